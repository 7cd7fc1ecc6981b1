"""What a study is made of: a YAML file, read into cells.

    description: Two methods on digits.
    defaults:                      # options of training that all runs share
      preset: quick
      dataset: mnist5k
      arch: resnet18
      seed: [0, 1, 2]              # a list is an axis of the grid
    runs:                          # blocks, each a grid of its own
      - method: trades
        beta: [1, 2, 4]
      - method: dtrades
        lambda_mean: [1, 2, 4]
      - method: faal
        init_weights: {method: trades, beta: 2}   # the best epoch of the run that is alike but for these
        label: fine-tuned          # what the report calls this setting; by default the options that vary
    evaluations:                   # options of `dtrades-fast evaluate`; a list of checkpoints is one each
      - {suite: quick, limit: 200, checkpoint: [best, last]}
      - {attacks: autoattack, limit: 200, only: {seed: 0}}
      - {suite: blackbox, limit: 200, surrogates: [{seed: 1}], only: {seed: 0}}  # runs alike but for these, trained
    compare: dtrades               # the method that the others are compared with, by default dtrades

Options are those of ``dtrades-fast train`` with underscores. A block's ``protocol`` (``common`` unless given) keeps
apart what is not to be compared: common conditions, and each method's published ones. Its ``part`` (``main`` unless
given) is the section of the report that its runs are for: those of ``main`` are what the methods are compared by.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dtrades_fast import config
from dtrades_fast.config import Config
from dtrades_fast.evaluation import evaluate, suites
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Cell", "Study", "read"]

SECTIONS = ("description", "defaults", "runs", "evaluations", "compare")
#: Where a cell stands in the grid; no part of a setting.
AXES = ("protocol", "dataset", "arch", "method", "seed")
OWN = ("protocol", "part", "label")  #: keys of a block that are no options of training
#: Options that the study decides, or its command line.
DECIDED = ("run", "runs_dir", "resume", "overwrite", "device", "threads", "data_root")
#: Options of training whose value is itself a list.
LISTS = tuple(
    name
    for group in dataclasses.fields(Config)
    for name, value in vars(getattr(Config(), group.name)).items()
    if isinstance(value, tuple)
)
#: Options of an evaluation that are one of a few words.
CHOICES = {n: get_args(kind) for n, kind in get_type_hints(evaluate.Options).items() if get_origin(kind) is Literal}
Options = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a training and its evaluations.

    Attributes:
        name: of its run folder.
        protocol, dataset, arch, method, seed: where it stands in the grid.
        epochs: of training.
        part: section of the report.
        labelled: whether the file names the setting; if not, options that vary make it a point of a front.
        setting: what tells it from other runs of its method, e.g. ``"beta 2"``; empty if nothing does.
        options: of training, but for ``init_weights`` if it starts from another cell.
        evaluations: options of each evaluation beside the run; ``surrogates`` are names of cells.
        start: name of the cell whose best epoch it starts from.
    """

    name: str
    protocol: str
    dataset: str
    arch: str
    method: str
    seed: int
    epochs: int
    part: str
    labelled: bool
    setting: str
    options: Options
    evaluations: tuple[Options, ...]
    start: str | None = None

    @property
    def needs(self) -> list[str]:
        """Names of the cells whose training it waits for at some time."""
        surrogates = [name for options in self.evaluations for name in options.get("surrogates", ())]
        return list(dict.fromkeys([*([self.start] if self.start is not None else []), *surrogates]))

    @property
    def place(self) -> Options:
        """Where it stands, as ``cell.json`` keeps it."""
        return {name: getattr(self, name) for name in (*AXES, "part", "setting")}

    def config(self, runs_dir: Path, *more: str) -> Config:
        """The configuration of its training, in a folder of runs."""
        words = [*config.words(self.options), "--run", self.name, "--runs-dir", str(runs_dir)]
        if self.start is not None:
            words += ["--init-weights", str(RunFolder(runs_dir / self.start).best_weights)]
        return config.parse([*words, *more], f"study cell {self.name}")

    def asked(self) -> Options:
        """All that decides its result, as ``cell.json`` keeps it."""
        return json.loads(json.dumps({"options": self.options, "start": self.start, "evaluations": self.evaluations}))


