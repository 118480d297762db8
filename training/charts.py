"""Figures of arms side by side, drawn from records: differences with their intervals, and what they cost."""

import statistics
from pathlib import Path

from . import contrast
from .arms import COLOURS
from .figures import WHERE, mark_chance, mean_and_bars, plt, save
from .records import Records, split_of

SIDES = {1: "#3a923a", 0: "#555555", -1: "#c03d3e"}  # sslpp is better, level, worse by the interval
UNITS = {1e9: "billions", 1e12: "trillions", 1e15: "thousands of trillions", 1e18: "millions of trillions"}


def draw(folder: Path, rows: Records) -> dict[str, str]:
    """Draw a comparison's figures into a folder; the caption of each by its name."""
    rows = contrast.final(rows)
    split = split_of(rows)
    arms, seeds = contrast.arms_and_seeds(rows)
    folder.mkdir(parents=True, exist_ok=True)
    known = len(seeds) >= contrast.ENOUGH
    bars = "bars: 95 % interval over seeds" if known else f"{contrast.FEWER}, so that no interval is known"
    captions = {}
    if "sslpp" in arms and len(arms) > 1:
        differences(folder / "differences.png", rows, split)
        captions["differences"] = (
            f"sslpp minus each arm, pooled features; small dots: seeds; {bars}. Green: sslpp is better; red: worse; "
            f"grey: level; hollow: {contrast.FEWER}"
        )
        by_stage(folder / "stages.png", rows, split)
        captions["stages"] = f"sslpp minus each arm by stage of the network, from its input to its output; {bars}"
    costs(folder / "operations.png", rows, arms, split)
    captions["operations"] = "How good each arm's pooled features are, and what its training cost"
    return captions


def _controls(rows: Records) -> list[str]:
    return [arm for arm in contrast.arms_and_seeds(rows)[0] if arm != "sslpp"]


