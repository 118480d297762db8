"""Folders of images, walked: splits, classes, labels, and an account of every file.

README's section "Your own images" states the rules. Paths are kept as bytes that are not UTF-8 allow (surrogates), and
written as `escape` has them.
"""

import csv
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .files import Refused
from .pixels import is_image_file
from .recipe import Data

LABEL_COLUMNS = ("label", "labels", "fine_label")
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
Rows = list[dict[str, Any]]
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
# What ends a line or a column somewhere, and what stands for a byte that is not UTF-8.
_UNSAFE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff]")
_ESCAPED = re.compile(r"\\(\\|t|n|r|x[0-9a-f]{2}|u[0-9a-f]{4})")
_SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escape(path: str) -> str:
    r"""A path as it is written: backslashes, control characters and bytes not of UTF-8 as ``\\ \t \n \u0085 \xe9``."""

    def one(found: re.Match) -> str:
        mark = found.group()
        code = ord(mark)
        if code < 0x80:
            return _SHORT.get(mark) or f"\\x{code:02x}"
        return f"\\x{code - 0xDC00:02x}" if code >= 0xDC80 else f"\\u{code:04x}"

    return _UNSAFE.sub(one, path)


def unescape(text: str) -> str:
    """What `escape` made of a path, back."""

    def one(found: re.Match) -> str:
        mark = found.group(1)
        if mark[0] in "xu":
            code = int(mark[1:], 16)
            return chr(code + 0xDC00) if mark[0] == "x" and code >= 0x80 else chr(code)
        return {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}[mark]

    return _ESCAPED.sub(one, text)


def canonical(name: str) -> str | None:
    """ "train", "validation" or "test" for a name that means it, None for any other."""
    return SPLIT_NAMES.get(name.lower())


@dataclass
class FolderSource:
    """The images of a split, as files.

    Attributes:
        files: where each is; "" for one that is listed but missing.
        paths: how each is written: relative to data.path, escaped.
        faults: why an entry cannot be read, by position.
        labels: the class of each, None where unknown; None without labels.
        missing: how many are listed but not there.
        left_aside: how many files are no images, by ending.
    """

    files: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    labels: list[str | None] | None = None
    names: None = None  # the classes are those that occur
    missing: int = 0
    left_aside: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, positions: list[int]) -> list[int]:
        """What `read` is given for each position."""
        return positions

    def read(self, row: int) -> tuple[str, bytes, str]:
        """(path, content, why there is none)."""
        if row in self.faults:
            return self.paths[row], b"", self.faults[row]
        try:
            content = Path(self.files[row]).read_bytes()
        except OSError as error:
            return self.paths[row], b"", error.strerror or "cannot be read"
        return self.paths[row], content, "" if content else "empty file"

    def add(self, other: "FolderSource") -> None:
        """Append the images of the same split of another folder."""
        if self.labels is not None or other.labels is not None:
            self.labels = (self.labels or [None] * len(self)) + (other.labels or [None] * len(other))
        self.faults |= {len(self) + position: why for position, why in other.faults.items()}
        self.files += other.files
        self.paths += other.paths
        self.missing += other.missing
        self.left_aside += other.left_aside


@dataclass
class Tree:
    """What lies in a folder.

    Attributes:
        images: path relative to the folder -> why it cannot be read, "" for what is to be tried; in order of path.
        others: paths of files that are no images, and of links that lead back to a folder above them.
        metadata: paths of files of the ``file_name`` convention.
    """

    images: dict[str, str]
    others: list[str]
    metadata: list[str]


def walk(root: str) -> Tree:
    """Every file under a folder that is not hidden, links followed."""
    images, others, metadata = {}, [], []
    stack: list[tuple[str, frozenset]] = [("", frozenset())]
    while stack:
        place, above = stack.pop()
        folder = os.path.join(root, place)
        try:
            status = os.stat(folder)
            names = sorted(os.listdir(folder))
        except OSError as error:
            images[place] = f"folder cannot be opened: {error.strerror}"
            continue
        here = above | {(status.st_dev, status.st_ino)}
        for name in names:
            if name.startswith("."):
                continue
            path, full = os.path.join(place, name), os.path.join(folder, name)
            try:
                status = os.stat(full)
            except OSError as error:
                images[path] = "broken link" if os.path.islink(full) else f"cannot be opened: {error.strerror}"
                continue
            if stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in here:
                    others.append(path)  # a link to a folder above it, which is being read already
                else:
                    stack.append((path, here))
            elif is_image_file(full, stat.S_ISREG(status.st_mode)):
                images[path] = "" if stat.S_ISREG(status.st_mode) else "not a file"
            else:
                others.append(path)
                if name in METADATA:
                    metadata.append(path)
    return Tree({path: images[path] for path in sorted(images, key=lambda path: path.split("/"))}, others, metadata)


