"""Max-pooling that stays fast when a network is compiled for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaxPool2d"]


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` with windows side by side, for whose gradient ``torch.compile`` takes PyTorch's kernel on a CPU.

    The code that it makes otherwise costs a VGG-16 more than compiling gains.

    Args:
        size: height, width and distance of the windows.
        ceil_mode: whether windows at the right and lower edge may be smaller, rather than left out.
    """

    def __init__(self, size: int, *, ceil_mode: bool = False) -> None:
        super().__init__(size, ceil_mode=ceil_mode)
        self.size = size

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and input.device.type == "cpu":
            return max_pool2d(input, self.size, self.ceil_mode)[0]
        return super().forward(input)


@torch.library.custom_op("dtrades_fast::max_pool2d", mutates_args=())
def max_pool2d(input: Tensor, size: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """The largest value of each window, and where it is."""
    return _forward(input, size, ceil_mode)


@torch.library.custom_op("dtrades_fast::max_pool2d_backward", mutates_args=())
def max_pool2d_backward(gradient: Tensor, input: Tensor, places: Tensor, size: int, ceil_mode: bool) -> Tensor:
    """The gradient, put where the largest values were."""
    window, padding, dilation = [size, size], [0, 0], [1, 1]
    return torch.ops.aten.max_pool2d_with_indices_backward(
        gradient, input, window, window, padding, dilation, ceil_mode, places
    )


@max_pool2d.register_fake
def _forward(input: Tensor, size: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    window, padding, dilation = [size, size], [0, 0], [1, 1]
    return torch.ops.aten.max_pool2d_with_indices(input, window, window, padding, dilation, ceil_mode)


@max_pool2d_backward.register_fake
def _(gradient: Tensor, input: Tensor, places: Tensor, size: int, ceil_mode: bool) -> Tensor:
    return torch.empty_like(input)


def _keep(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[1:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return max_pool2d_backward(gradient, *ctx.saved_tensors, *ctx.options), None, None


max_pool2d.register_autograd(_backward, setup_context=_keep)
