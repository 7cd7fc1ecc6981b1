"""Pictures of what ``dtrades-fast evaluate`` has stored: accuracy against radius and queries, and transfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from dtrades_fast.evaluation.blackbox import QueryCurve, Transfer
from dtrades_fast.evaluation.record import flags, stored
from dtrades_fast.evaluation.report import threat
from dtrades_fast.pixels import pixels
from dtrades_fast.plot.robustness import robust_accuracy_curve
from dtrades_fast.plot.transfer import query_curves, transfer_matrix
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["pictures"]


def pictures(runs: Mapping[str, RunFolder]) -> Iterator[tuple[str, Figure]]:
    """What can be drawn of the runs' last evaluations that have it, by file name."""
    records = {name: stored(run.evaluation) for name, run in runs.items()}
    for norm in ("linf", "l2"):
        found = {name: last(of, "minimum_norm", norm) for name, of in records.items()}
        if curves := {name: record for name, record in found.items() if record}:
            yield f"minimum-norm-{norm}", radius_curve(curves, norm)
    squares = {name: last(of, "attacks", "square") for name, of in records.items()}
    for number, ball in enumerate(dict.fromkeys(threat(record) for record in squares.values() if record)):
        same = {name: record for name, record in squares.items() if record and threat(record) == ball}
        yield f"queries-{number + 1}" if number else "queries", query_curve(same)
    for name, of in records.items():
        for attack in ("mifgsm", "pgd20"):
            if record := last(of, "transfer", attack):
                file = f"transfer-{attack}" if len(runs) == 1 else f"transfer-{attack}-{name.replace('/', '-')}"
                yield file, transfer_matrix(stored_transfer(record["transfer"][attack], name), title(attack, record))


def last(records: list[dict[str, Any]], part: str, name: str) -> dict[str, Any] | None:
    """The newest one that has such an entry."""
    return next((record for record in reversed(records) if name in record[part]), None)


def title(attack: str, record: Mapping[str, Any]) -> str:
    return f"{attack}, {threat(record)}"


def radius_curve(records: Mapping[str, dict[str, Any]], norm: Any) -> Figure:
    norms, largest = {}, 0.0
    for name, record in records.items():
        found = [torch.inf if value is None else value for value in record["minimum_norm"][norm]["per_point"]]
        norms[name] = torch.tensor(found, dtype=torch.float64)
        largest = max([largest, *(value for value in found if value < torch.inf)])
    same = {record["epsilon"] for record in records.values() if record["norm"] == norm}
    epsilon = pixels(same.pop()) if len(same) == 1 else None
    return robust_accuracy_curve(norms, norm=norm, cap=1.05 * largest or 1.0, epsilon=epsilon)


def query_curve(records: Mapping[str, dict[str, Any]]) -> Figure:
    curves = {}
    for name, record in records.items():
        entry = record["attacks"]["square"]
        spent = torch.tensor(entry["queries"]["per_point"])
        curves[name] = QueryCurve(spent, flags(entry["correct"]), entry["settings"]["queries"])
    return query_curves(curves, title("Square", next(iter(records.values()))))


def stored_transfer(entry: Mapping[str, Any], run: str) -> Transfer:
    """The matrix, with the run's name for ``target``."""
    names = [tuple(run if name == "target" else name for name in entry[side]) for side in ("sources", "targets")]
    return Transfer(
        sources=names[0],
        targets=names[1],
        relations=tuple(map(tuple, entry["relations"])),
        natural=torch.stack([flags(row) for row in entry["natural"]]),
        standing=torch.stack([torch.stack([flags(column) for column in row]) for row in entry["standing"]]),
    )
