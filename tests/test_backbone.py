"""Backbones of many families: stages, features, low and high, a fresh high part, folders that timm loads."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath

from tests.conftest import make_images
from training import backbone as B
from training import extraction
from training.extraction import extract, features, plain_batch
from training.files import Failed, Refused
from training.pixels import Pixels
from training.recipe import Model, Views

FAMILIES = {
    "test_resnet": {},
    "test_vit": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "vgg11_bn": {"mlp_ratio": 1 / 64},  # without it 120 million weights
    "repvgg_a0": {},
    "regnetx_002": {},
    "resnet18": {"channels": [8, 16, 24, 32], "output_stride": 8},
}


def build(name, size=32, **args):
    torch.manual_seed(0)
    return B.create(Model(name, {**FAMILIES.get(name, {}), **args}), size)


@pytest.mark.parametrize("name", FAMILIES)
def test_pooled_features_are_the_models_own_and_a_stages_are_means_of_its_map(name):
    network, batch = build(name).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = features(network, batch, B.stage_list(network))
        assert torch.equal(found["pooled"], network(batch))
        maps = network.forward_intermediates(batch, norm=False, intermediates_only=True)
    for stage in B.stage_list(network):
        assert torch.allclose(found[stage], maps[stage].mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_low_part_is_what_changes_a_stages_features(name):
    network, batch = build(name).eval(), torch.randn(2, 3, 32, 32)
    stages = B.stage_list(network)
    parts = [B.low_names(network, stage, 32) for stage in stages]
    assert all(one <= other for one, other in itertools.pairwise(parts))
    stage = stages[len(stages) // 2]
    low = parts[stage]
    names = {n for n, _ in (*network.named_parameters(), *network.named_buffers())}
    assert low < names
    before = features(network, batch, [stage])[stage].detach()
    torch.manual_seed(1)
    B.reinit(network, names - low, B.create(Model(name, FAMILIES[name]), 32))
    assert torch.equal(features(network, batch, [stage])[stage], before)
    for name_of, parameter in network.named_parameters():
        if name_of in low and parameter.ndim > 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    assert not torch.allclose(features(network, batch, [stage])[stage], before, atol=1e-4)


def test_asking_for_the_low_part_changes_nothing():
    network = build("test_resnet").train()
    next(network.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    B.low_names(network, 1, 32)
    assert network.training
    assert not next(network.parameters()).requires_grad
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_batch_norm_buffers_go_with_their_module():
    network = build("resnet18")
    low = B.low_names(network, 2, 32)
    assert {"bn1.running_mean", "layer2.1.bn2.running_var"} <= low
    assert "layer3.0.bn1.running_mean" not in low


def test_buffers_of_modules_without_parameters_go_with_what_comes_out_of_these():
    network = build("resnet18")
    for layer in (network.layer1, network.layer2, network.layer4):
        layer[0].bn1 = torch.nn.BatchNorm2d(layer[0].bn1.num_features, affine=False)
    low = B.low_names(network, 2, 32)
    assert {"layer1.0.bn1.running_mean", "layer2.0.bn1.running_var"} <= low
    assert "layer4.0.bn1.running_mean" not in low


def test_reinit_takes_the_constructors_initialisation():
    network, fresh = build("resnet18"), None
    for parameter in network.parameters():
        parameter.data.fill_(7.0)
    torch.manual_seed(3)
    fresh = B.create(Model("resnet18", FAMILIES["resnet18"]), 32)
    low = B.low_names(network, 2, 32)
    B.reinit(network, {n for n, _ in network.named_parameters()} - low, fresh)
    state, new = network.state_dict(), fresh.state_dict()
    assert torch.equal(state["layer4.1.conv2.weight"], new["layer4.1.conv2.weight"])
    assert (state["layer1.0.conv1.weight"] == 7).all()
    B.reinit(network, {"layer1.0.conv1.weight", "bn1.num_batches_tracked"}, fresh, keep=0.25)
    expected = 0.25 * 7 + 0.75 * new["layer1.0.conv1.weight"]
    assert torch.allclose(network.state_dict()["layer1.0.conv1.weight"], expected)


@pytest.mark.parametrize(("low_norm", "moves"), [("train", True), ("eval", False)])
def test_a_frozen_low_part_normalises_as_asked(low_norm, moves):
    network = build("resnet18").train()
    low = B.low_names(network, 2, 32)
    B.set_frozen_mode(network, low, low_norm)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(torch.randn(4, 3, 32, 32) + 1)
    after = network.state_dict()
    assert torch.equal(after["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"]) != moves
    assert not torch.equal(after["layer4.0.bn1.running_mean"], before["layer4.0.bn1.running_mean"])


def test_estimated_statistics_are_the_data_s(tiny):
    network = build("resnet18", 16)
    B.estimate_norm(network, tiny, torch.device("cpu"), batch_size=64)
    batch = plain_batch(tiny, tiny.train, torch.device("cpu"))
    with torch.no_grad():
        first = network.conv1(batch)
    assert torch.allclose(network.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-4)
    assert network.bn1.momentum == 0.1


def test_features_are_extracted_in_order_whatever_the_batch(tiny, context):
    network = build("test_resnet", 16).eval()
    one = extract(network, tiny, tiny.all, context.accelerator, 64, [1])
    other = extract(network, tiny, tiny.all, context.accelerator, 7, [1])
    assert one["pooled"].shape[0] == len(tiny)
    for key in one:
        assert torch.allclose(one[key], other[key], atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet18"])
def test_a_saved_folder_is_the_same_model_to_timm(name, tmp_path):
    images, network = make_images(size=32), build(name).eval()
    B.save(network, tmp_path, images, tag="x")
    batch = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), network(batch))
        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()(batch).shape == (2, 7)
        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)(batch[:, :1]).shape[0] == 2
        maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()(batch)
    last = B.stage_list(network)[-1]
    assert torch.allclose(maps[-1].mean((2, 3)), features(network, batch, [last])[last], atol=1e-4)
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config["mean"]) == images.mean
    assert tuple(config["std"]) == images.std
    assert config["crop_pct"] == images.crop_pct
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Model("resnet81"), "model.name"),
        (Model("resnet18", {"chanels": 3}), "model.args"),
        (Model("resnet18", {"global_pool": ""}), r"model.args: .* gives \[512, 1, 1\] for an image"),
        (Model("local-dir:/nowhere", pretrained=True), "model.name"),
        (Model("nosource:x"), "model.name"),
    ],
)
def test_what_timm_cannot_build_is_refused(model, named):
    with pytest.raises(Refused, match=named):
        B.create(model, 32)


def test_a_transformer_of_one_size_is_built_at_the_one_that_is_asked_for():
    network = B.create(Model("vit_tiny_patch16_224"), 64)
    assert network.pos_embed.shape[1] == 1 + (64 // 16) ** 2


def test_a_stage_that_is_not_there_is_refused():
    network = build("test_resnet")
    assert B.resolve_stage(network, -1, "x") == 4
    with pytest.raises(Refused, match=r"relearn\.split: 5"):
        B.resolve_stage(network, 5, "relearn.split")


def test_a_frozen_low_part_takes_its_dropout_along_and_leaves_the_high_part_alone(context):
    network = B.create(Model("test_vit", args={"drop_path_rate": 0.5}), 16)
    count = len(B.stage_list(network))
    low = B.low_names(network, count // 2 - 1, 16)
    network.train()
    B.set_frozen_mode(network, low, "eval")
    drops = [module.training for module in network.modules() if isinstance(module, DropPath)]
    assert set(drops) == {True, False}
    assert drops == sorted(drops)  # frozen ones first
    modes = [module.training for module in network.modules()]
    images = make_images()
    extract(network, images, images.all, context.accelerator, 16)
    assert [module.training for module in network.modules()] == modes


class Processes:
    """Threads that gather as processes do, under the few names of an Accelerator that this takes."""

    device = torch.device("cpu")

    def __init__(self, count):
        self.num_processes, self.place = count, threading.local()
        self.given, self.met = [None] * count, threading.Barrier(count)

    def gather(self, rows):
        self.given[self.place.number] = rows
        self.met.wait()
        every = torch.cat(self.given)
        self.met.wait()
        return every

    def run(self, work):
        def one(number):
            self.place.number = number
            return work(number)

        with ThreadPoolExecutor(self.num_processes) as pool:
            return list(pool.map(one, range(self.num_processes)))


def test_rows_of_processes_that_have_unequal_shares_come_together_in_order(monkeypatch):
    monkeypatch.setattr(extraction, "GATHERED", 12)  # two rows of two at a time, of each of three
    shares, processes = torch.arange(18.0).view(9, 2).split([2, 0, 7]), Processes(3)
    for found in processes.run(lambda number: extraction.gather(shares[number], processes)):
        assert torch.equal(found, torch.cat(shares))


@pytest.mark.parametrize("random", [None, (Views(), 3)])
def test_a_cpu_passes_no_more_images_forward_than_its_caches_hold(random, tiny, context, monkeypatch):
    network, seen = B.create(Model("test_resnet"), 16), []
    network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    whole = extract(network, tiny, tiny.all, context.accelerator, 16, random=random)["pooled"]
    assert seen == [16, 16, 8]
    monkeypatch.setattr(extraction, "LEAST", 1)
    monkeypatch.setattr(extraction, "CACHED", 5 * 16**2)
    torch.set_num_threads(1)
    seen.clear()
    parts = extract(network, tiny, tiny.all, context.accelerator, 16, random=random)["pooled"]
    assert seen == [5, 5, 5, 1, 5, 5, 5, 1, 5, 3]
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-6)  # and random views are drawn for as many as before


def test_random_views_of_a_long_picture_are_the_same_however_a_pass_is_split(context, monkeypatch):
    tiny = make_images()
    flat, place = [], 0
    heights, widths, starts = (torch.zeros(len(tiny), dtype=torch.long) for _ in range(3))
    for i in range(len(tiny)):
        whole = tiny.pixels.picture(i)
        whole = whole.repeat(1, 1, 4) if i == 5 else whole
        heights[i], widths[i], starts[i] = *whole.shape[1:], place
        flat.append(whole.reshape(-1))
        place += whole.numel()
    tiny = dataclasses.replace(tiny, pixels=Pixels(torch.cat(flat), heights, widths, starts))
    network, random = B.create(Model("test_resnet"), 16), (Views(), 3)
    whole = extract(network, tiny, tiny.all, context.accelerator, 16, random=random)["pooled"]
    monkeypatch.setattr(extraction, "LEAST", 4)
    monkeypatch.setattr(extraction, "CACHED", 1)
    parts = extract(network, tiny, tiny.all, context.accelerator, 16, random=random)["pooled"]
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_last_features_are_those_of_the_whole_network_whatever_stages_are_asked_for():
    network = timm.create_model("hiera_tiny_224", num_classes=0, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(features(network, image, [1])["pooled"], network(image), atol=1e-5)


def test_a_folder_that_lacks_weights_is_not_loaded(tmp_path):
    B.save(B.create(Model("test_resnet"), 16), tmp_path, make_images())
    state = load_file(tmp_path / "model.safetensors")
    state.pop("layer3.0.conv1.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failed, match=r"layer3\.0\.conv1\.weight"):
        B.load(tmp_path)


def test_what_white_was_is_kept_with_a_backbone(tmp_path):
    for white in (None, 4095.0):
        B.save(B.create(Model("test_resnet"), 16), tmp_path, dataclasses.replace(make_images(), white=white))
        assert B.white_of(B.load(tmp_path)) == white


def test_the_fingerprint_of_tensors_is_of_names_types_shapes_and_contents():
    one = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    assert B.fingerprint(one) == B.fingerprint({name: value.clone() for name, value in one.items()})
    others = [
        {"a": one["a"].view(3, 2), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"].double(), "b": one["b"]},
        {"a": one["a"] + 1e-6, "b": one["b"]},
    ]
    assert len({B.fingerprint(x) for x in (one, *others)}) == 5
