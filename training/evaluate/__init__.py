"""Protocols: how good features are. All are read from a frozen backbone in evaluation mode, in float32.

linear      logistic regression on a stage's features, its C chosen on the held-out part of train.
knn         weighted nearest neighbours by cosine.
lowshot     the linear probe on pooled features of few images of each class.
transfer    linear and knn on another data set.
residue     the linear probe, reading which of the proxy's views an image was given instead of its class.
rankme      effective rank, without labels; label_free, what else needs none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import backbone as B
from .. import recipe
from ..extraction import Stage, extract
from ..images import Images
from ..loop import Context
from . import knn, label_free, linear, lowshot, rankme

Splits = tuple[Images, Images | None]
UNEQUAL = 1.5  # a class as many times as large as another: balanced accuracy is told beside top-1


@dataclass
class Over:
    """What a backbone is measured over.

    Attributes:
        splits: the training split, which probes are fitted on and whose held-out part chooses their C; and the split
            that is measured, None without one.
        residue: the proxy's views, whose number the residue's probe reads; empty for a proxy without.
        views: strong views, which scores without labels are of.
        transfer: other data sets by name, their splits as the network is to see them.
    """

    splits: Splits
    residue: tuple[Callable[[Tensor], Tensor], ...]
    views: recipe.Views = field(default_factory=recipe.Views)
    transfer: dict[str, Splits] = field(default_factory=dict)

    def data(self, name: str, split: str) -> str:
        """What records call the data that a figure is of, given its name."""
        train, test = self.transfer.get(name, self.splits)
        return f"{name}@{(test if split == 'test' else train).fingerprint[:16]}"


def evaluate(network: nn.Module, settings: recipe.Evaluate, over: Over, context: Context) -> list[dict[str, Any]]:
    """Measure a backbone.

    Args:
        network: a backbone without a head, on the device.
        settings: the recipe's protocols.
        over: the images.
        context: the run.

    Returns:
        On the main process, records with stage, protocol, settings, split, metric and value, and for transfer the name
        of the data; elsewhere none.
    """
    stages, device = B.stage_list(network), context.accelerator.device
    train, twin = over.splits[0], None

    def features(
        images: Images, indices: Tensor, view: Callable | None = None, random: Any = None
    ) -> dict[Stage, Tensor]:
        rows = extract(network, images, indices, context.accelerator, settings.batch_size, stages, view, random)
        return {stage: value for stage, value in rows.items() if stage != "pooled" or twin is None}

    parts = parts_of(over.splits, settings)
    found = {name: features(*part) for name, part in parts.items()}
    records, twin = [], twin_of_pooled(found)
    if twin is not None:
        for rows in found.values():
            del rows["pooled"]
    if train.labels is not None:
        labels = labels_of(parts)
        if context.main:
            classes = len(train.label_names)
            records += class_records(found, labels, classes, settings, device)
            few = {name: rows["pooled" if twin is None else twin] for name, rows in found.items()}
            records += lowshot_records(few, labels, classes, settings, train.split_seed, device)
    for name, splits in over.transfer.items():
        other = parts_of(splits, settings)
        rows = {split: features(*part) for split, part in other.items()}
        if context.main:
            classes = len(splits[0].label_names)
            own = class_records(rows, labels_of(other), classes, settings, device)
            records += [
                {**row, "protocol": "transfer", "settings": {"probe": row["protocol"], **row["settings"]}, "of": name}
                for row in own
            ]
    if len(over.residue) > 1:
        half = max(1, settings.residue_images // 2)
        share = {"train": settings.residue_images, "val": half, "test": half}
        turned = {}
        for name, (images, indices) in parts.items():
            some = images.sample(indices, share[name])
            plain = taken(found[name], indices, some)  # the first view changes nothing
            turned[name] = [plain, *(features(images, some, view) for view in over.residue[1:])]
        if context.main:
            records += residue_records(turned, settings, device)
    held = parts["val"][1]
    some = train.sample(held, label_free.IMAGES)
    two = (features(train, some, random=(over.views, seed)) for seed in (1, 2)) if len(some) > 1 else ()
    three = [taken(found["val"], held, some), *two]
    if context.main:
        for name in measured(found):
            for stage, rows in found[name].items():
                size = {"n": len(rows), "dimensions": rows.shape[1]}
                records.append(_record(stage, "rankme", size, name, "rank", rankme.rankme(rows)))
        for stage in three[0] if len(some) > 1 else ():  # of one image alone nothing can be told
            for metric, told, value in label_free.scores(*(rows[stage] for rows in three)):
                records.append(_record(stage, "label_free", told, "val", metric, value) | {"count": len(some)})
    context.accelerator.wait_for_everyone()
    return records + [{**row, "stage": "pooled"} for row in records if row["stage"] == twin]


def twin_of_pooled(found: dict[str, dict[Stage, Tensor]]) -> int | None:
    """The stage whose features are the pooled ones, so that nothing need be measured twice; None if there is none."""
    rows = found["val"]
    last = max(stage for stage in rows if stage != "pooled")
    pooled, own = rows["pooled"], rows[last]
    return last if pooled.shape == own.shape and torch.allclose(pooled, own, rtol=1e-4, atol=1e-5) else None


def taken(rows: dict[Stage, Tensor], indices: Tensor, some: Tensor) -> dict[Stage, Tensor]:
    """Features of some of the images whose indices, [n] in order, the rows are of."""
    place = torch.searchsorted(indices, some)
    return {stage: values[place] for stage, values in rows.items()}


def parts_of(splits: Splits, settings: recipe.Evaluate) -> dict[str, tuple[Images, Tensor]]:
    """The images that probes are fitted on, "train", and those that are measured, "val" and "test"."""
    train, test = splits
    parts = {
        "train": (train, train.sample(train.train, settings.images)),
        "val": (train, train.sample(train.val, settings.images)),
    }
    if test is not None and settings.test:
        parts["test"] = (test, test.all)
    return parts


def labels_of(parts: dict[str, tuple[Images, Tensor]]) -> dict[str, Tensor]:
    """The labels of parts that have any."""
    return {name: images.labels[indices] for name, (images, indices) in parts.items() if images.labels is not None}


def unprobed(splits: Splits, settings: recipe.Evaluate) -> str | None:
    """Why nothing that needs classes is measured; None where it is."""
    if splits[0].labels is None:
        return "there are no labels of two classes or more"
    called = {"train": "training", "val": "held-out", "test": "test"}
    for name, (images, indices) in parts_of(splits, settings).items():
        if images.labels is not None and not len(images.labelled(indices)):
            return f"none of {len(indices)} {called[name]} images has a label"
    return None


def measured(parts: dict[str, Any]) -> list[str]:
    """The parts that figures are of, in one order."""
    return [name for name in parts if name != "train"]


def _record(stage: Stage, protocol: str, settings: dict, split: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "protocol": protocol,
        "settings": settings,
        "split": split,
        "metric": metric,
        "value": value,
    }


def accuracies(guess: Tensor, truth: Tensor, balanced: bool) -> dict[str, float]:
    """Share of right answers, "top1"; also "balanced", its mean over classes, if that is asked for."""
    right, truth = (guess == truth).cpu().double(), truth.cpu()
    told = {"top1": right.mean().item()}
    if balanced:
        counts = torch.bincount(truth)
        hits = torch.bincount(truth, weights=right, minlength=len(counts))
        told["balanced"] = (hits[counts > 0] / counts[counts > 0]).mean().item()
    return told


def by_chance(truth: Tensor) -> dict[str, float]:
    """The same of the best guess that looks at no image: always the commonest class."""
    counts = torch.bincount(truth.cpu())
    shares = {"top1": counts.max() / len(truth), "balanced": 1 / (counts > 0).sum()}
    return {metric: round(share.item(), 4) for metric, share in shares.items()}


def unequal(labels: Tensor) -> bool:
    """Whether one class has much more training images than another, so that top-1 alone would mislead."""
    counts = torch.bincount(labels.cpu())
    return bool(counts.max() > UNEQUAL * counts[counts > 0].min())


def known_rows(
    found: dict[str, dict[Stage, Tensor]], labels: dict[str, Tensor], stage: Stage, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """A stage's features and labels of the images that have one, by part; None if a part has none."""
    rows = {name: found[name][stage][labels[name] >= 0].to(device) for name in labels}
    known = {name: labels[name][labels[name] >= 0].to(device) for name in labels}
    return None if any(len(part) == 0 for part in known.values()) else (rows, known)


