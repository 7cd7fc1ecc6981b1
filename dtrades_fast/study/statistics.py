"""What can be said of a few seeds: means, paired differences with their uncertainty, trade-offs.

Two sources of chance are kept apart. Another training gives another network: the t interval over seeds speaks of that.
Other test points give other accuracies of the same networks: the bootstrap speaks of that. Neither covers the other, so
a winner is named only where both exclude zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Interval",
    "Paired",
    "Summary",
    "area_under_front",
    "at_equal",
    "bootstrap",
    "difference_at_weight",
    "difference_of_fronts",
    "differences_at_weight",
    "harmonic",
    "in_common",
    "paired",
    "pareto",
    "resampled",
    "resolved",
    "rounded",
    "seeds_needed",
    "summary",
    "verdict",
]

LEVEL = 0.95
POWER = 0.8
SAME = 1e-9  #: a mean or deviation that is rounding
MOST_SEEDS = 10_000  #: beyond it, no number of seeds is named
RESAMPLES = 10_000
CHUNK = 500  #: resamples at a time

Point = tuple[float, float]  #: clean and robust accuracy


@dataclass(frozen=True)
class Summary:
    """Of values over seeds.

    Attributes:
        mean: their mean.
        deviation: their standard deviation, with n - 1; NaN of one value.
        count: how many there are.
    """

    mean: float
    deviation: float
    count: int


def summary(values: ArrayLike) -> Summary:
    """Mean and standard deviation of [n] values.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"a summary needs finite values, got {x.tolist()}")
    return Summary(float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else math.nan, x.size)


# ---- differences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean difference, and where it lies with the confidence of the level."""

    mean: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether it excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired(Interval):
    """Differences on the same seeds.

    Attributes:
        deviation: standard deviation of the differences; NaN of one.
        count: seeds that both have.
        dropped: seeds that only one of both has.
        needed: seeds at which the interval would exclude zero with a probability of 80 %, were mean and deviation the
            true ones; None if the mean or the deviation is 0, the deviation is unknown or more than 10,000 would be
            needed.
    """

    deviation: float
    count: int
    dropped: int
    needed: int | None

    @property
    def resolved(self) -> bool:
        """Whether it excludes zero; differences that are all the same say nothing of how much others would vary."""
        return self.deviation > 0 and super().resolved


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], level: float = LEVEL) -> Paired:
    r"""Interval of the mean of ``ours - theirs`` by Student's t with n - 1 degrees of freedom.

    .. math:: \bar d \pm t_{n-1, (1 + level) / 2}\, s_d / \sqrt n

    It takes the differences for normal, which a few seeds cannot show. One seed gives an infinite interval; differences
    that are all the same (to 1e-9) give one without width, which resolves nothing: accuracies on a few points come in
    steps.

    Args:
        ours, theirs: seed -> value.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} and {sorted(theirs)}")
    found = summary([ours[seed] - theirs[seed] for seed in seeds])
    mean, deviation = (0.0 if abs(value) < SAME else value for value in (found.mean, found.deviation))
    count = found.count
    half = half_width(deviation, count, level)
    return Paired(
        mean=mean,
        low=mean - half,
        high=mean + half,
        deviation=deviation,
        count=count,
        dropped=len(set(ours) ^ set(theirs)),
        needed=smallest_count(lambda n: power(mean, deviation, n, level) >= POWER, mean, deviation),
    )


def half_width(deviation: float, count: int, level: float) -> float:
    """Of the t interval of a mean."""
    if count < 2:
        return math.inf
    return float(stats.t.ppf((1 + level) / 2, count - 1) * deviation / math.sqrt(count))


def power(mean: float, deviation: float, count: int, level: float) -> float:
    """Probability that the t interval of so many differences excludes zero on the side of the true mean."""
    threshold = stats.t.ppf((1 + level) / 2, count - 1)
    return float(stats.nct.sf(threshold, count - 1, abs(mean) / deviation * math.sqrt(count)))


def smallest_count(enough: Callable[[int], bool], mean: float, deviation: float) -> int | None:
    """The smallest number of seeds, from 2 on, that is enough; more are enough, too."""
    if mean == 0 or not deviation > 0 or not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # not enough, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def bootstrap(
    ours: ArrayLike, theirs: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of the mean of ``ours - theirs`` over other test points, for these trained networks.

    Points are drawn with replacement, the same ones for both methods and all seeds; the interval lies between the
    percentiles of the mean differences that come out.

    Args:
        ours, theirs: [seeds, points], e.g. 1 where a point stands; the same points and seeds.
        level: of confidence.
        resamples: how often points are drawn.
        seed: of the drawing.

    Raises:
        ValueError: the shapes differ, nothing is there or a value is not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (ours, theirs))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"both must have the same seeds and points, got {list(a.shape)} and {list(b.shape)}")
    per_point = (a - b).mean(0)
    if bad := int((~np.isfinite(per_point)).sum()):
        raise ValueError(f"{bad} of {len(per_point)} points have no result")
    drawn, points = draws(len(per_point), resamples, seed), len(per_point)
    means = [drawn[first : first + CHUNK].astype(float) @ per_point / points for first in range(0, resamples, CHUNK)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(per_point.mean()), float(low), float(high))


@functools.lru_cache(maxsize=4)
def draws(points: int, resamples: int, seed: int) -> NDArray[np.uint16]:
    """How often each point is drawn, [resamples, points]; kept, since all figures of a report are drawn alike."""
    random, drawn = np.random.default_rng(seed), np.empty((resamples, points), dtype=np.uint16)
    for first in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - first)
        drawn[first : first + count] = random.multinomial(points, np.full(points, 1 / points), size=count)
    drawn.flags.writeable = False
    return drawn


def resampled(
    statistic: Callable[[NDArray[np.float64]], float | None],
    points: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES // 5,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of anything that is computed from test points, as :func:`bootstrap` of means.

    The minimum over classes, or a front, tends to be lower or higher on drawn points than on the points themselves; the
    percentiles are moved by that much, so that their median is the value on the points themselves.

    Args:
        statistic: of the weights of the points, [points], which sum to 1; None if it does not exist for them, which
            leaves that draw out.
        points: how many there are.
        level: of confidence.
        resamples: how often points are drawn.
        seed: of the drawing.

    Raises:
        ValueError: the statistic does not exist for the points as they are.
    """
    mean = statistic(np.full(points, 1 / points))
    if mean is None:
        raise ValueError("a statistic that does not exist has no interval")
    drawn = draws(points, resamples, seed)
    values = [value for counts in drawn if (value := statistic(counts / points)) is not None]
    low, middle, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return Interval(mean, float(low - middle + mean), float(high - middle + mean))


