"""Robust accuracy by the radius of the attack, from the smallest perturbation of each point."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dtrades_fast.evaluation.minimum_norm import robust_accuracy
from dtrades_fast.plot.figures import DASHES, WIDTH, looks, styled

__all__ = ["robust_accuracy_curve"]

MARKERS = 8  #: on one curve
NAMES = {"linf": "Linf", "l2": "L2"}


@styled
def robust_accuracy_curve(
    norms: Mapping[str, Tensor], *, norm: Literal["linf", "l2"], cap: float, epsilon: float | None = None
) -> Figure:
    """A step for each point at the norm that breaks it; on the left, the accuracy without an attack.

    Args:
        norms: name of a run -> [N], its smallest norms in pixel units, see :mod:`dtrades_fast.evaluation.minimum_norm`.
        norm: in which they were measured.
        cap: where the axis ends: larger norms were not looked for.
        epsilon: a radius to mark, that of training.
    """
    figure = Figure((0.75 * WIDTH, 3.4), layout="constrained")
    ax = figure.subplots()
    for (colour, marker), dashes, (name, values) in zip(looks(), itertools.cycle(DASHES), norms.items(), strict=False):
        radii = torch.cat((values.new_tensor([0.0, cap]), values[(values > 0) & (values < cap)])).sort().values
        share = 100 * robust_accuracy(values, radii)
        ax.step(radii, share, dashes, where="post", color=colour)
        at = torch.linspace(0, cap, MARKERS, dtype=values.dtype)
        ax.plot(at, 100 * robust_accuracy(values, at), linestyle="", color=colour, marker=marker)
        ax.plot([], [], dashes, color=colour, marker=marker, label=name)
    if epsilon is not None:
        ax.axvline(epsilon, color="0.35", linewidth=1, linestyle=(0, (1, 3)))
        ax.annotate(f"ε = {epsilon:.3g}", (epsilon, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    ax.set(xlabel=f"radius of the attack ε ({NAMES[norm]}, pixel units)", ylabel="robust accuracy RA (%)")
    ax.set(xlim=(0, cap), ylim=(0, 102))
    ax.legend(frameon=False)
    return figure
