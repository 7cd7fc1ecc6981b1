"""Where the oracles and launches are, what is skipped where there is no compiler, and what the planted bugs were caught
by, for the end of the log."""

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / folder) for folder in ("ops", "simt")] + [str(HERE.parent.parent / "_build")]

import cuda_toolkit  # noqa: E402
from builds import COMPILER  # noqa: E402

_findings: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nvcc: needs a CUDA compiler, but no GPU")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("nvcc"):
        return
    if cuda_toolkit.find_toolkit() is None:
        pytest.skip("no nvcc: PTX was not checked")
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER}, which plans the launches: PTX was not checked")


@pytest.fixture
def findings() -> list[str]:
    return _findings


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _findings:
        terminalreporter.section("planted bugs caught by the PTX interpreter")
        terminalreporter.write_line("\n".join(_findings))
