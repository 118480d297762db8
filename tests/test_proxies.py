"""Proxy tasks against a plain loop, and their options."""

import pytest
import torch

from tests.conftest import make_images
from training import backbone as B
from training import loop, proxies, views
from training.files import Refused
from training.launch import Key
from training.proxies.rotation import Rotation
from training.recipe import Model, Proxy, Schedule, Views


def build(images, name="test_resnet", **settings):
    torch.manual_seed(0)
    return proxies.build(Proxy(**{"batch_size": 8, **settings}), B.create(Model(name), images.size), images)


def test_rotation_is_the_cross_entropy_over_four_turns(tiny, context):
    task = build(tiny).double().eval()
    batch = loop.draw_batch(tiny, tiny.train, Schedule(batch_size=8), Key(0, "proxy"), 0, 0, context.accelerator)
    got = task(batch)
    again = loop.draw_batch(tiny, tiny.train, Schedule(batch_size=8), Key(0, "proxy"), 0, 0, context.accelerator)
    images = views.random_views(task.views, again.pixels, again.sizes, again.draws, tiny.size)
    quarters = again.draws.integers(4)
    total, hits = 0.0, 0
    for image, quarter in zip(images.double(), quarters.tolist(), strict=True):
        turned = torch.rot90(image, quarter, (1, 2))
        normal = (turned - task.mean.view(3, 1, 1)) / task.std.view(3, 1, 1)
        logits = task.head(task.network(normal.unsqueeze(0)))[0]
        total -= (logits[quarter] - logits.exp().sum().log()).item()
        hits += int(logits.argmax()) == quarter
    assert got["loss"].item() == pytest.approx(total / 8, rel=1e-5)
    assert got["accuracy"].item() == pytest.approx(hits / 8)
    assert not got["accuracy"].requires_grad


def test_rotation_is_learned(context):
    images = make_images(160)
    # A bright corner tells which side is up.
    images.pixels.stacked[:, :, :7, :7] = 255
    task = build(images, epochs=6, batch_size=16, lr=0.05)
    task.views.flip = 0.0
    loop.train(task, images, images.train, Proxy(epochs=6, batch_size=16, lr=0.05), Key(0, "proxy"), context, "x")
    from training.files import read_lines

    rows = read_lines(context.folder / "metrics.jsonl")
    assert sum(row["accuracy"] for row in rows[-8:]) / 8 > 0.6
    assert sum(row["accuracy"] for row in rows[:4]) / 4 < 0.5


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_the_first_nuisance_view_changes_nothing_and_all_differ(name):
    batch = torch.rand(1, 3, 8, 8)
    seen = [view(batch) for view in proxies.PROXIES[name].nuisance]
    assert torch.equal(seen[0], batch)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    turned = [view(batch) for view in proxies.PROXIES[name].residue]
    assert all(not torch.equal(a, b) for i, a in enumerate(turned) for b in turned[:i])


def test_rotations_of_every_side_are_asked_about_and_measured(tiny, context):
    batch = torch.rand(2, 3, 8, 8)
    expected = [torch.rot90(batch, quarter, (2, 3)) for quarter in range(4)]
    for found, turned in zip(Rotation.residue, expected, strict=True):
        assert torch.equal(found(batch), turned)
    for found, turned in zip(
        Rotation.nuisance, expected + [torch.rot90(batch.flip(3), q, (2, 3)) for q in range(4)], strict=True
    ):
        assert torch.equal(found(batch), turned)
    task, asked = build(tiny), []
    task.head = torch.nn.Identity()
    task.embed = lambda images: torch.zeros(len(images), 4, requires_grad=True)
    for step in range(40):
        drawn = loop.draw_batch(tiny, tiny.train, Schedule(batch_size=8), Key(0, "proxy"), step, 0, context.accelerator)
        before = views.random_views(
            task.views, drawn.pixels, drawn.sizes, views.Draws(Key(0, "proxy").number("views", step), 8), 16
        )
        seen = []
        task.embed = lambda images, seen=seen: seen.append(images) or torch.zeros(len(images), 4, requires_grad=True)
        task(drawn)
        for one, other in zip(seen[0], before, strict=True):
            asked += [q for q in range(4) if torch.allclose(one, torch.rot90(other, q, (1, 2)), atol=1e-6)][:1]
    counts = torch.bincount(torch.tensor(asked), minlength=4)
    assert len(asked) == 320
    assert counts.min() > 50


def test_a_rotation_whose_views_turn_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"proxy\.views\.turn: rotation asks about it"):
        proxies.check(Proxy(views=Views(turn=0.5)))
    proxies.check(Proxy(views=Views(turn=0.5), epochs=0))


def test_an_mlp_and_an_average_come_with_the_schedule(tiny):
    task = build(tiny, mlp_layers=2, mlp_dim=12, ema=0.9)
    assert task.head.in_features == 12
    assert not any(p.requires_grad for p in task.average.parameters())
    with torch.no_grad():
        next(task.network.parameters()).add_(1)
    assert task.result() is task.average.module


def test_unknown_tasks_and_options_are_refused():
    with pytest.raises(Refused, match=r"proxy\.name: .*'jigsaw'.*rotation"):
        proxies.find(Proxy(name="jigsaw"))
    with pytest.raises(Refused, match=r"proxy\.options.*turns"):
        proxies.options(Proxy(options={"turns": 8}))
