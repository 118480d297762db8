"""Bytes of image files to uint8 pixels, and many of these in memory or in a file."""

import functools
import hashlib
import importlib
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .files import Failed, writing

LARGE = 2**24  # pixels of a picture that is decoded alone, and reduced in bands
WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
LONGEST = 2  # long side over short side of what a step sees of a picture; of a longer one, a window

# Formats that Pillow needs a plugin for: first bytes of the file, endings, module, package.
PLUGINS = (
    (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", (".heic", ".heif", ".hif"), "pi_heif", "pi-heif"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", (".jxl",), "pillow_jxl", "pillow-jxl-plugin"),
)
RAW = (".dng", ".cr2", ".cr3", ".crw", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw")
VECTOR = (".svg", ".svgz", ".eps", ".ps", ".ai")
NO_PICTURES = ("HDF5", "MPEG", "GRIB", "BUFR", "IPTC", "PCD", "IM")  # what Pillow opens as stubs, or hardly an image
PROGRAMS = ("EPS",)  # what Pillow gives to a program to run
DNG_VERSION, ORIENTATION = 50706, 274  # tags of TIFF and EXIF
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM.{4}\0\0\0\0.{4}[\x0c\x28-\x7c]\0\0\0"
    rb"|....ftypavi[fs]|\0\0\0\x0cjP  |\xff\x4f\xff\x51|8BPS|DDS |qoif|P[1-6]\s+[#\d]|"
    + b"|".join(p[0] for p in PLUGINS),
    re.DOTALL,
)


@functools.cache
def endings() -> frozenset[str]:
    """Endings of files that are tried as images."""
    Image.init()
    ours = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    ours -= {ending for ending, kind in Image.registered_extensions().items() if kind in NO_PICTURES}
    return frozenset(ours | {ending for plugin in PLUGINS for ending in plugin[1]} | set(RAW) | set(VECTOR))


def is_image_file(path: str, regular: bool = True) -> bool:
    """Whether a file is to be tried as an image: by its ending, else by its first bytes."""
    if os.path.splitext(path)[1].lower() in endings():
        return True
    if not regular:
        return False
    try:
        with open(path, "rb") as file:
            return MAGIC.match(file.read(32)) is not None
    except OSError:
        return False


class Deep(Exception):
    """A picture of more than 8 bits, for which no white is known yet."""


def is_deep(picture: Image.Image) -> bool:
    """Whether values are 16-bit, 32-bit or floats."""
    return picture.mode.startswith("I") or picture.mode == "F"


