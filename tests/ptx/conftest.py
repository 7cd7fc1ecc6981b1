"""Where the oracles and launches are, and what is skipped where there is no compiler."""

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / folder) for folder in ("ops", "simt")] + [str(HERE.parent.parent / "_build")]

import cuda_toolkit  # noqa: E402
from builds import COMPILER  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nvcc: needs a CUDA compiler, but no GPU")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("nvcc"):
        return
    if cuda_toolkit.find_toolkit() is None:
        pytest.skip("no nvcc: PTX was not checked")
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER}, which plans the launches: PTX was not checked")
