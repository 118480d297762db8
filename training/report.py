"""Records to tables: on the screen, in report.md, in cards."""

import html
import json
import re
import shutil
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from . import figures
from .command import short_name
from .files import read_json, whole_file, write_text
from .gains import cautions, gain
from .recipe import Recipe
from .records import Records, data_of, is_labelled, last_round, split_of, stages_of

Table = list[list[str]]
TITLES = {
    "linear": "linear probe, top-1 %",
    "knn": "nearest neighbours, top-1 %",
    "residue": "residue, top-1 % (lower: less of the proxy is left)",
    "rankme": "RankMe (effective rank)",
}
ROWS = {
    "random": "the untrained network",
    "proxy_short": "what relearning started from, after the proxy task or by weights that were given",
    "sslpp": "the backbone after relearning",
}
# What a table shows, by how its title begins, for somebody who reads it for the first time.
LEGENDS = {
    "linear probe, top-1": "The features are frozen, and a linear classifier is fitted on those of labelled training "
    "images: the share of images that it gets right. A stage is a group of the network's layers, by its index in timm; "
    "pooled is what the model returns.",
    "linear probe, mean": "The same with every class counting as much, since some have more images than others.",
    "nearest neighbours, top-1": "Without a classifier: the k training images with the nearest features vote.",
    "residue": "How well such a classifier still tells the proxy task's own answer, which is of no use afterwards.",
    "RankMe": "How many dimensions features spread over (Garrido et al., ICML 2023); fewer may mean that some is lost.",
    "linear probe on few": "As with few labels; ±: standard deviation over five draws of the labelled images.",
    "without labels": "From two strongly changed views of each held-out image. Retrieval: how often one finds the "
    "other among all. Stability: how far two clusterings agree, by other seeds or of the two views, from 0 to 1. "
    "Alignment: squared distance of the two views. Uniformity: how evenly images lie, lower is more. Spread: 1 is "
    "even, 0 is all in one place.",
    "pseudo-labels": "Clusters that were relearned from. Agreement: normalised mutual information (NMI), from 0, "
    "chance, to 1, the same, of two clusterings by other seeds or views; nmi: of clusters and classes; purity: the "
    "share of images whose class is the most frequent of their cluster; inertia: how far images lie from centroids.",
}
SENTENCE = 40  # characters; a figure has fewer
EVERY = (*TITLES, "transfer")  # protocols that are measured by stage
PICTURES = {
    "stages": "What frozen features tell by stage of the network; a residue is what is left in them of the proxy task",
    "arms": "sslpp minus each arm of the comparison; bars: 95 % intervals over seeds; green: better, red: worse",
    "lowshot": "Accuracy on few labelled images of each class; bars: standard deviation over five draws",
    "neighbours": "Held-out images, drawn at random, and their nearest training images, before and after",
    "clusters": "What the last round relearned from: images of some of its clusters, or classes if it had true labels",
    "curves": "Training, phase by phase: the loss, and what the log tells of each phase's own task",
}

SOURCES = {
    "backbone": "clusters of features, without labels",
    "random": "clusters of an untrained network's features, without labels",
    "labels": "the true labels",
}


def tables(records: Records, arms: list[str], protocols: Collection[str] = TITLES) -> list[tuple[str, Table]]:
    """(protocol, rows) of tables with a row for each arm and a column for each stage and the pooled features.

    One for each number of neighbours, each other data set that features were transferred to, and for balanced accuracy
    where classes are of unequal size; of several seeds the means.
    """
    shown = [r for arm in arms for r in last_round(records, arm)]
    stages = sorted({r["stage"] for r in shown if r["stage"] != "pooled"})
    result = []
    for protocol in protocols:
        of = [r for r in shown if r["protocol"] == protocol]
        for title in dict.fromkeys(map(title_of, of)):
            rows = [r for r in of if title_of(r) == title]
            rows = [r for r in rows if r["split"] == split_of(rows)]  # a test split may have no labels
            lines = [[title, *(f"stage {s}" for s in stages), "pooled"]]
            for arm in arms:
                scale = 1 if protocol == "rankme" else 100
                own = [r for r in rows if r["arm"] == arm]
                found = [[scale * r["value"] for r in own if r["stage"] == stage] for stage in (*stages, "pooled")]
                if own:
                    lines.append([arm, *(f"{statistics.mean(values):.1f}" if values else "" for values in found)])
            result.append((protocol, lines))
    return result


def title_of(record: dict[str, Any]) -> str:
    """The title of the table that a record of features by stage belongs to."""
    settings, protocol = record["settings"], record["protocol"]
    title = TITLES[settings.get("probe", protocol)]
    if record["metric"] == "balanced":
        title = title.replace("top-1 %", "mean over classes, %")
    if protocol == "transfer":
        title = f"{data_of(record)}: {title}"
    return f"{title}, k = {settings['k']}" if settings.get("k") else title


