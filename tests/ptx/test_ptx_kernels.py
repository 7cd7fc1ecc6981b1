"""Every kernel as nvcc compiled it: right results, no report of the machine, every instruction executed."""

from __future__ import annotations

import compiler
import pytest
import torch
from engine import Engine, library
from helpers import DTYPES, F32, F64
from programs import CASES, Case, checked, kernels_of
from unreached import RUNS, UNREACHED, unreached

pytestmark = pytest.mark.nvcc

each_run = pytest.mark.parametrize(("arch", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))


@each_run
@pytest.mark.parametrize("operator", dict.fromkeys(case.operator for case in CASES))
def test_matches_oracle(operator: str, arch: int, dtype: torch.dtype) -> None:
    """In bounds, aligned, without a race, a register or byte that was never written, or a thread left waiting."""
    for case in CASES:
        if case.operator == operator:
            checked(case, arch, dtype)


@pytest.mark.parametrize("arch", [a for a in compiler.ARCHITECTURES if a != 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_architectures_run_the_same_programs(arch: int, dtype: torch.dtype) -> None:
    """What is not run here for an architecture is instruction for instruction what is run for sm_80."""
    if (arch, dtype) in RUNS:
        pytest.skip("has programs of its own, and runs them")
    for name in kernels_of(library(80), dtype):
        assert library(arch).kernel(name).code == library(80).kernel(name).code, name


@each_run
def test_every_instruction_is_executed(arch: int, dtype: torch.dtype) -> None:
    missing = [key for key, reason in unreached(arch, dtype).items() if reason is None]
    assert not missing, "\n".join(map(str, missing[:20]))


def test_exceptions_are_needed() -> None:
    used = {reason for arch, dtype in RUNS for reason in unreached(arch, dtype).values()}
    assert set(UNREACHED) <= used, set(UNREACHED) - used


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.operator != "pgd_step"][::6], ids=str)
def test_approximations_may_be_off(case: Case, dtype: torch.dtype) -> None:
    """Two units in the last place of every approximate instruction keep all results within their tolerance."""
    case.check(Engine(library(80), perturbation=2).run, dtype)
