"""The configuration of a training run: its options, where their values come from, and how they are stored.

Every option is a field of one of the groups below and a flag of the same name (``lambda_alpha``, ``--lambda-alpha``).
Its value is looked for in this order: command line, preset, recipe, the default here. The group :class:`Defense` is
generated from the fields of the registered defenses, so a new defense brings its options along.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from dtrades_fast import defenses, environment, processes
from dtrades_fast.attacks import PGD
from dtrades_fast.pixels import pixels

__all__ = [
    "Attack",
    "Config",
    "Data",
    "Defense",
    "Model",
    "Optimization",
    "Run",
    "Speed",
    "load",
    "option",
    "parse",
    "profiles",
]

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_METHOD = "dtrades"
L2_NEEDS_EPSILON = (
    "--norm needs --epsilon with it: the usual radius of a data set and those of recipes are for Linf; "
    "in L2, 0.5 is usual for CIFAR-10"
)
#: Options that say where a run is kept and how to start it, not what it computes; they are not stored with it.
NOT_STORED = ("recipe", "preset", "runs_dir", "run", "resume", "overwrite")
#: Options that may differ on resume, because they change no bit of the result.
MAY_DIFFER = ("checkpoint_minutes", "data_root", "track")


def option(kind: str, help: str, default: str) -> Any:
    """Annotation of an option that is None until its default is decided; ``kind`` is what may be given."""
    return tyro.conf.arg(help=help, help_behavior_hint=f"(default: {default})", metavar=kind)


@dataclass
class Model:
    """The network."""

    arch: str = "resnet18"
    """Architecture: preactresnet18, resnet18, smallcnn, vgg16 or wrn34_10."""
    width: Annotated[
        int | None, option("INT", "Channels of the first stage.", "as published, 64; smallcnn 32, wrn34_10 160")
    ] = None
    init_weights: Annotated[
        str | None,
        option(
            "STR", "Weights to start from: a safetensors or torch file, or 'imagenet'. What fits is loaded.", "random"
        ),
    ] = None
    freeze_backbone: bool = False
    """Train only the classifier at the end; the features stay as they are."""
    normalization: Literal["dataset", "none"] = "dataset"
    """Normalisation inside the model: by the data set's mean and deviation, or none as in TRADES' recipes."""


@dataclass
class Data:
    """The images."""

    dataset: str = "mnist5k"
    """Data set: mnist5k (needs no download), mnist, cifar10, cifar100 or folder:PATH."""
    data_root: str = "data"
    """Folder of the downloaded data sets."""
    augmentation: Literal["dataset", "none"] = "dataset"
    """Random crop and flip where they suit the data set (not digits), or none."""
    limit: Annotated[
        int | None, option("INT", "Images of each split to keep, the same share of each class.", "all")
    ] = None


@dataclass
class Attack:
    """The attack inside training, and the one that validation selects by."""

    epsilon: Annotated[
        str | None,
        option("STR", "Radius in pixel units of [0, 1], e.g. 8/255.", "the data set's: 0.3 for digits, else 8/255"),
    ] = None
    steps: int = 10
    """Steps of the attack in training."""
    step_size: Annotated[str | None, option("STR", "Size of a step in pixel units.", "epsilon / 4")] = None
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    epsilon_ramp: float = 0.0
    """Share of training, 0 to 1, in which epsilon and step size grow linearly from 0."""
    validation_steps: int = 10
    """Steps of the PGD (cross-entropy, step epsilon / 4) whose validation accuracy chooses the best epoch."""
    on_masking: Literal["warn", "noise", "stop"] = "warn"
    """When the gradients that the attack climbs seem masked: say so, or also start the attack from images with Gaussian
    noise until they no longer do, or stop."""
    masking_noise: float = 0.1
    """Standard deviation of that noise in pixel units."""


@dataclass
class Optimization:
    """The optimizer."""

    epochs: int = 30
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate; its highest value where the schedule varies it."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of Adam."""
    nesterov: bool = False
    """Nesterov momentum (SGD)."""
    weight_decay: float = 5e-4
    """L2 penalty on all trained parameters."""
    schedule: Literal["step", "cosine", "one-cycle", "constant"] = "one-cycle"
    """Learning rate: drops at the milestones, half a cosine to 0, up over 30 % and down again, or constant."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the step schedule drops the learning rate."""
    gamma: float = 0.1
    """Factor of each drop."""
    ema: Annotated[
        float | None,
        option(
            "FLOAT", "Decay per step of a moving average of the weights, which is then validated and exported.", "off"
        ),
    ] = None
    clip_norm: Annotated[float | None, option("FLOAT", "Largest L2 norm of the whole gradient.", "off")] = None
    precision: environment.Precision = "auto"
    """Precision of the network; logits and losses are always float32. auto: bf16 on a GPU that has it, else fp16 with
    a scaled loss; fp32 on the CPU."""


