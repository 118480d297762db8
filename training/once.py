"""A phase of a run is done once, by it or by another arm of its comparison; its marker tells from what."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import backbone as B
from . import longer, records
from .files import sha256_file, sha256_json, whole_file, whole_folder, write_json
from .markers import check_written, refuse_other, written
from .recipe import phase_fields
from .setup import Run

MAKES = {"proxy": B.FILES, "clusters": ("labels.parquet", "clusters.safetensors"), "relearn": B.FILES}


def reads(this: Run, phase: str, **inputs: Path) -> dict[str, Any]:
    """What the result of a phase depends on: fields of the recipe, the images, and files of phases before it."""
    files = {name: sha256_file(path) for name, path in inputs.items()}
    return {**phase_fields(this.recipe, phase), "images": this.train.fingerprint, "white": this.train.white, **files}


def once(this: Run, marker: Path, read: dict[str, Any], do: Callable[[], dict[str, Any] | None]) -> None:
    """Do a phase, unless it was done before from the same fields and inputs, here or by another arm.

    Args:
        this: the run.
        marker: written last; says what the phase read, what it wrote and cost, and what `do` tells.
        read: what the result depends on.
        do: the phase.

    Raises:
        Refused: it was done from other fields or inputs.
        Failed: what it wrote is no longer there as it was.
    """
    lent, more = lending(this, marker, read), longer.asked(marker, read)
    if more:
        done, epochs = read["earlier"][-1][0], read[f"{marker.stem}.epochs"]
        this.context.say(f"{marker.parent}: goes on from {done:g} epochs to {epochs:g}, by a schedule of its own")
    ours = marker.exists() and not more
    theirs = not ours and lent is not None and (lent / marker.name).exists()
    this.accelerator.wait_for_everyone()  # every process has looked before the main one writes
    if theirs and this.main:
        check_written(lent / marker.name)
        marker.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(lent.iterdir(), key=lambda file: file.name == marker.name):
            with whole_file(marker.parent / file.name) as beside:
                shutil.copy(file, beside)
    this.accelerator.wait_for_everyone()
    if ours or theirs:
        refuse_other(marker, read)
        check_written(marker)
        return
    this.context.budget = {"images": 0.0, "flops": 0.0, "seconds": 0.0}
    told = do() or {}
    if this.main:
        device = records.device_name(this.accelerator.device.type)
        made = written(marker.parent, [name for name in MAKES[marker.stem] if (marker.parent / name).exists()])
        write_json(marker, {"read": read, "wrote": made, "budget": this.context.budget, "device": device, **told})
        if lent:
            with whole_folder(lent) as beside:
                for file in marker.parent.iterdir():
                    shutil.copy(file, beside)
    this.accelerator.wait_for_everyone()


def lending(this: Run, marker: Path, read: dict[str, Any]) -> Path | None:
    """Where a phase's result lies for other arms; phase 3 is each arm's own."""
    if this.shared is None or marker.stem == "relearn":
        return None
    return this.shared / f"{marker.stem}_{sha256_json(read)[:12]}"
