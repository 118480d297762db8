"""The real command, end to end, on tiny data; what is wrong is refused first."""

import errno
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import ROOT, call, tiny_run
from training import clusters, command, config, embed, records
from training.__main__ import CONFIGS, fitting, main
from training.evaluate import __main__ as evaluate
from training.files import read_json, read_lines, sha256_file


def test_a_folder_of_images_becomes_a_run_folder(finished):
    folder, done = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "recipe.yaml", "data.json", "bad_images.txt", "metrics.jsonl", "records.jsonl", "report.md",
        "proxy/config.json", "proxy/model.safetensors",
        "round_1/config.json", "round_1/model.safetensors", "round_1/labels.parquet", "round_1/clusters.safetensors",
        "round_1/clusters.json", "round_1/clusters.png",
        "report/stages.png", "report/neighbours.png", "report/clusters.png", "report/curves.png",
        "hub/config.json", "hub/model.safetensors", "hub/README.md",
    } <= names  # fmt: skip
    assert not [name for name in names if ".tmp" in name or ".old" in name]
    assert len(list((folder / "checkpoints").iterdir())) == 2
    told = read_json(folder / "data.json")
    assert (told["images"], told["test"]["images"]) == (48, 16)
    assert len(told["fingerprint"]) == len(told["test"]["fingerprint"]) == 64
    first, second, third = done.stdout.splitlines()[:3]
    assert first == "train: training (48 read); test: test (16 read)"
    assert re.search(
        r"^warning: at 16 px, 3 convolutions have taps that no data ever meets, such as 8 of the 9 of", second
    )
    assert re.search(r"fp32; processes 1; threads \d+; batch 8; images 38 \(\+ 10 held out\), .* MB in", third)
    # Three folders have the weights, and two checkpoints three times as much.
    weights = (folder / "proxy" / "model.safetensors").stat().st_size / 1e6
    assert int(re.search(r", and (\d+) MB in", third).group(1)) == pytest.approx(9 * weights, rel=0.1)


def test_the_report_shows_every_arm_and_the_lines_of_python_work(finished, tmp_path):
    folder, done = finished
    for arm in ("random", "proxy_short", "sslpp"):
        # linear, knn, residue, rankme, few images, without labels
        assert len(re.findall(rf"^{arm} +\d", done.stdout, re.M)) == 6
    text = (folder / "report.md").read_text()
    assert re.findall(r"^!\[(\w+)\]\(report/\1\.png\)$", text, re.M) == [
        "stages", "lowshot", "neighbours", "clusters", "curves",
    ]  # fmt: skip
    assert "sslpp over the backbone that it started from" in text
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "torch.Size([1, 96])" in shown.stdout


def test_records_have_all_their_fields(finished):
    folder, _ = finished
    found = records.read(folder / "records.jsonl")
    wanted = {
        "arm", "model", "task", "recipe_sha256", "seed", "phase", "round", "stage", "protocol", "settings", "data",
        "split", "metric", "value", "images_seen", "flops", "seconds", "device", "precision", "weights_sha256",
        "versions",
    }  # fmt: skip
    assert all(set(record) - {"deviation", "count"} == wanted for record in found)
    assert all(("deviation" in record) == (record["protocol"] == "lowshot") for record in found)
    assert {(r["arm"], r["round"]) for r in found} == {("random", 0), ("proxy_short", 0), ("sslpp", 1)}
    assert {r["split"] for r in found if r["protocol"] in ("clusters", "task")} == {"train"}
    last = next(r for r in found if r["arm"] == "sslpp")
    assert last["weights_sha256"] == sha256_file(folder / "round_1" / "model.safetensors")
    assert last["images_seen"] == 2 * 32 + round(48 * 8 / 3) + 2 * 32
    assert last["flops"] > 0


def test_labels_belong_to_their_images(finished, picture_folder):
    folder, _ = finished
    table = pq.read_table(folder / "round_1" / "labels.parquet")
    paths = table["path"].to_pylist()
    assert len(paths) == 48
    assert all((picture_folder / path).exists() for path in paths)


