"""``dtrades-fast evaluate``: accuracy of trained networks, clean and under attack, and whether it is to be believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console

import dtrades_fast
from dtrades_fast import data, environment, models, processes
from dtrades_fast.config import option
from dtrades_fast.data import ImageSet
from dtrades_fast.evaluation import blackbox, metrics, report, suites
from dtrades_fast.evaluation.engine import Progress
from dtrades_fast.evaluation.record import SCHEMA, Settings, evaluate_model, flags, stored
from dtrades_fast.evaluation.targets import Target, TrainedRun, find_run, load_run, load_target
from dtrades_fast.models.normalize import Classifier
from dtrades_fast.pixels import pixels
from dtrades_fast.training import checkpoint

__all__ = ["Options", "RunOptions", "TrainedRun", "evaluate", "find_run", "load_run", "main", "parse"]

FILE_WIDTH = 132  #: characters of the tables where the output is not a terminal
#: Records that agree in this are of one evaluation.
PLACE = (
    "dataset",
    "checkpoint",
    "split",
    "ids",
    "epsilon",
    "norm",
    "step_size",
    "seed",
    "engine",
    "precision",
    "ignored",
    "notes",
)
VERDICTS = ("healthy", "suspicious", "masked")  #: from good to bad


@dataclass
class RunOptions:
    """Which runs to look at, and how: the options that commands on trained runs share."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, or names of runs in --runs-dir; evaluate also takes files of weights."""
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
    """Accuracy of networks, clean and under attack, and a verdict on it: writes eval.json and prints tables.

    A network is a run, a .safetensors file, or a PyTorch checkpoint of this or another project. Suites: quick (FGSM,
    PGD-20), standard (quick and AutoAttack), blackbox (Square, and transfer from --surrogates and a twin),
    minimum-norm (APN in Linf and L2), full (all of them).
    """

    suite: Literal["quick", "standard", "blackbox", "minimum-norm", "full"] = "quick"
    """Which attacks."""
    attacks: Annotated[
        str | None, option("STR", f"Attacks instead of the suite's, with commas: {suites.ATTACKS}.", "the suite's")
    ] = None
    engine: Literal["fast", "official"] = "fast"
    """AutoAttack by this package, or by its authors' code (pip install 'dtrades-fast[autoattack]')."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the searches, for GPUs and CPUs that compute in it; what they find is checked in float32."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights of the best epoch (by validation) or of the last one."""
    split: Literal["test", "validation"] = "test"
    """Images to evaluate on."""
    epsilon: Annotated[str | None, option("STR", "Radius in pixel units, e.g. 8/255.", "the run's")] = None
    norm: Annotated[Literal["linf", "l2"] | None, option("{linf,l2}", "Norm of the ball.", "the run's")] = None
    step_size: Annotated[str | None, option("STR", "Size of a PGD step in pixel units.", "epsilon / 4")] = None
    seed: int = 0
    """Seed of the attacks' random numbers."""
    surrogates: tuple[str, ...] = ()
    """Runs or files of weights that transfer attacks make their images on."""
    twin: Annotated[
        str | None,
        option(
            "ARCH",
            "Also train a twin of that architecture on the network's answers to the training images, and attack by it.",
            "blackbox and full: the network's own",
        ),
    ] = None
    twin_queries: int = 5000
    """Training images that the network is asked about for the twin, the same share of each class."""
    resume: bool = False
    """Go on with an evaluation that was killed."""
    overwrite: bool = False
    """Forget an evaluation that was killed and start again."""
    ignore: str = ""
    """Findings of the guard rails, with commas, that are no reason to stop."""
    dataset: Annotated[str | None, option("STR", "Data set, for files of weights.", "the run's")] = None
    arch: Annotated[str | None, option("ARCH", "Architecture of a file of weights.", "recognised")] = None
    width: Annotated[int | None, option("INT", "Channels of the first stage in a file.", "recognised")] = None
    mean: tuple[float, ...] | None = None
    """What a file's network wants subtracted from images in [0, 1], per channel."""
    std: tuple[float, ...] | None = None
    """What it wants them divided by then."""
    preact_shortcut: Annotated[
        Literal["activated", "input"] | None,
        option("{activated,input}", "What the 1x1 shortcuts of a pre-activation ResNet in a file see.", "activated"),
    ] = None


