"""FMN (Pintor et al. 2021): gradient steps in a ball that shrinks where the model is fooled and grows elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast.attacks.apgd import TINY, Ball, length
from dtrades_fast.attacks.base import Attack, Model, gradient_and_logits
from dtrades_fast.attacks.nearest import Nearest, size
from dtrades_fast.attacks.objectives import Margin
from dtrades_fast.profiling import span

#: Last step and last change of the radius, as shares of the first ones.
LAST_STEP, LAST_GAMMA = 0.01, 0.02


@dataclass(frozen=True)
class FMN(Attack):
    """Smallest perturbation by ``steps`` looks at the model, the first at the clean image. Nothing is random.

    With ``g`` the gradient of the margin ``m = max_{i != y} z'_i - z'_y`` and ``q`` the dual norm, each look sets the
    radius of the ball to ``min(r (1 - gamma), smallest norm so far)`` where the model is fooled, elsewhere to
    ``r (1 + gamma)``, before the first success to ``max(r, ||delta|| + |m| / ||g||_q)(1 + gamma)``; then
    ``delta <- project(delta + alpha g / ||g||_2)`` onto ball and box. ``alpha`` and ``gamma`` fall along a half cosine,
    ``alpha`` to a hundredth and ``gamma`` to a fiftieth. Before the first success the paper has only the estimate
    ``||delta|| + |m| / ||g||_q``, which falls short of the boundary for good where the box cuts ``delta`` down.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        steps: number of looks.
        step_size: first ``alpha``, an L2 norm in pixel units for either ``norm``.
        gamma: first relative change of the radius.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Pintor, Roli, Brendel and Biggio 2021, Fast minimum-norm adversarial attacks through adaptive norm
    constraints.
    """

    norm: Literal["linf", "l2"] = "linf"
    steps: int = 200
    step_size: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not self.step_size > 0:
            raise ValueError(f"step_size must be > 0, an L2 norm in pixel units, got {self.step_size}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must lie in (0, 1), got {self.gamma}")

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        objective, nearest = Margin(labels), Nearest(images, self.norm)
        farthest = size(torch.maximum(images, 1 - images), self.norm)
        adv, radius = images, torch.zeros_like(farthest)
        for step in range(1, self.steps):
            with span("attack step", step):
                gradient, logits = gradient_and_logits(model, adv, objective)
                with torch.no_grad():
                    fooled = logits.argmax(1) != labels
                    nearest.record(adv, fooled)
                    gamma = self._at(step, self.gamma, LAST_GAMMA)
                    estimate = size(adv - images, self.norm) + to_boundary(objective.value(logits), gradient, self.norm)
                    larger = torch.where(nearest.size.isinf(), estimate.maximum(radius), radius) * (1 + gamma)
                    smaller = torch.minimum(radius * (1 - gamma), nearest.size)
                    radius = torch.where(fooled, smaller, larger).minimum(farthest)
                    alpha = self._at(step, self.step_size, LAST_STEP)
                    adv = torch.addcdiv(adv, gradient, length(gradient) + TINY, value=alpha)
                    adv = Ball(images, radius, self.norm).project_(adv)
        with torch.no_grad():
            nearest.record(adv, model(adv).argmax(1) != labels)
        return nearest.adv

    def _at(self, step: int, first: float, last: float) -> float:
        """What has fallen to ``first`` times ``last`` after all steps."""
        return first * (last + (1 - last) * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2)


def to_boundary(margin: Tensor, gradient: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    """Distance to where the linearised margin [N] is 0, [N]."""
    dual = torch.linalg.vector_norm(gradient, 1 if norm == "linf" else 2, dim=(1, 2, 3))
    return margin.abs() / dual.clamp(min=torch.finfo(dual.dtype).tiny)
