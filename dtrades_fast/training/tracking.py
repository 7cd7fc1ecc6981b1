"""Where an epoch's figures go beside ``metrics.jsonl``, which is always written and from which all can be redone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

__all__ = ["TensorBoard", "Tracker", "create", "scalars"]


class Tracker:
    """Is shown each line of ``metrics.jsonl``; this one does nothing with it."""

    def start(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Begin, with the lines of the epochs that training goes on from; whatever else was tracked is forgotten."""

    def add(self, line: Mapping[str, Any]) -> None:
        """An epoch has ended."""

    def close(self) -> None:
        """No line follows."""


class TensorBoard(Tracker):
    """Scalars by epoch for ``tensorboard --logdir``.

    Args:
        folder: of the log, which is deleted at the start.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "--track tensorboard needs the package tensorboard: pip install 'dtrades_fast[track]'"
            ) from error
        self.folder, self._writer_class = folder, SummaryWriter
        self._writer: Any = None

    def start(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        # Tells a TensorBoard that has the old log open to forget it.
        self._writer = self._writer_class(str(self.folder), purge_step=0)
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def create(kind: Literal["none", "tensorboard"], folder: Path) -> Tracker:
    """The tracker that ``--track`` names.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    return TensorBoard(folder) if kind == "tensorboard" else Tracker()


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line by their path, e.g. ``validation/na``, ``train/loss/std``; lists are left out.

    The mean over an epoch of training has the name of its quantity, ``train/loss``. The epoch is the step of all.
    """
    for name, value in line.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{path}/")
        elif isinstance(value, (int, float)) and path != "epoch":
            yield path.removesuffix("/mean") if path.startswith("train/") else path, value
