"""Optimizers and learning-rate schedules by name, all from torch; the schedules advance once per step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from dtrades_fast.config import Optimization

__all__ = ["create_optimizer", "create_schedule", "ramp"]


def create_optimizer(options: Optimization, parameters: Iterable[nn.Parameter], fused: bool = False) -> Optimizer:
    """``fused``: an update is one launch, and the loss scaler's verdict on it never leaves the device."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if options.optimizer == "adam":
        betas = (options.momentum, 0.999)
        return Adam(trained, options.lr, betas, weight_decay=options.weight_decay, fused=fused)
    sgd = SGD(
        trained,
        options.lr,
        options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=fused,
    )
    if fused and options.momentum:
        # Torch's fused update leaves the first momentum uninitialised if the loss scaler skips the first step.
        for parameter in trained:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def create_schedule(options: Optimization, optimizer: Optimizer, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    """Learning rate by step: drops at milestones, cosine to 0, constant, or 30 % up from lr / 25 and then down."""
    total = options.epochs * steps_per_epoch
    if options.schedule == "step":
        milestones = [epoch * steps_per_epoch for epoch in options.milestones]
        return lr_scheduler.MultiStepLR(optimizer, milestones, options.gamma)
    if options.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total)
    if options.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, options.lr, total, cycle_momentum=False)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def ramp(step: int, total_steps: int, share: float) -> float:
    """Factor on epsilon and step size at a step: linear up to 1 within the first ``share`` of all steps."""
    return min(1.0, (step + 1) / max(1.0, share * total_steps))