@dataclass(frozen=True)
class Study:
    """A study, read and checked.

    Attributes:
        path: of its file.
        description: what it is about.
        compare: the method that the others are compared with.
        cells: in the order of the file, each after the one that it starts from.
    """

    path: Path
    description: str
    compare: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def __getitem__(self, name: str) -> Cell:
        found = next((cell for cell in self.cells if cell.name == name), None)
        if found is None:
            raise ValueError(f"{self.path} has no cell {name!r}; its cells are {', '.join(c.name for c in self.cells)}")
        return found


def read(path: Path) -> Study:
    """A study from its file.

    Raises:
        ValueError: what is wrong with the file, and where.
    """
    try:
        return _study(path, config.read_yaml(path))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _study(path: Path, values: Mapping[str, Any]) -> Study:
    _known("sections", values, SECTIONS)
    runs = values.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(block, dict) for block in runs):
        raise ValueError("'runs' must be a list of blocks of options, e.g. '- method: [trades, dtrades]'")
    defaults, evaluations = values.get("defaults", {}), values.get("evaluations", [])
    drafts = [draft for block in runs for draft in _drafts({**defaults, **block})]
    cells = _cells(drafts, [each for entry in evaluations for each in _evaluations(entry)])
    compare = values.get("compare", "dtrades")
    if compare not in (methods := {cell.method for cell in cells}):
        if "compare" in values:
            raise ValueError(f"'compare' must be one of its methods, {', '.join(sorted(methods))}, got {compare!r}")
        compare = cells[-1].method
    return Study(path, str(values.get("description", "")).strip(), compare, cells)


def _known(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known are {', '.join(known)}")


def _drafts(block: Options) -> Iterator[Options]:
    """The runs of a block: one for each combination of what it has lists of."""
    if decided := [name for name in block if name in DECIDED]:
        raise ValueError(f"{', '.join(decided)}: the study decides, take it out of 'runs' and 'defaults'")
    axes = {name: _axis(name, value) for name, value in block.items()}
    if empty := [name for name, values in axes.items() if not values]:
        raise ValueError(f"{', '.join(empty)}: an empty list makes no runs")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _axis(name: str, value: Any) -> list[Any]:
    is_axis = isinstance(value, list) and (name not in LISTS or any(isinstance(each, list) for each in value))
    return value if is_axis else [value]


def _evaluations(entry: Any) -> Iterator[Options]:
    """One for each checkpoint."""
    if not isinstance(entry, dict):
        raise ValueError(f"'evaluations' must be a list of options, e.g. '- {{suite: quick}}', got {entry!r}")
    options = {"checkpoint": "best", **entry}
    names = [f.name for f in dataclasses.fields(evaluate.Options)]
    _known("options of an evaluation", options, ["only", *(n for n in names if n not in (*DECIDED, "runs"))])
    _known("names in 'only'", options.get("only", {}), (*AXES, "part", "setting", *config.option_names()))
    attacks = options.get("attacks")
    if isinstance(attacks, list):
        options["attacks"] = ",".join(attacks)
    for name in suites.names(options.get("attacks"), "quick"):
        suites.make_attack(name, epsilon=0.1)  # raises what it would
    for checkpoint in _axis("checkpoint", options["checkpoint"]):
        one = {**options, "checkpoint": checkpoint}
        for name, allowed in CHOICES.items():
            if name in one and one[name] not in allowed:
                raise ValueError(f"{name} of an evaluation must be one of {', '.join(allowed)}, got {one[name]!r}")
        yield one


def _cells(drafts: Sequence[Options], evaluations: Sequence[Options]) -> tuple[Cell, ...]:
    """Drafts that know of each other: settings, names and starts."""
    configs = [_config(draft) for draft in drafts]
    parsed = [_parsed(draft, made) for draft, made in zip(drafts, configs, strict=True)]
    several_protocols = len({cell.protocol for cell in parsed}) > 1
    cells = []
    for draft, made, cell in zip(drafts, configs, parsed, strict=True):
        alike = [d for d, c in zip(drafts, parsed, strict=True) if _group(c) == _group(cell)]
        setting = str(draft["label"]) if "label" in draft else _setting(draft, alike)
        parts = [cell.protocol] if several_protocols else []
        parts += [made.dataset_name, cell.arch, cell.method, setting, f"seed{cell.seed}"]
        name = "-".join(slug for part in parts if (slug := re.sub(r"[^\w.+=]+", "-", part).strip("-")))
        cells.append(dataclasses.replace(cell, name=name, setting=setting))
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"the same run is asked for more than once: {', '.join(twice)}; give blocks a label of their own"
        )
    cells = [_started(cell, cells) for cell in cells]
    chosen = [replace(c, evaluations=tuple(_chosen(c, cells, evaluations))) for c in cells]
    return tuple(sorted(chosen, key=lambda cell: _depth(cell, chosen)))


