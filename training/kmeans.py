"""Spherical k-means (Dhillon & Modha 2001) over all processes' rows: k-means++ seeding, empty clusters repaired.

Every process holds a part of the rows, on its device; sums are reduced over the processes, so all end with the same
centroids.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

BLOCK = 2**25  # similarities held at once: 128 MiB of float32


@dataclass
class Clustering:
    """A clustering of unit rows.

    Attributes:
        centroids: [k, D] float32, unit rows.
        inertia: mean over all rows of 1 - cosine to the own centroid.
        repaired: times an empty cluster was given a new centroid.
        iterations: iterations made.
    """

    centroids: Tensor
    inertia: float
    repaired: int
    iterations: int


def assign(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each unit row, [n] int64, and the distance 1 - cosine to it, [n] float32 in [0, 2]."""
    labels, distances = [], []
    for part in rows.split(max(1, BLOCK // len(centroids))):
        nearest = (part @ centroids.T).max(1)
        labels.append(nearest.indices)
        distances.append((1 - nearest.values).clamp(0, 2))
    if not labels:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return torch.cat(labels), torch.cat(distances)


def kmeans(rows: Tensor, k: int, seed: int, iterations: int, accelerator: Accelerator, restarts: int = 1) -> list:
    """Cluster unit rows several times, best first.

    Args:
        rows: [n, D] float32, this process's rows.
        k: number of clusters, at most the rows of all processes.
        seed: of the seeding.
        iterations: most of a run; it ends before when no row changes its cluster.
        accelerator: tells the processes apart.
        restarts: runs.

    Returns:
        `restarts` clusterings, by inertia.
    """
    runs = [_run(rows, k, seed + restart, iterations, accelerator) for restart in range(restarts)]
    return sorted(runs, key=lambda run: run.inertia)


def _run(rows: Tensor, k: int, seed: int, iterations: int, accelerator: Accelerator) -> Clustering:
    centroids = _seed(rows, k, torch.Generator().manual_seed(seed), accelerator)
    total = accelerator.reduce(torch.tensor([float(len(rows))], device=rows.device), "sum").item()
    labels, repaired, done = torch.full((len(rows),), -1, device=rows.device), 0, 0
    while done < iterations:
        done += 1
        new, distances = assign(rows, centroids)
        changed = accelerator.reduce((new != labels).sum().float().view(1), "sum").item()
        labels = new
        if changed == 0:
            break
        sums = torch.zeros_like(centroids).index_add_(0, labels, rows)
        counts = torch.zeros(k, device=rows.device).index_add_(0, labels, torch.ones_like(distances))
        sums, counts = accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum")
        for empty in (counts == 0).nonzero().flatten().tolist():
            # The row that its centroid serves worst becomes a centroid of its own.
            worst, distances = _take(rows, distances, distances.argmax() if len(distances) else None, accelerator)
            sums[empty], repaired = worst, repaired + 1
        centroids = torch.nn.functional.normalize(sums, dim=1)
    _, distances = assign(rows, centroids)
    inertia = accelerator.reduce(_total(distances), "sum").item() / total
    return Clustering(centroids, inertia, repaired, done)


def _total(values: Tensor) -> Tensor:
    """The sum [1], added up in float64 on the CPU: some devices have none."""
    return values.cpu().double().sum().float().view(1).to(values.device)


def _take(rows: Tensor, scores: Tensor, local: Tensor | None, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """The row with the highest score over all processes, given each one's best; its score becomes 0."""
    best = scores[local] if local is not None else torch.tensor(-1.0, device=rows.device)
    bests = accelerator.gather(best.view(1))
    owner = int(bests.argmax()) == accelerator.process_index
    row = torch.zeros(rows.shape[1], device=rows.device)
    if owner:
        row, scores = rows[local].clone(), scores.clone()
        scores[local] = 0
    return accelerator.reduce(row, "sum"), scores


def _seed(rows: Tensor, k: int, generator: torch.Generator, accelerator: Accelerator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each next centroid is a row drawn by its distance to the nearest one.

    On the unit sphere the squared Euclidean distance is twice 1 - cosine.
    """
    weights = torch.ones(len(rows), device=rows.device)
    centroids = torch.empty(k, rows.shape[1], device=rows.device)
    for number in range(k):
        shares = accelerator.gather(_total(weights)).cpu().double()
        place = torch.rand(1, generator=generator, dtype=torch.float64) * shares.sum()
        ends = shares.cumsum(0)
        owner = min(int(torch.searchsorted(ends, place, right=True)), len(ends) - 1)
        row = torch.zeros(rows.shape[1], device=rows.device)
        if owner == accelerator.process_index:
            inside = float(place - (ends[owner] - shares[owner]))
            index = torch.searchsorted(weights.cpu().double().cumsum(0), inside, right=True)
            row = rows[min(int(index), len(rows) - 1)].clone()
        centroids[number] = accelerator.reduce(row, "sum")
        distance = (1 - rows @ centroids[number]).clamp(0, 2)
        weights = distance if number == 0 else torch.minimum(weights, distance)
    return centroids
