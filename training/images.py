"""Any image data in; uint8 pixels, indices, labels or None out.

Every file is decoded once, to a square of at most 1.15 times the working size, and kept as uint8: in memory, or in a
memory-mapped file beside the run. An image that cannot be decoded keeps its index and is never drawn.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .files import Failed, Refused, whole_file, write_text
from .recipe import Data

MARGIN = 1.15  # stored side over working side: room for the centre crop of evaluation, as timm's crop_pct 0.875
CHUNK = 256  # images decoded between two reads of the data set

datasets.disable_progress_bars()


@dataclass
class Images:
    """The images of one split.

    Attributes:
        pixels: [N, 3, S, S] uint8 RGB; image i fills the first sides[i] rows and columns.
        sides: [N] int64, px; 0 where the image could not be decoded.
        labels: [N] int64, -1 where unknown; None without labels.
        label_names: the classes' names; None without labels.
        paths: [N] path of each file, or its row in the data set.
        usable: [N] bool, what could be decoded.
        held_out: [N] bool, the part of train that settings may be chosen on.
        fingerprint: sha256 over (path, length, sha256 of the bytes) in order.
        mean, std: of the training images' RGB values in [0, 1].
        crop_pct: working side over stored side, at most 1: the share of an image that evaluation sees.
        size: working size, px.
    """

    pixels: Tensor
    sides: Tensor
    labels: Tensor | None
    label_names: list[str] | None
    paths: list[str]
    held_out: Tensor
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    size: int

    @property
    def usable(self) -> Tensor:
        return self.sides > 0

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

    def __len__(self) -> int:
        return len(self.paths)


def load(
    data: Data, split: str, folder: Path, like: Images | None = None, in_file: bool = False, listing: bool = True
) -> Images:
    """Read and decode a split.

    Args:
        data: where the images are and how large they are kept.
        split: name of the split.
        folder: run folder, which gets ``bad_images.txt`` and, where memory is short, ``images/SPLIT.u8``.
        like: the training split, whose statistics, crop and class names a test split shares.
        in_file: keep pixels in the file whatever their size, so that the processes of a machine share them.
        listing: write ``bad_images.txt``; of several processes one does.

    Raises:
        Refused: the data cannot be read, or has no usable image.
        Failed: more than data.max_bad_fraction of the images cannot be decoded.
    """
    rows = read_split(data, split)
    column = _image_column(rows, data)
    if like is None and data.limit and data.limit < len(rows):
        chosen = np.random.default_rng(data.split_seed).permutation(len(rows))[: data.limit]
        rows = rows.select(np.sort(chosen))
    labels, names = _labels(rows, data, like.label_names if like else None)
    pixels, moments, paths, fingerprint, bad = _decode_all(rows, column, data, split, folder, in_file)
    if like is None and listing:
        write_text(folder / "bad_images.txt", "".join(f"{line}\n" for line in bad))
    if len(bad) == len(rows):
        raise Refused(f"data.path: no image of split {split!r} in {data.path} can be decoded ({len(bad)} tried).")
    if len(bad) > data.max_bad_fraction * len(rows):
        raise Failed(
            f"{len(bad)} of {len(rows)} images could not be decoded, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows; {folder / 'bad_images.txt'} lists them, the first is "
            f"{' '.join(bad[0].split())}."
        )
    sides = torch.from_numpy(moments[:, 0].astype(np.int64))
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    if like is None:
        drawn = np.random.default_rng(data.split_seed + 1).permutation(len(rows))
        held_out[drawn[: round(data.val_fraction * len(rows))].copy()] = True
        train = ((sides > 0) & ~held_out).numpy()
        train = train if train.any() else (sides > 0).numpy()
        mean = moments[train, 1:4].mean(0)
        std = np.sqrt(np.maximum(moments[train, 4:7].mean(0) - mean**2, 1 / 255**2))
        crop_pct = min(1.0, data.size / int(sides.max()))
        # Four digits are what a config.json and a card can show, and are the statistics that training uses.
        statistics = tuple(round(float(x), 4) for x in mean), tuple(round(float(x), 4) for x in std), crop_pct
    else:
        statistics = like.mean, like.std, like.crop_pct
    return Images(pixels, sides, labels, names, paths, held_out, fingerprint, *statistics, data.size)


def find_test_split(data: Data) -> str | None:
    """Name of the split to test on: the one asked for, else "test" or "validation" if it is there, else None."""
    if data.test_split:
        return None if data.test_split == "none" else data.test_split
    names = split_names(data)
    return next((name for name in ("test", "validation") if name in names and name != data.split), None)


def split_names(data: Data) -> list[str]:
    """Names of the data set's splits."""
    return list(_read(data).keys())


