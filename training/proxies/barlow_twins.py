"""Barlow Twins (Zbontar et al., ICML 2021): two views agree in each coordinate, coordinates differ.

Invariant to its views, so that nothing is left to average over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import recipe
from ..images import Images
from ..launch import gather_rows
from ..limits import PositiveFloat, PositiveInt
from ..task import Batch, full
from .proxy import Proxy
from .simclr import published_pair, strong_views


class BarlowTwins(Proxy):
    """Sum of (1 - C_ii)^2 and weight times that of C_ij^2, C the cross-correlation of two views (eq. 1 and 2)."""

    whole_batch = True
    defaults = {
        "views": strong_views(blur=1.0, solarize=0.2),
        "optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6, "warmup": 10.0, "mlp_layers": 2, "mlp_dim": 8192,
    }  # fmt: skip

    @dataclass
    class Options:
        """Cross-correlation"""

        dim: PositiveInt = 8192
        """Width of what is correlated."""
        weight: PositiveFloat = 0.005
        """Weight of what is off the diagonal."""

    metric = "correlation"

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.weight, self.head = options.weight, nn.Linear(self.width, options.dim, bias=False)
        self.views, self.other_views = published_pair(self.views)

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        return 2.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        both = torch.cat([self.see(batch), self.see(batch, self.other_views)])
        one, other = (gather_rows(rows) for rows in full(self.head(self.embed(both))).chunk(2))
        return barlow_twins(one, other, self.weight)


def barlow_twins(one: Tensor, other: Tensor, weight: float) -> dict[str, Tensor]:
    """The loss over [n, D] rows of two views of the same images, each coordinate standardised over the batch."""
    one, other = ((rows - rows.mean(0)) / rows.std(0, unbiased=False).clamp(min=1e-5) for rows in (one, other))
    correlation = one.T @ other / len(one)
    diagonal = correlation.diagonal()
    agree = (1 - diagonal).square().sum()
    differ = correlation.square().sum() - diagonal.square().sum()
    return {"loss": agree + weight * differ, "correlation": diagonal.detach().mean()}