def pooled_tables(records: Records, arms: list[str]) -> list[Table]:
    """Tables of pooled features alone: the probe on few images of each class, and scores that need no labels."""
    result = []
    shown = [r for arm in arms for r in last_round(records, arm) if r["stage"] == "pooled"]
    few = [r for r in shown if r["protocol"] == "lowshot"]
    for metric in dict.fromkeys(r["metric"] for r in few):
        rows = [r for r in few if r["metric"] == metric and r["split"] == split_of(few)]
        shots = sorted({r["settings"]["shots"] for r in rows})
        words = "top-1 %" if metric == "top1" else "mean over classes, %"
        lines = [[f"linear probe on few images of a class, {words}", *(f"{n} each" for n in shots)]]
        for arm in arms:
            cells = {
                r["settings"]["shots"]: f"{100 * r['value']:.1f} ± {100 * r['deviation']:.1f}"
                for r in rows
                if r["arm"] == arm
            }
            if cells:
                lines.append([arm, *(cells.get(n, "") for n in shots)])
        result.append(lines)
    free = [r for r in shown if r["protocol"] == "label_free"]
    if free:
        metrics = list(dict.fromkeys(r["metric"] for r in free))
        lines = [["without labels", *(name.replace("_", " ") for name in metrics)]]
        for arm in arms:
            values = {r["metric"]: r["value"] for r in free if r["arm"] == arm}
            if values:
                lines.append([arm, *(f"{values[name]:.3f}" if name in values else "" for name in metrics)])
        result.append(lines)
    return result


def cluster_table(records: Records, arm: str) -> list[list[str]]:
    """What the last round's pseudo-labels are like, a row for each k."""
    rows = [r for r in last_round(records, arm) if r["protocol"] == "clusters"]
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    lines = [["pseudo-labels", *(metric.replace("_", " ") for metric in metrics)]]
    for k in sorted({r["settings"]["k"] for r in rows}):
        values = {r["metric"]: r["value"] for r in rows if r["settings"]["k"] == k}
        lines.append([f"k = {k}", *(f"{values[m]:.3f}" if m in values else "" for m in metrics)])
    return lines


TOLD = {
    "images": "images",
    "read": "read",
    "not_drawn": "not drawn",
    "bad": "bad",
    "missing": "of these missing",
    "left_aside": "no images",
}


def splits_line(account: dict[str, dict[str, Any]]) -> str:
    """What each split is used for, and what became of its files, by data.json's account."""

    def one(name: str, told: dict[str, Any]) -> str:
        parts = [f"{told[key]} {words}" for key, words in TOLD.items() if told.get(key)]
        return f"{name}: {told['use']} ({', '.join(parts)})"

    return "; ".join(one(*item) for item in account.items())


def in_words(lines: Table) -> list[bool]:
    """Which columns of a table stand on the left: the first, and sentences."""
    return [not i or any(len(line[i]) > SENTENCE for line in lines[1:]) for i in range(len(lines[0]))]


def as_text(lines: Table) -> str:
    """A table for the screen."""
    widths, left = [max(map(len, column)) for column in zip(*lines, strict=True)], in_words(lines)
    rows = [zip(line, widths, left, strict=True) for line in lines]
    return "\n".join("  ".join(cell.ljust(w) if words else cell.rjust(w) for cell, w, words in row) for row in rows)


_MARKUP = re.compile(r"[\\`*|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|(?<=:)/(?=/)|(?<=www)\.")


def plain(text: str) -> str:
    """A name from elsewhere, as of a folder, for Markdown: it is shown as it is, and does nothing."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def fenced(text: str, language: str) -> str:
    """A block of code, whatever it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def as_markdown(lines: Table) -> str:
    """A table for Markdown."""
    head, *body = ["| " + " | ".join(map(plain, line)) + " |" for line in lines]
    return "\n".join([head, "|" + "|".join("---" if words else "---:" for words in in_words(lines)) + "|", *body])


def rows_explained(arms: Collection[str]) -> str:
    """What the rows of a run's tables are."""
    return f"The rows: {'; '.join(f'`{name}`, {ROWS[name]}' for name in arms if name in ROWS)}."


def beside(arm: str) -> list[str]:
    """A run's arms: the untrained network, what relearning started from, and what came of it, if anything did."""
    return list(dict.fromkeys(("random", "proxy_short", arm)))


def run_tables(records: Records, arm: str, short: bool = False) -> tuple[list[str], list[Table]]:
    """A run's arms, and its tables by stage and of pooled features; `short`, without transfer and few labels.

    Without labels the scores come first that need none.
    """
    arms = [name for name in beside(arm) if any(r["arm"] == name for r in records)]
    by_stage = [lines for _, lines in tables(records, arms, TITLES if short else EVERY)]
    if not is_labelled(records):
        return arms, pooled_tables(records, arms) + by_stage
    return arms, by_stage if short else by_stage + pooled_tables(records, arms)


