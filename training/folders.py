"""Folders of images, walked: splits, classes, labels, and an account of every file.

README's section "Your own images" states the rules. Paths are kept as bytes that are not UTF-8 allow (surrogates), and
written as `escape` has them.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import labels
from .files import Refused
from .names import escape, unescape
from .pixels import is_image_file
from .recipe import Data

MISSING = "listed, but missing"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def canonical(name: str) -> str | None:
    """ "train", "validation" or "test" for a name that means it, None for any other."""
    return SPLIT_NAMES.get(name.lower())


def like_splits(name: str) -> set[str]:
    """The splits that words in a name mean, as in train2017 or seg_test."""
    return {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES}


def training_split(names: Iterable[str]) -> str:
    """The name among those of splits that means training, else the first."""
    return next((name for name in names if canonical(name) == "train"), next(iter(names)))


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


def read(roots: list[str], trees: list[Tree], data: Data, labelled: bool = True) -> tuple[dict[str, FolderSource], int]:
    """The splits of folders of images, united by name, and how many files lie beside all splits.

    Args:
        roots: the folders.
        trees: what lies in each.
        data: what was asked for.
        labelled: whether metadata files are read.

    Raises:
        Refused: what is a split cannot be told, or labels cannot be read.
    """
    table = labels.given(data.labels, data.label_column) if data.labels else None
    result: dict[str, FolderSource] = {}
    told = False  # whether a metadata file has the column of labels
    used: set[str] = set()  # files that the table names
    beside, bases = 0, [os.path.basename(os.path.abspath(root)) for root in roots]
    for number, (root, tree) in enumerate(zip(roots, trees, strict=True)):
        # One folder's paths are told from it on, so that it can be moved; of several each is told with its name.
        name = bases[number] + (f" ({number + 1})" if bases.count(bases[number]) > 1 else "")
        prefixes, base = splits_of(root, tree, data)
        inside = tuple(prefixes.values())
        beside += sum(not path.startswith(inside) for path in (*tree.images, *tree.others))
        files = {os.path.abspath(os.path.join(root, path)): path for path in tree.images}
        listed: dict[str, str | None] = {}
        missing: list[str] = []
        if table:
            for file in table.labels:
                if path := table.find(file, (root, os.path.dirname(table.file)), files):
                    listed[files[path]] = table.labels[file]
                    used.add(file)
        else:
            for place in tree.metadata if labelled else ():
                known, absent = _metadata(root, place, files, data.label_column)
                told = told or known is not None
                listed |= known or {}
                missing += absent
        for split, prefix in prefixes.items():
            rest = split == training_split(prefixes)
            absent = [path for path in missing if path.startswith(prefix) or (rest and not path.startswith(inside))]
            source = _source(root, tree, listed, absent, prefix, base, bool(table))
            if len(roots) > 1:
                source.paths = [escape(name) + "/" + path for path in source.paths]
            result.setdefault(split, FolderSource()).add(source)
    if table:
        _add_absent(table, [name for name in table.labels if name not in used], result)
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
        loose = [path for path in below if "/" not in path and not tree.images[base + path]]
        if loose or len(tops) != 1 or canonical(tops[0]) or tops[0] in asked:
            break
        base += tops[0] + "/"
    kinds = {top: canonical(top) for top in tops}
    training = [top for top in tops if kinds[top] == "train"]
    if len(tops) == 1 and not loose and not training and tops[0] not in asked:
        base += tops[0] + "/"  # a test split by itself: its folders are classes
    whole = {"train": ""}, base
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
    like = {kind: [top for top in tops if kind in like_splits(top)] for kind in ("train", "test", "validation")}
    if like["train"] and (held := like["test"] + like["validation"]) and len(tops) <= len(like["train"] + held) + 1:
        raise Refused(
            f"data.path: {escape(like['train'][0])} and {escape(held[0])} in {where} look like splits, and their names "
            "are not quite; name them by --data.split and --data.test_split, or --data.splits none makes each a class."
        )
    return whole


def _metadata(
    root: str, place: str, files: dict[str, str], column: str | None
) -> tuple[dict[str, str | None] | None, list[str]]:
    """What a metadata file tells of images: their labels, and what it lists that is not there.

    Args:
        root: the folder.
        place: the file's path in it.
        files: path in it of each image, by absolute path.
        column: of labels, if it was asked for.

    Returns:
        Labels by path in the folder, None without a column of them; and paths in the folder.
    """
    table = labels.metadata(os.path.join(root, place), column)
    if table is None:
        return None, []
    known: dict[str, str | None] = {}
    missing: list[str] = []
    folder = os.path.join(root, os.path.dirname(place))
    for name, label in table.labels.items():
        path = table.find(name, (folder,), files)
        if path is None:
            missing.append(os.path.relpath(os.path.join(folder, unescape(name)), root))
        else:
            known[files[path]] = label
    return (known if table.column else None), missing


def _add_absent(table: labels.Table, absent: list[str], result: dict[str, FolderSource]) -> None:
    """Add what ``data.labels`` lists and is not there to the split that its path names, else to the training split.

    Raises:
        Refused: nothing that it lists is there.
    """
    if len(absent) == len(table.labels):
        raise Refused(
            f"data.labels: none of the {len(absent)} files of {table.file} is among the images; the first is "
            f"{escape(absent[0])}, and is looked for beside the table and under data.path."
        )
    for split, source in result.items():
        rest = split == training_split(result)
        own = [name for name in absent if name.split("/")[0] == split or (rest and name.split("/")[0] not in result)]
        faults = dict.fromkeys(range(len(own)), MISSING)
        paths = [escape(unescape(name)) for name in own]
        source.add(FolderSource([""] * len(own), paths, faults, [None] * len(own), missing=len(own)))


def _source(
    root: str,
    tree: Tree,
    listed: dict[str, str | None],
    missing: list[str],
    prefix: str,
    base: str,
    by_table: bool,
) -> FolderSource:
    """A split.

    Args:
        root: the folder.
        tree: what lies in it.
        listed: labels by path, as a table or metadata give them.
        missing: what metadata list of this split, and is not there.
        prefix: of the split's paths.
        base: folder below which classes lie in a lone split.
        by_table: folders are no classes, even where nothing is listed.
    """
    entries = {path: why for path, why in tree.images.items() if path.startswith(prefix)}
    entries |= dict.fromkeys(missing, MISSING)
    start = len(prefix or base)
    if by_table or any(path in listed for path in entries):
        found = [listed.get(path) for path in entries]
    else:
        classes = [path[start:].split("/")[0] if "/" in path[start:] else None for path in entries]
        found = [None if name is None else escape(name) for name in classes] if any(classes) else None
    return FolderSource(
        files=["" if why == MISSING else os.path.join(root, path) for path, why in entries.items()],
        paths=[escape(path) for path in entries],
        faults={position: why for position, why in enumerate(entries.values()) if why},
        labels=found,
        missing=sum(why == MISSING for why in entries.values()),
        left_aside=Counter(_ending(path) for path in tree.others if path.startswith(prefix)),
    )


def _ending(path: str) -> str:
    return escape(os.path.splitext(path)[1].lower()) or "no ending"
