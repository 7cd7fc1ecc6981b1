"""Evaluate runs from their folders: accuracy clean and under attack, ``eval.json`` and a table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import dtrades_fast
from dtrades_fast import config as configuration
from dtrades_fast import data, environment, rng
from dtrades_fast.attacks import FGSM, PGD
from dtrades_fast.config import Config, option
from dtrades_fast.evaluation import metrics
from dtrades_fast.pixels import pixels
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import create_model

__all__ = [
    "Options",
    "RunOptions",
    "TrainedRun",
    "evaluate",
    "find_run",
    "load_run",
    "main",
    "make_attack",
    "parse",
]

FILE_WIDTH = 132  #: characters of the tables where the output is not a terminal


@dataclass
class RunOptions:
    """Which runs to look at, and how: the options that commands on trained runs share."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, or names of runs in --runs-dir."""
    limit: Annotated[int | None, option("INT", "Images to look at, the same share of each class.", "all")] = None
    batch_size: int = 256
    """Images at a time; it does not change the result."""
    runs_dir: str = "runs"
    """Folder in which names of runs are looked for."""
    data_root: Annotated[str | None, option("STR", "Folder of the data sets.", "the run's")] = None
    device: str = "auto"
    """Device: auto (cuda if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int | None, option("INT", "CPU threads.", "the physical cores")] = None


@dataclass
class Options(RunOptions):
    """Accuracy of runs, clean and under attack: writes RUN/eval.json and prints one table over all of them."""

    attacks: str = "fgsm,pgd20"
    """Attacks, separated by commas: fgsm, pgdK (K steps), pgdK-rR (R restarts), pgdK-l2, pgdK-rR-l2."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights of the best epoch (by validation) or of the last one."""
    split: Literal["test", "validation"] = "test"
    """Images to evaluate on."""
    epsilon: Annotated[str | None, option("STR", "Radius in pixel units, e.g. 8/255.", "the run's")] = None
    step_size: Annotated[str | None, option("STR", "Size of a PGD step in pixel units.", "epsilon / 4")] = None
    seed: int = 0
    """Seed of the attacks' random starts."""


Asked = TypeVar("Asked", bound=RunOptions)


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``evaluate``."""
    options = parse(Options, argv, prog)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    folders = [find_run(name, options.runs_dir) for name in options.runs]
    records = [evaluate(folder, options) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        write(folder.path / "eval.json", record)
    console.print(table(records))
    if len(records) == 1:
        console.print(class_table(records[0]))
    return 0


def parse(kind: type[Asked], argv: Sequence[str], prog: str) -> Asked:
    """The options of a command on trained runs, with torch set to their number of threads.

    Raises:
        ValueError: no run is named.
        SystemExit: with status 2 for an unknown flag or a value of the wrong type, 0 for ``--help``.
    """
    options = tyro.cli(kind, args=list(argv), prog=prog)
    if not options.runs:
        raise ValueError(f"{prog} needs at least one run: its folder, or its name in --runs-dir")
    torch.set_num_threads(options.threads or environment.physical_cores())
    return options


def find_run(name: str, runs_dir: str) -> RunFolder:
    """The folder of a run that was given by path or by name.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in (Path(name).expanduser(), Path(runs_dir).expanduser() / name):
        folder = RunFolder(path)
        if folder.config.is_file():
            return folder
    known = sorted(path.parent.name for path in Path(runs_dir).expanduser().glob("*/config.yaml"))
    raise FileNotFoundError(
        f"{name} is no run folder (no config.yaml there or in {Path(runs_dir) / name}); "
        f"runs in {runs_dir}: {', '.join(known) or 'none'}"
    )


@dataclass(frozen=True)
class TrainedRun:
    """A run's network, in eval mode with the weights of one epoch, and its data."""

    config: Config
    model: nn.Module
    sets: data.DataSets
    weights_file: Path


def load_run(
    folder: RunFolder, epoch: Literal["best", "last"], data_root: str | None, device: str, limit: int | None
) -> TrainedRun:
    """The network of a run and its data.

    Args:
        folder: of the run.
        epoch: whose weights: the best one's by validation, or the last one's.
        data_root: folder of the data sets; the run's if None.
        device: where both are put.
        limit: images of each split to keep; None for all.

    Raises:
        FileNotFoundError: the weights or the data set are missing.
        RuntimeError: the weights are damaged.
    """
    config = configuration.load(folder.config)
    weights_file = folder.best_weights if epoch == "best" else folder.weights
    weights = checkpoint.load_weights(weights_file)
    sets = data.load(config.data.dataset, data_root or config.data.data_root, device, limit=limit)
    model = create_model(config, sets.info).to(device)
    model.load_state_dict(weights)
    return TrainedRun(config, model.eval(), sets, weights_file)


def make_attack(name: str, epsilon: float, step_size: float | None = None) -> PGD:
    """The attack of that name: ``fgsm``, ``pgdK`` (K steps), ``pgdK-rR`` (R restarts), ``pgdK-l2``, ``pgdK-rR-l2``.

    Args:
        epsilon: radius in pixel units.
        step_size: of PGD, in pixel units; ``epsilon / 4`` if not given.

    Raises:
        ValueError: there is no such attack.
    """
    if name == "fgsm":
        return FGSM(epsilon)
    found = re.fullmatch(r"pgd([1-9]\d*)(?:-r([1-9]\d*))?(-l2)?", name)
    if found is None:
        raise ValueError(
            f"unknown attack {name!r}; known are fgsm, pgdK (K steps, e.g. pgd20), "
            "pgdK-rR (R restarts, e.g. pgd20-r5), pgdK-l2 and pgdK-rR-l2"
        )
    steps, restarts, l2 = found.groups()
    return PGD(epsilon, int(steps), step_size, norm="l2" if l2 else "linf", restarts=int(restarts or 1))


