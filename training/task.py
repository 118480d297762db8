"""Tasks: what the loop trains. A batch in, a loss and metrics out."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import backbone as B
from . import views
from .extraction import evaluating
from .files import Refused
from .images import Images
from .operations import suited
from .recipe import Schedule, Views


@dataclass
class Batch:
    """What a task is given.

    Attributes:
        pixels: [B, 3, H, W] uint8; whole pictures. On the device, once `to` was called.
        sizes: [B, 2] int64 on the CPU, height and width of each, px: so many of its first rows and columns.
        indices: [B] int64 on the CPU, where the images stand in their split.
        step_indices: [n] int64 on the CPU, those of the whole step, over all processes and micro-batches.
        labels: [B] int64 where the pixels are, -1 where unknown; None without labels.
        draws: the step's random stream, of which this batch has its rows.
        step: steps of the schedule that are done.
        total: all of them.
    """

    pixels: Tensor
    sizes: Tensor
    indices: Tensor
    step_indices: Tensor
    labels: Tensor | None
    draws: views.Draws
    step: int
    total: int

    def to(self, device: torch.device) -> "Batch":
        """The same with pixels and labels on a device, which need not have arrived yet."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return dataclasses.replace(self, pixels=self.pixels.to(device, non_blocking=True), labels=labels)


class Task(nn.Module):
    """What is learned: owns backbone, heads, queues and averaged copies, so that its state_dict is the whole state.

    Attributes:
        seen: views of an image that a step passes forward and backward; a forward pass alone counts a third.
        memory_format: of its weights, and so of the maps that convolutions make with them.
        whole_batch: its loss needs all images of a step at once, so that micro-batches would change it.
    """

    seen: float = 1.0
    memory_format: torch.memory_format = torch.contiguous_format
    whole_batch: ClassVar[bool] = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and the task's own metrics, these detached."""
        raise NotImplementedError

    def after_step(self, step: int, total: int) -> None:
        """Move averages and queues after `step` of `total` steps."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trainable parameters for the optimiser; a group's ``lr_scale`` multiplies the learning rate."""
        return decay_groups(self, weight_decay)

    def depends_on_share(self) -> str | None:
        """What makes a step depend on how its images are shared out among processes; None if nothing does."""
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.training:
                return "batch norms take statistics of each process's images"
            drops = getattr(module, "p", 0) if isinstance(module, _DropoutNd) else getattr(module, "drop_prob", 0)
            if module.training and drops:
                return "each process drops out what it draws itself"
        return None


