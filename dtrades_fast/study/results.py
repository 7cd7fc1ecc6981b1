"""What the finished cells of a study have to say, from their folders alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
MARK = "†"  #: of a row, some of whose evaluations are not healthy
MARK_EXPLAINED = f"{MARK} gradients of some seed look masked: its robust accuracies may be lower than shown."
Ids = tuple[int, ...]  #: of test points
Conditions = tuple[float, str, Ids]  #: radius in pixel units, norm, test points


@dataclass(frozen=True)
class Basis:
    """What makes accuracies comparable: the same test points, radius and attacks.

    Attributes:
        epsilon: radius in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        ids: of the test points.
        attacks: that all runs of the group were attacked by, over which the worst case is taken.
        norms: ``"linf"`` or ``"l2"`` -> the points on which smallest perturbations are compared, and the largest norm
            that was looked for; without those that nobody looked for.
    """

    epsilon: float
    norm: str
    ids: Ids
    attacks: tuple[str, ...]
    norms: Mapping[str, tuple[Ids, float]] = field(default_factory=dict)

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
    ids: Ids
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
        epochs_before: of those trainings.
    """

    cell: Cell
    folder: RunFolder
    seconds: dict[str, float]
    ended: str | None
    before: float | None
    epochs_before: int = 0

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

    def attacks(self, checkpoint: Checkpoint) -> dict[Conditions, list[tuple[str, ...]]]:
        """By the conditions under which it was attacked: by what, in each evaluation."""
        found: dict[Conditions, list[tuple[str, ...]]] = {}
        for record in self.attacked(checkpoint):
            found.setdefault(conditions(record), []).append(tuple(record["attacks"]))
        return found

    def record(
        self, checkpoint: Checkpoint, basis: Basis, attacks: Sequence[str] | None = None
    ) -> dict[str, Any] | None:
        """The evaluation on the points and at the radius of the basis, by these attacks at least, else by its own."""
        needed = set(basis.attacks if attacks is None else attacks)
        for record in self.attacked(checkpoint):
            if conditions(record) == basis.conditions and needed <= set(record["attacks"]):
                return record
        return None

    def standing(self, checkpoint: Checkpoint, basis: Basis, attacks: Sequence[str]) -> NDArray[np.bool_] | None:
        """Points that are classified correctly under all of these attacks, [points]; without attacks the clean ones."""
        record = self.record(checkpoint, basis, attacks)
        if record is None:
            return None
        return np.all([flags(record["correct"]), *(flags(record["attacks"][n]["correct"]) for n in attacks)], axis=0)

    def norms(self, checkpoint: Checkpoint, norm: str, basis: Basis) -> Norms | None:
        """The smallest perturbations that were found on the points of the basis.

        A point that an attack of the basis has broken counts as broken at its radius at the latest: searches for the
        smallest perturbation take fewer steps at each radius than an attack at one.
        """
        record = next((r for r in self.searched(checkpoint, norm) if searching(r, norm) == basis.norms.get(norm)), None)
        if record is None:
            return None
        entry, ids = record["minimum_norm"][norm], tuple(record["ids"])
        values = np.array([np.inf if value is None else value for value in entry["per_point"]], dtype=float)
        natural, standing = (self.standing(checkpoint, basis, attacks) for attacks in ((), basis.attacks))
        if norm == basis.norm and natural is not None and standing is not None:
            broken = set(np.array(basis.ids)[natural & ~standing].tolist())
            values = np.where([point in broken for point in ids], np.minimum(values, basis.epsilon), values)
        return Norms(values, ids, entry["cap"])

    def searched(self, checkpoint: Checkpoint, norm: str) -> list[dict[str, Any]]:
        """The evaluations that looked for smallest perturbations."""
        return [r for r in self.records if r["checkpoint"] == checkpoint and norm in r["minimum_norm"]]


