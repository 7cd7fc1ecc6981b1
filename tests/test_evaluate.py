"""Evaluation: the figures, the attacks by name, the record and the table."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console

from dtrades_fast import data as datasets
from dtrades_fast.attacks import APGD, FAB, FGSM, PGD, Square
from dtrades_fast.attacks.autoattack import AutoAttack
from dtrades_fast.config import load
from dtrades_fast.evaluation import evaluate, metrics, report
from dtrades_fast.evaluation.evaluate import Options
from dtrades_fast.evaluation.official import OfficialAutoAttack, OfficialStage
from dtrades_fast.evaluation.suites import make_attack
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import create_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that has learnt its classes, more or less."""
    torch.set_num_threads(1)
    images = tiny_run.images(tmp_path_factory.mktemp("images"))
    options = ("--epochs", "8", "--lr", "0.05", "--method", "trades")
    folder, _ = tiny_run.run(images, tmp_path_factory.mktemp("runs"), *options)
    return folder


def options(folder: RunFolder, **given: object) -> Options:
    return Options(runs=(str(folder.path),), device="cpu", threads=1, **given)  # type: ignore[arg-type]


def evaluated(folder: RunFolder, **given: object) -> dict[str, Any]:
    asked = options(folder, **given)
    return evaluate.evaluate(evaluate.load(str(folder.path), asked), asked)[0]


def flags(text: str) -> torch.Tensor:
    return torch.tensor([character == "1" for character in text])


def test_figures_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    natural, robust = flags("11101110"), flags("11000010")
    figures = metrics.robustness(natural, robust, labels, ("a", "b", "never", "c"))
    assert metrics.accuracy(natural) == 0.75
    assert (figures.ra, figures.rd, figures.asr_all) == (0.375, 0.375, 0.625)
    assert figures.asr_correct == 0.5
    assert figures.per_class == {"a": 0.5, "b": 0.0, "c": 0.5}
    assert (figures.worst_class, figures.worst_class_ra, figures.spread) == ("b", 0.0, 0.5)
    assert metrics.robustness(flags("00"), flags("00"), labels[:2], ("a", "b")).asr_correct is None


def test_record(folder: RunFolder) -> None:
    record = evaluated(folder, attacks="fgsm,pgd3-r2", epsilon="16/255")
    assert (record["epsilon"], record["points"], record["checkpoint"]) == ("16/255", 9, "best")
    assert record["attacks"]["pgd3-r2"]["settings"]["restarts"] == 2
    assert record["attacks"]["pgd3-r2"]["settings"]["epsilon"] == 16 / 255
    natural = flags(record["correct"])
    assert record["na"] == natural.double().mean().item()
    assert set(record["per_class"]) == {"band0", "band1", "band2"}
    for figures in record["attacks"].values():
        assert figures["ra"] == flags(figures["correct"]).double().mean().item()
        assert figures["rd"] == pytest.approx(record["na"] - figures["ra"])
        assert figures["asr_all"] == pytest.approx(1 - figures["ra"])
        assert figures["asr_correct"] == pytest.approx(figures["rd"] / record["na"])
    json.dumps(record, allow_nan=False)


def test_record_is_that_of_the_model(folder: RunFolder) -> None:
    """Against the attack applied here to the weights of either checkpoint."""
    config = load(folder.config)
    sets = datasets.load(config.data.dataset, "data", "cpu")
    for name, file in (("best", folder.best_weights), ("last", folder.weights)):
        model = create_model(config, sets.info).eval()
        model.load_state_dict(checkpoint.load_weights(file))
        images, labels = sets.test.images(slice(None)), sets.test.labels
        record = evaluated(folder, attacks="fgsm", checkpoint=name)
        assert record["epsilon"] == "8/255"
        adv = FGSM(8 / 255)(model, images, labels)
        assert flags(record["correct"]).equal(model(images).argmax(1) == labels)
        assert flags(record["attacks"]["fgsm"]["correct"]).equal(model(adv).argmax(1) == labels)


def test_independent_of_the_batch_size(folder: RunFolder) -> None:
    records = []
    for size in (1, 4, 100):
        for asked in (
            {"attacks": "pgd3,pgd2-r3", "split": "validation"},
            {"attacks": "pgd3,apgd-ce"},
        ):
            record = evaluated(folder, epsilon="0.2", batch_size=size, **asked)
            records.append((record["correct"], {name: a["correct"] for name, a in record["attacks"].items()}))
    assert records[0] == records[2] == records[4]
    assert records[1] == records[3] == records[5]


def test_limit_takes_every_class(folder: RunFolder) -> None:
    record = evaluated(folder, attacks="", limit=6)
    assert record["points"] == 6
    assert len(record["per_class"]) == 3
    assert len(record["ids"]) == 6


