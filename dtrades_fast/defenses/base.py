"""The interface of a defense, and the registry that makes a new one a new file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from dtrades_fast.attacks import PGD, Graph, Model, Seen, Watch, frozen, input_gradient
from dtrades_fast.attacks.base import check_images
from dtrades_fast.profiling import span

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
        epoch: how much of training lies behind, in epochs.
        noise: [], standard deviation in pixel units of Gaussian noise on the images that the attack starts from.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    key: int
    epoch: float = 0.0
    noise: Tensor | None = None


@dataclass(frozen=True)
class Crafted:
    """What crafting leaves for the loss and for the monitor.

    Attributes:
        adv: the adversarial images, [N, C, H, W].
        watch: what the input gradients of the attack said; None without an attack.
    """

    adv: Tensor
    watch: Watch | None = None


@dataclass(frozen=True)
class Loss:
    """What a defense returns for a batch.

    Attributes:
        per_sample: the loss of each sample, [N]; its mean is minimised.
        terms: per-sample values [N], detached, by name; those in the loss first.
        clean_logits: [N, classes], detached, or None if the defense makes no clean pass.
        adv_logits: [N, classes], detached, or None if it makes no adversarial pass.
        margin: largest wrong probability minus that of the label, [N], on the adversarial images if there are any.
    """

    per_sample: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    clean_logits: Tensor | None = None
    adv_logits: Tensor | None = None
    margin: Tensor | None = None

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

    def describe(self, epochs: int) -> str:
        """What is worth saying before a training of that many epochs; nothing by default."""
        return ""

    def figures(self) -> dict[str, float]:
        """What the method has found for itself so far, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the options: tensors, numbers, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most defenses have nothing to load)
        """Go on from a :meth:`state_dict`, whose tensors are on the device of training."""

    def pgd(self, model: Model, batch: Batch, *, final: bool = False, **settings: Any) -> Crafted:
        """The adversarial batch of PGD with these settings under this defense's threat.

        Args:
            model: attacked in eval mode with frozen parameters.
            batch: what is attacked.
            final: take the gradient once more, at the final images.
            settings: objective and start, see :class:`~dtrades_fast.attacks.PGD`.
        """
        check_images(batch.images, batch.labels)
        threat = self.threat
        attack = PGD(threat.epsilon, threat.steps, threat.step_size, threat.norm, **settings)

        def run(images: Tensor, labels: Tensor, adv: Tensor) -> tuple[Tensor, Seen]:
            watch = Watch(images, threat.epsilon, threat.norm)
            objective = attack.make_objective(model, images, labels)
            adv = attack.ascend(model, adv, images, objective, watch)
            if final:
                with span("sensitivity"):
                    watch(adv, input_gradient(model, adv, objective))
            return adv, watch.seen

        graph: Graph | None = getattr(model, "graph", None)
        with frozen(model):
            inputs = batch.images, batch.labels, attack.start_from(batch.images, batch.index, batch.key, batch.noise)
            adv, seen = run(*inputs) if graph is None else graph((attack, final), run, *inputs)
        return Crafted(adv, Watch(batch.images, threat.epsilon, threat.norm, seen))


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
