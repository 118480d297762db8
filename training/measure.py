"""What a run gained: the records of its backbones, measured once, by it or by another arm of its comparison."""

from pathlib import Path
from typing import Any

from . import backbone as B
from . import clusters, figures, longer, proxies, records
from .evaluate import Over, evaluate
from .files import read_json, sha256_file, sha256_json, write_json
from .images import Images
from .once import reads
from .recipe import READS, Recipe
from .setup import Run


def measure(this: Run, arm: str, folders: list[Path], comparison: Path | None = None) -> None:
    """Evaluate the backbone that the phases in `folders` made, without any the untrained one, unless that was done.

    Where an arm of the comparison is the same, its records are taken.
    """
    path, number = this.folder / "records.jsonl", max(0, len(folders) - 1)
    weights = sha256_file(folders[-1] / "model.safetensors") if folders else "untrained"
    made_by = ("evaluate", *(("proxy", "clusters", "relearn") if number else ("proxy",) * len(folders)))
    tests = [this.test.fingerprint if this.test and this.recipe.evaluate.test else None]
    others = [split for splits in this.transfer.values() for split in splits]
    tests += [classes_fingerprint(split) for split in (this.train, this.test, *others) if split]
    tests += [split.fingerprint for split in others if split]
    recipe_sha256 = sha256_json([weights, *tests, *(reads(this, phase) for phase in made_by)])
    known, told = written_records(this.folder, arm, number)
    if known and told == proof(recipe_sha256, known):
        return
    same = comparison and written_records(comparison / f"seed_{this.recipe.seed}" / arm, arm, number)
    lent = same[0] if same and same[1] == proof(recipe_sha256, same[0]) else []
    if not lent:
        again = told.get("recipe_sha256") == recipe_sha256
        again = " again: its records are not those that were written" if again else ""
        this.context.say(f"measuring {arm}" + (f", round {number}" if number else "") + again)
    this.accelerator.wait_for_everyone()  # every process has looked before the main one writes
    rows = lent or measured(this, arm, folders, {"recipe_sha256": recipe_sha256, "weights_sha256": weights})
    if this.main:
        ours = (recipe_sha256, told.get("recipe_sha256", recipe_sha256))
        # Also those that a damaged file has under another name.
        records.write(path, rows, lambda r: r in known or r.get("recipe_sha256") in ours)
        marker = this.folder / "measured.json"
        before = read_json(marker) if marker.exists() else {}
        write_json(marker, {**before, f"{arm} {number}": proof(recipe_sha256, rows)})
    this.accelerator.wait_for_everyone()


def written_records(folder: Path, arm: str, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """An arm's records of a round in a run's folder, and their proof, as measured.json has it."""
    known = [r for r in records.read(folder / "records.jsonl") if (r.get("arm"), r.get("round")) == (arm, number)]
    marker = folder / "measured.json"
    told = (read_json(marker) if marker.exists() else {}).get(f"{arm} {number}")
    return known, told if isinstance(told, dict) else {}


def proof(recipe_sha256: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells that records are those that were written, and what they were made from."""
    return {"recipe_sha256": recipe_sha256, "records": len(rows), "sha256": sha256_json(rows)}


def measured(this: Run, arm: str, folders: list[Path], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """The records of an arm, on the main process; elsewhere none."""
    number = max(0, len(folders) - 1)
    network = this.on_device(B.load(folders[-1]) if folders else this.untrained())
    recipe = this.recipe
    residue = proxies.residue(recipe.proxy) if recipe.by_proxy else ()
    over = Over((this.train, this.test), residue, recipe.relearn.views, this.transfer)
    found = evaluate(network, recipe.evaluate, over, this.context)
    if not this.main:
        return []
    markers = [folder / f"{name}.json" for folder in folders for name in READS]
    made = [read_json(marker, "budget") for marker in markers if marker.exists()]
    schedules = longer.schedules([(marker, f"{marker.stem}.epochs") for marker in markers if marker.exists()])
    costs = [marker["budget"] for marker in made]
    for solved in (marker["solved"] for marker in made if "solved" in marker):
        told = {"stage": "pooled", "protocol": "task", "settings": {"chance": solved["chance"]}, "split": "train"}
        found.append({**told, "metric": solved["metric"], "value": solved["value"]})
    if number:
        found += cluster_records(this, folders[-1])
        figures.contact_sheet(folders[-1] / "clusters.png", this.train, folders[-1] / "labels.parquet")
    chosen = chosen_stages(recipe, folders[-1]) if number else {}
    shared = {
        "arm": arm,
        "model": recipe.model.name,
        "task": recipe.proxy.name if recipe.by_proxy else None,
        "recipe_sha256": hashes["recipe_sha256"],
        "seed": recipe.seed,
        "phase": "relearn" if number else "proxy",
        "round": number,
    }
    cost = {
        "images_seen": round(sum(one["images"] for one in costs)),
        "flops": sum(one["flops"] for one in costs),
        "seconds": round(sum(one["seconds"] for one in costs), 1),
        "device": records.device_name(this.accelerator.device.type),
        "precision": recipe.precision,
        "weights_sha256": hashes["weights_sha256"],
        "versions": records.versions(),
        **({"schedules": schedules} if schedules else {}),
        **({"chosen": chosen} if chosen else {}),
    }
    source = recipe.data.called
    own = over.data(source, "train")
    rows = [{**shared, **row, "data": over.data(row.pop("of", source), row["split"]), **cost} for row in found]
    return [row if row["protocol"] != "transfer" else {**row, "trained_on": own} for row in rows]


def chosen_stages(recipe: Recipe, folder: Path) -> dict[str, int]:
    """The stages that a round's markers tell of, by the fields that left them to be chosen."""
    fields = {"clusters.stage": recipe.clusters.stage, "relearn.split": recipe.relearn.split}
    auto = [field.split(".") for field, value in fields.items() if value == "auto"]
    told = {f"{phase}.{name}": read_json(folder / f"{phase}.json").get(name) for phase, name in auto}
    return {field: stage for field, stage in told.items() if stage is not None}  # of true labels none is clustered


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