Asked = TypeVar("Asked", bound=RunOptions)


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``evaluate``."""
    options = parse(Options, argv, prog)
    with processes.joined() as rank:
        console = Console(quiet=rank > 0)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        records, unfinished = [], []
        for name in options.runs:
            file, state = places(name, options)
            known = [] if options.overwrite else stored(file)
            record, progress = evaluate(load(name, options), options, console, state, known)
            if rank == 0:
                write(file, record)
            records.append(record)
            unfinished.append(progress)
        for progress in unfinished:  # until then, an evaluation of several networks can be resumed
            progress.finish()
        console.print(report.table(records))
        if len(records) == 1:
            for view in report.tables(records[0]):
                console.print(view)
        for record in records:
            console.print(report.markdown(record), soft_wrap=True, markup=False, highlight=False)
            for line in verdict_lines(record):
                console.print(line, soft_wrap=True, markup=False, highlight=False)
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


def device_of(options: RunOptions) -> str:
    """The device asked for; of several processes with GPUs, each its own."""
    return processes.own_device(environment.device(options.device))


def load(name: str, options: Options) -> Target:
    """A network to evaluate."""
    file = {field: getattr(options, field) for field in ("arch", "width", "mean", "std", "preact_shortcut")}
    return _load(name, options, dataset=options.dataset, **file)


def _load(name: str, options: Options, **file: Any) -> Target:
    return load_target(name, **file, epoch=options.checkpoint, runs_dir=options.runs_dir, device=device_of(options))


def places(name: str, options: Options) -> tuple[Path, Path]:
    """Where the record goes, and where an unfinished evaluation is kept: in the run's folder, or beside the file."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.with_name(path.name + ".eval.json"), path.with_name(path.name + ".eval-state")
    folder = find_run(name, options.runs_dir)
    return folder.evaluation, folder.evaluation_state


