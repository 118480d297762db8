"""Pixels: every odd file becomes RGB or tells why not, and every picture comes back as it was kept."""

import base64
import io
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from training import memory
from training import pixels as P


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(mode, value, size=(12, 12)):
    return Image.new(mode, size, value)


def paletted():
    return colour("RGB", (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


def deep(value, kind=np.uint16):
    return Image.fromarray(np.full((12, 12), value, kind))


@pytest.mark.parametrize(
    ("content", "white", "expected"),
    [
        (encoded(colour("L", 100)), None, (100, 100, 100)),
        (encoded(colour("1", 1)), None, (255, 255, 255)),
        (encoded(colour("RGBA", (200, 0, 0, 255))), None, (200, 0, 0)),
        (encoded(colour("RGBA", (0, 0, 0, 0))), None, (255, 255, 255)),
        (encoded(colour("LA", (0, 0))), None, (255, 255, 255)),
        (encoded(paletted()), None, (10, 200, 30)),
        (encoded(colour("CMYK", (0, 255, 255, 0)), "TIFF"), None, (255, 0, 0)),
        (encoded(deep(65535)), 65535, (255, 255, 255)),
        (encoded(deep(25700)), 65535, (100, 100, 100)),
        (encoded(deep(1606)), 4095, (100, 100, 100)),
        (encoded(deep(5000)), 4095, (255, 255, 255)),
        (encoded(deep(200, np.int32), "TIFF"), 255, (200, 200, 200)),
        (encoded(deep(0.4, np.float32), "TIFF"), 1, (102, 102, 102)),
        (encoded(deep(102.0, np.float32), "TIFF"), 255, (102, 102, 102)),
        (encoded(colour("RGB", (1, 2, 3)), "BMP"), None, (1, 2, 3)),
        (encoded(colour("RGB", (90, 90, 90)), "AVIF"), None, (90, 90, 90)),
    ],
)
def test_every_kind_of_file_becomes_rgb(content, white, expected):
    array = P.decode(content, 12, white)
    assert array.dtype == np.uint8
    assert np.abs(array.reshape(3, -1).T.astype(int) - expected).max() <= 1
    if white is not None:
        with pytest.raises(P.Deep):
            P.decode(content, 12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_make_an_image_bad(value):
    array = np.full((12, 12), 0.5, np.float32)
    array[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        P.decode(encoded(Image.fromarray(array), "TIFF"), 12, 1)


@pytest.mark.parametrize(
    ("peaks", "white"),
    [
        ([(200, False), (300, False)], 1023),
        ([(255, False)], 255),
        ([(3900, False)], 4095),
        ([(12_000, False)], 16383),
        ([(60_000, False)], 65535),
        ([(70_000, False)], 131071),
        ([(0.9, True)], 1),
        ([(1, False)], 255),
        ([(0.9, True), (200.0, True)], 255),
    ],
)
def test_white_is_the_first_that_a_sample_does_not_exceed(peaks, white):
    assert P.white_of(peaks) == white


def test_exif_orientation_is_applied():
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10] = 255
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a quarter clockwise
    turned = Image.fromarray(np.rot90(upright).copy())
    array = P.decode(encoded(turned, exif=exif), 20)
    assert array.shape == (3, 20, 30)
    assert array[:, :10].min() > 200
    assert array[:, 10:].max() < 50


def test_the_whole_picture_is_kept_its_short_side_brought_down_and_nothing_enlarged():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert P.decode(encoded(Image.fromarray(wide)), 30).shape == (3, 20, 60)
    small = P.decode(encoded(Image.fromarray(wide)), 10)
    assert small.shape == (3, 10, 30)
    assert small[:, :, 11:19].min() > 200
    assert small[:, :, :9].max() < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "alpha", "deep"])
def test_a_large_picture_is_what_the_plain_way_makes_of_it_but_in_bands(kind, monkeypatch):
    y, x = np.mgrid[:300, :420]
    waves = (127 + 100 * np.sin(x / 40) * np.cos(y / 30)).astype(np.uint8)
    picture = Image.fromarray(np.stack([waves, waves.T[:300, :300].repeat(2, 1)[:, :420], 255 - waves], 2))
    if kind == "alpha":
        picture.putalpha(Image.fromarray(waves))
    if kind == "deep":
        picture = Image.fromarray(waves.astype(np.uint16) * 200)
    exif = Image.Exif()
    exif[274] = 8
    white = 51_000 if kind == "deep" else None
    content = encoded(picture, kind if kind.isupper() else "PNG", exif=exif)
    plain = P.decode(content, 24, white)
    monkeypatch.setattr(P, "LARGE", 20_000)
    banded = P.decode(content, 24, white)
    assert banded.shape == plain.shape
    assert np.abs(banded.astype(int) - plain).mean() < 2


def test_a_huge_picture_takes_no_gigabyte(tmp_path):
    content = encoded(Image.new("RGB", (9_000, 9_000)))
    (tmp_path / "huge.png").write_bytes(content)
    code = (
        "import resource, sys; from training import pixels as P; P.endings(); content = open(sys.argv[1], 'rb').read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "assert P.decode(content, 64).shape == (3, 64, 64); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "huge.png"], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < 450e6, done.stderr  # Pillow's own copy of it takes 324 MB


# A grey square of 16 px, made for this test.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA"
    "AAAERAAAEAAQAAAAABoAABAAAAAAAAACYAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAA"
    "AADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkA"
    "AAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAA"
    "AChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAALm"
    "1kYXQAAAAiKAGvEyEdlvhbUwmI6yxAuUxYKXlXIJNuwHivMoeOva+aYA=="
)
JXL = b"\xff\x0a" + b"\0" * 20
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"  # Pillow would run Ghostscript for it


