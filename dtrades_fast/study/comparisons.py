"""What a study compares: pairs of methods on the same seeds, and fronts of methods with several settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrades_fast.study import statistics
from dtrades_fast.study.results import NAMES, NORMS, Basis, Checkpoint, Group, Result, Row, figures

__all__ = [
    "DECIMALS",
    "Difference",
    "differences",
    "front_by_seed",
    "front_comparison",
    "fronts",
    "heading",
    "in_words",
    "mean_points",
    "of_seeds",
    "points",
]

#: What pairs of methods are compared by, first of all, and its unit.
HEADLINES = {"NA": "points", "RA worst": "points", "worst class": "points", "APN Linf": ""}
#: Figures that are no result, or the complement of another one.
NOT_COMPARED = ("ASR all", "minutes", "mean weight", "last weight")
DECIMALS = {"APN Linf": 3, "APN L2": 2}  #: decimals; all else has one


def of_seeds(row: Row, checkpoint: Checkpoint, basis: Basis | None) -> dict[int, dict[str, float]]:
    """Seed -> the figures of its run."""
    return {seed: figures(result, checkpoint, basis) for seed, result in row.results.items()}


def heading(name: str) -> str:
    return {"worst class": "RA worst class", "ASR all": "ASR of all", "ASR correct": "ASR of correct"}.get(name, name)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs(group: Group, compare: str) -> Iterator[tuple[Row, Row]]:
    """Rows that are to be compared: the method of the study with the others of ``main`` and, in other parts, with those
    of the same setting; and its main row with its own rows of other parts that have a label."""
    mine = [row for row in group.part("main") if row.method == compare]
    for part in group.parts:
        rows = group.part(part)
        for row in rows:
            if row.method == compare and part != "main":
                yield from ((row, other) for other in rows if other.method != compare and other.setting == row.setting)
                if row.labelled and not any(o.setting == row.setting and o.method != compare for o in rows):
                    yield from ((first, row) for first in mine)
            elif row.method != compare and part == "main":
                yield from ((first, row) for first in mine)


@dataclass(frozen=True)
class Difference:
    """One figure of two rows on the same seeds.

    Attributes:
        ours, theirs: rows.
        name: of the figure.
        over_seeds: ``ours - theirs``, for other trainings.
        over_points: the same for other test images; None of a figure that is no mean over images.
    """

    ours: Row
    theirs: Row
    name: str
    over_seeds: statistics.Paired
    over_points: statistics.Interval | None

    @property
    def winner(self) -> str:
        """The row with the higher value, where both intervals exclude zero."""
        if not statistics.resolved(self.over_seeds, self.over_points):
            return "not resolved"
        return (self.ours if self.over_seeds.mean > 0 else self.theirs).name

    @property
    def in_words(self) -> str:
        unit, decimals = HEADLINES.get(self.name, ""), DECIMALS.get(self.name, 1)
        said = statistics.verdict(
            self.over_seeds, self.ours.name, self.theirs.name, unit, decimals, points=self.over_points
        )
        return f"{heading(self.name)}: {said}"


def differences(group: Group, compare: str, checkpoint: Checkpoint, *, headlines: bool = True) -> list[Difference]:
    """Of all pairs that are to be compared.

    Args:
        group: of rows.
        compare: the method that is compared with the others.
        checkpoint: whose weights.
        headlines: of what matters most; else of all other figures.
    """
    basis, found = group.bases.get(checkpoint), []
    for ours, theirs in pairs(group, compare):
        a, b = (of_seeds(row, checkpoint, basis) for row in (ours, theirs))
        for name in dict.fromkeys(name for side in (a, b) for seed in side.values() for name in seed):
            x, y = ({seed: values[name] for seed, values in side.items() if name in values} for side in (a, b))
            if (name in HEADLINES) == headlines and name not in NOT_COMPARED and set(x) & set(y):
                drawn = over_points(ours, theirs, checkpoint, basis, name)
                found.append(Difference(ours, theirs, name, statistics.paired(x, y), drawn))
    return found


def over_points(
    ours: Row, theirs: Row, checkpoint: Checkpoint, basis: Basis | None, name: str
) -> statistics.Interval | None:
    """The bootstrap interval of a figure that is a mean over test points; None of others, or if points differ."""
    both = [(ours.results[seed], theirs.results[seed]) for seed in ours.results if seed in theirs.results]
    sides = [[per_point(pair[side], checkpoint, basis, name) for pair in both] for side in (0, 1)]
    found = [(a, b) for a, b in zip(*sides, strict=True) if a is not None and b is not None]
    if not found or len({ids for pair in found for ids, _ in pair}) > 1:
        return None
    return statistics.bootstrap(np.array([a for (_, a), _ in found]), np.array([b for _, (_, b) in found]))


def per_point(
    result: Result, checkpoint: Checkpoint, basis: Basis | None, name: str
) -> tuple[tuple[int, ...], NDArray[np.float64]] | None:
    """Test points and what each adds to the mean that the figure is; None if it is none."""
    if name.startswith("APN "):
        norm = next(norm for norm, word in NORMS.items() if name == f"APN {word}")
        norms = result.norms(checkpoint, norm)
        return None if norms is None else (norms.ids, norms.capped)
    attacks: Sequence[str] | None = None
    if basis is not None:
        attacks = {"NA": (), "RA worst": basis.attacks, "RD": basis.attacks}.get(name)
        if attacks is None and name.startswith("RA "):
            attacks = (name.removeprefix("RA "),)
    standing = None if basis is None or attacks is None else result.standing(checkpoint, basis, attacks)
    if basis is None or standing is None:
        return None
    if name == "RD":
        natural = result.standing(checkpoint, basis, ())
        assert natural is not None
        return basis.ids, 100 * (natural & ~standing).astype(float)
    return basis.ids, 100 * standing.astype(float)


def in_words(group: Group, compare: str, checkpoint: Checkpoint) -> list[str]:
    """The headlines in words; none where the group names no winners."""
    if group.protocol != "common":
        return []
    found = differences(group, compare, checkpoint)
    return [f"{group.name}, {checkpoint} epoch, {each.in_words}" for each in found]


# ---- fronts ----------------------------------------------------------------------------------------------------------


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
    """How the front of the method lies to that of each other one that has as many settings, in words."""
    basis, found = group.bases.get(checkpoint), fronts(group, checkpoint)
    mine, lines = found.pop(compare, []), []
    for rows in found.values():
        if len(rows) < 2 or len(mine) < 2:
            continue
        ours, theirs = (NAMES.get(each[0].method, each[0].method) for each in (mine, rows))
        where = f"{group.name}, {checkpoint} epoch, the front of {ours} against that of {theirs}"
        a, b = front_by_seed(mine, checkpoint, basis), front_by_seed(rows, checkpoint, basis)
        seeds = sorted(set(a) & set(b))
        if len(mine) != len(rows) or not seeds:
            lines.append(f"{where}: not compared, {len(mine)} and {len(rows)} settings on {len(seeds)} common seeds.")
            continue
        areas = [{seed: 100 * statistics.area_under_front(side[seed]) for seed in seeds} for side in (a, b)]
        lines.append(
            f"{where}, area under it: {statistics.verdict(statistics.paired(areas[0], areas[1]), ours, theirs)}."
        )
        equal = {seed: statistics.difference_of_fronts(a[seed], b[seed]) for seed in seeds}
        values = {seed: value for seed, value in equal.items() if value is not None}
        ranges = [ends for seed in seeds if (ends := statistics.in_common(a[seed], b[seed]))]
        if values:
            said = statistics.verdict(statistics.paired(values, dict.fromkeys(values, 0.0)), ours, theirs)
            over = ", ".join(f"{low:.1f} to {high:.1f}" for low, high in ranges)
            lines.append(f"{where}, RA worst at equal NA ({over} %, by seed): {said}.")
        else:
            lines.append(f"{where}: no range of clean accuracies in common.")
    return lines
