"""Projected gradient descent (Madry et al. 2018), Linf and L2, with restarts, targeted or not, of any objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast import rng
from dtrades_fast.attacks.base import Attack, Model, claims_hold, gradient_and_logits, input_gradient
from dtrades_fast.attacks.objectives import DLR, KL, CrossEntropy, Margin, Objective, Targeted
from dtrades_fast.attacks.survivors import COMPACT_EVERY, Survivors
from dtrades_fast.attacks.watch import Watch
from dtrades_fast.ops import pgd_step_, random_start
from dtrades_fast.profiling import span

#: Standard deviation of the start that TRADES publishes, in pixel units.
GAUSSIAN_START = 0.001


@dataclass(frozen=True)
class PGD(Attack):
    """``steps`` ascent steps of ``step_size``, each projected onto the ball of radius ``epsilon`` and onto [0, 1].

    Args:
        epsilon: radius of the ball in pixel units.
        steps: number of steps; 0 gives the start.
        step_size: in pixel units; ``epsilon / 4`` if not given.
        norm: ``"linf"`` or ``"l2"``.
        objective: ``"ce"`` (cross-entropy to the labels), ``"kl"`` (divergence from the clean prediction), ``"margin"``
            (largest wrong logit minus the label's) or ``"dlr"`` (that margin relative to the spread of the logits).
        start: ``"uniform"`` in the ball, ``"gaussian"`` (0.001 N(0, 1), as TRADES) or ``"clean"``. With ``"kl"`` the
            clean image has an exactly zero gradient, so ``"clean"`` is refused there.
        restarts: independent starts; a sample keeps the first that fools the model, else that of highest objective.
        targeted: the labels given are classes to reach; ``"ce"`` only.
        stop_early: a sample ends at the first image that fools the model (the start included, unless it is Gaussian and
            may lie outside of ball and box) and leaves the batch: never weaker than the last image alone, which is what
            PGD's accuracy is usually taken at. Samples that are never fooled keep their last image.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Madry et al. 2018, Towards deep learning models resistant to adversarial attacks.
    """

    epsilon: float
    steps: int = 10
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    objective: Literal["ce", "kl", "margin", "dlr"] = "ce"
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    restarts: int = 1
    targeted: bool = False
    stop_early: bool = False

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be >= 0 in pixel units, got {self.epsilon}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size must be > 0 in pixel units, got {self.step_size}")
        if self.restarts < 1:
            raise ValueError(f"restarts must be >= 1, got {self.restarts}")
        for name, value, allowed in (
            ("norm", self.norm, ("linf", "l2")),
            ("objective", self.objective, ("ce", "kl", "margin", "dlr")),
            ("start", self.start, ("uniform", "gaussian", "clean")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if self.objective == "kl" and self.start == "clean":
            raise ValueError("objective='kl' has a zero gradient at the clean image: use start='gaussian' or 'uniform'")
        if self.objective != "ce" and self.targeted:
            raise ValueError(f"targeted needs objective='ce', got {self.objective!r}: only it goes towards a class")

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        objective = self.make_objective(model, images, labels)
        if self.restarts == 1:
            return self._run(model, images, labels, objective, index, key)
        return self._worst_of_restarts(model, images, labels, objective, index, key)

    def make_objective(self, model: Model, images: Tensor, labels: Tensor) -> Objective:
        """The objective for this batch; for KL this is the one forward pass on the clean images."""
        if self.objective == "kl":
            with torch.no_grad(), span("clean prediction"):
                return KL(model(images).log_softmax(-1))
        if self.targeted:
            return Targeted(labels)
        kinds: dict[str, Callable[[Tensor], Objective]] = {"ce": CrossEntropy, "margin": Margin, "dlr": DLR}
        return kinds[self.objective](labels)

    def _run(
        self, model: Model, images: Tensor, labels: Tensor, objective: Objective, index: Tensor, key: int
    ) -> Tensor:
        """One run from one start."""
        if self.stop_early:
            return self._ascend_until_fooled(model, images, labels, objective, index, key)
        return self.ascend(model, self.start_from(images, index, key), images, objective)

    def ascend(
        self, model: Model, adv: Tensor, images: Tensor, objective: Objective, watch: Watch | None = None
    ) -> Tensor:
        """All steps from one start, on a model that is already frozen; ``adv`` is changed in place and returned.

        Nothing here depends on the values of a tensor, and there are no random numbers: the host waits for nothing,
        and a CUDA graph can hold it all.

        Args:
            model: as in :meth:`__call__`, like ``images``.
            adv: [N, C, H, W], where it begins, see :meth:`start_from`.
            objective: what is maximised, see :meth:`make_objective`.
            watch: is shown each gradient with the images that it was taken at.
        """
        step_size = self.epsilon / 4 if self.step_size is None else self.step_size
        for step in range(self.steps):
            with span("attack step", step + 1):
                gradient = input_gradient(model, adv, objective)
                if watch is not None:
                    with span("watch"):
                        watch(adv, gradient)
                with span("pgd_step_"):
                    pgd_step_(adv, gradient, images, step_size, self.epsilon, norm=self.norm)
        return adv

    def start_from(self, images: Tensor, index: Tensor, key: int, noise: Tensor | None = None) -> Tensor:
        """The images that an ascent begins at, [N, C, H, W].

        Args:
            images: as in :meth:`__call__`, like ``index`` and ``key``.
            noise: [], standard deviation in pixel units of Gaussian noise that is added.
        """
        with span("start"):
            adv = self._start(images, index, key)
            if noise is not None:
                normal = random_start(torch.zeros_like(adv), index, "gaussian", 1.0, rng.key(key, "noise"))
                adv.add_(normal * noise)
        return adv

    def _ascend_until_fooled(
        self, model: Model, images: Tensor, labels: Tensor, objective: Objective, index: Tensor, key: int
    ) -> Tensor:
        """:meth:`ascend` on the samples that still stand; every few steps the host waits for their number."""
        step_size = self.epsilon / 4 if self.step_size is None else self.step_size
        survivors = Survivors(images, claims_hold(model, labels, targeted=self.targeted))
        adv, clean = self._start(images, index, key), images
        for step in range(1, self.steps + 1):
            with span("attack step", step):
                gradient, logits = gradient_and_logits(model, adv, objective)
                if step > 1 or self.start != "gaussian":  # whose start may lie outside of ball and box
                    survivors.record(adv, self._fooled(logits, labels))
                pgd_step_(adv, gradient, clean, step_size, self.epsilon, norm=self.norm)
            if step % COMPACT_EVERY == 0 and (keep := survivors.drop()) is not None:
                if len(keep) == 0:
                    return survivors.result()
                adv, clean, labels, objective = adv[keep], clean[keep], labels[keep], objective.select(keep)
        with torch.no_grad():
            survivors.record(adv, self._fooled(model(adv), labels))
        return survivors.result(adv)

    def _fooled(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels) == self.targeted

    def _start(self, images: Tensor, index: Tensor, key: int) -> Tensor:
        if self.start == "clean":
            return images.detach().clone()
        if self.start == "gaussian":
            return random_start(images.detach(), index, "gaussian", GAUSSIAN_START, key)
        return random_start(images.detach(), index, self.norm, self.epsilon, key)

    def _worst_of_restarts(
        self, model: Model, images: Tensor, labels: Tensor, objective: Objective, index: Tensor, key: int
    ) -> Tensor:
        """Later restarts run on the samples left standing; their count is the one thing that the host waits for."""
        worst = images.detach().clone()
        highest = torch.full(images.shape[:1], -torch.inf, device=images.device)
        standing = torch.arange(len(images), device=images.device)  # samples that no restart has fooled yet
        for restart in range(self.restarts):
            if len(standing) == 0:
                break
            part = objective.select(standing)
            # The first start is that of a single run, so that more restarts never make a sample's result weaker.
            start_key = rng.key(key, "restart", restart) if restart else key
            adv = self._run(model, images[standing], labels[standing], part, index[standing], start_key)
            with torch.no_grad():
                logits = model(adv)
            fooled = self._fooled(logits, labels[standing])
            value = part.value(logits).float()
            better = fooled | (value > highest[standing])
            worst[standing[better]] = adv[better]
            highest[standing[better]] = value[better]
            standing = standing[~fooled]
        return worst
