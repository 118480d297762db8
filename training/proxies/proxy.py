"""What a proxy task is to the rest: a task over a backbone, and what phases, evaluation and cards ask of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..images import Images
from ..launch import gather_rows
from ..task import BackboneTask
from ..views import View


class Proxy(BackboneTask):
    """A proxy task, made from (backbone, recipe.proxy, images, options).

    Attributes:
        defaults: fields of recipe.proxy for photographs, as published, where they are not recipe.Proxy's own.
        asked: fields of its views that change the answer to what it asks, and must be 0.
        specific: what its features are specific to, as cards and reports say it; None where nothing is known.
        pooled: it reads pooled features, behind a disposable MLP if proxy.mlp_layers has one.
        metric: which of its metrics tells how well it is solved, the higher the better.
        chance: what that metric is for who learned nothing.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[tuple[str, ...]] = ()
    specific: ClassVar[str | None] = None
    pooled: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    chance: float = 0.0

    @dataclass
    class Options:
        """The task has no settings of its own."""

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Any) -> None:
        super().__init__(backbone, proxy, images)

    @staticmethod
    def nuisance(options: Any) -> tuple[View, ...]:
        """What it is covariant with: views, the first of which changes nothing; phase 2 averages over them."""
        return ()

    @staticmethod
    def residue(options: Any) -> tuple[View, ...]:
        """Views that it tells one from another, by their position; the residue measures how well features still do."""
        return ()

    @staticmethod
    def side(options: Any, size: int) -> int:
        """Side, px, of what the backbone is given of an image of `size` px."""
        return size

    @staticmethod
    def seen(options: Any, backbone: nn.Module, size: int) -> float:
        """Views of an image that a step passes forward and backward; a forward pass alone counts a third."""
        return 1.0


class Queue(nn.Module):
    """The newest unit rows of all processes, which hold the same; random ones at first.

    Args:
        count: rows that are remembered.
        dim: width of a row.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def push(self, rows: Tensor) -> None:
        """Replace the oldest rows by these, of every process."""
        rows = gather_rows(rows)[: len(self.rows)]
        places = (self.place + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[places] = rows
        self.place.copy_((self.place + len(rows)) % len(self.rows))
