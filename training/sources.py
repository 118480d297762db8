"""What ``data.path`` may name: folders of images, what `datasets` reads, or "digits"."""

import logging
import os
import re
import tarfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from . import folders, labels
from .files import Failed, Refused, full_disk, reason
from .folders import FolderSource
from .names import escape
from .recipe import Data

READ_BY_DATASETS = (".parquet", ".arrow", ".tar")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_IN_CACHE = re.compile(r"^.*/(snapshots|extracted)/[0-9a-f]{40,64}/")  # what comes before a data set's own paths
PATTERN = re.compile(r"[*?\[\]]")  # what `datasets` takes for a pattern in names of files
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt")

datasets.disable_progress_bars()
logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # the README of a folder need be no card


@dataclass
class TableSource:
    """The images of a split, as rows of a data set.

    Attributes:
        table: the split, its images not decoded.
        column: of images.
        labels: the class of each row, None where unknown; None without labels.
        names: the classes in the order that the data set gives them; None if it gives none.
        trusted: folders below which a row may name a file; none where rows must hold the bytes.
    """

    table: datasets.Dataset
    column: str
    labels: list[str | None] | None
    names: list[str] | None
    trusted: tuple[Path, ...] = ()
    missing: int = 0
    left_aside: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, positions: list[int]) -> list[tuple[int, Any]]:
        """What `read` is given for each position."""
        alike = positions == list(range(positions[0], positions[0] + len(positions)))
        part = self.table[positions[0] : positions[-1] + 1] if alike else self.table[positions]
        return list(zip(positions, part[self.column], strict=True))

    def read(self, row: tuple[int, Any]) -> tuple[str, bytes, str]:
        """(path, content, why there is none)."""
        position, value = row
        if value is None:
            return str(position), b"", "no image"
        path, content = value.get("path") or str(position), value.get("bytes")
        if content is None:
            if not any(Path(path).resolve().is_relative_to(folder) for folder in self.trusted):
                return escape(path), b"", "a file outside the data set"
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                return escape(path), b"", error.strerror or "cannot be read"
            path = _IN_CACHE.sub("", path)
        return escape(path), content, "" if content else "empty file"


Source = FolderSource | TableSource


def read(data: Data, labelled: bool = True) -> tuple[dict[str, Source], int]:
    """The splits that the data have, by name, and how many files lie beside all of them.

    Args:
        data: what was asked for.
        labelled: whether labels are asked for; if not, no table of them is read.

    Raises:
        Refused: the data cannot be read.
        Failed: something that is no fault of the data's keeps them from being read.
    """
    paths = data.paths
    if paths == ["digits"]:
        return {name: _table(rows, data, (), labelled) for name, rows in _digits().items()}, 0
    found = [_folder(path) for path in paths]
    if len(paths) > 1 and not all(found):
        raise Refused("data.path: several are united only if each is a folder of images.")
    if all(found):
        for name in ("name", "image_column"):
            if getattr(data, name):
                raise Refused(f"data.{name}: this is for data sets, and {escape(paths[0])} is a folder of images.")
        roots, trees = zip(*found, strict=True)
        return folders.read(list(roots), list(trees), data, labelled)
    for name, value in (("labels", data.labels), ("splits", None if data.splits == "auto" else data.splits)):
        if value:
            raise Refused(f"data.{name}: this is for folders of images, and {paths[0]} is none.")
    tables, trusted = _load(paths[0], data)
    return {name: _table(rows, data, trusted, labelled) for name, rows in tables.items()}, 0


