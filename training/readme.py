"""python -m training.readme: write the README's tables anew from the committed records.

They stand between ``<!-- run: RECIPE -->`` or ``<!-- comparison: RECIPE -->`` and ``<!-- end -->``, and are made from
``hub_configs/RECIPE/records.jsonl``.
"""

import re
from pathlib import Path

from . import contrast, records, report
from .files import write_text

ROOT = Path(__file__).parent.parent


def run_table(rows: contrast.Records) -> list[list[list[str]]]:
    """What one run gained, by stage."""
    arms = [name for name in ("random", "proxy_short", "sslpp") if any(r["arm"] == name for r in rows)]
    found = report.tables(rows, arms)
    return [lines for protocol, lines in found if protocol != "rankme" and "k = 200" not in lines[0][0]]


def comparison_table(rows: contrast.Records) -> list[list[list[str]]]:
    """Means of all arms, and the paired differences of the pooled features."""
    rows = contrast.final(rows)
    split = report.split_of(rows)
    pooled = [contrast.contrast(rows, name, split) for name in ("linear pooled", "knn pooled")]
    return [contrast.summary(rows, split), *pooled]


TABLES = {"run": run_table, "comparison": comparison_table}


def fill(text: str, configs: Path) -> str:
    """A Markdown text with its tables made from the records under `configs`."""

    def table(found: re.Match) -> str:
        kind, name = found.groups()
        made = TABLES[kind](records.read(configs / name / "records.jsonl"))
        return f"<!-- {kind}: {name} -->\n" + "\n\n".join(map(report.as_markdown, made)) + "\n<!-- end -->"

    return re.sub(r"<!-- (run|comparison): (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    write_text(path, fill(path.read_text(encoding="utf-8"), ROOT / "hub_configs"))
