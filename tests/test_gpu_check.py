"""scripts/gpu_check.py without a GPU: every way in which a check and the whole can end, and its GPU tests rehearsed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GPU = {"device": "Some GPU (80 GB)", "capability": "9.0", "versions": {"torch": "2.0"}}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


class Fake:
    """A runner that answers by the check's name, a status and output or an exception, else success."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.ran = answers, []

    def __call__(self, check: Any) -> tuple[int, str]:
        self.ran.append(check)
        answer = self.answers.get(check.name.replace("-", "_"), (0, "3 passed in 0.1s"))
        if isinstance(answer, BaseException):
            raise answer
        return answer


def check(gpu_check: Any, tmp_path: Path, runner: Fake, *words: str) -> tuple[int, str]:
    """Exit status and report."""
    status = gpu_check.main([*words, "--out", str(tmp_path)], runner, lambda: GPU)
    return status, (tmp_path / "gpu-check-some-gpu-80-gb.md").read_text()


def test_without_a_gpu_nothing_runs(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Fake()
    assert gpu_check.main(["--out", str(tmp_path)], runner, lambda: None) == 3
    assert capsys.readouterr().err == "no GPU\n"
    assert not runner.ran
    assert not list(tmp_path.iterdir())


def test_the_command_without_a_gpu() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py"], cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert "no GPU" in done.stderr


def test_all_pass(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Fake()
    status, report = check(gpu_check, tmp_path, runner)
    assert status == 0
    names = [c.name for c in runner.ran]
    assert names[:4] == ["build", "load", "doctor", "operators"]
    assert set(names) >= {"memcheck", "racecheck", "initcheck", "synccheck", "graph", "large", "bench", "step-dtrades"}
    assert f"{len(names)} pass, 0 fail, 0 skip, of {len(names)} checks" in report
    assert report.startswith("# GPU check: Some GPU (80 GB)\n")
    assert "- capability: 9.0\n- versions: torch 2.0\n" in report
    assert all(f"| {name} | pass |" in report and f"\n## {name}: pass\n" in report for name in names)
    assert f"report: {tmp_path}" in capsys.readouterr().out


def test_a_failure_stops_nothing_and_makes_the_status_1(gpu_check: Any, tmp_path: Path) -> None:
    output = "\n".join(f"line {i}" for i in range(100))
    runner = Fake(load=(1, output))
    status, report = check(gpu_check, tmp_path, runner, "--only", "build,load,bench")
    assert status == 1
    assert [c.name for c in runner.ran] == ["build", "load", "bench"]
    assert "2 pass, 1 fail, 0 skip, of 3 checks" in report
    assert "| load | fail | 0 | exit status 1 |" in report
    assert "line 99\n```" in report
    assert "line 70\n" in report
    assert "line 69\n" not in report


def test_a_missing_tool_is_skipped(gpu_check: Any, tmp_path: Path) -> None:
    status, report = check(gpu_check, tmp_path, Fake(memcheck=FileNotFoundError()), "--only", "memcheck,build")
    assert status == 0
    assert "1 pass, 0 fail, 1 skip, of 2 checks" in report
    assert "compute-sanitizer is not installed |" in report


@pytest.mark.parametrize("output", [b"so far \xff", "so far", None])
def test_what_takes_too_long_has_failed(gpu_check: Any, tmp_path: Path, output: Any) -> None:
    late = subprocess.TimeoutExpired(["x"], 1, output=output)
    status, report = check(gpu_check, tmp_path, Fake(bench=late), "--only", "bench")
    assert status == 1
    assert "not done after 30 minutes" in report
    assert ("so far" in report) == (output is not None)


def test_tests_that_were_all_skipped_are_no_pass(gpu_check: Any, tmp_path: Path) -> None:
    skipped = "ss\nSKIPPED [1] a.py:3: needs 14 GiB\nSKIPPED [2] b.py: needs 14 GiB\n2 skipped in 0.1s\n"
    some = "s.\nSKIPPED [1] a.py:3: needs 14 GiB\n1 passed, 1 skipped in 0.1s\n"
    runner = Fake(large=(0, skipped), graph=(0, some), kernels=(0, "2 skipped, 7 deselected in 0.1s"))
    status, report = check(gpu_check, tmp_path, runner, "--only", "large,graph,kernels")
    assert status == 0
    assert "| large | skip | 0 | needs 14 GiB |" in report
    assert "| graph | pass |" in report
    assert "| kernels | skip | 0 | every test was skipped |" in report


def test_the_report_is_there_after_each_check(gpu_check: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        check(gpu_check, tmp_path, Fake(load=KeyboardInterrupt()), "--only", "build,load")
    (report,) = tmp_path.iterdir()
    assert "1 pass, 0 fail, 0 skip, of 2 checks" in report.read_text()


def test_a_check_runs_as_a_process(gpu_check: Any) -> None:
    code = "import os, sys; print(os.environ['WORD'], os.getcwd()); print('oops', file=sys.stderr); sys.exit(4)"
    status, output = gpu_check.run(gpu_check.Check("x", [sys.executable, "-c", code], 1, {"WORD": "hello"}))
    assert (status, output) == (4, f"hello {ROOT}\noops\n")
    slow = gpu_check.Check("x", [sys.executable, "-c", "import time; time.sleep(60)"], 0.01)
    assert gpu_check.outcome(slow, gpu_check.run).why == "not done after 0.01 minutes"
    missing = gpu_check.Check("x", ["no-such-program"])
    assert gpu_check.outcome(missing, gpu_check.run).status == "skip"


def test_what_the_commands_name_exists(gpu_check: Any, tmp_path: Path) -> None:
    for c in gpu_check.checks(gpu_check.find_tools(), tmp_path):
        assert all((ROOT / word).is_file() for word in c.command if word.endswith(".py")), c.command


def test_an_unknown_check_is_named(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--only", "magic"], Fake(), lambda: GPU)
    assert stopped.value.code == 2
    assert "unknown check 'magic'; known are build, load" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("test_gpu_operators.py", "-k", "oracle or every_operator"), ("test_gpu_training.py",)]
)
def test_the_gpu_tests_rehearsed(words: tuple[str, ...]) -> None:
    """On the CPU: that they find their oracles and do what they say."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/gpu/{words[0]}", *words[1:]],
        cwd=ROOT,
        env={**os.environ, "GPU_TESTS_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
