"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dtrades_fast.config import read_yaml
from dtrades_fast.study import statistics
from dtrades_fast.study.blocks import Table, slug
from dtrades_fast.study.results import (
    CHECKPOINTS,
    NAMES,
    Checkpoint,
    Group,
    Result,
    Results,
    Row,
    class_accuracies,
    figures,
    masking,
)
from dtrades_fast.training.progress import duration

#: What pairs of methods are compared by: its name, its unit, and whether test points can be drawn anew for it.
MEASURES = (
    ("NA", "points", True),
    ("RA worst", "points", True),
    ("worst class", "points", False),
    ("APN Linf", "", False),
)
NOTHING = "–"
UNITS = {"APN Linf": 3, "APN L2": 2}  #: decimals; all else has one


def of_seeds(row: Row, checkpoint: Checkpoint, attacks: Sequence[str]) -> dict[int, dict[str, float]]:
    """Seed -> the figures of its run."""
    return {seed: figures(result, checkpoint, attacks) for seed, result in row.results.items()}


def mean_and_deviation(values: Sequence[float], decimals: int = 1) -> str:
    """``mean ± deviation``; of one seed the value."""
    if not values:
        return NOTHING
    found = statistics.summary(values)
    mean = f"{found.mean:.{decimals}f}"
    return mean if found.count == 1 else f"{mean} ± {found.deviation:.{decimals}f}"


def accuracies(group: Group, part: str, checkpoint: Checkpoint) -> Table | None:
    """Mean and deviation over seeds; None if no run of the part was evaluated at that checkpoint."""
    attacks, rows = group.attacks(checkpoint), group.part(part)
    found = {row.name: of_seeds(row, checkpoint, attacks) for row in rows}
    names = [name for row in found.values() for seed in row.values() for name in seed]
    if "NA" not in names:
        return None
    order = [
        "NA",
        *(f"RA {name}" for name in ["fgsm", *attacks]),
        "RA autoattack",
        "RA worst",
        "RD",
        "ASR all",
        "ASR correct",
    ]
    order = [name for name in dict.fromkeys([*order, "worst class", "APN Linf", "APN L2"]) if name in names]
    lines = []
    for row in rows:
        seeds = found[row.name].values()
        cells = [
            mean_and_deviation([seed[name] for seed in seeds if name in seed], UNITS.get(name, 1)) for name in order
        ]
        overfit = mean_and_deviation(overfitting(row, attacks)) if checkpoint == "last" else None
        lines.append([row.name, *cells, *([overfit] if overfit else []), str(len(row.results))])
    header = [
        "method",
        *(heading(name) for name in order),
        *(["best − last RA"] if checkpoint == "last" else []),
        "seeds",
    ]
    used = [i for i, _ in enumerate(header) if any(line[i] != NOTHING for line in lines)]
    caption = (
        f"{group.name}, {part}, {checkpoint} epoch: mean ± standard deviation over seeds, in % (APN in pixel units). "
        f"RA worst: points that stand under each of {', '.join(attacks)}."
    )
    name = slug(f"{group.protocol}-{group.name}-{part}-{checkpoint}")
    return Table(name, caption, [header[i] for i in used], [[line[i] for i in used] for line in lines])


def heading(name: str) -> str:
    return {"worst class": "RA worst class", "ASR all": "ASR of all", "ASR correct": "ASR of correct"}.get(name, name)


def overfitting(row: Row, attacks: Sequence[str]) -> list[float]:
    """RA of the best epoch minus that of the last one, by seed; empty if one was not evaluated."""
    both = [of_seeds(row, checkpoint, attacks) for checkpoint in CHECKPOINTS]
    last, best = ([found.get("RA worst") for found in seeds.values()] for seeds in both)
    return [b - a for a, b in zip(last, best, strict=True) if a is not None and b is not None]


# ---- comparisons -----------------------------------------------------------------------------------------------------


def pairs(group: Group, compare: str) -> Iterator[tuple[str, Row, Row]]:
    """Part and rows that are to be compared: the method of the study with the others of ``main`` and, in other parts,
    with those of the same setting; and its main row with its own rows of other parts that have a label."""
    mine = [row for row in group.part("main") if row.method == compare]
    for part in group.parts:
        rows = group.part(part)
        for row in rows:
            if row.method == compare and part != "main":
                yield from (
                    (part, row, other) for other in rows if other.method != compare and other.setting == row.setting
                )
                if row.labelled and not any(o.setting == row.setting and o.method != compare for o in rows):
                    yield from ((part, first, row) for first in mine)
            elif row.method != compare and part == "main":
                yield from ((part, first, row) for first in mine)


