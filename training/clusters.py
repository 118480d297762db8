"""Phase 2: features of one stage to pseudo-labels.

Features are averaged over the proxy's nuisance views, so that what the proxy is covariant with drops out, whitened by
PCA, brought to unit length, and clustered for each k. A relearned network has not seen the nuisance views for long: its
features are averaged over the kind of views that it was relearned on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from . import backbone as B
from . import proxies, recipe
from .files import Refused, whole_file
from .images import Images
from .kmeans import assign, kmeans
from .launch import Key
from .loop import Context
from .operations import forward_flops
from .views import FAMILIAR, View

METRICS = ("agreement_of_seeds", "agreement_of_views", "nmi", "purity", "inertia")  # of a clustering, as records tell


@dataclass
class Whitening:
    """x to (x - mean) @ projection, at unit length."""

    mean: Tensor
    projection: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize((features - self.mean) @ self.projection, dim=1)


def fit_whitening(features: Tensor, dimensions: int, power: float = 1.0) -> Whitening:
    """PCA whitening of [n, D] features to at most `dimensions`; 0 leaves them as they are, but for their length.

    Each direction is divided by its standard deviation to the `power`: 1 makes all variances equal, 0 leaves them.
    Directions of less than a millionth of the largest variance are noise of the arithmetic and are dropped.
    """
    width = features.shape[1]
    if dimensions == 0:
        return Whitening(torch.zeros(width), torch.eye(width))
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / max(1, len(features) - 1)
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0), vectors.flip(1)
    kept = (values > 1e-6 * values[0].clamp(min=1e-30))[:dimensions].sum().clamp(min=1)
    vectors = vectors[:, :kept]
    vectors = (
        vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    )  # a sign that is always the same
    return Whitening(mean, (vectors / values[:kept].clamp(min=1e-30) ** (power / 2)).float())


def purity(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of images whose class is the commonest of their cluster."""
    table = np.zeros((labels.max() + 1, classes.max() + 1), np.int64)
    np.add.at(table, (labels, classes), 1)
    return float(table.max(1).sum() / len(labels))


def nmi(one: np.ndarray, other: np.ndarray) -> float:
    """Normalised mutual information of two clusterings, arithmetic mean in the denominator."""
    return float(normalized_mutual_info_score(one, other))


def averaging(recipe: recipe.Recipe, number: int) -> str:
    """Over which views a round's features are averaged: "nuisance", "familiar" or "none"."""
    if recipe.clusters.average != "auto":
        return recipe.clusters.average
    by_proxy = recipe.proxy.epochs > 0 or not recipe.model.pretrained
    covariant = bool(proxies.nuisance(recipe.proxy))
    return "nuisance" if by_proxy and covariant and number == 1 else "familiar"


def views_of(recipe: recipe.Recipe, number: int) -> tuple[View, ...]:
    """The views that a round's features are averaged over, the first of which changes nothing."""
    return views_called(averaging(recipe, number), recipe.proxy)


def views_called(averaging: str, proxy: recipe.Proxy) -> tuple[View, ...]:
    """The views of an averaging: "nuisance", which is "none" for a task that is covariant with nothing, and so on."""
    return {"nuisance": proxies.nuisance(proxy), "familiar": FAMILIAR, "none": ()}[averaging] or FAMILIAR[:1]


def averaged(
    network: nn.Module, images: Images, stage: int, views: tuple[View, ...], context: Context, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, D] of every usable image: averaged over the views, of the first view, and of the last."""
    total = first = last = None
    for view in views:
        found = B.extract(network, images, images.all, context.accelerator, batch_size, [stage], view)[stage]
        total = found if total is None else total + found
        first, last = found if first is None else first, found
    return total / len(views), first, last


def cluster(
    network: nn.Module,
    images: Images,
    settings: recipe.Clusters,
    views: tuple[View, ...],
    key: Key,
    context: Context,
    batch_size: int,
    folder: Path,
) -> dict[str, Any]:
    """Make pseudo-labels of every usable image and write them to `folder`.

    Centroids are fitted on the training images; those held out are only assigned.

    Args:
        network: whose features are clustered, on the device.
        images: the training split.
        settings: the recipe's phase 2.
        views: that features are averaged over; agreement_of_views compares the first with the last.
        key: seeds k-means.
        context: the run.
        batch_size: images of a forward pass.
        folder: an existing folder of the main process; gets labels.parquet and clusters.safetensors.

    Returns:
        For each k, what clusters.json tells.
    """
    accelerator, usable = context.accelerator, images.all
    stage = B.resolve_stage(network, settings.stage, "clusters.stage")
    flops = forward_flops(network, images.size)
    mean, first, last = averaged(network, images, stage, views, context, batch_size)
    # A forward pass counts a third of a training step's view (a backward pass costs about two forward ones).
    context.spend(len(usable) * len(views) / 3, len(usable) * len(views) * flops, 0.0)
    train = ~images.held_out[usable]
    whitening = fit_whitening(mean[train], settings.whiten, settings.whiten_power)
    rows, first, last = whitening(mean), whitening(first), whitening(last)
    # In order, so that the seeding draws the same rows whatever the number of processes.
    mine = rows[train].tensor_split(accelerator.num_processes)[accelerator.process_index].to(accelerator.device)
    tensors = {"mean": whitening.mean, "projection": whitening.projection}
    columns: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}
    for k in settings.k:
        runs = kmeans(mine, k, key.number("kmeans", k), settings.iterations, accelerator, settings.restarts)
        best, second = (run.centroids.cpu() for run in runs[:2])
        labels, distances = (x.numpy() for x in assign(rows, best))
        tensors[f"centroids_{k}"] = best
        columns[f"label_{k}"], columns[f"distance_{k}"] = labels, distances
        chosen = train.numpy()
        report[str(k)] = {
            "inertia": runs[0].inertia,
            "iterations": runs[0].iterations,
            "repaired": runs[0].repaired,
            "agreement_of_seeds": nmi(labels[chosen], assign(rows[train], second)[0].numpy()),
            "sizes": np.bincount(labels[chosen], minlength=k).tolist(),
        }
        if len(views) > 1:
            one, other = (assign(x[train], best)[0].numpy() for x in (first, last))
            report[str(k)]["agreement_of_views"] = nmi(one, other)
        products = sum(
            run.iterations + 1 for run in runs
        )  # of all rows with all centroids; the last one is the seeding
        context.spend(0.0, 2.0 * k * int(train.sum()) * rows.shape[1] * products, 0.0)
    if context.main:
        write_labels(folder / "labels.parquet", images, usable, columns)
        with whole_file(folder / "clusters.safetensors") as beside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"})
    return report


def against_classes(path: Path, images: Images) -> dict[str, dict[str, float]]:
    """NMI and purity of the training images' pseudo-labels against their classes, for each k; none without classes."""
    if images.labels is None:
        return {}
    labels, counts = read_labels(path)
    known = images.train[images.labels[images.train] >= 0]
    classes, told = images.labels[known].numpy(), {}
    for k, column in zip(counts, labels[known].numpy().T, strict=True):
        if len(classes):
            told[str(k)] = {"nmi": nmi(column, classes), "purity": purity(column, classes)}
    return told


