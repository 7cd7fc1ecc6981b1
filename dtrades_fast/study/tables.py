"""The tables of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dtrades_fast.config import read_yaml
from dtrades_fast.study import statistics
from dtrades_fast.study.blocks import Table, slug
from dtrades_fast.study.comparisons import (
    DECIMALS,
    HEADLINES,
    differences,
    heading,
    of_seeds,
)
from dtrades_fast.study.fronts import front_by_seed, fronts, points
from dtrades_fast.study.results import (
    CHECKPOINTS,
    MARK,
    MARK_EXPLAINED,
    Basis,
    Checkpoint,
    Group,
    Result,
    Results,
    Row,
    class_accuracies,
    doubts,
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


def mark_explained(lines: Sequence[Sequence[str]]) -> str:
    """For a caption, where a row has the mark."""
    return f" {MARK_EXPLAINED}" if any(MARK in line[0] for line in lines) else ""


def accuracies(group: Group, part: str, checkpoint: Checkpoint, basis: Basis, number: int = 0) -> Table | None:
    """Mean and deviation over seeds; None if no run of the part was evaluated so.

    Args:
        group: of rows.
        part: of the group.
        checkpoint: whose weights.
        basis: the conditions of evaluation.
        number: of the conditions; 0 are the usual ones, of which norms and the best epoch's advantage are shown, too.
    """
    found = {row: of_seeds(row, checkpoint, basis) for row in group.part(part)}
    if number:
        found = {row: {s: f for s, f in seeds.items() if "NA" in f} for row, seeds in found.items()}
    found = {row: seeds for row, seeds in found.items() if any("NA" in seed for seed in seeds.values())}
    names = [name for seeds in found.values() for seed in seeds.values() for name in seed]
    if not found:
        return None
    attacked = [f"RA {name}" for name in basis.attacks]
    attacked = attacked or [n for n in dict.fromkeys(names) if n.startswith("RA ") and n != "RA worst"]
    order = ["NA", *attacked, "RA worst", "RD", "ASR all", "ASR correct", "worst class"]
    order = [name for name in (*order, "APN Linf", "APN L2") if name in names]
    lines, overfit = [], checkpoint == "last" and number == 0
    for row, seeds in found.items():
        values = {name: [seed[name] for seed in seeds.values() if name in seed] for name in order}
        cells = [mean_and_deviation(values[name], DECIMALS.get(name, 1), len(seeds)) for name in order]
        extra = [mean_and_deviation(overfitting(group, row))] if overfit else []
        each = ", ".join(f"{value:.1f}" for value in values.get("RA worst", [])) or NOTHING
        lines.append([row.marked(checkpoint), *cells, *extra, each, str(len(seeds))])
    header = ["method", *map(heading, order), *(["best − last RA"] if overfit else []), "RA worst by seed", "seeds"]
    used = [i for i, _ in enumerate(header) if any(line[i] != NOTHING for line in lines)]
    caption = (
        f"{group.name}, {part}, {checkpoint} epoch, {basis.words}: mean ± standard deviation over seeds, in % (APN in "
        "pixel units)."
    )
    if basis.attacks:
        caption += f" RA worst: points that stand under each of {', '.join(basis.attacks)}, which all runs were"
        caption += " attacked by; an upper bound, which more attacks would lower."
    name = slug(f"{group.protocol}-{group.name}-{part}-{checkpoint}{f'-{number + 1}' if number else ''}")
    shown = [[line[i] for i in used] for line in lines]
    return Table(name, caption + mark_explained(lines), [header[i] for i in used], shown)


def other_attacks(group: Group, checkpoint: Checkpoint, basis: Basis) -> Table | None:
    """Attacks that only some runs were attacked by, beside RA worst of the same runs; None without any."""
    lines = []
    for row in group.rows:
        seeds = of_seeds(row, checkpoint, basis).values()
        names = dict.fromkeys(name for seed in seeds for name in seed if name.startswith("RA "))
        for name in (n for n in names if n != "RA worst" and n.removeprefix("RA ") not in basis.attacks):
            both = [(seed[name], seed["RA worst"]) for seed in seeds if name in seed and "RA worst" in seed]
            if both:
                figures_of = [mean_and_deviation(values) for values in zip(*both, strict=True)]
                lines.append([row.marked(checkpoint), name.removeprefix("RA "), *figures_of, str(len(both))])
    if not lines:
        return None
    caption = (
        f"{group.name}, {checkpoint} epoch, {basis.words}: attacks that only some runs were attacked by, and RA worst "
        f"({', '.join(basis.attacks)}) of the same runs, in %."
    )
    header = ["method", "attack", "RA", "RA worst of the same runs", "runs"]
    name = slug(f"{group.protocol}-{group.name}-other-attacks-{checkpoint}")
    return Table(name, caption + mark_explained(lines), header, lines)


def transfers(group: Group, checkpoint: Checkpoint) -> Table | None:
    """Robust accuracy under images made on other networks; None without any."""
    lines = []
    for row in group.rows:
        for seed, result in row.results.items():
            for record in result.records:
                for attack, entry in record["transfer"].items() if record["checkpoint"] == checkpoint else ():
                    for i, source in enumerate(entry["sources"]):
                        relation, ra = entry["relations"][i][0], entry["ra"][i][0]
                        lines.append([row.name, str(seed), source, relation, attack, f"{100 * ra:.1f}"])
    if not lines:
        return None
    caption = f"{group.name}, {checkpoint} epoch: RA under images made on other networks, in %."
    header = ["method", "seed", "made on", "the attacker has", "attack", "RA"]
    return Table(slug(f"{group.protocol}-{group.name}-transfer-{checkpoint}"), caption, header, lines)


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
        "Calibration fixes the mean of λ(x) where it ends; as entropy and sensitivity change, so does λ(x). The mean "
        "over training includes the warm-up, in which all images have the same weight. Runs are alike in weight by "
        "these columns, not by their names."
    )
    header = ["method", "part", "mean over training", "mean in the last epoch", "seeds"]
    return Table(slug(f"{group.protocol}-{group.name}-weights"), caption, header, lines)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparison(
    group: Group, compare: str, checkpoint: Checkpoint, *, headlines: bool = True, number: int = 0
) -> Table | None:
    """The differences as a table; None if there are none.

    Args:
        group: of rows.
        compare: the method that is compared with the others.
        checkpoint: whose weights.
        headlines: of what matters most, with the winners where the group decides; else of all other figures.
        number: of the conditions of evaluation; 0 are the usual ones, only they name winners.
    """
    found = [d for d in differences(group, compare, checkpoint, number) if (d.name in HEADLINES) == headlines]
    if not found:
        return None
    decides = headlines and group.protocol == "common" and number == 0
    basis = group.basis(checkpoint, number)
    lines = []
    for each in found:
        decimals = DECIMALS.get(each.name, 1)
        lines.append(
            [
                f"{each.ours.marked(checkpoint)} − {each.theirs.marked(checkpoint)}",
                heading(each.name),
                f"{each.over_seeds.mean:+.{decimals}f}",
                interval(each.over_seeds, decimals),
                NOTHING if each.over_points is None else interval(each.over_points, decimals),
                *([each.winner] if decides else []),
                str(each.over_seeds.count),
                statistics.seeds_needed(each.over_seeds, each.over_points) or NOTHING,
            ]
        )
    header = ["pair", "of", "difference", "95 % over seeds", "95 % over images"]
    header += [*(["higher"] if decides else []), "seeds", "seeds for 80 % power"]
    several = sum(each.over_seeds.count > 1 for each in found)
    at_zero = any(each.name == "worst class" and each.over_points is None for each in found)
    caption = (
        f"{group.name}, {checkpoint} epoch{f', {basis.words}' if basis else ''}: paired differences on the same "
        "seeds. Over seeds: Student's t, for other trainings; over images: bootstrap, for other test images of these "
        "networks. The seeds needed are an order of magnitude, if difference and deviation are as seen; more images "
        "are needed, too, where the interval over images contains zero."
    )
    if several:
        caption += (
            f" The intervals are not corrected for their number: of {several} over seeds, about {several / 20:.0f}"
        )
        caption += " would exclude zero by chance if nothing differed."
    if at_zero:
        caption += " A worst class in which nothing stands has no interval over images."
    if decides:
        caption += " What is higher is named only where both intervals exclude zero."
    elif number and basis is not None:
        caption += f" RA worst is that under {', '.join(basis.attacks)} here: no winner is named by it."
    elif headlines:
        caption += f" The {group.protocol} conditions differ between methods: they name no winner."
    rest = ("" if headlines else "-of-the-rest") + (f"-{number + 1}" if number else "")
    name = slug(f"{group.protocol}-{group.name}-comparison-{checkpoint}{rest}")
    return Table(name, caption + mark_explained(lines), header, lines)


def interval(found: statistics.Interval, decimals: int = 1) -> str:
    if np.isinf(found.low):
        return "one seed"
    if isinstance(found, statistics.Paired) and found.deviation == 0:
        return "the same on each seed"
    return f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}"


# ---- trade-offs ------------------------------------------------------------------------------------------------------


def trade_offs(group: Group, checkpoint: Checkpoint) -> Table | None:
    """Harmonic means; areas under the fronts of methods with several settings."""
    basis, lines = group.bases.get(checkpoint), []
    by_method = fronts(group, checkpoint)
    every = {row: points(row, checkpoint, basis) for rows in by_method.values() for row in rows}
    for rows in by_method.values():
        by_seed = front_by_seed(rows, checkpoint, basis)
        areas = [100 * statistics.area_under_front(front) for front in by_seed.values()] if len(rows) > 1 else []
        for row in rows:
            found = every[row].values()
            harmonics = [statistics.harmonic(na, ra) for na, ra in found]
            lines.append(
                [
                    row.marked(checkpoint),
                    mean_and_deviation([na for na, _ in found]),
                    mean_and_deviation([ra for _, ra in found]),
                    mean_and_deviation(harmonics),
                    f"{sum(on_front(row, seed, every) for seed in every[row])} of {len(found)}",
                    mean_and_deviation(areas) if row is rows[0] else NOTHING,
                ]
            )
    if not lines:
        return None
    header = ["method", "NA", "RA worst", "harmonic mean", "on the front, seeds", "area under the method's front"]
    caption = (
        f"{group.name}, {checkpoint} epoch: trade-off, in %. A run is on the front of its seed if no other run is "
        "higher in one accuracy and at least as high in the other; the area, of methods with several settings and "
        "given once, is the share of all pairs of accuracies that one of its settings exceeds: it takes the best "
        "setting of each seed, which favours methods that scatter."
    )
    name = slug(f"{group.protocol}-{group.name}-trade-off-{checkpoint}")
    return Table(name, caption + mark_explained(lines), header, lines)


def on_front(row: Row, seed: int, every: Mapping[Row, Mapping[int, tuple[float, float]]]) -> bool:
    """Whether no other run of the seed exceeds it."""
    here = [row, *(other for other in every if other is not row and seed in every[other])]
    return 0 in statistics.pareto([every[other][seed] for other in here])


# ---- masking, times, configuration -----------------------------------------------------------------------------------


def masked_gradients(group: Group) -> Table:
    """How often gradients looked masked in training, and the verdicts of evaluations."""
    lines = []
    for row in group.rows:
        counted = [masking(result) for result in row.results.values()]
        runs = sum(masked > 0 for masked, _ in counted)
        verdicts = [
            f"seed {seed}, {checkpoint}, {doubt}"
            for seed, result in row.results.items()
            for checkpoint in CHECKPOINTS
            for doubt in doubts(result, checkpoint)
        ]
        judged = sum(len(result.attacked(c)) for result in row.results.values() for c in CHECKPOINTS)
        batch = {str(line.cell.options.get("batch_size", "")) or NOTHING for line in row.results.values()}
        gaps = [gap for c in CHECKPOINTS for f in of_seeds(row, c, group.bases.get(c)).values() for gap in flattery(f)]
        lines.append(
            [
                row.name,
                row.part,
                "/".join(sorted(batch)),
                f"{runs} of {len(counted)}",
                f"{100 * sum(m for m, _ in counted) / sum(n for _, n in counted):.1f}",
                f"{max(gaps):.1f}" if gaps else NOTHING,
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
        "PGD − RA worst, largest",
        "healthy evaluations",
        "others",
    ]
    caption = (
        f"{group.name}: gradient masking in training, as the monitor saw it, and the verdicts of the evaluations. "
        "Healthy means that no rule fired, not that few steps tell the truth: by how many points PGD alone was above "
        "all attacks together, in the worst run and epoch, stands beside it. A verdict is of those points that "
        "evaluate looks at (64 of the test images unless told otherwise); searches for the smallest perturbation are "
        "not counted."
    )
    return Table(slug(f"{group.protocol}-{group.name}-masking"), caption, header, lines)


def flattery(found: Mapping[str, float]) -> list[float]:
    """By how many points each PGD was above the worst case."""
    return [value - found["RA worst"] for name, value in found.items() if name.startswith("RA pgd")]


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
    counted: Counter[tuple[str, ...]] = Counter()
    for result in results.all:
        evaluated = dict.fromkeys(short(record.get("commit")) for record in result.records)
        where = (noted(result.environment, name) for name in ("platform", "device", "backend", "threads", "versions"))
        place = (noted(result.environment, "commit"), ", ".join(evaluated), *where)
        counted[place] += 1
    rows = [[*place[:2], str(count), *place[2:]] for place, count in counted.items()]
    header = ["trained at", "evaluated at", "cells", "platform", "device", "operators", "threads", "versions"]
    return Table("environment", "Where the cells ran.", header, rows)


def noted(environment: Mapping[str, Any], name: str) -> str:
    """What a run's environment says, one after the other where it went on in another one."""
    parts = [environment, *(part for part in environment.get("resumed", []) if name in part)]
    return ", then ".join(dict.fromkeys(in_words(name, part[name]) for part in parts))


def in_words(name: str, value: Any) -> str:
    if name == "versions":
        return ", ".join(f"{package} {version}" for package, version in value.items())
    return short(value) if name == "commit" else str(value)


def short(commit: str | None) -> str:
    """A commit in a few digits, with what says that there were local changes."""
    digits, dash, dirty = str(commit).partition("-")
    return digits[:10] + dash + dirty


def by_class(group: Group, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Row -> class -> mean RA over seeds; the rows of ``main``; none without an attack in common."""
    basis, found = group.bases.get(checkpoint), {}
    if basis is None or not basis.attacks:
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
