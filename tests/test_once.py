"""What exists is not done again, what read something else is refused, and what is not what was written is told."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import call, tiny_run, write_png
from training import command, loop, once, recipe, records
from training.__main__ import main
from training.files import read_json, sha256_file


def test_the_same_command_again_does_nothing_again(finished, picture_folder):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors") if "hub" not in path.parts}
    lines = (folder / "metrics.jsonl").read_bytes()
    again = tiny_run(folder, picture_folder)
    assert again.returncode == 0, again.stderr
    assert "measuring" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "metrics.jsonl").read_bytes() == lines


def test_the_resolved_recipe_runs_as_it_is(finished, picture_folder):
    folder, _ = finished
    again = call(main, "--config", folder / "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert "measuring" not in again.stdout


def test_a_second_round_is_added_to_a_finished_run(finished, picture_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(finished[0], folder)
    first = sha256_file(folder / "round_1" / "model.safetensors")
    done = tiny_run(folder, picture_folder, "--relearn.rounds", 2)
    assert done.returncode == 0, done.stderr
    assert sha256_file(folder / "round_1" / "model.safetensors") == first
    assert sha256_file(folder / "hub" / "model.safetensors") == sha256_file(folder / "round_2" / "model.safetensors")
    assert {r["round"] for r in records.read(folder / "records.jsonl") if r["arm"] == "sslpp"} == {1, 2}
    assert read_json(folder / "round_2" / "clusters.json")["read"]["backbone"] == first


def test_true_labels_that_change_are_noticed_where_they_are_used(tmp_path):
    data, pixels = tmp_path / "data", np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3))
    for i, pixel in enumerate(pixels):
        write_png(data / f"{i:02d}.png", pixel)
    table = tmp_path / "t.csv"

    def labels(words):
        table.write_text("file,label\n" + "".join(f"{i:02d}.png,{words[i % len(words)]}\n" for i in range(40)))

    options = ["--data.labels", table, "--proxy.epochs", "0", "--relearn.epochs", "1"]
    labels("ab")
    assert tiny_run(tmp_path / "run", data, *options).returncode == 0
    told = {
        r["metric"]: r["value"] for r in records.read(tmp_path / "run" / "records.jsonl") if r["protocol"] == "clusters"
    }
    labels("aab")
    assert tiny_run(tmp_path / "run", data, *options).returncode == 0  # pseudo-labels are none of theirs
    again = {
        r["metric"]: r["value"] for r in records.read(tmp_path / "run" / "records.jsonl") if r["protocol"] == "clusters"
    }
    assert told["inertia"] == again["inertia"]
    assert told["nmi"] != again["nmi"]
    options += ["--clusters.source", "labels"]
    assert tiny_run(tmp_path / "taught", data, *options).returncode == 0
    labels("ab")
    changed = tiny_run(tmp_path / "taught", data, *options)
    assert (changed.returncode, changed.stderr.startswith("error: labels: ")) == (2, True)


def test_weights_to_start_from_that_change_under_their_name_are_noticed(finished, picture_folder, tmp_path):
    start, run = shutil.copytree(finished[0] / "hub", tmp_path / "start"), tmp_path / "run"
    options = ["--model.name", f"local-dir:{start}", "--model.pretrained", "true", "--proxy.epochs", "0"]
    options += ["--relearn.epochs", "0.5"]
    assert tiny_run(run, picture_folder, *options).returncode == 0
    assert tiny_run(run, picture_folder, *options).returncode == 0
    shutil.copy(finished[0] / "proxy" / "model.safetensors", start)
    report = (run / "report.md").read_bytes()
    changed = tiny_run(run, picture_folder, *options)
    assert (changed.returncode, changed.stderr.count("\n")) == (2, 1), changed.stderr
    assert "weights: " in changed.stderr
    assert "other weights to start from (model.safetensors)" in changed.stderr
    assert (run / "report.md").read_bytes() == report
    shutil.rmtree(start)  # what is finished needs it no more
    marker = read_json(run / "proxy" / "proxy.json")
    del marker["read"]["weights"]  # as older versions left it
    shutil.copytree(finished[0] / "hub", start)
    (run / "proxy" / "proxy.json").write_text(json.dumps(marker))
    assert tiny_run(run, picture_folder, *options).returncode == 0


def test_a_training_under_way_is_not_begun_anew_with_other_settings(picture_folder, tmp_path, monkeypatch):
    run, real = tmp_path / "run", loop.save_checkpoint

    def stop(task, optimizer, key, step, told, context):
        real(task, optimizer, key, step, told, context)
        context.stop.number = 15 if key.phase == "relearn" and step == 6 else None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        assert tiny_run(run, picture_folder, "--checkpoint_every", "3").returncode == 143
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    other = tiny_run(run, picture_folder, "--relearn.lr", "0.5")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1), other.stderr
    assert f"relearn.lr: the training in {run}, of whose 8 steps 7 are done, was begun with 0.02" in other.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert tiny_run(run, picture_folder).returncode == 0


def test_fewer_rounds_than_once_export_and_tell_what_these_made(finished, picture_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for rounds, made, seen in (("2", "round_2", 2), ("1", "round_1", 1), ("0", "proxy", 0)):
        done = tiny_run(run, picture_folder, "--relearn.rounds", rounds)
        assert done.returncode == 0, done.stderr
        sha256 = sha256_file(run / "hub" / "model.safetensors")
        assert sha256 == sha256_file(run / made / "model.safetensors")
        rows = [row for row in records.read(run / "hub" / "records.jsonl") if row["weights_sha256"] == sha256]
        assert max(row["round"] for row in records.read(run / "hub" / "records.jsonl")) == seen
        for name in ("report.md", "hub/README.md"):
            text = (run / name).read_text()
            assert f" {rows[0]['images_seen']:,}" in text
            assert ("clusters.png" in text) == (seen > 0), name
    assert "proxy_short over the untrained network" in done.stdout


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damaged", "marker"),
    [
        ("proxy/model.safetensors", "proxy.json"),
        ("proxy/config.json", "proxy.json"),
        ("round_1/model.safetensors", "relearn.json"),
        ("round_1/labels.parquet", "clusters.json"),
        ("round_1/clusters.safetensors", "clusters.json"),
    ],
)
def test_what_a_phase_wrote_is_checked_before_it_is_used(damaged, marker, finished, picture_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "hub")
    flip(folder / damaged)
    done = tiny_run(folder, picture_folder)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{folder / damaged} is not what was written" in done.stderr
    assert f"delete {(folder / damaged).parent / marker}" in done.stderr
    assert not (folder / "hub").exists()
    ((folder / damaged).parent / marker).unlink()
    again = tiny_run(folder, picture_folder)  # as the sentence says
    assert again.returncode == 0, again.stderr
    names = ("proxy/model.safetensors", "round_1/labels.parquet", "hub/model.safetensors")
    assert all((folder / name).read_bytes() == (finished[0] / name).read_bytes() for name in names)


def test_records_are_whole_or_measured_anew(finished, picture_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    path = folder / "records.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(True)
    for damage in ("{ torn\n", "{}\n"):
        path.write_text("".join(lines[:4]) + damage + "".join(lines[5:]))
        done = tiny_run(folder, picture_folder)
        assert (done.returncode, "records.jsonl: line 5 is damaged" in done.stderr) == (1, True)
    sslpp = next(i for i, line in enumerate(lines) if '"arm": "sslpp"' in line)
    edited = re.sub(r'"value": [\d.]+', '"value": 0.999', lines[sslpp])
    for other in ([*lines[:sslpp], edited, *lines[sslpp + 1 :]], lines[:sslpp] + lines[sslpp + 1 :]):
        assert other != lines
        path.write_text("".join(other))
        done = tiny_run(folder, picture_folder)
        assert done.returncode == 0, done.stderr
        assert "measuring sslpp, round 1 again: its records are not those that were written" in done.stdout
        assert "measuring random" not in done.stdout
        assert path.read_text().count("\n") == whole.count("\n")
        assert "0.999" not in path.read_text()


def test_pixels_in_a_file_are_checked_before_they_are_used(picture_folder, tmp_path):
    options = ["--data.memory_gb", "0", "--relearn.rounds", "0", "--proxy.epochs", "1"]
    assert tiny_run(tmp_path / "whole", picture_folder, *options).returncode == 0
    shutil.copytree(tmp_path / "whole" / "images", tmp_path / "torn" / "images")
    pixels = tmp_path / "torn" / "images" / "train.u8"
    content = pixels.read_bytes()
    pixels.write_bytes(content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2))
    assert tiny_run(tmp_path / "torn", picture_folder, *options).returncode == 0
    assert pixels.read_bytes() == content  # decoded anew
    one, other = (tmp_path / name / "proxy" / "model.safetensors" for name in ("whole", "torn"))
    assert one.read_bytes() == other.read_bytes()


def test_a_field_that_no_phase_reads_never_redoes_one():
    one = command.parse(["--data.path", "digits"])
    other = command.parse(["--data.path", "digits", "--log.every", "3", "--clusters.k", "[4]", "--relearn.rounds", "3"])
    assert recipe.phase_fields(one, "proxy") == recipe.phase_fields(other, "proxy")
    assert recipe.phase_fields(one, "relearn") == recipe.phase_fields(other, "relearn")
    assert recipe.phase_fields(one, "clusters") != recipe.phase_fields(other, "clusters")


@pytest.mark.parametrize("late", [False, True])
def test_processes_meet_as_often_however_late_they_look_for_a_shared_phase(late, tmp_path):
    shared, marker, read = tmp_path / "shared", tmp_path / "proxy" / "proxy.json", {"a": 1}
    lent = once.lending(SimpleNamespace(shared=shared), marker, read)
    met = []

    def main_process():
        for folder in (lent, *([marker.parent] if late or met else [])):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "proxy.json").write_text('{"read": {"a": 1}}')

    def wait():
        met.append(1)
        main_process()

    main_process()
    this = SimpleNamespace(shared=shared, main=False, accelerator=SimpleNamespace(wait_for_everyone=wait))
    once.once(this, marker, read, lambda: pytest.fail("done again"))
    assert len(met) == 2
