"""What commands over a finished model read: the model, and images as it is to see them."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from torch import nn

from . import backbone as B
from . import images, sources
from .decoding import MARGIN
from .files import Refused, sha256_file
from .images import Images
from .launch import StopSignals, start
from .loop import Context
from .recipe import Data, Model
from .setup import Splits, load_splits, scaled_for
from .uses import uses

# What `every_split` has no use for: nothing is held out, drawn or tested, and what cannot be decoded keeps its place.
UNUSED = ("limit", "val_fraction", "split_seed", "test_split", "labels", "label_column", "max_bad_fraction")


@contextmanager
def one_process(command: str) -> Iterator[Context]:
    """A float32 context, its folder gone afterwards, for a command that measures or embeds, and does not train.

    Raises:
        Refused: it was launched in several processes.
    """
    with StopSignals() as stop, tempfile.TemporaryDirectory() as scratch:
        accelerator = start("fp32", None, scratch)
        if accelerator.num_processes > 1:
            raise Refused(f"{command} runs in one process; start it with python -m training.{command}.")
        yield Context(accelerator, Path(scratch), stop, 1, 1)


def as_timm_names(name: str) -> str:
    """A MODEL as timm.create_model takes it: a folder by its prefix, but for one that only bears a model's name."""
    folder = Path(name)
    if not folder.is_dir() or (timm.is_model(name) and not (folder / "config.json").is_file()):
        return name
    return f"local-dir:{name}"


def model(name: str, size: int | None = None, pretrained: bool = True, head: bool = False) -> nn.Module:
    """The MODEL of a command line.

    Args:
        name: a folder, or a name that timm loads.
        size: working size, px; None: the model's own.
        pretrained: with its weights.
        head: with its classifier; a backbone without.

    Raises:
        Refused: there is none of this name, or it is not of this kind.
    """
    folder, called = Path(name), as_timm_names(name)
    if called != name and not (folder / "config.json").is_file():
        found = sorted([*folder.glob("*/config.json"), *folder.glob("seed_*/sslpp/hub/config.json")])
        inside = ", ".join(str(path.parent) for path in found)
        advice = f"name one of the models in it: {inside}" if inside else "a model's folder has one"
        raise Refused(f"MODEL: {name} has no config.json; {advice}.")
    if "/" in name and ":" not in name and not folder.exists():
        raise Refused(f"MODEL: there is no folder {name}; a model of the Hub is called hf-hub:ORG/NAME.")
    try:
        network = B.create(Model(called, pretrained=pretrained), size, head=head)
    except Refused as error:
        raise Refused(re.sub(r"^model\.\w+: ", "MODEL: ", str(error))) from error
    if head and not network.num_classes:
        raise Refused(
            f"MODEL: {name} is a backbone, which knows no classes; python -m training.finetune makes it a classifier."
        )
    return network


def weights_sha256(network: nn.Module) -> str:
    """sha256 of the file that the weights were read from, as runs record it; of the tensors where timm names none."""
    told = network.pretrained_cfg.get("file")  # of a folder, the folder
    for file in (Path(told), Path(told) / "model.safetensors") if told else ():
        if file.is_file():
            return sha256_file(file)
    return B.fingerprint(network.state_dict())


def own_size(network: nn.Module) -> int:
    """The side of the images that a model was trained with, px."""
    return network.pretrained_cfg["input_size"][-1]


def load_for(
    network: nn.Module,
    data: Data,
    context: Context,
    size: int | None = None,
    own_crop: bool = False,
    tuning: bool = False,
) -> Splits:
    """The splits as a model expects them, at its own size if no other is given, with its crop or the images' own."""
    if not own_crop:
        say_crop(network, context)
    train, test = load_splits(data_for(network, data, size), context, tuning)
    return B.as_seen_by(network, train, own_crop), B.as_seen_by(network, test, own_crop) if test else None


def every_split(
    network: nn.Module, data: Data, context: Context, size: int | None = None
) -> tuple[list[str], Iterator[Images]]:
    """The names of every split, or of data.split alone, and each split as a model expects it.

    What cannot be decoded keeps its place in a split of which something can.
    """
    say_crop(network, context)
    data = dataclasses.replace(data_for(network, data, size), max_bad_fraction=1.0)
    found, _ = sources.read(data, labelled=False)
    names = [uses(data, found).train] if data.split else [name for name, source in found.items() if len(source)]

    def read() -> Iterator[Images]:
        white = data.white
        for name in names:
            split = images.load(dataclasses.replace(data, white=white), {name: found[name]}, context.folder)
            white = split.white
            yield B.as_seen_by(network, split)

    return names, read()


def say_crop(network: nn.Module, context: Context) -> None:
    """Say that a model's own transform would show more than the centre."""
    mode = network.pretrained_cfg.get("crop_mode") or "center"
    if mode != "center":
        what = {"squash": "squeezes whole images into a square", "border": "shows whole images with a border"}
        context.say(f"the model's own transform {what.get(mode, f'crops by {mode}')}; here it sees their centre")


def data_for(network: nn.Module, data: Data, size: int | None = None) -> Data:
    """The data as a model is to see them, at its own size if no other is given."""
    return dataclasses.replace(scaled_for(network, data), size=size or own_size(network))


def shrunk(network: nn.Module, found: Images) -> str | None:
    """What to expect of images that a model sees at another size than their own, or than it was trained at."""
    size, own = found.size, own_size(network)
    larger = int((found.sides >= round(MARGIN * size)).sum())
    told = []
    if size != own:
        told.append(f"the model was trained at {own} px and is asked at {size} px: its features may be better or worse")
    if larger:
        told.append(
            f"{larger} of {len(found.all)} images are larger than the {size} px that the model sees, and are shrunk to "
            "that: what is small in them is lost to it, and a larger --data.size may show it more, up to a point"
        )
    if not told:
        return None
    return "; ".join(told) + "; python -m training.evaluate tells which size is best, where there are labels"
