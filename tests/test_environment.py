"""What is written down of where something ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dtrades_fast import environment


def test_a_commit_is_dirty_where_what_runs_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_commit() is None  # no checkout
    package, notes = tmp_path / "dtrades_fast" / "module.py", tmp_path / "docs" / "notes.md"
    for path in (package, notes):
        path.parent.mkdir()
        path.write_text("first")
    git("init", "--quiet")
    assert environment.git_commit() is None  # no commit yet
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    notes.write_text("second")  # results beside the package change nothing that runs
    assert environment.git_commit() == git("rev-parse", "HEAD")
    package.write_text("second")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    git("checkout", "--quiet", "--", "dtrades_fast")
    (package.parent / "new.py").write_text("untracked, but imported")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "-dirty"
