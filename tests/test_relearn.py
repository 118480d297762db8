"""Relearning: the loss against a plain loop, and which weights move when."""

import pytest
import torch

from tests.conftest import make_images
from training import backbone as B
from training import loop, views
from training import relearn as R
from training.files import Refused, read_lines
from training.launch import Key
from training.recipe import Model, Views
from training.recipe import Relearn as Settings

MODEL = Model("resnet18", {"channels": [8, 12, 16, 20], "output_stride": 8})
KEY = Key(0, "relearn", 1)


def settings(**changes):
    calm = Views(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0)
    made = dict(epochs=1, batch_size=8, lr=0.05, split=2, settle=0.5, mlp_layers=1, mlp_dim=12, views=calm)
    return Settings(**{**made, **changes})


def network():
    torch.manual_seed(5)
    return B.create(MODEL, 16)


def pseudo_labels(images):
    return torch.stack([images.labels, images.labels % 2], 1)


def go(images, context, **changes):
    before = network()
    start = {k: v.clone() for k, v in before.state_dict().items()}
    result = R.relearn(before, MODEL, settings(**changes), pseudo_labels(images), [4, 2], images, KEY, context, {})
    return start, result


def moved(start, result, names):
    after = result.state_dict()
    return {n for n in names if n in after and not torch.equal(after[n], start[n])}


