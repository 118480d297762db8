"""python -m training.embed MODEL --data.path DATA --out OUT.parquet [--clusters ROUND]: features with paths."""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from . import backbone as B
from . import clusters, images, launch, proxies, recipe, sources
from .command import Parser, as_timm_names, check_data, guarded, model_parser
from .extraction import Stage, extract
from .files import Refused, check_written, read_json, sha256_file, whole_file
from .images import Images
from .loop import Context
from .setup import one_process, scaled_for

ROWS = 8192  # images between two writes


def command() -> Parser:
    description = "Write the features of images, with their paths, as a parquet file."
    parser = model_parser("embed", description, "--out OUT.parquet [--clusters ROUND]")
    parser.add_argument("--out", required=True, help="The parquet file to write.")
    parser.add_argument("--stage", type=int, help="Stage whose features are written; without one the pooled features.")
    parser.add_argument("--clusters", help="A round's folder, runs/NAME/round_N: adds its labels and distances.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images of a forward pass.")
    # The model says the size; nothing is held out, drawn or tested, and what cannot be decoded becomes null.
    unused = {"size", "limit", "val_fraction", "split_seed", "test_split", "labels", "label_column", "max_bad_fraction"}
    parser.add_class_arguments(recipe.Data, "data", skip=unused)
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = command()
    given = parser.read(arguments)
    data: recipe.Data = parser.instantiate(given).data
    check_data(data)
    with launch.StopSignals() as stop, tempfile.TemporaryDirectory() as scratch:
        context = one_process("embed", Path(scratch), stop)
        network = B.create(recipe.Model(as_timm_names(given.model), pretrained=True), None)
        size = network.pretrained_cfg["input_size"][-1]
        data = dataclasses.replace(scaled_for(network, data), size=size, max_bad_fraction=1.0)
        splits, _ = sources.read(data)
        split = sources.uses(data, splits).train
        found = B.as_seen_by(network, images.load(data, {split: splits[split]}, Path(scratch)))
        labels = assign(Path(given.clusters), found, context, given.batch_size) if given.clusters else {}
        network.to(context.accelerator.device)
        write(Path(given.out), network, found, given.stage, labels, context, given.batch_size)
        bad = len(found) - len(found.all)
        context.say(f"{len(found)} rows in {given.out}" + (f", {bad} of them null: not decodable" if bad else ""))


def assign(folder: Path, found: Images, context: Context, batch_size: int) -> dict[str, Tensor]:
    """Labels and distances of an earlier clustering, by the features of the backbone that it was made from."""
    earlier = clusters.Clustered(folder)
    check_written(folder / "clusters.json")
    made = read_json(folder / "clusters.json", "read")
    read = made["read"]
    beside = [path for path in folder.parent.iterdir() if (path / "model.safetensors").exists()]
    source = next((path for path in beside if sha256_file(path / "model.safetensors") == read["backbone"]), None)
    if source is None or read["clusters.source"] != "backbone":
        raise Refused(f"--clusters: the backbone whose features {folder} clusters is not beside it.")
    network = B.load(source).to(context.accelerator.device)
    stage = B.resolve_stage(network, made.get("stage", read["clusters.stage"]), "clusters.stage")
    task = proxies.find(read["proxy.name"])
    proxy = recipe.Proxy(name=read["proxy.name"], options=task.Options(**(read["proxy.options"] or {})))
    views = clusters.views_called(read["views"], proxy)
    seen = B.as_seen_by(network, found)
    return earlier(clusters.averaged(network, seen, seen.all, stage, views, context, batch_size)[0])


def write(
    out: Path,
    network: nn.Module,
    found: Images,
    stage: int | None,
    labels: dict[str, Tensor],
    context: Context,
    batch_size: int,
) -> None:
    """index, path, features and any labels of every image; null where one could not be decoded."""
    key: Stage = "pooled" if stage is None else B.resolve_stage(network, stage, "--stage")
    stages = [] if stage is None else [key]

    place = {index: number for number, index in enumerate(found.all.tolist())}

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(found), ROWS):
            part = torch.arange(start, min(start + ROWS, len(found)))
            usable = part[found.usable[part]]
            rows: list[list[float] | None] = [None] * len(part)
            if len(usable):
                features = extract(network, found, usable, context.accelerator, batch_size, stages)[key]
                for index, row in zip(usable.tolist(), features.numpy(), strict=True):
                    rows[index - start] = row
            columns = {
                "index": pa.array(part.tolist(), pa.int64()),
                "path": found.paths[start : start + len(part)],
                "features": pa.array(rows, pa.list_(pa.float32())),
            }
            for name, values in labels.items():
                kind = pa.int32() if name.startswith("label") else pa.float32()
                picked = [values[place[i]].item() if i in place else None for i in part.tolist()]
                columns[name] = pa.array(picked, kind)
            yield pa.table(columns)

    with whole_file(out) as beside:
        writer = None
        for table in tables():
            writer = writer or pq.ParquetWriter(beside, table.schema)
            writer.write_table(table)
        writer.close()


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
