"""The loop: schedule, order and randomness are functions of the step; resume, faults, accumulation."""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn

from tests.conftest import make_images
from training import backbone as B
from training import batches, launch, loop, setup
from training.files import Failed, Refused, read_lines
from training.launch import Interrupted, Key
from training.loop import Context
from training.recipe import Model, Schedule, Views
from training.task import BackboneTask, Task

KEY = Key(0, "proxy")
READ = {"lr": 0.1}
CALM = Views(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0)


class Mean(Task):
    """Predicts each image's mean, plainly: no batch norm, so that batches may be split."""

    def __init__(self, spoil_at=None):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(1))
        self.spoil_at, self.drawn, self.dtypes, self.after = spoil_at, [], [], None

    def forward(self, batch):
        self.drawn.append(batch.indices)
        means = batch.pixels.float().mean((2, 3)) / 255
        noise = batch.draws.uniform(1).float().to(means.device) * 0.1
        predicted = self.linear(means)
        self.dtypes.append(predicted.dtype)
        loss = (predicted - means.mean(1, keepdim=True) - noise).square().mean()
        if self.spoil_at is not None and self.steps == self.spoil_at:
            loss = loss * float("nan")
        return {"loss": loss, "noise": noise.mean()}

    def after_step(self, step, total):
        self.steps += 1
        if self.after:
            self.after(step)


def make(**kwargs):
    torch.manual_seed(0)
    return Mean(**kwargs)


def run(task, context, images=None, first=0, last=None, read=READ, earlier=None, **schedule):
    images = images or make_images()
    settings = Schedule(**{"epochs": 3, "batch_size": 8, "lr": 0.1, **schedule})
    loop.train(task, images, images.train, settings, KEY, context, read, first, last, None, earlier)
    return task


