"""Figures of a run, drawn from records, metrics and images."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .arms import COLOURS
from .files import read_lines, whole_file
from .images import Images
from .views import resized_crop

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NO_CURVES = ("phase", "round", "step", "images", "images_per_second", "lr")
TILE = 64  # px of an image in a sheet
PANELS = (
    ("linear", None, "linear probe"),
    ("knn", 20, "nearest neighbours"),
    ("residue", None, "residue of the proxy"),
)


def _save(figure: plt.Figure, path: Path) -> None:
    with whole_file(path) as beside:
        # No date and version in the file: the same data gives the same bytes.
        figure.savefig(beside, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _mean_and_bars(groups: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means of groups of values, and how far the smallest and largest of each lie from it, as errorbar wants them."""
    mean = [np.mean(values) for values in groups]
    pairs = list(zip(mean, groups, strict=True))
    return mean, [[m - min(values) for m, values in pairs], [max(values) - m for m, values in pairs]]


def tiles(images: Images, indices: Tensor) -> np.ndarray:
    """Stored images as [n, TILE, TILE, 3] uint8."""
    sides = images.sides[indices]
    whole = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    grown = resized_crop(images.pixels.squares(indices), whole, TILE)
    return (grown * 255).round().byte().permute(0, 2, 3, 1).numpy()


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
    figure, axes = plt.subplots(len(chosen), 1, figsize=(9.5, 0.8 * len(chosen) + 0.5), squeeze=False)
    for axis, number in zip(axes[:, 0], chosen, strict=True):
        members = np.flatnonzero(found == number)
        nearest = members[np.argsort(distance[members], kind="stable")][:columns]
        strip = np.full((TILE, columns * TILE, 3), 255, np.uint8)
        for place, tile in enumerate(tiles(images, torch.from_numpy(nearest))):
            strip[:, place * TILE : (place + 1) * TILE] = tile
        axis.imshow(strip)
        axis.set_axis_off()
        axis.text(
            -8, TILE / 2, _describe(images, number, members), ha="right", va="center", fontsize=8, parse_math=False
        )
    axes[0, 0].set_title(f"{len(chosen)} of {k} clusters, nearest images first", fontsize=10)
    _save(figure, path)


def _describe(images: Images, number: int, members: np.ndarray) -> str:
    text = f"cluster {number}\n{len(members)} images"
    if images.labels is not None:
        classes = images.labels[torch.from_numpy(members)]
        classes = classes[classes >= 0]
        if len(classes):
            most = int(classes.mode().values)
            text += f"\n{100 * (classes == most).double().mean():.0f} % {images.label_names[most][:16]}"
    return text


