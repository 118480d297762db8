"""python -m training.readme: pages' tables, comparisons' figures and shipped cards anew from the committed records.

Tables, and a verdict's sentences, stand between ``<!-- KIND: RECIPE -->`` and ``<!-- end -->``. ``finetune`` is made
from ``hub_configs/RECIPE/finetune.jsonl``, every other kind from ``records.jsonl`` beside it; ``backbones`` from those
of all the backbones of the package that its pattern matches, and from ``larger.jsonl`` (of ``training.evaluate
--data.size``), ``gains`` and ``controls`` from those of all such recipes.
"""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm

import sslpp_models  # noqa: F401  registers the backbones

from . import agreement, benchmark, card, charts, contrast, figures, records, report, verdict
from .command import guarded, parse, short_name
from .files import write_text
from .records import Records

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "hub_configs" / "RESULTS.md")


def run_table(rows: Records) -> list[list[list[str]]]:
    """What one run gained, by stage."""
    arms = [name for name in ("random", "proxy_short", "sslpp") if any(r["arm"] == name for r in rows)]
    found = report.tables(rows, arms)
    return [lines for protocol, lines in found if protocol != "rankme" and "k = 200" not in lines[0][0]]


def fine_tuned(rows: Records) -> dict[str, dict[float, list[float]]]:
    """Top-1, %, of each seed, on the test split after the last epoch, by what was fine-tuned and by share of labels."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if (row["stage"], row["split"], row["metric"]) == ("last", "test", "top1"):
            start = short_name(row["model"]) + (", from scratch" if row["settings"]["scratch"] else "")
            start += f", at {row['size']} px" if "size" in row else ""
            found.setdefault(start, {}).setdefault(float(row["settings"]["labels"]), []).append(100 * row["value"])
    return found


def finetune_table(rows: Records) -> list[list[list[str]]]:
    """Mean and spread over seeds of fine-tuned models, a column for each share of labels."""
    found = fine_tuned(rows)
    shares = sorted({share for values in found.values() for share in values})
    head = ["fine-tuned, top-1 %", *(f"{share:.0%} of the labels" for share in shares)]
    mean = contrast.mean_and_spread
    return [[head, *([start, *(mean(values.get(share, [])) for share in shares)] for start, values in found.items())]]


ARMS = {"random": "untrained", "proxy_short": "proxy task", "sslpp": "SSL++"}
PROBES = {"linear": {"protocol": "linear"}, "kNN": {"protocol": "knn", "k": 20}}
# What sslpp is to be better than, at its own budget.
CONTROLS = {
    "proxy": "more of the proxy task",
    "scratch": "its labels, all layers from random",
    "finetune_all": "its labels, all layers trained alike",
    "keep_high": "its labels, high layers kept, too",
}
HEADS = [f"{probe}, {arm}" for probe in PROBES for arm in ARMS.values()]


def gained(rows: Records) -> list[str]:
    """Pooled features on the test split, for `HEADS`: untrained, after the proxy task, after SSL++."""
    pick = partial(records.value, rows, stage="pooled", split="test", metric="top1")
    found = [pick(arm=arm, **fields) for fields in PROBES.values() for arm in ARMS]
    return ["" if value is None else f"{100 * value:.1f}" for value in found]


def gains_table(configs: Path, pattern: str) -> list[list[list[str]]]:
    """What runs of the recipes in folders of that pattern gained, each on its own images."""
    lines = [["recipe", "images", *HEADS]]
    for path in sorted(configs.glob(f"{pattern}/**/records.jsonl")):
        rows = records.read(path)
        lines.append([str(path.parent.relative_to(configs)), records.data_of(rows[0]), *gained(rows)])
    return [lines]


def shown_larger(folder: Path) -> Records:
    """The records of a shipped backbone at its `test_input_size`; none where it has no such size."""
    return [{**row, "arm": "sslpp"} for row in records.read(folder / "larger.jsonl")]  # evaluate calls it by its name


def gained_by_size(own: Records, larger: Records) -> str:
    """What a backbone gains by being shown larger than in training, for its card."""
    found = dict(zip(HEADS, zip(gained(larger), gained(own), strict=True), strict=True))
    linear, knn = (" instead of ".join(found[f"{probe}, SSL++"]) for probe in PROBES)
    size, config = larger[0]["size"], "`timm.data.resolve_model_data_config(model, use_test_size=True)`"
    return f"""Shown at {size} px, its `test_input_size` ({config}), it comes to a linear
accuracy of {linear}, and by neighbours to {knn}."""


def backbones_table(configs: Path, pattern: str) -> list[list[list[str]]]:
    """The package's backbones, and what they gained; the same weights once more at the px of a `larger.jsonl`."""
    lines = [["backbone", "parameters", "px", "images", *HEADS]]
    for name in timm.list_pretrained(pattern):
        own, larger = records.read(configs / name / "records.jsonl"), shown_larger(configs / name)
        network = timm.create_model(name)
        count = sum(parameter.numel() for parameter in network.parameters())
        sizes = {network.pretrained_cfg["input_size"][-1]: own}
        if larger:
            sizes[larger[0]["size"]] = larger
        for size, rows in sizes.items():
            lines.append([name, f"{count / 1e6:.1f} M", str(size), records.data_of(own[0]), *gained(rows)])
    return [lines]


