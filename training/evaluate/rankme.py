"""RankMe (Garrido et al., ICML 2023): the effective rank of features, which needs no labels."""

import torch
from torch import Tensor


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """exp of the entropy of the normalised singular values of [n, D] features, not centred; between 1 and min(n, D)."""
    values = torch.linalg.svdvals(features)
    share = values / values.sum().clamp(min=1e-30) + epsilon
    return torch.exp(-(share * share.log()).sum()).item()