def _folder(given: str) -> tuple[str, folders.Tree] | None:
    """A folder of images and what is in it, of one that is itself an image that alone; None for what `datasets` reads.

    Raises:
        Refused: there is nothing of the kind.
    """
    path = os.path.expanduser(given)
    if not os.path.isdir(path):
        if os.path.isfile(path) and folders.is_image_file(path):
            return os.path.dirname(path) or ".", folders.Tree({os.path.basename(path): ""}, [], [])
        if os.path.exists(path):
            _check_file(path)
        elif given.startswith((".", "/", "~")) or given.count("/") > 1:
            raise Refused(f"data.path: {escape(given)} does not exist.")
        return None
    tree = folders.walk(path)
    tables = [
        name
        for name in tree.others
        if name.lower().endswith(READ_BY_DATASETS) and os.path.basename(name) not in folders.METADATA
    ]
    if not tree.images:
        if tables and not _class_folders_in_tar(path, tables):
            return None
        kinds = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in tree.others)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "nothing"
        advice = "; unpack the archives first" if any(kind in ARCHIVES for kind in kinds) else ""
        raise Refused(f"data.path: {escape(given)} holds no image (but {told}){advice}.")
    if any(_holds_images(os.path.join(path, name)) for name in tables if name.lower().endswith(".parquet")):
        raise Refused(
            f"data.path: {escape(given)} has image files and parquet files that hold images; name the folder of either."
        )
    if any(_holds_samples(os.path.join(path, name)) for name in tables if name.lower().endswith(".tar")):
        raise Refused(
            f"data.path: {escape(given)} has image files and archives of a webdataset; name the folder of either."
        )
    return path, tree


def _holds_images(file: str) -> bool:
    """Whether a parquet file has a column of images as `datasets` writes them."""
    try:
        schema = pq.read_schema(file)
    except Exception:  # a file that only bears the name
        return False
    kinds = [schema.field(name).type for name in schema.names]
    return any(str(kind).startswith("struct<") and "bytes" in str(kind) for kind in kinds)


def _members(archive: str) -> tuple[list[str], int]:
    """The first files in an archive, and how many of these one sample of a webdataset has at most."""
    try:
        with tarfile.open(archive) as file:
            members = [member.name for _, member in zip(range(200), file, strict=False) if member.isfile()]
    except (OSError, tarfile.TarError):
        return [], 0
    return members, max(Counter(re.sub(r"\.[^/]*$", "", member) for member in members).values(), default=0)


def _holds_samples(archive: str) -> bool:
    """Whether an archive is a webdataset's, in which an image has something beside it."""
    members, parts = _members(archive)
    return parts > 1 and any(folders.is_image_file(member, regular=False) for member in members)


def _class_folders_in_tar(folder: str, names: list[str]) -> bool:
    """Whether archives hold folders of images instead of a webdataset's samples, so that classes would be lost."""
    for name in names:
        if not name.lower().endswith(".tar"):
            return False
        members, parts = _members(os.path.join(folder, name))
        if parts == 1 and any("/" in member for member in members):
            return True
    return False


def _check_file(path: str) -> None:
    """Refuse a file that is no data set, saying what to do with it.

    Raises:
        Refused: naming what it seems to be.
    """
    ending, told = os.path.splitext(path)[1].lower(), f"data.path: {escape(path)}"
    if ending in TABLES:
        raise Refused(f"{told} is a table; name the folder of the images, and the table as --data.labels.")
    if ending == ".tar" and not _class_folders_in_tar(*os.path.split(path)[:1], [os.path.basename(path)]):
        return
    if ending in ARCHIVES:
        raise Refused(f"{told} is an archive; unpack it, and name the folder.")
    if ending not in READ_BY_DATASETS:
        raise Refused(f"{told} is no folder of images, and no parquet, arrow or webdataset file.")


