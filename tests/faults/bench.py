"""Where faults are put into runs at random, and what came of each is counted."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from hypothesis import given, seed, settings

from tests.conftest import ROOT, TINY_RUN, write_pictures
from tests.faults import test_requests as requests
from tests.faults.harness import SLOW, Command, flip, results
from tests.faults.images import look, write_mutated

KILLS_OF_A_RUN = 10
# What is killed: a module and its command line.
KILLED = {
    "python -m training.compare": (
        "training.compare",
        [*TINY_RUN, *SLOW, "--arms", '["random","sslpp"]', "--seeds", "[0]", "--grid", "[1]"],
    ),
    "python -m training": ("training.__main__", [*TINY_RUN, *SLOW]),
    "python -m training.finetune": (
        "training.finetune",
        [
            "--epochs", "6", "--batch_size", "8", "--data.val_fraction", "0.2", "--log.every", "1",
            "--checkpoint_every", "3",
        ],
    ),
}  # fmt: skip
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29741", "-m", "--", "training"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29742",
        "-m", "training",
    ],
}  # fmt: skip


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

    def kills(self, name, most):
        """SIGKILL at random moments of a command, which is started again until it ends."""
        module, line = KILLED[name]
        if module == "training.finetune":
            assert self.tiny(self.folder / "model").end() == 0
            line = [self.folder / "model" / "hub", *line]
        began, whole = time.monotonic(), self.folder / "whole"
        assert self.start(module, whole, *line).end() == 0, name
        seconds, wanted, done = time.monotonic() - began, results(whole), 0
        while done < most:
            torn = self.folder / "torn"
            shutil.rmtree(torn, ignore_errors=True)
            for _ in range(min(KILLS_OF_A_RUN, most - done)):
                command = self.start(module, torn, *line)
                moment = time.monotonic() + self.rng.uniform(0.02, seconds)
                if not command.until(lambda moment=moment: time.monotonic() > moment):
                    break
                if command.kill() != -signal.SIGKILL:
                    break
                done += 1
                self.count(f"kills, {name}", "killed")
            status = self.start(module, torn, *line).end()
            same = status == 0 and results(torn) == wanted
            self.count(f"kills, {name}", "run to its end, the same bit for bit" if same else "WRONG: another end")

    def launchers(self, name, most):
        """SIGKILL of a launcher of two processes, or of one of these, at random moments, until the end of a run."""
        line = [*LAUNCHERS[name], *TINY_RUN, *SLOW, "--data.path", str(self.data), "--run"]

        def start(run):
            with open(self.folder / "said", "w") as said:
                return subprocess.Popen([sys.executable, "-m", *line, str(run)], cwd=ROOT, stdout=said, stderr=said)

        began, whole, torn = time.monotonic(), self.folder / "whole", self.folder / "torn"
        assert start(whole).wait() == 0, (self.folder / "said").read_text()[-500:]
        seconds, done = time.monotonic() - began, 0
        while done < most:
            launcher = start(torn)
            moment = time.monotonic() + self.rng.uniform(0.2, 0.9) * seconds
            while time.monotonic() < moment and launcher.poll() is None:
                time.sleep(0.02)
            try:
                family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
                family[int(self.rng.integers(len(family)))].kill()
            except psutil.NoSuchProcess:  # too late
                launcher.wait()
                shutil.rmtree(torn, ignore_errors=True)
                continue
            launcher.wait()
            # What is left behind notices, or waits in vain for the one that is gone, as a scheduler would not let it.
            for process in psutil.wait_procs(family, timeout=20)[1]:
                process.kill()
            psutil.wait_procs(family)
            done += 1
            self.count(f"kills, {name}", "killed")
        same = start(torn).wait() == 0 and results(torn) == results(whole)
        self.count(f"kills, {name}", "run to its end, the same bit for bit" if same else "WRONG: another end")

    def bits(self, name, each):
        """Bits turned in every file of a finished or of a half-finished run, which is then started again."""
        finished, half = self.folder / "finished", self.folder / "half"
        assert self.tiny(finished, "--data.memory_gb", "0").end() == 0
        shutil.copytree(finished, half)
        shutil.rmtree(half / "hub")
        shutil.rmtree(half / "report")
        (half / "round_1" / "relearn.json").unlink()
        (half / "report.md").unlink()
        rows = (half / "records.jsonl").read_text().splitlines(True)
        (half / "records.jsonl").write_text("".join(row for row in rows if '"sslpp"' not in row))
        whole = {"a finished run": finished, "a half-finished run": half}[name]
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

    def images(self, name, most):
        """Mutated images, read twice."""
        for start in range(0, most, 1000):
            folder = self.folder / "images"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            count = min(1000, most - start)
            write_mutated(folder, count, self.rng)
            found = look(folder)
            whole = found["read"] + found["bad"] == count and look(folder) == found
            self.told.setdefault(name, Counter()).update(
                {"read": found["read"], "listed as bad": found["bad"]} if whole else {"WRONG: read otherwise": 1}
            )

    def requests(self, name, most):
        """Values of fields, as tests/faults/test_requests.py has them, but not always the same."""

        @seed(int(self.rng.integers(2**31)))
        @settings(max_examples=most, **requests.ALWAYS)
        @given(*requests.REQUESTS)
        def ask(chosen, value, in_file):
            try:
                requests.check(chosen, value, in_file)
                outcome = "taken, or refused in one sentence that names the field"
            except Exception as error:
                outcome = f"WRONG: {chosen[1]}={value!r}: {error}"
            self.count(name, outcome)

        ask()


def do(kind, name, most, number):
    """Do a part; what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), np.random.default_rng(number))
        try:
            getattr(bench, kind)(name, most)
        except Exception as error:  # the other parts go on
            bench.count(name, f"WRONG: broken off: {error!r}")
    return bench.told
