"""Spherical k-means (Dhillon & Modha 2001) over all processes' rows: k-means++ seeding, empty clusters repaired.

Every process holds a part of the rows, on any device and in any precision; they are looked at in blocks, on the device
of the processes, in float32. Sums are reduced over the processes, so all end with the same centroids.

Centroids are fitted on a sample of `FITTED` rows each, and begin as some of `SEEDED` rows each. They move past the mean
of their rows, by `PAST` of the way to it, which needs half the iterations for an inertia; in the end they are the mean.
On a CPU, most passes compare a row with the centroids alone that are nearest to the one it has had.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

FITTED, SEEDED, PAST = 256, 32, 0.9
DRAWN = 2048  # most seeds that are drawn at once
CACHED = 2**18  # similarities that a CPU makes at once: 1 MiB of float32
BLOCK = 2**25  # that other devices do
NEAR, FIRST, EVERY = 128, 3, 4  # centroids that a row is compared with, but for the first passes, and every so many


@dataclass
class Clustering:
    """A clustering of unit rows.

    Attributes:
        centroids: [k, D] float32, unit rows.
        labels: [n] int64, of this process's rows.
        distances: [n] float32, 1 - cosine to the own centroid.
        inertia: mean over all rows of these distances.
        repaired: times an empty cluster was given a new centroid.
        iterations: iterations made.
        products: of a row and a centroid, that were computed for it.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor
    inertia: float
    repaired: int
    iterations: int
    products: int