def class_records(
    found: dict[str, dict[Stage, Tensor]],
    labels: dict[str, Tensor],
    classes: int,
    settings: recipe.Evaluate,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Linear and nearest-neighbour accuracy of every stage; images without a label do not count."""
    records = []
    for stage in found["train"]:
        told = known_rows(found, labels, stage, device)
        if told is None:
            continue
        rows, known = told
        probe, c = linear.fit_best(rows["train"], known["train"], rows["val"], known["val"], classes, settings.linear_c)
        balanced = unequal(known["train"])
        k = sorted({min(k, len(rows["train"])) for k in settings.knn_k})
        for name in measured(labels):
            fit, guessed = {"C": c, "n": len(rows["train"])}, by_chance(known[name])
            for metric, value in accuracies(probe(rows[name]).argmax(1), known[name], balanced).items():
                told = {**fit, "chance": guessed[metric]}
                records.append(_record(stage, "linear", told, name, metric, value) | {"count": len(known[name])})
            predicted = knn.classify(rows["train"], known["train"], rows[name], classes, k, settings.knn_temperature)
            for neighbours, guess in predicted.items():
                vote = {"k": neighbours, "temperature": settings.knn_temperature, "n": len(rows["train"])}
                for metric, value in accuracies(guess, known[name], balanced).items():
                    told = {**vote, "chance": guessed[metric]}
                    records.append(_record(stage, "knn", told, name, metric, value) | {"count": len(known[name])})
    return records


def lowshot_records(
    pooled: dict[str, Tensor],
    labels: dict[str, Tensor],
    classes: int,
    settings: recipe.Evaluate,
    seed: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Mean and standard deviation over draws of the probe on few images of each class, of the pooled features."""
    told = known_rows({name: {"pooled": rows} for name, rows in pooled.items()}, labels, "pooled", device)
    records = []
    for shots in settings.shots if told else ():
        rows, known = told
        guesses, c = lowshot.lowshot(rows, known, classes, shots, settings.linear_c, seed)
        for name, draws in guesses.items():
            each = [accuracies(guess, known[name], unequal(known["train"])) for guess in draws]
            for metric in each[0]:
                values = torch.tensor([one[metric] for one in each], dtype=torch.float64)
                fit = {"shots": shots, "draws": len(draws), "C": c, "chance": by_chance(known[name])[metric]}
                record = _record("pooled", "lowshot", fit, name, metric, values.mean().item())
                records.append({**record, "deviation": values.std().item()})
    return records


def residue_records(
    turned: dict[str, list[dict[Stage, Tensor]]], settings: recipe.Evaluate, device: torch.device
) -> list[dict[str, Any]]:
    """How well a linear probe on every stage still tells the proxy's views apart; chance is 1 / views."""
    records, views = [], len(turned["train"])
    for stage in turned["train"][0]:
        rows = {name: torch.cat([view[stage] for view in parts]).to(device) for name, parts in turned.items()}
        labels = {
            name: torch.arange(views, device=device).repeat_interleave(len(parts[0][stage]))
            for name, parts in turned.items()
        }
        probe, c = linear.fit_best(rows["train"], labels["train"], rows["val"], labels["val"], views, settings.linear_c)
        for name in measured(turned):
            fit = {"C": c, "n": len(rows["train"]), "views": views}
            records.append(_record(stage, "residue", fit, name, "top1", probe.top1(rows[name], labels[name])))
    return records
