"""Where the kernels' oracles are; what the planted bugs were caught by, for the end of the log."""

import shutil
import sys
from pathlib import Path

import pytest
from builds import COMPILER

sys.path.append(str(Path(__file__).resolve().parent.parent / "ops"))

_findings: list[str] = []


def pytest_runtest_setup() -> None:
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER}: the CUDA kernels were not emulated")


@pytest.fixture
def findings() -> list[str]:
    return _findings


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _findings:
        terminalreporter.section("planted bugs caught by the SIMT emulator")
        terminalreporter.write_line("\n".join(_findings))
