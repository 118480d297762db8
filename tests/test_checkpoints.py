"""Checkpoints: which are kept, which are taken up, and that none is lost to a training of something else."""

import os
import re
import shutil
import time

import pytest

from tests.test_loop import READ, make, run
from training.checkpoints import Earlier
from training.files import Refused, sha256_json
from training.launch import Interrupted


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(context):
    context.checkpoint_every = 3
    run(make(), context)
    found = context.checkpoints.found("proxy_0")
    assert [path.name for path in found] == ["proxy_0_00000009", "proxy_0_00000012"]
    state = found[1] / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    said = []
    assert context.checkpoints.load("proxy_0", READ, said.append).step == 9
    assert "damaged" in said[0]
    (found[0] / "state.json").write_text("{")
    assert context.checkpoints.load("proxy_0", READ, said.append) is None


def test_a_state_that_was_edited_is_passed_over(context):
    context.checkpoint_every = 3
    run(make(), context)
    path = context.folder / "checkpoints" / "proxy_0_00000012" / "state.json"
    text = path.read_text()
    path.write_text(text.replace('"step": 12', '"step": 11'))
    assert path.read_text() != text
    assert context.checkpoints.load("proxy_0", READ, lambda line: None).step == 9


def test_checkpoints_go_by_their_step_not_by_the_files_time(context):
    context.checkpoint_every = 3
    run(make(), context, last=9)
    old = list((context.folder / "checkpoints").iterdir())
    ahead = time.time() + 10_000
    for path in old:
        os.utime(path, (ahead, ahead))
    run(make(), context, first=9)
    assert sorted(p.name for p in (context.folder / "checkpoints").iterdir()) == [
        "proxy_0_00000009",
        "proxy_0_00000012",
    ]
    assert context.checkpoints.load("proxy_0", READ).step == 12


def test_a_checkpoint_of_another_phase_or_recipe_is_not_taken_up(context):
    run(make(), context)
    assert context.checkpoints.load("proxy_0", READ).step == 12
    assert context.checkpoints.load("proxy_0", {"lr": 0.2}) is None
    assert context.checkpoints.load("relearn_1", READ) is None


def stopped(context, at, **schedule):
    """A training that was stopped after step `at`."""
    task = make()
    task.after = lambda step: setattr(context.stop, "number", 15 if step == at else None)
    with pytest.raises(Interrupted):
        run(task, context, **schedule)
    context.stop.number = None


@pytest.mark.parametrize("damaged", [False, True])
def test_a_training_under_way_is_not_begun_anew_from_something_else(context, damaged):
    context.checkpoint_every = 3
    stopped(context, 6)
    found = context.checkpoints.found("proxy_0")
    if damaged:
        (found[1] / "state.json").write_text("{")
    done = 3 if damaged else 6
    said = (
        f"lr: the training in {context.folder}, of whose 12 steps {done} are done, was begun with 0.1, now it is 0.2;"
    )
    with pytest.raises(Refused, match=re.escape(said)):
        run(make(), context, read={"lr": 0.2})
    with pytest.raises(Refused, match="lr: "):  # before anything is read
        context.checkpoints.refuse_other("proxy_0", {"lr": 0.2})
    assert context.checkpoints.found("proxy_0") == found
    run(make(), context)
    run(make(), context, read={"lr": 0.2})  # once it is over


def test_a_longer_schedule_under_way_is_not_begun_anew_from_the_one_before(context):
    context.checkpoint_every = 3
    run(make(), context)
    earlier = Earlier(12, sha256_json(READ))
    longer, other = {"lr": 0.1, "epochs": 6}, {"lr": 0.1, "epochs": 9}
    stopped(context, 18, read=longer, epochs=6, earlier=earlier)
    assert context.checkpoints.load("proxy_0", longer, earlier=earlier).step == 18
    before, *newer = context.checkpoints.found("proxy_0")
    assert [path.name[-2:] for path in (before, *newer)] == ["12", "15", "18"]
    said = "epochs: .* of whose 24 steps 18 are done, was begun with 6, now it is 9; choose another --run, or remove "
    with pytest.raises(Refused, match=said + re.escape(f"{newer[0]} and {newer[1]}.")):
        context.checkpoints.load("proxy_0", other, earlier=earlier)
    for path in newer:  # as it says
        shutil.rmtree(path)
    assert context.checkpoints.load("proxy_0", other, earlier=earlier).step == 12
    run(make(), context, read=other, epochs=9, earlier=earlier)
    assert len(context.checkpoints.found("proxy_0")) == 3
