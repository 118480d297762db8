"""A finished training that is asked for more epochs goes on from its last checkpoint, by a schedule of its own.

Its marker then tells of the schedules before, as "earlier": the epochs at which each ended, and the fingerprint of its
checkpoints. Records tell the ends of all schedules, since one long schedule would have ended elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoints, Earlier
from .files import Refused, read_json, sha256_json
from .loop import steps_of
from .markers import differences
from .recipe import Schedule


def _before(marker: Path) -> dict[str, Any]:
    """What a finished training read."""
    told = read_json(marker, "read") if marker.exists() else {}
    return told["read"] if "budget" in told else {}


def going_on(marker: Path, read: dict[str, Any], field: str) -> dict[str, Any]:
    """What a training reads, with the schedules before it; with the finished one, too, if only `field` is more.

    Args:
        marker: of the training.
        read: what it reads.
        field: of the epochs.
    """
    before = _before(marker)
    earlier, done = before.get("earlier", []), before.get(field)
    same = all(name == field for name, *_ in differences(before, read))
    if done and same and read[field] > done:
        earlier = [*earlier, [done, sha256_json(before)]]
    return {**read, "earlier": earlier} if earlier else read


def asked(marker: Path, read: dict[str, Any]) -> bool:
    """Whether a finished training is to go on, given what `going_on` made of what it reads."""
    before = _before(marker)
    return bool(before) and read.get("earlier", []) != before.get("earlier", [])


def check(folder: Path, marker: Path, field: str, alone: bool = True) -> None:
    """Refuse to go on with what cannot.

    Args:
        folder: of the run.
        marker: of the training.
        field: of the epochs.
        alone: it is no part of a comparison.

    Raises:
        Refused: with the reason.
    """
    number = int(marker.parent.name.removeprefix("round_")) if marker.stem == "relearn" else 0
    later = folder / f"round_{number + 1}"
    why = None
    if not alone:
        why = "the arms of a comparison are trained once"
    elif (later / "clusters.json").exists():
        why = f"{later} was made from it"
    elif not Checkpoints(folder / "checkpoints").found(f"{marker.stem}_{number}"):
        why = "its last checkpoint is gone"
    if why:
        raise Refused(
            f"{field}: {marker.parent} was made with {_before(marker)[field]:g}, and cannot go on, since {why}; choose "
            "another --run."
        )


def refuse_idle(marker: Path, schedule: Schedule, images: int, field: str) -> None:
    """Refuse more epochs that are no more steps.

    Raises:
        Refused: naming the field.
    """
    done = _before(marker)[field]
    if steps_of(schedule, images)[1] <= steps_of(dataclasses.replace(schedule, epochs=done), images)[1]:
        raise Refused(
            f"{field}: {schedule.epochs:g} are no more steps than the {done:g} that {marker.parent} was made with; ask "
            "for more."
        )


def last_of(earlier: Sequence, steps: Callable[[float], int]) -> Earlier | None:
    """The last of the schedules before, given the steps of so many epochs; None if there is none."""
    return Earlier(steps(earlier[-1][0]), earlier[-1][1]) if earlier else None


def schedules(markers: Iterable[tuple[Path, str]]) -> dict[str, list[float]]:
    """The epochs at which the schedules of trainings ended, by their folders' names, of those that went on.

    Args:
        markers: each with the field of its epochs.
    """
    told = {}
    for marker, field in markers:
        read = _before(marker)
        if "earlier" in read:
            told[marker.parent.name] = [*(end for end, _ in read["earlier"]), read[field]]
    return told


def words(record: dict[str, Any]) -> str:
    """A sentence on what a record's training went on from; nothing if it did not."""
    told = [
        f"{name} was trained in {len(ends)} schedules, which end at {', '.join(f'{end:g}' for end in ends)} epochs"
        for name, ends in record.get("schedules", {}).items()
    ]
    return f" {'; '.join(told)}, each with a warm-up and a cosine of its own." if told else ""
