"""Entrypoints in libraries that build on timm: they take ours as they take timm's own."""

import peft
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor

import sslpp_models  # noqa: F401  registers the backbones
from tests.test_models import PACKAGED, images


@pytest.mark.parametrize("name", PACKAGED)
def test_strides_are_those_of_the_family(name):
    network = timm.create_model(name, features_only=True)
    assert network.feature_info.reduction() in ([2, 4, 8, 16, 32], [4, 8, 16, 32])


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("depth", [3, 5])
def test_a_unet_over_it_starts_from_its_weights_and_learns(name, depth):
    depth = min(depth, len(timm.create_model(name).feature_info))
    widths = (64, 32, 16, 16, 8)[:depth]
    torch.manual_seed(0)
    network = smp.Unet(f"tu-{name}", encoder_weights=True, encoder_depth=depth, decoder_channels=widths, classes=2)
    backbone = timm.create_model(name, pretrained=True)
    first = f"{backbone.pretrained_cfg['first_conv']}.weight"
    taken = {tuple(value.shape): value for value in network.encoder.state_dict().values()}
    weight = backbone.state_dict()[first]
    assert torch.equal(taken[tuple(weight.shape)], weight)
    batch, target = images(name, 64), torch.randint(2, (2, 64, 64))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    losses = []
    for _ in range(5):
        out = network(batch)
        assert out.shape == (2, 2, 64, 64)
        losses.append(torch.nn.functional.cross_entropy(out, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", PACKAGED)
def test_adapters_train_a_little_of_it(name):
    network = timm.create_model(name, pretrained=True, num_classes=3)
    convolutions = {key: part for key, part in network.named_modules() if isinstance(part, torch.nn.Conv2d)}
    layers = [key for key, part in convolutions.items() if part.groups == 1][1:]  # peft takes no depthwise ones
    head = network.pretrained_cfg["classifier"]
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=layers, modules_to_save=[head]))
    trained, whole = adapted.get_nb_trainable_parameters()
    assert 0 < trained < 0.2 * whole
    adapted(images(name)).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PACKAGED)
def test_torchvision_reads_its_layers(name):
    network = timm.create_model(name, pretrained=True).eval()
    last = network.feature_info[-1]["module"]
    # As timm has it: padding that depends on the input, as the family of EfficientNet-Lite0 has it, is not traced.
    kept = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    with torch.no_grad():
        found = create_feature_extractor(network, {last: "map"}, tracer_kwargs=kept)(images(name))["map"]
        assert torch.equal(found, network.forward_intermediates(images(name), norm=False)[1][-1])
