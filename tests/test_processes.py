"""Two processes on the CPU, through torchrun: the same run as one process's."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
from sklearn.metrics import normalized_mutual_info_score

from tests.conftest import ROOT, TINY_RUN, command, make_images, tiny_run
from training import backbone as B
from training import records
from training.clusters import read_labels
from training.files import Refused, read_json, read_lines
from training.recipe import Model, Schedule
from training.task import ViewTask, check_processes

# Without batch norm, whose statistics are each process's own.
PLAIN = [
    "--model.name", "test_vit", "--data.size", "32", "--proxy.epochs", "6", "--relearn.epochs", "6",
    "--relearn.mlp_layers", "0", "--clusters.stage", "3", "--relearn.split", "2", "--precision", "fp32",
    "--relearn.settle", "0.1",
]  # fmt: skip
TWO = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731")
FOUR = ("torch.distributed.run", "--nproc_per_node", "4", "--master_port", "29731")


@pytest.fixture(scope="module")
def runs(picture_folder, tmp_path_factory):
    folders = {}
    for name, launcher in (("one", ()), ("two", TWO)):
        folders[name] = tmp_path_factory.mktemp("runs") / name
        done = command(
            "training", *TINY_RUN, *PLAIN, "--data.path", picture_folder, "--run", folders[name], launcher=launcher
        )
        assert done.returncode == 0, done.stderr
        assert f"processes {1 if name == 'one' else 2};" in done.stdout.splitlines()[1]
        assert len([line for line in done.stdout.splitlines() if "processes" in line]) == 1
    return folders


@pytest.mark.parametrize("phase", ["proxy", "relearn"])
def test_the_first_losses_are_one_processs(runs, phase):
    losses = {
        name: [row["loss"] for row in read_lines(folder / "metrics.jsonl") if row["phase"] == phase][:20]
        for name, folder in runs.items()
    }
    assert len(losses["one"]) == 20
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-4)


def test_the_clusters_agree(runs):
    one, two = (read_labels(folder / "round_1" / "labels.parquet")[0] for folder in runs.values())
    for column in range(one.shape[1]):
        assert normalized_mutual_info_score(one[:, column], two[:, column]) >= 0.99


def test_the_images_are_kept_once_for_both(runs):
    assert (runs["two"] / "images" / "train.u8").exists()
    assert not (runs["one"] / "images").exists()


def test_one_process_goes_on_from_two_ones_checkpoint_as_they_did(runs, picture_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["two"], folder)
    (folder / "round_1" / "relearn.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "relearn_1_00000024")
    done = tiny_run(folder, picture_folder, *PLAIN)
    assert done.returncode == 0, done.stderr
    found, told = (
        [r for r in read_lines(f / "metrics.jsonl") if r["phase"] == "relearn"] for f in (folder, runs["two"])
    )
    assert found[1]["images_per_second"] == told[1]["images_per_second"]  # the second step is the two's own
    assert found[2]["images_per_second"] != told[2]["images_per_second"]
    assert [r["loss"] for r in found[2:22]] == pytest.approx([r["loss"] for r in told[2:22]], abs=1e-3)


@pytest.mark.parametrize(
    ("network", "args", "why"),
    [("test_resnet", {}, "batch norms"), ("test_vit", {"drop_path_rate": 0.1}, "drops out"), ("test_vit", {}, None)],
)
def test_going_on_in_another_number_of_processes_is_refused_where_it_is_another_training(network, args, why):
    images = make_images(size=32, side=36)
    task = ViewTask(B.create(Model(network, args), 32), Schedule(), images).train()
    check_processes(task, 2, 2, 7)
    check_processes(task, None, 2, 7)
    with (
        pytest.raises(Refused, match=f"step 7 is of 2 processes, now there are 3, and .*{why}")
        if why
        else nullcontext()
    ):
        check_processes(task, 2, 3, 7)
    task.hold({name for name, _ in task.network.named_parameters()} | {n for n, _ in task.network.named_buffers()})
    check_processes(task, 2, 3, 7)  # what is held still depends on nothing


def test_all_processes_hold_the_same_weights_after_settling(tmp_path):
    code = f"""
import torch, pathlib
from tests.conftest import make_images
from tests.test_relearn import MODEL, KEY, network, pseudo_labels, settings
from training import launch, loop, relearn
accelerator = launch.start("fp32", None, "{tmp_path}")
assert accelerator.num_processes == 4
context = loop.Context(accelerator, pathlib.Path("{tmp_path}"), launch.StopSignals(), 1, 1000)
torch.manual_seed(accelerator.process_index)
before = network()
if accelerator.process_index:  # even if they had begun apart
    before.layer4[0].conv1.weight.data.add_(1)
