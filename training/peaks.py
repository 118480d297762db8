"""What each phase takes of memory at its peak; what cannot fit is refused before anything is trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from timm.optim import get_optimizer_info
from torch import Tensor, nn

from . import proxies
from .extraction import evaluating, rows_of_pass
from .files import Refused
from .images import Images
from .memory import free_memory
from .operations import passes
from .recipe import Recipe, Relearn, Schedule
from .task import mlp, pooled_size

FLOAT = torch.float32.itemsize
SPARE = 1.25  # of what autograd keeps: the backward pass's own maps, and the allocator's gaps
BLOCKS = 2**29  # bytes of similarities, whitened rows and their like, a block at a time
VIEWS = 4  # floats that a view's making holds for each of its values


@dataclass(frozen=True)
class Peak:
    """What a phase takes beside what is taken when it begins, in a process.

    Attributes:
        phase: its name.
        where: "host" or "device"; a CPU is both.
        size: bytes.
        advice: given the bytes that there are, what would fit.
    """

    phase: str
    where: str
    size: float
    advice: Callable[[float], str]


def kept(network: nn.Module, size: int, precision: str) -> float:
    """Bytes that autograd keeps of a view in the run's precision: what two more views add to two."""
    device = next(network.parameters()).device
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def of(rows: int) -> int:
        seen: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
            torch.autocast(device.type, dtype=half, enabled=half is not None),
        ):
            network(torch.zeros(rows, 3, size, size, device=device))
        return sum(seen.values())

    with evaluating(network):  # no statistics are touched
        return (of(4) - of(2)) / 2


def largest(network: nn.Module, size: int) -> float:
    """Bytes of the largest layer's input and output for an image, which is what a forward pass alone holds."""
    found = passes(network, size, (nn.Conv2d, nn.Linear))
    return FLOAT * max((into.numel() + out.numel() for _, _, into, out in found), default=0)


def picture_bytes(images: Images) -> float:
    """Bytes that making a view of an image takes."""
    return FLOAT * VIEWS * 3 * (images.pixels.nbytes / max(1, len(images.all)) / 3 + images.size**2)


def side_of(accelerator: Accelerator) -> str:
    """Where a step's memory is."""
    return "host" if accelerator.device.type == "cpu" else "device"


def held(task: nn.Module, schedule: Schedule) -> float:
    """Bytes of a task's weights and buffers, and of the gradients and averages of what learns."""
    averages = 2 if get_optimizer_info(schedule.optimizer).has_betas else bool(schedule.momentum)
    learns = sum(p.nbytes for p in task.parameters() if p.requires_grad)
    return (1 + averages) * learns + sum(tensor.nbytes for tensor in (*task.parameters(), *task.buffers()))


def relearned(settings: Relearn, clusters: list[int], network: nn.Module, size: int) -> nn.Module:
    """The network, its disposable MLP and a head for each clustering, as phase 3 learns them, the last two unfilled."""
    pooled = pooled_size(network, size)
    with torch.device("meta"):
        blocks, width = mlp(pooled, settings.mlp_dim, settings.mlp_layers)
        heads = [nn.Linear(width, k) for k in clusters]
    average = [copy.deepcopy(network).requires_grad_(False)] if settings.ema else []
    return nn.ModuleList([network, blocks, *heads, *average])


def step(
    phase: str,
    schedule: Schedule,
    network: nn.Module,
    images: Images,
    precision: str,
    accelerator: Accelerator,
    views: float = 1.0,
    whole_batch: bool = False,
    task: nn.Module | None = None,
) -> Peak:
    """The peak of a training step.

    Args:
        phase: its name; where its fields have the schedule's own names, "".
        schedule: batch and optimiser.
        network: what is trained.
        images: what is seen.
        precision: of the arithmetic.
        accelerator: tells the processes and the device.
        views: of an image.
        whole_batch: the task needs all images of a micro-batch at once.
        task: the network with its heads and whatever else the task keeps; without one the network alone.
    """
    processes, prefix = accelerator.num_processes, f"{phase}." if phase else ""
    weights = held(task or network, schedule)
    view = views * (SPARE * kept(network, images.size, precision) + picture_bytes(images))
    share = schedule.batch_size // processes
    rows = share // schedule.accumulate

    def bytes_of(rows: int) -> float:
        return weights + rows * view

    def advice(free: float) -> str:
        smaller = [n for n in range(1, rows) if rows % n == 0 and bytes_of(n) <= free]
        if not smaller:
            return "a smaller data.size or network needs less"
        if whole_batch:
            return f"{prefix}batch_size {smaller[-1] * processes * schedule.accumulate} would fit"
        return f"{prefix}accumulate {share // smaller[-1]} would fit"

    return Peak(f"{phase or 'training'}: a step of {rows} images", side_of(accelerator), bytes_of(rows), advice)


