"""Writes docs/gpu-evidence.md: what is known of the CUDA kernels without a GPU, each number from a run.

python tests/ptx/evidence.py            writes it
python tests/ptx/evidence.py --check    says whether it is what would be written
"""

# ruff: noqa: E402 - as a program it looks for its modules first

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path += [str(HERE.parent / folder) for folder in ("ops", "simt")] + [str(HERE.parent.parent / "_build")]

import barriers
import compiler
import numpy as np
import torch
from cases import EPSILON, KEY, STEP, image, labels, logits
from counters import SECTOR, Counters
from emulator import Launch
from engine import UNWRITTEN, Engine, library
from helpers import F16, F32
from kernels import START_KINDS, Kernels
from planted_ptx import PLANTED, compiled, outcome
from programs import kernels_of
from reports import ptxas
from unreached import RUNS, UNREACHED, unreached

DOCUMENT = compiler.ROOT / "docs" / "gpu-evidence.md"
ARCH = 80
INF = math.inf


@dataclass(frozen=True)
class GPU:
    """Documented limits: of a multiprocessor, and of the whole device at its boost clock."""

    name: str
    arch: int
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    doubles: int  # double-precision operations of a multiprocessor in a cycle
    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of it for each block
    shared_unit: int  # bytes

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Threads that are resident at once, of those that could be."""
        of_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // of_warp // (threads // 32)
        used = -(-(shared + self.reserved) // self.shared_unit) * self.shared_unit
        by_shared = self.shared // used if used else self.blocks
        return min(self.blocks, self.threads // threads, by_registers, by_shared) * threads / self.threads

    def bound(self, run: Run) -> float:
        """Seconds below which the launch cannot be: bytes, issue slots, double-precision units."""
        cycles = self.multiprocessors * self.clock
        return max(
            run.compulsory / self.bandwidth,
            run.counters.of_warps(INDISPENSABLE) / (4 * cycles),
            32 * run.counters.of_warps(DOUBLE) / (self.doubles * cycles),
        )


GPUS = (
    GPU("T4", 75, 40, 1.59e9, 320e9, 2, 1024, 16, 64 << 10, 0, 256),
    GPU("A100 80 GB", 80, 108, 1.41e9, 2039e9, 32, 2048, 32, 164 << 10, 1024, 128),
    GPU("H100 SXM", 90, 132, 1.98e9, 3350e9, 64, 2048, 32, 228 << 10, 1024, 128),
)
#: PTX that no optimisation removes: floating-point arithmetic, memory, shuffles, barriers. Moves, conversions and
#: integer arithmetic are not counted.
INDISPENSABLE = r"(add|sub|mul|fma|div|sqrt|rcp|ex2)\.(r[nm]|approx)|(ld|st)\.(global|shared)|shfl|bar"
DOUBLE = r"(add|sub|mul|fma)\.rn\.f64"


@dataclass
class Run:
    """One launch of an operator, counted."""

    operator: str
    size: str
    dtype: torch.dtype
    elements: int = 0
    compulsory: int = 0  # bytes: every input once, every result once
    launches: list[Launch] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def measure(self, call: str, *arguments: object) -> Run:
        """Of Kernels."""
        engine = Engine(library(ARCH), counters=self.counters, launches=self.launches)

        def run(op: str, dtype: str, buffers: dict, *rest: object, **options: object) -> dict[str, np.ndarray]:
            after = engine.run(op, dtype, buffers, *rest, **options)
            given = {name: x for name, x in buffers.items() if x is not None}
            for name, x in given.items():
                written = not np.array_equal(x, after[name])
                read = not np.isin(x.view(f"u{x.itemsize}"), UNWRITTEN[x.itemsize]).all()
                self.compulsory += (written + read) * x.nbytes
            self.elements = max(x.size for x in given.values())
            return after

        getattr(Kernels(run), call)(*arguments)
        return self


def runs() -> Iterator[Run]:
    """The sizes of training: logits of CIFAR-10, CIFAR-100 and ImageNet, images of CIFAR."""
    for dtype in (F32, F16):
        for classes in (10, 100, 1000):
            z, other, y = logits(128, classes, dtype, 1), logits(128, classes, dtype, 2), labels(128, classes)
            row, size = torch.ones(128), f"128×{classes}"
            forward = (row, row, torch.ones(128, 4))
            yield Run("entropy_kl", size, dtype).measure("entropy_kl", z, other)
            yield Run("entropy_kl backward", size, dtype).measure("entropy_kl_backward", row, row, z, other, *forward)
            yield Run("logit_grad_kl", size, dtype).measure("logit_grad_kl", z, other)
            yield Run("logit_grad_ce", size, dtype).measure("logit_grad_ce", z, y)
            yield Run("ce_loss", size, dtype).measure("ce_loss", z, y)
            weighting = (0.5, 0.5, 0.5, 0.0, INF, False)
            yield Run("trades_loss", size, dtype).measure("trades_loss", z, other, row, y, *weighting)
            yield Run("mart_loss", size, dtype).measure("mart_loss", z, other, y, 6.0)
        adv, grad, clean = image(128, 3072, dtype)
        z, index, size = logits(128, 10, dtype, 1), torch.arange(128), "128×3×32×32"
        for norm in ("linf", "l2"):
            step = (STEP, EPSILON, 0.0, 1.0, norm)
            yield Run(f"pgd_step {norm}", size, dtype).measure("pgd_step", adv, grad, clean, *step)
        yield Run("sample_stats", size, dtype).measure("sample_stats", grad, adv, clean, EPSILON)
        yield Run("lambda_x", size, dtype).measure("lambda_x", z, grad, 1.0, 1.0, 0.0, -INF, INF)
        for kind in START_KINDS:
            yield Run(f"random_start {kind}", size, dtype).measure("random_start", clean, index, kind, EPSILON, KEY)


# ---- the document --------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# The CUDA kernels without a GPU

This file is written by `make gpu-evidence`; every number in it comes from a run of that command. It was made with the
compiler of CUDA {toolkit}. No GPU took part, and no time was measured.

**Shown by running what nvcc made.** An interpreter (`tests/ptx`) executes the PTX of every kernel, with the launch
geometry and the arguments that the product's own host code computes, and compares all results with float64 oracles;
elementwise results have the bits of the CPU kernels. On the way it checks every access for bounds, alignment, memory
or registers that were never written and data races, and every barrier and shuffle for threads that do not come.

**Shown for all data.** A static analysis finds no address, no branch around memory or barriers, no barrier and no
shuffle that depends on loaded values, in any kernel of any architecture. So one clean run of a launch stands for all
inputs of that shape.

**Shown by the compiler.** ptxas reports registers, stack and spills, and the disassembled machine code the width of
memory accesses, for sm_75, sm_80, sm_86 and sm_90.

**Shown of the checks themselves.** They catch the planted bugs and deleted barriers below.

**Not shown.** That ptxas translates PTX to machine code correctly; that a GPU's approximations of exp2 and reciprocals
are as good as documented (results stay within their tolerance when these are off by two units in the last place); any
shape that is unlike those that were run; and anything about time.
"""


