"""Whatever makes a step faster leaves its result alone: against the published code's order in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console
from torch import Tensor, nn

from dtrades_fast import data, rng
from dtrades_fast.attacks import PGD
from dtrades_fast.evaluation import metrics
from dtrades_fast.models.attack_network import Compiled
from dtrades_fast.training import schedules
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer

BENCH = Path(__file__).parent.parent / "bench"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _bench_is_importable() -> Iterator[None]:
    sys.path.append(str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"), per_class=12)


STEPS = 20


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in float64."""
    in_single = data.to_float
    monkeypatch.setattr(data, "to_float", lambda pixels: in_single(pixels).double())


def trainer(images: Path, runs: Path, method: str, *options: str) -> Trainer:
    """A trainer in the images' dtype whose options make it compute what the textbook does. Its last batch has 5."""
    from textbook import SAME

    words = [word for name, value in SAME[method].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--arch", "resnet18", "--width", "2", "--batch-size", "7", "--steps", "3", "--epochs", "6"]
    words += ["--lr", "0.01"]
    config = tiny_run.configuration(images, runs, "--method", method, *words, *options)
    sets = data.load(config.data.dataset, "data", "cpu")
    config = config.resolved(sets.info.epsilon)
    made = Trainer(config, sets, RunFolder(config.folder), Console(quiet=True))
    made.model.to(sets.train.images(slice(1)).dtype)
    made.attacked, made.validated = made.attack_networks()
    return made


def by_the_textbook(made: Trainer, method: str, steps: int = STEPS) -> dict[str, Tensor]:
    """The state of the same model after the same steps of the textbook."""
    from textbook import Textbook

    options = made.config.optimization
    book = Textbook(method, made.model, schedules.create_optimizer(options, made.model.parameters()), made.threat)
    schedule = schedules.create_schedule(options, book.optimizer, len(made.batches))
    made.model.to(memory_format=torch.contiguous_format)
    for step in range(steps):
        x, labels, ids = made.batches.get(*divmod(step, len(made.batches)))
        book.step(x.contiguous(), labels, ids, rng.key(made.config.run.seed, "attack", step))
        schedule.step()
    return state(made.model)


def by_the_trainer(made: Trainer, steps: int = STEPS) -> dict[str, Tensor]:
    network = made.network(made.model)
    for _ in range(steps):
        made.train_step(network)
    return state(made.model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all weights and BatchNorm statistics."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("method", ["at", "trades", "dtrades", "mart", "faal"])
@pytest.mark.parametrize(
    "speed", [(), ("--no-fold-batchnorm",), ("--no-channels-last",), ("--no-fold-batchnorm", "--no-channels-last")]
)
def test_trains_what_the_textbook_trains(images: Path, tmp_path: Path, method: str, speed: tuple[str, ...]) -> None:
    """Twenty steps in float64: every weight and every statistic to 1e-8."""
    made = trainer(images, tmp_path, method, *speed)
    assert (made.attacked.folded is None) == ("--no-fold-batchnorm" in speed)
    begin = state(made.model)
    expected = by_the_textbook(trainer(images, tmp_path, method), method)
    got = by_the_trainer(made)
    assert largest_difference(got, expected) < 1e-8
    assert largest_difference(got, begin) > 0.01  # it has learned


@pytest.mark.usefixtures("double")
def test_compiled_training_is_the_same(images: Path, tmp_path: Path) -> None:
    """And nothing is compiled again for the epoch's last batch, for later epochs or for validation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = trainer(images, tmp_path, "dtrades", "--compile")
    assert made.attacked.how.endswith(", compiled")
    assert "compiled" not in made.validated.how  # whose batches shrink
    network = made.network(made.model)
    made.train_step(network)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 5  # the clean prediction and the attack; the outer passes: clean, adversarial, without gradients
    for _ in range(STEPS - 1):
        made.train_step(network)
    made.validate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    sizes = {len(made.batches.get(0, i)[1]) for i in range(len(made.batches))}
    assert len(sizes) == 2
    expected = by_the_textbook(trainer(images, tmp_path, "dtrades"), "dtrades")
    assert largest_difference(state(made.model), expected) < 1e-8


@pytest.mark.parametrize("option", ["--no-compile", "--compile"])
def test_validation_counts_images_that_are_right_all_along(images: Path, tmp_path: Path, option: str) -> None:
    """As PGD counts them that ends nowhere early: right without an attack and after each number of steps."""
    made = trainer(images, tmp_path, "at", "--validation-steps", "6", "--epsilon", "0.004", option)
    by_the_trainer(made)
    made.sets = replace(made.sets, validation=made.sets.train)  # of more images
    part, epsilon = made.sets.validation, made.threat.epsilon
    key, stands = rng.key(made.config.run.seed, "validation"), metrics.correct(made.model, part, None, 0, 8)
    na = metrics.accuracy(stands)
    for steps in range(7):
        attack = PGD(epsilon, steps, step_size=epsilon / 4)
        stands &= metrics.correct(made.model, part, attack, key, 8)
    assert made.validate() == (na, metrics.accuracy(stands))
    assert 0 < metrics.accuracy(stands) < na < 1


class Overstates(nn.Module):
    """A form of a network that takes many images for fooled which do not fool the network itself."""

    layout = torch.contiguous_format

    def __init__(self, network: nn.Module, margin: float):
        super().__init__()
        self.network, self.margin = network, margin

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return logits - self.margin * nn.functional.one_hot(logits.argmax(1), logits.shape[1])


def test_where_only_the_form_is_fooled_the_network_itself_is_attacked(images: Path, tmp_path: Path) -> None:
    made = trainer(images, tmp_path, "at")
    by_the_trainer(made)
    part, attack = made.sets.train, PGD(0.004, 6, stop_early=True)
    expected = metrics.correct(made.model, part, attack, 1, 8)
    form: Any = Overstates(made.model, 1e6)  # every image fools it at once
    assert torch.equal(metrics.correct(made.model, part, attack, 1, 8, form), expected)
    assert 0 < metrics.accuracy(expected) < metrics.accuracy(metrics.correct(made.model, part, None, 1, 8))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_validation_in_half_precision_calls_nothing_robust_that_its_attack_breaks(
    images: Path, tmp_path: Path, precision: str
) -> None:
    """To within images that a step in half precision takes elsewhere, of 36."""
    made = trainer(images, tmp_path, "at", "--validation-steps", "6", "--epsilon", "0.004", "--precision", precision)
    by_the_trainer(made)
    made.sets = replace(made.sets, validation=made.sets.train)
    part, key = made.sets.validation, rng.key(made.config.run.seed, "validation")
    _, half = made.validate()
    single = metrics.correct(made.model, part, made.config.validation_attack(stop_early=True), key, 8)
    assert abs(half - metrics.accuracy(single)) <= 2 / len(part)


def test_full_gradients_are_not_taken_in_float16(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--lambda-gradient full needs --precision fp32 or bf16"):
        trainer(images, tmp_path, "dtrades", "--lambda-gradient", "full", "--precision", "fp16")


def test_every_network_of_a_process_is_compiled() -> None:
    """However many there were before: a study trains many, one after the other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    count = 2 * torch._dynamo.config.recompile_limit
    for _ in range(count):
        compiled, images = Compiled(nn.Linear(3, 2), backend="eager"), torch.zeros(2, 3)
        compiled(images)
        with torch.no_grad():
            compiled(images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * count


def test_single_precision_stays_close(images: Path, tmp_path: Path) -> None:
    """In float32 a sign of the attack that rounding turns moves a pixel; after one step little has come of it."""
    made, twin = trainer(images, tmp_path, "trades"), trainer(images, tmp_path, "trades")
    expected, got = by_the_textbook(twin, "trades", steps=1), by_the_trainer(made, steps=1)
    assert largest_difference(got, expected) < 1e-4


def test_compile_refuses_a_double_backward(images: Path, tmp_path: Path) -> None:
    options: tuple[Any, ...] = ("--method", "dtrades", "--lambda-gradient", "full", "--compile")
    with pytest.raises(ValueError, match="--lambda-gradient full differentiates twice"):
        tiny_run.configuration(images, tmp_path, *options)


def test_compile_asks_for_a_compiler_first(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler on a CPU: install g\+\+ or set CXX"):
        trainer(images, tmp_path, "at", "--compile")
