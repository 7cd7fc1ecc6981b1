"""``dtrades-fast study`` and ``status``: a grid of runs, from a file to finished cells."""

from __future__ import annotations

import fnmatch
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from dtrades_fast.config import option
from dtrades_fast.study import cell as cells
from dtrades_fast.study.cell import Machine, State
from dtrades_fast.study.executors import Executor, Job, Local, Ray, Slurm
from dtrades_fast.study.grid import Cell, Study, read
from dtrades_fast.training.progress import duration
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Interrupted

__all__ = ["Options", "drive", "main", "status_main"]

LOOK_SECONDS = 2.0  #: between looks at the folders
NO_LIMIT = 1_000_000  #: of jobs under way on a cluster
FILE_WIDTH = 132  #: characters of the table where the output is not a terminal
TAIL = 3  #: lines of a failed cell's log that are shown
BUSY = 75  #: exit status where another process is at a cell: EX_TEMPFAIL of sysexits.h
MARKS = {
    "waiting": "[dim]waiting[/]",
    "running": "[cyan]running[/]",
    "done": "[green]done[/]",
    "failed": "[red]failed[/]",
}


@dataclass
class Where:
    """The study and its runs."""

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY.yaml")]
    """The study's file."""
    runs_dir: Annotated[Path | None, option("DIR", "Folder of the study's runs.", "runs/NAME of the file")] = None

    @property
    def runs(self) -> Path:
        return self.runs_dir or Path("runs") / self.study.stem


@dataclass
class Options(Where):
    """Train and evaluate a grid of runs. What is finished is skipped, what was killed goes on, what failed is tried
    again."""

    cells: tuple[str, ...] = ()
    """Only the cells of these names or patterns (``'cifar10-*'``), and, unless inline, those that they need."""
    executor: Literal["local", "slurm", "ray", "inline"] = "local"
    """Where cells run: processes of this machine, Slurm, a Ray cluster, or one after the other in this process."""
    jobs: Annotated[
        int | None,
        option("INT", "Cells at a time.", "one per GPU, else one per core with 4 GiB of memory; clusters: no limit"),
    ] = None
    threads: Annotated[int | None, option("INT", "CPU threads of each.", "the machine's CPUs / --jobs")] = None
    device: str = "auto"
    """Device: auto (cuda if there is one), cpu or cuda."""
    data_root: Annotated[str | None, option("STR", "Folder of the data sets.", "data")] = None
    resources: tuple[str, ...] = ()
    """For a cluster, NAME=VALUE: parameters of submitit (timeout_min=600 slurm_partition=gpu gpus_per_node=1) or of a
    Ray task (num_gpus=1 num_cpus=8)."""
    print_commands: bool = False
    """Print one command per unfinished cell for a scheduler of your own, and run nothing."""


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``study``."""
    options = tyro.cli(Options, args=list(argv), prog=prog)
    study = read(options.study)
    chosen = chosen_cells(study, options.cells, needed=options.executor != "inline")
    for name in cells.reopen(chosen, options.runs):
        print(f"{name} is opened again: others need its weights, which are not there", file=sys.stderr)
    unfinished = [cell for cell in chosen if cells.look(cell, options.runs).status != "done"]
    if options.print_commands:
        for cell in unfinished:
            print(shlex.join(command(options, cell)))
        return 0
    if options.executor == "inline":
        return run_here(unfinished, options)
    console = Console()
    executor = make_executor(options)
    try:
        failed = drive(study, chosen, options, executor, console)
    finally:
        executor.close()
    for name, why in failed.items():
        console.print(f"failed: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        console.print(
            f"{len(failed)} of {len(chosen)} cells failed; the same command tries them again", highlight=False
        )
        return 1
    next_command = shlex.join(["dtrades-fast", "report", str(options.study), "--runs-dir", str(options.runs)])
    console.print(f"all {len(chosen)} cells are finished; next: {next_command}", highlight=False, soft_wrap=True)
    return 0


def run_here(unfinished: Sequence[Cell], options: Options) -> int:
    """Run cells one after the other in this process; the first failure is raised."""
    machine, busy = Machine(options.device, options.threads, options.data_root), set[str]()
    while ready := [c for c in unfinished if c.name not in busy and cells.can_go_on(c, options.runs)]:
        for cell in ready:
            try:
                cells.run(cell, options.runs, machine)
            except cells.BusyError as error:
                print(error, file=sys.stderr)
                busy.add(cell.name)
    if busy:
        return BUSY
    waiting = [cell for cell in unfinished if cells.look(cell, options.runs).status != "done"]
    for cell in waiting:
        print(f"{cell.name} waits for {', '.join(cell.needs)} to be trained; run it again then")
    return 0


def status_main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``status``."""
    where = tyro.cli(Where, args=list(argv), prog=prog, description="How far the cells of a study are.")
    study = read(where.study)
    states = {cell.name: cells.look(cell, where.runs) for cell in study.cells}
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table(study, states, everything=True))
    return 0


