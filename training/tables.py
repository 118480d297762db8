"""Tables in files: parquet, CSV or NPZ, as the file's ending says."""

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from .files import Refused, refuse_out, whole_file

ENDINGS = (".parquet", ".csv", ".npz")


def check(path: Path, endings: tuple[str, ...] = ENDINGS, read: Collection[str] = ()) -> None:
    """Refuse a file whose ending names no kind of table, that cannot be written, or that is what is `read`.

    Raises:
        Refused: saying why.
    """
    if path.suffix not in endings:
        raise Refused(f"--out: {path} ends in none of {', '.join(endings)}, which say what is written.")
    refuse_out(path, read)


def write(path: Path, parts: Iterable[pa.Table]) -> int:
    """Write parts of a table, one below the other.

    Rows of features, lists of one length, are a list in parquet, a column for each value in CSV, and [n, D] float32 in
    NPZ. What is null is empty in CSV; in NPZ a feature or another float is NaN, an integer -1, a text empty.

    Args:
        path: the file, its ending one of ENDINGS.
        parts: one at least.

    Returns:
        The number of rows.
    """
    rows = 0
    with whole_file(path) as beside:
        if path.suffix == ".npz":
            columns: dict[str, list[np.ndarray]] = {}
            for part in parts:
                for name in part.column_names:
                    columns.setdefault(name, []).append(_array(part[name]))
                rows += len(part)
            np.savez(beside, **{name: np.concatenate(arrays) for name, arrays in columns.items()})
            return rows
        writer = None
        for part in parts:
            part = part if path.suffix == ".parquet" else _flat(part)
            kind = pq.ParquetWriter if path.suffix == ".parquet" else pyarrow.csv.CSVWriter
            writer = writer or kind(beside, part.schema)
            writer.write_table(part)
            rows += len(part)
        writer.close()
    return rows


def _array(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return _matrix(column)
    fill = np.nan if pa.types.is_floating(kind) else -1 if pa.types.is_integer(kind) else ""
    values = column.fill_null(fill).to_numpy()
    return values.astype(str) if pa.types.is_string(kind) else values  # NumPy would pickle what is no text of its own


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """[n, D] float32 of a column of lists, NaN where one is null."""
    rows = column.combine_chunks()
    found = np.full((len(rows), column.type.list_size), np.nan, np.float32)
    known = rows.is_valid().to_numpy(zero_copy_only=False)
    found[known] = rows.flatten().to_numpy().reshape(-1, column.type.list_size)
    return found


def _flat(table: pa.Table) -> pa.Table:
    """The table with a column for each value of a column of lists."""
    columns = {}
    for name in table.column_names:
        if pa.types.is_fixed_size_list(table[name].type):
            values = pa.array(_matrix(table[name]).T.ravel(), from_pandas=True)  # NaN is null
            width = len(table)
            for place in range(table[name].type.list_size):
                columns[f"{name}_{place}"] = values[place * width : (place + 1) * width]
        else:
            columns[name] = table[name]
    return pa.table(columns)
