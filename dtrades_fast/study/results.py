"""What the finished cells of a study have to say, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtrades_fast.study import cell as cells
from dtrades_fast.study.grid import Cell, Study
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Checkpoint", "Group", "Result", "Results", "Row", "load"]

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


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: of the study.
        folder: of its run.
        seconds: of training, of evaluation, and of the training that it started from.
    """

    cell: Cell
    folder: RunFolder
    seconds: dict[str, float]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Of ``metrics.jsonl``."""
        return self.folder.read_metrics()

    @cached_property
    def environment(self) -> dict[str, Any]:
        return dict(json.loads(self.folder.env.read_text()))

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of ``eval.json``."""
        if not self.folder.evaluation.is_file():
            return []
        return list(json.loads(self.folder.evaluation.read_text())["evaluations"])

    def record(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """The evaluation with attacks on the most points."""
        found = [r for r in self.records if r["checkpoint"] == checkpoint and r["attacks"]]
        return max(found, key=lambda record: record["points"], default=None)

    def norms(self, checkpoint: Checkpoint, norm: str) -> dict[str, Any] | None:
        """The smallest perturbations that were found."""
        found = [
            r["minimum_norm"][norm] for r in self.records if r["checkpoint"] == checkpoint and norm in r["minimum_norm"]
        ]
        return max(found, key=lambda entry: entry["apn"]["points"], default=None)

    def standing(self, checkpoint: Checkpoint, attacks: Sequence[str]) -> NDArray[np.bool_] | None:
        """Points that are classified correctly under all of these attacks, [points]; without attacks the clean ones."""
        record = self.record(checkpoint)
        if record is None or any(name not in record["attacks"] for name in attacks):
            return None
        strings = [record["correct"], *(record["attacks"][name]["correct"] for name in attacks)]
        return np.all([np.frombuffer(string.encode(), np.uint8) == ord("1") for string in strings], axis=0)


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
        return f"{self.arch} on {self.dataset}"

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.part == name]

    @property
    def parts(self) -> list[str]:
        """``main`` first."""
        names = dict.fromkeys(row.part for row in self.rows)
        return sorted(names, key=lambda name: name != "main")

    def attacks(self, checkpoint: Checkpoint) -> list[str]:
        """Attacks that all of its runs were evaluated by, in the order of the first."""
        records = [record for row in self.rows for r in row.results.values() if (record := r.record(checkpoint))]
        if not records:
            return []
        return [name for name in records[0]["attacks"] if all(name in record["attacks"] for record in records)]


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


def load(study: Study, runs_dir: Path) -> Results:
    """What there is of a study.

    Raises:
        ValueError: a folder has a cell of other options.
    """
    states = {cell.name: cells.look(cell, runs_dir) for cell in study.cells}
    groups: dict[tuple[str, str, str], dict[tuple[str, str], dict[int, Result]]] = {}
    kept = {cell.name: _result(cell, runs_dir) for cell in study.cells if states[cell.name].status == "done"}
    for name, result in kept.items():
        cell = study[name]
        if cell.start in kept:
            result.seconds["before"] = kept[cell.start].seconds["training"]
        rows = groups.setdefault((cell.protocol, cell.dataset, cell.arch), {})
        rows.setdefault((cell.method, cell.setting), {})[cell.seed] = result
    made = [
        Group(*place, rows=[_row(method, setting, found) for (method, setting), found in rows.items()])
        for place, rows in groups.items()
    ]
    made.sort(key=lambda group: group.protocol != "common")
    return Results(study, made, states)


def _result(cell: Cell, runs_dir: Path) -> Result:
    folder = RunFolder(runs_dir / cell.name)
    return Result(cell, folder, dict(json.loads(folder.cell.read_text())["seconds"]))


def _row(method: str, setting: str, found: dict[int, Result]) -> Row:
    cell = next(iter(found.values())).cell
    return Row(method, setting, cell.part, cell.labelled, dict(sorted(found.items())))


# ---- figures of a run ------------------------------------------------------------------------------------------------


def figures(result: Result, checkpoint: Checkpoint, attacks: Sequence[str]) -> dict[str, float]:
    """Name -> value: accuracies, drops and success rates in per cent, norms in pixel units, times in minutes.

    Args:
        result: of a run.
        checkpoint: whose weights.
        attacks: what "RA worst" and all that follows from it is taken over.
    """
    found: dict[str, float] = {}
    record = result.record(checkpoint)
    standing = result.standing(checkpoint, attacks)
    if record is not None and standing is not None:
        na, ra = 100 * record["na"], 100 * float(standing.mean())
        found["NA"] = na
        for name in record["attacks"]:
            found[f"RA {name}"] = 100 * record["attacks"][name]["ra"]
        found |= {
            "RA worst": ra,
            "RD": na - ra,
            "ASR all": 100 - ra,
            "ASR correct": 100 * (na - ra) / na if na else 0.0,
        }
        found["worst class"] = min(class_accuracies(result, checkpoint, attacks).values())
    for norm, name in NORMS.items():
        if (entry := result.norms(checkpoint, norm)) is not None:
            found[f"APN {name}"] = entry["apn"]["mean"]
    found["minutes"] = sum(seconds for what, seconds in result.seconds.items() if what != "evaluation") / 60
    return found


def class_accuracies(result: Result, checkpoint: Checkpoint, attacks: Sequence[str]) -> dict[str, float]:
    """Class -> its share of points that stand under all of these attacks, in per cent; without attacks, clean."""
    record, standing = result.record(checkpoint), result.standing(checkpoint, attacks)
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
