"""Where the emulator and the oracles are; which mutants are planted; what became of them, for the end of the log."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / folder) for folder in ("ops", "simt")]

from builds import COMPILER, OPERATORS  # noqa: E402
from mutate import Mutant, mutants  # noqa: E402

_tally: Counter[str] = Counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutant" in metafunc.fixturenames:
        planted = mutants() if metafunc.config.getoption("--all-mutants") else _sample(mutants())
        metafunc.parametrize("mutant", planted, ids=lambda mutant: mutant.name)


def _sample(every: list[Mutant]) -> list[Mutant]:
    """Two for each operator, the same ones as long as they exist."""
    shuffled = sorted(every, key=lambda mutant: hashlib.sha256(mutant.name.encode()).digest())
    return [m for operator in OPERATORS for m in [m for m in shuffled if m.operators == (operator,)][:2]]


def pytest_runtest_setup() -> None:
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER}: no mutants were planted")


@pytest.fixture
def tally() -> Counter[str]:
    return _tally


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tally:
        total = _tally.total() - _tally["does not compile"]
        terminalreporter.section("mutants of the formulas and CUDA kernels")
        terminalreporter.write_line(
            f"{_tally['killed']} of {total} killed; "
            + ", ".join(f"{count} {outcome}" for outcome, count in sorted(_tally.items()) if outcome != "killed")
        )
