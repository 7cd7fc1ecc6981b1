"""D-TRADES: TRADES whose weight is a function of the input.

    loss = CE(z, y) + lambda(x) KL(p || p')
    lambda(x) = clip(lambda_base + lambda_alpha H(p) + lambda_beta ||grad_{x'} KL(p || p')||_2)
    attack: as in TRADES

The entropy H (nats) comes from the clean logits of the outer pass, the gradient from the eval view of the network, in
pixel space and from the sum over the batch, so that it is each sample's own. With lambda_alpha = lambda_beta = 0 this
is TRADES with beta = lambda_base, bit for bit. Source: the thesis that proposes it, sections 6.2 to 6.4.

Entropy and sensitivity have sizes of their own, which depend on the data, the network and epsilon. So by default the
two weights are calibrated: a warm-up trains with the constant lambda_mean, then, from its last batches,

    lambda_alpha = (1 - lambda_share) (lambda_mean - lambda_base) / mean H
    lambda_beta = lambda_share (lambda_mean - lambda_base) / mean ||grad||

are fixed for the rest of training.

The defaults. Measured with ResNet-18 of width 8 on 3,000 images, 8 epochs (``dtrades-fast train --method dtrades
--preset quick --threads 1``, which trains with lambda 4 for 4 epochs; the means of each epoch are in metrics.jsonl):

    digits, epsilon 0.3           mean H 2.23 in epoch 1, 0.50 in epoch 4, 1.35 in epoch 8; mean norm 0.37, 0.18, 0.11
    CIFAR images, epsilon 8/255   mean H 2.18, 1.95, 2.01; mean norm 0.34, 0.11, 0.07

So with alpha = beta = 1 lambda would be about 1.5 on digits and 2.1 on CIFAR, nearly all of it entropy: far below
TRADES' published 6, and the sensitivity without a say. Hence ``lambda_mean = 6``, TRADES' beta, half of it from either.
After calibration the mean moves with what it is made of: from 4 to between 3.3 (CIFAR) and 6.9 (digits) in those runs.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtrades_fast import processes, rng
from dtrades_fast.attacks import Model, eval_mode
from dtrades_fast.defenses.base import Batch, BNMode, Crafted, Defense, Loss, outer_forward, register
from dtrades_fast.defenses.trades import weighted_kl
from dtrades_fast.ops import logit_grad_kl


@register("dtrades")
@dataclass
class DTRADES(Defense):
    """Minimises the mean of ``CE(z, y) + lambda(x) KL(p || p')``.

    Args:
        lambda_alpha: weight of the entropy of the clean prediction (at most ln C nats); found by calibration if neither
            it nor lambda_beta is given.
        lambda_beta: weight of the sensitivity, the L2 norm of the input gradient of the KL; as lambda_alpha.
        lambda_base: constant part of lambda.
        lambda_min: lambda is clipped from below here.
        lambda_max: lambda is clipped from above here.
        lambda_mean: the constant lambda of the warm-up, and the mean that calibration aims at.
        lambda_share: share, 0 to 1, of lambda_mean above lambda_base that calibration gives to the sensitivity.
        lambda_warmup: epochs of training with the constant lambda_mean; 1 with calibration, else 0.
        calibration_batches: the last batches of the warm-up, whose means calibration takes.
        lambda_gradient: "none" treats lambda as a weight, "entropy" lets gradients flow through H, "full" also through
            the gradient norm, by a double backward through the network in eval mode with x' held constant.
        lambda_shuffle: each sample gets the weight of another one, by a random permutation of the batch: a control with
            the same weights and no input dependence. Needs lambda_gradient "none".
        sensitivity_at: "final" takes the gradient at the final x' (one more pass, as the thesis has it), "last_step"
            reuses the attack's last one, taken one step before, for free.
        bn_mode: order of the outer forwards, see :func:`~dtrades_fast.defenses.base.outer_forward`.
    """

    lambda_alpha: float | None = None
    lambda_beta: float | None = None
    lambda_base: float = 0.0
    lambda_min: float = 0.0
    lambda_max: float = math.inf
    lambda_mean: float = 6.0
    lambda_share: float = 0.5
    lambda_warmup: float | None = None
    calibration_batches: int = 50
    lambda_gradient: Literal["none", "entropy", "full"] = "none"
    lambda_shuffle: bool = False
    sensitivity_at: Literal["final", "last_step"] = "final"
    bn_mode: BNMode = "clean_adv"

    def __post_init__(self) -> None:
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"lambda_min must not exceed lambda_max, got {self.lambda_min} and {self.lambda_max}")
        if self.sensitivity_at == "last_step" and self.threat.steps < 1:
            raise ValueError("sensitivity_at='last_step' needs at least one attack step, got steps=0")
        if self.lambda_gradient == "full" and self.sensitivity_at == "last_step":
            raise ValueError("lambda_gradient='full' needs sensitivity_at='final': the last step's x' is not kept")
        if self.lambda_shuffle and self.lambda_gradient != "none":
            raise ValueError(f"lambda_shuffle needs lambda_gradient='none', got {self.lambda_gradient!r}")
        if (self.lambda_alpha is None) != (self.lambda_beta is None):
            raise ValueError(
                "lambda_alpha and lambda_beta must be given both or neither (which calibrates them), "
                f"got {self.lambda_alpha} and {self.lambda_beta}"
            )
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {self.calibration_batches}")
        if self.lambda_warmup is None:
            self.lambda_warmup = 1.0 if self.calibrates else 0.0
        if self.lambda_warmup < 0:
            raise ValueError(f"lambda_warmup must be at least 0 epochs, got {self.lambda_warmup}")
        if self.calibrates:
            self._check_calibration()
        elif not self.lambda_min <= self.lambda_mean <= self.lambda_max and self.lambda_warmup:
            raise ValueError(f"lambda_mean must lie between lambda_min and lambda_max, got {self.lambda_mean}")
        self._weights = (self.lambda_alpha, self.lambda_beta)
        self._recent: deque[Tensor] = deque(maxlen=self.calibration_batches)  # samples, sum of H, sum of the norms

    @property
    def calibrates(self) -> bool:
        """Whether alpha and beta are found rather than given."""
        return self.lambda_alpha is None

    def _check_calibration(self) -> None:
        if self.lambda_warmup == 0:
            raise ValueError(
                "without lambda_alpha and lambda_beta they are calibrated after a warm-up: "
                "lambda_warmup must be above 0 epochs, got 0"
            )
        if not 0 <= self.lambda_share <= 1:
            raise ValueError(f"lambda_share must be a share of lambda_mean from 0 to 1, got {self.lambda_share}")
        lowest = max(self.lambda_base, self.lambda_min)
        if not lowest <= self.lambda_mean <= self.lambda_max:
            raise ValueError(
                "lambda_mean must lie between lambda_min or lambda_base and lambda_max, "
                f"[{lowest}, {self.lambda_max}], got {self.lambda_mean}"
            )

    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        # "full" takes its gradient in the loss, within the graph
        final = self.sensitivity_at == "final" and self.lambda_gradient != "full"
        return self.pgd(attack_model, batch, objective="kl", start="gaussian", final=final)

    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        if self.lambda_gradient == "full":  # before the outer passes move the statistics of BatchNorm
            gradient = kl_gradient_in_graph(model, batch.images, crafted.adv)
            sensitivity = torch.linalg.vector_norm(gradient.flatten(1).double(), dim=1).to(gradient.dtype)
        elif crafted.watch is not None and crafted.watch.stats is not None:
            sensitivity = crafted.watch.stats.l2
        else:
            raise ValueError("crafted has seen no gradient: pass what DTRADES.craft returned")
        clean_logits, adv_logits = outer_forward(model, batch.images, crafted.adv, self.bn_mode)
        logits = clean_logits, adv_logits, batch.labels
        loss = weighted_kl(*logits, sensitivity=sensitivity, **self.weight_at(batch.epoch))
        if self.lambda_shuffle:
            weight = loss.terms["lambda"][permutation(batch)]
            loss = weighted_kl(*logits, sensitivity=weight, base=0.0, beta=1.0)
        loss.terms["sensitivity"] = sensitivity.detach()
        if self.calibrates and None in self._weights:
            self._remember(loss.terms["entropy"], loss.terms["sensitivity"])
        return loss

    def weight_at(self, epoch: float) -> dict[str, Any]:
        """What lambda is made of at a moment of training, as the arguments of :func:`~dtrades_fast.ops.trades_loss`.

        The first call after the warm-up calibrates.
        """
        assert self.lambda_warmup is not None
        if epoch < self.lambda_warmup:
            return {"base": self.lambda_mean}
        if None in self._weights:
            self._calibrate()
        alpha, beta = self._weights
        return {
            "base": self.lambda_base,
            "alpha": alpha,
            "beta": beta,
            "minimum": self.lambda_min,
            "maximum": self.lambda_max,
            "entropy_gradient": self.lambda_gradient != "none",
        }

    def _remember(self, entropy: Tensor, sensitivity: Tensor) -> None:
        self._recent.append(torch.stack((torch.ones_like(entropy), entropy, sensitivity)).double().sum(1))

    def _calibrate(self) -> None:
        """The one time that the host reads what the device has computed."""
        if not self._recent:
            raise RuntimeError(
                "nothing to calibrate lambda with: training began behind the warm-up. Begin at epoch 0, or give "
                "lambda_alpha and lambda_beta"
            )
        samples, entropy, sensitivity = processes.total(torch.stack(tuple(self._recent)).sum(0)).tolist()
        if not (entropy > 0 and sensitivity > 0):
            raise RuntimeError(
                f"lambda cannot be calibrated: after the warm-up the mean entropy is {entropy / samples:.3g} nats and "
                f"the mean sensitivity {sensitivity / samples:.3g}. Give --lambda-alpha and --lambda-beta"
            )
        above = self.lambda_mean - self.lambda_base
        alpha = (1 - self.lambda_share) * above * samples / entropy
        self._weights = (alpha, self.lambda_share * above * samples / sensitivity)
        self._recent.clear()

    def describe(self, epochs: int) -> str:
        assert self.lambda_warmup is not None
        if self.lambda_warmup >= epochs:
            return f"lambda is {self.lambda_mean:g} throughout, as in TRADES: the warm-up is as long as training"
        warm = f"lambda {self.lambda_mean:g} for {self.lambda_warmup:g} epochs, then " if self.lambda_warmup else ""
        if not self.calibrates:
            return f"{warm}lambda {self.lambda_base:g} + {self.lambda_alpha:g} H + {self.lambda_beta:g} ||grad||"
        return (
            f"{warm}calibrated to that mean, {self.lambda_share:.0%} of it above {self.lambda_base:g} from sensitivity"
        )

    def figures(self) -> dict[str, float]:
        alpha, beta = self._weights
        return {} if alpha is None or beta is None else {"lambda_alpha": alpha, "lambda_beta": beta}

    def state_dict(self) -> dict[str, Any]:
        """With the sums of all processes."""
        return {"weights": list(self._weights), "recent": [processes.total(sums) for sums in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The first process takes the sums; those of the others begin anew."""
        alpha, beta = state["weights"]
        self._weights = (alpha, beta)
        self._recent.extend(sums * (processes.rank() == 0) for sums in state["recent"])


def permutation(batch: Batch) -> Tensor:
    """A random order of the batch, [N], made on its device."""
    device = batch.labels.device
    random = torch.Generator(device).manual_seed(rng.key(batch.key, "shuffle"))
    return torch.randperm(len(batch.labels), generator=random, device=device)


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