def _load(given: str, data: Data) -> tuple[dict[str, datasets.Dataset], tuple[Path, ...]]:
    """What `datasets` reads, and the folders below which its rows may name files.

    Raises:
        Refused: it cannot be read.
        Failed: `datasets` cannot keep what it reads.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        usable = os.access(cache, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise Failed(
            f"{cache}, where datasets keeps what it reads, cannot be written; set HF_HOME to a folder that can."
        )
    path = Path(given).expanduser()
    if path.exists() and PATTERN.search(str(path.absolute())):
        raise Refused(f"data.path: {escape(given)} has one of *?[] in its path, which datasets reads as a pattern.")
    config = datasets.config
    caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.is_file():
                kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower(), "webdataset")
                return datasets.load_dataset(kind, data_files={data.split or "train": str(path)}), ()
            if (path / "state.json").is_file():  # as Dataset.save_to_disk leaves it
                return {data.split or "train": datasets.load_from_disk(path)}, ()
            if path.exists():
                return datasets.load_dataset(str(path), data.name), ()
            return datasets.load_dataset(given, data.name), tuple(Path(p).expanduser().resolve() for p in caches)
    except Exception as error:  # datasets raises nearly every type, also for what a user mistyped
        if full := full_disk(error):
            raise Failed(f"{cache}, where datasets keeps what it reads, cannot be written: {reason(full)}.") from error
        where = "" if path.exists() else " of the Hub, and no such file or folder is here"
        raise Refused(f"data.path: {escape(given)} cannot be read as a data set{where}: {_reasons(error)}") from error


def _reasons(error: BaseException | None) -> str:
    """What an error says, and what the errors say that caused it."""
    said: list[str] = []
    while error is not None:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if not any(text in earlier for earlier in said):
            said.append(text)
        error = error.__cause__
    return "; because: ".join(said)


def _digits() -> dict[str, datasets.Dataset]:
    """The 1,797 digits of 8 px that scikit-learn ships, every fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in bunch.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    order = np.random.default_rng(0).permutation(len(pictures))
    parts = {"train": order[len(order) // 5 :], "test": order[: len(order) // 5]}
    return {
        name: datasets.Dataset.from_dict(
            {"image": [pictures[i] for i in part], "label": bunch.target[part].tolist()}, features=features
        )
        for name, part in parts.items()
    }


def _table(rows: datasets.Dataset, data: Data, trusted: tuple[Path, ...], labelled: bool) -> TableSource:
    column = _image_column(rows, data)
    undecoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return TableSource(undecoded, column, *(_labels(rows, data) if labelled else (None, None)), trusted)


def _image_column(rows: datasets.Dataset, data: Data) -> str:
    """The column that holds the images.

    Raises:
        Refused: there is none, or it cannot be told, or what it holds is no images.
    """
    columns, column = ", ".join(map(escape, rows.features)), data.image_column
    if column and column not in rows.features:
        raise Refused(f"data.image_column: there is no column {column!r}; there are {columns}.")
    if not column:
        found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        found = found or [name for name in ("image", "img") if name in rows.features]
        found = found or [name for name, kind in rows.features.items() if _holds_bytes(kind)]
        if len(found) != 1:
            raise Refused(f"data.image_column: {len(found)} of the columns {columns} hold images; name the one.")
        column = found[0]
    kind = rows.features[column]
    text = isinstance(kind, datasets.Value) and kind.dtype.removeprefix("large_") == "string"
    if not (isinstance(kind, datasets.Image) or text or _holds_bytes(kind)):
        told = "classes" if isinstance(kind, datasets.ClassLabel) else getattr(kind, "dtype", type(kind).__name__)
        raise Refused(f"data.image_column: {column!r} holds {told}, no images; there are {columns}.")
    return column


def _holds_bytes(kind: Any) -> bool:
    """Whether a column holds files: bytes, or these with their path."""
    if isinstance(kind, dict):
        return {"bytes"} <= set(kind) <= {"bytes", "path"}
    return isinstance(kind, datasets.Value) and kind.dtype.removeprefix("large_") == "binary"


def _labels(rows: datasets.Dataset, data: Data) -> tuple[list[str | None] | None, list[str] | None]:
    """The class of each row, and the classes' names if the data set gives them; (None, None) without labels."""
    column = data.label_column
    if column and column not in rows.features:
        raise Refused(f"data.label_column: there is no column {column!r}; there are {', '.join(rows.features)}.")
    single = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel | datasets.Value)]
    if column and column not in single:
        raise Refused(f"data.label_column: {column!r} holds more than one class for each image.")
    column = column or labels.label_column(single, None)
    if column is None:
        return None, None
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = [escape(name) for name in feature.names]
        return [None if v is None or v < 0 else names[v] for v in values], names
    return [labels.label_of(value) for value in values], None
