"""The kernels for older processors: the oracle tests again with AVX2 and with the baseline alone.

A machine with AVX-512 would otherwise never run the code that most laptops use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrades_fast.ops import _library

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not _library.simd_level().startswith("x86-64-"), reason="runs on the best of several x86-64 levels only"
)


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DTRADES_FAST_SIMD": level}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )


@pytest.mark.parametrize(("level", "name"), [("x86-64-v3", "x86-64-v3"), ("baseline", "x86-64 baseline")])
def test_lower_level_passes_the_oracle_tests(level: str, name: str) -> None:
    shown = run(level, "-c", "from dtrades_fast.ops import _library; print(_library.simd_level())")
    assert shown.stdout.strip() == name, shown.stderr
    others = sorted(
        path.name for path in HERE.glob("test_*.py") if path.name not in (Path(__file__).name, "test_backend.py")
    )
    result = run(level, "-m", "pytest", "-q", "-k", "oracle or alone", "-p", "no:cacheprovider", *others)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout


def test_unknown_level_is_an_error() -> None:
    code = "import torch; from dtrades_fast import ops; ops.logit_grad_kl(torch.zeros(1, 2), torch.zeros(1, 2))"
    result = run("avx2", "-c", code)
    assert result.returncode == 1
    assert "DTRADES_FAST_SIMD='avx2' is not a level; allowed are x86-64-v4, x86-64-v3, baseline" in result.stderr
