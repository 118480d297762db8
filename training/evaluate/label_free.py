"""Scores of features that need no labels, from two strong views of each image.

retrieval           share of views whose nearest other view is of the same image.
stability_of_seeds  agreement (normalised mutual information) of two runs of k-means.
stability_of_views  agreement of the clusters of one view with those of the other.
alignment           mean squared distance of the two views of an image (Wang & Isola, ICML 2020, eq. 1; lower: closer).
uniformity          log of the mean of exp(-2 distance^2) over pairs of images (eq. 2; lower: more even).
spread              standard deviation of a coordinate times the root of their number; 1 if even, 0 if collapsed.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

LEADING = "retrieval"  # which of them reports lead with: hub_configs/RESULTS.md
IMAGES = 1000  # most images that are looked at
PER_CLUSTER = 10  # images of a cluster, about


def retrieval(one: Tensor, other: Tensor) -> float:
    """Share of unit rows of `one` whose nearest among those of `other` is at the same position."""
    return ((one @ other.T).argmax(1) == torch.arange(len(one), device=one.device)).double().mean().item()


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance of unit rows at the same position."""
    return (one - other).square().sum(1).mean().item()


def uniformity(rows: Tensor) -> float:
    """Log of the mean over pairs of unit rows of exp(-2 distance^2)."""
    squared = torch.pdist(rows.double()).square()
    return (torch.logsumexp(-2 * squared, 0) - math.log(max(1, len(squared)))).item()


def spread(rows: Tensor) -> float:
    """Standard deviation over unit rows, mean over coordinates, times the root of their number (Chen & He 2021)."""
    return (rows.std(0, unbiased=False).mean() * rows.shape[1] ** 0.5).item()


def stability(plain: Tensor, one: Tensor, other: Tensor) -> tuple[float, float, int]:
    """Agreement of two runs of k-means over `plain`, and of the clusters of two views by the first; and k."""
    k = max(2, min(100, len(plain) // PER_CLUSTER))
    first, second = (KMeans(k, n_init=1, random_state=seed).fit(plain.cpu().numpy()) for seed in (0, 1))
    seeds = normalized_mutual_info_score(first.labels_, second.labels_)
    views = normalized_mutual_info_score(*(first.predict(rows.cpu().numpy()) for rows in (one, other)))
    return float(seeds), float(views), k


def scores(plain: Tensor, one: Tensor, other: Tensor) -> list[tuple[str, dict[str, int], float]]:
    """(metric, settings, value) of [n, D] features: of images as they are, and of two strong views of each."""
    plain, one, other = (F.normalize(rows, dim=1) for rows in (plain, one, other))
    seeds, views, k = stability(plain, one, other)
    n = {"n": len(plain)}
    return [
        ("retrieval", n, retrieval(one, other)),
        ("stability_of_seeds", {**n, "clusters": k}, seeds),
        ("stability_of_views", {**n, "clusters": k}, views),
        ("alignment", n, alignment(one, other)),
        ("uniformity", n, uniformity(one)),
        ("spread", n, spread(plain)),
    ]