before.idle = torch.nn.Parameter(torch.ones(2))  # as EfficientViM has one
images = make_images()
chosen = settings(mlp_layers=0, epochs=2)
seen = []
real = relearn.train
def spy(task, *args, **kwargs):
    real(task, *args, **kwargs)
    for name, value in sorted(task.state_dict().items()):
        if value.is_floating_point() and "running" not in name:
            everybody = accelerator.gather(value.flatten().unsqueeze(0))
            assert all(torch.equal(everybody[0], one) for one in everybody), name
            seen.append(name)
relearn.train = spy
from types import SimpleNamespace
from training import clusters, extraction, kmeans, recipe
alone = SimpleNamespace(num_processes=1, process_index=0, device=accelerator.device)
alone.gather, alone.reduce = lambda x: x, lambda x, how: x
net = network()
for count in (1, 2, 3, 5, 21):  # uneven shares, and fewer images than processes
    for random in (None, (recipe.Views(), 3)):
        some = make_images().all[:count]
        given = (net, make_images(), some)
        both, one = (extraction.extract(*given, a, 4, [1], random=random) for a in (accelerator, alone))
        assert both[1].shape == one[1].shape
        assert all(torch.allclose(both[stage], one[stage], atol=1e-5) for stage in one), count
rows = torch.arange(21.0).view(7, 3)
assert torch.equal(extraction.gather(extraction.share(rows, accelerator), accelerator), rows)
assert torch.equal(extraction.gather(extraction.share(rows[:1], accelerator), accelerator), rows[:1])
rows = torch.randn(31, 5, generator=torch.Generator().manual_seed(0))
both, one = (clusters.fit_whitening(extraction.share(rows, a), 3, 1.0, a) for a in (accelerator, alone))
assert torch.allclose(both.projection, one.projection, rtol=1e-4) and torch.allclose(both.mean, one.mean, atol=1e-6)
rows = torch.nn.functional.normalize(torch.randn(700, 5, generator=torch.Generator().manual_seed(1)), dim=1)
kmeans.FITTED = 20
mine = rows.split([500, 120, 70, 10])[accelerator.process_index]
both, one = (kmeans.kmeans(x, 30, 0, 50, a)[0] for x, a in ((mine, accelerator), (rows, alone)))
assert torch.allclose(both.centroids, one.centroids, atol=1e-4) and abs(both.inertia - one.inertia) < 1e-5
assert torch.equal(extraction.gather(both.labels, accelerator), one.labels)
for some in (rows[:3], rows[:6], torch.eye(5)[:1].repeat(3, 1)):  # fewer than processes; all alike
    both, one = (kmeans.kmeans(extraction.share(some, a), 2, 5, 20, a)[0] for a in (accelerator, alone))
    assert torch.allclose(both.centroids, one.centroids, atol=1e-5), some
relearn.relearn(before, MODEL, chosen, pseudo_labels(images), [4, 2], images, KEY, context, {{}})
assert any(name.endswith("layer4.0.conv1.weight") for name in seen) and len(seen) > 60
print("equal on rank", accelerator.process_index)
launch.end_processes()
"""
    script = tmp_path / "ranks.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", *FOUR, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal on rank") == 4


def test_a_comparison_runs_in_two_processes_and_ends_cleanly(picture_folder, tmp_path):
    done = command(
        "training.compare", *TINY_RUN, *PLAIN, "--proxy.epochs", "1", "--relearn.epochs", "1",
        "--arms", '["random","proxy","sslpp"]', "--seeds", "[0]", "--grid", "[1]",
        "--data.path", picture_folder, "--run", tmp_path / "run", launcher=TWO,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sslpp" in done.stdout
    assert (tmp_path / "run" / "report.md").exists()


def test_a_backbone_is_fine_tuned_in_two_processes_and_both_measure_what_is_kept(finished, picture_folder, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text("""
import sys, torch
from training import finetune
from training.command import guarded

real = finetune.Keeper.look

def look(self, step, total):
    told = real(self, step, total)
    for name, value in self.task.result().named_buffers():  # batch norms, which have seen other images
        both = self.context.accelerator.gather(value.double().flatten().unsqueeze(0))
        assert torch.equal(both[0], both[1]), name
    return told

