"""python -m training.embed MODEL --data.path DATA --out OUT.parquet [--clusters ROUND]: features with paths."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from . import backbone as B
from . import clusters, inputs, proxies, recipe, tables
from .command import Parser, check_data, guarded, model_parser
from .extraction import Stage, extract
from .files import Refused, read_json, sha256_file
from .images import Images
from .limits import PositiveInt
from .loop import Context
from .markers import check_written
from .operations import on_device

ROWS = 8192  # images between two writes


def command() -> Parser:
    description = "Write the features of images, with their paths, as a table: every split, or --data.split alone."
    parser = model_parser("embed", description, "--out OUT.parquet [--clusters ROUND]", inputs.UNUSED, sizes=True)
    parser.add_argument("--out", required=True, help="The table to write: .parquet, .csv or .npz, as its ending says.")
    parser.add_argument("--stage", type=int, help="Stage whose features are written; without one the pooled features.")
    parser.add_argument("--clusters", metavar="ROUND", help="runs/NAME/round_N: adds its labels and distances.")
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="Images of a forward pass.")
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = command()
    given = parser.read(arguments)
    data: recipe.Data = parser.instantiate(given).data
    check_data(data)
    out = Path(given.out)
    tables.check(out, read=data.paths)
    with inputs.one_process("embed") as context:
        network = inputs.model(given.model, data.size)
        stage: Stage = "pooled" if given.stage is None else B.resolve_stage(network, given.stage, "--stage")
        network = on_device(network, context.accelerator.device, data.size or inputs.own_size(network))
        earlier = Earlier(Path(given.clusters), context) if given.clusters else None
        bad, expect = 0, None

        def parts() -> Iterator[pa.Table]:
            nonlocal bad, expect
            names, splits = inputs.every_split(network, data, context, data.size)
            apart = earlier and inputs.data_for(earlier.network, data) != inputs.data_for(network, data, data.size)
            again = inputs.every_split(earlier.network, data, context)[1] if apart else None
            for split, found in zip(names, splits, strict=True):
                if not expect and (expect := inputs.shrunk(network, found)):
                    context.say(f"{split}: {expect}")
                labels = earlier.labels(next(again) if apart else found, given.batch_size) if earlier else {}
                yield from rows_of(split, network, found, stage, labels, context, given.batch_size)
                bad += len(found) - len(found.all)

        count = tables.write(out, parts())
        context.say(f"{count} rows in {out}" + (f", {bad} of them null: not decodable" if bad else ""))


class Earlier:
    """An earlier round's clusters, by the features of the backbone that they were made from.

    Args:
        folder: of the round.
        context: the run.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        self.clusters, self.context = clusters.Clustered(folder), context
        check_written(folder / "clusters.json")
        made = read_json(folder / "clusters.json", "read")
        read = made["read"]
        beside = [path for path in folder.parent.iterdir() if (path / "model.safetensors").exists()]
        source = next((path for path in beside if sha256_file(path / "model.safetensors") == read["backbone"]), None)
        if source is None or read["clusters.source"] != "backbone":
            raise Refused(f"--clusters: the backbone whose features {folder} clusters is not beside it.")
        network = B.load(source)
        self.network = on_device(network, context.accelerator.device, inputs.own_size(network))
        self.stage = B.resolve_stage(network, made.get("stage", read["clusters.stage"]), "clusters.stage")
        task = proxies.find(read["proxy.name"])
        proxy = recipe.Proxy(name=read["proxy.name"], options=task.Options(**(read["proxy.options"] or {})))
        self.views = clusters.views_called(read["views"], proxy)

    def labels(self, found: Images, batch_size: int) -> dict[str, dict[int, Any]]:
        """Labels and distances of images, at that backbone's own size, by name and the image's index."""
        seen = B.as_seen_by(self.network, found)
        rows, _ = clusters.averaged(self.network, seen, seen.all, self.stage, self.views, self.context, batch_size)
        told = self.clusters(rows)
        return {name: dict(zip(found.all.tolist(), values.tolist(), strict=True)) for name, values in told.items()}


def rows_of(
    split: str,
    network: nn.Module,
    found: Images,
    stage: Stage,
    labels: dict[str, dict[int, Any]],
    context: Context,
    batch_size: int,
) -> Iterator[pa.Table]:
    """split, index in it, path, features and any labels of every image; null where one could not be decoded."""
    stages = [] if stage == "pooled" else [stage]
    for start in range(0, len(found), ROWS):
        part = torch.arange(start, min(start + ROWS, len(found)))
        usable = part[found.usable[part]]
        rows: list[list[float] | None] = [None] * len(part)
        seen = usable if len(usable) else found.all[:1]  # whose features tell how many there are
        features = extract(network, found, seen, context.accelerator, batch_size, stages)[stage]
        for index, row in zip(usable.tolist(), features.numpy(), strict=False):
            rows[index - start] = row
        columns = {
            "split": pa.array([split] * len(part)),
            "index": pa.array(part.tolist(), pa.int64()),
            "path": found.paths[start : start + len(part)],
            "features": pa.array(rows, pa.list_(pa.float32(), features.shape[1])),
        }
        for name, values in labels.items():
            kind = pa.int32() if name.startswith("label") else pa.float32()
            columns[name] = pa.array(map(values.get, part.tolist()), kind)
        yield pa.table(columns)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
