"""Pictures of what a classifier says of images, for people who were not there when it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from . import figures
from .arms import COLOURS
from .figures import plt
from .images import Images

MOST = 24  # classes that a figure shows by name
SHOWN, COLUMNS, TILE, CAPTION = 18, 6, 128, 12  # images of a sheet, of these in a row; px of each, and of a line above
RIGHT, WRONG, REST = COLOURS["finetune_all"], COLOURS["scratch"], COLOURS["random"]


def short(name: str, length: int = 20) -> str:
    """A class's name as a figure has room for it."""
    return name if len(name) <= length else name[: length - 1] + "…"


def learning(
    path: Path, rows: list[dict[str, Any]], epoch_images: float, called: str, best: int, constant: float
) -> None:
    """Loss and accuracy against epochs.

    Args:
        path: where the figure goes.
        rows: of metrics.jsonl.
        epoch_images: images of an epoch.
        called: what people call the images that the best classifier is chosen on.
        best: step after which it was kept.
        constant: share of these images that is right if the most frequent class is always said.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    trained = [r for r in rows if "loss" in r]
    looks = [r for r in rows if "val_top1" in r]
    x = [r["images"] / epoch_images for r in trained]
    axes[0].plot(x, [r["loss"] for r in trained], color=COLOURS["proxy"], lw=1)
    axes[0].set_title("loss on what it learns from (lower is better)", fontsize=10)
    shown = {"label": "what it learns from, in altered views", "color": COLOURS["proxy"], "lw": 1}
    axes[1].plot(x, [100 * r["accuracy"] for r in trained], **shown)
    measured = [r["images"] / epoch_images for r in looks], [100 * r["val_top1"] for r in looks]
    axes[1].plot(*measured, "o-", ms=3, color=COLOURS["sslpp"], label=called)
    kept = [r for r in looks if r["step"] == best]
    place = [r["images"] / epoch_images for r in kept], [100 * r["val_top1"] for r in kept]
    axes[1].plot(*place, "*", ms=13, color=WRONG, label="best/, chosen there")
    axes[1].axhline(100 * constant, color=REST, ls=":", label="always the most frequent class")
    axes[1].set_title("images told right, %", fontsize=10)
    axes[1].set_ylim(0, 102)
    axes[1].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)  # below: it hides no curve
    for axis in axes:
        axis.set_xlabel("epochs")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figures.save(figure, path)


def by_class(path: Path, rows: Sequence[tuple], overall: float, where: str) -> None:
    """Share told right of each class, its 95 % interval by the number of images; the worst of many classes.

    Args:
        path: where the figure goes.
        rows: (name, images, of these right, ...) of each class, the worst first.
        overall: share of all images.
        where: what people call the images.
    """
    shown = rows[:MOST]
    figure, axis = plt.subplots(figsize=(6.8, 0.26 * len(shown) + 1.3))
    for place, (_, count, right, *_) in enumerate(shown):
        low, high = interval(right, count)
        axis.barh(place, 100 * right / count, color=RIGHT, alpha=0.75)
        axis.plot([100 * low, 100 * high], [place, place], color="black", lw=1)
    names = [f"{short(name)}  ({count})" for name, count, *_ in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    axis.axvline(100 * overall, color=REST, ls="--", lw=1)
    axis.text(100 * overall, -0.9, f"all {100 * overall:.0f} %", color=REST, fontsize=8, ha="center", va="bottom")
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel(f"told right, % of the class's images ({where}); line: 95 % interval")
    some = f"The {len(shown)} classes of {len(rows)} that are told worst" if len(shown) < len(rows) else "Each class"
    axis.set_title(f"{some} (number of images)", fontsize=10, pad=18)
    axis.grid(axis="x", alpha=0.3)
    figures.save(figure, path)


def interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `count` (Wilson 1927)."""
    found = binomtest(right, count).proportion_ci(0.95, "wilson")
    return found.low, found.high


def confusion(path: Path, counts: Tensor, names: list[str], where: str) -> None:
    """What each class is taken for; of many classes those with most mistakes, the others summed up.

    Args:
        path: where the figure goes.
        counts: [C, C] images of a class, a row, that a class, a column, was said of.
        names: of the classes.
        where: what people call the images.
    """
    wrong = counts - counts.diag().diag()
    worst = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)
    chosen = worst[:MOST].sort().values if len(names) > MOST + 1 else torch.arange(len(names))
    rest = torch.tensor([i for i in range(len(names)) if i not in set(chosen.tolist())], dtype=torch.long)
    table, labels = counts[chosen][:, chosen], [short(names[i]) for i in chosen.tolist()]
    if len(rest):
        table = torch.cat([table, counts[chosen][:, rest].sum(1, keepdim=True)], 1)
    share = 100 * table / counts[chosen].sum(1, keepdim=True).clamp(min=1)
    side = 0.34 * len(chosen) + 2.4
    figure, axis = plt.subplots(figsize=(side + 0.6, side))
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in share.ge(0.5).nonzero().tolist():
        dark = share[row, column] > 55
        axis.text(
            column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
        )
    axis.set_yticks(range(len(chosen)), labels, fontsize=8, parse_math=False)
    across = [*labels, f"the other {len(rest)}"] if len(rest) else labels
    axis.set_xticks(range(len(across)), across, fontsize=8, rotation=90, parse_math=False)
    axis.set_ylabel("what it is")
    axis.set_xlabel("what the classifier said")
    some = f"The {len(chosen)} classes with most mistakes.\n" if len(rest) else ""
    rows = f"Each row: of 100 images of a class ({where}),\nhow many were called what; on the diagonal: right"
    axis.set_title(some + rows, fontsize=10)
    figure.colorbar(picture, shrink=0.6, label="% of the row")
    figures.save(figure, path)


def sheet(path: Path, found: list[tuple[Images, int, str]], title: str) -> None:
    """Images, given with their index, and what was said of each; nothing is drawn without any."""
    if not found:
        path.unlink(missing_ok=True)  # of an earlier report
        return
    tiles = figures.white(-(-len(found) // COLUMNS), COLUMNS, TILE)
    above = CAPTION * (1 + max(caption.count("\n") for *_, caption in found)) + figures.GAP
    for tile, (images, index, _) in zip(tiles.reshape(-1, *tiles.shape[2:]), found, strict=False):
        tile[:] = figures.tiles(images, torch.tensor([index]), TILE)[0]
    figure, axis = figures.mosaic(tiles, above, 1.7 * COLUMNS)
    for place, (*_, caption) in enumerate(found):
        x, y = place % COLUMNS * (TILE + figures.GAP) + TILE / 2, place // COLUMNS * (above + TILE) + above - 2
        axis.text(x, y, caption, fontsize=8, ha="center", va="bottom", parse_math=False)
    axis.set_title(title, fontsize=11)
    figures.save(figure, path)
