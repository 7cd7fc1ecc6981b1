"""The PTX that nvcc makes of ``csrc/cuda``, run in place of a GPU.

    Kernels(Engine(Library(80)).run).pgd_step(adv, grad, clean, ...)

``run`` has the signature of :func:`emulator.run`. What is launched, and with which arguments, is what the host code of
the product says (:func:`emulator.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import compiler
import numpy as np
from counters import Counters
from emulator import MAX_BLOCKS, Launch, Settings, plan
from instructions import Program
from machine import run_launch
from memory import Memory
from parser import Kernel, Module

GLOBAL_SHIFT = 32  # 4 GiB of addresses for every buffer
#: torch.nan in each dtype: Kernels fills with it what an operator is to write
UNWRITTEN = {2: (0x7E00, 0x7FC0), 4: (0x7FC00000,), 8: (0x7FF8000000000000,)}


class Library:
    """All kernels of one architecture, each ready to run from when it is first asked for."""

    def __init__(self, arch: int, source: Path = compiler.CSRC, stems: tuple[str, ...] = compiler.STEMS) -> None:
        self.arch = arch
        paths = compiler.in_parallel(lambda stem: compiler.ptx(stem, arch, source), stems)
        modules = [Module(path.read_text()) for path in paths]
        self._modules = {name: module for module in modules for name in module.names()}
        self._programs: dict[str, Program] = {}

    def names(self) -> list[str]:
        return list(self._modules)

    def kernel(self, name: str) -> Kernel:
        return self._modules[name].kernel(name)

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = Program(self.kernel(name))
        return self._programs[name]


@cache
def library(arch: int) -> Library:
    return Library(arch)


@dataclass
class Engine:
    library: Library
    perturbation: int = 0
    counters: Counters | None = None
    replaced: Mapping[str, Program] = field(default_factory=dict)  # mutants, by the kernel's name
    launches: list[Launch] = field(default_factory=list)  # that were run

    def run(
        self,
        op: str,
        dtype: str,
        buffers: Mapping[str, np.ndarray | None],
        settings: Settings,
        count: int,
        *,
        max_blocks: int = MAX_BLOCKS,
        misalignment: Mapping[str, int] | None = None,
    ) -> dict[str, np.ndarray]:
        given = {name: np.ascontiguousarray(x) for name, x in buffers.items() if x is not None}
        offsets = [(misalignment or {}).get(name, 0) for name in given]
        memory = Memory(GLOBAL_SHIFT, [x.nbytes for x in given.values()], misalignments=offsets)
        pointers = dict.fromkeys(buffers, 0)
        for i, (name, x) in enumerate(given.items()):
            pointers[name] = memory.address(i)
            if not np.isin(x.view(f"u{x.itemsize}"), UNWRITTEN[x.itemsize]).all():
                memory.fill(i, x)
        for launch in plan(op, dtype, pointers, settings, count, max_blocks):
            program = self.replaced.get(launch.symbol) or self.library.program(launch.symbol)
            self.launches.append(launch)
            run_launch(program, launch, memory, self.perturbation, self.counters)
        return {
            name: np.frombuffer(memory.data[memory.content(i)].tobytes(), x.dtype).reshape(x.shape)
            for i, (name, x) in enumerate(given.items())
        }