@dataclass
class Speed:
    """How the network is run; the results are the same within rounding."""

    fold_batchnorm: bool = True
    """Attack the network with BatchNorm folded into its convolutions."""
    channels_last: bool = True
    """Keep images and activations in the channels-last memory format, where that is faster."""
    compile: bool = False
    """Compile the network with torch.compile, which takes a minute or two and needs a C++ compiler on a CPU."""
    cuda_graphs: bool = False
    """On a GPU, launch all steps of the training attack as one CUDA graph, which keeps memory of its own for them."""


@dataclass
class Run:
    """Where the run is kept, and what it runs on."""

    runs_dir: str = "runs"
    """Folder of all runs."""
    run: Annotated[str | None, option("STR", "Name of the run, a folder of its own.", "dataset-arch-method-seedN")] = (
        None
    )
    recipe: Annotated[
        str | None,
        option(
            "STR",
            "Published settings, by NAME or FILE.yaml (a run's config.yaml works too); they replace defaults.",
            "none",
        ),
    ] = None
    preset: Annotated[
        str | None, option("STR", "Settings for a machine, e.g. quick for a CPU; they replace the recipe's.", "none")
    ] = None
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on with a run that was stopped; its options are taken from its folder."""
    overwrite: bool = False
    """Delete the run of that name and start again."""
    device: str = "auto"
    """Device: auto (cuda if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int | None, option("INT", "CPU threads.", "the physical cores")] = None
    deterministic: bool = False
    """Use deterministic algorithms only; on CUDA, resuming gives the same bits only with it."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; the end of an epoch always has one."""
    track: Literal["none", "tensorboard"] = "none"
    """Also log each epoch's figures for TensorBoard, into RUN/tensorboard."""


