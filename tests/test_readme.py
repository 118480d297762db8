"""The README's tables are those of the committed records, and its commands exist."""

import re
import runpy
import shutil
import sys

import pytest
import timm
from PIL import Image

from tests.conftest import ROOT
from tests.test_contrast import rows as compared
from training import classifier, figures, readme, records

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_committed_records(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(f"<!-- (?:{'|'.join(readme.TABLES)}): ", text)) == text.count("<!-- end -->") > 0
    assert readme.fill(text, ROOT / "hub_configs") == text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (page.parent / picture).exists(), picture


def test_a_table_that_is_out_of_date_is_made_anew():
    stale = re.sub(r"(\| sslpp_\S+ \| )\d", r"\g<1>9", TEXT)
    assert stale != TEXT
    assert readme.fill(stale, ROOT / "hub_configs") == TEXT


def test_the_command_writes_tables_figures_and_cards(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "hub_configs", tmp_path / "hub_configs")
    configs, page = tmp_path / "hub_configs", tmp_path / "PAGE.md"
    card = configs / "sslpp_resnet10t_s64.simclr_c10_v2" / "CARD.md"
    kinds = ("comparison: quickstart", "across: tasks_c10_20k", "controls: sslpp_*0k")
    page.write_text("".join(f"<!-- {kind} -->\n<!-- end -->\n" for kind in kinds))
    names = ("quickstart/report/differences.png", "tasks_c10_20k/report/tasks.png", "controls.png")
    whole, drawn = card.read_text(), {name: (configs / name).read_bytes() for name in names}
    for path in (card, *(configs / name for name in names)):
        path.unlink()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", (page,))
    readme.main([])
    assert "| sslpp |" in page.read_text()
    assert card.read_text() == whole
    for name, content in drawn.items():
        assert len((configs / name).read_bytes()) == pytest.approx(len(content), rel=0.2), name  # fonts differ


@pytest.mark.parametrize("name", timm.list_pretrained("sslpp_*"))
def test_the_cards_of_the_shipped_backbones_are_those_of_their_records(name):
    folder = ROOT / "hub_configs" / name
    text = (folder / "CARD.md").read_text(encoding="utf-8")
    assert text == readme.shipped_card(folder)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (folder / picture).exists(), picture


@pytest.mark.parametrize("module", sorted(set(re.findall(r"-m (training[.\w]*)", TEXT))))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_commands_exist_and_read_their_arguments(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--nonsense", "x"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*nonsense.*\n", capsys.readouterr().err)


def test_the_files_that_are_linked_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_fine_tuned_models_are_told_apart_by_start_and_share_of_labels(tmp_path):
    def row(model, seed, value, labels=0.1, scratch=False, **other):
        settings = {"labels": labels, "epochs": 1, "scratch": scratch}
        same = {"arm": "finetune", "stage": "last", "protocol": "finetune", "split": "test", "metric": "top1"}
        return {**same, "model": model, "seed": seed, "value": value, "settings": settings, **other}

    rows = [row("net", 0, 0.5), row("net", 1, 0.6), row("net", 0, 0.3, scratch=True), row("net", 0, 0.9, labels=1)]
    rows += [row("local-dir:runs/x/proxy", 0, 0.4), row("net", 0, 0.1, stage="best"), row("net", 0, 0.2, split="val")]
    records.write(tmp_path / "finetune.jsonl", rows)
    assert records.read(tmp_path / "finetune.jsonl") == rows  # none took another's place
    assert readme.finetune_table(rows) == [
        [
            ["fine-tuned, top-1 %", "10% of the labels", "100% of the labels"],
            ["net", "55.0 ± 7.1 (2)", "90.0 (1)"],
            ["net, from scratch", "30.0 (1)", ""],
            ["x_proxy", "40.0 (1)", ""],
        ]
    ]
    figures.fine_tuned(tmp_path / "finetune.png", readme.fine_tuned(rows))
    assert Image.open(tmp_path / "finetune.png").size[0] > 300


def test_controls_side_by_side_show_what_seeds_can_tell(tmp_path):
    own = [{**r, "split": "test", "model": "net", "task": "rotation"} for r in compared() if r["arm"] != "random"]
    one = [{**r, "arm": "keep_high"} for r in own if (r["arm"], r["seed"]) == ("scratch", 1)]
    (tmp_path / "a_1k").mkdir()
    (tmp_path / "b_1k").mkdir()
    records.write(tmp_path / "a_1k" / "records.jsonl", own + one)
    fewer = [{**r, "value": 2 * r["value"], "settings": {**r["settings"], "n": 200}} for r in own if r["seed"] < 2]
    records.write(tmp_path / "b_1k" / "records.jsonl", fewer)
    told = ["net, rotation, 200 images, seeds 2", "net, rotation, 100 images, seeds 3"]
    assert readme.controls_table(tmp_path, "*1k") == [
        [
            ["sslpp minus, in points: linear / kNN", *told],
            ["proxy: more of the proxy task", "", ""],
            ["scratch: its labels, all layers from random", "(+5.0) / (+5.0)", "(+2.0) / (+2.0)"],
            ["finetune_all: its labels, all layers trained alike", "", ""],
            ["keep_high: its labels, high layers kept, too", "", "(+3.0) / (+3.0)"],
        ]
    ]
    sure = [{**r, "value": r["value"] + (0.1 if r["arm"] == "sslpp" else 0)} for r in own]
    records.write(tmp_path / "a_1k" / "records.jsonl", sure)
    assert readme.controls_table(tmp_path, "a_1k")[0][2][1] == "+12.0 / +12.0"
    (tmp_path / "c_1k").mkdir()
    two = [r for r in sure if r["seed"] < 2]  # whose interval is no proof
    records.write(tmp_path / "c_1k" / "records.jsonl", two)
    assert readme.controls_table(tmp_path, "c_1k")[0][2][1] == "(+12.5) / (+12.5)"


def test_the_lines_for_classifiers_are_those_of_every_card():
    assert classifier.usage("local-dir:runs/shoes/best", 36) in TEXT
    assert TEXT.count("\n") <= 220
