"""FAB-T (Croce and Hein 2020): along the boundary to one class, to its point nearest to the clean image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast.attacks.base import Attack, Model, gradient_and_logits, worst_of
from dtrades_fast.attacks.nearest import Nearest
from dtrades_fast.attacks.objectives import ranked_rival
from dtrades_fast.attacks.survivors import COMPACT_EVERY, Survivors
from dtrades_fast.profiling import span

#: Lengths of moves are at least this in the weight of the clean image, so that two moves of 0 have one.
SHORTEST = 1e-8
#: Newton steps of a projection. In float32 hyperplanes through the box take 4 to 12, through its very corner up to 24.
NEWTON_STEPS = 24


@dataclass(frozen=True)
class FAB(Attack):
    """Smallest perturbation to a wrong class ``t``, by projections onto the linearised boundary, from the clean image.

    With ``P(z)`` the point of the box nearest to ``z`` on ``{u: f(x') + <grad f(x'), u - x'> = 0}``, where
    ``f = z'_t - z'_y``, and ``d, d0`` the distances of ``x'`` and of the clean image ``x`` from there,

    ``x' <- clip((1 - a)(x' + eta (P(x') - x')) + a (x + eta (P(x) - x)), 0, 1), a = min(d / (d + d0), alpha_max)``.

    An image that fools the model is kept if it is the nearest so far, and the search goes on from
    ``x + beta (x' - x)``. A step takes two forward passes and one backward pass. Nothing is random.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        steps: for each class.
        target: go only for the wrong class of that rank at the clean image, 1 for the strongest.
        targets: else go for that many wrong classes, strongest first.
        epsilon: a sample is done at the first image within that radius, in pixel units; what is found outside does not
            count. None looks for the smallest perturbation in all steps and to all the classes.
        alpha_max: largest weight of the clean image.
        eta: how far a step goes, 1 for the boundary itself.
        beta: share of the perturbation that is kept when the model is fooled.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Croce and Hein 2020, Minimally distorted adversarial examples with a fast adaptive boundary attack; the
    targeted version is of Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks.
    """

    norm: Literal["linf", "l2"] = "linf"
    steps: int = 100
    target: int | None = None
    targets: int = 9
    epsilon: float | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        for name, count in (("steps", self.steps), ("target", self.target), ("targets", self.targets)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if self.epsilon is not None and not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0 in pixel units, or None for the smallest, got {self.epsilon}")
        for name, share in (("alpha_max", self.alpha_max), ("beta", self.beta)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if not self.eta >= 1:
            raise ValueError(f"eta must be >= 1, got {self.eta}: a shorter step never gets beyond the boundary")

    def parts(self) -> Sequence[Attack]:
        """One attack per class if there is an epsilon; the smallest perturbation needs all classes for each sample."""
        return self._single() if self.epsilon is not None else (self,)

    def _single(self) -> list[FAB]:
        ranks = range(1, self.targets + 1) if self.target is None else (self.target,)
        return [replace(self, target=rank) for rank in ranks]

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        if self.target is not None:
            return self._search(model, images, labels, self.target)
        if self.epsilon is not None:
            return worst_of(self.parts(), model, images, labels, index, key)
        nearest = Nearest(images, self.norm)
        for attack in self._single():
            adv = attack.perturb(model, images, labels, index, key)
            with torch.no_grad():
                nearest.record(adv, model(adv).argmax(1) != labels)
        return nearest.adv

    def _search(self, model: Model, images: Tensor, labels: Tensor, rank: int) -> Tensor:
        with torch.no_grad(), span("clean prediction"):
            logits = model(images)
        if rank >= logits.shape[1]:
            raise ValueError(
                f"the wrong class of rank {rank} needs {rank + 1} classes, the model has {logits.shape[1]}: "
                f"use targets={logits.shape[1] - 1}"
            )
        objective = Difference(labels, ranked_rival(logits, labels, rank))
        survivors, nearest = Survivors(images), Nearest(images, self.norm)
        enough = 0.0 if self.epsilon is None else self.epsilon  # nothing is nearer than 0
        nearest.record(images, logits.argmax(1) != labels)
        survivors.record(images, nearest.size <= enough)
        adv = images
        for step in range(1, self.steps + 1):
            with span("attack step", step):
                gradient, logits = gradient_and_logits(model, adv, objective)
                with torch.no_grad():
                    adv = self._towards_boundary(adv, nearest.images, gradient, objective.value(logits))
                    fooled = model(adv).argmax(1) != objective.labels
                    nearest.record(adv, fooled)
                    survivors.record(nearest.adv, nearest.size <= enough)
                    back = torch.lerp(nearest.images, adv, self.beta)
                    adv = torch.where(fooled[:, None, None, None], back, adv)
            if step % COMPACT_EVERY == 0 and (keep := survivors.drop()) is not None:
                if len(keep) == 0:
                    break
                adv, nearest, objective = adv[keep], nearest.select(keep), objective.select(keep)
        return survivors.result(nearest.adv if self.epsilon is None else None)

    def _towards_boundary(self, adv: Tensor, images: Tensor, gradient: Tensor, difference: Tensor) -> Tensor:
        """The next point, from the gradient and the value [N] of the difference of logits at ``adv``."""
        points, normal = torch.stack((adv, images)).flatten(2), gradient.flatten(1)
        to_images = (normal * (points[0] - points[1])).sum(1)
        moves = to_hyperplane(points, normal, torch.stack((-difference, to_images - difference)), self.norm)
        order = torch.inf if self.norm == "linf" else 2
        length = torch.linalg.vector_norm(moves, order, dim=2, keepdim=True).clamp_(min=SHORTEST)
        alpha = (length[0] / (length[0] + length[1])).clamp_(max=self.alpha_max)
        points = points.add_(moves, alpha=self.eta)
        return torch.lerp(points[0], points[1], alpha).clamp_(0, 1).view(adv.shape)


class Difference:
    """``z'_t - z'_y``: the logit of a class over the label's."""

    def __init__(self, labels: Tensor, targets: Tensor):
        self.labels, self.targets = labels, targets

    def logit_grad(self, logits: Tensor) -> Tensor:
        gradient = torch.zeros_like(logits).scatter_(1, self.targets[:, None], 1)
        return gradient.scatter_(1, self.labels[:, None], -1)

    def value(self, logits: Tensor) -> Tensor:
        return (logits.gather(1, self.targets[:, None]) - logits.gather(1, self.labels[:, None])).squeeze(1)

    def select(self, rows: Tensor) -> Difference:
        return Difference(self.labels[rows], self.targets[rows])


def to_hyperplane(points: Tensor, normal: Tensor, missing: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    r"""Smallest moves within [0, 1] that bring points onto their hyperplane, or as near to it as the box allows.

    .. math:: \min \|\delta\| \quad\text{with}\quad \langle w, \delta \rangle = m,\ 0 \le x + \delta \le 1

    All coordinates move as ``w`` says for ``m``'s sign until they meet the box: by ``min(s, r_i)`` for Linf and by
    ``|w_i| min(s, r_i / |w_i|)`` for L2, where ``r_i`` is the room to the box. What that gains,
    ``sum_i u_i min(s, t_i)`` with ``u = |w|, t = r`` or ``u = w^2, t = r / |w|``, is concave and piecewise linear in
    ``s``, and :func:`reach` finds the ``s`` that gains ``|m|``.

    Args:
        points: [K, N, D], ``x``, in [0, 1].
        normal: [N, D], ``w``; 0 moves nothing.
        missing: [K, N], ``m``.
        norm: whose length is minimised.

    Returns:
        [K, N, D], the moves.
    """
    scale = normal.abs().amax(1, keepdim=True)
    normal = normal / scale.masked_fill(scale == 0, 1)
    weights = normal.abs()
    signs = missing.sign()[..., None] * normal.sign()
    limits = torch.where(signs > 0, 1 - points, points)
    if norm == "l2":
        limits.div_(weights.clamp(min=torch.finfo(weights.dtype).tiny))
        signs.mul_(weights)
        weights = weights.square()
    amount = missing.abs() / scale.masked_fill(scale == 0, 1).squeeze(1)
    return torch.minimum(limits, reach(weights, limits, amount)[..., None]).mul_(signs)


def reach(weights: Tensor, limits: Tensor, amount: Tensor) -> Tensor:
    """The smallest ``s`` with ``sum_i u_i min(s, t_i) = a``, [K, N]; infinite where no ``s`` gains as much.

    Newton's method from the left: never beyond the solution, exact once no limit lies between, and each step at least
    halves what is missing or the slope. No sorting: a step reads the numbers twice.

    Args:
        weights: [N, D], ``u >= 0``.
        limits: [K, N, D], ``t >= 0``.
        amount: [K, N], ``a >= 0``.
    """
    buffer = torch.mul(limits, weights)
    possible = amount < buffer.sum(2)
    left = amount.where(possible, 0)
    s = left / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
    for _ in range(NEWTON_STEPS):
        missing = left - torch.minimum(limits, s[..., None], out=buffer).mul_(weights).sum(2)
        slope = torch.gt(limits, s[..., None], out=buffer).mul_(weights).sum(2)
        ahead = torch.where(slope > 0, s + missing / slope, s).maximum(s)
        if not ahead.is_cuda and torch.equal(ahead, s):  # on a GPU looking would make the host wait
            break
        s = ahead
    return s.where(possible, torch.inf)
