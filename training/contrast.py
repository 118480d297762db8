"""A comparison's records to tables: means, paired differences over seeds, and their intervals."""

import math
import statistics

from scipy import stats

from . import arms as A
from .evaluate.label_free import LEADING
from .records import Records, data_of, split_of

KNN = 20  # neighbours that tables show; where others were asked for, the fewest of these
ENOUGH = 3  # seeds, for an interval: that of two is so wide that it tells next to nothing
FEWER = "fewer than three seeds"
WITHOUT_LABELS = "label_free pooled"
METRICS = {
    "linear pooled": "linear probe, pooled",
    "linear best": "linear probe, best stage",
    "linear last": "linear probe, last stage",
    "linear drop": "linear probe, drop from the best stage to the last",
    "knn pooled": "nearest neighbours (k = {k}), pooled",
    "knn best": "nearest neighbours (k = {k}), best stage",
    "knn last": "nearest neighbours (k = {k}), last stage",
    "knn drop": "nearest neighbours (k = {k}), drop from the best stage to the last",
    "residue pooled": "residue of the proxy, pooled",
    WITHOUT_LABELS: f"{LEADING} (needs no labels), pooled",
}


def neighbours(rows: Records) -> int:
    """How many nearest neighbours vote in the figures that are shown."""
    counts = {r["settings"]["k"] for r in rows if r["protocol"] == "knn"}
    return KNN if KNN in counts else min(counts, default=KNN)


def title(name: str, rows: Records) -> str:
    """What people call a metric of these records."""
    return METRICS[name].format(k=neighbours(rows))


def final(rows: Records) -> Records:
    """Every arm's records of its last round, those of the grid left out."""
    rows = [row for row in rows if not row.get("variant")]
    last: dict[tuple[str, int], int] = {}
    for row in rows:
        last[row["arm"], row["seed"]] = max(row["round"], last.get((row["arm"], row["seed"]), 0))
    return [row for row in rows if row["round"] == last[row["arm"], row["seed"]]]


def metric(rows: Records, arm: str, seed: int, name: str, split: str) -> float | None:
    """A metric of one arm and seed in points, None where it was not measured; without labels of held-out images."""
    protocol, which = name.split()
    measured, split = (LEADING, "val") if protocol == "label_free" else ("top1", split)
    found = [r for r in rows if (r["arm"], r["seed"], r["protocol"], r["split"]) == (arm, seed, protocol, split)]
    found = [r for r in found if r["metric"] == measured]
    if protocol == "knn":
        k = neighbours(rows)
        found = [r for r in found if r["settings"]["k"] == k]
    by_stage = {r["stage"]: 100 * r["value"] for r in found}
    if which.isdecimal():
        return by_stage.get(int(which))
    pooled, stages = by_stage.pop("pooled", None), sorted(by_stage)
    if which == "pooled" or not stages:
        return pooled
    best, last = max(by_stage.values()), by_stage[stages[-1]]
    return {"best": best, "last": last, "drop": best - last}[which]


def arms_and_seeds(rows: Records) -> tuple[list[str], list[int]]:
    """The arms in the order that they were run in, and the seeds."""
    return list(dict.fromkeys(r["arm"] for r in rows)), sorted({r["seed"] for r in rows})


def interval(differences: list[float]) -> tuple[float, float] | None:
    """The 95 % t interval of the mean of paired differences; None for fewer than `ENOUGH`."""
    count = len(differences)
    if count < ENOUGH:
        return None
    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return mean - half, mean + half


def told(differences: list[float]) -> tuple[str, str]:
    """The interval of the mean of paired differences, and whether it excludes 0."""
    found = interval(differences)
    if found is None:
        return "one seed" if len(differences) == 1 else "two seeds", "?"
    return f"{found[0]:+.1f} to {found[1]:+.1f}", "no" if found[0] <= 0 <= found[1] else "yes"


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation (number of values)."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f} (1)" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def contrast(rows: Records, name: str, split: str) -> list[list[str]]:
    """A metric's table: each arm's mean, sslpp minus the arm for every seed, and the interval of that difference."""
    arms, seeds = arms_and_seeds(rows)
    lines = [[title(name, rows), "mean", *(f"seed {s}" for s in seeds), "95 % interval", "differs"]]
    for arm in arms:
        values = {seed: metric(rows, arm, seed, name, split) for seed in seeds}
        known = [v for v in values.values() if v is not None]
        if not known:
            continue
        line = [arm, f"{sum(known) / len(known):.1f}"]
        differences = paired(rows, "sslpp", arm, name, split)
        if arm == "sslpp" or not differences:
            lines.append([*line, *(f"({values[s]:.1f})" if values[s] is not None else "" for s in seeds), "", ""])
            continue
        line += [f"{differences[s]:+.1f}" if s in differences else "" for s in seeds]
        lines.append([*line, *told(list(differences.values()))])
    return lines


