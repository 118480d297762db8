"""Images: every odd file becomes RGB or is left out, and keeps its place."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_png
from training import images as I
from training.files import Failed, Refused
from training.launch import Interrupted
from training.recipe import Data


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(mode, value, size=(12, 12)):
    return Image.new(mode, size, value)


def paletted():
    return colour("RGB", (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(colour("L", 100)), (100, 100, 100)),
        (encoded(colour("1", 1)), (255, 255, 255)),
        (encoded(colour("RGBA", (200, 0, 0, 255))), (200, 0, 0)),
        (encoded(colour("RGBA", (0, 0, 0, 0))), (255, 255, 255)),
        (encoded(colour("LA", (0, 0))), (255, 255, 255)),
        (encoded(paletted()), (10, 200, 30)),
        (encoded(colour("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.fromarray(np.full((12, 12), 65535, np.uint16))), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((12, 12), 25700, np.uint16))), (100, 100, 100)),
        (encoded(Image.fromarray(np.full((12, 12), 0.4, np.float32)), "TIFF"), (102, 102, 102)),
        (encoded(colour("RGB", (1, 2, 3)), "BMP"), (1, 2, 3)),
    ],
    ids=["grey", "bilevel", "rgba", "transparent", "la", "palette", "cmyk", "white16", "grey16", "float", "bmp"],
)
def test_every_kind_of_file_becomes_rgb(content, expected):
    array = I.decode(content, 12)
    assert array.dtype == np.uint8
    assert np.abs(array.reshape(3, -1).T.astype(int) - expected).max() <= 1


def test_exif_orientation_is_applied():
    upright = np.zeros((20, 20, 3), np.uint8)
    upright[:10] = 255
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a quarter clockwise
    turned = Image.fromarray(np.rot90(upright).copy())
    array = I.decode(encoded(turned, exif=exif), 20)
    assert array[:, :10].min() > 200
    assert array[:, 10:].max() < 50


def test_the_short_side_is_brought_down_and_the_centre_kept_but_nothing_is_enlarged():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert I.decode(encoded(Image.fromarray(wide)), 30).shape == (3, 20, 20)
    small = I.decode(encoded(Image.fromarray(wide)), 10)
    assert small.shape == (3, 10, 10)
    assert small.min() > 200


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
    return I.load(data, "train", folder / "run")


def test_bad_files_are_listed_and_keep_their_index(folder):
    found = load(folder)
    assert len(found) == 23
    assert int(found.usable.sum()) == 20
    listed = (folder / "run" / "bad_images.txt").read_text().splitlines()
    assert [found.paths[int(line.split("\t")[0])] for line in listed] == [line.split("\t")[1] for line in listed]
    assert {line.split("\t")[1] for line in listed} == {"a/00_empty.png", "a/30_text.jpg", "b/31_cut.png"}
    for i in found.all.tolist():
        number = int(found.paths[i].split("/")[1][:2])
        assert found.pixels[i, :, : found.sides[i], : found.sides[i]].unique().tolist() == [10 * number]
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
    with pytest.raises(Refused, match="can be decoded"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/nowhere/at/all"},
        {"split": "training"},
        {"image_column": "picture"},
        {"label_column": "class"},
    ],
)
def test_what_cannot_be_read_is_refused(folder, changes):
    data = Data(**{"path": str(folder / "data"), "size": 12, **changes})
    with pytest.raises(Refused, match=r"^data\."):
        I.load(data, data.split, folder / "run")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(Refused, match=r"data\.path"):
        load(tmp_path)


def test_a_mapped_file_holds_what_memory_would(folder):
    in_memory = load(folder)
    first, again = load(folder, memory_gb=0.0), load(folder, memory_gb=0.0)
    assert (folder / "run" / "images" / "train.u8").exists()
    for found in (first, again):
        assert torch.equal(found.pixels, in_memory.pixels)
        assert torch.equal(found.sides, in_memory.sides)
        assert (found.fingerprint, found.mean, found.std) == (in_memory.fingerprint, in_memory.mean, in_memory.std)


def test_a_mapped_file_of_other_images_is_made_anew(folder):
    load(folder, memory_gb=0.0)
    write_png(folder / "data" / "a" / "01.png", np.full((14, 14, 3), 11))
    found, expected = load(folder, memory_gb=0.0), load(folder)
    assert torch.equal(found.pixels, expected.pixels)
    assert (found.fingerprint, found.mean, found.std) == (expected.fingerprint, expected.mean, expected.std)


def test_of_several_processes_one_lists_bad_images(folder):
    I.load(Data(path=str(folder / "data"), size=12, max_bad_fraction=0.5), "train", folder / "run", listing=False)
    assert not (folder / "run" / "bad_images.txt").exists()


def test_a_signal_while_data_are_read_is_no_fault_of_theirs(folder, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted(15)

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted):
        load(folder)


def test_the_fingerprint_is_of_paths_and_bytes(folder):
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    write_png(folder / "data" / "a" / "01.png", np.full((14, 14, 3), 11))
    assert load(folder).fingerprint != before


def test_held_out_images_are_drawn_by_the_split_seed_alone(folder):
    first = load(folder, val_fraction=0.3)
    assert torch.equal(first.held_out, load(folder, val_fraction=0.3).held_out)
    assert not torch.equal(first.held_out, load(folder, val_fraction=0.3, split_seed=1).held_out)
    assert int(first.held_out.sum()) == 7
    assert len(load(folder, limit=9)) == 9


def test_statistics_are_of_the_training_images(folder):
    found = load(folder)
    values = torch.stack([found.pixels[i, :, :14, :14] for i in found.train.tolist()]).double() / 255
    assert np.allclose(found.mean, values.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(found.std, values.std((0, 2, 3), unbiased=False), atol=1e-4)
    assert found.crop_pct == 12 / 14


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
    assert I.find_test_split(Data(path=str(tmp_path / "data"))) == "test"
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
    data = Data(path="digits", size=16)
    rows = I.read_split(data, "train")
    assert (len(rows), len(I.read_split(data, "test")), I.find_test_split(data)) == (1438, 359, "test")