def evaluate(
    target: Target,
    options: Options,
    console: Console | None = None,
    state: Path | None = None,
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, Any], Progress]:
    """One network under all attacks: the record that ``eval.json`` keeps, and what is to be forgotten once it does.

    Args:
        target: the network.
        options: of the command.
        console: is told what is found.
        state: folder that keeps what is done until then; None to keep nothing.
        known: records that there are. Where the best epoch is the last one, the second evaluation is the first one.

    Raises:
        ValueError: an option that is not possible, or the guard rails have found an error.
        FileNotFoundError: the weights or the data set are missing.
    """
    for flag in ("batch_size", "limit", "twin_queries"):
        number = getattr(options, flag)
        if number is not None and number < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {number}")
    console = console or Console(quiet=True)
    sets, device = data_of(target, options, options.limit), device_of(options)
    images: ImageSet = getattr(sets, options.split)
    settings = settings_of(target, options)
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with an evaluation, --overwrite deletes it: give one of the two")
    surrogates = surrogates_of(target, options)
    twin = options.twin or (target.arch if options.suite in ("blackbox", "full") and not options.attacks else None)
    progress = Progress(
        state,
        {
            "version": dtrades_fast.__version__,
            "network": target.sha256,
            "read": list(target.notes),
            "points": len(images),
            "images": hashlib.sha256(images.ids.cpu().numpy().tobytes()).hexdigest()[:16],
            "dataset": target.dataset,
            "split": options.split,
            "surrogates": list(options.surrogates),
            "twin": [twin, options.twin_queries] if twin else None,
            **json.loads(json.dumps(dataclasses.asdict(settings))),
        },
        resume=options.resume,
        overwrite=options.overwrite,
    )
    method = target.config.defense.method if target.config else None
    about = {
        "run": target.name,
        "method": method,
        "arch": target.arch,
        "source": target.source,
        "notes": list(target.notes),
        "dataset": target.dataset,
        "checkpoint": options.checkpoint if target.folder else "file",
        "weights_sha256": target.sha256,
        "split": options.split,
        "version": dtrades_fast.__version__,
        "commit": environment.git_commit(),
    }
    console.print(f"{target.name}: {target.source}; {len(images):,} {options.split} images of {target.dataset}")
    for note in target.notes:
        console.print(f"  {note}")
    if not (surrogates or twin) and (found := same_weights(about, settings, images, options, known)) is not None:
        console.print(
            f"  the {found['checkpoint']} epoch has the very same weights, and its evaluation all that is asked"
        )
        return {**found, "source": about["source"], "checkpoint": about["checkpoint"]}, progress
    extracted: dict[str, Any] = {}

    def everyone() -> dict[str, blackbox.Player]:
        """The surrogates, and a twin that is trained once for all processes and sessions."""
        if twin is None:
            return surrogates
        asked = data_of(target, options, options.twin_queries)
        make = twin_maker(target, sets.info, twin, device)

        def train() -> dict[str, Any]:
            found = blackbox.extract(
                target.model,
                asked.train.images_uint8,
                make,
                held_out_uint8=images.images_uint8,
                augmentation=sets.info.augmentation,
                seed=options.seed,
            )
            return {
                "weights": {name: tensor.cpu() for name, tensor in found.twin.state_dict().items()},
                "queries": found.queries,
                "agreement": found.agreement,
            }

        trained = progress.once("twin", train)
        network = make().eval()
        network.load_state_dict(trained["weights"])
        extracted.update({"arch": twin, "queries": trained["queries"], "agreement": trained["agreement"]})
        console.print(
            f"twin {twin}: agrees on {100 * trained['agreement']:.1f} % of the {options.split} images after "
            f"{trained['queries']:,} queries"
        )
        return {**surrogates, f"twin-{twin}": blackbox.Player(network, twin, twin_of=target.model)}

    record = evaluate_model(
        target.model,
        images,
        sets.info.classes,
        settings,
        surrogates=everyone,
        player=player(target),
        progress=progress,
        ignore=[name for name in options.ignore.split(",") if name],
        report=console.print,
    )
    return {**about, "extraction": extracted, **record}, progress


def same_weights(
    about: Mapping[str, Any],
    settings: Settings,
    images: ImageSet,
    options: Options,
    known: Sequence[Mapping[str, Any]],
) -> Mapping[str, Any] | None:
    """The record of another checkpoint of the run with the same weights and all that is asked for, by the same code."""
    asked = {
        **{name: value for name, value in about.items() if name not in ("run", "source", "checkpoint")},
        **{name: getattr(settings, name) for name in ("epsilon", "norm", "step_size", "seed", "precision")},
        "engine": options.engine,
        "ids": images.ids.tolist(),
        "ignored": [name for name in options.ignore.split(",") if name],
    }
    for record in known:
        if (
            record["checkpoint"] != about["checkpoint"]
            and all(record[name] == value for name, value in asked.items())
            and set(settings.attacks) <= set(record["attacks"])
            and set(settings.minimum_norms) <= set(record["minimum_norm"])
        ):
            return record
    return None


def data_of(target: Target, options: Options, limit: int | None) -> data.DataSets:
    """The data set that the network is evaluated on, so many images of each split."""
    if target.dataset is None:
        raise ValueError(f"{target.name} is a file of weights: say with --dataset what it is to be evaluated on")
    root = options.data_root or (target.config.data.data_root if target.config else "data")
    sets = data.load(target.dataset, root, device_of(options), limit=limit)
    if target.classes is not None and target.classes != len(sets.info.classes):
        raise ValueError(
            f"{target.name} has {target.classes} classes and {target.dataset} has {len(sets.info.classes)}: "
            "name the data set that it was trained on with --dataset"
        )
    return sets


