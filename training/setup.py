"""Before the first phase: processes, images, and everything that can be refused before anything runs."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from . import backbone as B
from . import clusters, costs, images, longer, peaks, proxies, records, relearn, report
from .batches import draw_batch
from .checkpoints import Checkpoints, can_be_kept
from .evaluate import unprobed
from .files import Refused, lock_folder, nothing_left, read_json, refuse_files, refuse_kind, write_json, write_text
from .images import Images
from .launch import Key, StopSignals, end_trackers, resolve_precision, seed_all, start
from .loop import Context, steps_of
from .markers import refuse_other
from .memory import bound
from .names import escape
from .operations import dead_taps, on_device, suited
from .recipe import READS, Data, Evaluate, Proxy, Recipe, Schedule, phase_fields, to_yaml
from .task import BackboneTask, check_norms

Splits = tuple[Images, Images | None]
Read = tuple[Splits, dict[str, Splits]]  # the images, and other data sets by name


@dataclass
class Run:
    """What the phases of a run share.

    Attributes:
        recipe: what to do, precision resolved.
        arm: what the result is called in records.
        folder: the run folder.
        context: processes, log and budget.
        train, test: the splits; test is None without one.
        transfer: other data sets by name, for evaluation.
        lock: held on the main process while the run lasts.
        shared: folder of phases that several runs of a comparison have in common; None for a run by itself.
    """

    recipe: Recipe
    arm: str
    folder: Path
    context: Context
    train: Images
    test: Images | None
    transfer: dict[str, Splits]
    lock: IO[str] | None
    shared: Path | None = None

    @property
    def accelerator(self) -> Accelerator:
        return self.context.accelerator

    @property
    def main(self) -> bool:
        return self.context.main

    @property
    def room(self) -> float:
        """Bytes that features may take of the machine's memory."""
        return bound(self.recipe.data.memory_gb, sum(map(resident, [(self.train, self.test), *self.transfer.values()])))

    def key(self, phase: str, round_number: int = 0) -> Key:
        """What the randomness of a phase is a function of."""
        return Key(self.recipe.seed, phase, round_number)

    def close(self) -> None:
        """End the trackers and let the run folder go."""
        end_trackers(self.accelerator)
        if self.lock:
            self.lock.close()

    def on_device(self, network: nn.Module) -> nn.Module:
        return on_device(network, self.accelerator.device, self.recipe.data.size)

    def untrained(self) -> nn.Module:
        """The network that phase 1 starts from if it starts from random weights, its batch norms' statistics set."""
        seed_all(self.key("proxy").number("weights"))
        network = self.on_device(B.create(self.recipe.model, self.recipe.data.size, pretrained=False))
        B.estimate_norm(network, self.train, self.accelerator.device, self.recipe.evaluate.batch_size)
        return network