def resolved(found: Paired, points: Interval | None) -> bool:
    """Whether a winner may be named: both intervals exclude zero."""
    return found.resolved and points is not None and points.resolved


def verdict(
    found: Paired, name: str, other: str, unit: str = "points", decimals: int = 1, points: Interval | None = None
) -> str:
    """A sentence: which is higher, if the intervals exclude zero, or that it is not resolved and what would resolve it.

    Args:
        found: ``name`` minus ``other``.
        name, other: as they are called.
        unit: of the values.
        decimals: that are shown, more if the difference were zero to them.
        points: the same difference over test points; without it, no winner is named.
    """
    unit = f" {unit}" if unit else ""
    while found.mean and not round(found.mean, decimals):
        decimals += 1
    seeds = f"{found.count} seeds{' in common' if found.dropped else ''}"
    if resolved(found, points):
        (above, below), sign = ((name, other), 1) if found.mean > 0 else ((other, name), -1)
        low, high = sorted((sign * found.low, sign * found.high))
        interval = f"95 % interval {low:+.{decimals}f} to {high:+.{decimals}f}, {seeds}"
        if points is not None:
            low, high = sorted((sign * points.low, sign * points.high))
            interval += f"; {low:+.{decimals}f} to {high:+.{decimals}f} over test images"
        return f"{above} is {abs(found.mean):.{decimals}f}{unit} above {below} ({interval})"
    difference = f"not resolved: {name} minus {other} {found.mean:+.{decimals}f}{unit}"
    if found.count == 1:
        return f"{difference}, one seed{' in common' if found.dropped else ''}"
    if found.deviation == 0:
        return f"{difference} with each of {seeds}, from which their spread cannot be told"
    interval = f"95 % interval {found.low:+.{decimals}f} to {found.high:+.{decimals}f}, {seeds}"
    if found.resolved and points is None:
        return f"{difference} ({interval}; nothing is known of other test images)"
    if found.resolved and points is not None:
        drawn = f"{points.low:+.{decimals}f} to {points.high:+.{decimals}f}"
        return f"{difference} ({interval}; but {drawn} over test images, of which more would be needed)"
    if (needed := seeds_needed(found, points)) is None:
        return f"{difference} ({interval}; there is no difference to resolve)"
    return f"{difference} ({interval}; {needed} for a power of 80 %, if it is as seen)"


