"""Train, push, and load in a fresh process as anyone would: over a Hub that speaks the real one's API."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from huggingface_hub import constants

import sslpp_models
from tests.conftest import call, make_images
from training import backbone as B
from training import finetune, push

NAME = timm.list_pretrained("sslpp_*")[0]


def publish(folder, repo, *options):
    done = call(push.main, folder, repo, *options)
    assert done.returncode == 0, done.stderr


def fresh(hub, home, code, **more):
    """Run code in a fresh process, in `home`; what it printed last, from JSON."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env = {**known, **switches, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(home), **more}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def features(network, batch):
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    with torch.no_grad():
        return network.eval()(batch).numpy()


WITHOUT_THIS_PACKAGE = """
import sys; sys.modules["sslpp_models"] = sys.modules["training"] = None
import json, os, numpy, timm, torch, transformers

batch, first = torch.from_numpy(numpy.load("batch.npy")), open("first").read()

def save(name, network):
    # The same place in memory for equal weights: their alignment decides the last bits of a product.
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    with torch.no_grad():
        out = network.eval()(batch)
    numpy.save(name, getattr(out, "pooler_output", out).numpy())

def why(model):
    try:
        timm.create_model(model, pretrained=True)
    except Exception as error:
        return type(error).__name__
    return "loaded"

save("timm", timm.create_model("hf-hub:org/net", pretrained=True))
save("pinned", timm.create_model(f"hf-hub:org/net@{first}", pretrained=True))
save("transformers", transformers.AutoModel.from_pretrained("org/net"))
told = {"stranger": why("hf-hub:org/secret"), "no revision": why("hf-hub:org/net@none")}
os.environ["HF_TOKEN"] = "write-alice"
save("secret", timm.create_model("hf-hub:org/secret", pretrained=True))
told["truncated"] = [why("hf-hub:org/cut"), why("hf-hub:org/cut")]
told["head"] = timm.create_model("hf-hub:org/net", pretrained=True, num_classes=3).num_classes
told["maps"] = len(timm.create_model("hf-hub:org/net", pretrained=True, features_only=True)(batch))
print(json.dumps(told))
"""


def test_train_push_and_load_without_this_package(hub, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    publish(tmp_path / "run", "org/net")
    publish(tmp_path / "run", "org/secret", "--private")
    publish(tmp_path / "run", "org/cut")
    (tmp_path / "first").write_text(hub.repos["org/net"].refs["main"])
    old = B.load(tmp_path / "run" / "hub")
    new = B.load(tmp_path / "run" / "hub")
    with torch.no_grad():
        next(new.parameters()).mul_(1.5)
    B.save(new, tmp_path / "run" / "hub", make_images())
    publish(tmp_path / "run", "org/net")

    batch = torch.rand(3, 3, 16, 16)
    np.save(tmp_path / "batch.npy", batch.numpy())
    hub.fault("GET /org/cut/.*/model.safetensors", "short", 1)
    told = fresh(hub, tmp_path, WITHOUT_THIS_PACKAGE)
    old, new = features(old, batch), features(new, batch)
    assert not np.array_equal(old, new)
    for name, expected in (("timm", new), ("pinned", old), ("transformers", new), ("secret", old)):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected), name
    assert told["stranger"] == "RepositoryNotFoundError"
    assert told["no revision"] == "RevisionNotFoundError"
    assert told["truncated"][0] != "loaded" == told["truncated"][1]
    assert (told["head"], told["maps"]) == (3, 5)


def test_a_backbone_on_the_hub_is_fine_tuned_as_its_card_says(hub, finished, picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    publish(finished[0], "org/net")
    options = ["--epochs", "1", "--batch_size", "8", "--run", tmp_path / "tuned"]
    done = call(finetune.main, "hf-hub:org/net", "--data.path", picture_folder, *options)
    assert done.returncode == 0, done.stderr
    assert any("/resolve/main/model.safetensors" in request for request in hub.requests)
    assert timm.create_model(f"local-dir:{tmp_path / 'tuned' / 'last'}", pretrained=True).num_classes == 4


OVER_XET = """
import json, numpy, timm, torch

network = timm.create_model("hf-hub:org/net", pretrained=True)
print(json.dumps({name: float(value.double().sum()) for name, value in network.state_dict().items()}))
"""


def test_weights_pushed_over_xet_load_over_xet(hub, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = str(tmp_path / "cas")
    shutil.copytree(finished[0], tmp_path / "run")
    publish(tmp_path / "run", "org/net")
    hub.index_xet(tmp_path / "run" / "hub" / "model.safetensors")
    told = fresh(hub, tmp_path, OVER_XET, HF_HUB_DISABLE_XET="0")
    expected = B.load(tmp_path / "run" / "hub").state_dict()
    assert told == {name: float(value.double().sum()) for name, value in expected.items()}
    assert any("xet-read-token" in request for request in hub.requests)
    sent = [request for request in hub.requests if request.startswith(("PUT", "GET")) and "safetensors" in request]
    assert not any("/lfs/" in request for request in hub.requests)
    assert not sent


BY_ITS_NAME = """
import json, re, numpy, timm, torch, sslpp_models
from pathlib import Path

def why():
    try:
        timm.create_model("NAME", pretrained=True, num_classes=10, cache_dir="cache")
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
    return "loaded"

told = [why(), why(), why()]
Path(re.search(r"delete (\\S+) and load again", told[-1]).group(1)).unlink()
told += [why(), why()]
network = timm.create_model("NAME", pretrained=True, cache_dir="cache")
network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
with torch.no_grad():
    numpy.save("named", network.eval()(torch.from_numpy(numpy.load("batch.npy"))).numpy())
print(json.dumps(told))
""".replace("NAME", NAME)


def test_a_registered_name_loads_from_the_hub_what_was_published_and_nothing_else(hub, tmp_path):
    # The package as it is for weights that are too large to travel in it.
    shutil.copytree(Path(sslpp_models.__file__).parent, tmp_path / "sslpp_models")
    repo = tmp_path / "repo"
    repo.mkdir()
    B.save(timm.create_model(NAME, pretrained=True), repo, make_images(size=32))
    shutil.move(tmp_path / "sslpp_models" / "weights" / f"{NAME}.safetensors", repo / "model.safetensors")
    (repo / "README.md").write_text("card")
    publish(repo, f"org/{NAME}")
    batch = torch.rand(3, 3, 32, 32)
    np.save(tmp_path / "batch.npy", batch.numpy())

    hub.fault("GET .*/model.safetensors", "short", 1)
    hub.fault("GET .*/model.safetensors", "flip", 1)
    truncated, corrupted, cached, *mended = fresh(hub, tmp_path, BY_ITS_NAME, SSLPP_HUB_ORG="org")
    assert f"org/{NAME} could not be fetched" in truncated  # the client noticed, and kept nothing
    assert "is not what was published" in corrupted  # which only the published sha256 can tell
    assert cached == corrupted  # the client hands out what lies in its cache
    assert mended == ["loaded", "loaded"]
    assert np.array_equal(np.load(tmp_path / "named.npy"), features(B.load(repo), batch))