def decay_groups(
    task: nn.Module, weight_decay: float, lr_scale: float = 1.0, names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with decay; and without: biases, norms, and what a network of timm itself
    exempts, such as position embeddings.

    Args:
        task: whose parameters.
        weight_decay: of the first group.
        lr_scale: of both.
        names: of the parameters; all without them.
    """
    exempt = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in task.named_modules()
        if hasattr(module, "no_weight_decay")
        for pattern in module.no_weight_decay()
    ]
    with_decay, without = [], []
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and (names is None or name in names):
            spared = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, each) for each in exempt)
            (without if spared else with_decay).append(parameter)
    groups = [
        {"params": with_decay, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": without, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


class ViewTask(Task):
    """A task over random views of single images: a network, what of it is held still, and an average of it.

    Args:
        network: a timm model.
        schedule: views and averaging.
        images: size and statistics of the images.
        average_from: step from which the average is taken; before it, the average is the network.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, images: Images, average_from: int = 0) -> None:
        super().__init__()
        self.network, self.views, self.size = network, schedule.views, images.size
        self.held, self.held_norm = set(), "eval"
        self.stored, self.fresh = schedule.norm == "stored", set()
        self.memory_format = suited(network, images.size)[0]
        self.register_buffer("mean", torch.tensor(images.mean), persistent=False)
        self.register_buffer("std", torch.tensor(images.std), persistent=False)
        self.average = None
        if schedule.ema:
            self.average = ModelEmaV3(network, decay=schedule.ema, update_after_step=average_from)
            self.average.requires_grad_(False)

    def hold(self, names: set[str], norm: str = "eval") -> None:
        """Train nothing of the network of that name, its batch norms as `norm` says; then call the loop anew."""
        self.held, self.held_norm = names, norm
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in names)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ViewTask":
        super().train(mode)
        if mode:
            B.set_frozen_mode(self.network, self.held, self.held_norm)
            self.store_norms(self.network)
        return self

    def store_norms(self, network: nn.Module) -> None:
        """Leave its batch norms the statistics that they have, if the schedule says so, but for new ones in `fresh`."""
        for name, module in network.named_modules() if self.stored else ():
            if isinstance(module, _BatchNorm) and f"{name}.running_mean" not in self.fresh:
                module.eval()

    def see(self, batch: Batch, kind: Views | None = None, size: int | None = None) -> Tensor:
        """A random view of each image, [B, 3, size, size], float32 in [0, 1]; the schedule's at the working size if not
        told otherwise."""
        return views.random_views(kind or self.views, batch.pixels, batch.sizes, batch.draws, size or self.size)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the network expects them."""
        return views.normalize(images, self.mean, self.std)

    def after_step(self, step: int, total: int) -> None:
        if self.average is not None:
            self.average.update(self.network, step=step)

    def result(self) -> nn.Module:
        """The trained network, averaged if the schedule says so."""
        return self.network if self.average is None else self.average.module


class BackboneTask(ViewTask):
    """A task whose head reads a backbone through a disposable MLP, as the schedule has it; arguments of `ViewTask`."""

    def __init__(self, backbone: nn.Module, schedule: Schedule, images: Images, average_from: int = 0) -> None:
        super().__init__(backbone, schedule, images, average_from)
        self.mlp, self.width = mlp(pooled_size(backbone, images.size), schedule.mlp_dim, schedule.mlp_layers)

    def embed(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to what the head reads, [B, width]."""
        return self.mlp(self.network(self.normalize(images)))


def pooled_size(backbone: nn.Module, size: int) -> int:
    """Number of pooled features; timm's num_features is another thing where a head has a hidden layer."""
    device = next(backbone.parameters()).device
    with evaluating(backbone), torch.no_grad():
        return backbone(torch.zeros(1, 3, size, size, device=device)).shape[1]


def mlp(width: int, hidden: int, layers: int) -> tuple[nn.Module, int]:
    """`layers` times linear, batch norm, ReLU, and the width that comes out."""
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    return nn.Sequential(*blocks), width


def full(values: Tensor) -> Tensor:
    """Values out of autocast: half precision as float32, others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label's; rows labelled -1 do not count."""
    known = labels >= 0
    return ((logits.argmax(1) == labels) & known).sum() / known.sum().clamp(min=1)


def check_norms(schedule: Schedule, processes: int, forward: Callable[[], Any], prefix: str = "") -> None:
    """Refuse micro-batches of one image where a batch norm then finds one value for each channel.

    Args:
        schedule: whose fields are named with `prefix`.
        processes: that share a step.
        forward: passes one image through what is trained.
        prefix: as above.

    Raises:
        Refused: naming the field.
    """
    if schedule.batch_size > processes * schedule.accumulate:
        return
    try:
        with torch.no_grad():
            forward()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise Refused(
            f"{prefix}batch_size: {schedule.batch_size} leaves a micro-batch one image, of which a batch norm has no "
            "statistics; give each at least two."
        ) from error


def check_processes(task: Task, before: int | None, now: int, step: int) -> None:
    """Refuse to go on in another number of processes, None if that is not known, where that makes another training.

    Raises:
        Refused: with the reason.
    """
    if before not in (None, now) and (why := task.depends_on_share()):
        raise Refused(
            f"the checkpoint of step {step} is of {before} processes, now there are {now}, and {why}; start as many as "
            "before, or choose another --run."
        )
