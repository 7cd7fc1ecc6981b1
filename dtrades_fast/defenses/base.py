"""The interface of a defense, and the registry that makes a new one a new file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrades_fast.attacks import PGD, Model

BNMode = Literal["clean_adv", "adv_clean", "clean_adv_clean", "concat"]


@dataclass(frozen=True)
class Threat:
    """What the attack inside training may do: radius, steps, step size (pixel units) and norm."""

    epsilon: float
    steps: int = 10
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        images: [N, C, H, W] in [0, 1].
        labels: [N] int64.
        index: [N] int64, each sample's id in its data set, for its random numbers.
        key: the stream of random numbers of this step.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    key: int


@dataclass(frozen=True)
class Crafted:
    """What crafting leaves for the loss: the adversarial images and, for D-TRADES, an input gradient of the KL."""

    adv: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """What a defense returns for a batch.

    Attributes:
        per_sample: the loss of each sample, [N]; its mean is minimised.
        terms: per-sample values [N], detached, by name; those in the loss first.
        clean_logits: [N, classes], detached, or None if the defense makes no clean pass.
        adv_logits: [N, classes], detached, or None if it makes no adversarial pass.
    """

    per_sample: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    clean_logits: Tensor | None = None
    adv_logits: Tensor | None = None

    @cached_property
    def total(self) -> Tensor:
        """The scalar that is minimised."""
        return self.per_sample.mean()


@dataclass
class Defense(ABC):
    """Crafts the adversarial batch and turns it into a loss.

    It never touches the optimizer, the loop, the device or files; the trainer never knows which defense it runs.
    The dataclass fields of a subclass, after ``threat``, are its options on the command line and in recipes.
    """

    threat: Threat
    name: ClassVar[str]

    @abstractmethod
    def craft(self, attack_model: Model, batch: Batch) -> Crafted:
        """The adversarial batch. ``attack_model`` is in eval mode with frozen parameters."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, crafted: Crafted) -> Loss:
        """The loss; ``model`` is in train mode."""

    def pgd(self, **settings: Any) -> PGD:
        """PGD under this defense's threat."""
        threat = self.threat
        return PGD(threat.epsilon, threat.steps, threat.step_size, threat.norm, **settings)


D = TypeVar("D", bound=type[Defense])
REGISTRY: dict[str, type[Defense]] = {}


def register(name: str) -> Callable[[D], D]:
    """Make a defense known by the name that the command line uses."""

    def add(cls: D) -> D:
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def outer_forward(model: nn.Module, clean: Tensor, adv: Tensor, bn_mode: BNMode) -> tuple[Tensor, Tensor]:
    """Clean and adversarial logits, [N, classes] each, with the forwards in the order that ``bn_mode`` names.

    The order decides the share of adversarial batches in the running statistics of BatchNorm (momentum 0.1):
    ``clean_adv`` 0.526 (MART), ``adv_clean`` 0.474 (RST, FAAL), ``clean_adv_clean`` 0.332 (official TRADES, whose third
    pass only moves the statistics), ``concat`` normalises both jointly.
    """
    if bn_mode == "concat":
        both = model(torch.cat((clean, adv)))
        return both[: len(clean)], both[len(clean) :]
    if bn_mode == "adv_clean":
        adv_logits = model(adv)
        return model(clean), adv_logits
    clean_logits = model(clean)
    adv_logits = model(adv)
    if bn_mode == "clean_adv_clean":
        with torch.no_grad():
            model(clean)
    return clean_logits, adv_logits


def at_least_float32(logits: Tensor) -> Tensor:
    """Losses are computed in float32, in float64 where the logits are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log p_y`` per sample, [N]."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def details(**terms: Tensor) -> dict[str, Tensor]:
    """Per-sample terms for the log, cut off from the graph."""
    return {name: value.detach() for name, value in terms.items()}
