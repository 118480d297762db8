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
from accelerate import Accelerator
from safetensors.torch import load_file
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from . import backbone as B
from . import proxies, recipe
from .evaluate import label_free
from .extraction import batches, evaluating, extract, features, gather, share
from .files import Refused, reading, save_tensors, whole_file
from .images import Images
from .kmeans import assign, kmeans
from .launch import Key
from .loop import Context
from .memory import placed, table
from .operations import forward_flops
from .views import FAMILIAR, View

METRICS = ("agreement_of_seeds", "agreement_of_views", "nmi", "purity", "inertia")  # of a clustering, as records tell


ROWS = 2**12  # features that are whitened at once
LOOKED_AT = 10_000  # most training images whose clusters under two views are compared


@dataclass
class Whitening:
    """x to (x - mean) @ projection, at unit length."""

    mean: Tensor
    projection: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize((features - self.mean) @ self.projection, dim=1)

    def replace(self, features: Tensor) -> Tensor:
        """The same, the result written over the features; in memory of its own where that is less than half."""
        width = self.projection.shape[1]
        for rows in features.split(ROWS):
            rows[:, :width] = self(rows)
        whitened = features[:, :width]
        return whitened.clone() if 2 * width <= features.shape[1] else whitened


def fit_whitening(
    features: Tensor, dimensions: int, power: float = 1.0, accelerator: Accelerator | None = None
) -> Whitening:
    """PCA whitening of [n, D] features to at most `dimensions`; 0 leaves them as they are, but for their length.

    Each direction is divided by its standard deviation to the `power`: 1 makes all variances equal, 0 leaves them.
    Directions of less than a millionth of the largest variance are noise of the arithmetic and are dropped.

    Args:
        features: this process's.
        dimensions, power: as above.
        accelerator: tells the processes apart; without one there is one alone.
    """
    width = features.shape[1]
    if dimensions == 0:
        return Whitening(torch.zeros(width), torch.eye(width))

    def whole(part: Tensor) -> Tensor:
        """The sum over the processes, float64."""
        if accelerator is None or accelerator.num_processes == 1:
            return part
        return accelerator.reduce(part.float().to(accelerator.device), "sum").cpu().double()

    count = whole(torch.tensor([float(len(features))], dtype=torch.float64))
    total = sum((rows.double().sum(0) for rows in features.split(ROWS)), torch.zeros(width, dtype=torch.float64))
    mean = (whole(total) / count).float()
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows - mean
        scatter += centred.T @ centred
    values, vectors = torch.linalg.eigh(whole(scatter) / (count - 1).clamp(min=1))
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
    covariant = bool(proxies.nuisance(recipe.proxy))
    return "nuisance" if recipe.by_proxy and covariant and number == 1 else "familiar"


def views_of(recipe: recipe.Recipe, number: int) -> tuple[View, ...]:
    """The views that a round's features are averaged over, the first of which changes nothing."""
    return views_called(averaging(recipe, number), recipe.proxy)


def views_called(averaging: str, proxy: recipe.Proxy) -> tuple[View, ...]:
    """The views of an averaging: "nuisance", which is "none" for a task that is covariant with nothing, and so on."""
    return {"nuisance": proxies.nuisance(proxy), "familiar": FAMILIAR, "none": ()}[averaging] or FAMILIAR[:1]


def leading_stage(network: nn.Module, images: Images, context: Context, batch_size: int) -> int:
    """The stage whose features of a strong view of held-out images find another view of the same image most often.

    Of the scores without labels it agrees best with probes over runs (hub_configs/tasks_c10); the first of equals.
    """
    stages, shown = B.stage_list(network), images.sample(images.val, label_free.IMAGES)
    one, other = (
        extract(network, images, shown, context.accelerator, batch_size, stages, random=(recipe.Views(), seed))
        for seed in (1, 2)
    )
    unit = torch.nn.functional.normalize
    found = {stage: label_free.retrieval(unit(one[stage], dim=1), unit(other[stage], dim=1)) for stage in stages}
    return max(found, key=found.get)


def averaged(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    stage: int,
    views: tuple[View, ...],
    context: Context,
    batch_size: int,
    looked_at: Tensor | None = None,
    room: float = float("inf"),
) -> tuple[Tensor, list[Tensor]]:
    """Features of this process's share of the images, averaged over the views, and of a few under one view alone.

    Args:
        network: whose features, on the device.
        images: where the indices point.
        indices: [n] which images, of all processes.
        stage: whose features.
        views: that are averaged over.
        context: the run.
        batch_size: images of a forward pass.
        looked_at: [n] bool, the few.
        room: bytes that the features of all processes may take of memory; beyond it they lie in a file of the run's.

    Returns:
        [share, D]; and of the few in this share, [m, D] under the first view and under the last.
    """
    accelerator = context.accelerator
    looked_at = torch.zeros(len(indices), dtype=torch.bool) if looked_at is None else looked_at
    few = share(looked_at, accelerator)
    with evaluating(network), torch.no_grad():
        blank = torch.zeros(1, 3, images.size, images.size, device=accelerator.device)
        width = features(network, blank, [stage])[stage].shape[1]
    total = table(len(few), width, context.folder, room / accelerator.num_processes)
    kept = {number: [torch.zeros(0, width)] for number in (0, len(views) - 1)}
    for number, view in enumerate(views):
        for start, found in batches(network, images, indices, accelerator, batch_size, [stage], view):
            place = slice(start, start + len(found[stage]))
            total[place] += found[stage]
            if number in kept:
                kept[number].append(found[stage][few[place]])
    return total.div_(len(views)), [torch.cat(kept[number]) for number in (0, len(views) - 1)]


