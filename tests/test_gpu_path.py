"""What training does on a GPU, as far as it shows without one.

The host must not wait for the device within a step: a watch fails on every operation that hands a tensor's value to
Python, or whose result has a size that depends on values. The attack must be the same sequence of operations whatever
the images are: a trace of it, replayed on others, gives what the attack gives.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console
from tiny_run import assert_same
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrades_fast import data as datasets
from dtrades_fast import defenses, doctor, environment, models
from dtrades_fast.attacks import PGD, frozen, input_gradient
from dtrades_fast.attacks.objectives import CrossEntropy
from dtrades_fast.config import Optimization
from dtrades_fast.ops import _check, _library
from dtrades_fast.training import schedules
from dtrades_fast.training.average import MovingAverage
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Autocast, Trainer, TrainingError, not_finite, upload

aten = torch.ops.aten
#: A value goes to Python, a size depends on values, or Python's data are copied over.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}
WAITING |= {aten.lift_fresh, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount}
MASKED = {aten.index, aten.index_put, aten.index_put_}


class HostWaitedError(Exception):
    pass


class Watch(TorchDispatchMode):
    """Fails where the host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in MASKED else ()
        if func.overloadpacket in WAITING or any(x is not None and x.dtype == torch.bool for x in indices):
            raise HostWaitedError(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[None]:
    """The watch, and the methods that read memory without an operation; labels as they are checked on a GPU."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HostWaitedError

    with pytest.MonkeyPatch.context() as patch, Watch():
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(_check, "labels", _check.indices)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def model() -> models.Classifier:
    torch.manual_seed(0)
    return models.create(
        "smallcnn", num_classes=3, in_channels=3, image_size=16, width=2, mean=(0.5,) * 3, std=(0.5,) * 3
    ).eval()


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (5,), generator=random)
    return torch.rand(5, 3, 16, 16, generator=random), labels, torch.randperm(100, generator=random)[:5]


def trainer(data: Path, runs: Path, *options: str) -> Trainer:
    config = tiny_run.configuration(data, runs, *options).resolved("8/255")
    sets = datasets.load(config.data.dataset, "data", "cpu")
    return Trainer(config, sets, RunFolder(config.folder), Console(file=io.StringIO()))


# The host waits for nothing


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_the_watch_sees(read: Any) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    read(x.clone())
    with pytest.raises(HostWaitedError), watched():
        read(x)


ATTACKS = {
    "linf": PGD(0.1, 3),
    "l2": PGD(0.5, 3, norm="l2"),
    "trades": PGD(0.1, 3, objective="kl", start="gaussian"),
    "targeted": PGD(0.1, 2, targeted=True, start="clean"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_an_attack_reads_nothing(model: nn.Module, attack: PGD, dtype: torch.dtype | None) -> None:
    network = model if dtype is None else Autocast(model, "cpu", dtype)
    images, labels, index = batch(0)
    expected = attack(network, images, labels, index=index, key=1)
    with watched():
        actual = attack(network, images, labels, index=index, key=1)
    assert torch.equal(actual, expected)


def test_restarts_read_the_number_left_standing(model: nn.Module) -> None:
    images, labels, index = batch(0)
    with pytest.raises(HostWaitedError), watched():
        PGD(0.1, 1, restarts=2)(model, images, labels, index=index)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", defenses.names())
def test_a_training_step_reads_nothing(data: Path, tmp_path: Path, method: str, precision: str) -> None:
    """The same steps with and without the watch, within an epoch, whose first step draws order and crops."""
    options = ("--method", method, "--precision", precision, "--clip-norm", "1", "--epsilon-ramp", "0.5")
    optimizer = "adam" if precision == "fp16" else "sgd"  # fused only then, and always on a GPU
    one, other = (trainer(data, tmp_path, *options, "--optimizer", optimizer) for _ in range(2))
    for t in (one, other):
        t.reading_waits = True
        network = t.network(t.model)
        t.train_step(network)
        if t is one:
            t.train_step(network)
        else:
            with watched():
                t.train_step(network)
    assert_same(one.state(), other.state())


def test_the_moving_average_is_torch_s_without_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = MovingAverage(model, 0.5)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        model(torch.rand(5, 3))
        with torch.no_grad():
            model[0].weight += 1
        theirs.update_parameters(model)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", None)
            ours.update_parameters(model)
    assert_same(ours.state_dict(), theirs.state_dict())
    assert not torch.equal(ours.module[0].weight, model[0].weight)


def test_upload_keeps_the_values() -> None:
    assert torch.equal(upload(torch.arange(3), torch.device("cpu")), torch.arange(3))


# The attack is one sequence of operations


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_trace_of_the_attack_holds_for_other_images(
    model: nn.Module, attack: PGD, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_check, "labels", _check.indices)

    def run(images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return attack(model, images, labels, index=index, key=7)

    trace = make_fx(run)(*batch(0))
    for seed in (1, 2):
        assert torch.equal(trace(*batch(seed)), run(*batch(seed)))
    assert not torch.equal(trace(*batch(1)), trace(*batch(2)))


# Mixed precision


@pytest.mark.parametrize(
    ("asked", "device", "capability", "expected"),
    [
        ("auto", "cpu", None, "fp32"),
        ("auto", "cuda", (7, 5), "fp16"),
        ("auto", "cuda:1", (8, 0), "bf16"),
        ("auto", "cuda", (9, 0), "bf16"),
        ("fp32", "cuda", (9, 0), "fp32"),
        ("bf16", "cpu", None, "bf16"),
    ],
)
def test_precision_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, asked: Any, device: str, capability: Any, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert environment.precision(asked, device) == expected


def test_what_is_stored_is_decided(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    config = tiny_run.configuration(data, tmp_path, "--device", "auto").resolved("8/255")
    assert (config.stored()["device"], config.stored()["precision"]) == ("cuda", "bf16")


class Confident(nn.Module):
    """Logits so far apart that the gradient of the cross-entropy is about e^-20, and 0 in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.1, 0.1, 24).view(2, 12))
            self.layer.bias.copy_(torch.tensor([20.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("scaled", [True, False])
def test_float16_keeps_the_gradient_of_confident_samples(scaled: bool) -> None:
    images, objective = torch.rand(4, 3, 2, 2), CrossEntropy(torch.tensor([0, 0, 1, 0]))
    images[3] = math.nan  # shows, and in its sample alone
    network = Autocast(Confident(), "cpu", torch.float16)
    if not scaled:  # what would happen
        network.computes_in_half = False
    with frozen(network):
        half, full = input_gradient(network, images, objective), input_gradient(network.network, images, objective)
    assert 0 < full[:2].abs().max() < 1e-8
    assert half[3].isnan().all()
    if scaled:
        torch.testing.assert_close(half[:3], full[:3], rtol=1e-2, atol=0)
    else:
        assert (half[:2] == 0).all()


def test_a_zero_gradient_stays_zero_in_float16() -> None:
    class Flat:
        def logit_grad(self, logits: Tensor) -> Tensor:
            return torch.zeros_like(logits)

    gradient = input_gradient(Autocast(Confident(), "cpu", torch.float16), torch.rand(2, 3, 2, 2), Flat())  # type: ignore[arg-type]
    assert (gradient == 0).all()


def test_an_overflow_is_skipped_and_reported(data: Path, tmp_path: Path) -> None:
    """A loss scale beyond float16 in the first step: the weights stay, the scale is halved, the figures say so."""
    t = trainer(data, tmp_path, "--precision", "fp16", "--weight-decay", "0")
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    network, before = t.network(t.model), [p.detach().clone() for p in t.model.parameters()]
    t.train_step(network)
    assert all(torch.equal(old, new) for old, new in zip(before, t.model.parameters(), strict=True))
    assert t.scaler.get_scale() == 2.0**59
    assert t.meter.summary()["skipped"]["mean"] == 1
    t.scaler.update(1.0)
    t.train_step(network)
    assert any(not torch.equal(old, new) for old, new in zip(before, t.model.parameters(), strict=True))
    assert t.meter.summary()["skipped"]["mean"] == 0.5
    assert t.state()["scaler"] == t.scaler.state_dict()
    assert t.state()["scaler"]["scale"] == 1


def test_overflow_at_any_scale_ends_training(data: Path, tmp_path: Path) -> None:
    t = trainer(data, tmp_path, "--precision", "fp16")
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    t.train_step(t.network(t.model))
    with pytest.raises(TrainingError, match="overflow in float16 whatever the loss is scaled by"):
        t.check_state()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_fused_update_is_the_same_update(kind: str) -> None:
    weights = [torch.linspace(-1, 1, 6).view(2, 3).requires_grad_() for _ in range(2)]
    for weight, fused in zip(weights, (False, True), strict=True):
        optimizer = schedules.create_optimizer(Optimization(optimizer=kind, lr=0.1), [weight], fused)  # type: ignore[arg-type, list-item]
        for _ in range(3):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)


# What is looked at now and then


def test_a_first_step_that_the_scaler_skips_leaves_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's fused SGD would read a momentum buffer that it has only allocated; here such memory is full of NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, math.nan))
    weights = []
    for fused in (True, False):
        weight = nn.Parameter(torch.ones(3))
        optimizer = schedules.create_optimizer(Optimization(lr=0.1, weight_decay=0), [weight], fused)
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (math.inf, 1.0, 2.0):
            weight.grad = torch.full((3,), gradient) * scaler.get_scale()
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)
    assert weights[0].isfinite().all()


def test_a_loss_that_is_not_finite_is_found_later(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrades_fast.training import trainer as module

    monkeypatch.setattr(module, "LOOK_STEPS", 4)
    monkeypatch.setattr(Trainer, "wait", lambda self: None)
    monkeypatch.setattr(Trainer, "expect", lambda self, per_step: None)
    t = trainer(data, tmp_path, "--lr", "1e30", "--schedule", "constant", "--batch-size", "2")
    t.reading_waits = True
    with pytest.raises(TrainingError, match=r"step 4 of .*: not finite within the last 4 steps: .*loss"):
        t.fit()


def test_names_of_what_is_not_finite() -> None:
    values = {"a": [1.0], "b": [1.0, math.inf], "c": 3, "d": math.nan}
    assert not_finite({name: torch.tensor(value) for name, value in values.items()}) == ["b", "d"]
    assert not_finite({}) == []


# What doctor says


def test_doctor_shows_gpu_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "Some GPU", 7, 5, 16 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    shown = dict(doctor.cuda())
    assert shown["cuda:0"] == "Some GPU, compute capability 7.5, 16 GiB, --precision auto is fp16"
    assert "CUDA devices" not in shown


@pytest.mark.parametrize(
    ("devices", "problems", "expected"),
    [
        ({"cpu"}, {"_C_cuda": "no nvcc"}, {"  _C": "loaded, serves cpu tensors", "  _C_cuda": "no nvcc"}),
        ({"cpu", "cuda"}, {}, {"  _C": "loaded, serves cpu tensors", "  _C_cuda": "loaded, serves cuda tensors"}),
        (set(), {"_C": "no compiler"}, {"  _C": "no compiler", "  _C_cuda": "not used (DTRADES_FAST_BACKEND=auto)"}),
    ],
)
def test_doctor_shows_each_module(monkeypatch: pytest.MonkeyPatch, devices: Any, problems: Any, expected: Any) -> None:
    monkeypatch.setattr(_library, "BACKEND", _library.Backend("cpp", "auto", frozenset(devices), problems))
    monkeypatch.setattr(_library, "simd_level", lambda: "")
    assert expected.items() <= dict(doctor.operators()).items()
