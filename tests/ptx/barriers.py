"""Kernels with one barrier deleted, and what shows that it is missing."""

from __future__ import annotations

from functools import cache

import torch
from engine import Engine, library
from instructions import Program
from parser import PTXError
from programs import Case, kernel_named

ARCH = 80
#: kernel, threads of a block -> a launch in which each block has several rows or samples
LAUNCHES = {
    ("entropy_kl_forward", 256): Case("entropy_kl", (3, 1025)),
    ("logit_grad_kl", 256): Case("logit_grad", (3, 1025)),
    ("logit_grad_ce", 256): Case("logit_grad", (3, 1025)),
    ("ce_loss", 256): Case("robust_loss", (3, 1025)),
    ("trades_loss", 256): Case("robust_loss", (3, 1025)),
    ("mart_loss", 256): Case("robust_loss", (3, 1025)),
}
for kernel, operator in (
    ("pgd_step_l2", "pgd_step"),
    ("random_start_l2", "random_start"),
    ("sample_stats", "sample_stats"),
    ("lambda_x", "lambda_x"),
):
    LAUNCHES |= {(kernel, 256): Case(operator, (3, 105)), (kernel, 1024): Case(operator, (3, 16389))}

#: Barriers, in the order of the kernel, without which nothing goes wrong: those before a reduction writes to its shared
#: array, where a reduction with another array, and so another barrier, lies between that and the last time it was read.
#: They stay: a reduction must not depend on what comes before it.
REDUNDANT = {
    "entropy_kl_forward": {0, 4},
    "logit_grad_kl": {0, 2},
    "logit_grad_ce": {0, 2},
    "ce_loss": {0, 2},
    "trades_loss": {0, 4},
    "mart_loss": {0, 4, 6, 8},
    "pgd_step_l2": set(),
    "random_start_l2": set(),
    "sample_stats": {0, 2, 4},
    "lambda_x": {0, 2, 4},
}


@cache
def outcomes(kernel: str, threads: int, dtype: torch.dtype) -> list[str | None]:
    """For each barrier of the kernel: what shows that it has been deleted, None if nothing does."""
    name = kernel_named(library(ARCH), kernel, threads, dtype)
    original = library(ARCH).kernel(name)
    barriers = [at for at, i in enumerate(original.instructions) if i.opcode == "bar"]
    return [_outcome(LAUNCHES[kernel, threads], dtype, name, Program(original.without(at))) for at in barriers]


def _outcome(case: Case, dtype: torch.dtype, name: str, mutant: Program) -> str | None:
    try:
        case.check(Engine(library(ARCH), replaced={name: mutant}).run, dtype, max_blocks=1)
    except (PTXError, AssertionError) as error:
        return str(error)
    return None
