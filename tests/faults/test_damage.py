"""Files of ours, and images, that are not what they were: one sentence that names them, or the same end."""

import shutil

import numpy as np
import pytest

from tests.conftest import TINY_RUN, call
from tests.faults.harness import flip, results
from tests.faults.images import look, write_mutated
from training.__main__ import main


@pytest.fixture
def run(finished, picture_folder, tmp_path):
    """A copy of the finished run, its command, and whether both have the same end."""
    folder = tmp_path / "tiny"
    shutil.copytree(finished[0], folder)
    return folder, lambda: call(main, *TINY_RUN, "--data.path", picture_folder, "--run", folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data.json", lambda content: b"[]"),
        ("measured.json", lambda content: b"\xff"),
        ("metrics.jsonl", lambda content: b"\0\xff\n" + content),
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
    (folder / "round_1" / "relearn.json").unlink()
    newest, older = sorted((folder / "checkpoints").iterdir(), reverse=True)
    (newest / "state.json").write_bytes(b"[]")
    done = again()
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged and left aside" in done.stdout
    assert older.exists()
    assert results(folder) == results(finished[0])


@pytest.mark.parametrize("name", ["checkpoints", "hub", "report", "round_1"])
def test_a_file_where_a_folder_belongs_is_left_alone_and_named(name, picture_folder, tmp_path):
    (tmp_path / name).write_text("mine")
    done = call(main, *TINY_RUN, "--data.path", picture_folder, "--run", tmp_path)
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
