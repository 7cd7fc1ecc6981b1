"""What an attack maximises, as the gradient to the logits in closed form and the value per sample."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrades_fast.ops import logit_grad_ce, logit_grad_kl

#: Added to DLR's denominator, as published, so that equal logits do not divide by zero.
DLR_FLOOR = 1e-12


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


class Margin:
    """``max_{i != y} z'_i - z'_y`` (Carlini and Wagner 2017): positive where the model is fooled."""

    def __init__(self, labels: Tensor):
        self.labels = labels

    def logit_grad(self, logits: Tensor) -> Tensor:
        gradient = torch.zeros_like(logits)
        gradient.scatter_(1, strongest_rival(logits, self.labels)[:, None], 1)
        return gradient.scatter_(1, self.labels[:, None], -1)

    def value(self, logits: Tensor) -> Tensor:
        rival = strongest_rival(logits, self.labels)
        return (logits.gather(1, rival[:, None]) - logits.gather(1, self.labels[:, None])).squeeze(1)

    def select(self, rows: Tensor) -> Margin:
        return Margin(self.labels[rows])


class DLR:
    """``(max_{i != y} z'_i - z'_y) / (z'_(1) - z'_(3))``, difference of logits ratio (Croce and Hein 2020).

    ``z'_(k)`` is the k-th largest logit. Neither scale nor shift of the logits matters. Needs 3 classes.
    """

    def __init__(self, labels: Tensor):
        self.labels = labels

    def _parts(self, logits: Tensor) -> tuple[Tensor, Tensor, tuple[tuple[Tensor, float], ...]]:
        """Class whose logit the label's is subtracted from, denominator, and the logits' weights in it."""
        values, classes = logits.topk(3, 1)
        rival = torch.where(classes[:, 0] == self.labels, classes[:, 1], classes[:, 0])
        return rival, values[:, 0] - values[:, 2], ((classes[:, 0], 1.0), (classes[:, 2], -1.0))

    def logit_grad(self, logits: Tensor) -> Tensor:
        rival, denominator, weights = self._parts(logits)
        scale = 1 / (denominator + DLR_FLOOR)
        difference = logits.gather(1, rival[:, None]) - logits.gather(1, self.labels[:, None])
        by_denominator = -difference.squeeze(1) * scale.square()
        gradient = torch.zeros_like(logits)
        for column, amount in ((rival, scale), (self.labels, -scale)):
            gradient.scatter_add_(1, column[:, None], amount[:, None])
        for column, weight in weights:
            gradient.scatter_add_(1, column[:, None], (weight * by_denominator)[:, None])
        return gradient

    def value(self, logits: Tensor) -> Tensor:
        rival, denominator, _ = self._parts(logits)
        difference = logits.gather(1, rival[:, None]) - logits.gather(1, self.labels[:, None])
        return difference.squeeze(1) / (denominator + DLR_FLOOR)

    def select(self, rows: Tensor) -> DLR:
        return DLR(self.labels[rows])


class TargetedDLR(DLR):
    """``(z'_t - z'_y) / (z'_(1) - (z'_(3) + z'_(4)) / 2)`` for a class t; needs 4 classes (Croce and Hein 2020)."""

    def __init__(self, labels: Tensor, targets: Tensor):
        super().__init__(labels)
        self.targets = targets

    def _parts(self, logits: Tensor) -> tuple[Tensor, Tensor, tuple[tuple[Tensor, float], ...]]:
        values, classes = logits.topk(4, 1)
        weights = ((classes[:, 0], 1.0), (classes[:, 2], -0.5), (classes[:, 3], -0.5))
        return self.targets, values[:, 0] - (values[:, 2] + values[:, 3]) / 2, weights

    def select(self, rows: Tensor) -> TargetedDLR:
        return TargetedDLR(self.labels[rows], self.targets[rows])


def strongest_rival(logits: Tensor, labels: Tensor) -> Tensor:
    """Class of the largest logit but the label's, [N]."""
    return ranked_rival(logits, labels, 1)


def ranked_rival(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Class of the ``rank``-th largest logit, from 1, among those but the label's, [N]."""
    return logits.scatter(1, labels[:, None], -torch.inf).topk(rank, 1).indices[:, rank - 1]
