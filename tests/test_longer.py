"""A finished run is trained for longer by the same command with more epochs: from where it stands, and told so."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.conftest import TINY_RUN, call
from training import finetune, loop, records
from training import run as phases
from training.__main__ import main
from training.files import read_json, read_lines, sha256_file


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that relearned for two epochs of four steps."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def longer(finished, picture_folder, tmp_path_factory):
    """A copy that went on to four."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(finished[0], folder)
    done = train(folder, picture_folder, "--relearn.epochs", 4)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def unmeasured(monkeypatch):
    """Runs train, and are neither measured nor reported."""
    for name in ("measure", "finish"):
        monkeypatch.setattr(phases, name, lambda *args: None)


def train(folder, data, *more):
    return call(main, *TINY_RUN, "--data.path", data, "--run", folder, *more)


def test_more_epochs_go_on_from_the_last_checkpoint_by_a_new_schedule(longer, picture_folder, finished, unmeasured):
    run, done = longer
    before = load_file(finished[0] / "checkpoints" / "relearn_1_00000008" / "state.safetensors")
    assert "round_1: goes on from 2 epochs to 4, by a schedule of its own" in done.stdout
    marker = read_json(run / "round_1" / "relearn.json")
    assert [end for end, _ in marker["read"]["earlier"]] == [2.0]
    earlier = read_json(finished[0] / "round_1" / "relearn.json")["budget"]
    assert marker["budget"]["images"] == 2 * earlier["images"] == 16 * 8
    rows = [r for r in read_lines(run / "metrics.jsonl") if r["phase"] == "relearn" and "lr" in r]
    assert [r["step"] for r in rows] == list(range(1, 17))
    rates = [r["lr"] for r in rows]
    assert rates[:8] == rates[8:]  # a warm-up and a cosine, once more
    after = load_file(run / "checkpoints" / "relearn_1_00000016" / "state.safetensors")
    assert after.keys() == before.keys()  # the head goes on, too
    own = [r for r in records.read(run / "records.jsonl") if r["arm"] == "sslpp"]
    assert {str(r["schedules"]) for r in own} == {"{'round_1': [2.0, 4.0]}"}
    assert not any("schedules" in r for r in records.read(run / "records.jsonl") if r["arm"] != "sslpp")
    for page in ("report.md", "hub/README.md"):
        assert "round_1 was trained in 2 schedules, which end at 2, 4 epochs" in (run / page).read_text()
    assert sha256_file(run / "hub" / "model.safetensors") == sha256_file(run / "round_1" / "model.safetensors")
    again = train(run, picture_folder, "--relearn.epochs", 4)
    assert (again.returncode, "goes on" in again.stdout) == (0, False)
    fewer = train(run, picture_folder)
    assert (fewer.returncode, "relearn.epochs: " in fewer.stderr) == (2, True)


def test_what_goes_on_and_is_interrupted_ends_in_the_same_weights(longer, run, picture_folder, unmeasured, monkeypatch):
    real, stopped = loop.save_checkpoint, []

    def stop(task, optimizer, key, step, told, context):
        real(task, optimizer, key, step, told, context)
        if step == 10 and not stopped:
            stopped.append(step)
            context.stop.number = 15

    monkeypatch.setattr(loop, "save_checkpoint", stop)
    command = ("--relearn.epochs", 4, "--checkpoint_every", 2)
    assert [train(run, picture_folder, *command).returncode for _ in range(2)] == [143, 0]
    one, other = (folder / "round_1" / "model.safetensors" for folder in (longer[0], run))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (lambda run: None, ["--proxy.epochs", "4"], "round_1 was made from it"),
        (lambda run: shutil.rmtree(run / "checkpoints"), ["--relearn.epochs", "4"], "its last checkpoint is gone"),
        (lambda run: None, ["--relearn.epochs", "4", "--relearn.lr", "0.01"], "relearn.epochs: "),
        (lambda run: None, ["--relearn.epochs", "1"], "relearn.epochs: "),
        (lambda run: None, ["--relearn.epochs", "2.1"], "relearn.epochs: 2.1 are no more steps than the 2 that"),
    ],
)
def test_what_cannot_go_on_is_refused_and_changes_nothing(spoil, options, said, run, picture_folder):
    spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = train(run, picture_folder, *options)
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True), done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_proxy_that_nothing_was_made_from_goes_on_more_than_once(picture_folder, unmeasured, tmp_path):
    options = ("--relearn.rounds", 0, "--evaluate.every", 0)
    for epochs in (1, 2, 3):
        done = train(tmp_path / "run", picture_folder, *options, "--proxy.epochs", epochs)
        assert (done.returncode, "goes on" in done.stdout) == (0, epochs > 1), done.stderr
    marker = read_json(tmp_path / "run" / "proxy" / "proxy.json")
    assert [end for end, _ in marker["read"]["earlier"]] == [1.0, 2.0]
    rows = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "lr" in r]
    rates = [r["lr"] for r in rows]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rates[:4] == rates[4:8] == rates[8:]


def test_a_longer_fine_tuning_that_was_stopped_is_not_taken_for_the_finished_one(
    finished, picture_folder, tmp_path, monkeypatch
):
    options = ["--data.path", picture_folder, "--data.val_fraction", "0.2", "--run", tmp_path / "tuned"]
    command = (finetune.main, finished[0] / "hub", *options, "--batch_size", "8", "--epochs")
    assert call(*command, 1).returncode == 0
    measured = (tmp_path / "tuned" / "records.jsonl").read_bytes()
    real = finetune.Keeper.look

    def stop_after_an_epoch(self, step, total):
        self.context.stop.number = 15
        self.keep(self.task.result(), "best", step, 1.0)
        return real(self, step, total)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Keeper, "look", stop_after_an_epoch)
        assert call(*command, 3).returncode == 143
    done = call(*command, 1)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "best is of step 8, and 1 epochs have 4: a longer training went on" in done.stderr
    assert (tmp_path / "tuned" / "records.jsonl").read_bytes() == measured
    assert call(*command, 3).returncode == 0


def test_fine_tuning_goes_on(finished, picture_folder, tmp_path):
    options = ["--data.path", picture_folder, "--data.val_fraction", "0.2", "--run", tmp_path / "tuned"]
    options += ["--batch_size", "8", "--log.every", "1", "--head_first", "0.5", "--epochs"]
    for epochs in (1, 2):
        done = call(finetune.main, finished[0] / "hub", *options, epochs)
        assert (done.returncode, "goes on from 1 epochs to 2" in done.stdout) == (0, epochs > 1), done.stderr
    rows = [r for r in read_lines(tmp_path / "tuned" / "metrics.jsonl") if "lr" in r]
    rates = [r["lr"] for r in rows]
    assert rates[:4] == rates[4:]
    assert read_json(tmp_path / "tuned" / "last" / "finetune.json")["step"] == 8
    found = [r for r in records.read(tmp_path / "tuned" / "records.jsonl") if r["settings"]["epochs"] == 2]
    assert {str(r["schedules"]) for r in found} == {"{'tuned': [1.0, 2.0]}"}
    assert "tuned was trained in 2 schedules" in (tmp_path / "tuned" / "report.md").read_text()
    for epochs in (1, 2.01):
        fewer = call(finetune.main, finished[0] / "hub", *options, epochs)
        assert (fewer.returncode, "epochs: " in fewer.stderr) == (2, True)
    assert (
        call(finetune.main, finished[0] / "hub", *options, 2).returncode == 0
    )  # nothing was changed by what was refused