def explained(found: list[Table]) -> Iterator[str]:
    """Tables for Markdown, and under the first of each kind what it shows."""
    left = dict(LEGENDS)
    for lines in found:
        yield as_markdown(lines)
        for begin in [begin for begin in left if lines[0][0].startswith(begin)]:
            yield f"*{left.pop(begin)}*"


def origin(recipe: Recipe, records: Records) -> str:
    """What the backbone was made from and by, in words."""
    relearn, name = recipe.relearn, plain(short_name(recipe.model.name))
    steps = [f"from the weights of {name}, whatever these were trained on"]
    if not recipe.model.pretrained:
        steps = ["from random weights"]
    if recipe.proxy.epochs:
        steps.append(f"by {recipe.proxy.epochs:g} epochs of the proxy task {recipe.proxy.name}, without labels")
    if relearn.rounds:
        source, told = recipe.clusters.source, f"epochs {relearn.epochs:g}; rounds {relearn.rounds}"
        if source != "labels":
            told = f"k = {', '.join(map(str, recipe.clusters.k))}; {told}"
        last = last_low(relearn.split, records)
        kept = {
            "high": f"keeping the low layers (up to {last}) and re-initialising the high ones",
            "all": "re-initialising every layer",
            "none": f"re-initialising nothing; layers up to {last} rest for the first {relearn.settle:.0%} of it",
        }[relearn.reinit]
        steps.append(f"then from {SOURCES[source]} ({told}), {kept}")
    return ", ".join(steps)


def last_low(split: int | str, records: Records) -> str:
    """The last stage of the low layers, in words, given where relearning was to split the network."""
    chosen = [row["chosen"]["relearn.split"] for row in records if "relearn.split" in row.get("chosen", {})]
    if split == "auto" and not chosen:  # records of earlier versions do not tell
        return "a stage that was chosen without labels"
    count, stage = stages_of(records), chosen[-1] if split == "auto" else split
    told = f"{stage % count if count else stage}{', chosen without labels,' if split == 'auto' else ''}"
    return f"stage {told} of 0 to {count - 1}" if count else f"stage {told}"


def usage(model: str, size: int) -> str:
    """Lines of Python that load a backbone by timm's name for it and embed an image."""
    return f"""import timm, torch
from PIL import Image

model = timm.create_model({json.dumps(model, ensure_ascii=False)}, pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new("RGB", ({2 * size}, {2 * size}))  # your own: Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    features = model(transform(image).unsqueeze(0))  # one row of features
print(features.shape)"""


def draw(folder: Path, records: Records, arm: str, last: Path) -> None:
    """The figures in report/ that need no network."""
    arms = beside(arm)
    shown = [r for name in arms for r in last_round(records, name)]
    figures.stages(folder / "report" / "stages.png", shown, arms, split_of(records))
    figures.lowshot(folder / "report" / "lowshot.png", shown, arms, split_of(records))
    figures.curves(folder / "report" / "curves.png", folder / "metrics.jsonl")
    sheet, drawn = last / "clusters.png", folder / "report" / "clusters.png"
    if sheet.exists():
        with whole_file(drawn) as copy:
            shutil.copyfile(sheet, copy)
    else:  # of a round that is no longer asked for
        drawn.unlink(missing_ok=True)


def pictures(folder: Path, names: Collection[str]) -> list[str]:
    """Sections with those of a run's figures that are there."""
    there = [name for name in names if (folder / "report" / f"{name}.png").exists()]
    return [f"## {name.capitalize()}\n\n![{name}](report/{name}.png)\n\n*{PICTURES[name]}.*" for name in there]


def write(folder: Path, records: Records, recipe: Recipe, arm: str, last: Path) -> str:
    """Write report.md; the text for the screen."""
    arms, found = run_tables(records, arm)
    if len(pseudo := cluster_table(records, arm)) > 1:
        found.append(pseudo)
    code = usage(f"local-dir:{folder / 'hub'}", recipe.data.size)
    account = read_json(folder / "data.json", "splits")["splits"]
    first = cautions(records, arm, recipe.relearn.export)
    parts = [f"# {plain(folder.name)}", *first, gain(records, arm)]
    parts.append(f"It is {plain(short_name(recipe.model.name))} at {recipe.data.size} px, {origin(recipe, records)}.")
    parts.append(f"The images: {plain(splits_line(account))}.")
    leading = [] if is_labelled(records) else ["neighbours", "clusters"]  # they tell more than scores
    parts += pictures(folder, [*leading, *(name for name in PICTURES if name not in leading)])
    parts += ["## Tables", rows_explained(arms), *explained(found)]
    parts.append(f"## Use it\n\n{fenced(code, 'python')}")
    parts.append("Figures are in records.jsonl, the recipe in recipe.yaml.")
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    # On the screen what is read first: top-1, and one number of neighbours.
    short = [lines for lines in found if "mean over" not in lines[0][0] and "k = 200" not in lines[0][0]]
    screen = map(as_text, short)
    return "\n\n".join(["", *first, *screen, gain(records, arm), code, f"More, with figures: {folder / 'report.md'}"])
