"""AutoAttack ``standard`` (Croce and Hein 2020): four attacks, each on what the ones before it have left standing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dtrades_fast.attacks.apgd import APGD
from dtrades_fast.attacks.base import Attack, Model, worst_of
from dtrades_fast.attacks.fab import FAB
from dtrades_fast.attacks.square import Square

#: Wrong classes that the targeted attacks go for.
TARGETS = 9


@dataclass(frozen=True)
class AutoAttack(Attack):
    """APGD-CE, APGD-T, FAB-T and Square with 5,000 queries; a point counts as robust if none of them breaks it.

    Args:
        epsilon: radius of the ball in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        classes: number of classes of the model, at least 4; the targeted attacks go for 9 wrong ones, or all there are.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks.
    """

    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    classes: int = 10

    def __post_init__(self) -> None:
        if self.classes < 4:
            raise ValueError(
                f"AutoAttack needs at least 4 classes, got {self.classes}: its targeted loss divides by the spread of "
                "the four largest logits; use pgdK, apgd-ce and square"
            )

    def stages(self) -> dict[str, Attack]:
        """The four attacks by name, in their order."""
        targets = min(TARGETS, self.classes - 1)
        return {
            "apgd-ce": APGD(self.epsilon, norm=self.norm),
            "apgd-t": APGD(self.epsilon, norm=self.norm, loss="dlr", targets=targets),
            "fab-t": FAB(norm=self.norm, targets=targets, epsilon=self.epsilon),
            "square": Square(self.epsilon, norm=self.norm),
        }

    def parts(self) -> Sequence[Attack]:
        return [part for stage in self.stages().values() for part in stage.parts()]

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        return worst_of(self.parts(), model, images, labels, index, key)