def test_attack_names() -> None:
    assert make_attack("fgsm", 0.1) == FGSM(0.1)
    assert make_attack("fgsm", 0.5, norm="l2") == PGD(0.5, 1, 0.5, "l2", start="clean")
    assert make_attack("pgd20", 0.1) == PGD(0.1, 20, stop_early=True)
    assert make_attack("pgd7-r5", 0.1, 0.02) == PGD(0.1, 7, 0.02, restarts=5, stop_early=True)
    assert make_attack("pgd20", 0.5, norm="l2") == PGD(0.5, 20, norm="l2", stop_early=True)
    assert make_attack("pgd20-r5", 0.5, norm="l2") == PGD(0.5, 20, norm="l2", restarts=5, stop_early=True)
    assert make_attack("autoattack", 0.1) == AutoAttack(0.1)
    assert make_attack("autoattack", 0.1, norm="l2", classes=5) == AutoAttack(0.1, "l2", 5)
    assert make_attack("autoattack", 0.1, official=True) == OfficialAutoAttack(0.1)
    for part in ("apgd-ce", "apgd-t", "fab-t"):
        assert make_attack(part, 0.1, norm="l2", official=True) == OfficialStage(part, 0.1, "l2")
    assert make_attack("square", 0.1, official=True) == make_attack("square", 0.1)  # for its curve
    assert not make_attack("pgd5", 0.1, stop_early=False).stop_early  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the official fab-t goes for 9 wrong classes and the model has 5"):
        make_attack("fab-t", 0.1, classes=5, official=True)
    assert make_attack("apgd-ce", 0.1) == APGD(0.1)
    assert make_attack("apgd-t", 0.1, classes=6) == APGD(0.1, loss="dlr", targets=5)
    assert make_attack("fab-t", 0.1, norm="l2") == FAB("l2", targets=9, epsilon=0.1)
    assert make_attack("square", 0.1) == Square(0.1, 5000)
    with pytest.raises(ValueError, match="apgd-t needs at least 4 classes, got 3"):
        make_attack("apgd-t", 0.1, classes=3)
    for name in ("pgd", "pgd0", "pgd20-r0", "nope", "pgd20-l2"):
        with pytest.raises(ValueError, match=f"unknown attack '{name}'; known are fgsm, pgdK"):
            make_attack(name, 0.1)


def test_eval_json(folder: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"

    def stored() -> list[dict]:  # type: ignore[type-arg]
        return json.loads(path.read_text())["evaluations"]

    record = evaluated(folder, attacks="fgsm")
    evaluate.write(path, record)
    evaluate.write(path, record)
    assert stored() == [record]
    other = evaluated(folder, attacks="pgd2")
    evaluate.write(path, other)  # the same points: one record with both attacks
    assert list(stored()[0]["attacks"]) == ["fgsm", "pgd2"]
    evaluate.write(path, {**record, "epsilon": "0.5"})
    assert [r["epsilon"] for r in stored()] == ["8/255", "0.5"]
    evaluate.write(path, {**record, "weights_sha256": "trained on"})  # what was measured on other weights goes
    assert [r["weights_sha256"] for r in stored()] == ["trained on"]
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_table(folder: RunFolder) -> None:
    record = evaluated(folder, attacks="fgsm,pgd2", epsilon="8/255")
    output = io.StringIO()
    Console(file=output, width=80).print(report.table([record, {**record, "run": "another", "epsilon": "0.1"}]))
    text = output.getvalue()
    assert "Linf epsilon 8/255, Linf epsilon 0.1; 9 test images" in " ".join(text.split())
    assert "fgsm 8/255" in text
    assert "pgd2 0.1" in text
    assert "another" in text
    assert f"band{record['attacks']['fgsm']['worst_class'][-1]}: " in text
    assert "…" not in text


def test_main_writes_and_prints(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder.path.name, "--runs-dir", str(folder.path.parent), "--attacks", "fgsm", "--threads", "1"]
    assert evaluate.main(words, "evaluate") == 0
    text = capsys.readouterr().out
    assert folder.path.name in text
    assert "band1" in text
    assert json.loads((folder.path / "eval.json").read_text())["evaluations"][0]["attacks"]["fgsm"]


def test_the_same_weights_are_evaluated_once(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(folder.path, run.path, ignore=shutil.ignore_patterns("eval*"))
    shutil.copy(run.best_weights, run.weights)

    def said(*words: str) -> bool:
        assert evaluate.main([str(run.path), "--threads", "1", *words], "evaluate") == 0
        return "the very same weights" in capsys.readouterr().out

    def records() -> list[dict[str, Any]]:
        return list(json.loads(run.evaluation.read_text())["evaluations"])

    assert not said("--attacks", "fgsm,pgd2")
    assert not said("--attacks", "fgsm,pgd2")  # of this checkpoint: measured again
    assert said("--attacks", "pgd2", "--checkpoint", "last")
    best, last = records()
    assert (best["checkpoint"], last["checkpoint"]) == ("best", "last")
    assert {**last, "checkpoint": "best", "source": best["source"]} == best
    assert "last epoch" in last["source"]
    for other in (("--attacks", "pgd3"), ("--seed", "1"), ("--limit", "4"), ("--epsilon", "1/255"), ("--overwrite",)):
        assert not said("--attacks", "fgsm", *other, "--checkpoint", "last"), other
    weights = checkpoint.load_weights(run.weights)
    checkpoint.save_weights(run.weights, {name: tensor * 2 for name, tensor in weights.items()})
    assert not said("--attacks", "fgsm", "--checkpoint", "last")


def test_refusals(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"nope is no run folder .*runs in .*: {folder.path.name}"):
        evaluate.find_run("nope", str(folder.path.parent))
    with pytest.raises(ValueError, match="--batch-size must be at least 1"):
        evaluated(folder, batch_size=0)
    with pytest.raises(ValueError, match="--epsilon must be a number >= 0"):
        evaluated(folder, epsilon="x")
    with pytest.raises(ValueError, match="needs at least one run"):
        evaluate.main([], "evaluate")
    young = RunFolder(tmp_path)
    young.config.write_text(folder.config.read_text())
    with pytest.raises(FileNotFoundError, match="has not finished its first epoch"):
        evaluated(young)
    young.best_weights.write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match="is damaged"):
        evaluated(young)
