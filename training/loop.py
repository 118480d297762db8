"""The one training loop. A task says what is learned; the loop knows nothing of it.

Everything random is a function of (seed, phase, round, step), everything scheduled a function of the step, so that a
run goes on after any interruption as if there had been none.
"""

import copy
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from . import backbone as B
from .batches import ahead, draw_batch
from .checkpoints import Checkpoints, Earlier
from .files import Diverged, Failed, Refused, append_line, read_log, sha256_json, write_lines
from .images import Images
from .launch import Interrupted, Key, StopSignals, out_of_memory, seed_all
from .operations import counting_flops
from .recipe import Schedule
from .task import Batch, Task, check_processes

LINES = 20  # of the log at least, or short trainings would have no curves


@dataclass
class Context:
    """What the phases of a run share.

    Attributes:
        accelerator: devices, processes and precision.
        folder: the run folder.
        stop: requests to end.
        log_every, checkpoint_every: steps.
        budget: images seen, floating-point operations and seconds that the present backbone has cost.
    """

    accelerator: Accelerator
    folder: Path
    stop: StopSignals
    log_every: int
    checkpoint_every: int
    budget: dict[str, float] = field(default_factory=lambda: {"images": 0.0, "flops": 0.0, "seconds": 0.0})

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def spend(self, images: float, flops: float, seconds: float) -> None:
        """Add to what the present backbone has cost."""
        for name, amount in (("images", images), ("flops", flops), ("seconds", seconds)):
            self.budget[name] += amount

    def say(self, text: str) -> None:
        """Print a line, on the main process alone, above any progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def steps_of(schedule: Schedule, images: int, prefix: str = "") -> tuple[int, int]:
    """Steps of an epoch and of the whole schedule; the last partial batch of an epoch is dropped.

    Raises:
        Refused: a batch is larger than the images.
    """
    epoch = images // schedule.batch_size
    if epoch == 0:
        raise Refused(
            f"{prefix}batch_size: {schedule.batch_size} is more than the {images} training images; choose a smaller one"
            + (f", such as {2 ** (images.bit_length() - 2)}." if images > 3 else ".")
        )
    total = round(schedule.epochs * epoch)
    if total == 0 and schedule.epochs > 0:
        raise Refused(f"{prefix}epochs: {schedule.epochs} is less than one step of {schedule.batch_size} images.")
    return epoch, total


def make_optimizer(task: Task, schedule: Schedule) -> torch.optim.Optimizer:
    """The schedule's optimiser, by timm, over the task's trainable parameters."""
    # timm's "sgd" is Nesterov's, which needs a momentum; without one both are plain SGD.
    name = "momentum" if schedule.optimizer == "sgd" and not schedule.momentum else schedule.optimizer
    groups = task.parameter_groups(schedule.weight_decay)
    return create_optimizer_v2(groups, name, lr=schedule.lr, momentum=schedule.momentum)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine to 0 (Loshchilov & Hutter 2017), for the step that comes after `step` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def rehearse(task: Task, batch: Batch) -> tuple[float, list[str]]:
    """A training step, forward and backward, on a copy of the task: an image's floating-point operations, and the
    parameters that learn nothing by it.

    What is a buffer and no batch norm's, such as a queue or a bank, is not copied: `forward` only reads it.
    """
    norms = {id(b) for module in task.modules() if isinstance(module, _BatchNorm) for b in module.buffers()}
    copied = copy.deepcopy(task, {id(b): b for b in task.buffers() if id(b) not in norms})
    with counting_flops() as counter:
        copied(batch)["loss"].backward()
    idle = [name for name, p in copied.named_parameters() if p.requires_grad and p.grad is None]
    return counter.get_total_flops() / len(batch.indices), idle


class Window:
    """Metrics since the last line of the log, left on the device until then."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.steps: list[dict[str, Tensor]] = []
        self.since = time.perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.steps.append(metrics)

    def read(self, step: int, images: int) -> dict[str, float]:
        """Means over the window and the processes, and images/s; `step` steps are done.

        Raises:
            Diverged: a loss was not finite.
        """
        names = list(self.steps[0])
        table = torch.stack([torch.stack([one[name].float() for name in names]) for one in self.steps])
        table = self.context.accelerator.reduce(table, "mean").cpu()
        wrong = (~table[:, names.index("loss")].isfinite()).nonzero().flatten()
        if len(wrong):
            raise Diverged(f"the loss is not finite at step {step - len(self.steps) + int(wrong[0]) + 1}")
        seconds = time.perf_counter() - self.since
        result = dict(zip(names, table.mean(0).tolist(), strict=True))
        result["images_per_second"] = len(self.steps) * images / seconds
        self.steps, self.since = [], time.perf_counter()
        return result


