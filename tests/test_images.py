"""Images: what can be decoded keeps its place, what cannot is listed; splits, statistics, samples."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_png
from tests.test_pixels import colour, encoded
from training import images as I
from training.files import Failed, Refused
from training.launch import Interrupted
from training.recipe import Data


@pytest.fixture
def folder(tmp_path):
    """20 good files of two classes and four that are not images."""
    for i in range(20):
        write_png(tmp_path / "data" / ("a" if i % 2 else "b") / f"{i:02d}.png", np.full((14, 14, 3), 10 * i))
    (tmp_path / "data" / "a" / "00_empty.png").write_bytes(b"")
    (tmp_path / "data" / "a" / "30_text.jpg").write_text("no image")
    (tmp_path / "data" / "b" / "31_cut.png").write_bytes(encoded(Image.effect_noise((40, 40), 50))[:300])
    (tmp_path / "data" / "b" / "notes.txt").write_text("left alone")
    return tmp_path


def load(folder, **changes):
    data = Data(**{"path": str(folder / "data"), "size": 12, "max_bad_fraction": 0.5, **changes})
    return I.load_splits(data, folder / "run")[0]


def test_bad_files_are_listed_and_keep_their_index(folder):
    found = load(folder)
    assert len(found) == 23
    assert int(found.usable.sum()) == 20
    listed = I.write_bad(folder, found.bad).read_text().splitlines()
    assert [line.split("\t")[:2] for line in listed] == [
        ["train", path] for path in ("a/00_empty.png", "a/30_text.jpg", "b/31_cut.png")
    ]
    assert found.account["train"]["left_aside_by_ending"] == {".txt": 1}
    for i in found.all.tolist():
        number = int(found.paths[i].split("/")[1][:2])
        assert found.pixels.picture(i).unique().tolist() == [10 * number]
        assert found.label_names[found.labels[i]] == ("a" if number % 2 else "b")
    drawn = set(found.train.tolist()) | set(found.val.tolist())
    assert drawn == set(found.all.tolist())


def test_too_many_bad_files_stop_the_run_with_the_list(folder):
    with pytest.raises(Failed, match=r"3 of 23 .*bad_images.txt"):
        load(folder, max_bad_fraction=0.01)
    assert len((folder / "run" / "bad_images.txt").read_text().splitlines()) == 3


def test_no_usable_image_is_a_clear_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_text("no image")
    with pytest.raises(Refused, match=r"can be decoded \(1 tried\); the first is a\.png: not an image"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/nowhere/at/all"},
        {"split": "night"},
        {"image_column": "picture"},
        {"label_column": "class"},
    ],
)
def test_what_cannot_be_read_is_refused(folder, changes):
    data = Data(**{"path": str(folder / "data"), "size": 12, **changes})
    with pytest.raises(Refused, match=r"^data\."):
        I.load_splits(data, folder / "run")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(Refused, match=r"data\.path"):
        load(tmp_path)


def test_a_mapped_file_holds_what_memory_would(folder):
    in_memory = load(folder)
    first, again = load(folder, memory_gb=0.0), load(folder, memory_gb=0.0)
    assert (folder / "run" / "images" / "train.u8").exists()
    for found in (first, again):
        assert torch.equal(found.pixels.flat, in_memory.pixels.flat)
        assert torch.equal(found.sides, in_memory.sides)
        assert (found.fingerprint, found.mean, found.std) == (in_memory.fingerprint, in_memory.mean, in_memory.std)


def test_a_mapped_file_of_other_images_is_made_anew(folder):
    load(folder, memory_gb=0.0)
    write_png(folder / "data" / "a" / "01.png", np.full((14, 14, 3), 11))
    found, expected = load(folder, memory_gb=0.0), load(folder)
    assert torch.equal(found.pixels.flat, expected.pixels.flat)
    assert (found.fingerprint, found.mean, found.std) == (expected.fingerprint, expected.mean, expected.std)


def test_a_signal_while_data_are_read_is_no_fault_of_theirs(folder, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted(15)

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted):
        load(folder, path="org/data")


def test_the_fingerprint_is_of_paths_and_bytes(folder):
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    write_png(folder / "data" / "a" / "01.png", np.full((14, 14, 3), 11))
    assert load(folder).fingerprint != before


def test_of_each_class_as_large_a_share_is_held_out_and_never_all():
    classes = np.repeat([0, 1, 2, -1], [40, 20, 5, 1])
    for seed in range(20):
        held = I.held(np.random.default_rng(seed).permutation(66), 13, classes)
        assert len(set(held)) == 13
        counts = [np.sum(classes[held] == label) for label in (0, 1, 2, -1)]
        assert [7 <= counts[0] <= 9, 3 <= counts[1] <= 5, 0 <= counts[2] <= 2, counts[3]] == [True, True, True, 0]
    assert sorted(I.held(np.arange(6)[::-1], 6, np.array([0, 0, 0, 1, 1, 2]))) == [0, 1, 3]
    assert I.held(np.arange(4), 2, None).tolist() == [0, 1]


def test_held_out_images_are_drawn_by_the_split_seed_alone(folder):
    first = load(folder, val_fraction=0.3)
    assert torch.equal(first.held_out, load(folder, val_fraction=0.3).held_out)
    assert not torch.equal(first.held_out, load(folder, val_fraction=0.3, split_seed=1).held_out)
    assert int(first.held_out.sum()) == 7
    part, whole = load(folder, limit=9), load(folder)
    assert len(part) == 9
    assert part.paths != whole.paths[:9]  # a sample, in order
    assert part.paths == sorted(part.paths, key=whole.paths.index)
    assert load(folder, limit=9).paths == part.paths != load(folder, limit=9, split_seed=1).paths


def test_statistics_are_of_the_training_images(folder):
    found = load(folder)
    values = torch.stack([found.pixels.picture(i) for i in found.train.tolist()]).double() / 255
    assert np.allclose(found.mean, values.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(found.std, values.std((0, 2, 3), unbiased=False), atol=1e-4)
    assert found.crop_pct == 12 / 14
    for path in found.paths:
        write_png(folder / "data" / path, np.full((14, 14, 3), 7))
    assert np.allclose(load(folder).std, 1 / 255, atol=1e-4)  # of one grey: what rounding leaves unknown


def test_parquet_files_and_folders_of_them_with_and_without_labels(tmp_path):
    pictures = [colour("RGB", (i, i, i)) for i in range(6)]
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0, 1, 0, 1, 0, 1]},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"])),
    )
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    rows.select(range(2)).to_parquet(tmp_path / "data" / "test.parquet")
    rows.remove_columns("label").to_parquet(tmp_path / "plain.parquet")
    found = load(tmp_path)
    assert (len(found), found.label_names, found.labels.tolist()) == (6, ["x", "y"], [0, 1, 0, 1, 0, 1])
    assert I.load_splits(Data(path=str(tmp_path / "data"), size=12), None)[1].labels.tolist() == [0, 1]
    plain = load(tmp_path, path=str(tmp_path / "plain.parquet"))
    assert (len(plain), plain.labels, plain.label_names) == (6, None, None)


def test_labels_that_are_missing_are_unknown_and_text_is_a_class(tmp_path):
    pictures = [colour("RGB", (i, i, i)) for i in range(4)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": ["cat", None, "dog", "cat"]})
    rows = rows.cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    found = load(tmp_path)
    assert (found.labels.tolist(), found.label_names) == ([0, -1, 1, 0], ["cat", "dog"])


def test_digits_ship_with_scikit_learn():
    train, test = I.load_splits(Data(path="digits", size=16), None)
    assert (len(train), len(test), train.label_names) == (1438, 359, [str(i) for i in range(10)])
