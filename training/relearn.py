"""Phase 3: keep the low part, re-initialise the high part, and train it to predict the pseudo-labels.

While the new high part is random the low part is frozen (settle), so that it is not distorted by a random head's
gradient (Kumar et al., ICLR 2022); then it trains on at `low_lr` of the learning rate.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backbone as B
from . import recipe
from .files import Refused
from .images import Images
from .launch import Key, seed_all
from .longer import last_of
from .loop import Context, steps_of, train
from .task import BackboneTask, Batch, accuracy, decay_groups


class Relearn(BackboneTask):
    """Mean over the clusterings of the cross-entropy with their pseudo-labels.

    Args:
        backbone: the network, its high part already new.
        low: names of its low part.
        labels: [N, heads] int64, a column for each clustering, -1 where an image has no label.
        classes: number of clusters of each column.
        settings: the recipe's phase 3.
        images: size and statistics of the images.
        settled: step at which settle ends.
    """

    def __init__(
        self,
        backbone: nn.Module,
        low: set[str],
        labels: Tensor,
        classes: list[int],
        settings: recipe.Relearn,
        images: Images,
        settled: int,
    ) -> None:
        super().__init__(backbone, settings, images, average_from=settled)
        self.low, self.low_norm, self.low_lr = low, settings.low_norm, settings.low_lr
        self.smoothing = settings.label_smoothing
        if settings.reinit == "high":
            self.fresh = {name for name, _ in backbone.named_buffers()} - low
        self.register_buffer("targets", labels, persistent=False)
        self.heads = nn.ModuleList(nn.Linear(self.width, count) for count in classes)

    def freeze_low(self, frozen: bool) -> None:
        """Freeze or free the low part."""
        self.hold(self.low if frozen else set(), self.low_norm)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        targets = self.targets[batch.indices.to(self.targets.device)]
        # The mean over the labels of the whole step, which the loop makes from as many equal parts.
        known = (self.targets[batch.step_indices.to(self.targets.device)] >= 0).sum(0).clamp(min=1)
        parts = len(batch.step_indices) / len(batch.indices)
        hidden = self.embed(self.see(batch))
        losses, hits = [], []
        for head, target, count in zip(self.heads, targets.unbind(1), known, strict=True):
            logits = head(hidden).float()
            loss = F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
            losses.append(loss * parts / count)
            hits.append(accuracy(logits.detach(), target))
        return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(hits).mean()}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        low = {f"network.{name}" for name in self.low}
        high = {name for name, _ in self.named_parameters()} - low
        return decay_groups(self, weight_decay, self.low_lr, low) + decay_groups(self, weight_decay, 1.0, high)


def split(network: nn.Module, settings: recipe.Relearn, size: int) -> set[str]:
    """Names of the low part.

    Raises:
        Refused: there is no such stage, or nothing above it to re-initialise.
    """
    stage = B.resolve_stage(network, settings.split, "relearn.split")
    low = B.low_names(network, stage, size)
    if settings.reinit == "high" and all(name in low for name, _ in network.named_parameters()):
        raise Refused(
            f"relearn.split: no parameter lies above stage {settings.split}, so that there is no high part to relearn; "
            "choose an earlier stage, such as --relearn.split -2."
        )
    return low


def check(settings: recipe.Relearn, images: Images) -> None:
    """Refuse to leave out so many images that less than a batch may be left.

    Raises:
        Refused: naming the field.
    """
    least = math.ceil(len(images.train) * (1 - settings.drop))
    if settings.drop and least < settings.batch_size:
        raise Refused(
            f"relearn.drop: {settings.drop:g} may leave {least} of {len(images.train)} training images, fewer than "
            f"relearn.batch_size {settings.batch_size}."
        )


def relearn(
    network: nn.Module,
    model: recipe.Model,
    settings: recipe.Relearn,
    labels: Tensor,
    classes: list[int],
    images: Images,
    key: Key,
    context: Context,
    read: Any,
    watch: Callable[[Relearn, int], Callable[[int, int], dict[str, float]]] | None = None,
    earlier: Sequence = (),
) -> nn.Module:
    """Train phase 3 from `network`, which is changed, and return the relearned backbone.

    Args:
        network: the backbone whose low part is kept.
        model: how to build a new one.
        settings: the recipe's phase 3.
        labels: [N, heads] int64 pseudo-labels by image index, -1 for none.
        classes: number of clusters of each head.
        images: the training split.
        key, context, read: as `loop.train` takes them.
        watch: makes `loop.train`'s `epoch_end` of the task and the number of images that it draws from.
        earlier: the schedules before, as `longer.going_on` has them.
    """
    indices = images.train[(labels[images.train] >= 0).any(1)]
    # As many steps as with all images, so that leaving some out does not make the phase shorter.
    share = (len(images.train) // settings.batch_size) / max(1, len(indices) // settings.batch_size)
    settings = dataclasses.replace(settings, epochs=settings.epochs * share)

    def steps(epochs: float) -> int:
        return steps_of(dataclasses.replace(settings, epochs=epochs * share), len(indices), "relearn.")[1]

    _, total = steps_of(settings, len(indices), "relearn.")
    # What went on has settled in its first schedule.
    settled = round(settings.settle * (steps(earlier[0][0]) if earlier and settings.settle < 1 else total))
    low = split(network, settings, images.size)
    seed_all(key.number("fresh"))
    if settings.reinit != "none":
        names = {n for n, _ in (*network.named_parameters(), *network.named_buffers())}
        fresh = B.create(model, images.size, pretrained=False)
        B.reinit(network, names if settings.reinit == "all" else names - low, fresh, settings.keep)
    task = Relearn(network, low, labels, classes, settings, images, settled)
    look = watch(task, len(indices)) if watch else None
    done = last_of(earlier, steps)
    task.freeze_low(True)
    train(task, images, indices, settings, key, context, read, last=settled, epoch_end=look, earlier=done)
    task.freeze_low(settings.low_lr == 0)
    train(task, images, indices, settings, key, context, read, settled, epoch_end=look, earlier=done)
    return task.result()
