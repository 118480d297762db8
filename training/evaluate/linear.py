"""Linear probe: multinomial logistic regression on frozen, standardised features, by L-BFGS to convergence.

L-BFGS is what Kolesnikov et al. (CVPR 2019, section 3.3) find adequate; SGD would add a schedule to tune.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import Diverged


@dataclass
class Probe:
    """A fitted probe: logits are standardize(x) @ weight + bias."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[n, D] features to [n, classes] logits."""
        return ((features - self.mean) / self.scale) @ self.weight + self.bias

    def top1(self, features: Tensor, labels: Tensor) -> float:
        """Share of features whose largest logit is their label's."""
        return (self(features).argmax(1) == labels).cpu().double().mean().item()


def fit(features: Tensor, labels: Tensor, classes: int, c: float, start: Probe | None = None) -> Probe:
    """Minimise sum of cross-entropies + |weight|^2 / (2 C), as scikit-learn's LogisticRegression; the bias is free.

    Args:
        features: [n, D] float32.
        labels: [n] int64.
        classes: number of classes.
        c: inverse regularisation.
        start: a probe of other regularisation to start from.

    Raises:
        Diverged: a feature is not finite.
    """
    peak = features.abs().max().clamp(min=1e-12)
    if not peak.isfinite():
        raise Diverged("features are not finite, so that no probe can be fitted; the training before them diverged.")
    mean, scale = (peak * x for x in ((features / peak).mean(0), (features / peak).std(0, unbiased=False)))
    scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-12), scale, 1.0)
    rows = (features - mean) / scale
    n, step = len(rows), preconditioner(rows, classes, c)
    # weight.T is moved @ step: in `moved` the loss is about as steep in every direction, and L-BFGS needs a third of
    # the iterations. The gradient is written out, since autograd's products with tall matrices are slower.
    moved = torch.zeros(classes, features.shape[1], device=features.device)
    bias = torch.zeros(classes, device=features.device)
    if start is not None:
        moved, bias = torch.linalg.solve(step.T, start.weight).T.contiguous(), start.bias.clone()
    # The mean loss, not the sum, so that the tolerances mean the same for any number of images.
    optimizer = torch.optim.LBFGS(
        [moved, bias],
        max_iter=1000,
        tolerance_grad=1e-4,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    place = torch.arange(n, device=features.device)

    @torch.no_grad()
    def closure() -> Tensor:
        weight = moved @ step
        # [classes, n]: over the first dimension a softmax is many times as fast.
        log_probabilities = F.log_softmax(torch.addmm(bias[:, None], weight, rows.T), 0)
        loss = weight.square().sum() / (2 * c * n) - log_probabilities[labels, place].mean()
        residual = log_probabilities.exp_()
        residual[labels, place] -= 1
        residual /= n
        moved.grad = (residual @ rows + weight / (c * n)) @ step.T
        bias.grad = residual.sum(1)
        return loss

    optimizer.step(closure)
    return Probe(mean, scale, (moved @ step).T.contiguous(), bias)


def preconditioner(rows: Tensor, classes: int, c: float) -> Tensor:
    """The inverse of the Cholesky factor of the loss's second derivative where all classes are as likely, [D, D]."""
    curvature = (rows.T @ rows).cpu().double() / (len(rows) * classes)
    curvature.diagonal().add_(max(1 / (c * len(rows)), 1e-6 / classes))
    factor = torch.linalg.cholesky(curvature)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False)
    return inverse.to(rows)


def fit_best(
    features: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, classes: int, grid: list[float]
) -> tuple[Probe, float]:
    """The probe whose C, of the grid, does best on the held-out features; the smaller C where two are equal."""
    best, best_c, best_top1, probe = None, grid[0], -1.0, None
    for c in sorted(grid):
        probe = fit(features, labels, classes, c, start=probe)
        top1 = probe.top1(held_out, held_out_labels)
        if top1 > best_top1:
            best, best_c, best_top1 = probe, c, top1
    assert best is not None
    return best, best_c
