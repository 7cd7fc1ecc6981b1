"""Where the cells of a study run: each executor starts a command and says when it has ended.

A command runs one cell to its end or goes on where it was left, so any of them may be killed and started again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrades_fast import environment

__all__ = ["Executor", "Job", "Local", "Ray", "Slurm"]

POLL_SECONDS = 0.2
CELL_GIB = 4.0  #: main memory for a cell on a CPU: a full-size ResNet-18 with batches of 128 takes about 3
Command = Sequence[str]


class Job(ABC):
    """A command that was started."""

    @abstractmethod
    def poll(self) -> int | None:
        """Its exit status, None while it waits or runs."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save its state and end."""


class Executor(ABC):
    """Starts commands.

    Attributes:
        jobs: how many may be under way at once.
    """

    jobs: int

    @abstractmethod
    def start(self, name: str, command: Command, log: Path) -> Job:
        """Start a command whose output goes to the end of a file."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what is held."""


def call(command: Command, log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end; SIGTERM and SIGINT ask it to save its state and end."""
    process = start(command, log, environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: process.terminate())
    return process.wait()


def start(
    command: Command, log: Path, environment: Mapping[str, str] | None = None, cpus: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches only who started it, which then stops it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cpus)
    return process


# ---- this machine ----------------------------------------------------------------------------------------------------


class LocalJob(Job):
    def __init__(self, process: subprocess.Popen[bytes], free: Any):
        self.process, self._free = process, free

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and self._free is not None:
            self._free()
            self._free = None
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()


class Local(Executor):
    """Processes on this machine: one per GPU, or ``jobs`` with their own CPUs.

    Args:
        jobs: at once; by default one per GPU; on a machine without, as many as have a core and
            :data:`CELL_GIB` of memory each, since a thread per cell gives more cells an hour than threads that wait
            for each other.
        threads: CPUs of each; None for an equal share of the cores. It is bound to them if no other job would fit
            beside these, for bound jobs of two studies could end up on the same CPU while another idles.
        gpus: how many there are; process ``i`` sees GPU ``i`` modulo them.
    """

    def __init__(self, jobs: int | None = None, threads: int | None = None, gpus: int = 0):
        self.jobs, self.gpus = jobs or gpus or _fitting(threads or 1), gpus
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.threads = threads or max(1, environment.physical_cores() // self.jobs)
        if cpus and self.jobs * self.threads > len(cpus):
            raise ValueError(
                f"--jobs {self.jobs} of --threads {self.threads} need {self.jobs * self.threads} CPUs, "
                f"this process may use {len(cpus)}: choose fewer"
            )
        self._cpus = cpus if len(cpus) - self.jobs * self.threads < self.threads else []
        self._slots = set(range(self.jobs))

    def start(self, name: str, command: Command, log: Path) -> Job:
        slot = min(self._slots)
        self._slots.remove(slot)
        visible = {"CUDA_VISIBLE_DEVICES": self._device(slot)} if self.gpus else {}
        cpus = self._cpus[slot * self.threads : (slot + 1) * self.threads]
        return LocalJob(start(command, log, visible, cpus), lambda: self._slots.add(slot))

    def _device(self, slot: int) -> str:
        """One of the GPUs that this process sees."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(i) for i in range(self.gpus)]
        return names[slot % len(names)]


def _fitting(threads: int) -> int:
    """How many cells the CPUs and the memory of this machine have room for."""
    rooms = [environment.physical_cores() // threads]
    if (memory := environment.memory_gib()) is not None:
        rooms.append(int(memory / CELL_GIB))
    return max(1, min(rooms))


# ---- clusters --------------------------------------------------------------------------------------------------------


class _Checkpointable:
    """What submitit runs: asked to make room, it is put in line again, and goes on from the last checkpoint."""

    def __init__(self, command: Command, log: Path):
        self.command, self.log = list(command), log

    def __call__(self) -> int:
        return call(self.command, self.log)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmJob(Job):
    def __init__(self, job: Any):
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception:  # killed by the scheduler, out of memory, out of time: submitit's own classes
            return 1

    def stop(self) -> None:
        self.job.cancel()


class Slurm(Executor):
    """Jobs of Slurm, through submitit, which requeues those that are preempted or run out of time.

    Args:
        folder: where submitit keeps its files.
        parameters: of ``submitit.AutoExecutor.update_parameters``, e.g. ``timeout_min``, ``slurm_partition``.
        jobs: under way at once.
        cluster: ``"slurm"``, or submitit's ``"local"`` for trying things out.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Any], jobs: int, cluster: str = "slurm"):
        try:
            import submitit
        except ImportError:
            raise ModuleNotFoundError(
                "--executor slurm needs submitit: pip install 'dtrades-fast[cluster]', or use --print-commands"
            ) from None
        self.jobs = jobs
        try:
            self._executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        except RuntimeError as error:
            raise RuntimeError(f"{error} (--executor slurm runs where sbatch is)") from error
        self._executor.update_parameters(**{"timeout_min": 24 * 60, **parameters})

    def start(self, name: str, command: Command, log: Path) -> Job:
        self._executor.update_parameters(name=name)
        return SlurmJob(self._executor.submit(_Checkpointable(command, log.resolve())))


class RayJob(Job):
    def __init__(self, reference: Any):
        self.reference = reference

    def poll(self) -> int | None:
        import ray

        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return int(ray.get(self.reference))
        except ray.exceptions.RayError:  # the worker or its node is lost
            return 1

    def stop(self) -> None:
        import ray

        ray.cancel(self.reference)


class Ray(Executor):
    """Tasks of a Ray cluster, whose machines share the folder of runs.

    Args:
        parameters: of a task, e.g. ``num_cpus``, ``num_gpus``.
        jobs: under way at once.
        address: of the cluster; None for the one in RAY_ADDRESS, else a local one is started.
    """

    def __init__(self, parameters: Mapping[str, Any], jobs: int, address: str | None = None):
        try:
            import ray
        except ImportError:
            raise ModuleNotFoundError(
                "--executor ray needs ray: pip install 'dtrades-fast[cluster]', or use --print-commands"
            ) from None
        self.jobs, self._parameters = jobs, dict(parameters)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        self._task = ray.remote(_on_a_worker)

    def start(self, name: str, command: Command, log: Path) -> Job:
        task = self._task.options(name=name, **self._parameters)
        return RayJob(task.remote(list(command), log.resolve()))

    def close(self) -> None:
        import ray

        ray.shutdown()


def _on_a_worker(command: Command, log: Path) -> int:
    """A KeyboardInterrupt, by which Ray cancels, asks the command to save its state."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has started in the background
    process = start(command, log)
    try:
        while (status := process.poll()) is None:
            time.sleep(POLL_SECONDS)  # unlike a blocking wait, it lets the interrupt through
        return status
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()
