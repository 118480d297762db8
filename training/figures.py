"""Figures of a run, drawn from records, metrics and images. charts.py draws arms side by side."""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .arms import COLOURS
from .evaluate.label_free import LEADING
from .files import read_log, whole_file
from .images import Images
from .views import resized_crop

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Classes may be called in any script; a mark that the font has not is drawn as a box, which needs no warning.
warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)

NO_CURVES = ("phase", "round", "step", "images", "images_per_second", "lr")
TILE, GAP, ABOVE, FRAME = 64, 4, 12, 3  # px of an image in a sheet, beside and above one, and of a frame around one
SAME, OTHER = (58, 146, 58), (192, 61, 62)  # colours of frames: of the same class, of another
WHERE = {"val": "held-out images", "test": "test"}
PANELS = (
    ("linear", "top1", None, "linear probe"),
    ("knn", "top1", 20, "nearest neighbours"),
    ("label_free", LEADING, None, f"{LEADING}, which needs no labels"),
    ("residue", "top1", None, "residue of the proxy (less is better)"),
)


def save(figure: plt.Figure, path: Path) -> None:
    try:
        with whole_file(path) as beside:
            # No date and version in the file: the same data gives the same bytes.
            figure.savefig(beside, dpi=110, bbox_inches="tight", metadata={"Software": None})
    finally:
        plt.close(figure)