def elsewhere(folder):
    (folder / "other").mkdir()
    return folder / "other"


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_learning_rate_warms_up_and_falls_to_nothing():
    rates = [loop.learning_rate(step, 100, 10, 0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_every_epoch_draws_every_image_once_in_an_order_of_its_own(context):
    images = make_images(37)
    task = run(make(), context, images, epochs=2, batch_size=8)
    seen = torch.cat(task.drawn)
    epoch = len(images.train) // 8 * 8
    first, second = seen[:epoch], seen[epoch:]
    assert len(second) == epoch
    for part in (first, second):
        assert len(set(part.tolist())) == epoch
        assert set(part.tolist()) <= set(images.train.tolist())
    assert not torch.equal(first, second)


def test_accumulated_micro_batches_are_the_whole_batch(context, tmp_path):
    whole = run(make(), context)
    context.folder = elsewhere(tmp_path)
    parts = run(make(), context, accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(context, tmp_path):
    whole = run(make(), context, optimizer="adamw", lr=0.01)
    lines = read_lines(context.folder / "metrics.jsonl")
    context.folder = elsewhere(tmp_path)
    task = make()
    task.after = lambda step: setattr(context.stop, "number", 15) if step == 7 else None
    with pytest.raises(Interrupted):
        run(task, context, optimizer="adamw", lr=0.01)
    context.stop.number = None
    assert [path.name for path in context.checkpoints.found("proxy_0")] == ["proxy_0_00000007"]
    resumed = run(make(), context, optimizer="adamw", lr=0.01)
    assert same(whole, resumed)
    again = read_lines(context.folder / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in lines]


@pytest.mark.parametrize("optimizer", ["lamb", "adan", "lion"])
def test_every_optimiser_goes_on_bit_for_bit(optimizer, context, tmp_path):
    whole = run(make(), context, optimizer=optimizer)
    context.folder, task = elsewhere(tmp_path), make()
    task.after = lambda step: setattr(context.stop, "number", 15) if step == 7 else None
    with pytest.raises(Interrupted):
        run(task, context, optimizer=optimizer)
    context.stop.number = None
    assert same(whole, run(make(), context, optimizer=optimizer))


def test_an_optimiser_that_checkpoints_cannot_hold_is_refused():
    with pytest.raises(Refused, match=r"proxy\.optimizer: checkpoints cannot hold what kron remembers"):
        setup.check_fits(Schedule(optimizer="kron", batch_size=8), 40, 1, "proxy.")


def test_a_signal_after_the_last_step_stops_what_would_come_next(context, tmp_path):
    def stopped(step, total):
        context.stop.number = 15 if step == total else None
        return {}

    images, settings = make_images(), Schedule(epochs=1, batch_size=8, lr=0.1)
    with pytest.raises(Interrupted):
        loop.train(make(), images, images.train, settings, KEY, context, READ, epoch_end=stopped)
    context.stop.number = None
    assert context.checkpoints.load("proxy_0", READ).step == 4


def test_the_scale_of_half_precision_goes_on_where_it_was(context, tmp_path):
    def scaled():
        context.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        return make()

    try:
        whole = run(scaled(), context)
        grown = context.accelerator.scaler.state_dict()
        assert grown["scale"] == 16.0
        context.folder, task = elsewhere(tmp_path), scaled()
        task.after = lambda step: setattr(context.stop, "number", 15) if step == 7 else None
        with pytest.raises(Interrupted):
            run(task, context)
        context.stop.number = None
        assert same(whole, run(scaled(), context))
        assert context.accelerator.scaler.state_dict() == grown
    finally:
        context.accelerator.scaler = None


def test_each_training_of_a_task_has_the_precision_of_the_run(tmp_path):
    context = Context(launch.start("bf16", None, str(tmp_path)), tmp_path, launch.StopSignals(), 1, 1000)
    task = make()
    run(task, context, last=4)
    run(task, context, first=4)
    assert task.dtypes == [torch.bfloat16] * 12


def test_a_tracker_gets_steps_that_rise_through_the_phases(context, monkeypatch):
    told = []
    monkeypatch.setattr(context.accelerator, "log", lambda values, step: told.append((step, values)))
    run(make(), context, epochs=1)
    images, settings = make_images(), Schedule(epochs=1, batch_size=8, lr=0.1)
    loop.train(make(), images, images.train, settings, Key(0, "relearn", 1), context, READ)
    assert [step for step, _ in told] == list(range(1, 9))
    assert told[0][1]["proxy_0/step"] == told[4][1]["relearn_1/step"] == 1


def test_metrics_past_the_checkpoint_are_cut_back(context):
    context.checkpoint_every = 5
    task = make(spoil_at=8)
    with pytest.raises(Failed):
        run(task, context)
    assert [row["step"] for row in read_lines(context.folder / "metrics.jsonl")] == list(range(1, 9))
    run(make(), context)
    assert [row["step"] for row in read_lines(context.folder / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize(("epochs", "rows"), [(6, 24), (25, 25)])
def test_a_short_training_is_logged_more_often(epochs, rows, context):
    context.log_every = 4  # of 4 steps an epoch
    run(make(), context, epochs=epochs)
    assert len(read_lines(context.folder / "metrics.jsonl")) == rows


@pytest.mark.parametrize("every", [1, 4])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(context, every):
    context.checkpoint_every, context.log_every = 5, every
    with pytest.raises(Failed, match="loss is not finite at step 9; the checkpoint of step 5 is kept"):
        run(make(spoil_at=8), context, epochs=25)
    saved = context.checkpoints.load("proxy_0", READ)
    assert saved.step == 5
    assert all(value.isfinite().all() for value in saved.tensors.values())


def test_weights_that_are_not_finite_are_never_saved(context):
    task = make()
    task.after = lambda step: task.linear.weight.data.fill_(float("inf")) if step == 3 else None
    with pytest.raises(Failed, match="not finite"):
        run(task, context, epochs=0.75)
    assert context.checkpoints.load("proxy_0", READ) is None


def test_a_part_of_the_schedule_that_is_over_is_not_done_again(context):
    task = run(make(), context, last=6)
    run(task, context, first=6)
    spent = dict(context.budget)
    fresh = make()
    context.budget = {"images": 0.0, "flops": 0.0, "seconds": 0.0}
    run(fresh, context, last=6)
    assert fresh.steps == 0
    run(fresh, context, first=6)
    assert same(task, fresh)
    assert context.budget == spent
    assert context.budget["images"] == 12 * 8


def test_a_batch_larger_than_the_images_is_refused(context):
    with pytest.raises(Refused, match=r"batch_size: 64 is more than the 32 training images; .*, such as 16\."):
        run(make(), context, batch_size=64)


def test_gradients_are_clipped(context, tmp_path):
    free = run(make(), context, epochs=0.25, momentum=0.0, weight_decay=0.0)
    context.folder = elsewhere(tmp_path)
    held = run(make(), context, epochs=0.25, momentum=0.0, weight_decay=0.0, clip_grad=1e-3)
    start = make()

    def moved(task):
        return sum((a - b).square().sum() for a, b in zip(task.parameters(), start.parameters(), strict=True)).sqrt()

    assert moved(free) > 1e-3
    assert moved(held) <= 1.01e-4


def test_the_average_starts_where_it_is_told_to_and_is_the_result():
    images = make_images()
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    backbone.feature_info = [{"reduction": 1}]
    task = BackboneTask(backbone, Schedule(ema=0.9, views=CALM), images, average_from=3)
    expected = None
    for step in range(1, 7):
        with torch.no_grad():
            backbone[2].weight += torch.randn(2, 3)
        task.after_step(step, 6)
        weight = backbone[2].weight.detach().clone()
        expected = weight if step <= 4 else 0.9 * expected + 0.1 * weight
    assert torch.allclose(task.result()[2].weight, expected, atol=1e-6)
    assert not any(
        name.startswith("average") for name, p in task.named_parameters() if p.requires_grad and "module" not in name
    )


def test_operations_are_counted_without_touching_the_task(context):
    images, task = make_images(), make()
    batch = loop.draw_batch(images, images.train, Schedule(batch_size=8), KEY, 0, 0, context.accelerator, rows=2)
    # forward: 3 x 1 products; backward: those of the weight's gradient; a multiply-add counts two
    task.idle = nn.Parameter(torch.zeros(2))
    before = copy.deepcopy(task.state_dict())
    assert loop.rehearse(task, batch) == (2 * 3 + 2 * 3, ["idle"])
    assert all(torch.equal(before[k], v) for k, v in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())


def test_the_recipes_momentum_and_weight_decay_are_the_optimisers():
    optimizer = loop.make_optimizer(make(), Schedule(momentum=0.7, weight_decay=0.03, lr=0.2))
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(1, 3): 0.03, (1,): 0.0}
    # one step of SGD with Nesterov's momentum, by hand
    weight = optimizer.param_groups[0]["params"][0]
    for group in optimizer.param_groups:
        weight = next((p for p in group["params"] if p.ndim > 1), weight)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    gradient = 1 + 0.03 * before
    assert torch.allclose(weight, before - 0.2 * (gradient + 0.7 * gradient), atol=1e-6)


def test_what_a_network_exempts_does_not_decay():
    images = make_images()
    network = B.create(Model("test_vit", args={"img_size": 16}), 16)
    task = BackboneTask(network, Schedule(views=CALM), images)
    spared = {id(p) for g in task.parameter_groups(0.1) if g["weight_decay"] == 0 for p in g["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in spared}
    assert {"pos_embed", "cls_token"} <= names
    assert "blocks.0.attn.qkv.weight" not in names
    assert "blocks.0.attn.qkv.bias" in names


@pytest.mark.parametrize(("warmup", "peak_at"), [(1.0, 3), (0.25, 1), (0.0, 0)])
def test_warm_up_is_at_most_a_tenth_of_the_whole(context, warmup, peak_at):
    run(make(), context, epochs=7.5, warmup=warmup)  # 4 steps an epoch, 30 in all
    rates = [row["lr"] for row in read_lines(context.folder / "metrics.jsonl")]
    assert len(rates) == 30
    assert rates == [pytest.approx(loop.learning_rate(step, 30, peak_at, 0.1)) for step in range(30)]


def test_what_steps_cost_is_counted(context):
    run(make(), context, epochs=2)
    steps = 8
    assert context.budget["images"] == steps * 8
    assert context.budget["flops"] == pytest.approx(steps * 8 * 12)  # as the test above counts an image


def test_draws_and_order_are_functions_of_seed_phase_round_and_step():
    keys = [Key(0, "proxy"), Key(1, "proxy"), Key(0, "relearn"), Key(0, "proxy", 1)]
    assert len({key.number("views", 3) for key in keys} | {Key(0, "proxy").number("views", 4)}) == 5
    assert Key(0, "proxy").number("views", 3) == keys[0].number("views", 3)
    orders = [batches.epoch_order(key, epoch, 50).tolist() for key in keys[:2] for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_batches_are_gathered_before_they_are_asked_for_and_are_their_steps_own(context, monkeypatch):
    images, settings, real = make_images(), Schedule(batch_size=8, accumulate=2), batches.draw_batch
    second = threading.Event()

    def spy(*args):
        if args[4:6] != (1, 0):
            second.set()
        return real(*args)

    monkeypatch.setattr(batches, "draw_batch", spy)
    given = images, images.train, settings, KEY
    drawn = batches.ahead(*given, 1, 9, context.accelerator)
    first = next(drawn)
    assert second.wait(60)  # nobody has asked for it
    drawn.close()
    assert torch.equal(first.pixels, loop.draw_batch(*given, 1, 0, context.accelerator).pixels)
    for (step, part), batch in zip(
        itertools.product(range(1, 9), range(2)), batches.ahead(*given, 1, 9, context.accelerator), strict=True
    ):
        expected = loop.draw_batch(*given, step, part, context.accelerator)
        assert batch.step == step
        for name in ("pixels", "labels", "indices", "step_indices", "sizes"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert torch.equal(batch.draws.uniform(3), expected.draws.uniform(3))
