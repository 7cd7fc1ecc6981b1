"""One cell of a study: running it, and how far it is."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dtrades_fast import config
from dtrades_fast.evaluation import evaluate
from dtrades_fast.evaluation.record import stored
from dtrades_fast.study.grid import Cell
from dtrades_fast.training import trainer
from dtrades_fast.training.checkpoint import load_state, write_text
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["BusyError", "Epochs", "Machine", "State", "can_go_on", "epochs", "is_trained", "look", "reopen", "run"]

VERSION = 1  #: of cell.json
BEAT_SECONDS = 10.0  #: between signs of life
DEAD_SECONDS = 60.0  #: after the last one
Status = Literal["waiting", "running", "done", "failed"]


class BusyError(RuntimeError):
    """Another process is at the cell."""


@dataclass(frozen=True)
class Machine:
    """Where a cell runs: options of training and evaluation that change no result, or are the machine's."""

    device: str = "auto"
    threads: int | None = None
    data_root: str | None = None

    @property
    def words(self) -> list[str]:
        given = {"--device": self.device, "--threads": self.threads, "--data-root": self.data_root}
        return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


@dataclass(frozen=True)
class State:
    """How far a cell is.

    Attributes:
        status: ``waiting`` also for one that was killed and will go on.
        stage: what it does, or why it failed.
        epoch: of training, done.
        epochs: of training, in all.
        validation: NA and RA after the last epoch, as shares.
        seconds: spent on training so far.
    """

    status: Status
    stage: str = ""
    epoch: int = 0
    epochs: int = 0
    validation: tuple[float, float] | None = None
    seconds: float = 0.0


def run(cell: Cell, runs_dir: Path, machine: Machine) -> None:
    """Train and evaluate the cell, or go on where it was left; evaluations that need untrained cells are left out.

    Raises:
        ValueError: an option that is not possible, or the folder has a cell of other options.
        BusyError: another process is at it.
        Interrupted: a signal came; what is done is saved.
        Exception: whatever training or evaluation raise; ``cell.json`` says so.
    """
    check(cell, runs_dir)
    folder = RunFolder(runs_dir / cell.name)
    with ExitStack() as held:
        try:
            held.enter_context(folder.locked(folder.cell_lock))
        except RuntimeError as error:
            raise BusyError(str(error)) from error
        _go_on(cell, runs_dir, folder, machine)


def _go_on(cell: Cell, runs_dir: Path, folder: RunFolder, machine: Machine) -> None:
    record = Record(cell, folder)
    try:
        with _beating(folder) as beat:
            if not (folder.weights.is_file() and folder.best_weights.is_file()):
                record.note_untrained()
            if not record.trained:
                beat("training")
                if not folder.last.is_file() or _best_is_lost(folder):  # it begins anew, perhaps elsewhere
                    folder.last.unlink(missing_ok=True)
                    folder.env.unlink(missing_ok=True)
                trainer.train(cell.config(runs_dir, "--resume", *machine.words))
                record.note_trained()
            while (options := _next_evaluation(cell, runs_dir, record.evaluated)) is not None:
                beat(f"evaluation {len(record.evaluated) + 1} of {len(cell.evaluations)}")
                began = time.monotonic()
                evaluate.main([*evaluation_words(cell, runs_dir, options), "--resume", *machine.words], "evaluate")
                record.note("begun", options, time.monotonic() - began)
    except trainer.Interrupted:
        raise
    except (Exception, SystemExit) as error:
        record.note("failed", error=str(error) or type(error).__name__)
        raise
    if not _missing(cell, record.evaluated):
        record.note("done")


def _best_is_lost(folder: RunFolder) -> bool:
    """Whether there was a best epoch and nothing has its weights, so that going on could not make them."""
    if folder.best.is_file() or folder.best_weights.is_file():
        return False
    return load_state(folder.last)["best"] is not None