def chosen_cells(study: Study, names: Sequence[str], *, needed: bool) -> list[Cell]:
    """All cells, or those named, with what they need if that is asked for."""
    if not names:
        return list(study.cells)
    wanted, todo = set[str](), [found for name in names for found in matching(study, name)]
    while todo:
        cell = study[todo.pop()]
        if cell.name not in wanted:
            wanted.add(cell.name)
            todo += cell.needs if needed else []
    return [cell for cell in study.cells if cell.name in wanted]


def matching(study: Study, pattern: str) -> list[str]:
    """Names of the cells that a name or pattern is for."""
    found = [cell.name for cell in study.cells if fnmatch.fnmatchcase(cell.name, pattern)]
    return found or [study[pattern].name]  # which says what there is


def command(options: Options, cell: Cell, threads: int | None = None) -> list[str]:
    """Runs one cell, whatever executes it."""
    words = [*this_package(), "study", str(options.study), "--runs-dir", str(options.runs)]
    words += ["--executor", "inline", "--cells", cell.name]
    return [*words, *Machine(options.device, options.threads or threads, options.data_root).words]


def this_package() -> list[str]:
    """What starts the package that runs here, and not one that lies in the working directory: in a checkout, ``python
    -m`` would take its sources, of which ``pip install .`` compiles nothing in place."""
    if Path(__file__).parents[2].resolve() == Path.cwd().resolve():
        return [sys.executable, "-m", "dtrades_fast"]
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", "dtrades_fast"]
    return [sys.executable, "-c", "import sys; sys.path.pop(0); from dtrades_fast.cli import main; sys.exit(main())"]


def make_executor(options: Options) -> Executor:
    """The executor asked for.

    Raises:
        ValueError: a resource without a value, or an executor that takes none.
        ModuleNotFoundError: its package is not installed.
    """
    if options.resources and options.executor == "local":
        raise ValueError("--resources are for clusters: --executor slurm or ray")
    if wrong := [word for word in options.resources if "=" not in word]:
        raise ValueError(f"--resources must be NAME=VALUE, got {', '.join(wrong)}")
    parameters = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in options.resources)}
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if options.executor == "local":
        import torch

        gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
        return Local(options.jobs, options.threads, gpus)
    if options.executor == "slurm":
        return Slurm(options.runs / ".submitit", parameters, options.jobs or NO_LIMIT)
    return Ray(parameters, options.jobs or NO_LIMIT)


# ---- driving ---------------------------------------------------------------------------------------------------------


def drive(
    study: Study, chosen: Sequence[Cell], options: Options, executor: Executor, console: Console
) -> dict[str, str]:
    """Run the cells that are not finished; a failed one does not stop the others.

    Returns:
        Why cells failed, by name.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the cells under way have saved their state.
    """
    grid = Drive(study, chosen, options, executor)
    with Stop() as stop, View(console, study) as view:
        more = True
        while more:
            more = grid.step()
            view.update(grid.states)
            if more and stop.wait(LOOK_SECONDS):
                grid.stop()
                raise Interrupted(
                    stop.signum, f"stopped by {signal.Signals(stop.signum).name}; the same command goes on"
                )
    return grid.failed


