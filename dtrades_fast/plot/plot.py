"""Draw runs from their folders, as PNG and PDF."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from matplotlib.figure import Figure

from dtrades_fast import environment
from dtrades_fast.config import option
from dtrades_fast.evaluation.evaluate import RunOptions, find_run, load_run, parse
from dtrades_fast.plot import evaluations, figures
from dtrades_fast.plot.samples import Samples, measure
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Options", "main", "plot"]

DPI = 160
#: No time of creation, so that the same run gives the same file.
METADATA: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}


@dataclass
class Options(RunOptions):
    """Pictures of runs, as PNG and PDF: training curves; lambda, entropy and sensitivity; adversarial images; and, of
    what evaluate has stored, accuracy against radius and queries, and transfer between networks.

    All but the curves need the weights and the data set, of which they show validation images. What cannot be drawn is
    left out with the reason, and the exit status is then 1.
    """

    out: Annotated[
        str | None, option("STR", "Folder of the pictures.", "RUN/plots; of several runs RUNS_DIR/plots")
    ] = None
    epoch: Literal["best", "last"] = "best"
    """Weights of the best epoch (by validation) or of the last one; the curves always show all epochs."""
    images: int = 6
    """Images in the gallery."""


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``plot``."""
    return 1 if plot(parse(Options, argv, prog)) else 0


def plot(options: Options) -> list[str]:
    """Draw all that can be drawn, and say where it is.

    Returns:
        What was left out although it was asked for, with the reason.

    Raises:
        ValueError: an option that is not possible.
        FileNotFoundError: no such run, or none of its epochs is finished.
    """
    for name, value in (("--images", options.images), ("--limit", options.limit), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = environment.device(options.device)
    runs = named([find_run(name, options.runs_dir) for name in options.runs])
    lines = {name: run.read_metrics() for name, run in runs.items()}
    if young := [name for name, run_lines in lines.items() if not run_lines]:
        raise FileNotFoundError(f"run {young[0]} has not finished its first epoch, so there is nothing to draw")
    out = output_folder(options, list(runs.values()))
    out.mkdir(parents=True, exist_ok=True)
    save(figures.curves(lines), out / "curves")
    samples, left_out = {}, []
    for name, run in runs.items():
        try:
            samples[name] = look_at(run, lines[name], device, options)
        except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
            left_out.append(f"left out all but the curves of {name}: {error}")
    for file, figure in (*pictures(samples, options.images), *evaluations.pictures(runs)):
        save(figure, out / file)
    for problem in left_out:
        print(problem, file=sys.stderr)
    return left_out


def named(folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Each run once, by the end of its path that tells it from the others."""
    paths = {folder.path.resolve(): folder for folder in folders}
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = {"/".join(path.parts[-length:]): folder for path, folder in paths.items()}
        if len(names) == len(paths):
            break
    return names


def output_folder(options: Options, runs: Sequence[RunFolder]) -> Path:
    if options.out is not None:
        return Path(options.out).expanduser()
    return runs[0].plots if len(runs) == 1 else Path(options.runs_dir).expanduser() / "plots"


def look_at(run: RunFolder, lines: Sequence[dict[str, Any]], device: str, options: Options) -> Samples:
    """Attack the validation images with the weights that were asked for."""
    best = max(lines, key=lambda line: (line["validation"]["ra"], line["validation"]["na"]))  # the first of equals
    trained = load_run(run, options.epoch, options.data_root, device, options.limit)
    return measure(trained, best if options.epoch == "best" else lines[-1], options.batch_size)


def pictures(runs: Mapping[str, Samples], images: int) -> Iterator[tuple[str, Figure]]:
    """The pictures of trained networks, by file name."""
    weighted = {name: samples for name, samples in runs.items() if samples.weighting}
    for name, samples in runs.items():
        if name not in weighted:
            print(f"no histogram of lambda for {name}: after epoch {samples.epoch} its lambda, if any, is a constant")
    if weighted:
        yield "lambda", figures.lambda_histogram(weighted)
    if runs:
        yield "entropy-sensitivity", figures.entropy_sensitivity(runs)
    for name, samples in runs.items():
        file = "gallery" if len(runs) == 1 else f"gallery-{name.replace('/', '-')}"
        yield file, figures.gallery(name, samples, images)


def save(figure: Figure, path: Path) -> None:
    """Write ``path`` as .png and .pdf."""
    for kind, metadata in METADATA.items():
        file = path.with_name(f"{path.name}.{kind}")
        checkpoint.write(file, _writer(figure, kind, metadata))
    print(f"{path}.png, .pdf")


def _writer(figure: Figure, kind: str, metadata: dict[str, Any]) -> Callable[[Any], None]:
    return lambda file: figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
