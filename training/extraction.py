"""Features of images from a frozen backbone, in float32 and evaluation mode, by all processes together.

Every process extracts the features of its own share of the images, consecutive ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from . import views
from .images import Images
from .recipe import Views

Stage = int | str  # an index into feature_info, or "pooled"
PLACES = 2**32  # what the seed of windows of long pictures is beyond that of views
DELAY = 3  # seconds until a pass over images has a progress bar
GATHERED = 2**24  # values that processes send each other at once
CACHED, LEAST = 2**18, 16  # px that a core of a CPU passes forward at once, since maps of more leave its caches; images


def features(network: nn.Module, images: Tensor, stages: Iterable[int]) -> dict[Stage, Tensor]:
    """Features of a batch: each stage's, [B, D], the mean over positions without prefix tokens; and the pooled ones.

    The network must be in evaluation mode for these to be the features that records speak of.
    """
    stages = list(stages)
    final, maps = network.forward_intermediates(images, indices=stages, norm=False, stop_early=False)
    result: dict[Stage, Tensor] = {stage: level.flatten(2).mean(2) for stage, level in zip(stages, maps, strict=True)}
    result["pooled"] = network.forward_head(final)
    return result


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # those inside a module after it
            module.train(mode)  # whereby LeViT and its like drop what they remember, which nobody could copy


def plain_batch(
    images: Images, indices: Tensor, device: torch.device, view: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Un-augmented images, normalised, on the device; `view` changes them, [B, 3, H, W] in [0, 1], before that."""
    mean, std = (torch.tensor(x, device=device) for x in (images.mean, images.std))
    squares = images.pixels.squares(indices).to(device)
    batch = views.plain(squares, images.sides[indices], images.crop_pct, images.size)
    return views.normalize(view(batch) if view else batch, mean, std)


def random_batch(
    images: Images, indices: Tensor, device: torch.device, kind: Views, draws: views.Draws, places: views.Draws
) -> Tensor:
    """A random view of each image, normalised, on the device; `places` are those of windows of long pictures."""
    mean, std = (torch.tensor(x, device=device) for x in (images.mean, images.std))
    whole, sizes = images.pixels.windows(indices, places.uniform)
    return views.normalize(views.random_views(kind, whole.to(device), sizes, draws, images.size), mean, std)


def share(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's share of rows that all processes have: consecutive ones, as many for each but for one."""
    return rows.tensor_split(accelerator.num_processes)[accelerator.process_index]


def rows_of_pass(batch_size: int, size: int, accelerator: Accelerator) -> int:
    """Images of `size` px that this process passes forward at once; all together `batch_size`, on a CPU fewer."""
    rows = max(1, batch_size // accelerator.num_processes)
    if accelerator.device.type == "cpu":
        rows = min(rows, max(LEAST, torch.get_num_threads() * CACHED // size**2))
    return rows


@torch.no_grad()
def batches(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    accelerator: Accelerator,
    batch_size: int,
    stages: Iterable[int] = (),
    view: Callable[[Tensor], Tensor] | None = None,
    random: tuple[Views, int] | None = None,
) -> Iterator[tuple[int, dict[Stage, Tensor]]]:
    """Features of this process's share of the images, a batch at a time.

    Args:
        network: a backbone without a head, on the accelerator's device.
        images: where the indices point.
        indices: [n] which images, of all processes.
        accelerator: tells the processes apart.
        batch_size: images of a forward pass at most, over all processes.
        stages: whose features, beside the pooled ones.
        view: what is done to the images, [B, 3, H, W] in [0, 1], before they are normalised.
        random: kind and seed of a random view of each instead of the un-augmented image.

    Yields:
        Where in this process's share the batch begins; [B, D] float32 on the CPU for each stage and "pooled".
    """
    stages, device = list(stages), accelerator.device
    mine = share(torch.arange(len(indices)), accelerator)
    first, end = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    size = rows_of_pass(batch_size, images.size, accelerator)
    hidden = None if accelerator.process_index == 0 else True  # None: shown on a terminal alone
    bar = tqdm(total=len(mine), desc="features", unit="image", delay=DELAY, leave=False, disable=hidden)
    with evaluating(network), bar:
        # Random views are drawn for blocks of all processes' images, so that their number changes none.
        for block in range(0, len(indices), batch_size):
            last = min(block + batch_size, len(indices))
            for start in range(max(first, block), min(end, last), size):
                stop = min(start + size, end, last)
                if random is None:
                    batch = plain_batch(images, indices[start:stop], device, view)
                else:
                    seed, rows = random[1] + block // batch_size, (batch_size, start - block, stop - block)
                    draws, places = (views.Draws(number, *rows) for number in (seed, PLACES + seed))
                    batch = random_batch(images, indices[start:stop], device, random[0], draws, places)
                with torch.autocast(device.type, enabled=False):
                    found = features(network, batch, stages) if stages else {"pooled": network(batch)}
                yield start - first, {stage: rows.float().cpu() for stage, rows in found.items()}
                bar.update(stop - start)


def extract(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    accelerator: Accelerator,
    batch_size: int,
    stages: Iterable[int] = (),
    view: Callable[[Tensor], Tensor] | None = None,
    random: tuple[Views, int] | None = None,
) -> dict[Stage, Tensor]:
    """Features of all the images, [n, D] for each stage and "pooled", on every process; arguments of `batches`."""
    # No process is without a share.
    counted = indices[torch.arange(max(len(indices), accelerator.num_processes)) % len(indices)]
    parts = [found for _, found in batches(network, images, counted, accelerator, batch_size, stages, view, random)]
    mine = {stage: torch.cat([part[stage] for part in parts]) for stage in parts[0]}
    return {stage: gather(rows, accelerator)[: len(indices)] for stage, rows in mine.items()}


def gather(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Every process's rows, in order, on every process; their numbers may differ."""
    if accelerator.num_processes == 1:
        return rows
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    found: list[list[Tensor]] = [[] for _ in counts]
    step = max(1, GATHERED // max(1, math.prod(rows.shape[1:])) // len(counts))
    for start in range(0, max(counts), step):
        part = rows[start : start + step]
        length = min(step, max(counts) - start)
        padded = part.new_zeros(length, *rows.shape[1:])
        padded[: len(part)] = part
        everybody = accelerator.gather(padded.to(accelerator.device)).cpu().split(length)
        for place, (own, count) in enumerate(zip(everybody, counts, strict=True)):
            found[place].append(own[: max(0, min(length, count - start))])
    return torch.cat([part for own in found for part in own])
