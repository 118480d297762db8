"""What each split of the data is for: to learn from, to choose settings on, or to measure."""

from collections.abc import Mapping
from dataclasses import dataclass

from .files import Refused
from .folders import canonical
from .names import escape
from .recipe import Data
from .sources import Source


@dataclass
class Uses:
    """What each split is for.

    Attributes:
        train: learned from.
        held_out: settings, or the best classifier, are chosen on it; None: a part of train is held out.
        test: measured; None without one.
        names: all splits.
    """

    train: str
    held_out: str | None
    test: str | None
    names: list[str]

    def of(self, name: str) -> str:
        """What a split is for, in a word."""
        told = {self.test: "test", self.held_out: "validation", self.train: "training"}
        return told.get(name, "not used")


def uses(data: Data, found: Mapping[str, Source], tuning: bool = False) -> Uses:
    """Tell what each split is for.

    Args:
        data: what was asked for.
        found: the splits.
        tuning: a classifier is trained, so that a validation split is held out whether or not there is a test split.

    Raises:
        Refused: there is no such split, or it would serve twice.
    """

    def named(name: str, field: str) -> str:
        same = [other for other in found if other == name] or [
            other for other in found if canonical(other) and canonical(other) == canonical(name)
        ]
        if not same:
            raise Refused(f"data.{field}: {_told(data)} has no split {name!r}; it has {', '.join(map(repr, found))}.")
        return same[0]

    def meaning(kind: str) -> str | None:
        return next((name for name in found if canonical(name) == kind and name not in (train, test)), None)

    test = named(data.test_split, "test_split") if data.test_split not in (None, "none") else None
    train = named(data.split or "train", "split")
    if train == test:
        raise Refused(f"data.test_split: {train!r} is the split to train on, too; name another, or none.")
    if not len(found[train]):
        raise Refused(f"data.split: split {train!r} of {_told(data)} is empty.")
    validation = meaning("validation")
    labelled = {
        name: bool(source.labels and any(x is not None for x in source.labels)) for name, source in found.items()
    }
    if data.test_split is None:
        test = meaning("test")
        better = test is None or not labelled[test]
        if validation and not tuning and better and (test is None or (labelled[train] and labelled[validation])):
            test, validation = validation, None  # as ImageNet's, whose test split tells no labels
        elif tuning and test and not labelled[test]:
            test = None
    measured = tuning or (test is not None and labelled[test])
    held_out = validation if validation and labelled[validation] and labelled[train] and measured else None
    if held_out and data.val_fraction is not None:
        raise Refused(f"data.val_fraction: the split {held_out!r} is what is held out; leave val_fraction out.")
    used = [name for name in (train, held_out, test) if name]
    return Uses(train, held_out, test, [*used, *(name for name in found if name not in used)])


def _told(data: Data) -> str:
    return escape(", ".join(data.paths))
