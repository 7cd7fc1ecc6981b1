"""The trainer: what it computes, what it writes, what it says, when it stops."""

import io
import json
import math
import re
from pathlib import Path

import pytest
import tiny_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import assert_same, result
from torch import nn

from dtrades_fast import data as datasets
from dtrades_fast import environment, rng
from dtrades_fast.config import Optimization, load
from dtrades_fast.defenses import Batch, create
from dtrades_fast.training import checkpoint, progress, schedules
from dtrades_fast.training.meter import Meter
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Batches, Trainer, TrainingError, create_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    return tiny_run.run(data, tmp_path_factory.mktemp("runs"), "--ema", "0.5")


def trainer(data: Path, tmp_path: Path, *options: str) -> Trainer:
    config = tiny_run.configuration(data, tmp_path, *options).resolved("8/255")
    sets = datasets.load(config.data.dataset, "data", "cpu")
    return Trainer(config, sets, RunFolder(config.folder), Console(file=io.StringIO()))


def test_a_last_batch_of_one_image_is_refused_where_batchnorm_needs_more(data: Path, tmp_path: Path) -> None:
    """Before anything is trained: 19 images in batches of 9, which VGG-16 shrinks to one pixel."""
    with pytest.raises(ValueError, match=r"too few for the BatchNorm of vgg16 .* choose another --batch-size than 9"):
        tiny_run.run(data, tmp_path, "--arch", "vgg16", "--batch-size", "9", "--run", "vgg")
    tiny_run.run(data, tmp_path, "--arch", "resnet18", "--batch-size", "9", "--epochs", "1", "--run", "resnet")


def test_run_folder(trained: tuple[RunFolder, str]) -> None:
    folder, _ = trained
    names = {path.name for path in folder.path.iterdir()}
    files = {"config.yaml", "env.json", "metrics.jsonl", "last.pt", "best.pt", "model.safetensors"}
    assert names == files | {"model-best.safetensors", ".lock"}
    env = json.loads(folder.env.read_text())
    assert env["versions"]["torch"] == environment.versions()["torch"]
    assert env["threads"] == 1
    assert env["seed"] == 0
    assert len(env["data"]["fingerprint"]) == 64
    assert load(folder.config).stored()["epsilon"] == "8/255"