def _bar(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval, 0 where there is none."""
    found = contrast.interval(values)
    return statistics.mean(values), (found[1] - found[0]) / 2 if found else 0.0


def _mark(axis: plt.Axes, place: int, values: list[float], less_is_better: bool = False) -> None:
    """A line with the differences of all seeds, their mean, its interval and its figures."""
    if not values:
        return
    mean, half = _bar(values)
    known = len(values) >= contrast.ENOUGH
    side = int(mean - half > 0) - int(mean + half < 0) if known else 0
    colour = SIDES[-side if less_is_better else side]
    axis.plot(values, [place] * len(values), "o", ms=3, color=colour, alpha=0.35)
    fill = colour if known else "white"
    axis.errorbar(mean, place, xerr=half or None, fmt="o", ms=6, capsize=3, color=colour, mfc=fill)
    told = f"{mean:+.1f}" + (f" ± {half:.1f}" if known else "")
    axis.text(1.02, place, told, transform=axis.get_yaxis_transform(), va="center", fontsize=8)


def _around_nothing(axis: plt.Axes) -> None:
    """An axis of differences: a line at 0, and ±1 beside ±20."""
    axis.axvline(0, color="black", lw=1, zorder=1)
    axis.set_xscale("symlog", linthresh=2, linscale=0.8)
    most = max(abs(edge) for edge in axis.get_xlim())
    ticks = [tick for tick in (1, 2, 5, 20) if tick <= most]
    axis.set_xticks([-tick for tick in reversed(ticks)] + [0, *ticks])
    axis.set_xticklabels([f"{tick:+d}" if tick else "0" for tick in axis.get_xticks().astype(int)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def differences(path: Path, rows: Records, split: str) -> None:
    """sslpp minus each arm, a panel for each metric of pooled features, with seeds and intervals."""
    names = [*contrast.leading(rows, split), "residue pooled"]
    arms = _controls(rows)
    found = {n: {a: list(contrast.paired(rows, "sslpp", a, n, split).values()) for a in arms} for n in names}
    found = {name: of for name, of in found.items() if any(of.values())}
    size = (4.6 * len(found) + 1, 0.42 * len(arms) + 1.3)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, sharey=True)
    for axis, (name, of) in zip(axes[0], found.items(), strict=True):
        turned = name.startswith("residue")
        for place, values in enumerate(of.values()):
            _mark(axis, place, values, turned)
        _around_nothing(axis)
        axis.set_title(contrast.title(name, rows) + (" (less is better)" if turned else ""), fontsize=9)
        axis.set_xlabel("sslpp minus the arm, points (scale compressed)")
    axes[0][0].set_yticks(range(len(arms)), arms)
    axes[0][0].set_ylim(len(arms) - 0.4, -0.6)
    figure.tight_layout()
    save(figure, path)


def controls(path: Path, found: dict[str, Records], arms: dict[str, str]) -> None:
    """sslpp minus its controls: a line for each comparison, panels below one another for each arm.

    Args:
        path: of the figure.
        found: the records that count of each comparison, by what it is called.
        arms: the controls, each with what it is.
    """
    names = ("linear pooled", "knn pooled")
    size = (10, len(arms) * (0.26 * len(found) + 0.35) + 0.8)
    figure, axes = plt.subplots(len(arms), len(names), figsize=size, squeeze=False, sharex="col", sharey=True)
    for line, (arm, what) in zip(axes, arms.items(), strict=True):
        for axis, name in zip(line, names, strict=True):
            for place, rows in enumerate(found.values()):
                _mark(axis, place, list(contrast.paired(rows, "sslpp", arm, name, "test").values()))
        line[0].set_title(f"sslpp minus {arm}: {what}", fontsize=9, loc="left")
        line[0].set_yticks(range(len(found)), list(found), fontsize=8)
        line[0].set_ylim(len(found) - 0.4, -0.6)
    for axis in axes.flat:
        _around_nothing(axis)
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(f"{contrast.title(name, next(iter(found.values())))}, points (scale compressed)")
    figure.tight_layout()
    save(figure, path)


def by_stage(path: Path, rows: Records, split: str) -> None:
    """sslpp minus each arm against the stage, a panel for each arm."""
    arms = _controls(rows)
    metrics = [name.split()[0] for name in contrast.leading(rows, split)]
    stages = sorted({r["stage"] for r in rows if r["stage"] != "pooled" and r["protocol"] in metrics})
    columns = 2 if len(arms) in (2, 4) else min(3, len(arms))
    lines = -(-len(arms) // columns)
    size = (3.7 * columns, 2.4 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharex=True)
    places = [*stages, "pooled"]
    for axis, arm in zip(axes.flat, arms, strict=False):
        axis.axhline(0, color="black", lw=1)
        for shift, metric, style in zip((-0.07, 0.07), metrics, ("o-", "s--"), strict=False):
            known = [(place, list(contrast.paired(rows, "sslpp", arm, f"{metric} {stage}", split).values()))
                     for place, stage in enumerate(places)]  # fmt: skip
            known = [(place + shift, *_bar(values)) for place, values in known if values]
            if known:
                x, y, bars = zip(*known, strict=True)
                label = contrast.title(f"{metric} pooled", rows).split(",")[0]
                axis.errorbar(x, y, yerr=bars, fmt=style, ms=4, lw=1.2, capsize=2, color=COLOURS[arm], label=label)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -2), max(high, 2))  # a difference of nothing looks like one
        axis.set_title(f"sslpp minus {arm}", fontsize=10)
        axis.set_xticks(range(len(places)), [str(place) for place in places])
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    for column in range(columns):
        last = max(row for row in range(lines) if row * columns + column < len(arms))
        axes[last][column].set_xlabel("stage")
        axes[last][column].tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("points")
    figure.tight_layout()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9, frameon=False)
    save(figure, path)


def costs(path: Path, rows: Records, arms: list[str], split: str) -> None:
    """A row for each arm: accuracy, mean and range over seeds, beside the operations and minutes of its training."""
    name = contrast.leading(rows, split)[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 0.4 * len(arms) + 1.2), sharey=True)
    found = {arm: contrast.over_seeds(rows, arm, name, split) for arm in arms}
    for place, (arm, values) in enumerate(found.items()):
        if values:
            mean, spread = mean_and_bars([values])
            left.errorbar(mean, place, xerr=spread, fmt="o", ms=6, capsize=3, color=COLOURS[arm])
            left.text(1.01, place, f"{mean[0]:.1f}", transform=left.get_yaxis_transform(), va="center", fontsize=8)
    where = "val" if name == contrast.WITHOUT_LABELS else split
    measured = [r for r in rows if (r["protocol"], r["stage"], r["split"]) == (*name.split(), where)]
    mark_chance(left, measured, vertical=True)
    flops, seconds = ({arm: statistics.mean(r[k] for r in rows if r["arm"] == arm) for arm in arms}
                      for k in ("flops", "seconds"))  # fmt: skip
    unit = max((size for size in UNITS if size <= max(flops.values())), default=1e9)
    right.barh(range(len(arms)), [value / unit for value in flops.values()], 0.6, color=[COLOURS[a] for a in arms])
    for place, arm in enumerate(arms):
        time = f"{seconds[arm]:.0f} s" if seconds[arm] < 60 else f"{seconds[arm] / 60:.0f} min"
        told = f" {flops[arm] / unit:.3g}, in {time}" if flops[arm] else " no training"
        right.text(flops[arm] / unit, place, told, va="center", fontsize=8)
    right.margins(x=0.5)
    right.set_xlim(left=0)
    right.set_xlabel(f"{UNITS[unit]} of floating-point operations")
    left.set_xlabel(f"{contrast.title(name, rows)}, % on {WHERE[where]}")
    left.set_yticks(range(len(arms)), arms)
    left.set_ylim(len(arms) - 0.4, -0.6)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout()
    save(figure, path)


def tasks(path: Path, rows: Records) -> None:
    """What pooled features are worth by proxy task and arm: a row for each task, a point for each arm, seeds' range."""
    name = contrast.leading(rows, split_of(rows))[0]
    found = contrast.probed(rows, name)
    figure, axis = plt.subplots(figsize=(6.8, 0.42 * len(found) + 1.2))
    arms = list(dict.fromkeys(arm for values in found.values() for arm in values))
    for number, arm in enumerate(arms):
        shift = 0.5 * (number - (len(arms) - 1) / 2) / len(arms)
        drawn = [(place + shift, values[arm]) for place, values in enumerate(found.values()) if arm in values]
        mean, spread = mean_and_bars([values for _, values in drawn])
        axis.errorbar(
            mean, [place for place, _ in drawn], xerr=spread, fmt="o", ms=5, color=COLOURS[arm], capsize=2, label=arm
        )
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlabel(f"{contrast.title(name, rows)}, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)
