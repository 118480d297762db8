"""A comparison's report: what sslpp is above, level with and below, in words made from the intervals; the tables."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path

from scipy import stats

from . import charts, records, report
from .contrast import (
    FEWER,
    METRICS,
    Records,
    arms_and_seeds,
    contrast,
    costs,
    final,
    grid,
    interval,
    leading,
    over_seeds,
    paired,
    summary,
    tables,
    title,
    transferred,
)
from .files import write_text

MOST_SEEDS = 30  # more than these nobody runs to tell two arms apart
FEW_SEEDS = "not told from"
MEANING = (
    "Above and below mean that the 95 % t interval of the difference, paired by seed, excludes 0, as one in twenty "
    "does by chance; level with, that it does not, which does not make two arms equal."
)
TOY = (
    "Digits are a toy: 1,797 grey images of 8 x 8 pixels, and seconds of training. They show how a comparison reads; "
    "what SSL++ is worth on photographs, or after a long training, they cannot tell."
)


def side(differences: list[float]) -> str:
    """Where sslpp stands beside an arm, by the interval of its paired differences over it."""
    found = interval(differences)
    if found is None:
        return FEW_SEEDS
    return "above" if found[0] > 0 else "below" if found[1] < 0 else "level with"


def seeds_to_tell(differences: list[float]) -> int | None:
    """How many seeds would tell two arms apart if mean and deviation stayed as they are; None for more than a few."""
    mean, deviation = abs(statistics.mean(differences)), statistics.stdev(differences)
    counts = range(len(differences) + 1, MOST_SEEDS + 1)
    return next((n for n in counts if stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n) < mean), None)


def listed(words: Iterable[str]) -> str:
    """Words with commas, and "and" before the last."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def compared(found: dict[str, list[float]]) -> str:
    """Arms by where sslpp stands beside them, each with the mean of its paired differences over it."""
    sides: dict[str, list[str]] = {}
    for arm, differences in found.items():
        sides.setdefault(side(differences), []).append(f"{arm} ({statistics.mean(differences):+.1f})")
    known = [where for where in ("above", "level with", "below", FEW_SEEDS) if where in sides]
    told = "; ".join(f"{where} {listed(sides[where])}" for where in known)
    return told + (f", of which there are {FEWER}" if FEW_SEEDS in sides else "")


def telling_apart(found: dict[str, list[float]]) -> str:
    """What would tell sslpp from the arms that it is level with, or that have few seeds; "" where there are none."""
    level = {arm: seeds_to_tell(values) for arm, values in found.items() if side(values) == "level with"}
    some = [f"about {count} seeds from {arm}" for arm, count in level.items() if count]
    many = [arm for arm, count in level.items() if not count]
    few = [arm for arm, values in found.items() if side(values) == FEW_SEEDS]
    parts = [f"as differences stand, {listed(some)}"] if some else []
    if many:
        parts.append(
            f"for so small a difference as that from {listed(many)} over {MOST_SEEDS} seeds, or rather more images, "
            "harder ones or a longer training"
        )
    if few:
        parts.append(f"at least three seeds of {listed(few)}")
    return "; ".join(parts)


def verdict(rows: Records) -> list[str]:
    """Sentences that tell what a comparison found; none without sslpp and another arm."""
    rows = final(rows)
    split, (arms, seeds) = records.split_of(rows), arms_and_seeds(rows)
    lines = []
    for name in leading(rows, split):
        found = {arm: list(paired(rows, "sslpp", arm, name, split).values()) for arm in arms if arm != "sslpp"}
        found = {arm: differences for arm, differences in found.items() if differences}
        if not found:
            continue
        ours = statistics.mean(over_seeds(rows, "sslpp", name, split))
        count = max(map(len, found.values()))
        told = f"{count} seeds" if count > 1 else f"one seed ({seeds[0]})"
        lines.append(f"{title(name, rows).capitalize()}, {told}: sslpp ({ours:.1f} %) is {compared(found)}.")
        if more := telling_apart(found):
            lines.append(f"What would tell these apart: {more}.")
    if lines:
        seen = {arm: statistics.mean(r["images_seen"] for r in rows if r["arm"] == arm) for arm in arms}
        fewer = [arm for arm in arms if seen[arm] < 0.9 * seen["sslpp"]]
        unequal = f"A gain over {listed(fewer)}, which saw fewer images, may be due to that." if fewer else ""
        lines.append(" ".join(filter(None, (MEANING, unequal))))
        if any(r["data"].startswith("digits@") for r in rows):
            lines.append(TOY)
    return lines


def write(folder: Path) -> str:
    """Write a comparison's report.md and figures from its records; the text for the screen."""
    rows = records.read(folder / "records.jsonl")
    shown = final(rows)
    split, (_, seeds) = records.split_of(shown), arms_and_seeds(shown)
    pictures = charts.draw(folder / "report", rows)
    where = {"val": "the held-out part of train", "test": "the test split"}[split]
    intro = (
        f"Frozen features, top-1 on {where} in percent, seeds {', '.join(map(str, seeds))}. An arm is one way to "
        "train. Differences are sslpp minus the arm, paired by seed: positive ones speak for SSL++, but for drop (from "
        "the network's best stage to its last) and residue (how well features still tell the proxy task's answer), "
        "where less is better."
    )
    found = verdict(rows)
    told = "\n".join(f"- {line}" for line in found)
    every = [costs(shown), summary(shown, split), *(contrast(shown, name, split) for name in METRICS)]
    every = [lines for lines in [*every, *transferred(shown)] if len(lines) > 1]
    parts = [f"# {report.plain(folder.name)}", *(["## Verdict", told] if found else []), "## Figures", intro]
    parts += [f"![{caption}](report/{name}.png)\n\n*{caption}.*" for name, caption in pictures.items()]
    parts += ["## Tables", *map(report.as_markdown, every)]
    tried = grid(rows)
    if len(tried) > 1:
        parts += ["## Learning rates", report.as_markdown(tried)]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    screen = ["", intro, *map(report.as_text, tables(rows)), f"More, with figures: {folder / 'report.md'}"]
    narrow = [textwrap.fill(line, 110, initial_indent="- ", subsequent_indent="  ") for line in found]
    return "\n\n".join([*screen, *(["\n".join(["Verdict", *narrow])] if found else [])])
