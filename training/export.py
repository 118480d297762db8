"""A backbone to hub/: a folder that plain timm and transformers load, with its card and figures."""

import shutil
from pathlib import Path
from typing import Any

import timm
import torch

from . import backbone as B
from . import report
from .files import Failed, whole_folder
from .images import Images
from .recipe import Recipe


def export(folder: Path, source: Path, images: Images, records: list[dict[str, Any]], recipe: Recipe) -> Path:
    """Write ``hub/`` beside the phases and load it again.

    Args:
        folder: the run folder.
        source: the backbone to export.
        images: the training split, whose statistics the folder carries.
        records: what was measured.
        recipe: what made it.

    Returns:
        The written folder.

    Raises:
        Failed: timm does not find the same features in the written folder.
    """
    hub = folder / "hub"
    with whole_folder(hub) as beside:
        B.save(B.load(source), beside, images, tag=recipe.proxy.name)
        (beside / "README.md").write_text(card(folder, records, recipe), encoding="utf-8")
        if (folder / "report").exists():
            shutil.copytree(folder / "report", beside / "report")
    check(hub, source, images)
    return hub


def check(hub: Path, source: Path, images: Images, count: int = 16) -> None:
    """Load a written folder as anyone would, and compare its features with the backbone's.

    Raises:
        Failed: they differ, or weights were missing.
    """
    batch = B.plain_batch(images, images.all[:count], torch.device("cpu"))
    written, original = timm.create_model(f"local-dir:{hub}", pretrained=True).eval(), B.load(source).eval()
    weights, expected = written.state_dict(), original.state_dict()
    same = weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    with torch.no_grad():
        # Equal weights may lie differently in memory, which changes the last bits of a product.
        if not same or not torch.allclose(written(batch), original(batch), rtol=1e-4, atol=1e-5):
            raise Failed(f"{hub} does not give the features of {source}; please report this with its recipe.yaml.")


def card(folder: Path, records: list[dict[str, Any]], recipe: Recipe) -> str:
    """README.md of the exported folder."""
    arms = [name for name in ("random", "proxy_short", "sslpp") if any(r["arm"] == name for r in records)]
    tables = "\n\n".join(report.as_markdown(lines) for _, lines in report.tables(records, arms))
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [timm, transformers, image-feature-extraction, self-supervised]
---
# {folder.name}

A {recipe.model.name} backbone without a head, trained without labels: first on {recipe.proxy.name} prediction, then by
SSL++ (Chen et al., IEEE TIP 2022, doi 10.1109/TIP.2021.3135470; our reading of the abstract), which keeps the low
layers and relearns the high ones from clusters of the features.

```python
{report.usage(Path("FOLDER"), recipe.data.size)}
```

{report.gain(records, "sslpp")}

{tables}
"""
