"""What a trained network makes of its validation images, clean and attacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrades_fast import rng
from dtrades_fast.attacks import frozen, input_gradient
from dtrades_fast.attacks.objectives import KL
from dtrades_fast.config import Config
from dtrades_fast.data import ImageSet
from dtrades_fast.defenses import Batch
from dtrades_fast.defenses.dtrades import DTRADES
from dtrades_fast.evaluation.evaluate import TrainedRun
from dtrades_fast.ops import lambda_x

__all__ = ["Samples", "measure", "weighting"]


@dataclass(frozen=True)
class Samples:
    """Images and what the network says of them, on the host.

    Attributes:
        images: clean, [N, C, H, W] in [0, 1].
        adv: attacked, [N, C, H, W] in [0, 1].
        labels: [N].
        clean_probs: predicted probabilities of the clean images, [N, classes].
        adv_probs: of the attacked images, [N, classes].
        entropy: of the clean prediction in nats, [N].
        sensitivity: ``||grad_{x'} KL(p || p')||_2`` in nats per pixel unit, [N].
        weight: lambda, [N]; without meaning if ``weighting`` is empty.
        classes: names, by label.
        attack: what crafted ``adv``, in words.
        radius: the largest change of a pixel that the attack may make, in pixel units; None for a ball in L2.
        weighting: what lambda is made of, see :func:`weighting`.
        epoch: after which the weights were saved.
    """

    images: Tensor
    adv: Tensor
    labels: Tensor
    clean_probs: Tensor
    adv_probs: Tensor
    entropy: Tensor
    sensitivity: Tensor
    weight: Tensor
    classes: tuple[str, ...]
    attack: str
    radius: float | None
    weighting: dict[str, float]
    epoch: int

    @property
    def correct(self) -> Tensor:
        """Whether the clean image is classified correctly, [N], bool."""
        return self.clean_probs.argmax(1) == self.labels

    @property
    def robust(self) -> Tensor:
        """Whether the attacked image is classified correctly, [N], bool."""
        return self.adv_probs.argmax(1) == self.labels


def weighting(config: Config, line: dict[str, Any]) -> dict[str, float]:
    """What lambda was made of at the end of an epoch, as arguments of :func:`dtrades_fast.ops.lambda_x`.

    Args:
        config: of the run.
        line: the epoch's line in ``metrics.jsonl``.

    Returns:
        ``base``, ``alpha``, ``beta``, ``minimum`` and ``maximum``; empty if the method has no lambda that depends on
        the image, or has none yet, in the warm-up.
    """
    defense = config.make_defense()
    if not isinstance(defense, DTRADES):
        return {}
    if found := line.get("defense"):
        defense.load_state_dict({"weights": [found["lambda_alpha"], found["lambda_beta"]], "recent": []})
    last_step = line["epoch"] * (line["step"] - 1) / line["step"]
    made_of = defense.weight_at(last_step)
    made_of.pop("entropy_gradient", None)
    return made_of if "alpha" in made_of else {}


def measure(run: TrainedRun, line: dict[str, Any], batch_size: int) -> Samples:
    """Attack the run's validation images as its method does in training, and look at both predictions.

    A method without an attack gets that of its validation. The random starts belong to the images, so the result does
    not depend on the batch size.

    Args:
        run: in eval mode.
        line: of ``metrics.jsonl``, of the epoch that the weights are from.
        batch_size: images at a time.
    """
    images, threat, made_of = run.sets.validation, run.config.threat(), weighting(run.config, line)
    parts = []
    for begin in range(0, len(images), batch_size):
        parts.append(_measure_batch(run, images, slice(begin, begin + batch_size), made_of))
    joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return Samples(
        **joined,
        classes=run.sets.info.classes,
        attack=f"{_attack_name(run.config)}, {threat.norm}, epsilon {run.config.attack.epsilon}",
        radius=threat.epsilon if threat.norm == "linf" else None,
        weighting=made_of,
        epoch=line["epoch"],
    )


def _measure_batch(run: TrainedRun, images: ImageSet, part: slice, made_of: dict[str, float]) -> dict[str, Tensor]:
    clean, labels, ids = images.images(part), images.labels[part], images.ids[part]
    key = rng.key(run.config.run.seed, "plot")
    adv = _craft(run.model, run.config, Batch(clean, labels, ids, key))
    with torch.no_grad():
        clean_logits, adv_logits = run.model(clean), run.model(adv)
    with frozen(run.model):
        gradient = input_gradient(run.model, adv, KL(clean_logits.log_softmax(-1)))
    figures = lambda_x(clean_logits, gradient, **(made_of or {"alpha": 0.0, "beta": 0.0}))
    return {
        "images": clean,
        "adv": adv,
        "labels": labels,
        "clean_probs": clean_logits.softmax(-1),
        "adv_probs": adv_logits.softmax(-1),
        "entropy": figures.entropy,
        "sensitivity": figures.sensitivity,
        "weight": figures.value,
    }


def _craft(model: nn.Module, config: Config, batch: Batch) -> Tensor:
    if config.defense.method != "standard":
        return config.make_defense().craft(model, batch).adv
    return config.validation_attack()(model, batch.images, batch.labels, index=batch.index, key=batch.key)


def _attack_name(config: Config) -> str:
    if config.defense.method == "standard":
        return f"PGD with {config.attack.validation_steps} steps"
    return f"the attack of {config.defense.method} with {config.attack.steps} steps"
