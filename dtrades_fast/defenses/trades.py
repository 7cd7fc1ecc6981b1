"""TRADES (Zhang et al. 2019).

    loss = CE(z, y) + beta KL(p || p')
    attack: maximise KL(p || p'), start x + 0.001 N(0, 1)

``beta`` is the published code's name; the paper writes 1/lambda. The clean prediction p is not detached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import Batch, BNMode, Crafted, Defense, Loss, outer_forward, register
from dtrades_fast.ops import trades_loss


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
        return self.pgd(attack_model, batch, objective="kl", start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        clean_logits, adv_logits = outer_forward(model, batch.images, crafted.adv, self.bn_mode)
        return weighted_kl(clean_logits, adv_logits, batch.labels, base=self.beta)


def weighted_kl(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, **weight: Any) -> Loss:
    """``CE(z, y) + w KL(p || p')``, with what the weight is made of as :func:`~dtrades_fast.ops.trades_loss` has it."""
    loss = trades_loss(clean_logits, adv_logits, labels, **weight)
    terms = {"ce": loss.ce, "kl": loss.kl, "lambda": loss.weight, "entropy": loss.entropy}
    return Loss(loss.loss, terms, clean_logits.detach(), adv_logits.detach(), loss.margin)
