"""A disk that is full at any file, and a run folder that is taken away: one sentence, and then the same end."""

import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, TINY_RUN, call
from training import contrast, embed, files, finetune, memory, pixels, records, run, verdict
from training.__main__ import main
from training.evaluate import __main__ as evaluate
from training.files import read_lines
from training.proxies import __main__ as proxies


class FullDisk:
    """A file of each name can, until that has failed once, take no more than ten bytes, as the kernel sees to.

    Attributes:
        met: the names, their numbers left out, that have failed.
    """

    def __init__(self, monkeypatch):
        self.met, self.full, self.real = [], False, files.writing
        for module in (files, memory, pixels):
            monkeypatch.setattr(module, "writing", self)

    @contextmanager
    def __call__(self, path):
        name = re.sub(r"\d+", "", path.name)
        with self.real(path):
            if self.full or name in self.met:
                yield
                return
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            self.full = True
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            try:
                yield
            except Exception:
                self.met.append(name)
                raise
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                self.full = False

    def until_done(self, *command):
        """Start a command again until nothing fails; which files failed."""
        failed = []
        for _ in range(40):
            done = call(*command)
            if done.returncode == 0:
                return failed
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr
            failed += re.findall(r"^error: \S*/(\S+) cannot be written: File too large; ", done.stderr.splitlines()[-1])
            assert re.sub(r"\d+", "", failed[-1]) == self.met[-1]
        pytest.fail("no end")


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


def same_end(one, other):
    """Whether two run folders hold the same."""
    names = ("proxy", "round_1", "hub")
    names = [f"{name}/model.safetensors" for name in names] + ["round_1/labels.parquet", "round_1/clusters.safetensors"]
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    logs = [[{**r, "images_per_second": 0} for r in read_lines(folder / "metrics.jsonl")] for folder in (one, other)]
    assert logs[0] == logs[1]
    told = [[{**r, "seconds": 0} for r in read_lines(folder / "records.jsonl")] for folder in (one, other)]
    assert told[0] == told[1]


def test_a_run_whose_every_file_fails_once_ends_as_if_none_had(finished, picture_folder, tmp_path, disk):
    folder = tmp_path / "tiny"
    arguments = [*TINY_RUN, "--data.memory_gb", "0", "--data.path", picture_folder, "--run", folder]
    assert set(disk.until_done(main, *arguments)) == {
        "train.u8", "train.npz", "test.u8", "test.npz", "data.json", "recipe.yaml", "metrics.jsonl", "proxy_0_00000008",
        "state.json", ".backbone", "proxy.json", "records.jsonl", "measured.json", "tiny", "labels.parquet",
        "clusters.safetensors", "clusters.json", "clusters.png", "relearn_1_00000004", "relearn.json", "stages.png",
        "lowshot.png", "neighbours.png", "curves.png", "hub", "README.md", "report.md",
    }  # fmt: skip
    same_end(folder, finished[0])


def test_other_commands_files_fail_once_and_are_whole_the_next_time(finished, picture_folder, tmp_path, disk):
    model, out = finished[0] / "hub", tmp_path / "out"
    data = ["--data.path", picture_folder]
    tuned = disk.until_done(
        finetune.main, model, *data, "--epochs", "1", "--batch_size", "8", "--data.val_fraction", "0.2", "--run", out
    )
    assert {"metrics.jsonl", "finetune_0_00000004", "finetune.json", "best", "last", "records.jsonl"} <= set(tuned)
    assert disk.until_done(embed.main, model, *data, "--out", out / "features.parquet") == ["features.parquet"]
    fast = ["--evaluate.linear_c", "[0.1]", "--evaluate.shots", "[]"]
    assert disk.until_done(evaluate.main, model, *data, *fast, "--out", out / "told.jsonl") == ["told.jsonl"]


def test_the_pages_and_figures_of_comparisons_fail_once_and_are_whole_the_next_time(tmp_path, disk):
    committed = {"arms": "sslpp_resnet10t_s32.rotation_c10_20k", "tasks/rotation": "tasks_c10"}
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    disk.met.append("records.jsonl")  # which are there before
    for name, recipe in committed.items():
        told = records.read(ROOT / "hub_configs" / recipe / "records.jsonl")
        told = [r for r in told if r["protocol"] == "linear" and r.get("task", "rotation") == "rotation"]
        told = [r for r in told if r["arm"] in ("random", "proxy_short", "proxy", "sslpp")]
        for folder in (torn, whole):
            records.write(folder / name / "records.jsonl", contrast.final(told))
    assert disk.until_done(lambda _: verdict.write(torn / "arms")) == [
        "differences.png", "stages.png", "operations.png", "report.md",
    ]  # fmt: skip
    verdict.write(whole / "arms")
    disk.met.clear()
    assert disk.until_done(lambda _: proxies.write(torn / "tasks")) == ["records.jsonl", "tasks.png", "report.md"]
    proxies.write(whole / "tasks")
    made = [{p.relative_to(at): p.read_bytes() for p in at.rglob("*") if p.is_file()} for at in (torn, whole)]
    assert made[0] == made[1]


def test_what_datasets_cannot_keep_is_a_failure_that_names_its_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = {"image": [{"bytes": bytes([i] * 500), "path": None} for i in range(9)]}
    pq.write_table(pa.table(rows), tmp_path / "data" / "train.parquet")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        done = call(main, "--data.path", tmp_path / "data", "--run", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert re.search(
        r"^error: \S*/cache, where datasets keeps what it reads, cannot be written: File too large", done.stderr
    )


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        ("tiny", "relearn"),
        ("tiny", "finish"),
        ("tiny/records.jsonl", "finish"),
        ("tiny/proxy/model.safetensors", "phase_relearn"),
        ("tiny/round_1/labels.parquet", "phase_relearn"),
    ],
)
def test_a_run_folder_taken_away_under_the_run_is_one_sentence(
    finished, picture_folder, tmp_path, monkeypatch, taken, name
):
    shutil.copytree(finished[0], tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "hub")
    (tmp_path / "tiny" / "round_1" / "relearn.json").unlink()
    shutil.rmtree(tmp_path / "tiny" / "checkpoints")
    real = getattr(run, name)

    def without(*args, **kwargs):
        (tmp_path / taken).rename(tmp_path / "elsewhere")
        return real(*args, **kwargs)

    monkeypatch.setattr(run, name, without)
    arguments = [*TINY_RUN, "--data.path", picture_folder, "--run", tmp_path / "tiny"]
    done = call(main, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert "tiny was moved or deleted while" in said if taken == "tiny" else str(tmp_path / taken) in said
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(tmp_path / taken)
    assert call(main, *arguments).returncode == 0
    same_end(tmp_path / "tiny", finished[0])


def test_output_that_nobody_takes_is_no_traceback(tmp_path):
    """A pipe that was closed, as by head, and a log on a full disk, which is what /dev/full is."""
    code = "import sys; from training.command import guarded; sys.exit(guarded(lambda a: print('x' * 99999), []))"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (1, "error: Broken pipe; what was finished is kept.\n")
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full).returncode == 1
