"""Operations are those that a network makes, and taps without data those whose weights change nothing."""

import pytest
import timm
import torch

import sslpp_models  # noqa: F401  registers the backbones
from training import backbone as B
from training import operations
from training.operations import forward_flops
from training.recipe import Model


def test_attention_counts_on_every_device():
    network = B.create(Model("test_vit", args={"img_size": 16}), 16)
    block = network.blocks[0]
    tokens, width = network.pos_embed.shape[1:]
    with operations.counting_flops() as counter, torch.no_grad():
        block.attn(torch.zeros(1, tokens, width))
    dense = 2 * tokens * (block.attn.qkv.weight.numel() + block.attn.proj.weight.numel())
    assert counter.get_total_flops() == dense + 2 * 2 * tokens * tokens * width  # queries by keys, weights by values


def naive_dead_taps(network, size):
    """Taps of which no weight changes the output when the input is all there: by setting each to something."""
    found = {}
    inputs = {}
    convs = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: inputs.update({n: i[0]})) for n, m in convs.items()]
    with torch.no_grad():
        network.eval()(torch.randn(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        image = torch.rand_like(inputs[name]) + 1
        weight = torch.zeros_like(conv.weight)
        dead = 0
        for row in range(weight.shape[2]):
            for column in range(weight.shape[3]):
                weight.zero_()[:, :, row, column] = 1
                with torch.no_grad():
                    old = conv.weight.clone()
                    conv.weight.copy_(weight)
                    with_tap = conv(image)
                    conv.weight.zero_()
                    dead += torch.equal(with_tap, conv(image))
                    conv.weight.copy_(old)
        if dead:
            found[name] = dead, weight.shape[2] * weight.shape[3]
    return found


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("resnet18", {"channels": [8, 8, 8, 8], "output_stride": 16}, 32),
        ("resnet18", {"channels": [8, 8, 8, 8]}, 32),
        ("resnet18", {"channels": [8, 8, 8, 8]}, 36),
        ("test_convnext", {}, 32),
        ("test_efficientnet", {}, 16),
        ("tf_efficientnet_lite0", {}, 40),
        ("mobilenetv1_100", {}, 32),
    ],
)
def test_taps_that_meet_no_data_are_those_whose_weights_change_nothing(name, args, size):
    network = B.create(Model(name, args), size)
    assert operations.dead_taps(network, size) == naive_dead_taps(network, size)


@pytest.mark.parametrize("name", ["test_vit3", "test_vit"])
def test_operations_are_counted_behind_attention_that_pools_and_where_nothing_learns(name):
    network = timm.create_model(name, num_classes=0)
    with torch.no_grad():
        free = forward_flops(network, network.pretrained_cfg["input_size"][-1])
    assert free == forward_flops(network.requires_grad_(False), network.pretrained_cfg["input_size"][-1]) > 0


def test_taps_without_data_are_counted():
    old = timm.create_model("resnet18", channels=(32, 64, 128, 256), output_stride=16, num_classes=0)
    dead = operations.dead_taps(old, 32)
    weights = dict(old.named_parameters())
    assert sum(weights[f"{n}.weight"].numel() * taps // total for n, (taps, total) in dead.items()) == 1_572_864
    assert operations.dead_taps(timm.create_model("resnet18"), 224) == {}


@pytest.mark.parametrize(
    ("name", "size", "memory_format", "bf16"),
    [
        ("resnet18", 96, torch.channels_last, True),
        ("resnet18", 16, torch.channels_last, False),  # strides below a pixel
        ("tf_efficientnet_lite0", 96, torch.channels_last, False),
        ("mobilenetv3_small_100", 96, torch.channels_last, False),
        ("convnext_atto", 96, torch.contiguous_format, False),
        ("vit_tiny_patch16_224", 224, torch.contiguous_format, True),
    ],
)
def test_what_suits_a_network_is_what_was_measured(name, size, memory_format, bf16):
    assert operations.suited(timm.create_model(name, num_classes=0), size) == (memory_format, bf16)
