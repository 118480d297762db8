"""A run: proxy, then rounds of clusters and relearning, then what was gained. What exists already is not done again."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import backbone as B
from . import clusters, export, figures, longer, proxies, records, report
from .evaluate import Over, evaluate
from .evaluate.online import Online
from .extraction import extract
from .files import (
    Failed,
    check_written,
    read_json,
    read_log,
    refuse_other,
    sha256_file,
    sha256_json,
    whole_file,
    whole_folder,
    write_json,
    written,
)
from .images import Images
from .launch import StopSignals, seed_all
from .loop import steps_of, train
from .recipe import READS, Recipe, Schedule, phase_fields
from .relearn import relearn
from .setup import Read, Run, prepare
from .task import ViewTask


def run(
    recipe: Recipe,
    stop: StopSignals,
    read: Read | None = None,
    arm: str = "sslpp",
    shared: Path | None = None,
    comparison: Path | None = None,
) -> Path:
    """Do everything of a recipe that is not done yet.

    By itself, a run is measured after each phase, the untrained network last, and has a report and hub/. An arm of a
    comparison, which has `shared`, is measured at its end alone.

    Args:
        recipe: what to do.
        stop: requests to end.
        read: the images, where they are read already.
        arm: what the result is called in records.
        shared: where phases lie that arms of a comparison have in common.
        comparison: folder of the comparison that this run is the result of, for its card.

    Returns:
        The run folder.
    """
    this = prepare(recipe, stop, arm, shared, read)
    folders = [phase_proxy(this)]
    if shared is None:
        measure(this, "proxy_short", folders)
    for number in range(1, this.recipe.relearn.rounds + 1):
        phase_clusters(this, folders[-1], number)
        folders.append(phase_relearn(this, folders[-1], number))
        if shared is None:
            measure(this, arm, folders)
    if shared is None:
        measure(this, "random", [])
        finish(this, folders, comparison)
    else:
        measure(this, arm, folders)
    this.close()
    return this.folder


# What is done once

MAKES = {"proxy": B.FILES, "clusters": ("labels.parquet", "clusters.safetensors"), "relearn": B.FILES}


def reads(this: Run, phase: str, **inputs: Path) -> dict[str, Any]:
    """What the result of a phase depends on: fields of the recipe, the images, and files of phases before it."""
    files = {name: sha256_file(path) for name, path in inputs.items()}
    return {**phase_fields(this.recipe, phase), "images": this.train.fingerprint, "white": this.train.white, **files}


def once(this: Run, marker: Path, read: dict[str, Any], do: Callable[[], dict[str, Any] | None]) -> None:
    """Do a phase, unless it was done before from the same fields and inputs, here or by another arm.

    Args:
        this: the run.
        marker: written last; says what the phase read, what it wrote and cost, and what `do` tells.
        read: what the result depends on.
        do: the phase.

    Raises:
        Refused: it was done from other fields or inputs.
        Failed: what it wrote is no longer there as it was.
    """
    lent, more = lending(this, marker, read), longer.asked(marker, read)
    if more:
        done, epochs = read["earlier"][-1][0], read[f"{marker.stem}.epochs"]
        this.context.say(f"{marker.parent}: goes on from {done:g} epochs to {epochs:g}, by a schedule of its own")
    ours = marker.exists() and not more
    theirs = not ours and lent is not None and (lent / marker.name).exists()
    this.accelerator.wait_for_everyone()  # every process has looked before the main one writes
    if theirs and this.main:
        check_written(lent / marker.name)
        marker.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(lent.iterdir(), key=lambda file: file.name == marker.name):
            with whole_file(marker.parent / file.name) as beside:
                shutil.copy(file, beside)
    this.accelerator.wait_for_everyone()
    if ours or theirs:
        refuse_other(marker, read)
        check_written(marker)
        return
    this.context.budget = {"images": 0.0, "flops": 0.0, "seconds": 0.0}
    told = do() or {}
    if this.main:
        device = records.device_name(this.accelerator.device.type)
        made = written(marker.parent, [name for name in MAKES[marker.stem] if (marker.parent / name).exists()])
        write_json(marker, {"read": read, "wrote": made, "budget": this.context.budget, "device": device, **told})
        if lent:
            with whole_folder(lent) as beside:
                for file in marker.parent.iterdir():
                    shutil.copy(file, beside)
    this.accelerator.wait_for_everyone()


def lending(this: Run, marker: Path, read: dict[str, Any]) -> Path | None:
    """Where a phase's result lies for other arms; phase 3 is each arm's own."""
    if this.shared is None or marker.stem == "relearn":
        return None
    return this.shared / f"{marker.stem}_{sha256_json(read)[:12]}"


def keep(this: Run, network: nn.Module, folder: Path) -> None:
    """Write a phase's backbone into its folder, whole or not at all."""
    if this.main:
        with whole_folder(folder / ".backbone") as beside:
            B.save(network, beside, this.train, tag=this.recipe.proxy.name)
        for file in (folder / ".backbone").iterdir():
            file.replace(folder / file.name)
        (folder / ".backbone").rmdir()
    this.accelerator.wait_for_everyone()


