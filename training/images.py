"""Any image data in; uint8 pixels, indices, labels or None out.

Every file is decoded once, whole, its short side at most 1.15 times the working size, and kept as uint8: in memory, or
in a memory-mapped file beside the run. An image that cannot be decoded keeps its index and is never drawn.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sources
from .decoding import Decoded, decode_all
from .files import Failed, Refused, write_text
from .pixels import Pixels
from .recipe import Data
from .sources import Source
from .uses import uses


@dataclass
class Images:
    """The images of a split, and of another that is held out from it, if there is one.

    Attributes:
        pixels: the pictures; of size 0 where one could not be decoded.
        labels: [N] int64, -1 where unknown; None without labels.
        label_names: the classes' names; None without labels.
        paths: [N] path of each file, or its row in the data set.
        held_out: [N] bool, what settings may be chosen on.
        fingerprint: sha256 over (path, length, sha256 of the bytes) in order.
        mean, std: of the training images' RGB values in [0, 1].
        crop_pct: working side over stored side, at most 1: the share of an image that evaluation sees.
        size: working size, px.
        split_seed: draws samples.
        white: value of more than 8 bits that became 255; None where all have 8 bits.
        bad: split, path and reason of what could not be decoded.
        account: for each split that the data have, what it is for, and what became of its files.
    """

    pixels: Pixels
    labels: Tensor | None
    label_names: list[str] | None
    paths: list[str]
    held_out: Tensor
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    size: int
    split_seed: int = 0
    white: float | None = None
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    account: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sides(self) -> Tensor:
        """[N] int64 short sides, px; 0 where there is no picture."""
        return self.pixels.sides

    @property
    def usable(self) -> Tensor:
        """[N] bool, what could be decoded."""
        return self.pixels.heights > 0

    @property
    def train(self) -> Tensor:
        """[n] int64 indices that training may draw."""
        return (self.usable & ~self.held_out).nonzero().flatten()

    @property
    def val(self) -> Tensor:
        """[n] int64 indices held out from training."""
        return (self.usable & self.held_out).nonzero().flatten()

    @property
    def all(self) -> Tensor:
        """[n] int64 indices of everything that could be decoded."""
        return self.usable.nonzero().flatten()

    def labelled(self, indices: Tensor) -> Tensor:
        """Those of the indices whose label is known."""
        return indices[self.labels[indices] >= 0]

    def sample(self, indices: Tensor, count: int) -> Tensor:
        """At most `count` of `indices`, drawn by split_seed, in order."""
        if len(indices) <= count:
            return indices
        drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.split_seed))[:count]
        return indices[drawn.sort().values]

    def __len__(self) -> int:
        return len(self.paths)


def load_splits(
    data: Data, folder: Path | None, tuning: bool = False, in_file: bool = False, taken: int = 0
) -> tuple[Images, Images | None]:
    """Read and decode what is trained on and held out, and the split that is measured, None without one.

    Args:
        data: where the images are and how large they are kept.
        folder: run folder, which gets ``images/SPLIT.u8`` where memory is short; None keeps all in memory.
        tuning: a classifier is to be trained: a validation split is for choosing it.
        in_file: keep pixels in the file whatever their size, so that the processes of a machine share them.
        taken: bytes of data.memory_gb that are in use.

    Raises:
        Refused: the data cannot be read, or have no usable image.
        Failed: more than data.max_bad_fraction of the images of a split cannot be decoded.
    """
    found, beside = sources.read(data)
    use = uses(data, found, tuning)
    names = [name for name in (use.train, use.held_out) if name]
    train = load(data, {name: found[name] for name in names}, folder, in_file=in_file, taken=taken, by_class=tuning)
    test = load(data, {use.test: found[use.test]}, folder, train, in_file, taken) if use.test else None
    read = train.account | (test.account if test else {})
    unread = {name: {"images": len(source), "left_aside": source.left_aside.total()} for name, source in found.items()}
    account = {name: {"use": use.of(name), **read.get(name, unread[name])} for name in use.names}
    if beside:
        account["beside the splits"] = {"use": "not used", "left_aside": beside}
    return dataclasses.replace(train, account=account), test


def load(
    data: Data,
    splits: dict[str, Source],
    folder: Path | None,
    like: Images | None = None,
    in_file: bool = False,
    taken: int = 0,
    by_class: bool = False,
) -> Images:
    """Read and decode splits as one.

    Args:
        data: where the images are and how large they are kept.
        splits: the first; what comes after it is held out from training.
        folder: as `load_splits` takes it.
        like: the training split, whose statistics, crop, white and class names a test split shares.
        in_file, taken: as `load_splits` takes them.
        by_class: as many of each class are held out, as far as they divide, where there are labels.

    Raises:
        Refused: there is no usable image, or a class that training has not.
        Failed: more than data.max_bad_fraction of the images of a split cannot be decoded.
    """
    rows = list(_rows(splits, data, like is not None))
    number = [split for split, *_ in rows]
    white = data.white if data.white is not None else like.white if like else None
    taken += like.pixels.resident if like else 0
    decoded = decode_all(rows, list(splits.values()), data, "_".join(splits), folder, in_file, white, taken)
    account, bad = _account(rows, splits, decoded)
    if len(bad) == len(rows):
        raise Refused(
            f"data.path: no image of split {next(iter(splits))!r} can be decoded ({len(bad)} tried); the first is "
            f"{bad[0][1]}: {bad[0][2]}."
        )
    for name, told in account.items():
        if told["bad"] > data.max_bad_fraction * (told["bad"] + told["read"]):
            raise _too_many(bad, name, told, data, folder)
    labels, names = _labels(rows, splits, like.label_names if like else None)
    held_out = torch.tensor([split > 0 for split in number])
    moments = decoded.moments
    usable = decoded.pixels.heights > 0
    if like is None:
        if len(splits) == 1:
            drawn = np.random.default_rng(data.split_seed + 1).permutation(len(rows))
            classes = labels.numpy() if by_class and labels is not None else None
            held_out[held(drawn, round(data.held_out * len(rows)), classes).copy()] = True
        train = (usable & ~held_out).numpy()
        train = train if train.any() else usable.numpy()
        mean = moments[train, :3].mean(0)
        std = np.sqrt(np.maximum(moments[train, 3:].mean(0) - mean**2, 1 / 255**2))
        crop_pct = min(1.0, data.size / int(decoded.pixels.sides.max()))
        # Four digits are what a config.json and a card can show, and are the statistics that training uses.
        statistics = tuple(round(float(x), 4) for x in mean), tuple(round(float(x), 4) for x in std), crop_pct
    else:
        statistics = like.mean, like.std, like.crop_pct
    return Images(
        decoded.pixels, labels, names, decoded.paths, held_out, decoded.fingerprint, *statistics, data.size,
        data.split_seed, decoded.white, bad, account,
    )  # fmt: skip


def write_bad(folder: Path, bad: Sequence[tuple[str, str, str]]) -> Path:
    """bad_images.txt: split, path and reason of what could not be decoded."""
    path = folder / "bad_images.txt"
    write_text(path, "".join("\t".join(line) + "\n" for line in bad))
    return path


def _too_many(bad: list, name: str, told: dict, data: Data, folder: Path | None) -> Failed:
    own = [line for line in bad if line[0] == name]
    listed = f"{write_bad(folder, bad)} lists them, " if folder else ""
    return Failed(
        f"{told['bad']} of {told['bad'] + told['read']} images of split {name!r} could not be decoded, more than "
        f"data.max_bad_fraction {data.max_bad_fraction:g} allows; {listed}the first is {own[0][1]}: {own[0][2]}."
    )


def _rows(splits: dict[str, Source], data: Data, measured: bool) -> Iterator[tuple[int, int]]:
    """(number of the split, position in it) of every image that is to be read."""
    for number, source in enumerate(splits.values()):
        positions = np.arange(len(source)) if number or measured else drawn(data, len(source))
        yield from ((number, position) for position in positions.tolist())


def drawn(data: Data, count: int) -> np.ndarray:
    """Which of a training split's `count` images data.limit leaves; a lower limit draws some of a higher one's."""
    if not data.limit or data.limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(data.split_seed).permutation(count)[: data.limit])


def held(drawn: np.ndarray, count: int, classes: np.ndarray | None) -> np.ndarray:
    """Which `count` images are held out: the first of a random order, or as large a share of each class, never all.

    Args:
        drawn: [N] the images in random order.
        count: how many.
        classes: [N] the class of each image, -1 where unknown; None where none is told.
    """
    if classes is None:
        return drawn[:count]
    grouped = drawn[np.argsort(classes[drawn], kind="stable")]
    first = np.unique(classes[grouped], return_index=True)[1]  # of each class, which stays to be learned from
    rest = np.delete(grouped, first)
    count = min(count, len(rest))
    return rest[np.arange(count) * len(rest) // max(1, count)]


def _account(
    rows: list[tuple[int, int]], splits: dict[str, Source], decoded: Decoded
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, str]]]:
    """What became of each split's files: found + missing = read + not_drawn + bad + left_aside; and the bad ones."""
    names, account = list(splits), {}
    bad = [
        (names[split], decoded.paths[i], decoded.reasons[i]) for i, (split, _) in enumerate(rows) if decoded.reasons[i]
    ]
    for number, (name, source) in enumerate(splits.items()):
        drawn = sum(split == number for split, _ in rows)
        worse = sum(split == name for split, _, _ in bad)
        aside = source.left_aside.total()
        account[name] = {
            "found": len(source) - source.missing + aside,
            "missing": source.missing,
            "read": drawn - worse,
            "not_drawn": len(source) - drawn,
            "bad": worse,
            "left_aside": aside,
            "left_aside_by_ending": dict(source.left_aside.most_common()),
        }
    return account, bad


