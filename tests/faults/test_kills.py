"""Killed at any moment, started again by the same command: the same results, bit for bit; and signals are answered."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, TINY_RUN, call
from tests.faults.harness import SLOW, Command, results, steps
from training.__main__ import main
from training.files import read_lines


@pytest.fixture
def run(picture_folder, tmp_path):
    """Starts the slow tiny run in a folder."""

    def start(folder):
        given = [*TINY_RUN, *SLOW, "--data.path", picture_folder, "--run", folder]
        return Command("training.__main__", *given, said=tmp_path / "said")

    return start


def test_killed_five_times_the_run_ends_bit_for_bit_the_same(run, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert run(whole).end() == 0
    moments = {
        "proxy/proxy.json": lambda: steps(torn, "proxy") >= 10,
        "round_1/clusters.json": (torn / "round_1").exists,
        "round_1/relearn.json": lambda: steps(torn, "relearn") >= 22,  # past settle
        "round_1/clusters.png": (torn / "round_1" / "relearn.json").exists,
        "hub": (torn / "report" / "stages.png").exists,
    }
    for not_yet, moment in moments.items():
        command = run(torn)
        assert command.until(moment), command.text
        assert command.kill() == -signal.SIGKILL
        assert not (torn / not_yet).exists()
    command = run(torn)
    assert command.end() == 0, command.text
    assert results(torn) == results(whole)
    kept = [[(r["phase"], r["step"], r["loss"]) for r in read_lines(f / "metrics.jsonl")] for f in (torn, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_a_signal_is_answered_with_a_checkpoint_and_its_status(number, status, run, tmp_path):
    command = run(tmp_path / "run")
    assert command.until(lambda: steps(tmp_path / "run", "proxy") >= 4)
    assert command.signal(number) == status
    assert "the same command goes on" in command.text.splitlines()[-1]
    last = steps(tmp_path / "run", "proxy")
    assert (tmp_path / "run" / "checkpoints" / f"proxy_0_{last:08d}").exists()


def test_a_run_folder_in_use_is_refused(run, picture_folder, tmp_path):
    command = run(tmp_path / "run")
    assert command.until(lambda: steps(tmp_path / "run", "proxy") >= 1)
    os.kill(command.process.pid, signal.SIGSTOP)  # it cannot end before the second has started, however slow that is
    second = call(main, *TINY_RUN, *SLOW, "--data.path", picture_folder, "--run", tmp_path / "run")
    command.kill()
    assert (second.returncode, "in use by another process" in second.stderr) == (2, True)


def test_a_trainer_whose_launcher_was_terminated_checkpoints_and_ends(picture_folder, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "training", *TINY_RUN, *SLOW]
    command += ["--data.path", picture_folder, "--run", folder]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while steps(folder, "proxy") < 4:
        assert launcher.poll() is None
        time.sleep(0.01)
    trainers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.terminate()
    launcher.wait(60)
    assert not psutil.wait_procs(trainers, timeout=60)[1]
    assert (folder / "checkpoints" / f"proxy_0_{steps(folder, 'proxy'):08d}").exists()
