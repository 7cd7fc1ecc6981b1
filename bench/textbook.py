"""Training steps as the published code writes them, in plain PyTorch: what this package's steps are compared with.

The attack runs on the model itself, whose parameters require gradients, in the default memory format; the clean
prediction is computed anew in each attack step; TRADES passes the clean images through the model twice in its loss
(clean, adversarial, clean), D-TRADES too; MART passes clean and adversarial images once each, FAAL the adversarial
ones first. Random starts are those of this package, so that both can be compared to the last bits.

Sources: Madry et al. 2018 (AT), Zhang et al. 2019 (TRADES), Wang et al. 2020 (MART), Zhang et al. 2024 (FAAL, with its
class weights from this package instead of a convex solver), and the thesis on D-TRADES.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrades_fast.defenses import Threat
from dtrades_fast.defenses.faal import class_means, class_weights
from dtrades_fast.ops import random_start

#: Options under which this package computes the same: the order of the outer passes, and MART's small constants.
SAME: dict[str, dict[str, object]] = {
    "at": {},
    "trades": {"bn_mode": "clean_adv_clean"},
    "dtrades": {"bn_mode": "clean_adv_clean", "lambda_base": 1.0, "lambda_alpha": 2.0, "lambda_beta": 3.0},
    "mart": {"clamps": "published"},
    "faal": {"bn_mode": "adv_clean"},
}
BETA = {"trades": 6.0, "mart": 5.0, "faal": 6.0}
RADIUS = 0.5  #: of FAAL's class weights


@dataclass
class Textbook:
    """A model, its optimizer, and the method that trains it."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    threat: Threat

    def step(self, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        """One training step; returns its loss."""
        self.model.eval()
        adv = self.attack(images, labels, index, key)
        weight = None
        if self.method == "dtrades":
            weight = self.input_dependent_weight(images, adv)
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss(images, adv, labels, weight)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def attack(self, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        epsilon = self.threat.epsilon
        step_size = epsilon / 4 if self.threat.step_size is None else self.threat.step_size
        if self.method == "at":
            adv = random_start(images, index, "linf", epsilon, key)
        else:
            adv = random_start(images, index, "gaussian", 0.001, key)
        for _ in range(self.threat.steps):
            adv.requires_grad_()
            if self.method in ("at", "mart"):
                loss = F.cross_entropy(self.model(adv), labels)
            else:
                loss = divergence(self.model(images), self.model(adv)).sum()
            (gradient,) = torch.autograd.grad(loss, adv)
            adv = adv.detach() + step_size * gradient.sign()
            adv = torch.min(torch.max(adv, images - epsilon), images + epsilon).clamp(0, 1)
        return adv

    def input_dependent_weight(self, images: Tensor, adv: Tensor) -> Tensor:
        """``base + beta ||grad KL||``; the entropy's part is added in the loss, from the logits of the outer pass."""
        adv = adv.clone().requires_grad_()
        loss = divergence(self.model(images), self.model(adv)).sum()
        (gradient,) = torch.autograd.grad(loss, adv)
        options = SAME["dtrades"]
        return options["lambda_base"] + options["lambda_beta"] * gradient.flatten(1).norm(dim=1)  # type: ignore[operator,no-any-return]

    def loss(self, images: Tensor, adv: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        model, method = self.model, self.method
        if method == "at":
            return F.cross_entropy(model(adv), labels)
        if method == "mart":
            clean_logits, adv_logits = model(images), model(adv)
            return mart(clean_logits, adv_logits, labels)
        if method == "faal":
            adv_logits, clean_logits = model(adv), model(images)
            per_sample = F.cross_entropy(clean_logits, labels, reduction="none")
            per_sample = per_sample + BETA["faal"] * divergence(clean_logits, adv_logits)
            return (faal_weights(adv_logits.detach(), labels) * per_sample).mean()
        clean_logits = model(images)
        ce = F.cross_entropy(clean_logits, labels)
        adv_logits = model(adv)
        kl = divergence(model(images), adv_logits)
        if weight is None:
            return ce + BETA["trades"] * kl.mean()
        prediction = clean_logits.detach().softmax(1)
        entropy = -(prediction * prediction.log()).sum(1)
        return ce + ((weight + SAME["dtrades"]["lambda_alpha"] * entropy) * kl).mean()  # type: ignore[operator]


def divergence(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """``KL(p || p')`` per sample."""
    return F.kl_div(adv_logits.log_softmax(1), clean_logits.softmax(1), reduction="none").sum(1)


def mart(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
    adv = adv_logits.softmax(1)
    two = adv.argsort(1)[:, -2:]
    rival = torch.where(two[:, -1] == labels, two[:, -2], two[:, -1])
    bce = F.cross_entropy(adv_logits, labels) + F.nll_loss((1.0001 - adv + 1e-12).log(), rival)
    clean = clean_logits.softmax(1)
    true = clean.gather(1, labels[:, None]).squeeze(1)
    return bce + BETA["mart"] * (divergence(clean_logits, adv_logits) * (1.0000001 - true)).mean()


def faal_weights(adv_logits: Tensor, labels: Tensor) -> Tensor:
    """``C q_y`` of each sample, with the classes of the batch alone."""
    probabilities = adv_logits.softmax(1)
    true = probabilities.gather(1, labels[:, None]).squeeze(1)
    margin = probabilities.scatter(1, labels[:, None], -torch.inf).amax(1) - true
    counts, margins = class_means(margin, labels, adv_logits.shape[1])
    present = counts > 0
    weights = class_weights(margins * counts, present, RADIUS) * present.sum()
    return weights.to(adv_logits.dtype)[labels]