def mean_and_bars(groups: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means of groups of values, and how far the smallest and largest of each lie from it, as errorbar wants them."""
    mean = [np.mean(values) for values in groups]
    pairs = list(zip(mean, groups, strict=True))
    return mean, [[m - min(values) for m, values in pairs], [max(values) - m for m, values in pairs]]


def chance_of(records: list[dict[str, Any]]) -> float | None:
    """What guessing reaches at a protocol, as its records tell, in percent; None where they do not."""
    for record in records:
        settings = record["settings"]
        if record["metric"] == LEADING:  # one of so many images
            return 100 / settings["n"]
        if record["metric"] == "top1" and settings.keys() & {"chance", "views"}:
            return 100 * settings["chance"] if "chance" in settings else 100 / settings["views"]
    return None


def mark_chance(axis: plt.Axes, records: list[dict[str, Any]], vertical: bool = False) -> None:
    """A line where guessing is, or, where that is far below what the axis shows, words that say so."""
    chance = chance_of(records)
    if chance is None:
        return
    low, high = axis.get_xlim() if vertical else axis.get_ylim()
    told = f"chance {chance:.3g} %"
    if chance < low - (high - low):
        place, told = ((0.98, 1.01), f"{told}, far to the left") if vertical else ((0.98, 0.03), f"{told}, far below")
        axis.text(*place, told, ha="right", fontsize=8, color="#555555", transform=axis.transAxes)
        return
    (axis.axvline if vertical else axis.axhline)(chance, color="#555555", ls=":", lw=1.2, zorder=0)
    place, anchor = ((chance, 0.98), (4, -2)) if vertical else ((0.98, chance), (0, 3))
    transform = axis.get_xaxis_transform() if vertical else axis.get_yaxis_transform()
    axis.annotate(told, place, anchor, xycoords=transform, textcoords="offset points", fontsize=8, color="#555555",
                  ha="left" if vertical else "right", va="top" if vertical else "bottom")  # fmt: skip


def tiles(images: Images, indices: Tensor, side: int = TILE) -> np.ndarray:
    """Stored images as [n, side, side, 3] uint8."""
    sides = images.sides[indices]
    whole = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    grown = resized_crop(images.pixels.squares(indices), whole, side)
    return (grown * 255).round().byte().permute(0, 2, 3, 1).numpy()


def white(rows: int, columns: int, side: int) -> np.ndarray:
    """A sheet's tiles before there is anything on them, [rows, columns, side, side, 3] uint8."""
    return np.full((rows, columns, side, side, 3), 255, np.uint8)


def mosaic(sheet: np.ndarray, above: int, width: float) -> tuple[plt.Figure, plt.Axes]:
    """A sheet's tiles as one picture, `above` px of white over each row, in a figure of `width` inches.

    Text is placed by the picture's pixels. With axes for every tile, drawing would take longer than a short training.
    """
    rows, columns, side = sheet.shape[:3]
    spaced = np.pad(sheet, ((0, 0), (0, 0), (above, 0), (0, GAP), (0, 0)), constant_values=255)
    picture = spaced.transpose(0, 2, 1, 3, 4).reshape(rows * (above + side), columns * (side + GAP), 3)
    figure = plt.figure(figsize=(width, width * picture.shape[0] / picture.shape[1]))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(picture)
    axis.set_axis_off()
    return figure, axis


def contact_sheet(path: Path, images: Images, labels: Path, rows: int = 12, columns: int = 12) -> None:
    """A row of the most typical images of each of some clusters, from the largest to the smallest."""
    table = pq.read_table(labels)
    k = min(int(name.removeprefix("label_")) for name in table.column_names if name.startswith("label_"))
    found = table[f"label_{k}"].fill_null(-1).to_numpy()
    name = f"distance_{k}"
    distance = table[name].fill_null(2.0).to_numpy() if name in table.column_names else np.zeros(len(found))
    sizes = np.bincount(found[found >= 0], minlength=k)
    by_size = np.argsort(-sizes, kind="stable")
    by_size = by_size[sizes[by_size] > 0]
    chosen = by_size[np.unique(np.linspace(0, len(by_size) - 1, min(rows, len(by_size))).round().astype(int))]
    sheet, members = white(len(chosen), columns, TILE), [np.flatnonzero(found == number) for number in chosen]
    for row, own in zip(sheet, members, strict=True):
        nearest = own[np.argsort(distance[own], kind="stable")][:columns]
        row[: len(nearest)] = tiles(images, torch.from_numpy(nearest))
    figure, axis = mosaic(sheet, ABOVE, 8.0)
    for row, (number, own) in enumerate(zip(chosen, members, strict=True)):
        middle = row * (ABOVE + TILE) + ABOVE + TILE / 2
        axis.text(-8, middle, _describe(images, number, own), ha="right", va="center", fontsize=8, parse_math=False)
    shown = "All" if len(chosen) == k else f"{len(chosen)} of"
    axis.set_title(f"{shown} {k} clusters, the images nearest to each one's centre first", fontsize=10)
    save(figure, path)


def _describe(images: Images, number: int, members: np.ndarray) -> str:
    text = f"cluster {number}: {len(members)} images"
    if images.labels is not None:
        classes = images.labels[torch.from_numpy(members)]
        classes = classes[classes >= 0]
        if len(classes):
            most = int(classes.mode().values)
            told = f"{(classes == most).double().mean():.0%} are of class {images.label_names[most][:24]!r}"
            text += "\n" + textwrap.fill(told, 26)
    return text


def stages(path: Path, records: list[dict[str, Any]], arms: list[str], split: str) -> None:
    """Accuracy, without labels a score that needs none, and residue against stage, a line for each arm.

    Shaded from the smallest seed to the largest.
    """
    protocols = {r["protocol"] for r in records}
    protocols -= {"label_free"} if "linear" in protocols else set()
    panels = [p for p in PANELS if p[0] in protocols]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), squeeze=False)
    for axis, (protocol, metric, k, title) in zip(axes[0], panels, strict=True):
        where = "val" if protocol == "label_free" else split  # these scores are of held-out images alone
        rows = [r for r in records if (r["protocol"], r["split"], r["metric"]) == (protocol, where, metric)]
        present = {r["settings"].get("k") for r in rows}
        k = k if k in present else min(present, default=None, key=lambda n: n or 0)
        rows = [r for r in rows if r["settings"].get("k") == k]
        places = sorted({r["stage"] for r in rows if r["stage"] != "pooled"})
        for arm in arms:
            values = [
                [100 * r["value"] for r in rows if r["arm"] == arm and r["stage"] == s] for s in (*places, "pooled")
            ]
            if not all(values):
                continue
            x = [*places, max(places, default=0) + 1]
            axis.plot(x, [np.mean(v) for v in values], "o-", ms=4, color=COLOURS[arm], label=arm)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=COLOURS[arm], alpha=0.12)
        axis.set_xticks([*places, max(places, default=0) + 1], [*map(str, places), "pooled"])
        axis.set_title(f"{title}, k = {k}" if k else title, fontsize=10)
        axis.set_xlabel("stage")
        axis.set_ylabel(f"{metric.replace('top1', 'top-1')} on {WHERE[where]}, %")
        axis.grid(alpha=0.3)
        mark_chance(axis, rows)
    figure.tight_layout()
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def lowshot(path: Path, records: list[dict[str, Any]], arms: list[str], split: str) -> None:
    """Accuracy of the probe on few images of each class, a line for each arm, bars: deviation over draws."""
    rows = [r for r in records if (r["protocol"], r["split"], r["metric"]) == ("lowshot", split, "top1")]
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for arm in arms:
        here = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["settings"]["shots"])
        if here:
            x, y, bars = zip(
                *((r["settings"]["shots"], 100 * r["value"], 100 * r["deviation"]) for r in here), strict=True
            )
            axis.errorbar(x, y, yerr=bars, fmt="o-", ms=4, color=COLOURS[arm], capsize=3, label=arm)
    shots = sorted({r["settings"]["shots"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, map(str, shots))
    axis.set_xlabel("labelled images of each class")
    axis.set_ylabel(f"linear probe, pooled, top-1 on {WHERE[split]}, %")
    axis.grid(alpha=0.3)
    mark_chance(axis, rows)
    axis.legend(fontsize=8)
    save(figure, path)


def fine_tuned(path: Path, found: dict[str, dict[float, list[float]]]) -> None:
    """Accuracy against the share of labels, a line for each start, bars from seed to seed; arguments of readme.py."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for start, values in found.items():
        name = next((name for name in ("scratch", "proxy") if start.endswith(name)), "sslpp")
        mean, spread = mean_and_bars(list(values.values()))
        axis.errorbar(list(values), mean, yerr=spread, fmt="o-", color=COLOURS[name], capsize=3, label=start)
    shares = sorted({share for values in found.values() for share in values})
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("labels used")
    axis.set_ylabel("fine-tuned, top-1 on test, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    save(figure, path)


def curves(path: Path, metrics: Path) -> None:
    """Every metric of training, and what features tell now and then, against images; a column for each phase."""
    rows = read_log(metrics)
    phases = list(dict.fromkeys((row["phase"], row["round"]) for row in rows))
    told = dict.fromkeys(name for row in rows for name in row if name not in NO_CURVES)
    accuracies = [name for name in ("knn", "linear", "retrieval") if name in told]  # in one panel
    panels = [[name] for name in told if name not in accuracies] + ([accuracies] if accuracies else [])
    if not phases:
        return
    size = (4.2 * len(phases), 2.2 * len(panels) + 0.4)
    figure, axes = plt.subplots(len(panels), len(phases), figsize=size, squeeze=False, sharex="col")
    for column, (name, number) in enumerate(phases):
        here = [row for row in rows if (row["phase"], row["round"]) == (name, number)]
        for axis, metrics_of in zip(axes[:, column], panels, strict=True):
            for style, metric in zip(("-", "--", ":"), metrics_of, strict=False):
                known = [(row["images"], row[metric]) for row in here if metric in row]
                few = "o" if len(known) < 30 else None
                colour = COLOURS["sslpp" if number else "proxy"]
                axis.plot(
                    *zip(*known, strict=True) if known else ([], []),
                    style,
                    marker=few,
                    ms=3,
                    lw=1,
                    color=colour,
                    label=metric,
                )
            axis.set_ylabel(", ".join(metrics_of))
            axis.grid(alpha=0.3)
            if len(metrics_of) > 1:
                axis.legend(fontsize=8)
        axes[0, column].set_title(f"{name} {number}" if number else name, fontsize=10)
        axes[-1, column].set_xlabel("images seen")
    figure.tight_layout()
    save(figure, path)


def same_class(unit: Tensor, images: Images, shown: Tensor, count: int) -> tuple[float, float, int]:
    """How often the nearest training images of held-out ones are of the same class.

    Args:
        unit: [n, D] unit rows of `shown`.
        images: the training split, with labels.
        shown: [n] indices, held-out ones and others.
        count: how many nearest are looked at.

    Returns:
        The share, that of a random choice, and how many held-out images have a class.
    """
    labels, held_out = images.labels[shown], images.held_out[shown]
    asked, bank = ((mask & (labels >= 0)).nonzero().flatten() for mask in (held_out, ~held_out))
    same = []
    for part in asked.split(1000):
        nearest = bank[(unit[part] @ unit[bank].T).topk(min(count, len(bank)), dim=1).indices]
        same.append((labels[nearest] == labels[part].unsqueeze(1)).double().mean(1))
    shares = torch.bincount(labels[bank], minlength=int(labels.max()) + 1) / len(bank)
    return torch.cat(same).mean().item(), shares[labels[asked]].mean().item(), len(asked)


def neighbours(path: Path, features: dict[str, Tensor], images: Images, shown: Tensor, rows: int = 8) -> None:
    """Held-out images, drawn at random, and their nearest training images under two backbones, side by side.

    Under each side stands how often the nearest of all held-out images among `shown` are of the same class.

    Args:
        path: where the figure goes.
        features: [n, D] of `shown` for each backbone.
        images: the training split.
        shown: [n] indices of training and held-out images.
        rows: held-out images that are drawn.
    """
    held_out = images.held_out[shown]
    asked, bank = images.sample(held_out.nonzero().flatten(), rows), (~held_out).nonzero().flatten()
    count = min(6, len(bank))
    labels, side = images.labels, TILE + 2 * FRAME
    sheet = white(len(asked), 2 * count + 2, side)
    inside = sheet[:, :, FRAME:-FRAME, FRAME:-FRAME]
    inside[:, 0] = tiles(images, shown[asked])
    words = [(0, "image", "")]
    for first, (name, found) in zip((1, count + 2), features.items(), strict=True):
        unit = torch.nn.functional.normalize(found, dim=1)
        for row, query in enumerate(asked.tolist()):
            near = shown[bank[(unit[bank] @ unit[query]).topk(count).indices]]
            if labels is not None and labels[shown[query]] >= 0:
                same = (labels[near] == labels[shown[query]]).numpy()
                sheet[row, first : first + count] = np.where(same[:, None], SAME, OTHER)[:, None, None]
            inside[row, first : first + count] = tiles(images, near)
        told = ""
        if labels is not None and (labels[shown[held_out]] >= 0).any():
            share, chance, of = same_class(unit, images, shown, count)
            told = (
                f"Of the {count} nearest of all {of:,} held-out images\n{share:.0%} are of the same class (green), "
                f"by chance {chance:.0%}"
            )
        words.append((first * (side + GAP), f"nearest under {name}", told))
    figure, axis = mosaic(sheet, ABOVE, 0.8 * sheet.shape[1])
    for place, title, told in words:
        axis.text(place, ABOVE - GAP, title, fontsize=10, va="bottom")
        axis.text(place, len(asked) * (ABOVE + side) + 2 * GAP, told, fontsize=10, va="top")
    save(figure, path)