def read(roots: list[str], trees: list[Tree], data: Data) -> tuple[dict[str, FolderSource], int]:
    """The splits of folders of images, united by name, and how many files lie beside all splits.

    Args:
        roots: the folders.
        trees: what lies in each.
        data: what was asked for.

    Raises:
        Refused: what is a split cannot be told, or labels cannot be read.
    """
    given = Labels(data.labels, data.label_column) if data.labels else None
    result: dict[str, FolderSource] = {}
    told = False  # whether a metadata file has the column of labels
    beside, bases = 0, [os.path.basename(os.path.abspath(root)) for root in roots]
    for number, (root, tree) in enumerate(zip(roots, trees, strict=True)):
        # One folder's paths are told from it on, so that it can be moved; of several each is told with its name.
        name = bases[number] + (f" ({number + 1})" if bases.count(bases[number]) > 1 else "")
        prefixes, base = splits_of(root, tree, data)
        metadata = {file: _rows(os.path.join(root, file)) for file in tree.metadata}
        told = told or any(rows and data.label_column in rows[0] for rows in metadata.values())
        found = {split: _source(root, tree, metadata, prefix, base, data) for split, prefix in prefixes.items()}
        inside = [prefix for prefix in prefixes.values() if prefix]
        everywhere = "" in prefixes.values()
        beside += 0 if everywhere else sum(not path.startswith(tuple(inside)) for path in tree.others)
        if given:
            given.of(root, found.values())
        for split, source in found.items():
            if len(roots) > 1:
                source.paths = [escape(name) + "/" + path for path in source.paths]
            result.setdefault(split, FolderSource()).add(source)
    if given:
        given.finish(result)
    elif data.label_column and not told:
        raise Refused(f"data.label_column: no metadata file has a column {data.label_column!r}, and no table is given.")
    return result, beside


def splits_of(root: str, tree: Tree, data: Data) -> tuple[dict[str, str], str]:
    """The prefix of each split's paths, by the split's name, and the folder below which classes lie in a lone split.

    Raises:
        Refused: what is a split cannot be told.
    """
    asked = {name for name in (data.split, data.test_split) if name and name != "none"}
    base, where = "", escape(root)
    while True:
        below = [path[len(base) :] for path in tree.images]
        tops = list(dict.fromkeys(path.split("/")[0] for path in below if "/" in path))
        loose = [path for path in below if "/" not in path]
        if loose or len(tops) != 1 or canonical(tops[0]) or tops[0] in asked:
            break
        base += tops[0] + "/"
    whole = {"train": ""}, base
    kinds = {top: canonical(top) for top in tops}
    training = [top for top in tops if kinds[top] == "train"]
    if data.splits == "none":
        return whole
    named = any(top in asked for top in tops) and not (training and all(kinds.values()))
    if named or (training and all(kinds.values())):
        if loose:
            raise Refused(
                f"data.path: {where} has images beside the folders of its splits, such as {escape(loose[0])}; move "
                "them into a split, or --data.splits none makes all of it one split, whose folders are classes."
            )
        for kind in () if named else set(kinds.values()):
            same = [top for top in tops if kinds[top] == kind]
            if len(same) > 1:
                raise Refused(
                    f"data.path: {' and '.join(map(escape, same))} in {where} are two names of one split; unite them, "
                    "name the ones to use by --data.split and --data.test_split, or --data.splits none makes each a "
                    "class."
                )
        return {escape(top): f"{base}{top}/" for top in tops}, base
    others = [top for top in tops if not kinds[top]]
    if others and any(path.startswith(f"{top}/") and path.count("/") > 1 for top in training for path in below):
        raise Refused(
            f"data.path: {where} has a folder {escape(training[0])} of class folders beside {escape(others[0])}, which "
            "is no name of a split; name the folders to use by --data.split and --data.test_split, or --data.splits "
            "none makes all of it one split, whose folders are classes."
        )
    return whole


def _source(root: str, tree: Tree, metadata: dict[str, Rows], prefix: str, base: str, data: Data) -> FolderSource:
    """A split, with the labels that its own metadata or folders give."""
    entries = {path: why for path, why in tree.images.items() if path.startswith(prefix)}
    labels: dict[str, str | None] | None = None
    missing: dict[str, str] = {}
    for file, rows in metadata.items():
        if not rows or "file_name" not in rows[0]:
            continue
        column = _label_column(rows[0], data.label_column)
        for row in rows:
            path = os.path.normpath(os.path.join(os.path.dirname(file), str(row["file_name"])))
            path = path if path in entries else unescape(path)
            if path.startswith(prefix) and path not in entries:
                missing[path] = "listed, but missing"
            if column and path in entries:
                labels = {} if labels is None else labels
                labels[path] = _label(row.get(column))
    entries |= missing
    if labels is not None:
        found = [labels.get(path) for path in entries]
    else:
        start = len(prefix or base)
        classes = [path[start:].split("/")[0] if "/" in path[start:] else None for path in entries]
        found = [None if name is None else escape(name) for name in classes] if any(classes) else None
    aside = Counter(_ending(path) for path in tree.others if path.startswith(prefix))
    return FolderSource(
        files=["" if path in missing else os.path.join(root, path) for path in entries],
        paths=[escape(path) for path in entries],
        faults={position: why for position, why in enumerate(entries.values()) if why},
        labels=found,
        missing=len(missing),
        left_aside=aside,
    )