def flags(text: str) -> NDArray[np.bool_]:
    """Of ``"1"`` and ``"0"``, one per point."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def conditions(record: dict[str, Any]) -> Conditions:
    """Radius in pixel units, norm and test points of an evaluation."""
    return pixels(record["epsilon"]), record["norm"], tuple(record["ids"])


def searching(record: dict[str, Any], norm: str) -> tuple[Ids, float]:
    """Test points and largest norm of a search for smallest perturbations."""
    return tuple(record["ids"]), record["minimum_norm"][norm]["cap"]


@dataclass(frozen=True, eq=False)
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

    def looks_masked(self, checkpoint: Checkpoint) -> bool:
        """Whether an evaluation of one of its runs was not judged healthy."""
        return any(doubts(result, checkpoint) for result in self.results.values())

    def marked(self, checkpoint: Checkpoint) -> str:
        """Its name, with :data:`MARK` if its accuracies may flatter it."""
        return f"{self.name} {MARK}" if self.looks_masked(checkpoint) else self.name


@dataclass(frozen=True, eq=False)
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
        return {checkpoint: found[0] for checkpoint, found in self._bases.items() if found}

    def other_bases(self, checkpoint: Checkpoint) -> list[Basis]:
        """Other conditions, under which some of the runs were attacked, too."""
        return self._bases[checkpoint][1:]

    def basis(self, checkpoint: Checkpoint, number: int = 0) -> Basis | None:
        """Conditions by their number: 0 are the usual ones, from 1 on the others; None without any."""
        found = self._bases[checkpoint]
        return found[number] if number < len(found) else None

    @cached_property
    def _bases(self) -> dict[Checkpoint, list[Basis]]:
        return {checkpoint: self._conditions(checkpoint) for checkpoint in CHECKPOINTS}

    def _conditions(self, checkpoint: Checkpoint) -> list[Basis]:
        results = [result for row in self.rows for result in row.results.values()]
        searches = {
            norm: Counter(searching(r, norm) for result in results for r in result.searched(checkpoint, norm))
            for norm in NORMS
        }
        norms = {norm: max(n, key=lambda key: (n[key], len(key[0]))) for norm, n in searches.items() if n}
        attacked: dict[Conditions, list[list[tuple[str, ...]]]] = {}  # of each run, by evaluation
        for result in results:
            for place, attacks in result.attacks(checkpoint).items():
                attacked.setdefault(place, []).append(attacks)
        found = []
        for (epsilon, norm, ids), theirs in attacked.items():
            counts = Counter(names for run in theirs for names in set(run))
            usual = max(counts, key=lambda names: (counts[names], len(names)))
            chosen = [max(run, key=lambda names: len(set(names) & set(usual))) for run in theirs]
            common = tuple(name for name in usual if all(name in names for names in chosen))
            found.append((len(theirs), len(common), len(ids), Basis(epsilon, norm, ids, common, norms)))
        bases = [basis for *_, basis in sorted(found, key=lambda one: one[:3], reverse=True)]
        return bases[:1] + [replace(basis, norms={}) for basis in bases[1:]]  # norms are shown once


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
    seconds, epochs = _before(study, cell, runs_dir)
    return Result(cell, folder, dict(kept["seconds"]), kept.get("ended"), seconds, epochs)


def _before(study: Study, cell: Cell, runs_dir: Path) -> tuple[float | None, int]:
    """Seconds and epochs of the trainings that it started from, one after the other."""
    seconds: float | None = 0.0
    epochs = 0
    while cell.start is not None:
        cell = study[cell.start]
        epochs += cell.epochs
        try:
            done = cells.epochs(RunFolder(runs_dir / cell.name))
        except RuntimeError:  # damaged, which the cell itself says
            done = cells.Epochs()
        seconds = seconds + done.seconds if seconds is not None and done.count >= cell.epochs else None
    return seconds, epochs


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
        alike = [other for other in result.attacked(checkpoint) if conditions(other) == basis.conditions]
        for name, attack in ((name, attack) for each in (record, *alike) for name, attack in each["attacks"].items()):
            found.setdefault(f"RA {name}", 100 * attack["ra"])
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
        if basis is not None and (norms := result.norms(checkpoint, norm, basis)) is not None:
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


def doubts(result: Result, checkpoint: Checkpoint) -> list[str]:
    """Why evaluations of the checkpoint were not judged healthy."""
    found = []
    for record in result.attacked(checkpoint):
        judged = record["verdict"]
        if judged["verdict"] != "healthy":
            why = [r if isinstance(r, str) else str(r.get("text", r)) for r in judged["reasons"]]
            found.append(f"{len(record['ids'])} images, {judged['verdict']}: {'; '.join(why)}")
    return found


def masking(result: Result) -> tuple[int, int]:
    """Steps of training in which gradients looked masked, and all steps."""
    return sum(line["monitor"]["alarms"]["steps"] for line in result.lines), result.lines[-1]["step"]
