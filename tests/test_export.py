"""Export: the same logits to the bit, names that survive RobustBench's loader, a card that says what it is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

from dtrades_fast import cli, models
from dtrades_fast.evaluation.evaluate import Options, evaluate, load, write
from dtrades_fast.evaluation.export import export, main
from dtrades_fast.evaluation.targets import load_run, load_target
from dtrades_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    options = ("--epochs", "4", "--lr", "0.05", "--method", "trades", "--beta", "5", "--run", "one")
    return tiny_run.run(images, runs, *options)[0]


@pytest.mark.parametrize("epoch", ["best", "last"])
def test_exported_networks_give_the_same_logits_to_the_bit(run: RunFolder, epoch: str, tmp_path: Path) -> None:
    trained = load_run(run, epoch, None, "cpu", None)  # type: ignore[arg-type]
    weights, _ = export(run, tmp_path / "new" / "folder", epoch)  # type: ignore[arg-type]
    assert weights.name == ("one.pt" if epoch == "best" else "one-last.pt")
    images = trained.sets.test.images(slice(None))
    target = load_target(weights)
    with torch.no_grad():
        assert torch.equal(target.model(images), trained.model(images))
    assert (target.arch, target.classes) == ("smallcnn", 3)
    content = torch.load(weights, weights_only=True)
    assert list(content) == ["state_dict"]
    assert torch.equal(content["state_dict"]["normalize.mean"], trained.model.get_buffer("normalize.mean"))
    assert not torch.equal(content["state_dict"]["normalize.std"], torch.ones(1, 3, 1, 1))


def through_robustbench(name: str) -> str:
    """What RobustBench's loader makes of a name: it looks for these anywhere and cuts at the front."""
    for wrapper in ("module.", "model."):
        name = name[len(wrapper) :] if wrapper in name else name
    return name


@pytest.mark.parametrize("arch", models.names())
def test_names_survive_robustbench(arch: str) -> None:
    assert through_robustbench("net.model.fc.weight") == "del.fc.weight"
    with torch.device("meta"):
        model = models.create(arch, num_classes=10, in_channels=3, image_size=32, mean=[0.0] * 3, std=[1.0] * 3)
    assert all(through_robustbench(name) == name for name in model.state_dict())


def test_card(run: RunFolder, tmp_path: Path) -> None:
    weights, text = export(run, tmp_path)
    card = text.read_text()
    assert card.startswith("# one\n")
    for fact in (
        "| method | trades (",
        "beta 5.0",
        "| recipe | none, preset: none |",
        "| network | smallcnn, width 2, ",
        " 3 classes |",
        "| threat in training | linf, epsilon 8/255, 2 steps |",
        "| weights | the best of 4 epochs, by validation, seed 0 |",
        json.loads(run.env.read_text())["data"]["fingerprint"],
        f"torch {torch.__version__.split('+')[0]}",
        hashlib.sha256(weights.read_bytes()).hexdigest(),
        hashlib.sha256(run.best_weights.read_bytes()).hexdigest(),
        f"Not evaluated yet: `dtrades-fast evaluate {run.path}`",
    ):
        assert fact in card, fact
    (options,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert yaml.safe_load(options) == yaml.safe_load(run.config.read_text())


def test_the_code_on_the_card_loads_the_network(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, text = export(run, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, torch.nn.Module] = {}
    exec(code, names)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(names["model"](images), load_target(weights).model(images))


def test_card_has_the_figures_of_these_weights_alone(run: RunFolder, tmp_path: Path) -> None:
    options = Options(runs=(str(run.path),), device="cpu", threads=1, attacks="fgsm,pgd3", epsilon="0.1")
    record, _ = evaluate(load(str(run.path), options), options)
    others = {**record, "weights_sha256": "of others", "attacks": {"pgd7": record["attacks"]["fgsm"]}}
    verdict = {"verdict": "suspicious", "reasons": ["12 % of the points have no gradient"]}
    file = run.path / "eval.json"
    try:
        write(file, record)
        stored = json.loads(file.read_text())["evaluations"]
        file.write_text(json.dumps({"evaluations": [*stored, others]}))
        card = export(run, tmp_path)[1].read_text()
        for attack in ("fgsm", "pgd3"):
            ra = record["attacks"][attack]["ra"]
            assert (
                f"| {attack} | Linf epsilon 0.1 | 9 test | fp32 | {100 * record['na']:.2f} % | {100 * ra:.2f} % |"
                in card
            )
        assert "pgd7" not in card
        assert "Not evaluated" not in card
        assert f"Gradients at Linf epsilon 0.1: {record['verdict']['verdict']}" in card
        stored = [{**record, "verdict": verdict, "norm": "l2", "ignored": ["chance"]}, {**others, "schema": 1}]
        file.write_text(json.dumps({"evaluations": stored}))
        card = export(run, tmp_path)[1].read_text()
        assert "Gradients at L2 epsilon 0.1: suspicious; 12 % of the points have no gradient." in card
        assert "Findings that were ignored: chance." in card
        assert "pgd7" not in card
    finally:
        file.unlink()


def test_command(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run.path.name, "--runs-dir", str(run.path.parent)], "export") == 0
    files = [run.export / "one.pt", run.export / "one.md"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert all(file.is_file() for file in files)
    assert main([str(run.path), "--out", str(tmp_path), "--checkpoint", "last"], "export") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one-last.md", "one-last.pt"]


def test_overwriting_a_run_takes_its_export_along(images: Path, tmp_path: Path) -> None:
    options = ("--epochs", "1", "--run", "again")
    folder, _ = tiny_run.run(images, tmp_path, *options)
    export(folder, folder.export)
    tiny_run.run(images, tmp_path, *options, "--overwrite")
    assert not folder.export.exists()


def test_refusals(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = RunFolder(tmp_path / "young")
    young.path.mkdir()
    young.config.write_text(run.config.read_text())
    (tmp_path / "file").touch()
    for words, status, message in (
        (["nope", "--runs-dir", str(tmp_path)], 1, "nope is no run folder"),
        ([str(young.path)], 1, "has not finished its first epoch"),
        ([str(run.path), "--out", str(tmp_path / "file")], 2, "--out must be a folder"),
    ):
        assert cli.main(["export", *words]) == status
        assert message in capsys.readouterr().err
    assert not young.export.exists()
