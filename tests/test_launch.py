"""Signals, seeds, precision and processes."""

import os
import random
import signal

import numpy as np
import pytest
import timm
import torch

from training import launch, proxies, setup
from training.files import Refused
from training.operations import suited
from training.recipe import Data, Recipe


def test_a_signal_outside_the_loop_ends_the_run_at_once():
    with launch.StopSignals(), pytest.raises(launch.Interrupted) as error:
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.number == signal.SIGTERM


def test_a_signal_in_the_loop_waits_to_be_asked_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with launch.StopSignals() as stop:
        stop.deferred = True
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_what_schedulers_and_terminals_send_asks_to_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # who runs the tests may ignore SIGHUP
    try:
        with launch.StopSignals() as stop:
            stop.deferred = True
            os.kill(os.getpid(), number)
            assert stop.requested()
            assert stop.number == number
    finally:
        signal.signal(number, before)


def test_a_hang_up_that_was_ignored_before_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_orphan_of_a_launcher_is_asked_to_stop(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stop, parent = launch.StopSignals(), os.getppid()
    assert not stop.requested()
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert stop.requested()
    assert stop.number == signal.SIGTERM


def test_without_a_launcher_a_lost_parent_means_nothing(monkeypatch):
    for name in launch.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    stop, parent = launch.StopSignals(), os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert not stop.requested()


def test_seeds_reach_every_global_stream():
    def drawn(seed):
        launch.seed_all(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert drawn(3) == drawn(3)
    assert all(a != b for a, b in zip(drawn(3), drawn(2**62), strict=True))
    assert all(a != b for a, b in zip(drawn(3), drawn(5), strict=True))


@pytest.mark.parametrize(("units", "size", "expected"), [(True, 32, "bf16"), (False, 32, "fp32"), (True, 16, "fp32")])
def test_precision_is_what_the_cpu_has_units_for_and_does_right(monkeypatch, units, size, expected):
    fits = suited(timm.create_model("test_resnet"), size)[1]  # its stride is 32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert launch.resolve_precision("auto", fits) == expected
    assert launch.resolve_precision("bf16", fits) == "bf16"


def test_what_the_launcher_was_told_is_done_or_contradicted_aloud(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert launch.resolve_precision("auto", False) == "bf16"
    assert launch.resolve_precision("fp32", True) == "fp32"
    weight = torch.ones(1, requires_grad=True)
    launch.start("bf16", None, str(tmp_path)).backward(weight.sum())
    assert weight.grad == 1  # not divided
    said = capsys.readouterr().out
    assert "gradient_accumulation_steps is not used" in said
    assert "bf16" not in said
    launch.start("fp32", None, str(tmp_path))
    assert "warning: fp32 is used, not bf16 as the launcher was told" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    plain = torch.nn.Linear(1, 1)
    assert launch.start("fp32", None, str(tmp_path)).prepare(plain) is plain
    assert capsys.readouterr().out == (
        "warning: nothing is compiled, though the launcher's dynamo_backend asks for it.\n"
    )
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launch.resolve_precision("auto", False) == launch.resolve_precision("fp32", False) == "fp32"
    launch.start("fp32", None, str(tmp_path))
    assert capsys.readouterr().out == ""


def test_precision_is_right_for_what_a_task_makes_of_an_image(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    network = timm.create_model("test_resnet")  # tiles of 25 px are smaller than its stride

    def found(task, other=None):
        own = {"path": "digits", "size": 64}
        made = Recipe(run="none", data=Data(**own), proxy=proxies.settings(task, options=None))
        return setup.run_precision(made, network, other and proxies.settings(other))

    assert (found("rotation"), found("jigsaw"), found("rotation", "jigsaw")) == ("bf16", "fp32", "fp32")


def test_processes_that_cannot_find_each_other_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "Accelerator", lambda **kwargs: type("Alone", (), {"num_processes": 1})())
    with pytest.raises(Refused, match="2 processes were launched"):
        launch.start("fp32", None, str(tmp_path))


@pytest.mark.parametrize("name", launch.SPREAD)
def test_a_network_that_would_be_shared_out_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv(launch.SPREAD[name], "true")
    with pytest.raises(Refused, match=f"the launcher was told to use {name}"):
        launch.start("fp32", None, str(tmp_path))


def test_fp16_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="precision: fp16"):
        launch.start("fp16", None, str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, False),  # the launcher's one
        ({"OMP_NUM_THREADS": "1"}, True),  # the user's
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({}, False),
    ],
)
def test_every_core_is_used_unless_the_user_says_otherwise(monkeypatch, tmp_path, environment, kept):
    for name in (*launch.LAUNCHERS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    launch.start("fp32", None, str(tmp_path))
    assert said == ([] if kept else [len(os.sched_getaffinity(0))])
