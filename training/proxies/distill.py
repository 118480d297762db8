"""Distillation: say of an image what a frozen teacher says of it, without labels.

By cosine, or by the similarities to a queue of other images (SEED, Fang et al., ICLR 2021). What many do today instead
of pretraining. Invariant to what its teacher is; its features are specific to what the teacher was trained for.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backbone as B
from .. import recipe, views
from ..files import Refused
from ..images import Images
from ..limits import PositiveFloat, PositiveInt
from ..operations import forward_flops
from ..recipe import Model, Views
from ..task import Batch, full, pooled_size
from .proxy import Proxy, Queue


class Distill(Proxy):
    """One minus the cosine to a teacher's features, or the cross-entropy of similarities to a queue (SEED, eq. 5)."""

    defaults = {
        "views": Views(crop_scale=(0.2, 1.0)),
        "lr": 0.03,
        "weight_decay": 1e-4,
        "mlp_layers": 1,
        "mlp_dim": 2048,
    }

    @dataclass
    class Options:
        """A teacher"""

        teacher: str = ""
        """Any model of timm with weights: arch.tag, local-dir:FOLDER, hf-hub:ORG/NAME."""
        match: Literal["cosine", "similarity"] = "cosine"
        """What is to agree: features, or their similarities to those of other images."""
        queue: PositiveInt = 65_536
        """Images that similarities are to."""
        temperature: PositiveFloat = 0.2
        """Temperature of the student's similarities."""
        teacher_temperature: PositiveFloat = 0.01
        """Temperature of the teacher's."""

    metric = "cosine"

    def __init__(self, backbone: nn.Module, proxy: recipe.Proxy, images: Images, options: Options) -> None:
        super().__init__(backbone, proxy, images, options)
        teacher = _teacher(options)
        self.teacher = [teacher.eval().requires_grad_(False)]  # in a list: not saved with every checkpoint
        source = teacher.pretrained_cfg
        self.teacher_size = source["input_size"][-1]
        self.register_buffer("teacher_mean", torch.tensor(source["mean"]), persistent=False)
        self.register_buffer("teacher_std", torch.tensor(source["std"]), persistent=False)
        dim = pooled_size(teacher, self.teacher_size)
        self.head, self.options = nn.Linear(self.width, dim), options
        if options.match == "similarity":
            self.queue = Queue(options.queue, dim)
        self.made: list[Tensor] = []

    def __deepcopy__(self, memo: dict) -> "Distill":
        """A copy with the same teacher, which nothing changes."""
        copied = self.__class__.__new__(self.__class__)
        memo |= {id(self): copied, id(self.teacher): self.teacher}
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return copied

    @staticmethod
    def seen(options: Options, backbone: nn.Module, size: int) -> float:
        teacher = _teacher(options, weights=False)
        own = forward_flops(teacher, teacher.pretrained_cfg["input_size"][-1])
        return 1 + own / forward_flops(backbone, size) / 3

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows = views.draw(self.views, batch.sizes, batch.draws)
        student = F.normalize(full(self.head(self.embed(views.apply(batch.pixels, rows, self.size)))), dim=1)
        with torch.no_grad():
            image = views.apply(batch.pixels, rows, self.teacher_size)  # the same view, as large as the teacher has it
            image = views.normalize(image, self.teacher_mean, self.teacher_std)
            teacher = F.normalize(full(self.teacher[0].to(image.device)(image)), dim=1)
        cosine = (student * teacher).sum(1)
        if self.options.match == "cosine":
            return {"loss": (1 - cosine).mean(), "cosine": cosine.detach().mean()}
        self.made.append(teacher)
        loss = similarity(student, teacher, self.queue.rows, self.options.temperature, self.options.teacher_temperature)
        return {"loss": loss, "cosine": cosine.detach().mean()}

    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        if self.made:
            self.queue.push(torch.cat(self.made))
            self.made = []


def similarity(
    student: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of the student's with the teacher's softmax over its own features and the queue (eq. 5)."""
    own = (teacher * teacher).sum(1, keepdim=True), (student * teacher).sum(1, keepdim=True)
    target = (torch.cat([own[0], teacher @ queue.T], 1) / teacher_temperature).softmax(1)
    return -(target * (torch.cat([own[1], student @ queue.T], 1) / temperature).log_softmax(1)).sum(1).mean()


def _teacher(options: Distill.Options, weights: bool = True) -> nn.Module:
    if not options.teacher:
        raise Refused("proxy.options.teacher: name the teacher, any model of timm with weights.")
    try:
        return B.create(Model(options.teacher, pretrained=weights), None)
    except Refused as error:
        raise Refused(str(error).replace("model.name", "proxy.options.teacher", 1)) from error