def _described(cls: type) -> dict[str, str]:
    """Option -> its text in the Args section of the class docstring, with a capital and without Sphinx roles."""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    plain = {name: re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", " ".join(text.split())) for name, text in entries}
    return {name: text[:1].upper() + text[1:] for name, text in plain.items()}


def _shown(kind: Any) -> str:
    """A type as the help shows it; that an option may be None (automatic) goes without saying."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    (plain,) = [part for part in get_args(kind) or (kind,) if part is not type(None)]
    return str(plain.__name__).upper()


def _method_option(name: str, having: Mapping[str, dataclasses.Field[Any]]) -> tuple[str, Any, Any]:
    """The field of :class:`Defense` for an option, from the methods that have it."""
    classes = {method: defenses.REGISTRY[method] for method in having}
    kinds = list(dict.fromkeys(get_type_hints(cls)[name] for cls in classes.values()))
    shown = "|".join(dict.fromkeys(_shown(kind) for kind in kinds))
    texts = dict.fromkeys(text for cls in classes.values() if (text := _described(cls).get(name)))
    own: dict[str, list[str]] = {}
    for method, having_it in having.items():
        default = "automatic" if having_it.default is None else str(having_it.default)
        own.setdefault(default, []).append(method)
    hint = "; ".join(f"{default} for {', '.join(methods)}" for default, methods in own.items())
    given: Any = functools.reduce(operator.or_, kinds, None)
    return name, Annotated[given, option(shown, " ".join(texts), hint)], field(default=None)


def _defense_group() -> type:
    """Dataclass with ``method`` and every option of every registered defense; None is the method's own default."""
    having: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for method in defenses.names():
        for name, known in defenses.options(method).items():
            having.setdefault(name, {})[method] = known
    method_help = tyro.conf.arg(help=f"Training method: {', '.join(defenses.names())}.")
    fields = [("method", Annotated[str, method_help], field(default=DEFAULT_METHOD))]
    fields += [_method_option(name, methods) for name, methods in having.items()]
    namespace = {"__doc__": "The training method and its own options.", "__module__": __name__}
    return dataclasses.make_dataclass("Defense", fields, namespace=namespace)


if TYPE_CHECKING:
    Defense = Any
else:
    Defense = _defense_group()


@dataclass
class Config:
    """Train a classifier. Values are looked for on the command line, then in --preset, --recipe and the defaults."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    defense: Defense = field(default_factory=Defense)
    attack: Attack = field(default_factory=Attack)
    optimization: Optimization = field(default_factory=Optimization)
    speed: Speed = field(default_factory=Speed)
    run: Run = field(default_factory=Run)

    @property
    def method_options(self) -> dict[str, Any]:
        """The options given to the method; its own defaults hold for the others."""
        given = vars(self.defense).items()
        return {name: value for name, value in given if name != "method" and value is not None}

    @property
    def dataset_name(self) -> str:
        """The data set in a word that can be part of a file's name."""
        kind, _, path = self.data.dataset.partition(":")
        word = re.sub(r"[^\w.+=]+", "-", Path(path).name).strip("-")
        return f"folder-{word}" if kind == "folder" else self.data.dataset

    @property
    def run_name(self) -> str:
        return self.run.run or f"{self.dataset_name}-{self.model.arch}-{self.defense.method}-seed{self.run.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.run.runs_dir).expanduser() / self.run_name

    def threat(self) -> defenses.Threat:
        """The attack in training at its full size. Epsilon must be known, see :meth:`resolved`."""
        assert self.attack.epsilon is not None
        step_size = None if self.attack.step_size is None else pixels(self.attack.step_size, "step_size")
        return defenses.Threat(pixels(self.attack.epsilon), self.attack.steps, step_size, self.attack.norm)

    def validation_attack(self, *, stop_early: bool = False) -> PGD:
        """What chooses the best epoch. Epsilon must be known, as for :meth:`threat`."""
        threat = self.threat()
        return PGD(threat.epsilon, self.attack.validation_steps, norm=threat.norm, stop_early=stop_early)

    def make_defense(self) -> defenses.Defense:
        return defenses.create(self.defense.method, self.threat(), **self.method_options)

    def resolved(self, epsilon: str) -> Config:
        """A copy with nothing left to be decided: epsilon, device, precision, threads, the method's defaults.

        Args:
            epsilon: the data set's, as written.
        """
        attack = dataclasses.replace(self.attack, epsilon=self.attack.epsilon or epsilon)
        run = dataclasses.replace(
            self.run,
            device=environment.device(self.run.device),
            threads=self.run.threads or max(1, environment.physical_cores() // processes.on_this_machine()),
        )
        precision = environment.precision(self.optimization.precision, run.device)
        optimization = dataclasses.replace(self.optimization, precision=precision)
        config = dataclasses.replace(self, attack=attack, optimization=optimization, run=run)
        made = config.make_defense()
        options = {name: getattr(made, name) for name in defenses.options(self.defense.method)}
        return dataclasses.replace(config, defense=dataclasses.replace(self.defense, **options))

    def stored(self) -> dict[str, Any]:
        """Option -> value as ``config.yaml`` keeps them: all that decide the result, without other methods' options."""
        values: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            values |= vars(getattr(self, group.name))
        known = ("method", *defenses.options(self.defense.method))
        others = set(vars(self.defense)) - set(known)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in NOT_STORED and name not in others
        }

    def to_yaml(self) -> str:
        run = self.run
        origin = f"# recipe: {run.recipe or 'none'}, preset: {run.preset or 'none'}; their values are among these\n"
        return origin + yaml.safe_dump(self.stored(), sort_keys=False)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """``"name: here, there"`` for each stored option that makes another run of it."""
        mine = self.stored()
        names = [name for name in {**mine, **other} if name not in MAY_DIFFER]
        return [
            f"{name}: {mine.get(name)} here, {other.get(name)} in the run"
            for name in names
            if mine.get(name) != other.get(name)
        ]

    def warnings(self) -> list[str]:
        """What is possible and hardly meant."""
        found, attack, milestones = [], self.attack, self.optimization.milestones
        if attack.step_size is not None and attack.epsilon is not None:
            reach = attack.steps * pixels(attack.step_size)
            if 0 < reach < pixels(attack.epsilon):
                found.append(
                    f"{attack.steps} steps of {attack.step_size} reach {reach:.3g}, not epsilon {attack.epsilon}: "
                    "take more --steps or a larger --step-size (None: epsilon / 4)"
                )
        late = [epoch for epoch in milestones if epoch >= self.optimization.epochs]
        if self.optimization.schedule == "step" and late:
            found.append(
                f"--milestones {' '.join(map(str, late))} lie at or beyond the end of {self.optimization.epochs} "
                "epochs: the learning rate never drops there"
            )
        return found

    def check(self) -> None:
        """Refuse what no run can have.

        Raises:
            ValueError: which option, what it may be and what came.
        """
        optimization, attack, run = self.optimization, self.attack, self.run
        _at_least(1, epochs=optimization.epochs, batch_size=optimization.batch_size, threads=run.threads)
        _at_least(0, steps=attack.steps, momentum=optimization.momentum, weight_decay=optimization.weight_decay)
        _at_least(0, validation_steps=attack.validation_steps, checkpoint_minutes=run.checkpoint_minutes)
        _above_zero(lr=optimization.lr, gamma=optimization.gamma, clip_norm=optimization.clip_norm)
        if not 0 <= attack.epsilon_ramp <= 1:
            raise ValueError(f"--epsilon-ramp must be a share of training from 0 to 1, got {attack.epsilon_ramp}")
        if optimization.ema is not None and not 0 <= optimization.ema < 1:
            raise ValueError(f"--ema must be a decay in [0, 1), e.g. 0.999, got {optimization.ema}")
        if optimization.schedule == "step" and not optimization.milestones:
            raise ValueError("--schedule step needs --milestones, the epochs after which the learning rate drops")
        if optimization.nesterov and (optimization.optimizer != "sgd" or optimization.momentum == 0):
            raise ValueError("--nesterov needs --optimizer sgd and a --momentum above 0")
        if self.speed.compile and self.method_options.get("lambda_gradient") == "full":
            raise ValueError("--lambda-gradient full differentiates twice, which a network under --compile cannot")
        if run.resume and run.overwrite:
            raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of the two")
        if not re.fullmatch(r"[\w][\w.+=-]*", self.run_name):
            raise ValueError(
                f"--run must be a folder name of letters, digits and . _ + = -, got {self.run_name!r}; "
                "--runs-dir says where it is"
            )
        if attack.step_size is not None and pixels(attack.step_size, "--step-size") == 0:
            raise ValueError("--step-size must be above 0 in pixel units, got 0")
        if attack.epsilon is not None:
            pixels(attack.epsilon, "--epsilon")
        elif attack.norm == "l2":
            raise ValueError(L2_NEEDS_EPSILON)
        dataclasses.replace(self, attack=dataclasses.replace(attack, epsilon=attack.epsilon or "0")).make_defense()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _at_least(bound: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= bound:
            raise ValueError(f"{_flag(name)} must be at least {bound}, got {value}")


def _above_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{_flag(name)} must be above 0, got {value}")


# Reading: recipes, presets, config.yaml, the command line


def profiles(kind: Literal["recipe", "preset"]) -> tuple[str, ...]:
    """Names of the settings that come with the package: a recipe names its method, a preset does not."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    return tuple(sorted(name for name, values in files.items() if ("method" in values) == (kind == "recipe")))


def load(path: Path) -> Config:
    """The configuration in a run's ``config.yaml``."""
    values = read_yaml(path)
    return _apply(Config(), values, values.get("method", DEFAULT_METHOD), str(path))


def parse(argv: Sequence[str], prog: str = "dtrades-fast train") -> Config:
    """The configuration that a command line asks for, checked.

    With ``--resume`` the options of the run that is resumed are the defaults.

    Raises:
        ValueError: a recipe, preset, option or value that is not possible.
        SystemExit: with status 2 for an unknown flag or a value of the wrong type, 0 for ``--help``.
    """
    defaults, config = _parse(argv, prog, {})
    stored = config.folder / "config.yaml"
    if config.run.resume and stored.is_file():
        defaults, config = _parse(argv, prog, {str(stored): read_yaml(stored)})
    if config.attack.norm != defaults.attack.norm and not any(word.partition("=")[0] == "--epsilon" for word in argv):
        raise ValueError(L2_NEEDS_EPSILON)
    config.check()
    return config


def _parse(argv: Sequence[str], prog: str, layers: dict[str, dict[str, Any]]) -> tuple[Config, Config]:
    """The options without those of the command line, and with them.

    Args:
        argv: of the command line, like ``prog``.
        layers: values by the name of the file that they come from, the later ones first.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "preset", "method"):
        early.add_argument(f"--{name}")
    given, _ = early.parse_known_args(list(argv))
    layers = dict(layers)
    if given.recipe is not None:
        layers[f"recipe {given.recipe}"] = _profile("recipe", given.recipe)
    if given.preset is not None:
        layers[f"preset {given.preset}"] = _profile("preset", given.preset)
    methods = [values["method"] for values in layers.values() if "method" in values]
    method = given.method or (methods[-1] if methods else DEFAULT_METHOD)
    config = Config()
    for source, values in layers.items():
        config = _apply(config, values, method, source)
    config.defense.method = method
    return config, _cli(config, argv, prog)


def _profile(kind: Literal["recipe", "preset"], name: str) -> dict[str, Any]:
    """Values of a recipe or preset, by name or, with a suffix .yaml, from a file."""
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name).expanduser())
    elif name in profiles(kind):
        values = read_yaml(RECIPES / f"{name}.yaml")
    else:
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(profiles(kind))}, or give a FILE.yaml")
    if kind == "recipe" and "method" not in values:
        raise ValueError(f"{name} is no recipe, because it names no method: give it as --preset")
    if kind == "preset" and "method" in values:
        raise ValueError(f"{name} is no preset, because it names a method: give it as --recipe")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: there is no such file, or something else is in it.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected is a YAML file of options")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map option names to values, e.g. 'lr: 0.1', got {type(values).__name__}")
    return values


def _apply(config: Config, values: Mapping[str, Any], method: str, source: str) -> Config:
    """``config`` with the values of a file for ``method``.

    ``methods: {NAME: {...}}`` holds values for single methods. Options of the method a recipe is for do not apply to
    another one.
    """
    plain = {name: value for name, value in values.items() if name != "methods"}
    if plain.get("method", method) != method:
        plain = {name: value for name, value in plain.items() if name not in vars(Defense())}
    sections = values.get("methods", {})
    if strange := [name for name in sections if name not in defenses.names()]:
        raise ValueError(f"{source}: unknown method {strange[0]!r}; known are {', '.join(defenses.names())}")
    plain |= sections.get(method, {})
    known = set(option_names()) - set(NOT_STORED)
    given = [name for part in (values, *sections.values()) for name in part if name != "methods"]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{source} has unknown options {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    made = _cli(config, words(plain), source)
    if made.attack.norm != config.attack.norm and config.attack.epsilon is not None and "epsilon" not in plain:
        raise ValueError(f"{source}: {L2_NEEDS_EPSILON}")
    return made


def option_names() -> list[str]:
    """All options of training, with underscores."""
    return [name for group in dataclasses.fields(Config) for name in vars(getattr(Config(), group.name))]


def words(values: Mapping[str, Any]) -> list[str]:
    """Options as they would be given on the command line, so that one parser checks their types."""
    return [word for name, value in values.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool) and name not in vars(Defense()):  # whose options may also be None
        return [_flag(name) if value else _flag(f"no_{name}")]
    if isinstance(value, (list, tuple)):
        return [_flag(name), *map(str, value)]
    return [_flag(name), str(value)]


def _cli(default: Config, argv: Sequence[str], prog: str) -> Config:
    return tyro.cli(Config, args=list(argv), default=default, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