def settings_of(target: Target, options: Options) -> Settings:
    """What is asked for, with the run's own threat where nothing is said."""
    epsilon = options.epsilon or target.epsilon
    if epsilon is None:
        raise ValueError(f"{target.name} is a file of weights: say with --epsilon how far attacks may go, e.g. 8/255")
    pixels(epsilon, "--epsilon")
    if options.epsilon is None and target.config and options.norm not in (None, target.config.attack.norm):
        raise ValueError(
            f"--norm {options.norm} needs --epsilon: {epsilon}, which {target.name} was trained for, is a radius in "
            f"{target.config.attack.norm}"
        )
    norms: tuple[suites.Norm, ...] = ("linf", "l2") if options.suite in ("minimum-norm", "full") else ()
    return Settings(
        epsilon=epsilon,
        norm=options.norm or (target.config.attack.norm if target.config else "linf"),
        attacks=tuple(suites.names(options.attacks, options.suite)),
        step_size=None if options.step_size is None else pixels(options.step_size, "--step-size"),
        official=options.engine == "official",
        minimum_norms=() if options.attacks else norms,
        seed=options.seed,
        batch_size=options.batch_size,
        precision=options.precision,
    )


def player(target: Target) -> blackbox.Player:
    return blackbox.Player(target.model, target.arch)


def surrogates_of(target: Target, options: Options) -> dict[str, blackbox.Player]:
    """The other networks, by name."""
    found = {name: _load(name, options) for name in options.surrogates}
    for name, surrogate in found.items():
        if surrogate.sha256 == target.sha256:
            raise ValueError(
                f"--surrogates {name} has the very weights of {target.name}: give others (the white box is among the "
                "transfer attacks anyway)"
            )
    return {name: player(surrogate) for name, surrogate in found.items()}


def twin_maker(target: Target, info: data.DataInfo, arch: str, device: str) -> Callable[[], Classifier]:
    """What makes untrained networks of an architecture, as wide as the target and for the same images."""
    width = target.config.model.width if target.config else None
    if isinstance(target.model, Classifier):
        mean, std = (
            numbers.flatten().tolist() for numbers in (target.model.normalize.mean, target.model.normalize.std)
        )
    else:
        mean, std = [0.0] * info.channels, [1.0] * info.channels

    def make() -> Classifier:
        return models.create(
            arch,
            num_classes=len(info.classes),
            in_channels=info.channels,
            image_size=info.image_size,
            width=width,
            mean=mean,
            std=std,
        ).to(device)

    return make


def write(path: Path, record: dict[str, Any]) -> None:
    """Add a record to ``eval.json``.

    Records of the same checkpoint but other weights, and of an older schema, are out of date and go. A record of the
    same points, threat and way of searching is merged with the new one, attack by attack.
    """
    kept = []
    for other in stored(path):
        if other["checkpoint"] == record["checkpoint"] and other["weights_sha256"] != record["weights_sha256"]:
            continue
        if all(other[name] == record[name] for name in PLACE):
            record = merged(other, record)
        else:
            kept.append(other)
    checkpoint.write_text(path, json.dumps({"schema": SCHEMA, "evaluations": [*kept, record]}) + "\n")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both evaluations of the same points in one, the new one's word counting where both have one.

    Of the verdicts it is the worse one: what an attack has shown stays true when another one is run.
    """
    attacks = {**old["attacks"], **new["attacks"]}
    standing = [flags(entry["correct"]) for entry in attacks.values()]
    transfers = new if new["transfer"] else old  # of one set of surrogates
    return {
        **new,
        "attacks": attacks,
        "ra_worst": metrics.accuracy(torch.stack(standing).all(0)) if standing else new["na"],
        "minimum_norm": {**old["minimum_norm"], **new["minimum_norm"]},
        "transfer": transfers["transfer"],
        "extraction": transfers["extraction"],
        "verdict": max(new["verdict"], old["verdict"], key=lambda found: VERDICTS.index(found["verdict"])),
    }


def verdict_lines(record: dict[str, Any]) -> list[str]:
    """The last lines of an evaluation."""
    found = record["verdict"]
    what = f"verdict on {record['run']}: {found['verdict']} ({found['points']} points looked at)"
    return [what, *(f"  {reason}" for reason in found["reasons"])]
