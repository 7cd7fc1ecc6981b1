"""The pictures, as functions of figures that are already there. Colour is never the only sign of anything."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dtrades_fast.plot.samples import Samples

__all__ = ["curves", "entropy_sensitivity", "gallery", "lambda_histogram"]

STYLE: Any = {  # whose keys newer versions of matplotlib spell out as a type
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
}
#: Distinct to the colour-blind: Okabe and Ito 2008, Color Universal Design.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*"
MOST_MARKERS = 12  #: on one curve
BINS = 30
WIDTH = 7.2  #: inches

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Matplotlib's settings for the time of drawing."""

    @functools.wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return within


# Training curves


@dataclass(frozen=True)
class Panel:
    """One quantity over the epochs.

    Attributes:
        label: of the y axis, with the unit.
        lines: what is drawn, first solid, then dashed: its name -> where it is in a line of ``metrics.jsonl``.
        spread: where the standard deviation of the first line is.
        factor: to the unit.
        alarms: mark the epochs with masking alarms.
    """

    label: str
    lines: Mapping[str, tuple[str, ...]]
    spread: tuple[str, ...] = ()
    factor: float = 1.0
    log: bool = False
    alarms: bool = False


PANELS = (
    Panel("training loss (nats)", {"mean": ("train", "loss", "mean")}),
    Panel(
        "natural accuracy NA (%)",
        {"validation": ("validation", "na"), "training": ("train", "na", "mean")},
        factor=100,
    ),
    Panel(
        "robust accuracy RA (%)",
        {"validation": ("validation", "ra"), "training": ("train", "ra", "mean")},
        factor=100,
    ),
    Panel(
        "weight λ (mean ± std)",
        {"mean": ("train", "lambda", "mean")},
        spread=("train", "lambda", "std"),
    ),
    Panel(
        "FOSC (nats)",
        {"mean": ("monitor", "fosc", "mean"), "95th percentile": ("monitor", "fosc", "p95")},
        log=True,
        alarms=True,
    ),
)
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")


