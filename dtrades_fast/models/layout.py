"""Memory formats in which convolutions are fast.

Channels last is faster on GPUs with tensor cores, and on CPUs while feature maps are large. On CPUs it is slower for
many channels on few pixels. Milliseconds of PyTorch's (oneDNN's) float32 3x3 convolution, contiguous / channels last,
32 images, one thread of a processor with AVX-512:

    channels, pixels    forward       gradient to the input
    64, 32x32           16.9 / 10.8   19.2 / 11.1
    128, 16x16          11.5 / 10.1   11.7 / 10.1
    256, 8x8            10.8 / 10.3   11.0 / 10.4
    256, 4x4             2.8 /  3.8    2.5 /  3.9
    512, 4x4            11.0 / 19.3    9.8 / 19.7
    512, 2x2             4.0 / 12.4    3.7 / 12.8
    128, 4x4            0.73 / 0.65   0.65 / 0.65

With AVX2 alone (``ONEDNN_MAX_CPU_ISA=AVX2``) they are alike but for 512 channels on 2x2: 7.9 / 12.2, 12.1 / 12.8. In
bfloat16 channels last is faster throughout. ``python bench/bench_layout.py`` measures such a table.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dtrades_fast.attacks.base import eval_mode

__all__ = ["contiguous_input", "lay_out"]

#: Convolutions of at least so many channels that give at most so many pixels are contiguous on CPUs.
MANY_CHANNELS, FEW_PIXELS = 256, 16


def contiguous_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: what comes in channels last goes on contiguous."""
    return tuple(x.contiguous() for x in inputs)


def lay_out(
    network: nn.Module, images: Tensor, layers: Iterable[nn.Module] | None = None, *, half: bool = False
) -> None:
    """Give convolutions the memory format in which they are fast; the network computes the same within rounding.

    Args:
        network: maps images to logits; wants them channels last from now on.
        images: [N, C, H, W], a few, of the size that it is for.
        layers: modules of the network whose convolutions are laid out; all of it by default.
        half: they will compute in half precision.
    """
    convolutions = [m for layer in layers or [network] for m in layer.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        return
    slow = images.device.type == "cpu" and not half  # where there are few pixels
    few = few_pixels(network, images.to(convolutions[0].weight.dtype), convolutions) if slow else set()
    for convolution in convolutions:
        if convolution in few and min(convolution.in_channels, convolution.out_channels) >= MANY_CHANNELS:
            convolution.to(memory_format=torch.contiguous_format)
            if contiguous_input not in convolution._forward_pre_hooks.values():
                convolution.register_forward_pre_hook(contiguous_input)
        else:
            convolution.to(memory_format=torch.channels_last)


@torch.no_grad()
def few_pixels(network: nn.Module, images: Tensor, convolutions: Iterable[nn.Conv2d]) -> set[nn.Module]:
    """The convolutions that give few pixels for such images."""
    found: set[nn.Module] = set()

    def note(layer: nn.Module, inputs: object, result: Tensor) -> None:
        if result.shape[2:].numel() <= FEW_PIXELS:
            found.add(layer)

    hooks = [convolution.register_forward_hook(note) for convolution in convolutions]
    try:
        with eval_mode(network):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
