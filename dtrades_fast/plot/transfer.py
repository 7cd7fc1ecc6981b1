"""Pictures of black-box attacks: who is fooled by whose images, and how accuracy falls with the number of queries."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import StrMethodFormatter

from dtrades_fast.evaluation.blackbox import QueryCurve, Transfer
from dtrades_fast.plot.figures import DASHES, WIDTH, looks, styled

__all__ = ["query_curves", "transfer_matrix"]

CELL_WIDTH, CELL_HEIGHT = 1.15, 0.6  #: inches
NAME_LENGTH = 14  #: characters in a line of a name
MARKER_DISTANCE = 0.08  #: on a curve, as a share of the diagonal


@styled
def transfer_matrix(transfer: Transfer, attack: str) -> Figure:
    """Robust accuracy of each target (column) under the images of each source (row), with what the source is to it.

    Dark is robust. White-box cells, which are what a target fears most, have a frame.

    Args:
        transfer: what was measured.
        attack: its name and epsilon, for the title.
    """
    accuracy = transfer.accuracy().numpy()
    rows, columns = accuracy.shape
    figure = Figure((2.4 + CELL_WIDTH * columns, 1.5 + CELL_HEIGHT * rows), layout="constrained")
    ax = figure.add_subplot()
    mesh = ax.pcolormesh(accuracy, cmap="Greys", vmin=0, vmax=100, edgecolors="white", linewidth=1)
    for i in range(rows):
        for j in range(columns):
            write_cell(ax, i, j, accuracy[i, j], transfer.relations[i][j])
    natural = 100 * transfer.natural.double().mean(1)
    targets = [f"{folded(name)}\nNA {na:.1f} %" for name, na in zip(transfer.targets, natural.tolist(), strict=True)]
    ax.set_xticks(np.arange(columns) + 0.5, targets)
    ax.set_yticks(np.arange(rows) + 0.5, [folded(name) for name in transfer.sources])
    ax.set(xlabel="target, judged", ylabel="source, attacked")
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=ax, label="robust accuracy RA (%)", shrink=0.9)
    bar.outline.set_visible(False)
    ax.set_title(textwrap.fill(f"{attack}: {transfer.natural.shape[1]:,} points", 50))
    return figure


def write_cell(ax: Axes, row: int, column: int, accuracy: float, relation: str) -> None:
    """The number and, below it, what the source is to the target, in the colour that stands out."""
    colour = "white" if accuracy > 55 else "black"
    middle = (column + 0.5, row + 0.36)
    own = relation == "white box"
    ax.annotate(f"{accuracy:.1f}", middle, color=colour, ha="center", va="center", weight="bold" if own else "normal")
    ax.annotate(relation, (middle[0], row + 0.74), color=colour, ha="center", va="center", fontsize=6.5)
    if own:
        ax.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, fill=False, edgecolor=colour, linewidth=1.2))


def folded(name: str) -> str:
    return textwrap.fill(name, NAME_LENGTH)


@styled
def query_curves(runs: Mapping[str, QueryCurve], attack: str) -> Figure:
    """Robust accuracy after so many queries per point, of all runs; at 0 queries it is the natural one.

    Args:
        runs: by name.
        attack: its name and epsilon, for the title.
    """
    figure = Figure((0.75 * WIDTH, 3.3), layout="constrained")
    ax = figure.add_subplot()
    for (colour, marker), dashes, (name, curve) in zip(looks(), itertools.cycle(DASHES), runs.items(), strict=False):
        after = torch.cat((curve.queries.new_tensor([0, curve.budget]), curve.queries)).unique()
        look: dict[str, Any] = {"color": colour, "marker": marker, "markevery": MARKER_DISTANCE, "label": name}
        ax.step(after, curve.accuracy(after), where="post", linestyle=dashes, **look)
    ax.set_xscale("symlog", linthresh=1, linscale=0.3)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set(xlabel="queries per point", ylabel="robust accuracy RA (%)", ylim=(0, 100))
    ax.set_xlim(0, max(curve.budget for curve in runs.values()))
    ax.set_title(f"{attack}: {len(next(iter(runs.values())).queries):,} points")
    ax.legend(framealpha=0.8)
    return figure
