"""The model card: what the Hub reads of it, and what it promises."""

import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.conftest import TINY_RUN, call
from training import card, command, export, records
from training.__main__ import main

SECTIONS = ("Use it", "What it is", "What was measured", "Limits", "Made by", "Citation")


@pytest.fixture(scope="module")
def hub(finished):
    return finished[0] / "hub"


def test_the_hubs_client_reads_what_a_leaderboard_may_compare(finished, hub):
    own = records.last_round(records.read(finished[0] / "records.jsonl"), "sslpp")
    own = [r for r in own if r["protocol"] in ("linear", "knn") and r["stage"] == "pooled" and r["split"] == "test"]
    own = [r for r in own if r["metric"] == "top1"]
    data = ModelCard.load(hub / "README.md").data
    read = [
        {**r.metric_args, "split": r.dataset_split, "metric": r.metric_type, "value": r.metric_value,
         "data": f"{r.dataset_name}@{r.dataset_args['fingerprint']}"}
        for r in data.eval_results
    ]  # fmt: skip
    made = [{**{name: row[name] for name in read[0]}, "metric": "accuracy"} for row in own]
    assert sorted(map(str, read)) == sorted(map(str, made))
    assert {row["protocol"] for row in made} == {"linear", "knn"}
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.license is None


def test_it_says_what_a_stranger_needs(finished, hub):
    text = (hub / "README.md").read_text()
    for section in SECTIONS:
        assert f"\n## {section}\n" in text
    for needed in ("hf-hub:ORG/NAME", "features_only=True", "training.finetune", "our reading of the abstract"):
        assert needed in text
    assert "No licence was chosen" in text
    assert "up to stage 2 of 0 to 4" in text
    assert re.search(r"trained on 38 images of pictures\d; 10 more were held out", text)
    assert text.count("\n") < 200
    assert records.read(hub / "records.jsonl") == records.read(finished[0] / "records.jsonl")
    for picture in (hub / "report").glob("*.png"):
        assert picture.stem == "curves" or f"report/{picture.name}" in text


def test_its_lines_of_python_run(hub, tmp_path):
    code = "\n".join(part.split("```")[0] for part in (hub / "README.md").read_text().split("```python\n")[1:])
    code = code.replace("hf-hub:ORG/NAME", f"local-dir:{hub}") + "\nprint(features.shape, len(maps.feature_info))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "torch.Size([1, 96]) 5"


def test_its_recipe_is_the_one_that_ran_without_the_places_of_this_machine(hub, finished, picture_folder, tmp_path):
    text = (hub / "recipe.yaml").read_text()
    for place in (picture_folder, finished[0]):
        assert str(place) not in text + (hub / "README.md").read_text()
    (tmp_path / "again.yaml").write_text(text)
    here = ["--data.path", str(picture_folder), "--run", str(finished[0])]
    again = command.parse(["--config", str(tmp_path / "again.yaml"), *here])
    assert again == command.parse(["--config", str(finished[0] / "recipe.yaml")])


def test_licence_data_set_and_words_come_from_the_recipe(picture_folder, tmp_path):
    config = tmp_path / "mine" / "recipe.yaml"
    config.parent.mkdir()
    config.write_text("card: {license: other, dataset: somebody/pictures}\nrelearn: {rounds: 0}\n")
    (config.parent / "README.md").write_text("Words of *ours*.\n")
    run = tmp_path / "run"
    done = call(
        main, "--config", config, *TINY_RUN, "--data.path", picture_folder, "--run", run, "--proxy.epochs", "0.5"
    )
    assert done.returncode == 0, done.stderr
    data, text = ModelCard.load(run / "hub" / "README.md").data, (run / "hub" / "README.md").read_text()
    assert (data.license, data.datasets) == ("other", ["somebody/pictures"])
    assert "\nWords of *ours*.\n" in text
    assert "research only" in text
    assert data.eval_results  # of the proxy's backbone, where nothing was relearned
    assert "clusters of features" not in text.split("The method is")[0]
    assert '"license": "other"' in (run / "hub" / "config.json").read_text()


def test_a_data_sets_name_may_hold_the_sign_before_its_fingerprint():
    row = {"stage": 1, "protocol": "linear", "settings": {}, "split": "test", "metric": "top1", "seed": 0, "value": 0.5}
    found = card.result({**row, "data": "photos@home@0123"}, None)
    assert (found.dataset_name, found.dataset_args) == ("photos@home", {"fingerprint": "0123"})


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("hf-hub:org/net@v2", "org/net"),
        ("local-dir:runs/mine/hub", None),
        ("sslpp_resnet10t_s32", None),
    ],
)
def test_weights_of_the_hub_are_known_by_their_repository(model, repository):
    assert card.hub_id(model) == repository


