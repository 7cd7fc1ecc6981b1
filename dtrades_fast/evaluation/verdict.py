"""Is the robustness real? Every evaluation ends with a verdict on masked gradients, and with its evidence.

A defense may make attacks fail instead of adversarial images (Athalye et al. 2018; Carlini et al. 2019; Tramer et al.
2020). What gives it away: samples without a gradient; an attack without gradients, or blind noise, that breaks what the
strongest attack with gradients leaves; a larger ball that is harder to attack; points that stand where every image is
allowed; a loss that saturates; and single steps that fail although many steps succeed.

The figures are taken on a few correctly classified points, the thresholds stand in :data:`RULES`, and what they were
set from in ``docs/evaluation.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrades_fast.attacks import APGD, FGSM, PGD, gradient_and_logits, gradient_stats
from dtrades_fast.attacks.base import Attack, frozen
from dtrades_fast.attacks.objectives import CrossEntropy
from dtrades_fast.attacks.square import Square
from dtrades_fast.ops import random_start
from dtrades_fast.rng import key as stream

__all__ = ["RULES", "Rule", "Verdict", "judge", "probe"]

Norm = Literal["linf", "l2"]

PROBE_STEPS = 30  #: of APGD
PROBE_QUERIES = 200  #: of Square
NOISE_DRAWS = 20
#: A share counts from that many points on: one or two of a few dozen are no sign of anything.
LEAST = 3
#: Points that must have been looked at before a network is called healthy: fewer would miss most signs.
ENOUGH = 20


@dataclass(frozen=True)
class Rule:
    """A figure that is a sign of masked gradients from ``suspicious`` on, and proof enough from ``masked`` on."""

    suspicious: float
    masked: float
    means: str


RULES = {
    "zero_gradient": Rule(0.1, 0.3, "of the points have an input gradient of exactly zero"),
    "noise_only": Rule(0.02, 0.05, "of the points fall to random noise, but not to attacks with gradients"),
    "score_only": Rule(
        0.03, 0.1, "of the points fall to Square, which needs no gradients, but not to attacks with them"
    ),
    "transfer_only": Rule(
        0.02, 0.05, "of the points fall to images made on another network, but not to white-box ones"
    ),
    "larger_is_harder": Rule(0.02, 0.05, "more of the points stand in a ball twice as large"),
    "whole_box": Rule(0.03, 0.06, "of the points stand although every image is allowed"),
    "saturated": Rule(0.15, 0.3, "of the points fall only to a loss that the scale of the logits does not matter to"),
    "single_step": Rule(0.6, 0.7, "of the points stand after a single step (FGSM) and fall to many"),
}
RANDOM = (
    "the forward pass is random: gradients of one pass say little about the next; attack the average over it "
    "(dtrades_fast.evaluation.averaged.Averaged) before you believe any of these figures"
)


@dataclass(frozen=True)
class Verdict:
    """``"healthy"``, ``"suspicious"`` or ``"masked"``, with the reasons and the figures that they come from.

    Attributes:
        verdict: the word.
        reasons: a sentence per sign, the strongest first; none if healthy.
        figures: shares of the points by the names of :data:`RULES`.
        points: correctly classified points that were looked at.
    """

    verdict: Literal["healthy", "suspicious", "masked"]
    reasons: tuple[str, ...]
    figures: Mapping[str, float]
    points: int

    def record(self) -> dict[str, Any]:
        """For ``eval.json``."""
        return {**vars(self), "reasons": list(self.reasons), "figures": dict(self.figures)}


def judge(
    figures: Mapping[str, float], points: int, *, of: Mapping[str, int] | None = None, random: bool = False
) -> Verdict:
    """The verdict that follows from figures by the names of :data:`RULES`; those not taken are left out.

    Args:
        figures: shares, 0 to 1.
        points: how many points they were taken on. A figure is a sign only if it is of :data:`LEAST` points or more,
            and of fewer than :data:`ENOUGH` points none is healthy.
        of: for some figures another number of points.
        random: whether the forward pass gives different logits each time. That alone is suspicious. Of the figures
            only gradients of exactly zero make it worse, since noise may be behind all others.
    """
    sizes = of or {}
    counted = [name for name, value in figures.items() if round(value * sizes.get(name, points)) >= LEAST]
    proofs = [name for name in counted if figures[name] >= RULES[name].masked]
    signs = [name for name in counted if RULES[name].suspicious <= figures[name] < RULES[name].masked]
    reasons = [f"{100 * figures[name]:.0f} % {RULES[name].means}" for name in (*proofs, *signs)]
    if random:
        reasons.insert(0, RANDOM)
    if points < ENOUGH:
        reasons.append(f"too few correctly classified points to tell: {points}, at least {ENOUGH} are needed")
    masked = "zero_gradient" in proofs if random else bool(proofs)
    word: Literal["healthy", "suspicious", "masked"] = "masked" if masked else "suspicious" if reasons else "healthy"
    return Verdict(word, tuple(reasons), dict(figures), points)


def probe(
    model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, *, epsilon: float, norm: Norm, key: int
) -> tuple[dict[str, float], int]:
    """The figures of :func:`judge` but ``transfer_only``, and the number of points that they were taken on.

    About 500 forward passes per point.

    Args:
        model: maps images in [0, 1] to logits; the network itself, in eval mode.
        images: [N, C, H, W] in [0, 1]; those that are misclassified are left out.
        labels: [N], int64.
        index: [N], int64, the samples' indices for random numbers.
        epsilon: radius of the ball in pixel units.
        norm: of the ball.
        key: the stream of random numbers.
    """
    with torch.no_grad():
        right = model(images).argmax(1) == labels
        classes = model(images[:1]).shape[1]
    images, labels, index = images[right], labels[right], index[right]
    if not len(images):
        return {}, 0

    def stands(attack: Attack, rows: Tensor | slice = slice(None)) -> Tensor:
        adv = attack(model, images[rows], labels[rows], index=index[rows], key=stream(key, "verdict"))
        with torch.no_grad():
            return model(adv).argmax(1) == labels[rows]

    whole = 1.0 if norm == "linf" else images[0].numel() ** 0.5
    by_ce = stands(APGD(epsilon, PROBE_STEPS, norm)) & stands(PGD(epsilon, 20, norm=norm, stop_early=True))
    standing = by_ce & stands(APGD(epsilon, PROBE_STEPS, norm, loss="dlr")) if classes > 2 else by_ce
    half, full, double = (
        stands(PGD(min(size, whole), 10, norm=norm, stop_early=True)) for size in (epsilon / 2, epsilon, 2 * epsilon)
    )
    figures = {
        "zero_gradient": share(no_gradient(model, images, labels, index, epsilon, norm, key)),
        "noise_only": share(standing & ~stands_noise(model, images, labels, index, epsilon, norm, key)),
        "score_only": 0.0,
        "larger_is_harder": max(share(full) - share(half), share(double) - share(full), 0.0),
        "whole_box": share(stands(PGD(whole, 40, norm=norm, stop_early=True))),
        "saturated": share(by_ce & ~standing),
        "single_step": share(stands(FGSM(epsilon, norm)) & ~standing),
    }
    rows = standing.nonzero().squeeze(1)
    if len(rows):
        fallen = ~stands(Square(epsilon, PROBE_QUERIES, norm=norm), rows)
        figures["score_only"] = float(fallen.sum()) / len(images)
    return figures, len(images)


def share(flags: Tensor) -> float:
    return flags.double().mean().item()


def no_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epsilon: float, norm: Norm, key: int
) -> Tensor:
    """Points whose cross-entropy has a gradient of exactly zero at a random point of the ball, [N], bool."""
    start = random_start(images, index, norm, epsilon, stream(key, "gradient"))
    with frozen(model):
        gradient, _ = gradient_and_logits(model, start, CrossEntropy(labels))
    return gradient_stats(gradient, start, images, epsilon, norm).zero


def stands_noise(
    model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epsilon: float, norm: Norm, key: int
) -> Tensor:
    """Points that every one of a few random points of their ball is classified correctly for, [N], bool."""
    stands = torch.ones_like(labels, dtype=torch.bool)
    with torch.no_grad():
        for draw in range(NOISE_DRAWS):
            noisy = random_start(images, index, norm, epsilon, stream(key, "noise", draw))
            stands &= model(noisy).argmax(1) == labels
    return stands
