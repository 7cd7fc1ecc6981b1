"""``dtrades-fast report``: what a study has to say, as Markdown, CSV, LaTeX and one HTML page."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import tyro
from rich.console import Console

from dtrades_fast import environment
from dtrades_fast.config import option
from dtrades_fast.evaluation.evaluate import load_run
from dtrades_fast.plot import figures as pictures_of_runs
from dtrades_fast.plot.samples import measure
from dtrades_fast.study import comparisons, figures, fronts, tables
from dtrades_fast.study.blocks import (
    Block,
    Details,
    Heading,
    Picture,
    Table,
    Text,
    csv_text,
    html,
    latex,
    markdown,
    png,
    slug,
)
from dtrades_fast.study.grid import read
from dtrades_fast.study.results import CHECKPOINTS, MARK, MARK_EXPLAINED, Checkpoint, Group, Results, load
from dtrades_fast.study.study import Where
from dtrades_fast.training.checkpoint import write, write_text

__all__ = ["Options", "blocks", "main"]

GALLERY_IMAGES = 6
PROTOCOLS = {"common": "Common conditions", "published": "Published conditions"}


@dataclass
class Options(Where):
    """Tables, statistics and pictures of a study, of as many of its cells as are finished."""

    output: Annotated[Path | None, option("DIR", "Folder of the report.", "RUNS_DIR/report")] = None
    compare_at: Literal["last", "best"] = "last"
    """Epoch whose networks are compared; the accuracies of both are shown."""
    gallery: bool = True
    """Show adversarial images, which needs weights and data sets."""
    data_root: Annotated[str | None, option("DIR", "Folder of the data sets.", "the run's")] = None


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``report``."""
    options = tyro.cli(Options, args=list(argv), prog=prog)
    study = read(options.study)
    results = load(study, options.runs)
    if not results.groups:
        raise FileNotFoundError(
            f"no cell of {options.study} is finished in {options.runs}: run it with dtrades-fast study {options.study}"
        )
    content = list(blocks(results, options))
    output = options.output or options.runs / "report"
    write_files(output, f"Study {study.name}", content, results)
    console = Console()
    for group in results.groups:
        for line in comparisons.in_words(group, study.compare, options.compare_at):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    for name in ("index.html", "results.md", "results.csv", "summary.csv", "tables/*.tex", "figures/*.png"):
        console.print(str(output / name), soft_wrap=True, highlight=False, markup=False)
    return 0


