"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dtrades_fast.config import read_yaml
from dtrades_fast.study import statistics
from dtrades_fast.study.blocks import Table, slug
from dtrades_fast.study.comparisons import (
    DECIMALS,
    differences,
    front_by_seed,
    fronts,
    heading,
    mean_points,
    of_seeds,
    points,
)
from dtrades_fast.study.results import (
    CHECKPOINTS,
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

NOTHING = "–"


def mean_and_deviation(values: Sequence[float], decimals: int = 1, seeds: int | None = None) -> str:
    """``mean ± deviation``; of one seed the value. Where fewer than all seeds have one, how many do."""
    if not values:
        return NOTHING
    found = statistics.summary(values)
    text = f"{found.mean:.{decimals}f}" + (f" ± {found.deviation:.{decimals}f}" if found.count > 1 else "")
    return text if seeds in (None, found.count) else f"{text} ({found.count} of {seeds} seeds)"


def median_and_range(values: Sequence[float]) -> str:
    """``median (lowest to highest)``; of one seed the value."""
    if not values:
        return NOTHING
    middle = f"{np.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def accuracies(group: Group, part: str, checkpoint: Checkpoint) -> Table | None:
    """Mean and deviation over seeds; None if no run of the part was evaluated at that checkpoint."""
    basis, rows = group.bases.get(checkpoint), group.part(part)
    found = {row.name: of_seeds(row, checkpoint, basis) for row in rows}
    names = [name for row in found.values() for seed in row.values() for name in seed]
    if basis is None or "NA" not in names:
        return None
    attacked = [name for name in dict.fromkeys(names) if name.startswith("RA ") and name != "RA worst"]
    order = ["NA", *(f"RA {name}" for name in basis.attacks), *attacked]
    order += ["RA worst", "RD", "ASR all", "ASR correct", "worst class", "APN Linf", "APN L2"]
    order = [name for name in dict.fromkeys(order) if name in names]
    lines = []
    for row in rows:
        values = {name: [seed[name] for seed in found[row.name].values() if name in seed] for name in order}
        cells = [mean_and_deviation(values[name], DECIMALS.get(name, 1), len(row.results)) for name in order]
        overfit = [mean_and_deviation(overfitting(group, row))] if checkpoint == "last" else []
        lines.append([row.name, *cells, *overfit, str(len(row.results))])
    header = [
        "method",
        *(heading(name) for name in order),
        *(["best − last RA"] if checkpoint == "last" else []),
        "seeds",
    ]
    used = [i for i, _ in enumerate(header) if any(line[i] != NOTHING for line in lines)]
    caption = (
        f"{group.name}, {part}, {checkpoint} epoch, {basis.words}: mean ± standard deviation over seeds, in % (APN in "
        "pixel units)."
    )
    if basis.attacks:
        caption += f" RA worst: points that stand under each of {', '.join(basis.attacks)}, which all runs were"
        caption += " attacked by."
    name = slug(f"{group.protocol}-{group.name}-{part}-{checkpoint}")
    return Table(name, caption, [header[i] for i in used], [[line[i] for i in used] for line in lines])


def overfitting(group: Group, row: Row) -> list[float]:
    """RA of the best epoch minus that of the last one, by seed, under the attacks of both."""
    bases = [group.bases.get(checkpoint) for checkpoint in ("best", "last")]
    if None in bases:
        return []
    best, last = (basis for basis in bases if basis is not None)
    attacks = [name for name in best.attacks if name in last.attacks]
    if not attacks or best.conditions != last.conditions:
        return []
    pairs = [(r.standing("best", best, attacks), r.standing("last", last, attacks)) for r in row.results.values()]
    return [100 * float(a.mean() - b.mean()) for a, b in pairs if a is not None and b is not None]


def weights(group: Group) -> Table | None:
    """What the weight of the regularisation really was; None without a method that has one."""
    lines = []
    for row in group.rows:
        found = [seed for seed in of_seeds(row, "last", None).values() if "mean weight" in seed]
        if found:
            over = [mean_and_deviation([seed[name] for seed in found], 2) for name in ("mean weight", "last weight")]
            lines.append([row.name, row.part, *over, str(len(found))])
    if not lines:
        return None
    caption = (
        f"{group.name}: the weight of the regularisation as it was in training, mean ± standard deviation over seeds. "
        "Calibration fixes the mean of λ(x) where it ends; as entropy and sensitivity change, so does λ(x). Runs are "
        "alike in weight by these columns, not by their names."
    )
    header = ["method", "part", "mean over training", "mean in the last epoch", "seeds"]
    return Table(slug(f"{group.protocol}-{group.name}-weights"), caption, header, lines)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparison(group: Group, compare: str, checkpoint: Checkpoint, *, headlines: bool = True) -> Table | None:
    """The differences as a table, with the winners where the group decides; None if there are none."""
    found = differences(group, compare, checkpoint, headlines=headlines)
    if not found:
        return None
    decides = headlines and group.protocol == "common"
    lines = []
    for each in found:
        decimals = DECIMALS.get(each.name, 1)
        lines.append(
            [
                f"{each.ours.name} − {each.theirs.name}",
                heading(each.name),
                f"{each.over_seeds.mean:+.{decimals}f}",
                interval(each.over_seeds, decimals),
                NOTHING if each.over_points is None else interval(each.over_points, decimals),
                str(each.over_seeds.count),
                str(each.over_seeds.needed_for_power or NOTHING),
                *([each.winner] if decides else []),
            ]
        )
    header = ["pair", "of", "difference", "95 % over seeds", "95 % over images", "seeds", "seeds for 80 % power"]
    caption = (
        f"{group.name}, {checkpoint} epoch: paired differences on the same seeds. Over seeds: Student's t, for other "
        "trainings; over images: bootstrap, for other test images of these networks. The intervals are not corrected "
        "for their number."
    )
    if decides:
        header.append("higher")
        caption += " What is higher is named only where both intervals exclude zero."
    elif headlines:
        caption += f" The {group.protocol} conditions differ between methods: they name no winner."
    rest = "" if headlines else "-of-the-rest"
    return Table(slug(f"{group.protocol}-{group.name}-comparison-{checkpoint}{rest}"), caption, header, lines)


def interval(found: statistics.Interval, decimals: int = 1) -> str:
    if np.isinf(found.low):
        return "one seed"
    return f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}"


