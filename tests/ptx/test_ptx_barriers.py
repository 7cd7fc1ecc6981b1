"""Every barrier is needed and missed when it is gone, or named as redundant."""

from __future__ import annotations

import pytest
import torch
from barriers import LAUNCHES, REDUNDANT, outcomes
from helpers import F32, each_dtype

pytestmark = pytest.mark.nvcc


@each_dtype
@pytest.mark.parametrize(("kernel", "threads"), LAUNCHES, ids=str)
def test_deleted_barrier_is_missed(
    kernel: str, threads: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype != F32 and not request.config.getoption("--all-mutants", False):
        pytest.skip("float32 is the sample; --all-mutants runs the others")
    found = outcomes(kernel, threads, dtype)
    assert found, "a kernel without barriers"
    assert {number for number, outcome in enumerate(found) if outcome is None} == REDUNDANT[kernel]
