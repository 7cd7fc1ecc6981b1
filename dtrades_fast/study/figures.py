"""The pictures of a report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dtrades_fast.plot.figures import DASHES, WIDTH, filled_grid, looks, series, styled
from dtrades_fast.plot.robustness import robust_accuracy_curve
from dtrades_fast.study import fronts, statistics, tables
from dtrades_fast.study.results import NAMES, Checkpoint, Group, Row

LEGEND: Literal["outside upper center"] = "outside upper center"
MEASURES = {
    "validation NA (%)": ("validation", "na"),
    "validation RA (%)": ("validation", "ra"),
    "training loss (nats)": ("train", "loss", "mean"),
}


def look_of(group: Group) -> dict[str, tuple[str, str]]:
    """Method -> colour and marker, the same in all pictures of a group."""
    methods = dict.fromkeys(row.method for row in group.rows)
    return dict(zip(methods, looks(), strict=False))


@styled
def trade_off(group: Group, checkpoint: Checkpoint) -> Figure:
    """Clean against robust accuracy: means with the deviation over seeds, settings of a method joined, Pareto front."""
    basis, look = group.bases.get(checkpoint), look_of(group)
    figure = Figure((WIDTH, 4.6), layout="constrained")
    ax = figure.subplots()
    for (method, rows), dashes in zip(fronts.fronts(group, checkpoint).items(), itertools.cycle(DASHES), strict=False):
        colour, marker = look[method]
        found = [np.array(list(fronts.points(row, checkpoint, basis).values())) for row in rows]
        mean = np.array([each.mean(0) for each in found])
        spread = np.array([each.std(0, ddof=1) if len(each) > 1 else np.zeros(2) for each in found])
        order = mean[:, 0].argsort()
        ax.errorbar(
            mean[order, 0],
            mean[order, 1],
            xerr=spread[order, 0],
            yerr=spread[order, 1],
            color=colour,
            marker=marker,
            linestyle=dashes if len(rows) > 1 else "",
            elinewidth=0.8,
            capsize=2,
            label=NAMES.get(method, method),
        )
        if len(rows) > 1:
            for row, (na, ra) in zip(rows, mean, strict=True):
                short = row.setting.split()[-1] if row.setting else "default"
                ax.annotate(short, (na, ra), (4, 4), textcoords="offset points", fontsize=7, color=colour)
    draw_front(ax, list(fronts.mean_points(group, checkpoint).values()))
    ax.set(xlabel="natural accuracy NA (%)", ylabel="robust accuracy RA, all attacks (%)")
    figure.legend(loc=LEGEND, ncols=6, frameon=False)
    return figure


def draw_front(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """The steps below which every point is exceeded by another one, to the edges of the picture."""
    (left, _), (bottom, _) = ax.get_xlim(), ax.get_ylim()
    front = sorted(points[i] for i in statistics.pareto(points))
    corners = np.array([(left, front[0][1]), *front, (front[-1][0], bottom)])
    ax.step(*corners.T, where="pre", color="0.6", linewidth=4, alpha=0.4, zorder=0, label="Pareto front")
    ax.set(xlim=(left, None), ylim=(bottom, None))


@styled
def training(group: Group) -> Figure:
    """By epoch, mean over seeds with a band from the lowest to the highest; the rows of ``main``."""
    look = look_of(group)
    figure = Figure((WIDTH, 4.8), layout="constrained")
    for ax, (label, path) in zip(filled_grid(figure, len(MEASURES), 2), MEASURES.items(), strict=True):
        for row, dashes in zip(group.part("main"), itertools.cycle(DASHES), strict=False):
            colour, marker = look[row.method]
            values = by_epoch(row, path) * (100 if path[0] == "validation" else 1)
            epochs = epochs_before(row) + np.arange(1, values.shape[1] + 1)
            every = max(1, len(epochs) // 10)
            name = row.name if ax is figure.axes[0] else None
            ax.plot(epochs, values.mean(0), dashes, color=colour, marker=marker, markevery=every, label=name)
            ax.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc=LEGEND, ncols=3, frameon=False)
    return figure


def by_epoch(row: Row, path: Sequence[str]) -> NDArray[np.float64]:
    """[seeds, epochs], as many epochs as all seeds have."""
    found = [series(result.lines, path) for result in row.results.values()]
    shortest = min(map(len, found))
    return np.array([values[:shortest] for values in found])


def epochs_before(row: Row) -> int:
    """Of the networks that its runs started from."""
    return max(result.epochs_before for result in row.results.values())


def with_lambda(group: Group) -> list[Row]:
    """The rows of the method whose weight depends on the input."""
    return [row for row in group.rows if row.method == "dtrades"]


@styled
def weights(rows: Sequence[Row]) -> Figure:
    """Lambda's distribution by epoch as shares of the images, over all seeds, with its mean."""
    columns = min(2, len(rows))
    figure = Figure((WIDTH, 2.5 * -(-len(rows) // columns) + 0.6), layout="constrained")
    for ax, row in zip(filled_grid(figure, len(rows), columns), rows, strict=True):
        edges, shares = histograms(row)
        shown = np.flatnonzero(shares.sum(1))
        low, high = max(0, shown[0] - 1), min(len(shares), shown[-1] + 2)
        epochs = np.arange(shares.shape[1] + 1) + 0.5
        spread = shares[:, (shares > 0).sum(0) > 1]  # not of a warm-up, in which all images have one weight
        most = float(spread.max()) if spread.size else 100.0
        mesh = ax.pcolormesh(epochs, edges[low : high + 1], shares[low:high], cmap="Blues", vmin=0, vmax=most)
        mean = by_epoch(row, ("train", "lambda", "mean")).mean(0)
        ax.plot(np.arange(1, len(mean) + 1), mean, color="#D55E00", marker="o", label="mean")
        ax.set(title=row.name, xlabel="epoch", ylabel="weight λ(x)", yscale="log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(False)
        figure.colorbar(mesh, ax=ax, label="% of images")
    figure.axes[0].legend(frameon=False)
    return figure


def histograms(row: Row) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges of lambda, and the share in % of the training images between them, [bins, epochs].

    The outer bins take what lies beyond the edges, and are left out.
    """
    counts, edges = [], np.array([])
    for result in row.results.values():
        found = [line["monitor"]["lambda"]["histogram"] for line in result.lines]
        edges = np.array(found[0]["edges"])
        counts.append([np.array(h["correct"]) + np.array(h["wrong"]) for h in found])
    shortest = min(map(len, counts))
    total = np.array([each[:shortest] for each in counts], dtype=float).sum(0)  # [epochs, bins]
    shares = 100 * total / total.sum(1, keepdims=True)
    beyond = (shares.shape[1] - (len(edges) - 1)) // 2
    return edges, shares[:, beyond : shares.shape[1] - beyond].T if beyond else shares.T


@styled
def classes(group: Group, checkpoint: Checkpoint) -> Figure:
    """Robust accuracy by class and method, mean over seeds, as a heat map with its numbers."""
    found = tables.by_class(group, checkpoint)
    names = list(next(iter(found.values())))
    values = np.array([[row[name] for name in names] for row in found.values()])
    figure = Figure((1.9 + 0.62 * len(names), 1.3 + 0.36 * len(found)), layout="constrained")
    ax = figure.subplots()
    ax.pcolormesh(values, cmap="Greys", vmin=0, vmax=100, edgecolors="white", linewidth=1)
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > 55 else "black"
        ax.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        if value == values[i].min():
            ax.add_patch(frame(j, i))
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=30 if max(map(len, names)) > 3 else 0)
    ax.set_yticks(np.arange(len(found)) + 0.5, list(found))
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("class; a method's worst is framed")
    return figure


def frame(column: int, row: int) -> Rectangle:
    return Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=2)


def against_epsilon(group: Group, checkpoint: Checkpoint) -> Figure | None:
    """Robust accuracy by radius, from the smallest perturbations in Linf of all seeds; the rows of ``main``."""
    norms: dict[str, NDArray[np.float64]] = {}
    cap = 0.0
    if (basis := group.bases.get(checkpoint)) is None:
        return None
    for row in group.part("main"):
        found = [entry for result in row.results.values() if (entry := result.norms(checkpoint, "linf", basis))]
        if found:
            cap = max(cap, *(entry.cap for entry in found))
            norms[row.name] = np.concatenate([entry.values for entry in found])
    if not norms:
        return None
    epsilon = basis.epsilon if basis.norm == "linf" else None
    largest = max(float(values[np.isfinite(values)].max(initial=0.0)) for values in norms.values())
    shown = min(cap, 1.05 * max(largest, epsilon or 0.0)) or cap
    values = {name: torch.from_numpy(found) for name, found in norms.items()}
    return robust_accuracy_curve(values, norm="linf", cap=shown, epsilon=epsilon)
