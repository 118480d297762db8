"""Jigsaw puzzles (Noroozi & Favaro, ECCV 2016): in which of some orders were an image's tiles given?

Covariant with the arrangement of an image's parts. Its features are specific to where in a scene a part is.
"""

import functools
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe, views
from ..files import Refused
from ..images import Images
from ..limits import BelowOne, PositiveInt, Several
from ..recipe import Views
from ..task import Batch, accuracy, full
from .proxy import Proxy

SAMPLE = 20_000  # orders that the most distant ones are sought among


@functools.cache
def distant_orders(grid: int, count: int, seed: int = 0) -> Tensor:
    """Orders of grid^2 tiles that are far from each other, [count, grid^2] int64, the first of which changes nothing.

    The paper's algorithm 1: each next one has the largest Hamming distance, on average, to those that are chosen; among
    all orders, or a sample of them where there are many.

    Raises:
        Refused: there are not so many.
    """
    tiles = grid * grid
    draws = np.random.default_rng(seed)
    if tiles <= 7:
        pool = np.array(list(permutations(range(tiles))))
    else:
        pool = np.unique(np.array([draws.permutation(tiles) for _ in range(SAMPLE)]), axis=0)
    if count > len(pool):
        raise Refused(f"proxy.options.orders: {count} are more than the {len(pool)} orders of {tiles} tiles.")
    chosen = [np.arange(tiles)]
    distance, free = np.zeros(len(pool)), np.any(pool != chosen[0], axis=1)
    while len(chosen) < count:
        distance += (pool != chosen[-1]).sum(1)
        best = int(np.where(free, distance, -1).argmax())
        free[best] = False
        chosen.append(pool[best])
    return torch.from_numpy(np.stack(chosen)).long()


def some_orders(grid: int) -> tuple[views.View, ...]:
    """The image, and a few rearrangements of its cells that are far from each other."""
    return tuple(views.shuffled(order.tolist(), grid) for order in islice(distant_orders(grid, 4), 4))


def tile_side(grid: int, gap: float, size: int) -> int:
    """Side of a tile, px: a cell's but for a gap."""
    return max(1, round(size // grid * (1 - gap)))


class Tiles(Proxy):
    """A task over tiles: the backbone sees each by itself; a disposable head sees all that belong together."""

    @dataclass
    class Options:
        """Tiles of an image"""

        grid: Several = 3
        """Cells along each side of an image."""
        gap: BelowOne = 0.15
        """Share of a cell's side that no tile has; tiles lie at random places in their cells."""
        hidden: PositiveInt = 4096
        """Width of the layer that sees all tiles."""

    defaults = {"views": Views(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.3)}
    used = 1  # tiles that the backbone sees; of a subclass

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.grid, self.side = options.grid, tile_side(options.grid, options.gap, images.size)
        name = backbone.pretrained_cfg.get("architecture")
        try:
            with torch.no_grad():
                backbone.eval()(torch.zeros(2, 3, self.side, self.side))
        except Exception as error:
            raise Refused(
                f"proxy.name: {proxy.name} passes tiles of {self.side} px through the backbone, and {name} takes none "
                "of that size; networks for any size do, such as ResNets and ConvNeXts."
            ) from error

    def tiles(self, batch: Batch) -> Tensor:
        """A random view of each image in tiles, [B, grid^2, 3, side, side], each of zero mean and unit deviation."""
        return views.tiles(self.see(batch), self.grid, self.side, batch.draws)

    def embed_tiles(self, tiles: Tensor) -> Tensor:
        """[B, n, 3, side, side] to the features of n tiles side by side, [B, n * width]."""
        return self.mlp(self.network(tiles.flatten(0, 1))).unflatten(0, tiles.shape[:2]).flatten(1)

    @staticmethod
    def nuisance(options: Options) -> tuple[views.View, ...]:
        return some_orders(options.grid)

    @staticmethod
    def residue(options: Options) -> tuple[views.View, ...]:
        return some_orders(options.grid)

    @staticmethod
    def side(options: Options, size: int) -> int:
        return tile_side(options.grid, options.gap, size)

    @classmethod
    def share(cls, options: Options, tiles: int, size: int) -> float:
        """Pixels of `tiles` tiles as a share of an image's."""
        return tiles * cls.side(options, size) ** 2 / size**2


class Jigsaw(Tiles):
    """Cross-entropy over the orders of the tiles, eq. 1 of the paper; a siamese network, its features side by side."""

    specific = "in which order an image's tiles were given"

    @dataclass
    class Options(Tiles.Options):
        """Tiles of an image"""

        orders: PositiveInt = 1000
        """Orders of the tiles, a class each; the most distant ones by Hamming distance."""

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        tiles, self.chance = options.grid**2, 1 / options.orders
        self.register_buffer("orders", distant_orders(options.grid, options.orders), persistent=False)
        self.head = nn.Sequential(
            nn.Linear(tiles * self.width, options.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(options.hidden, options.orders),
        )

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        return Tiles.share(options, options.grid**2, size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tiles = self.tiles(batch)
        which = batch.draws.integers(len(self.orders)).to(tiles.device)
        order = self.orders[which]
        given = tiles.gather(1, order.view(*order.shape, 1, 1, 1).expand_as(tiles))
        logits = full(self.head(self.embed_tiles(given)))
        return {"loss": F.cross_entropy(logits, which), "accuracy": accuracy(logits.detach(), which)}
