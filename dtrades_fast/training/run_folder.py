"""The folder of a run: everything after training reads only this."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from dtrades_fast.config import Config
from dtrades_fast.training import checkpoint

__all__ = ["RunFolder"]

LOCK = ".lock"


class RunFolder:
    """``runs/NAME/``: config.yaml, env.json, metrics.jsonl, checkpoints, weights, plots, exports and a TensorBoard log;
    in a study what it knows of the run.

    At the end of an epoch the files are written in this order: the metrics line, best.pt and model-best.safetensors,
    model.safetensors, last.pt. A run goes on from last.pt alone, so that wherever it is killed, what is newer than
    last.pt is written again with the same content.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.env = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.weights = path / "model.safetensors"
        self.best_weights = path / "model-best.safetensors"
        self.plots = path / "plots"
        self.export = path / "export"
        self.evaluation = path / "eval.json"
        self.evaluation_state = path / "eval-state"
        self.tensorboard = path / "tensorboard"
        self.cell = path / "cell.json"  # of a study, like the next three: what was asked for, and how it ended
        self.beat = path / "cell.beat"  # sign of life of the process that works here
        self.log = path / "cell.log"
        self.cell_lock = path / "cell.lock"

    def weights_of(self, epoch: Literal["best", "last"]) -> Path:
        """File of the weights of the best epoch by validation, or of the last one."""
        return self.best_weights if epoch == "best" else self.weights

    def check(self, config: Config) -> None:
        """Refuse a folder that this run must not write into. Changes nothing.

        Raises:
            ValueError: it exists, or belongs to something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not self._names()):
            return
        if not self.config.is_file():
            if config.run.resume and self.path.is_dir() and not self._strange():
                return  # killed before its first file was complete
            raise ValueError(f"{self.path} exists and is no run folder (no config.yaml): choose another --run")
        if not (config.run.resume or config.run.overwrite):
            raise ValueError(
                f"run {self.path} exists: go on with it (--resume), delete it and start again (--overwrite) "
                "or choose another --run"
            )
        if config.run.overwrite and (strange := self._strange()):
            raise ValueError(
                f"--overwrite deletes run folders only, but {self.path} also holds {', '.join(strange)}: "
                "move that away or choose another --run"
            )

    def _strange(self) -> list[str]:
        """Names in the folder that no run writes."""
        own = {path.name for path in vars(self).values()}
        return [name for name in self._names() if name not in own and not name.endswith(".tmp")]

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if path.name != LOCK)

    def open(self, config: Config, env: dict[str, Any]) -> bool:
        """Make the folder, which is checked and locked, ready; True if there is a checkpoint to go on from.

        Raises:
            ValueError: the run in the folder has another configuration or other data.
        """
        checkpoint.remove_leftovers(self.path)
        if config.run.overwrite:
            for path in (self.path / name for name in self._names()):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if config.run.resume and self.config.is_file():
            if differences := config.differences(yaml.safe_load(self.config.read_text())):
                raise ValueError(
                    f"run {self.path} was started with other options ({'; '.join(differences)}): "
                    "leave them out to resume it, or choose another --run"
                )
        else:
            checkpoint.write_text(self.config, config.to_yaml())
        self._note_environment(env)
        return self.last.is_file()

    def _note_environment(self, env: dict[str, Any]) -> None:
        """Write env.json; on resume, add what changed."""
        if self.env.is_file():
            first = json.loads(self.env.read_text())
            if first["data"] != env["data"]:
                raise ValueError(
                    f"the data set differs from the one that run {self.path} was started with "
                    f"({env['data']} here, {first['data']} in {self.env.name}): give it the same images with "
                    "--data-root, or choose another --run"
                )
            changed = {name: value for name, value in env.items() if first.get(name) != value}
            env = {**first, "resumed": [*first.get("resumed", []), changed]}
        checkpoint.write_text(self.env, json.dumps(env, indent=2) + "\n")

    @contextmanager
    def locked(self, lock: Path | None = None) -> Iterator[None]:
        """Only one process may train into the folder; the lock goes with the process, however it ends.

        Args:
            lock: the file that is locked; by default that of training.

        Raises:
            RuntimeError: another process has the lock.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (lock or self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process is training run {self.path}: wait for it or stop it") from error
            yield

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, none if there is no such file.

        A last line without its end is left out: it is being written, or who wrote it was killed.

        Raises:
            RuntimeError: a line is damaged.
        """
        text = self.metrics.read_text() if self.metrics.is_file() else ""
        lines = text.splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise RuntimeError(
                f"{self.metrics} is damaged ({error}): if it is the last line, --resume writes it again"
            ) from error

    def cut_metrics(self, lines: int) -> None:
        """Forget the epochs after the checkpoint that training goes on from.

        Raises:
            RuntimeError: there are fewer lines than the checkpoint has seen epochs.
        """
        there = self.metrics.read_text().splitlines(keepends=True) if self.metrics.is_file() else []
        if len(there) < lines:
            raise RuntimeError(
                f"{self.metrics} has {len(there)} lines, but {self.last.name} was saved after {lines} epochs: "
                "put the file back, or start again with --overwrite"
            )
        checkpoint.write_text(self.metrics, "".join(there[:lines]))
