"""The kernels of ``csrc/cuda`` without a GPU: run by the emulator, or planned for somebody else to run.

    run("PGDStepLinf", "float32", {"adv": adv, "grad": grad, "clean": clean},
        {"size": 3072, "step_size": 0.007, ...}, count=adv.size)["adv"]

Operators are the structs of ``csrc/arguments.h``. ``buffers`` are the pointers among their fields, as numpy arrays
whose bytes the kernels see (None: a null pointer); ``settings`` are the other fields. Half precision is given as bits.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from builds import build as compile_emulator

SCHEDULES = ("lockstep", "random", "greedy")
MAX_BLOCKS = 65535

Settings = Mapping[str, float | int]


class EmulatorError(Exception):
    """The report of the emulator, of a sanitizer, or the signal that ended it."""


@dataclass(frozen=True)
class Launch:
    """What the driver of a GPU would be given."""

    symbol: str  # the mangled name of the kernel
    grid: tuple[int, int]
    block: int
    shared: int  # bytes of dynamic shared memory
    params: tuple[bytes, ...]


def run(
    op: str,
    dtype: str,
    buffers: Mapping[str, np.ndarray | None],
    settings: Settings,
    count: int,
    *,
    max_blocks: int = MAX_BLOCKS,
    schedule: str = "lockstep",
    seed: int = 0,
    misalignment: Mapping[str, int] | None = None,
    build: str | Path = "plain",
) -> dict[str, np.ndarray]:
    """Launches an operator over ``count`` rows, samples or elements and returns the buffers as they are afterwards.

    ``misalignment`` says how many bytes after a multiple of 16 a buffer begins. ``build`` is a kind of :mod:`builds`
    or a program that it made.
    """
    offsets = misalignment or {}
    given = {name: np.ascontiguousarray(x) for name, x in buffers.items() if x is not None}
    lines = [f"buffer {name} {x.nbytes} {offsets.get(name, 0)}" for name, x in given.items()]
    lines += [f"value {name} 0" for name, x in buffers.items() if x is None]
    server = _server(build)
    payload = b"".join(x.tobytes() for x in given.values())
    server.ask(f"run {op} {dtype} {count} {max_blocks} {schedule} {seed}", lines, settings, payload)
    return {name: np.frombuffer(server.read(x.nbytes), x.dtype).reshape(x.shape) for name, x in given.items()}


def plan(
    op: str,
    dtype: str,
    pointers: Mapping[str, int],
    settings: Settings,
    count: int,
    max_blocks: int = MAX_BLOCKS,
) -> list[Launch]:
    """The launches that ``run`` would do, for buffers at these addresses."""
    server = _server("plain")
    lines = [f"value {name} {address}" for name, address in pointers.items()]
    return server.ask(f"plan {op} {dtype} {count} {max_blocks} lockstep 0", lines, settings)


class _Server:
    """A running emulator; after an error it is started anew."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str, lines: list[str], settings: Settings, payload: bytes = b"") -> list[Launch]:
        """The launches that come before the end of the answer; what comes after it is left to ``read``."""
        lines = lines + [f"value {name} {_text(value)}" for name, value in settings.items()]
        if self.process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n".join([f"{request} {len(lines)}", *lines, ""]).encode() + payload)
            self.process.stdin.flush()
        launches = []
        while (line := self.process.stdout.readline().decode()) != "end\n":
            if not line:
                self._fail()
            symbol, grid_x, grid_y, block, shared, *params = line.split()
            launches.append(
                Launch(symbol, (int(grid_x), int(grid_y)), int(block), int(shared), tuple(map(bytes.fromhex, params)))
            )
        return launches

    def read(self, size: int) -> bytes:
        return self.process.stdout.read(size)

    def _start(self) -> None:
        self.report = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self.process = subprocess.Popen(
            [*_prefix(self.program), str(self.program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.report,
            env={
                **os.environ,
                "ASAN_OPTIONS": "detect_leaks=0",  # the last request's memory, when a report ends the program
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "TSAN_OPTIONS": "halt_on_error=1",
            },
        )

    def _fail(self) -> None:
        self.process.communicate()
        status, self.process = self.process.returncode, None
        self.report.seek(0)
        report = self.report.read().decode(errors="replace")
        raise EmulatorError(report or f"ended by signal {-status}")


@cache
def _server(build: str | Path) -> _Server:
    return _Server(compile_emulator(build) if isinstance(build, str) else build)


def _prefix(program: Path) -> list[str]:
    """ThreadSanitizer cannot place its memory among addresses with more than 28 random bits."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    fixed = program.name.startswith("tsan") and bits.exists() and int(bits.read_text()) > 28
    return ["setarch", "-R"] if fixed else []


def _text(value: float | int) -> str:
    return value.hex() if isinstance(value, float) else str(int(value))
