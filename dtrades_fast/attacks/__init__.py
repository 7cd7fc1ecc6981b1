"""Attacks: ``(model, images, labels) -> adversarial images``, one file each."""

from dtrades_fast.attacks.apgd import APGD
from dtrades_fast.attacks.base import Attack, Model, eval_mode, frozen, gradient_and_logits, input_gradient
from dtrades_fast.attacks.fgsm import FGSM
from dtrades_fast.attacks.pgd import PGD
from dtrades_fast.attacks.watch import GradientStats, Watch, gradient_stats

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "Attack",
    "GradientStats",
    "Model",
    "Watch",
    "eval_mode",
    "frozen",
    "gradient_and_logits",
    "gradient_stats",
    "input_gradient",
]
