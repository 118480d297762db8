"""How long training takes here, told before it begins."""

import copy
import time
from collections.abc import Collection
from functools import partial

from accelerate import Accelerator
from torch import nn

from . import arms, proxies
from .evaluate import parts_of
from .extraction import plain_batch
from .files import sha256_json
from .images import Images
from .operations import on_device
from .recipe import Recipe, Schedule, phase_fields


def counts(recipe: Recipe, train: Images, network: nn.Module, other: str | None = None) -> arms.Counts:
    """What budgets of recipes over these images are counted from; `other` is the task of the arm other_proxy."""
    seen = partial(proxies.seen, backbone=network, size=recipe.data.size)
    return arms.Counts(len(train.train), len(train.all), seen, other)


def trained(recipes: Collection[Recipe], counted: arms.Counts) -> float:
    """Views that recipes of a comparison train on; a proxy phase that several share counts once."""
    begun = {sha256_json(phase_fields(r, "proxy")): arms.images_of(r.proxy, counted) for r in recipes}
    return sum(begun.values()) + sum(r.relearn.rounds * arms.images_of(r.relearn, counted) for r in recipes)


def evaluated(recipe: Recipe, splits: tuple[Images, Images | None]) -> float:
    """Views whose forward and backward pass take as long as the forward passes that evaluate a backbone."""
    parts = [len(indices) for _, indices in parts_of(splits, recipe.evaluate).values()]
    turned = max(0, len(proxies.residue(recipe.proxy)) - 1)
    return (sum(parts) + turned * sum(min(part, recipe.evaluate.residue_images) for part in parts)) / 3


def told(
    recipes: Collection[Recipe],
    backbones: int,
    counted: arms.Counts,
    splits: tuple[Images, Images | None],
    network: nn.Module,
    accelerator: Accelerator,
) -> str:
    """How long the phases of recipes take in all, for the screen.

    Args:
        recipes: one, or those of a comparison.
        backbones: how many each has evaluated.
        counted: what their budgets are counted from.
        splits: the images.
        network: of the kind that they train.
        accelerator: tells the processes and the device.
    """
    schedules = [s for r in recipes for s in (r.proxy, *[r.relearn] * r.relearn.rounds) if s.epochs]
    view = seconds_of_view(network, splits[0], schedules, accelerator)
    passed = sum(
        sum(arms.clustering_images(r, counted, number + 1) for number in range(r.relearn.rounds))
        + backbones * evaluated(r, splits)
        for r in recipes
    )
    training = duration(trained(recipes, counted) * view)
    return f"training takes about {training}, features for clusters and figures {duration(passed * view)}"


def seconds_of_view(
    network: nn.Module, images: Images, schedules: Collection[Schedule], accelerator: Accelerator
) -> float:
    """Seconds of a view's forward and backward pass in a step of all processes, the faster of two after a first.

    Args:
        network: of the kind that is trained.
        images: what is seen.
        schedules: the smallest micro-batch of which is passed, or as much of it as makes the device busy.
        accelerator: tells the processes and the device.
    """
    device, processes = accelerator.device, accelerator.num_processes
    rows = min([s.batch_size // (processes * s.accumulate) for s in schedules] or [64])
    rows = min(rows, 16 if device.type == "cpu" else 64)  # a GPU is not busy with fewer
    network = on_device(copy.deepcopy(network), device, images.size).train()
    batch = plain_batch(images, images.train[:rows], device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with accelerator.autocast():
            loss = network(batch).float().square().mean()
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / len(batch) / processes


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
