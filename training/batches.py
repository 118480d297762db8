"""Batches of a schedule, functions of the step, gathered ahead of the device."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .images import Images
from .launch import Key
from .recipe import Schedule
from .task import Batch
from .views import Draws

AHEAD = 2  # batches that are gathered before they are asked for


@lru_cache(maxsize=2)
def epoch_order(key: Key, epoch: int, images: int) -> Tensor:
    """The order in which an epoch draws its images, [images] int64."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(key.number("epoch", epoch)))


def draw_batch(
    images: Images,
    indices: Tensor,
    schedule: Schedule,
    key: Key,
    step: int,
    part: int,
    accelerator: Accelerator,
    rows: int | None = None,
) -> Batch:
    """Micro-batch `part` of this process at a step: its rows of the global batch, or only so many of them.

    In the host's memory, which a GPU can read by itself while it computes.
    """
    size, epoch_steps = schedule.batch_size, len(indices) // schedule.batch_size
    epoch, place = divmod(step, epoch_steps)
    order = epoch_order(key, epoch, len(indices))
    share = size // (accelerator.num_processes * schedule.accumulate)
    start = (accelerator.process_index * schedule.accumulate + part) * share
    rows = min(rows or share, share)
    whole = indices[order[place * size : (place + 1) * size]]
    chosen = whole[start : start + rows]
    pixels, sizes = images.pixels.windows(
        chosen, lambda: Draws(key.number("windows", step), size, start, start + rows).uniform()
    )
    labels = images.labels[chosen] if images.labels is not None else None
    if accelerator.device.type == "cuda":
        pixels, labels = pixels.pin_memory(), None if labels is None else labels.pin_memory()
    return Batch(
        pixels=pixels,
        sizes=sizes,
        indices=chosen,
        step_indices=whole,
        labels=labels,
        draws=Draws(key.number("views", step), size, start, start + rows),
        step=step,
        total=round(schedule.epochs * epoch_steps),
    )


def ahead(
    images: Images, indices: Tensor, schedule: Schedule, key: Key, first: int, last: int, accelerator: Accelerator
) -> Iterator[Batch]:
    """The micro-batches of the steps from `first` to `last`, in order, as `draw_batch` gives each, on the device.

    They are gathered in a thread, while the device computes; close it if not all are taken.
    """
    places = ((step, part) for step in range(first, last) for part in range(schedule.accumulate))
    waiting: deque[Any] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for place in places:
            waiting.append(pool.submit(draw_batch, images, indices, schedule, key, *place, accelerator))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result().to(accelerator.device)
        while waiting:
            yield waiting.popleft().result().to(accelerator.device)
    finally:
        pool.shutdown(cancel_futures=True)
