"""What people read of a run, word by word: made of fixed figures, held against tests/pages.

Where words were changed on purpose, ``python -m tests.test_pages`` writes the pages anew; look at what changed.
"""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.conftest import make_images
from training import (
    classifier_report,
    command,
    compare,
    embed,
    finetune,
    predict,
    push,
    records,
    report,
    usage,
    verdict,
)
from training.benchmark import __main__ as benchmark
from training.classifier import Answers
from training.evaluate import __main__ as evaluate
from training.explore import __main__ as explore
from training.files import write_json, write_lines
from training.proxies import __main__ as proxies

PAGES = Path(__file__).parent / "pages"
CONFIGS = Path(__file__).parent.parent / "hub_configs"
RUN = CONFIGS / "sslpp_resnet10t_s32.rotation_c10"
SPLITS = {
    "train": {"use": "training", "read": 32, "bad": 1, "left_aside": 2},
    "test": {"use": "test", "read": 8},
    "other": {"use": "not used", "images": 3, "left_aside": 0},
}


def run_report(folder, labelled):
    """A run's report and what is on the screen at its end."""
    run = folder / "mine"
    shutil.copytree(RUN, run)
    recipe = command.parse(["--config", str(RUN / "recipe.yaml"), "--data.path", "digits"])
    write_json(run / "data.json", {"splits": SPLITS})
    left_out = ("transfer",) if labelled else ("transfer", "linear", "knn", "residue", "lowshot")
    rows = [r for r in records.read(run / "records.jsonl") if r["protocol"] not in left_out]
    said = report.write(run, rows, recipe, "sslpp", run / "round_1")
    return {"report": (run / "report.md").read_text(), "screen": said}


def classifier_pages(folder):
    """A fine-tuned classifier's report and card."""
    run, images = folder / "shoes", make_images(count=40)
    images.account = SPLITS
    for name in ("best", "last"):
        (run / name / "report").mkdir(parents=True)
    write_json(run / "best" / "finetune.json", {"step": 20})
    steps = [{"step": 10 * i, "images": 80 * i, "lr": 0.1, "loss": 2 / i, "accuracy": 0.3 * i} for i in (1, 2, 3)]
    shared = {"phase": "finetune", "round": 0, "val_top1": 0.5}
    write_lines(run / "metrics.jsonl", [{**shared, **row} for row in steps])
    settings = {"labels": 1.0, "epochs": 10, "scratch": False, "lr": 0.001, "layer_decay": 0.75}
    shared = {"settings": settings, "seed": 0, "data": "shop@0123456789abcdef"}
    rows = [
        {**shared, "stage": stage, "split": split, "metric": metric, "value": value}
        for stage, value in (("best", 0.75), ("last", 0.5))
        for split in ("val", "test")
        for metric in ("top1", "balanced")
    ]
    shown = torch.arange(0, 40, 5)
    answers = Answers(images, shown, torch.eye(4)[(images.labels[shown] + (shown > 25)) % 4] * 0.6 + 0.1)
    called = {"val": "validation", "test": "test"}
    told = classifier_report.Told(
        "resnet10t.c3_in1k", rows, images, 32, called, "test", {"best": answers, "last": answers}, "mit"
    )
    said = classifier_report.write(run, told)
    return {"report": (run / "report.md").read_text(), "card": (run / "best" / "README.md").read_text(), "screen": said}


def comparison_pages(folder):
    """A comparison's report, of the quickstart's records, a learning rate tried beside them."""
    run = folder / "quickstart"
    run.mkdir(parents=True)
    rows = records.read(CONFIGS / "quickstart" / "records.jsonl")
    tried = next(r for r in rows if (r["arm"], r["protocol"], r["stage"]) == ("sslpp", "linear", "pooled"))
    rows.append({**tried, "split": "val", "metric": "top1", "variant": "lr x1", "value": 0.5})
    write_lines(run / "records.jsonl", rows)
    said = verdict.write(run)
    return {"report": (run / "report.md").read_text(), "screen": said}


def every_help():
    """What --help_all of each command says (--help, where it has no short form), but for lines of the ones before."""
    found = [command.parser([]), compare.command([]), proxies.command([])]
    found += [one.command() for one in (finetune, evaluate, embed, predict, push, explore, benchmark)]
    with mock.patch.dict(os.environ, COLUMNS="110"):
        return "\n".join(dict.fromkeys(line for one in found for line in usage.whole(one).splitlines())) + "\n"


def pages(folder):
    """Each page by the name of its file."""
    made = {}
    for name, parts in (
        ("labelled", run_report(folder / "a", True)),
        ("unlabelled", run_report(folder / "b", False)),
        ("classifier", classifier_pages(folder / "c")),
        ("comparison", comparison_pages(folder / "d")),
    ):
        made |= {f"{name}_{part}.md": text.replace(str(folder), "FOLDER") for part, text in parts.items()}
    return made | {"help.txt": every_help()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pages(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("name", sorted(path.name for path in PAGES.glob("*")))
def test_the_words_are_those_that_were_looked_at(name, made):
    assert made[name] == (PAGES / name).read_text(encoding="utf-8")


def test_every_page_is_there(made):
    assert sorted(made) == sorted(path.name for path in PAGES.iterdir())


def test_what_each_split_was_for(tmp_path):
    """A part is held out of the training split unless there is another split for that."""
    images = make_images(40)
    told = classifier_report.Told("x", [], images, 20, {}, "val", {}, None)
    images.account = {"train": {"use": "training", "read": 40}, "other": {"use": "not used", "images": 3}}
    learned, held = ["train", "learned from", "20"], ["train, held-out part", "chooses best/", "8"]
    assert classifier_report.split_table(told)[1:] == [learned, held, ["other", "not used", "3"]]
    images.account = {"train": {"use": "training", "read": 40}, "val": {"use": "validation", "read": 5}}
    assert classifier_report.split_table(told)[1:] == [learned, ["val", "chooses best/", "5"]]


def test_a_classifier_keeps_its_figures_beside_its_card(tmp_path):
    classifier_pages(tmp_path)
    kept = {path.name for path in (tmp_path / "shoes" / "best" / "report").iterdir()}
    assert kept == {"classes.png", "confusion.png"}


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for page, text in pages(Path(scratch)).items():
            (PAGES / page).write_text(text, encoding="utf-8")
