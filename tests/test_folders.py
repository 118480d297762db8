"""Folders: what is a split, a class, a label; every file is read, listed as bad, or said to be left aside."""

import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import call, tiny_run, write_png
from training import images as I
from training import records, report
from training.__main__ import main
from training.files import Refused, read_json
from training.recipe import Data


def picture(path, value=100, side=12):
    write_png(path, np.full((side, side, 3), value))


def tree(root, spec, start=0):
    """Make folders of pictures: {"a/b": 3} is three pictures in a/b."""
    for place, count in spec.items():
        for i in range(start, start + count):
            picture(root / place / f"{i:02d}.png", 10 + i)
    return root


def read(path, folder=None, tuning=False, **changes):
    paths = list(map(str, path)) if isinstance(path, list) else str(path)
    return I.load_splits(Data(**{"path": paths, "size": 12, "max_bad_fraction": 1.0, **changes}), folder, tuning)


def by_path(found):
    """The class of each path."""
    names = found.label_names or []
    labels = [-1] * len(found) if found.labels is None else found.labels.tolist()
    return {path: names[label] if label >= 0 else None for path, label in zip(found.paths, labels, strict=True)}


def classes(found):
    """How many images each class has."""
    told = list(by_path(found).values())
    return {name: told.count(name) for name in dict.fromkeys(told)}


@pytest.mark.parametrize(
    ("spec", "options", "train", "test"),
    [
        # one split: names of splits that not all top-level folders bear are classes
        ({"bicycle": 4, "bus": 4, "train": 4}, {}, {"bicycle": 4, "bus": 4, "train": 4}, None),
        ({"control": 3, "test": 3}, {}, {"control": 3, "test": 3}, None),
        ({"dog": 2, "cat": 3, "empty": 0}, {}, {"cat": 3, "dog": 2}, None),
        ({"val": 2, "test": 3}, {}, {"test": 3, "val": 2}, None),
        ({"flowers/flowers/rose": 2, "flowers/flowers/tulip": 3}, {}, {"rose": 2, "tulip": 3}, None),
        ({"dog/husky": 2, "dog/pug/old": 1, "cat": 2, ".": 1}, {}, {None: 1, "cat": 2, "dog": 3}, None),
        ({".": 5}, {}, {None: 5}, None),
        ({"only": 5}, {}, {None: 5}, None),
        # splits
        ({"train/a": 2, "train/b": 3, "test/a": 1, "test/b": 1}, {}, {"a": 2, "b": 3}, {"a": 1, "b": 1}),
        ({"Training/a": 2, "Training/b": 3, "TEST/a": 1}, {}, {"a": 2, "b": 3}, {"a": 1}),
        ({"photos/train/a": 2, "photos/train/b": 3, "photos/val/b": 1}, {}, {"a": 2, "b": 3}, {"b": 1}),
        ({"train/a": 2, "train/b": 3, "test": 4}, {}, {"a": 2, "b": 3}, {None: 4}),
        ({"train": 4, "test": 2}, {}, {None: 4}, {None: 2}),
        ({"train/a": 2, "train/b": 2}, {}, {"a": 2, "b": 2}, None),
        ({"photos/test/a": 2, "photos/test/b": 1}, {}, {"a": 2, "b": 1}, None),
        # named by the user
        (
            {"training/a": 2, "training/b": 3, "holdout/a": 1, "holdout/b": 1},
            {"split": "training", "test_split": "holdout"},
            {"a": 2, "b": 3},
            {"a": 1, "b": 1},
        ),
        ({"x/a": 2, "x/b": 2, "y/a": 1}, {"split": "x"}, {"a": 2, "b": 2}, None),
        ({"train/a": 2, "train/b": 2, "test/a": 1}, {"test_split": "none"}, {"a": 2, "b": 2}, None),
        ({"train/a": 2, "holdout/a": 1}, {"splits": "none"}, {"holdout": 1, "train": 2}, None),
        ({"train": 2, "test": 1}, {"splits": "none"}, {"test": 1, "train": 2}, None),
        ({"train2017": 2, "val2017": 1}, {"splits": "none"}, {"train2017": 2, "val2017": 1}, None),
        (
            {"freight train": 2, "test tube": 1, "cat": 1, "dog": 1},
            {},
            {"freight train": 2, "test tube": 1, "cat": 1, "dog": 1},
            None,
        ),
    ],
)
def test_splits_and_classes(spec, options, train, test, tmp_path):
    found, tested = read(tree(tmp_path, spec), **options)
    assert classes(found) == {k: train[k] for k in classes(found)}
    assert sum(train.values()) == len(found)
    assert (None if tested is None else classes(tested)) == test
    assert all(len(source.all) == len(source) for source in (found, tested) if source)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ({"train/a": 2, "training/a": 2}, {}, "two names of one split"),
        ({"train/a": 2, "val/a": 1, "dev/a": 1}, {}, "two names of one split"),
        ({"train/a": 2, "test/a": 1, ".": 1}, {}, "images beside the folders of its splits"),
        (
            {"training/a": 2, "training/b": 2, "holdout/a": 1},
            {},
            r"--data\.split and --data\.test_split.*--data\.splits",
        ),
        ({"train/a": 2, "train/b": 2, "test/a": 1}, {"test_split": "train"}, "is the split to train on, too"),
        ({"train/a": 2, "train/b": 2, "test/c": 1}, {}, "the split 'test' has the class 'c', which is not among"),
        (
            {"train/a": 2, "train/b": 2, "val/c": 1, "test/a": 1},
            {},
            "the split 'val' has the class 'c', which is not among",
        ),
        ({"train2017": 2, "val2017": 1}, {}, "train2017 and val2017 in .* look like splits"),
        ({"seg_train/a": 2, "seg_test/a": 1, "seg_pred": 2}, {}, "seg_train and seg_test in .* look like splits"),
        ({"train/a": 2, "train/b": 2}, {"test_split": "exam"}, r"data\.test_split: .* no split 'exam'; it has 'train'"),
        ({"a": 2, "b": 2}, {"label_column": "kind"}, r"data\.label_column"),
        ({"train/a": 3, "train/b": 3, "val/a": 1, "test/a": 1}, {"val_fraction": 0.2}, r"data\.val_fraction"),
    ],
)
def test_what_cannot_be_told_is_refused(spec, options, said, tmp_path):
    with pytest.raises(Refused, match=said):
        read(tree(tmp_path, spec), **options)


