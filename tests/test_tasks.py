"""Every proxy task against a plain loop from its paper's equation, in float64; what it keeps between steps; resume."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_images
from tests.test_losses import logsumexp, same
from training import backbone as B
from training import loop, proxies, views
from training.checkpoints import Checkpoints
from training.files import Refused, read_lines
from training.launch import Interrupted, Key
from training.proxies import check, settings
from training.proxies.barlow_twins import barlow_twins
from training.proxies.jigsaw import distant_orders, tile_side
from training.recipe import Model, Schedule

KEY = Key(0, "proxy")
SIZE = 32


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    B.save(B.create(Model("test_resnet"), 40), folder, make_images(side=46, size=40))
    return f"local-dir:{folder}"


@pytest.fixture
def images():
    return make_images(side=36, size=SIZE)


def small(name, teacher):
    """Options of a size for tests."""
    return {
        "jigsaw": {"grid": 2, "orders": 10, "hidden": 16},
        "relative_location": {"hidden": 16, "gap": 0.1},
        "npid": {"negatives": 6, "dim": 5},
        "simclr": {"dim": 5},
        "moco": {"dim": 5, "queue": 24, "momentum": 0.9},
        "byol": {"dim": 5, "momentum": 0.9},
        "barlow_twins": {"dim": 7},
        "distill": {"teacher": teacher, "queue": 24},
    }.get(name, {})


def build(name, images, teacher, network="test_resnet", options=None, **fields):
    kind = proxies.find(name)
    told = kind.Options(**{**small(name, teacher), **(options or {})})
    given = {"batch_size": 8, "mlp_dim": 6, "options": told, "optimizer": "sgd", "lr": 0.02, "warmup": 0.0, **fields}
    proxy = proxies.settings(name, **given)
    torch.manual_seed(0)
    return proxies.build(proxy, B.create(Model(network), SIZE), images), proxy


def draw(images, context, step=0):
    return loop.draw_batch(images, images.train, Schedule(batch_size=8), KEY, step, 0, context.accelerator)


def exact(task):
    """A task in float64 and evaluation mode, so that each row goes through by itself."""
    return task.double().eval()


def first(task):
    """The network's first weight, which a gradient reaches last."""
    return next(task.network.parameters())


def seen(task, batch, kind=None):
    return views.random_views(kind or task.views, batch.pixels, batch.sizes, batch.draws, SIZE).double()


def normal(task, image):
    return ((image - task.mean.view(3, 1, 1)) / task.std.view(3, 1, 1)).unsqueeze(0)


def embedded(task, image):
    return task.head(task.mlp(task.network(normal(task, image))))[0]