# The phases


def phase_proxy(this: Run) -> Path:
    """Phase 1: proxy/, a backbone trained on the proxy task."""
    folder, settings, key = this.folder / "proxy", this.recipe.proxy, this.key("proxy")
    marker = folder / "proxy.json"
    read = longer.going_on(marker, reads(this, "proxy"), "proxy.epochs")

    def steps(epochs: float) -> int:
        return steps_of(dataclasses.replace(settings, epochs=epochs), len(this.train.train), "proxy.")[1]

    def learn() -> dict[str, Any]:
        seed_all(key.number("weights"))
        network = B.create(this.recipe.model, this.recipe.data.size)
        solved = {}
        if settings.epochs:
            task = proxies.build(settings, network, this.train)
            look, indices = watch(this, settings, task, len(this.train.train)), this.train.train
            done = longer.last_of(read.get("earlier", ()), steps)
            train(task, this.train, indices, settings, key, this.context, sha256_json(read), 0, None, look, done)
            network, solved = task.result(), how_well(this, task)
        elif not this.recipe.model.pretrained:
            network = this.untrained()
        keep(this, network, folder)
        return solved

    once(this, marker, read, learn)
    return folder


def how_well(this: Run, task: proxies.Proxy) -> dict[str, Any]:
    """A proxy task's own metric, its mean over what the log has of the last tenth of the steps, and that of chance."""
    rows = [r for r in read_log(this.folder / "metrics.jsonl") if r["phase"] == "proxy" and task.metric in r]
    newest = [r[task.metric] for r in rows if r["step"] > 0.9 * rows[-1]["step"]]
    if not newest:
        return {}
    return {"solved": {"metric": task.metric, "value": sum(newest) / len(newest), "chance": task.chance}}


def phase_clusters(this: Run, source: Path, number: int) -> None:
    """Phase 2: labels.parquet in round_N/, from the features of the backbone in `source`."""
    folder, settings = this.folder / f"round_{number}", this.recipe.clusters
    over = clusters.averaging(this.recipe, number)
    read = {**reads(this, "clusters", backbone=source / "model.safetensors"), "views": over}
    if settings.source == "labels":
        read["labels"] = classes_fingerprint(this.train)

    def cluster() -> dict[str, Any]:
        began = time.perf_counter()
        folder.mkdir(exist_ok=True)
        if settings.source == "labels":
            clusters.from_classes(this.train, this.context, folder)
            return {}
        network = this.untrained() if settings.source == "random" else this.on_device(B.load(source))
        stage = resolved(this, network, settings.stage, "clusters.stage")
        views, key = clusters.views_of(this.recipe, number), this.key("clusters", number)
        told = clusters.cluster(
            network,
            this.train,
            dataclasses.replace(settings, stage=stage),
            views,
            key,
            this.context,
            this.recipe.evaluate.batch_size,
            folder,
            this.room,
        )
        this.context.spend(0, 0, time.perf_counter() - began)
        return {"stage": stage, "clusterings": told}

    once(this, folder / "clusters.json", read, cluster)