def peaks(
    recipe: Recipe, splits: tuple[Images, Images | None], network: nn.Module, accelerator: Accelerator
) -> list[Peak]:
    """The phases' peaks."""
    train, test = splits
    processes, size, found = accelerator.num_processes, recipe.data.size, []

    def passing(free: float) -> str:
        fit = int((free - BLOCKS) / max(1.0, forward) * processes)
        return f"evaluate.batch_size {fit} would fit" if fit > 0 else "a smaller data.size or network needs less"

    forward = largest(network, size) + picture_bytes(train)
    rows = rows_of_pass(recipe.evaluate.batch_size, size, accelerator)
    found.append(Peak(f"features: a pass of {rows} images", side_of(accelerator), BLOCKS + rows * forward, passing))
    if recipe.proxy.epochs:
        whole, seen = proxies.find(recipe.proxy.name).whole_batch, proxies.seen(recipe.proxy, network, size)
        task = proxies.build(recipe.proxy, copy.deepcopy(network), train)
        found.append(step("proxy", recipe.proxy, network, train, recipe.precision, accelerator, seen, whole, task))
    if recipe.relearn.rounds:
        task = relearned(recipe.relearn, recipe.clusters.k, network, size)
        found.append(step("relearn", recipe.relearn, network, train, recipe.precision, accelerator, task=task))
        width = recipe.clusters.whiten or max(info["num_chs"] for info in network.feature_info)
        count = len(train.all) / processes

        def narrower(free: float) -> str:
            return f"clusters.whiten {max(1, int((free - BLOCKS) / (FLOAT * count)))} would fit"

        found.append(Peak("clusters: whitened features", "host", BLOCKS + FLOAT * count * width, narrower))
    width = sum(info["num_chs"] for info in network.feature_info) + network.num_features
    counts = [min(recipe.evaluate.images, len(part)) for part in (train.train, train.val)]
    rest = len(test.all) if test and recipe.evaluate.test else 0

    def fewer(free: float) -> str:
        fit = int(free / (2 * FLOAT * width)) - rest
        return f"evaluate.images {fit // 2} would fit" if fit > 1 else "evaluate.test false needs less"

    size = 2 * FLOAT * width * (sum(counts) + rest)  # as they come, in batches, and joined
    found.append(Peak(f"evaluate: features of {sum(counts) + rest} images", "host", size, fewer))
    return found


def check(recipe: Recipe, splits: tuple[Images, Images | None], network: nn.Module, accelerator: Accelerator) -> str:
    """What a run takes at most, for the screen; raises what `fitting` does."""
    return fitting(peaks(recipe, splits, network, accelerator), accelerator)


def fitting(found: list[Peak], accelerator: Accelerator) -> str:
    """Which of these takes most, for the screen.

    Raises:
        Refused: it is not there; naming phase, field and the value that would fit.
    """
    local = accelerator.num_processes  # of which a machine has all, as far as a process can tell
    free = {"host": free_memory() / local}
    if accelerator.device.type == "cuda":
        free["device"] = float(torch.cuda.mem_get_info(accelerator.device)[0])
    found = [peak for peak in found if peak.where in free]
    for peak in found:
        if peak.size > free[peak.where]:
            each = f" for each of {local} processes" if local > 1 else ""
            raise Refused(
                f"{peak.phase} would take about {_amount(peak.size)} of memory on the {peak.where}, and "
                f"{_amount(free[peak.where])} are free{each}; {peak.advice(free[peak.where])}."
            )
    most = {peak.where: peak for peak in sorted(found, key=lambda peak: peak.size)}
    return "memory at the peak, beside what is taken already: " + "; ".join(
        f"about {_amount(most[where].size)} of {_amount(free[where])} on the {where} ({most[where].phase})"
        for where in free
        if where in most
    )


def _amount(size: float) -> str:
    if size < 1e8:
        return f"{max(1, round(size / 1e6))} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
