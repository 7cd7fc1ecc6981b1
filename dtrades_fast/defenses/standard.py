"""Standard training, no defense: the baseline whose robust accuracy is near zero.

loss = CE(z, y)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import Batch, Crafted, Defense, Loss, register
from dtrades_fast.ops import ce_loss


@register("standard")
@dataclass
class Standard(Defense):
    """Minimises the mean of ``CE(z, y)`` on clean images."""

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        return Crafted(batch.images)

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        logits = model(batch.images)
        ce, margin = ce_loss(logits, batch.labels)
        return Loss(ce, {"ce": ce.detach()}, clean_logits=logits.detach(), margin=margin)