def assign(rows: Tensor, centroids: Tensor, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each unit row, [n] int64, and the distance 1 - cosine to it, [n] float32 in [0, 2].

    Both are on the centroids' device. If there are `sums`, [k, D], each row is added to its centroid's.
    """
    on_cpu, across, found = centroids.device.type == "cpu", centroids.T.contiguous(), []
    for part in rows.split(max(128, (CACHED if on_cpu else BLOCK) // len(centroids))):
        part = part.to(centroids)
        similar = part @ across
        # NumPy's argmax is several times as fast as torch's on a CPU.
        labels = torch.from_numpy(similar.numpy().argmax(1)) if on_cpu else similar.argmax(1)
        found.append((labels, (1 - similar.gather(1, labels.view(-1, 1)).view(-1)).clamp(0, 2)))
        if sums is not None and on_cpu:
            sums.index_add_(0, labels, part)
        elif sums is not None:  # the other's order differs from run to run
            sums.index_put_((labels,), part, accumulate=True)
    labels, distances = zip(*found, strict=True)
    return torch.cat(labels), torch.cat(distances)


def _assign_near(rows: Tensor, centroids: Tensor, sums: Tensor, labels: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """As `assign`, but of the centroids that are near the one, [k, near] int64, which each row has had."""
    new, distances = torch.empty_like(labels), torch.empty(len(labels))
    sizes = torch.bincount(labels, minlength=len(centroids)).tolist()
    for own, members in zip(near, labels.argsort(stable=True).split(sizes), strict=True):
        if len(members):
            part = rows.index_select(0, members).to(centroids)
            similar = part @ centroids.index_select(0, own).T
            nearest = own.index_select(0, torch.from_numpy(similar.numpy().argmax(1)))
            new.index_copy_(0, members, nearest)
            distances.index_copy_(0, members, (1 - similar.amax(1)).clamp_(0, 2))
            sums.index_add_(0, nearest, part)
    return new, distances


def kmeans(rows: Tensor, k: int, seed: int, iterations: int, accelerator: Accelerator, restarts: int = 1) -> list:
    """Cluster unit rows several times, best first.

    Args:
        rows: [n, D], this process's rows.
        k: number of clusters, at most the rows of all processes.
        seed: of the samples and the seeding.
        iterations: most of a run; it ends before when no row changes its cluster.
        accelerator: tells the processes apart.
        restarts: runs.

    Returns:
        `restarts` clusterings, by inertia.
    """
    runs = [_run(rows, k, seed + restart, iterations, accelerator) for restart in range(restarts)]
    return sorted(runs, key=lambda run: run.inertia)


def _run(rows: Tensor, k: int, seed: int, iterations: int, accelerator: Accelerator) -> Clustering:
    generator = torch.Generator().manual_seed(seed)
    sample, fitted = draw(rows, FITTED * k, generator, accelerator)
    few, seeded = draw(sample, SEEDED * k, generator, accelerator)
    centroids = _seed(few, k, generator, accelerator)
    labels, changed, moved = torch.full((len(sample),), -1, device=centroids.device), 1.0, True
    repaired = done = products = 0
    while done < iterations:
        done += 1
        sums = torch.zeros_like(centroids)
        whole = centroids.device.type != "cpu" or k <= 4 * NEAR or done <= FIRST or done % EVERY == 0 or changed == 0
        if whole:
            new, distances = assign(sample, centroids, sums)
            near = None
        else:
            if near is None:
                near = torch.cat([(part @ centroids.T).topk(NEAR).indices for part in centroids.split(2**10)])
            new, distances = _assign_near(sample, centroids, sums, labels, near)
        products += fitted * (k if whole else NEAR)
        changed = accelerator.reduce((new != labels).sum().float().view(1), "sum").item()
        if changed == 0 and whole and not moved:
            break
        labels = new
        sums = accelerator.reduce(sums, "sum")
        sizes = accelerator.reduce(torch.bincount(labels, minlength=k), "sum")
        for empty in (sizes == 0).nonzero().flatten().tolist():
            # The row that its centroid serves worst becomes a centroid of its own.
            worst, distances = _take(sample, distances, accelerator)
            sums[empty] = centroids[empty] = worst
            repaired += 1
        means, moved = normalize(sums, dim=1), changed > 0 and done < iterations
        centroids = normalize(means + PAST * (means - centroids), dim=1) if moved else means
    labels, distances = assign(rows, centroids)
    total = int(accelerator.reduce(torch.tensor([len(rows)], device=centroids.device), "sum"))
    inertia = accelerator.reduce(_total(distances), "sum").item() / total
    return Clustering(centroids, labels, distances, inertia, repaired, done, products + k * (seeded + total))


def _total(values: Tensor) -> Tensor:
    """The sum [1], added up in float64 on the CPU: some devices have none."""
    return values.cpu().double().sum().float().view(1).to(values.device)


def draw(rows: Tensor, count: int, generator: torch.Generator, accelerator: Accelerator) -> tuple[Tensor, int]:
    """This process's rows among `count` drawn from those of all processes, and how many these are.

    All rows, where they are not more.
    """
    lengths = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).cpu()
    total, first = int(lengths.sum()), int(lengths[: accelerator.process_index].sum())
    if total <= count:
        return rows, total
    drawn = torch.randperm(total, generator=generator)[:count].sort().values - first
    return rows[drawn[(drawn >= 0) & (drawn < len(rows))].to(rows.device)], count


def _take(rows: Tensor, scores: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """The row with the highest score over all processes; its score becomes 0."""
    best = scores.max().view(1) if len(scores) else torch.full((1,), -1.0, device=accelerator.device)
    row = torch.zeros(rows.shape[1], device=accelerator.device)
    if int(accelerator.gather(best).argmax()) == accelerator.process_index:
        local, scores = scores.argmax(), scores.clone()
        row, scores[local] = rows[local.to(rows.device)].to(row), 0
    return accelerator.reduce(row, "sum"), scores


def _seed(rows: Tensor, k: int, generator: torch.Generator, accelerator: Accelerator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each next centroid is a row drawn by its distance to the nearest one.

    On the unit sphere the squared Euclidean distance is twice 1 - cosine. As many are drawn at once as there are, by
    the distances so far, and each is kept with the share of this distance that those kept before it left: together the
    same probability, for a few large products of matrices instead of many small ones.
    """
    weights = torch.full((len(rows),), 2.0, dtype=torch.float64)  # no distance is larger
    centroids = torch.empty(0, rows.shape[1], device=accelerator.device)
    while len(centroids) < k:
        many = min(max(1, len(centroids)), DRAWN)
        chances, places = torch.rand(2, many, generator=generator, dtype=torch.float64)
        drawn, left = _draw_by(rows, weights, places, accelerator)
        between = (1 - drawn @ drawn.T).clamp(0, 2).cpu().numpy()
        left, kept = left.cpu().numpy(), []
        for number, threshold in enumerate(chances.numpy() * left):
            # Not below: where all rows are equal, all are kept.
            if threshold <= left[number]:
                kept.append(number)
                np.minimum(left, between[number], out=left)
        new = drawn[kept[: k - len(centroids)]]
        centroids = torch.cat([centroids, new])
        weights = torch.minimum(weights, assign(rows, new)[1].cpu().double())
    return centroids


def _draw_by(rows: Tensor, weights: Tensor, places: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Rows of all processes drawn by their weights, [n, D], and their weights, [n].

    Args:
        rows: this process's.
        weights: [rows] float64 on the CPU.
        places: [n] float64 in [0, 1), where in the sum of all weights each is.
    """
    device, sums = accelerator.device, weights.cumsum(0)
    total = sums[-1:] if len(sums) else torch.zeros(1, dtype=torch.float64)
    # As integers: some devices have no float64, and float32 cannot tell the rows of a million apart.
    totals = accelerator.gather(total.view(torch.int64).to(device)).cpu().view(torch.float64)
    ends = totals.cumsum(0)
    places = places * ends[-1]
    owner = torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)
    mine = (owner == accelerator.process_index).nonzero().flatten() if len(rows) else torch.zeros(0, dtype=torch.int64)
    inside = places[mine] - (ends - totals)[owner[mine]]
    index = torch.searchsorted(sums, inside, right=True).clamp(max=len(rows) - 1)
    drawn = torch.zeros(len(places), rows.shape[1] + 1, device=device)
    drawn[mine.to(device), :-1] = rows[index.to(rows.device)].to(drawn)
    drawn[mine.to(device), -1] = weights[index].to(drawn)
    drawn = accelerator.reduce(drawn, "sum")
    return drawn[:, :-1], drawn[:, -1]
