"""Is there anything for the attack to climb? Watches training for masked gradients, from tensors that are there anyway.

A network may learn to hide its gradients instead of becoming robust: then the attack in training fails, accuracy under
it rises, and a better attack breaks everything (Li et al. 2024 show it for TRADES, Wong et al. 2020 for single steps).
Each batch is looked at after its backward pass, where the gradient of the loss at the final adversarial images comes
for the price of one more convolution. A batch looks masked if its accuracy under attack is above chance by more than
the share ``LEARNED`` of what there is to learn, and

- ``fosc``: the attack is far from its optimum (relative FOSC above ``FOSC``) and its gradients do not agree from step
  to step (mean cosine similarity below ``COSINE``), or
- ``zero``: more than the share ``ZERO`` of the samples have no gradient at all, or
- ``accuracy``: the accuracy under attack exceeds the clean one by more than ``ABOVE``.

The alarm is on while a moving average of such batches, over about ``1 / (1 - MEMORY)`` of them, is above ``ALARM``.

Nothing here makes the host wait for the device: figures are summed there and read at the end of an epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtrades_fast import processes
from dtrades_fast.attacks import GradientStats
from dtrades_fast.defenses import Crafted, Loss
from dtrades_fast.training.meter import Meter

__all__ = ["REASONS", "Monitor"]

FOSC, COSINE, ZERO, ABOVE, LEARNED = 0.35, 0.4, 0.1, 0.05, 0.1
MEMORY, ALARM = 0.98, 0.5
REASONS = {
    "fosc": "the attack does not converge",
    "zero": "samples have no gradient",
    "accuracy": "adversarial images are classified better than clean ones",
}
#: Terms of a loss whose distribution is kept, split by class and by whether the clean image is classified correctly.
SPLIT = ("lambda", "entropy", "sensitivity")
#: Bins of their histograms, 10 per decade; the first and last take what lies beyond.
EDGES = [10 ** (i / 10) for i in range(-60, 31)]


class Monitor:
    """Figures of an epoch, and whether gradients look masked.

    Args:
        classes: number of classes.
        noise: standard deviation in pixel units of the noise that is to help while the alarm is on.
        device: where the figures are summed.
    """

    def __init__(self, classes: int, noise: float, device: torch.device | str):
        self.classes, self.device = classes, device
        self.noise_size = torch.tensor(noise, device=device)
        self.edges = torch.tensor(EDGES, device=device, dtype=torch.float64)
        self.looks_masked = torch.zeros((), dtype=torch.float64, device=device)  # the moving average
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.meter = Meter()
        self.moments: dict[str, Tensor] = {}  # name -> [class, wrong or correct, (count, sum, sum of squares)]
        self.histograms: dict[str, Tensor] = {}  # name -> [wrong or correct, bin]

    @property
    def noise(self) -> Tensor:
        """[], the noise that the next attack starts with: 0 while all is well."""
        return torch.where(self.alarm, self.noise_size, 0)

    @property
    def alarm(self) -> Tensor:
        """[], whether gradients look masked."""
        return self.looks_masked > ALARM

    def add(self, crafted: Crafted, loss: Loss, labels: Tensor, scale: Tensor) -> None:
        """One batch, after its backward pass.

        Args:
            crafted: what the attack left; where its images have a gradient, they took part in the loss.
            loss: the loss and its parts.
            labels: [N].
            scale: [], what the loss was multiplied by before the backward pass.
        """
        self._split(loss, labels)
        if crafted.watch is None or crafted.adv.grad is None:
            return
        crafted.watch(crafted.adv.detach(), crafted.adv.grad * (len(labels) / scale))
        stats, cosine = crafted.watch.stats, crafted.watch.cosine
        assert stats is not None
        add = self.meter.add_finite  # fp16 can overflow on the way to the pixels
        for name, values in (("fosc", stats.fosc), ("fosc_relative", stats.fosc_relative)):
            add(name, values)
            add(f"{name}_p95", values.float().quantile(0.95)[None])
        add("zero_gradient", stats.zero)
        if cosine is not None:
            add("gradient_cosine", cosine)
        self._judge(stats, cosine, loss, labels)

    def _judge(self, stats: GradientStats, cosine: Tensor | None, loss: Loss, labels: Tensor) -> None:
        assert loss.adv_logits is not None
        values = {"zero": stats.zero, "fosc": stats.fosc_relative, "robust": loss.adv_logits.argmax(1) == labels}
        if cosine is not None:
            values["cosine"] = cosine
        if loss.clean_logits is not None:
            values["clean"] = loss.clean_logits.argmax(1) == labels
        mean = dict(zip(values, mean_of_all(list(values.values())), strict=True))
        flags = {"zero": mean["zero"] > ZERO}
        if "cosine" in mean:
            flags["fosc"] = (mean["fosc"] > FOSC) & (mean["cosine"] < COSINE)
        if "clean" in mean:
            above = mean["robust"] - mean["clean"]
            self._add_of_all("adv_minus_clean", above)
            flags["accuracy"] = above > ABOVE
        chance = 1 / self.classes
        learned = mean["robust"] > chance + LEARNED * (1 - chance)
        flags = {reason: flag & learned for reason, flag in flags.items()}
        masked = torch.stack(tuple(flags.values())).any()
        self.looks_masked.lerp_(masked.double(), 1 - MEMORY)
        for reason, flag in {**flags, "alarm": self.alarm}.items():
            self._add_of_all(f"masked {reason}", flag)

    def _add_of_all(self, name: str, value: Tensor) -> None:
        """What all processes have alike counts once."""
        if processes.rank() == 0:
            self.meter.add(name, value[None])

    def _split(self, loss: Loss, labels: Tensor) -> None:
        if loss.clean_logits is None:
            return
        correct = (loss.clean_logits.argmax(1) == labels).long()
        for name in SPLIT:
            if name not in loss.terms:
                continue
            values = loss.terms[name].double()
            if name not in self.moments:
                self.moments[name] = values.new_zeros(2 * self.classes, 3)
                self.histograms[name] = values.new_zeros(2 * (len(EDGES) + 1))
            powers = torch.stack((torch.ones_like(values), values, values.square()), 1)
            self.moments[name].index_add_(0, 2 * labels + correct, powers)
            bins = torch.bucketize(values, self.edges)
            self.histograms[name].index_add_(0, correct * (len(EDGES) + 1) + bins, powers[:, 0])

    def summary(self) -> dict[str, Any]:
        """The figures of the epoch for ``metrics.jsonl``, of all processes; waits for the device."""
        return self.of_all()._summary()

    def _summary(self) -> dict[str, Any]:
        figures = {name: values["mean"] for name, values in self.meter.summary().items()}
        result: dict[str, Any] = {}
        for name in ("fosc", "fosc_relative"):
            if name in figures:
                result[name] = {"mean": figures[name], "p95": figures[f"{name}_p95"]}
        for name in ("gradient_cosine", "zero_gradient", "adv_minus_clean"):
            result[name] = figures.get(name)
        steps = {name.removeprefix("masked "): sums for name, sums in self.meter.sums.items() if " " in name}
        counts = {name: int(sums[1]) for name, sums in steps.items()}
        result["alarms"] = {"steps": counts.pop("alarm", 0), "reasons": counts}
        return result | {name: self._distribution(name) for name in self.moments}

    def _distribution(self, name: str) -> dict[str, Any]:
        by_class = self.moments[name].view(self.classes, 2, 3)
        wrong, correct = by_class.sum(0).tolist()
        bins = self.histograms[name].view(2, -1).long().tolist()
        return {
            "correct": moments(*correct),
            "wrong": moments(*wrong),
            "by_class": [moments(*sums) for sums in by_class.sum(1).tolist()],
            "histogram": {"edges": EDGES, "correct": bins[1], "wrong": bins[0]},
        }

    def message(self) -> str:
        """What to say while the alarm is on, else nothing; waits for the device."""
        if not self.alarm:
            return ""
        reasons = [text for name, text in REASONS.items() if self._latest(f"masked {name}")]
        return "gradients look masked: " + (", ".join(reasons) or "in most of the latest batches")

    def _latest(self, name: str) -> bool:
        return name in self.meter.latest and bool(self.meter.latest[name].any())

    def of_all(self) -> Monitor:
        """A monitor with the sums of all processes."""
        if processes.count() == 1:
            return self
        merged = copy.copy(self)
        merged.meter, merged.moments, merged.histograms = self.meter.of_all(), {}, {}
        sums = {name: (self.moments[name].cpu(), self.histograms[name].cpu()) for name in self.moments}
        for theirs in processes.gathered(sums):
            for name, (moments, histogram) in theirs.items():
                merged.moments[name] = moments + merged.moments.get(name, 0)
                merged.histograms[name] = histogram + merged.histograms.get(name, 0)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "looks_masked": self.looks_masked,
            "meter": self.meter.sums,
            "moments": self.moments,
            "histograms": self.histograms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` whose tensors are on the device."""
        self.looks_masked, self.meter = state["looks_masked"], Meter(state["meter"])
        self.moments, self.histograms = state["moments"], state["histograms"]


def mean_of_all(values: Sequence[Tensor]) -> Tensor:
    """Means over the samples [N] of all processes, one for each tensor."""
    sums = [v.double().sum() for v in values]
    count = torch.full_like(sums[0], len(values[0]))
    totals = processes.total(torch.stack((count, *sums)))
    return totals[1:] / totals[0]


def moments(count: float, total: float, squares: float) -> dict[str, float | None]:
    """Count, mean and standard deviation from sums; of nothing there is no mean."""
    if count == 0:
        return {"count": 0, "mean": None, "std": None}
    mean = total / count
    return {"count": int(count), "mean": mean, "std": math.sqrt(max(0.0, squares / count - mean * mean))}
