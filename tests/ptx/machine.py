"""Runs a launch: all threads of some blocks at once, one numpy operation for each instruction of the kernel.

The threads that are furthest behind go first, so that those which parted at a branch meet again. At a barrier a block
waits for all its threads, at a shuffle a warp for all its lanes.
"""

from __future__ import annotations

import numpy as np
from counters import Counters
from emulator import Launch
from instructions import Meeting, Program
from memory import Memory, Who
from parser import PTXError
from registers import Lanes, Registers

WARP = 32
THREADS_AT_ONCE = 2048


class Machine:
    """Some blocks of a launch, all at the same place in time."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        memory: Memory,
        blocks: np.ndarray,
        perturbation: int,
        counters: Counters | None,
    ) -> None:
        threads = launch.block
        self.program, self.memory, self.counters = program, memory, counters
        self.size = len(blocks) * threads
        self.copy = np.repeat(np.arange(len(blocks)), threads)
        self.block = np.repeat(blocks, threads)
        self.thread = self.block * threads + np.tile(np.arange(threads), len(blocks))
        self.interval = np.zeros(self.size, np.int64)
        self.threads_per_block = threads
        self.shared = program.shared_memory(launch.shared, len(blocks))
        self.registers = Registers(program.kernel, self.size)
        self.parameters = dict(zip(program.kernel.parameters, launch.params, strict=True))
        self.special = {
            "%tid.x": self.thread % threads,
            "%ctaid.x": self.block % launch.grid[0],
            "%ctaid.y": self.block // launch.grid[0],
            "%ntid.x": np.full(self.size, threads),
            "%nctaid.x": np.full(self.size, launch.grid[0]),
            "%nctaid.y": np.full(self.size, launch.grid[1]),
        }
        self.special = {name: values.astype(np.uint32) for name, values in self.special.items()}
        self.rng = np.random.default_rng(perturbation)
        self.perturbation = perturbation
        self.end = len(program.steps)
        self.at = np.zeros(self.size, np.int64)  # the next instruction of each thread
        self.waits = np.zeros(self.size, bool)

    def require_known(self, registers: tuple[str, ...], lanes: Lanes) -> None:
        if self.registers.unknown(registers, lanes) is not None:
            raise PTXError("a register that was never written is used")

    def space(self, name: str, lanes: Lanes) -> tuple[Memory, np.ndarray | int]:
        """Memory, and which copy of its arrays each thread sees."""
        if name == "global":
            return self.memory, 0
        return self.shared, self.copy if lanes is None else self.copy[lanes]

    def perturbed(self, values: np.ndarray) -> np.ndarray:
        """Off by up to `perturbation` units of the last place that an approximation has: in double, 32 bits."""
        if not self.perturbation:
            return values
        unit = np.int64(1 << 32) if values.dtype == np.float64 else np.int32(1)
        steps = self.rng.integers(-self.perturbation, self.perturbation + 1, values.shape).astype(unit.dtype)
        moved = (values.view(unit.dtype) + steps * unit).view(values.dtype)
        return np.where(np.isfinite(values) & (values != 0), moved, values)

    def warps(self, lanes: Lanes) -> np.ndarray:
        """The warp of each of these threads."""
        return (np.arange(self.size) if lanes is None else lanes) // WARP

    def who(self, lanes: Lanes) -> Who:
        if lanes is None:
            return Who(self.thread, self.block, self.interval)
        return Who(self.thread[lanes], self.block[lanes], self.interval[lanes])

    def run(self) -> None:
        while True:
            next_at = np.where(self.waits, self.end, self.at)
            first = int(next_at.min())
            if first == self.end:
                break
            lanes = np.flatnonzero(next_at == first)
            self._run_from(first, None if len(lanes) == self.size else lanes)
        if self.waits.any():
            places = sorted({str(self.program.kernel.instructions[i]) for i in self.at[self.waits]})
            raise PTXError(f"threads wait for others that have exited or wait elsewhere, in {'; '.join(places)}")

    def _run_from(self, at: int, lanes: Lanes) -> None:
        """Up to where these threads part, wait, end, or where others may join them."""
        while True:
            step = self.program.steps[at]
            if step.meeting is not None:
                lanes = self._meet(at, lanes, step.meeting)
                if lanes is not None and not len(lanes):
                    return
            threads = self.size if lanes is None else len(lanes)
            self.program.executed[at] += threads
            if self.counters is not None:
                self.counters.step(step.instruction, threads, self.warps(lanes))
            try:
                taken = step.run(self, lanes)
            except (PTXError, ZeroDivisionError) as error:
                raise PTXError(f"{error}, in {step.instruction} of {self.program.kernel.name}") from error
            if step.target is None or not np.any(taken):
                at += 1
            elif np.all(taken):
                at = step.target
            else:
                lanes = np.arange(self.size) if lanes is None else lanes
                self.at[lanes] = np.where(taken, step.target, at + 1)
                return
            if at == self.end or (lanes is not None and at in self.program.joins):
                self.at[slice(None) if lanes is None else lanes] = at
                return

    def _meet(self, at: int, lanes: Lanes, meeting: Meeting) -> Lanes:
        """Of the threads that have come to this barrier or shuffle, those whose whole block or warp is there."""
        if lanes is None:
            return None
        self.at[lanes] = at
        self.waits[lanes] = True
        group = self.threads_per_block if meeting is Meeting.BLOCK else WARP
        here = (self.waits & (self.at == at)).reshape(-1, group)
        ready = np.flatnonzero(np.repeat(here.all(1), group))
        self.waits[ready] = False
        return ready


def run_launch(
    program: Program, launch: Launch, memory: Memory, perturbation: int = 0, counters: Counters | None = None
) -> None:
    """Runs all blocks of a launch whose pointers are addresses in ``memory``.

    With a perturbation, approximate instructions are off by up to so many units of their last place.
    """
    if launch.block % WARP or not 0 < launch.block <= 1024:
        raise PTXError(f"a block of {launch.block} threads")
    count = launch.grid[0] * launch.grid[1]
    together = max(1, THREADS_AT_ONCE // launch.block)
    with np.errstate(all="ignore"):
        for first in range(0, count, together):
            blocks = np.arange(first, min(count, first + together))
            Machine(program, launch, memory, blocks, perturbation, counters).run()
