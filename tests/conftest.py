"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-mutants",
        action="store_true",
        help="plant every mutant and delete every barrier, not a fixed sample of them ('make mutants')",
    )