# ---- trade-offs ------------------------------------------------------------------------------------------------------


def trade_offs(group: Group, checkpoint: Checkpoint) -> Table | None:
    """Harmonic means; areas under the fronts of methods with several settings."""
    basis, lines = group.bases.get(checkpoint), []
    means = mean_points(group, checkpoint)
    on_front = {name for i, name in enumerate(means) if i in statistics.pareto(list(means.values()))}
    for rows in fronts(group, checkpoint).values():
        by_seed = front_by_seed(rows, checkpoint, basis)
        areas = [100 * statistics.area_under_front(front) for front in by_seed.values()] if len(rows) > 1 else []
        for row in rows:
            found = points(row, checkpoint, basis).values()
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
            for record in result.attacked(checkpoint)
            if record["verdict"]["verdict"] != "healthy"
        ]
        judged = sum(len(result.attacked(c)) for result in row.results.values() for c in CHECKPOINTS)
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
        results = list(row.results.values())
        whole = [(r.seconds["training"] + r.before) / 60 for r in results if r.before is not None]
        lines.append(
            [
                row.name,
                median_and_range([r.seconds["training"] / 60 for r in results]),
                median_and_range(whole) if any(r.cell.start for r in results) else NOTHING,
                median_and_range([r.seconds["evaluation"] / 60 for r in results]),
            ]
        )
    header = ["method", "training", "with the network that it started from", "evaluation"]
    caption = (
        f"{group.name}: minutes per cell, median (lowest to highest) over seeds. Cells may have run on several "
        "machines and beside others: these are no benchmark."
    )
    return Table(slug(f"{group.protocol}-{group.name}-times"), caption, header, lines)


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
    basis, found = group.bases.get(checkpoint), {}
    if basis is None:
        return {}
    for row in group.part("main"):
        evaluated = [r for r in row.results.values() if r.record(checkpoint, basis)]
        each = [class_accuracies(r, checkpoint, basis) for r in evaluated]
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
            for name, value in figures(result, checkpoint, group.bases.get(checkpoint)).items():
                lines.append([result.cell.name, *place(group, row), result.cell.seed, checkpoint, name, f"{value:.6g}"])
    return ["cell", *PLACE, "seed", "checkpoint", "figure", "value"], lines


def aggregated(results: Results) -> tuple[list[str], list[list[Any]]]:
    """A line per row, checkpoint and figure."""
    lines: list[list[Any]] = []
    for group in results.groups:
        for row in group.rows:
            for checkpoint in CHECKPOINTS:
                found = list(of_seeds(row, checkpoint, group.bases.get(checkpoint)).values())
                for name in dict.fromkeys(name for seed in found for name in seed):
                    s = statistics.summary([seed[name] for seed in found if name in seed])
                    lines.append([*place(group, row), checkpoint, name, f"{s.mean:.6g}", f"{s.deviation:.6g}", s.count])
    return [*PLACE, "checkpoint", "figure", "mean", "deviation", "seeds"], lines


def each_run(results: Results) -> Iterator[tuple[Group, Row, Result]]:
    for group in results.groups:
        for row in group.rows:
            for result in row.results.values():
                yield group, row, result
