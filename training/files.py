"""Files that are whole or not there: written beside their place, flushed, renamed into it."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError


class Refused(Exception):
    """A request that cannot be served; its text is the one sentence the user sees (exit status 2)."""


class Failed(Exception):
    """Work that broke off; its text is the one sentence the user sees (exit status 1)."""


class Diverged(Failed):
    """A training whose loss, weights or features are no longer finite."""


def reason(error: BaseException) -> str:
    """What an error of a file says, in a few words."""
    text, of_folder = str(error), isinstance(error, shutil.Error) and isinstance(error.args[0], list)
    if of_folder:  # of its files, the first
        text = str(error.args[0][0][-1])
    found = re.search(r"os error (\d+)" if isinstance(error, SafetensorError) else r"^\[Errno (\d+)\]", text)
    number = int(found.group(1)) if found else getattr(error, "errno", None)
    if number is not None:
        return os.strerror(number)
    return " ".join(text.split())[:300] or type(error).__name__


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def full_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk that is full, failing or read-only among an error and what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


_held: WeakValueDictionary[Path, IO[str]] = WeakValueDictionary()  # lock files of folders that are written to


def moved(path: Path | None) -> str | None:
    """What to say if the run folder that a file belongs to, or any without one, is no longer where it was."""
    for folder, lock in list(_held.items()):
        ours = path is None or path.is_relative_to(folder)
        if ours and not lock.closed and not _is_at(lock, folder / LOCK):
            return f"{folder} was moved or deleted while it was written to; the same command starts it again."
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps the block from writing `path`, in one sentence.

    Raises:
        Failed: a disk is full, or fails; or the run folder is no longer there.
    """
    if told := moved(path):
        raise Failed(told)
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Failed(
            f"{path} cannot be written: {reason(error)}; what was finished is kept, and the same command goes on from "
            "there."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What keeps the block from reading `path`, which was whole before, in one sentence.

    Raises:
        Failed: it is gone, or is another.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Failed(
            moved(path)
            or f"{path} cannot be read: {reason(error)}; take it back from a copy, or delete its folder to have it "
            "made again."
        ) from error


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` if the block ends without an exception."""
    beside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            _sync(beside)
            os.replace(beside, path)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it replaces `path` if the block ends without an exception."""
    beside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            yield beside
            for file in beside.rglob("*"):
                _sync(file)
            _sync(beside)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(beside, path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors that may be read by whoever may read other new files; the library's are their owner's alone."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text that people write.

    Raises:
        Refused: it is none in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is no text in UTF-8.") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(
    path: Path, *keys: str, advice: str = "remove it to have it made again, or take it back from a copy"
) -> dict[str, Any]:
    """An object with some keys.

    Raises:
        Failed: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # of JSON, or of UTF-8
        value = None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        raise Failed(f"{path} is damaged; {advice}.")
    return value


def refuse_files(folder: Path, names: Collection[str]) -> None:
    """Refuse files where a run has folders of its own.

    Raises:
        Refused: naming one.
    """
    for path in (folder / name for name in names):
        if path.is_file():
            raise Refused(f"{path} is a file, where a run has a folder; move it away, or choose another --run.")


# What tells by which command a folder was made.
KINDS = {
    "a run": "proxy",
    "a comparison": "seed_*",
    "proxy tasks side by side": "*/seed_*",
    "a fine-tuned classifier": "finetune.json",
}


def refuse_kind(folder: Path, kind: str) -> None:
    """Refuse a folder that another command made than one of this kind.

    Raises:
        Refused: naming what it holds.
    """
    for other, name in KINDS.items():
        if other != kind and any(folder.glob(name)):
            raise Refused(f"{folder} holds {other}, where this would put {kind}; choose another --run.")


def refuse_out(path: Path, read: Collection[str | Path] = ()) -> None:
    """Refuse a file that could not be written once all is done, or that would replace what is `read`.

    Raises:
        Refused: it is a folder or what is read, or lies below a file or where nobody may write.
    """
    if path.resolve() in {Path(place).expanduser().resolve() for place in read}:
        raise Refused(f"--out: {path} is what is to be shown or read; write to another file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{above} is no folder that can be written to"
        raise Refused(f"--out: {path} cannot be written: {why}.")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON object as a line; what is left of one that could not be written whole, `read_lines` leaves out."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return read_lines(path, "phase", "round", "step", "images")


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read one JSON object, with some keys, a line; a last line that a kill cut short is left out.

    Raises:
        Failed: another line is damaged.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
        except ValueError:  # of JSON, or of UTF-8
            row = False
        if row is False and number == len(lines):
            break  # without its line break it was never finished
        if line and not (isinstance(row, dict) and all(key in row for key in keys)):
            raise Failed(f"{path}: line {number} is damaged; remove it, or take the file back from a copy.")
        if line:
            rows.append(row)
    return rows


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Remove `folder`, and what had to be made above it, if it was not there before and the block is refused."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except Refused:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        for path in new[1:]:
            with suppress(OSError):  # others may have come to use it
                path.rmdir()
        raise


LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def lock_folder(folder: Path) -> IO[str]:
    """Hold `folder` for this process until the returned file is closed or the process is gone.

    Where the file system has no locks, a warning says that nothing holds it.

    Raises:
        Refused: another process holds it; or it is a file, a link to nothing, or nobody may write there.
        Failed: the disk is full, or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        kind = Failed if error.errno in FULL else Refused
        raise kind(f"{folder} cannot be a run's folder: {reason(error)}; choose another --run.") from error
    _held[folder] = file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            text = f"warning: {folder} is on a file system without locks; see that no other process writes to it."
            print(text, file=sys.stderr)
            return file
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise Refused(f"{folder} is in use by another process; wait for it, or choose another --run.") from None
    return file


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from adding to a file of `folder` at the same time, where the file system has locks."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
