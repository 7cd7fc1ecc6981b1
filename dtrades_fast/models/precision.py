"""Mixed precision: the network in float16 or bfloat16, its logits in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtrades_fast.models.folding import FoldedNetwork

__all__ = ["HALF", "Autocast", "cast_once"]

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Autocast(nn.Module):
    """A network in mixed precision with float32 logits, for the attack and the loss alike.

    Attributes:
        computes_in_half: gradients run through float16 and would lose what is small, see
            :func:`dtrades_fast.attacks.input_gradient`.
    """

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype):
        super().__init__()
        self.network, self.device_type, self.dtype = network, device.split(":")[0], dtype
        self.computes_in_half = dtype == torch.float16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype):
            logits = self.network(images)
        return logits.float()


class Float32(nn.Module):
    """A layer that computes in float32 within a network in mixed precision."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.layer(features.float())


def cast_once(network: FoldedNetwork, dtype: torch.dtype) -> FoldedNetwork:
    """The network made ready for :class:`Autocast`, in place.

    The folded convolutions' weights are cast here, not in each pass, and a linear layer that gives the logits stays in
    float32: its rounding, of 1 to 255 for bfloat16, would hide what a small step of an attack gains.
    """
    for layer in network.own_layers:
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype)
    graph = network.network.graph
    (last,) = graph.output_node().args
    if isinstance(last, torch.fx.Node) and last.op == "call_module":
        logits = network.network.get_submodule(str(last.target))
        if isinstance(logits, nn.Linear):
            network.network.set_submodule(str(last.target), Float32(logits))
    return network
