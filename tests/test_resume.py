"""A run that was stopped, however, goes on to the same bits as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from tiny_run import assert_same, result

from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Interrupted, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def start(data: Path, runs: Path, *options: str) -> subprocess.Popen[str]:
    """A real process, past its preparations: it has printed the plan."""
    words = tiny_run.arguments(data, runs, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrades_fast", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("  machine"):
            return process
    raise AssertionError(printed)


LONG = ("--epochs", "40", "--run", "long", "--ema", "0.9", "--epsilon-ramp", "0.5", "--clip-norm", "1")


def test_killed_at_random_moments(data: Path, tmp_path: Path) -> None:
    """SIGKILL three times, with checkpoints at every step, at some steps, and at the ends of epochs alone."""
    process = start(data, tmp_path / "whole", *LONG)
    began = time.monotonic()
    assert process.wait(120) == 0
    seconds = time.monotonic() - began

    moments = random.Random(time.time_ns())
    for kill, minutes in enumerate(("0", "0.001", "10")):
        resume = ["--resume"] if kill else []
        process = start(data, tmp_path / "killed", *LONG, "--checkpoint-minutes", minutes, *resume)
        time.sleep(moments.uniform(0.02, 0.25) * seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, "the run was over before it was killed"
    (tmp_path / "killed" / "long" / ".last.pt.1.tmp").write_bytes(b"half a checkpoint")
    process = start(data, tmp_path / "killed", *LONG, "--resume")
    assert process.stdout is not None
    assert "  resumed    after step" in process.stdout.read()
    assert process.wait(120) == 0

    killed = RunFolder(tmp_path / "killed" / "long")
    assert_same(result(RunFolder(tmp_path / "whole" / "long")), result(killed))
    assert not list(killed.path.glob("*.tmp"))


def test_sigterm_saves_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path, "--epochs", "500", "--run", "stopped")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume --run stopped" in output
    assert torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"] >= 1


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """SIGTERM during each of these steps, once."""
    threat_at = Trainer.threat_at

    def stop(trainer: Trainer, step: int):  # type: ignore[no-untyped-def]
        if step in steps:
            steps.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return threat_at(trainer, step)

    monkeypatch.setattr(Trainer, "threat_at", stop)


CONFIGURATIONS = {
    "sgd": (),
    "adam, cosine, bf16": ("--optimizer", "adam", "--schedule", "cosine", "--precision", "bf16"),
    "fp16": ("--precision", "fp16", "--clip-norm", "1"),
    "step, EMA": ("--schedule", "step", "--milestones", "1", "2", "--ema", "0.8", "--method", "trades"),
    "constant, resnet": ("--arch", "resnet18", "--schedule", "constant", "--method", "at"),
    "no augmentation, L2": (
        "--augmentation",
        "none",
        "--norm",
        "l2",
        "--epsilon",
        "0.5",
        "--sensitivity-at",
        "last_step",
    ),
    "frozen": ("--freeze-backbone", "--deterministic", "--method", "standard"),
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_interrupted_within_epochs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    whole, _ = tiny_run.run(data, tmp_path, *options, "--run", "whole")
    interrupt_at(monkeypatch, {0, 4, 5, 8})  # the first step, within the second epoch, its end, the last step
    for when in ("step 1 of 9", "step 5 of 9", "step 6 of 9", "the last step: training is finished"):
        with pytest.raises(Interrupted, match=f"after {when}"):
            tiny_run.run(data, tmp_path, *options, "--run", "parts", "--resume")
    parts, said = tiny_run.run(data, tmp_path, *options, "--run", "parts", "--resume")
    assert "is finished, there is nothing to resume" in said
    assert_same(result(whole), result(parts))


class PowerFailure(BaseException):
    pass


def fail_at_write(monkeypatch: pytest.MonkeyPatch, count: int, before: bool) -> None:
    """The process ends just before or just after the ``count``-th file is written."""
    write, done = checkpoint.write, [0]

    def failing(path, content):  # type: ignore[no-untyped-def]
        done[0] += 1
        if done[0] == count and before:
            raise PowerFailure
        write(path, content)
        if done[0] == count:
            raise PowerFailure

    monkeypatch.setattr(checkpoint, "write", failing)


@pytest.mark.parametrize("before", [True, False])
def test_stopped_between_any_two_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    options = ("--epochs", "2", "--batch-size", "16")
    whole, _ = tiny_run.run(data, tmp_path, *options, "--run", "whole")
    writes = 0
    while True:
        writes += 1
        name = f"stopped{writes}"
        with monkeypatch.context() as patch:
            fail_at_write(patch, writes, before)
            try:
                tiny_run.run(data, tmp_path, *options, "--run", name)
                break
            except PowerFailure:
                pass
        stopped, _ = tiny_run.run(data, tmp_path, *options, "--run", name, "--resume")
        assert_same(result(whole), result(stopped))
    assert writes > 2 + 2 * 2  # config and env, then at least weights and last.pt per epoch


def test_half_a_line_of_metrics(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = tiny_run.run(data, tmp_path, "--run", "whole")
    interrupt_at(monkeypatch, {4})
    with pytest.raises(Interrupted):
        tiny_run.run(data, tmp_path, "--run", "parts")
    parts = RunFolder(tmp_path / "parts")
    with parts.metrics.open("a") as file:
        file.write('{"epoch": 2, "st')
    tiny_run.run(data, tmp_path, "--run", "parts", "--resume")
    assert_same(result(whole), result(parts))


def test_metrics_lost(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path)
    folder.metrics.unlink()
    with pytest.raises(RuntimeError, match=r"has 0 lines, but last\.pt was saved after 3 epochs"):
        tiny_run.run(data, tmp_path, "--resume")


def test_resume_refuses_other_options(data: Path, tmp_path: Path) -> None:
    tiny_run.run(data, tmp_path, "--run", "one")
    with pytest.raises(ValueError, match=r"epochs: 4 here, 3 in the run; seed: 5 here, 0 in the run"):
        tiny_run.run(data, tmp_path, "--epochs", "4", "--run", "one", "--seed", "5", "--resume")
    with pytest.raises(ValueError, match=r"method: trades here, dtrades in the run"):
        tiny_run.run(data, tmp_path, "--run", "one", "--method", "trades", "--resume")


def test_resume_takes_the_runs_options(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, {1})
    with pytest.raises(Interrupted):
        tiny_run.run(data, tmp_path, "--run", "one", "--lambda-alpha", "0.5", "--lambda-beta", "1")
    from dtrades_fast.config import parse
    from dtrades_fast.training.trainer import train

    config = parse(["--resume", "--run", "one", "--runs-dir", str(tmp_path)])
    assert config.defense.lambda_alpha == 0.5
    train(config)
    stored = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert torch.load(tmp_path / "one" / "last.pt", weights_only=True)["config"] == stored


def test_resume_of_a_finished_run(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path)
    before = result(folder)
    _, output = tiny_run.run(data, tmp_path, "--resume")
    assert "is finished, there is nothing to resume" in output
    assert_same(before, result(folder))


@pytest.mark.parametrize("options", [(), ("--ema", "0.8")])
def test_weights_that_are_gone_are_written_again(data: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder, _ = tiny_run.run(data, tmp_path, *options)
    before = result(folder)
    folder.weights.unlink()
    folder.best_weights.unlink()
    tiny_run.run(data, tmp_path, *options, "--resume")
    assert_same(before, result(folder))


def test_resume_refuses_other_images(data: Path, tmp_path: Path) -> None:
    images = tiny_run.images(tmp_path / "images")
    tiny_run.run(images, tmp_path / "runs")
    (images / "train" / "band0" / "0.png").unlink()
    with pytest.raises(ValueError, match="data set differs"):
        tiny_run.run(images, tmp_path / "runs", "--resume")


def test_two_processes_in_one_folder(data: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    with folder.locked(), pytest.raises(RuntimeError, match="another process is training run"):
        tiny_run.run(data, tmp_path, "--run", "one", "--resume")


def test_damaged_checkpoint(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path)
    folder.last.write_bytes(folder.last.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"last\.pt is damaged"):
        tiny_run.run(data, tmp_path, "--resume")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/dtrades_fast_was_here",)


def test_a_checkpoint_runs_no_code(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path)
    torch.save({"step": Evil()}, folder.last)
    with pytest.raises(RuntimeError, match="no checkpoint of this program"):
        tiny_run.run(data, tmp_path, "--resume")
    assert not Path("/tmp/dtrades_fast_was_here").exists()
