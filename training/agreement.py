"""Which score that needs no labels agrees best with what probes find, from records of many runs."""

import math
from collections.abc import Callable
from typing import Any

from scipy import stats

from .contrast import by_task, mean_and_spread
from .records import Records

Place = tuple[str, str, int, int | str]  # task, arm, seed, stage
PROBES = ("linear", "knn")
FALLING = ("alignment", "uniformity", "residue")  # of these the lower is taken for the better
GROUPS: dict[str, Callable[[Place], Any]] = {
    "runs": lambda place: place[2] if place[3] == "pooled" else None,
    "arms of a task": lambda place: (place[0], place[2]) if place[3] == "pooled" else None,
    "stages of a network": lambda place: place[:3] if place[3] != "pooled" else None,
}


def values(rows: Records, split: str = "val") -> dict[Place, dict[str, float]]:
    """What was measured at each place: probes, and scores without labels, all so that higher is better."""
    found: dict[Place, dict[str, float]] = {}
    for task, here in by_task(rows).items():
        for row in here:
            if row["split"] == split and row["protocol"] in (*PROBES, "rankme", "residue", "label_free"):
                if row["metric"] == "balanced":
                    continue
                name = row["metric"] if row["protocol"] == "label_free" else row["protocol"]
                place = (task, row["arm"], row["seed"], row["stage"])
                found.setdefault(place, {})[name] = -row["value"] if name in FALLING else row["value"]
    return found


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's rank correlation of pairs; NaN where one side is constant."""
    return float(stats.kendalltau(*zip(*pairs, strict=True)).statistic)


def agreement(rows: Records, probe: str) -> list[list[str]]:
    """Kendall's tau of each score with a probe over three kinds of groups, and what choosing a stage by it costs.

    A group has the runs of a seed, of all tasks and arms; or the arms of a task and seed; or the stages of one network.
    tau is the mean over groups, ± its standard deviation over them; a score that a group lacks leaves it out. What a
    choice costs is the probe's accuracy at its own best stage less that at the score's, in points.
    """
    found = {place: told for place, told in values(rows).items() if probe in told}
    names = list(dict.fromkeys(name for told in found.values() for name in told if name not in PROBES))
    lines = [[f"agrees with {probe}", *GROUPS, "lost by choosing a stage"]]
    for name in names:
        line = [name.replace("_", " ")]
        for group_of in GROUPS.values():
            groups: dict[Any, list[tuple[float, float]]] = {}
            for place, told in found.items():
                if group_of(place) is not None and name in told:
                    groups.setdefault(group_of(place), []).append((told[name], told[probe]))
            taus = [tau(pairs) for pairs in groups.values() if len(pairs) > 1]
            line.append(mean_and_spread([found for found in taus if not math.isnan(found)], 2))
        lost = [max(p for _, p in pairs) - max(pairs)[1] for pairs in groups.values()]  # of the last kind, stages
        lines.append([*line, mean_and_spread([100 * value for value in lost])])
    return lines