@pytest.mark.parametrize("licence", ["apache-2.0", "cc-by-nc-sa-4.0", "MIT", "agpl-3.0"])
def test_licences_that_the_hub_knows_are_named_so(licence):
    assert card.licence_fields(licence) == {"license": licence.lower()}


def test_other_licences_are_named_beside():
    assert card.licence_fields("dinov3-license") == {"license": "other", "license_name": "dinov3-license"}
    assert card.licence_fields(None) == {}


def test_it_says_what_the_model_started_from():
    base = ["--data.path", "/home/me/photos", "--run", "x"]
    made = command.parse([*base, "--model.name", "local-dir:/home/me/runs/a/hub"])
    own = card.what(made, [], "sslpp")
    assert "/home/me" not in own + card.portable(made)
    assert "name: local-dir:FOLDER" in card.portable(made)
    assert "from random weights, by 100 epochs of the proxy task rotation, without labels, then from clusters" in own
    assert "ORG" not in card.usage("sslpp_x", 32, shipped=True)
    assert card.in_words({"channels": [16, 32], "stem_width": 8}) == "channels 16, 32; stem width 8"
    lent = card.what(command.parse([*base, "--model.pretrained", "true", "--proxy.epochs", "0"]), [], "sslpp")
    assert "from the weights of resnet50, whatever these were trained on, then from clusters" in lent
    assert "from new weights" not in own + lent
    for source, told in (("labels", "the true labels"), ("random", "clusters of an untrained network's features")):
        text = card.what(command.parse([*base, "--clusters.source", source, "--clusters.k", "[77]"]), [], "sslpp")
        assert f"then from {told}" in text
        assert f"Here it was {told}" in text
        assert ("k = 77" in text) == (source == "random")
    assert "Here it was" not in own + lent
    for rounds in (1, 0):
        made = command.parse([*base, "--relearn.reinit", "high", "--relearn.rounds", str(rounds)])
        assert ("The high ones started from new weights here." in card.what(made, [], "sslpp")) == bool(rounds)


def test_places_of_one_machine_stay_there_and_other_data_sets_are_named():
    places = ["--data.path", "/home/me/photos", "--run", "/home/me/x", "--data.labels", "/home/me/labels.csv"]
    made = command.parse([*places, "--evaluate.transfer", "[/home/me/shoes, org/hats]"])
    assert "/home/me" not in card.portable(made)
    rows = [{"protocol": "linear", "data": "own@0"}]
    assert "were measured on nothing else.\n" in card.limits(made, rows)
    rows += [{"protocol": "transfer", "data": f"{name}@1"} for name in ("shoes", "hats", "shoes")]
    assert "were measured beside these on shoes and hats.\n" in card.limits(made, rows)


def test_controls_are_shown_where_there_were_any():
    row = {"round": 1, "stage": "pooled", "protocol": "linear", "settings": {}, "split": "test", "metric": "top1"}
    cost = {"data": "photos@0", "images_seen": 10, "flops": 1.0, "seconds": 1.0}
    rows = [
        {**row, **cost, "arm": arm, "seed": seed, "value": value + seed / 100}
        for arm, value in (("scratch", 0.4), ("sslpp", 0.5))
        for seed in (0, 1, 2)
    ]
    title, told = card.comparison(rows)
    assert title == "### Beside its controls"
    assert "sslpp (51.0 %) is above scratch (+10.0)" in told
    assert card.comparison([]) == []


@pytest.mark.parametrize("asked", ["better", "always"])
def test_hub_holds_the_better_backbone_and_its_card_says_so(finished, tiny, tmp_path, asked):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    made = command.parse(["--config", str(folder / "recipe.yaml"), "--relearn.export", asked])
    rows = [
        {**row, "value": row["value"] - 2 * (row["arm"] == "sslpp"), "model": "local-dir:/home/me/run/proxy"}
        for row in records.read(folder / "records.jsonl")
        if row["protocol"] != "clusters"
    ]
    hub = export.export(folder, [folder / "proxy", folder / "round_1"], tiny, rows, made, "sslpp", None)
    kept = folder / ("proxy" if asked == "better" else "round_1") / "model.safetensors"
    assert (hub / "model.safetensors").read_bytes() == kept.read_bytes()
    assert {row["model"] for row in records.read(hub / "records.jsonl")} == {"local-dir:FOLDER"}
    text = (hub / "README.md").read_text()
    assert "Relearning made it worse on held-out images" in text.split("## Use it")[0]
    assert ("then from clusters" in text) == (asked == "always")
    values = {r.metric_value for r in ModelCard.load(hub / "README.md").data.eval_results}
    assert (min(values) < 0) == (asked == "always")
