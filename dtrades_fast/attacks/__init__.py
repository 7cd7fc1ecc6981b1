"""Attacks: ``(model, images, labels) -> adversarial images``, one file each."""

from dtrades_fast.attacks.base import Attack, Model, eval_mode, frozen, input_gradient
from dtrades_fast.attacks.fgsm import FGSM
from dtrades_fast.attacks.pgd import PGD, PGDResult

__all__ = ["FGSM", "PGD", "Attack", "Model", "PGDResult", "eval_mode", "frozen", "input_gradient"]
