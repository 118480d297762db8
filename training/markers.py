"""What a phase read and wrote, as its marker tells: other fields or inputs are refused, and files that have changed."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .files import Failed, Refused, read_json, sha256_file


def written(folder: Path, names: Collection[str]) -> dict[str, str]:
    """sha256 of files of a folder, as a marker tells what was written."""
    return {name: sha256_file(folder / name) for name in sorted(names)}


def check_written(marker: Path, advice: str | None = None) -> None:
    """Compare the files that a marker tells of with what was written then.

    Args:
        marker: of a phase.
        advice: what to do if they are others; without it, to do the phase again.

    Raises:
        Failed: one is another, or gone.
    """
    advice = advice or f"delete {marker} to do that phase again, or take the file back from a copy"
    for name, digest in read_json(marker, advice=advice).get("wrote", {}).items():
        path = marker.parent / name
        if not path.exists() or sha256_file(path) != digest:
            raise Failed(
                f"{path} is {'not what was written' if path.exists() else 'gone'}: its sha256 is not the one in "
                f"{marker.name}; {advice}."
            )


# What a phase reads beside fields, known by its sha256.
INPUTS = {
    "images": "images: files were added, removed, renamed or changed since",
    "backbone": "weights before it: the phase before was done again since",
    "labels": "labels: classes, or those of images, changed since",
    "weights": "weights to start from",
    "test": "images to test",
    "targets": "labels to learn, or other images held out",
}
UNTOLD = ("weights", "--other_proxy")  # inputs that older runs, or arms without any, do not tell of
LATER = {"norm": "batch"}  # fields that older runs do not tell of, and what was done before there were any


def _later(name: str) -> Any:
    return LATER.get(name.split(".")[-1])


def since_ever(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields without later ones that say what was done before they came, so that older runs are not others."""
    return {name: value for name, value in fields.items() if _later(name) is None or value != _later(name)}


def differences(before: dict[str, Any], read: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What a phase `read` that it did not read `before`: name, what that was, and what it is."""
    known = [name for name in read if name in before or name not in UNTOLD]
    for name in [*known, *(name for name in before if _later(name) and name not in read)]:
        was, now = before.get(name, _later(name)), read.get(name, _later(name))
        if was != now:
            yield name, was, now


def first_difference(before: dict[str, Any], read: dict[str, Any], done: str = "made") -> tuple[str, str] | None:
    """The first of `differences`: its name, and what was `done` with what, in words; None without any."""
    for name, was, value in differences(before, read):
        if name not in INPUTS:
            return name, f"was {done} with {was}, now it is {value}"
        told = f"was {done} with other {INPUTS[name]}"
        if isinstance(value, dict) and isinstance(was, dict):
            told += f" ({', '.join(key for key in value if was.get(key) != value[key])})"
        return name, told
    return None


def refuse_other(marker: Path, read: dict[str, Any]) -> None:
    """Refuse a phase that was finished from other fields or inputs.

    Raises:
        Refused: naming the first that differs.
    """
    if told := first_difference(read_json(marker, "read")["read"], read):
        name, how = told
        raise Refused(f"{name}: {marker.parent} {how}; choose another --run, or remove that folder to do it again.")
