"""A classifier: how it learns labels, what it says of images, and the lines of Python that use it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from . import evaluate
from .extraction import extract
from .images import Images
from .limits import BelowOne, ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt, Share
from .loop import Context
from .names import escape, unescape
from .recipe import Data, Running, Schedule, Views
from .task import Batch, ViewTask, accuracy


def photo_views() -> Views:
    """Crop, flip and some colour, as supervised training is used to."""
    return Views(crop_scale=(0.2, 1.0), grey=0.0, hue=0.0)


@dataclass
class Finetune(Schedule, Running):
    """How a backbone learns labels."""

    data: Data = field(default_factory=Data)
    epochs: PositiveFloat = 50.0
    """Passes over the training images; parts of one are allowed."""
    batch_size: PositiveInt = 64
    """Images of a step, over all processes and accumulated micro-batches; what is left of an epoch is dropped."""
    optimizer: str = "adamw"
    """Optimiser, a name of timm.optim.list_optimizers()."""
    lr: NonNegativeFloat = 1e-3
    """Highest learning rate, that of the head; a cosine leads to 0."""
    warmup: NonNegativeFloat = 2.0
    """Linear warm-up, epochs; never more than a tenth of the whole."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of weights; biases and norms have none."""
    layer_decay: ClosedUnitInterval = 0.75
    """Learning rate of a layer as a share of the next one's, by timm's parameter groups; 1 makes all equal."""
    freeze: int | None = None
    """Last stage that is not trained, an index into timm's feature_info."""
    head_first: BelowOne = 0.0
    """Share of the steps in which the head alone is trained (Kumar et al., ICLR 2022)."""
    label_smoothing: BelowOne = 0.1
    """Share of the target spread over all classes."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup; 0 mixes nothing."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix; 0 mixes nothing."""
    labels: Share = 1.0
    """Share of the training labels that may be used, drawn by data.split_seed, the same share of each class."""
    scratch: bool = False
    """Start from random weights: the same architecture, to compare with."""
    views: Views = field(default_factory=photo_views)


class Classify(ViewTask):
    """Cross-entropy with the labels, perhaps smoothed and mixed.

    Args:
        network: a timm model with a head.
        settings: how it learns.
        images: size and statistics of the images.
        average_from: step from which the average is taken.
    """

    def __init__(self, network: nn.Module, settings: Finetune, images: Images, average_from: int) -> None:
        super().__init__(network, settings, images, average_from)
        self.settings = settings
        mixing = {"mixup_alpha": settings.mixup, "cutmix_alpha": settings.cutmix, "label_smoothing": 0.0}
        self.mix = Mixup(**mixing, num_classes=network.num_classes) if settings.mixup or settings.cutmix else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, target = self.normalize(self.see(batch)), batch.labels
        if self.mix is not None:  # draws from numpy's stream, which the loop seeds for each step
            images, target = self.mix(images, target)
        logits = self.network(images).float()
        loss = F.cross_entropy(logits, target, label_smoothing=self.settings.label_smoothing)
        return {"loss": loss, "accuracy": accuracy(logits.detach(), batch.labels)}

    def depends_on_share(self) -> str | None:
        return "each process mixes the images that it draws itself" if self.mix else super().depends_on_share()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        exempt = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        groups = param_groups_layer_decay(self.network, weight_decay, exempt, layer_decay=self.settings.layer_decay)
        return [{key: group[key] for key in ("params", "lr_scale", "weight_decay")} for group in groups]


def head_names(network: nn.Module) -> set[str]:
    """Names of the classifier's parameters; some networks have two."""
    heads = network.get_classifier()
    ids = {id(module) for module in (heads if isinstance(heads, tuple | list) else [heads])}
    return {f"{n}.{p}" for n, m in network.named_modules() if id(m) in ids for p, _ in m.named_parameters()}


@dataclass
class Answers:
    """What a classifier says of images.

    Attributes:
        images, indices: of which.
        probabilities: [n, C] of each class.
    """

    images: Images
    indices: Tensor
    probabilities: Tensor

    @property
    def guess(self) -> Tensor:
        """[n] the likeliest class."""
        return self.probabilities.argmax(1)

    @property
    def truth(self) -> Tensor:
        """[n] the true class."""
        return self.images.labels[self.indices]

    def table(self, split: str, names: Sequence[str]) -> pa.Table:
        """split, path, class and its probability of every image, null of those that could not be decoded."""
        sure, guess = self.probabilities.max(1)
        told = {i: (names[c], p) for i, c, p in zip(self.indices.tolist(), guess.tolist(), sure.tolist(), strict=True)}
        rows = [told.get(i, (None, None)) for i in range(len(self.images))]
        return pa.table(
            {
                "split": pa.array([split] * len(rows)),
                "path": self.images.paths,
                "class": pa.array([name for name, _ in rows], pa.string()),
                "probability": pa.array([value for _, value in rows], pa.float32()),
            }
        )


def answers(network: nn.Module, images: Images, indices: Tensor, context: Context, batch_size: int) -> Answers:
    """What a classifier, on the device, says of some images, seen as evaluation sees them."""
    logits = extract(network, images, indices, context.accelerator, batch_size)["pooled"]
    return Answers(images, indices, logits.softmax(1))


def label_names(network: nn.Module) -> list[str]:
    """The names of a classifier's classes; their numbers where it tells none."""
    names = network.pretrained_cfg.get("label_names")
    return (
        [escape(unescape(name)) for name in names] if names else [str(number) for number in range(network.num_classes)]
    )


def confusion(found: Answers) -> Tensor:
    """[C, C] images of a class, a row, that a class, a column, was said of."""
    classes = found.probabilities.shape[1]
    return torch.bincount(found.truth * classes + found.guess, minlength=classes**2).view(classes, classes)


def by_class(counts: Tensor, names: list[str]) -> list[tuple[str, int, int, str, int]]:
    """(name, images, told right, most often taken for, how often) of each class with images, the worst first."""
    rows = []
    for number, row in enumerate(counts):
        if row.sum():
            wrong = row.clone()
            wrong[number] = 0
            taken = int(wrong.argmax())
            times = int(wrong[taken])
            rows.append((names[number], int(row.sum()), int(row[number]), names[taken] if times else "", times))
    return sorted(rows, key=lambda row: row[2] / row[1])


def values(found: Answers, train: Images) -> dict[str, float]:
    """Share told right; also its mean over classes where these have unequally many training images."""
    known = train.labels[train.labelled(train.train)]
    return evaluate.accuracies(found.guess, found.truth, evaluate.unequal(known))


def usage(model: str, size: int) -> str:
    """Lines of Python that load a classifier by timm's name for it and tell an image's class."""
    return f"""import timm, torch
from PIL import Image

model = timm.create_model({json.dumps(model, ensure_ascii=False)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new("RGB", ({2 * size}, {2 * size}))  # your own: Image.open("photo.jpg").convert("RGB")
batch = transform(image).unsqueeze(0)
with torch.no_grad():
    probability, number = model(batch).softmax(1)[0].max(0)
print(model.pretrained_cfg["label_names"][number], f"{{probability:.0%}}")"""


ONNX = """names = model.pretrained_cfg["label_names"]  # in the order of the outputs
torch.onnx.export(model, (batch,), "model.onnx", input_names=["image"], output_names=["logits"], dynamo=True)"""
