"""The cases notice arithmetic errors: every mutant of the formulas and kernels is killed, or it is known why not."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import builds
import pytest
import torch
from mutate import Mutant, mutants
from outcome import STAGES, SURVIVED, outcome
from survivors import EQUIVALENT, UNNOTICED

KNOWN = {
    name: kind
    for kind, table in (("equivalent", EQUIVALENT), ("unnoticed", UNNOTICED))
    for names in table.values()
    for name in names
}


@pytest.mark.parametrize("operator", builds.OPERATORS)
@pytest.mark.parametrize(("kind", "dtype", "cases"), STAGES)
def test_real_sources_pass(kind: str, dtype: str, cases: Callable[..., None], operator: str) -> None:
    """Or what is said of the mutants would mean nothing."""
    cases(operator, getattr(torch, dtype), builds.build(kind))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """Of all mutants that are asked for, two at a time. What they leave behind is worth nothing to anybody else."""
    planted = [item.callspec.params["mutant"] for item in request.session.items if "mutant" in item.fixturenames]
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(builds, "CACHE", Path(cache))
        builds.build(operators=[])  # what all of them share
        yield {mutant.name: pool.submit(outcome, mutant) for mutant in planted}
        pool.shutdown(cancel_futures=True)


def test_is_killed(mutant: Mutant, outcomes: dict[str, Future[str]], tally: Counter[str]) -> None:
    became = outcomes[mutant.name].result()
    tally[KNOWN.get(mutant.name, became) if became == SURVIVED else became] += 1
    if mutant.name in KNOWN:
        assert became == SURVIVED, f"it is {became}, so its entry in survivors.py is outdated: {mutant.change}"
    else:
        assert became != SURVIVED, f"nobody notices: {mutant.change}"


def test_known_survivors_exist() -> None:
    assert set(KNOWN) <= {mutant.name for mutant in mutants()}


def test_few_go_unnoticed() -> None:
    """Nine in ten of those that change anything are killed."""
    unnoticed = sum(map(len, UNNOTICED.values()))
    assert unnoticed <= 0.1 * (len(mutants()) - sum(map(len, EQUIVALENT.values())))
