"""Files are whole or not there."""

import pytest

from training import files


def test_a_file_is_replaced_only_if_its_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_only_if_its_block_ends_well(tmp_path):
    path = tmp_path / "a"
    with files.whole_folder(path) as beside:
        (beside / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_folder(path) as beside:
        (beside / "x").write_text("half")
        raise ZeroDivisionError
    assert (path / "x").read_text() == "old"
    with files.whole_folder(path) as beside:
        (beside / "y").write_text("new")
    assert [p.name for p in path.iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]
    assert files.read_lines(tmp_path / "none") == []


def test_a_locked_folder_is_refused_until_its_holder_is_gone(tmp_path):
    held = files.lock_folder(tmp_path)
    with pytest.raises(files.Refused, match="in use by another process"):
        files.lock_folder(tmp_path)
    held.close()
    files.lock_folder(tmp_path).close()