def write_files(output: Path, title: str, content: Sequence[Block], results: Results) -> None:
    """All files, each old or new but never half written."""
    for folder in ("tables", "figures"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for table in all_tables(content):
        write_text(output / "tables" / f"{table.name}.tex", latex(table))
    for picture in all_pictures(content):
        write(output / "figures" / f"{picture.name}.png", functools.partial(write_png, picture))
    write_text(output / "results.csv", csv_text(*tables.per_run(results)))
    write_text(output / "summary.csv", csv_text(*tables.aggregated(results)))
    write_text(output / "results.md", markdown(title, content))
    write_text(output / "index.html", html(title, content))


def write_png(picture: Picture, file: BinaryIO) -> None:
    file.write(png(picture.figure))


def every(content: Sequence[Block]) -> Iterator[Block]:
    for block in content:
        yield block
        if isinstance(block, Details):
            yield from every(block.blocks)


def all_tables(content: Sequence[Block]) -> Iterator[Table]:
    return (block for block in every(content) if isinstance(block, Table))


def all_pictures(content: Sequence[Block]) -> Iterator[Picture]:
    return (block for block in every(content) if isinstance(block, Picture))


# ---- what is said ----------------------------------------------------------------------------------------------------


def blocks(results: Results, options: Options) -> Iterator[Block]:
    """The report, from top to bottom."""
    yield Text.of(results.study.description)
    yield from progress(results)
    compare, at = results.study.compare, options.compare_at
    chapters: dict[str, Callable[[Group], Iterable[Block]]] = {
        "Accuracy and robustness": accuracy,
        "Comparisons": lambda group: comparison(group, compare, at),
        "Trade-off": lambda group: trade_offs(group, compare, at),
        "Training": training,
        "Classes, radii, images": lambda group: closer(group, at, options),
        "Gradient masking": lambda group: [tables.masked_gradients(group)],
    }
    for protocol in dict.fromkeys(group.protocol for group in results.groups):
        groups = [group for group in results.groups if group.protocol == protocol]
        title = PROTOCOLS.get(protocol, protocol)
        several = len({group.protocol for group in results.groups}) > 1
        prefix = f"{title}: " if several else ""
        for heading, part in chapters.items():
            yield Heading(prefix + heading)
            for group in groups:
                yield from part(group)
    yield Heading("Time")
    yield Text.of(f"All finished cells together took {tables.total_time(results)}.")
    for group in results.groups:
        yield tables.times(group)
    yield Heading("Configuration and environment")
    yield tables.environments(results)
    yield Details("Options of training", list(tables.configuration(results)))


def progress(results: Results) -> Iterator[Block]:
    """How much of the study there is."""
    states = results.states
    counts = {status: [n for n, state in states.items() if state.status == status] for status in ("done", "failed")}
    ended = max((when for result in results.all if (when := result.ended)), default=None)
    day = f", the last one on {ended}" if ended else ""
    if len(counts["done"]) == len(states):
        yield Text.of(f"All {len(states)} cells are finished{day}.")
    else:
        missing = len(states) - len(counts["done"]) - len(counts["failed"])
        yield Text.of(
            f"Not finished: {len(counts['done'])} of {len(states)} cells are{day}; {len(counts['failed'])} failed, "
            f"{missing} are missing. All figures are of what there is.",
            strong=True,
        )
    if others := results.other_data:
        yield Text.of(f"These cells are of other data than the rest of their group: {', '.join(others)}.", strong=True)
    if counts["failed"]:
        yield Text(tuple(f"{name}: {states[name].stage}" for name in counts["failed"]))


def accuracy(group: Group) -> Iterator[Block]:
    yield Heading(group.name, 3)
    for part in group.parts:
        if part != "main":
            yield Heading(f"{group.name}: {part}", 4)
        for checkpoint, basis in group.bases.items():
            if (table := tables.accuracies(group, part, checkpoint, basis)) is not None:
                yield table
    for checkpoint, basis in group.bases.items():
        if (table := tables.other_attacks(group, checkpoint, basis)) is not None:
            yield table
        for number, other in enumerate(group.other_bases(checkpoint), 1):
            found = (tables.accuracies(group, part, checkpoint, other, number) for part in group.parts)
            yield from (table for table in found if table is not None)
    for checkpoint in CHECKPOINTS:
        if (table := tables.transfers(group, checkpoint)) is not None:
            yield table


def comparison(group: Group, compare: str, at: Checkpoint) -> Iterator[Block]:
    if (table := tables.comparison(group, compare, at)) is None:
        yield Text.of(f"{group.name}: nothing to compare yet.")
        return
    yield table
    if lines := comparisons.in_words(group, compare, at):
        yield Details(f"The same in words: {group.name}", [said(lines)])
    if (rest := tables.comparison(group, compare, at, headlines=False)) is not None:
        yield Details(f"Paired differences of all other figures: {group.name}", [rest])
    for number, basis in enumerate(group.other_bases(at), 1):
        if (table := tables.comparison(group, compare, at, number=number)) is not None:
            yield Details(f"The same on {basis.words}: {group.name}", [table])
    other = other_than(at)
    if (table := tables.comparison(group, compare, other)) is not None:
        yield Details(f"The same of the {other} epoch: {group.name}", [table])


def said(lines: Sequence[str]) -> Text:
    """Sentences, with what a mark in them means."""
    explained = [MARK_EXPLAINED] if any(MARK in line for line in lines) else []
    return Text((*lines, *explained))


def other_than(checkpoint: Checkpoint) -> Checkpoint:
    return "best" if checkpoint == "last" else "last"


def trade_offs(group: Group, compare: str, at: Checkpoint) -> Iterator[Block]:
    shown = list(trade_off(group, compare, at))
    yield from shown or [Text.of(f"{group.name}: nothing was evaluated yet.")]
    if rest := list(trade_off(group, compare, other_than(at))):
        yield Details(f"Trade-off of the {other_than(at)} epoch: {group.name}", rest)


def trade_off(group: Group, compare: str, at: Checkpoint) -> Iterator[Block]:
    """Nothing if no network was evaluated there."""
    if (table := tables.trade_offs(group, at)) is None:
        return
    yield Picture(
        slug(f"{group.protocol}-{group.name}-trade-off-{at}"),
        figures.trade_off(group, at),
        f"{group.name}, {at} epoch: means over seeds with their standard deviations. Numbers beside points are the "
        "settings; the grey line is the Pareto front of the means.",
        "Clean against robust accuracy: "
        + "; ".join(f"{name} {na:.1f} and {ra:.1f} %" for name, (na, ra) in fronts.mean_points(group, at).items()),
    )
    yield table
    if lines := fronts.front_comparison(group, compare, at):
        yield said(lines)


def training(group: Group) -> Iterator[Block]:
    yield Picture(
        slug(f"{group.protocol}-{group.name}-training"),
        figures.training(group),
        f"{group.name}: means over seeds, bands from the lowest to the highest. RA is that of the validation's PGD.",
        f"Training curves of {', '.join(row.name for row in group.part('main'))}",
    )
    if (table := tables.weights(group)) is not None:
        yield table
    if rows := figures.with_lambda(group):
        yield Picture(
            slug(f"{group.protocol}-{group.name}-lambda"),
            figures.weights(rows),
            f"{group.name}: distribution of the weight λ(x) over the training images by epoch, all seeds. Its last "
            "column is the final histogram.",
            "Drift of lambda: " + "; ".join(drift(row) for row in rows),
        )


def drift(row: tables.Row) -> str:
    mean = figures.by_epoch(row, ("train", "lambda", "mean")).mean(0)
    return f"{row.name} from {mean[0]:.2f} in the first epoch to {mean[-1]:.2f} in the last"


def closer(group: Group, at: Checkpoint, options: Options) -> Iterator[Block]:
    if found := tables.by_class(group, at):
        worst = {name: min(values, key=lambda label: values[label]) for name, values in found.items()}
        yield Picture(
            slug(f"{group.protocol}-{group.name}-classes"),
            figures.classes(group, at),
            f"{group.name}, {at} epoch: RA under all attacks by class in %, mean over seeds.",
            "Worst classes: "
            + "; ".join(f"{name}: {label}, {found[name][label]:.0f} %" for name, label in worst.items()),
        )
    if (figure := figures.against_epsilon(group, at)) is not None:
        yield Picture(
            slug(f"{group.protocol}-{group.name}-epsilon"),
            figure,
            f"{group.name}, {at} epoch: robust accuracy by radius, from the smallest perturbation found of each point, "
            "all seeds together: an upper bound. The dotted line is the radius of training, at which stronger attacks "
            "than the search's were made: hence the step.",
            f"Robust accuracy against epsilon of {', '.join(row.name for row in group.part('main'))}",
        )
    if options.gallery:
        yield from gallery(group, at, options)


def gallery(group: Group, at: Checkpoint, options: Options) -> Iterator[Block]:
    """Adversarial images of the first seed of each row of ``main``, folded away; or why there are none."""
    shown: list[Block] = []
    missing = []
    for row in group.part("main"):
        result = next(iter(row.results.values()))
        try:
            run = load_run(result.folder, at, options.data_root, environment.device("cpu"), GALLERY_IMAGES)
            best = max(result.lines, key=lambda line: (line["validation"]["ra"], line["validation"]["na"]))
            samples = measure(run, best if at == "best" else result.lines[-1], GALLERY_IMAGES)
        except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
            missing.append(f"no adversarial images of {row.name}: {error}")
            continue
        name = slug(f"{group.protocol}-{group.name}-gallery-{row.name}")
        fooled = int((samples.correct & ~samples.robust).sum())
        caption = f"{group.name}: {row.name}, seed {result.cell.seed}, {at} epoch, validation images."
        alt = f"Clean images, perturbations and adversarial images; {fooled} of {len(samples.labels)} fool {row.name}"
        shown.append(Picture(name, pictures_of_runs.gallery(row.name, samples, GALLERY_IMAGES), caption, alt))
    if shown:
        yield Details(f"Adversarial images: {group.name}", shown)
    if missing:
        yield Details(f"Adversarial images that are missing: {group.name}", [Text(tuple(missing))])
