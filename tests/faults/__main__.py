"""python -m tests.faults: the long form of these tests, hours of faults at random, and a page of what came of them.

Exit status 1 if a result was lost, or changed in silence, or a fault ended in anything but one sentence.
"""

import argparse
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.faults import bench
from training import report

MOST = {"bits": 3, "kills": 200, "launchers": 3, "requests": 5000, "images": 5000}  # launchers: kills of each


def page(told, arguments, seconds):
    """The figures as Markdown."""
    place = f"Python {platform.python_version()}, {platform.machine()}, {platform.system()}"
    lines = [
        "# Faults",
        "",
        "What kills, damaged files, mutated images and odd values do to runs of a tiny network, all at random, by",
        f"`{' '.join(['python -m tests.faults', *arguments])}` ({seconds / 60:.0f} min; {place}). A full disk at each",
        "writer is in the suite, `tests/faults/test_disks.py`.",
        "",
        "| what | came of it | times |",
        "|---|---|---:|",
    ]
    for what, outcomes in told.items():
        lines += [f"| {what} | {report.plain(outcome)} | {count:,} |" for outcome, count in outcomes.items()]
    whole = ", ".join(f"`--{name} {most}`" for name, most in MOST.items())
    lines += ["", f"A number that the command does not name is that of the whole form, which takes hours: {whole}."]
    return "\n".join(lines) + "\n"


def parts(asked):
    """What is done, each by itself: kind of fault, what is met by it, and how many."""
    for name in ("a finished run", "a half-finished run"):
        yield "bits", name, asked.bits
    for number, name in enumerate(bench.KILLED):
        yield "kills", name, (asked.kills + number) // len(bench.KILLED)
    for name in bench.LAUNCHERS:
        yield "launchers", name, asked.launchers
    yield "requests", "values of fields", asked.requests
    yield "images", "mutated images", asked.images


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    for name, most in {**MOST, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=most)
    parser.add_argument("--jobs", type=int, default=1, help="Parts that are done beside each other.")
    parser.add_argument("--page", type=Path, help="Markdown file to write.")
    asked = parser.parse_args(arguments)
    began, made, told = time.monotonic(), "", {}
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        wanted = [(kind, name, most) for kind, name, most in parts(asked) if most]
        works = [pool.submit(bench.do, *part, [asked.seed, number]) for number, part in enumerate(wanted)]
        for work in as_completed(works):
            told |= work.result()
            names = [name for work in works if work.done() for name in work.result()]
            made = page({name: told[name] for name in names}, arguments, time.monotonic() - began)
            print(made, flush=True)
            if asked.page:  # what is known so far
                asked.page.write_text(made, encoding="utf-8")
    return int("WRONG" in made)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
