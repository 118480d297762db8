"""BYOL (Grill et al., NeurIPS 2020): predict what an average of the network says of another view.

Invariant to its views, so that nothing is left to average over. No image is told from another; what keeps features from
collapsing is the predictor and the average.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import recipe
from ..images import Images
from ..limits import BelowOne, PositiveInt
from ..task import Batch, full, mlp
from .proxy import Proxy
from .simclr import published_pair, strong_views


class BYOL(Proxy):
    """Mean squared error of unit predictions and unit targets, eq. 2 of the paper, both ways round."""

    defaults = {
        "views": strong_views(blur=1.0, solarize=0.2),
        "optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6, "warmup": 10.0, "mlp_layers": 1, "mlp_dim": 4096,
    }  # fmt: skip

    @dataclass
    class Options:
        """Prediction of an average"""

        dim: PositiveInt = 256
        """Width of what is predicted."""
        momentum: BelowOne = 0.996
        """Decay per step of the average at the start; it rises to 1 by a cosine."""

    metric = "cosine"

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.momentum, self.head = options.momentum, nn.Linear(self.width, options.dim)
        predictor, width = mlp(options.dim, proxy.mlp_dim, 1)
        self.predictor = nn.Sequential(predictor, nn.Linear(width, options.dim))
        self.views, self.other_views = published_pair(self.views)
        self.target = ModelEmaV3(self._encoder(), decay=options.momentum)
        self.target.requires_grad_(False)

    def _encoder(self) -> nn.Module:
        return nn.Sequential(self.network, self.mlp, self.head)

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        return 2 + 2 / 3

    def train(self, mode: bool = True) -> "BYOL":
        super().train(mode)
        self.target.train(mode)  # its batch norms see the batch, as published
        self.store_norms(self.target.module[0])
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        both = torch.cat([self.see(batch), self.see(batch, self.other_views)])
        predicted = full(self.predictor(self.head(self.embed(both))))
        with torch.no_grad():
            target = full(self.target.module(self.normalize(both)))
        swapped = target.roll(len(target) // 2, 0)
        cosine = F.cosine_similarity(predicted, swapped, dim=1)
        return {"loss": 2 * (2 - 2 * cosine).mean(), "cosine": cosine.detach().mean()}

    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        # Section 3.2: 1 - (1 - momentum) (cos(pi k / K) + 1) / 2
        self.target.decay = 1 - (1 - self.momentum) * (math.cos(math.pi * step / total) + 1) / 2
        self.target.update(self._encoder())
