"""Proxy tasks against a plain loop, and their options."""

import dataclasses
import re

import pytest
import torch

from tests.conftest import make_images
from training import backbone as B
from training import clusters, command, loop, proxies, recipe, usage, views
from training.files import Refused, read_lines
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
    loop.train(task, images, images.train, Proxy(epochs=6, batch_size=16, lr=0.05), Key(0, "proxy"), context, {})
    rows = read_lines(context.folder / "metrics.jsonl")
    assert sum(row["accuracy"] for row in rows[-8:]) / 8 > 0.6
    assert sum(row["accuracy"] for row in rows[:4]) / 4 < 0.5


@pytest.mark.parametrize("name", ["rotation", "jigsaw", "relative_location"])
def test_the_first_nuisance_view_changes_nothing_and_all_differ(name):
    batch = torch.rand(1, 3, 12, 12)
    for found in (proxies.nuisance(proxies.settings(name)), proxies.residue(proxies.settings(name))):
        seen = [view(batch) for view in found]
        assert len(seen) >= 4
        assert torch.equal(seen[0], batch)
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("name", sorted(set(proxies.PROXIES) - {"rotation", "jigsaw", "relative_location"}))
def test_a_task_that_is_invariant_to_its_views_has_nothing_to_average_over(name):
    proxy = proxies.settings(name)
    assert proxies.nuisance(proxy) == proxies.residue(proxy) == ()
    made = command.parse(["--data.path", "digits", "--proxy.name", name])
    assert [clusters.averaging(made, number) for number in (1, 2)] == ["familiar", "familiar"]
    assert made.proxy == proxies.settings(name)  # the command line has the published settings


def test_rotations_of_every_side_are_asked_about_and_measured(tiny, context):
    batch = torch.rand(2, 3, 8, 8)
    expected = [torch.rot90(batch, quarter, (2, 3)) for quarter in range(4)]
    for found, turned in zip(Rotation.residue(None), expected, strict=True):
        assert torch.equal(found(batch), turned)
    for found, turned in zip(
        Rotation.nuisance(None), expected + [torch.rot90(batch.flip(3), q, (2, 3)) for q in range(4)], strict=True
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
    with pytest.raises(Refused, match=r"proxy\.name: .*'magic'.*rotation"):
        proxies.find("magic")
    for arguments in (["--proxy.name", "magic"], ["--proxy.options.turns", "8"], ["--proxy.options", "{turns: 8}"]):
        with pytest.raises(Refused, match=r"magic|turns"):
            command.parse(["--data.path", "digits", *arguments])


class Faint(Rotation):
    """A task of its own, with options and defaults."""

    @dataclasses.dataclass
    class Options:
        """Options of Faint"""

        strength: float = 0.5
        """How strong."""

    defaults = {"lr": 0.3, "mlp_layers": 1, "views": Views(grey=0.7, turn=0.0)}
    whole_batch = True

    @staticmethod
    def nuisance(options):
        return ()

    @staticmethod
    def seen(options, backbone, size):
        return 2.0


def test_a_task_brings_its_options_and_defaults(monkeypatch, tmp_path):
    monkeypatch.setitem(proxies.PROXIES, "faint", Faint)
    made = command.parse(["--data.path", "digits", "--proxy.name", "faint", "--proxy.lr", "0.2"])
    assert (made.proxy.options.strength, made.proxy.mlp_layers, made.proxy.views.grey) == (0.5, 1, 0.7)
    assert made.proxy.lr == 0.2  # what is asked for comes before what is published
    assert command.parse(["--data.path", "digits"]).proxy.views.grey == 0.0  # rotation's are untouched
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(made))  # resolved
    assert "strength: 0.5" in path.read_text()
    assert command.parse(["--config", str(path)]) == made
    path.write_text("proxy: {name: faint, options: {strength: 0.9}}\ndata: {path: digits}\n")
    changed = command.parse(["--config", str(path)])
    assert (changed.proxy.options.strength, changed.proxy.lr) == (0.9, 0.3)
    assert recipe.phase_fields(changed, "proxy")["proxy.options"] == {"strength": 0.9}
    for wrong in (["--proxy.options.strong", "1"], ["--proxy.options.strength", "much"]):
        with pytest.raises(Refused, match=r"proxy\.options\.str"):
            command.parse(["--data.path", "digits", "--proxy.name", "faint", *wrong])
    told = usage.whole(command.parser(["--proxy.name=faint"]))
    assert re.search(r"--proxy.options.strength X +How strong. \[0.5\]", told)


def test_what_a_task_says_of_itself_is_used(monkeypatch, tiny, context):
    monkeypatch.setitem(proxies.PROXIES, "faint", Faint)
    made = command.parse(["--data.path", "digits", "--proxy.name", "faint"])
    assert clusters.averaging(made, 1) == "familiar"  # covariant with nothing
    assert clusters.views_called("none", made.proxy)[0](torch.ones(1, 3, 2, 2)).sum() == 12
    with pytest.raises(Refused, match=r"proxy\.accumulate: the loss of faint needs"):
        proxies.check(dataclasses.replace(made.proxy, accumulate=2))
    proxy = proxies.settings("faint", batch_size=8, epochs=1.0)
    torch.manual_seed(0)
    task = proxies.build(proxy, B.create(Model("test_resnet"), 16), tiny)
    loop.train(task, tiny, tiny.train, proxy, Key(0, "proxy"), context, {})
    assert context.budget["images"] == 4 * 8 * 2  # two views each
