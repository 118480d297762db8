"""Transfer, low-shot, scores without labels and the online probe: against plain loops, and as a run tells them."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

from tests.conftest import TINY_RUN, call, make_images
from training import backbone as B
from training import evaluate as E
from training import recipe, records, setup
from training.__main__ import main
from training.evaluate import __main__ as command
from training.evaluate import label_free, linear, lowshot
from training.evaluate.online import Online
from training.files import read_lines
from training.proxies.rotation import Rotation
from training.recipe import Evaluate, Model, Schedule, Views

CALM = Views(crop_scale=(0.9, 1.0), jitter=0.0, grey=0.0)


def unit(count=30, width=6, seed=0):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_scores_of_two_views_against_plain_loops():
    one = unit()
    other = F.normalize(one + 0.4 * unit(seed=1), dim=1)
    hits = pairs = 0
    close, energy = 0.0, []
    for i in range(30):
        cosines = [float(one[i].double() @ other[j].double()) for j in range(30)]
        hits += int(np.argmax(cosines)) == i
        close += float((one[i].double() - other[i].double()).square().sum()) / 30
        for j in range(i):
            energy.append(math.exp(-2 * float((one[i].double() - one[j].double()).square().sum())))
            pairs += 1
    assert 0.3 < hits / 30 < 1
    assert label_free.retrieval(one, other) == pytest.approx(hits / 30)
    assert label_free.alignment(one, other) == pytest.approx(close, rel=1e-5)
    assert label_free.uniformity(one) == pytest.approx(math.log(sum(energy) / pairs), rel=1e-5)


def test_spread_is_one_where_features_are_even_and_nothing_where_they_collapse():
    assert label_free.spread(unit(4000, 32)) == pytest.approx(1, abs=0.05)
    assert label_free.spread(unit(1).expand(50, 6)) == pytest.approx(0, abs=1e-6)


def test_stability_is_that_of_clusters():
    groups = F.normalize(torch.eye(8).repeat(20, 1) + 0.01 * unit(160, 8), dim=1)
    seeds, views, k = label_free.stability(groups, groups, groups)
    assert k == 16
    assert views == pytest.approx(1)
    noise = [unit(160, 8, seed) for seed in range(3)]
    assert label_free.stability(*noise)[1] < 0.6 < seeds
    assert label_free.stability(*noise)[0] < 0.95  # two runs, not one twice


def test_a_draw_has_so_many_images_of_each_class_or_all():
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 5)
    drawn = [lowshot.draw(labels, 3, 4, torch.Generator().manual_seed(seed)) for seed in range(6)]
    for part in drawn:
        assert torch.bincount(labels[part]).tolist() == [4, 3, 4]
        assert len(part.unique()) == len(part)
    assert len({tuple(part.tolist()) for part in drawn}) == 6


def test_low_shot_is_the_mean_over_draws_of_a_probe_whose_cost_the_held_out_part_chose():
    generator = torch.Generator().manual_seed(3)

    def part(count):
        labels = torch.arange(count) % 3
        return torch.randn(count, 10, generator=generator) + 1.5 * F.one_hot(labels, 10), labels

    parts = {"train": part(90), "val": part(60), "test": part(150)}
    rows, labels = ({name: pair[i] for name, pair in parts.items()} for i in (0, 1))
    grid = [1e-4, 1e-1, 10.0]
    tried = {}
    for c in grid:
        probes = []
        for draw in range(5):
            chosen = lowshot.draw(labels["train"], 3, 2, torch.Generator().manual_seed(7 * 5 + draw))
            probes.append(linear.fit(rows["train"][chosen], labels["train"][chosen], 3, c))
        tried[c] = {n: np.mean([probe.top1(rows[n], labels[n]) for probe in probes]) for n in ("val", "test")}
    best = max(grid, key=lambda c: tried[c]["val"])
    got = E.lowshot_records(rows, labels, 3, Evaluate(shots=[2], linear_c=grid), 7, torch.device("cpu"))
    assert {r["split"]: r["value"] for r in got} == {
        n: pytest.approx(tried[best][n], abs=0.005) for n in ("val", "test")
    }
    assert all(r["settings"] == {"shots": 2, "draws": 5, "C": best, "chance": 0.3333} for r in got)
    assert all(r["deviation"] > 0 for r in got)


def test_balanced_accuracy_is_told_where_classes_are_of_unequal_size():
    truth = torch.tensor([0] * 30 + [1] * 5 + [2] * 5)
    guess = truth.clone()
    guess[:6], guess[30:33] = 1, 0
    told = E.accuracies(guess, truth, E.unequal(truth))
    assert told["top1"] == pytest.approx(31 / 40)
    assert told["balanced"] == pytest.approx(balanced_accuracy_score(truth, guess))
    equal = torch.arange(30) % 3
    assert E.accuracies(equal, equal, E.unequal(equal)) == {"top1": 1.0}


def measured(context, **over):
    torch.manual_seed(0)
    network = B.create(Model("test_resnet"), 16).eval()
    settings = Evaluate(linear_c=[0.1], knn_k=[3], shots=[1, 4])
    splits = make_images(80), make_images(24, seed=1)
    return E.evaluate(network, settings, E.Over(splits, Rotation.residue(None), **over), context)


def test_transfer_measures_the_same_on_another_data_set(context):
    other = make_images(60, seed=5, classes=3), make_images(30, seed=6, classes=3)
    other = tuple(dataclasses.replace(images, fingerprint=str(i) * 64) for i, images in enumerate(other))
    found = [r for r in measured(context, transfer={"other": other}) if r["protocol"] == "transfer"]
    assert {(r["settings"]["probe"], r["split"], r["of"]) for r in found} == {
        (probe, split, "other") for probe in ("linear", "knn") for split in ("val", "test")
    }
    assert {r["stage"] for r in found} == {*range(5), "pooled"}
    torch.manual_seed(0)
    network = B.create(Model("test_resnet"), 16).eval()
    settings = Evaluate(linear_c=[0.1], knn_k=[3], shots=[])
    alone = E.evaluate(network, settings, E.Over(other, ()), context)
    expected = {
        (r["protocol"], r["stage"], r["split"], r["metric"]): r["value"]
        for r in alone
        if r["protocol"] in ("linear", "knn")
    }
    assert {(r["settings"]["probe"], r["stage"], r["split"], r["metric"]): r["value"] for r in found} == expected
    over = E.Over(other, (), transfer={"other": other})
    assert over.data("other", "test") == "other@" + "1" * 16
    assert over.data("own", "val") == "own@" + "0" * 16


def test_scores_without_labels_are_measured_in_every_run_at_every_stage(context):
    found = [r for r in measured(context) if r["protocol"] == "label_free"]
    metrics = {"retrieval", "stability_of_seeds", "stability_of_views", "alignment", "uniformity", "spread"}
    assert {(r["stage"], r["metric"]) for r in found} == {(s, m) for s in (*range(5), "pooled") for m in metrics}
    assert all(math.isfinite(r["value"]) for r in found)


def test_records_of_one_run_are_told_apart(context):
    other = make_images(60, seed=5, classes=3), make_images(30, seed=6, classes=3)
    rows = [{**r, "data": r.get("of", "own")} for r in measured(context, transfer={"other": other})]
    assert len({records.identity(r) for r in rows}) == len(rows)


# Is it learning?


def online(images, context, every=1, **settings):
    return Online(
        Evaluate(every=every, knn_k=[3], linear_c=[0.1], **settings), Schedule(batch_size=8), images, 32, CALM, context
    )


def test_the_online_probe_looks_every_so_many_epochs(context):
    network = B.create(Model("test_resnet"), 16)
    look = online(make_images(), context, every=2)  # 4 steps an epoch
    assert [bool(look(network, step)) for step in (4, 8, 12, 16)] == [False, True, False, True]
    assert online(make_images(), context, every=0)(network, 8) == {}


def test_the_online_probe_tells_accuracies_or_scores_that_need_no_labels(context):
    network = B.create(Model("test_resnet"), 16).train()
    told = online(make_images(), context)(network, 4)
    assert told.keys() == {"spread", "rank", "knn", "linear"}
    assert network.training
    plain = online(make_images(labelled=False), context)(network, 4)
    assert plain.keys() == {"spread", "rank", "retrieval"}


def test_collapse_is_warned_of_with_what_helps(context, monkeypatch):
    said = []
    monkeypatch.setattr(context, "say", said.append, raising=False)
    network = B.create(Model("test_resnet"), 16)
    online(make_images(), context)(network, 4)
    assert len(said) == 1
    with torch.no_grad():
        for parameter in network.layer4.parameters():
            parameter.zero_()
        network.layer4[-1].bn2.bias.fill_(1.0) if hasattr(network.layer4[-1], "bn2") else None
    online(make_images(), context)(network, 8)
    assert any("collapse" in line and "lower learning rate" in line for line in said[1:])


@pytest.fixture(scope="module")
def watched(picture_folder, tmp_path_factory):
    """A tiny run with everything that is measured, and one that is not watched."""
    folder = tmp_path_factory.mktemp("watched")
    options = [*TINY_RUN, "--data.path", picture_folder]
    extra = ["--evaluate.every", "1", "--evaluate.transfer", f"[{picture_folder}/train]", "--evaluate.shots", "[1,2]"]
    done = call(main, *options, *extra, "--run", folder / "watched")
    assert done.returncode == 0, done.stderr
    plain = call(main, *options, "--evaluate.every", "0", "--run", folder / "plain")
    assert plain.returncode == 0, plain.stderr
    return folder, done


def test_looking_changes_nothing_of_the_training(watched):
    folder, _ = watched
    for name in ("proxy", "round_1"):
        one, other = (folder / run / name / "model.safetensors" for run in ("watched", "plain"))
        assert one.read_bytes() == other.read_bytes()
    losses = [
        [r["loss"] for r in read_lines(folder / run / "metrics.jsonl") if "loss" in r] for run in ("watched", "plain")
    ]
    assert losses[0] == losses[1]


def test_what_was_seen_is_in_the_log_and_the_report(watched):
    folder, done = watched
    rows = [r for r in read_lines(folder / "watched" / "metrics.jsonl") if "linear" in r]
    assert {(r["phase"], r["round"]) for r in rows} == {("proxy", 0), ("relearn", 1)}
    assert len(rows) == 4
    assert all({"images", "knn", "spread", "rank"} <= r.keys() for r in rows)
    assert "after 2 epochs: " in done.stdout
    report = (folder / "watched" / "report.md").read_text()
    for words in ("few images of a class", "without labels", "train: linear probe", "report/lowshot.png"):
        assert words in report
    assert not [r for r in read_lines(folder / "plain" / "metrics.jsonl") if "linear" in r]


def test_records_of_transfer_name_both_data_sets(watched, picture_folder):
    folder, _ = watched
    found = [r for r in records.read(folder / "watched" / "records.jsonl") if r["protocol"] == "transfer"]
    assert found
    assert {r["data"].split("@")[0] for r in found} == {"train"}
    assert {r["trained_on"].split("@")[0] for r in found} == {picture_folder.name}
    options = [
        "--data.path",
        picture_folder,
        "--evaluate.transfer",
        f"[{picture_folder}/train]",
        "--data.val_fraction",
        "0.2",
    ]
    options += ["--evaluate.knn_k", "[3]", "--evaluate.linear_c", "[0.1]"]
    again = call(command.main, folder / "watched" / "hub", *options, "--out", folder / "again.jsonl")
    assert again.returncode == 0, again.stderr
    rows = [r for r in records.read(folder / "again.jsonl") if r["protocol"] == "transfer"]
    theirs = {(r["stage"], r["settings"]["probe"], r["split"]): r["value"] for r in found if r["arm"] == "sslpp"}
    ours = {(r["stage"], r["settings"]["probe"], r["split"]): r["value"] for r in rows if r["metric"] == "top1"}
    assert ours == {key: pytest.approx(value, abs=1e-4) for key, value in theirs.items()}


def test_other_data_of_one_name_are_told_apart_without_their_places(picture_folder, tmp_path, tiny, context):
    shutil.copytree(picture_folder / "train", tmp_path / "train")
    shutil.copytree(picture_folder / "train", tmp_path / "test")
    paths = [str(picture_folder / "train"), str(tmp_path / "train"), str(tmp_path / "test")]
    assert list(setup.load_transfer(paths, recipe.Data(), (tiny, None), context)) == ["train", "train (2)", "test"]


def test_other_data_without_labels_are_refused(picture_folder, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(picture_folder / "train" / "class 0", flat)
    options = [*TINY_RUN, "--data.path", picture_folder, "--evaluate.transfer", f"[{flat}]"]
    done = call(main, *options, "--run", tmp_path / "run")
    assert (done.returncode, "has no labels in a split" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
