"""Rotation prediction (Gidaris, Singh & Komodakis, ICLR 2018): which quarter turn was an image given?

Covariant with the four rotations. Its features are specific to which side of a picture is up: gravity, sky, faces.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe, views
from ..images import Images
from ..task import Batch, accuracy, full
from .proxy import Proxy


def _turned(quarters: int, flipped: bool) -> views.View:
    def view(images: Tensor) -> Tensor:
        return torch.rot90(images.flip(3) if flipped else images, quarters, (2, 3))

    return view


class Rotation(Proxy):
    """Cross-entropy over the four rotations, eq. 2 and 3 of the paper.

    The paper passes all four rotations of an image in one step; here each image gets one at random, so that a step is
    batch_size different images and images seen are counted as for any other task.
    """

    asked = ("turn",)
    specific = "by which quarter turn an image was rotated"
    chance = 1 / 4

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Proxy.Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.head = nn.Linear(self.width, 4)

    @staticmethod
    def nuisance(options: Proxy.Options) -> tuple[views.View, ...]:
        return tuple(_turned(quarters, flipped) for flipped, quarters in product((False, True), range(4)))

    @staticmethod
    def residue(options: Proxy.Options) -> tuple[views.View, ...]:
        return tuple(_turned(quarters, False) for quarters in range(4))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = self.see(batch)
        quarters = batch.draws.integers(4)
        logits = self.head(self.embed(views.turn(images, quarters)))
        quarters = quarters.to(logits.device)
        loss = F.cross_entropy(full(logits), quarters)
        return {"loss": loss, "accuracy": accuracy(logits.detach(), quarters)}
