"""What is evaluated: a run, a file of weights, or a network in Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dtrades_fast import config as configuration
from dtrades_fast import data
from dtrades_fast.config import Config
from dtrades_fast.models.normalize import Classifier
from dtrades_fast.models.recognise import Shortcut, recognise
from dtrades_fast.models.weights import read_state
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import create_model

__all__ = ["Target", "TrainedRun", "find_run", "load_run", "load_target"]

Epoch = Literal["best", "last"]

#: What files of weights end in, and what torch files keep the state dict under: RobustBench and most others, this
#: package and timm, tutorials, MAIR, pytorch-cifar.
SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")
CONTAINERS = ("state_dict", "model", "model_state_dict", "rmodel", "net")


# Runs


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


def load_run(folder: RunFolder, epoch: Epoch, data_root: str | None, device: str, limit: int | None) -> TrainedRun:
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
    weights_file = folder.weights_of(epoch)
    weights = checkpoint.load_weights(weights_file)
    sets = data.load(config.data.dataset, data_root or config.data.data_root, device, limit=limit)
    model = create_model(config, sets.info).to(device)
    model.load_state_dict(weights)
    return TrainedRun(config, model.eval(), sets, weights_file)


# Any target


@dataclass(frozen=True)
class Target:
    """A network to evaluate, and what is known of it.

    Attributes:
        model: images in [0, 1], [N, C, H, W], to logits [N, classes]; in eval mode.
        name: the run's, the file's or the one given.
        arch: architecture, e.g. ``resnet18``; the class of a network in Python.
        classes: number of logits; None for a network in Python whose head is not that of a known one.
        source: in words, what it is and where from.
        sha256: of the file of weights; for a network in Python of its parameters and buffers.
        notes: what was recognised, assumed and left out, a sentence each.
        dataset: the data set it belongs to, as far as it is known.
        epsilon: radius it was trained for in pixel units, as written; None for files and networks in Python.
        config: of the run.
        folder: of the run.
    """

    model: nn.Module
    name: str
    arch: str
    classes: int | None
    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    dataset: str | None = None
    epsilon: str | None = None
    config: Config | None = None
    folder: RunFolder | None = None


def load_target(
    spec: str | Path | nn.Module,
    *,
    arch: str | None = None,
    dataset: str | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preact_shortcut: Shortcut | None = None,
    epoch: Epoch = "best",
    runs_dir: str | Path = "runs",
    name: str | None = None,
    device: torch.device | str = "cpu",
) -> Target:
    """The network that ``spec`` names.

    It may be a run (its folder, or its name in ``runs_dir``), a file of weights or an ``nn.Module``. Files are this
    package's own or torch files of others: RobustBench, MAIR, and the published checkpoints of TRADES, MART, RST and
    those who took over their networks. Architecture, width, classes, channels and normalisation are recognised, see
    :func:`dtrades_fast.models.recognise.recognise`; :attr:`Target.notes` says how. No code of a file is run.

    Args:
        spec: what to load.
        arch: of a file: one of :func:`dtrades_fast.models.names`, where it shall not be guessed.
        dataset: the data set that it belongs to; a run's own if None.
        width: of a file: channels of the first stage.
        mean: of a file: what its network wants subtracted from images in [0, 1]; by default what it holds, if any.
        std: of a file: what its network wants them divided by then.
        preact_shortcut: of a file with a pre-activation ResNet: what its 1x1 shortcuts see; ``"activated"`` if None.
        epoch: of a run: the epoch whose weights to take, the best one by validation or the last one.
        runs_dir: where names of runs are looked for.
        name: for tables; by default the run's, the file's or the module's class.
        device: where the network is put.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no weights yet.
        ValueError: the file is damaged, holds code, or fits no known architecture; an option that is not possible.
        RuntimeError: the run's weights are damaged.
    """
    options = {"arch": arch, "width": width, "mean": mean, "std": std, "preact_shortcut": preact_shortcut}
    given = [option for option, value in options.items() if value is not None]
    if isinstance(spec, nn.Module):
        _refuse(given, "a network in Python")
        return _of_module(spec.to(device), name, dataset)
    path = Path(spec).expanduser()
    if path.is_file():
        found = recognise(
            read_state(path, CONTAINERS),
            str(path),
            arch=arch,
            width=width,
            mean=mean,
            std=std,
            preact_shortcut=preact_shortcut or "activated",
        )
        return Target(
            model=found.model.to(device),
            name=name or path.name.removesuffix(path.suffix),
            arch=found.arch,
            classes=found.classes,
            source=f"{found.arch} in {path}",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            notes=found.notes,
            dataset=dataset,
        )
    if path.suffix in SUFFIXES and not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give a file of weights, a run folder or a run's name")
    folder = find_run(str(spec), str(runs_dir))
    _refuse(given, f"run {folder.path}, whose config.yaml says what it is")
    return _of_run(folder, epoch, name, dataset, device)


def _refuse(options: Sequence[str], what: str) -> None:
    if options:
        raise ValueError(f"{', '.join(options)} describe a file of weights and cannot be given for {what}")


def _of_run(
    folder: RunFolder, epoch: Epoch, name: str | None, dataset: str | None, device: torch.device | str
) -> Target:
    """A run's network from its folder alone: what the data set decided, its tensors tell."""
    config = configuration.load(folder.config)
    file = folder.weights_of(epoch)
    found = recognise(checkpoint.load_weights(file), str(file), arch=config.model.arch, width=config.model.width)
    return Target(
        model=found.model.to(device),
        name=name or folder.path.resolve().name,
        arch=found.arch,
        classes=found.classes,
        source=f"{found.arch} of run {folder.path}, {epoch} epoch",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        notes=found.notes,
        dataset=dataset or config.data.dataset,
        epsilon=config.attack.epsilon,
        config=config,
        folder=folder,
    )


def _of_module(model: nn.Module, name: str | None, dataset: str | None) -> Target:
    """A network in Python, which is put in eval mode."""
    kind = type(model.network if isinstance(model, Classifier) else model).__name__
    return Target(
        model=model.eval(),
        name=name or kind,
        arch=kind,
        classes=model.head.out_features if isinstance(model, Classifier) else None,
        source=f"{kind} given from Python",
        sha256=fingerprint(model),
        dataset=dataset,
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all names, dtypes, shapes and bits of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
