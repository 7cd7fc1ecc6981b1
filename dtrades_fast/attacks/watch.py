"""What the gradients of an attack say of each sample: whether it converged, whether there is anything to climb."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dtrades_fast.ops import sample_stats

__all__ = ["GradientStats", "Seen", "Watch", "gradient_stats"]

#: The reciprocal of a norm stays below it, so that a gradient of zero keeps the direction zero.
LARGEST = 3e38


class GradientStats(NamedTuple):
    """Per-sample figures of the gradient ``g`` of an objective at ``x'``, each [N].

    Attributes:
        l2: ``||g||_2``; D-TRADES' sensitivity where the objective is KL.
        fosc: first-order stationary condition, how far the linearised objective could still rise within the ball, and
            for Linf within the box; 0 means that the attack has converged.
        fosc_relative: ``fosc`` divided by its value for ``x' = x`` without a box, ``epsilon ||g||_1`` (Linf) or
            ``epsilon ||g||_2`` (L2): 0 converged, 1 where it began, 2 at the opposite end. 0 for a gradient of zero.
        zero: whether the gradient is exactly zero.
    """

    l2: Tensor
    fosc: Tensor
    fosc_relative: Tensor
    zero: Tensor


def gradient_stats(
    gradient: Tensor, adv: Tensor, images: Tensor, epsilon: float, norm: Literal["linf", "l2"]
) -> GradientStats:
    """See :class:`GradientStats`. All images [N, C, H, W] of one dtype, ``epsilon`` in pixel units.

    Source of FOSC: Wang et al. 2019, On the convergence and robustness of adversarial training.
    """
    l2, l1, linf, fosc = sample_stats(gradient, adv, images, epsilon)
    size = epsilon * l1
    if norm == "l2":
        size = epsilon * l2
        fosc = size - (gradient * (adv - images)).sum((1, 2, 3), dtype=l2.dtype)
    return GradientStats(l2, fosc, torch.where(size > 0, fosc / size, 0), linf == 0)


class Seen(NamedTuple):
    """What a :class:`Watch` knows.

    Attributes:
        stats: of the last gradient; None before the first.
        direction: the last gradient, normalised, [N, C, H, W].
        cosines: of each gradient but the first the cosine similarity with the one before, [N].
    """

    stats: GradientStats | None = None
    direction: Tensor | None = None
    cosines: tuple[Tensor, ...] = ()


class Watch:
    """Follows an ascent step by step: call it with each ``(adv, gradient)`` before the step is made.

    The host waits for nothing. The clean images are the middle of the ball.
    """

    def __init__(self, images: Tensor, epsilon: float, norm: Literal["linf", "l2"], seen: Seen | None = None):
        self.images, self.epsilon, self.norm, self.seen = images, epsilon, norm, seen or Seen()

    def __call__(self, adv: Tensor, gradient: Tensor) -> None:
        stats = gradient_stats(gradient, adv, self.images, self.epsilon, self.norm)
        direction = gradient * stats.l2.reciprocal().clamp(max=LARGEST)[:, None, None, None]
        cosines = self.seen.cosines
        if self.seen.direction is not None:
            cosines += ((direction * self.seen.direction).sum((1, 2, 3)),)
        self.seen = Seen(stats, direction, cosines)

    @property
    def stats(self) -> GradientStats | None:
        """Of the last call; None before the first."""
        return self.seen.stats

    @property
    def cosine(self) -> Tensor | None:
        """Mean cosine similarity of the gradients of neighbouring steps, [N]; None with fewer than two gradients."""
        return torch.stack(self.seen.cosines).mean(0) if self.seen.cosines else None
