"""Momentum iterative FGSM (Dong et al. 2018): steps along a mean of all gradients so far, which transfers better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast.attacks.base import Attack, Model, input_gradient
from dtrades_fast.attacks.objectives import CrossEntropy
from dtrades_fast.ops import pgd_step_
from dtrades_fast.profiling import span


@dataclass(frozen=True)
class MIFGSM(Attack):
    """``m <- decay m + g / ||g||_1``, then a step along ``m`` as in PGD, from the clean image, without random numbers.

    ``g`` is the gradient of the cross-entropy. The last image counts, whether or not an earlier one fooled the model:
    what has gone further fools other models more often.

    Args:
        epsilon: radius of the ball in pixel units.
        steps: number of steps.
        step_size: in pixel units; ``epsilon / steps`` if not given.
        decay: of the momentum, >= 0; 0 is iterative FGSM.
        norm: ``"linf"`` (steps along the sign of ``m``) or ``"l2"`` (along ``m / ||m||_2``).

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Dong et al. 2018, Boosting adversarial attacks with momentum.
    """

    epsilon: float
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0 in pixel units, got {self.epsilon}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be > 0 in pixel units, got {self.step_size}")
        if not self.decay >= 0:
            raise ValueError(f"decay must be >= 0, got {self.decay}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        step_size = self.epsilon / self.steps if self.step_size is None else self.step_size
        objective = CrossEntropy(labels)
        adv, momentum = images.detach().clone(), torch.zeros_like(images)
        for step in range(self.steps):
            with span("attack step", step + 1):
                gradient = input_gradient(model, adv, objective)
                size = torch.linalg.vector_norm(gradient, 1, dim=(1, 2, 3), keepdim=True)
                momentum.mul_(self.decay).addcdiv_(gradient, size.masked_fill(size == 0, 1))
                pgd_step_(adv, momentum, images, step_size, self.epsilon, norm=self.norm)
        return adv