def document() -> str:
    toolkit = ".".join(map(str, compiler.cuda_toolkit.toolkit_version(compiler.toolkit())))
    parts = [INTRODUCTION.format(toolkit=toolkit), *_coverage(), *_mutants(), *_counts(list(runs()))]
    return "\n".join(parts)


def table(header: str, rows: list[tuple[object, ...]]) -> str:
    """A Markdown table, numbers to the right."""
    columns = header.split(" | ")
    marks = ["---:" if isinstance(x, int | float) else "---" for x in rows[0]]
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines) + "\n"


def _text(x: object) -> str:
    if isinstance(x, float):
        return f"{x:.3g}" if x < 1000 else f"{x:.0f}"
    return str(x).replace("|", r"\|")


def _coverage() -> Iterator[str]:
    yield "## Instructions executed\n"
    rows = []
    for arch, dtype in RUNS:
        names = kernels_of(library(arch), dtype)
        missing = unreached(arch, dtype)
        steps = [library(arch).program(name).executed for name in names]
        total, reached = sum(map(len, steps)), sum(int(np.count_nonzero(s)) for s in steps)
        unexplained = sum(reason is None for reason in missing.values())
        rows.append((f"sm_{arch}", _name(dtype), len(names), total, 100 * reached / total, unexplained))
    yield table("PTX | dtype | kernels | instructions | executed % | neither executed nor explained", rows)
    yield (
        "All other kernels of sm_75, sm_86 and sm_90 are, instruction for instruction, those of sm_80. "
        "What is not executed:\n"
    )
    yield table("kernel | reason", [(f"`{u.kernel}`", u.reason) for u in UNREACHED])