def write_labels(path: Path, images: Images, usable: Tensor, columns: dict[str, np.ndarray]) -> None:
    """labels.parquet: index, path, and for each k the label and the distance; null where an image cannot be decoded."""
    table: dict[str, Any] = {"index": pa.array(range(len(images)), pa.int64()), "path": images.paths}
    blank = ~images.usable.numpy()
    for name, values in columns.items():
        full = np.zeros(len(images), values.dtype)
        full[usable.numpy()] = values
        kind = pa.int32() if name.startswith("label") else pa.float32()
        table[name] = pa.array(full, mask=blank).cast(kind)
    with whole_file(path) as beside:
        pq.write_table(pa.table(table), beside)


def from_classes(images: Images, context: Context, folder: Path) -> None:
    """Write the true labels of the training images as labels.parquet, for the supervised arm; no held-out image's."""
    if context.main:
        usable = images.all
        labels = torch.where(images.held_out, -1, images.labels)[usable].numpy()
        name = f"label_{len(images.label_names)}"
        write_labels(folder / "labels.parquet", images, usable, {name: labels})


def read_labels(path: Path, drop: float = 0.0) -> tuple[Tensor, list[int]]:
    """labels.parquet as [N, heads] int64, -1 where there is none, and the number of clusters of each head.

    Args:
        path: the file.
        drop: share of each cluster, the images farthest from its centroid, that gets -1, too.
    """
    table = pq.read_table(path)
    k = [int(name.removeprefix("label_")) for name in table.column_names if name.startswith("label_")]
    columns = []
    for count in k:
        labels = table[f"label_{count}"].fill_null(-1).to_numpy().astype(np.int64)
        if drop and f"distance_{count}" in table.column_names:
            distances = table[f"distance_{count}"].fill_null(2.0).to_numpy()
            for number in range(count):
                members = np.flatnonzero(labels == number)
                farthest = members[np.argsort(-distances[members], kind="stable")]
                labels[farthest[: int(drop * len(members))]] = -1
        columns.append(torch.from_numpy(labels.copy()))
    return torch.stack(columns, 1), k


class Clustered:
    """An earlier clustering, to assign other features with."""

    def __init__(self, folder: Path) -> None:
        path = folder / "clusters.safetensors"
        if not path.exists():
            raise Refused(
                f"--clusters: {folder} has no clusters.safetensors; name a round's folder, runs/NAME/round_1."
            )
        tensors = load_file(path)
        self.whitening = Whitening(tensors["mean"], tensors["projection"])
        self.centroids = {
            int(n.removeprefix("centroids_")): c for n, c in tensors.items() if n.startswith("centroids_")
        }

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """[n, D] features, averaged as the clustering's were, to label_K and distance_K for each k."""
        rows, result = self.whitening(features), {}
        for k, centroids in self.centroids.items():
            result[f"label_{k}"], result[f"distance_{k}"] = assign(rows, centroids)
        return result


def check(settings: recipe.Clusters, images: Images) -> None:
    """Refuse more clusters than images, and true labels where there are none.

    Raises:
        Refused: naming the field.
    """
    if settings.source == "labels":
        if images.labels is None:
            raise Refused("clusters.source: labels were asked for, but the data has none.")
    elif max(settings.k) > len(images.train):
        raise Refused(f"clusters.k: {max(settings.k)} clusters are more than the {len(images.train)} training images.")