@dataclass
class Drive:
    """What is under way.

    Attributes:
        jobs: by the name of their cell.
        trained: of the cells that each job's cell needs, those that were trained when the job was started.
        failed: why cells failed, by name.
        busy: when another process was found at a cell, by its name.
    """

    study: Study
    chosen: Sequence[Cell]
    options: Options
    executor: Executor
    jobs: dict[str, Job] = field(default_factory=dict)
    trained: dict[str, set[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)

    def step(self) -> bool:
        """Look after what runs, start what can start; whether there is more to wait for."""
        for name, job in list(self.jobs.items()):
            if (status := job.poll()) is not None:
                del self.jobs[name]
                self._ended(self.study[name], status)
        self.states = {cell.name: self._look(cell) for cell in self.chosen}
        open_cells = [cell for cell in self.chosen if self._is_open(cell)]
        for cell in open_cells:
            if self._is_ready(cell) and len(self.jobs) < self.executor.jobs:
                threads = self.executor.threads if isinstance(self.executor, Local) else None
                words = command(self.options, cell, threads)
                self.trained[cell.name] = self._trained_needs(cell)
                self.jobs[cell.name] = self.executor.start(cell.name, words, self._log(cell))
        elsewhere = any(state.status == "running" or self._is_busy(name) for name, state in self.states.items())
        if not self.jobs and not elsewhere:
            self._give_up(open_cells)
        return bool(self.jobs or open_cells)

    def stop(self) -> None:
        """Ask all jobs to save their state, and wait until they have ended."""
        for job in self.jobs.values():
            job.stop()
        while any(job.poll() is None for job in self.jobs.values()):
            time.sleep(0.1)

    def _look(self, cell: Cell) -> State:
        state = cells.look(cell, self.options.runs)
        if cell.name in self.failed:
            return State("failed", self.failed[cell.name], state.epoch, state.epochs, state.validation, state.seconds)
        if cell.name in self.jobs and state.status != "running":
            stage = "begins" if state.status != "done" else "ends"
            return State("running", stage, state.epoch, state.epochs, state.validation, state.seconds)
        return state

    def _is_open(self, cell: Cell) -> bool:
        """Whether it is still to end, here or in a process that somebody else started."""
        if cell.name in self.failed or self.states[cell.name].status == "done":
            return False
        if self.states[cell.name].status == "running" or cells.can_go_on(cell, self.options.runs):
            return True
        missing = set(cell.needs) - self._trained_needs(cell)
        if lost := [name for name in cell.needs if name in missing & set(self.failed)]:
            self.failed[cell.name] = f"it needs {', '.join(lost)}, which failed"
        return not lost

    def _is_ready(self, cell: Cell) -> bool:
        """Whether it can be started; one that failed in an earlier call is tried again."""
        if cell.name in self.jobs or self.states[cell.name].status == "running" or self._is_busy(cell.name):
            return False
        return cells.can_go_on(cell, self.options.runs)

    def _is_busy(self, name: str) -> bool:
        """Whether another process was found at the cell so lately that its sign of life may still be to come."""
        return time.monotonic() - self.busy.get(name, -math.inf) < cells.DEAD_SECONDS

    def _give_up(self, stuck: Sequence[Cell]) -> None:
        """Nothing runs and nothing can be started: say so rather than wait for ever."""
        for cell in stuck:
            state, missing = self.states[cell.name], sorted(set(cell.needs) - self._trained_needs(cell))
            if not set(missing) & set(self.failed):  # else the next look says so
                why = f"it waits for {', '.join(missing) or 'something'} that nothing makes"
                self.failed[cell.name] = state.stage if state.status == "failed" else why

    def _ended(self, cell: Cell, status: int) -> None:
        """Note that it failed; with status 0, it may have found that it must wait for others' networks."""
        state = cells.look(cell, self.options.runs)
        if status == BUSY:
            self.busy[cell.name] = time.monotonic()
        if state.status == "done" or status == BUSY:
            return
        news = self._trained_needs(cell) - self.trained[cell.name]  # trained while it ran, perhaps after it had looked
        if status == 0 and (news or not cells.can_go_on(cell, self.options.runs)):
            return
        why = state.stage if state.status == "failed" else f"its process ended with status {status}"
        self.failed[cell.name] = f"{why}; {self._log(cell)} has all it said" + tail(self._log(cell), state)

    def _trained_needs(self, cell: Cell) -> set[str]:
        return {name for name in cell.needs if cells.is_trained(name, self.options.runs)}

    def _log(self, cell: Cell) -> Path:
        return RunFolder(self.options.runs / cell.name).log


def tail(log: Path, state: State) -> str:
    """The last lines of a log, where no exception says what happened."""
    if state.status == "failed" or not log.is_file():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-TAIL:]
    return ", at last: " + " / ".join(line.strip() for line in lines) if lines else ""


class Stop(threading.Event):
    """Set by SIGINT and SIGTERM while inside; wakes who waits for it."""

    signum = 0

    def __enter__(self) -> Stop:
        self._before = {name: signal.signal(name, self._note) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        self.set()


# ---- what is shown ---------------------------------------------------------------------------------------------------


class View:
    """Shows how far the cells are: a table that keeps up, or, where the output is no terminal, a line per change."""

    def __init__(self, console: Console, study: Study):
        self.console, self.study = console, study
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._before: dict[str, str] = {}

    def __enter__(self) -> View:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, states: Mapping[str, State]) -> None:
        if self.live is not None:
            self.live.update(table(self.study, states), refresh=True)
            return
        for name, state in states.items():
            if state.status not in (self._before.get(name), "waiting"):
                line = f"{name}: {state.status}{progress(state)}"
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._before[name] = state.status


def table(study: Study, states: Mapping[str, State], *, everything: bool = False) -> Table:
    """The cells; without ``everything``, those that run or failed, and how many there are of each."""
    counts = {status: sum(state.status == status for state in states.values()) for status in MARKS}
    title = f"{study.name}: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    view = Table(title=title, header_style="bold", title_justify="left")
    for name in ("cell", "status", "epoch", "NA %", "RA %", "trained", ""):
        view.add_column(
            name, justify="right" if name in ("epoch", "NA %", "RA %", "trained") else "left", no_wrap=name == "cell"
        )
    for name, state in states.items():
        if everything or state.status in ("running", "failed"):
            accuracies = [f"{100 * share:.1f}" for share in state.validation] if state.validation else ["", ""]
            spent = duration(state.seconds) if state.seconds else ""
            view.add_row(name, MARKS[state.status], f"{state.epoch}/{state.epochs}", *accuracies, spent, state.stage)
    return view


def progress(state: State) -> str:
    """Of a cell, in a line."""
    figures = f", validation na {state.validation[0]:.1%} ra {state.validation[1]:.1%}" if state.validation else ""
    return f" ({state.epoch} of {state.epochs} epochs{figures})" if state.epoch else ""