def _mutants() -> Iterator[str]:
    yield "## Planted bugs\n"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, bug in enumerate(PLANTED):
            report = outcome(bug, compiled(bug, Path(folder) / str(i)))
            rows.append((bug.name, bug.operator, "not caught" if report is None else report.partition(", in ")[0]))
    yield table("bug | operator | report", rows)
    yield "Every `bar.sync` of the float32 kernels deleted, one at a time:\n"
    rows = []
    for kernel, threads in barriers.LAUNCHES:
        found = barriers.outcomes(kernel, threads, F32)
        survivors = ", ".join(str(i) for i, outcome in enumerate(found) if outcome is None)
        rows.append((kernel, threads, len(found), sum(x is not None for x in found), survivors or "none"))
    yield table("kernel | threads | barriers | missed when deleted | redundant (first is 0)", rows)
    yield (
        "A redundant one stands before a reduction writes to its shared array, where another reduction's barrier has "
        "already passed since that array was last read.\n"
    )


def _counts(found: list[Run]) -> Iterator[str]:
    yield "## What a launch does\n"
    yield (
        f"Counted on the PTX of sm_{ARCH}. Compulsory bytes: every input once and every result once. Requested: what "
        "the threads ask for, much of which a cache serves. Sectors: 32-byte pieces of global memory that requests "
        "touch, times 32, by the bytes requested: 1 for aligned data, less where threads share it. Instructions are "
        "PTX instructions of threads; those of doubles are additions, products and their fusions, by warp.\n"
    )
    rows: list[tuple[object, ...]] = []
    for run in found:
        c, launch = run.counters, run.launches[0]
        requested = c.bytes["global load"] + c.bytes["global store"]
        sectors = c.sectors["global load"] + c.sectors["global store"]
        rows.append(
            (
                *(f"`{run.operator}`", run.size, _name(run.dtype), len(run.launches)),
                f"{launch.grid[0]}×{launch.grid[1]}×{launch.block}",
                *(run.compulsory, requested / run.compulsory, SECTOR * sectors / requested),
                *(c.thread_instructions / run.elements, 32 * c.of_warps(DOUBLE) / run.elements),
                *(c.of_warps("bar") * 32 // launch.block // (launch.grid[0] * launch.grid[1]), c.bank_conflicts),
            )
        )
    yield table(
        "operator | size | dtype | launches | blocks×threads | compulsory bytes | requested | sectors "
        "| instructions/element | double/element | barriers/block | bank conflicts",
        rows,
    )
    yield "## What the machine code needs, and a bound\n"
    yield (
        "Registers of a thread, static and dynamic shared memory of a block, threads that are resident at once by "
        "these and the documented limits (theoretical occupancy), and a **lower bound** of the time of the launch: the "
        "largest of compulsory bytes over the datasheet's bandwidth, indispensable instructions (floating-point "
        "arithmetic, memory, shuffles, barriers) over the issue slots, and double-precision arithmetic over its units, "
        "at boost clock. It is a bound of the roofline kind that no measurement here confirms; the launch itself is "
        "not in it, and takes longer than most of these.\n"
    )
    rows = []
    for run in found:
        launch = run.launches[0]
        reports = [ptxas(gpu.arch)[launch.symbol] for gpu in GPUS]
        shared = [report.shared + launch.shared for report in reports]
        occupancy = [
            gpu.occupancy(launch.block, report.registers, memory)
            for gpu, report, memory in zip(GPUS, reports, shared, strict=True)
        ]
        rows.append(
            (
                *(f"`{run.operator}`", run.size, _name(run.dtype)),
                *(" / ".join(str(report.registers) for report in reports), max(shared)),
                " / ".join(f"{100 * x:.0f}" for x in occupancy),
                " / ".join(f"{1e6 * gpu.bound(run):.2g}" for gpu in GPUS),
            )
        )
    gpus = " / ".join(gpu.name for gpu in GPUS)
    yield table(
        f"operator | size | dtype | registers {gpus} | shared bytes | occupancy % {gpus} | lower bound µs {gpus}", rows
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str]) -> int:
    text = document()
    if arguments == ["--check"]:
        current = DOCUMENT.exists() and DOCUMENT.read_text() == text
        print(f"{DOCUMENT} is {'what' if current else 'not what'} a new run gives")
        return 0 if current else 1
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
