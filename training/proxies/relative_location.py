"""Context prediction (Doersch, Gupta & Efros, ICCV 2015): where does a tile lie, seen from the one in the middle?

Covariant with the arrangement of an image's parts. Its features are specific to where in a scene a part is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..files import Refused
from ..images import Images
from ..task import Batch, accuracy, full
from .jigsaw import Tiles
from .proxy import Proxy


class RelativeLocation(Tiles):
    """Cross-entropy over the neighbours of the middle tile, eight in a grid of 3 x 3 (section 3 of the paper)."""

    specific = "where in an image a tile lies, seen from the middle"

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Tiles.Options) -> None:
        if options.grid % 2 == 0:
            raise Refused(
                f"proxy.options.grid: {options.grid} is even, so that no tile is in the middle; choose an odd one."
            )
        super().__init__(backbone, proxy, images, options)
        count = options.grid**2
        self.middle, self.chance = count // 2, 1 / (count - 1)
        self.register_buffer("others", torch.tensor([i for i in range(count) if i != self.middle]), persistent=False)
        self.head = nn.Sequential(
            nn.Linear(2 * self.width, options.hidden), nn.ReLU(inplace=True), nn.Linear(options.hidden, count - 1)
        )

    @staticmethod
    def seen(options: Proxy.Options, backbone: nn.Module, size: int) -> float:
        return Tiles.share(options, 2, size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tiles = self.tiles(batch)
        which = batch.draws.integers(len(self.others)).to(tiles.device)
        row = torch.arange(len(tiles), device=tiles.device)
        pair = torch.stack([tiles[:, self.middle], tiles[row, self.others[which]]], 1)
        logits = full(self.head(self.embed_tiles(pair)))
        return {"loss": F.cross_entropy(logits, which), "accuracy": accuracy(logits.detach(), which)}
