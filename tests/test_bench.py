"""The benchmark's arithmetic and files, and that its command works; the figures themselves are not tested."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

BENCH = Path(__file__).parent.parent / "bench"
COLUMNS = ["op", "mode", "shape", "dtype", "provider", "threads", "median_us", "p20_us", "p80_us", "gb_per_s"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


def bench_ops(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "bench_ops.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_percentiles(harness):
    timing = harness.Timing.of([30.0, 10.0, 50.0, 20.0, 40.0, 60.0])  # p of 6 values lies at index 5p
    assert timing == harness.Timing(median_us=35.0, p20_us=20.0, p80_us=50.0)


def test_bandwidth(harness):
    assert harness.gb_per_s(8_000_000, 1000.0) == 8.0


def test_copy_moves_what_it_should(harness):
    target = harness.copy_call(4096, torch.device("cpu"))()
    assert 2 * target.numel() * target.element_size() == 4096  # read once, written once


def test_providers_take_turns(harness):
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    effort = harness.Effort(seconds=0.0, rounds=3)  # one timed call per round, one untimed before it
    timings = harness.measure(calls, torch.device("cpu"), effort)
    assert order[-12:] == list("aabb" * 3)
    assert all(0 <= t.p20_us <= t.median_us <= t.p80_us for t in timings.values())


def test_csv_columns(harness, tmp_path):
    row = harness.Row("op", "forward", "2x3", "float32", "ours", 1, 1.234, 1.0, 2.0, 3.0)
    harness.write_csv(tmp_path / "new" / "x.csv", [row])
    assert (tmp_path / "new" / "x.csv").read_text().splitlines() == [
        ",".join(COLUMNS),
        "op,forward,2x3,float32,ours,1,1.23,1.00,2.00,3.00",
    ]


def test_pinning_is_undone(harness):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity on this system")
    before = os.sched_getaffinity(0)
    with harness.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_quick_run(tmp_path):
    done = bench_ops("--ops", "pgd_step_", "--providers", "eager,ours", "--threads", 1, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eager/ours" in done.stdout
    with (tmp_path / "ops-cpu.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider) for op in ("pgd_step_linf", "pgd_step_l2") for provider in ("eager", "ours", "copy")
    }
    moved = 4 * 4 * 128 * 3 * 32 * 32  # adv, grad and clean read, adv written, float32
    for row in rows:
        assert float(row["gb_per_s"]) == pytest.approx(moved / float(row["median_us"]) / 1e3, rel=2e-3, abs=0.01)
    assert json.loads((tmp_path / "ops-cpu.json").read_text())["versions"]["torch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ops", "pgd"), "unknown operator 'pgd'; known are entropy_kl, "),
        (("--providers", "ours,triton"), "unknown provider 'triton'; known are eager, compile, ours"),
        (("--dtypes", "int8"), "unknown dtype 'int8'; known are float32, "),
        (("--threads", "0"), "must lie in 1.."),
        (("--threads", "two"), "must be whole numbers"),
        (("--device", "tpu"), "tpu is not available here"),
    ],
)
def test_wrong_option_is_named(harness, capsys, options, message):
    import bench_ops

    with pytest.raises(SystemExit) as stopped:
        bench_ops.parse(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert options[0] in error
    assert message in error


def test_bench_attacks(tmp_path):
    """One run, two attacks, two seeds of ours: the table, the files, and nothing is done twice."""
    images = tiny_run.images(tmp_path / "images")
    run, _ = tiny_run.run(images, tmp_path / "runs", "--epochs", "1", "--run", "tiny")
    state = tmp_path / "state.json"
    command = [
        sys.executable,
        str(BENCH / "bench_attacks.py"),
        str(run.path),
        "--attacks",
        "fgsm,pgd2-clean",
        "--turns",
        "1",
    ]
    command += ["--providers", "ours,ours-seed1", "--points", "9", "--state", str(state), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Robust accuracy, time and memory" in done.stdout
    with (tmp_path / "attacks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["attack"], row["provider"]) for row in rows] == [
        (attack, provider) for attack in ("fgsm", "pgd2-clean") for provider in ("ours", "ours-seed1")
    ]
    assert all(float(row["ra"]) == pytest.approx(int(row["standing"]) / 9, rel=1e-3) for row in rows)
    assert rows[0]["ra"] == rows[1]["ra"]  # nothing is random in FGSM
    assert json.loads((tmp_path / "attacks.json").read_text())["points"] == 9
    before = state.read_text()
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert state.read_text() == before
    other = subprocess.run([*command, "--points", "6"], capture_output=True, text=True, timeout=300)
    assert "name another --state" in other.stderr
