"""The official AutoAttack code (``pip install 'dtrades-fast[autoattack]'``) behind this package's interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast.attacks.autoattack import TARGETS
from dtrades_fast.attacks.base import Attack, Model, worst_of

__all__ = ["OfficialAutoAttack", "OfficialStage"]

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class OfficialStage(Attack):
    """One attack of the official ``standard`` version, with the settings that it has there.

    Its random numbers come from torch's global generator, one draw for a whole batch: the result depends on the batch
    size and on which points are in a batch. The generator's state is put back afterwards.

    Args:
        name: ``"apgd-ce"``, ``"apgd-t"``, ``"fab-t"`` or ``"square"``.
        epsilon: radius of the ball in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        classes: number of classes of the model; the targeted ones need 10.

    Raises:
        ValueError: a targeted attack with fewer classes.
        ModuleNotFoundError: when it runs, if the package is not installed.
    """

    name: str
    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    classes: int = 10

    def __post_init__(self) -> None:
        if self.name not in ("apgd-ce", "square") and self.classes <= TARGETS:
            raise ValueError(
                f"the official {self.name} goes for {TARGETS} wrong classes and the model has {self.classes} classes: "
                "use --engine fast, which goes for all there are"
            )

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        try:
            import pyautoattack
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the official AutoAttack is not installed: pip install 'dtrades-fast[autoattack]', or --engine fast"
            ) from error
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            suite = pyautoattack.AutoAttack(
                model, norm=NORMS[self.norm], eps=self.epsilon, seed=key % 2**31, device=images.device
            )
            suite.attacks_to_run = [self.name]
            adv, _ = suite.run_standard_evaluation(images, labels, batch_size=len(images))
        return adv


@dataclass(frozen=True)
class OfficialAutoAttack(Attack):
    """The official ``standard`` version, stage by stage; for any number of classes from 10 on.

    Args:
        epsilon: radius of the ball in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        classes: number of classes of the model.
    """

    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    classes: int = 10

    def __post_init__(self) -> None:
        self.stages()  # which looks at the number of classes

    def stages(self) -> dict[str, Attack]:
        """The four attacks by name, in their order."""
        return {name: OfficialStage(name, self.epsilon, self.norm, self.classes) for name in STAGES}

    def parts(self) -> Sequence[Attack]:
        return list(self.stages().values())

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        return worst_of(self.parts(), model, images, labels, index, key)
