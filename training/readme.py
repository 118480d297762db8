"""python -m training.readme: write the README's tables and the shipped backbones' cards anew from committed records.

Tables stand between ``<!-- KIND: RECIPE -->`` and ``<!-- end -->``. A ``run`` or ``comparison`` is made from
``hub_configs/RECIPE/records.jsonl``, ``finetune`` from ``finetune.jsonl`` beside it.
"""

import re
import statistics
from pathlib import Path

import timm

import sslpp_models  # noqa: F401  registers the backbones

from . import card, contrast, recipe, records, report
from .command import short_name
from .files import write_text

ROOT = Path(__file__).parent.parent


def run_table(rows: contrast.Records) -> list[list[list[str]]]:
    """What one run gained, by stage."""
    arms = [name for name in ("random", "proxy_short", "sslpp") if any(r["arm"] == name for r in rows)]
    found = report.tables(rows, arms)
    return [lines for protocol, lines in found if protocol != "rankme" and "k = 200" not in lines[0][0]]


def finetune_table(rows: contrast.Records) -> list[list[list[str]]]:
    """Top-1 of fine-tuned models on the test split, mean and spread over seeds, a column for each share of labels."""
    rows = [r for r in rows if (r["stage"], r["split"]) == ("last", "test")]
    shares = sorted({float(r["settings"]["labels"]) for r in rows})
    lines = [["fine-tuned, top-1 %", *(f"{share:.0%} of the labels" for share in shares)]]
    for start in dict.fromkeys((r["model"], r["settings"]["scratch"]) for r in rows):
        name = short_name(start[0])
        cells = [f"{name}, from scratch" if start[1] else name]
        for share in shares:
            same = [r for r in rows if (r["model"], r["settings"]["scratch"]) == start]
            values = [100 * r["value"] for r in same if float(r["settings"]["labels"]) == share]
            cells.append(mean_and_spread(values))
        lines.append(cells)
    return [lines]


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation (number of seeds)."""
    if len(values) < 2:
        return "".join(f"{value:.1f} (1)" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


TABLES = {
    "run": ("records.jsonl", run_table),
    "comparison": ("records.jsonl", contrast.tables),
    "finetune": ("finetune.jsonl", finetune_table),
}


def fill(text: str, configs: Path) -> str:
    """A Markdown text with its tables made from the records under `configs`."""

    def table(found: re.Match) -> str:
        kind, name = found.groups()
        file, table_of = TABLES[kind]
        made = table_of(records.read(configs / name / file))
        return f"<!-- {kind}: {name} -->\n" + "\n\n".join(map(report.as_markdown, made)) + "\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}): (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def shipped_card(folder: Path) -> str:
    """The card of a backbone that the package ships, from its recipe folder; push fills the repository in."""
    made = recipe.parse(["--config", str(folder / "recipe.yaml"), "--data.path", "DATA"])
    own, compared = (records.read(at / "records.jsonl") for at in (folder, folder.with_name(f"{folder.name}_20k")))
    return card.page(folder, folder.name, own, compared, made, "sslpp")


if __name__ == "__main__":
    configs = ROOT / "hub_configs"
    path = ROOT / "README.md"
    write_text(path, fill(path.read_text(encoding="utf-8"), configs))
    for name in timm.list_pretrained("sslpp_*"):
        write_text(configs / name / "CARD.md", shipped_card(configs / name))
