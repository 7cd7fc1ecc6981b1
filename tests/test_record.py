"""A whole evaluation: what its record says, that it goes on after an interruption, and that processes share it."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import small_nets
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtrades_fast.evaluation import evaluate
from dtrades_fast.evaluation.blackbox import Player
from dtrades_fast.evaluation.engine import Engine, Progress
from dtrades_fast.evaluation.guards import GuardError
from dtrades_fast.evaluation.minimum_norm import robust_accuracy
from dtrades_fast.evaluation.record import SCHEMA, Settings, evaluate_model, flags
from dtrades_fast.plot import evaluations
from dtrades_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [str(digit) for digit in range(10)]
EPSILON = str(small_nets.EPSILON)


def points(count: int):
    return small_nets.digits()[1].subset(torch.arange(count))


def record_of(model: nn.Module, count: int = 32, progress: Progress | None = None, **given: Any) -> dict[str, Any]:
    people = {name: given.pop(name) for name in ("surrogates", "player", "ignore") if name in given}
    settings = Settings(**{"epsilon": EPSILON, "attacks": ("fgsm", "pgd5"), **given})
    return evaluate_model(model, points(count), CLASSES, settings, progress=progress, **people)


def stable(record: dict[str, Any]) -> dict[str, Any]:
    """Without what a second evaluation cannot repeat: seconds."""
    return json.loads(
        json.dumps(record), object_hook=lambda d: {name: value for name, value in d.items() if name != "seconds"}
    )


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    robust, standard = (small_nets.network(kind) for kind in ("robust", "standard"))  # type: ignore[arg-type]
    return record_of(
        robust,
        attacks=("fgsm", "pgd20", "apgd-ce", "square"),
        minimum_norms=("linf", "l2"),
        player=Player(robust, "small"),
        surrogates={"standard": Player(standard, "small"), "masked": Player(small_nets.network("masked"), "small")},
    )


def test_figures_follow_from_points(full: dict[str, Any]) -> None:
    json.dumps(full, allow_nan=False)
    assert full["schema"] == SCHEMA
    natural, every = flags(full["correct"]), []
    assert len(natural) == len(full["ids"]) == len(full["labels"]) == full["points"] == 32
    of_class = [flag for flag, label in zip(natural, full["labels"], strict=True) if label == 0]
    assert sum(map(int, of_class)) / len(of_class) == next(iter(full["per_class"].values()))
    for entry in full["attacks"].values():
        standing = flags(entry["correct"])
        assert not (standing & ~natural).any()
        assert entry["ra"] == standing.double().mean().item()
        assert entry["rd"] == pytest.approx(full["na"] - entry["ra"])
        assert entry["asr_all"] == pytest.approx(1 - entry["ra"])
        assert entry["asr_correct"] == pytest.approx(entry["rd"] / full["na"])
        assert entry["forwards"] > entry["backwards"] >= 0
        every.append(standing)
    assert full["ra_worst"] == torch.stack(every).all(0).double().mean().item()
    assert full["attacks"]["square"]["backwards"] == 0
    assert full["attacks"]["apgd-ce"]["ra"] <= full["attacks"]["pgd20"]["ra"] <= full["attacks"]["fgsm"]["ra"]


def test_query_curve(full: dict[str, Any]) -> None:
    entry = full["attacks"]["square"]
    natural, standing = flags(full["correct"]), flags(entry["correct"])
    spent = torch.tensor(entry["queries"]["per_point"])
    assert (spent[~natural] == 0).all()
    assert (spent[standing] == 5000).all()
    broken = natural & ~standing
    assert ((spent[broken] >= 1) & (spent[broken] <= 5000)).all()
    assert entry["queries"]["ra"] == sorted(entry["queries"]["ra"], reverse=True)
    assert entry["queries"]["ra"][-1] == entry["ra"]
    assert entry["queries"]["median"] == spent[broken].double().quantile(0.5).item()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_minimum_norms(full: dict[str, Any], norm: str) -> None:
    found = full["minimum_norm"][norm]
    natural = flags(full["correct"])
    norms = torch.tensor([float("inf") if value is None else value for value in found["per_point"]])
    assert (norms[~natural] == 0).all()
    assert (norms[natural] > 0).all()
    assert found["apn"]["mean"] == pytest.approx(norms.clamp(max=found["cap"]).mean().item(), rel=1e-6)
    assert all(found["apn"]["mean"] <= figures["mean"] for figures in found["by_attack"].values())
    # the share that is larger than a radius is the accuracy under attacks of that radius
    epsilon = small_nets.EPSILON
    if norm == "linf":
        ra = robust_accuracy(norms.double(), [epsilon]).item()
        assert abs(ra - full["attacks"]["apgd-ce"]["ra"]) <= 2 / 32


def test_transfer(full: dict[str, Any]) -> None:
    entry = full["transfer"]["mifgsm"]
    assert entry["sources"] == ["target", "standard", "masked", "ensemble"]
    assert entry["targets"] == ["target", "standard", "masked"]
    assert entry["relations"][0][0] == "white box"
    assert entry["relations"][1][0] == "grey box"
    assert entry["natural"][0] == full["correct"]
    for row, shares in zip(entry["standing"], entry["ra"], strict=True):
        assert [flags(column).double().mean().item() for column in row] == pytest.approx(shares)
    assert entry["ra"][0][0] < entry["ra"][1][0]  # its own gradients serve better than another's


def test_verdict_of_planted_networks() -> None:
    assert record_of(small_nets.network("robust"), 64)["verdict"]["verdict"] == "healthy"
    assert record_of(small_nets.network("masked"), 64)["verdict"]["verdict"] == "masked"

    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return small_nets.network("robust")(images + 0.1 * torch.randn_like(images))

    class Quantised(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return small_nets.network("robust")((8 * images).round() / 8)

    noisy = record_of(Noisy().eval(), 64)
    assert noisy["verdict"]["verdict"] == "suspicious"
    assert "average" in noisy["verdict"]["reasons"][0]
    assert [finding["name"] for finding in noisy["guards"]] == ["random"]
    assert record_of(Quantised().eval(), 64)["verdict"]["verdict"] == "masked"


def test_guard_rails_stop_it() -> None:
    softmax = nn.Sequential(small_nets.network("robust"), nn.Softmax(1)).eval()
    with pytest.raises(GuardError, match="probabilities"):
        record_of(softmax)
    ignored = record_of(softmax, ignore=["probabilities"])
    assert ignored["ignored"] == ["probabilities"]
    assert [finding["name"] for finding in ignored["guards"]] == ["probabilities"]
    with pytest.raises(GuardError, match="8/255"):
        record_of(small_nets.network("robust"), epsilon="8")


def test_goes_on_to_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = small_nets.network("robust"), {"attacks": ("pgd5", "apgd-ce"), "batch_size": 8}
    real, done, killed_at = Progress.done, [0], [0]

    def dies(self: Progress, *arguments: Any) -> None:
        done[0] += 1
        if done[0] == killed_at[0]:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr("dtrades_fast.evaluation.engine.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Progress, "done", dies)
    expected = stable(record_of(model, **given))
    batches = done[0]
    killed_at[0] = batches + batches // 2
    with pytest.raises(KeyboardInterrupt):
        record_of(model, progress=Progress(tmp_path / "state", {}), **given)
    again = Progress(tmp_path / "state", {}, resume=True)
    assert stable(record_of(model, progress=again, **given)) == expected
    assert done[0] == 2 * batches + 1  # only the batch that was lost is done twice
    again.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    images = tiny_run.images(tmp_path_factory.mktemp("images"))
    return tiny_run.run(images, tmp_path_factory.mktemp("runs"), "--epochs", "8", "--lr", "0.05", "--run", "tiny")[0]


def stored(path: Path) -> dict[str, Any]:
    return stable(json.loads(path.read_text())["evaluations"][-1])


def test_processes_share_it(run: RunFolder) -> None:
    words = ["evaluate", str(run.path), "--attacks", "pgd3,apgd-ce,square", "--batch-size", "2", "--threads", "1"]
    words += ["--epsilon", "0.2", "--device", "cpu"]
    for start in (["-m"], ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]):
        done = subprocess.run([sys.executable, *start, "dtrades_fast", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("verdict on tiny") == 1
        if start == ["-m"]:
            alone = stored(run.evaluation)
            run.evaluation.unlink()
    assert stored(run.evaluation) == alone
    assert not run.evaluation_state.exists()


def test_command_resumes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(run.path), "--attacks", "pgd3,apgd-ce", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    assert evaluate.main(words, "evaluate") == 0
    expected, real = stored(run.evaluation), Engine.attack
    run.evaluation.unlink()

    def dies(self: Engine, name: str, *arguments: Any) -> Any:
        if name == "apgd-ce":
            self.progress.save()
            raise KeyboardInterrupt
        return real(self, name, *arguments)

    monkeypatch.setattr(Engine, "attack", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(words, "evaluate")
    monkeypatch.setattr(Engine, "attack", real)
    assert run.evaluation_state.is_dir()
    with pytest.raises(ValueError, match=r"belongs to another evaluation \(epsilon: 8/255, now 0\.1"):
        evaluate.main([*words, "--resume", "--epsilon", "0.1"], "evaluate")
    assert evaluate.main([*words, "--resume"], "evaluate") == 0
    assert stored(run.evaluation) == expected
    assert not run.evaluation_state.exists()


def test_files_of_weights(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(run.best_weights.read_bytes())
    dataset = evaluate.load(str(run.path), evaluate.Options(runs=(str(run.path),), device="cpu")).dataset
    words = [str(file), "--attacks", "fgsm", "--threads", "1", "--device", "cpu"]
    with pytest.raises(ValueError, match="say with --dataset"):
        evaluate.main(words, "evaluate")
    words += ["--dataset", str(dataset)]
    with pytest.raises(ValueError, match="say with --epsilon"):
        evaluate.main(words, "evaluate")
    assert evaluate.main([*words, "--epsilon", "8/255"], "evaluate") == 0
    record = stored(tmp_path / "weights.safetensors.eval.json")
    assert (record["run"], record["checkpoint"], record["method"]) == ("weights", "file", None)
    assert "| weights |" in capsys.readouterr().out


def another(run: RunFolder, folder: Path) -> Path:
    """The same run with other weights."""
    shutil.copytree(run.path, folder / "other")
    file = RunFolder(folder / "other").best_weights
    weights = load_file(file)
    save_file({name: 1.1 * tensor if "weight" in name else tensor for name, tensor in weights.items()}, file)
    return folder / "other"


def test_twin_and_surrogates(run: RunFolder, tmp_path: Path) -> None:
    other = another(run, tmp_path)
    words = [str(run.path), "--suite", "blackbox", "--surrogates", str(other), "--threads", "1", "--device", "cpu"]
    assert evaluate.main([*words, "--epsilon", "0.1", "--twin", "smallcnn", "--limit", "6"], "evaluate") == 0
    record = stored(run.evaluation)
    assert record["points"] == 6
    assert record["extraction"]["queries"] > 6  # --limit is about the images that are evaluated
    assert 0 <= record["extraction"]["agreement"] <= 1
    assert record["transfer"]["mifgsm"]["relations"][2][0] == "extracted"
    assert list(record["attacks"]) == ["square"]
    names = [name for name, _ in evaluations.pictures({"tiny": run})]
    assert names == ["queries", "transfer-mifgsm", "transfer-pgd20"]


def test_records_of_different_evaluations_stay_apart(run: RunFolder) -> None:
    """What was found on other images, or in another way, is not overwritten; what belongs together is one record."""
    run.evaluation.unlink(missing_ok=True)
    words = [str(run.path), "--threads", "1", "--device", "cpu", "--epsilon", "0.1"]
    for more in (["--attacks", "fgsm"], ["--attacks", "pgd3"], ["--limit", "6"], ["--precision", "bf16"]):
        assert evaluate.main([*words, *more], "evaluate") == 0
    whole, few, half = json.loads(run.evaluation.read_text())["evaluations"]
    assert list(whole["attacks"]) == ["fgsm", "pgd3"]
    worst = flags(whole["attacks"]["fgsm"]["correct"]) & flags(whole["attacks"]["pgd3"]["correct"])
    assert whole["ra_worst"] == worst.double().mean().item()
    assert (whole["points"], few["points"], half["precision"]) == (9, 6, "bf16")
    found = {**whole, "dataset": "another"}
    evaluate.write(run.evaluation, found)
    assert len(json.loads(run.evaluation.read_text())["evaluations"]) == 4


def test_a_proof_of_masking_is_not_forgotten() -> None:
    old: dict[str, Any] = {"attacks": {}, "minimum_norm": {}, "na": 0.5}
    old |= {"transfer": {"pgd20": {}}, "extraction": {"arch": "vgg16"}, "verdict": {"verdict": "masked"}}
    new = {**old, "transfer": {}, "extraction": {}, "verdict": {"verdict": "suspicious"}}
    for first, second in ((old, new), (new, old)):
        both = evaluate.merged(first, second)
        assert both["verdict"]["verdict"] == "masked"
        assert both["extraction"] == {"arch": "vgg16"}


def test_several_networks_resume(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a state of its own, which is kept until all are done."""
    files = []
    for name in ("a.safetensors", "b.safetensors"):
        files.append(tmp_path / name)
        shutil.copy(run.best_weights, files[-1])
    shutil.copy(RunFolder(another(run, tmp_path)).best_weights, files[1])
    dataset = evaluate.load(str(run.path), evaluate.Options(runs=(str(run.path),), device="cpu")).dataset
    words = [*map(str, files), "--attacks", "pgd3", "--epsilon", "0.1", "--threads", "1", "--device", "cpu"]
    words += ["--dataset", str(dataset)]
    real, calls = Engine.attack, []

    def dies(self: Engine, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Engine, "attack", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(words, "evaluate")
    states = [file.with_name(file.name + ".eval-state") for file in files]
    assert all(state.is_dir() for state in states)
    with pytest.raises(ValueError, match="holds an unfinished evaluation"):
        evaluate.main(words, "evaluate")
    with pytest.raises(ValueError, match="give one of the two"):
        evaluate.main([*words, "--resume", "--overwrite"], "evaluate")
    assert evaluate.main([*words, "--resume"], "evaluate") == 0
    assert not any(state.exists() for state in states)


def test_options_that_would_measure_something_else(run: RunFolder, tmp_path: Path) -> None:
    words = [str(run.path), "--attacks", "fgsm", "--threads", "1", "--device", "cpu"]
    with pytest.raises(
        ValueError, match="--norm l2 needs --epsilon: 8/255, which tiny was trained for, is a radius in"
    ):
        evaluate.main([*words, "--norm", "l2"], "evaluate")
    with pytest.raises(ValueError, match="has the very weights of tiny"):
        evaluate.main([*words, "--surrogates", str(run.path)], "evaluate")
    with pytest.raises(ValueError, match="mean describe a file of weights"):
        evaluate.main([*words, "--mean", "0.5"], "evaluate")
    with pytest.raises(ValueError, match="--twin-queries must be at least 1"):
        evaluate.main([*words, "--twin-queries", "0"], "evaluate")
    assert not run.evaluation_state.exists()
    robust = small_nets.network("robust")
    with pytest.raises(ValueError, match="no surrogate can be called 'target'"):
        record_of(robust, surrogates={"target": Player(robust, "small")}, player=Player(robust, "small"))


def test_files_options_are_not_the_surrogates(run: RunFolder, tmp_path: Path) -> None:
    """--mean and --std describe the networks that are evaluated, not the ones that images are made on."""
    file = tmp_path / "weights.safetensors"
    shutil.copy(run.best_weights, file)
    options = evaluate.Options(
        runs=(str(file),), surrogates=(str(another(run, tmp_path)),), mean=(0.25,), std=(0.5,), device="cpu"
    )
    target = evaluate.load(str(file), options)
    assert target.model.normalize.mean.flatten()[0] == 0.25  # type: ignore[union-attr]
    (surrogate,) = evaluate.surrogates_of(target, options).values()
    assert surrogate.model.normalize.mean.flatten()[0] != 0.25  # type: ignore[union-attr]
    copy = tmp_path / "other.safetensors"
    shutil.copy(RunFolder(tmp_path / "other").best_weights, copy)
    options.surrogates = (str(copy),)
    (surrogate,) = evaluate.surrogates_of(target, options).values()
    assert surrogate.model.normalize.mean.flatten()[0] != 0.25  # type: ignore[union-attr]


def test_transfer_counts_only_what_white_boxes_leave() -> None:
    """Also where the only white-box attacks are those of the transfer matrix itself, and none is weak."""
    robust = small_nets.network("robust")
    twin = Player(copy.deepcopy(robust), "small")
    for attacks in ((), ("fgsm",), ("square",)):
        found = record_of(robust, 64, attacks=attacks, surrogates={"copy": twin}, player=Player(robust, "small"))
        assert found["verdict"]["figures"]["transfer_only"] == 0
        assert found["verdict"]["verdict"] == "healthy"

    class Quantised(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return robust((8 * images).round() / 8)

    hidden = Quantised().eval()
    found = record_of(hidden, 64, attacks=("square",), surrogates={"open": twin}, player=Player(hidden, "hidden"))
    assert found["verdict"]["figures"]["transfer_only"] > 0.2


def test_pictures_of_what_nothing_broke(full: dict[str, Any]) -> None:
    """No radius broke a point; and curves of different balls are not drawn in one picture."""
    calm = copy.deepcopy(full)
    calm["minimum_norm"]["linf"]["per_point"] = [None] * full["points"]
    assert evaluations.radius_curve({"calm": calm}, "linf").axes
    other = {**full, "norm": "l2"}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, record in {"one": full, "two": other}.items():
            runs[name] = RunFolder(Path(folder) / name)
            runs[name].path.mkdir()
            runs[name].evaluation.write_text(json.dumps({"evaluations": [record]}))
        drawn = dict(evaluations.pictures(runs))
    titles = {name: drawn[name].axes[0].get_title() for name in ("queries", "queries-2")}
    assert titles == {
        "queries": "Square, Linf epsilon 0.25: 32 points",
        "queries-2": "Square, L2 epsilon 0.25: 32 points",
    }


def test_lucky_draws_are_no_robustness() -> None:
    """PGD on a network with noise does not end at the first pass that is fooled, which the next one would deny."""

    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return small_nets.network("robust")(images + 0.2 * torch.randn_like(images))

    torch.manual_seed(0)
    attacks = record_of(Noisy().eval(), 96, attacks=("fgsm", "pgd20"), epsilon="0.2")["attacks"]
    assert not attacks["pgd20"]["settings"]["stop_early"]
    assert attacks["pgd20"]["ra"] <= attacks["fgsm"]["ra"] + 0.1
