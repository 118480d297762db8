"""SimMIM (Xie et al., CVPR 2022): paint the masked patches of an image, by a linear layer on the last map.

Patches are masked in the image, so that convolutional networks serve as well as ViTs. Covariant with nothing that views
could undo. Its features are specific to colours and edges nearby: good low layers, and a top that draws.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..extraction import evaluating
from ..files import Refused
from ..images import Images
from ..limits import OpenUnitInterval, PositiveInt
from ..recipe import Views
from ..task import Batch, full
from .proxy import Proxy

PATCHES = 7  # along a side of an image, by default: patches of 32 px at 224


class SimMIM(Proxy):
    """Mean absolute error over masked pixels (eq. 1), of images of zero mean and unit deviation."""

    defaults = {
        "views": Views(crop_scale=(0.67, 1.0), jitter=0.0, grey=0.0),
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "warmup": 10.0, "clip_grad": 5.0,
    }  # fmt: skip

    @dataclass
    class Options:
        """Masked patches"""

        patch: PositiveInt | None = None
        """Side of a masked patch, px; without it a seventh of the image's, 32 at 224."""
        ratio: OpenUnitInterval = 0.6
        """Share of an image's patches that is masked."""

    metric = "explained"
    pooled = False

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        self.patch, self.ratio = options.patch or max(1, self.size // PATCHES), options.ratio
        if self.patch > self.size // 2:
            raise Refused(
                f"proxy.options.patch: {self.patch} px leave fewer than four patches in an image of {self.size} px."
            )
        with torch.no_grad(), evaluating(backbone):
            last = self._map(torch.zeros(1, 3, self.size, self.size))[0]
        self.stride = -(-self.size // last.shape[2])
        self.token = nn.Parameter(torch.zeros(3, 1, 1))
        self.head = nn.Conv2d(last.shape[1], 3 * self.stride**2, 1)

    def _map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last map [B, C, h, w], and the pooled features."""
        final, maps = self.network.forward_intermediates(images, indices=1, norm=True, stop_early=False)
        return maps[-1], self.network.forward_head(final)

    def mask(self, batch: Batch) -> Tensor:
        """[B, 1, S, S] bool, the same share of the patches of every image."""
        along = -(-self.size // self.patch)
        count = max(1, round(self.ratio * along**2))
        chosen = batch.draws.uniform(along**2).argsort(1).argsort(1) < count
        grown = chosen.view(-1, 1, along, along).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return grown[:, :, : self.size, : self.size].to(self.token.device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, mask = self.normalize(self.see(batch)), self.mask(batch)
        last, pooled = self._map(torch.where(mask, self.token.to(images.dtype), images))
        painted = F.pixel_shuffle(full(self.head(last)), self.stride)
        if painted.shape[2:] != images.shape[2:]:  # of a map that does not divide the image
            painted = F.interpolate(painted, images.shape[2:], mode="bilinear", align_corners=False)
        error = ((painted - images).abs() * mask).sum() / (3 * mask.sum())
        plain = (images.abs() * mask).sum() / (3 * mask.sum())  # the error of the data's mean colour
        # What lies behind the last map has no part in this, but DDP asks each parameter for a gradient.
        return {"loss": error + 0.0 * full(pooled).sum(), "explained": 1 - error.detach() / plain}
