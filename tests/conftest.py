"""Options and fixtures of the whole test suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-mutants",
        action="store_true",
        help="plant every mutant and delete every barrier, not a fixed sample of them ('make mutants')",
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of small tensors, where waking threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
