"""Instance discrimination (Wu, Xiong, Yu & Lin, CVPR 2018): which image of the data set is this?

With `bank` false the memory is a plain classifier of as many classes as there are images: DIET (Balestriero, arXiv
2406.10743). Invariant to its views, so that nothing is left to average over. Its features are specific to
single images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..images import Images
from ..launch import gather_rows
from ..limits import BelowOne, NonNegativeInt, PositiveFloat, PositiveInt
from ..recipe import Views
from ..task import Batch, accuracy, full
from .proxy import Proxy


class NPID(Proxy):
    """Non-parametric softmax over a bank of features (eq. 2), or its noise-contrastive estimate (eq. 5 to 8)."""

    defaults = {"views": Views(crop_scale=(0.2, 1.0), jitter=1.0, hue=0.4), "lr": 0.03, "weight_decay": 1e-4}

    @dataclass
    class Options:
        """Discrimination of single images"""

        temperature: PositiveFloat = 0.07
        """Temperature of the similarities."""
        dim: PositiveInt = 128
        """Width of what is remembered of an image."""
        negatives: NonNegativeInt = 4096
        """Other images that an image is compared with; 0: all of them."""
        momentum: BelowOne = 0.5
        """Share of what was remembered that stays when an image is seen again."""
        bank: bool = True
        """Remember features; false: learn a classifier of all images (DIET)."""
        label_smoothing: BelowOne = 0.8
        """Of DIET alone."""

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.options, self.count = options, len(images)
        self.chance = 1 / (1 + options.negatives if options.bank and options.negatives else self.count)
        if not options.bank:
            self.head = nn.Linear(self.width, self.count, bias=False)
            return
        self.head = nn.Linear(self.width, options.dim)
        self.register_buffer("bank", F.normalize(torch.randn(self.count, options.dim), dim=1))
        self.register_buffer("constant", torch.zeros(()))  # Z of eq. 8, estimated from the first step
        self.made: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        index = batch.indices.to(batch.pixels.device)
        features = full(self.head(self.embed(self.see(batch))))
        if not self.options.bank:
            loss = F.cross_entropy(features, index, label_smoothing=self.options.label_smoothing)
            return {"loss": loss, "accuracy": accuracy(features.detach(), index)}
        features = F.normalize(features, dim=1)
        if not self.options.negatives:
            logits = features @ self.bank.T / self.options.temperature
            loss, right = F.cross_entropy(logits, index), accuracy(logits.detach(), index)
            first = self.constant
        else:
            drawn = (batch.draws.uniform(self.options.negatives) * self.count).long().to(index.device)
            chosen = torch.cat([index.unsqueeze(1), drawn], 1)
            similar = torch.einsum("bd,bnd->bn", features, self.bank[chosen]) / self.options.temperature
            first = self.count * gather_rows(similar.detach().exp().mean().view(1)).mean()
            constant = torch.where(self.constant > 0, self.constant, first)
            loss = nce(similar, constant, self.count)
            right = (similar.detach().argmax(1) == 0).float().mean()
        self.made.append((index, features.detach(), first))
        return {"loss": loss, "accuracy": right}

    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        if not self.options.bank:
            return
        index, features, first = (
            torch.cat([part[i].reshape(-1, *part[i].shape[1:]) for part in self.made]) for i in range(3)
        )
        index, features, first = (gather_rows(part) for part in (index, features, first))  # all banks are the same
        self.made = []
        kept = self.options.momentum * self.bank[index] + (1 - self.options.momentum) * features
        self.bank[index] = F.normalize(kept, dim=1)
        if self.options.negatives and not self.constant:
            self.constant.copy_(first.mean())


def nce(similar: Tensor, constant: Tensor, count: int) -> Tensor:
    """Noise-contrastive estimate of the softmax over `count` images (eq. 5 to 7), mean over the batch.

    Args:
        similar: [B, 1 + m] similarities over temperature, the image's own first, then those of uniform noise.
        constant: of normalisation, Z.
        count: number of images; the noise has probability 1 / count.
    """
    noise = similar.shape[1] - 1
    odds = similar - torch.log(constant * noise / count)  # log of P(i|v) / (m P_n(i))
    return (F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1)).mean()
