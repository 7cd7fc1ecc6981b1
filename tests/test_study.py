"""Studies that are run: cells in order, failures that stop nothing, kills that lose nothing, and each executor."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import assert_same, result

import dtrades_fast
from dtrades_fast import cli, environment
from dtrades_fast.study import cell as cells
from dtrades_fast.study import study as command
from dtrades_fast.study.cell import Machine, look
from dtrades_fast.study.executors import Executor, Job, Local, Ray, Slurm
from dtrades_fast.study.grid import Study, read
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Interrupted, Trainer

MACHINE = Machine("cpu", 1)
WORDS = ("--device", "cpu", "--threads", "1")
FILE = """
description: Tiny.
defaults: {{dataset: "folder:{images}", arch: smallcnn, width: 2, batch_size: 8, epochs: 2, lr: 0.01, steps: 2,
           validation_steps: 2, seed: [0, 1]}}
runs:
  - method: trades
  - {{method: faal, init_weights: {{method: trades}}, epochs: 1}}
evaluations:
  - {{attacks: fgsm, checkpoint: [best, last]}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def study_file(folder: Path, images: Path, text: str = FILE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text.format(images=images))
    return path


@pytest.fixture
def study(tmp_path: Path, images: Path) -> Study:
    return read(study_file(tmp_path, images))


def kept(runs: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((runs / name / "cell.json").read_text()))


def statuses(study: Study, runs: Path) -> list[str]:
    return [look(cell, runs).status for cell in study.cells]


def python(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dtrades_fast", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def test_cells_run_this_package_and_not_one_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout after ``pip install .``: what lies there is not compiled."""
    other = tmp_path / "dtrades_fast"
    other.mkdir()
    for name in ("__init__", "__main__"):
        (other / f"{name}.py").write_text("raise SystemExit('of the working directory')")
    monkeypatch.chdir(tmp_path)
    plain = subprocess.run([sys.executable, "-m", "dtrades_fast", "--help"], capture_output=True, text=True)
    assert "of the working directory" in plain.stderr
    monkeypatch.setenv("PYTHONPATH", str(Path(dtrades_fast.__file__).parents[1]))  # installed or not
    done = subprocess.run([*command.this_package(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "recipes" in done.stdout


def test_a_checkout_that_runs_is_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(dtrades_fast.__file__).parents[1])
    assert command.this_package() == [sys.executable, "-m", "dtrades_fast"]


# ---- one cell --------------------------------------------------------------------------------------------------------


def test_a_cell_is_trained_and_evaluated(study: Study, tmp_path: Path) -> None:
    runs, cell = tmp_path / "runs", study.cells[0]
    assert look(cell, runs).status == "waiting"
    assert not (runs / cell.name).exists()  # looking makes nothing
    cells.run(cell, runs, MACHINE)
    state = look(cell, runs)
    assert (state.status, state.epoch, state.epochs) == ("done", 2, 2)
    assert state.validation is not None
    record = kept(runs, cell.name)
    assert record["status"] == "done"
    ended = datetime.datetime.fromisoformat(record["ended"].replace("Z", "+00:00"))
    assert abs(datetime.datetime.now(datetime.timezone.utc) - ended) < datetime.timedelta(minutes=5)
    assert record["place"]["method"] == "trades"
    assert record["evaluated"] == record["asked"]["evaluations"] == [dict(e) for e in cell.evaluations]
    assert min(record["seconds"].values()) > 0
    evaluations = json.loads(RunFolder(runs / cell.name).evaluation.read_text())["evaluations"]
    assert [e["checkpoint"] for e in evaluations] == ["best", "last"]
    assert not RunFolder(runs / cell.name).beat.exists()


def test_a_cell_stops_between_training_and_evaluation(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes with the last step is not lost."""
    train_step = Trainer.train_step

    def signalled(trainer: Trainer, network: torch.nn.Module) -> None:
        if trainer.step + 1 == trainer.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(trainer, network)

    cell = study.cells[0]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(Interrupted, match="training is finished"):
            cells.run(cell, tmp_path, MACHINE)
    assert look(cell, tmp_path).status == "waiting"
    assert not RunFolder(tmp_path / cell.name).evaluation.exists()
    cells.run(cell, tmp_path, MACHINE)
    assert look(cell, tmp_path).status == "done"


def test_an_evaluation_that_is_asked_for_no_more(
    study: Study, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell whose evaluation failed is done without it; a study does not wait for it for ever."""
    runs, file = tmp_path / "runs", study_file(tmp_path, images, FILE + "  - {{attacks: pgd2}}\n")
    cell, evaluate = read(file).cells[0], cells.evaluate.main

    def broken(words: Sequence[str], prog: str) -> int:
        if "pgd2" in words:
            raise RuntimeError("no memory")
        return evaluate(words, prog)

    with monkeypatch.context() as patch:
        patch.setattr(cells.evaluate, "main", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            cells.run(cell, runs, MACHINE)
    assert look(cell, runs).status == "failed"
    assert look(study.cells[0], runs).status == "done"
    capsys.readouterr()
    less = study_file(tmp_path, images)
    assert cli.main(["study", str(less), "--runs-dir", str(runs), *WORDS, "--cells", cell.name]) == 0
    assert "all 1 cells are finished" in capsys.readouterr().out


def test_what_is_committed_without_weights_counts_as_done(study: Study, tmp_path: Path, images: Path) -> None:
    """config.yaml, env.json, metrics.jsonl, eval.json and cell.json are enough, unless more is asked for."""
    runs, cell = tmp_path / "runs", study.cells[0]
    cells.run(cell, runs, MACHINE)
    for pattern in ("*.pt", "*.safetensors", ".lock", "cell.log"):
        for path in (runs / cell.name).glob(pattern):
            path.unlink()
    assert look(cell, runs).status == "done"
    more = read(study_file(tmp_path, images, FILE + "  - {{attacks: pgd2}}\n"))
    with pytest.raises(
        ValueError, match=r"finished but for the evaluation .*pgd2.*model-best.safetensors is not there"
    ):
        look(more.cells[0], runs)


def test_weights_that_others_start_from_are_trained_again(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And if they are the same, nothing else is done again."""
    runs, file = tmp_path / "runs", study_file(tmp_path, images)
    words = [str(file), "--runs-dir", str(runs), *WORDS]
    study = read(file)
    first, second = study.cells[0], next(cell for cell in study.cells if cell.start == study.cells[0].name)
    assert cli.main(["study", *words, "--cells", first.name]) == 0
    folder = RunFolder(runs / first.name)
    metrics, evaluation = folder.read_metrics(), folder.evaluation.read_text()
    weights = folder.best_weights.read_bytes()
    for path in (folder.best_weights, folder.best):
        path.unlink()
    assert cli.main(["study", *words, "--cells", first.name]) == 0
    assert not folder.best_weights.exists()  # nobody needs them
    capsys.readouterr()
    assert cli.main(["study", *words, "--cells", second.name]) == 0
    assert f"{first.name} is opened again" in capsys.readouterr().err
    assert [look(cell, runs).status for cell in (first, second)] == ["done", "done"]
    assert folder.evaluation.read_text() == evaluation
    assert [line["train"] for line in folder.read_metrics()] == [line["train"] for line in metrics]
    assert "resumed" not in json.loads(folder.env.read_text())  # it began anew
    assert folder.best_weights.read_bytes() == weights
    # Weights of another kind of machine: what was evaluated does not count any more.
    record = json.loads(evaluation)
    for entry in record["evaluations"]:
        entry["weights_sha256"] = "0" * 64
    folder.evaluation.write_text(json.dumps(record))
    (runs / second.name / "cell.json").unlink()
    for path in (folder.best_weights, folder.best):
        path.unlink()
    assert cli.main(["study", *words, "--cells", second.name]) == 0
    again = json.loads(folder.evaluation.read_text())["evaluations"]
    assert [entry["weights_sha256"] for entry in again] == [
        entry["weights_sha256"] for entry in json.loads(evaluation)["evaluations"]
    ]


def test_weights_come_back_from_checkpoints(study: Study, tmp_path: Path, images: Path) -> None:
    """Without training."""
    runs, cell = tmp_path / "runs", study.cells[0]
    cells.run(cell, runs, MACHINE)
    folder = RunFolder(runs / cell.name)
    kept = {path: path.read_bytes() for path in (folder.weights, folder.best_weights, folder.metrics)}
    more = read(study_file(tmp_path, images, FILE + "  - {{attacks: pgd2, checkpoint: last}}\n")).cells[0]
    for path in (folder.weights, folder.best_weights):
        path.unlink()
    cells.run(more, runs, MACHINE)
    assert look(more, runs).status == "done"
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_cell_that_is_stopped_in_its_first_epoch_goes_on(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a best one; again and again, and what is half trained never counts as trained."""
    cell, folder, train_step, steps = study.cells[0], RunFolder(tmp_path / study.cells[0].name), Trainer.train_step, []

    def signalled(trainer: Trainer, network: torch.nn.Module) -> None:
        steps.append(trainer.step)
        os.kill(os.getpid(), signal.SIGTERM)
        train_step(trainer, network)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    for stops in range(1, 5):
        with pytest.raises(Interrupted):
            cells.run(cell, tmp_path, MACHINE)
        assert steps == list(range(stops))
        assert not kept(tmp_path, cell.name)["trained"]
    assert len(folder.read_metrics()) == 1  # of three steps
    for path in (folder.best_weights, folder.best):
        path.unlink()
    with pytest.raises(Interrupted):
        cells.run(cell, tmp_path, MACHINE)
    assert steps[-1] == 0  # the best epoch's weights are gone for good


def test_a_new_evaluation_is_made_up_for(study: Study, tmp_path: Path, images: Path) -> None:
    runs, cell = tmp_path / "runs", study.cells[0]
    cells.run(cell, runs, MACHINE)
    trained = RunFolder(runs / cell.name).last.stat().st_mtime_ns
    more = read(study_file(tmp_path, images, FILE + "  - {{attacks: pgd2}}\n")).cells[0]
    assert look(more, runs).status == "waiting"
    cells.run(more, runs, MACHINE)
    assert look(more, runs).status == "done"
    assert RunFolder(runs / cell.name).last.stat().st_mtime_ns == trained
    evaluations = json.loads(RunFolder(runs / cell.name).evaluation.read_text())["evaluations"]
    assert {e["checkpoint"]: list(e["attacks"]) for e in evaluations} == {"best": ["fgsm", "pgd2"], "last": ["fgsm"]}


def test_other_options_are_another_cell(study: Study, tmp_path: Path, images: Path) -> None:
    runs = tmp_path / "runs"
    cells.run(study.cells[0], runs, MACHINE)
    other = read(study_file(tmp_path, images, FILE.replace("lr: 0.01", "lr: 0.02"))).cells[0]
    for call in (lambda: look(other, runs), lambda: cells.run(other, runs, MACHINE)):
        with pytest.raises(
            ValueError, match=r"other options than the study asks for now \(lr: 0.02 here, 0.01 there\)"
        ):
            call()


def test_surrogates_without_weights_are_trained_again(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a cell that can begin at once, and with what the surrogate itself starts from."""
    runs, words = tmp_path / "runs", ["--runs-dir", str(tmp_path / "runs"), *WORDS]
    only = FILE.replace("seed: [0, 1]", "seed: 0")
    assert cli.main(["study", str(study_file(tmp_path, images, only)), *words]) == 0
    trades, faal = (RunFolder(runs / cell.name) for cell in read(tmp_path / "tiny.yaml").cells)
    for folder in (trades, faal):
        for path in (folder.last, folder.best, folder.weights, folder.best_weights):
            path.unlink()
    more = only.replace("evaluations:", "  - {{method: at}}\nevaluations:") + (
        "  - {{attacks: fgsm, limit: 9, surrogates: [{{method: faal}}], only: {{method: at}}}}\n"
    )
    capsys.readouterr()
    file = study_file(tmp_path, images, more)
    assert cli.main(["study", str(file), *words, "--print-commands"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"{folder.path.name} is opened again: others need its weights, which are not there" for folder in (faal, trades)
    ]
    assert len(said.out.splitlines()) == 3
    assert trades.env.is_file()  # commands are printed, nothing is begun anew
    assert cli.main(["study", str(file), *words]) == 0, capsys.readouterr().out
    assert statuses(read(file), runs) == ["done"] * 3
    assert faal.best_weights.is_file()


def test_two_processes_at_one_cell(study: Study, tmp_path: Path, images: Path) -> None:
    """The second one leaves everything as it is, and a study that finds it busy waits."""
    runs, cell = tmp_path / "runs", study.cells[0]
    folder = RunFolder(runs / cell.name)
    words = ["study", str(tmp_path / "tiny.yaml"), "--runs-dir", str(runs), *WORDS, "--cells", cell.name]
    with folder.locked(folder.cell_lock):
        with pytest.raises(cells.BusyError, match="another process"):
            cells.run(cell, runs, MACHINE)
        assert not folder.cell.exists()
        second = python(*words, "--executor", "inline")
        assert second.wait() == command.BUSY, second.communicate()[0]
        assert not folder.cell.exists()
        grid = command.Drive(study, [cell], command.Options(tmp_path / "tiny.yaml", runs), Idle())
        grid.trained[cell.name] = set()
        grid._ended(cell, command.BUSY)
        assert not grid.failed
        assert grid.step()  # it waits
        assert not grid.failed
        assert not grid.jobs
    assert cli.main(words) == 0
    assert look(cell, runs).status == "done"


def test_a_sign_of_life_that_cannot_be_written_ends_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cells.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "cell.beat":
            raise OSError("no space left")
        write(path, text)

    monkeypatch.setattr(cells, "write_text", full)
    cells.run(study.cells[0], tmp_path, MACHINE)
    assert look(study.cells[0], tmp_path).status == "done"


def test_torn_and_damaged_metrics(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that was cut off is written again; damage further up is that cell's failure alone."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    file, runs = study_file(tmp_path, images, FILE[: FILE.index("  - {{method: faal")] + "evaluations: []\n"), tmp_path
    words = [str(file), "--runs-dir", str(runs), *WORDS]
    first, second = read(file).cells
    assert cli.main(["study", *words, "--cells", first.name]) == 0
    folder = RunFolder(runs / first.name)
    whole = folder.metrics.read_text()
    folder.metrics.write_text(whole + '{"epoch": ')
    assert (look(first, runs).status, look(first, runs).epoch) == ("done", 2)
    folder.metrics.write_text('{"epoch": \n' + whole)
    assert look(first, runs).status == "failed"
    capsys.readouterr()
    assert cli.main(["study", *words]) == 1
    said = capsys.readouterr().out
    assert f"failed: {first.name}: {folder.metrics} is damaged" in said
    assert look(second, runs).status == "done"


def test_a_study_that_nothing_can_go_on_with_ends(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "can_go_on", lambda *_: False)
    grid = command.Drive(study, study.cells, command.Options(tmp_path / "tiny.yaml", tmp_path), Idle())
    while grid.step():
        pass
    first, *_ = grid.failed.values()
    assert first == "it waits for something that nothing makes"
    assert sum("which failed" in why for why in grid.failed.values()) == 2
    assert len(grid.failed) == 4


def test_a_failed_evaluation_stops_no_other_cell(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAAL starts from a TRADES network that is trained, though it could not be evaluated."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    file, runs = study_file(tmp_path, images, FILE.replace("seed: [0, 1]", "seed: 0")), tmp_path / "runs"
    RunFolder(runs / read(file).cells[0].name).evaluation.mkdir(parents=True)  # where a file is to be written
    assert cli.main(["study", str(file), "--runs-dir", str(runs), *WORDS]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 cells failed" in said
    assert statuses(read(file), runs) == ["failed", "done"]


def test_a_failure_is_kept_and_tried_again(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cell = tmp_path / "runs", study.cells[0]

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(cells.evaluate, "main", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            cells.run(cell, runs, MACHINE)
    state = look(cell, runs)
    assert (state.status, state.stage) == ("failed", "no memory")
    cells.run(cell, runs, MACHINE)
    assert look(cell, runs).status == "done"
    assert kept(runs, cell.name)["error"] is None


def test_signs_of_life(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cell = tmp_path / "runs", study.cells[0]
    beat = RunFolder(runs / cell.name).beat
    beat.parent.mkdir(parents=True)
    beat.write_text(json.dumps({"host": "elsewhere", "pid": 1, "stage": "training"}))
    assert (look(cell, runs).status, look(cell, runs).stage) == ("running", "training")
    old = time.time() - cells.DEAD_SECONDS - 1
    os.utime(beat, (old, old))
    assert look(cell, runs).status == "waiting"
    done = subprocess.Popen(["true"])
    done.wait()
    beat.write_text(json.dumps({"host": cells.socket.gethostname(), "pid": done.pid, "stage": "training"}))
    assert look(cell, runs).status == "waiting"  # that process has ended


@pytest.mark.parametrize("content", ["{", '{"version": 99}'])
def test_a_damaged_record_is_named(study: Study, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "runs" / study.cells[0].name
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(content)
    with pytest.raises(ValueError, match=r"cell\.json"):
        look(study.cells[0], tmp_path / "runs")


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_a_study_from_start_to_end(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    file, runs = study_file(tmp_path, images), tmp_path / "runs"
    words = [str(file), "--runs-dir", str(runs), *WORDS]
    assert cli.main(["study", *words, "--jobs", str(min(2, len(os.sched_getaffinity(0))))]) == 0
    study, said = read(file), capsys.readouterr().out
    assert statuses(study, runs) == ["done"] * 4
    assert "all 4 cells are finished" in said
    for cell in study.cells:
        assert f"{cell.name}: done (" in said
    log = (runs / study.cells[-1].name / "cell.log").read_text()
    assert "tensors come from" in log  # it started from the TRADES network
    stamps = {cell.name: RunFolder(runs / cell.name).last.stat().st_mtime_ns for cell in study.cells}
    assert cli.main(["study", *words]) == 0  # nothing is left to do
    assert stamps == {cell.name: RunFolder(runs / cell.name).last.stat().st_mtime_ns for cell in study.cells}
    capsys.readouterr()
    assert cli.main(["status", str(file), "--runs-dir", str(runs)]) == 0
    assert "tiny: 4 done" in capsys.readouterr().out


def test_commands_run_one_cell_each(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = study_file(tmp_path, images), tmp_path / "runs"
    words = [str(file), "--runs-dir", str(runs), *WORDS]
    cli.main(["study", *words, "--print-commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert not runs.exists()
    done = subprocess.run(lines[0], shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert statuses(read(file), runs) == ["done", "waiting", "waiting", "waiting"]
    cli.main(["study", *words, "--print-commands"])
    assert capsys.readouterr().out.splitlines() == lines[1:]
    cli.main(["study", *words, "--print-commands", "--cells", "*-trades-*"])
    assert capsys.readouterr().out.splitlines() == [line for line in lines[1:] if "-trades-" in line]
    last = read(file).cells[-1]
    assert cli.main(["study", *words, "--executor", "inline", "--cells", last.name]) == 0
    assert f"{last.name} waits for {last.start} to be trained" in capsys.readouterr().out


def test_a_failed_cell_stops_nothing_but_what_needs_it(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRADES of seed 1 cannot train: its folder is full of something else."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    file, runs = study_file(tmp_path, images), tmp_path / "runs"
    study = read(file)
    names = [cell.name for cell in study.cells]
    bad = next(name for name in names if "trades-seed1" in name)
    (runs / bad).mkdir(parents=True)
    (runs / bad / "diary.txt").write_text("mine")
    assert cli.main(["study", str(file), "--runs-dir", str(runs), *WORDS]) == 1
    said = capsys.readouterr().out
    assert [s for s, name in zip(statuses(study, runs), names, strict=True) if "seed0" in name] == ["done", "done"]
    assert look(study[bad], runs).status == "failed"
    assert f"failed: {bad}: {runs / bad} exists and is no run folder" in said
    assert f"it needs {bad}, which failed" in said
    assert "2 of 4 cells failed; the same command tries them again" in said
    assert (runs / bad / "diary.txt").read_text() == "mine"


class Ended(Job):
    def __init__(self, status: int):
        self.status = status

    def poll(self) -> int:
        return self.status

    def stop(self) -> None:
        pass


class AtOnce(Executor):
    """Two jobs at a time, of which each has ended when the next is started, and is looked at only later."""

    jobs = 2

    def start(self, name: str, command: Sequence[str], log: Path) -> Job:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return Ended(subprocess.call(command, stdout=output, stderr=output))


class Idle(Executor):
    """Says that all went well, and does nothing."""

    jobs = 2

    def start(self, name: str, command: Sequence[str], log: Path) -> Job:
        return Ended(0)


@pytest.mark.parametrize("executor", [Local(jobs=1), AtOnce()])
def test_evaluations_wait_for_their_surrogates(
    executor: Executor,
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two networks that attack each other: both are trained first, in whatever order the processes end."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(command, "make_executor", lambda options: executor)
    text = FILE[: FILE.index("  - {{method: faal")] + (
        "evaluations:\n"
        "  - {{attacks: fgsm, limit: 9, surrogates: [{{seed: 1}}], only: {{seed: 0}}}}\n"
        "  - {{attacks: fgsm, limit: 9, surrogates: [{{seed: 0}}], only: {{seed: 1}}}}\n"
    )
    file, runs = study_file(tmp_path, images, text), tmp_path / "runs"
    assert cli.main(["study", str(file), "--runs-dir", str(runs), *WORDS]) == 0, capsys.readouterr().out
    for cell in read(file).cells:
        (evaluation,) = json.loads(RunFolder(runs / cell.name).evaluation.read_text())["evaluations"]
        assert cell.needs[0] in evaluation["transfer"]["pgd20"]["sources"]


def test_a_job_that_did_nothing_has_failed(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it would be started for ever."""
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(command, "make_executor", lambda options: Idle())
    file = study_file(tmp_path, images)
    assert cli.main(["study", str(file), "--runs-dir", str(tmp_path / "runs"), *WORDS]) == 1
    said = capsys.readouterr().out
    assert said.count("its process ended with status 0") == 2
    assert "4 of 4 cells failed" in said


def test_kill_and_go_on_loses_nothing(tmp_path: Path, images: Path) -> None:
    """SIGKILL to the study and to what it runs, SIGTERM later: in the end all is as without."""
    long = FILE.replace("epochs: 2", "epochs: 100").replace("seed: [0, 1]", "seed: 0, checkpoint_minutes: 0")
    file = study_file(tmp_path, images, long)
    study = read(file)
    for runs, kills in ((tmp_path / "whole", ()), (tmp_path / "parts", (signal.SIGKILL, signal.SIGTERM))):
        words = ("study", str(file), "--runs-dir", str(runs), *WORDS)
        for i, kill in enumerate(kills):
            process = python(*words)
            metrics = RunFolder(runs / study.cells[0].name).metrics
            begin = time.monotonic()
            while not metrics.is_file() or len(metrics.read_text().splitlines()) < 10 * (i + 1):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() - begin < 120
                time.sleep(0.01)
            if kill == signal.SIGKILL:  # the power fails
                os.kill(json.loads(RunFolder(runs / study.cells[0].name).beat.read_text())["pid"], kill)
            process.send_signal(kill)
            said = process.communicate()[0]
            assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 128 + signal.SIGTERM), said
            if kill == signal.SIGTERM:
                assert "stopped by SIGTERM; the same command goes on" in said
                assert look(study.cells[0], runs).status == "waiting"
        process = python(*words)
        assert process.wait() == 0, process.communicate()[0]
    for cell in study.cells:
        whole, parts = (RunFolder(tmp_path / name / cell.name) for name in ("whole", "parts"))
        results = [result(folder) for folder in (whole, parts)]
        for epoch in ("last", "best"):
            starts = [str(each[epoch]["config"].pop("init_weights")) for each in results]
            assert starts[1] == starts[0].replace("whole", "parts")
        assert_same(*results)
        one, other = (json.loads(folder.evaluation.read_text())["evaluations"] for folder in (whole, parts))
        assert [e["correct"] for e in one] == [e["correct"] for e in other]


# ---- executors -------------------------------------------------------------------------------------------------------


def ended(job: Job) -> int:
    begin = time.monotonic()
    while (status := job.poll()) is None:
        assert time.monotonic() - begin < 120
        time.sleep(0.05)
    return status


def test_local_jobs_have_cpus_and_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = [
        sys.executable,
        "-c",
        "import os; print(sorted(os.sched_getaffinity(0)), os.environ['CUDA_VISIBLE_DEVICES'])",
    ]
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    half = len(cpus) // 2
    executor = Local(jobs=2, threads=half, gpus=2)
    jobs = [executor.start(str(i), show, tmp_path / f"{i}.log") for i in range(2)]
    assert [ended(job) for job in jobs] == [0, 0]
    assert [(tmp_path / f"{i}.log").read_text() for i in range(2)] == [
        f"{cpus[:half]} 4\n",
        f"{cpus[half : 2 * half]} 7\n",
    ]
    assert ended(executor.start("2", show, tmp_path / "2.log")) == 0  # a place is free again
    assert ended(Local(jobs=1, threads=1, gpus=1).start("3", show, tmp_path / "3.log")) == 0
    assert (tmp_path / "3.log").read_text() == f"{cpus} 4\n"  # another study may run beside it
    assert Local(gpus=2).jobs == 2
    with pytest.raises(ValueError, match=rf"--jobs 2 of --threads {len(cpus)} need {2 * len(cpus)} CPUs"):
        Local(jobs=2, threads=len(cpus))


@pytest.mark.parametrize(
    ("cores", "memory", "threads", "jobs"),
    [(8, 100.0, None, 8), (8, 9.0, None, 2), (8, None, 2, 4), (2, 1.0, None, 1), (2, 100.0, 2, 1)],
)
def test_a_machine_without_gpu_is_filled(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory: float | None, threads: int | None, jobs: int
) -> None:
    monkeypatch.setattr(environment, "physical_cores", lambda: cores)
    monkeypatch.setattr(environment, "memory_gib", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    executor = Local(threads=threads)
    assert (executor.jobs, executor.threads) == (jobs, threads or cores // jobs)
    assert Local(jobs=1).threads == cores


def test_a_local_job_can_be_stopped(tmp_path: Path) -> None:
    job = Local().start("x", ["sleep", "100"], tmp_path / "x.log")
    assert job.poll() is None
    job.stop()
    assert ended(job) == -signal.SIGTERM


def clusters(tmp_path: Path, kind: str) -> Executor:
    if kind == "slurm":
        pytest.importorskip("submitit")
        return Slurm(tmp_path / "submitit", {"timeout_min": 5}, 10, cluster="local")
    pytest.importorskip("ray")
    return Ray({"num_cpus": 1}, 10)


@pytest.fixture
def interrupts(kind: str) -> Iterator[None]:
    """Ignored, as in what a shell has started in the background; but submitit's local executor cancels by them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler if kind == "slurm" else signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_a_study_on_a_cluster(
    kind: str, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """submitit's local executor, and a local Ray cluster: statuses, logs, a job that fails, one that is stopped."""
    executor = clusters(tmp_path, kind)
    try:
        print_and_fail = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]
        assert ended(executor.start("fails", print_and_fail, tmp_path / "fails.log")) == 3
        assert (tmp_path / "fails.log").read_text() == "said\n"
        say_and_wait = ["sh", "-c", "echo $$; exec sleep 1000"]
        endless = executor.start("endless", say_and_wait, tmp_path / "endless.log")
        begin = time.monotonic()
        while not (said := (tmp_path / "endless.log")).is_file() or not said.read_text():
            assert time.monotonic() - begin < 120
            time.sleep(0.1)
        assert endless.poll() is None
        endless.stop()
        assert ended(endless) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(said.read_text()), 0)
        monkeypatch.setattr(command, "make_executor", lambda options: executor)
        file, runs = study_file(tmp_path, images), tmp_path / "runs"
        status = cli.main(["study", str(file), "--runs-dir", str(runs), "--executor", kind, *WORDS])
        assert status == 0, capsys.readouterr().out
        assert statuses(read(file), runs) == ["done"] * 4
    finally:
        executor.close()


def test_what_is_asked_of_executors(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", str(study_file(tmp_path, images)), "--runs-dir", str(tmp_path / "runs")]
    for more, message in (
        (["--resources", "a=1"], "--resources are for clusters"),
        (["--executor", "slurm", "--resources", "a"], "--resources must be NAME=VALUE, got a"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--cells", "nope"], "has no cell 'nope'"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    for make in (lambda: Slurm(tmp_path, {}, 1), lambda: Ray({}, 1)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'dtrades-fast\[cluster\]'"):
            make()


def test_threads_of_torch_are_as_asked(study: Study, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        cells.run(study.cells[0], tmp_path, Machine("cpu", 1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