def stages(path: Path, records: list[dict[str, Any]], arms: list[str], split: str) -> None:
    """Accuracy and residue against stage, a line for each arm; shaded from the smallest seed to the largest."""
    panels = [p for p in PANELS if any(r["protocol"] == p[0] for r in records)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), squeeze=False)
    for axis, (protocol, k, title) in zip(axes[0], panels, strict=True):
        rows = [r for r in records if (r["protocol"], r["split"], r["metric"]) == (protocol, split, "top1")]
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
        axis.set_ylabel(f"top-1 on {split}, %")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def costs(path: Path, records: list[dict[str, Any]], arms: list[str], split: str) -> None:
    """Pooled linear accuracy against floating-point operations, a point for each arm, bars from seed to seed."""
    wanted = ("linear", "pooled", split, "top1")
    rows = [r for r in records if (r["protocol"], r["stage"], r["split"], r["metric"]) == wanted]
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for arm in arms:
        here = [r for r in rows if r["arm"] == arm]
        if not here:
            continue
        x = np.mean([r["flops"] for r in here])
        y, spread = _mean_and_bars([[100 * r["value"] for r in here]])
        axis.errorbar(x, y, yerr=spread, fmt="o", color=COLOURS[arm], capsize=3, label=arm)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    axis.set_xlabel("floating-point operations (forward, backward, clustering)")
    axis.set_ylabel(f"linear probe, pooled, top-1 on {split}, %")
    axis.grid(alpha=0.3)
    _save(figure, path)


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
    axis.set_ylabel(f"linear probe, pooled, top-1 on {split}, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def tasks(path: Path, found: dict[str, dict[str, list[float]]]) -> None:
    """Accuracies of each seed by proxy task and arm: a row for each task, a point for each arm, bars over seeds."""
    figure, axis = plt.subplots(figsize=(6.8, 0.42 * len(found) + 1.2))
    arms = list(dict.fromkeys(arm for values in found.values() for arm in values))
    for number, arm in enumerate(arms):
        shift = 0.5 * (number - (len(arms) - 1) / 2) / len(arms)
        rows = [(place + shift, values[arm]) for place, values in enumerate(found.values()) if arm in values]
        mean, spread = _mean_and_bars([values for _, values in rows])
        axis.errorbar(
            mean, [place for place, _ in rows], xerr=spread, fmt="o", ms=5, color=COLOURS[arm], capsize=2, label=arm
        )
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlabel("linear probe, pooled, top-1 %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def fine_tuned(path: Path, found: dict[str, dict[float, list[float]]]) -> None:
    """Accuracy against the share of labels, a line for each start, bars from seed to seed; arguments of readme.py."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for start, values in found.items():
        name = next((name for name in ("scratch", "proxy") if start.endswith(name)), "sslpp")
        mean, spread = _mean_and_bars(list(values.values()))
        axis.errorbar(list(values), mean, yerr=spread, fmt="o-", color=COLOURS[name], capsize=3, label=start)
    shares = sorted({share for values in found.values() for share in values})
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("labels used")
    axis.set_ylabel("fine-tuned, top-1 on test, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def curves(path: Path, metrics: Path) -> None:
    """Every metric of training, and what features tell now and then, against images; a column for each phase."""
    rows = read_lines(metrics)
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
    _save(figure, path)


def neighbours(path: Path, features: dict[str, Tensor], images: Images, shown: Tensor, rows: int = 8) -> None:
    """Held-out images and their nearest training images under two backbones, side by side.

    Args:
        path: where the figure goes.
        features: [n, D] of `shown` for each backbone.
        images: the training split.
        shown: [n] indices; a sample of `rows` of the held-out ones among them is asked about.
    """
    held_out = images.held_out[shown]
    asked, bank = images.sample(held_out.nonzero().flatten(), rows), (~held_out).nonzero().flatten()
    count = min(6, len(bank))
    figure, axes = plt.subplots(
        len(asked), 2 * count + 2, figsize=(2 * count + 2, 1.08 * len(asked) + 0.5), squeeze=False
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    labels = images.labels
    for row, query in enumerate(asked.tolist()):
        axes[row, 0].imshow(tiles(images, shown[query : query + 1])[0])
        for side, (_, found) in enumerate(features.items()):
            unit = torch.nn.functional.normalize(found, dim=1)
            near = bank[(unit[bank] @ unit[query]).topk(count).indices]
            for place, tile in enumerate(tiles(images, shown[near])):
                axis = axes[row, 1 + side * (count + 1) + place]
                axis.imshow(tile)
                if labels is not None and labels[shown[query]] >= 0:
                    same = bool(labels[shown[near[place]]] == labels[shown[query]])
                    for spine in axis.spines.values():
                        spine.set_visible(True)
                        spine.set_linewidth(2.5)
                        spine.set_color("#3a923a" if same else "#c03d3e")
    axes[0, 0].set_title("image", fontsize=10)
    for side, name in enumerate(features):
        axes[0, 1 + side * (count + 1)].set_title(f"nearest under {name}", fontsize=10, loc="left")
    if labels is not None:
        figure.text(0.5, 0.06, "green: same class as the image; red: another", ha="center", fontsize=9)
    _save(figure, path)
