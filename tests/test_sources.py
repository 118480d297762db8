"""Sources: what data.path may name, what is refused with advice, and what each split is for."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import ROOT, command, write_png
from tests.test_folders import by_path, classes, read, tree
from training import sources as S
from training.files import Failed, Refused
from training.recipe import Data
from training.uses import uses


def png(value=100):
    buffer = io.BytesIO()
    Image.new("L", (12, 12), value).save(buffer, "PNG")
    return buffer.getvalue()


def table(path, labels, **columns):
    pictures = [Image.new("L", (12, 12), 10 * i) for i in range(len(labels))]
    rows = datasets.Dataset.from_dict({"image": pictures, **({"label": labels} if any(labels) else {}), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.cast_column("image", datasets.Image()).to_parquet(path)


def archive(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("labels.csv", b"file,label\n", "is a table; name the folder of the images, and the table as --data.labels"),
        ("list.txt", b"a.png\n", "is a table"),
        ("photos.zip", b"PK", "is an archive; unpack it"),
        ("photos.tar.gz", b"\x1f\x8b", "is an archive; unpack it"),
        ("model.bin", b"\0", "is no folder of images"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_with_what_to_do(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=said):
        read(tmp_path / name)


def test_a_readme_beside_parquet_files_that_is_no_card_is_nothing_to_warn_of(tmp_path):
    table(tmp_path / "photos" / "train.parquet", ["a", "b"])
    (tmp_path / "photos" / "README.md").write_text("# Photographs\n")
    code = "import sys\nfrom training import sources\nfrom training.recipe import Data\n"
    code += "print(len(sources.read(Data(path=sys.argv[1]))[0]))"
    run = [sys.executable, "-c", code, str(tmp_path / "photos")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_an_image_is_read_alone(tmp_path, monkeypatch):
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,label\none.png,cat\n")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "one.png", "one.png"):
        found, beside = S.read(Data(path=str(path)))
        source = found["train"]
        assert (list(found), source.paths, source.labels, beside) == (["train"], ["one.png"], None, 0)
        assert source.read(0) == ("one.png", png(), "")


def test_archives_of_class_folders_are_to_be_unpacked_and_webdatasets_are_read(tmp_path):
    archive(tmp_path / "photos.tar", {f"photos/{c}/{i}.png": png() for c in "ab" for i in range(3)})
    with pytest.raises(Refused, match="is an archive; unpack it"):
        read(tmp_path / "photos.tar")
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "photos.zip", "w") as file:
        file.writestr("cat/1.png", png())
    with pytest.raises(Refused, match=r"holds no image \(but 1 \.zip\); unpack the archives first"):
        read(folder)
    samples = {
        f"{i:03d}.{kind}": content for i in range(4) for kind, content in (("png", png(i)), ("cls", b"01"[i % 2 :][:1]))
    }
    archive(tmp_path / "shard.tar", samples)
    found, _ = read(tmp_path / "shard.tar", label_column="cls")
    assert list(by_path(found).values()) == ["0", "1", "0", "1"]


def test_images_and_parquet_files_of_images_in_one_folder_are_refused_and_features_are_not(tmp_path):
    tree(tmp_path, {"a": 2, "b": 2})
    rows = datasets.Dataset.from_dict({"path": ["a"], "features": [[0.5, 1.0]]})
    rows.to_parquet(tmp_path / "features.parquet")
    found, _ = read(tmp_path)
    assert (len(found), found.account["train"]["left_aside_by_ending"]) == (4, {".parquet": 1})
    table(tmp_path / "more.parquet", ["a", "b"])
    with pytest.raises(Refused, match="image files and parquet files that hold images"):
        read(tmp_path)


def test_a_row_that_names_a_file_of_this_machine_is_not_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(secret)}, {"bytes": png(), "path": None}]})
    kinds = datasets.Features(image=datasets.Image(decode=False))
    rows.cast(kinds).to_parquet(tmp_path / "foreign.parquet")
    # as a hostile writer makes it: the path alone
    kept = pq.read_table(tmp_path / "foreign.parquet")
    value = pa.array(
        [{"bytes": None, "path": str(secret)}, {"bytes": png(), "path": "b.png"}], kept.schema.field("image").type
    )
    pq.write_table(kept.set_column(0, kept.schema.field("image"), value), tmp_path / "foreign.parquet")
    found, _ = read(tmp_path / "foreign.parquet")
    assert [(path, reason) for _, path, reason in found.bad] == [(str(secret), "a file outside the data set")]
    assert len(found.all) == 1


def test_a_file_of_the_hubs_cache_is_called_as_the_data_set_has_it(tmp_path):
    own = tmp_path / "hub" / "datasets--org--pics"
    (own / "blobs").mkdir(parents=True)
    (own / "blobs" / "0891").write_bytes(png())
    file = own / "snapshots" / ("0" * 40) / "train" / "0.png"
    file.parent.mkdir(parents=True)
    file.symlink_to(own / "blobs" / "0891")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)}]})
    source = S.TableSource(rows, "image", None, None, (tmp_path / "elsewhere", tmp_path / "hub"))
    assert source.read(source.rows([0])[0]) == ("train/0.png", png(), "")


def test_files_in_a_column_of_bytes_are_images(tmp_path):
    for name, column in (("plain", [png(1), png(2)]), ("struct", [{"bytes": png(1)}, {"bytes": png(2)}])):
        pq.write_table(pa.table({"jpg": column, "cls": [3, 5], "key": ["a", "b"]}), tmp_path / f"{name}.parquet")
        found, _ = read(tmp_path / f"{name}.parquet")
        assert (len(found.all), list(by_path(found).values())) == (2, ["3", "5"])


def test_what_save_to_disk_leaves_is_read(tmp_path):
    pictures = [Image.new("L", (12, 12), 10 * i) for i in range(4)]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "d\x1bog"]))
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}, features=kinds)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    alone, _ = read(tmp_path / "one")
    train, test = read(tmp_path / "two")
    assert alone.label_names == train.label_names == test.label_names == ["cat", r"d\x1bog"]
    assert [len(found.all) for found in (alone, train, test)] == [4, 4, 4]


def test_a_path_that_datasets_takes_for_a_pattern_is_refused(tmp_path):
    for path in ("x [1]/train.parquet", "train[1].parquet"):
        table(tmp_path / path, ["a", "b"])
        with pytest.raises(Refused, match="datasets reads as a pattern"):
            read(tmp_path / path)
    table(tmp_path / "T.PARQUET", ["a", "b"])
    assert len(read(tmp_path / "T.PARQUET")[0].all) == 2


def test_a_webdataset_beside_pictures_is_refused_and_an_archive_of_pictures_left_aside(tmp_path):
    for i in range(2):
        (tmp_path / f"preview{i}.png").write_bytes(png())
    archive(tmp_path / "photos.tar", {f"{i}.png": png() for i in range(3)})
    assert len(read(tmp_path)[0]) == 2
    pairs = {f"{i}.{ending}": content for i in range(3) for ending, content in (("png", png()), ("cls", b"1"))}
    archive(tmp_path / "shard.tar", pairs)
    with pytest.raises(Refused, match="image files and archives of a webdataset"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("label", "'label' holds classes, no images"),
        ("number", "'number' holds int64, no images"),
        ("size", "'size' holds "),
        (None, None),
        ("file", "no image of split 'train' can be decoded"),
    ],
)
def test_a_column_that_holds_no_images_is_refused(column, said, tmp_path):
    table(tmp_path / "x.parquet", ["a", "b"], number=[1, 2], size=[[1, 2], [3, 4]], file=["a", "b"])
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train")
    kinds = rows.features.copy()
    kinds["label"] = datasets.ClassLabel(names=["a", "b"])
    rows.cast(kinds).to_parquet(tmp_path / "x.parquet")
    if said is None:
        assert len(read(tmp_path / "x.parquet")[0].all) == 2
    else:
        with pytest.raises(Refused, match=said):
            read(tmp_path / "x.parquet", image_column=column)


def test_what_datasets_says_is_told_with_its_cause(tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise ValueError("An error occurred while generating the dataset") from OSError("column 3 is torn")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(Refused, match="generating the dataset; because: column 3 is torn"):
        read("org/data")


def test_a_cache_that_cannot_be_written_is_not_the_datas_fault(tmp_path, monkeypatch):
    table(tmp_path / "train.parquet", ["a", "b"])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(Failed, match="where datasets keeps what it reads, cannot be written; set HF_HOME"):
        read(tmp_path / "train.parquet")
    tree(tmp_path / "photos", {"a": 2})  # a folder of images needs no such place
    assert len(read(tmp_path / "photos")[0]) == 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"splits": "none"}, "splits"),
        ({"labels": "x.csv"}, "labels"),
    ],
)
def test_what_is_for_folders_is_refused_elsewhere(given, named, tmp_path):
    table(tmp_path / "train.parquet", ["a", "b"])
    with pytest.raises(Refused, match=f"data.{named}: this is for folders of images"):
        read(tmp_path / "train.parquet", **given)
    tree(tmp_path / "photos", {"a": 2})
    for name in ("image_column", "name"):
        with pytest.raises(Refused, match=f"data.{name}: this is for data sets"):
            read(tmp_path / "photos", **{name: "x"})
    with pytest.raises(Refused, match="several are united only if each is a folder of images"):
        read([tmp_path / "photos", tmp_path / "train.parquet"])


LABELLED, PLAIN = ["a", "b", "a"], [None] * 3


@pytest.mark.parametrize(
    ("splits", "options", "tuning", "expected"),
    [
        # settings are chosen on a labelled validation split beside a labelled test split
        ({"train": LABELLED, "validation": LABELLED, "test": LABELLED}, {}, False, "training validation test"),
        # ImageNet: what the test split does not tell, the validation split does
        ({"train": LABELLED, "validation": LABELLED, "test": PLAIN}, {}, False, "training test not_used"),
        ({"train": LABELLED, "validation": LABELLED}, {}, False, "training test"),
        ({"train": LABELLED, "validation": PLAIN, "test": LABELLED}, {}, False, "training not_used test"),
        ({"train": PLAIN, "validation": PLAIN, "test": PLAIN}, {}, False, "training not_used test"),
        (
            {"train": LABELLED, "validation": LABELLED, "test": LABELLED},
            {"test_split": "validation"},
            False,
            "training test not_used",
        ),
        ({"train": LABELLED, "test": LABELLED}, {"test_split": "none"}, False, "training not_used"),
        # a classifier is chosen on a validation split, and measured on a test split
        ({"train": LABELLED, "validation": LABELLED, "test": LABELLED}, {}, True, "training validation test"),
        ({"train": LABELLED, "validation": LABELLED}, {}, True, "training validation"),
        ({"train": LABELLED, "test": LABELLED}, {}, True, "training test"),
        ({"train": LABELLED, "validation": LABELLED, "test": PLAIN}, {}, True, "training validation not_used"),
        ({"train": LABELLED, "validation": PLAIN, "test": LABELLED}, {}, True, "training not_used test"),
    ],
)
def test_what_each_split_is_for(splits, options, tuning, expected, tmp_path):
    for name, labels in splits.items():
        table(tmp_path / f"{name}.parquet", labels)
    found, _ = S.read(Data(path=str(tmp_path)))
    told = uses(Data(path=str(tmp_path), **options), found, tuning)
    assert [told.of(name).replace(" ", "_") for name in splits] == expected.split()


def test_a_validation_split_is_held_out_and_never_trained_on(tmp_path):
    tree(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 1, "test/a": 1})
    train, test = read(tmp_path)
    assert [train.paths[i].split("/")[0] for i in train.train.tolist()] == ["train"] * 6
    assert [train.paths[i].split("/")[0] for i in train.val.tolist()] == ["val"] * 3
    assert (classes(train), classes(test)) == ({"a": 5, "b": 4}, {"a": 1})


def test_a_home_that_cannot_be_written_is_no_traceback(tmp_path):
    tree(tmp_path / "data", {"a": 2})
    table(tmp_path / "train.parquet", ["a", "b"])
    (tmp_path / "home").write_text("")
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    done = command("training", "--data.path", tmp_path / "train.parquet", "--run", tmp_path / "run", env=home)
    said = done.stderr.splitlines()  # Matplotlib has a word on it, too
    assert (done.returncode, sum("error" in line for line in said), "Traceback" in done.stderr) == (1, 1, False)
    assert "set HF_HOME" in said[-1]


def test_a_path_may_be_of_any_bytes(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9 [2020]")
    for i in range(3):
        write_png(root / f"{i}.png", np.full((12, 12, 3), i))
    assert len(read(root)[0]) == 3