def seeds_needed(found: Paired, points: Interval | None) -> str | None:
    """How many seeds would resolve it with a power of 80 %, in words; None if nothing tells.

    Args:
        found: over seeds.
        points: the same difference over test points, of which more are needed, too, if it contains zero.
    """
    if not found.mean or not found.deviation > 0:
        return None
    count = f"about {rounded(found.needed)} seeds" if found.needed else f"more than {MOST_SEEDS:,} seeds"
    return count if points is None or points.resolved else f"{count} and more images"


def rounded(count: int) -> int:
    """Up to one significant digit from 10 on: what a few seeds tell of the number needed is its order of magnitude."""
    size = 10 ** (len(str(count)) - 1) if count >= 10 else 1
    return -(-count // size) * size


# ---- trade-offs ------------------------------------------------------------------------------------------------------


def harmonic(na: float, ra: float) -> float:
    """Harmonic mean of clean and robust accuracy: high only if both are; 0 if one is."""
    return 2 * na * ra / (na + ra) if na + ra > 0 else 0.0


def pareto(points: Sequence[Point]) -> list[int]:
    """Positions of the points that no other one exceeds: at least equal in both accuracies, higher in one."""
    return [
        i for i, (na, ra) in enumerate(points) if not any(n >= na and r >= ra and (n > na or r > ra) for n, r in points)
    ]


def area_under_front(points: Sequence[Point], scale: float = 100.0) -> float:
    """Share, 0 to 1, of the square of all accuracies that some point exceeds: hypervolume from (0, 0).

    Args:
        points: accuracies from 0 to ``scale``.
        scale: of the accuracies: 100 for per cent.
    """
    area, height = 0.0, 0.0
    for na, ra in sorted((points[i] for i in pareto(points)), reverse=True):  # clean accuracy falls, robust rises
        area += na * max(0.0, ra - height)
        height = max(height, ra)
    return area / scale**2


def at_equal(front: Sequence[Point], na: ArrayLike) -> NDArray[np.float64]:
    """The best robust accuracy of a front at clean accuracies of at least ``na``; NaN beyond its highest one.

    Linear between its points: what a classifier reaches that picks one of two neighbouring networks at random. Below
    its lowest clean accuracy it is that of this point, which has more than is asked for.

    Args:
        front: points of a method with several settings; those that another one exceeds are left out.
        na: clean accuracies.
    """
    kept = sorted({front[i] for i in pareto(front)})
    x, y = (np.array([point[axis] for point in kept]) for axis in (0, 1))
    return np.interp(np.asarray(na, dtype=float), x, y, right=math.nan)


def in_common(ours: Sequence[Point], theirs: Sequence[Point]) -> tuple[float, float] | None:
    """The range of clean accuracies, from that of one setting to that of another, that both have; None without one."""
    ends = [sorted(na for na, _ in front) for front in (ours, theirs)]
    low, high = max(ends[0][0], ends[1][0]), min(ends[0][-1], ends[1][-1])
    return (low, high) if low <= high else None


def difference_of_fronts(ours: Sequence[Point], theirs: Sequence[Point], steps: int = 200) -> float | None:
    """Mean difference in robust accuracy at equal clean accuracy, over the clean accuracies that both have.

    Returns:
        ``ours - theirs``, or None if they have none in common.
    """
    if (ends := in_common(ours, theirs)) is None:
        return None
    na = np.linspace(*ends, steps)
    return float((at_equal(ours, na) - at_equal(theirs, na)).mean())


def difference_at_weight(ours: Sequence[Point], theirs: Sequence[Point]) -> float | None:
    """Mean of :func:`differences_at_weight` over the weights of ``ours`` that lie between those of ``theirs``.

    Returns:
        ``ours - theirs``, or None without any such weight.
    """
    found = differences_at_weight(ours, theirs)
    return float(np.nanmean(found)) if np.isfinite(found).any() else None


def differences_at_weight(ours: Sequence[Point], theirs: Sequence[Point]) -> NDArray[np.float64]:
    """Difference in robust accuracy at equal weight of the regularisation, at each weight of ``ours``.

    Args:
        ours: pairs of weight, above 0, and robust accuracy.
        theirs: the same; linear in the logarithm of the weight between them.

    Returns:
        ``ours - theirs``, [settings of ours]; NaN beyond the weights of ``theirs``.
    """
    (w, ra), (x, y) = np.array(ours).T, np.array(sorted(theirs)).T
    return np.array(ra - np.interp(np.log(w), np.log(x), y, left=math.nan, right=math.nan))
