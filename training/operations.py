"""What a network computes: its floating-point operations, and the taps of its convolutions that meet no data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .backbone import evaluating


def forward_flops(network: nn.Module, size: int) -> float:
    """Floating-point operations of one image's forward pass, a multiply-add counting two."""
    device = next(network.parameters()).device
    with evaluating(network), torch.no_grad(), counting_flops() as counter:
        network(torch.zeros(1, 3, size, size, device=device))
    return float(counter.get_total_flops())


@torch.no_grad()
def dead_taps(network: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Convolutions with taps that meet nothing but padding, so that their weights never see data.

    Args:
        network: a timm model.
        size: working size, px.

    Returns:
        For each by its name, how many of the kernel's taps, and how many it has.
    """
    found: dict[str, tuple[int, int]] = {}

    def remember(name: str) -> Callable:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            alive = 1
            for axis in (0, 1):
                kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
                source, target = inputs[0].shape[2 + axis], output.shape[2 + axis]
                # As much as the output needs, half of it before: what numbers, "same" and timm's own "same" come to.
                padding = max(0, (target - 1) * stride + (kernel - 1) * dilation + 1 - source) // 2
                if not isinstance(conv.padding, str) and any(conv.padding):
                    padding = conv.padding[axis]
                places = [[o * stride - padding + t * dilation for o in range(target)] for t in range(kernel)]
                alive *= sum(any(0 <= place < source for place in tap) for tap in places)
            total = conv.kernel_size[0] * conv.kernel_size[1]
            if alive < total:
                found[name] = total - alive, total

        return hook

    hooks = [m.register_forward_hook(remember(n)) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    try:
        with evaluating(network):
            network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count floating-point operations; those of fused attention, too, which torch counts on some devices only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