def phase_relearn(this: Run, source: Path, number: int) -> Path:
    """Phase 3: the backbone of round_N/, its high part learned from that round's pseudo-labels."""
    folder, settings = this.folder / f"round_{number}", this.recipe.relearn
    read = reads(this, "relearn", backbone=source / "model.safetensors", labels=folder / "labels.parquet")
    read = longer.going_on(folder / "relearn.json", read, "relearn.epochs")

    def learn() -> dict[str, Any]:
        before = this.on_device(B.load(source))
        split = resolved(this, before, settings.split, "relearn.split", below=1)
        network = relearn(
            before,
            this.recipe.model,
            dataclasses.replace(settings, split=split),
            *clusters.read_labels(folder / "labels.parquet", settings.drop),
            this.train,
            this.key("relearn", number),
            this.context,
            sha256_json(read),
            lambda task, count: watch(this, settings, task, count),
            read.get("earlier", ()),
        )
        keep(this, network, folder)
        return {"split": split}

    once(this, folder / "relearn.json", read, learn)
    return folder


def resolved(this: Run, network: nn.Module, stage: int | str, field: str, below: int = 0) -> int:
    """A stage of a field as its index; auto is the leading one, at most the last but `below`."""
    if stage != "auto":
        return B.resolve_stage(network, stage, field)
    found = clusters.leading_stage(network, this.train, this.context, this.recipe.evaluate.batch_size)
    found = min(found, len(B.stage_list(network)) - 1 - below)
    this.context.say(f"{field}: stage {found} was chosen")
    return found


def watch(this: Run, schedule: Schedule, task: ViewTask, count: int) -> Callable[[int, int], dict[str, float]]:
    """What looks at a phase's features every few epochs of `count` images."""
    online = Online(this.recipe.evaluate, schedule, this.train, count, this.recipe.relearn.views, this.context)
    return lambda step, total: online(task.result(), step)


# What was gained


def measure(this: Run, arm: str, folders: list[Path]) -> None:
    """Evaluate the backbone that the phases in `folders` made, without any the untrained one, unless that was done."""
    path, number = this.folder / "records.jsonl", max(0, len(folders) - 1)
    weights = sha256_file(folders[-1] / "model.safetensors") if folders else "untrained"
    made_by = ("evaluate", *(("proxy", "clusters", "relearn") if number else ("proxy",) * len(folders)))
    tests = [this.test.fingerprint if this.test and this.recipe.evaluate.test else None]
    others = [split for splits in this.transfer.values() for split in splits]
    tests += [classes_fingerprint(split) for split in (this.train, this.test, *others) if split]
    tests += [split.fingerprint for split in others if split]
    recipe_sha256 = sha256_json([weights, *tests, *(reads(this, phase) for phase in made_by)])
    known = [r for r in records.read(path) if (r.get("arm"), r.get("round")) == (arm, number)]
    marker, name = this.folder / "measured.json", f"{arm} {number}"
    before = read_json(marker) if marker.exists() else {}
    told = before[name] if isinstance(before.get(name), dict) else {}
    ours = (recipe_sha256, told.get("recipe_sha256", recipe_sha256))
    if known and told == {"recipe_sha256": recipe_sha256, "records": len(known), "sha256": sha256_json(known)}:
        return
    again = " again: its records are not those that were written" if told.get("recipe_sha256") == recipe_sha256 else ""
    this.context.say(f"measuring {arm}" + (f", round {number}" if number else "") + again)
    this.accelerator.wait_for_everyone()  # every process has looked before the main one writes
    network = this.on_device(B.load(folders[-1]) if folders else this.untrained())
    recipe = this.recipe
    # Weights from elsewhere were made by no proxy task that we know of.
    residue = () if recipe.model.pretrained and not recipe.proxy.epochs else proxies.residue(recipe.proxy)
    over = Over((this.train, this.test), residue, recipe.relearn.views, this.transfer)
    found = evaluate(network, recipe.evaluate, over, this.context)
    if this.main:
        markers = [folder / f"{name}.json" for folder in folders for name in READS]
        made = [read_json(marker, "budget") for marker in markers if marker.exists()]
        schedules = longer.schedules([(marker, f"{marker.stem}.epochs") for marker in markers if marker.exists()])
        costs = [marker["budget"] for marker in made]
        for solved in (marker["solved"] for marker in made if "solved" in marker):
            told = {"stage": "pooled", "protocol": "task", "settings": {"chance": solved["chance"]}, "split": "train"}
            found.append({**told, "metric": solved["metric"], "value": solved["value"]})
        shared = {
            "arm": arm,
            "model": this.recipe.model.name,
            "task": this.recipe.proxy.name,
            "recipe_sha256": recipe_sha256,
            "seed": this.recipe.seed,
            "phase": "relearn" if number else "proxy",
            "round": number,
        }
        cost = {
            "images_seen": round(sum(one["images"] for one in costs)),
            "flops": sum(one["flops"] for one in costs),
            "seconds": round(sum(one["seconds"] for one in costs), 1),
            "device": records.device_name(this.accelerator.device.type),
            "precision": this.recipe.precision,
            "weights_sha256": weights,
            "versions": records.versions(),
            **({"schedules": schedules} if schedules else {}),
        }
        source = this.recipe.data.called
        if number:
            found += cluster_records(this, folders[-1])
            figures.contact_sheet(folders[-1] / "clusters.png", this.train, folders[-1] / "labels.parquet")
        own = over.data(source, "train")
        rows = [{**shared, **row, "data": over.data(row.pop("of", source), row["split"]), **cost} for row in found]
        rows = [row if row["protocol"] != "transfer" else {**row, "trained_on": own} for row in rows]
        # Also those that a damaged file has under another name.
        records.write(path, rows, lambda r: r in known or r.get("recipe_sha256") in ours)
        told = {"recipe_sha256": recipe_sha256, "records": len(rows), "sha256": sha256_json(rows)}
        write_json(marker, {**before, name: told})
    this.accelerator.wait_for_everyone()