def to_rgb(picture: Image.Image, white: float | None = None) -> Image.Image:
    """Any PIL image as 8-bit RGB: transparency laid over white, more than 8 bits scaled so that `white` is 255.

    Raises:
        ValueError: a pixel is not finite.
        Deep: there are more than 8 bits, and no white.
    """
    if is_deep(picture):
        if white is None:
            raise Deep
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        picture = Image.fromarray(np.clip(values * (255 / white), 0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


_alone = threading.Lock()


def open_picture(content: bytes, path: str = "") -> Image.Image:
    """Open an image file; what Pillow cannot read is told with the plugin that could.

    Raises:
        ValueError: why not.
    """
    ending = os.path.splitext(path)[1].lower()
    for magic, known, module, package in PLUGINS:
        if ending in known or re.match(magic, content[:16], re.DOTALL):
            if not _plugin(module):
                raise ValueError(f"Pillow reads this format once {package} is installed (pip install {package})")
            break
    if ending in RAW:
        raise ValueError("camera raw, which Pillow cannot read; convert it to JPEG or TIFF")
    if ending in VECTOR:
        raise ValueError("vector graphics, which Pillow cannot read; convert it to PNG")
    try:
        Image.init()
        formats = [kind for kind in Image.ID if kind not in (*PROGRAMS, *NO_PICTURES)]
        picture = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    if DNG_VERSION in getattr(picture, "tag_v2", ()):
        raise ValueError("camera raw, which Pillow cannot read; convert it to JPEG or TIFF")
    return picture


@functools.cache
def _plugin(module: str) -> bool:
    """Whether a plugin of Pillow is installed, which is then in use."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    getattr(found, "register_heif_opener", lambda: None)()
    return True


def decode(content: bytes, side: int, white: float | None = None, path: str = "") -> np.ndarray:
    """Bytes of an image file as [3, h, w] uint8 RGB, upright; its short side brought to `side`, never enlarged.

    Args:
        content: the file.
        side: px.
        white: value of more than 8 bits that becomes 255.
        path: whose ending tells of formats that have no magic number.

    Raises:
        ValueError: it cannot be decoded; Pillow raises nearly every other type, too.
        Deep: there are more than 8 bits, and no white.
    """
    with open_picture(content, path) as picture:
        if is_deep(picture) and white is None:
            raise Deep
        if picture.width * picture.height > LARGE:
            with _alone:
                rgb = _reduced(picture, side, white)
        else:
            rgb = to_rgb(ImageOps.exif_transpose(picture), white)
    width, height = rgb.size
    short = min(width, height)
    if short > side:
        width, height = max(side, round(width * side / short)), max(side, round(height * side / short))
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def _reduced(picture: Image.Image, side: int, white: float | None) -> Image.Image:
    """A large picture as RGB, upright, averaged down to about twice `side` at least, without a second copy of it."""
    picture.draft(None, (2 * side * picture.width // min(picture.size), 2 * side * picture.height // min(picture.size)))
    picture.load()
    orientation = picture.getexif().get(ORIENTATION, 1)  # which a TIFF loses as it is read, upright already
    factor = max(1, min(picture.size) // (2 * side))
    rows = max(1, LARGE // 4 // picture.width // factor) * factor
    bands = []
    for top in range(0, picture.height, rows):
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        bands.append(to_rgb(band, white).reduce(factor))
    whole = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)))
    place = 0
    for band in bands:
        whole.paste(band, (0, place))
        place += band.height
    whole.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(whole)


def peak(content: bytes, path: str = "") -> tuple[float, bool]:
    """Largest finite value of a picture of more than 8 bits, and whether its values are floats."""
    with open_picture(content, path) as picture:
        values = np.asarray(picture)
        finite = values[np.isfinite(values)]
        return (float(finite.max()) if finite.size else 0.0), picture.mode == "F"


def white_of(peaks: list[tuple[float, bool]]) -> float:
    """What white is, given (largest value, floats) of a sample: 1 for floats of less than 2, some of which may lie
    beyond white; else the first of `WHITES`, 2^n - 1."""
    most = max((value for value, _ in peaks), default=0.0)
    if most < 2 and peaks and all(floats for _, floats in peaks):
        return 1.0
    return float(next((white for white in WHITES if most <= white), 2 ** int(most).bit_length() - 1))


class Pixels:
    """Decoded pictures of any size, one after another.

    Args:
        flat: [bytes] uint8, each picture as [3, height, width].
        heights, widths: [N] int64, px; 0 where there is no picture.
        starts: [N] int64, where each begins.
        in_file: the bytes are a mapped file's.
    """

    def __init__(self, flat: Tensor, heights: Tensor, widths: Tensor, starts: Tensor, in_file: bool = False) -> None:
        self.in_file = in_file
        self.flat, self.heights, self.widths, self.starts = flat, heights, widths, starts
        there = heights > 0
        sizes = torch.stack([heights[there], widths[there]], 1).unique(dim=0)
        self.stacked = None
        if len(sizes) == 1:  # pictures of one size are drawn in one piece
            height, width = sizes[0].tolist()
            self.stacked, self.places = flat.view(-1, 3, height, width), starts // (3 * height * width)

    @classmethod
    def of(cls, pictures: Tensor) -> "Pixels":
        """[N, 3, H, W] uint8 of one size."""
        count, _, height, width = pictures.shape
        sizes = torch.full((count,), height), torch.full((count,), width)
        return cls(pictures.reshape(-1), *sizes, torch.arange(count) * (3 * height * width))

    def __len__(self) -> int:
        return len(self.heights)

    @property
    def nbytes(self) -> int:
        return self.flat.numel()

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        return 0 if self.in_file else self.nbytes

    @property
    def sides(self) -> Tensor:
        """[N] int64 short sides, px."""
        return torch.minimum(self.heights, self.widths)

    def picture(self, index: int) -> Tensor:
        """One whole picture, [3, h, w]."""
        height, width, start = int(self.heights[index]), int(self.widths[index]), int(self.starts[index])
        return self.flat[start : start + 3 * height * width].view(3, height, width)

    def squares(self, indices: Tensor) -> Tensor:
        """Centre squares, [B, 3, S, S] with the first sides[i] rows and columns filled."""
        heights, widths = self.heights[indices], self.widths[indices]
        sides = torch.minimum(heights, widths)
        return self._gather(indices, sides, sides, (heights - sides) // 2, (widths - sides) // 2)

    def windows(self, indices: Tensor, place: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Whole pictures, [B, 3, H, W], and how much of that each fills, [B, 2] int64 height and width.

        Of a picture longer than `LONGEST` times its short side it is a window of that length, at `place()`, [B] in
        [0, 1), of the way along; so that one panorama does not make the batch as long as itself.
        """
        heights, widths = self.heights[indices], self.widths[indices]
        most = LONGEST * torch.minimum(heights, widths)
        high, wide = torch.minimum(heights, most), torch.minimum(widths, most)
        top = left = torch.zeros_like(high)
        if bool(((heights > high) | (widths > wide)).any()):
            share = place()
            top, left = (share * (heights - high + 1)).long(), (share * (widths - wide + 1)).long()
        return self._gather(indices, high, wide, top, left), torch.stack([high, wide], 1)

    def _gather(self, indices: Tensor, high: Tensor, wide: Tensor, top: Tensor, left: Tensor) -> Tensor:
        if self.stacked is not None and bool((high > 0).all()):
            row, column, height, width = (int(x[0]) if len(x) else 0 for x in (top, left, high, wide))
            if bool((top == row).all() and (left == column).all()):
                part = self.stacked[:, :, row : row + height, column : column + width]
                return part.index_select(0, self.places[indices])  # ten times as fast as part[...]
        shape = (len(indices), 3, int(high.max()) if len(high) else 0, int(wide.max()) if len(wide) else 0)
        result = torch.zeros(shape, dtype=torch.uint8)
        boxes = torch.stack([indices, high, wide, top, left], 1).tolist()
        for row, (index, height, width, first, begin) in zip(result, boxes, strict=True):
            row[:, :height, :width] = self.picture(index)[:, first : first + height, begin : begin + width]
        return result


class Store:
    """Takes pictures one after another: into memory up to a limit, then into a file.

    Args:
        file: where they go beyond the limit.
        limit: bytes.
    """

    def __init__(self, file: Path, limit: float) -> None:
        self.file, self.limit, self.length = file, limit, 0
        self.memory: bytearray | None = bytearray()
        self.out: IO[bytes] | None = None

    def add(self, picture: np.ndarray) -> int:
        """Keep [3, h, w] uint8; where it begins."""
        start, self.length = self.length, self.length + picture.size
        if self.memory is not None and self.length > self.limit:
            with self._writing():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.out = self.file.open("wb")
                self.out.write(self.memory)
            self.memory = None
        if self.memory is not None:
            self.memory += picture.tobytes()
        else:
            with self._writing():
                self.out.write(picture.tobytes())
        return start

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A file that cannot be written whole leaves its place to others."""
        try:
            with writing(self.file):
                yield
        except Failed:
            self.file.unlink(missing_ok=True)
            raise

    def close(self) -> Tensor:
        """All of it, [bytes] uint8."""
        if self.memory is not None:
            return (
                torch.frombuffer(self.memory, dtype=torch.uint8) if self.memory else torch.zeros(0, dtype=torch.uint8)
            )
        with self._writing():
            self.out.flush()
            os.fsync(self.out.fileno())
            self.out.close()
        return mapped(self.file)


def mapped(file: Path) -> Tensor:
    """The bytes of a file, [bytes] uint8, which processes of a machine share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only map is fine: nothing writes to pixels
        return torch.from_numpy(np.memmap(file, np.uint8, "r"))


def digest(flat: Tensor) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(flat.numpy()).hexdigest()
