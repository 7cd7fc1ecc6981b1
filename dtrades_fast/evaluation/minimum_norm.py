"""The smallest perturbation that changes each prediction: the least that three attacks find, checked on the network.

Their mean is the average minimum perturbation norm (APN). All of them are upper bounds of the true minimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtrades_fast.attacks.base import Attack, check_images, frozen
from dtrades_fast.attacks.bisection import Bisection
from dtrades_fast.attacks.fab import FAB
from dtrades_fast.attacks.fmn import FMN
from dtrades_fast.attacks.nearest import size
from dtrades_fast.evaluation.suites import Norm

__all__ = ["Figures", "MinimumNorms", "minimum_norm", "robust_accuracy"]

#: Wrong classes that FAB-T goes for, where there are as many.
TARGETS = 9


@dataclass(frozen=True)
class Figures:
    """Of the norms of N points, in pixel units. What none has broken within the cap counts as the cap.

    Attributes:
        mean: APN, if the norms are the smallest that were found.
        median: the middle, of two the mean.
        success_rate: share of the points, 0 to 1, broken within the cap; wrong without an attack counts as broken.
        censored: number of points that were not.
        points: N.
    """

    mean: float
    median: float
    success_rate: float
    censored: int
    points: int


@dataclass(frozen=True)
class MinimumNorms:
    """Smallest norms by attack.

    Attributes:
        norm: in which they are measured.
        cap: largest norm in pixel units that counts as broken.
        norms: attack -> [N], float64, on the host, in pixel units: 0 where the clean image is classified wrongly,
            infinite where the attack found nothing.
    """

    norm: Norm
    cap: float
    norms: Mapping[str, Tensor]

    @property
    def smallest(self) -> Tensor:
        """Of all attacks, [N]."""
        return torch.stack(list(self.norms.values())).amin(0)

    def figures(self, attack: str | None = None) -> Figures:
        """Of one attack; of the smallest norms if none is named."""
        norms = self.smallest if attack is None else self.norms[attack]
        capped = norms.clamp(max=self.cap)
        broken = norms <= self.cap
        return Figures(
            mean=capped.mean().item(),
            median=capped.quantile(0.5).item(),
            success_rate=broken.double().mean().item(),
            censored=int((~broken).sum()),
            points=len(norms),
        )


def minimum_norm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    *,
    norm: Norm,
    cap: float,
    key: int,
    batch_size: int,
    attacks: Mapping[str, Attack] | None = None,
) -> MinimumNorms:
    """Attack what the model classifies correctly, and measure what has fooled it.

    A norm counts only if the model classifies that image wrongly, and if it lies in [0, 1].

    Args:
        model: maps images in [0, 1] to logits; used in eval mode and in its own precision.
        images: [N, C, H, W], float32 or float64.
        labels: [N], int64.
        index: [N], int64, for the random numbers of each sample.
        norm: ``"linf"`` or ``"l2"``.
        cap: largest norm that is looked for, in pixel units.
        key: the stream of random numbers.
        batch_size: images at a time; it does not change the result beyond rounding.
        attacks: by name; FMN, FAB-T and the bisection with APGD if not given.

    Raises:
        ValueError: there are no images, or an argument is out of its range.
    """
    check_images(images, labels)
    if len(images) == 0:
        raise ValueError("there must be at least one image to attack")
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap must be > 0 in pixel units and finite, got {cap}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if attacks is None:
        with frozen(model), torch.no_grad():
            attacks = standard(norm, cap, model(images[:1]).shape[1])
    parts = [
        _batch(model, images[rows], labels[rows], index[rows], norm, key, attacks)
        for rows in torch.arange(len(images), device=images.device).split(batch_size)
    ]
    return MinimumNorms(norm, cap, {name: torch.cat([part[name] for part in parts]).cpu() for name in attacks})


def standard(norm: Norm, cap: float, classes: int) -> dict[str, Attack]:
    """The attacks of the evaluation, by name."""
    return {
        "fmn": FMN(norm),
        "fab-t": FAB(norm, targets=min(TARGETS, classes - 1)),
        "bisection": Bisection(cap, norm, loss="dlr" if classes > 2 else "ce"),
    }


def _batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    norm: Norm,
    key: int,
    attacks: Mapping[str, Attack],
) -> dict[str, Tensor]:
    clean = verified(model, images, images, labels, norm)
    rows = (clean > 0).nonzero().squeeze(1)
    found = {name: clean.clone() for name in attacks}
    if len(rows):
        for name, attack in attacks.items():
            adv = attack(model, images[rows], labels[rows], index=index[rows], key=key)
            found[name][rows] = verified(model, adv, images[rows], labels[rows], norm)
    return found


def verified(model: nn.Module, adv: Tensor, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Norms of the perturbations, [N], float64; infinite where the model is not fooled or a pixel is not in [0, 1]."""
    with frozen(model), torch.no_grad():
        fooled = model(adv).argmax(1) != labels
    inside = ((adv >= 0) & (adv <= 1)).flatten(1).all(1)
    return size(adv.double() - images.double(), norm).where(fooled & inside, torch.inf)


def robust_accuracy(norms: Tensor, epsilons: Tensor | Sequence[float]) -> Tensor:
    """Accuracy, 0 to 1, under attacks of each radius, [E], from the smallest norms [N]: the share that is larger."""
    radii = torch.as_tensor(epsilons, dtype=norms.dtype)
    return (norms > radii[:, None]).double().mean(1)
