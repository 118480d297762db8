"""Records: one JSON line for each measured figure. Tables, cards and figures are made from them and nothing else."""

import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .files import alone, read_lines, refuse_out, write_lines

Records = list[dict[str, Any]]
# What makes two records figures of the same thing: a newer one replaces an older.
IDENTITY = (
    "arm", "model", "task", "seed", "phase", "round", "stage", "protocol", "data", "size", "split", "metric", "variant",
)  # fmt: skip
SETTINGS = ("k", "views", "labels", "scratch", "probe", "shots")


def identity(record: dict[str, Any]) -> tuple:
    settings = record.get("settings", {})
    made_by = record.get("recipe_sha256") if record.get("protocol") == "finetune" else None
    return (*(record.get(name) for name in IDENTITY), *(settings.get(name) for name in SETTINGS), made_by)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file."""
    return read_lines(path, "arm", "protocol", "metric", "value", "settings")


def check_out(path: Path) -> None:
    """Refuse a file that records could not be added to, before they are measured.

    Raises:
        Refused: it cannot be written.
        Failed: it is damaged.
    """
    refuse_out(path)
    read(path)


def write(
    path: Path, records: list[dict[str, Any]], replaces: Callable[[dict[str, Any]], bool] = lambda record: False
) -> None:
    """Add records to a file; one of the same thing replaces an older one, and so do all what `replaces` tells.

    They take the place of what they replace, so that what is measured again changes no order.
    """
    new = {identity(record): record for record in records}
    with alone(path.parent):
        rows = read(path)
        place = next((number for number, record in enumerate(rows) if replaces(record)), len(rows))
        before, after = ({identity(r): r for r in part if not replaces(r)} for part in (rows[:place], rows[place:]))
        write_lines(path, list({**before, **new, **after, **new}.values()))


def data_of(record: dict[str, Any]) -> str:
    """What the data of a record are called, without their fingerprint."""
    return record["data"].rpartition("@")[0]


def split_of(records: Records) -> str:
    """The split that tables show: test where classes were measured on it, else the held-out part of train."""
    classes = [r for r in records if r["protocol"] in ("linear", "knn")]
    return "test" if any(r["split"] == "test" for r in classes or records) else "val"


def last_round(records: Records, arm: str) -> Records:
    """An arm's records of its last round."""
    rows = [r for r in records if r["arm"] == arm]
    last = max((r["round"] for r in rows), default=0)
    return [r for r in rows if r["round"] == last]


def is_labelled(records: Records) -> bool:
    """Whether anything was measured by classes."""
    return any(row["protocol"] in ("linear", "knn") for row in records)


def stages_of(records: Records) -> int:
    """How many stages the records tell of."""
    return 1 + max((r["stage"] for r in records if isinstance(r["stage"], int)), default=-1)


def versions() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "timm", "accelerate")}}


def device_name(kind: str) -> str:
    """A device as records name it, e.g. "AMD EPYC, 2 cores"."""
    import torch

    from .launch import cores

    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {cores()} cores" if kind == "cpu" else f"{kind}, {name}"


def value(records: list[dict[str, Any]], **fields: Any) -> float | None:
    """The value of the one record that has these fields, None if there is none; `k` is looked for in its settings."""
    k = fields.pop("k", None)
    found = [
        r["value"]
        for r in records
        if all(r.get(name) == wanted for name, wanted in fields.items()) and (k is None or r["settings"].get("k") == k)
    ]
    return found[-1] if found else None
