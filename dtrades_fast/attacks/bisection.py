"""The smallest ball in which APGD fools the model, by bisection, each sample with a radius of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast import rng
from dtrades_fast.attacks.apgd import APGD
from dtrades_fast.attacks.base import Attack, Model
from dtrades_fast.attacks.nearest import Nearest


@dataclass(frozen=True)
class Bisection(Attack):
    """Smallest perturbation by runs of APGD: one at radius ``cap``, then ``halvings`` more where it fooled the model.

    A run that fools the model moves the upper end of a sample's bracket to the norm that it did that with, any other
    the lower end to its radius; the next radius is the middle.

    Args:
        cap: largest radius in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        halvings: the bracket ends at most ``cap / 2^halvings`` wide.
        steps: of each run.
        loss: of APGD: ``"dlr"``, which needs 3 classes, or ``"ce"``, which pulls towards all wrong classes at once and
            so needs larger balls where there are several.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.
    """

    cap: float
    norm: Literal["linf", "l2"] = "linf"
    halvings: int = 12
    steps: int = 50
    loss: Literal["ce", "dlr"] = "dlr"

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"cap must be > 0 in pixel units and finite, got {self.cap}")
        if self.halvings < 0:
            raise ValueError(f"halvings must be >= 0, got {self.halvings}")
        self._attack()  # which looks at the rest

    def _attack(self) -> APGD:
        return APGD(self.cap, self.steps, self.norm, self.loss)

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        with torch.no_grad():
            logits = model(images)
        if self.loss == "dlr" and logits.shape[1] < 3:
            raise ValueError(f"loss='dlr' needs 3 classes, the model has {logits.shape[1]}: use loss='ce'")
        wrong = logits.argmax(1) != labels
        result, rows = images.detach().clone(), (~wrong).nonzero().squeeze(1)
        nearest = Nearest(images[rows], self.norm)
        low = torch.zeros_like(nearest.size)
        radius = torch.full_like(low, self.cap)
        for run in range(self.halvings + 1):
            if len(rows) == 0:
                break
            stream = rng.key(key, "bisection", run)
            adv = self._attack().search(model, nearest.images, labels[rows], index[rows], stream, radius)
            with torch.no_grad():
                fooled = model(adv).argmax(1) != labels[rows]
            nearest.record(adv, fooled)
            if run == 0:  # what stands at the cap stays out
                keep = fooled.nonzero().squeeze(1)
                rows, low, radius, fooled = rows[keep], low[keep], radius[keep], fooled[keep]
                nearest = nearest.select(keep)
            low = torch.where(fooled, low, radius)
            radius = (low + nearest.size) / 2
        result[rows] = nearest.adv
        return result
