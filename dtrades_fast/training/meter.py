"""Running statistics of per-sample figures over an epoch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtrades_fast import processes

__all__ = ["Meter"]


class Meter:
    """Mean, standard deviation, minimum and maximum by name, from batches that are not kept.

    The sums are float64 tensors on the device of the values, so adding a batch does not wait for it.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None):
        #: name -> count, sum, sum of squares, minimum, maximum
        self.sums = sums or {}
        self.latest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add one batch's values [N]."""
        v = values.detach().double()
        self.latest[name] = v
        self.add_sums(name, torch.stack((torch.full_like(v[0], len(v)), v.sum(), v.square().sum(), v.min(), v.max())))

    def add_finite(self, name: str, values: Tensor) -> None:
        """Add those of one batch's values [N] that are finite; the others, and the latest batch, stay out."""
        v = values.detach().double()
        finite = v.isfinite()
        kept = v.where(finite, 0)
        low, high = v.where(finite, math.inf).min(), v.where(finite, -math.inf).max()
        self.add_sums(name, torch.stack((finite.double().sum(), kept.sum(), kept.square().sum(), low, high)))

    def add_sums(self, name: str, new: Tensor) -> None:
        """Add what another meter has of a name."""
        if (old := self.sums.get(name)) is not None:
            new = torch.cat((old[:3] + new[:3], torch.minimum(old[3:4], new[3:4]), torch.maximum(old[4:], new[4:])))
        self.sums[name] = new

    def of_all(self) -> Meter:
        """The sums of all processes."""
        if processes.count() == 1:
            return self
        meter = Meter()
        for sums in processes.gathered({name: values.cpu() for name, values in self.sums.items()}):
            for name, values in sums.items():
                meter.add_sums(name, values)
        return meter

    def latest_mean(self, name: str) -> float:
        """Mean over the batch that was added last."""
        return self.latest[name].mean().item()

    def summary(self) -> dict[str, dict[str, float]]:
        """Name -> mean, std (over the samples), min and max; without the names of which nothing was finite."""
        result = {}
        for name, sums in self.sums.items():
            count, total, squares, low, high = sums.tolist()
            if count == 0:
                continue  # nothing of it was finite
            mean = total / count
            variance = max(0.0, squares / count - mean * mean)
            result[name] = {"mean": mean, "std": math.sqrt(variance), "min": low, "max": high}
        return result
