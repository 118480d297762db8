"""The recipes under hub_configs/: each resolves, says what it is, and takes its first steps, at a tiny size."""

import re

import pytest
import timm

from tests.conftest import ROOT, call
from training import backbone as B
from training import command, operations
from training.__main__ import main
from training.files import read_lines

FOLDERS = sorted(path.parent for path in (ROOT / "hub_configs").glob("*/recipe.yaml"))
FOR_A_GPU = {
    "photos_resnet50": "test_resnet",
    "photos_vit_small": "test_vit",
    "sslpp_resnet50.rotation_in1k": "test_resnet",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_resolves_and_opens_with_paper_command_cost_and_result(folder):
    text = (folder / "recipe.yaml").read_text()
    head = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for word in ("Chen et al.", "Command:", "Cost:", "Result:"):
        assert word in head
    made = command.parse(["--config", str(folder / "recipe.yaml"), "--data.path", "digits"])
    assert made.card.about == (folder / "README.md").read_text().strip()
    measured = (folder / "records.jsonl").exists()
    assert measured != ("not yet run" in head)


# Its last stage is dilated over maps of 2 x 2: its weights have left the package, what was measured of it stays.
DEAD = "sslpp_resnet18_s32"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_weight_of_its_network_sees_data(folder):
    made = command.parse(["--config", str(folder / "recipe.yaml"), "--data.path", "digits"])
    network = B.create(made.model, made.data.size, pretrained=False)
    assert bool(operations.dead_taps(network, made.data.size)) == folder.name.startswith(DEAD)


@pytest.mark.parametrize("name", timm.list_models("sslpp_*"))
def test_every_weight_of_an_entrypoint_sees_data(name):
    network = timm.create_model(name)
    assert not operations.dead_taps(network, network.pretrained_cfg["input_size"][-1])


@pytest.mark.parametrize(("name", "network"), FOR_A_GPU.items())
def test_its_first_steps_at_a_tiny_size(name, network, picture_folder, tmp_path):
    config = ROOT / "hub_configs" / name / "recipe.yaml"
    smaller = ["--model.name", network, "--data.size", "32", "--data.test_split", "test", "--data.val_fraction", "0.2"]
    smaller += ["--log.every", "1"]
    smaller += ["--clusters.k", "[3,5]", "--evaluate.knn_k", "[3]", "--evaluate.linear_c", "[0.1]"]
    smaller += ["--evaluate.residue_images", "8", "--run", str(tmp_path / "run")]
    for phase in ("proxy", "relearn"):
        smaller += [f"--{phase}.batch_size", "8", f"--{phase}.epochs", "0.5", f"--{phase}.lr", "0.0001"]
    done = call(main, "--config", config, "--data.path", picture_folder, *smaller)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 1, 2]
    assert re.search(r"sslpp +\d", done.stdout)
