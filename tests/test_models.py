"""Entrypoints: what timm promises of its own models, of ours."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, load_state_dict, save_for_hf
from timm.models._manipulate import group_with_matcher

import sslpp_models
from sslpp_models import weights
from tests.conftest import ROOT
from training import records

TAGGED = timm.list_pretrained("sslpp_*")
PACKAGED = [name for name in TAGGED if weights.packaged(name).exists()]
NAMES = timm.list_models("sslpp_*")
LICENCES = {"apache-2.0"}


def images(name, size=None, channels=3, count=2):
    size = size or get_pretrained_cfg(name).input_size[-1]
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_lists_filters_tags_and_cfgs_answer_as_timms_own():
    assert {timm.models.get_arch_name(name) for name in TAGGED} == set(NAMES) == set(timm.list_models(module="sslpp"))
    assert {name.split("_")[1] for name in NAMES} >= {"resnet10t", "convnext"}
    assert timm.list_models("sslpp_resnet*", pretrained=True) == [n for n in TAGGED if "resnet" in n]
    for name in TAGGED:
        architecture, tag = name.split(".")
        cfg = get_pretrained_cfg(name)
        assert timm.is_model_pretrained(architecture)
        assert timm.is_model_pretrained(name)
        assert (cfg.architecture, cfg.tag, cfg.num_classes) == (architecture, tag, 0)
        assert name in get_arch_pretrained_cfgs(architecture)
        assert cfg.license in LICENCES
        assert cfg.paper_ids
        assert cfg.first_conv
        assert cfg.classifier
        data = timm.data.resolve_model_data_config(timm.create_model(architecture))
        assert data["input_size"] == cfg.input_size
        assert (data["mean"], data["std"], data["crop_pct"]) == (cfg.mean, cfg.std, cfg.crop_pct)


def test_what_is_published_is_registered_and_the_other_way_round_and_small():
    listed = dict(line.split()[::-1] for line in (weights.FOLDER / "SHA256SUMS").read_text().splitlines())
    assert set(listed) == {f"{name}.safetensors" for name in TAGGED}
    sizes = []
    for file, sha256 in listed.items():
        if not (weights.FOLDER / file).exists():  # too large for the package
            continue
        content = (weights.FOLDER / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        sizes.append(len(content) / 1e6)
    assert max(sizes) <= 25
    assert sum(sizes) <= 60
    assert all(name in (weights.FOLDER / "README.md").read_text() for name in TAGGED)
    assert {path.suffix for path in weights.FOLDER.iterdir()} <= {".safetensors", "", ".md"}


@pytest.mark.parametrize("name", PACKAGED)
def test_its_records_were_measured_on_these_weights(name):
    rows = records.read(ROOT / "hub_configs" / name / "records.jsonl")
    assert {row["weights_sha256"] for row in rows if row["arm"] == "sslpp"} == {weights.published(name)}


@pytest.mark.parametrize("name", PACKAGED)
def test_the_size_that_timm_tests_it_at_is_the_one_that_it_was_measured_at(name):
    network = timm.create_model(name)
    larger = records.read(ROOT / "hub_configs" / name / "larger.jsonl")
    size = timm.data.resolve_model_data_config(network, use_test_size=True)["input_size"][-1]
    assert {(row["size"], row["weights_sha256"]) for row in larger} <= {(size, weights.published(name))}
    assert bool(larger) == (size > network.pretrained_cfg["input_size"][-1])


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("pretrained", [True, False])
def test_networks_of_every_kind_are_created(name, pretrained):
    for channels in (1, 3, 4):
        for classes in (0, 10):
            network = timm.create_model(name, pretrained=pretrained, in_chans=channels, num_classes=classes).eval()
            with torch.no_grad():
                out = network(images(name, channels=channels))
            assert out.shape == (2, classes or network.num_features)
            assert torch.isfinite(out).all()
    for keyword in ({"global_pool": "max"}, {"drop_path_rate": 0.2}, {"drop_rate": 0.2}, {"output_stride": 8}):
        network = timm.create_model(name, pretrained=pretrained, **keyword).eval()
        assert network(images(name)).shape == (2, network.num_features)


@pytest.mark.parametrize("name", PACKAGED)
def test_its_cfg_tells_the_network_as_timm_tests_its_own(name):
    network = timm.create_model(name, num_classes=10).eval()
    cfg, state = network.default_cfg, network.state_dict()
    with torch.no_grad():
        assert network.forward_features(images(name)).shape[-2:] == cfg["pool_size"]
        network.reset_classifier(0)
        assert network(images(name)).shape == (2, network.num_features)
        network.reset_classifier(0, "")
        assert network(images(name)).shape[-2:] == cfg["pool_size"]
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['classifier']}.weight" not in network.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    larger = 2 * cfg["input_size"][-1]
    pooled, changed = timm.layers.apply_test_time_pool(
        timm.create_model(name, num_classes=10), {"input_size": (3, larger, larger)}
    )
    assert (changed, pooled.eval()(images(name, larger)).shape) == (True, (2, 10))


@pytest.mark.parametrize("name", PACKAGED)
def test_every_backbone_weight_is_the_published_one(name):
    published = load_file(weights.packaged(name))
    for classes in (0, 10):
        found = timm.create_model(name, pretrained=True, num_classes=classes).state_dict()
        own = {key for key in found if not key.startswith(get_pretrained_cfg(name).classifier)}
        assert own == set(published)
        assert all(torch.equal(found[key], published[key].to(found[key].dtype)) for key in own)
    feature_maps = timm.create_model(name, pretrained=True, features_only=True)
    values = {tuple(value.shape): value for value in feature_maps.state_dict().values()}
    first = f"{get_pretrained_cfg(name).first_conv}.weight"
    assert torch.equal(values[tuple(published[first].shape)], published[first].float())


@pytest.mark.parametrize("name", PACKAGED)
def test_feature_maps_intermediates_and_sizes(name):
    network = timm.create_model(name, pretrained=True).eval()
    size = get_pretrained_cfg(name).input_size[-1]
    for side in (size, size + 32):
        batch = images(name, side)
        with torch.no_grad():
            last, maps = network.forward_intermediates(batch)
            again = timm.create_model(name, pretrained=True, features_only=True).eval()(batch)
            assert torch.allclose(last, network.forward_features(batch), atol=1e-5)
            assert torch.allclose(network.forward_head(last), network(batch), atol=1e-5)
        channels = [info["num_chs"] for info in network.feature_info]
        assert [m.shape[1] for m in maps] == channels
        for one, other in zip(again, maps, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    chosen = timm.create_model(name, features_only=True, out_indices=(0, 2))
    assert chosen.feature_info.channels() == [channels[0], channels[2]]


@pytest.mark.parametrize("name", PACKAGED)
def test_saved_loaded_and_grouped(name, tmp_path):
    network = timm.create_model(name, pretrained=True, num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    again = timm.create_model(name, num_classes=7, checkpoint_path=tmp_path / "own.safetensors").eval()
    assert torch.equal(network(images(name)), again(images(name)))
    groups = group_with_matcher(network.named_parameters(), network.group_matcher(), reverse=True)
    assert set(groups) == {key for key, _ in network.named_parameters()}
    head = f"{get_pretrained_cfg(name).classifier}.weight"
    assert groups[head] == max(groups.values()) >= 4


def test_what_timm_saves_of_them_loads_without_this_package(tmp_path):
    expected = {}
    for name in PACKAGED:
        network = timm.create_model(name, pretrained=True).eval()
        save_for_hf(network, tmp_path / name, safe_serialization=True)
        np.save(tmp_path / name / "batch.npy", images(name).numpy())
        with torch.no_grad():
            expected[name] = network(images(name)).numpy()
    code = """
