"""How much memory there is, and tables that lie in a file where it is short.

One bound, data.memory_gb, holds for decoded pictures and for the features of phase 2; what is beyond it lies in mapped
files, of which the machine's page cache holds what there is room for.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from .files import writing

# Where Linux tells a container's limit, use and cache, in version 2 and 1 of control groups.
GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take: what the machine has free, or its container, if that is less."""
    free = psutil.virtual_memory().available
    try:
        paths = {line.split(":", 2)[2].strip("/") for line in own.read_text().splitlines()}
    except OSError:  # no Linux
        return free
    places = {str(place) for path in paths for place in (Path(path), *Path(path).parents)}
    for version, limit, used, cache in GROUPS:
        for place in places:
            folder = root / version / place
            try:
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # there is no such limit
                continue
            free = min(free, most - taken + int(told.get(cache, 0)))
    return max(0, free)


def bound(memory_gb: float | None, taken: int = 0) -> float:
    """Bytes that may still be kept in memory: of `memory_gb` what is not taken; without it, half of what is free."""
    return free_memory() / 2 if memory_gb is None else max(0.0, memory_gb * 1e9 - taken)


def table(rows: int, width: int, folder: Path, room: float) -> Tensor:
    """Zeros, [rows, width] float32: in memory up to `room` bytes, else in a file of `folder` that nobody sees.

    Raises:
        Failed: the disk has no room for the file.
    """
    size = rows * width * torch.float32.itemsize
    if size <= max(0.0, room):
        return torch.zeros(rows, width)
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a map of what the disk cannot hold would end in a bus error
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))


def placed(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on the device, if half of what is free there holds them, else where they are."""
    fits = device.type != "cuda" or rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return rows.to(device) if fits else rows