def prepare(
    recipe: Recipe,
    stop: StopSignals,
    arm: str = "sslpp",
    shared: Path | None = None,
    read: Read | None = None,
) -> Run:
    """Start the processes, take the run folder, read the images, and refuse what cannot work.

    Args:
        recipe: what to do; its `run` is set.
        stop: requests to end.
        arm: what the result is called in records.
        shared: where phases lie that several runs have in common.
        read: the images, where they are read already.

    Raises:
        Refused: naming the field.
    """
    folder, recipe = Path(recipe.run), copy.deepcopy(recipe)
    network = B.create(recipe.model, recipe.data.size, pretrained=False)
    recipe.precision = run_precision(recipe, network)
    if recipe.relearn.split != "auto":
        relearn.split(network, recipe.relearn, recipe.data.size)
    if recipe.clusters.stage != "auto":
        B.resolve_stage(network, recipe.clusters.stage, "clusters.stage")
    rounds = (f"round_{number}" for number in range(1, recipe.relearn.rounds + 1))
    refuse_kind(folder, "a run")
    refuse_files(folder, ("checkpoints", "proxy", "report", "hub", *rounds))
    going_on: list[Path] = []
    for marker in folder.glob("*/*.json"):
        if marker.stem in READS and re.fullmatch(r"proxy|round_\d+", marker.parent.name):  # else it is a copy
            fields, epochs = phase_fields(recipe, marker.stem), f"{marker.stem}.epochs"
            if longer.asked(marker, longer.going_on(marker, fields, epochs)):
                longer.check(folder, marker, epochs, shared is None)
                going_on.append(marker)
            else:
                refuse_other(marker, fields)
    for phase, number in ("proxy", 0), *(("relearn", number) for number in range(1, recipe.relearn.rounds + 1)):
        if not (folder / (f"round_{number}" if number else "proxy") / f"{phase}.json").exists():
            Checkpoints(folder / "checkpoints").refuse_other(f"{phase}_{number}", phase_fields(recipe, phase))
    accelerator = start(recipe.precision, recipe.log.tracker, str(folder))
    context = Context(accelerator, folder, stop, recipe.log.every, recipe.checkpoint_every)
    with nothing_left(folder):
        lock = lock_folder(folder) if context.main else None
        (train, test), transfer = read or load_images(recipe, network, context)
        refuse(recipe, train, network, accelerator)
        for marker in going_on:
            longer.refuse_idle(marker, getattr(recipe, marker.stem), len(train.train), f"{marker.stem}.epochs")
        needs = peaks.check(recipe, (train, test), network, accelerator) if read is None else ""
        if context.main:
            _remember(recipe, folder, train, test)
    run = Run(recipe, arm, folder, context, train, test, transfer, lock, shared)
    if run.main:
        write_text(folder / "recipe.yaml", to_yaml(recipe))
    accelerator.init_trackers("sslpp", {})
    if read is None:
        _announce(run, network)
        context.say(needs)
    return run


def run_precision(recipe: Recipe, network: nn.Module, other: Proxy | None = None) -> str:
    """`auto` as the run folder has it, so that a run goes on as it began, else as the device likes it.

    `other` is another proxy task that is trained in the same precision.
    """
    asked, before = recipe.precision, Path(recipe.run) / "recipe.yaml"
    if asked == "auto" and before.exists():
        lines = before.read_text(encoding="utf-8", errors="replace").splitlines()
        asked = next((line.split(": ")[1] for line in lines if line.startswith("precision: ")), asked)
    tasks = [task for task in (recipe.proxy, other) if task and task.epochs]
    sides = [recipe.data.size, *(proxies.side(task, recipe.data.size) for task in tasks)]
    return resolve_precision(asked, suited(network, min(sides))[1])


def load_images(recipe: Recipe, network: nn.Module, context: Context) -> Read:
    """The training split and the test split, if there is one, and other data sets, as the network is to see them.

    Raises:
        Refused: another data set has no labels.
    """
    data = scaled_for(network, recipe.data) if recipe.model.pretrained else recipe.data
    train, test = load_splits(data, context)
    source = network.pretrained_cfg
    seen = {"mean": tuple(source["mean"]), "std": tuple(source["std"])} if recipe.model.pretrained else {}

    def as_seen(images: Images | None) -> Images | None:
        return dataclasses.replace(images, **seen) if images else None

    own = as_seen(train), as_seen(test)
    return own, load_transfer(recipe.evaluate.transfer, data, own, context)


def resident(splits: Splits) -> int:
    """Bytes of pictures in memory."""
    return sum(split.pixels.resident for split in splits if split)


def load_transfer(paths: list[str], data: Data, own: Splits, context: Context) -> dict[str, Splits]:
    """Other data sets by name, at the size and with the statistics of one's own training split.

    Raises:
        Refused: one has no labels, or nothing to hold out.
    """
    found: dict[str, Splits] = {}
    taken = resident(own)
    called = [Data(path=path).called for path in paths]
    for number, path in enumerate(paths):
        told = {"size": own[0].size, "white": data.white, "split_seed": data.split_seed, "memory_gb": data.memory_gb}
        other = Data(path=path, **told)
        same = called[:number].count(called[number])
        name = called[number] + (f" ({same + 1})" if same else "")
        splits = load_splits(other, context, apart=Path("transfer") / re.sub(r"\W+", "_", path), taken=taken)
        taken += resident(splits)
        check_split(other, splits[0], f"evaluate.transfer: {path}")
        if any(split is not None and split.labels is None for split in splits):
            raise Refused(f"evaluate.transfer: {path} has no labels in a split that is to be measured.")
        seen = {"mean": own[0].mean, "std": own[0].std, "size": own[0].size}
        train, test = (dataclasses.replace(split, **seen) if split else None for split in splits)
        found[name] = train, test
    return found