class Record:
    """``cell.json`` of a cell that is run: what was asked for, what is done, and how it ended."""

    def __init__(self, cell: Cell, folder: RunFolder):
        self.cell, self.folder = cell, folder
        kept = _kept(folder)
        self.trained = bool(kept.get("trained"))
        self.evaluated: list[Any] = kept.get("evaluated", [])
        self.seconds = float(kept.get("seconds", {}).get("evaluation", 0.0))  # of evaluations
        self.note("begun")

    def note_untrained(self) -> None:
        """Write that its weights are still to come, before the first of them are there."""
        self.trained = False
        self.note("begun")

    def note_trained(self) -> None:
        """Write that training is done; evaluations of other weights, from before it was trained again, do not count."""
        for record in stored(self.folder.evaluation):
            weights = self.folder.weights_of(record["checkpoint"]).read_bytes()
            if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
                self.evaluated = []
        self.trained = True
        self.note("begun")

    def note(
        self,
        status: Literal["begun", "failed", "done"],
        evaluated: Any = None,
        seconds: float = 0.0,
        *,
        error: str | None = None,
    ) -> None:
        """Write how it is, with what was done just now."""
        self.evaluated += [evaluated] if evaluated is not None else []
        self.seconds += seconds
        content = {
            "version": VERSION,
            "status": status,
            "place": self.cell.place,
            "asked": self.cell.asked(),
            "trained": self.trained,
            "evaluated": self.evaluated,
            "seconds": {"training": epochs(self.folder).seconds, "evaluation": self.seconds},
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if status == "done" else None,
            "error": error,
        }
        write_text(self.folder.cell, json.dumps(content, indent=1) + "\n")


def evaluation_words(cell: Cell, runs_dir: Path, options: Mapping[str, Any]) -> list[str]:
    """Of ``dtrades-fast evaluate``."""
    own = {name: value for name, value in options.items() if name != "surrogates"}
    others = options.get("surrogates", ())
    return [cell.name, "--runs-dir", str(runs_dir), *config.words(own), *(["--surrogates", *others] if others else [])]


def can_go_on(cell: Cell, runs_dir: Path) -> bool:
    """Whether there is something to do for it that waits for no other cell."""
    if not is_trained(cell.name, runs_dir):
        return cell.start is None or is_trained(cell.start, runs_dir)
    return _next_evaluation(cell, runs_dir, _kept(RunFolder(runs_dir / cell.name))["evaluated"]) is not None


def reopen(cells: Sequence[Cell], runs_dir: Path) -> list[str]:
    """Have the trained cells among them trained again whose weights are gone and whose weights others wait for.

    Their evaluations stay valid if the same weights come out, as they do on the same kind of machine.

    Returns:
        Their names.
    """
    by_name, again = {cell.name: cell for cell in cells}, list[str]()
    todo = [cell for cell in cells if look(cell, runs_dir).status != "done"]
    while todo:
        for name in _weights_needed(todo.pop(0), runs_dir):
            folder = RunFolder(runs_dir / name)
            state = _kept(folder)
            if name in by_name and name not in again and state.get("trained") and not folder.best_weights.is_file():
                write_text(folder.cell, json.dumps({**state, "status": "begun", "trained": False}, indent=1) + "\n")
                again.append(name)
                todo.append(by_name[name])
    return again


def _weights_needed(cell: Cell, runs_dir: Path) -> list[str]:
    """Names of the cells whose weights it will need to its end."""
    evaluated = _kept(RunFolder(runs_dir / cell.name)).get("evaluated", ())
    start = [cell.start] if cell.start is not None and not is_trained(cell.name, runs_dir) else []
    return [*start, *(name for options in _missing(cell, evaluated) for name in options.get("surrogates", ()))]


def _next_evaluation(cell: Cell, runs_dir: Path, evaluated: Sequence[Any]) -> Any:
    """The first one that is missing and has its surrogates, or None."""
    for options in _missing(cell, evaluated):
        if all(is_trained(name, runs_dir) for name in options.get("surrogates", ())):
            return options
    return None


def is_trained(name: str, runs_dir: Path) -> bool:
    """Whether the cell of that name is trained and its weights are there."""
    folder = RunFolder(runs_dir / name)
    return bool(_kept(folder).get("trained")) and folder.best_weights.is_file()


@dataclass(frozen=True)
class Epochs:
    """Of ``metrics.jsonl``: how many, their seconds, and NA and RA of validation after the last one."""

    count: int = 0
    seconds: float = 0.0
    validation: tuple[float, float] | None = None


