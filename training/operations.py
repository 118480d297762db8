"""What a network computes: its floating-point operations, and the taps of its convolutions that meet no data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .extraction import evaluating

LARGE = 7  # side of a depthwise kernel from which on maps are better contiguous


def forward_flops(network: nn.Module, size: int) -> float:
    """Floating-point operations of one image's forward pass, a multiply-add counting two."""
    device = next(network.parameters()).device
    # With gradients, which the counter's hooks ask for behind attention that pools.
    with evaluating(network), torch.enable_grad(), counting_flops() as counter:
        network(torch.zeros(1, 3, size, size, device=device))
    return float(counter.get_total_flops())


@torch.no_grad()
def passes(network: nn.Module, size: int, kinds: tuple[type, ...]) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, module, input and output of every module of some kinds that an image of `size` px passes."""
    found: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def remember(name: str) -> Callable:
        return lambda module, inputs, output: found.append((name, module, inputs[0], output))

    hooks = [m.register_forward_hook(remember(n)) for n, m in network.named_modules() if isinstance(m, kinds)]
    try:
        with evaluating(network):
            network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def dead_taps(network: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Convolutions with taps that meet nothing but padding, so that their weights never see data.

    Args:
        network: a timm model.
        size: working size, px.

    Returns:
        For each by its name, how many of the kernel's taps, and how many it has.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, conv, into, out in passes(network, size, (nn.Conv2d,)):
        alive = 1
        for axis in (0, 1):
            kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
            source, target = into.shape[2 + axis], out.shape[2 + axis]
            # As much as the output needs, half of it before: what numbers, "same" and timm's own "same" come to.
            padding = max(0, (target - 1) * stride + (kernel - 1) * dilation + 1 - source) // 2
            if not isinstance(conv.padding, str) and any(conv.padding):
                padding = conv.padding[axis]
            places = [[o * stride - padding + t * dilation for o in range(target)] for t in range(kernel)]
            alive *= sum(any(0 <= place < source for place in tap) for tap in places)
        total = conv.kernel_size[0] * conv.kernel_size[1]
        if alive < total:
            found[name] = total - alive, total
    return found


def suited(network: nn.Module, size: int) -> tuple[torch.memory_format, bool]:
    """How a network likes its maps in memory, and whether a CPU's bf16 units serve it; a rule by what was measured.

    Channels last where convolutions do most of the multiply-adds, unless depthwise ones are large, as ConvNeXts' are;
    else contiguous. Depthwise convolutions are slower in bf16 than in fp32. oneDNN 3.12 leaves bf16 gradients of
    weights that meet nothing but padding unwritten, as strides below a pixel do.
    """
    convolved = linear = 0
    depthwise = 0  # largest kernel
    for _, module, _, out in passes(network, size, (nn.Conv2d, nn.Linear)):
        if isinstance(module, nn.Conv2d):
            convolved += out[0, 0].numel() * module.weight.numel()
            if module.groups == module.in_channels > 1:
                depthwise = max(depthwise, *module.kernel_size)
        else:
            linear += out.numel() // module.out_features * module.weight.numel()
    last = convolved >= linear and depthwise < LARGE
    bf16 = not depthwise and size >= network.feature_info[-1]["reduction"]
    return torch.channels_last if last else torch.contiguous_format, bf16


def on_device(network: nn.Module, device: torch.device, size: int) -> nn.Module:
    """A network on a device, in the memory format that suits it at a size, px; so that it gives the same everywhere."""
    return network.to(device, memory_format=suited(network, size)[0])


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count floating-point operations; those of fused attention, too, which torch counts on some devices only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
