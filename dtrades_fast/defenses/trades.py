"""TRADES (Zhang et al. 2019).

    loss = CE(z, y) + beta KL(p || p')
    attack: maximise KL(p || p'), start x + 0.001 N(0, 1)

``beta`` is the published code's name; the paper writes 1/lambda. The clean prediction p is not detached.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import (
    Batch,
    BNMode,
    Crafted,
    Defense,
    Loss,
    cross_entropy,
    details,
    outer_forward,
    register,
)
from dtrades_fast.ops import entropy_kl


@register("trades")
@dataclass
class TRADES(Defense):
    """Minimises the mean of ``CE(z, y) + beta KL(p || p')``.

    Args:
        beta: weight of the robust term.
        bn_mode: order of the outer forwards, see :func:`~dtrades_fast.defenses.base.outer_forward`.
    """

    beta: float = 6.0
    bn_mode: BNMode = "clean_adv"

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        attack = self.pgd(objective="kl", start="gaussian")
        return Crafted(attack(attack_model, batch.images, batch.labels, index=batch.index, key=batch.key))

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        clean_logits, adv_logits = outer_forward(model, batch.images, crafted.adv, self.bn_mode)
        kl = entropy_kl(clean_logits, adv_logits).kl
        return trades_loss(clean_logits, adv_logits, batch.labels, kl, self.beta)


def trades_loss(
    clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, kl: Tensor, weight: Tensor | float, **extra: Tensor
) -> Loss:
    """``CE(z, y) + weight KL(p || p')``, where ``weight`` is one number or one per sample."""
    ce = cross_entropy(clean_logits, labels)
    return Loss(ce + weight * kl, details(ce=ce, kl=kl, **extra), clean_logits.detach(), adv_logits.detach())