def epochs(folder: RunFolder) -> Epochs:
    """What is trained so far.

    Raises:
        RuntimeError: ``metrics.jsonl`` is damaged.
    """
    if not folder.metrics.is_file():
        return Epochs()
    status = folder.metrics.stat()
    return _epochs_read(folder.path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _epochs_read(path: Path, mtime_ns: int, size: int) -> Epochs:
    """Read once per state of the file: a study looks at all its cells every few seconds."""
    lines = RunFolder(path).read_metrics()
    if not lines:
        return Epochs()
    last = lines[-1]["validation"]
    return Epochs(len(lines), float(sum(line["seconds"] for line in lines)), (last["na"], last["ra"]))


def look(cell: Cell, runs_dir: Path) -> State:
    """How far it is, from its folder alone.

    Raises:
        ValueError: the folder has a cell of other options.
    """
    folder = RunFolder(runs_dir / cell.name)
    state = _kept(folder)
    check(cell, runs_dir)
    try:
        found = epochs(folder)
    except RuntimeError as error:  # one damaged cell stops no other
        return State("failed", str(error), epochs=cell.epochs)
    about: dict[str, Any] = {
        "epoch": found.count,
        "epochs": cell.epochs,
        "validation": found.validation,
        "seconds": found.seconds,
    }
    if (stage := _alive(folder)) is not None:
        return State("running", stage, **about)
    if state.get("trained") and not _missing(cell, state["evaluated"]):
        return State("done", **about)
    if state.get("status") == "failed":
        return State("failed", state["error"], **about)
    return State("waiting", "was stopped" if state else "", **about)


def check(cell: Cell, runs_dir: Path) -> None:
    """Refuse a folder of that name with a training of other options."""
    state = _kept(RunFolder(runs_dir / cell.name))
    if not state:
        return
    asked, there = cell.asked(), state["asked"]
    names = [name for name in {**asked["options"], **there["options"]} if name]
    differences = [
        f"{name}: {asked['options'].get(name)} here, {there['options'].get(name)} there"
        for name in names
        if asked["options"].get(name) != there["options"].get(name)
    ]
    if asked["start"] != there["start"]:
        differences.append(f"start: {asked['start']} here, {there['start']} there")
    if differences:
        raise ValueError(
            f"{runs_dir / cell.name} was trained with other options than the study asks for now "
            f"({'; '.join(differences)}): choose another --runs-dir, or move that folder away"
        )
    folder, missing = RunFolder(runs_dir / cell.name), _missing(cell, state["evaluated"])
    weights = folder.best_weights
    if state["status"] == "done" and missing and not (weights.is_file() or folder.best.is_file()):
        raise ValueError(
            f"{runs_dir / cell.name} is finished but for the evaluation {missing[0]}, which needs its weights, and "
            f"{weights.name} is not there: put it there, or move the folder away to train again"
        )


def _missing(cell: Cell, evaluated: Sequence[Any]) -> list[Any]:
    """Evaluations that are asked for and not done."""
    return [options for options in cell.asked()["evaluations"] if options not in evaluated]


def _kept(folder: RunFolder) -> dict[str, Any]:
    """``cell.json``, empty if there is none.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    if not folder.cell.is_file():
        return {}
    try:
        state = json.loads(folder.cell.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder.cell} is damaged ({error}): move {folder.path} away") from error
    if state.get("version") != VERSION:
        raise ValueError(f"{folder.cell} has version {state.get('version')}, this package reads {VERSION}")
    return dict(state)


@contextmanager
def _beating(folder: RunFolder) -> Iterator[Any]:
    """A sign of life in the folder while inside; gives a function that says what is done now."""
    stage, ended, writing = [""], threading.Event(), threading.Lock()

    def write() -> None:
        with writing, suppress(OSError):  # one that is missed ends nothing
            write_text(folder.beat, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "stage": stage[0]}))

    def keep() -> None:
        while not ended.wait(BEAT_SECONDS):
            write()

    def say(what: str) -> None:
        stage[0] = what
        write()

    say("beginning")
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield say
    finally:
        ended.set()
        thread.join()
        folder.beat.unlink(missing_ok=True)


def _alive(folder: RunFolder) -> str | None:
    """What a process that works in the folder does now; None if there is none."""
    try:
        age = time.time() - folder.beat.stat().st_mtime
        beat = json.loads(folder.beat.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if age > DEAD_SECONDS or (beat["host"] == socket.gethostname() and not _runs(beat["pid"])):
        return None
    return str(beat["stage"])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