def cluster(
    network: nn.Module,
    images: Images,
    settings: recipe.Clusters,
    views: tuple[View, ...],
    key: Key,
    context: Context,
    batch_size: int,
    folder: Path,
    room: float = float("inf"),
) -> dict[str, Any]:
    """Make pseudo-labels of every usable image and write them to `folder`.

    Centroids are fitted on the training images; those held out are only assigned. Each process holds the features of
    its share of both.

    Args:
        network: whose features are clustered, on the device.
        images: the training split.
        settings: the recipe's phase 2.
        views: that features are averaged over; agreement_of_views compares the first with the last.
        key: seeds k-means.
        context: the run.
        batch_size: images of a forward pass.
        folder: an existing folder of the main process; gets labels.parquet and clusters.safetensors.
        room: bytes that features may take of the machine's memory.

    Returns:
        For each k, what clusters.json tells.
    """
    accelerator, train, held = context.accelerator, images.train, images.val
    stage = B.resolve_stage(network, settings.stage, "clusters.stage")
    flops = forward_flops(network, images.size)
    looked_at = torch.isin(train, images.sample(train, LOOKED_AT)) if len(views) > 1 else None
    found, two_views = averaged(network, images, train, stage, views, context, batch_size, looked_at, room)
    taken = found.nbytes * accelerator.num_processes
    rest, _ = averaged(network, images, held, stage, views, context, batch_size, room=room - taken)
    # A forward pass counts a third of a training step's view (a backward pass costs about two forward ones).
    passes = (len(train) + len(held)) * len(views)
    context.spend(passes / 3, passes * flops, 0.0)
    whitening = fit_whitening(found, settings.whiten, settings.whiten_power, accelerator)
    rows, rest, *two_views = (
        placed(x, accelerator.device)
        for x in (whitening.replace(found), whitening.replace(rest), *(whitening(x) for x in two_views))
    )
    del found
    tensors = {"mean": whitening.mean, "projection": whitening.projection}
    columns: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}

    def everybody(values: Tensor) -> np.ndarray:
        return gather(values.cpu(), accelerator).numpy()

    for k in settings.k:
        runs = kmeans(rows, k, key.number("kmeans", k), settings.iterations, accelerator, settings.restarts)
        best, second = runs[:2]
        labels, distances, own = (everybody(x) for x in (best.labels, best.distances, second.labels))
        others = [everybody(x) for x in assign(rest, best.centroids)]
        tensors[f"centroids_{k}"] = best.centroids.cpu()
        columns[f"label_{k}"] = np.concatenate([labels, others[0]])
        columns[f"distance_{k}"] = np.concatenate([distances, others[1]])
        report[str(k)] = {
            "inertia": best.inertia,
            "iterations": best.iterations,
            "repaired": best.repaired,
            "agreement_of_seeds": nmi(labels, own),
            "sizes": np.bincount(labels, minlength=k).tolist(),
        }
        if len(views) > 1:
            report[str(k)]["agreement_of_views"] = nmi(*(everybody(assign(x, best.centroids)[0]) for x in two_views))
        context.spend(0.0, 2.0 * rows.shape[1] * sum(run.products for run in runs), 0.0)
    if context.main:
        write_labels(folder / "labels.parquet", images, torch.cat([train, held]), columns)
        with whole_file(folder / "clusters.safetensors") as beside:
            save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"})
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


def write_labels(path: Path, images: Images, indices: Tensor, columns: dict[str, np.ndarray]) -> None:
    """labels.parquet: index, path, and for each k the label and the distance; null where an image cannot be decoded."""
    table: dict[str, Any] = {"index": pa.array(range(len(images)), pa.int64()), "path": images.paths}
    blank = ~images.usable.numpy()
    for name, values in columns.items():
        full = np.zeros(len(images), values.dtype)
        full[indices.numpy()] = values
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
    with reading(path):
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
            why = "name a round's folder, runs/NAME/round_1"
            if (folder / "labels.parquet").exists():
                why = "it was made from true labels, which have no centroids, or that file was lost"
            raise Refused(f"--clusters: {folder} has no clusters.safetensors; {why}.")
        with reading(path):
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
