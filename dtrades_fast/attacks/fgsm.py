"""Fast gradient sign method (Goodfellow et al. 2015): one step of epsilon from the clean image."""

from __future__ import annotations

from dtrades_fast.attacks.pgd import PGD


def FGSM(epsilon: float, *, targeted: bool = False) -> PGD:  # noqa: N802 (named as the attack it makes)
    """``clip(x + epsilon sign(grad_x CE(z, y)), 0, 1)``.

    Args:
        epsilon: size of the step in pixel units.
        targeted: the labels given are classes to reach.
    """
    return PGD(epsilon, steps=1, step_size=epsilon or None, start="clean", targeted=targeted)
