"""PGD adversarial training (Madry et al. 2018).

loss = CE(z', y)
attack: maximise CE(z', y), uniform start in the ball, clipped to [0, 1]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import Batch, Crafted, Defense, Loss, register
from dtrades_fast.ops import ce_loss


@register("at")
@dataclass
class AT(Defense):
    """Minimises the mean of ``CE(z', y)`` on adversarial images alone."""

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        return self.pgd(attack_model, batch, objective="ce", start="uniform")

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        logits = model(crafted.adv)
        ce, margin = ce_loss(logits, batch.labels)
        return Loss(ce, {"ce": ce.detach()}, adv_logits=logits.detach(), margin=margin)
