"""Runs that can be killed at any moment, damage to files, and what came of both; imports are paid for once."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from training.files import read_lines

# A clustering and phases long enough to be met in the middle, at a size that allows bf16 where there are units for it.
SLOW = [
    "--proxy.epochs", "8", "--relearn.epochs", "8", "--clusters.restarts", "60", "--checkpoint_every", "3",
    "--data.size", "32",
]  # fmt: skip
PRELOAD = ["tests.faults.harness", "training.run", "training.compare", "training.finetune", "sklearn.linear_model"]
FORKS = multiprocessing.get_context("forkserver")  # of a process that has computed nothing, as autograd wants it
FORKS.set_forkserver_preload(PRELOAD)


def _work(module, arguments, said):
    import importlib

    from training.command import guarded

    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(guarded(importlib.import_module(module).main, arguments))


class Command:
    """``python -m MODULE ARGUMENTS`` in a process of its own, without the seconds that imports take.

    Attributes:
        said: file of what it prints.
    """

    def __init__(self, module, *arguments, said):
        self.said = Path(said)
        given = list(map(str, arguments))
        self.process = FORKS.Process(target=_work, args=(module, given, str(said)), daemon=True)
        self.process.start()

    def until(self, condition, seconds=120):
        """Wait for something while it works; whether it came before the end."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end
            time.sleep(0.005)
        return True

    def signal(self, number):
        """Send a signal, if it is not too late, and wait for the end; the exit status, negative for a signal's."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.end()

    def kill(self):
        return self.signal(signal.SIGKILL)

    def end(self, seconds=240):
        """Wait for the end; the exit status."""
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def text(self):
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    @property
    def sentence(self):
        """The last line, if nothing else was said of what went wrong."""
        found = re.split(r"[\r\n]+", self.text.strip())
        return found[-1] if "Traceback" not in self.text and found[-1].startswith("error: ") else None


def steps(folder, phase):
    """Steps that a run's log has of a phase."""
    return max((row["step"] for row in read_lines(folder / "metrics.jsonl") if row["phase"] == phase), default=0)


def results(folder):
    """What a run made that must never be another: weights, labels, figures, by name."""
    kept = (".safetensors", ".parquet")
    files = {path for path in folder.rglob("*") if path.suffix in kept and "checkpoints" not in path.parts}
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
    for path in sorted(folder.rglob("records.jsonl")):
        # Those that are measured again come last.
        told = [json.dumps({**row, "seconds": 0}, sort_keys=True) for row in read_lines(path)]
        found[str(path.relative_to(folder))] = sorted(told)
    return found


def flip(path, rng):
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def mutated(content, rng):
    """A file's bytes with some changed, cut off, repeated or put elsewhere."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        a, b = sorted(int(x) for x in rng.integers(0, len(content) + 1, 2))
        kind = int(rng.integers(6))
        if kind == 0 and content:
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        elif kind == 1:
            content[a:b] = rng.bytes(b - a)
        elif kind == 2:
            del content[a:b]
        elif kind == 3:
            content[a:a] = content[a : min(b, a + 500)]
        elif kind == 4 and len(content) > 4:  # a length or an offset
            place = int(rng.integers(len(content) - 4))
            content[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        else:
            content = content[:b]
    return bytes(content)
