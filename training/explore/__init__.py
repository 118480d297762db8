"""What is shown of images and their features: maps, nearest neighbours, and lists of those that deserve a look."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

FEWEST = 5  # images that make a map


@dataclass
class Found:
    """Some images and what is known of them.

    Attributes:
        paths: [n] how each is written.
        tiles: [n, side, side, 3] uint8 pictures.
        sides: [n, D] features by what they are called, those before relearning first.
        classes: [n] names, None where unknown; None without classes.
        clusters: by k, [n] labels, -1 where there is none, and [n] distances from the cluster's centre.
    """

    paths: list[str]
    tiles: np.ndarray
    sides: dict[str, Tensor]
    classes: list[str | None] | None = None
    clusters: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class Listed:
    """Images, or pairs of them, that deserve a look.

    Attributes:
        about: what they are, and what the score means.
        images: [m] indices.
        others: [m] indices of each one's partner; none for a list of single images.
        scores: [m] what they are ordered by.
        notes: [m] words on each.
    """

    about: str
    images: list[int]
    scores: list[float]
    others: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
