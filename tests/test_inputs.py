"""What commands over a model read: sizes other than the model's, every split, and what is said of it."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import call, write_png
from training import embed, inputs, predict, records
from training.evaluate import __main__ as evaluate
from training.extraction import plain_batch
from training.images import load_splits
from training.recipe import Data


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two splits: one of 60 px, one of 16 px with a broken file."""
    folder = tmp_path_factory.mktemp("mixed")
    draws = np.random.default_rng(0)
    for split, side, count in (("train", 60, 4), ("val", 16, 3)):
        for number in range(count):
            write_png(folder / split / f"{number}.png", draws.integers(0, 255, (side, side, 3)))
    (folder / "val" / "1.png").write_bytes(b"")
    return folder


def test_every_split_is_embedded_at_the_size_that_is_asked_for(backbone, mixed, tmp_path, context):
    options = ["--data.path", mixed, "--out", tmp_path / "out.npz"]
    done = call(embed.main, backbone, *options, "--data.size", 24)
    assert done.returncode == 0, done.stderr
    assert "trained at 16 px and is asked at 24 px" in done.stdout
    assert done.stdout.count("4 of 4 images are larger than the 24 px that the model sees") == 1
    with np.load(tmp_path / "out.npz") as found:
        assert [f"{s} {i}" for s, i in zip(found["split"], found["index"], strict=True)] == [
            "train 0", "train 1", "train 2", "train 3", "val 0", "val 1", "val 2",
        ]  # fmt: skip
        rows = torch.from_numpy(found["features"])
    assert rows.isnan().any(1).tolist() == [False] * 5 + [True, False]
    network = inputs.model(str(backbone), 24)
    splits = dict(zip(*inputs.every_split(network, Data(path=str(mixed)), context, 24), strict=True))
    with torch.no_grad():
        expected = network(plain_batch(splits["train"], torch.arange(4), torch.device("cpu")))
    assert torch.allclose(rows[:4], expected, atol=1e-4)
    alone = call(embed.main, backbone, *options, "--data.split", "val")
    assert (alone.returncode, "3 rows" in alone.stdout, "size" in alone.stdout) == (0, True, False)


def test_a_folder_that_only_bears_the_name_of_a_model_is_not_taken_for_it(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "sslpp_resnet10t_s32"
    (tmp_path / name).mkdir()
    assert inputs.model(name).pretrained_cfg["tag"] == "rotation_c10"
    shutil.copytree(backbone, tmp_path / name, dirs_exist_ok=True)
    assert inputs.model(name).pretrained_cfg["source"] == "local-dir"


def test_evaluate_takes_a_size_and_records_it(backbone, picture_folder, tmp_path, monkeypatch):
    seen, figure = [], {"stage": 0, "protocol": "knn", "settings": {"k": 1}, "split": "val", "metric": "top1"}

    def measured(network, settings, over, context):
        seen.append(over.splits)
        return [{**figure, "value": 0.5}]

    monkeypatch.setattr(evaluate, "evaluate", measured)
    out = ["--out", tmp_path / "records.jsonl"]
    for more, size in (([], 16), (["--data.size", "24"], 24)):
        for _ in range(2):  # what is measured again replaces what it is of, and nothing of another size
            done = call(evaluate.main, backbone, "--data.path", picture_folder, *out, *more)
            assert done.returncode == 0, done.stderr
            assert [split.size for split in seen[-1]] == [size, size]
    assert [row["size"] for row in records.read(out[1])] == [16, 24]


def test_labels_that_are_not_used_are_not_read(backbone, mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "mixed")
    line = '{"file_name": "0.png", "label": "%s"}\n'
    (folder / "train" / "metadata.jsonl").write_text(line % "a" + line % "b")
    done = call(embed.main, backbone, "--data.path", folder, "--out", tmp_path / "out.npz")
    assert (done.returncode, "7 rows" in done.stdout) == (0, True), done.stderr
    table = tmp_path / "table"
    table.mkdir()
    pictures = [{"bytes": (mixed / "train" / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    pq.write_table(pa.table({"image": pictures, "label": [b"\xff", b"a", b"b", b"c"]}), table / "a.parquet")
    done = call(embed.main, backbone, "--data.path", table, "--out", tmp_path / "out.npz")
    assert (done.returncode, "4 rows" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.limit", "4"], "data.val_fraction: 0.1 of 4 usable images leaves 4 to train on and 0 held out"),
        (["--evaluate.knn_k", "[]"], "evaluate.linear_c and evaluate.knn_k need at least one value each"),
        (["--evaluate.linear_c", "[]"], "evaluate.linear_c and evaluate.knn_k need at least one value each"),
        (["--residue", "simclr"], "--residue: simclr gives images no few views that could be told apart; rotation"),
        (["--evaluate.transfer", "[FEW]"], "0.1 of 4 usable images leaves 4 to train on and 0 held out"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said, backbone, picture_folder, tmp_path):
    for number in range(4):
        source = sorted(picture_folder.glob(f"train/class {number}/*.png"))[0]
        (tmp_path / "few" / str(number)).mkdir(parents=True)
        shutil.copy(source, tmp_path / "few" / str(number))
    given = [option.replace("FEW", str(tmp_path / "few")) for option in options]
    done = call(evaluate.main, backbone, "--data.path", picture_folder, *given)
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True), done.stderr


def test_what_has_no_labels_to_be_measured_by_is_told(backbone, picture_folder, tmp_path):
    unlabelled = "there are no labels of two classes or more, so that linear and knn are left out"
    done = call(evaluate.main, backbone, "--data.path", picture_folder / "train" / "class 1")
    assert (done.returncode, unlabelled in done.stdout) == (0, True), done.stderr
    found, _ = load_splits(Data(path=str(picture_folder), size=16), None)
    rows = [found.paths[index].removeprefix("train/") for index in found.train.tolist()]
    lines = [f'"{row}",{row.split("/")[0]}\n' for row in rows]
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(lines))
    options = ["--data.path", picture_folder / "train", "--data.splits", "none", "--data.labels", tmp_path / "t.csv"]
    done = call(evaluate.main, backbone, *options)
    assert done.returncode == 0, done.stderr
    assert f"none of {len(found.val)} held-out images has a label, so that linear and knn are left out" in done.stdout


@pytest.mark.parametrize("command", [embed, predict])
def test_what_is_read_is_not_written_over(command, backbone, tmp_path):
    data = tmp_path / "data.parquet"
    data.write_bytes(b"rows of somebody's images")
    done = call(command.main, backbone, "--data.path", data, "--out", data)
    assert (done.returncode, f"--out: {data} is what is to be shown or read" in done.stderr) == (2, True), done.stderr
    assert data.read_bytes() == b"rows of somebody's images"
