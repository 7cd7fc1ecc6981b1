"""MART (Wang et al. 2020): misclassification-aware adversarial training.

    loss = BCE(z', y) + beta KL(p || p') (1 - p_y)
    BCE(z', y) = -log p'_y - log(1 - max_{k != y} p'_k)
    attack: maximise CE(z', y), start x + 0.001 N(0, 1)

Neither p nor the weight 1 - p_y is detached. The published code adds 1e-4 + 1e-12 to 1 - p'_k and 1e-7 to the weight;
``clamps = "published"`` does the same; without them both are exact at any logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dtrades_fast.attacks import Model
from dtrades_fast.defenses.base import Batch, BNMode, Crafted, Defense, Loss, outer_forward, register
from dtrades_fast.ops import mart_loss

#: What the published code adds to 1 - p'_k, which it writes 1.0001 - p'_k + 1e-12, and to the weight.
PUBLISHED = 1e-4 + 1e-12, 1e-7


@register("mart")
@dataclass
class MART(Defense):
    """Minimises the mean of ``BCE(z', y) + beta KL(p || p') (1 - p_y)``.

    Args:
        beta: weight of the robust term.
        clamps: "published" adds the small constants of the published code under the logarithm and in the weight.
        bn_mode: order of the outer forwards, see :func:`~dtrades_fast.defenses.base.outer_forward`.
    """

    beta: float = 5.0
    clamps: Literal["none", "published"] = "none"
    bn_mode: BNMode = "clean_adv"

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        return self.pgd(attack_model, batch, objective="ce", start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        clean_logits, adv_logits = outer_forward(model, batch.images, crafted.adv, self.bn_mode)
        slack, weight_slack = PUBLISHED if self.clamps == "published" else (0.0, 0.0)
        loss = mart_loss(clean_logits, adv_logits, batch.labels, self.beta, slack, weight_slack)
        terms = {"bce": loss.bce, "kl": loss.kl, "weight": loss.weight}
        return Loss(loss.loss, terms, clean_logits.detach(), adv_logits.detach(), loss.margin)
