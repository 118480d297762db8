"""python -m training.proxies --config RECIPE --data.path DATA: proxy tasks side by side, and what SSL++ adds.

For every task a comparison in runs/NAME/TASK, with RECIPE's settings and those of TASK.yaml beside it, if there is one.
What exists is not done again, so that tasks, arms and seeds can be added later.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from .. import agreement, charts, compare, contrast, launch, records, report
from ..command import Parser, guarded
from ..files import Refused, refuse_kind, write_lines, write_text
from . import PROXIES, find

ABOUT = "Compare proxy tasks: is each learned, are its features better than random ones, what does SSL++ add?"
ARMS = ["random", "proxy_short", "proxy", "sslpp"]


def command(arguments: Sequence[str]) -> Parser:
    made = compare.command(arguments, "python -m training.proxies", ABOUT)
    made.add_argument("--tasks", type=list[str], default=list(PROXIES), help="Tasks to compare.")
    made.set_defaults(arms=ARMS, grid=[1.0])
    return made


def with_own(arguments: Sequence[str], task: str) -> list[str]:
    """A command line for a task: the recipe's settings, then those of the task's file beside it."""
    result = []
    for argument in arguments:
        option, mark, value = argument.partition("=")
        result += [option, value] if option == "--config" and mark else [argument]
    for place in [i for i, argument in enumerate(result) if argument == "--config"][-1:]:
        own = Path(*result[place + 1 : place + 2]).with_name(f"{task}.yaml")
        if own.exists():
            result[place + 2 : place + 2] = ["--config", str(own)]
    return [*result, "--proxy.name", task]


def main(arguments: Sequence[str]) -> None:
    made = command(arguments)
    values = made.read(arguments)
    tasks = values.pop("tasks")
    if not tasks:
        raise Refused("--tasks needs at least one value.")
    for task in tasks:
        find(task, "--tasks")
    folder = Path(compare.request(values, made)["recipe"].run)
    refuse_kind(folder, "proxy tasks side by side")
    requests = []
    for task in tasks:
        own = with_own(arguments, task)
        made = command(own)
        values = made.read([*own, f"--run={folder}/{task}"])
        del values["tasks"]
        requests.append(compare.request(values, made))
    with launch.StopSignals() as stop:
        for asked in requests:
            compare.compare(**asked, stop=stop)
    if PartialState().is_main_process:
        write(folder)


def write(folder: Path) -> None:
    """Write records.jsonl and report.md with its figure of all tasks that were compared in a folder."""
    found = {name: records.read(folder / name / "records.jsonl") for name in PROXIES}
    rows = [row for own in found.values() for row in own]
    write_lines(folder / "records.jsonl", rows)
    charts.tasks(folder / "report" / "tasks.png", rows)
    agreeing = (agreement.agreement(rows, probe) for probe in agreement.PROBES)
    tables = [*contrast.tasks(rows), *(lines for lines in agreeing if len(lines) > 1)]  # without labels none
    print("\n\n".join(map(report.as_text, tables)))
    parts = [f"# {report.plain(folder.name)}", *map(report.as_markdown, tables), "![Proxy tasks](report/tasks.png)"]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