def scaled_for(network: nn.Module, data: Data) -> Data:
    """The data, those of more than 8 bits scaled as for the images that a saved backbone was trained on."""
    return dataclasses.replace(data, white=data.white or B.white_of(network))


def load_splits(data: Data, context: Context, tuning: bool = False, apart: Path = Path(), taken: int = 0) -> Splits:
    """The training split and the test split, if there is one; the main process decodes before the others read.

    Args:
        data: where they are.
        context: the run.
        tuning: as `images.load_splits` takes it.
        apart: folder below the run's for pixels that are kept in files.
        taken: bytes of data.memory_gb that are in use.
    """
    shared = context.accelerator.num_processes > 1

    def load() -> Splits:
        return images.load_splits(data, context.folder / apart, tuning, in_file=shared, taken=taken)

    found = load() if context.main else None
    context.accelerator.wait_for_everyone()
    return found or load()


def _remember(recipe: Recipe, folder: Path, train: Images, test: Images | None) -> None:
    """Write data.json and bad_images.txt; refuse a run folder of other data, so that labels never slip by one."""
    path, data = folder / "data.json", recipe.data
    told = {
        "path": list(map(escape, data.paths)),
        "splits": train.account,
        "images": len(train),
        "fingerprint": train.fingerprint,
        "bad": int((~train.usable).sum()),
        "training": len(train.train),
        "held_out": len(train.val),
        "test": None if test is None else {"images": len(test), "fingerprint": test.fingerprint},
        "size": data.size,
        "crop_pct": train.crop_pct,
        "mean": list(train.mean),
        "std": list(train.std),
        "white": train.white,
        "label_names": train.label_names,
    }
    if path.exists():
        fixed = ("images", "fingerprint", "size", "training", "held_out", "white")
        before = read_json(path, *fixed)
        for name in fixed:
            if before[name] != told[name]:
                what = f"data.json has {name} = {before[name]}, now it is {told[name]}"
                if name == "fingerprint":
                    what = "as many, but files were renamed or changed, or others took their place"
                raise Refused(f"{folder} holds a run over other images ({what}); choose another --run.")
    write_json(path, told)
    images.write_bad(folder, [*train.bad, *(test.bad if test else ())])


def refuse(recipe: Recipe, train: Images, network: nn.Module, accelerator: Accelerator) -> None:
    """Refuse what the images, the network or the number of processes make impossible.

    Raises:
        Refused: naming the field.
    """
    processes, settings = accelerator.num_processes, recipe.proxy
    check_split(recipe.data, train)
    proxies.check(settings)
    if recipe.relearn.rounds:
        clusters.check(recipe.clusters, train)
        relearn.check(recipe.relearn, train)
        check_fits(recipe.relearn, len(train.train), processes, "relearn.")
        relearned = BackboneTask(copy.deepcopy(network), recipe.relearn, train).train()
        blank = torch.zeros(1, 3, train.size, train.size)
        check_norms(recipe.relearn, processes, lambda: relearned.embed(blank), "relearn.")
    if settings.epochs:
        check_fits(settings, len(train.train), processes, "proxy.")
        task = proxies.build(settings, copy.deepcopy(network), train)
        key, indices = Key(recipe.seed, "proxy"), train.train

        def step() -> None:
            batch = draw_batch(train, indices, settings, key, 0, 0, accelerator)
            task.train().to(accelerator.device)(batch.to(accelerator.device))

        check_norms(settings, processes, step, "proxy.")


def tell_unprobed(own: Splits, transfer: dict[str, Splits], settings: Evaluate, context: Context) -> None:
    """Say where nothing that needs classes can be measured."""
    for name, splits in {"": own, **transfer}.items():
        if why := unprobed(splits, settings):
            context.say(f"{name + ': ' if name else ''}{why}, so that linear and knn are left out")


