"""TensorBoard: its log says what metrics.jsonl says, also after a kill, and is no part of what a run computes."""

import json
import sys
from pathlib import Path

import pytest
import tiny_run

from dtrades_fast.config import parse
from dtrades_fast.training import tracking
from dtrades_fast.training.run_folder import RunFolder

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def logged(folder: RunFolder) -> dict[str, dict[int, float]]:
    """Tag -> epoch -> value, by TensorBoard's own reader."""
    reader = event_accumulator.EventAccumulator(str(folder.tensorboard))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    events = {tag: reader.Scalars(tag) for tag in tags}
    assert all(len({event.step for event in part}) == len(part) for part in events.values()), "an epoch came twice"
    return {tag: {event.step: event.value for event in part} for tag, part in events.items()}


def expected(folder: RunFolder) -> dict[str, dict[int, float]]:
    result: dict[str, dict[int, float]] = {}
    for line in folder.read_metrics():
        for tag, value in tracking.scalars(line):
            result.setdefault(tag, {})[line["epoch"]] = pytest.approx(value, rel=1e-6, nan_ok=True)
    return result


def test_scalars_of_a_line() -> None:
    line = {
        "epoch": 3,
        "lr": 0.1,
        "train": {"loss": {"mean": 1.5, "std": 0.25}},
        "validation": {"na": 0.5},
        "monitor": {"fosc": {"mean": 2.0}, "adv_minus_clean": None, "lambda": {"by_class": [{"mean": 1}]}},
    }
    assert dict(tracking.scalars(line)) == {
        "lr": 0.1,
        "train/loss": 1.5,
        "train/loss/std": 0.25,
        "validation/na": 0.5,
        "monitor/fosc/mean": 2.0,
    }


def test_round_trip(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--method", "dtrades", "--track", "tensorboard")
    found = logged(folder)
    assert found == expected(folder)
    assert sorted(found["train/loss"]) == [1, 2, 3]
    assert sorted(found["defense/lambda_alpha"]) == [2, 3]  # calibrated after the first epoch
    assert {"validation/ra", "train/lambda/std", "monitor/fosc/p95"} <= set(found)


def test_nothing_is_logged_by_default(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--epochs", "1")
    assert not folder.tensorboard.exists()


def test_the_result_does_not_depend_on_it(data: Path, tmp_path: Path) -> None:
    with_it, _ = tiny_run.run(data, tmp_path / "a", "--epochs", "1", "--track", "tensorboard")
    without, _ = tiny_run.run(data, tmp_path / "b", "--epochs", "1")
    assert with_it.weights.read_bytes() == without.weights.read_bytes()
    assert with_it.best_weights.read_bytes() == without.best_weights.read_bytes()


def test_resumed_with_the_epochs_before_and_without_what_lay_behind_the_checkpoint(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path)  # begun without a tracker
    log = tracking.TensorBoard(folder.tensorboard)
    log.start(folder.read_metrics())
    log.add({"epoch": 4, "lr": 123.0})  # killed before the checkpoint of epoch 4
    log.close()
    assert logged(folder)["lr"][4] == 123
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"epoch": 4, "lr": 123.0}) + "\n")
    tiny_run.run(data, tmp_path, "--resume", "--track", "tensorboard")
    assert logged(folder) == expected(folder)
    assert sorted(logged(folder)["lr"]) == [1, 2, 3]


def test_may_change_on_resume_and_is_kept_otherwise(data: Path, tmp_path: Path) -> None:
    first = tiny_run.configuration(data, tmp_path, "--track", "tensorboard")
    assert first.differences({**first.stored(), "track": "none"}) == []
    old = {name: value for name, value in first.stored().items() if name != "track"}
    assert first.differences(old) == []  # a run from before there were trackers
    first.folder.mkdir(parents=True)
    (first.folder / "config.yaml").write_text(first.to_yaml())
    words = ["--runs-dir", str(tmp_path), "--run", first.run_name, "--resume"]
    assert parse(words).run.track == "tensorboard"
    assert parse([*words, "--track", "none"]).run.track == "none"


def test_overwrite_deletes_the_log(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--epochs", "1", "--track", "tensorboard")
    assert logged(folder)
    tiny_run.run(data, tmp_path, "--epochs", "1", "--overwrite")
    assert not folder.tensorboard.exists()


def test_a_missing_package_is_said_before_anything_is_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dtrades_fast\[track\]'"):
        tiny_run.run(data, tmp_path, "--track", "tensorboard")
    assert not list(tmp_path.iterdir())