def test_files_of_a_split_that_is_not_used_are_counted_too(tmp_path):
    tree(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 3})
    for place in ("test", ""):
        (tmp_path / place / "notes.txt").write_text("no image")
    found, _ = read(tmp_path, test_split="none")
    assert found.account["test"] == {"use": "not used", "images": 3, "left_aside": 1}
    assert found.account["beside the splits"] == {"use": "not used", "left_aside": 1}
    told = "train: training (4 read); test: not used (3 images, 1 no images); beside the splits: not used (1 no images)"
    assert report.splits_line(found.account) == told


def test_what_cannot_be_opened_beside_the_splits_is_counted_there(tmp_path):
    tree(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1})
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    train, test = read(tmp_path)
    assert (len(train), len(test), train.account["beside the splits"]["left_aside"]) == (4, 1, 1)


def test_classes_that_the_limit_does_not_draw_are_classes_all_the_same(tmp_path):
    spec = {f"{split}/c{i}": 2 for split in ("train", "test") for i in range(10)}
    train, test = read(tree(tmp_path, spec), limit=4)
    assert (len(train), len(test)) == (4, 20)
    assert train.label_names == test.label_names == [f"c{i}" for i in range(10)]


def test_a_name_of_a_split_inside_a_file_name_means_nothing(tmp_path):
    tree(tmp_path, {"cat": 20, "dog": 19})
    picture(tmp_path / "dog" / "dog_at_train_station.png")
    picture(tmp_path / "dog" / "test.png")
    assert classes(read(tmp_path)[0]) == {"cat": 20, "dog": 21}


