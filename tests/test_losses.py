"""Losses by themselves, each against a plain loop from its paper's equation, in float64; gradients, too."""

import pytest
import torch
import torch.nn.functional as F

from training.proxies.barlow_twins import barlow_twins
from training.proxies.distill import similarity
from training.proxies.npid import nce
from training.proxies.simclr import nt_xent


def same(got, expected, parameters):
    """Values and gradients agree."""
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)
        assert one.abs().sum() > 0


def logsumexp(values):
    return torch.stack(values).exp().sum().log()


def rows(count=6, width=4, seed=0):
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def test_nt_xent():
    a, b = rows(), rows(seed=1)
    one, other = F.normalize(a, dim=1), F.normalize(b, dim=1)
    everyone, total = [*one, *other], 0.0
    for i in range(12):
        positive = everyone[i] @ everyone[(i + 6) % 12] / 0.3
        total = total - (positive - logsumexp([everyone[i] @ everyone[j] / 0.3 for j in range(12) if j != i]))
    same(nt_xent(one, other, 0.3)["loss"], total / 12, (a, b))


def test_barlow_twins():
    a, b = rows(9, 4), rows(9, 4, seed=1)
    total = 0.0
    for i in range(4):
        for j in range(4):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            c = (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())
            total = total + ((1 - c) ** 2 if i == j else 0.02 * c**2)
    same(barlow_twins(a, b, 0.02)["loss"], total, (a, b))


def test_noise_contrastive_estimation():
    similar = rows(3, 6)
    constant, count, m = torch.tensor(40.0, dtype=torch.float64), 50, 5
    total = 0.0
    for row in similar:
        posterior = []
        for value in row:
            p = value.exp() / constant
            posterior.append(p / (p + m / count))
        total = total - posterior[0].log() - sum((1 - h).log() for h in posterior[1:])
    same(nce(similar, constant, count), total / 3, (similar,))


def test_similarities_to_a_queue():
    student, teacher, queue = (
        F.normalize(rows(), dim=1),
        F.normalize(rows(seed=1), dim=1).detach(),
        rows(7, 4, 2).detach(),
    )
    student = student.detach().requires_grad_()
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        keys = [t, *queue]
        target = [(t @ key / 0.1).exp() for key in keys]
        logs = [s @ key / 0.2 for key in keys]
        total = total - sum(x / sum(target) * (y - logsumexp(logs)) for x, y in zip(target, logs, strict=True))
    same(similarity(student, teacher, queue, 0.2, 0.1), total / 6, (student,))
