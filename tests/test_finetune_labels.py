"""Which labels a fine-tuning learns from: shares, missing ones, and what each split is for."""

import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TUNING, call, write_png
from training import backbone as B
from training import finetune as T
from training import records
from training.recipe import Model


def test_a_share_of_the_labels_is_a_share_of_each_class(tiny, context, monkeypatch):
    monkeypatch.setattr(T.inputs, "load_for", lambda *args, **kwargs: (tiny, None))
    network = B.create(Model("test_resnet"), 16)
    _, every = T.load_images(network, T.Finetune(), context)
    assert torch.equal(every, tiny.train)
    _, half = T.load_images(network, T.Finetune(labels=0.5), context)
    _, again = T.load_images(network, T.Finetune(labels=0.5, seed=9), context)
    counts, whole = (torch.bincount(tiny.labels[i], minlength=4) for i in (half, every))
    assert torch.equal(half, again)
    assert all(abs(c - w / 2) <= 0.5 for c, w in zip(counts.tolist(), whole.tolist(), strict=True))


def parquet(folder, labels, test=None):
    folder.mkdir()
    for split, values in (("train", labels), ("test", test)):
        if values is not None:
            pictures = [Image.new("RGB", (16, 16), (i, i, i)) for i in range(len(values))]
            rows = datasets.Dataset.from_dict({"image": pictures, **({"label": values} if any(values) else {})})
            rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("labels", "test", "said"),
    [
        ([None] * 12, None, "the train split has no labels of two classes or more"),
        (["a"] * 12, None, "the train split has no labels of two classes or more"),
        ([["a"], ["a", "b"]] * 6, None, "the train split has no labels of two classes or more"),
        (["a", "b"] * 6, ["a", "c"], "the split 'test' has the class 'c', which is not among the training split's"),
        (["a", "b"] * 6, [None, None], "data.test_split: the test split has no labels"),
    ],
)
def test_labels_that_are_missing_or_do_not_match_are_refused(backbone, tmp_path, labels, test, said):
    data = parquet(tmp_path / "data", labels, test)
    named = ["--data.test_split", "test"] if test else []
    done = call(T.main, backbone, *TUNING, *named, "--data.path", data, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("none", [None, "", math.nan])
def test_images_without_a_label_are_left_out_and_counted(backbone, tmp_path, none):
    values = [0.0, 1.0] if none is not None and none != "" else ["a", "b"]
    data = parquet(tmp_path / "data", [*values, none] * 10, [*values, none])
    done = call(T.main, backbone, *TUNING, "--data.path", data, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "10 of 30 images of the train split have no label and are left out" in done.stdout
    assert "1 of 3 images of the test split have no label" in done.stdout


def test_a_class_without_an_image_to_learn_from_is_warned_of(backbone, tmp_path):
    for name in "abc":
        for i in range(12):
            write_png(tmp_path / "data" / name / f"{i}.png", np.full((16, 16, 3), 10 * i))
    for path in (tmp_path / "data" / "c").iterdir():
        path.write_bytes(b"broken")
    options = [
        *TUNING,
        "--data.path",
        tmp_path / "data",
        "--data.max_bad_fraction",
        "1",
        "--run",
        tmp_path / "run",
    ]
    done = call(T.main, backbone, *options)
    assert done.returncode == 0, done.stderr
    assert "warning: 1 classes have no image to learn from, and are never learned: c" in done.stdout


@pytest.mark.parametrize("options", [[], ["--data.test_split", "none"]])
def test_a_test_split_without_labels_is_left_out(options, backbone, tmp_path):
    data = parquet(tmp_path / "data", ["a", "b"] * 12, [None, None])
    done = call(T.main, backbone, *TUNING, *options, "--data.path", data, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "test: not used" in done.stdout
    assert {row["split"] for row in records.read(tmp_path / "run" / "records.jsonl")} == {"val"}


def test_a_validation_split_chooses_and_the_test_split_is_measured_once(backbone, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for split, count in (("train", 24), ("val", 6), ("test", 4)):
        for i in range(count):
            write_png(data / split / "ab"[i % 2] / f"{i}.png", np.full((16, 16, 3), 40 + 150 * (i % 2)))
    measured = []
    real = T.Keeper.answers
    monkeypatch.setattr(T.Keeper, "answers", lambda self, net, split: measured.append(split) or real(self, net, split))
    options = [x for x in TUNING if x not in ("--data.val_fraction", "0.2")]
    done = call(T.main, backbone, *options, "--data.path", data, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "train: training (24 read); val: validation (6 read); test: test (4 read)" in done.stdout
    assert "best, validation: " in done.stdout
    assert "last, test: " in done.stdout
    assert measured[:-4] == ["val"] * (len(measured) - 4)  # no test split before the end
    found = records.read(tmp_path / "run" / "records.jsonl")
    assert {r["split"] for r in found} == {"val", "test"}
    refused = call(
        T.main, backbone, *TUNING, "--data.path", data, "--run", tmp_path / "x", "--data.val_fraction", "0.2"
    )
    assert (refused.returncode, "data.val_fraction: the split 'val' is what is held out" in refused.stderr) == (2, True)