def classes_fingerprint(images: Images) -> str:
    """sha256 of the true labels: who uses them notices when they change."""
    return B.fingerprint({} if images.labels is None else {" ".join(images.label_names): images.labels})


def cluster_records(this: Run, folder: Path) -> list[dict[str, Any]]:
    """How stable a round's pseudo-labels are, and how close to the classes, as records of the training images."""
    marker = read_json(folder / "clusters.json")
    told, stage = marker.get("clusterings", {}), marker.get("stage")
    for k, values in clusters.against_classes(folder / "labels.parquet", this.train).items():
        told.get(k, {}).update(values)
    shared = {"stage": stage, "protocol": "clusters", "split": "train"}
    return [
        {**shared, "settings": {"k": int(k)}, "metric": metric, "value": values[metric]}
        for k, values in told.items()
        for metric in clusters.METRICS
        if metric in values
    ]


def finish(this: Run, folders: list[Path], comparison: Path | None) -> None:
    """report.md with its figures, and hub/."""
    arm = this.arm if this.recipe.relearn.rounds else "proxy_short"
    sides = {"what relearning started from": folders[0], arm: folders[-1]}
    most = this.recipe.evaluate.images
    shown = torch.cat([this.train.sample(indices, most) for indices in (this.train.train, this.train.val)])
    found = {
        name: extract(
            this.on_device(B.load(folder)), this.train, shown, this.accelerator, this.recipe.evaluate.batch_size
        )["pooled"]
        for name, folder in sides.items()
    }
    if this.main:
        rows = records.read(this.folder / "records.jsonl")
        if not any(row.get("arm") == arm for row in rows):
            raise Failed(f"{this.folder / 'records.jsonl'} has lost its records of {arm}; the same command makes them.")
        report.draw(this.folder, rows, arm, folders[-1])
        figures.neighbours(this.folder / "report" / "neighbours.png", found, this.train, shown)
        export.export(this.folder, folders, this.train, rows, this.recipe, arm, comparison)
        text = report.write(this.folder, rows, this.recipe, arm, folders[-1])
        if comparison is None:  # which ends in a verdict of its own
            this.context.say(text)
    this.accelerator.wait_for_everyone()