def read_split(data: Data, split: str) -> datasets.Dataset:
    """A split as datasets reads it, images not yet decoded."""
    found = _read(data)
    if split not in found:
        raise Refused(f"data.split: {data.path} has no split {split!r}; it has {', '.join(map(repr, found))}.")
    if len(found[split]) == 0:
        raise Refused(f"data.path: split {split!r} of {data.path} is empty.")
    return found[split]


def _read(data: Data) -> dict[str, datasets.Dataset]:
    if data.path == "digits":
        return _digits()
    path = Path(data.path).expanduser()
    if not path.exists() and (data.path.startswith((".", "/", "~")) or data.path.count("/") > 1):
        raise Refused(f"data.path: {data.path} does not exist.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.is_file():
                kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "webdataset")
                return datasets.load_dataset(kind, data_files={data.split: str(path)})
            return datasets.load_dataset(str(path) if path.exists() else data.path, data.name)
    except Exception as error:  # datasets raises nearly every type, also for what a user mistyped
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refused(f"data.path: {data.path} cannot be read as a data set: {reason}") from error


def _digits() -> dict[str, datasets.Dataset]:
    """The 1,797 digits of 8 px that scikit-learn ships, every fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in bunch.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    order = np.random.default_rng(0).permutation(len(pictures))
    parts = {"train": order[len(order) // 5 :], "test": order[: len(order) // 5]}
    return {
        name: datasets.Dataset.from_dict(
            {"image": [pictures[i] for i in part], "label": bunch.target[part].tolist()}, features=features
        )
        for name, part in parts.items()
    }


def _image_column(rows: datasets.Dataset, data: Data) -> str:
    if data.image_column:
        if data.image_column not in rows.features:
            raise Refused(
                f"data.image_column: there is no column {data.image_column!r}; there are {', '.join(rows.features)}."
            )
        return data.image_column
    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in ("image", "img") if name in rows.features]
    if len(found) != 1:
        raise Refused(
            f"data.image_column: {len(found)} of the columns {', '.join(rows.features)} hold images; name the one."
        )
    return found[0]


def _labels(rows: datasets.Dataset, data: Data, names: list[str] | None) -> tuple[Tensor | None, list[str] | None]:
    """Labels as class numbers, and the classes' names, `names` if given; (None, None) without two classes to tell."""
    column = data.label_column
    if column and column not in rows.features:
        raise Refused(f"data.label_column: there is no column {column!r}; there are {', '.join(rows.features)}.")
    single = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel | datasets.Value)]
    if column and column not in single:
        raise Refused(f"data.label_column: {column!r} holds more than one class for each image.")
    column = column or next((name for name in ("label", "labels", "fine_label") if name in single), None)
    if column is None:
        return None, None
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        given = list(feature.names)
        values = [None if v is None or v < 0 else given[v] for v in values]
    else:
        given = None
        values = [None if _unlabelled(v) else str(v) for v in values]
    seen = {v for v in values if v is not None}
    if names is None:
        names = given or sorted(seen, key=lambda v: (len(v), v) if v.isdecimal() else (1 << 20, v))
        if len(seen) < 2 or len(names) < 2:
            return None, None
    if not seen:
        return None, None
    unknown = seen - set(names)
    if unknown:
        raise Refused(f"data.test_split: its label {sorted(unknown)[0]!r} is not among the training split's classes.")
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([-1 if v is None else number[v] for v in values]), names


def _unlabelled(value: Any) -> bool:
    """Whether an entry of a column says that there is no label: none, empty, not a number, or a negative one."""
    number = isinstance(value, int | float)
    return value is None or value == "" or (number and (value < 0 or value != value))


