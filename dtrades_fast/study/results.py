"""What the finished cells of a study have to say, from their folders alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtrades_fast.pixels import pixels
from dtrades_fast.study import cell as cells
from dtrades_fast.study.grid import Cell, Study
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Basis", "Checkpoint", "Group", "Norms", "Result", "Results", "Row", "load"]

Checkpoint = Literal["last", "best"]
CHECKPOINTS: tuple[Checkpoint, ...] = ("last", "best")
NAMES = {
    "standard": "standard",
    "at": "PGD-AT",
    "trades": "TRADES",
    "dtrades": "D-TRADES",
    "mart": "MART",
    "faal": "FAAL",
}
NORMS = {"linf": "Linf", "l2": "L2"}
Conditions = tuple[float, str, tuple[int, ...]]  #: radius in pixel units, norm, test points


@dataclass(frozen=True)
class Basis:
    """What makes accuracies comparable: the same test points, radius and attacks.

    Attributes:
        epsilon: radius in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        ids: of the test points.
        attacks: that all runs of the group were attacked by, over which the worst case is taken.
    """

    epsilon: float
    norm: str
    ids: tuple[int, ...]
    attacks: tuple[str, ...]

    @property
    def conditions(self) -> Conditions:
        return self.epsilon, self.norm, self.ids

    @property
    def words(self) -> str:
        levels = round(255 * self.epsilon)
        radius = f"{levels}/255" if 0 < levels < 255 and levels / 255 == self.epsilon else f"{self.epsilon:.3g}"
        return f"{NORMS[self.norm]} {radius}, {len(self.ids)} test images"


@dataclass(frozen=True)
class Norms:
    """Smallest perturbations that were found.

    Attributes:
        values: [points], pixel units; infinite where none was found.
        ids: of the test points.
        cap: largest norm that was looked for.
    """

    values: NDArray[np.float64]
    ids: tuple[int, ...]
    cap: float

    @property
    def capped(self) -> NDArray[np.float64]:
        """As APN counts them: what none has broken within the cap counts as the cap."""
        return self.values.clip(max=self.cap)


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: of the study.
        folder: of its run.
        seconds: of training and of evaluation.
        ended: when, UTC; None if that is not known.
        before: seconds of the trainings that it started from; 0 without, None if one of them is not at its end.
    """

    cell: Cell
    folder: RunFolder
    seconds: dict[str, float]
    ended: str | None
    before: float | None

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Of ``metrics.jsonl``."""
        return self.folder.read_metrics()

    @cached_property
    def environment(self) -> dict[str, Any]:
        return dict(json.loads(self.folder.env.read_text()))

    @property
    def fingerprint(self) -> str | None:
        """Of the data that it was trained on, where that was written down."""
        return self.environment.get("data", {}).get("fingerprint")

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of ``eval.json``."""
        if not self.folder.evaluation.is_file():
            return []
        return list(json.loads(self.folder.evaluation.read_text())["evaluations"])

    def attacked(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """The evaluations with attacks."""
        return [r for r in self.records if r["checkpoint"] == checkpoint and r["attacks"]]

    def record(self, checkpoint: Checkpoint, basis: Basis) -> dict[str, Any] | None:
        """The evaluation on the points and at the radius of the basis, by its attacks at least."""
        for record in self.attacked(checkpoint):
            if conditions(record) == basis.conditions:
                return record
        return None

    def standing(self, checkpoint: Checkpoint, basis: Basis, attacks: Sequence[str]) -> NDArray[np.bool_] | None:
        """Points that are classified correctly under all of these attacks, [points]; without attacks the clean ones."""
        record = self.record(checkpoint, basis)
        if record is None or any(name not in record["attacks"] for name in attacks):
            return None
        return np.all([flags(record["correct"]), *(flags(record["attacks"][n]["correct"]) for n in attacks)], axis=0)

    def norms(self, checkpoint: Checkpoint, norm: str) -> Norms | None:
        """The smallest perturbations that were found, where the most points were looked at.

        A point that any attack of an evaluation has broken counts as broken at its radius at the latest: searches for
        the smallest perturbation take fewer steps at each radius than an attack at one.
        """
        found = [r for r in self.records if r["checkpoint"] == checkpoint and norm in r["minimum_norm"]]
        if not found:
            return None
        record = max(found, key=lambda r: len(r["ids"]))
        entry = record["minimum_norm"][norm]
        values = np.array([np.inf if value is None else value for value in entry["per_point"]], dtype=float)
        radius = dict.fromkeys(record["ids"], np.inf)
        for other in self.attacked(checkpoint):
            if other["norm"] == norm:
                stand = np.all([flags(attack["correct"]) for attack in other["attacks"].values()], axis=0)
                for point in np.array(other["ids"])[flags(other["correct"]) & ~stand]:
                    if point in radius:
                        radius[point] = min(radius[point], pixels(other["epsilon"]))
        return Norms(np.minimum(values, list(radius.values())), tuple(record["ids"]), entry["cap"])


def flags(text: str) -> NDArray[np.bool_]:
    """Of ``"1"`` and ``"0"``, one per point."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def conditions(record: dict[str, Any]) -> Conditions:
    """Radius in pixel units, norm and test points of an evaluation."""
    return pixels(record["epsilon"]), record["norm"], tuple(record["ids"])


@dataclass(frozen=True)
class Row:
    """The runs of a method with one setting, by seed."""

    method: str
    setting: str
    part: str
    labelled: bool
    results: dict[int, Result]

    @property
    def name(self) -> str:
        method = NAMES.get(self.method, self.method)
        return f"{method} ({self.setting})" if self.setting else method


@dataclass(frozen=True)
class Group:
    """Rows that are compared: one protocol, data set and architecture."""

    protocol: str
    dataset: str
    arch: str
    rows: list[Row]

    @property
    def name(self) -> str:
        kind, _, folder = self.dataset.partition(":")
        name = f"{self.arch} on {f'the folder {Path(folder).name}' if folder else kind}"
        return name if self.protocol == "common" else f"{name}, {self.protocol} conditions"

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.part == name]

    @property
    def parts(self) -> list[str]:
        """``main`` first."""
        names = dict.fromkeys(row.part for row in self.rows)
        return sorted(names, key=lambda name: name != "main")

    @cached_property
    def bases(self) -> dict[Checkpoint, Basis]:
        """What the accuracies of each checkpoint are of: the conditions under which most runs were attacked.

        Of several with as many runs, those with the most attacks in common, then the most points.
        """
        found: dict[Checkpoint, Basis] = {}
        for checkpoint in CHECKPOINTS:
            records = [record for row in self.rows for r in row.results.values() for record in r.attacked(checkpoint)]
            counts = Counter(map(conditions, records))
            candidates = []
            for (epsilon, norm, ids), count in counts.items():
                theirs = [record["attacks"] for record in records if conditions(record) == (epsilon, norm, ids)]
                common = tuple(name for name in theirs[0] if all(name in attacks for attacks in theirs))
                candidates.append((count, len(common), len(ids), Basis(epsilon, norm, ids, common)))
            if candidates:
                found[checkpoint] = max(candidates, key=lambda candidate: candidate[:3])[-1]
        return found

    def left_out(self, checkpoint: Checkpoint) -> list[str]:
        """Evaluations that no table shows, in words, since they are of other points or another radius."""
        if (basis := self.bases.get(checkpoint)) is None:
            return []
        return [
            f"{row.name}, seed {seed}: {', '.join(record['attacks'])} at {record['norm']} {record['epsilon']} on "
            f"{len(record['ids'])} test images"
            for row in self.rows
            for seed, result in row.results.items()
            for record in result.attacked(checkpoint)
            if conditions(record) != basis.conditions
        ]


@dataclass(frozen=True)
class Results:
    """A study as far as it is.

    Attributes:
        study: what was asked for.
        groups: of finished cells, the common protocol first.
        states: how far each cell is, by name.
    """

    study: Study
    groups: list[Group]
    states: dict[str, cells.State]

    @property
    def all(self) -> Iterator[Result]:
        for group in self.groups:
            for row in group.rows:
                yield from row.results.values()

    @property
    def other_data(self) -> list[str]:
        """Names of cells whose data are not those of most of their group."""
        found = []
        for group in self.groups:
            marks = {r.cell.name: r.fingerprint for row in group.rows for r in row.results.values()}
            usual = Counter(marks.values()).most_common(1)[0][0]
            found += [name for name, mark in marks.items() if mark != usual]
        return found


def load(study: Study, runs_dir: Path) -> Results:
    """What there is of a study.

    Raises:
        ValueError: a folder has a cell of other options.
    """
    states = {cell.name: cells.look(cell, runs_dir) for cell in study.cells}
    groups: dict[tuple[str, str, str], dict[tuple[str, str], dict[int, Result]]] = {}
    kept = {cell.name: _result(study, cell, runs_dir) for cell in study.cells if states[cell.name].status == "done"}
    for name, result in kept.items():
        cell = study[name]
        rows = groups.setdefault((cell.protocol, cell.dataset, cell.arch), {})
        rows.setdefault((cell.method, cell.setting), {})[cell.seed] = result
    made = [
        Group(*place, rows=[_row(method, setting, found) for (method, setting), found in rows.items()])
        for place, rows in groups.items()
    ]
    made.sort(key=lambda group: group.protocol != "common")
    return Results(study, made, states)


def _result(study: Study, cell: Cell, runs_dir: Path) -> Result:
    folder = RunFolder(runs_dir / cell.name)
    kept = json.loads(folder.cell.read_text())
    return Result(cell, folder, dict(kept["seconds"]), kept.get("ended"), _seconds_before(study, cell, runs_dir))


def _seconds_before(study: Study, cell: Cell, runs_dir: Path) -> float | None:
    """Of the trainings that it started from, one after the other."""
    total = 0.0
    while cell.start is not None:
        cell = study[cell.start]
        lines = RunFolder(runs_dir / cell.name).read_metrics()
        if len(lines) < cell.epochs:
            return None
        total += sum(line["seconds"] for line in lines)
    return total


def _row(method: str, setting: str, found: dict[int, Result]) -> Row:
    cell = next(iter(found.values())).cell
    return Row(method, setting, cell.part, cell.labelled, dict(sorted(found.items())))


# ---- figures of a run ------------------------------------------------------------------------------------------------


def figures(result: Result, checkpoint: Checkpoint, basis: Basis | None) -> dict[str, float]:
    """Name -> value: accuracies, drops and success rates in per cent, norms in pixel units, times in minutes.

    Args:
        result: of a run.
        checkpoint: whose weights.
        basis: of the accuracies; "RA worst" and all that follows from it is over its attacks, and missing without any.
    """
    found: dict[str, float] = {}
    record = None if basis is None else result.record(checkpoint, basis)
    if record is not None and basis is not None:
        found["NA"] = na = 100 * record["na"]
        for name in record["attacks"]:
            found[f"RA {name}"] = 100 * record["attacks"][name]["ra"]
        standing = result.standing(checkpoint, basis, basis.attacks)
        if basis.attacks and standing is not None:
            ra = 100 * float(standing.mean())
            found |= {
                "RA worst": ra,
                "RD": na - ra,
                "ASR all": 100 - ra,
                "ASR correct": 100 * (na - ra) / na if na else 0.0,
            }
            found["worst class"] = min(class_accuracies(result, checkpoint, basis).values())
    for norm, name in NORMS.items():
        if (norms := result.norms(checkpoint, norm)) is not None:
            found[f"APN {name}"] = float(norms.capped.mean())
    weights = [line["train"]["lambda"]["mean"] for line in result.lines if "lambda" in line["train"]]
    if weights:
        found |= {"mean weight": float(np.mean(weights)), "last weight": weights[-1]}
    if result.before is not None:
        found["minutes"] = (result.seconds["training"] + result.before) / 60
    return found


def class_accuracies(result: Result, checkpoint: Checkpoint, basis: Basis) -> dict[str, float]:
    """Class -> its share of points that stand under all attacks of the basis, in per cent."""
    record, standing = result.record(checkpoint, basis), result.standing(checkpoint, basis, basis.attacks)
    assert record is not None
    assert standing is not None
    labels = np.array(record["labels"])
    return {
        name: 100 * float(standing[labels == i].mean())
        for i, name in enumerate(record["per_class"])
        if (labels == i).any()
    }


def masking(result: Result) -> tuple[int, int]:
    """Steps of training in which gradients looked masked, and all steps."""
    return sum(line["monitor"]["alarms"]["steps"] for line in result.lines), result.lines[-1]["step"]
