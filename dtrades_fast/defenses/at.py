"""PGD adversarial training (Madry et al. 2018).

loss = CE(z', y)
attack: maximise CE(z', y), uniform start in the ball, clipped to [0, 1]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import Batch, Crafted, Defense, Loss, cross_entropy, details, register


@register("at")
@dataclass
class AT(Defense):
    """Minimises the mean of ``CE(z', y)`` on adversarial images alone."""

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        attack = self.pgd(objective="ce", start="uniform")
        return Crafted(attack(attack_model, batch.images, batch.labels, index=batch.index, key=batch.key))

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        logits = model(crafted.adv)
        ce = cross_entropy(logits, batch.labels)
        return Loss(ce, details(ce=ce), adv_logits=logits.detach())
