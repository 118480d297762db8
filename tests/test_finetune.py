"""Fine-tuning: the real command on tiny data, its loss, what is trained when, and what is refused."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from tests.conftest import TUNING, call, make_images
from training import backbone as B
from training import finetune as T
from training import loop, records, views
from training.extraction import plain_batch
from training.files import read_json, read_lines
from training.launch import Key
from training.recipe import Data, Model, Views

CALM = Views(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0)


@pytest.fixture(scope="module")
def finished(backbone, picture_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    done = call(T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def classify(images, **settings):
    torch.manual_seed(0)
    network = B.create(Model("test_resnet"), 16)
    network.reset_classifier(4)
    return T.Classify(network, T.Finetune(**{"views": CALM, "batch_size": 8, **settings}), images, 0)


def told_right(folder, pictures):
    """The share of pictures that plain timm tells right by a classifier's folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    assert list(names) == [f"class {i}" for i in range(4)]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right = total = 0
    for path in sorted((pictures / "test").rglob("*.png")):
        with torch.no_grad():
            guess = model(transform(Image.open(path).convert("RGB")).unsqueeze(0)).argmax()
        right, total = right + (names[guess] == path.parent.name), total + 1
    return right / total


def test_the_result_is_a_folder_whose_predictions_timm_reproduces(finished, picture_folder):
    folder, done = finished
    rows = records.read(folder / "records.jsonl")
    found = records.value(rows, stage="best", split="test")
    assert told_right(folder / "best", picture_folder) == pytest.approx(found)
    assert f"best, test: {100 * found:.2f} %" in done.stdout
    told = {"labels": 1.0, "epochs": 3.0, "scratch": False, "lr": 0.01, "layer_decay": 0.75, "head_first": 0.0}
    assert [(row["settings"], row["size"]) for row in rows] == [(told, 16)] * 4


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])  # the second is built for one size
def test_a_size_that_is_not_the_models_own_becomes_the_classifiers(name, picture_folder, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    B.save(B.create(Model(name), 16), tmp_path / "model", make_images())
    run = tmp_path / "run"
    shared = [T.main, tmp_path / "model", "--data.path", picture_folder, "--run", run]
    done = call(*shared, *TUNING, "--epochs", "1", "--data.size", "32")
    assert done.returncode == 0, done.stderr
    assert "images at 32 px, instead of the model's 16;" in done.stdout
    assert read_json(run / "best" / "config.json")["pretrained_cfg"]["input_size"] == [3, 32, 32]
    rows = records.read(run / "records.jsonl")
    assert {row["size"] for row in rows} == {32}
    assert told_right(run / "best", picture_folder) == pytest.approx(records.value(rows, stage="best", split="test"))
    assert call(*shared, "--config", run / "recipe.yaml").returncode == 0
    other = call(*shared, *TUNING, "--epochs", "1")
    assert (other.returncode, "seen as: " in other.stderr) == (2, True)


def test_pictures_larger_than_the_network_sees_are_seen_as_timm_shows_them(backbone, context, tmp_path):
    shutil.copytree(backbone, tmp_path / "wide")
    rewrite(tmp_path / "wide" / "config.json", '"crop_pct": 0.8', '"crop_pct": 0.95')
    draws = np.random.default_rng(0)
    paths = [tmp_path / "data" / "train" / f"class {i % 2}" / f"{i}.png" for i in range(10)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((84, 60)).save(path)
    network = B.create(Model(f"local-dir:{tmp_path / 'wide'}", pretrained=True), None)
    settings = T.Finetune(data=Data(path=str(tmp_path / "data"), size=16))
    images = T.load_images(network, settings, context)[0]["train"]
    folder = tmp_path / "saved"
    folder.mkdir()
    B.save(network, folder, images)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    shown = torch.stack([transform(Image.open(tmp_path / "data" / path)) for path in images.paths])
    assert torch.allclose(shown, plain_batch(images, images.all, torch.device("cpu")), atol=1e-5)


def test_accuracy_is_measured_after_each_epoch_and_the_best_is_kept(finished):
    folder, done = finished
    told = [float(x) for x in re.findall(r"^step \d+: held-out part of train: ([\d.]+) %", done.stdout, re.M)]
    assert len(told) == 3
    logged = [row["val_top1"] for row in read_lines(folder / "metrics.jsonl") if "val_top1" in row]
    assert [100 * value for value in logged] == pytest.approx(told, abs=0.01)
    best = read_json(folder / "best" / "finetune.json")
    assert 100 * best["val_top1"] == pytest.approx(max(told), abs=0.01)
    steps = [int(step) for step in re.findall(r"^step (\d+): held-out", done.stdout, re.M)]
    assert best["step"] == max(
        step for step, value in zip(steps, told, strict=True) if value == max(told)
    )  # the latest
    assert 100 * read_json(folder / "last" / "finetune.json")["val_top1"] == pytest.approx(told[-1], abs=0.01)


def test_the_same_command_again_trains_nothing_and_another_one_is_refused(finished, backbone, picture_folder):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    again = call(T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    kept = (folder / "records.jsonl").read_bytes()
    for change, said in (("--layer_decay", "layer_decay"), ("--data.val_fraction", "targets")):
        other = call(T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", folder, change, "0.5")
        assert (other.returncode, said in other.stderr) == (2, True)
    assert (folder / "records.jsonl").read_bytes() == kept
    row = records.read(folder / "records.jsonl")[0]
    assert row["images_seen"] == 3 * 4 * 8
    assert row["flops"] > 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run, data, model: [p.rename(p.with_name("class 9")) for p in data.glob("*/class 3")], "label names: "),
        (lambda run, data, model: rewrite(model / "config.json", "0.5", "0.6"), "seen as: "),
    ],
)
def test_a_finished_run_is_not_measured_as_another_one(spoil, said, finished, backbone, picture_folder, tmp_path):
    run, data, model = (tmp_path / name for name in ("run", "data", "model"))
    for source, copy in ((finished[0], run), (picture_folder, data), (backbone, model)):
        shutil.copytree(source, copy)
    spoil(run, data, model)
    kept = (run / "records.jsonl").read_bytes()
    done = call(T.main, model, *TUNING, "--data.path", data, "--run", run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert (run / "records.jsonl").read_bytes() == kept


@pytest.mark.parametrize("damage", ["folder", "marker", "half a marker", "weights", "one file"])
def test_what_of_a_classifier_is_gone_or_damaged_is_told_with_what_helps(
    damage, finished, backbone, picture_folder, tmp_path
):
    run = shutil.copytree(finished[0], tmp_path / "run")
    best = run / "best"
    if damage == "folder":
        shutil.rmtree(best)
    elif damage == "half a marker":
        (best / "finetune.json").write_text('{"step"')
    elif damage == "weights":
        (best / "model.safetensors").write_bytes(b"no weights")
    else:
        (best / {"marker": "finetune.json", "one file": "config.json"}[damage]).unlink()
    done = call(T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", run)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.endswith(f"; choose another --run, or remove {run} to train again.\n")
    assert str(best) in done.stderr


def test_an_interrupted_run_ends_in_the_same_weights(finished, backbone, picture_folder, tmp_path, monkeypatch):
    folder, _ = finished
    real, steps = T.Keeper.look, []

    def stop_after_the_first(self, step, total):
        steps.append(step)
        self.context.stop.number = 15 if len(steps) == 1 else None
        return real(self, step, total)

    monkeypatch.setattr(T.Keeper, "look", stop_after_the_first)
    command = (T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", tmp_path / "torn")
    assert call(*command).returncode == 143
    assert call(*command).returncode == 0
    for name in ("best", "last"):
        one, other = (f / name / "model.safetensors" for f in (folder, tmp_path / "torn"))
        assert one.read_bytes() == other.read_bytes()


def test_a_classifier_keeps_the_licence_of_its_backbone(backbone, picture_folder, tmp_path):
    config = {**read_json(backbone / "config.json")}
    config["pretrained_cfg"]["license"] = "other"
    shutil.copytree(backbone, tmp_path / "research")
    (tmp_path / "research" / "config.json").write_text(json.dumps(config))
    options = [*TUNING, "--epochs", "1", "--data.path", picture_folder]
    for name, more, licence in (("tuned", [], "other"), ("scratch", ["--scratch", "true"], None)):
        done = call(T.main, tmp_path / "research", *options, *more, "--run", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert read_json(tmp_path / name / "last" / "config.json")["pretrained_cfg"].get("license") == licence


def test_every_classifier_of_a_network_is_its_head():
    network = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24, num_heads=2, num_classes=3)
    assert T.head_names(network) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(("mixing", "smoothing"), [({}, 0.0), ({}, 0.2), ({"mixup": 0.4}, 0.1)])
def test_the_loss_is_the_cross_entropy(tiny, context, mixing, smoothing):
    task = classify(tiny, label_smoothing=smoothing, **mixing).eval()
    batches = [
        loop.draw_batch(tiny, tiny.train, task.settings, Key(0, "x"), 0, 0, context.accelerator) for _ in range(2)
    ]
    np.random.seed(3)  # noqa: NPY002  timm's Mixup draws from the global stream
    got = task(batches[0])["loss"].item()
    batch = batches[1]
    images = views.normalize(views.random_views(CALM, batch.pixels, batch.sizes, batch.draws, 16), task.mean, task.std)
    targets = F.one_hot(batch.labels, 4).float()
    if mixing:
        np.random.seed(3)  # noqa: NPY002
        np.random.rand()  # noqa: NPY002  whether to mix at all
        share = np.random.beta(0.4, 0.4)  # noqa: NPY002
        images = share * images + (1 - share) * images.flip(0)
        targets = share * targets + (1 - share) * targets.flip(0)
    expected = 0.0
    for image, target in zip(images, targets, strict=True):
        logs = task.network(image.unsqueeze(0)).log_softmax(1)[0]
        smoothed = (1 - smoothing) * target + smoothing / 4
        expected -= float((smoothed * logs).sum().detach()) / 8
    assert got == pytest.approx(expected, abs=1e-4)


def test_layers_learn_slower_the_lower_they_are():
    task = classify(make_images(), layer_decay=0.5)
    names = {id(p): n for n, p in task.network.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in task.parameter_groups(0.1) for p in g["params"]}
    assert scales.keys() == set(names.values())
    assert scales["fc.weight"] == 1.0
    first, last = scales["conv1.0.weight"], scales["layer4.0.conv1.weight"]
    assert first < last <= 1.0
    assert math.log2(last / first) == round(math.log2(last / first))


def trained(images, context, **settings):
    """What moved, parameters and buffers, in a training whose keeper looks after each epoch."""
    task = classify(images, **settings)
    before = {n: value.detach().clone() for n, value in task.network.state_dict().items()}
    frozen = T.check(task.settings, task.network, images, len(images.train), 1)
    keeper = T.Keeper(context, {"train": images}, task.settings)
    key = Key(0, "finetune")
    T.fit(task.network, images, images.train, task.settings, frozen, key, context, {}, keeper)
    return {n for n, value in task.network.state_dict().items() if not torch.equal(value, before[n])}


def test_the_head_is_trained_first_and_frozen_stages_never(context):
    images = make_images()
    alone = trained(images, context, epochs=2, head_first=0.99)
    assert alone == {"fc.weight", "fc.bias"}
    context.folder = context.folder / "other"
    context.folder.mkdir()
    low = B.low_names(B.create(Model("test_resnet"), 16), 1, 16)
    assert {"bn1.weight", "bn1.running_mean"} <= low
    moved = trained(images, context, epochs=2, freeze=1)
    assert not moved & low
    assert {"fc.weight", "layer4.0.conv1.weight", "layer4.0.bn1.running_mean"} <= moved


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer", "foo"], "optimizer: timm has no optimiser 'foo'"),
        (["--optimizer", "adahessian"], "optimizer: adahessian needs second derivatives"),
        pytest.param(
            ["--optimizer", "fusedlamb"],
            "optimizer: fusedlamb cannot be had here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can, where APEX is installed"),
        ),
        (["--data.label_column", "image"], "no metadata file has a column 'image'"),
        (["--batch_size", "99"], "batch_size: 99 is more than the 38 training images"),
        (["--batch_size", "9", "--mixup", "0.2"], "9 of a micro-batch cannot be paired"),
        (["--accumulate", "8"], "batch_size: 8 leaves a micro-batch one image"),
        (["--freeze", "9"], "freeze: 9 is not one of the 5 stages"),
        (["--epochs", "0"], "epochs"),
        (["--labels", "0"], "labels"),
        (["--data.val_fraction", "0.001"], "0 held out"),
    ],
)
def test_what_cannot_work_is_refused_and_blocks_nothing(options, said, backbone, picture_folder, tmp_path):
    done = call(T.main, backbone, *TUNING, "--data.path", picture_folder, "--run", tmp_path / "run", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not list(tmp_path.glob("run/*.json"))


@pytest.mark.parametrize("options", [["--cutmix", "1.0"], ["--ema", "0.5", "--freeze", "1", "--head_first", "0.4"]])
def test_mixing_averaging_and_freezing_resume_too(options, backbone, picture_folder, tmp_path, monkeypatch):
    real = T.Keeper.look

    def stop_the_torn_one(self, step, total):
        self.context.stop.number = 15 if self.context.folder.name == "torn" and step < total else None
        return real(self, step, total)

    monkeypatch.setattr(T.Keeper, "look", stop_the_torn_one)
    command = (T.main, backbone, *TUNING, *options, "--data.path", picture_folder, "--run")
    assert call(*command, tmp_path / "whole").returncode == 0
    assert [call(*command, tmp_path / "torn").returncode for _ in range(3)] == [143, 143, 0]
    one, other = (tmp_path / name / "last" / "model.safetensors" for name in ("whole", "torn"))
    assert one.read_bytes() == other.read_bytes()


def test_what_memory_cannot_hold_is_refused_with_what_would(backbone, picture_folder, tmp_path, monkeypatch):
    run = (T.main, backbone, *TUNING, "--epochs", "1", "--data.path", picture_folder, "--run", tmp_path / "run")
    (need,) = re.findall(r"about (\d+) MB of .* on the host \(training: a step of 8 images\)", call(*run).stdout)
    monkeypatch.setattr(T.peaks, "free_memory", lambda: 1e6)
    assert 0 < int(need) < 100
    done = call(*run[:-1], tmp_path / "other")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        f"training: a step of 8 images would take about {need} MB of memory on the host, and 1 MB are free"
        in done.stderr
    )
    assert not (tmp_path / "other").exists()


def test_weights_that_are_random_have_no_statistics_to_keep(backbone, tmp_path):
    done = call(T.main, backbone, *TUNING, "--scratch", "true", "--norm", "stored", "--data.path", tmp_path)
    assert done.returncode == 2
    assert "error: norm: batch norms that begin at random" in done.stderr


def test_from_scratch_the_weights_are_random_but_repeat_by_seed(backbone, picture_folder, tmp_path):
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        run = tmp_path / str(number)
        done = call(
            T.main, backbone, *TUNING, "--epochs", "1", "--scratch", "true", "--seed", seed,
            "--data.path", picture_folder, "--run", run,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        hashes.append((run / "last" / "model.safetensors").read_bytes())
        assert {row["phase"] for row in read_lines(run / "metrics.jsonl")} == {"finetune"}
    assert hashes[0] == hashes[1] != hashes[2]