def _labels(
    rows: list[tuple[int, int]], splits: dict[str, Source], names: list[str] | None
) -> tuple[Tensor | None, list[str] | None]:
    """Labels as class numbers, and the classes' names, `names` if given, else those of all images of the first split,
    drawn or not; (None, None) without two classes to tell.

    Raises:
        Refused: another split has a class that the first has not.
    """
    found = list(splits.values())
    values = [None if found[split].labels is None else found[split].labels[position] for split, position in rows]
    if names is None:
        seen = {value for value, (split, _) in zip(values, rows, strict=True) if value is not None and split == 0}
        names = found[0].names or sorted({value for value in found[0].labels or () if value is not None}, key=_natural)
        if len(seen) < 2 or len(names) < 2:
            return None, None
    if all(value is None for value in values):
        return None, None
    number = {name: i for i, name in enumerate(names)}
    for value, (split, _) in zip(values, rows, strict=True):
        if value is not None and value not in number:
            raise Refused(
                f"data.path: the split {list(splits)[split]!r} has the class {value!r}, which is not among the "
                "training split's; take it out there, or name the splits to use by --data.split and --data.test_split."
            )
    return torch.tensor([-1 if value is None else number[value] for value in values]), names


def _natural(name: str) -> list:
    """A key that sorts class 10 after class 9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part] or [(1, 0, "")]
