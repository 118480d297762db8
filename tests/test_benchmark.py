"""The benchmark: its command on tiny sizes, and what a goal that is missed ends in."""

import pytest

from tests.conftest import call
from training import benchmark
from training.benchmark import __main__ as B
from training.benchmark import parts
from training.benchmark.__main__ import main
from training.files import read_lines


def test_a_missed_goal_is_named_and_ends_in_1(tmp_path):
    goals = tmp_path / "goals.yaml"
    goals.write_text("linear probe over scikit-learn: 1000000\nk-means, linear growth in k: 0\n")
    pytest.importorskip("faiss")
    out = tmp_path / "records.jsonl"
    done = call(main, "evaluate", "growth", "--size", "tiny", "--goals", goals, "--out", out)
    assert done.returncode == 1
    assert "error: linear probe over scikit-learn: " in done.stderr
    assert "the goal is 1000000" in done.stderr
    assert "linear growth" not in done.stderr.split("error:")[1]
    assert "not measured" in done.stdout or benchmark.devices() == ["cpu", "cuda"]
    rows = read_lines(out)
    assert len(rows) == 4
    assert all(row["value"] > 0 and row["settings"]["low"] <= row["value"] <= row["settings"]["high"] for row in rows)


def test_steps_and_input_are_measured():
    names = [row["name"] for part in (parts.step, parts.gathering) for row in part(benchmark.TINY)]
    assert names[0] == "loop over a bare step, CNN 32 px"
    assert names[len(benchmark.devices())] == "chosen precision and format over the best, mobilenetv3_small_100"
    assert len(names) == 1 + 2 * len(benchmark.devices())


def test_an_unknown_part_is_refused():
    done = call(main, "speed")
    assert done.returncode == 2
    assert "there is no part 'speed'" in done.stderr


def test_a_peer_that_is_not_installed_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(B, "find_spec", lambda name: None if name == "faiss" else name)
    monkeypatch.setattr(B, "PARTS", {name: lambda size: pytest.fail("measured") for name in B.PARTS})
    done = call(main, "start", "kmeans", "--size", "tiny")
    assert (done.returncode, "error: kmeans is measured against faiss: pip install" in done.stderr) == (2, True)


def test_a_ratio_is_the_peers_time_over_ours_by_its_median():
    times = [((4.0, 9.0), (2.0, 3.0)), ((6.0, 9.0), (2.0, 3.0)), ((9.0, 9.0), (1.0, 3.0))]
    row = benchmark.row("x", times)
    assert (row["ratio"], row["low"], row["high"]) == (3.0, 2.5, 6.0)
    assert (row["peer_cpu"], row["cpu"], row["peer_wall"], row["wall"]) == (6.0, 2.0, 9.0, 3.0)
    assert benchmark.row("x", times, "cuda")["ratio"] == 3.0
    assert benchmark.row("x", times, "cuda")["name"] == "x, GPU"