def _raw(row: Any, position: int, root: Path) -> tuple[str, bytes, str]:
    """A row of datasets.Image(decode=False) as (path, bytes, error)."""
    if row is None:
        return str(position), b"", "no image"
    path = row.get("path") or str(position)
    try:
        content = row["bytes"] if row.get("bytes") is not None else Path(path).read_bytes()
    except OSError as error:
        content, reason = b"", error.strerror or "cannot be read"
    else:
        reason = "" if content else "empty file"
    if os.path.isabs(path) and Path(path).is_relative_to(root):
        path = str(Path(path).relative_to(root))
    return path, content, reason


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright: EXIF orientation applied, transparency laid over white, 16 bits scaled."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F":  # nothing says the range of floats; [0, 1] and [0, 255] are the ones in use
            values = values * (255 if values.max() <= 1 else 1)
        elif picture.mode.startswith("I;16") or values.max() > 255:
            values = values / 257  # 65535 becomes 255
        picture = Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def decode(content: bytes, side: int) -> np.ndarray:
    """Bytes of an image file as [3, s, s] uint8 RGB: short side brought to `side` (never enlarged), centre-cropped."""
    with Image.open(io.BytesIO(content)) as picture:
        picture = to_rgb(picture)
    width, height = picture.size
    short = min(width, height)
    if short > side:
        width, height = max(side, round(width * side / short)), max(side, round(height * side / short))
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        short = side
    left, top = (width - short) // 2, (height - short) // 2
    return np.asarray(picture)[top : top + short, left : left + short].transpose(2, 0, 1)


def _chunks(rows: datasets.Dataset, column: str) -> Iterator[list[Any]]:
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK][column]


def _decode_all(
    rows: datasets.Dataset, column: str, data: Data, split: str, folder: Path, in_file: bool
) -> tuple[Tensor, np.ndarray, list[str], str, list[str]]:
    """Pixels [N, 3, S, S] uint8; side, mean and mean square of each image [N, 7]; paths; fingerprint; bad images."""
    slot = round(MARGIN * data.size)
    shape = (len(rows), 3, slot, slot)
    limit = psutil.virtual_memory().available / 2 if data.memory_gb is None else data.memory_gb * 1e9
    file, done = folder / "images" / f"{split}.u8", folder / "images" / f"{split}.npz"
    in_file = in_file or np.prod(shape) > limit
    decoded = in_file and done.exists() and file.exists() and file.stat().st_size == np.prod(shape)
    if in_file:
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.memmap(file, np.uint8, "r" if decoded else "w+", shape=shape)
    else:
        pixels = np.zeros(shape, np.uint8)
    moments, known = np.zeros((len(rows), 7)), ""
    if decoded:
        with np.load(done) as saved:
            moments, known = saved["moments"], str(saved["fingerprint"])

    def one(position: int, row: Any) -> tuple[str, int, str, str]:
        path, content, reason = _raw(row, position, Path(data.path).expanduser().resolve())
        digest = hashlib.sha256(content).hexdigest()
        if not reason and not decoded:
            try:
                picture = decode(content, slot)
            except UnidentifiedImageError:
                reason = "not an image"
            except Exception as error:  # Pillow's plugins raise nearly every type on a broken file
                reason = " ".join(str(error).split())[:120] or type(error).__name__
            else:
                side = picture.shape[1]
                pixels[position, :, :side, :side] = picture
                scaled = picture.reshape(3, -1) / 255.0
                moments[position] = [side, *scaled.mean(1), *(scaled**2).mean(1)]
        elif decoded and moments[position, 0] == 0:
            reason = reason or "cannot be decoded"
        return path, len(content), digest, reason

    seen, paths, bad = hashlib.sha256(), [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what is wrong with them is listed
        for chunk in _chunks(rows, column):
            for path, length, digest, reason in pool.map(one, range(len(paths), len(paths) + len(chunk)), chunk):
                if reason:
                    bad.append(f"{len(paths)}\t{path}\t{reason}")
                paths.append(path)
                seen.update(f"{path}\0{length}\0{digest}\n".encode())
    fingerprint = seen.hexdigest()
    if decoded and fingerprint != known:  # the file holds what other images once were
        done.unlink()
        return _decode_all(rows, column, data, split, folder, in_file)
    if in_file and not decoded:
        pixels.flush()
        with whole_file(done) as beside:
            np.savez(beside, moments=moments, fingerprint=fingerprint)
    largest = max(1, int(moments[:, 0].max()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only map is fine: nothing writes to pixels
        stored = torch.from_numpy(pixels)[:, :, :largest, :largest]
    return stored, moments, paths, fingerprint, bad