SUMMARY = {
    "linear pooled": "linear",
    "linear best": "linear, best stage",
    "linear last": "linear, last stage",
    "linear drop": "linear, drop",
    "knn pooled": "kNN {k}",
    "knn drop": "kNN {k}, drop",
    WITHOUT_LABELS: LEADING,
    "residue pooled": "residue",
}


def summary(rows: Records, split: str) -> list[list[str]]:
    """Every arm's means, of what was measured."""
    arms, _ = arms_and_seeds(rows)
    found = {name: {arm: over_seeds(rows, arm, name, split) for arm in arms} for name in SUMMARY}
    labelled = leading(rows, split) != [WITHOUT_LABELS]
    names = [name for name in SUMMARY if any(found[name].values()) and not (labelled and name == WITHOUT_LABELS)]
    lines = [["mean over seeds, %", *(SUMMARY[name].format(k=neighbours(rows)) for name in names)]]
    for arm in arms:
        values = [found[name][arm] for name in names]
        if any(values):
            lines.append([arm, *(f"{statistics.mean(known):.1f}" if known else "" for known in values)])
    return lines


def costs(rows: Records) -> list[list[str]]:
    """What every arm is, what it has seen and what it cost."""
    lines = [["arm", "what it is", "images seen", "operations, 10^12", "minutes"]]
    for arm in arms_and_seeds(rows)[0]:
        own = [r for r in rows if r["arm"] == arm]
        seen, flops, seconds = (statistics.mean(r[k] for r in own) for k in ("images_seen", "flops", "seconds"))
        what = A.title(arm) if arm in A.ARMS else ""
        lines.append([arm, what, f"{seen:,.0f}", f"{flops / 1e12:.3g}", f"{seconds / 60:.1f}"])
    return lines


def leading(rows: Records, split: str) -> list[str]:
    """The metrics that are shown first: pooled features' by labels, or where there are none the one that needs none."""
    arms, _ = arms_and_seeds(rows)
    probes = [name for name in ("linear pooled", "knn pooled") if any(over_seeds(rows, a, name, split) for a in arms)]
    return probes or [WITHOUT_LABELS]


def tables(rows: Records) -> list[list[list[str]]]:
    """The tables to show first: what the arms are, their means, and the paired differences of the pooled features."""
    rows = final(rows)
    split = split_of(rows)
    made = [costs(rows), summary(rows, split), *(contrast(rows, name, split) for name in leading(rows, split))]
    return [lines for lines in made if len(lines) > 1]


def by_task(rows: Records) -> dict[str, Records]:
    """The records that count, by proxy task."""
    tasks = dict.fromkeys(r["task"] for r in rows)
    return {task: final([r for r in rows if r["task"] == task]) for task in tasks}


def over_seeds(rows: Records, arm: str, name: str, split: str) -> list[float]:
    """A metric of an arm, of all seeds that have it."""
    seeds = arms_and_seeds(rows)[1]
    return [v for seed in seeds if (v := metric(rows, arm, seed, name, split)) is not None]


def paired(rows: Records, arm: str, over: str, name: str, split: str) -> dict[int, float]:
    """An arm's metric less another's, in points, by seed, of the seeds that have both."""
    pairs = {seed: [metric(rows, one, seed, name, split) for one in (arm, over)] for seed in arms_and_seeds(rows)[1]}
    return {seed: one - other for seed, (one, other) in pairs.items() if one is not None and other is not None}


def gained(rows: Records, arm: str, over: str, name: str, split: str) -> tuple[str, ...]:
    """Mean of an arm's paired differences over another, their interval, and whether it excludes 0."""
    differences = list(paired(rows, arm, over, name, split).values())
    return (f"{statistics.mean(differences):+.1f}", *told(differences)) if differences else ("", "", "")


def probed(rows: Records, name: str) -> dict[str, dict[str, list[float]]]:
    """A metric of every seed that has it, by proxy task and arm."""
    found = {}
    for task, here in by_task(rows).items():
        values = {arm: over_seeds(here, arm, name, split_of(here)) for arm in arms_and_seeds(here)[0]}
        found[task] = {arm: known for arm, known in values.items() if known}
    return found


