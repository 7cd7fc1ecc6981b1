"""Training in two processes: the same gradients as in one, exact resume, and plain words when one of them is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

from dtrades_fast import processes
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


def test_more_processes_than_validation_images(data: Path, tmp_path: Path) -> None:
    """Some look at none. And what all judge together, such as alarms, is counted once."""
    few = tiny_run.images(tmp_path / "few", per_class=5)
    three = [*TWO[:-1], "--nproc-per-node=3"]
    words = tiny_run.arguments(few, tmp_path / "runs", "--batch-size", "7", "--epochs", "2", "--run", "tiny")
    assert len(load(f"folder:{few}", "data", "cpu").validation) < 3
    done = python(*three, "--", SCRIPT, "alarmed", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    for line in RunFolder(tmp_path / "runs" / "tiny").read_metrics():
        assert line["monitor"]["alarms"]["steps"] == line["step"] / line["epoch"]  # each step of the epoch, once
    assert "FutureWarning" not in done.stderr


def test_another_number_of_processes_is_said(data: Path, tmp_path: Path) -> None:
    words = tiny_run.arguments(data, tmp_path / "runs", "--batch-size", "16", "--run", "tiny")
    killed = python(*TWO, "--", SCRIPT, "dies", tmp_path, *words)
    assert killed.returncode != 0
    resumed = python("-m", "dtrades_fast", "train", *words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "saved by 2 processes, goes on with 1" in resumed.stdout


def test_an_error_of_the_first_process_is_plain_in_all(data: Path, tmp_path: Path) -> None:
    words = tiny_run.arguments(data, tmp_path / "runs", "--batch-size", "16", "--run", "tiny", "--epochs", "1")
    assert python("-m", "dtrades_fast", "train", *words).returncode == 0
    done = python(*TWO, "-m", "--", "dtrades_fast", "train", *words, "--resume", "--lr", "0.02")
    assert "error in process 0: run" in done.stderr
    assert "was started with other options (lr: 0.02 here" in done.stderr
    assert "error in process 1: [" not in done.stderr


def test_gpus_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.own_device("cuda:1") == "cuda:1"  # alone
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.own_device("cpu") == "cpu"
    assert processes.own_device("cuda") == "cuda:1"
    with pytest.raises(ValueError, match="--device cuda:0 is one GPU for 2 processes: give cuda"):
        processes.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs: start as many as GPUs"):
        processes.own_device("cuda")
