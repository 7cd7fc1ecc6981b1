"""Which instructions no launch executes, and why that is right."""

from __future__ import annotations

import re
from dataclasses import dataclass

import compiler
import numpy as np
import torch
from engine import library
from helpers import BF16, DTYPES
from parser import Kernel
from programs import CASES, checked, kernels_of

#: What is run. The other architectures have programs of their own for bfloat16 alone, which each converts its own way.
RUNS = [(80, dtype) for dtype in DTYPES] + [(75, BF16), (90, BF16)]


@dataclass(frozen=True)
class Unreached:
    """Instructions that no launch executes, by their kernel and by mnemonic and source line."""

    kernel: str
    instruction: str
    reason: str

    def explains(self, kernel: Kernel, instruction: str) -> bool:
        return bool(re.search(self.kernel, kernel.name) and re.search(self.instruction, instruction))


UNREACHED = (
    Unreached("random_start", r"::logf?\(x\)", "log of a number in (0, 1]: neither zero, subnormal, infinite nor NaN"),
    Unreached("random_start_l2", r"::exp\(x\)", "exp(log(v) / d) lies in [2^-24, 1]"),
    Unreached(
        "(entropy_kl_forward|lambda_x|ce_loss|trades_loss|mart_loss)Id",
        r"::log\(x\)",
        "the sum of exp(z - max) is at least 1, or 0 without a term, never subnormal",
    ),
)


def unreached(arch: int, dtype: torch.dtype) -> dict[tuple[str, str], Unreached | None]:
    """Every instruction that was not executed, and what explains that."""
    for case in CASES:
        checked(case, arch, dtype)
    found: dict[tuple[str, str], Unreached | None] = {}
    for name in kernels_of(library(arch), dtype):
        program = library(arch).program(name)
        for at in np.flatnonzero(program.executed == 0):
            text = f"{program.steps[at].instruction.mnemonic} {source_text(program.steps[at].instruction.source)}"
            found[name, text] = next((u for u in UNREACHED if u.explains(program.kernel, text)), None)
    return found


def source_text(source: str) -> str:
    """The text of `rows.cuh:80`; empty where the line is not ours."""
    file, line = source.split(":")
    paths = list(compiler.CSRC.rglob(file))
    return paths[0].read_text().splitlines()[int(line) - 1].strip() if paths and line != "0" else ""