@styled
def curves(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Loss, accuracies, lambda and FOSC by epoch, of all runs in each panel; a panel that no run has is left out.

    Args:
        runs: name -> the lines of its ``metrics.jsonl``.
    """
    panels = [panel for panel in PANELS if any(has(lines, panel) for lines in runs.values())]
    figure = Figure((WIDTH, 2.3 * math.ceil(len(panels) / 2) + 0.5), layout="constrained")
    for ax, panel in zip(filled_grid(figure, len(panels), 2), panels, strict=True):
        for (colour, marker), lines in zip(looks(), runs.values(), strict=False):
            draw_curve(ax, panel, lines, colour, marker)
        if panel.alarms:
            draw_alarms(ax, runs.values())
        ax.set(xlabel="epoch", ylabel=panel.label, yscale="log" if panel.log else "linear")
        ax.set_xlim(0.5, max(len(lines) for lines in runs.values()) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        name_lines(ax, panel, runs.values())
    handles = [
        Line2D([], [], color=colour, marker=marker, label=name)
        for (colour, marker), name in zip(looks(), runs, strict=False)
    ]
    columns = max(1, min(len(runs), 90 // (max(map(len, runs)) + 8)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def filled_grid(figure: Figure, count: int, columns: int) -> Iterator[Axes]:
    """``count`` panels in rows; the last one fills what is left of its row."""
    grid = GridSpec(math.ceil(count / columns), columns, figure=figure)
    for i in range(count):
        row, column = divmod(i, columns)
        yield figure.add_subplot(grid[row, column:] if i == count - 1 else grid[row, column])


def looks() -> Iterable[tuple[str, str]]:
    """Colour and marker of each run."""
    return zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)


def series(lines: Iterable[Mapping[str, Any]], path: Sequence[str]) -> np.ndarray:
    """A quantity by epoch, NaN where it was not measured."""
    values = []
    for line in lines:
        value: Any = line
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        values.append(math.nan if value is None else value)
    return np.array(values, dtype=float)


def shown(lines: Iterable[Mapping[str, Any]], path: Sequence[str], panel: Panel) -> np.ndarray:
    """A curve in the panel's unit; what a logarithmic axis cannot show is NaN."""
    values = panel.factor * series(lines, path)
    return np.where(values > 0, values, math.nan) if panel.log else values


def has(lines: Sequence[Mapping[str, Any]], panel: Panel) -> bool:
    return any(np.isfinite(shown(lines, path, panel)).any() for path in panel.lines.values())


def draw_curve(ax: Axes, panel: Panel, lines: Sequence[Mapping[str, Any]], colour: str, marker: str) -> None:
    epochs = series(lines, ("epoch",))
    every = max(1, len(epochs) // MOST_MARKERS)
    for dashes, path in zip(DASHES, panel.lines.values(), strict=False):
        values = shown(lines, path, panel)
        if np.isfinite(values).any():
            ax.plot(epochs, values, dashes, color=colour, marker=marker, markevery=every, zorder=2)
    if panel.spread:
        (middle,) = panel.lines.values()
        mean, std = series(lines, middle), series(lines, panel.spread)
        ax.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0.8, linestyle=":")


def alarmed(lines: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Whether gradients looked masked at any step of each epoch."""
    return series(lines, ("monitor", "alarms", "steps")) > 0


def draw_alarms(ax: Axes, runs: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """A row of marks along the bottom for each run that had alarms."""
    row = 0
    for (colour, _), lines in zip(looks(), runs, strict=False):
        at = series(lines, ("epoch",))[alarmed(lines)]
        if len(at):
            heights = np.full(len(at), 0.04 + 0.07 * row)
            marks: dict[str, Any] = {
                "marker": "X",
                "color": colour,
                "markeredgecolor": "black",
                "markersize": 7,
                "linestyle": "",
            }
            ax.plot(at, heights, transform=ax.get_xaxis_transform(), **marks)
            row += 1
    ax.set_ymargin(0.05 + 0.07 * row)


def name_lines(ax: Axes, panel: Panel, runs: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """A legend of dashes and alarms, if there is more than one kind of line."""
    handles = [
        Line2D([], [], color="black", linestyle=dashes, label=name)
        for dashes, name in zip(DASHES, panel.lines, strict=False)
    ]
    if panel.alarms and any(alarmed(lines).any() for lines in runs):
        handles.append(
            Line2D([], [], color="white", marker="X", markeredgecolor="black", markersize=7, label="masking alarm")
        )
    if len(handles) > 1:
        ax.legend(handles=handles, framealpha=0.8)


# Lambda and what it is made of


@dataclass(frozen=True)
class Group:
    """Images that a picture tells from the others, and how: as bars and as points."""

    name: str
    members: Callable[[Samples], torch.Tensor]
    bars: dict[str, Any]
    points: dict[str, Any]


GROUPS = (
    Group(
        "correct under attack",
        lambda samples: samples.correct & samples.robust,
        {"facecolor": COLOURS[6], "edgecolor": COLOURS[6]},
        {"marker": "o", "facecolors": "none", "edgecolors": COLOURS[0]},
    ),
    Group(
        "fooled by the attack",
        lambda samples: samples.correct & ~samples.robust,
        {"facecolor": "none", "edgecolor": "black", "hatch": "////", "linewidth": 1.2},
        {"marker": "x", "color": COLOURS[1]},
    ),
    Group(
        "wrong without an attack",
        lambda samples: ~samples.correct,
        {"facecolor": "none", "edgecolor": COLOURS[1], "hatch": "...", "linewidth": 1.2, "linestyle": "--"},
        {"marker": "^", "facecolors": "none", "edgecolors": "black"},
    ),
)


def panel_title(name: str, samples: Samples) -> str:
    sizes = [f"{int(group.members(samples).sum())} {group.name.split()[0]}" for group in GROUPS]
    return f"{textwrap.fill(f'{name}, epoch {samples.epoch}', 50)}\n{', '.join(sizes)}"


@styled
def lambda_histogram(runs: Mapping[str, Samples]) -> Figure:
    """Lambda of the validation images by how they are classified, a panel per run."""
    edges = np.histogram_bin_edges(torch.cat([samples.weight for samples in runs.values()]).numpy(), BINS)
    figure = Figure((0.75 * WIDTH, 2.2 * len(runs) + 0.5), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, samples) in zip(axes, runs.items(), strict=True):
        for group in GROUPS:
            values = samples.weight[group.members(samples)].numpy()
            share = np.full(len(values), 100 / max(1, len(values)))
            ax.hist(values, edges, weights=share, histtype="stepfilled", **group.bars)
        ax.set(title=panel_title(name, samples), ylabel="share of its group (%)")
    axes[-1].set_xlabel("weight λ(x) of validation images")
    handles = [Patch(label=group.name, **group.bars) for group in GROUPS]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(GROUPS), frameon=False)
    return figure


@styled
def entropy_sensitivity(runs: Mapping[str, Samples]) -> Figure:
    """The two ingredients of lambda, a point per validation image and a panel per run, with lambda's level lines."""
    columns = min(2, len(runs))
    figure = Figure((WIDTH if columns == 2 else 0.75 * WIDTH, 3.4 * math.ceil(len(runs) / columns)))
    figure.set_layout_engine("constrained")
    for ax, (name, samples) in zip(filled_grid(figure, len(runs), columns), runs.items(), strict=True):
        points = [
            ax.scatter(samples.entropy[part], samples.sensitivity[part], 14, linewidths=0.8, **group.points)
            for group in GROUPS
            for part in [group.members(samples)]
        ]
        scale_sensitivity(ax, samples.sensitivity.numpy())
        draw_levels(ax, samples.weighting)
        ax.set(xlabel="entropy H(p) (nats)", ylabel="sensitivity ‖∇KL‖₂ (nats per pixel unit)")
        ax.set_title(panel_title(name, samples), fontsize=8)
    names = [group.name for group in GROUPS]
    figure.legend(points, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def scale_sensitivity(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis, but linear below the power of 10 that a twentieth of the values, or zeros, lie under."""
    positive = values[values > 0]
    decade = 10.0 ** math.floor(math.log10(np.quantile(positive, 0.05))) if len(positive) else 1.0
    if (values >= decade).all():
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=decade)
        ax.set_ylim(bottom=0)


def draw_levels(ax: Axes, made_of: Mapping[str, float]) -> None:
    """Where lambda has one value, within its limits."""
    if not made_of or made_of["alpha"] == made_of["beta"] == 0:
        return
    across = np.linspace(0, 1, 200)  # even steps on the screen, where an axis may not be linear
    on_screen = ax.transAxes.transform(np.stack(np.meshgrid(across, across), -1).reshape(-1, 2))
    entropy, sensitivity = ax.transData.inverted().transform(on_screen).T.reshape(2, 200, 200)
    value = made_of["base"] + made_of["alpha"] * entropy + made_of["beta"] * sensitivity
    value = value.clip(made_of["minimum"], made_of["maximum"])
    if value.min() == value.max():
        return
    levels = MaxNLocator(7).tick_values(value.min(), value.max())
    lines = ax.contour(entropy, sensitivity, value, levels, colors="0.35", linewidths=0.7)
    diagonal = np.interp(levels, value.diagonal(), np.arange(len(value))).round().astype(int)
    inside = diagonal[(diagonal > 0.04 * len(value)) & (diagonal < 0.92 * len(value))]
    at = list(zip(entropy[inside, inside], sensitivity[inside, inside], strict=True))
    for text in ax.clabel(lines, fmt=lambda level: f"λ = {level:g}", fontsize=7, inline=False, manual=at):
        text.set(bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=3)


# Gallery


@styled
def gallery(name: str, samples: Samples, count: int) -> Figure:
    """Clean image, perturbation and adversarial image of some validation images, evenly spread over the set."""
    chosen = torch.linspace(0, len(samples.labels) - 1, min(count, len(samples.labels))).round().long()
    change = samples.adv[chosen] - samples.images[chosen]
    radius = samples.radius or max(change.abs().max().item(), 1e-8)
    rows = {
        "clean": samples.images[chosen],
        "perturbation": (0.5 + change / (2 * radius)).clamp(0, 1),  # beyond by rounding
        "adversarial": samples.adv[chosen],
    }
    width = max(5.0, 1.2 * len(chosen) + 1.1)
    figure = Figure((width, 5.0), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
    for column, i in enumerate(chosen.tolist()):
        label = short(samples.classes[samples.labels[i]])
        axes[0, column].set_title(f"label {label}\n{predicted(samples, samples.clean_probs, i)}", fontsize=8)
        axes[2, column].set_title(predicted(samples, samples.adv_probs, i), fontsize=8)
    size = "epsilon" if samples.radius else f"{radius:.3g}"
    scale = f"perturbation scaled so that −{size} is darkest, 0 grey and +{size} brightest"
    head = textwrap.fill(f"{name}, epoch {samples.epoch}: {samples.attack}", int(13 * width))
    figure.suptitle(f"{head}\n{scale}", fontsize=9)
    return figure


def predicted(samples: Samples, probs: torch.Tensor, i: int) -> str:
    """The prediction for an image and its probability, with a cross if it is wrong."""
    best = int(probs[i].argmax())
    mark = "" if best == samples.labels[i] else "✗ "
    return f"{mark}{short(samples.classes[best])} ({100 * probs[i, best]:.0f} %)"


def short(name: str) -> str:
    """A class name that fits above its image."""
    return name if len(name) <= 13 else f"{name[:12]}…"
