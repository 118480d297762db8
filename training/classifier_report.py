"""The report and the card of a fine-tuned classifier."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow as pa
from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor

from . import classifier, guesses, longer, records, report, tables
from .card import REPOSITORY, hub_id, licence_fields
from .command import short_name
from .files import read_json, read_log, whole_file, write_text
from .guesses import SHOWN, short
from .images import Images

USES = {"training": "learned from", "validation": "chooses best/", "test": "measured once, at the end"}
PICTURES = {
    "learning": "How it learned",
    "classes": "How often each class is told right",
    "confusion": "What is taken for what",
    "mistakes": "The mistakes that it was surest of",
}


@dataclass
class Told:
    """What report and card are made of.

    Attributes:
        model: what was fine-tuned, as timm loads it.
        rows: the run's records.
        train: the training images.
        learned: how many of them had labels that it learned from.
        called: what people call each split of the records.
        shown: the split that tables and figures show.
        found: what the best and the last classifier say of its images, by their folder's name.
        licence: of the classifier, if any.
    """

    model: str
    rows: records.Records
    train: Images
    learned: int
    called: dict[str, str]
    shown: str
    found: dict[str, classifier.Answers]
    licence: str | None

    @property
    def names(self) -> list[str]:
        return self.train.label_names

    @property
    def scratch(self) -> bool:
        """Whether it began with random weights."""
        return bool(self.rows[0]["settings"]["scratch"])

    def accuracy(self, stage: str, split: str, metric: str = "top1") -> float | None:
        return records.value(self.rows, stage=stage, split=split, metric=metric)


def headline(told: Told, kept: str = "best", who: str = "the classifier in `best/`") -> str:
    """The answer, with its interval, what a constant would reach, and the mean over classes where it is another."""
    found = told.found[kept]
    right, count = int((found.guess == found.truth).sum()), len(found.truth)
    low, high = guesses.interval(right, count)
    balanced = told.accuracy(kept, told.shown, "balanced")
    mean = "" if balanced is None else f" The mean over classes, which are of unequal size, is {100 * balanced:.1f} %."
    chosen = (kept, told.shown) == ("best", "val")
    warning = " It was chosen on these images, which flatters it: a test split would tell more." * chosen
    return (
        f"Of {count:,} images ({told.called[told.shown]}) {who} tells **{100 * right / count:.1f} %** right "
        f"({100 * low:.1f} to {100 * high:.1f} with 95 % confidence, by their number); saying the most frequent of the "
        f"{len(told.names)} classes each time would reach {100 * constant(told.train, found.truth):.1f} %.{mean}"
        f"{warning}"
    )


def constant(train: Images, truth: Tensor) -> float:
    """Share of images that is right if the most frequent training class is always said."""
    return (truth == train.labels[train.labelled(train.train)].mode().values).double().mean().item()


KEPT = {"best": "chosen on the held-out images", "last": "after the last epoch"}


def accuracy_table(told: Told, rows: dict[str, str]) -> report.Table:
    """Accuracy of the best and the last classifier on each split; `rows` are their names in the table."""
    metrics = {r["metric"]: None for r in told.rows}
    words = {"top1": "told right, %", "balanced": "mean over classes, %"}
    lines = [["", *(f"{name}: {words[metric]}" for name in told.called.values() for metric in metrics)]]
    for stage, what in rows.items():
        cells = (told.accuracy(stage, split, metric) for split in told.called for metric in metrics)
        lines.append([what, *(f"{100 * value:.1f}" for value in cells)])
    return lines


def class_table(told: Told, kept: str = "best") -> report.Table:
    """A row for each class, the worst first."""
    lines = [["class", "images", "told right, %", "most often taken for"]]
    for name, count, right, taken, times in classifier.by_class(classifier.confusion(told.found[kept]), told.names):
        mistaken = f"{taken} ({times})" if times else ""
        lines.append([name, str(count), f"{100 * right / count:.0f}", mistaken])
    return lines


def split_table(told: Told) -> report.Table:
    """What each split, and what is held out of one, was for."""
    lines = [["images", "used for", "how many"]]
    for name, account in told.train.account.items():
        use, count = account["use"], account.get("read", account.get("images", 0))
        if use == "training" and "validation" not in {a["use"] for a in told.train.account.values()}:
            held = int(told.train.held_out[told.train.all].sum())
            lines.append([name, USES[use], f"{told.learned:,}"])
            lines.append([f"{name}, held-out part", USES["validation"], f"{held:,}"])
        else:
            lines.append([name, USES.get(use, use), f"{told.learned if use == 'training' else count:,}"])
    return lines


def draw(folder: Path, told: Told, metrics: list[dict[str, Any]], best: int) -> None:
    """The figures in report/."""
    best_found = told.found["best"]
    at, where, counts = folder / "report", told.called[told.shown], classifier.confusion(best_found)
    finetuned = [r for r in metrics if r["phase"] == "finetune"]
    epoch = finetuned[-1]["images"] / told.rows[0]["settings"]["epochs"]
    always = constant(told.train, told.train.labels[told.train.labelled(told.train.val)])
    guesses.learning(at / "learning.png", finetuned, epoch, told.called["val"], best, always)
    overall = (best_found.guess == best_found.truth).double().mean().item()
    guesses.by_class(at / "classes.png", classifier.by_class(counts, told.names), overall, where)
    guesses.confusion(at / "confusion.png", counts, told.names, where)
    sure, guess = best_found.probabilities.max(1)
    wrong = (guess != best_found.truth).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:SHOWN].tolist()
    names, truth = told.names, best_found.truth
    captions = [f"is {short(names[truth[i]])}\nsaid {short(names[guess[i]])}, {100 * sure[i]:.0f} %" for i in worst]
    shown = [(best_found.images, int(best_found.indices[i]), c) for i, c in zip(worst, captions, strict=True)]
    title = f"Wrong, and surest of it: {len(shown)} of {len(wrong)} mistakes ({where})"
    guesses.sheet(at / "mistakes.png", shown, title)


def write(folder: Path, told: Told) -> str:
    """Figures, predictions and report.md of a run, and the cards of its classifiers; the text for the screen."""
    model, size = folder / "best", told.train.size
    draw(folder, told, read_log(folder / "metrics.jsonl"), read_json(model / "finetune.json", "step")["step"])
    best = told.found["best"]
    said = best.table(told.called[told.shown], told.names)
    truth = dict(zip(best.indices.tolist(), best.truth.tolist(), strict=True))
    labels = pa.array([told.names[truth[i]] if i in truth else None for i in range(len(said))], pa.string())
    tables.write(folder / "predictions.csv", [said.append_column("label", labels).filter(labels.is_valid())])
    shown = [
        f"## {caption}\n\n![{caption}](report/{name}.png)"
        for name, caption in PICTURES.items()
        if (folder / "report" / f"{name}.png").exists()
    ]
    parts = [
        f"# {report.plain(folder.name)}",
        f"{headline(told)} It is {report.plain(told.model)}, fine-tuned.{longer.words(told.rows[0])}",
        report.as_markdown(accuracy_table(told, {name: f"{name}/, {what}" for name, what in KEPT.items()})),
        "## Which images were for what",
        report.as_markdown(split_table(told)),
        f"All files: {report.plain(report.splits_line(told.train.account))}.",
        "## Use it",
        f"On a folder of new images, no labels needed:\n\n```bash\npython -m training.predict {quote(str(model))} "
        "--data.path NEW --out predictions.csv\n```",
        f"In Python:\n\n{report.fenced(classifier.usage(f'local-dir:{model}', size), 'python')}",
        f"As ONNX (`pip install onnx onnxscript`):\n\n```python\n{classifier.ONNX}\n```",
        f"On the Hub:\n\n```bash\npython -m training.push {quote(str(folder))} ORG/NAME --dry-run\n```",
        *shown,
        "## Every class",
        report.as_markdown(class_table(told)),
        "What it says of each image is in predictions.csv; figures are in records.jsonl, settings in recipe.yaml.",
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    for name in ("best", "last"):
        write_text(folder / name / "README.md", card(folder.name, name, told))
    for name in ("classes", "confusion"):
        with whole_file(model / "report" / f"{name}.png") as beside:
            shutil.copy(folder / "report" / f"{name}.png", beside)
    return f"\n{headline(told).replace('**', '')}\nMore, with figures: {folder / 'report.md'}"


def card(name: str, kept: str, told: Told) -> str:
    """The model card of a classifier, its use first.

    Args:
        name: of the model.
        kept: "best" or "last".
        told: the run.
    """
    measured = [r for r in told.rows if (r["stage"], r["split"], r["metric"]) == (kept, "test", "top1")]
    head = ModelCardData(
        model_name=name,
        library_name="timm",
        **licence_fields(told.licence),
        base_model=None if told.scratch else hub_id(told.model),
        pipeline_tag="image-classification",
        tags=["timm", "transformers", "image-classification"],
        eval_results=[_result(row) for row in measured] or None,
    )
    settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in told.rows[0]["settings"].items())
    pictures = [f"![{PICTURES[one]}](report/{one}.png)" for one in ("classes", "confusion")]
    licence = "No licence was chosen for these weights: ask before you use them"
    if told.licence:
        licence = f"The weights are under {report.plain(told.licence)}"
    parts = [
        f"---\n{head}\n---",
        f"# {report.plain(name)}",
        f"It tells {len(told.names)} classes of images apart: {', '.join(map(report.plain, told.names))}.",
        "## Use it",
        f"Plain timm loads it:\n\n```python\n{classifier.usage(f'hf-hub:{REPOSITORY}', told.train.size)}\n```",
        f'`transformers.pipeline("image-classification", "{REPOSITORY}")` does the same. As ONNX, after these '
        f"lines and `pip install onnx onnxscript`:\n\n```python\n{classifier.ONNX}\n```",
        "## How good it is",
        headline(told, kept, "this classifier"),
        report.as_markdown(accuracy_table(told, {kept: KEPT[kept]})),
        *(pictures if kept == "best" else []),
        report.as_markdown(class_table(told, kept)),
        "## How it was made",
        f"{report.plain(short_name(told.model))} was fine-tuned on {told.learned:,} labelled images, seen at "
        f"{told.train.size} px ({settings}), by `training.finetune` of SSL++ for timm.{longer.words(told.rows[0])}",
        "## Limits",
        "- It names one of its classes for any image, also for one that shows none; a low probability may tell.\n"
        "- It was trained and measured on images of one source, and knows their biases.\n"
        f"- {licence}.",
    ]
    return "\n\n".join(parts) + "\n"


def _result(record: dict[str, Any]) -> EvalResult:
    source, _, fingerprint = record["data"].rpartition("@")
    return EvalResult(
        task_type="image-classification",
        dataset_type=source,
        dataset_name=source,
        dataset_split=record["split"],
        dataset_args={"fingerprint": fingerprint},
        metric_type="accuracy",
        metric_name="fine-tuned, top-1",
        metric_value=record["value"],
        metric_args={name: record[name] for name in ("stage", "seed", "settings")},
    )
