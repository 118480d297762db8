"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018): votes exp(cosine / temperature)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, CACHED = 2**26, 2**22  # similarities held at once; on a CPU


def classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, neighbours: list[int], temperature: float
) -> dict[int, Tensor]:
    """Predict the class of each query from its nearest neighbours by cosine.

    Args:
        bank: [n, D] training features.
        bank_labels: [n] int64.
        queries: [m, D].
        classes: number of classes.
        neighbours: numbers of neighbours, each at most n.
        temperature: of the votes' weights.

    Returns:
        [m] int64 predictions for each number of neighbours.
    """
    bank = F.normalize(bank, dim=1)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    block = CACHED if bank.device.type == "cpu" else BLOCK
    for part in F.normalize(queries, dim=1).split(max(1, block // len(bank))):
        similar, index = (part @ bank.T).topk(max(neighbours), dim=1)
        # A common factor changes no vote; without it exp would leave float32 at small temperatures.
        votes = ((similar - similar[:, :1]) / temperature).exp()
        labels = bank_labels[index]
        for k in neighbours:
            score = torch.zeros(len(part), classes, device=part.device)
            score.scatter_add_(1, labels[:, :k], votes[:, :k])
            found[k].append(score.argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}
