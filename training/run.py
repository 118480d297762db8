"""A run: proxy, then rounds of clusters and relearning, then what was gained. What exists already is not done again."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import backbone as B
from . import clusters, export, figures, longer, proxies, records, report
from .evaluate.online import Online
from .extraction import extract
from .files import Failed, read_log, whole_folder
from .launch import StopSignals, seed_all
from .loop import steps_of, train
from .markers import written
from .measure import classes_fingerprint, measure
from .once import once, reads
from .recipe import Model, Recipe, Schedule
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
        comparison: folder of the comparison that this run is the result of, for its card and what is measured there.

    Returns:
        The run folder.
    """
    this = prepare(recipe, stop, arm, shared, read)
    folders = [phase_proxy(this)]
    if shared is None:
        measure(this, "proxy_short", folders, comparison)
    for number in range(1, this.recipe.relearn.rounds + 1):
        phase_clusters(this, folders[-1], number)
        folders.append(phase_relearn(this, folders[-1], number))
        if shared is None:
            measure(this, arm, folders)
    if shared is None:
        measure(this, "random", [], comparison)
        finish(this, folders, comparison)
    else:
        # The untrained network is measured as it is for a run by itself, which takes these records then.
        trained = this.recipe.proxy.epochs or this.recipe.model.pretrained or len(folders) > 1
        measure(this, arm, folders if trained else [])
    this.close()
    return this.folder


def phase_proxy(this: Run) -> Path:
    """Phase 1: proxy/, a backbone trained on the proxy task."""
    folder, settings, key = this.folder / "proxy", this.recipe.proxy, this.key("proxy")
    marker = folder / "proxy.json"
    read = longer.going_on(marker, {**reads(this, "proxy"), **weights(this.recipe.model)}, "proxy.epochs")

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
            train(task, this.train, indices, settings, key, this.context, read, 0, None, look, done)
            network, solved = task.result(), how_well(this, task)
        elif not this.recipe.model.pretrained:
            network = this.untrained()
        keep(this, network, folder)
        return solved

    once(this, marker, read, learn)
    return folder


def weights(model: Model) -> dict[str, Any]:
    """sha256 of what a folder has to start from, which may change under its name; a name that timm knows is enough."""
    scheme, _, folder = model.name.rpartition(":")
    if not model.pretrained or scheme != "local-dir":
        return {}
    return {"weights": written(Path(folder), [name for name in B.FILES if (Path(folder) / name).is_file()])}


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
            read,
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


def keep(this: Run, network: nn.Module, folder: Path) -> None:
    """Write a phase's backbone into its folder, whole or not at all."""
    if this.main:
        with whole_folder(folder / ".backbone") as beside:
            B.save(network, beside, this.train, tag=this.recipe.proxy.name)
        for file in (folder / ".backbone").iterdir():
            file.replace(folder / file.name)
        (folder / ".backbone").rmdir()
    this.accelerator.wait_for_everyone()


def watch(this: Run, schedule: Schedule, task: ViewTask, count: int) -> Callable[[int, int], dict[str, float]]:
    """What looks at a phase's features every few epochs of `count` images."""
    online = Online(this.recipe.evaluate, schedule, this.train, count, this.recipe.relearn.views, this.context)
    return lambda step, total: online(task.result(), step)


def finish(this: Run, folders: list[Path], comparison: Path | None) -> None:
    """report.md with its figures, and hub/."""
    if len(folders) > 1:
        arm, start, before = this.arm, "what relearning started from", this.on_device(B.load(folders[0]))
    else:
        arm, start, before = "proxy_short", "the untrained network", this.untrained()
    sides = {start: before, arm: this.on_device(B.load(folders[-1]))}
    most, batch = this.recipe.evaluate.images, this.recipe.evaluate.batch_size
    shown = torch.cat([this.train.sample(indices, most) for indices in (this.train.train, this.train.val)])
    found = {
        name: extract(network, this.train, shown, this.accelerator, batch)["pooled"] for name, network in sides.items()
    }
    if this.main:
        # Of more rounds that were asked for once, the figures are not those of what is exported.
        rows = [r for r in records.read(this.folder / "records.jsonl") if r.get("round", 0) < len(folders)]
        if not any(row.get("arm") == arm for row in rows):
            raise Failed(f"{this.folder / 'records.jsonl'} has lost its records of {arm}; the same command makes them.")
        report.draw(this.folder, rows, arm, folders[-1])
        figures.neighbours(this.folder / "report" / "neighbours.png", found, this.train, shown)
        export.export(this.folder, folders, this.train, rows, this.recipe, arm, comparison)
        text = report.write(this.folder, rows, this.recipe, arm, folders[-1])
        if comparison is None:  # which ends in a verdict of its own
            this.context.say(text)
    this.accelerator.wait_for_everyone()
