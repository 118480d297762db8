"""python -m tests.faults: the long form of these tests, hours of faults at random, and a page of what came of them.

Exit status 1 if a result was lost, or changed in silence, or a fault ended in anything but one sentence.
"""

import argparse
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, seed, settings

from tests.conftest import TINY_RUN, write_pictures
from tests.faults import test_requests as requests
from tests.faults.harness import SLOW, Command, flip, results
from tests.faults.images import look, write_mutated
from training import report

KILLS_OF_A_RUN = 10
COMPARE = ["--arms", '["random","sslpp"]', "--seeds", "[0]", "--grid", "[1]"]


class Bench:
    """Where faults are put into runs.

    Args:
        folder: scratch.
        rng: what is drawn.
    """

    def __init__(self, folder, rng):
        self.folder, self.rng, self.told = folder, rng, {}
        self.data = write_pictures(folder / "data")

    def start(self, module, run, *more):
        return Command(module, *more, "--data.path", self.data, "--run", run, said=self.folder / "said")

    def tiny(self, run, *more):
        return self.start("training.__main__", run, *TINY_RUN, *more)

    def count(self, name, outcome):
        self.told.setdefault(name, Counter())[outcome] += 1
        if outcome.startswith("WRONG"):
            print(f"{name}: {outcome}", flush=True)

    def commands(self):
        """The command lines that are killed, by name."""
        whole = self.folder / "model"
        assert self.tiny(whole).end() == 0
        yield "python -m training", "training.__main__", [*TINY_RUN, *SLOW]
        tuned = [whole / "hub", "--epochs", "6", "--batch_size", "8", "--data.val_fraction", "0.2", "--log.every", "1"]
        yield "python -m training.finetune", "training.finetune", [*tuned, "--checkpoint_every", "3"]
        yield "python -m training.compare", "training.compare", [*TINY_RUN, *SLOW, *COMPARE]

    def kills(self, most):
        """SIGKILL at random moments of three commands, which are started again until they end."""
        for name, module, line in self.commands() if most else ():
            began, whole = time.monotonic(), self.folder / "whole"
            assert self.start(module, whole, *line).end() == 0, name
            seconds, wanted, done = time.monotonic() - began, results(whole), 0
            while done < most / 3:
                torn = self.folder / "torn"
                shutil.rmtree(torn, ignore_errors=True)
                for _ in range(KILLS_OF_A_RUN):
                    command = self.start(module, torn, *line)
                    moment = time.monotonic() + self.rng.uniform(0.02, seconds)
                    if not command.until(lambda moment=moment: time.monotonic() > moment):
                        break
                    command.kill()
                    done += 1
                    self.count(f"kills, {name}", "killed")
                status = self.start(module, torn, *line).end()
                same = status == 0 and results(torn) == wanted
                self.count(f"kills, {name}", "run to its end, the same bit for bit" if same else "WRONG: another end")
            shutil.rmtree(whole)

    def bits(self, each):
        """Bits turned in every file of a finished and of a half-finished run, which is then started again."""
        finished, half = self.folder / "finished", self.folder / "half"
        if each:
            assert self.tiny(finished, "--data.memory_gb", "0").end() == 0
            shutil.copytree(finished, half)
            shutil.rmtree(half / "hub")
            shutil.rmtree(half / "report")
            (half / "round_1" / "relearn.json").unlink()
            (half / "report.md").unlink()
            rows = (half / "records.jsonl").read_text().splitlines(True)
            (half / "records.jsonl").write_text("".join(row for row in rows if '"sslpp"' not in row))
        for name, whole in (("a finished run", finished), ("a half-finished run", half)) if each else ():
            for path in sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size):
                for _ in range(each):
                    self.count(f"bits turned in {name}", self.turned(whole, path.relative_to(whole), results(finished)))

    def turned(self, whole, name, wanted):
        """What came of a run with a bit of one file turned."""
        run = self.folder / "turned"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        flip(run / name, self.rng)
        command = self.tiny(run, "--data.memory_gb", "0")
        status = command.end()
        if status == 0:
            return "the same end" if results(run) == wanted else f"WRONG: {name}: another end"
        told = status in (1, 2) and command.sentence and str(run) in command.sentence
        return "told in one sentence that names the file" if told else f"WRONG: {name}: {command.text[-300:]}"

    def images(self, most):
        """Mutated images, read twice."""
        for start in range(0, most, 1000):
            folder = self.folder / "images"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            count = min(1000, most - start)
            write_mutated(folder, count, self.rng)
            found = look(folder)
            whole = found["read"] + found["bad"] == count and look(folder) == found
            self.told.setdefault("mutated images", Counter()).update(
                {"read": found["read"], "listed as bad": found["bad"]} if whole else {"WRONG: read otherwise": 1}
            )

    def requests(self, most):
        """Values of fields, as tests/faults/test_requests.py has them, but not always the same."""

        @seed(int(self.rng.integers(2**31)))
        @settings(max_examples=max(1, most), **requests.ALWAYS)
        @given(*requests.REQUESTS)
        def ask(chosen, value, in_file):
            try:
                requests.check(chosen, value, in_file)
                outcome = "taken, or refused in one sentence that names the field"
            except Exception as error:
                outcome = f"WRONG: {chosen[1]}={value!r}: {error}"
            self.count("values of fields", outcome)

        if most:
            ask()


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
    return "\n".join(lines) + "\n"


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    for name, most in (("kills", 200), ("bits", 3), ("images", 5000), ("requests", 5000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=most)
    parser.add_argument("--page", type=Path, help="Markdown file to write.")
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), np.random.default_rng(asked.seed))
        for name in ("images", "requests", "kills", "bits"):
            getattr(bench, name)(getattr(asked, name))
            made = page(bench.told, arguments, time.monotonic() - began)
            print(made, flush=True)
            if asked.page:  # what is known so far
                asked.page.write_text(made, encoding="utf-8")
    return int("WRONG" in made)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
