"""Labels from tables: ``data.labels``, and the metadata files that lie beside images."""

import csv
import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .files import Refused
from .names import escape, unescape

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
Rows = list[dict[str, Any]]


@dataclass
class Table:
    """What a table says of files.

    Attributes:
        file: the table.
        labels: the label of each file, by the name that the table has for it; None for one without.
        column: of labels; None if the table has none.
    """

    file: str
    labels: dict[str, str | None]
    column: str | None

    def find(self, name: str, places: Iterable[str], files: Container[str]) -> str | None:
        """The absolute path, among `files`, of what the table calls `name`, looked for in `places`; else None."""
        forms = (name, unescape(name), name.strip(), name.replace("\\", "/"))
        paths = (os.path.abspath(os.path.join(place, form)) for form in forms for place in places)
        return next((path for path in paths if path in files), None)


def metadata(file: str, column: str | None) -> Table | None:
    """A metadata file; None for one without rows, or without the column file_name.

    Raises:
        Refused: it cannot be read, or gives a file two labels.
    """
    rows = _rows(file)
    columns = _columns(rows)
    if "file_name" not in columns:
        return None
    label = label_column(columns, column)
    if not column and any(isinstance(row.get(label), list | dict) for row in rows):
        label = None  # several classes of an image, which nobody asked for
    return Table(file, _labels(escape(file), rows, "file_name", label), label)


def given(file: str, column: str | None) -> Table:
    """The table of ``data.labels``.

    Args:
        file: CSV, TSV, JSONL or parquet.
        column: of labels; without one the first of `LABEL_COLUMNS` that is there, or the only one beside the files.

    Raises:
        Refused: it cannot be read, does not tell which column is which, or gives a file two labels.
    """
    if not Path(file).is_file():
        raise Refused(f"data.labels: {file} is not a file.")
    rows = _rows(file)
    if not rows:
        raise Refused(f"data.labels: {file} has no rows.")
    columns = _columns(rows)
    if column and column not in columns:
        raise Refused(f"data.label_column: {file} has no column {column!r}; it has {', '.join(columns)}.")
    files, label = _among(FILE_COLUMNS, columns), label_column(columns, column)
    if label is None and files and len(columns) == 2:
        label = columns[1 - columns.index(files)]
    if files is None or label is None:
        raise Refused(
            f"data.labels: {file} has the columns {', '.join(columns)}; the one of files is to be called "
            "file_name, that of labels label, or as data.label_column says."
        )
    return Table(file, _labels(f"data.labels: {file}", rows, files, label), label)


def _columns(rows: Rows) -> list[str]:
    """The columns that any row has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def label_column(columns: Iterable[str], asked: str | None) -> str | None:
    """The column of labels: the one that is asked for, else the first of `LABEL_COLUMNS`; None if it is not there."""
    return _among((asked,) if asked else LABEL_COLUMNS, columns)


def _among(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The first of the names that is a column, whatever the case of its letters where none is the same."""
    columns = list(columns)
    lower = {column.lower(): column for column in reversed(columns)}
    exact = next((name for name in names if name in columns), None)
    return exact or next((lower[name.lower()] for name in names if name.lower() in lower), None)


def label_of(value: Any) -> str | None:
    """An entry of a column of labels; None for one that says that there is none: empty, not a number, or negative.

    Raises:
        Refused: it is more than one class, or no text.
    """
    if isinstance(value, list | dict):
        raise Refused(f"data.label_column: {value} is more than one class for an image.")
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    text = "" if value is None else text.strip()
    if re.search("[\udc80-\udcff]", text):
        raise Refused(f"data.label_column: the label {escape(text)} is not in UTF-8; save the table as UTF-8.")
    return None if text in ("", "nan") or re.fullmatch(r"-\d+(\.\d*)?", text) else escape(text)


def _labels(told: str, rows: Rows, files: str, label: str | None) -> dict[str, str | None]:
    """The label of each file; `told` names the table in what is refused."""
    labels: dict[str, str | None] = {}
    for row in rows:
        name = row.get(files)
        if not name or not isinstance(name, str):
            raise Refused(f"{told} has a row that names no file in the column {files!r}.")
        value = label_of(row.get(label)) if label else None
        if labels.setdefault(name, value) != value:
            raise Refused(f"{told} gives {escape(name)} two labels.")
    return labels


def _rows(file: str) -> Rows:
    """A table's rows.

    Raises:
        Refused: it cannot be read.
    """
    try:
        ending = Path(file).suffix.lower()
        if ending in WORKBOOKS:
            raise ValueError("it is a workbook; save it as CSV")
        if ending == ".parquet":
            return pq.read_table(file).to_pylist()
        text = _text(Path(file).read_bytes())
        if ending in (".jsonl", ".json"):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no JSON object")
            return rows
        told = re.match(r'"?sep=(.)"?\r?\n', text)  # what Excel takes for a remark on the file
        head, _, _ = (text := text[told.end() :] if told else text).partition("\n")
        mark = told.group(1) if told else max(",;\t", key=head.count)
        reader = csv.DictReader(_lines(text), delimiter=mark, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = list(reader)
        if any(None in row for row in rows):
            raise ValueError("a row has more cells than the first one names")
        return rows
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise Refused(f"{escape(file)} cannot be read as a table: {' '.join(str(error).split())}.") from error


def _text(content: bytes) -> str:
    """A table's text: UTF-16 where its first bytes say so, else UTF-8, other bytes kept as names of files may have."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends; not what str.splitlines takes for ends, which names of files may have."""
    return (line + "\n" for line in text.replace("\r\n", "\n").split("\n"))
