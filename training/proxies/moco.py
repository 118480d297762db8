"""MoCo v2 (He et al., CVPR 2020; Chen et al., arXiv 2003.04297): which key of a queue is of the same image?

Invariant to its views, so that nothing is left to average over. Its features are specific to single images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import backbone as B
from .. import recipe
from ..images import Images
from ..limits import BelowOne, PositiveFloat, PositiveInt
from ..task import Batch, full
from .proxy import Proxy, Queue
from .simclr import strong_views


class MoCo(Proxy):
    """InfoNCE, eq. 1 of the first paper: the key of the same image against those of the queue.

    Keys are made by an average of the network (eq. 2), in evaluation mode: its batch norms have the running statistics,
    averaged as the weights are (the newest would not fit them), so that no key tells by the statistics of its batch
    which query it belongs to. The paper met that leak by shuffling images between processes, which does nothing in one
    (compare Cai et al., CVPR 2021).
    """

    defaults = {
        "views": strong_views(crop_scale=(0.2, 1.0), saturation=0.4),
        "lr": 0.03,
        "weight_decay": 1e-4,
        "mlp_layers": 1,
        "mlp_dim": 2048,
    }

    @dataclass
    class Options:
        """Contrast of single images with a queue"""

        temperature: PositiveFloat = 0.2
        """Temperature of the similarities."""
        dim: PositiveInt = 128
        """Width of what is compared."""
        queue: PositiveInt = 65_536
        """Keys that are remembered."""
        momentum: BelowOne = 0.999
        """Decay per step of the network that makes keys."""

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.temperature, self.head = options.temperature, nn.Linear(self.width, options.dim)
        self.chance = 1 / (1 + options.queue)
        self.keys = ModelEmaV3(self._encoder(), decay=options.momentum)
        self.keys.requires_grad_(False)
        self.queue = Queue(options.queue, options.dim)
        self.made: list[Tensor] = []

    def _encoder(self) -> nn.Module:
        return nn.Sequential(self.network, self.mlp, self.head)

    def train(self, mode: bool = True) -> "MoCo":
        super().train(mode)
        self.keys.eval()
        return self

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        return 1 + 1 / 3

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        query, image = self.see(batch), self.normalize(self.see(batch))
        queries = F.normalize(full(self.head(self.embed(query))), dim=1)
        with torch.no_grad():
            keys = F.normalize(full(self.keys.module(image)), dim=1)
        self.made.append(keys)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.rows.T], 1) / self.temperature
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return {"loss": F.cross_entropy(logits, target), "accuracy": (logits.detach().argmax(1) == 0).float().mean()}

    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        self.keys.update(self._encoder())
        B.unite_norms(self.keys.module)  # keys are made with its statistics, which each process has of its own images
        self.queue.push(torch.cat(self.made))
        self.made = []
