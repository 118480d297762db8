"""Mutated images of many formats, and what the reader makes of them."""

import io

import numpy as np
from PIL import Image

from tests.faults.harness import mutated
from training import images
from training.pixels import digest
from training.recipe import Data

KINDS = {
    "png": {}, "jpeg": {}, "gif": {}, "webp": {}, "bmp": {}, "ppm": {}, "tiff": {"compression": "tiff_lzw"}, "avif": {},
    "jpeg2000": {}, "qoi": {},
}  # fmt: skip


def originals(rng):
    """Small pictures by ending, in formats and modes that this Pillow writes."""
    for kind, options in KINDS.items():
        for mode in ("RGB", "L", "RGBA", "P", "I;16"):
            array = rng.integers(0, 2**16 if mode == "I;16" else 256, (20, 24, 3)).astype(np.uint16)
            picture = Image.fromarray(array[..., 0] if mode == "I;16" else array.astype(np.uint8))
            picture = picture if picture.mode == mode else picture.convert(mode)
            buffer = io.BytesIO()
            try:
                picture.save(buffer, kind, **options)
            except (OSError, KeyError, ValueError):  # not in this mode, or not in this build
                continue
            yield {"jpeg2000": "jp2"}.get(kind, kind), buffer.getvalue()


def write_mutated(folder, count, rng):
    """Write so many mutated images."""
    known = list(originals(rng))
    for number in range(count):
        kind, content = known[number % len(known)]
        (folder / f"{number:05d}.{kind}").write_bytes(mutated(content, rng))


def look(folder):
    """What became of the images of a folder, and the sha256 of what was read."""
    found, _ = images.load_splits(Data(path=str(folder), size=16, max_bad_fraction=1.0), None)
    told = next(iter(found.account.values()))
    reasons = tuple(reason for _, _, reason in found.bad)
    return {"read": told["read"], "bad": told["bad"], "pixels": digest(found.pixels.flat), "reasons": reasons}
