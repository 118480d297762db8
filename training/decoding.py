"""Every file of some splits to pixels, once; again only if it is another."""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import pixels as P
from .files import whole_file
from .memory import bound
from .pixels import Pixels
from .recipe import Data
from .sources import Source

MARGIN = 1.15  # stored side over working side: room for the centre crop of evaluation, as timm's crop_pct 0.875
CHUNK = 256  # images decoded between two reads of the data set
DEEP_SAMPLE = 64  # pictures of more than 8 bits that tell what white is


@dataclass
class Decoded:
    """What was read of some files.

    Attributes:
        pixels: the pictures.
        moments: [N, 6] float64, mean and mean square of each one's RGB values in [0, 1].
        paths: how each is written.
        reasons: why one could not be decoded; "" if it could.
        fingerprint: as `Images` has it.
        white: what more than 8 bits were scaled by.
    """

    pixels: Pixels
    moments: np.ndarray
    paths: list[str]
    reasons: list[str]
    fingerprint: str
    white: float | None


def decode_all(
    rows: list[tuple[int, int]],
    found: list[Source],
    data: Data,
    name: str,
    folder: Path | None,
    in_file: bool,
    white: float | None,
    taken: int = 0,
) -> Decoded:
    """Decode every row, or take what the run folder has of the same files; `taken` bytes of memory_gb are in use."""
    file = (folder or Path()) / "images" / f"{name}.u8"
    slot = round(MARGIN * data.size)
    made = repr([slot, white])
    kept = _kept(file, made) if folder else None
    store = P.Store(file, (-1 if in_file else bound(data.memory_gb, taken)) if folder else float("inf"))
    shape = np.zeros((len(rows), 3), np.int64)  # height, width, start
    moments, deep = np.zeros((len(rows), 6)), []

    def one(position: int, content: bytes, path: str, reason: str, white: float | None) -> tuple[Any, str]:
        """What became of an image: its picture, or why there is none."""
        if reason or kept:
            return None, reason
        try:
            return P.decode(content, slot, white, path), ""
        except P.Deep:
            deep.append(position)
            return None, ""
        except Exception as error:  # Pillow's plugins raise nearly every type on a broken file
            return None, " ".join(str(error).split())[:120] or type(error).__name__

    def keep(position: int, picture: np.ndarray) -> None:
        shape[position] = (*picture.shape[1:], store.add(picture))
        values = picture.reshape(3, -1).astype(np.float64)
        moments[position, :3] = values.sum(1) / (255 * values.shape[1])
        moments[position, 3:] = np.einsum("cp,cp->c", values, values) / (255**2 * values.shape[1])

    seen, paths, reasons = hashlib.sha256(), [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what is wrong with them is listed

        def read(position: int, source: Source, row: Any) -> tuple:
            path, content, reason = source.read(row)
            return path, len(content), hashlib.sha256(content).hexdigest(), *one(position, content, path, reason, white)

        bar = tqdm(total=len(rows), desc=f"reading {name}", unit="image", disable=None, leave=False)
        for batch, args in _chunks(rows, found):
            bar.update(len(batch))
            for position, (path, length, digest, picture, reason) in zip(batch, pool.map(read, *args), strict=True):
                paths.append(path)
                reasons.append(reason)
                seen.update(f"{path}\0{length}\0{digest}\n".encode())
                if picture is not None:
                    keep(position, picture)
        bar.close()
        fingerprint = seen.hexdigest()
        if kept and kept["fingerprint"] != fingerprint:  # the file holds what other images once were
            file.unlink()
            return decode_all(rows, found, data, name, folder, in_file, white, taken)
        if kept:
            pixels = Pixels(P.mapped(file), *torch.from_numpy(kept["shape"]).T.contiguous(), in_file=True)
            known = None if kept["white"] < 0 else float(kept["white"])
            return Decoded(pixels, kept["moments"], paths, kept["reasons"].tolist(), fingerprint, known)
        if deep:  # once all have been met, so that white is one value for all of them
            deep.sort()
            white = P.white_of(_peaks(deep, rows, found, data.split_seed, pool))
            for batch, args in _chunks([rows[i] for i in deep], found, deep):

                def again(position: int, source: Source, row: Any, white: float = white) -> tuple[Any, str]:
                    path, content, reason = source.read(row)
                    return one(position, content, path, reason, white)

                for position, (picture, reason) in zip(batch, pool.map(again, *args), strict=True):
                    reasons[position] = reason
                    if picture is not None:
                        keep(position, picture)
    flat = store.close()
    if store.memory is None:
        told = {
            "shape": shape,
            "moments": moments,
            "reasons": np.array(reasons),
            "white": -1.0 if white is None else white,
        }
        told |= {"fingerprint": fingerprint, "made": made, "sha256": P.digest(flat)}
        with whole_file(file.with_suffix(".npz")) as beside:
            np.savez(beside, **told)
    pixels = Pixels(flat, *torch.from_numpy(shape).T.contiguous(), in_file=store.memory is None)
    return Decoded(pixels, moments, paths, reasons, fingerprint, white)


def _kept(file: Path, made: str) -> dict[str, np.ndarray] | None:
    """What is known of the pixels in a file, if they are whole and were made in the same way."""
    try:
        with np.load(file.with_suffix(".npz")) as saved:
            told = dict(saved)
        whole = str(told["made"]) == made and str(told["sha256"]) == P.digest(P.mapped(file))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return told if whole else None


def _chunks(
    rows: list[tuple[int, int]], found: list[Source], positions: list[int] | None = None
) -> Iterator[tuple[list[int], tuple[list, list, list]]]:
    """Rows as (their positions, (positions, sources, what each source reads)), some of one split at a time."""
    positions = list(range(len(rows))) if positions is None else positions
    for number, source in enumerate(found):
        own = [i for i, (split, _) in enumerate(rows) if split == number]
        for start in range(0, len(own), CHUNK):
            part = own[start : start + CHUNK]
            batch = [positions[i] for i in part]
            yield batch, (batch, [source] * len(part), source.rows([rows[i][1] for i in part]))


def _peaks(deep: list[int], rows: list, found: list[Source], seed: int, pool: ThreadPoolExecutor) -> list:
    """The largest values of a sample of the pictures of more than 8 bits."""
    drawn = np.random.default_rng(seed).permutation(len(deep))[:DEEP_SAMPLE]
    chosen = [deep[i] for i in np.sort(drawn)]

    def read(position: int) -> tuple[float, bool] | None:
        split, place = rows[position]
        path, content, _ = found[split].read(found[split].rows([place])[0])
        try:
            return P.peak(content, path)
        except Exception:  # as `one` has it
            return None

    return [told for told in pool.map(read, chosen) if told]