def train(
    task: Task,
    images: Images,
    indices: Tensor,
    schedule: Schedule,
    key: Key,
    context: Context,
    read: Any,
    first: int = 0,
    last: int | None = None,
    epoch_end: Callable[[int, int], dict[str, float]] | None = None,
    earlier: Earlier | None = None,
) -> None:
    """Train `task` in place from step `first` to step `last` of the schedule, or on from the newest checkpoint between.

    Called anew, on a newly prepared model, whenever the trainable parameters change.

    Args:
        task: what is learned.
        images, indices: the split, and which of it may be drawn.
        schedule: batch, optimiser and learning rate.
        key: the phase and round, and the seed.
        context: the run.
        read: what the result depends on, as JSON; checkpoints of a training that read something else are not taken up.
        first, last: steps of the schedule, the whole of it by default.
        epoch_end: called after each epoch and after the last step, with the steps done and all there are; what it
            returns is logged.
        earlier: the schedule that this one goes on from, and whose steps are done.

    Raises:
        Refused: checkpoints are of an unfinished training that read something else.
        Failed: the last checkpoint of the schedule before is gone.
        Diverged: the loss is not finite; the last good checkpoint is kept.
        Interrupted: a signal came; a checkpoint has been written.
    """
    accelerator = context.accelerator
    epoch_steps, total = steps_of(schedule, len(indices))
    last = total if last is None else last
    begin = earlier.step if earlier else 0
    training = {"read": read, "fingerprint": sha256_json(read), "begin": begin, "of": total}
    saved = context.checkpoints.load(key.name, read, context.say, earlier)
    if saved:
        context.budget = saved.state["budget"]
    if first >= last or (saved and saved.step >= last and last < total):
        return  # the next call's part of the schedule has begun
    task.to(accelerator.device, memory_format=task.memory_format).train()
    two = draw_batch(images, indices, schedule, key, first, 0, accelerator, rows=2)
    flops, idle = rehearse(task, two.to(accelerator.device))
    accelerator.ddp_handler.find_unused_parameters = bool(idle)
    optimizer = make_optimizer(task, schedule)
    step = first
    if saved:
        step = saved.step
        check_processes(task, saved.state.get("processes"), accelerator.num_processes, step)
        saved.load_task(task)
        if step > first:
            saved.load_optimizer(optimizer)
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
    model, optimizer = accelerator.prepare(task, optimizer)
    warmup = min(round(schedule.warmup * epoch_steps), (total - begin) // 10)
    log, bar, window = Log(context, key, step), _bar(context, key, step, total), Window(context)
    meter = Meter(context, flops, schedule.batch_size, task.seen)
    drawn = ahead(images, indices, schedule, key, step, last, accelerator)
    saved_at, log_every = step, max(1, min(context.log_every, total // LINES))
    context.stop.deferred = True
    try:
        while step < last:
            rate = learning_rate(step - begin, total - begin, warmup, schedule.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            seed_all(key.number("step", step, accelerator.process_index))
            parts = islice(drawn, schedule.accumulate)
            window.add(take_step(model, optimizer, parts, schedule, accelerator))
            step += 1
            task.after_step(step, total)
            bar.update()
            # The host waits for the device here alone.
            due = step % context.checkpoint_every == 0 or step == last
            look = due or step % log_every == 0
            ends = _agreed(context, look)
            if look or ends:
                means = window.read(step, schedule.batch_size)
                log.write(step, images=round(step * schedule.batch_size * task.seen), lr=rate, **means)
                bar.set_postfix_str(" ".join(f"{k}={v:.4g}" for k, v in {**means, "lr": rate}.items()), refresh=False)
            if due or ends or (epoch_end and step % epoch_steps == 0):
                B.unite_norms(task)
            ended = epoch_end and (step % epoch_steps == 0 or step == total)
            # Before the checkpoint, after which this epoch is over for good.
            if ended and (told := epoch_end(step, total)):
                log.write(step, images=round(step * schedule.batch_size * task.seen), **told)
                bar.set_postfix_str(" ".join(f"{k}={v:.4g}" for k, v in told.items()), refresh=False)
            if due or ends:
                meter.read(step - saved_at)
                save_checkpoint(task, optimizer.optimizer, key, step, training, context)
                saved_at = step
            if ends:
                raise Interrupted(context.stop.number or signal.SIGTERM)
    except Diverged as error:
        kept = f"the checkpoint of step {saved_at} is kept" if saved_at else "there is no checkpoint yet"
        advice = "a lower learning rate, clip_grad or --precision fp32 may help"
        raise Diverged(f"{key.phase}: {error}; {kept}; {advice}.") from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        rows = schedule.batch_size // (accelerator.num_processes * schedule.accumulate)
        half = ("batch_size", schedule.batch_size // 2) if task.whole_batch else ("accumulate", 2 * schedule.accumulate)
        text = "{0}: out of memory at {1} images in one pass; {2}{3} {4} halves what it takes. Finished work is kept."
        prefix = "" if key.phase == "finetune" else f"{key.phase}."  # its schedule is the command's own
        raise Failed(text.format(key.phase, rows, prefix, *half)) from error
    finally:
        context.stop.deferred = False
        drawn.close()
        bar.close()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        task.__dict__.pop("_is_accelerate_prepared", None)  # else the next call's prepare() would leave out autocast
        accelerator.free_memory()
    if _agreed(context, True):  # since the last step looked
        raise Interrupted(context.stop.number or signal.SIGTERM)


def take_step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    parts: Iterable[Batch],
    schedule: Schedule,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """One step of the optimiser over a step's micro-batches; the metrics' means over them, left on the device."""
    metrics: dict[str, Tensor] = {}
    for number, batch in enumerate(parts, start=1):
        with nullcontext() if number == schedule.accumulate else accelerator.no_sync(model):
            result = model(batch)
            accelerator.backward(result["loss"] / schedule.accumulate)
        for name, value in result.items():
            metrics[name] = metrics.get(name, 0) + value.detach() / schedule.accumulate
    if schedule.clip_grad:
        accelerator.clip_grad_norm_(model.parameters(), schedule.clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def save_checkpoint(
    task: Task, optimizer: torch.optim.Optimizer, key: Key, step: int, training: dict[str, Any], context: Context
) -> None:
    """Write a checkpoint, which tells of the `training`, on the main process, if the weights are worth keeping.

    Raises:
        Diverged: a weight is not finite.
    """
    if not all(bool(value.isfinite().all()) for value in task.state_dict().values() if value.is_floating_point()):
        raise Diverged(f"a weight is not finite after step {step}")
    if context.main:
        state = {**training, "step": step, "budget": context.budget, "processes": context.accelerator.num_processes}
        if context.accelerator.scaler:  # of fp16
            state["scaler"] = context.accelerator.scaler.state_dict()
        context.checkpoints.save(key.name, task, optimizer, state)
    context.accelerator.wait_for_everyone()


class Meter:
    """Adds what steps cost to the run's budget."""

    def __init__(self, context: Context, flops: float, batch_size: int, views: float) -> None:
        self.context, self.flops, self.views, self.since = context, flops, views, time.perf_counter()
        self.batch_size = batch_size

    def read(self, steps: int) -> None:
        """Count `steps` more steps, and the time since the last reading."""
        now, images = time.perf_counter(), steps * self.batch_size
        self.context.spend(images * self.views, images * self.flops, now - self.since)
        self.since = now


def _bar(context: Context, key: Key, step: int, total: int) -> tqdm:
    return tqdm(
        total=total,
        initial=step,
        desc=f"{key.phase} {key.round}" if key.round else key.phase,
        unit="step",
        disable=not context.main,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


def _agreed(context: Context, look: bool) -> bool:
    """Whether to stop: one process asks its own flag at each step, several agree when they meet anyway.

    On the CPU that is at each step, which may take long there, while a launcher's patience is 30 seconds.
    """
    accelerator = context.accelerator
    if accelerator.num_processes == 1:
        return context.stop.requested()
    if not look and accelerator.device.type != "cpu":
        return False
    asked = torch.tensor([float(context.stop.requested())], device=accelerator.device)
    return bool(accelerator.reduce(asked, "sum").item() > 0)


class Log:
    """metrics.jsonl, cut back to the step that a phase goes on from, and the user's tracker."""

    def __init__(self, context: Context, key: Key, step: int) -> None:
        self.context, self.key, self.path = context, key, context.folder / "metrics.jsonl"
        self.before = 0  # steps of other phases: trackers want steps that rise
        if context.main:
            rows = read_log(self.path)
            here = (key.phase, key.round)
            self.before = sum(
                {(r["phase"], r["round"]): r["step"] for r in rows if (r["phase"], r["round"]) != here}.values()
            )
            kept = [r for r in rows if (r["phase"], r["round"]) != here or r["step"] <= step]
            if len(kept) < len(rows) or (self.path.exists() and not self.path.read_bytes().endswith(b"\n")):
                write_lines(self.path, kept)

    def write(self, step: int, **told: float) -> None:
        row = {"phase": self.key.phase, "round": self.key.round, "step": step, **told}
        if self.context.main:
            append_line(self.path, row)
        prefix = f"{self.key.name}/"
        row = {prefix + name: value for name, value in row.items() if name != "phase"}
        self.context.accelerator.log(row, step=self.before + step)
