"""How speed is measured: ours and a peer in turn, on made-up images and features."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from ..images import Images
from ..pixels import Pixels


@dataclass
class Size:
    """How much is measured.

    Attributes:
        rounds: of ours and the peer.
        images: of a batch of views at 32 px; fewer where they are larger.
        rows: rows a centroid.
        k: numbers of clusters.
        bank: rows that neighbours are looked for among.
        sides: px.
    """

    rounds: int = 7
    images: int = 256
    rows: int = 32
    k: tuple[int, ...] = (1000, 10000)
    bank: int = 20000
    sides: tuple[int, ...] = (32, 64, 224)


TINY = Size(rounds=2, images=4, rows=8, k=(20,), bank=300, sides=(32,))
Row = dict[str, Any]


def seconds(device: str, work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and seconds of some work."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def side_by_side(name: str, peer: Callable, ours: Callable, rounds: int, device: str = "cpu", **told: Any) -> Row:
    """A row: peer and ours in turn, after one of each that does not count."""
    times = [(seconds(device, peer), seconds(device, ours)) for _ in range(rounds + 1)][1:]
    return row(name, times, device, **told)


def row(name: str, times: list, device: str = "cpu", **told: Any) -> Row:
    """A row from ((CPU seconds, seconds) of the peer, of ours) of each round."""
    table = np.array(times)  # [rounds, peer or ours, CPU or wall]
    counted = table[:, :, 0 if device == "cpu" else 1]
    low, middle, high = np.quantile(counted[:, 0] / counted[:, 1], [0.25, 0.5, 0.75]).tolist()
    means = {"cpu": table[:, 1, 0], "wall": table[:, 1, 1], "peer_cpu": table[:, 0, 0], "peer_wall": table[:, 0, 1]}
    spent = {key: float(np.median(value)) for key, value in means.items()}
    name = name if device == "cpu" else f"{name}, GPU"
    measured = {"rounds": len(times), "threads": torch.get_num_threads() if device == "cpu" else None, **spent}
    return {"name": name, "ratio": middle, "low": low, "high": high, **measured, **told}


def table(rows: list[Row]) -> list[list[str]]:
    """A head, and a line for each row: the ratio, its quartiles and goal, what ours and the peer spend."""
    lines = [["peer's time over ours", "ratio", "quartiles", "goal", "threads", "CPU s", "peer's", "s", "peer's"]]
    for r in rows:
        told = [r["name"], f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", str(r["goal"] or "")]
        lines.append(
            [*told, str(r["threads"] or ""), *(f"{r[key]:.3g}" for key in ("cpu", "peer_cpu", "wall", "peer_wall"))]
        )
    return lines


def pictures(count: int, side: int, size: int) -> Images:
    """Made-up images, smooth with some noise, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 8 + 1, side // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") * 200
    pixels = (smooth + 55 * torch.rand(count, 3, side, side, generator=generator)).to(torch.uint8)
    half = torch.arange(count) < 0
    statistics = (0.5,) * 3, (0.25,) * 3
    return Images(
        Pixels.of(pixels), None, None, [str(i) for i in range(count)], half, "0" * 64, *statistics, size / side, size
    )


def features(count: int, width: int = 128) -> torch.Tensor:
    """Made-up unit rows: many groups of unequal size, variances that fall as those of networks' features do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.25
    centres = torch.randn(max(10, count // 100), width, generator=generator)
    drawn = (torch.rand(count, generator=generator) ** 2 * len(centres)).long()
    return normalize((centres[drawn] + 1.2 * torch.randn(count, width, generator=generator)) * spectrum, dim=1)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
