"""Files are whole or not there."""

import errno
import os
import shutil

import pytest
import torch

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


@pytest.mark.parametrize("damage", [b'{"a"', b"[1]", b"\xff\xfe", b"3", b"{'a': 1}"])
def test_a_damaged_line_is_told_and_only_an_unfinished_last_one_forgiven(damage, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": 3}\n')
    with pytest.raises(files.Failed, match=r"lines\.jsonl: line 2 is damaged"):
        files.read_lines(path)
    path.write_bytes(b'{"a": 1}\n' + damage + b"\n")
    with pytest.raises(files.Failed, match="line 2 is damaged"):
        files.read_lines(path)


def test_a_locked_folder_is_refused_until_its_holder_is_gone(tmp_path):
    held = files.lock_folder(tmp_path)
    with pytest.raises(files.Refused, match="in use by another process"):
        files.lock_folder(tmp_path)
    held.close()
    files.lock_folder(tmp_path).close()


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked" / files.LOCK).mkdir(parents=True)
    for name in ("file", "link", "file/x", "locked"):
        with pytest.raises(files.Refused, match=f"{name} cannot be a run's folder: .*; choose another --run"):
            files.lock_folder(tmp_path / name)


def test_a_file_that_could_not_be_written_in_the_end_is_refused_before(tmp_path):
    (tmp_path / "file").write_text("")
    for name, why in ((".", "is a folder"), ("file/x.csv", "file is no folder"), ("file/y/x.csv", "file is no folder")):
        with pytest.raises(files.Refused, match=f"--out: .*{why}"):
            files.refuse_out(tmp_path / name)
    files.refuse_out(tmp_path / "new" / "x.csv")
    files.refuse_out(tmp_path / "file")


def test_of_a_folder_that_could_not_be_copied_the_first_reason_is_told():
    told = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "[Errno 5] more")])
    assert files.reason(told) == "No space left on device"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    files.lock_folder(tmp_path).close()
    assert "without locks" in capsys.readouterr().err
    with files.alone(tmp_path):
        (tmp_path / "records.jsonl").touch()


def test_tensors_may_be_read_by_whoever_may_read_other_files(tmp_path):
    files.save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_refused_run_leaves_what_others_have_put_beside_it(tmp_path):
    with pytest.raises(files.Refused), files.nothing_left(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "theirs").touch()
        raise files.Refused("no")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["theirs"]
