"""Files of ours, and images, that are not what they were: one sentence that names them, or the same end."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_RUN, call, tiny_run
from tests.faults.harness import flip, results
from tests.faults.images import look, write_mutated
from training import backbone as B
from training import embed
from training.command import parse
from training.files import Refused
from training.launch import StopSignals
from training.recipe import Model
from training.setup import prepare


@pytest.fixture
def run(finished, picture_folder, tmp_path):
    """A copy of the finished run, its command, and whether both have the same end."""
    folder = tmp_path / "tiny"
    shutil.copytree(finished[0], folder)
    return folder, lambda: tiny_run(folder, picture_folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data.json", lambda content: b"[]"),
        ("measured.json", lambda content: b"\xff"),
        ("metrics.jsonl", lambda content: b"\0\xff\n" + content),
        ("metrics.jsonl", lambda content: content.replace(b'"phase"', b'"phbse"', 1)),
        ("proxy/proxy.json", lambda content: b""),
        ("round_1/clusters.json", lambda content: b"{}"),
        ("round_1/relearn.json", lambda content: content[:100]),
        ("round_1/labels.parquet", None),
    ],
)
def test_a_damaged_file_is_named(name, damage, run):
    folder, again = run
    content = (folder / name).read_bytes()
    (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage(content))
    done = again()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{folder / name} is " in done.stderr or f"{folder / name}: line 1 is damaged" in done.stderr


def test_what_is_made_anew_may_be_damaged(finished, run):
    folder, again = run
    for name in ("recipe.yaml", "report.md", "hub/model.safetensors", "bad_images.txt"):
        (folder / name).write_bytes(b"\xff\0")
    (folder / "measured.json").unlink()
    rows = (folder / "records.jsonl").read_text()
    rows = rows.replace('"arm": "sslpp"', '"arm": "rslpp"', 1).replace('"seed": 0', '"see-": 0', 1)
    (folder / "records.jsonl").write_text(rows)
    (folder / "round_1" / "relearn.json").unlink()
    newest, older = sorted((folder / "checkpoints").iterdir(), reverse=True)
    (newest / "state.json").write_bytes(b"[]")
    done = again()
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged and left aside" in done.stdout
    assert older.exists()
    assert results(folder) == results(finished[0])


def test_copies_of_a_runs_folders_beside_them_are_let_alone(run):
    folder, _ = run
    shutil.copytree(folder / "round_1", folder / "round_1_old")
    told = json.loads((folder / "round_1" / "relearn.json").read_text())
    told["read"]["relearn.epochs"] = 1
    (folder / "round_1_old" / "relearn.json").write_text(json.dumps(told))
    recipe = parse([*TINY_RUN, "--data.path", str(folder.parent / "none"), "--run", str(folder)])
    with pytest.raises(Refused, match="none does not exist"), StopSignals() as stop:
        prepare(recipe, stop)


@pytest.fixture
def model(finished, tmp_path):
    """A copy of the finished run's backbone, and what a command that reads it says."""
    shutil.copytree(finished[0] / "hub", tmp_path / "hub")
    out = tmp_path / "out.csv"
    return tmp_path / "hub", lambda: call(embed.main, tmp_path / "hub", "--data.path", tmp_path, "--out", out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("[]", "config.json names no architecture"),
        ({"architecture": "resnet_nope"}, "timm has no model 'resnet_nope'"),
        ({"mean": "abc"}, "mean cannot be 'abc'"),
        ({"mean": None}, "mean cannot be None"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean cannot be"),
        ({"std": [0, 0, 0]}, "std cannot be"),
        ({"crop_pct": -1}, "crop_pct cannot be -1"),
        ({"notes": ["white x"]}, "notes cannot be"),
        ({"notes": 3}, "notes cannot be 3"),
    ],
)
def test_a_model_whose_config_is_damaged_is_refused(change, named, model):
    folder, ask = model
    if isinstance(change, dict):
        told = json.loads((folder / "config.json").read_text())
        for name, value in change.items():
            (told if name in told else told["pretrained_cfg"])[name] = value
        change = json.dumps(told)
    (folder / "config.json").write_text(change)
    done = ask()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{folder}" in done.stderr
    assert named in done.stderr


@pytest.mark.parametrize("names", [3, ["a"], ["a", None]])
def test_a_classifier_that_does_not_name_its_classes_is_refused(names, model):
    config = {**json.loads((model[0] / "config.json").read_text()), "num_classes": 2, "label_names": names}
    (model[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="label_names cannot be"):
        B.create(Model(f"local-dir:{model[0]}"), None, head=True)


def test_weights_that_are_not_finite_make_no_features(model):
    folder, ask = model
    tensors = load_file(folder / "model.safetensors")
    tensors["bn1.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    done = ask()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "are damaged: bn1.bias is not finite" in done.stderr


@pytest.mark.parametrize("name", ["checkpoints", "hub", "report", "round_1"])
def test_a_file_where_a_folder_belongs_is_left_alone_and_named(name, picture_folder, tmp_path):
    (tmp_path / name).write_text("mine")
    done = tiny_run(tmp_path, picture_folder)
    assert (done.returncode, (tmp_path / name).read_text()) == (2, "mine")
    assert f"{tmp_path / name} is a file" in done.stderr


def test_mutated_images_are_read_or_listed_and_always_alike(tmp_path):
    rng = np.random.default_rng(0)
    write_mutated(tmp_path, 150, rng)
    found = look(tmp_path)
    assert found["read"] + found["bad"] == 150
    assert min(found["read"], found["bad"]) > 10
    assert look(tmp_path) == found


def test_a_bit_is_turned(tmp_path):
    (tmp_path / "x").write_bytes(bytes(9))
    flip(tmp_path / "x", np.random.default_rng(0))
    assert sum(byte.bit_count() for byte in (tmp_path / "x").read_bytes()) == 1
