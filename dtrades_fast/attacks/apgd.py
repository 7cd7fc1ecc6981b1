"""Auto-PGD (Croce and Hein 2020): PGD with momentum that halves its step where the loss stops rising."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast import rng
from dtrades_fast.attacks.base import Attack, Model, claims_hold, gradient_and_logits, worst_of
from dtrades_fast.attacks.objectives import DLR, CrossEntropy, Objective, TargetedDLR, ranked_rival
from dtrades_fast.attacks.survivors import COMPACT_EVERY, Survivors
from dtrades_fast.ops import random_start
from dtrades_fast.profiling import span

#: Share of a step that goes along the gradient; the rest repeats the last movement.
MOMENTUM = 0.75
#: Share of the steps between two checkpoints that must have raised the loss, or the step is halved.
RHO = 0.75
#: Steps before the first checkpoint, by how much less each next interval has, and the least, as shares of all steps.
FIRST_CHECKPOINT, SHORTER_BY, SHORTEST = 0.22, 0.03, 0.06
TINY = 1e-12  #: keeps a norm of 0 from dividing


@dataclass(frozen=True)
class APGD(Attack):
    """``steps`` steps from a random start, the first of size ``2 epsilon``; a sample stops at the first that fools.

    With ``z`` the projected gradient step from ``x'`` and ``x'_`` the point before it,
    ``x' <- project(x' + 0.75 (z - x') + 0.25 (x' - x'_))``, without momentum in the first step. At checkpoints, a
    sample whose loss rose in less than 75 % of the steps since the last one, or whose best loss and step have not
    changed since, halves its step and goes on from its best point.

    Args:
        epsilon: radius of the ball in pixel units.
        steps: number of steps.
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"`` or ``"dlr"`` (difference of logits ratio; needs 3 classes, with a target 4).
        target: with ``"dlr"``, go for the wrong class of that rank at the clean image, 1 for the strongest.
        targets: with ``"dlr"``, go for that many wrong classes one after the other (APGD-T has 9).
        restarts: independent starts, of which later ones see what still stands.
        start: number of the first of them, which selects its random numbers.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks.
    """

    epsilon: float
    steps: int = 100
    norm: Literal["linf", "l2"] = "linf"
    loss: Literal["ce", "dlr"] = "ce"
    target: int | None = None
    targets: int | None = None
    restarts: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0 in pixel units, got {self.epsilon}")
        for name, count in (("steps", self.steps), ("restarts", self.restarts)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if self.loss not in ("ce", "dlr"):
            raise ValueError(f"loss must be 'ce' or 'dlr', got {self.loss!r}")
        for name, rank in (("target", self.target), ("targets", self.targets)):
            if rank is not None and (self.loss != "dlr" or rank < 1):
                raise ValueError(f"{name} must be at least 1 and needs loss='dlr', got {rank} with {self.loss!r}")
        if self.target is not None and self.targets is not None:
            raise ValueError("give target (one class) or targets (how many), not both")

    def parts(self) -> Sequence[Attack]:
        ranks = [self.target] if self.targets is None else range(1, self.targets + 1)
        starts = range(self.start, self.start + self.restarts)
        return [replace(self, target=rank, targets=None, restarts=1, start=n) for n in starts for rank in ranks]

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        if self.targets is None and self.restarts == 1:
            return self.search(model, images, labels, index, key, self.epsilon)
        return worst_of(self.parts(), model, images, labels, index, key)

    def search(
        self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int, epsilon: float | Tensor
    ) -> Tensor:
        """One run, on a frozen model: images that fool it, the clean ones where none does.

        Args:
            model: as in :meth:`__call__`, like ``images``, ``labels``, ``index`` and ``key``.
            epsilon: radius of the ball, one number or [N], one for each sample.
        """
        objective = self._objective(model, images, labels)
        ball = Ball(images, epsilon, self.norm)
        survivors = Survivors(images, claims_hold(model, labels))
        with span("start"), torch.no_grad():
            key = rng.key(key, "apgd", self.start, self.target or 0)
            adv = ball.point(random_start(torch.zeros_like(images), index, self.norm, 1.0, key, -1.0, 1.0))
        gradient, logits = gradient_and_logits(model, adv, objective)
        survivors.record(adv, logits.argmax(1) != labels)
        climb = _Climb(ball, labels, objective, adv, gradient, objective.value(logits))
        looks = checkpoints(self.steps)
        for step in range(1, self.steps + 1):
            with span("attack step", step):
                with torch.no_grad():
                    adv = climb.next_point(1.0 if step == 1 else MOMENTUM)
                if step == self.steps:
                    with torch.no_grad():
                        survivors.record(adv, model(adv).argmax(1) != climb.labels)
                    break
                gradient, logits = gradient_and_logits(model, adv, climb.objective)
                survivors.record(adv, logits.argmax(1) != climb.labels)
                climb.move(adv, gradient, climb.objective.value(logits))
                if step in looks:
                    climb.adapt(looks[step])
            if step % COMPACT_EVERY == 0 and (keep := survivors.drop()) is not None:
                if len(keep) == 0:
                    break
                climb = climb.select(keep)
        return survivors.result()

    def _objective(self, model: Model, images: Tensor, labels: Tensor) -> Objective:
        if self.loss == "ce":
            return CrossEntropy(labels)
        if self.target is None:
            return DLR(labels)
        with torch.no_grad(), span("clean prediction"):
            return TargetedDLR(labels, ranked_rival(model(images), labels, self.target))


def checkpoints(steps: int) -> dict[int, int]:
    """Steps, from 1, after which the step size is looked at, and how many steps each look covers."""
    length, shorter, shortest = (max(int(share * steps), 1) for share in (FIRST_CHECKPOINT, SHORTER_BY, SHORTEST))
    looks, step = {}, length
    while step <= steps:
        looks[step] = length
        length = max(length - shorter, shortest)
        step += length
    return looks


class Ball:
    """The points that may be shown to the model: within epsilon of the images, which may differ by sample, and [0, 1].

    Attributes:
        images: [N, C, H, W], the middles.
        epsilon: [N, 1, 1, 1], the radii in pixel units.
    """

    def __init__(self, images: Tensor, epsilon: float | Tensor, norm: Literal["linf", "l2"]):
        self.images, self.norm = images, norm
        radii = torch.as_tensor(epsilon, dtype=images.dtype, device=images.device)
        self.epsilon = radii.expand(len(images))[:, None, None, None]
        if norm == "linf":
            self._lower = (images - self.epsilon).clamp_(min=0)
            self._upper = (images + self.epsilon).clamp_(max=1)

    def point(self, direction: Tensor) -> Tensor:
        """``images + epsilon direction``, projected."""
        return self.project_(torch.addcmul(self.images, self.epsilon, direction))

    def step(self, adv: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """``adv`` moved by ``size`` [N, 1, 1, 1] along the gradient (its sign for Linf), projected."""
        direction = gradient.sign() if self.norm == "linf" else gradient / (length(gradient) + TINY)
        return self.project_(torch.addcmul(adv, size, direction))

    def project_(self, adv: Tensor) -> Tensor:
        """The closest point of the ball, in place, then of the box."""
        if self.norm == "linf":
            return adv.clamp_(self._lower, self._upper)
        adv.sub_(self.images)
        shrink = (self.epsilon / (length(adv) + TINY)).clamp_(max=1)
        return torch.addcmul(self.images, adv, shrink, out=adv).clamp_(0, 1)

    def select(self, rows: Tensor) -> Ball:
        return Ball(self.images[rows], self.epsilon[rows, 0, 0, 0], self.norm)


def length(images: Tensor) -> Tensor:
    """L2 norm per sample, [N, 1, 1, 1]."""
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)


@dataclass
class _Climb:
    """Where a run stands, per sample: the last two points, the best one, and what the next checkpoint looks at."""

    ball: Ball
    labels: Tensor
    objective: Objective
    adv: Tensor
    gradient: Tensor
    loss: Tensor

    def __post_init__(self) -> None:
        self.previous = self.adv
        self.size = 2 * self.ball.epsilon  # of a step
        self.best, self.best_gradient, self.best_loss = self.adv, self.gradient, self.loss
        self.best_at_check = self.loss
        self.rises = torch.zeros_like(self.loss)  # steps since the last checkpoint that raised the loss
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)  # at the last checkpoint

    def next_point(self, momentum: float) -> Tensor:
        target = self.ball.step(self.adv, self.gradient, self.size)
        target = torch.lerp(self.adv, target, momentum)
        if momentum < 1:
            target.add_(self.adv - self.previous, alpha=1 - momentum)
            self.ball.project_(target)
        return target

    def move(self, adv: Tensor, gradient: Tensor, loss: Tensor) -> None:
        """The model was shown ``adv``."""
        self.rises = self.rises + (loss > self.loss)
        self.previous, self.adv, self.gradient, self.loss = self.adv, adv, gradient, loss
        better = loss > self.best_loss
        pixels = better[:, None, None, None]
        self.best = torch.where(pixels, adv, self.best)
        self.best_gradient = torch.where(pixels, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def adapt(self, steps: int) -> None:
        """A checkpoint after that many steps: halve the step, and go back to the best point, where that is due."""
        stuck = ~self.halved & (self.best_at_check >= self.best_loss)
        self.halved = (self.rises <= RHO * steps) | stuck
        self.best_at_check, self.rises = self.best_loss, torch.zeros_like(self.rises)
        pixels = self.halved[:, None, None, None]
        self.size = torch.where(pixels, self.size / 2, self.size)
        self.adv = torch.where(pixels, self.best, self.adv)
        self.gradient = torch.where(pixels, self.best_gradient, self.gradient)

    def select(self, rows: Tensor) -> _Climb:
        """The same run for a part of its samples."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[rows] if isinstance(value, Tensor) else value.select(rows))
        return part
