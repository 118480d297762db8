"""What stays in memory, what goes to a file, and what is refused because it cannot fit."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import make_images, tiny_run
from training import backbone as B
from training import clusters, extraction, images, memory, peaks, proxies
from training.files import Failed, Refused
from training.launch import Key
from training.loop import train
from training.recipe import Clusters, Data, Model, Proxy, Recipe, Relearn
from training.task import BackboneTask


def test_the_bound_is_one_for_all_that_is_kept(tmp_path):
    for split, count in (("train", 6), ("test", 6)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "data" / split / f"{i}.png")
    each = 6 * 3 * 16 * 16
    kept = {}
    for room in (2 * each, 1.5 * each, 0.5 * each):
        data = Data(path=str(tmp_path / "data"), size=16, memory_gb=room / 1e9)
        splits = images.load_splits(data, tmp_path / f"run_{room}")
        kept[room / each] = [split.pixels.resident for split in splits]
        assert all(len(split.pixels.picture(0)) == 3 for split in splits)
    assert kept == {2.0: [each, each], 1.5: [each, 0], 0.5: [0, 0]}
    assert memory.bound(1.0, 10**9) == 0
    assert memory.bound(None) == pytest.approx(memory.free_memory() / 2, rel=0.2)


def test_features_in_a_file_make_the_same_labels(context, monkeypatch):
    shown, network = make_images(count=200), B.create(Model("test_resnet"), 16).eval()
    in_file, real = [], np.memmap
    monkeypatch.setattr(memory.np, "memmap", lambda *args, **kwargs: in_file.append(args) or real(*args, **kwargs))
    settings, found = Clusters(k=[5], whiten=8, stage=-1), {}
    for room in (1e9, 0.0):
        in_file.clear()
        folder = context.folder / f"round_{room:g}"
        folder.mkdir()
        clusters.cluster(network, shown, settings, clusters.FAMILIAR, Key(0, "c"), context, 64, folder, room)
        assert len(in_file) == (2 if room == 0.0 else 0)  # of training and of held-out images
        found[room] = clusters.read_labels(folder / "labels.parquet")[0]
    assert torch.equal(found[1e9], found[0.0])
    assert sorted(path.name for path in context.folder.iterdir()) == ["round_0", "round_1e+09"]  # nothing is left


def test_what_memory_has_no_room_for_lies_in_the_folder_that_is_named(tmp_path, monkeypatch):
    named, real = [], memory.tempfile.TemporaryFile
    monkeypatch.setattr(memory.tempfile, "TemporaryFile", lambda **told: named.append(told["dir"]) or real(**told))
    assert memory.table(4, 2, tmp_path, 32.0).sum() == 0
    assert named == []
    assert memory.table(4, 2, tmp_path, 31.0).shape == (4, 2)
    assert named == [tmp_path]


def test_a_file_that_the_disk_cannot_hold_is_one_sentence(tmp_path):
    with pytest.raises(Failed, match="cannot be written"):
        memory.table(2**40, 2**10, tmp_path, 0.0)


@pytest.fixture
def made(context):
    """What `peaks.check` is given of a recipe that a few changes are made to."""
    settings = Recipe(
        model=Model("test_resnet"),
        data=Data(size=16),
        proxy=Proxy(epochs=1, batch_size=16),
        clusters=Clusters(k=[3], whiten=8),
        relearn=Relearn(batch_size=16, mlp_dim=8),
        precision="fp32",
    )
    splits = make_images(count=4000), make_images(count=40)
    return settings, splits, B.create(Model("test_resnet"), 16), context.accelerator


@pytest.mark.parametrize(
    ("phase", "change"),
    [
        ("proxy", {"proxy": {"batch_size": 1024}}),
        ("relearn", {"relearn": {"batch_size": 1024}}),
        ("evaluate", {"evaluate": {"images": 3000, "batch_size": 8}}),
        ("features", {"evaluate": {"batch_size": 8192}}),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(phase, change, made, monkeypatch):
    settings, *rest = made
    monkeypatch.setattr(peaks, "BLOCKS", 0)
    monkeypatch.setattr(extraction, "CACHED", 2**40)  # as on a GPU
    for part, fields in change.items():
        setattr(settings, part, dataclasses.replace(getattr(settings, part), **fields))
    need = {peak.phase.split(":")[0]: peak.size for peak in peaks.peaks(settings, *rest)}
    assert max(need, key=need.get) == phase
    monkeypatch.setattr(peaks, "free_memory", lambda: max(v for name, v in need.items() if name != phase) * 1.05)
    with pytest.raises(Refused) as told:
        peaks.check(settings, *rest)
    assert str(told.value).startswith(phase)
    field, value = re.search(r"(\w+\.\w+) (\d+) would fit", str(told.value)).groups()
    part, name = field.split(".")
    setattr(settings, part, dataclasses.replace(getattr(settings, part), **{name: int(value)}))
    assert "about" in peaks.check(settings, *rest)


def test_where_no_value_of_a_field_would_fit_something_else_is_advised(made):
    told = {peak.phase.split(":")[0]: peak.advice(0.0) for peak in peaks.peaks(*made)}
    smaller = "a smaller data.size or network needs less"
    assert told == {
        "proxy": smaller, "relearn": smaller, "features": smaller,
        "clusters": "clusters.whiten 1 would fit", "evaluate": "evaluate.test false needs less",
    }  # fmt: skip


def test_heads_second_networks_and_averages_are_counted(made):
    settings, _, network, _ = made
    weights = sum(p.nbytes for p in network.parameters())
    buffers = sum(b.nbytes for b in network.buffers())
    assert peaks.held(network, settings.proxy) == 3 * weights + buffers  # weights, gradients, momentum
    before = {peak.phase: peak.size for peak in peaks.peaks(*made)}
    settings.relearn.ema, settings.clusters.k = 0.9, [1000]
    settings.proxy = proxies.settings("barlow_twins", epochs=1, batch_size=16, mlp_layers=2, mlp_dim=512)
    after = {peak.phase: peak.size for peak in peaks.peaks(*made)}
    width = network.num_features
    head = 4 * 1000 * settings.relearn.mlp_dim
    assert after["relearn: a step of 16 images"] - before["relearn: a step of 16 images"] > 2.9 * head + weights
    mlp = 4 * (width * 512 + 512 * 512 + 512 * 8192)
    assert after["proxy: a step of 16 images"] - before["proxy: a step of 16 images"] > 3 * mlp


def test_what_autograd_keeps_is_counted_for_a_view_alone():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
    # The convolution keeps its input, ReLU its output.
    assert peaks.kept(network, 10, "fp32") == 4 * (3 + 8) * 100


@pytest.mark.parametrize("name", ["edgenext_xx_small", "vit_tiny_patch16_dinov3_qkvb"])
def test_networks_that_make_their_embeddings_as_they_run_are_counted(name):
    network = B.create(Model(name), 64)
    heads = [p.shape for p in peaks.relearned(Relearn(mlp_dim=8, mlp_layers=1), [3], network, 64)[-1].parameters()]
    assert heads == [(3, 8), (3,)]


@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_remembers_its_attention_biases_can_be_copied_afterwards(training):
    widths = {"embed_dim": (8, 8, 8), "num_heads": (1, 1, 1), "depth": (1, 1, 1)}
    network = timm.create_model("levit_128s", img_size=64, key_dim=4, num_classes=0, **widths).train(training)
    assert peaks.kept(network, 64, "fp32") > 0
    assert copy.deepcopy(network).training is training


def test_a_run_says_what_it_takes_and_refuses_before_it_begins(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "free_memory", lambda: 3e6)
    done = tiny_run(tmp_path / "run", picture_folder)
    assert done.returncode == 2
    assert "would take about" in done.stderr
    assert not (tmp_path / "run").exists()


def test_out_of_memory_in_a_step_says_what_halves_it(context):
    class Large(BackboneTask):
        def forward(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    shown, schedule = make_images(), Relearn(batch_size=8, accumulate=2, epochs=1)
    task = Large(B.create(Model("test_resnet"), 16), schedule, shown)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Failed, match=r"relearn: .* 4 images .*accumulate 4"):
        patch.setattr("training.loop.rehearse", lambda *_: (0.0, []))
        train(task, shown, shown.train, schedule, Key(0, "relearn"), context, {})
    task.whole_batch = True
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Failed, match=r"relearn\.batch_size 4"):
        patch.setattr("training.loop.rehearse", lambda *_: (0.0, []))
        train(task, shown, shown.train, schedule, Key(0, "relearn"), context, {})