def comparison(group: Group, compare: str, checkpoint: Checkpoint) -> Table | None:
    """Paired differences with intervals over seeds and over points; None if there is nothing to compare."""
    attacks, lines = group.attacks(checkpoint), []
    for _, ours, theirs in pairs(group, compare):
        a, b = (of_seeds(row, checkpoint, attacks) for row in (ours, theirs))
        for name, unit, has_points in MEASURES:
            x, y = ({seed: found[name] for seed, found in side.items() if name in found} for side in (a, b))
            if not set(x) & set(y):
                continue
            found = statistics.paired(x, y)
            decimals = UNITS.get(name, 1)
            drawn = over_points(ours, theirs, checkpoint, attacks if name != "NA" else ()) if has_points else NOTHING
            lines.append(
                [
                    f"{ours.name} − {theirs.name}",
                    heading(name),
                    f"{found.mean:+.{decimals}f}",
                    interval(found, decimals),
                    drawn,
                    str(found.needed_for_power or NOTHING),
                    statistics.verdict(found, ours.name, theirs.name, unit, decimals),
                ]
            )
    if not lines:
        return None
    header = ["pair", "of", "difference", "95 % over seeds", "95 % over points", "seeds for 80 % power", "in words"]
    caption = (
        f"{group.name}, {checkpoint} epoch: paired differences on the same seeds. Over seeds: Student's t, for other "
        "trainings; over points: bootstrap, for other test images of these networks. A winner is named only where the "
        "interval over seeds excludes zero; the intervals are not corrected for their number."
    )
    return Table(slug(f"{group.protocol}-{group.name}-comparison-{checkpoint}"), caption, header, lines)


def interval(found: statistics.Interval, decimals: int = 1) -> str:
    if np.isinf(found.low):
        return "one seed"
    return f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}"


def over_points(ours: Row, theirs: Row, checkpoint: Checkpoint, attacks: Sequence[str]) -> str:
    """The bootstrap interval, if both were evaluated on the same points."""
    both = [(ours.results[seed], theirs.results[seed]) for seed in ours.results if seed in theirs.results]
    records = [r.record(checkpoint) for pair in both for r in pair]
    if any(record is None or record["ids"] != (records[0] or {})["ids"] for record in records):
        return NOTHING
    a, b = ([pair[side].standing(checkpoint, attacks) for pair in both] for side in (0, 1))
    return interval(statistics.bootstrap(100.0 * np.array(a), 100.0 * np.array(b)))


def comparison_lines(table: Table) -> list[str]:
    """The comparison in words, for a terminal."""
    return [f"{row[1]}: {row[-1]}" for row in table.rows]


# ---- trade-offs ------------------------------------------------------------------------------------------------------


def points(row: Row, checkpoint: Checkpoint, attacks: Sequence[str]) -> dict[int, tuple[float, float]]:
    """Seed -> clean and robust accuracy."""
    found = of_seeds(row, checkpoint, attacks)
    return {seed: (f["NA"], f["RA worst"]) for seed, f in found.items() if "RA worst" in f}


def fronts(group: Group, checkpoint: Checkpoint) -> dict[str, list[Row]]:
    """Method -> its rows along a front: those whose setting is an option's value, not a label."""
    rows: dict[str, list[Row]] = {}
    for row in group.rows:
        if not row.labelled and points(row, checkpoint, group.attacks(checkpoint)):
            rows.setdefault(row.method, []).append(row)
    return rows


def trade_offs(group: Group, checkpoint: Checkpoint) -> Table | None:
    """Harmonic means; areas under the fronts of methods with several settings."""
    attacks, lines = group.attacks(checkpoint), []
    means = mean_points(group, checkpoint)
    on_front = {name for i, name in enumerate(means) if i in statistics.pareto(list(means.values()))}
    for rows in fronts(group, checkpoint).values():
        by_seed = front_by_seed(rows, checkpoint, attacks)
        areas = [100 * statistics.area_under_front(front) for front in by_seed.values()] if len(rows) > 1 else []
        for row in rows:
            found = points(row, checkpoint, attacks).values()
            harmonics = [statistics.harmonic(na, ra) for na, ra in found]
            lines.append(
                [
                    row.name,
                    mean_and_deviation([na for na, _ in found]),
                    mean_and_deviation([ra for _, ra in found]),
                    mean_and_deviation(harmonics),
                    "yes" if row.name in on_front else "no",
                    mean_and_deviation(areas),
                ]
            )
    if not lines:
        return None
    header = ["method", "NA", "RA worst", "harmonic mean", "on the Pareto front", "area under the method's front"]
    caption = (
        f"{group.name}, {checkpoint} epoch: trade-off, in %. The front is that of the means of all methods; the area, "
        "of methods with several settings, is the share of all pairs of accuracies that one of them exceeds."
    )
    return Table(slug(f"{group.protocol}-{group.name}-trade-off-{checkpoint}"), caption, header, lines)