finetune.Keeper.look = look
sys.exit(guarded(finetune.main, sys.argv[1:]))
""")
    options = ["--epochs", "2", "--batch_size", "8", "--head_first", "0.5", "--data.val_fraction", "0.2"]
    options += ["--data.path", picture_folder, "--run", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-m", *TWO, "--", script, finished[0] / "hub", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = records.read(tmp_path / "run" / "records.jsonl")
    assert {(r["stage"], r["split"]) for r in found} == {(s, p) for s in ("best", "last") for p in ("val", "test")}
    for stage in ("best", "last"):
        told = read_json(tmp_path / "run" / stage / "finetune.json")["val_top1"]
        assert records.value(found, stage=stage, split="val") == pytest.approx(told)


def test_every_task_is_one_processs_in_two(tmp_path):
    """One launch runs all tasks, without batch norm where the task has none of its own."""
    script = tmp_path / "tasks.py"
    script.write_text(f"""
import json, pathlib, torch
from tests.conftest import make_images
from training import backbone as B, launch, loop, proxies
from training.files import read_lines
from training.launch import Key
from training.loop import Context
from training.recipe import Model

accelerator = launch.start("fp32", None, "{tmp_path}")
prepare = accelerator.prepare

def spy(*parts):
    model, optimizer = prepare(*parts)
    assert not getattr(model, "broadcast_buffers", False)  # queues and banks are not sent at each step
    return model, optimizer

accelerator.prepare = spy
place = pathlib.Path("{tmp_path}") / f"ranks_{{accelerator.num_processes}}"
torch.manual_seed(1)
teacher = place / f"teacher_{{accelerator.process_index}}"
teacher.mkdir(parents=True)
B.save(B.create(Model("test_vit"), 32), teacher, make_images(side=36, size=32))
options = {{
    "jigsaw": dict(grid=2, orders=6, hidden=8), "relative_location": dict(gap=0.0, hidden=8),
    "npid": dict(negatives=6, dim=5), "simclr": dict(dim=5), "moco": dict(dim=5, queue=24), "byol": dict(dim=5),
    "barlow_twins": dict(dim=5),
    "distill": dict(teacher=f"local-dir:{{teacher}}", match="similarity", queue=24, teacher_temperature=0.1),
}}
told = {{}}
for name in proxies.PROXIES:
    network, size = ("test_convnext", 96) if name in ("jigsaw", "relative_location") else ("test_vit", 32)
    images = make_images(side=size + 4, size=size)
    fields = dict(batch_size=8, epochs=0.75, mlp_layers=0, mlp_dim=6, optimizer="sgd", lr=0.01, warmup=0.0)
    proxy = proxies.settings(name, options=proxies.find(name).Options(**options.get(name, {{}})), **fields)
    torch.manual_seed(0)
    task = proxies.build(proxy, B.create(Model(network), size), images)
    folder = place / name
    folder.mkdir(exist_ok=True)
    context = Context(accelerator, folder, launch.StopSignals(), 1, 1000)
    loop.train(task, images, images.train, proxy, Key(0, "proxy"), context, {{}})
    for key, value in task.state_dict().items():
        if key in ("queue.rows", "bank", "queue.place"):  # everybody holds the same
            both = accelerator.gather(value.double().flatten().unsqueeze(0))
            assert all(torch.equal(both[0], one) for one in both), (name, key)
    if accelerator.is_main_process:
        told[name] = [row["loss"] for row in read_lines(folder / "metrics.jsonl")]
# MoCo's keys are made with running statistics, which are to be everybody's at each step.
images = make_images(side=36, size=32)
proxy = proxies.settings("moco", options=proxies.find("moco").Options(dim=5, queue=24), **{{**fields, "mlp_layers": 1}})
task = proxies.build(proxy, B.create(Model("test_resnet"), 32), images)
real = task.after_step

def look(step, total):
    real(step, total)
    for name, value in task.keys.module.named_buffers():
        both = accelerator.gather(value.double().flatten().unsqueeze(0))
        assert all(torch.equal(both[0], one) for one in both), (step, name)

task.after_step = look
context = Context(accelerator, place, launch.StopSignals(), 1, 1000)
loop.train(task, images, images.train, proxy, Key(0, "proxy"), context, {{}})
if accelerator.is_main_process:
    (place / "losses.json").write_text(json.dumps(told))
launch.end_processes()
""")
    for launcher in ([], ["-m", *TWO]):
        done = subprocess.run(
            [sys.executable, *launcher, script],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_json(tmp_path / f"ranks_{count}" / "losses.json") for count in (1, 2))
    assert len(one) == 10
    for name in one:
        assert len(one[name]) == 3
        if name != "byol":  # its predictor has a batch norm
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
