"""python -m training.finetune MODEL --data.path DATA: a backbone and labels in, a classifier that timm loads out."""

import copy
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import backbone as B
from . import config, costs, inputs, launch, longer, peaks, records, report
from .classifier import Classify, Finetune, head_names
from .command import (
    NO_STATISTICS,
    Parser,
    as_run,
    asked,
    check_data,
    check_schedule,
    guarded,
    model_parser,
    named_folder,
    short_name,
)
from .files import (
    Refused,
    lock_folder,
    nothing_left,
    read_json,
    refuse_files,
    refuse_kind,
    write_json,
    write_text,
)
from .images import Images, write_bad
from .keeper import Keeper
from .launch import Key, seed_all
from .loop import Context, steps_of, train
from .markers import refuse_other, since_ever
from .operations import suited
from .recipe import flatten, to_yaml
from .setup import check_fits, check_split
from .task import ViewTask, check_norms

UNUSED = ("mlp_layers", "mlp_dim")  # a classifier's head stands on the backbone itself


def command() -> Parser:
    description = "Fine-tune a backbone on labelled images; the result is a folder that timm loads."
    parser = model_parser("finetune", description, "[--config RECIPE]", sizes=True)
    parser.add_argument("--config", action="config", help="Recipe, a YAML file; later options override it.")
    parser.add_class_arguments(Finetune, as_group=False, skip={"data", *UNUSED})
    return parser.show("model", "data.path", "run", "epochs", "lr", "batch_size", "freeze", "labels", "precision")


def main(arguments: Sequence[str]) -> None:
    parser = command()
    for _, file in asked(arguments, "--config"):
        if Path(file).is_file():  # if not, the parser says so
            config.load(Path(file), Finetune, "epochs: 5")
    values = parser.read(arguments)
    name = values.pop("model")
    made = parser.instantiate(values)
    settings = Finetune(**{f.name: made[f.name] for f in dataclasses.fields(Finetune) if f.name in made})
    check_data(settings.data, run_folder(name, settings))
    check_schedule(settings)
    if settings.scratch and settings.norm == "stored":
        raise Refused(f"norm: {NO_STATISTICS}; leave it at batch where you start from scratch.")
    with launch.StopSignals() as stop:
        finetune(name, settings, stop)


def finetune(name: str, settings: Finetune, stop: launch.StopSignals) -> Path:
    """Fine-tune a backbone.

    Args:
        name: MODEL, as a command line has it.
        settings: how.
        stop: requests to end.

    Returns:
        The run folder, which gets best/ and last/.
    """
    folder = run_folder(name, settings)
    key = Key(settings.seed, "finetune")
    seed_all(key.number("weights"))
    network = inputs.model(name, settings.data.size, pretrained=not settings.scratch)
    own = inputs.own_size(network)
    precision = launch.resolve_precision(settings.precision, suited(network, settings.data.size or own)[1])
    accelerator = launch.start(precision, settings.log.tracker, str(folder))
    context = Context(accelerator, folder, stop, settings.log.every, settings.checkpoint_every)
    with nothing_left(folder):
        refuse_kind(folder, "a fine-tuned classifier")
        refuse_files(folder, ("checkpoints", "best", "last"))
        lock = lock_folder(folder) if context.main else None
        splits, indices = load_images(network, settings, context)
        frozen = check(settings, network, splits["train"], len(indices), accelerator.num_processes)
        needs = peaks.fitting([peaks.step("", settings, network, splits["train"], precision, accelerator)], accelerator)
        marker = folder / "finetune.json"
        read = longer.going_on(marker, reads(settings, network, splits, indices, precision), "epochs")
        more = longer.asked(marker, read)
        if more:
            longer.check(folder, marker, "epochs")
            longer.refuse_idle(marker, settings, len(indices), "epochs")
        elif marker.exists():
            refuse_other(marker, read)
    accelerator.wait_for_everyone()
    if context.main:
        resolved = dataclasses.replace(settings, run=as_run(folder), precision=precision)
        write_text(folder / "recipe.yaml", f"# for python -m training.finetune {name}\n{to_yaml(resolved, UNUSED)}")
        write_bad(folder, [line for images in splits.values() for line in images.bad])
        if not marker.exists():
            write_json(marker, {"read": read})
    accelerator.wait_for_everyone()
    accelerator.init_trackers("sslpp", {})
    context.say(report.splits_line(splits["train"].account))
    classes = len(splits["train"].label_names)
    view = costs.seconds_of_view(network, splits["train"], [settings], accelerator)
    views = settings.epochs * (len(indices) + len(splits["train"].val) / 3)  # each epoch looks at what is held out
    expected = "as the model expects them" if splits["train"].size == own else f"instead of the model's {own}"
    context.say(
        f"{records.device_name(accelerator.device.type)}; {precision}; processes {accelerator.num_processes}; threads "
        f"{torch.get_num_threads()}; batch {settings.batch_size}; {len(indices)} labels of {classes} classes; images "
        f"at {splits['train'].size} px, {expected}; training takes about "
        f"{costs.duration(views * view)}; {folder}"
    )
    context.say(needs)
    seed_all(key.number("head"))
    network.reset_classifier(classes)
    keeper = Keeper(context, splits, settings)
    if more:
        done = read["earlier"][-1][0]
        context.say(f"{folder}: goes on from {done:g} epochs to {settings.epochs:g}, by a schedule of its own")
    if more or "budget" not in read_json(marker, "read"):
        fit(network, splits["train"], indices, settings, frozen, key, context, read, keeper)
        if context.main:
            write_json(marker, {"read": read, "budget": context.budget})
        accelerator.wait_for_everyone()
    keeper.measure(inputs.as_timm_names(name), precision, len(indices))
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
    frozen: set[str] = set()
    if settings.freeze is not None:
        frozen = B.low_names(network, B.resolve_stage(network, settings.freeze, "freeze"), images.size)
    task = ViewTask(copy.deepcopy(network), settings, images)
    task.hold(frozen)
    check_norms(settings, processes, lambda: task.train().network(torch.zeros(1, 3, images.size, images.size)))
    return frozen


