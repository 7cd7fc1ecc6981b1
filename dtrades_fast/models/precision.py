"""Mixed precision: the network in float16 or bfloat16, its logits in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["HALF", "Autocast"]

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