def test_metrics(trained: tuple[RunFolder, str]) -> None:
    lines = [json.loads(line) for line in trained[0].metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [3, 6, 9]
    for line in lines:
        assert set(line["train"]) == {"loss", "na", "ra", "ce", "kl", "lambda", "entropy", "sensitivity"}
        assert line["train"]["lambda"]["min"] <= line["train"]["lambda"]["mean"] <= line["train"]["lambda"]["max"]
        assert line["train"]["entropy"]["max"] <= math.log(3) + 1e-6
        assert 0 <= line["validation"]["ra"] <= line["validation"]["na"] <= 1
        assert line["epsilon"] == 8 / 255
        assert line["seconds"] > 0


def test_checkpoints_and_weights_belong_together(trained: tuple[RunFolder, str]) -> None:
    """With EMA the averaged weights are exported; best is the first epoch of highest validation RA."""
    folder, output = trained
    lines = [json.loads(line)["validation"] for line in folder.metrics.read_text().splitlines()]
    scores = [(line["ra"], line["na"]) for line in lines]
    last, best = (torch.load(path, weights_only=True) for path in (folder.last, folder.best))
    assert last["step"] == 9
    assert best["best"]["epoch"] == 1 + scores.index(max(scores)) == last["best"]["epoch"]
    assert best["step"] == 3 * best["best"]["epoch"]
    for state, file in ((last, folder.weights), (best, folder.best_weights)):
        weights = load_file(file)
        averaged = {k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"}
        assert_same({k: averaged[k] for k in weights}, weights)
        assert any(not torch.equal(weights[name], state["model"][name]) for name in weights)
    assert f"best epoch {best['best']['epoch']}" in output


def test_the_exported_model_is_the_validated_one(trained: tuple[RunFolder, str]) -> None:
    folder, _ = trained
    config = load(folder.config)
    sets = datasets.load(config.data.dataset, "data", "cpu")
    model = create_model(config, sets.info)
    model.load_state_dict(checkpoint.load_weights(folder.weights))
    model.eval()
    images = sets.validation.images(slice(None))
    na = (model(images).argmax(1) == sets.validation.labels).double().mean().item()
    assert na == json.loads(folder.metrics.read_text().splitlines()[-1])["validation"]["na"]


def test_the_first_step_by_hand(data: Path, tmp_path: Path) -> None:
    """One epoch of one batch against a loop written out here: order, crops, keys, threat, optimizer, schedule."""
    options = (
        "--batch-size",
        "32",
        "--epochs",
        "1",
        "--method",
        "trades",
        "--epsilon-ramp",
        "1",
        "--schedule",
        "constant",
    )
    folder, _ = tiny_run.run(data, tmp_path, *options)
    config = load(folder.config)
    sets = datasets.load(config.data.dataset, "data", "cpu")
    torch.manual_seed(rng.key(0, "init"))
    model = create_model(config, sets.info).train()
    order = datasets.epoch_order(len(sets.train), 0, 0)
    ids = sets.train.ids[order]
    assert sets.info.augmentation is not None
    offsets = sets.info.augmentation.offsets(0, 0, int(sets.train.ids.max()) + 1)
    images = datasets.to_float(sets.info.augmentation.apply(sets.train.images_uint8[order], offsets[ids]))
    batch = Batch(images, sets.train.labels[order], ids, rng.key(0, "attack", 0))
    defense = create("trades", config.threat())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    torch.manual_seed(rng.key(0, "dropout", 0))
    defense.loss(model, batch, defense.craft(model, batch)).total.backward()
    optimizer.step()
    assert_same(dict(model.state_dict()), load_file(folder.weights))


def test_test_images_are_never_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_sets = datasets.load

    def without_test(*args, **kwargs):  # type: ignore[no-untyped-def]
        sets = load_sets(*args, **kwargs)
        object.__setattr__(sets, "test", None)
        return sets

    monkeypatch.setattr(datasets, "load", without_test)
    folder, _ = tiny_run.run(data, tmp_path)
    assert folder.weights.is_file()


def test_seed_decides(data: Path, tmp_path: Path) -> None:
    one, again, other = (
        result(tiny_run.run(data, tmp_path, "--epochs", "1", "--seed", seed, "--run", name)[0])
        for name, seed in (("one", "0"), ("again", "0"), ("other", "1"))
    )
    assert_same(one, again)
    assert one["weights"] != other["weights"]


def test_plan_and_expected_time(data: Path, tmp_path: Path) -> None:
    _, output = tiny_run.run(data, tmp_path, "--epochs", "5", "--epsilon-ramp", "0.5")
    for text in (
        r"model      smallcnn, width 2: [\d,]+ parameters",
        r"data       folder:\S+: 19 images to train on, 2 to select by, 3 classes",
        r"method     dtrades: lambda_base 0.0, .* lambda_mean 6.0",
        r"lambda 6 for 1 epochs, then calibrated to that mean, 50% of it above 0 from sensitivity",
        r"attack     linf, epsilon 8/255, 2 steps, step epsilon/4, growing over the first 50% of training",
        r"training   5 epochs of 3 steps of 8 images: 15 steps; sgd, lr 0.01, one-cycle",
        r"machine    cpu, 1 threads, operators: ",
        r"time       [\d.e-]+ s per step, at most [\d.e-]+ s per validation: [\d.e-]+ s to go",
        r"epoch 5/5: loss .* lambda .* \| validation na .* ra .* images/s",
        r"next: dtrades-fast evaluate ",
    ):
        assert re.search(text, output), text
    assert "--preset quick" not in output


def test_a_long_run_on_a_cpu_is_told_how_to_become_smaller(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrades_fast.training import trainer as module

    monkeypatch.setattr(module, "LONG_SECONDS", 0)
    _, output = tiny_run.run(data, tmp_path, "--device", "cpu")
    assert "to make it smaller: --preset quick" in output


def test_bar_in_a_terminal(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrades_fast.training.trainer import train

    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=160)
    train(tiny_run.configuration(data, tmp_path), console)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.getvalue())
    assert re.search(r"epoch [123] .*\d/9 loss \S+ na \S+ ra \S+ lambda \S+ \d+ images/s", text)


def test_durations() -> None:
    assert [progress.duration(s) for s in (0.05, 9, 45, 600, 20000)] == ["0.05 s", "9 s", "45 s", "10 min", "5.6 h"]


# Stopping on what is not finite


def test_infinite_loss_stops_before_it_does_harm(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as stopped:
        tiny_run.run(data, tmp_path, "--lr", "1e30", "--schedule", "constant", "--run", "exploding")
    message = str(stopped.value)
    assert re.search(r"at step \d of 9 \(epoch 1\): loss is (nan|inf), not finite: ce for \d of 8 samples", message)
    assert "No checkpoint had been saved yet" in message


def test_nan_names_term_and_last_good_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrades_fast.defenses import trades

    real, calls = trades.trades_loss, [0]

    def broken(*args, **settings):  # type: ignore[no-untyped-def]
        calls[0] += 1
        values = real(*args, **settings)
        if calls[0] == 5:
            bad = torch.full((8,), 1.0)
            bad[2:5] = math.nan
            return values._replace(kl=values.kl * bad, loss=values.loss * bad)
        return values

    monkeypatch.setattr(trades, "trades_loss", broken)
    with pytest.raises(
        TrainingError, match=r"step 5 of 9 \(epoch 2\): loss is nan, .*: kl for 3 of 8 samples"
    ) as stopped:
        tiny_run.run(data, tmp_path, "--run", "one")
    assert f"is kept: {tmp_path / 'one' / 'last.pt'}, after step 3" in str(stopped.value)
    assert torch.load(tmp_path / "one" / "last.pt", weights_only=True)["step"] == 3


def test_weights_that_are_not_finite_are_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch makes a weight infinite, with a finite loss before it."""
    step = torch.optim.SGD.step

    def broken(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        step(self, *args, **kwargs)
        broken.calls += 1  # type: ignore[attr-defined]
        if broken.calls == 6:  # type: ignore[attr-defined]
            self.param_groups[0]["params"][0].data[0, 0, 0, 0] = math.inf

    broken.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(TrainingError, match=r"weights are not finite: network\..*after step 3"):
        tiny_run.run(data, tmp_path, "--run", "one", "--schedule", "constant")


# Run folders


def test_an_existing_run_is_refused(data: Path, tmp_path: Path) -> None:
    tiny_run.run(data, tmp_path, "--run", "one", "--seed", "1")
    before = (tmp_path / "one" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"exists: go on with it \(--resume\), delete it .* \(--overwrite\)"):
        tiny_run.run(data, tmp_path, "--run", "one")
    assert (tmp_path / "one" / "last.pt").read_bytes() == before
    tiny_run.run(data, tmp_path, "--run", "one", "--overwrite")
    assert load(tmp_path / "one" / "config.yaml").run.seed == 0


def test_overwrite_deletes_runs_only(data: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "one" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for option in ("--overwrite", "--resume"):
        with pytest.raises(ValueError, match=r"is no run folder \(no config.yaml\)"):
            tiny_run.run(data, tmp_path, "--run", "one", option)
    tiny_run.run(data, tmp_path, "--run", "two")
    thesis.rename(tmp_path / "two" / "thesis.tex")
    with pytest.raises(ValueError, match=r"also holds thesis\.tex"):
        tiny_run.run(data, tmp_path, "--run", "two", "--overwrite")
    assert (tmp_path / "two" / "thesis.tex").is_file()
    assert (tmp_path / "two" / "last.pt").is_file()


def test_a_mistake_leaves_the_old_run_alone(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--run", "one")
    for wrong in (("--arch", "nope"), ("--init-weights", "nope.pt")):
        with pytest.raises((ValueError, FileNotFoundError), match="nope"):
            tiny_run.run(data, tmp_path, *wrong, "--run", "two")
    with pytest.raises(
        ValueError, match="unknown architecture 'nope'; known are preactresnet18, resnet18, smallcnn, vgg16, wrn34_10"
    ):
        tiny_run.run(data, tmp_path, "--arch", "nope", "--run", "one", "--overwrite")
    assert folder.last.is_file()


def test_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def fail(file):  # type: ignore[no-untyped-def]
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Options


def test_init_weights_and_frozen_backbone(data: Path, tmp_path: Path) -> None:
    first, _ = tiny_run.run(data, tmp_path, "--run", "first")
    options = ("--init-weights", str(first.weights), "--freeze-backbone")
    second, output = tiny_run.run(data, tmp_path, "--run", "second", *options)
    assert f"tensors come from {first.weights}" in output
    assert "of them trained" in output
    before, after = load_file(first.weights), load_file(second.weights)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert len(changed) == 2  # the last layer's weight and bias


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(data: Path, tmp_path: Path, precision: str) -> None:
    half, _ = tiny_run.run(data, tmp_path, "--run", "half", "--precision", precision)
    full, _ = tiny_run.run(data, tmp_path, "--run", "full")
    a, b = load_file(half.weights), load_file(full.weights)
    assert all(a[name].dtype == b[name].dtype for name in a)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_clip_norm(data: Path, tmp_path: Path) -> None:
    """With plain SGD of rate 1 the first step is the clipped gradient."""
    options = ("--batch-size", "32", "--epochs", "1", "--lr", "1", "--momentum", "0", "--weight-decay", "0")
    t = trainer(data, tmp_path, *options, "--schedule", "constant", "--clip-norm", "0.01")
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    tiny_run.run(data, tmp_path, *options, "--schedule", "constant", "--clip-norm", "0.01")
    after = load_file(t.folder.weights)
    moved = torch.cat([(after[name] - p).flatten() for name, p in before.items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_epsilon_ramp(data: Path, tmp_path: Path) -> None:
    t = trainer(data, tmp_path, "--epsilon", "0.2", "--step-size", "0.1", "--epsilon-ramp", "0.5", "--epochs", "2")
    assert t.total_steps == 6
    assert [round(t.threat_at(s).epsilon, 6) for s in range(6)] == [0.066667, 0.133333, 0.2, 0.2, 0.2, 0.2]
    assert [round(t.threat_at(s).step_size or 0, 6) for s in range(3)] == [0.033333, 0.066667, 0.1]
    assert trainer(data, tmp_path, "--epsilon", "0.2").threat_at(0).epsilon == 0.2


def rates(**options: object) -> list[float]:
    o = Optimization(epochs=4, lr=1.0, **options)  # type: ignore[arg-type]
    optimizer = schedules.create_optimizer(o, [nn.Parameter(torch.zeros(1))])
    schedule = schedules.create_schedule(o, optimizer, 5)
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedules() -> None:
    assert rates(schedule="constant") == [1.0] * 20
    assert rates(schedule="step", milestones=(1, 3), gamma=0.5) == [1.0] * 5 + [0.5] * 10 + [0.25] * 5
    expected = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates(schedule="cosine") == pytest.approx(expected)
    cycle = rates(schedule="one-cycle", optimizer="adam")
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(cycle) == pytest.approx(1, abs=0.02)
    assert cycle.index(max(cycle)) in (5, 6)
    assert cycle[-1] < 1e-4


def test_optimizers() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    sgd = schedules.create_optimizer(Optimization(nesterov=True, momentum=0.8, weight_decay=0.1), parameters)
    group = sgd.param_groups[0]
    assert isinstance(sgd, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"], len(group["params"])) == (0.8, True, 0.1, 1)
    adam = schedules.create_optimizer(Optimization(optimizer="adam", momentum=0.7), parameters)
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["betas"] == (0.7, 0.999)


def test_batches(data: Path) -> None:
    sets = datasets.load(f"folder:{data}", "data", "cpu")
    plain = Batches(sets.train, 8, 0, None)
    assert len(plain) == 3
    seen = [plain.get(0, i) for i in range(3)]
    assert [len(labels) for _, labels, _ in seen] == [8, 8, 3]
    ids = torch.cat([ids for _, _, ids in seen])
    assert sorted(ids.tolist()) == sorted(sets.train.ids.tolist())
    assert torch.equal(plain.get(0, 1)[2], seen[1][2])
    assert not torch.equal(plain.get(1, 0)[2], seen[0][2])
    row = sets.train.ids.tolist().index(ids[0].item())
    assert torch.equal(seen[0][0][0], sets.train.images(slice(row, row + 1))[0])
    cropped = Batches(sets.train, 8, 0, sets.info.augmentation)
    assert torch.equal(cropped.get(0, 0)[2], seen[0][2])
    assert not torch.equal(cropped.get(0, 0)[0], seen[0][0])


def test_meter() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    meter = Meter()
    for part in values.split(20):
        meter.add("x", part)
    meter = Meter(meter.sums)
    figures = meter.summary()["x"]
    assert figures["mean"] == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert figures["std"] == pytest.approx(values.double().std(correction=0).item(), rel=1e-9)
    assert (figures["min"], figures["max"]) == (values.min().item(), values.max().item())