def reads(
    settings: Finetune, network: nn.Module, splits: dict[str, Images], indices: Tensor, precision: str
) -> dict[str, Any]:
    """What the result depends on: fields, weights, images, and which labels there are and may be used."""
    apart = ("log", "run", "checkpoint_every", "data")
    own = since_ever({name: value for name, value in flatten(settings).items() if name.split(".")[0] not in apart})
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
    """The splits as the network is to see them, and the training images whose labels may be used.

    Raises:
        Refused: labels are missing, or do not match between the splits.
    """
    train, test = inputs.load_for(network, settings.data, context, settings.data.size, own_crop=True, tuning=True)
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
        if unknown := len(images.all) - len(images.labelled(images.all)):
            context.say(f"{unknown} of {len(images.all)} images of the {split} split have no label and are left out")
        if not len(images.labelled(images.val if images is train else images.all)):
            raise Refused(f"{field}: no image that the {split} split is to be measured on has a label.{advice}")
    known = train.labelled(train.train)
    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(settings.data.split_seed))
    shuffled, indices = known[chosen], []
    for label in range(len(train.label_names)):
        members = shuffled[train.labels[shuffled] == label]
        indices.append(members[: max(1, round(settings.labels * len(members)))])
    if none := [name for name, own in zip(train.label_names, indices, strict=True) if not len(own)]:
        few = ", ".join(none[:5]) + ", …" * (len(none) > 5)
        context.say(f"warning: {len(none)} classes have no image to learn from, and are never learned: {few}")
    return splits, torch.cat(indices).sort().values


def fit(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    settings: Finetune,
    frozen: set[str],
    key: Key,
    context: Context,
    read: dict[str, Any],
    keeper: Keeper,
) -> None:
    """Train the head, then all that is not frozen; `keeper` looks at the classifier after each epoch."""

    def steps(epochs: float) -> int:
        return steps_of(dataclasses.replace(settings, epochs=epochs), len(indices))[1]

    total, earlier = steps(settings.epochs), read.get("earlier", ())
    names = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    alone = round(settings.head_first * (steps(earlier[0][0]) if earlier else total))
    task = Classify(network, settings, images, average_from=alone)
    keeper.task = task
    for still, first, last in ((names - head_names(network), 0, alone), (frozen, alone, total)):
        task.hold(still)
        done = longer.last_of(earlier, steps)
        train(task, images, indices, settings, key, context, read, first, last, keeper.look, done)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
