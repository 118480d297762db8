"""Protocols: how good features are. All are read from a frozen backbone in evaluation mode, in float32.

linear   logistic regression on a stage's features, its C chosen on the held-out part of train.
knn      weighted nearest neighbours by cosine.
residue  the linear probe, reading which of the proxy's views an image was given instead of its class.
rankme   effective rank, without labels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backbone as B
from .. import recipe
from ..images import Images
from ..loop import Context
from . import knn, linear, rankme

Stage = B.Stage


def evaluate(
    network: nn.Module,
    settings: recipe.Evaluate,
    train: Images,
    test: Images | None,
    residue: tuple[Callable[[Tensor], Tensor], ...],
    context: Context,
) -> list[dict[str, Any]]:
    """Measure a backbone.

    Args:
        network: a backbone without a head, on the device.
        settings: the recipe's protocols.
        train: the training split, which probes are fitted on and whose held-out part chooses their C.
        test: the split that is measured, beside the held-out part; None without one.
        residue: the proxy's views, whose number the residue's probe reads; empty for a proxy without.
        context: the run.

    Returns:
        On the main process, records with stage, protocol, settings, split, metric and value; elsewhere none.
    """
    stages = B.stage_list(network)

    def features(images: Images, indices: Tensor, view: Callable | None = None) -> dict[Stage, Tensor]:
        return B.extract(network, images, indices, context.accelerator, settings.batch_size, stages, view)

    fitted = train.sample(train.train, settings.images)
    parts = {"train": (train, fitted), "val": (train, train.val)}
    if test is not None and settings.test:
        parts["test"] = (test, test.all)
    found = {name: features(*part) for name, part in parts.items()}
    records = []
    if train.labels is not None:
        labels = {
            name: images.labels[indices] for name, (images, indices) in parts.items() if images.labels is not None
        }
        if context.main:
            records += class_records(found, labels, len(train.label_names), settings, context.accelerator.device)
    if len(residue) > 1:
        share = {
            "train": settings.residue_images,
            "val": settings.residue_images // 2,
            "test": settings.residue_images // 2,
        }
        turned = {
            name: [features(images, images.sample(indices, share[name]), view) for view in residue]
            for name, (images, indices) in parts.items()
        }
        if context.main:
            records += residue_records(turned, settings, context.accelerator.device)
    if context.main:
        for name in measured(found):
            for stage, rows in found[name].items():
                rank = rankme.rankme(rows)
                size = {"n": len(rows), "dimensions": rows.shape[1]}
                records.append(_record(stage, "rankme", size, name, "rank", rank))
    context.accelerator.wait_for_everyone()
    return records


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
        rows = {name: found[name][stage][labels[name] >= 0].to(device) for name in labels}
        known = {name: labels[name][labels[name] >= 0].to(device) for name in labels}
        if any(len(part) == 0 for part in known.values()):
            continue
        probe, c = linear.fit_best(rows["train"], known["train"], rows["val"], known["val"], classes, settings.linear_c)
        k = sorted({min(k, len(rows["train"])) for k in settings.knn_k})
        for name in measured(labels):
            fit = {"C": c, "n": len(rows["train"])}
            records.append(_record(stage, "linear", fit, name, "top1", probe.top1(rows[name], known[name])))
            predicted = knn.classify(rows["train"], known["train"], rows[name], classes, k, settings.knn_temperature)
            for neighbours, guess in predicted.items():
                vote = {"k": neighbours, "temperature": settings.knn_temperature, "n": len(rows["train"])}
                top1 = (guess == known[name]).cpu().double().mean().item()
                records.append(_record(stage, "knn", vote, name, "top1", top1))
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
