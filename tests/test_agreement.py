"""Proxy tasks side by side, and which score without labels agrees with probes, against plain counts."""

import itertools
import math
import shutil

import pytest

from tests.conftest import TINY_RUN, call
from training import agreement, contrast, records
from training.files import read_lines
from training.proxies import __main__ as side_by_side

TINY = [*TINY_RUN, "--proxy.epochs", "1", "--relearn.epochs", "1", "--evaluate.shots", "[]"]
TINY += ["--seeds", "[0,1]", "--arms", "[random,proxy_short]"]


@pytest.fixture(scope="module")
def compared(picture_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "recipe.yaml").write_text("proxy: {batch_size: 4}\n")
    (folder / "simclr.yaml").write_text("proxy: {options: {dim: 7}, mlp_dim: 6}\n")
    options = [*TINY, "--data.path", picture_folder, "--run", folder / "run"]
    first = [option if option != "--proxy.batch_size" else "--clusters.iterations" for option in options]
    done = call(side_by_side.main, f"--config={folder / 'recipe.yaml'}", *first, "--tasks", "[rotation,simclr]")
    assert done.returncode == 0, done.stderr
    return folder, done, first


def test_each_task_is_compared_with_its_own_settings(compared):
    folder, done, _ = compared
    recipe = (folder / "run" / "simclr" / "recipe.yaml").read_text()
    assert "    dim: 7\n" in recipe
    assert "  batch_size: 4\n" in recipe
    assert "  optimizer: lars\n" in recipe  # the task's own default
    assert "  optimizer: lars\n" not in (folder / "run" / "rotation" / "recipe.yaml").read_text()
    rows = records.read(folder / "run" / "records.jsonl")
    found = {(r["task"], r["arm"], r["seed"]) for r in rows}
    assert found == set(itertools.product(("rotation", "simclr"), ("random", "proxy_short"), (0, 1)))
    (linear,) = contrast.tasks(rows)
    assert [line[0] for line in linear] == ["proxy task", "rotation", "simclr"]
    assert [line[2] for line in linear[1:]] == ["0.25", f"{1 / 7:.3g}"]
    assert "\nrotation" in done.stdout
    assert (folder / "run" / "report" / "tasks.png").stat().st_size > 1000


def test_without_labels_tasks_are_told_by_the_score_that_needs_none(picture_folder, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, path in enumerate(sorted((picture_folder / "train").rglob("*.png"))):
        shutil.copy(path, plain / f"{number}.png")
    arms = ["--tasks", "[rotation,npid]", "--arms", "[random,proxy_short]", "--seeds", "[0]"]
    done = call(side_by_side.main, *TINY, *arms, "--data.path", plain, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| proxy task | solved | chance | retrieval, random | retrieval, trained | gain |" in report
    rows = records.read(tmp_path / "run" / "records.jsonl")
    value = next(
        r["value"] for r in rows if (r["arm"], r["metric"]) == ("random", "retrieval") and r["stage"] == "pooled"
    )
    assert report.count(f"| {100 * value:.1f} (1) |") >= 1
    assert "agrees with" not in report
    assert (tmp_path / "run" / "report" / "tasks.png").stat().st_size > 1000


def test_the_metric_of_a_task_is_the_mean_of_its_newest_lines(compared):
    folder, _, _ = compared
    run = folder / "run" / "rotation" / "seed_1" / "proxy_short"
    rows = [r for r in read_lines(run / "metrics.jsonl") if r["phase"] == "proxy" and "accuracy" in r]
    last = [r["accuracy"] for r in rows if r["step"] > 0.9 * max(r["step"] for r in rows)]
    told = records.value(records.read(run / "records.jsonl"), protocol="task", metric="accuracy")
    assert len(rows) > len(last) > 0
    assert told == pytest.approx(sum(last) / len(last))


def test_a_task_is_added_without_doing_the_others_again(compared):
    folder, _, options = compared
    before = (folder / "run" / "simclr" / "records.jsonl").stat().st_mtime_ns
    marker = folder / "run" / "rotation" / "seed_0" / "proxy_short" / "proxy" / "proxy.json"
    made = marker.stat().st_mtime_ns
    done = call(side_by_side.main, "--config", folder / "recipe.yaml", *options, "--tasks", "[rotation,simmim]")
    assert done.returncode == 0, done.stderr
    assert marker.stat().st_mtime_ns == made
    assert (folder / "run" / "simclr" / "records.jsonl").stat().st_mtime_ns == before
    assert {r["task"] for r in records.read(folder / "run" / "records.jsonl")} == {"rotation", "simclr", "simmim"}


def test_a_task_that_is_none_is_refused_before_anything_is_written(picture_folder, tmp_path):
    options = [*TINY, "--data.path", picture_folder, "--run", tmp_path / "run"]
    done = call(side_by_side.main, *options, "--tasks", "[rotation,colours]")
    assert (done.returncode, (tmp_path / "run").exists()) == (2, False)
    assert "colours" in done.stderr


def rows_of(values):
    """Records of (task, arm, seed, stage): (retrieval, alignment, linear)."""
    rows = []
    for (task, arm, seed, stage), told in values.items():
        same = {"task": task, "arm": arm, "seed": seed, "stage": stage, "split": "val", "round": 0, "settings": {}}
        for (protocol, metric), value in zip(
            (("label_free", "retrieval"), ("label_free", "alignment"), ("linear", "top1")), told, strict=True
        ):
            rows.append({**same, "protocol": protocol, "metric": metric, "value": value})
    return rows


def test_agreement_counts_pairs_in_the_same_order():
    arms = ("random", "proxy", "sslpp")
    values = {
        (task, arm, seed, stage): (0.1 * i + 0.01 * seed, 0.3 * j, 0.2 * i - 0.1 * j + 0.05 * t)
        for (t, task), (i, arm), seed in itertools.product(enumerate("ab"), enumerate(arms), (0, 1))
        for j, stage in enumerate((0, 1, 2, "pooled"))
    }
    values["b", "sslpp", 1, "pooled"] = (0.05, 0.9, 0.4)
    lines = agreement.agreement(rows_of(values), "linear")
    told = {line[0]: line[1:] for line in lines[1:]}
    assert list(told) == ["retrieval", "alignment"]

    def naive(places, score):
        agree = ties_x = ties_y = total = 0
        for one, other in itertools.combinations(places, 2):
            x, y = (values[one][k] - values[other][k] for k in (score, 2))
            agree += (x > 1e-12) - (x < -1e-12) if y > 1e-12 else ((x < -1e-12) - (x > 1e-12)) if y < -1e-12 else 0
            ties_x, ties_y, total = ties_x + (abs(x) <= 1e-12), ties_y + (abs(y) <= 1e-12), total + 1
        return agree / math.sqrt((total - ties_x) * (total - ties_y))  # tau-b

    groups = {seed: [p for p in values if p[2] == seed and p[3] == "pooled"] for seed in (0, 1)}
    taus = [naive(places, 0) for places in groups.values()]
    assert told["retrieval"][0] == contrast.mean_and_spread(taus, 2)
    groups = {(t, s): [p for p in values if (p[0], p[2], p[3]) == (t, s, "pooled")] for t in "ab" for s in (0, 1)}
    assert told["retrieval"][1] == contrast.mean_and_spread([naive(places, 0) for places in groups.values()], 2)
    # Over stages the probe falls as alignment rises: its sign is turned, so that they agree wholly and nothing is lost.
    assert told["alignment"][2:] == ["1.00 ± 0.00 (12)", "0.0 ± 0.0 (12)"]
    assert told["retrieval"][2] == ""  # the same at all stages, it says nothing of them
