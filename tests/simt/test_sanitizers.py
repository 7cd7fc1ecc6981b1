"""Every kernel in every launch regime under ASan + UBSan and under TSan: no report, and the same bits.

A report ends the emulator and with it the test. That they do report is what test_planted_bugs.py shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builds import build
from cases import CHECKS, CLASS_REGIMES, ROW_CHECKS, SIZE_REGIMES
from emulator import SCHEDULES
from helpers import F16, F32, F64, assert_same_bits
from kernels import Kernels

DTYPES = (F32, F64, F16)  # each width; bfloat16 differs from float16 in its conversions alone


@pytest.fixture(scope="module", params=["asan", "tsan"])
def program(request: pytest.FixtureRequest) -> Path:
    return build(request.param, dtypes=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("operator", "size"),
    [(name, size) for name in CHECKS for size in (CLASS_REGIMES if name in ROW_CHECKS else SIZE_REGIMES)],
)
def test_is_silent(operator: str, size: int, dtype: torch.dtype, program: Path) -> None:
    """With more rows than the grid and samples that are aligned differently; with whole packs at odd addresses."""
    rows = 3 if operator not in ROW_CHECKS or size > 1024 else 37 if size <= 32 else 9
    expected = CHECKS[operator](Kernels(), rows, size, dtype)
    for seed, schedule in enumerate(SCHEDULES if dtype == F32 else ("greedy",)):
        k = Kernels(build=program, schedule=schedule, seed=seed, max_blocks=2)
        assert_same_bits(CHECKS[operator](k, rows, size, dtype), expected, schedule)
    CHECKS[operator](Kernels(build=program, shift=1), 2, size // 8 * 8, dtype)
