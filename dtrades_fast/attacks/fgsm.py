"""Fast gradient sign method (Goodfellow et al. 2015): one step of epsilon from the clean image."""

from __future__ import annotations

from typing import Literal

from dtrades_fast.attacks.pgd import PGD


def FGSM(  # noqa: N802 (named as the attack it makes)
    epsilon: float, norm: Literal["linf", "l2"] = "linf", *, targeted: bool = False
) -> PGD:
    """``clip(x + epsilon sign(g), 0, 1)`` with ``g = grad_x CE(z, y)``; for L2 along ``g / ||g||`` instead of its sign.

    Args:
        epsilon: size of the step in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        targeted: the labels given are classes to reach.
    """
    return PGD(epsilon, steps=1, step_size=epsilon or None, norm=norm, start="clean", targeted=targeted)
