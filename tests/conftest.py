"""Tiny images, networks and runs that the tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from more, and cores may be busy
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

import contextlib
import gc
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from PIL import Image

from tests.hub_server import Hub
from training import __main__ as training
from training import backbone as B
from training import launch
from training.command import guarded
from training.images import Images
from training.loop import Context
from training.pixels import Pixels
from training.recipe import Model

ROOT = Path(__file__).parent.parent
gc.freeze()  # what is imported stays: the loop collects garbage at its end, and need not go through it


def make_images(count=40, side=20, size=16, classes=4, labelled=True, seed=0):
    """Images whose class is a colour and a direction of stripes, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    place = torch.arange(side)
    stripes = torch.stack([(place.view(-1, 1) // 3 % 2).expand(side, side), (place // 3 % 2).expand(side, side)])
    base = stripes[labels % 2].unsqueeze(1) * torch.tensor([1.0, 0.6, 0.3])[(labels // 2 % 3)].view(-1, 1, 1, 1)
    noise = torch.rand(count, 3, side, side, generator=generator)
    pixels = (255 * (0.7 * base + 0.3 * noise)).to(torch.uint8)
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[:: max(2, count // 8)] = True
    return Images(
        pixels=Pixels.of(pixels),
        labels=labels if labelled else None,
        label_names=[f"class {i}" for i in range(classes)] if labelled else None,
        paths=[f"{i}.png" for i in range(count)],
        held_out=held_out,
        fingerprint="0" * 64,
        mean=(0.5, 0.4, 0.3),
        std=(0.3, 0.3, 0.2),
        crop_pct=size / side,
        size=size,
    )


@pytest.fixture(autouse=True)
def forget_accelerator():
    """Accelerate has one state in a process, precision included, and torch a number of threads: not the next test's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny():
    return make_images()


@pytest.fixture
def context(tmp_path):
    return Context(launch.start("fp32", None, str(tmp_path)), tmp_path, launch.StopSignals(), 1, 1000)


def write_pictures(folder):
    """A folder of class folders: 48 training and 16 test pictures of 20 px."""
    for split, count, seed in (("train", 48, 0), ("test", 16, 1)):
        images = make_images(count, seed=seed)
        for i in range(count):
            path = folder / split / images.label_names[images.labels[i]] / f"{i:03d}.png"
            write_png(path, images.pixels.picture(i).permute(1, 2, 0))
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


TUNING = ["--epochs", "3", "--batch_size", "8", "--lr", "0.01", "--data.val_fraction", "0.2", "--log.every", "1"]
TINY_RUN = [
    "--model.name", "test_resnet",
    "--data.size", "16",
    "--data.val_fraction", "0.2",
    "--proxy.epochs", "2",
    "--proxy.batch_size", "8",
    "--proxy.lr", "0.02",
    "--clusters.k", "[3,5]",
    "--clusters.whiten", "8",
    "--relearn.epochs", "2",
    "--relearn.batch_size", "8",
    "--relearn.lr", "0.02",
    "--relearn.mlp_dim", "16",
    "--relearn.settle", "0.5",
    "--relearn.export", "always",
    "--evaluate.linear_c", "[0.1]",
    "--evaluate.knn_k", "[3]",
    "--evaluate.shots", "[2]",
    "--log.every", "1",
]  # fmt: skip


def command(module, *arguments, launcher=(), cwd=ROOT, env=None, **kwargs):
    """Run ``python -m module`` as a user would; its stdout, stderr and exit status."""
    start = [sys.executable, "-m", *launcher] if launcher else [sys.executable]
    # torchrun takes --run for an abbreviation of an option of its own, unless -- ends them.
    separator = ["--"] if "torch.distributed.run" in launcher else []
    return subprocess.run(
        [*start, "-m", *separator, module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def call(main, *arguments):
    """Run a command in this process, which saves its imports; its stdout, stderr and exit status."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = guarded(main, [str(argument) for argument in arguments])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def tiny_run(folder, data, *more):
    """A tiny run in this process."""
    return call(training.main, *TINY_RUN, "--data.path", data, "--run", folder, *more)


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A backbone's folder, for 16 px; change a copy."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    B.save(B.create(Model("test_resnet"), 16), folder, make_images(), license="apache-2.0")
    return folder


@pytest.fixture(scope="session")
def finished(picture_folder, tmp_path_factory):
    """A tiny run, made as a user would, and what the command said; look at it, but change a copy."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = command("training", *TINY_RUN, "--data.path", picture_folder, "--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub over loopback that this process's clients talk to, as alice, who may write; without Xet."""
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(
        _http, "time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None), "time": __import__("time").time})
    )
    monkeypatch.setenv("HF_TOKEN", "write-alice")
    yield server
    server.close()
