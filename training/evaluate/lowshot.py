"""Low-shot: the linear probe on few images of each class, several draws of them."""

import torch
from torch import Tensor

from . import linear

DRAWS = 5


def draw(labels: Tensor, classes: int, shots: int, generator: torch.Generator) -> Tensor:
    """Positions of `shots` rows of each class, all of them where a class has fewer; [n] int64, in order."""
    mixed = torch.randperm(len(labels), generator=generator)
    chosen = [mixed[labels[mixed] == label][:shots] for label in range(classes)]
    return torch.cat(chosen).sort().values


def lowshot(
    rows: dict[str, Tensor], labels: dict[str, Tensor], classes: int, shots: int, grid: list[float], seed: int
) -> tuple[dict[str, list[Tensor]], float]:
    """Predictions of probes that were fitted on `shots` images of each class.

    Args:
        rows: [n, D] features of "train", and of what is predicted, "val" among it.
        labels: [n] int64 of each.
        classes: number of classes.
        shots: images of a class.
        grid: inverse regularisations, one of which is chosen: the best on "val" over all draws.
        seed: of the draws.

    Returns:
        For each part but "train" the [n] int64 predictions of each draw; and the chosen inverse regularisation.
    """
    device, known = rows["train"].device, labels["train"].cpu()
    drawn = [
        draw(known, classes, shots, torch.Generator().manual_seed(seed * DRAWS + n)).to(device) for n in range(DRAWS)
    ]
    fitted: dict[float, list[linear.Probe]] = {}
    for c in sorted(grid):
        fitted[c] = [linear.fit(rows["train"][part], labels["train"][part], classes, c) for part in drawn]
    best = max(fitted, key=lambda c: (sum(probe.top1(rows["val"], labels["val"]) for probe in fitted[c]), -c))
    return {name: [probe(rows[name]).argmax(1) for probe in fitted[best]] for name in rows if name != "train"}, best