def _ending(path: str) -> str:
    return escape(os.path.splitext(path)[1].lower()) or "no ending"


class Labels:
    """A table of file and label, ``--data.labels``.

    Args:
        file: CSV, TSV, JSONL or parquet.
        column: of labels; without one "label", "labels", "fine_label", or the only one beside the files.

    Raises:
        Refused: it cannot be read, or does not tell which column is which.
    """

    def __init__(self, file: str, column: str | None) -> None:
        if not Path(file).is_file():
            raise Refused(f"data.labels: {file} is not a file.")
        self.file, rows = file, _rows(file)
        if not rows:
            raise Refused(f"data.labels: {file} has no rows.")
        columns = list(rows[0])
        files = next((name for name in FILE_COLUMNS if name in columns), None)
        label = _label_column(rows[0], column) or (
            columns[1 - columns.index(files)] if len(columns) == 2 and files else None
        )
        if column and column not in columns:
            raise Refused(f"data.label_column: {file} has no column {column!r}; it has {', '.join(columns)}.")
        if files is None or label is None:
            raise Refused(
                f"data.labels: {file} has the columns {', '.join(columns)}; the one of files is to be called "
                "file_name, that of labels label, or as data.label_column says."
            )
        self.labels: dict[str, str | None] = {}
        for row in rows:
            name, label_of = str(row[files]), _label(row.get(label))
            if self.labels.setdefault(name, label_of) != label_of:
                raise Refused(f"data.labels: {file} gives {escape(name)} two labels.")
        self.used: set[str] = set()

    def of(self, root: str, sources: Iterable[FolderSource]) -> None:
        """Label the images of sources that lie under `root`."""
        by_file = {}
        for place in (os.path.dirname(self.file) or ".", root):
            for name in self.labels:
                by_file |= {os.path.abspath(os.path.join(place, form)): name for form in (unescape(name), name)}
        for source in sources:
            found = [by_file.get(os.path.abspath(file)) if file else None for file in source.files]
            self.used.update(name for name in found if name is not None)
            source.labels = [None if name is None else self.labels[name] for name in found]

    def finish(self, sources: dict[str, FolderSource]) -> None:
        """Add what is listed and was not found to the split that its path names, else to the first.

        Raises:
            Refused: none of the images is listed.
        """
        absent = [name for name in self.labels if name not in self.used]
        if not self.used:
            raise Refused(
                f"data.labels: none of the {len(self.labels)} files of {self.file} is among the images; the first is "
                f"{escape(absent[0])}, and is looked for beside the table and under data.path."
            )
        for name in absent:
            source = sources.get(name.split("/")[0], next(iter(sources.values())))
            source.add(FolderSource([""], [escape(unescape(name))], {0: "listed, but missing"}, [None], missing=1))


def _rows(file: str) -> Rows:
    """A table's rows.

    Raises:
        Refused: it cannot be read.
    """
    try:
        if file.endswith(".parquet"):
            return pq.read_table(file).to_pylist()
        text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
        if file.endswith((".jsonl", ".json")):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no JSON object")
            return rows
        head = text.split("\n", 1)[0]
        rows = list(csv.DictReader(_lines(text), delimiter=max(",;\t", key=head.count), strict=True))
        if any(None in row for row in rows):
            raise ValueError("a row has more cells than the first one names")
        return rows
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise Refused(f"{escape(file)} cannot be read as a table: {' '.join(str(error).split())}.") from error


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends; not what str.splitlines takes for ends, which names of files may have."""
    return (line + "\n" for line in text.replace("\r\n", "\n").split("\n"))


def _label_column(columns: Iterable[str], asked: str | None) -> str | None:
    names = (asked,) if asked else LABEL_COLUMNS
    return next((name for name in names if name in columns), None)


def _label(value: Any) -> str | None:
    """An entry of a table's column of labels; None for one that says that there is none."""
    if isinstance(value, list | dict):
        raise Refused(f"data.label_column: {value} is more than one class for an image.")
    text = "" if value is None else str(value)
    return None if text in ("", "nan") or re.fullmatch(r"-\d+(\.0*)?", text) else text
