"""Training in two processes: the same gradients as in one, exact resume, and plain words when one of them is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

from dtrades_fast.data import load
from dtrades_fast.training.run_folder import RunFolder

SCRIPT = str(Path(__file__).parent / "two_processes.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"), per_class=14)


def python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("method", ["at", "trades", "dtrades", "faal"])
def test_gradients_are_those_of_one_process(data: Path, tmp_path: Path, method: str) -> None:
    """Of every batch of an epoch, the last and smaller one of odd size included."""
    words = tiny_run.arguments(data, tmp_path / "runs", "--batch-size", "16", "--lr", "0.001", "--method", method)
    found = []
    for start in ([], [*TWO, "--"]):  # for torchrun takes --run for an option of its own
        output = tmp_path / f"{len(start)}.pt"
        done = python(*start, SCRIPT, "gradients", output, *words)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(output))
    alone, together = found
    assert len(alone["gradients"]) > 1
    for one, two in zip(alone["gradients"], together["gradients"], strict=True):
        assert max(float(g.abs().max()) for g in one.values()) > 1e-3
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9)
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_a_lost_process_ends_the_run_which_resumes_exactly(data: Path, tmp_path: Path) -> None:
    words = tiny_run.arguments(data, tmp_path / "whole", "--batch-size", "16", "--method", "dtrades", "--run", "tiny")
    done = python(*TWO, "-m", "--", "dtrades_fast", "train", *words)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("epoch 1/3") == 1
    whole = tiny_run.result(RunFolder(tmp_path / "whole" / "tiny"))
    words[words.index(str(tmp_path / "whole"))] = str(tmp_path / "cut")
    killed = python(*TWO, "--", SCRIPT, "dies", tmp_path, *words)
    assert killed.returncode != 0
    assert "another process of this run has ended" in killed.stderr
    assert "--resume" in killed.stderr
    resumed = python(*TWO, "-m", "--", "dtrades_fast", "train", *words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed    after step" in resumed.stdout
    tiny_run.assert_same(tiny_run.result(RunFolder(tmp_path / "cut" / "tiny")), whole)


def test_a_batch_too_small_for_all_is_refused(data: Path, tmp_path: Path) -> None:
    count = len(load(f"folder:{data}", "data", "cpu").train)
    words = tiny_run.arguments(data, tmp_path / "runs", "--batch-size", str(count - 1), "--epochs", "1")
    done = python(*TWO, "-m", "--", "dtrades_fast", "train", *words)
    assert done.returncode != 0
    assert "fewer than 2 processes: choose another --batch-size than" in done.stderr
