"""The real comparison on tiny data: killed and resumed, added to, its budgets and tables."""

import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import TINY_RUN, call
from tests.faults.harness import Command
from training import __main__ as training
from training import arms as A
from training import command, compare, contrast, launch, records, run
from training.evaluate import __main__ as evaluation
from training.files import Diverged, read_json, write_json, write_lines
from training.proxies import __main__ as tasks

ARMS = '["random","proxy","scratch","sslpp"]'
TINY = [
    *TINY_RUN, "--proxy.epochs", "1", "--relearn.epochs", "1", "--relearn.reinit", "high", "--evaluate.shots", "[]",
    "--arms", ARMS, "--seeds", "[0,1]", "--grid", "[1,4]",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(picture_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = call(compare.main, *TINY, "--data.path", picture_folder, "--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_arm_and_seed_has_its_records_and_budget(finished):
    folder, _ = finished
    final = contrast.final(records.read(folder / "records.jsonl"))
    arms = {(r["arm"], r["seed"]) for r in final}
    assert arms == {(a, s) for a in ("random", "proxy", "scratch", "sslpp") for s in (0, 1)}
    seen = {r["arm"]: r["images_seen"] for r in final if r["arm"] != "random"}
    assert max(seen.values()) - min(seen.values()) <= 8
    flops = {r["arm"]: r["flops"] for r in final}
    assert flops["sslpp"] < flops["scratch"]  # a frozen low part needs no backward pass
    assert flops["random"] == 0


def test_the_runs_that_time_is_told_for_are_those_that_are_done(finished, monkeypatch):
    folder, done = finished
    assert "; training takes about " in done.stdout
    planned = []

    def stop(this, arms, seeds):
        planned.extend(made.run for made in plan(this, arms, seeds))
        raise KeyboardInterrupt

    plan = compare.Comparison.planned
    monkeypatch.setattr(compare.Comparison, "planned", stop)
    assert call(compare.main, "--config", folder / "recipe.yaml", *TINY[-6:]).returncode == 130
    runs = {str(path.parent) for path in [*folder.glob("seed_*/*/recipe.yaml"), *folder.glob("grid/*/recipe.yaml")]}
    # What is chosen by the first seed was run with it, and taken from there; rates beyond the grid are not foreseen.
    rest = {run for run in runs - set(planned) if not re.search(r"grid/\w+\.x(0\.25|16)$", run)}
    assert {run.split("/seed_0/")[-1] for run in rest} == {"proxy", "scratch", "sslpp"}
    assert {run for run in set(planned) - runs if "x1.strong" not in run and "x1.mlp" not in run} == set()


def test_the_card_of_sslpp_shows_its_controls(finished):
    hub = finished[0] / "seed_0" / "sslpp" / "hub"
    text = (hub / "README.md").read_text()
    assert text.split("---")[2].startswith("\n\n# whole\n")
    assert "### Beside its controls" in text
    assert re.search(r"sslpp \(.* %\) is .*scratch \(", text)
    assert (hub / "report" / "arms.png").exists()
    assert "](report/arms.png)" in text


@pytest.mark.parametrize("intact", [True, False])
def test_what_an_arm_has_measured_is_taken_if_it_is_as_it_was_written(
    intact, finished, picture_folder, tmp_path, capsys
):
    whole, done = finished
    assert done.stdout.count("measuring random") == 2  # of two seeds
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    place, told = folder / "seed_0" / "sslpp", records.read(folder / "seed_0" / "random" / "records.jsonl")
    own = [r for r in records.read(place / "records.jsonl") if r["arm"] != "random"]
    assert len(own) + len(told) == len(records.read(place / "records.jsonl"))
    write_lines(place / "records.jsonl", own)
    write_json(
        place / "measured.json", {k: v for k, v in read_json(place / "measured.json").items() if k != "random 0"}
    )
    if not intact:
        write_lines(folder / "seed_0" / "random" / "records.jsonl", [{**r, "value": r["value"] / 2} for r in told])
    recipe = command.parse(["--config", str(whole / "seed_0" / "sslpp" / "recipe.yaml"), "--run", str(place)])
    with launch.StopSignals() as stop:
        run.run(recipe, stop, comparison=folder)
    assert ("measuring random" not in capsys.readouterr().out) == intact
    again = [r for r in records.read(place / "records.jsonl") if r["arm"] == "random"]
    assert again == told


def test_phases_that_arms_share_are_done_once(finished):
    folder, _ = finished
    for seed in (0, 1):
        shared = [path.name.split("_")[0] for path in (folder / f"seed_{seed}" / "shared").iterdir()]
        proxies = 3 + 6 * (seed == 0)  # sslpp's, random's, the whole-budget one; in the grid up to six more of these
        assert shared.count("clusters") == 1
        assert 3 <= shared.count("proxy") <= proxies
        weights = {
            (folder / f"seed_{seed}" / arm / "proxy" / "model.safetensors").read_bytes() for arm in ("scratch", "sslpp")
        }
        assert len(weights) == 1


def test_the_test_split_is_not_read_while_a_setting_is_chosen(finished):
    folder, _ = finished
    rows = records.read(folder / "records.jsonl")
    assert "test" not in {r["split"] for r in rows if r.get("variant")}
    assert {r["split"] for r in contrast.final(rows)} >= {"val", "test"}
    assert {r["variant"] for r in rows if r.get("variant") and r["arm"] == "proxy"} >= {"lr x1", "lr x4"}
    assert 5 <= len({r["variant"] for r in rows if r.get("variant") and r["arm"] == "proxy"}) <= 7


def test_the_setting_that_did_best_is_the_one_that_counts(finished):
    folder, _ = finished
    tried = {}
    for r in records.read(folder / "records.jsonl"):
        if r.get("variant") and (r["arm"], r["protocol"], r["stage"]) == ("scratch", "linear", "pooled"):
            tried[r["variant"]] = r["value"]
    best = max(tried, key=tried.get)
    chosen = read_json(folder / "seed_1" / "scratch" / "round_1" / "relearn.json")["read"]["relearn.lr"]
    assert chosen == pytest.approx(0.02 * float(best.removeprefix("lr x")))


def test_killed_twice_and_resumed_it_ends_in_the_same_table(finished, picture_folder, tmp_path):
    whole, _ = finished
    torn = tmp_path / "whole"
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "grid" / "scratch.x4")
    shutil.rmtree(torn / "seed_1")
    (torn / "records.jsonl").unlink()
    for until in ("grid/scratch.x4/round_1", "seed_1/scratch/proxy"):
        killed = Command(
            "training.compare", *TINY, "--data.path", picture_folder, "--run", torn, said=tmp_path / "said"
        )
        assert killed.until((torn / until).exists), killed.text
        assert killed.kill() == -signal.SIGKILL
    again = call(compare.main, *TINY, "--data.path", picture_folder, "--run", torn)
    assert again.returncode == 0, again.stderr

    def table(folder):
        rows = contrast.final(records.read(folder / "records.jsonl"))
        return [contrast.contrast(rows, name, "test") for name in contrast.METRICS]

    assert table(torn) == table(whole)


def test_arms_are_added_without_doing_others_again(finished, picture_folder):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    more = [*TINY, "--arms", '["sslpp","finetune_all"]', "--seeds", "[1]"]
    done = call(compare.main, *more, "--data.path", picture_folder, "--run", folder)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = (folder / "report.md").read_text()
    for arm in ("random", "proxy", "scratch", "sslpp", "finetune_all"):
        assert f"| {arm} |" in report
    for name in ("differences", "stages", "operations"):
        assert (folder / "report" / f"{name}.png").stat().st_size > 10_000
    assert done.stdout.count("images seen") == 1  # no figures at unequal budget after all; the verdict is the last
    assert "is not told from" in done.stdout.split("Verdict\n")[1]  # by two seeds


def test_arms_of_other_images_budgets_or_measures_are_refused_before_anything_changes(
    finished, picture_folder, tmp_path
):
    folder, other = tmp_path / "whole", tmp_path / "pictures"
    shutil.copytree(finished[0], folder)
    shutil.copytree(picture_folder, other)
    next((other / "train").rglob("*.png")).unlink()
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    more = [*TINY, "--arms", "[keep_high]", "--seeds", "[0]", "--run", folder, "--data.path"]
    for options, said in (
        ([other], "images: {0} was made with other images: files were added, removed, renamed or changed since; ch"),
        ([picture_folder, "--relearn.epochs", "2"], f"relearn.epochs: {folder} was made with 1.0, now it is 2.0"),
        ([picture_folder, "--clusters.k", "[3]"], f"clusters.k: {folder} was made with [3, 5], now it is [3]; choose"),
        ([picture_folder, "--evaluate.linear_c", "[1]"], "linear_c: {0} was measured with [0.1], now it is [1.0]; ask"),
    ):
        done = call(compare.main, *more, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said.format(folder) in done.stderr
    assert "proxy, random, scratch, sslpp] and --seeds [0, 1], too" in done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_all_that_is_there_may_be_measured_anew_and_another_task_stays_one(finished, picture_folder, tmp_path):
    folder = tmp_path / "whole"
    alone = [*TINY, "--arms", "[random]", "--seeds", "[0]", "--data.path", picture_folder, "--run", folder]
    folder.mkdir()
    write_json(folder / "comparison.json", {"made": {"--other_proxy": "moco"}, "measured": {}})  # nothing was trained
    for value in ("0.1", "0.01"):
        done = call(compare.main, *alone, "--evaluate.linear_c", f"[{value}]")
        assert done.returncode == 0, done.stderr
        rows = records.read(folder / "records.jsonl")
        assert {row["settings"]["C"] for row in rows if row["protocol"] == "linear"} == {float(value)}
    made = read_json(folder / "comparison.json")
    made["made"]["--other_proxy"] = "simclr"
    write_json(folder / "comparison.json", made)
    again = [*alone, "--evaluate.linear_c", "[0.01]", "--arms", "[other_proxy]", "--other_proxy", "rotation"]
    done = call(compare.main, *again)
    assert (done.returncode, f"--other_proxy: {folder} was made with simclr, now" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("grid", "best", "tried", "chosen"),
    [
        ([0.25, 1.0, 4.0], 1.0, [0.25, 1.0, 4.0], 1.0),  # inside: nothing more is tried
        ([0.25, 1.0, 4.0], 16.0, [0.25, 1.0, 4.0, 16.0, 64.0], 16.0),
        ([0.25, 1.0, 4.0], 1000.0, [0.25, 1.0, 4.0, 16.0, 64.0], 64.0),  # twice at most
        ([4.0, 1.0], 0.1, [1.0, 4.0, 0.25, 0.0625], 0.0625),
        ([2.0], 8.0, [], 2.0),  # one alone is taken as it is
    ],
)
def test_a_grid_goes_on_while_the_best_lies_at_its_edge(grid, best, tried, chosen, monkeypatch):
    asked = []
    this = compare.Comparison(None, None, grid, None, None, None)
    monkeypatch.setattr(
        compare.Comparison, "tried", lambda self, arm, lr, variant: asked.append(lr) or -abs(math.log(lr / best))
    )
    assert this.choose("sslpp") == (chosen, None)
    assert asked == tried


def test_a_rate_that_diverges_loses_and_stops_nothing(monkeypatch):
    said = []
    this = compare.Comparison(None, Path("x"), [1.0], None, None, SimpleNamespace(say=said.append))

    def diverging(self, *arguments, **options):
        raise Diverged("relearn: the loss is not finite at step 3")

    monkeypatch.setattr(compare.Comparison, "run", diverging)
    assert this.tried("sslpp", 16.0, None) == -math.inf
    assert "sslpp, lr x16: relearn: the loss is not finite" in said[0]


def test_other_data_sets_are_measured_for_the_arms_that_are_shown_alone(tmp_path, monkeypatch):
    seen, others = [], {"other": (None, None)}
    monkeypatch.setattr(compare, "run", lambda recipe, stop, read, *rest: seen.append(read[1]))
    made, context = command.parse(["--data.path", "digits"]), SimpleNamespace(say=str, stop=None)
    this = compare.Comparison(made, tmp_path, [1.0], A.Counts(100, 110, lambda proxy: 1.0), ((), others), context)
    for test in (False, True):
        this.run(tmp_path, "sslpp", 0, 1.0, None, test)
    assert seen == [{}, others]


def test_another_task_may_have_the_whole_budget():
    made = command.parse(["--data.path", "digits", "--proxy.epochs", "5", "--relearn.epochs", "5"])
    counts = A.Counts(1000, 1100, lambda proxy: 1.0, other="rotation")
    built = A.build("other_proxy", made, counts, lr=4.0)
    assert (built.proxy.name, built.relearn.rounds, built.proxy.lr) == ("rotation", 0, 4 * made.proxy.lr)
    assert A.budget(built, counts) == pytest.approx(A.budget(made, counts), abs=128)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--arms", '["other_proxy"]'], "--other_proxy: it names the task"),
        (["--other_proxy", "rotation"], "--other_proxy: it names the task"),
        (["--arms", '["magic"]'], "--arms"),
        (["--seeds", "[]"], "--seeds"),
        (["--grid", "[0]"], "grid"),
        (["--seed", "3"], "seed"),
    ],
)
def test_what_is_wrong_is_refused(picture_folder, tmp_path, arguments, named):
    done = call(compare.main, *TINY, *arguments, "--data.path", picture_folder, "--run", tmp_path / "x")
    assert done.returncode == 2
    assert named in done.stderr
    assert not (tmp_path / "x").exists()


def test_what_is_named_twice_is_done_once():
    made = compare.command([])
    values = made.read(["--data.path", "digits", "--seeds", "[1,0,1]", "--grid", "[1,1.0]", "--arms", "[proxy,proxy]"])
    asked = compare.request(values, made)
    assert (asked["seeds"], asked["grid"], asked["arms"]) == ([1, 0], [1.0], ["proxy"])


def test_what_is_compared_where_nothing_is_said():
    made = compare.command([])
    assert made.get_default("arms") == [arm for arm in A.ARMS if arm != "other_proxy"]
    assert made.get_default("seeds") == [0, 1, 2]
    assert set(tasks.command([]).get_default("arms")) < set(A.ARMS)


def test_an_arm_that_cannot_be_run_is_refused_before_any_other(picture_folder, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, path in enumerate(sorted((picture_folder / "train").rglob("*.png"))):
        shutil.copy(path, plain / f"{number}.png")
    arms = ["--arms", '["random","supervised"]']
    done = call(compare.main, *TINY, *arms, "--data.path", plain, "--run", tmp_path / "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "arm supervised: clusters.source" in done.stderr
    assert not list(tmp_path.glob("x/seed_*"))


def test_the_recipe_of_a_run_is_one_of_a_comparison_too_which_has_seeds_of_its_own(finished, picture_folder, tmp_path):
    folder, _ = finished
    assert "seed: 0" in (folder / "recipe.yaml").read_text()
    own = ["--data.path", picture_folder, "--run", tmp_path / "again"]
    done = call(compare.main, "--config", folder / "recipe.yaml", "--arms", "[random]", "--seeds", "[3]", *own)
    assert done.returncode == 0, done.stderr
    assert {r["seed"] for r in records.read(tmp_path / "again" / "records.jsonl")} == {3}
    done = call(compare.main, *TINY, "--seed", "1", *own)
    assert (done.returncode, done.stderr) == (2, "error: --seed: a comparison has --seeds, a list such as [0, 1].\n")


def test_an_arm_that_would_repeat_the_method_is_not_run_and_told(picture_folder, tmp_path):
    arms = ["--arms", "[keep_high,sslpp]", "--seeds", "[0]", "--grid", "[1]", "--relearn.reinit", "none"]
    done = call(compare.main, *TINY_RUN, *arms, "--data.path", picture_folder, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "not run: keep_high; by this recipe it is what sslpp is\n1 arms, seeds [0]" in done.stdout
    assert {r["arm"] for r in records.read(tmp_path / "run" / "records.jsonl")} == {"sslpp"}


def test_a_folder_of_another_command_is_left_as_it_is(finished, picture_folder, tmp_path):
    folder = tmp_path / "tasks" / "rotation"
    shutil.copytree(finished[0], folder)
    run, together = folder / "seed_0" / "scratch", "proxy tasks side by side"
    asked = [
        (run, "a run", compare, "a comparison"),
        (folder, "a comparison", training, "a run"),
        (folder, "a comparison", tasks, together),
        (tmp_path / "tasks", together, compare, "a comparison"),
    ]
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for place, held, module, kind in asked:
        tiny = TINY_RUN if module is training else TINY
        done = call(module.main, *tiny, "--data.path", picture_folder, "--run", place)
        said = f"error: {place} holds {held}, where this would put {kind}; choose another --run.\n"
        assert (done.returncode, done.stderr) == (2, said)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    done = call(evaluation.main, folder, "--data.path", picture_folder)
    hub = folder / "seed_0" / "sslpp" / "hub"
    said = f"error: MODEL: {folder} has no config.json; name one of the models in it: {hub}"
    assert done.returncode == 2
    assert done.stderr.startswith(said)
