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


def on_one_core():
    """Launched trainers take all cores that they may; tiny tensors gain nothing, and lose much where cores are busy."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]})


def launched(command, folder, **options):
    """Start a launcher in a process of its own; it, once its trainer has made four steps of the proxy."""
    process = subprocess.Popen(
        [*command, *TINY_RUN, *SLOW, "--run", folder],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=on_one_core,
        **options,
    )
    while steps(folder, "proxy") < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def test_a_trainer_whose_launcher_was_terminated_checkpoints_and_ends(picture_folder, tmp_path):
    folder = tmp_path / "run"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "-m", "training", "--data.path", picture_folder]
    launcher = launched(accelerate, folder)
    trainers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.terminate()
    launcher.wait(60)
    assert not psutil.wait_procs(trainers, timeout=60)[1]
    assert (folder / "checkpoints" / f"proxy_0_{steps(folder, 'proxy'):08d}").exists()


def test_a_slurm_job_that_is_signalled_keeps_a_checkpoint_and_is_queued_again(picture_folder, tmp_path):
    """What ``--signal=B:USR1`` does: USR1 to the batch script, and to nothing that it started."""
    folder, scontrol = tmp_path / "run", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    path = os.pathsep.join([str(scontrol.parent), os.path.dirname(sys.executable), os.environ["PATH"]])
    batch = ["bash", "hub_configs/slurm.sbatch", "--data.path", picture_folder]
    job = launched(batch, folder, env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"})
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=240)
    assert job.returncode == 1, said
    assert "stopped by SIGUSR1; the same command goes on from here" in said
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert (folder / "checkpoints" / f"proxy_0_{steps(folder, 'proxy'):08d}").exists()