import sys; sys.modules["sslpp_models"] = None
import numpy, timm, torch
for name in sys.argv[1:]:
    batch = torch.from_numpy(numpy.load(f"{name}/batch.npy"))
    with torch.no_grad():
        numpy.save(f"{name}/out.npy", timm.create_model(f"local-dir:{name}", pretrained=True).eval()(batch).numpy())
"""
    subprocess.run([sys.executable, "-c", code, *PACKAGED], cwd=tmp_path, check=True)
    for name in PACKAGED:
        assert np.array_equal(np.load(tmp_path / name / "out.npy"), expected[name]), name


@pytest.mark.parametrize("name", PACKAGED)
def test_torch_export_and_onnx_give_equal_outputs(name, tmp_path):
    network = timm.create_model(name, pretrained=True, num_classes=10).eval()
    batch = images(name)
    with torch.no_grad():
        expected = network(batch)
        exported = torch.export.export(network, (batch,))
        assert torch.allclose(exported.module()(batch), expected, atol=1e-5)
        torch.onnx.export(network, (batch,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
    assert np.allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", PACKAGED)
def test_what_a_keyword_adds_to_the_head_may_be_new_and_placement_is_not_saved(name, tmp_path):
    if "convnext" in name:
        network = timm.create_model(name, pretrained=True, num_classes=3, head_hidden_size=8)
        assert network(images(name)).shape == (2, 3)
    save_for_hf(timm.create_model(name, device=torch.device("cpu")), tmp_path, safe_serialization=True)
    assert '"device"' not in (tmp_path / "config.json").read_text()


def test_a_tag_that_does_not_exist_is_told_what_there_is():
    for name in NAMES:
        for pretrained in (True, False):
            with pytest.raises(RuntimeError, match=next(n for n in TAGGED if n.startswith(name))):
                timm.create_model(f"{name}.none", pretrained=pretrained)


DEEPER = {"resnet": {"layers": (3, 2, 2, 2)}, "convnext": {"depths": (3, 2, 4, 2)}}  # others have no such keyword


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PACKAGED for kind in DEEPER if kind in name])
def test_parts_that_the_weights_do_not_have_are_an_error(name, kind):
    more = DEEPER[kind]
    for classes in (0, 10):
        with pytest.raises(RuntimeError, match=r"layer1\.[12]|stages.0.blocks.2"):
            timm.create_model(name, pretrained=True, num_classes=classes, **more)
    for lenient in ({}, {"pretrained_strict": False}, {"pretrained_cfg_overlay": {"num_classes": 10}}):
        with pytest.raises(RuntimeError, match="Missing key"):
            timm.create_model(name, pretrained=True, features_only=True, **lenient, **more)
        assert timm.create_model(name, pretrained=True, features_only=True, num_classes=10, **lenient)
    timm.create_model(name, **more)


def test_weights_and_cfgs_of_the_callers_own(tmp_path):
    name = PACKAGED[0]
    other = timm.create_model(name)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for overlay in ({"file": str(tmp_path / "other.safetensors")}, {"state_dict": other.state_dict()}):
        found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), other.parameters(), strict=True))
    published = load_state_dict(weights.packaged(name))
    for cleared in ("url", "hf_hub_id", "state_dict"):
        found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={cleared: None})
        assert all(torch.equal(p, published[key].float()) for key, p in found.named_parameters())
    cfg = get_pretrained_cfg(name)
    bare = {"file": cfg.file, "tag": cfg.tag, "num_classes": 0, "classifier": None}
    for given in (cfg, cfg.to_dict(), bare):
        found = timm.create_model(name.split(".")[0], pretrained=True, pretrained_cfg=given)
        assert all(torch.equal(p, published[key].float()) for key, p in found.named_parameters())


def elsewhere(tmp_path, code, **env):
    """Run code against a copy of the package in tmp_path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **env},
        capture_output=True,
        text=True,
    )


