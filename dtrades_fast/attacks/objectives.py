"""What an attack maximises, as the gradient to the logits in closed form and the value per sample."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from dtrades_fast.ops import logit_grad_ce, logit_grad_kl


class Objective(Protocol):
    def logit_grad(self, logits: Tensor) -> Tensor:
        """d(sum over the batch)/d(logits), [N, C]."""

    def value(self, logits: Tensor) -> Tensor:
        """The objective per sample, [N]."""

    def select(self, rows: Tensor) -> Objective:
        """The same objective for a part of the batch."""


class CrossEntropy:
    """``CE(z', y)``: away from the labels."""

    def __init__(self, labels: Tensor):
        self.labels = labels

    def logit_grad(self, logits: Tensor) -> Tensor:
        return logit_grad_ce(logits, self.labels)

    def value(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels, reduction="none")

    def select(self, rows: Tensor) -> CrossEntropy:
        return type(self)(self.labels[rows])


class Targeted(CrossEntropy):
    """``-CE(z', t)``: towards the labels."""

    def logit_grad(self, logits: Tensor) -> Tensor:
        return -super().logit_grad(logits)

    def value(self, logits: Tensor) -> Tensor:
        return -super().value(logits)


class KL:
    """``KL(p || p')``: away from the clean prediction, whose log-probabilities are computed once."""

    def __init__(self, clean_log_probs: Tensor):
        self.clean_log_probs = clean_log_probs

    def logit_grad(self, logits: Tensor) -> Tensor:
        return logit_grad_kl(logits, self.clean_log_probs)

    def value(self, logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        return F.kl_div(log_q, self.clean_log_probs, reduction="none", log_target=True).sum(-1)

    def select(self, rows: Tensor) -> KL:
        return KL(self.clean_log_probs[rows])
