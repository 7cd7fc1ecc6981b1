"""What every attack has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dtrades_fast.attacks.objectives import Objective
from dtrades_fast.profiling import span

#: Anything that maps images [N, C, H, W] in [0, 1] to logits [N, classes].
Model = Callable[[Tensor], Tensor]

#: Largest entry of a sample's logit gradient in a float16 network: on its way to the pixels it may grow 4,000 times
#: before it overflows, and shrink 250,000 times before it loses bits.
HALF_SIZE = 16.0


class Attack(ABC):
    """``(model, images, labels) -> adversarial images``.

    An attack leaves the model as it found it (each module's mode, gradients, ``requires_grad``) and does not touch the
    global random state. In eval mode a sample's result depends on that sample, its index and the key alone.
    """

    @abstractmethod
    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        """The attack itself, on a frozen model."""

    def parts(self) -> Sequence[Attack]:
        """Attacks that one after the other, each on the samples that still stand, are this one; by default itself.

        An evaluation runs a part on all standing samples before the next one, so that its batches stay full.
        """
        return (self,)

    def __call__(
        self, model: Model, images: Tensor, labels: Tensor, *, index: Tensor | None = None, key: int = 0
    ) -> Tensor:
        """Adversarial images [N, C, H, W] in the ball around ``images`` and in [0, 1].

        Args:
            model: maps images in [0, 1] to logits; an ``nn.Module`` is attacked in eval mode.
            images: [N, C, H, W], floating point in [0, 1].
            labels: [N], int64: the true classes, or the classes to reach for a targeted attack.
            index: [N], int64, each sample's index for its random numbers; 0..N-1 if not given.
            key: the stream of random numbers, see :func:`dtrades_fast.rng.key`.

        Raises:
            TypeError: images are not floating point, or labels not int64.
            ValueError: a shape is another one.
        """
        check_images(images, labels)
        if index is None:
            index = torch.arange(len(images), device=images.device)
        with frozen(model):
            return self.perturb(model, images, labels, index, key)


def worst_of(
    attacks: Sequence[Attack], model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int
) -> Tensor:
    """One attack after the other, on a frozen model, each on the samples that still stand.

    Returns:
        The images that fool the model, the last attack's where none does.
    """
    worst = images.detach().clone()
    standing = torch.arange(len(images), device=images.device)
    for attack in attacks:
        if len(standing) == 0:
            break
        adv = attack.perturb(model, images[standing], labels[standing], index[standing], key)
        worst[standing] = adv
        with torch.no_grad():
            standing = standing[model(adv).argmax(1) == labels[standing]]
    return worst


def claims_hold(model: Model, labels: Tensor, *, targeted: bool = False) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Says whether the network that ``model`` is a faster form of is fooled, too; None if it is none.

    Args:
        model: a form of a network has :attr:`itself`, which gives the network's own logits.
        labels: [N], the whole batch's.
        targeted: labels are classes to reach.

    Returns:
        A function of images [m, C, H, W] and their positions in the batch [m] that gives [m], bool.
    """
    itself: Model | None = getattr(model, "itself", None)
    if itself is None:
        return None

    def holds(adv: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return (itself(adv).argmax(1) == labels[rows]) == targeted

    return holds


def check_images(images: Tensor, labels: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {got}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {got}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape [{len(images)}], one per image, got {list(labels.shape)}")


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode that it had, which need not be its parent's."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; afterwards every module and parameter is as it was."""
    parameters = model.parameters() if isinstance(model, nn.Module) else []
    needing = [parameter for parameter in parameters if parameter.requires_grad]
    with eval_mode(model):
        try:
            for parameter in needing:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in needing:
                parameter.requires_grad_(True)


def input_gradient(model: Model, images: Tensor, objective: Objective) -> Tensor:
    """Per-sample gradient of the objective with respect to the images, [N, C, H, W].

    The objective enters through its closed-form gradient to the logits, so no loss graph is built. The objective is
    summed, not averaged, over the batch: with a model in eval mode each row is that sample's own gradient.

    A model that says ``computes_in_half`` gets each sample's logit gradient at one size, which is undone afterwards:
    that of a confident sample would become 0 in float16.
    """
    return gradient_and_logits(model, images, objective)[0]


def gradient_and_logits(model: Model, images: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """:func:`input_gradient`, and the detached logits [N, classes] of the forward pass that it took."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        with span("forward"):
            logits = model(images)
        values = logits.detach()
        with span("logit gradient"):
            direction = objective.logit_grad(values)
        if not getattr(model, "computes_in_half", False):
            with span("backward"):
                return torch.autograd.grad(logits, images, direction)[0], values
        size = direction.abs().amax(1, keepdim=True) / HALF_SIZE
        size = size.masked_fill(size == 0, 1)
        with span("backward"):
            (gradient,) = torch.autograd.grad(logits, images, direction / size)
    return gradient * size[:, :, None, None], values
