"""python -m training.benchmark [PART ...]: ours and a peer, one after the other, and what of the goals is reached.

A ratio is the peer's CPU seconds over ours (on a GPU, seconds), the median over rounds with its quartiles; goals are in
hub_configs/goals.yaml. The peers are in the extra `benchmark`.

step      the loop, with its views, over a bare step on ready ones; a run's precision and memory format over the best.
input     batches gathered from pixels over torch's DataLoader.
views     over lightly's, torchvision's and kornia's.
kmeans    over faiss: equal rows, and as many iterations as reach faiss's inertia.
evaluate  nearest neighbours over faiss, the linear probe over scikit-learn.
growth    twice the rows or clusters over once.
train     an epoch of SimCLR, of commands, over LightlyTrain's, if that is on the PATH (it wants a venv of its own).
start     what --help imports over --help; imports and five seconds over a run's first step, on 10,000 images.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import yaml

from .. import records, report
from ..command import Parser, guarded
from ..files import Failed, Refused
from . import TINY, Row, Size, parts, table

GOALS = parts.ROOT / "hub_configs" / "goals.yaml"
GPU = "python -m training.benchmark step views kmeans"  # what has rows for a GPU

PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "step": parts.step,
    "input": parts.gathering,
    "views": parts.random_views,
    "kmeans": parts.clusters,
    "evaluate": parts.protocols,
    "growth": parts.growth,
    "train": parts.commands,
    "start": parts.start,
}
PEERS = {"views": ("kornia", "lightly", "torchvision"), "kmeans": ("faiss",), "evaluate": ("faiss",)}


def command() -> Parser:
    made = Parser(
        prog="python -m training.benchmark",
        description="Ours and a peer, one after the other, and what of the goals is reached.",
        usage="%(prog)s [PART ...] [--OPTION VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("parts", nargs="*", help=f"What is measured, of {', '.join(PARTS)}; all without any.")
    made.add_argument("--size", type=Literal["whole", "tiny"], default="whole", help="Tiny only shows that it runs.")
    made.add_argument("--goals", help="YAML file of the least ratio by a row's name; by default the package's.")
    made.add_argument("--out", help="File of records to add the rows to.")
    return made


def main(arguments: Sequence[str]) -> None:
    given = command().read(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        raise Refused(f"there is no part {wrong[0]!r}; there are {', '.join(PARTS)}.")
    for part in given.parts or PARTS:
        if gone := [peer for peer in PEERS.get(part, ()) if find_spec(peer) is None]:
            raise Refused(f"{part} is measured against {gone[0]}: pip install -e '.[benchmark]'")
    if given.out:
        records.check_out(Path(given.out))
    try:
        goals = yaml.safe_load(Path(given.goals or GOALS).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        goals = error
    if not isinstance(goals, dict):
        raise Refused(f"--goals: {given.goals} is no YAML file of ratios by name.")
    size = TINY if given.size == "tiny" else Size()
    device, found = records.device_name("cuda" if torch.cuda.is_available() else "cpu"), []
    for part in given.parts or PARTS:
        for made in PARTS[part](size):
            found.append({**made, "goal": goals.get(made["name"])})
            print(f"{made['name']}: {made['ratio']:.2f}", file=sys.stderr)
    lines = table(found)
    if not torch.cuda.is_available():
        lines.append(["on a GPU", "not measured", GPU, *[""] * 6])
    print(f"{device}; threads {torch.get_num_threads()}\n\n" + report.as_text(lines))
    if given.out:
        shared = {"arm": "benchmark", "protocol": "benchmark", "device": device, "versions": records.versions()}
        told = [{**shared, "metric": r["name"], "value": r["ratio"], "settings": r} for r in found]
        records.write(Path(given.out), told)
    if short := [r for r in found if r["goal"] and r["ratio"] < r["goal"]]:
        raise Failed("; ".join(f"{r['name']}: {r['ratio']:.2f}, the goal is {r['goal']}" for r in short))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
