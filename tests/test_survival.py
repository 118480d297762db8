"""Killed at any moment, started again by the same command: the same weights, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, TINY_RUN, call
from training.__main__ import main
from training.files import read_lines

LAUNCHERS = {"python": (), "accelerate": ("-m", "accelerate.commands.launch")}
# A clustering and phases long enough to be met in the middle, at a size that allows bf16 where there are units for it.
SLOW = [
    "--proxy.epochs", "8", "--relearn.epochs", "8", "--clusters.restarts", "150", "--checkpoint_every", "3",
    "--data.size", "32",
]  # fmt: skip


def start(launcher, folder, data):
    return subprocess.Popen(
        [
            sys.executable,
            *LAUNCHERS[launcher],
            "-m",
            "training",
            *TINY_RUN,
            *SLOW,
            "--data.path",
            data,
            "--run",
            folder,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps(folder, phase):
    return max((row["step"] for row in read_lines(folder / "metrics.jsonl") if row["phase"] == phase), default=0)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def end(process, number=signal.SIGKILL):
    os.killpg(process.pid, number)
    return process.wait(60), process.stderr.read()


def finish(process):
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error


def results(folder):
    names = ("proxy/model.safetensors", "round_1/model.safetensors", "round_1/clusters.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_in_each_phase_the_run_ends_bit_for_bit_the_same(launcher, picture_folder, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finish(start(launcher, whole, picture_folder))

    process = start(launcher, torn, picture_folder)
    wait_for(lambda: steps(torn, "proxy") >= 10, process)
    end(process)
    assert not (torn / "proxy" / "proxy.json").exists()
    assert list((torn / "checkpoints").glob("proxy_0_*"))

    process = start(launcher, torn, picture_folder)
    wait_for((torn / "round_1").exists, process)
    end(process)
    assert not (torn / "round_1" / "clusters.json").exists()

    process = start(launcher, torn, picture_folder)
    wait_for(lambda: steps(torn, "relearn") >= 22, process)  # past settle
    end(process)
    assert not (torn / "round_1" / "relearn.json").exists()

    finish(start(launcher, torn, picture_folder))
    assert results(torn) == results(whole)
    kept = [[(r["phase"], r["step"], r["loss"]) for r in read_lines(f / "metrics.jsonl")] for f in (torn, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_answered_with_a_checkpoint_and_its_status(number, status, picture_folder, tmp_path):
    process = start("python", tmp_path / "run", picture_folder)
    wait_for(lambda: steps(tmp_path / "run", "proxy") >= 4, process)
    got, error = end(process, number)
    assert got == status
    assert "the same command goes on" in error.splitlines()[-1]
    last = steps(tmp_path / "run", "proxy")
    assert (tmp_path / "run" / "checkpoints" / f"proxy_0_{last:08d}").exists()


def test_a_trainer_whose_launcher_was_terminated_checkpoints_and_ends(picture_folder, tmp_path):
    process = start("accelerate", tmp_path / "run", picture_folder)
    wait_for(lambda: steps(tmp_path / "run", "proxy") >= 4, process)
    trainers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(60)
    assert not psutil.wait_procs(trainers, timeout=60)[1]
    last = steps(tmp_path / "run", "proxy")
    assert (tmp_path / "run" / "checkpoints" / f"proxy_0_{last:08d}").exists()


def test_a_run_folder_in_use_is_refused(picture_folder, tmp_path):
    process = start("python", tmp_path / "run", picture_folder)
    wait_for(lambda: steps(tmp_path / "run", "proxy") >= 1, process)
    os.killpg(process.pid, signal.SIGSTOP)  # it cannot end before the second has started, however slow that is
    second = start("python", tmp_path / "run", picture_folder)
    _, error = second.communicate(timeout=240)
    end(process)
    assert second.returncode == 2
    assert "in use by another process" in error


@pytest.mark.parametrize("content", [b"[]", b"\xff"])
@pytest.mark.parametrize(
    "name", ["data.json", "measured.json", "proxy/proxy.json", "round_1/clusters.json", "round_1/relearn.json"]
)
def test_a_small_file_that_is_damaged_is_named(finished, picture_folder, tmp_path, name, content):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / name).write_bytes(content)
    done = call(main, *TINY_RUN, "--data.path", picture_folder, "--run", run)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{run / name} is damaged" in done.stderr


@pytest.mark.parametrize("name", ["checkpoints", "hub", "report", "round_1"])
def test_a_file_where_a_folder_belongs_is_left_alone_and_named(picture_folder, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("mine")
    done = call(main, *TINY_RUN, "--data.path", picture_folder, "--run", run)
    assert (done.returncode, (run / name).read_text()) == (2, "mine")
    assert f"{run / name} is a file" in done.stderr