def evaluate(folder: RunFolder, options: Options) -> dict[str, Any]:
    """One run under all attacks: the record that ``eval.json`` keeps.

    Raises:
        ValueError: an option that is not possible.
        FileNotFoundError: the weights or the data set are missing.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    config = configuration.load(folder.config)
    epsilon = options.epsilon or config.stored()["epsilon"]
    step_size = None if options.step_size is None else pixels(options.step_size, "--step-size")
    names = [name for name in options.attacks.split(",") if name]
    attacks = {name: make_attack(name, pixels(epsilon, "--epsilon"), step_size) for name in names}
    run = load_run(folder, options.checkpoint, options.data_root, environment.device(options.device), options.limit)
    model, images, classes = run.model, getattr(run.sets, options.split), run.sets.info.classes

    labels = images.labels.cpu()
    natural = metrics.correct(model, images, None, 0, options.batch_size)
    key = rng.key(options.seed, "evaluation")
    results = {}
    for name, attack in attacks.items():
        robust = metrics.correct(model, images, attack, key, options.batch_size)
        results[name] = {
            "settings": dataclasses.asdict(attack),
            **dataclasses.asdict(metrics.robustness(natural, robust, labels, classes)),
            "correct": flag_string(robust),
        }
    return {
        "run": folder.path.name,
        "method": config.defense.method,
        "arch": config.model.arch,
        "dataset": config.data.dataset,
        "checkpoint": options.checkpoint,
        "weights_sha256": hashlib.sha256(run.weights_file.read_bytes()).hexdigest(),
        "split": options.split,
        "points": len(images),
        "epsilon": epsilon,
        "seed": options.seed,
        "na": metrics.accuracy(natural),
        "per_class": metrics.per_class(natural, labels, classes),
        "correct": flag_string(natural),
        "ids": images.ids.tolist(),
        "attacks": results,
        "version": dtrades_fast.__version__,
        "commit": environment.git_commit(),
    }


def flag_string(flags: torch.Tensor) -> str:
    """One character per sample, 1 for correct."""
    return "".join("1" if flag else "0" for flag in flags.tolist())


def write(path: Path, record: dict[str, Any]) -> None:
    """Add a record to ``eval.json``.

    Records of the same checkpoint but other weights are out of date and go. A record of the same points and epsilon
    is merged with the new one, attack by attack.
    """
    place = ("checkpoint", "split", "points", "epsilon", "seed")
    earlier = json.loads(path.read_text())["evaluations"] if path.is_file() else []
    kept = []
    for other in earlier:
        if other["checkpoint"] == record["checkpoint"] and other["weights_sha256"] != record["weights_sha256"]:
            continue
        if all(other[name] == record[name] for name in place):
            record = {**record, "attacks": {**other["attacks"], **record["attacks"]}}
        else:
            kept.append(other)
    checkpoint.write_text(path, json.dumps({"evaluations": [*kept, record]}) + "\n")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def table(records: Sequence[dict[str, Any]]) -> Table:
    """A row per run and attack, in percent; narrow enough for a terminal of 80 characters."""
    epsilons = list(dict.fromkeys(record["epsilon"] for record in records))
    counts = dict.fromkeys(f"{r['points']:,} {r['split']} images of {r['dataset']}" for r in records)
    title = f"Accuracy in %, epsilon {', '.join(epsilons)}; {', '.join(counts)}"
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("run", overflow="fold", min_width=12)
    for name in ("weights", "NA", "attack", "RA", "RD", "ASR\nall", "ASR\ncorrect", "worst\nclass", "spread"):
        view.add_column(name, justify="left" if name in ("weights", "attack") else "right", no_wrap=True)
    for record in records:
        head = (record["run"], record["checkpoint"], percent(record["na"]))
        for name, figures in record["attacks"].items():
            attack = name if len(epsilons) == 1 else f"{name} {record['epsilon']}"
            shares = [percent(figures[share]) for share in ("ra", "rd", "asr_all", "asr_correct")]
            worst = f"{figures['worst_class']}: {percent(figures['worst_class_ra'])}"
            view.add_row(*head, attack, *shares, worst, percent(figures["spread"]))
            head = ("", "", "")
        if not record["attacks"]:
            view.add_row(*head)
        view.add_section()
    return view


def class_table(record: dict[str, Any]) -> Table:
    """NA and RA of each class of one run, in percent."""
    title = f"Classes of {record['run']}, accuracy in %, epsilon {record['epsilon']}"
    view = Table(title=title, box=box.SIMPLE_HEAD)
    view.add_column("class")
    columns = [record["per_class"], *(figures["per_class"] for figures in record["attacks"].values())]
    for name in ("NA", *(f"RA {name}" for name in record["attacks"])):
        view.add_column(name, justify="right")
    for label in record["per_class"]:
        view.add_row(label, *(percent(column[label]) for column in columns))
    return view
