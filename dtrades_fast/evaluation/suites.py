"""Attacks by name, and the suites that they make up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from dtrades_fast.attacks import APGD, FGSM, PGD, Attack
from dtrades_fast.attacks.autoattack import TARGETS, AutoAttack
from dtrades_fast.attacks.fab import FAB
from dtrades_fast.attacks.square import Square
from dtrades_fast.evaluation.official import OfficialAutoAttack, OfficialStage

__all__ = ["ATTACKS", "SUITES", "Norm", "make_attack"]

Norm = Literal["linf", "l2"]

#: What a name may be, for help and messages.
ATTACKS = (
    "fgsm, pgdK (K steps, e.g. pgd20), pgdK-rR (R restarts, e.g. pgd20-r5), apgd-ce, apgd-t, fab-t, square and "
    "autoattack"
)
#: Attacks of the suites; minimum-norm and blackbox have parts that are no attack with a fixed epsilon.
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("fgsm", "pgd20"),
    "standard": ("fgsm", "pgd20", "autoattack"),
    "blackbox": ("square",),
    "minimum-norm": (),
    "full": ("fgsm", "pgd20", "autoattack", "square"),
}


def make_attack(
    name: str,
    epsilon: float,
    step_size: float | None = None,
    *,
    norm: Norm = "linf",
    classes: int = 10,
    official: bool = False,
    stop_early: bool = True,
) -> Attack:
    """The attack of that name, see :data:`ATTACKS`.

    Args:
        name: e.g. ``"pgd20-r5"``.
        epsilon: radius in pixel units.
        step_size: of PGD, in pixel units; ``epsilon / 4`` if not given.
        norm: of the ball.
        classes: number of classes of the model.
        official: the official code of AutoAttack, APGD-CE, APGD-T and FAB-T instead of ours. Square by itself is always
            ours, which says when each point falls.
        stop_early: PGD ends at the first image that fools the model, as the others always do.

    Raises:
        ValueError: there is no such attack, or none for so few classes.
    """
    targets = min(TARGETS, classes - 1)
    if name == "fgsm":
        return FGSM(epsilon, norm)
    if name == "autoattack":
        return (OfficialAutoAttack if official else AutoAttack)(epsilon, norm, classes)
    if official and name in ("apgd-ce", "apgd-t", "fab-t"):
        return OfficialStage(name, epsilon, norm, classes)
    if name == "apgd-ce":
        return APGD(epsilon, norm=norm)
    if name == "apgd-t" and classes < 4:
        raise ValueError(f"apgd-t needs at least 4 classes, got {classes}: use apgd-ce, fab-t, pgdK and square")
    if name == "apgd-t":
        return APGD(epsilon, norm=norm, loss="dlr", targets=targets)
    if name == "fab-t":
        return FAB(norm=norm, targets=targets, epsilon=epsilon)
    if name == "square":
        return Square(epsilon, norm=norm)
    found = re.fullmatch(r"pgd([1-9]\d*)(?:-r([1-9]\d*))?", name)
    if found is None:
        raise ValueError(f"unknown attack {name!r}; known are {ATTACKS}")
    steps, restarts = found.groups()
    return PGD(epsilon, int(steps), step_size, norm=norm, restarts=int(restarts or 1), stop_early=stop_early)


def names(attacks: str | None, suite: str) -> Sequence[str]:
    """The attacks asked for: a list with commas, or those of the suite."""
    if attacks is None:
        return SUITES[suite]
    return list(dict.fromkeys(name for name in attacks.split(",") if name))
