"""What is found in features of many images: neighbours, a map, outliers, duplicates, odd ones of a cluster."""

import imagehash
import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from . import Found, Listed

NEAREST = 8  # neighbours that are shown of an image
LISTED = 200  # most entries of a list
ALIKE = 6  # bits of 64 in which hashes of near-duplicates differ at most
DIMENSIONS = 50  # of features that the map is made from
ITERATIONS = 500
ROWS = 1000  # images that are compared with all others at once
PURE = 0.5  # share of its commonest class from which on a cluster is taken to mean that class


def nearest(unit: Tensor, count: int = NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """Indices [n, count] of the nearest other rows by cosine, nearest first, and their cosines; of [n, D] unit rows."""
    count, found = min(count, len(unit) - 1), []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2.0  # not itself
        found.append(cosines.topk(count, dim=1))
    return torch.cat([f.indices for f in found]).numpy(), torch.cat([f.values for f in found]).numpy()


def layout(unit: Tensor, like: np.ndarray | None = None) -> np.ndarray:
    """A map [n, 2] of [n, D] unit rows by t-SNE, in about the places of another map where it may be."""
    rows = unit.double().numpy()
    width = min(DIMENSIONS, *rows.shape)
    flat = PCA(width, svd_solver="full").fit_transform(rows)
    begin = flat[:, :2] if like is None else like
    begin = (1e-4 * begin / max(float(begin[:, 0].std()), 1e-12)).astype(np.float32)
    perplexity = min(30.0, max(2.0, len(rows) / 10))
    exaggeration = 12.0 if like is None else 4.0  # more would pull the places apart that it begins with
    made = TSNE(init=begin, perplexity=perplexity, early_exaggeration=exaggeration, max_iter=ITERATIONS)
    return made.fit_transform(flat)


def outliers(cosines: np.ndarray) -> Listed:
    """The images that are farthest from their neighbours, by cosines [n, count] with these."""
    far = 1 - cosines.mean(1)
    first = np.argsort(-far, kind="stable")[:LISTED]
    about = "Images that have no neighbours: the farther from its nearest ones (1 - cosine, mean), the higher up."
    return Listed(about, first.tolist(), far[first].tolist())


def pairs(left: np.ndarray, right: np.ndarray, scores: np.ndarray, about: str) -> Listed:
    """Each pair of indices once, the lowest scores first."""
    ordered = np.stack([np.minimum(left, right), np.maximum(left, right)], 1)
    _, once = np.unique(ordered, axis=0, return_index=True)
    once = once[np.argsort(scores[once], kind="stable")][:LISTED]
    return Listed(about, ordered[once, 0].tolist(), scores[once].tolist(), ordered[once, 1].tolist())


def alike_by_feature(near: np.ndarray, cosines: np.ndarray) -> Listed:
    """Images and their nearest neighbours, the closest pairs first."""
    about = "The closest pairs by feature (1 - cosine): duplicates first, further down images that are only alike."
    return pairs(np.arange(len(near)), near[:, 0], 1 - cosines[:, 0], about)


def alike_by_hash(tiles: np.ndarray) -> Listed:
    """Pairs of images whose perceptual hashes differ in a few bits, by pictures [n, side, side, 3] uint8."""
    bits = np.stack([imagehash.phash(Image.fromarray(tile)).hash.ravel() for tile in tiles])
    hashes = np.packbits(bits, axis=1).view(np.uint64).ravel()
    left, right, differ = [], [], []
    for start in range(0, len(hashes), ROWS):
        counts = np.bitwise_count(hashes[start : start + ROWS, None] ^ hashes)
        one, other = np.nonzero(counts <= ALIKE)
        later = other > one + start
        left.append(one[later] + start)
        right.append(other[later])
        differ.append(counts[one[later], other[later]])
    about = f"Pairs whose pictures are alike: perceptual hashes of 64 bits that differ in at most {ALIKE}."
    return pairs(*(np.concatenate(part) for part in (left, right, differ)), about)


def disagreements(labels: np.ndarray, distances: np.ndarray, classes: list[str | None]) -> Listed:
    """Images whose class is not that of their cluster, the purest clusters' and nearest to the centre first."""
    names = np.array([name or "" for name in classes])
    odd: list[tuple[float, float, int, str]] = []
    for number in np.unique(labels[labels >= 0]).tolist():
        members = np.flatnonzero((labels == number) & (names != ""))
        found, counts = np.unique(names[members], return_counts=True)
        if not len(members) or counts.max() < max(2, PURE * len(members)):
            continue
        most, share = str(found[counts.argmax()]), float(counts.max() / len(members))
        others = members[names[members] != most].tolist()
        odd += [(share, float(distances[i]), i, f"cluster {number}: {share:.0%} {most}") for i in others]
    odd.sort(key=lambda one: (-one[0], one[1]))
    about = (
        "Images whose class is not that of their cluster, of which at least half is of one class (the score is its "
        f"share): wrong labels, or images that look like another class. There are {len(odd):,}."
    )
    odd = odd[:LISTED]
    return Listed(about, [i for _, _, i, _ in odd], [share for share, *_ in odd], notes=[note for *_, note in odd])


def finest(clusters: dict[int, tuple[np.ndarray, np.ndarray]], images: int) -> int:
    """The largest k whose clusters have ten images on average, or else the smallest: what disagreements are told by."""
    return max((k for k in clusters if k <= images / 10), default=min(clusters))


def lists(found: Found, near: np.ndarray, cosines: np.ndarray) -> dict[str, Listed]:
    """Every list that has an entry, by its title; neighbours are those of the last features."""
    made = {
        "outliers": outliers(cosines),
        "near-duplicates by feature": alike_by_feature(near, cosines),
        "near-duplicates by hash": alike_by_hash(found.tiles),
    }
    if found.classes and found.clusters:
        k = finest(found.clusters, len(found.paths))
        made["cluster and class disagree"] = disagreements(*found.clusters[k], found.classes)
    return {title: one for title, one in made.items() if one.images}
