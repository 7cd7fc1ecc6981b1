"""The emulator finds what it is there to find: without this a check that never fires would pass."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from builds import build
from planted import BUGS, WRONG, Bug, headline

CASES = [(bug, kind) for bug in BUGS for kind in bug.caught_by]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Path]]:
    """All of them, compiled two at a time while the first ones run."""
    pool = ThreadPoolExecutor(2)
    return {(bug.name, kind): pool.submit(bug.program, kind, tmp_path_factory.mktemp("planted")) for bug, kind in CASES}


@pytest.mark.parametrize(("bug", "kind"), CASES, ids=[f"{bug.name} - {kind}" for bug, kind in CASES])
def test_is_caught(bug: Bug, kind: str, programs: dict[tuple[str, str], Future[Path]], findings: list[str]) -> None:
    outcome = bug.outcome(programs[bug.name, kind].result())
    assert outcome is not None, "nobody noticed"
    assert re.search(bug.caught_by[kind], outcome), outcome
    findings.append(f"{bug.name}: {kind}: {WRONG if outcome == WRONG else headline(outcome)}")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_without_it_all_is_well(bug: Bug) -> None:
    """The launch that shows the bug passes on the real sources."""
    assert bug.outcome(build()) is None
