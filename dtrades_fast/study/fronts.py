"""Fronts: what methods with several settings reach in clean and robust accuracy, and how two of them lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrades_fast.study import statistics
from dtrades_fast.study.comparisons import of_seeds
from dtrades_fast.study.results import MARK, NAMES, Basis, Checkpoint, Group, Row, figures

__all__ = ["front_by_seed", "front_comparison", "fronts", "mean_points", "points"]


def points(row: Row, checkpoint: Checkpoint, basis: Basis | None) -> dict[int, tuple[float, float]]:
    """Seed -> clean and robust accuracy."""
    found = of_seeds(row, checkpoint, basis)
    return {seed: (f["NA"], f["RA worst"]) for seed, f in found.items() if "RA worst" in f}


def fronts(group: Group, checkpoint: Checkpoint) -> dict[str, list[Row]]:
    """Method -> its rows along a front: those whose setting is an option's value, not a label."""
    rows: dict[str, list[Row]] = {}
    for row in group.rows:
        if not row.labelled and points(row, checkpoint, group.bases.get(checkpoint)):
            rows.setdefault(row.method, []).append(row)
    return rows


def mean_points(group: Group, checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Name of a row -> its mean clean and robust accuracy."""
    found = {}
    for rows in fronts(group, checkpoint).values():
        for row in rows:
            values = np.mean(list(points(row, checkpoint, group.bases.get(checkpoint)).values()), axis=0)
            found[row.name] = (float(values[0]), float(values[1]))
    return found


def front_by_seed(
    rows: Sequence[Row], checkpoint: Checkpoint, basis: Basis | None
) -> dict[int, list[tuple[float, float]]]:
    """Seed -> the points of all settings; only of seeds that have all of them."""
    found = [points(row, checkpoint, basis) for row in rows]
    seeds = set(found[0]).intersection(*found[1:])
    return {seed: [each[seed] for each in found] for seed in sorted(seeds)}


def front_comparison(group: Group, compare: str, checkpoint: Checkpoint) -> list[str]:
    """How the front of the method lies to that of each other one that has as many settings, in words.

    And how its rows with a label, such as those of an ablation, lie to the other one's settings at their own weight.
    Conditions that differ between methods are not compared.
    """
    if group.protocol != "common":
        return []
    basis, found = group.bases.get(checkpoint), fronts(group, checkpoint)
    mine, lines = found.pop(compare, []), []
    for rows in found.values():
        if basis is None or len(rows) < 2 or len(mine) < 2:
            continue
        ours, theirs = (name_of(each, checkpoint) for each in (mine, rows))
        where = f"{group.name}, {checkpoint} epoch, the settings of {ours} against those of {theirs}"
        seeds = sorted(set(front_by_seed(mine, checkpoint, basis)) & set(front_by_seed(rows, checkpoint, basis)))
        if len(mine) != len(rows) or not seeds:
            lines.append(f"{where}: not compared, {len(mine)} and {len(rows)} settings on {len(seeds)} common seeds.")
            continue
        for what, (differ, about) in MEASURES.items():
            a, b = ([Curve.of(each, seed, checkpoint, basis) for seed in seeds] for each in (mine, rows))
            said = compare_curves(a, b, differ, seeds, (ours, theirs))
            details = about(a, b)
            lines.append(f"{where}, {what}{f' ({details})' if details else ''}: {said or 'none in common'}.")
        for row in (row for row in group.rows if row.method == compare and row.labelled):
            common = [seed for seed in seeds if seed in points(row, checkpoint, basis)]
            a, b = ([Curve.of(each, seed, checkpoint, basis) for seed in common] for each in ([row], rows))
            name = row.marked(checkpoint)
            if common and (said := compare_curves(a, b, at_equal_weight, common, (name, theirs))):
                where = f"{group.name}, {checkpoint} epoch, {name} against the settings of {theirs}"
                lines.append(f"{where}, {AT_WEIGHT}: {said}.")
    return lines


def name_of(rows: Sequence[Row], checkpoint: Checkpoint) -> str:
    """Of their method, marked if one of its settings is."""
    name = NAMES.get(rows[0].method, rows[0].method)
    return f"{name} {MARK}" if any(row.looks_masked(checkpoint) for row in rows) else name


@dataclass(frozen=True)
class Curve:
    """The settings of a method on one seed.

    Attributes:
        natural, standing: [settings, points], 1 where a point is classified correctly, clean and under all attacks.
        weights: of the regularisation, mean over training, [settings]; NaN of methods without one.
    """

    natural: NDArray[np.float64]
    standing: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[Row], seed: int, checkpoint: Checkpoint, basis: Basis) -> Curve:
        results = [row.results[seed] for row in rows]
        natural, standing = (
            np.array([result.standing(checkpoint, basis, attacks) for result in results], dtype=float)
            for attacks in ((), basis.attacks)
        )
        weights = [figures(result, checkpoint, basis).get("mean weight", np.nan) for result in results]
        return cls(natural, standing, np.array(weights))

    def points(self, drawn: NDArray[np.float64] | None = None) -> list[tuple[float, float]]:
        """Clean and robust accuracy in %, of points with the weights that are drawn."""
        share = np.full(self.natural.shape[1], 1 / self.natural.shape[1]) if drawn is None else drawn
        return [(float(na), float(ra)) for na, ra in 100 * np.stack([self.natural @ share, self.standing @ share], 1)]

    def by_weight(self, drawn: NDArray[np.float64] | None = None) -> list[tuple[float, float]]:
        """Weight of the regularisation and robust accuracy in %."""
        return [(weight, ra) for weight, (_, ra) in zip(self.weights.tolist(), self.points(drawn), strict=True)]


Differ = Callable[[Curve, Curve, NDArray[np.float64]], "float | None"]


def of_areas(ours: Curve, theirs: Curve, drawn: NDArray[np.float64]) -> float:
    area = [100 * statistics.area_under_front(curve.points(drawn)) for curve in (ours, theirs)]
    return area[0] - area[1]


def at_equal_accuracy(ours: Curve, theirs: Curve, drawn: NDArray[np.float64]) -> float | None:
    return statistics.difference_of_fronts(ours.points(drawn), theirs.points(drawn), steps=50)


def have_weights(*curves: Curve) -> bool:
    """Whether all settings have a weight that has a logarithm."""
    return all(bool((curve.weights > 0).all()) for curve in curves)


def at_equal_weight(ours: Curve, theirs: Curve, drawn: NDArray[np.float64]) -> float | None:
    if not have_weights(ours, theirs):
        return None
    return statistics.difference_at_weight(ours.by_weight(drawn), theirs.by_weight(drawn))


def ranges(ours: Sequence[Curve], theirs: Sequence[Curve]) -> str:
    """Of clean accuracies in common, by seed."""
    found = [statistics.in_common(a.points(), b.points()) for a, b in zip(ours, theirs, strict=True)]
    return ", ".join("none" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}" for ends in found) + " %, by seed"


def by_setting(ours: Sequence[Curve], theirs: Sequence[Curve]) -> str:
    """What the mean over the settings is made of: each one's difference at its weight, and those that are left out."""
    kept, beyond = [], []
    if not have_weights(*ours, *theirs):
        return ""
    means = np.mean([curve.weights for curve in ours], axis=0)
    of_all = [statistics.differences_at_weight(a.by_weight(), b.by_weight()) for a, b in zip(ours, theirs, strict=True)]
    for setting in np.argsort(means).tolist():
        differences = {i: float(each[setting]) for i, each in enumerate(of_all) if not np.isnan(each[setting])}
        weight = f"{means[setting]:.2f}"
        if not differences:
            beyond.append(weight)
            continue
        found = statistics.paired(differences, dict.fromkeys(differences, 0.0))
        spread = "" if np.isinf(found.low) else f" [{found.low:+.1f}, {found.high:+.1f}]"
        seeds = "" if found.count == len(ours) else f", {found.count} of {len(ours)} seeds"
        kept.append(f"{found.mean:+.1f}{spread} at {weight}{seeds}")
    left_out = f"; {', '.join(beyond)} left out, beyond the other's weights" if beyond else ""
    return f"mean over {'; '.join(kept)}{left_out}" if kept else ""


AT_WEIGHT = "RA worst at the same mean weight over training"
MEASURES: dict[str, tuple[Differ, Callable[[Sequence[Curve], Sequence[Curve]], str]]] = {
    "area under their front": (of_areas, lambda ours, theirs: ""),
    "RA worst at equal NA": (at_equal_accuracy, ranges),
    AT_WEIGHT: (at_equal_weight, by_setting),
}


def compare_curves(
    ours: Sequence[Curve], theirs: Sequence[Curve], differ: Differ, seeds: Sequence[int], names: tuple[str, str]
) -> str | None:
    """The verdict over seeds and test points, which says how many seeds it is of; None if there is none to compare."""

    def over_seeds(drawn: NDArray[np.float64]) -> dict[int, float]:
        found = {seed: differ(a, b, drawn) for seed, a, b in zip(seeds, ours, theirs, strict=True)}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(drawn: NDArray[np.float64]) -> float | None:
        values = list(over_seeds(drawn).values())
        return float(np.mean(values)) if values else None

    count = ours[0].natural.shape[1]
    values = over_seeds(np.full(count, 1 / count))
    if not values:
        return None
    found = statistics.paired(values, dict.fromkeys(seeds, 0.0))
    return statistics.verdict(found, *names, points=statistics.resampled(mean, count))
