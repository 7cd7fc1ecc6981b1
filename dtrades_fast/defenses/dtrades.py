"""D-TRADES: TRADES whose weight is a function of the input.

    loss = CE(z, y) + lambda(x) KL(p || p')
    lambda(x) = clip(lambda_base + lambda_alpha H(p) + lambda_beta ||grad_{x'} KL(p || p')||_2)
    attack: as in TRADES

The entropy H (nats) comes from the clean logits of the outer pass, the gradient from the eval view of the network, in
pixel space and from the sum over the batch, so that it is each sample's own. With lambda_alpha = lambda_beta = 0 this
is TRADES with beta = lambda_base, bit for bit. Source: the thesis that proposes it, sections 6.2 to 6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtrades_fast.attacks import Model, eval_mode, frozen, input_gradient
from dtrades_fast.defenses.base import Batch, BNMode, Crafted, Defense, Loss, outer_forward, register
from dtrades_fast.defenses.trades import trades_loss
from dtrades_fast.ops import entropy_kl, lambda_x, logit_grad_kl
from dtrades_fast.profiling import span


@register("dtrades")
@dataclass
class DTRADES(Defense):
    """Minimises the mean of ``CE(z, y) + lambda(x) KL(p || p')``.

    Args:
        lambda_alpha: weight of the entropy of the clean prediction (at most ln C nats).
        lambda_beta: weight of the sensitivity, the L2 norm of the input gradient of the KL.
        lambda_base: constant part of lambda.
        lambda_min: lambda is clipped from below here.
        lambda_max: lambda is clipped from above here.
        lambda_gradient: "none" treats lambda as a weight, "entropy" lets gradients flow through H, "full" also through
            the gradient norm, by a double backward through the network in eval mode with x' held constant.
        sensitivity_at: "final" takes the gradient at the final x' (one more pass, as the thesis has it), "last_step"
            reuses the attack's last one, taken one step before, for free.
        bn_mode: order of the outer forwards, see :func:`~dtrades_fast.defenses.base.outer_forward`.
    """

    lambda_alpha: float = 1.0
    lambda_beta: float = 1.0
    lambda_base: float = 0.0
    lambda_min: float = 0.0
    lambda_max: float = math.inf
    lambda_gradient: Literal["none", "entropy", "full"] = "none"
    sensitivity_at: Literal["final", "last_step"] = "final"
    bn_mode: BNMode = "clean_adv"

    def __post_init__(self) -> None:
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"lambda_min must not exceed lambda_max, got {self.lambda_min} and {self.lambda_max}")
        if self.sensitivity_at == "last_step" and self.threat.steps < 1:
            raise ValueError("sensitivity_at='last_step' needs at least one attack step, got steps=0")
        if self.lambda_gradient == "full" and self.sensitivity_at == "last_step":
            raise ValueError("lambda_gradient='full' needs sensitivity_at='final': the last step's x' is not kept")

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        attack = self.pgd(objective="kl", start="gaussian")
        with frozen(attack_model):
            objective = attack.make_objective(attack_model, batch.images, batch.labels)
            result = attack.ascend(attack_model, batch.images, objective, batch.index, batch.key)
            if self.lambda_gradient == "full":
                return Crafted(result.adv)  # the loss takes the gradient again, within its graph
            if self.sensitivity_at == "last_step":
                return Crafted(result.adv, result.last_gradient)
            with span("sensitivity"):
                return Crafted(result.adv, input_gradient(attack_model, result.adv, objective))

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        gradient = crafted.gradient
        if self.lambda_gradient == "full":  # before the outer passes move the statistics of BatchNorm
            gradient = kl_gradient_in_graph(model, batch.images, crafted.adv)
        if gradient is None:
            raise ValueError("crafted has no gradient: pass what DTRADES.craft returned")
        clean_logits, adv_logits = outer_forward(model, batch.images, crafted.adv, self.bn_mode)
        kl = entropy_kl(clean_logits, adv_logits).kl
        weight = lambda_x(
            clean_logits.detach() if self.lambda_gradient == "none" else clean_logits,
            gradient,
            self.lambda_alpha,
            self.lambda_beta,
            self.lambda_base,
            self.lambda_min,
            self.lambda_max,
        )
        extra = {"lambda": weight.value, "entropy": weight.entropy, "sensitivity": weight.sensitivity}
        return trades_loss(clean_logits, adv_logits, batch.labels, kl, weight.value, **extra)


def kl_gradient_in_graph(model: nn.Module, images: Tensor, adv: Tensor) -> Tensor:
    """``grad_{x'} KL(p || p')`` of each sample, [N, ...], as a differentiable function of the parameters.

    Both predictions come from the network in eval mode, with copies of its buffers: the outer passes move BatchNorm's
    statistics in place before the backward reads them, and autograd would not notice.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with eval_mode(model), torch.enable_grad():
        adv = adv.detach().requires_grad_()
        adv_logits = functional_call(model, buffers, (adv,))
        clean_logits = functional_call(model, buffers, (images,))
        direction = logit_grad_kl(adv_logits, clean_logits.log_softmax(-1))
        return torch.autograd.grad(adv_logits, adv, direction, create_graph=True)[0]
