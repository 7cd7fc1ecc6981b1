"""A network with a random forward pass, as attacks have to see it: averaged over many passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Averaged"]


class Averaged(nn.Module):
    """The mean of a network's logits over several forward passes (Athalye et al. 2018, expectation over randomness).

    Its gradient is the mean of the passes' gradients, which is what an attack on a random defense needs.

    Args:
        network: maps images in [0, 1] to logits, with random numbers of its own.
        passes: how many.

    Raises:
        ValueError: fewer than one pass.
    """

    def __init__(self, network: nn.Module, passes: int = 20):
        super().__init__()
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.network, self.passes = network, passes

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.network(images) for _ in range(self.passes)]).mean(0)
