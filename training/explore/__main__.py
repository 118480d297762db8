"""python -m training.explore RUN: one HTML page, without a server, to look at a run's images and what it made of them.

Also of a features.parquet that training.embed wrote, with the images' place as --data.path.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from .. import backbone as B
from .. import figures, images, inputs, recipe, sources
from ..command import Parser, check_data, guarded, parse
from ..extraction import extract
from ..files import Failed, Refused, read_json, refuse_out, whole_file
from ..images import Images
from ..limits import PositiveInt
from ..loop import Context
from ..markers import check_written
from ..operations import on_device
from ..setup import scaled_for
from ..uses import uses
from . import FEWEST, Found

IMAGES = 10_000
NEEDS = "explore needs bokeh and imagehash: pip install -e '.[training,explore]'."


def command() -> Parser:
    made = Parser(
        prog="python -m training.explore",
        description="One HTML page, without a server, to look at images and their features in.",
        usage="%(prog)s RUN [--out PAGE.html] | %(prog)s FEATURES.parquet --data.path DATA",
        allow_abbrev=False,
    )
    made.add_argument("source", help="A run's folder, or a parquet file that training.embed wrote.")
    made.add_argument("--out", help="The page; by default explore.html in the run, or beside the file.")
    made.add_argument("--images", type=PositiveInt, default=IMAGES, help="Most images, drawn at random, to show.")
    made.add_argument("--batch_size", type=PositiveInt, default=256, help="Images of a forward pass.")
    # What a run says of its data counts, but for what is given here; the size is the network's.
    unused = {"size", "limit", "val_fraction", "split_seed", "test_split", "max_bad_fraction"}
    made.add_class_arguments(recipe.Data, "data", skip=unused)
    return made


def main(arguments: Sequence[str]) -> None:
    made = command()
    given = made.read(arguments)
    data, source = made.instantiate(given).data, Path(given.source)
    try:
        from . import page
    except ImportError as error:
        raise Refused(NEEDS) from error
    if given.images < FEWEST:
        raise Refused(f"--images: a map needs at least {FEWEST}.")
    if not source.exists():
        raise Refused(f"{source} does not exist; name a run's folder, or a parquet file that training.embed wrote.")
    out = Path(given.out) if given.out else (source if source.is_dir() else source.parent) / "explore.html"
    refuse_out(out, [source, *data.paths])
    with inputs.one_process("explore") as context:
        found = (of_run if source.is_dir() else of_table)(source, data, given.images, given.batch_size, context)
        if len(found.paths) < FEWEST:
            raise Refused(f"{source}: {len(found.paths)} images are too few for a map; it needs {FEWEST}.")
        context.say(f"laying out {len(found.paths):,} images; 10,000 take some minutes")
        with whole_file(out) as beside:
            page.write(beside, source.resolve().name, found)
    context.say(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser")


def some(data: recipe.Data, count: int, folder: Path) -> tuple[Images, np.ndarray]:
    """At most `count` images of the training split, and their places among all that `data` has of it."""
    splits, _ = sources.read(data)
    name = uses(data, splits).train
    size = len(splits[name])
    fewer = dataclasses.replace(data, limit=min(count, data.limit or size), max_bad_fraction=1.0)
    loaded = images.load(fewer, {name: splits[name]}, folder)
    every, drawn = images.drawn(data, size), images.drawn(fewer, size)
    return loaded, np.searchsorted(every, drawn)


def rows_of(path: Path, loaded: Images, places: np.ndarray) -> pa.Table:
    """The rows of a parquet file that are of the images that were read.

    Raises:
        Refused: its paths are of other images.
    """
    table = pq.read_table(path)
    if "split" in table.column_names:  # of all splits, of which the training split is shown
        table = table.filter(pc.equal(table["split"], next(iter(loaded.account))))
    if places.max() < len(table):
        table = table.take(places)
        if table["path"].to_pylist() == loaded.paths:
            return table
    raise Refused(f"data.path: these are not the images of {path}; name those with --data.path.")


def known(loaded: Images, sides: dict[str, torch.Tensor], table: pa.Table | None) -> Found:
    """What there is of the images that could be decoded: features by side, and clusters that a table has."""
    usable = loaded.all
    names = loaded.label_names
    classes = None
    if loaded.labels is not None:
        classes = [names[label] if label >= 0 else None for label in loaded.labels[usable].tolist()]
    clusters = {}
    for name in table.column_names if table else ():
        if re.fullmatch(r"label_\d+", name):
            k, labels = int(name.removeprefix("label_")), table[name].fill_null(-1).to_numpy()[usable]
            distance = f"distance_{k}"  # true labels as clusters have none
            known = distance in table.column_names
            clusters[k] = labels, table[distance].fill_null(2.0).to_numpy()[usable] if known else np.zeros(len(usable))
    return Found([loaded.paths[i] for i in usable.tolist()], figures.tiles(loaded, usable), sides, classes, clusters)


def of_run(folder: Path, data: recipe.Data, count: int, batch_size: int, context: Context) -> Found:
    """Images of a run, with features before and after relearning and the clusters of its last round."""
    if not (folder / "proxy" / "model.safetensors").exists():
        runs = ("seed_*/*", "*/seed_*/*")  # of a comparison, and of tasks side by side
        inside = [
            place for name in runs for place in folder.glob(name) if (place / "proxy" / "model.safetensors").exists()
        ]
        best = min(inside, key=lambda path: (path.name != "sslpp", path), default=None)
        hint = f"; name one of its runs, such as {best}" if best else ""
        if (folder.parent / "proxy" / "model.safetensors").exists():
            hint = f"; name the run, {folder.parent}"
        raise Refused(f"{folder} is no run with a backbone in proxy/{hint}.")
    own = parse(["--config", str(folder / "recipe.yaml"), "--run", str(folder)]).data
    unset = recipe.Data()
    given = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    changed = {name: value for name, value in given.items() if value != getattr(unset, name)}
    numbers = {path: path.name.removeprefix("round_") for path in folder.glob("round_*")}
    rounds = [path for path in numbers if numbers[path].isdecimal() and (path / "model.safetensors").exists()]
    rounds.sort(key=lambda path: int(numbers[path]))
    sides = {"before relearning": folder / "proxy"} | ({"after relearning": rounds[-1]} if rounds else {})
    if rounds:
        check_written(rounds[-1] / "clusters.json")
    networks = {name: B.load(path) for name, path in sides.items()}
    first = next(iter(networks.values()))
    loaded, places = some(scaled_for(first, dataclasses.replace(own, **changed)), count, context.folder)
    table = rows_of(rounds[-1] / "labels.parquet", loaded, places) if rounds else None
    read = read_json(folder / "data.json", "images", "fingerprint")
    if len(loaded) == read["images"] and loaded.fingerprint != read["fingerprint"]:
        raise Refused(f"data.path: these bear the names of {folder}'s images, and are others, or were changed since.")
    features = {}
    for name, network in networks.items():
        seen, network = B.as_seen_by(network, loaded), on_device(network, context.accelerator.device, loaded.size)
        context.say(f"features {name} of {len(loaded.all):,} images")
        features[name] = extract(network, seen, seen.all, context.accelerator, batch_size)["pooled"]
    return known(loaded, features, table)


def of_table(path: Path, data: recipe.Data, count: int, batch_size: int, context: Context) -> Found:
    """Images of a file of training.embed, with the features and clusters that it has."""
    try:
        names = pq.read_schema(path).names
    except Exception as error:  # whatever else the file is
        raise Refused(f"{path} is no parquet file that can be read.") from error
    if missing := [name for name in ("path", "features") if name not in names]:
        raise Refused(f"{path} has no column {missing[0]!r}; training.embed writes what is wanted here.")
    check_data(data)
    loaded, places = some(dataclasses.replace(data, size=figures.TILE), count, context.folder)
    table = rows_of(path, loaded, places)
    rows = [table["features"][i].as_py() for i in loaded.all.tolist()]
    if None in rows:
        raise Failed(f"{path} has no features of an image that can be decoded; make it again with training.embed.")
    try:
        features = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError):  # texts, or rows of different lengths
        features = torch.empty(0)
    if features.ndim != 2:
        raise Refused(f"{path}: its column features does not hold as many numbers for each image.")
    return known(loaded, {"features": features}, table)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