def test_what_pillow_cannot_read_is_told_with_the_plugin_that_can(monkeypatch):
    monkeypatch.setattr(P, "_plugin", lambda module: False)
    for content, path, said in (
        (JXL, "a", "pip install pillow-jxl-plugin"),
        (b"", "a.jxl", "pip install pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a", "pip install pi-heif"),
        (encoded(colour("L", 3), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "a.tif", "camera raw"),
        (encoded(colour("L", 3), "TIFF"), "a.DNG", "camera raw"),
        (b"<svg/>", "a.svg", "vector graphics"),
        (EPS, "a.eps", "vector graphics"),
        (EPS, "a.jpg", "not an image"),
        (b"no image", "a.png", "not an image"),
    ):
        with pytest.raises(ValueError, match=said):
            P.decode(content, 12, path=path)


def test_heic_is_read_where_the_plugin_is_installed():
    pytest.importorskip("pi_heif")
    assert np.abs(P.decode(HEIC, 16).astype(int) - 128).max() <= 3


@pytest.mark.parametrize(
    ("name", "content", "tried"),
    [
        ("a.png", b"no image", True),
        ("a.JPEG", b"", True),
        ("photo", encoded(colour("L", 1)), True),
        ("photo.txt", encoded(colour("L", 1), "JPEG"), True),
        ("photo.bin", encoded(colour("L", 1), "WEBP"), True),
        ("photo.dat", encoded(colour("L", 1), "AVIF"), True),
        ("photo.x", encoded(colour("RGB", (1, 2, 3)), "BMP"), True),
        ("photo.y", encoded(colour("L", 1), "PPM"), True),
        ("BMW.txt", b"BMW makes cars, and a text may begin in this way", False),
        ("P5.txt", b"P5 is no image", False),
        ("notes.json", b"{}", False),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 40, False),
        ("more.zip", b"PK\3\4", False),
        ("features.h5", b"\x89HDF\r\n\x1a\n", False),
        ("a.im", b"", False),
    ],
)
def test_what_is_tried_as_an_image(name, content, tried, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert P.is_image_file(str(tmp_path / name)) is tried


def kept(sizes, limit=float("inf"), file=None):
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (3, *size), dtype=np.uint8) for size in sizes]
    store = P.Store(file, limit)
    starts = [store.add(picture) if picture.size else 0 for picture in pictures]
    heights, widths = torch.tensor(sizes).T
    return P.Pixels(store.close(), heights, widths, torch.tensor(starts)), [torch.from_numpy(p) for p in pictures]


@pytest.mark.parametrize("sizes", [[(8, 8)] * 4, [(8, 12), (9, 7), (5, 5), (6, 10)], [(8, 8), (0, 0), (8, 8), (8, 8)]])
@pytest.mark.parametrize("limit", [float("inf"), 200, -1])
def test_pictures_come_back_as_they_were_kept(sizes, limit, tmp_path):
    found, pictures = kept(sizes, limit, tmp_path / "images" / "train.u8")
    assert (tmp_path / "images" / "train.u8").exists() == (limit < 1000)
    order = torch.tensor([2, 0, 3])
    whole, filled = found.windows(order, lambda: None)
    squares = found.squares(order)
    for place, index in enumerate(order.tolist()):
        picture = pictures[index]
        height, width = picture.shape[1:]
        assert torch.equal(found.picture(index), picture)
        assert filled[place].tolist() == [height, width]
        assert torch.equal(whole[place, :, :height, :width], picture)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        assert torch.equal(squares[place, :, :side, :side], picture[:, top : top + side, left : left + side])
    both, filled = found.windows(torch.tensor([1, 0]), lambda: None)  # one that may be bad, of no pixels, comes first
    assert filled[0].tolist() == list(sizes[1])
    assert torch.equal(both[1, :, : sizes[0][0], : sizes[0][1]], pictures[0])


def test_of_a_long_picture_a_window_is_seen_anywhere_along_it():
    found, pictures = kept([(6, 30), (40, 6), (6, 6)])
    seen = {0: set(), 1: set()}
    for share in torch.linspace(0, 0.999, 60, dtype=torch.float64):
        pixels, filled = found.windows(torch.arange(3), lambda share=share: share.expand(3))
        assert pixels.shape == (3, 3, 12, 12)
        assert filled.tolist() == [[6, 12], [12, 6], [6, 6]]
        for index, axis in ((0, 2), (1, 1)):
            whole = pictures[index].unfold(axis, 12, 1)
            part = pixels[index, :, : filled[index, 0], : filled[index, 1]]
            for start in range(whole.shape[axis]):
                cut = whole.select(axis, start)
                if torch.equal(cut.transpose(1, 2) if axis == 1 else cut, part):
                    seen[index].add(start)
    assert seen == {0: set(range(19)), 1: set(range(29))}


def test_a_containers_limit_counts(tmp_path):
    own = tmp_path / "cgroup"
    for version, line, files in (
        ("", "0::/pod/one", {"memory.max": 3000, "memory.current": 1000}),
        ("memory", "4:memory:/pod/one", {"memory.limit_in_bytes": 3000, "memory.usage_in_bytes": 1000}),
    ):
        root = tmp_path / (version or "two")
        folder = root / version / "pod"  # the limit may be that of a group above one's own
        folder.mkdir(parents=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("anon 900\ninactive_file 100\ntotal_inactive_file 100\n")
        own.write_text(f"{line}\n")
        assert memory.free_memory(root, own) == 2100
        (folder / next(iter(files))).write_text("max\n")
        assert memory.free_memory(root, own) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