def ugly(root):
    """Everything odd that a folder may hold; (number of good images, paths of bad ones, number of other files)."""
    tree(root, {"cat": 3, "dog/husky": 2})
    grey = Image.new("L", (12, 12), 50)
    for name, kind in (("webp", "WEBP"), ("photo.txt", "JPEG"), ("wrong.jpg", "PNG"), ("a.avif", "AVIF")):
        grey.save(root / "cat" / name, kind)
    picture(root / "cat" / "[2020] b*?.png")
    picture(root / "cat" / "two\nlines\tand a tab.png")
    picture(root / "dog" / os.fsdecode(b"caf\xe9.png"))
    picture(root / "dog" / "back\\slash.png")
    # links: to a file, to a folder, to nothing, to a folder above
    elsewhere = root.parent / "elsewhere"
    tree(elsewhere, {"bird": 2})
    (root / "cat" / "linked.png").symlink_to(elsewhere / "bird" / "00.png")
    (root / "bird").symlink_to(elsewhere / "bird")
    (root / "dog" / "loop").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(root / "nowhere")
    # what is not readable
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "text.jpg").write_text("no image")
    (root / "cat" / "new.jxl").write_bytes(b"\xff\x0a123")
    (root / "cat" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "dog" / "raw.DNG").write_bytes(b"II*\0")
    nan = np.full((12, 12), 0.5, np.float32)
    nan[0, 0] = np.nan
    Image.fromarray(nan).save(root / "dog" / "nan.tif")
    os.mkfifo(root / "dog" / "pipe.png")
    # what is no image
    for name in ("a.txt", "a.json", "a.xml", "cat/Thumbs.db", "cat/more.zip", "notes/list.md", "dog/features.parquet"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\xd0\xcf\x11\xe0 other")
    # what is hidden
    picture(root / ".thumbnails" / "a.png")
    (root / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "._00.png").write_bytes(b"x")
    good = 3 + 2 + 4 + 2 + 2 + 1 + 2
    bad = ["cat/empty.png", "cat/text.jpg", "cat/new.jxl", "cat/phone.heic"]
    bad += ["dog/raw.DNG", "dog/nan.tif", "dog/pipe.png", "dog/gone.png"]
    return good, bad, 7 + 1  # the loop is no image, either


def test_every_file_of_an_ugly_tree_is_accounted_for(tmp_path):
    root = tmp_path / "[ugly] photos"
    good, bad, others = ugly(root)
    found, _ = read(root)
    account = found.account["train"]
    assert account["found"] + account["missing"] == sum(account[k] for k in ("read", "not_drawn", "bad", "left_aside"))
    assert (account["read"], account["bad"], account["left_aside"]) == (good, len(bad), others)
    assert len(found.all) == good
    assert {path for _, path, _ in found.bad} == set(bad)
    reasons = {path: reason for _, path, reason in found.bad}
    assert reasons["dog/gone.png"] == "broken link"
    assert reasons["dog/pipe.png"] == "not a file"
    assert "not finite" in reasons["dog/nan.tif"]
    assert "camera raw" in reasons["dog/raw.DNG"]
    listed = I.write_bad(tmp_path, found.bad).read_text().splitlines()
    assert [line.count("\t") for line in listed] == [2] * len(bad)
    labels = by_path(found)
    assert labels["dog/husky/00.png"] == "dog"
    assert labels["bird/01.png"] == "bird"
    assert labels["cat/linked.png"] == "cat"
    assert {r"dog/caf\xe9.png", r"cat/two\nlines\tand a tab.png", r"dog/back\\slash.png"} <= labels.keys()
    part, _ = read(root, limit=12)
    told = part.account["train"]
    assert told["not_drawn"] == good + len(bad) - 12
    assert told["found"] == sum(told[k] for k in ("read", "not_drawn", "bad", "left_aside"))


def test_the_real_command_tells_what_it_read(tmp_path):
    root = tmp_path / "photos"
    good, bad, others = ugly(root)
    tree(root, {"cat": 20, "dog/pug": 20}, start=20)
    options = ["--data.max_bad_fraction", "0.5", "--proxy.epochs", "1", "--relearn.epochs", "1"]
    done = tiny_run(tmp_path / "run", root, *options)
    assert done.returncode == 0, done.stderr
    line = f"train: training ({good + 40} read, {len(bad)} bad, {others} no images)"
    assert line in done.stdout
    assert line in (tmp_path / "run" / "report.md").read_text()
    told = read_json(tmp_path / "run" / "data.json")["splits"]["train"]
    assert (told["use"], told["read"], told["bad"]) == ("training", good + 40, len(bad))
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == len(bad)
    assert (tmp_path / "run" / "round_1" / "labels.parquet").exists()


def test_several_folders_are_one_and_their_classes_united_by_name(tmp_path):
    tree(tmp_path / "one" / "pets", {"cat": 2, "dog": 2})
    tree(tmp_path / "two" / "pets", {"dog": 3, "fox": 1}, start=50)
    found, _ = read([tmp_path / "one" / "pets", tmp_path / "two" / "pets"])
    assert classes(found) == {"cat": 2, "dog": 5, "fox": 1}
    assert len(set(found.paths)) == 8
    tree(tmp_path / "three", {"train/cat": 1, "train/dog": 1, "test/fox": 1})
    train, test = read([tmp_path / "one" / "pets", tmp_path / "two" / "pets", tmp_path / "three"])
    assert classes(train) == {"cat": 3, "dog": 6, "fox": 1}
    assert classes(test) == {"fox": 1}


def test_a_folder_keeps_its_fingerprint_when_it_is_moved(tmp_path):
    tree(tmp_path / "one", {"cat": 2, "dog": 2})
    before = read(tmp_path / "one")[0].fingerprint
    shutil.move(tmp_path / "one", tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere")[0].fingerprint == before


def test_classes_are_numbered_as_people_count(tmp_path):
    tree(tmp_path, {str(i): 1 for i in range(12)})
    assert read(tmp_path)[0].label_names == [str(i) for i in range(12)]


# The same images in every form


def digits(count):
    bunch = load_digits()
    order = np.argsort(bunch.target[:count], kind="stable")
    pictures = [Image.fromarray((bunch.images[i] * 255 / 16).round().astype(np.uint8)) for i in order]
    return pictures, bunch.target[:count][order].tolist()


def as_parquet(path, pictures, labels):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=kinds).to_parquet(path)


def as_folders(path, pictures, labels):
    for i, (image, label) in enumerate(zip(pictures, labels, strict=True)):
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(path / str(label) / f"{i:04d}.png")


def as_flat(path, pictures, labels):
    path.mkdir(parents=True)
    for i, image in enumerate(pictures):
        image.save(path / f"{i:04d}.png")
    return "file_name,label\n" + "".join(f"{i:04d}.png,{label}\n" for i, label in enumerate(labels))


MEASURE = ["--data.size", "8", "--evaluate.linear_c", "[0.1]", "--evaluate.knn_k", "[5]", "--evaluate.shots", "[]"]
MEASURE += ["--proxy.epochs", "0"]
MEASURE += ["--relearn.rounds", "0", "--model.name", "test_resnet", "--model.args", "{output_stride: 8}"]


def same_everywhere(found, runs, split="train"):
    """Equal pixels, labels and measured values."""
    first, *others = found
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert np.array_equal(a.pixels.flat.numpy(), b.pixels.flat.numpy())
            assert a.labels.tolist() == b.labels.tolist()
            assert a.label_names == b.label_names
    values = []
    for options, run in runs:
        done = call(main, *MEASURE, *options, "--run", run)
        assert done.returncode == 0, done.stderr
        values.append(
            [(r["protocol"], r["stage"], r["split"], r["value"]) for r in records.read(run / "records.jsonl")]
        )
    assert all(value == values[0] for value in values)
    assert len(values[0]) > 20


def test_one_split_is_the_same_in_every_form(tmp_path):
    pictures, labels = digits(300)
    as_folders(tmp_path / "folders", pictures, labels)
    as_parquet(tmp_path / "one.parquet", pictures, labels)
    table = as_flat(tmp_path / "metadata", pictures, labels)
    (tmp_path / "metadata" / "metadata.csv").write_text(table)
    as_flat(tmp_path / "table", pictures, labels)
    (tmp_path / "t.csv").write_text(table)
    forms = [{"path": "folders"}, {"path": "one.parquet"}, {"path": "metadata"}, {"path": "table", "labels": "t.csv"}]
    forms = [{name: str(tmp_path / value) for name, value in form.items()} for form in forms]
    found = [(I.load_splits(Data(size=8, **form), None)[0],) for form in forms]
    runs = [
        ([x for name, value in form.items() for x in (f"--data.{name}", value)], tmp_path / "runs" / str(i))
        for i, form in enumerate(forms)
    ]
    same_everywhere(found, runs)


def test_three_splits_are_the_same_in_every_form(tmp_path):
    pictures, labels = digits(300)
    for number, split in enumerate(("train", "validation", "test")):
        chosen = [i for i in range(300) if i % 5 in ((0, 1, 2), (3,), (4,))[number]]
        part, classes = [pictures[i] for i in chosen], [labels[i] for i in chosen]
        as_folders(tmp_path / "folders" / split, part, classes)
        as_parquet(tmp_path / "parquet" / f"{split}.parquet", part, classes)
    paths = [str(tmp_path / name) for name in ("folders", "parquet")]
    found = [I.load_splits(Data(path=path, size=8), None) for path in paths]
    assert [len(found[0][0].train), len(found[0][0].val), len(found[0][1])] == [180, 60, 60]
    same_everywhere(found, [(["--data.path", path], tmp_path / "runs" / str(i)) for i, path in enumerate(paths)])