def test_the_loss_is_the_mean_cross_entropy_of_the_heads(tiny, context):
    labels = pseudo_labels(tiny)
    labels[tiny.train[:6], 1] = -1
    low = B.low_names(network(), 2, 16)
    task = R.Relearn(network(), low, labels, [4, 2], settings(label_smoothing=0.2), tiny, 0).double().eval()
    images = [loop.draw_batch(tiny, tiny.train, settings(), KEY, 0, 0, context.accelerator) for _ in range(2)]
    got = task(images[0])
    batch = images[1]
    seen = views.random_views(task.views, batch.pixels, batch.sizes, batch.draws, 16).double()
    hidden = task.mlp(task.network((seen - task.mean.view(3, 1, 1)) / task.std.view(3, 1, 1)))
    losses = []
    for head, column, classes in zip(task.heads, (0, 1), (4, 2), strict=True):
        each = []
        for row, index in zip(hidden, batch.indices.tolist(), strict=True):
            if labels[index, column] >= 0:
                logs = head(row).log_softmax(0)
                target = torch.full((classes,), 0.2 / classes, dtype=torch.float64)
                target[labels[index, column]] += 0.8
                each.append(-(target * logs).sum())
        losses.append(sum(each) / len(each))
    expected = sum(losses) / 2
    assert got["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    parameters = list(task.heads.parameters())
    ours = torch.autograd.grad(got["loss"], parameters)
    theirs = torch.autograd.grad(expected, parameters)
    assert all(torch.allclose(a, b.to(a.dtype), atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("reinit", "norm"), [("none", "stored"), ("high", "stored"), ("none", "batch")])
def test_norms_that_are_stored_keep_the_statistics_that_they_came_with(tiny, context, reinit, norm):
    low = B.low_names(network(), 2, 16)
    start, result = go(tiny, context, reinit=reinit, norm=norm)
    norms = {name for name in start if "running_" in name}
    kept = set() if norm == "batch" else norms & low if reinit == "high" else norms
    assert moved(start, result, norms) == norms - kept  # new ones have to find theirs
    assert moved(start, result, {name.replace("running_mean", "weight") for name in norms if "mean" in name})


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_split(tiny, context):
    labels = pseudo_labels(tiny)
    labels[tiny.train[::3]] = -1
    labels[tiny.train[1:12], 1] = -1
    low = B.low_names(network(), 2, 16)

    def gradient(accumulate):
        torch.manual_seed(3)
        task = R.Relearn(network(), low, labels, [4, 2], settings(), tiny, 0).double().eval()
        loss = 0.0
        for part in range(accumulate):
            chosen = settings(batch_size=24, accumulate=accumulate)
            batch = loop.draw_batch(tiny, tiny.train, chosen, KEY, 0, part, context.accelerator)
            one = task(batch)["loss"] / accumulate
            one.backward()
            loss += one.item()
        return loss, task.heads[1].weight.grad

    whole, gradients = gradient(1)
    for accumulate in (2, 4):
        split, parts = gradient(accumulate)
        assert split == pytest.approx(whole, rel=1e-6)
        assert torch.allclose(parts, gradients, atol=1e-7)


def test_a_drop_that_may_leave_less_than_a_batch_is_refused(tiny):
    R.check(settings(drop=0.5, batch_size=16), tiny)
    with pytest.raises(Refused, match=r"relearn\.drop: 0\.9 may leave 4 of 32"):
        R.check(settings(drop=0.9, batch_size=8), tiny)


def test_a_batch_without_any_label_has_no_loss(tiny, context):
    low = B.low_names(network(), 2, 16)
    task = R.Relearn(network(), low, torch.full((len(tiny), 1), -1), [4], settings(), tiny, 0)
    batch = loop.draw_batch(tiny, tiny.train, settings(), KEY, 0, 0, context.accelerator)
    assert task(batch)["loss"].item() == 0


def test_low_weights_stay_while_settling_and_the_high_part_is_new(tiny, context):
    start, result = go(tiny, context, settle=1.0, epochs=1, reinit="high")
    low = B.low_names(network(), 2, 16)
    weights = {n for n, _ in network().named_parameters()}
    assert moved(start, result, low & weights) == set()
    assert moved(start, result, weights - low) == weights - low


def test_low_weights_move_after_settling_unless_their_rate_is_nothing(tiny, context):
    low = B.low_names(network(), 2, 16) & {n for n, p in network().named_parameters() if p.ndim > 1}
    start, result = go(tiny, context)
    assert moved(start, result, low) == low
    context.folder = context.folder / "other"
    context.folder.mkdir()
    start, result = go(tiny, context, low_lr=0.0)
    assert moved(start, result, low) == set()


def test_low_lr_is_a_share_of_the_learning_rate(tiny):
    low = B.low_names(network(), 2, 16)
    task = R.Relearn(network(), low, pseudo_labels(tiny), [4, 2], settings(low_lr=0.1), tiny, 0)
    scales = {}
    for group in task.parameter_groups(0.01):
        for parameter in group["params"]:
            scales[id(parameter)] = group["lr_scale"], group["weight_decay"]
    assert len(scales) == sum(1 for _ in task.parameters())
    for name, parameter in task.named_parameters():
        is_low = name.removeprefix("network.") in low
        assert scales[id(parameter)] == (0.1 if is_low else 1.0, 0.01 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize(("reinit", "new"), [("none", 0), ("high", 1), ("all", 2)])
def test_what_is_reinitialised_is_what_was_asked(tiny, context, reinit, new, monkeypatch):
    seen = {}
    monkeypatch.setattr(R, "train", lambda task, *a, **k: seen.update(task.network.state_dict()))
    start, _ = go(tiny, context, reinit=reinit)
    low = B.low_names(network(), 2, 16)
    convolutions = {n for n, p in network().named_parameters() if p.ndim == 4}
    changed = {n for n in convolutions if not torch.equal(seen[n], start[n])}
    assert changed == [set(), convolutions - low, convolutions][new]


def test_fresh_weights_are_drawn_anew_each_round(tiny, context, monkeypatch):
    seen = []
    monkeypatch.setattr(R, "train", lambda task, *a, **k: seen.append(task.network.layer4[0].conv1.weight.clone()))
    for key in (KEY, Key(0, "relearn", 2)):
        R.relearn(network(), MODEL, settings(reinit="high"), pseudo_labels(tiny), [4, 2], tiny, key, context, {})
    assert not torch.equal(seen[0], seen[-1])


def test_images_without_a_pseudo_label_are_never_drawn(tiny, context, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        R, "train", lambda task, images, indices, *a, **k: drawn.update(dict.fromkeys(indices.tolist()))
    )
    labels = pseudo_labels(tiny)
    labels[tiny.train[:5]] = -1
    R.relearn(network(), MODEL, settings(), labels, [4, 2], tiny, KEY, context, {})
    assert set(drawn) == set(tiny.train[5:].tolist())


def test_a_split_that_leaves_no_high_part_is_refused():
    with pytest.raises(Refused, match=r"relearn\.split: no parameter lies above stage -1"):
        R.split(network(), settings(split=-1, reinit="high"), 16)
    assert R.split(network(), settings(split=-1, reinit="none"), 16)
    with pytest.raises(Refused, match=r"relearn\.split: 9"):
        R.split(network(), settings(split=9), 16)


def test_relearning_learns_the_labels(context):
    images = make_images(160)
    go(images, context, epochs=8, batch_size=16)
    rows = read_lines(context.folder / "metrics.jsonl")
    assert rows[-1]["accuracy"] > 0.8
