"""FAAL (Zhang et al. 2024): fairness by class-wise distributionally robust weights.

    loss = (C / N) sum_i q_{y_i} l_i,   l the loss of AT, TRADES or MART
    q = argmax_q sum_c q_c a_c  over distributions with KL(u || q) <= radius, u uniform
    a_c = n_c m_c, m_c the mean over the class of (largest wrong probability - true probability), n_c its count
    attack: as in the base method

The maximiser has a closed form but for one number, the root mu > max a of a decreasing function:

    q_c = (u_c / (mu - a_c)) / sum_j u_j / (mu - a_j)
    sum_c u_c log(mu - a_c) + log sum_c u_c / (mu - a_c) = radius

where the published code calls a convex solver. The weights are constants of the loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dtrades_fast import processes
from dtrades_fast.attacks import Model
from dtrades_fast.defenses.at import AT
from dtrades_fast.defenses.base import Batch, BNMode, Crafted, Defense, Loss, register
from dtrades_fast.defenses.mart import MART
from dtrades_fast.defenses.trades import TRADES

#: Halvings of an interval of at most 1,500 around log t: what is left is beyond float64.
_HALVINGS = 60
#: log t below which float64 has no t: the weights then lie on the largest values alone.
_LOWEST = -700.0


@register("faal")
@dataclass
class FAAL(Defense):
    """Minimises the base method's loss with each class weighted by how badly the batch's adversarial images do in it.

    Args:
        base_loss: the method whose per-sample loss and attack are used: "at", "trades" or "mart".
        beta: weight of the robust term of TRADES or MART; "at" has none.
        radius: how far the class weights may be from uniform, KL(u || q) in nats; 0 leaves them uniform.
        margin: "count" weights each class's mean margin with its number of samples, as published; "mean" does not.
        absent_class: "mask" spreads the weights over the classes of the batch; "official" gives a class that the batch
            lacks the margin 0, as the published code does, and it may take most of the weight.
        bn_mode: order of the outer forwards, see :func:`~dtrades_fast.defenses.base.outer_forward`.
    """

    base_loss: Literal["at", "trades", "mart"] = "trades"
    beta: float = 6.0
    radius: float = 0.5
    margin: Literal["count", "mean"] = "count"
    absent_class: Literal["mask", "official"] = "mask"
    bn_mode: BNMode = "clean_adv"

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius must be >= 0, got {self.radius}")

    def base(self) -> Defense:
        """The base method under the threat of this moment, which may grow during training."""
        if self.base_loss == "at":
            return AT(self.threat)
        if self.base_loss == "mart":
            return MART(self.threat, self.beta, bn_mode=self.bn_mode)
        return TRADES(self.threat, self.beta, self.bn_mode)

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        return self.base().craft(attack_model, batch)

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        loss = self.base().loss(model, batch, crafted)
        assert loss.adv_logits is not None
        assert loss.margin is not None
        counts, margins = class_means(loss.margin, batch.labels, loss.adv_logits.shape[1])
        values = margins * counts if self.margin == "count" else margins
        considered = counts > 0 if self.absent_class == "mask" else torch.ones_like(counts, dtype=torch.bool)
        weights = class_weights(values, considered, self.radius) * considered.sum()
        weight = weights.to(loss.per_sample.dtype)[batch.labels]
        return dataclasses.replace(
            loss, per_sample=weight * loss.per_sample, terms={**loss.terms, "class_weight": weight}
        )


def class_means(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Samples per class and the mean of their values, [classes] each, float64; the mean of no sample is 0.

    Of several processes, each of which has a part of the batch, all count.
    """
    zeros = torch.zeros(2, classes, dtype=torch.float64, device=values.device)
    one_and_value = torch.stack((torch.ones_like(values), values)).double()
    counts, sums = processes.total(zeros.index_add(1, labels, one_and_value))
    return counts, sums / counts.clamp(min=1)


def class_weights(values: Tensor, considered: Tensor, radius: float) -> Tensor:
    r"""The distribution q that maximises ``sum_c q_c a_c`` subject to ``KL(u || q) <= radius``.

    With ``d_c = max a - a_c`` the root is sought as ``t = mu - max a > 0``, in

    .. math:: g(t) = \sum_c u_c \log(t + d_c) + \log \sum_c \frac{u_c}{t + d_c},

    which falls from infinity to 0. By Jensen ``g(t) <= E[d] / t``, which bounds the root from above; leaving out the
    classes other than the largest from the second sum bounds it from below. In between the interval of ``log t`` is
    halved a fixed number of times, so that nothing depends on the host.

    Args:
        values: ``a``, [C], float64.
        considered: [C] bool, the classes that u and q are spread over; the others get 0.
        radius: >= 0.

    Returns:
        q, [C], float64. With all values equal, or radius 0, it is uniform.
    """
    u = considered.double() / considered.sum()
    d = torch.where(considered, values.where(considered, -torch.inf).amax() - values, 0)
    largest = considered & (d == 0)
    share = (u * largest).sum()
    rest = torch.where(largest | ~considered, 0, u * d.log()).sum()
    lower = ((share.log() + rest - radius) / (1 - share)).clamp(min=_LOWEST)
    upper = ((u * d).sum() / radius).log() if radius > 0 else lower
    for _ in range(_HALVINGS):
        middle = (lower + upper) / 2
        t = middle.exp() + d
        too_large = (u * t.log()).sum() + (u / t).sum().log() > radius
        lower, upper = torch.where(too_large, middle, lower), torch.where(too_large, upper, middle)
    q = u / (((lower + upper) / 2).exp() + d)
    q = q / q.sum()
    has_root = (share < 1) & (radius > 0)
    return torch.where(has_root, q, u)
