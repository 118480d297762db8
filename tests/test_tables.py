"""Tables are what their file's ending says, whatever is null."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training import tables
from training.files import Refused


def parts():
    """Two parts of three rows each; the image of the second row of each has no features and no label."""
    for start in (0.0, 10.0):
        rows = [[start, start + 1], None, [start + 2, 0.1]]
        yield pa.table(
            {
                "path": ['a"b,c.png', "ü.png", "c.png"],
                "features": pa.array(rows, pa.list_(pa.float32(), 2)),
                "label": pa.array([1, None, 2], pa.int32()),
                "class": pa.array(["one", None, "two"], pa.string()),
            }
        )


def test_parquet_keeps_lists_and_nulls(tmp_path):
    assert tables.write(tmp_path / "out.parquet", parts()) == 6
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["features"].to_pylist()[1:4] == [None, pytest.approx([2, 0.1]), [10, 11]]
    assert table["label"].to_pylist() == [1, None, 2] * 2


def test_csv_has_a_column_for_each_feature_and_empty_cells(tmp_path):
    tables.write(tmp_path / "out.csv", parts())
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "features_0", "features_1", "label", "class"]
    assert rows[0]["path"] == 'a"b,c.png'
    assert rows[1] == {"path": "ü.png", "features_0": "", "features_1": "", "label": "", "class": ""}
    assert [float(row["features_1"] or -1) for row in rows] == pytest.approx([1, -1, 0.1, 11, -1, 0.1])


def test_npz_is_read_without_pickle(tmp_path):
    tables.write(tmp_path / "out.npz", parts())
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found["features"].dtype == np.float32
        assert np.isnan(found["features"]).all(1).tolist() == [False, True, False] * 2
        assert found["features"][3].tolist() == [10, 11]
        assert found["label"].tolist() == [1, -1, 2] * 2
        assert found["class"].tolist() == ["one", "", "two"] * 2


def test_what_broke_off_leaves_nothing_and_other_endings_are_refused(tmp_path):
    def broken():
        yield from parts()
        raise ValueError

    with pytest.raises(ValueError):
        tables.write(tmp_path / "out.csv", broken())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Refused, match=r"out\.xlsx ends in none of \.parquet, \.csv, \.npz"):
        tables.check(tmp_path / "out.xlsx")
