"""The moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["MovingAverage"]


class MovingAverage(AveragedModel):
    """Torch's exponential moving average of parameters and buffers, updated without making the host wait.

    Torch's own update copies its counter to the device each time, for which the host stops until the device is done.

    Args:
        model: what is averaged; a copy of it is :attr:`module`.
        decay: share of the average that a step keeps.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averages, currents = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = list(zip(averages, currents, strict=True))
        if self.n_averaged == 0:  # which lies on the host
            for average, current in pairs:
                average.copy_(current)
        else:
            for floating in (True, False):  # one launch or a few for all tensors of a kind
                if chosen := [pair for pair in pairs if pair[0].is_floating_point() == floating]:
                    self.average(*map(list, zip(*chosen, strict=True)), self.n_averaged)
        self.n_averaged += 1
