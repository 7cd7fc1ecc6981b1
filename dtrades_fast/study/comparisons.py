"""What a study compares on the same seeds: pairs of methods, figure by figure."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrades_fast.study import statistics
from dtrades_fast.study.results import NORMS, Basis, Checkpoint, Group, Result, Row, figures

__all__ = [
    "DECIMALS",
    "HEADLINES",
    "Difference",
    "differences",
    "heading",
    "in_words",
    "of_seeds",
]

#: What pairs of methods are compared by, first of all, and its unit.
HEADLINES = {"NA": "points", "RA worst": "points", "worst class": "points", "APN Linf": ""}
#: Figures that are no result, or the complement of another one.
NOT_COMPARED = ("ASR all", "minutes", "mean weight", "last weight")
#: Options that say what weight the regularisation has on average.
WEIGHTS = {"trades": "beta", "dtrades": "lambda_mean"}
DECIMALS = {"APN Linf": 3, "APN L2": 2}  #: decimals; all else has one


def of_seeds(row: Row, checkpoint: Checkpoint, basis: Basis | None) -> dict[int, dict[str, float]]:
    """Seed -> the figures of its run."""
    return {seed: figures(result, checkpoint, basis) for seed, result in row.results.items()}


def heading(name: str) -> str:
    return {"worst class": "RA worst class", "ASR all": "ASR of all", "ASR correct": "ASR of correct"}.get(name, name)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs(group: Group, compare: str) -> Iterator[tuple[Row, Row]]:
    """Rows that are to be compared: the method of the study with the others of ``main``; in other parts with those of
    the same setting or weight; and its main row with its own rows of other parts that have a label."""
    mine = [row for row in group.part("main") if row.method == compare]
    for part in group.parts:
        rows = group.part(part)
        for row in rows:
            if row.method == compare and part != "main":
                alike = [other for other in rows if other.method != compare and same_setting(row, other)]
                yield from ((row, other) for other in alike)
                if row.labelled and not alike:
                    yield from ((first, row) for first in mine)
            elif row.method != compare and part == "main":
                yield from ((first, row) for first in mine)


def same_setting(ours: Row, theirs: Row) -> bool:
    """Whether two methods have the same setting: by its name, or as the weight of their regularisation."""
    weights = [next(iter(r.results.values())).cell.options.get(WEIGHTS.get(r.method, "")) for r in (ours, theirs)]
    return ours.setting == theirs.setting or (None not in weights and weights[0] == weights[1])


@dataclass(frozen=True)
class Difference:
    """One figure of two rows on the same seeds.

    Attributes:
        ours, theirs: rows.
        checkpoint: whose weights.
        name: of the figure.
        over_seeds: ``ours - theirs``, for other trainings.
        over_points: the same for other test images; None of a figure that is no mean over images.
    """

    ours: Row
    theirs: Row
    checkpoint: Checkpoint
    name: str
    over_seeds: statistics.Paired
    over_points: statistics.Interval | None

    @property
    def winner(self) -> str:
        """The row with the higher value, where both intervals exclude zero."""
        if not statistics.resolved(self.over_seeds, self.over_points):
            return "not resolved"
        return (self.ours if self.over_seeds.mean > 0 else self.theirs).marked(self.checkpoint)

    @property
    def in_words(self) -> str:
        unit, decimals = HEADLINES.get(self.name, ""), DECIMALS.get(self.name, 1)
        ours, theirs = (row.marked(self.checkpoint) for row in (self.ours, self.theirs))
        said = statistics.verdict(self.over_seeds, ours, theirs, unit, decimals, points=self.over_points)
        return f"{heading(self.name)}: {said}"


@functools.lru_cache(maxsize=32)
def differences(group: Group, compare: str, checkpoint: Checkpoint, number: int = 0) -> Sequence[Difference]:
    """All figures of all pairs that are to be compared.

    Args:
        group: of rows.
        compare: the method that is compared with the others.
        checkpoint: whose weights.
        number: of the conditions of evaluation; 0 are the usual ones, under others there are no norms.
    """
    basis, found = group.basis(checkpoint, number), []
    for ours, theirs in pairs(group, compare):
        a, b = (of_seeds(row, checkpoint, basis) for row in (ours, theirs))
        for name in dict.fromkeys(name for side in (a, b) for seed in side.values() for name in seed):
            x, y = ({seed: values[name] for seed, values in side.items() if name in values} for side in (a, b))
            if name not in NOT_COMPARED and set(x) & set(y):
                drawn = over_points(ours, theirs, checkpoint, basis, name)
                found.append(Difference(ours, theirs, checkpoint, name, statistics.paired(x, y), drawn))
    return found


def over_points(
    ours: Row, theirs: Row, checkpoint: Checkpoint, basis: Basis | None, name: str
) -> statistics.Interval | None:
    """The bootstrap interval over test points; None of figures that are not of test points."""
    both = [(ours.results[seed], theirs.results[seed]) for seed in ours.results if seed in theirs.results]
    if name == "worst class":
        return None if basis is None else over_points_of_classes(both, checkpoint, basis)
    sides = [[per_point(pair[side], checkpoint, basis, name) for pair in both] for side in (0, 1)]
    found = [(a, b) for a, b in zip(*sides, strict=True) if a is not None and b is not None]
    return statistics.bootstrap([a for a, _ in found], [b for _, b in found]) if found else None


def over_points_of_classes(
    both: Sequence[tuple[Result, Result]], checkpoint: Checkpoint, basis: Basis
) -> statistics.Interval | None:
    """Of the robust accuracy of the worst class, which may be another one for other points; None where it is 0 in some
    network: no draw of these points can take it below that, so that they do not show how much others would vary."""
    stand = [[result.standing(checkpoint, basis, basis.attacks) for result in pair] for pair in both]
    found = [(a, b) for a, b in stand if a is not None and b is not None]
    records = [record for result, _ in both if (record := result.record(checkpoint, basis)) is not None]
    if not found:
        return None
    values = 100 * np.array(found, dtype=float)  # [seeds, ours and theirs, points]
    labels = np.array(records[0]["labels"])  # the same points, and so the same labels, in all
    classes = (labels == np.unique(labels)[:, None]).astype(float)  # [classes, points]

    def worst(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        share = classes @ weights
        here = share > 0
        return np.array(((values * weights) @ classes[here].T / share[here]).min(-1))  # [seeds, ours and theirs]

    if (worst(np.full(len(labels), 1 / len(labels))) == 0).any():
        return None
    return statistics.resampled(lambda weights: float(-np.diff(worst(weights)).mean()), len(labels))


def per_point(result: Result, checkpoint: Checkpoint, basis: Basis | None, name: str) -> NDArray[np.float64] | None:
    """What each test point of the basis adds to the mean that the figure is; None if it is none."""
    if basis is None:
        return None
    if name.startswith("APN "):
        norm = next(norm for norm, word in NORMS.items() if name == f"APN {word}")
        norms = result.norms(checkpoint, norm, basis)
        return None if norms is None else norms.capped
    attacks: Sequence[str] | None = {"NA": (), "RA worst": basis.attacks, "RD": basis.attacks}.get(name)
    if attacks is None and name.startswith("RA "):
        attacks = (name.removeprefix("RA "),)
    standing = None if attacks is None else result.standing(checkpoint, basis, attacks)
    if standing is None:
        return None
    if name == "RD":
        natural = result.standing(checkpoint, basis, ())
        assert natural is not None
        return 100 * (natural & ~standing).astype(float)
    return 100 * standing.astype(float)


def in_words(group: Group, compare: str, checkpoint: Checkpoint) -> list[str]:
    """The headlines in words; none where the group names no winners."""
    if group.protocol != "common":
        return []
    found = [each for each in differences(group, compare, checkpoint) if each.name in HEADLINES]
    return [f"{group.name}, {checkpoint} epoch, {each.in_words}" for each in found]
