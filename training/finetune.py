"""python -m training.finetune MODEL --data.path DATA: a backbone and labels in, a classifier that timm loads out."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from . import backbone as B
from . import launch, records, report
from .command import Parser, as_timm_names, check_data, check_schedule, guarded, model_parser, named_folder, short_name
from .extraction import extract
from .files import (
    Refused,
    check_written,
    lock_folder,
    nothing_left,
    read_json,
    refuse_files,
    sha256_file,
    sha256_json,
    whole_folder,
    write_json,
    written,
)
from .images import Images, write_bad
from .launch import Key, seed_all
from .limits import BelowOne, ClosedUnitInterval, NonNegativeFloat, PositiveFloat, Share
from .loop import Context, steps_of, train
from .operations import suited
from .recipe import Data, Model, Running, Schedule, Views, flatten
from .setup import check_fits, check_split, load_for, refuse_other
from .task import Batch, ViewTask, accuracy

BATCH = 512  # images of a forward pass that measures


def photo_views() -> Views:
    """Crop, flip and some colour, as supervised training is used to."""
    return Views(crop_scale=(0.2, 1.0), grey=0.0, hue=0.0)


@dataclass
class Finetune(Schedule, Running):
    """How a backbone learns labels."""

    data: Data = field(default_factory=Data)
    epochs: PositiveFloat = 50.0
    """Passes over the training images; parts of one are allowed."""
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

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        exempt = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        groups = param_groups_layer_decay(self.network, weight_decay, exempt, layer_decay=self.settings.layer_decay)
        return [{key: group[key] for key in ("params", "lr_scale", "weight_decay")} for group in groups]


def command() -> Parser:
    description = "Fine-tune a backbone on labelled images; the result is a folder that timm loads."
    parser = model_parser("finetune", description, "")
    # A classifier's head stands on the backbone itself; the model says the size.
    parser.add_class_arguments(Finetune, as_group=False, skip={"data", "mlp_layers", "mlp_dim"})
    parser.add_class_arguments(Data, "data", skip={"size"})
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = command()
    values = parser.read(arguments)
    name = values.pop("model")
    made = parser.instantiate(values)
    settings = Finetune(**{f.name: made[f.name] for f in dataclasses.fields(Finetune) if f.name in made})
    check_data(settings.data)
    check_schedule(settings)
    with launch.StopSignals() as stop:
        finetune(as_timm_names(name), settings, stop)


def finetune(name: str, settings: Finetune, stop: launch.StopSignals) -> Path:
    """Fine-tune a backbone.

    Args:
        name: of the backbone, as timm loads it.
        settings: how.
        stop: requests to end.

    Returns:
        The run folder, which gets best/ and last/.
    """
    folder = run_folder(name, settings)
    key = Key(settings.seed, "finetune")
    seed_all(key.number("weights"))
    network = B.create(Model(name, pretrained=not settings.scratch), None)
    size = network.pretrained_cfg["input_size"][-1]
    precision = launch.resolve_precision(settings.precision, suited(network, size)[1])
    accelerator = launch.start(precision, settings.log.tracker, str(folder))
    context = Context(accelerator, folder, stop, settings.log.every, settings.checkpoint_every)
    with nothing_left(folder):
        refuse_files(folder, ("checkpoints", "best", "last"))
        lock = lock_folder(folder) if context.main else None
        splits, indices = load_images(network, settings, context)
        frozen = check(settings, network, splits["train"], len(indices), accelerator.num_processes)
        read = reads(settings, network, splits, indices, precision)
        marker = folder / "finetune.json"
        if marker.exists():
            refuse_other(marker, read)
    accelerator.wait_for_everyone()
    if context.main:
        write_bad(folder, [line for images in splits.values() for line in images.bad])
        if not marker.exists():
            write_json(marker, {"read": read})
    accelerator.wait_for_everyone()
    accelerator.init_trackers("sslpp", {})
    context.say(report.splits_line(splits["train"].account))
    classes = len(splits["train"].label_names)
    context.say(
        f"{records.device_name(accelerator.device.type)}; {precision}; processes {accelerator.num_processes}; threads "
        f"{torch.get_num_threads()}; batch {settings.batch_size}; {len(indices)} labels of {classes} classes; {folder}"
    )
    seed_all(key.number("head"))
    network.reset_classifier(classes)
    keeper = Keeper(context, splits, settings)
    if "budget" not in read_json(marker, "read"):
        fit(network, splits["train"], indices, settings, frozen, key, context, sha256_json(read), keeper)
        if context.main:
            write_json(marker, {"read": read, "budget": context.budget})
        accelerator.wait_for_everyone()
    keeper.measure(name, settings, precision)
    launch.end_trackers(accelerator)
    if lock:
        lock.close()
    return folder


def run_folder(name: str, settings: Finetune) -> Path:
    """``--run`` if given, else one named after the model and the data."""
    return named_folder(settings.run or f"{short_name(name)}_{Path(settings.data.called).stem}_finetune")


def check(settings: Finetune, network: nn.Module, images: Images, count: int, processes: int) -> set[str]:
    """Refuse what these images, `count` of them to learn from, and processes make impossible.

    Returns:
        Names of what is frozen throughout.

    Raises:
        Refused: naming the field.
    """
    check_fits(settings, count, processes)
    rows = settings.batch_size // (processes * settings.accumulate)
    if (settings.mixup or settings.cutmix) and rows % 2:
        raise Refused(f"batch_size: mixup and cutmix pair images, and {rows} of a micro-batch cannot be paired.")
    if settings.freeze is None:
        return set()
    return B.low_names(network, B.resolve_stage(network, settings.freeze, "freeze"), images.size)


def reads(
    settings: Finetune, network: nn.Module, splits: dict[str, Images], indices: Tensor, precision: str
) -> dict[str, Any]:
    """What the result depends on: fields, weights, images, and which labels there are and may be used."""
    apart = ("log", "run", "checkpoint_every", "data")
    own = {name: value for name, value in flatten(settings).items() if name.split(".")[0] not in apart}
    train = splits["train"]
    targets = {"indices": indices, "held out": train.held_out}
    targets |= {split: images.labels for split, images in splits.items()}
    return {
        **own,
        "precision": precision,
        "seen as": [train.size, *train.mean, *train.std, train.crop_pct, train.white],
        "label names": train.label_names,
        "weights": B.fingerprint(network.state_dict()),
        "images": {split: images.fingerprint for split, images in splits.items()},
        "targets": B.fingerprint(targets),
    }


def load_images(network: nn.Module, settings: Finetune, context: Context) -> tuple[dict[str, Images], Tensor]:
    """The splits as the network expects them, and the training images whose labels may be used.

    Raises:
        Refused: labels are missing, or do not match between the splits.
    """
    train, test = load_for(network, settings.data, context, own_crop=True, tuning=True)
    check_split(settings.data, train)
    splits = {"train": train, **({"test": test} if test else {})}
    for split, images in splits.items():
        advice = " --data.test_split none leaves it out." if images is test else ""
        field = "data.test_split" if images is test else "data.label_column"
        if images.labels is None:
            raise Refused(
                f"{field}: the {split} split has no labels of two classes or more; name the column of labels, or give "
                f"each class a folder, in every split alike.{advice}"
            )
        if unknown := len(images.all) - len(labelled(images, images.all)):
            context.say(f"{unknown} of {len(images.all)} images of the {split} split have no label and are left out")
        if not len(labelled(images, images.val if images is train else images.all)):
            raise Refused(f"{field}: no image that the {split} split is to be measured on has a label.{advice}")
    known = labelled(train, train.train)
    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(settings.data.split_seed))
    shuffled, indices = known[chosen], []
    for label in range(len(train.label_names)):
        members = shuffled[train.labels[shuffled] == label]
        indices.append(members[: max(1, round(settings.labels * len(members)))])
    return splits, torch.cat(indices).sort().values


def labelled(images: Images, indices: Tensor) -> Tensor:
    """Those of the indices whose label is known."""
    return indices[images.labels[indices] >= 0]


def head_names(network: nn.Module) -> set[str]:
    """Names of the classifier's parameters; some networks have two."""
    heads = network.get_classifier()
    ids = {id(module) for module in (heads if isinstance(heads, tuple | list) else [heads])}
    return {f"{n}.{p}" for n, m in network.named_modules() if id(m) in ids for p, _ in m.named_parameters()}