def test_hub_loads_where_this_project_is_not(finished, tmp_path):
    folder, _ = finished
    code = f"""
import sys, timm, torch, transformers
assert "training" not in sys.modules and "sslpp_models" not in sys.modules
batch = torch.randn(2, 3, 16, 16)
hub = "{folder / "hub"}"
plain = timm.create_model("local-dir:" + hub, pretrained=True).eval()
with torch.no_grad():
    expected = plain(batch)
    headless = timm.create_model("local-dir:" + hub, pretrained=True, num_classes=0).eval()
    assert headless(batch).allclose(expected, atol=1e-5)
    assert timm.create_model("local-dir:" + hub, pretrained=True, num_classes=7)(batch).shape == (2, 7)
    assert len(timm.create_model("local-dir:" + hub, pretrained=True, features_only=True)(batch)) == 5
    assert timm.create_model("local-dir:" + hub, pretrained=True, in_chans=1)(batch[:, :1]).shape == expected.shape
    model = transformers.AutoModel.from_pretrained(hub).eval()
    assert torch.allclose(model(batch).pooler_output, expected, atol=1e-5)
from PIL import Image
import numpy as np
picture = Image.fromarray((np.random.default_rng(0).random((20, 20, 3)) * 255).astype("uint8"))
pixels = transformers.AutoImageProcessor.from_pretrained(hub)(picture)["pixel_values"]
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
assert torch.allclose(torch.as_tensor(pixels)[0], transform(picture), atol=1e-5)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("same"), done.stderr


def test_embed_writes_features_with_paths_and_earlier_labels(finished, picture_folder, tmp_path):
    folder, _ = finished
    out = tmp_path / "out.parquet"
    done = call(
        embed.main, folder / "hub", "--data.path", picture_folder, "--out", out, "--clusters", folder / "round_1"
    )
    assert done.returncode == 0, done.stderr
    larger = tmp_path / "larger.parquet"
    of_size = ["--data.size", 24, "--out", larger, "--clusters", folder / "round_1"]
    done = call(embed.main, folder / "hub", "--data.path", picture_folder, *of_size)
    assert done.returncode == 0, done.stderr
    table, labels = pq.read_table(out), pq.read_table(folder / "round_1" / "labels.parquet")
    assert pq.read_table(larger)["features"][0] != table["features"][0]
    for name in ("path", "label_3", "distance_3", "label_5", "distance_5"):  # at the size that they were made at
        assert pq.read_table(larger)[name] == table[name]
    assert set(table["split"].to_pylist()) == {"train", "test"}
    table = table.filter(pc.equal(table["split"], "train"))
    for name in ("path", "label_3", "label_5"):
        assert table[name].to_pylist() == labels[name].to_pylist()
    assert table["distance_3"].to_pylist() == pytest.approx(labels["distance_3"].to_pylist(), abs=1e-5)
    model = timm.create_model(f"local-dir:{folder / 'hub'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for row in (0, 31):
        picture = Image.open(picture_folder / table["path"][row].as_py())
        with torch.no_grad():
            expected = model(transform(picture).unsqueeze(0))[0]
        assert torch.allclose(torch.tensor(table["features"][row].as_py()), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--clusters.k", "[3,999]"], 2, "clusters.k"),
        (["--proxy.epochs", "3"], 2, "proxy.epochs"),
        (["--relearn.split", "-1"], 2, "relearn.split"),
        (["--relearn.split", "17"], 2, "relearn.split"),
        (["--clusters.stage", "-9"], 2, "clusters.stage"),
        (["--model.name", "resnet81"], 2, "model.name"),
        (["--model.name", "test_vit", "--model.args", "{patch_size: 7}"], 2, "data.size"),
        (["--proxy.name", "jigsaw"], 2, "proxy.name"),
        (["--proxy.optimizer", "adamish"], 2, "proxy.optimizer"),
        (["--proxy.batch_size", "64"], 2, "proxy.batch_size"),
        (["--data.size", "18"], 2, "size"),
        (["--data.limit", "30"], 2, "images"),
        (["--data.test_split", "exam"], 2, "data.test_split"),
        (["--precision", "fp16"], 2, "precision"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(finished, picture_folder, arguments, status, named):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    done = tiny_run(folder, picture_folder, *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    names = {path: path.stat().st_mtime_ns for path in before}
    assert {p for p in before if names[p] != before[p]} <= {folder / "bad_images.txt"}


def test_a_refused_request_leaves_nothing_behind(picture_folder, tmp_path):
    folder = tmp_path / "runs" / "mine"
    for field, value, said in (
        ("proxy.batch_size", 64, "proxy.batch_size: 64 is more than the 38"),
        ("proxy.accumulate", 8, "proxy.batch_size: 8 leaves a micro-batch one image"),
        ("relearn.accumulate", 8, "relearn.batch_size: 8 leaves a micro-batch one image"),
    ):
        done = tiny_run(folder, picture_folder, f"--{field}", value)
        assert (done.returncode, said in done.stderr) == (2, True)
        assert not (tmp_path / "runs").exists()
    assert tiny_run(folder, picture_folder, "--data.limit", "40", "--relearn.rounds", "0").returncode == 0
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert tiny_run(folder, picture_folder, "--data.limit", "41").returncode == 2
    shutil.copytree(picture_folder, tmp_path / "data")
    first, second = sorted((tmp_path / "data" / "train").rglob("*.png"))[:2]
    second.write_bytes(first.read_bytes())
    done = tiny_run(folder, tmp_path / "data", "--data.limit", "40", "--relearn.rounds", "0")
    assert (done.returncode, "other images (as many, but files were renamed or changed" in done.stderr) == (2, True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


def test_a_run_folder_of_the_working_directory_is_found_again_by_its_recipe(
    finished, picture_folder, tmp_path, monkeypatch
):
    shutil.copytree(finished[0], tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert tiny_run("./mine", picture_folder).returncode == 0
    done = call(main, "--config", "mine/recipe.yaml")
    assert (done.returncode, "relearn 1" in done.stderr) == (0, False), done.stderr  # nothing is trained again
    assert not (tmp_path / "runs").exists()


def test_images_without_labels_and_odd_files_go_through(tmp_path):
    generator = np.random.default_rng(0)
    data = tmp_path / "photos"
    data.mkdir()
    for i in range(40):
        array = (generator.random((int(generator.integers(5, 40)), int(generator.integers(5, 40)), 3)) * 255).astype(
            "uint8"
        )
        picture = Image.fromarray(array).convert(["RGB", "L", "RGBA", "P"][i % 4])
        picture.save(data / f"{i:02d}.png")
    (data / "empty.jpg").write_bytes(b"")
    done = tiny_run(tmp_path / "run", data, "--data.max_bad_fraction", 0.1, "--proxy.epochs", 1, "--relearn.epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "1 bad" in done.stdout
    found = records.read(tmp_path / "run" / "records.jsonl")
    assert {r["protocol"] for r in found} == {"task", "residue", "rankme", "label_free", "clusters"}
    stability = {(r["metric"], r["settings"]["k"]) for r in found if r["protocol"] == "clusters"}
    assert {(f"agreement_of_{what}", k) for what in ("seeds", "views") for k in (3, 5)} <= stability
    assert re.search(r"^k = 3 +[01]\.\d{3} +[01]\.\d{3}", done.stdout, re.M)
    assert (tmp_path / "run" / "bad_images.txt").read_text().count("\n") == 1
    text = (tmp_path / "run" / "report.md").read_text()
    order = [text.index(words) for words in ("retrieval ", "(report/neighbours.png)", "(report/clusters.png)", "|---")]
    assert order == sorted(order)
    assert "top-1" not in text.split("residue")[0]
    assert not re.search(r"^#.*\n+(#|\Z)", text.split("\n", 1)[1], re.M)  # no section is empty


def test_proxy_weights_may_come_from_a_folder_and_phase_1_may_be_left_out(finished, picture_folder, tmp_path):
    folder, _ = finished
    done = tiny_run(
        tmp_path / "run", picture_folder, "--model.name", f"local-dir:{folder / 'proxy'}", "--model.pretrained", "true",
        "--proxy.epochs", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        timm.create_model(f"local-dir:{f}", pretrained=True) for f in (tmp_path / "run" / "proxy", folder / "proxy")
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert {row["phase"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")} == {"relearn"}
    # What made them is not known, and so not what of it is left.
    assert "residue" not in {row["protocol"] for row in records.read(tmp_path / "run" / "records.jsonl")}
    config = json.loads((tmp_path / "run" / "hub" / "config.json").read_text())
    assert (config["architecture"], config["pretrained_cfg"].get("tag")) == ("test_resnet", None)
    told = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "own answer" in (folder / "hub" / "README.md").read_text()
    assert "own answer" not in told
    assert "those that the given weights were made from" in told


def test_the_quickstart_recipe_is_sound():
    made = command.parse(["--config", str(ROOT / "hub_configs" / "quickstart" / "recipe.yaml")])
    assert made.run == "runs/quickstart"


def test_a_full_disk_and_a_full_memory_are_one_sentence():
    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/state")

    def large(arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    for failing, said in ((full, "runs/x/state: No space left"), (large, "Out of memory")):
        done = call(failing)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_tracker_that_is_not_installed_is_refused(picture_folder, tmp_path):
    done = tiny_run(tmp_path / "run", picture_folder, "--log.tracker", "aim")
    assert (done.returncode, done.stderr.startswith("error: log.tracker: aim is not installed")) == (2, True)


def test_evaluate_finds_the_figures_of_the_run_again(finished, picture_folder, tmp_path):
    folder, _ = finished
    out = tmp_path / "records.jsonl"
    options = ["--data.path", picture_folder, "--data.val_fraction", "0.2", "--residue", "rotation", "--out", out]
    options += ["--evaluate.linear_c", "[0.1]", "--evaluate.knn_k", "[3]", "--evaluate.shots", "[2]"]
    done = call(evaluate.main, folder / "hub", *options)
    assert done.returncode == 0, done.stderr
    own = [r for r in records.read(folder / "records.jsonl") if r["arm"] == "sslpp"]
    own = [r for r in own if r["protocol"] not in ("clusters", "task")]
    found = {(r["stage"], r["protocol"], r["split"], r["metric"]): r["value"] for r in records.read(out)}
    key = ("stage", "protocol", "split", "metric")
    assert found == {tuple(r[name] for name in key): r["value"] for r in own}  # to the last digit
    assert {r["weights_sha256"] for r in records.read(out)} == {r["weights_sha256"] for r in own}
    assert done.stdout.count("hub") == 6
    refused = call(evaluate.main, folder / "hub", *options, "--residue", "none")
    assert (refused.returncode, "there is no task 'none'" in refused.stderr) == (2, True)


def test_stages_that_are_chosen_without_labels_are_told_and_used(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "leading_stage", lambda *args: 4)
    auto = ["--clusters.stage", "auto", "--relearn.split", "auto"]
    done = tiny_run(tmp_path / "run", picture_folder, *auto)
    assert done.returncode == 0, done.stderr
    made = [read_json(tmp_path / "run" / "round_1" / f"{name}.json") for name in ("clusters", "relearn")]
    assert (made[0]["stage"], made[1]["split"]) == (4, 3)  # something is left to relearn
    rows = records.read(tmp_path / "run" / "records.jsonl")
    assert {row["stage"] for row in rows if row["protocol"] == "clusters"} == {4}
    assert "relearn.split: stage 3 was chosen" in done.stdout
    assert next(row["chosen"] for row in rows if row["arm"] == "sslpp") == {"clusters.stage": 4, "relearn.split": 3}
    assert "up to stage 3, chosen without labels, of 0 to 4" in (tmp_path / "run" / "hub" / "README.md").read_text()


def test_without_a_recipe_one_that_fits_the_machine_is_taken_and_said(monkeypatch, capsys):
    for there, name in ((False, "photos_small"), (True, "photos_resnet50")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        made = command.parse(fitting(["--data.path", "photos", "--relearn.epochs", "7"]))
        assert f"no --config: {name} is taken" in capsys.readouterr().out
        assert (made.run, made.relearn.epochs) == (f"runs/{name}", 7)
        own = config.load(CONFIGS / name / "recipe.yaml")
        assert (made.model.name, made.data.size) == (own["model"]["name"], own["data"]["size"])
    for named in (["--config", "x.yaml"], ["--model.name=resnet18"], ["--proxy.name", "byol"], ["--help"]):
        assert fitting(named) == named


def test_weights_that_exist_take_the_recipe_for_them(capsys):
    lent = ["--model.name", "resnet18.a1_in1k", "--model.pretrained", "true", "--data.path", "photos"]
    made = command.parse(fitting(lent))
    assert "no --config: photos_adapt is taken, which is for weights that exist" in capsys.readouterr().out
    assert (made.model.name, made.proxy.epochs, made.relearn.norm) == ("resnet18.a1_in1k", 0, "stored")
    assert fitting(["--config", "x.yaml", *lent])[:2] == ["--config", "x.yaml"]
    assert fitting([*lent, "--model.pretrained=false"])[-1] == "--model.pretrained=false"
    assert not capsys.readouterr().out