def comparisons(configs: Path, pattern: str) -> list[Records]:
    """The records that count of each comparison of that pattern, that of the most images first."""
    found = [contrast.final(records.read(path)) for path in sorted(configs.glob(f"{pattern}/records.jsonl"))]
    return sorted(found, key=trained_on, reverse=True)


def controls_table(configs: Path, pattern: str) -> list[list[list[str]]]:
    """sslpp less its controls, pooled, on the test split, a column for each comparison of that pattern.

    In parentheses what its interval does not tell from 0, or what has too few seeds for one.
    """
    found = comparisons(configs, pattern)
    lines = [["sslpp minus, in points: " + " / ".join(PROBES), *map(compared, found)]]

    def cell(rows: Records, arm: str, probe: str) -> str:
        differences = list(contrast.paired(rows, "sslpp", arm, f"{probe.lower()} pooled", "test").values())
        if not differences:
            return ""
        mean = f"{statistics.mean(differences):+.1f}"
        return mean if contrast.told(differences)[1] == "yes" else f"({mean})"

    for arm, what in CONTROLS.items():
        cells = [[cell(rows, arm, probe) for probe in PROBES] for rows in found]
        lines.append([f"{arm}: {what}", *(" / ".join(filter(None, pair)) for pair in cells)])
    return [lines]


def compared(rows: Records) -> str:
    """The network, proxy task, images and seeds of a comparison."""
    seeds = len(contrast.arms_and_seeds(rows)[1])
    return f"{rows[0]['model']}, {rows[0]['task']}, {trained_on(rows):,} images, seeds {seeds}"


def trained_on(rows: Records) -> int:
    """How many images were trained on, which are those that a linear probe was fitted on."""
    return next(r["settings"]["n"] for r in rows if r["protocol"] == "linear")


def of(make: Callable[[Records], list], file: str = "records.jsonl") -> Callable[[Path, str], list]:
    """A kind of table that is made of one recipe's records."""
    return lambda configs, name: make(records.read(configs / name / file))


TABLES = {
    "run": of(run_table),
    "comparison": of(contrast.tables),
    "verdict": of(lambda rows: ["\n".join(f"- {line}" for line in verdict.verdict(rows))]),
    "tasks": of(contrast.tasks),
    "across": of(lambda rows: [contrast.across(rows, "linear pooled")]),
    "agreement": of(lambda rows: [agreement.agreement(rows, probe) for probe in agreement.PROBES]),
    "speed": of(lambda rows: [benchmark.table([row["settings"] for row in rows])]),
    "finetune": of(finetune_table, "finetune.jsonl"),
    "backbones": backbones_table,
    "gains": gains_table,
    "controls": controls_table,
}


def fill(text: str, configs: Path) -> str:
    """A Markdown text with its tables made from the records under `configs`."""

    def table(found: re.Match) -> str:
        kind, name = found.groups()
        parts = [part if isinstance(part, str) else report.as_markdown(part) for part in TABLES[kind](configs, name)]
        return f"<!-- {kind}: {name} -->\n" + "\n\n".join(parts) + "\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}): (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def shipped_card(folder: Path) -> str:
    """The card of a backbone that the package ships, from its recipe folder; push fills the repository in."""
    own, compared = (records.read(at / "records.jsonl") for at in (folder, folder.with_name(f"{folder.name}_20k")))
    made = parse(["--config", str(folder / "recipe.yaml"), "--data.path", records.data_of(own[0])])
    if larger := shown_larger(folder):
        made.card.about += f"\n{gained_by_size(own, larger)}"
    counted = {r["split"]: r["settings"]["n"] for r in own if r["protocol"] == "rankme"}
    return card.page(folder, folder.name, own, compared, made, "sslpp", (trained_on(own), counted["val"]), shipped=True)


def draw(configs: Path, kind: str, name: str) -> None:
    """The figures beside a table."""
    folder = configs / name
    if kind == "comparison":
        charts.draw(folder / "report", records.read(folder / "records.jsonl"))
    elif kind == "across":
        charts.tasks(folder / "report" / "tasks.png", records.read(folder / "records.jsonl"))
    elif kind == "controls":
        found = {f"{rows[0]['model']}, {rows[0]['task']}": rows for rows in comparisons(configs, name)}
        charts.controls(configs / "controls.png", found, CONTROLS)


def main(arguments: Sequence[str]) -> None:
    configs = ROOT / "hub_configs"
    for path in PAGES:
        write_text(path, fill(path.read_text(encoding="utf-8"), configs))
        for kind, name in re.findall(r"<!-- (\w+): (\S+) -->", path.read_text(encoding="utf-8")):
            draw(configs, kind, name)
    for path in configs.glob("*/finetune.jsonl"):
        figures.fine_tuned(path.parent / "report" / "finetune.png", fine_tuned(records.read(path)))
    for name in timm.list_pretrained("sslpp_*"):
        write_text(configs / name / "CARD.md", shipped_card(configs / name))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
