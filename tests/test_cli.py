"""The command as a user meets it: statuses, one message per error, nothing imported that is not needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import dtrades_fast
from dtrades_fast import cli, doctor
from dtrades_fast.ops import _library

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main replaces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


def status(*words: str) -> int:
    """As a process would end."""
    try:
        return cli.main(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_help_without_torch() -> None:
    code = "import sys; from dtrades_fast.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    for name in ("train", "evaluate", "plot", "export", "recipes", "bench", "doctor"):
        assert name in done.stdout


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out.strip() == dtrades_fast.__version__
    assert status() == 2
    assert "usage:" in capsys.readouterr().err
    assert status("trian") == 2
    printed = capsys.readouterr().err
    known = "train, evaluate, study, status, report, plot, export, recipes, bench, doctor"
    assert f"unknown command 'trian'; known are {known}" in printed


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "recipes", "doctor"])
def test_help_of_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(name, "--help") == 0
    assert f"dtrades-fast {name}" in capsys.readouterr().out


def test_scripts_train_and_evaluate(data: Path, tmp_path: Path) -> None:
    words = tiny_run.arguments(data, tmp_path, "--epochs", "1", "--run", "one")
    done = command("scripts/train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1: loss" in done.stdout
    done = command("scripts/evaluate.py", str(tmp_path / "one"), "--attacks", "fgsm")
    assert done.returncode == 0, done.stderr
    assert "fgsm" in done.stdout
    assert (tmp_path / "one" / "eval.json").is_file()


def test_wrong_usage_is_2(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs-dir", str(tmp_path)]
    for words, message in (
        (["train", "--nope"], "nope"),
        (["train", "--epochs", "many"], "many"),
        (["train", "--precision", "fp8"], "fp8"),
        (["train", "--method", "nope", *runs], "known are at, dtrades"),
        (
            ["train", "--arch", "nope", *runs, "--dataset", f"folder:{data}"],
            "known are preactresnet18, resnet18, smallcnn, vgg16, wrn34_10",
        ),
        (["train", "--dataset", "nope", *runs], "known are mnist5k, mnist, cifar10, cifar100"),
        (["train", "--preset", "nope"], "known are quick"),
        (["train", "--device", "cuda:99", *runs], "--device cuda:99 is not available here"),
        (["evaluate"], "needs at least one run"),
    ):
        assert status(*words) == 2, words
        printed = capsys.readouterr()
        assert message in " ".join((printed.err + printed.out).replace("│", " ").split()), words
        assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_existing_run_is_2_and_resume_of_a_finished_one_0(data: Path, tmp_path: Path) -> None:
    words = ["train", *tiny_run.arguments(data, tmp_path, "--epochs", "1")]
    assert status(*words) == 0
    assert status(*words) == 2
    assert status(*words, "--resume") == 0
    assert status(*words, "--overwrite") == 0


def test_failures_are_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exploding = tiny_run.arguments(data, tmp_path, "--lr", "1e30", "--schedule", "constant")
    assert status("train", *exploding) == 1
    printed = capsys.readouterr().err
    assert "error: training stopped at step" in printed
    assert "Traceback" not in printed
    assert status("train", "--dataset", f"folder:{tmp_path / 'nope'}", "--runs-dir", str(tmp_path)) == 1
    assert "nope/train is missing" in capsys.readouterr().err
    assert status("evaluate", str(tmp_path / "nope")) == 1
    assert "nope is no run folder" in capsys.readouterr().err


def test_debug_shows_where(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        cli.main(["train", "--method", "nope", "--debug"])
    monkeypatch.setenv("DTRADES_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown method"):
        cli.main(["train", "--method", "nope"])


def test_a_bug_is_one_message_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: object, prog: object) -> int:
        raise KeyError("x")

    monkeypatch.setitem(cli.COMMANDS, "train", broken)
    assert status("train") == 1
    assert "error: KeyError: 'x' (--debug shows where)" in capsys.readouterr().err


def test_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "dtrades_fast" / "cli.py"))
    assert status("bench") == 1
    assert "which is in the repository and not in the installed package" in capsys.readouterr().err
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_ops.py").write_text("import sys; sys.exit(len(sys.argv))")
    assert status("bench", "--quick", "--csv", "x") == 4


# doctor


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor", "--dataset", "mnist5k") == (0 if _library.BACKEND.error is None else 1)
    text = capsys.readouterr().out
    for name in ("torch", "torchvision", "operators", "SIMD", "CUDA toolkit", "extra", "mnist5k", "cores", "memory"):
        assert f"\n{name}" in text or f"\n  {name}" in text, name


def test_doctor_of_what_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, problem in (
        (["--device", "cuda:99"], "--device cuda:99 is not available here"),
        (["--dataset", "cifar10", "--data-root", str(tmp_path)], "batches.meta (missing)"),
        (["--dataset", "nope"], "unknown data set 'nope'"),
        (["--data-root", str(tmp_path / "nope")], "nope does not exist"),
    ):
        assert status("doctor", *words) == 1
        text = capsys.readouterr().out
        assert "problem: " in text
        assert problem in text


@pytest.mark.parametrize(("name", "code"), [("reference", 0), ("nonsense", 1)])
def test_doctor_of_backends(name: str, code: int) -> None:
    done = command("-m", "dtrades_fast", "doctor", DTRADES_FAST_BACKEND=name)
    assert done.returncode == code, done.stdout + done.stderr
    assert f"DTRADES_FAST_BACKEND={name}" in done.stdout
    assert ("'nonsense' is not a backend; allowed are auto, cpp, reference" in done.stdout) == (code == 1)


def test_doctor_says_when_the_kernels_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = _library.Backend("reference", "cpp", frozenset(), {"_C": "no compiler"}, "the kernels are missing")
    monkeypatch.setattr(_library, "BACKEND", missing)
    assert status("doctor") == 1
    text = capsys.readouterr().out
    assert "no compiler" in text
    assert "problem: the kernels are missing" in text


def test_doctor_finds_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.1, V9.1.85'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert str(tmp_path) not in doctor.toolkit()  # nvcc alone, without the headers, compiles nothing
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    assert doctor.toolkit().startswith(f"{tmp_path}, 9.1")
    if doctor.torch.version.cuda:
        assert "does NOT match torch's CUDA" in doctor.toolkit()
