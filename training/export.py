"""A backbone to hub/: a folder that plain timm and transformers load, with its card and figures."""

import shutil
from pathlib import Path

import timm
import torch

from . import backbone as B
from . import card, gains
from .extraction import plain_batch
from .files import Failed, whole_folder, write_lines, write_text
from .images import Images
from .recipe import Recipe
from .records import Records, read


def export(
    folder: Path,
    folders: list[Path],
    images: Images,
    records: Records,
    recipe: Recipe,
    arm: str,
    comparison: Path | None,
) -> Path:
    """Write ``hub/`` beside the phases and load it again.

    Args:
        folder: the run folder.
        folders: of the phases, the first and the last of which have the backbones that are chosen from.
        images: the training split, whose statistics the folder carries.
        records: what was measured.
        recipe: what made it.
        arm: what the last backbone is called in the records.
        comparison: folder of the comparison that this run is an arm of.

    Returns:
        The written folder.

    Raises:
        Failed: timm does not find the same features in the written folder.
    """
    hub, bad = folder / "hub", gains.worse(records, arm, recipe.relearn.export)
    source = folders[0] if bad and recipe.relearn.export == "better" else folders[-1]
    with whole_folder(hub) as beside:
        tag = recipe.proxy.name if recipe.by_proxy else ""
        B.save(B.load(source), beside, images, tag, recipe.card.license or "")
        if (folder / "report").exists():
            shutil.copytree(folder / "report", beside / "report")
        if comparison and (comparison / "report" / "differences.png").exists():
            shutil.copy(comparison / "report" / "differences.png", beside / "report" / "arms.png")
        write_lines(beside / "records.jsonl", [{**r, "model": card.portable_name(r["model"])} for r in records])
        write_text(beside / "recipe.yaml", card.portable(recipe))
        compared = read(comparison / "records.jsonl") if comparison else []
        counts, name = (len(images.train), len(images.val)), (comparison or folder).name
        write_text(beside / "README.md", card.page(beside, name, records, compared, recipe, arm, counts))
    check(hub, source, images)
    return hub


def check(hub: Path, source: Path, images: Images, count: int = 16) -> None:
    """Load a written folder as anyone would, and compare its features with the backbone's.

    Raises:
        Failed: they differ, or weights were missing.
    """
    batch = plain_batch(images, images.all[:count], torch.device("cpu"))
    written, original = timm.create_model(f"local-dir:{hub}", pretrained=True).eval(), B.load(source).eval()
    weights, expected = written.state_dict(), original.state_dict()
    same = weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    with torch.no_grad():
        # Equal weights may lie differently in memory, which changes the last bits of a product.
        if not same or not torch.allclose(written(batch), original(batch), rtol=1e-4, atol=1e-5):
            raise Failed(f"{hub} does not give the features of {source}; please report this with its recipe.yaml.")