def mean_points(group: Group, checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Name of a row -> its mean clean and robust accuracy."""
    found = {}
    for rows in fronts(group, checkpoint).values():
        for row in rows:
            values = np.mean(list(points(row, checkpoint, group.attacks(checkpoint)).values()), axis=0)
            found[row.name] = (float(values[0]), float(values[1]))
    return found


def front_by_seed(
    rows: Sequence[Row], checkpoint: Checkpoint, attacks: Sequence[str]
) -> dict[int, list[tuple[float, float]]]:
    """Seed -> the points of all settings; only of seeds that have all of them."""
    found = [points(row, checkpoint, attacks) for row in rows]
    seeds = set(found[0]).intersection(*found[1:])
    return {seed: [each[seed] for each in found] for seed in sorted(seeds)}


def at_equal_accuracy(group: Group, compare: str, checkpoint: Checkpoint) -> list[str]:
    """How the front of the method lies to that of each other one that has several settings, in words."""
    attacks, found = group.attacks(checkpoint), fronts(group, checkpoint)
    mine, lines = found.pop(compare, []), []
    for rows in found.values():
        if len(rows) < 2 or len(mine) < 2:
            continue
        a, b = front_by_seed(mine, checkpoint, attacks), front_by_seed(rows, checkpoint, attacks)
        by_seed = {seed: statistics.difference_of_fronts(a[seed], b[seed]) for seed in a if seed in b}
        values = {seed: value for seed, value in by_seed.items() if value is not None}
        ours, theirs = (NAMES.get(each[0].method, each[0].method) for each in (mine, rows))
        without = (
            f"; the fronts of {len(by_seed) - len(values)} seeds have no clean accuracy in common"
            if len(values) < len(by_seed)
            else ""
        )
        if values:
            said = statistics.verdict(statistics.paired(values, dict.fromkeys(values, 0.0)), ours, theirs)
            lines.append(f"{group.name}, {checkpoint} epoch, robust accuracy at equal clean accuracy: {said}{without}.")
        else:
            lines.append(f"{group.name}: the fronts of {ours} and {theirs} have no clean accuracy in common.")
    return lines


# ---- masking, times, configuration -----------------------------------------------------------------------------------


def masked_gradients(group: Group) -> Table:
    """How often gradients looked masked in training, and the verdicts of evaluations."""
    lines = []
    for row in group.rows:
        counted = [masking(result) for result in row.results.values()]
        runs = sum(masked > 0 for masked, _ in counted)
        verdicts = [
            f"{record['verdict']['verdict']} (seed {seed}, {checkpoint}): {'; '.join(reasons(record))}"
            for seed, result in row.results.items()
            for checkpoint in CHECKPOINTS
            if (record := result.record(checkpoint)) and record["verdict"]["verdict"] != "healthy"
        ]
        judged = sum(result.record(c) is not None for result in row.results.values() for c in CHECKPOINTS)
        batch = {str(line.cell.options.get("batch_size", "")) or NOTHING for line in row.results.values()}
        lines.append(
            [
                row.name,
                row.part,
                "/".join(sorted(batch)),
                f"{runs} of {len(counted)}",
                f"{100 * sum(m for m, _ in counted) / sum(n for _, n in counted):.1f}",
                f"{judged - len(verdicts)} of {judged}",
                "; ".join(verdicts) or NOTHING,
            ]
        )
    header = [
        "method",
        "part",
        "batch size, if given",
        "runs with an alarm",
        "% of steps",
        "healthy evaluations",
        "others",
    ]
    caption = f"{group.name}: gradient masking in training, as the monitor saw it, and the verdicts of the evaluations."
    return Table(slug(f"{group.protocol}-{group.name}-masking"), caption, header, lines)


def reasons(record: Mapping[str, Any]) -> list[str]:
    return [
        reason if isinstance(reason, str) else str(reason.get("text", reason))
        for reason in record["verdict"]["reasons"]
    ]


def times(group: Group) -> Table:
    """Minutes of training and evaluation."""
    lines = []
    for row in group.rows:
        spent = [result.seconds for result in row.results.values()]
        whole = [(s["training"] + s.get("before", 0.0)) / 60 for s in spent]
        lines.append(
            [
                row.name,
                mean_and_deviation([s["training"] / 60 for s in spent]),
                mean_and_deviation(whole) if any("before" in s for s in spent) else NOTHING,
                mean_and_deviation([s["evaluation"] / 60 for s in spent]),
            ]
        )
    header = ["method", "training", "with the network that it started from", "evaluation"]
    return Table(slug(f"{group.protocol}-{group.name}-times"), f"{group.name}: minutes per cell.", header, lines)


def total_time(results: Results) -> str:
    """Of all cells that are finished."""
    seconds = sum(r.seconds["training"] + r.seconds["evaluation"] for r in results.all)
    return duration(seconds)


def configuration(results: Results) -> tuple[Table, Table]:
    """The options in which cells differ, and those that they share."""
    configs = {result.cell.name: read_yaml(result.folder.config) for result in results.all}
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    values = {name: {str(config.get(name, NOTHING)) for config in configs.values()} for name in names}
    differ = [name for name in names if len(values[name]) > 1]
    rows = [[cell, *(str(config.get(name, NOTHING)) for name in differ)] for cell, config in configs.items()]
    shared = [[name, next(iter(values[name]))] for name in names if len(values[name]) == 1]
    return (
        Table("options-that-differ", "Options of training in which cells differ.", ["cell", *differ], rows),
        Table("options-in-common", "Options of training that all cells share.", ["option", "value"], shared),
    )


def environments(results: Results) -> Table:
    """Where cells ran, each kind of place once."""
    counted: dict[tuple[str, ...], int] = {}
    for result in results.all:
        e = result.environment
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        place = (str(e["commit"])[:12], e["platform"], str(e["device"]), str(e["backend"]), str(e["threads"]), versions)
        counted[place] = counted.get(place, 0) + 1
    rows = [[place[0], str(count), *place[1:]] for place, count in counted.items()]
    header = ["commit", "cells", "platform", "device", "operators", "threads", "versions"]
    return Table("environment", "Where the cells ran.", header, rows)


def by_class(group: Group, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Row -> class -> mean RA over seeds; the rows of ``main``."""
    attacks, found = group.attacks(checkpoint), {}
    for row in group.part("main"):
        each = [class_accuracies(r, checkpoint, attacks) for r in row.results.values() if r.record(checkpoint)]
        if each:
            found[row.name] = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    return found


# ---- files of numbers ------------------------------------------------------------------------------------------------

PLACE = ("protocol", "dataset", "arch", "part", "method", "setting")


def place(group: Group, row: Row) -> list[str]:
    """Values of :data:`PLACE`."""
    return [group.protocol, group.dataset, group.arch, row.part, row.method, row.setting]


def per_run(results: Results) -> tuple[list[str], list[list[Any]]]:
    """A line per cell, checkpoint and figure."""
    lines: list[list[Any]] = []
    for group, row, result in each_run(results):
        for checkpoint in CHECKPOINTS:
            for name, value in figures(result, checkpoint, group.attacks(checkpoint)).items():
                lines.append([result.cell.name, *place(group, row), result.cell.seed, checkpoint, name, f"{value:.6g}"])
    return ["cell", *PLACE, "seed", "checkpoint", "figure", "value"], lines


def aggregated(results: Results) -> tuple[list[str], list[list[Any]]]:
    """A line per row, checkpoint and figure."""
    lines: list[list[Any]] = []
    for group in results.groups:
        for row in group.rows:
            for checkpoint in CHECKPOINTS:
                found = list(of_seeds(row, checkpoint, group.attacks(checkpoint)).values())
                for name in dict.fromkeys(name for seed in found for name in seed):
                    s = statistics.summary([seed[name] for seed in found if name in seed])
                    lines.append([*place(group, row), checkpoint, name, f"{s.mean:.6g}", f"{s.deviation:.6g}", s.count])
    return [*PLACE, "checkpoint", "figure", "mean", "deviation", "seeds"], lines


def each_run(results: Results) -> Iterator[tuple[Group, Row, Result]]:
    for group in results.groups:
        for row in group.rows:
            for result in row.results.values():
                yield group, row, result