def test_orders_are_far_from_each_other():
    orders = distant_orders(3, 40)
    assert orders[0].tolist() == list(range(9))
    assert all(sorted(order.tolist()) == list(range(9)) for order in orders)
    gaps = [int((a != b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    drawn = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(40)])
    random = [int((a != b).sum()) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert sum(gaps) / len(gaps) > sum(random) / len(random)
    assert min(gaps) > 0
    assert len({tuple(order) for order in distant_orders(2, 24).tolist()}) == 24
    with pytest.raises(Refused, match=r"proxy\.options\.orders: 25 are more than the 24"):
        distant_orders(2, 25)


@pytest.mark.parametrize("name", ["jigsaw", "relative_location"])
def test_tasks_over_tiles(name, images, teacher, context):
    task = exact(build(name, images, teacher)[0])
    task.see = lambda batch: seen(task, batch)
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    tiles = views.tiles(seen(task, again), task.grid, task.side, again.draws)
    total = 0.0
    which = again.draws.integers(len(task.orders) if name == "jigsaw" else 8)
    for row, label in zip(tiles, which.tolist(), strict=True):
        if name == "jigsaw":
            given = [row[place] for place in task.orders[label].tolist()]
        else:
            given = [row[4], row[label if label < 4 else label + 1]]
        features = torch.cat([task.mlp(task.network(tile.unsqueeze(0)))[0] for tile in given])
        logits = task.head(features)
        total = total - (logits[label] - logsumexp(list(logits)))
    same(got, total / 8, [*task.head.parameters(), first(task)])


def test_simclr(images, teacher, context):
    task = exact(build("simclr", images, teacher)[0])
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    both = torch.cat([seen(task, again), seen(task, again)])
    units = [F.normalize(embedded(task, image), dim=0) for image in both]
    total = 0.0
    for i in range(16):
        others = [units[i] @ units[j] / task.temperature for j in range(16) if j != i]
        total = total - (units[i] @ units[(i + 8) % 16] / task.temperature - logsumexp(others))
    same(got, total / 16, [task.head.weight, first(task)])


def test_moco(images, teacher, context):
    task = exact(build("moco", images, teacher)[0])
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    one, other = seen(task, again), seen(task, again)
    total, keys = 0.0, []
    for query, key in zip(one, other, strict=True):
        q = F.normalize(embedded(task, query), dim=0)
        with torch.no_grad():
            keys.append(F.normalize(task.keys.module(normal(task, key))[0], dim=0))
        logits = [q @ k / task.temperature for k in (keys[-1], *task.queue.rows)]
        total = total - (logits[0] - logsumexp(logits))
    same(got, total / 8, [task.head.weight, first(task)])
    assert not [p for p in task.keys.parameters() if p.requires_grad]
    # after the step: the average has moved, and the queue has the keys in place of its oldest
    before, old = task.queue.rows.clone(), task.keys.module[2].weight.clone()
    with torch.no_grad():
        task.head.weight.add_(1)
    task.after_step(1, 10)
    assert torch.allclose(task.keys.module[2].weight, 0.9 * old + 0.1 * task.head.weight)
    assert torch.allclose(task.queue.rows[:8], torch.stack(keys))
    assert torch.equal(task.queue.rows[8:], before[8:])
    for _ in range(3):
        task(draw(images, context))
        task.after_step(1, 10)
    assert int(task.queue.place) == 8  # 32 of 24 places: round once


def test_byol(images, teacher, context):
    task = exact(build("byol", images, teacher)[0])
    assert task.other_views.solarize == 0.2
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    one, other = seen(task, again), seen(task, again, task.other_views)
    total = 0.0
    for a, b in zip(one, other, strict=True):
        for asked, told in ((a, b), (b, a)):
            p = task.predictor(embedded(task, asked).unsqueeze(0))[0]
            with torch.no_grad():
                z = task.target.module(normal(task, told))[0]
            total = total + (p / p.norm() - z / z.norm()).square().sum()
    same(got, total / 8, [task.head.weight, first(task)])
    for step, decay in ((0, 0.9), (5, 0.95), (10, 1.0)):
        task.after_step(step, 10)
        assert task.target.decay == pytest.approx(decay)
    for stored in (False, True):
        task.stored = stored
        norms = [module for module in task.train().target.module[0].modules() if hasattr(module, "running_mean")]
        assert [norm.training for norm in norms] == [not stored] * len(norms)


def test_barlow_twins_sees_two_views(images, teacher, context):
    task = exact(build("barlow_twins", images, teacher)[0])
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    assert (task.views.solarize, task.other_views.solarize) == (0, 0.2)
    both = seen(task, again), seen(task, again, task.other_views)
    one, other = (torch.stack([embedded(task, image) for image in images]) for images in both)
    same(got, barlow_twins(one, other, 0.005)["loss"], [task.head.weight, first(task)])


@pytest.mark.parametrize("negatives", [0, 6])
def test_npid(negatives, images, teacher, context):
    task = exact(build("npid", images, teacher, options={"negatives": negatives})[0])
    told = task(draw(images, context))
    again = draw(images, context)
    views_of = seen(task, again)
    drawn = (again.draws.uniform(negatives) * len(images)).long() if negatives else None
    units = [F.normalize(embedded(task, image), dim=0) for image in views_of]
    total, values, hits = 0.0, [], 0
    for i, (unit, index) in enumerate(zip(units, again.indices.tolist(), strict=True)):
        if negatives:
            values.append([unit @ task.bank[j] / 0.07 for j in (index, *drawn[i].tolist())])
            hits += values[-1][0] == max(values[-1])
        else:
            logits = [unit @ row / 0.07 for row in task.bank]
            total = total - (logits[index] - logsumexp(logits))
            hits += logits[index] == max(logits)
    if negatives:
        constant = len(images) * torch.stack([v.exp() for row in values for v in row]).mean().detach()  # eq. 8
        for row in values:
            h = [v.exp() / constant / (v.exp() / constant + negatives / len(images)) for v in row]
            total = total - h[0].log() - sum((1 - x).log() for x in h[1:])
    same(told["loss"], total / 8, [task.head.weight, first(task)])
    assert told["accuracy"] == pytest.approx(hits / 8)
    before = task.bank.clone()
    task.after_step(1, 10)
    for unit, index in zip(units, again.indices.tolist(), strict=True):
        assert torch.allclose(task.bank[index], F.normalize(0.5 * before[index] + 0.5 * unit, dim=0))
    others = [i for i in range(len(images)) if i not in again.indices.tolist()]
    assert torch.equal(task.bank[others], before[others])
    assert bool(task.constant > 0) == bool(negatives)


def test_npid_without_a_bank_is_a_classifier_of_all_images(images, teacher, context):
    task = exact(build("npid", images, teacher, options={"bank": False, "label_smoothing": 0.5})[0])
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    total = 0.0
    for image, index in zip(seen(task, again), again.indices.tolist(), strict=True):
        logs = embedded(task, image).log_softmax(0)
        total = total - 0.5 * logs[index] - 0.5 * logs.mean()
    same(got, total / 8, [task.head.weight, first(task)])


def test_simmim(images, teacher, context):
    task = exact(build("simmim", images, teacher, options={"patch": 8, "ratio": 0.6})[0])
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    views_of = torch.stack([normal(task, image)[0] for image in seen(task, again)])
    ranks = again.draws.uniform(16).argsort(1).argsort(1)
    error, count = 0.0, 0
    for image, rank in zip(views_of, ranks, strict=True):
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for patch in range(16):
            if rank[patch] < round(0.6 * 16):
                mask[patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = True
        given = torch.where(mask, task.token, image).unsqueeze(0)
        _, maps = task.network.forward_intermediates(given, indices=1)
        painted = F.pixel_shuffle(task.head(maps[-1]), task.stride)[0]
        error = error + (painted - image).abs()[:, mask].sum()
        count += 3 * int(mask.sum())
    same(got, error / count, [task.head.weight, task.token, first(task)])


def test_simmim_masks_something_however_small_the_share(images, teacher, context):
    task = build("simmim", images, teacher, options={"ratio": 0.001})[0]
    assert task.mask(draw(images, context)).flatten(1).any(1).all()


@pytest.mark.parametrize("match", ["cosine", "similarity"])
def test_distill(match, images, teacher, context):
    task = exact(build("distill", images, teacher, options={"match": match})[0])
    task.teacher[0].double()
    got = task(draw(images, context))["loss"]
    again = draw(images, context)
    drawn = views.draw(task.views, again.sizes, again.draws)
    total = 0.0
    for small_view, large in zip(
        views.apply(again.pixels, drawn, SIZE).double(), views.apply(again.pixels, drawn, 40).double(), strict=True
    ):
        s = F.normalize(embedded(task, small_view), dim=0)
        image = ((large - task.teacher_mean.view(3, 1, 1)) / task.teacher_std.view(3, 1, 1)).unsqueeze(0)
        with torch.no_grad():
            t = F.normalize(task.teacher[0](image)[0], dim=0)
        if match == "cosine":
            total = total + 1 - s @ t
            continue
        target = torch.stack([t @ key / 0.01 for key in (t, *task.queue.rows)]).softmax(0)
        logs = torch.stack([s @ key / 0.2 for key in (t, *task.queue.rows)]).log_softmax(0)
        total = total - (target * logs).sum()
    same(got, total / 8, [task.head.weight, first(task)])
    assert not [name for name in task.state_dict() if "teacher" in name]


# All of them


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_an_interrupted_task_ends_bit_for_bit_as_one_that_was_not(name, images, teacher, context, tmp_path):
    options = {"match": "similarity"} if name == "distill" else {}

    def train(stop=None):
        task, proxy = build(name, images, teacher, options=options, epochs=2.0, ema=0.5)
        real, done = task.after_step, []

        def after(step, total):
            real(step, total)
            done.append(step)
            context.stop.number = 15 if step == stop else None

        task.after_step = after
        loop.train(task, images, images.train, proxy, KEY, context, {})
        return task

    whole = train()
    lines = [row["loss"] for row in read_lines(context.folder / "metrics.jsonl")]
    context.folder = tmp_path / "elsewhere"
    context.folder.mkdir()
    with pytest.raises(Interrupted):
        train(stop=3)
    context.stop.number = None
    assert Checkpoints(context.folder / "checkpoints").load("proxy_0", {}).step == 3
    resumed = train()
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert [row["loss"] for row in read_lines(context.folder / "metrics.jsonl")] == lines
    assert all(math.isfinite(loss) for loss in lines)


@pytest.mark.parametrize("network", ["test_convnext", "test_vit"])
@pytest.mark.parametrize("name", sorted(set(proxies.PROXIES) - {"jigsaw", "relative_location"}))
def test_other_families_take_a_step(name, network, images, teacher, context):
    task, proxy = build(name, images, teacher, network=network, epochs=0.5)
    before = {n: p.clone() for n, p in task.network.named_parameters()}
    loop.train(task, images, images.train, proxy, KEY, context, {})
    moved = [n for n, p in task.network.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.85 * len(before)


def test_what_cannot_be_served_is_refused(images, teacher):
    for name in ("jigsaw", "relative_location"):
        with pytest.raises(Refused, match=rf"proxy\.name: {name} passes tiles of \d+ px .* networks for any size do"):
            build(name, images, teacher, network="test_vit")
    with pytest.raises(Refused, match=r"proxy\.options\.grid: 2 is even"):
        build("relative_location", images, teacher, options={"grid": 2})
    with pytest.raises(Refused, match=r"proxy\.mlp_layers: simmim reads maps"):
        check(settings("simmim", mlp_layers=1))
    with pytest.raises(Refused, match=r"proxy\.options\.patch"):
        build("simmim", images, teacher, options={"patch": 20})
    for name, said in (("", "name the teacher"), ("resnet81", "timm has no model"), ("resnet18.nowhere", "timm")):
        with pytest.raises(Refused, match=rf"proxy\.options\.teacher: .*{said}"):
            build("distill", images, teacher, options={"teacher": name})


def test_views_are_counted(images, teacher):
    counts = {name: build(name, images, teacher)[0].seen for name in proxies.PROXIES}
    expected = {"rotation": 1, "npid": 1, "simmim": 1, "simclr": 2, "barlow_twins": 2, "moco": 4 / 3, "byol": 8 / 3}
    assert {name: counts[name] for name in expected} == pytest.approx(expected)
    assert counts["jigsaw"] == pytest.approx(4 * tile_side(2, 0.15, SIZE) ** 2 / SIZE**2)
    assert counts["relative_location"] == pytest.approx(2 * tile_side(3, 0.1, SIZE) ** 2 / SIZE**2)
    # the teacher has the same network, at 40 px instead of 32
    assert counts["distill"] == pytest.approx(1 + 1.56 / 3, rel=0.05)


def test_a_bank_is_not_copied_to_count_operations(images, teacher, context):
    task, _ = build("npid", images, teacher)
    bank = task.bank.clone()
    copied = []
    real = torch.Tensor.__deepcopy__

    def spy(self, memo):
        copied.append(self.shape)
        return real(self, memo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__deepcopy__", spy)
        assert loop.rehearse(task, dataclasses.replace(draw(images, context)))[0] > 0
    assert task.bank.shape not in copied
    assert torch.equal(task.bank, bank)
    assert not task.made