def check_split(data: Data, images: Images, field: str = "data.val_fraction") -> None:
    """Refuse a held-out part of nothing, or of everything.

    Raises:
        Refused: naming the field.
    """
    if not len(images.train) or not len(images.val):
        raise Refused(
            f"{field}: {data.held_out:g} of {len(images.all)} usable images leaves "
            f"{len(images.train)} to train on and {len(images.val)} held out; at least one of each is needed."
        )


def check_fits(schedule: Schedule, images: int, processes: int, prefix: str = "") -> None:
    """Refuse a schedule, its fields named with `prefix`, that these images and processes make impossible.

    Raises:
        Refused: naming the field.
    """
    if schedule.optimizer not in list_optimizers():
        raise Refused(f"{prefix}optimizer: timm has no optimiser {schedule.optimizer!r}.")
    if get_optimizer_info(schedule.optimizer).second_order:
        raise Refused(f"{prefix}optimizer: {schedule.optimizer} needs second derivatives, which no step here takes.")
    try:
        weight = nn.Parameter(torch.zeros(2, 2))
        optimizer = create_optimizer_v2([weight], schedule.optimizer, lr=schedule.lr)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    except Exception as error:  # of a package that is missing, or a device
        raise Refused(f"{prefix}optimizer: {schedule.optimizer} cannot be had here: {error}.") from error
    if not can_be_kept(optimizer):
        raise Refused(f"{prefix}optimizer: checkpoints cannot hold what {schedule.optimizer} remembers.")
    if schedule.batch_size % (processes * schedule.accumulate):
        raise Refused(
            f"{prefix}batch_size: {schedule.batch_size} images cannot be shared evenly by {processes} processes of "
            f"{schedule.accumulate} micro-batches each."
        )
    steps_of(schedule, images, prefix)


def tell(context: Context, read: Read, settings: Evaluate, network: nn.Module) -> None:
    """Say what each split is for, what cannot be measured, and warn of weights that never see data."""
    (train, test), transfer = read
    context.say(report.splits_line(train.account))
    tell_unprobed((train, test), transfer, settings, context)
    if dead := dead_taps(network, train.size):
        name, (taps, total) = max(dead.items(), key=lambda item: item[1])
        context.say(
            f"warning: at {train.size} px, {len(dead)} convolutions have taps that no data ever meets, such as "
            f"{taps} of the {total} of {name}; a larger data.size or smaller strides and kernels leave none"
        )


def _announce(run: Run, network: nn.Module) -> None:
    """A line each: what splits are for, what of the network is useless, what runs where, for how long, on what disk."""
    recipe, train, processes = run.recipe, run.train, run.accelerator.num_processes
    tell(run.context, ((train, run.test), run.transfer), recipe.evaluate, network)
    schedules = (recipe.proxy, *[recipe.relearn] * min(1, recipe.relearn.rounds))
    batch = ", ".join(str(size) for size in dict.fromkeys(s.batch_size for s in schedules if s.epochs)) or "none"
    backbones = 2 + recipe.relearn.rounds  # the untrained network, and after each phase
    counted, splits = costs.counts(recipe, train, network), (train, run.test)
    time = costs.told([recipe], backbones, counted, splits, network, run.accelerator)
    weights = sum(p.nbytes for p in network.parameters())
    # proxy, rounds and hub hold the weights once; two checkpoints hold weights and momentum, perhaps an average.
    disk = weights * (2 + recipe.relearn.rounds + 2 * 3) + (train.pixels.nbytes if processes > 1 else 0)
    run.context.say(
        f"{records.device_name(run.accelerator.device.type)}; {recipe.precision}; processes {processes}; "
        f"threads {torch.get_num_threads()}; batch {batch}; images {len(train.train)} "
        f"(+ {len(train.val)} held out), {round(train.pixels.nbytes / 1e6)} MB; {time}, and "
        f"{max(1, round(disk / 1e6))} MB in {run.folder}"
    )