def fit(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    settings: Finetune,
    frozen: set[str],
    key: Key,
    context: Context,
    fingerprint: str,
    keeper: "Keeper",
) -> None:
    """Train the head, then all that is not frozen; `keeper` looks at the classifier after each epoch."""
    _, total = steps_of(settings, len(indices))
    names = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    alone = round(settings.head_first * total)
    task = Classify(network, settings, images, average_from=alone)
    keeper.task = task
    for still, first, last in ((names - head_names(network), 0, alone), (frozen, alone, total)):
        task.hold(still)
        train(task, images, indices, settings, key, context, fingerprint, first, last, keeper.look)


class Keeper:
    """Looks at a classifier after each epoch, and keeps the best on the held-out part, and the last.

    Args:
        context: the run.
        splits: the images.
        settings: for the names of what is kept.
    """

    def __init__(self, context: Context, splits: dict[str, Images], settings: Finetune) -> None:
        self.context, self.splits, self.settings = context, splits, settings
        self.task: Classify | None = None

    def called(self, split: str) -> str:
        """What people call a split of the records."""
        uses = {told["use"] for told in self.splits["train"].account.values()}
        return split if split == "test" else "validation" if "validation" in uses else "held-out part of train"

    def top1(self, network: nn.Module, split: str) -> float:
        """Accuracy on what is held out for choosing, or on the test split."""
        images = self.splits["train" if split == "val" else split]
        indices = labelled(images, images.val if split == "val" else images.all)
        logits = extract(network, images, indices, self.context.accelerator, BATCH)["pooled"]
        return (logits.argmax(1) == images.labels[indices]).double().mean().item()

    def look(self, step: int, total: int) -> dict[str, float]:
        """Measure after an epoch, and keep what is worth it; what the log is to have."""
        network = self.task.result()
        top1 = self.top1(network, "val")
        self.context.say(f"step {step}: {self.called('val')}: {100 * top1:.2f} %")
        best = self.context.folder / "best" / "finetune.json"
        if self.context.main and (not best.exists() or top1 > read_json(best, "val_top1")["val_top1"]):
            self.keep(network, "best", step, top1)
        if self.context.main and step == total:
            self.keep(network, "last", step, top1)
        self.context.accelerator.wait_for_everyone()
        return {"val_top1": top1}

    def keep(self, network: nn.Module, name: str, step: int, top1: float) -> None:
        """Write a classifier's folder."""
        train = self.splits["train"]
        with whole_folder(self.context.folder / name) as beside:
            licence = "" if self.settings.scratch else network.pretrained_cfg.get("license") or ""
            B.save(network, beside, train, tag="finetuned", license=licence, label_names=train.label_names)
            made = written(beside, B.FILES)
            write_json(beside / "finetune.json", {"step": step, "val_top1": top1, "wrote": made})

    def measure(self, model: str, settings: Finetune, precision: str) -> None:
        """Records of the best and the last classifier, on the held-out part and the test split."""
        path, found = self.context.folder / "records.jsonl", []
        marker = read_json(self.context.folder / "finetune.json")
        cost = marker["budget"]
        told = {name: getattr(settings, name) for name in ("labels", "epochs", "scratch", "lr", "layer_decay")}
        for name in ("best", "last"):
            folder = self.context.folder / name
            if not folder.exists():
                raise Refused(f"{folder} is gone; choose another --run, or remove {folder.parent} to train again.")
            check_written(folder / "finetune.json")
            network = B.load(folder).to(self.context.accelerator.device)
            for split in ("val", *(s for s in self.splits if s != "train")):
                value = self.top1(network, split)
                source = self.splits["train" if split == "val" else split].fingerprint[:16]
                found.append(
                    {
                        "arm": "finetune",
                        "model": model,
                        "recipe_sha256": sha256_json(marker["read"]),
                        "seed": settings.seed,
                        "phase": "finetune",
                        "round": 0,
                        "stage": name,
                        "protocol": "finetune",
                        "settings": told,
                        "data": f"{settings.data.called}@{source}",
                        "split": split,
                        "metric": "top1",
                        "value": value,
                        "images_seen": round(cost["images"]),
                        "flops": cost["flops"],
                        "seconds": round(cost["seconds"], 1),
                        "device": records.device_name(self.context.accelerator.device.type),
                        "precision": precision,
                        "weights_sha256": sha256_file(folder / "model.safetensors"),
                        "versions": records.versions(),
                    }
                )
                self.context.say(f"{name}, {self.called(split)}: {100 * value:.2f} %")
        if self.context.main:
            records.write(path, found)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