def _config(draft: Options) -> Config:
    """What training makes of the options."""
    options = {name: value for name, value in draft.items() if name not in OWN}
    _known("options", options, config.option_names())
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    return config.parse(config.words(plain), "study")


def _parsed(draft: Options, made: Config) -> Cell:
    options = {name: value for name, value in draft.items() if name not in OWN}
    place = made.data.dataset, made.model.arch, made.defense.method, made.run.seed, made.optimization.epochs
    protocol, part = (str(draft.get(name, default)) for name, default in (("protocol", "common"), ("part", "main")))
    return Cell("", protocol, *place, part, "label" in draft, "", options, ())


def _group(cell: Cell) -> tuple[str, ...]:
    return cell.protocol, cell.dataset, cell.arch, cell.method


def _setting(draft: Options, alike: Sequence[Options]) -> str:
    """The options in which runs of a method differ, with this one's values."""
    missing = object()
    names = dict.fromkeys(name for each in alike if "label" not in each for name in each)
    varying = [
        name
        for name in names
        if name not in (*AXES, "part")
        and len({repr(each.get(name, missing)) for each in alike if "label" not in each}) > 1
    ]
    return ", ".join(f"{name} {draft[name]}" for name in varying if name in draft)


def _started(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """The cell with the name of the one that it starts from, where ``init_weights`` describes one."""
    wanted = cell.options.get("init_weights")
    if not isinstance(wanted, dict):
        return cell
    start = _alike("init_weights", cell, wanted, cells)
    options = {name: value for name, value in cell.options.items() if name != "init_weights"}
    return replace(cell, options=options, start=start)


def _alike(what: str, cell: Cell, wanted: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Name of the one cell that stands where this one does, but for what is given."""
    kept = AXES if set(wanted) - set(AXES) or "method" in wanted else (*AXES, "setting")
    fixed = {name: getattr(cell, name) for name in kept}
    found = [c.name for c in cells if c.name != cell.name and _matches(c, {**fixed, **wanted})]
    if len(found) != 1:
        which = ", ".join(found) or "none"
        raise ValueError(
            f"{what} of {cell.name} must describe one other run of this study, {wanted} describes: {which}"
        )
    return found[0]


def _depth(cell: Cell, cells: Sequence[Cell]) -> int:
    """How many cells it comes after."""
    by_name, depth = {c.name: c for c in cells}, 0
    while cell.start is not None:
        cell, depth = by_name[cell.start], depth + 1
        if depth > len(cells):
            raise ValueError(f"init_weights go round in a circle: {cell.name} starts from itself")
    return depth


def _chosen(cell: Cell, cells: Sequence[Cell], evaluations: Sequence[Options]) -> Iterator[Options]:
    """The evaluations of a cell, with the names of surrogates."""
    for entry in evaluations:
        if not _matches(cell, entry.get("only", {})):
            continue
        options = {name: value for name, value in entry.items() if name != "only"}
        if wanted := options.get("surrogates"):
            described = wanted if isinstance(wanted, list) else [wanted]
            if not all(isinstance(each, dict) for each in described):
                raise ValueError(f"surrogates must describe runs of this study, e.g. [{{seed: 1}}], got {wanted!r}")
            options["surrogates"] = [_alike("surrogates", cell, each, cells) for each in described]
        yield options


def _matches(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    """Whether the cell has one of the values of each name, which is an axis, ``part``, ``setting`` or an option."""
    for name, values in wanted.items():
        value = getattr(cell, name) if name in (*AXES, "part", "setting") else cell.options.get(name)
        if value not in (values if isinstance(values, list) else [values]):
            return False
    return True
