"""Labels: what tables and metadata files tell of images, in whatever way they are written."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_folders import by_path, picture, read, tree
from training import labels as L
from training.files import Refused
from training.names import escape, unescape


def labelled_flat(root):
    return tree(root, {".": 6})


def test_metadata_gives_labels_and_what_it_does_not_list_stays(tmp_path):
    labelled_flat(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\n00.png,x\n01.png,y\n02.png,\n77.png,x\n")
    found, _ = read(tmp_path)
    assert by_path(found) == {
        "00.png": "x", "01.png": "y", "02.png": None, "03.png": None, "04.png": None, "05.png": None, "77.png": None,
    }  # fmt: skip
    assert found.bad == [("train", "77.png", "listed, but missing")]
    account = found.account["train"]
    assert (account["found"], account["missing"], account["read"], account["bad"], account["left_aside"]) == (
        7,
        1,
        6,
        1,
        1,
    )


def test_more_than_one_class_for_an_image_is_refused_where_it_is_asked_for(tmp_path):
    root = tree(tmp_path, {"p": 2, "q": 2})
    (root / "metadata.jsonl").write_text('{"file_name": "p/00.png", "label": ["a", "b"]}\n')
    with pytest.raises(Refused, match="more than one class"):
        read(root, label_column="label")
    found, _ = read(root)  # as in a table of images, where nobody asked for that column
    assert set(by_path(found).values()) == {"p", "q"}


def test_metadata_comes_before_folders_where_it_has_the_column_and_else_not(tmp_path):
    tree(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    rows = [{"file_name": f"{c}/0{i}.png", "label": "ab"[c == "a"], "size": i} for c in "ab" for i in range(2)]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test" / "metadata.csv").write_text("file_name,size\na/00.png,1\n")
    train, test = read(tmp_path)
    assert by_path(train) == {
        "train/a/00.png": "b",
        "train/a/01.png": "b",
        "train/b/00.png": "a",
        "train/b/01.png": "a",
    }
    assert by_path(test) == {"test/a/00.png": "a", "test/b/00.png": "b"}
    sized, _ = read(tmp_path, label_column="size")
    assert set(by_path(sized).values()) == {"0", "1"}


@pytest.mark.parametrize("form", ["comma", "tabs", "jsonl", "Parquet", "two columns"])
def test_a_table_gives_labels(form, tmp_path):
    root = tree(tmp_path / "data", {"p": 3, "q": 3})
    picture(root / "q" / "odd\tname.png")
    rows = [("p/00.png", "x"), ("p/01.png", "y"), ("q/02.png", "x"), (r"q/odd\tname.png", "y")]
    table = tmp_path / f"t.{form if form in ('jsonl', 'Parquet') else 'csv'}"
    if form == "Parquet":
        pq.write_table(pa.table({"file": [f for f, _ in rows], "kind": [k for _, k in rows]}), table)
    elif form == "jsonl":
        table.write_text("".join(json.dumps({"file": f, "kind": k}) + "\n" for f, k in rows))
    else:
        mark, head = {"comma": (",", "file_name,kind"), "tabs": ("\t", "path\tkind"), "two columns": (";", "image;x")}[
            form
        ]
        table.write_text("\n".join([head, *(mark.join(row) for row in rows)]) + "\n")
    column = {} if form == "two columns" else {"label_column": "kind"}
    found, _ = read(root, labels=str(table), **column)
    labels = by_path(found)
    assert {path: label for path, label in labels.items() if label} == dict(rows)
    assert len(labels) == 7  # those not in the table stay, unlabelled


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\nzzz.png,a\n", "none of the 1 files"),
        ("file_name,label\n00.png,a\n00.png,b\n", "two labels"),
        ("a,b,c\n1,2,3\n", "has the columns a, b, c"),
        ("file,label\n00.png,a,b\n", "a row has more cells"),
        ("", "no rows"),
    ],
)
def test_a_table_that_tells_nothing_is_refused(text, said, tmp_path):
    root = labelled_flat(tmp_path / "data")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Refused, match=said):
        read(root, labels=str(tmp_path / "t.csv"))


def test_a_workbook_is_refused_with_what_would_be_read(tmp_path):
    (tmp_path / "t.XLSX").write_bytes(b"PK\3\4")
    with pytest.raises(Refused, match=r"t\.XLSX cannot be read as a table: it is a workbook; save it as CSV\."):
        read(labelled_flat(tmp_path / "data"), labels=str(tmp_path / "t.XLSX"))


def test_what_a_table_lists_and_nobody_finds_is_bad(tmp_path):
    root = tree(tmp_path / "data", {"train": 3, "test": 2})
    (tmp_path / "t.csv").write_text("file,label\ntrain/00.png,a\ntrain/01.png,b\ntest/00.png,a\ntest/09.png,b\n")
    train, test = read(root, labels=str(tmp_path / "t.csv"))
    assert by_path(train) == {"train/00.png": "a", "train/01.png": "b", "train/02.png": None}
    assert test.bad == [("test", "test/09.png", "listed, but missing")]
    assert train.account["test"]["missing"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "file_name, label\n00.png, x\n01.png ,y \n"),
        ("t.csv", "sep=;\nfile_name;label\n00.png;x\n01.png;y\n"),
        ("t.csv", "Image,Class\r\n00.png,x\r\n01.png,y\r\n"),
        ("t.csv", "\ufefffile_name,label\n.\\00.png,x\n./01.png,y\n"),
        ("t.csv", "file_name,label\n00.png,x\n01.png,y\n".encode("utf-16")),
        ("t.jsonl", '{"file": "02.png"}\n{"file": "00.png", "label": "x"}\n{"file": "01.png", "label": "y"}\n'),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_tables_are_read_as_programs_write_them(name, content, beside, tmp_path):
    root = labelled_flat(tmp_path / "data")
    table = root / f"metadata.{name[2:]}" if beside else tmp_path / name
    if beside and isinstance(content, str):
        content = content.replace("Image,", "file_name,").replace('"file"', '"file_name"')
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, _ = read(root, **({} if beside else {"labels": str(table)}))
    assert {path: label for path, label in by_path(found).items() if label} == {"00.png": "x", "01.png": "y"}
    assert found.bad == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,label\n00.png,Äpfel\n".encode("cp1252"), r"the label \\xc4pfel is not in UTF-8"),
        (b"file_name,label\n00.png,a\n00.png,b\n", r"metadata\.csv gives 00\.png two labels"),
        (b"file_name,label\n,a\n", r"metadata\.csv has a row that names no file"),
    ],
)
def test_what_metadata_cannot_mean_is_refused(content, said, tmp_path):
    root = labelled_flat(tmp_path)
    (root / "metadata.csv").write_bytes(content)
    with pytest.raises(Refused, match=said):
        read(root)


def test_what_metadata_list_in_no_split_is_missing(tmp_path):
    tree(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1})
    (tmp_path / "metadata.csv").write_text("file_name,label\n00.png,x\ntrain/a/00.png,y\ntest/a/09.png,x\n")
    train, test = read(tmp_path)
    assert [path for _, path, _ in train.bad] == ["00.png"]
    assert [path for _, path, _ in test.bad] == ["test/a/09.png"]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("cat", "cat"),
        (" cat ", "cat"),
        (3, "3"),
        (-1, None),
        ("-1", None),
        (-1.0, None),
        (float("nan"), None),
        ("", None),
        (None, None),
        (b"cat", "cat"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
    ],
)
def test_a_label_is_the_same_whatever_it_is_written_in(value, label):
    assert L.label_of(value) == label


def test_a_metadata_file_may_be_parquet(tmp_path):
    root = labelled_flat(tmp_path)
    pq.write_table(pa.table({"file_name": ["00.png", "01.png"], "label": [1, 0]}), root / "metadata.parquet")
    assert [label for label in by_path(read(root)[0]).values() if label] == ["1", "0"]


@pytest.mark.parametrize("name", ["caf\udce9", "a\tb\nc\rd", "back\\x41slash", "\x85\u2028", "plain é", "\\\\", "\x7f"])
def test_escaped_paths_are_one_line_of_text_and_come_back(name):
    written = escape(name)
    assert unescape(written) == name
    assert written.encode()
    assert written.splitlines() == [written]
    assert "\t" not in written
