"""Accuracy under attack: one flag per sample, and the figures that follow from the flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtrades_fast.attacks import Attack
from dtrades_fast.data import ImageSet
from dtrades_fast.models.attack_network import AttackNetwork

__all__ = ["Robustness", "accuracy", "correct", "per_class", "robustness"]


def correct(
    model: nn.Module,
    images: ImageSet,
    attack: Attack | None,
    key: int,
    batch_size: int,
    form: AttackNetwork | None = None,
) -> Tensor:
    """Whether each image is classified correctly, after the attack if one is given, on a form of the model if given.

    The model is put in eval mode. Random numbers belong to samples, so the flags do not depend on the batch size. Where
    the form is fooled and the model is not, as in half precision near the boundary, where an attack that stops early
    ends, the model itself is attacked.

    Returns:
        [N], bool, on the host.
    """
    model.eval()
    flags = []
    for begin in range(0, len(images), batch_size):
        part = slice(begin, begin + batch_size)
        x, labels, ids = images.images(part), images.labels[part], images.ids[part]
        if attack is None:
            flags.append(is_right(model, x, labels))
        elif form is None:
            flags.append(is_right(model, attack(model, x, labels, index=ids, key=key), labels))
        else:
            adv = attack(form, x.contiguous(memory_format=form.layout), labels, index=ids, key=key)
            right = is_right(model, adv, labels)
            again = (right & ~is_right(form, adv, labels)).nonzero()[:, 0]
            if len(again):
                adv = attack(model, x[again], labels[again], index=ids[again], key=key)
                right[again] = is_right(model, adv, labels[again])
            flags.append(right)
    return torch.cat(flags).cpu() if flags else torch.zeros(0, dtype=torch.bool)


def is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether its prediction is the label, [N], bool."""
    with torch.no_grad():
        return model(images).argmax(1) == labels


def accuracy(flags: Tensor) -> float:
    """Share of correct samples, 0 to 1."""
    return flags.double().mean().item()


def per_class(flags: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Accuracy by class name, for the classes that occur."""
    chosen = {name: flags[labels == label] for label, name in enumerate(classes)}
    return {name: accuracy(part) for name, part in chosen.items() if len(part)}


@dataclass(frozen=True)
class Robustness:
    """How a model fares under one attack. All are shares from 0 to 1.

    Attributes:
        ra: robust accuracy.
        rd: robustness drop, ``NA - RA``.
        asr_all: attack success rate over all points, ``1 - RA``.
        asr_correct: attack success rate over the correctly classified points, ``RD / NA``; None if there are none.
        per_class: RA by class.
        worst_class: the class of lowest RA.
        worst_class_ra: its RA.
        spread: highest minus lowest RA of a class.
    """

    ra: float
    rd: float
    asr_all: float
    asr_correct: float | None
    per_class: dict[str, float]
    worst_class: str
    worst_class_ra: float
    spread: float


def robustness(natural: Tensor, robust: Tensor, labels: Tensor, classes: Sequence[str]) -> Robustness:
    """The figures from the flags without and with the attack, and the labels, [N] each, on the host."""
    na, ra = accuracy(natural), accuracy(robust)
    by_class = per_class(robust, labels, classes)
    worst = min(by_class, key=lambda name: by_class[name])
    return Robustness(
        ra=ra,
        rd=na - ra,
        asr_all=1 - ra,
        asr_correct=(na - ra) / na if na else None,
        per_class=by_class,
        worst_class=worst,
        worst_class_ra=by_class[worst],
        spread=max(by_class.values()) - by_class[worst],
    )