def learned(rows: Records) -> list[list[str]]:
    """For each proxy task how well it is solved, and what its features gain over a random network's."""
    names = leading(rows, split_of(rows))
    first, *others = (SUMMARY[name].split()[0] for name in names)
    lines = [["proxy task", "solved", "chance", f"{first}, random", f"{first}, trained", "gain", "95 % interval"]]
    lines[0] += ["differs", *(cell for other in others for cell in (f"{other} gain", "its interval"))]
    for task, here in by_task(rows).items():
        split = split_of(here)
        own = [r for r in here if (r["arm"], r["protocol"]) == ("proxy_short", "task")]
        cells = ["", ""]
        if own:
            reached = mean_and_spread([r["value"] for r in own], 3)
            cells = [f"{own[0]['metric']} {reached}", f"{own[0]['settings']['chance']:.3g}"]
        probes = [mean_and_spread(over_seeds(here, arm, names[0], split)) for arm in ("random", "proxy_short")]
        gains, *more = (gained(here, "proxy_short", "random", name, split) for name in names)
        lines.append([task, *cells, *probes, *gains, *(cell for gain in more for cell in gain[:2])])
    return lines


def added(rows: Records, name: str) -> list[list[str]]:
    """For each proxy task a metric of the task given the whole budget, of SSL++, and of their difference."""
    lines = [[title(name, rows), "proxy", "sslpp", "difference", "95 % interval", "differs"]]
    for task, here in by_task(rows).items():
        split = split_of(here)
        means = [mean_and_spread(over_seeds(here, arm, name, split)) for arm in ("proxy", "sslpp")]
        if all(means):
            lines.append([task, *means, *gained(here, "sslpp", "proxy", name, split)])
    return lines


def tasks(rows: Records) -> list[list[list[str]]]:
    """Tables of proxy tasks side by side, those that have rows."""
    made = [learned(rows), *(added(rows, name) for name in (*leading(rows, split_of(rows)), "residue pooled"))]
    if others(rows):
        made += [across(rows, f"{protocol} pooled") for protocol in ("linear", "knn")]
    return [lines for lines in made if len(lines) > 1]


def others(rows: Records) -> list[str]:
    """The other data sets that features were transferred to."""
    return list(dict.fromkeys(data_of(r) for r in rows if r["protocol"] == "transfer"))


def on(rows: Records, data: str) -> Records:
    """The records of transfer to another data set, as if it were a run's own."""
    here = [r for r in rows if r["protocol"] == "transfer" and data_of(r) == data]
    return [{**r, "protocol": r["settings"]["probe"]} for r in here]


def across(rows: Records, name: str) -> list[list[str]]:
    """For each proxy task and data set, a metric of the task given the whole budget, of SSL++, and their difference."""
    own = [r for r in rows if r["protocol"] != "transfer"]
    found = {data_of(own[0]): own, **{data: on(rows, data) for data in others(rows)}}
    lines = [[f"{title(name, own)}: proxy → sslpp", *found]]
    for task in dict.fromkeys(r["task"] for r in rows):
        cells = [step(final([r for r in here if r["task"] == task]), name) for here in found.values()]
        if any(cells):
            lines.append([task, *cells])
    return lines


def step(rows: Records, name: str) -> str:
    """A metric of the task given the whole budget and of SSL++, means over the seeds of both, and their difference."""
    split = split_of(rows)
    differences = paired(rows, "sslpp", "proxy", name, split)
    if not differences:
        return ""
    arms = ("proxy", "sslpp")
    before, after = (statistics.mean(metric(rows, arm, seed, name, split) for seed in differences) for arm in arms)
    between = f"; {told(list(differences.values()))[0]}" if len(differences) > 1 else ""
    return f"{before:.1f} → {after:.1f} ({after - before:+.1f}{between})"


def transferred(rows: Records) -> list[list[list[str]]]:
    """Paired differences of pooled features on each other data set."""
    result = []
    for data in others(rows):
        here = on(rows, data)
        for name in ("linear pooled", "knn pooled"):
            head, *lines = contrast(here, name, split_of(here))
            result.append([[f"{data}: {head[0]}", *head[1:]], *lines])
    return result


def grid(rows: Records) -> list[list[str]]:
    """What was tried for each arm on the held-out part of train."""
    tried: dict[tuple[str, str], float] = {}
    for r in rows:
        if r.get("variant") and [r[n] for n in ("protocol", "stage", "split", "metric")] == [
            "linear",
            "pooled",
            "val",
            "top1",
        ]:
            tried[r["arm"], r["variant"]] = 100 * r["value"]
    best = {arm: max((key for key in tried if key[0] == arm), key=tried.get) for arm, _ in tried}  # of equals the first
    lines = [["linear probe, pooled, on the held-out part", "setting", "top-1 %", "chosen"]]
    for (arm, setting), value in tried.items():
        lines.append([arm, setting, f"{value:.1f}", "yes" if (arm, setting) == best[arm] else ""])
    return lines