def test_importing_it_touches_no_network_and_little_beside_timm(tmp_path):
    code = """
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("the network was touched")
import timm
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
before = set(sys.modules)
import sslpp_models
print(*sorted(set(sys.modules) - before))
timm.create_model(timm.list_pretrained("sslpp_*")[0], pretrained=True)
"""
    done = elsewhere(ROOT, code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"sslpp_models", "sslpp_models.sslpp", "sslpp_models.weights"}


def test_timms_scripts_need_only_the_import(picture_folder):
    # What validate.py and train.py of timm do with a name and a folder, once the package is imported.
    name = NAMES[0]
    assert timm.is_model(name)
    model = timm.create_model(name, pretrained=True, num_classes=4, in_chans=3, global_pool=None, drop_rate=0.1)
    config = timm.data.resolve_data_config({"model": name}, model=model, use_test_size=True)
    sides = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"], "num_workers": 0}
    shared = {**sides, "interpolation": config["interpolation"], "use_prefetcher": False, "device": torch.device("cpu")}
    found = timm.data.create_dataset("", root=str(picture_folder), split="test", class_map="")
    images, labels = next(iter(timm.data.create_loader(found, batch_size=4, crop_pct=config["crop_pct"], **shared)))
    with torch.no_grad():
        assert model.eval()(images).shape == (4, 4)
    found = timm.data.create_dataset("", root=str(picture_folder), split="train", is_training=True)
    images, labels = next(iter(timm.data.create_loader(found, batch_size=4, is_training=True, **shared)))
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.01, layer_decay=0.7)
    before = model.get_classifier().weight.clone()
    torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    assert not torch.equal(before, model.get_classifier().weight)


def test_damaged_weights_load_nothing_and_say_which_file(tmp_path):
    name = TAGGED[0]
    shutil.copytree(Path(sslpp_models.__file__).parent, tmp_path / "sslpp_models")
    file = tmp_path / "sslpp_models" / "weights" / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code = f"""
import timm, sslpp_models
from sslpp_models.weights import WeightsError
for keywords in (dict(num_classes=10), dict(features_only=True), dict(pretrained_cfg_overlay=dict(tag="other"))):
    try:
        timm.create_model({name!r}, pretrained=True, **keywords)
    except WeightsError as error:
        print(error)
"""
    done = elsewhere(tmp_path, code)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith(f"{file} is not what was published")
        assert "install sslpp-models again" in line
