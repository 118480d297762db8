"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020): which of the other views in a batch is of the same image?

Invariant to its views, so that nothing is left to average over. Its features are specific to single images.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..images import Images
from ..launch import first_row, gather_rows
from ..limits import PositiveFloat, PositiveInt
from ..recipe import Views
from ..task import Batch, full
from .proxy import Proxy


def strong_views(**changes: Any) -> Views:
    """Views as contrastive tasks were published with: crop, flip, strong colour, blur."""
    colour = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    return Views(**{"crop_scale": (0.08, 1.0), **colour, "grey": 0.2, "blur": 0.5, **changes})


def published_pair(views: Views) -> tuple[Views, Views]:
    """BYOL's views: one is always blurred, the other seldom, and sometimes solarised."""
    return dataclasses.replace(views, solarize=0.0), dataclasses.replace(views, blur=0.1 * views.blur)


class SimCLR(Proxy):
    """NT-Xent, eq. 1 of the paper, over the views of all processes."""

    whole_batch = True
    defaults = {
        "views": strong_views(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "warmup": 10.0, "mlp_layers": 1, "mlp_dim": 2048,
    }  # fmt: skip

    @dataclass
    class Options:
        """Contrast of single images"""

        temperature: PositiveFloat = 0.1
        """Temperature of the similarities."""
        dim: PositiveInt = 128
        """Width of what is compared."""

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.temperature, self.head = options.temperature, nn.Linear(self.width, options.dim, bias=False)
        self.chance = 1 / (2 * proxy.batch_size - 1)

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        return 2.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        both = torch.cat([self.see(batch), self.see(batch)])
        one, other = F.normalize(full(self.head(self.embed(both))), dim=1).chunk(2)
        return nt_xent(one, other, self.temperature)


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> dict[str, Tensor]:
    """Mean over both views of -log softmax of the similarity to the other view of the image, itself left out (eq. 1).

    Args:
        one, other: [n, D] unit rows of this process; row i of both is of one image.
        temperature: of the similarities.
    """
    n, first = len(one), first_row(len(one))
    everyone = [gather_rows(rows) for rows in (one, other)]
    place = torch.arange(n, device=one.device)
    losses, hits = [], []
    for own, others in ((one, everyone), (other, everyone[::-1])):
        same, opposite = (own @ rows.T / temperature for rows in others)
        same = same.index_put((place, place + first), same.new_tensor(-torch.inf))
        logits = torch.cat([opposite, same], 1)
        losses.append(F.cross_entropy(logits, place + first))
        hits.append((logits.detach().argmax(1) == place + first).float().mean())
    return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(hits).mean()}
