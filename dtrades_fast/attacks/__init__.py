"""Attacks: ``(model, images, labels) -> adversarial images``, one file each."""

from dtrades_fast.attacks.apgd import APGD
from dtrades_fast.attacks.base import Attack, Model, eval_mode, frozen, gradient_and_logits, input_gradient
from dtrades_fast.attacks.bisection import Bisection
from dtrades_fast.attacks.fab import FAB
from dtrades_fast.attacks.fgsm import FGSM
from dtrades_fast.attacks.fmn import FMN
from dtrades_fast.attacks.graph import Graph
from dtrades_fast.attacks.mifgsm import MIFGSM
from dtrades_fast.attacks.pgd import PGD
from dtrades_fast.attacks.square import Square
from dtrades_fast.attacks.watch import GradientStats, Seen, Watch, gradient_stats

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "FMN",
    "MIFGSM",
    "PGD",
    "Attack",
    "Bisection",
    "GradientStats",
    "Graph",
    "Model",
    "Seen",
    "Square",
    "Watch",
    "eval_mode",
    "frozen",
    "gradient_and_logits",
    "gradient_stats",
    "input_gradient",
]
