"""The watch on the attack's gradients, and the monitor that judges from it whether they are masked."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast import data as datasets
from dtrades_fast.attacks import PGD, Watch, frozen, gradient_stats, input_gradient
from dtrades_fast.attacks.objectives import CrossEntropy
from dtrades_fast.defenses import Batch, Crafted, Loss, Threat, create
from dtrades_fast.training import monitor
from dtrades_fast.training.monitor import Monitor
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer, TrainingError

ONE = torch.ones(())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def images(seed: int = 0) -> Tensor:
    return torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trainer(data: Path, runs: Path, *options: str) -> Trainer:
    config = tiny_run.configuration(data, runs, *options).resolved("8/255")
    sets = datasets.load(config.data.dataset, "data", "cpu")
    t = Trainer(config, sets, RunFolder(config.folder), Console(file=io.StringIO()))
    t.folder.path.mkdir(parents=True, exist_ok=True)
    return t


# The gradients of an attack


def test_linf_fosc_is_how_far_the_linearised_objective_can_rise() -> None:
    x, g = images(), images(1) - 0.5
    adv = (x + 0.1 * (2 * images(2) - 1)).clamp(0, 1)
    stats = gradient_stats(g, adv, x, 0.1, "linf")
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    best = torch.where(g > 0, high, low)
    torch.testing.assert_close(stats.fosc, (g * (best - adv)).flatten(1).sum(1))
    torch.testing.assert_close(stats.fosc_relative, stats.fosc / (0.1 * g.abs().flatten(1).sum(1)))
    torch.testing.assert_close(gradient_stats(g, best, x, 0.1, "linf").fosc, torch.zeros(6, dtype=torch.float64))


def test_l2_fosc_is_zero_at_the_end_of_the_gradient_and_two_opposite() -> None:
    x, g = images(), images(1) - 0.5
    towards = 0.3 * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    for factor, expected in ((1, 0.0), (0, 1.0), (-1, 2.0)):
        stats = gradient_stats(g, x + factor * towards, x, 0.3, "l2")
        torch.testing.assert_close(stats.fosc_relative, torch.full((6,), expected, dtype=torch.float64))
    torch.testing.assert_close(stats.l2, g.flatten(1).norm(dim=1))


def test_a_gradient_of_zero_is_counted_and_gives_no_nan() -> None:
    x, g = images(), images(1)
    g[2] = 0
    watch = Watch(x, 0.1, "linf")
    watch(x, g)
    watch(x, g)
    assert watch.stats is not None
    assert watch.stats.zero.tolist() == [False, False, True, False, False, False]
    assert watch.stats.fosc_relative[2] == 0
    assert watch.cosine is not None
    torch.testing.assert_close(watch.cosine, torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_cosine_is_the_mean_over_neighbouring_steps(size: float) -> None:
    """Also of gradients whose squares vanish in float32."""
    x, gradients = images().float(), [size * (images(seed) - 0.5).float() for seed in (1, 2, 3)]
    watch = Watch(x, 0.1, "linf")
    assert watch.cosine is None
    for g in gradients:
        watch(x, g)
    flat = [g.double().flatten(1) / size for g in gradients]
    expected = (F.cosine_similarity(flat[0], flat[1]) + F.cosine_similarity(flat[1], flat[2])) / 2
    assert watch.cosine is not None
    torch.testing.assert_close(watch.cosine.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_attack_shows_each_gradient_with_the_images_it_was_taken_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, labels, seen = images(), torch.tensor([0, 1, 2, 0, 1, 2]), []

    class Recorder(Watch):
        def __call__(self, adv: Tensor, gradient: Tensor) -> None:
            seen.append((adv.clone(), gradient))

    attack, index = PGD(0.1, 4), torch.arange(6)
    with frozen(model):
        objective = CrossEntropy(labels)
        start = attack.start_from(x, index, 5)
        adv = attack.ascend(model, start, x, objective, Recorder(x, 0.1, "linf"))
        assert len(seen) == 4
        for at, gradient in seen:
            torch.testing.assert_close(input_gradient(model, at, objective), gradient)
    assert torch.equal(adv, attack(model, x, labels, index=index, key=5))
    assert not torch.equal(seen[-1][0], adv)


def test_noise_moves_the_start_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    starts = {}

    class First(Watch):
        def __call__(self, adv: Tensor, gradient: Tensor) -> None:
            starts.setdefault(self.epsilon, adv.clone())

    x, labels, index = images(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    attack = PGD(0.1, 3, start="gaussian")
    noises = (None, torch.zeros(()), torch.tensor(0.2))
    advs = [
        attack.ascend(model, attack.start_from(x, index, 5, noise), x, CrossEntropy(labels), First(x, float(i), "linf"))
        for i, noise in enumerate(noises)
    ]
    assert torch.equal(advs[0], advs[1])
    assert 0.15 < (starts[2.0] - starts[0.0]).std() < 0.25
    assert (advs[2] - x).abs().max() <= 0.1 + 1e-12  # the projection is around the clean image
    assert advs[2].min() >= 0


# The judgement


def judged(robust: float, clean: float, relative: float, cosine: float | None, zero: float = 0.0) -> Monitor:
    """A monitor after 100 equal batches of 50 samples with these figures, 10 classes."""
    m, labels = Monitor(10, 0.1, "cpu"), torch.arange(50) % 10

    def logits(accuracy: float) -> Tensor:
        right = torch.arange(50) < round(50 * accuracy)
        return F.one_hot(torch.where(right, labels, (labels + 1) % 10), 10).double()

    x = torch.full((50, 1, 2, 2), 0.5)
    for _ in range(100):
        watch = Watch(x, 0.1, "linf")
        g = torch.ones(50, 1, 2, 2)
        g[: round(50 * zero)] = 0
        if cosine is not None:  # two dimensions suffice for any angle
            before = torch.zeros_like(g)
            before[:, 0, 0, :] = torch.tensor([1.0, 1.0]) * cosine
            before[:, 0, 0] = torch.stack(
                [torch.tensor([math.cos(a), math.sin(a)]) for a in [math.acos(cosine) + math.pi / 4] * 50]
            )
            g[:, 0, 1] = 0
            watch(x, before)
        adv = (x + 0.1 * (1 - relative)).requires_grad_()
        adv.grad = g / 50
        loss = Loss(torch.zeros(50), {}, logits(clean), logits(robust))
        m.add(Crafted(adv, watch), loss, labels, ONE)
    return m


@pytest.mark.parametrize(
    ("robust", "clean", "relative", "cosine", "zero", "reason"),
    [
        (0.8, 0.9, 0.45, 0.2, 0.0, "fosc"),
        (0.8, 0.9, 0.1, 0.9, 0.5, "zero"),
        (0.9, 0.8, 0.1, 0.9, 0.0, "accuracy"),
        (0.8, 0.9, 0.1, 0.9, 0.0, None),  # converged
        (0.8, 0.9, 0.45, 0.8, 0.0, None),  # on its way: few small steps
        (0.8, 0.9, 0.1, 0.2, 0.0, None),  # converged at a corner of the ball
        (0.1, 0.1, 0.5, 0.1, 0.0, None),  # has not learned anything that could be masked
    ],
)
def test_verdict(robust: float, clean: float, relative: float, cosine: float, zero: float, reason: str | None) -> None:
    m = judged(robust, clean, relative, cosine, zero)
    figures = m.summary()
    assert figures["gradient_cosine"] == pytest.approx(cosine * (1 - zero), abs=1e-5)
    assert figures["zero_gradient"] == zero
    assert figures["fosc_relative"]["mean"] == pytest.approx(relative * (1 - zero), abs=1e-5)
    assert figures["adv_minus_clean"] == pytest.approx(robust - clean)
    assert bool(m.alarm) == (reason is not None)
    assert {name for name, steps in figures["alarms"]["reasons"].items() if steps} == ({reason} if reason else set())
    if reason:
        assert monitor.REASONS[reason] in m.message()
        assert figures["alarms"]["steps"] == 100 - 34  # 1 - 0.98^35 > 1/2: the average is slow on purpose
        assert m.noise == pytest.approx(0.1)
    else:
        assert m.message() == ""
        assert m.noise == 0


def test_a_single_step_without_a_second_gradient_is_not_judged_by_fosc() -> None:
    m = judged(0.8, 0.9, 0.45, None)
    assert m.summary()["gradient_cosine"] is None
    assert not m.alarm


def test_a_gradient_that_overflowed_is_left_out_of_the_epochs_means() -> None:
    labels, x = torch.zeros(4, dtype=torch.long), torch.full((4, 1, 2, 2), 0.5)
    logits = F.one_hot(labels, 10).double()

    def summary(*gradients: Tensor) -> dict:
        m = Monitor(10, 0.1, "cpu")
        for g in gradients:
            watch = Watch(x, 0.1, "linf")
            watch(x, torch.ones_like(x))
            adv = (x + 0.02).requires_grad_()
            adv.grad = g
            m.add(Crafted(adv, watch), Loss(torch.zeros(4), {}, logits, logits), labels, ONE)
        return m.summary()

    plain, overflowed = torch.ones_like(x), torch.full_like(x, torch.inf)
    figures, alone = summary(plain, overflowed), summary(plain)
    for name in ("fosc", "fosc_relative", "gradient_cosine"):
        assert figures[name] == alone[name]
    nothing = summary(overflowed)
    assert "fosc" not in nothing
    assert nothing["gradient_cosine"] is None


def test_a_state_goes_on_to_the_same_judgement() -> None:
    whole, first = judged(0.8, 0.9, 0.45, 0.2), judged(0.8, 0.9, 0.45, 0.2)
    second = Monitor(10, 0.1, "cpu")
    second.load_state_dict(first.state_dict())
    assert second.summary() == whole.summary()
    assert second.alarm


def test_distributions_are_split_by_class_and_by_the_clean_prediction() -> None:
    m, random = Monitor(3, 0.1, "cpu"), np.random.default_rng(0)
    collected = []
    for _ in range(4):
        labels, guess = random.integers(3, size=8), random.integers(3, size=8)
        values = 10.0 ** random.uniform(-8, 4, 8)
        loss = Loss(
            torch.zeros(8),
            {"lambda": torch.tensor(values)},
            F.one_hot(torch.tensor(guess), 3).double(),
        )
        m.add(Crafted(torch.zeros(8, 1, 1, 1)), loss, torch.tensor(labels), ONE)
        collected += list(zip(labels, guess == labels, values, strict=True))
    split = m.summary()["lambda"]
    for name, wanted in (("correct", True), ("wrong", False)):
        values = np.array([v for _, c, v in collected if c == wanted])
        assert split[name]["count"] == len(values)
        assert split[name]["mean"] == pytest.approx(values.mean())
        assert split[name]["std"] == pytest.approx(values.std())
        edges = np.array([-np.inf, *split["histogram"]["edges"], np.inf])
        assert split["histogram"][name] == np.histogram(values, edges)[0].tolist()
    for label, moments in enumerate(split["by_class"]):
        values = np.array([v for y, _, v in collected if y == label])
        assert moments["mean"] == pytest.approx(values.mean())


# In training


def test_metrics_have_the_monitors_figures(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--lambda-warmup", "1")
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in lines:
        figures = line["monitor"]
        assert 0 <= figures["fosc"]["mean"] <= figures["fosc"]["p95"]
        assert 0 <= figures["fosc_relative"]["mean"] <= 2
        assert -1 <= figures["gradient_cosine"] <= 1
        assert 0 <= figures["zero_gradient"] <= 1  # a tiny network of ReLUs is dead for some images
        assert figures["adv_minus_clean"] == pytest.approx(line["train"]["ra"]["mean"] - line["train"]["na"]["mean"], 1)
        for name in ("lambda", "entropy", "sensitivity"):
            split = figures[name]
            counts = [split["correct"]["count"] + split["wrong"]["count"], sum(c["count"] for c in split["by_class"])]
            counts.append(sum(split["histogram"]["correct"]) + sum(split["histogram"]["wrong"]))
            assert counts == [19, 19, 19]
            means = [(split[k]["count"], split[k]["mean"] or 0.0) for k in ("correct", "wrong")]
            assert sum(n * mean for n, mean in means) / 19 == pytest.approx(line["train"][name]["mean"])
    assert lines[0]["defense"] == {}
    assert set(lines[2]["defense"]) == {"lambda_alpha", "lambda_beta"}


def test_a_step_with_the_monitor_is_the_step_without(data: Path, tmp_path: Path) -> None:
    """That the images want a gradient changes no bit of the weights'."""
    weights = []
    for watched in (True, False):
        t = trainer(data, tmp_path, "--method", "trades")
        craft = t.defense.craft
        if not watched:
            t.defense.craft = lambda *given, craft=craft: Crafted(craft(*given).adv)  # type: ignore
        t.train_step(t.network(t.model))
        assert ("fosc" in t.monitor.meter.sums) == watched
        weights.append(t.model.state_dict())
    tiny_run.assert_same(*weights)


def raise_alarm(t: Trainer) -> None:
    t.monitor.looks_masked.fill_(1.0)


def test_stop_saves_and_says_what_is_off(data: Path, tmp_path: Path) -> None:
    t = trainer(data, tmp_path, "--on-masking", "stop")
    raise_alarm(t)
    with pytest.raises(TrainingError, match=r"at step 1 of 9: gradients look masked: .*--on-masking noise"):
        t.fit()
    assert torch.load(t.folder.last, weights_only=True)["step"] == 1


def test_stop_at_the_end_of_an_epoch_can_be_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state that is saved is behind the epoch's metrics, not before them."""
    t, message = trainer(data, tmp_path, "--on-masking", "stop"), Monitor.message
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "message", lambda self: "off" if t.step == 3 else message(self))
        with pytest.raises(TrainingError, match="at step 3 of 9: off"):
            t.fit()
    assert len(t.folder.read_metrics()) == 1
    again = trainer(data, tmp_path, "--on-masking", "stop", "--resume")
    again.restore()
    again.folder.cut_metrics(1)
    again.fit()
    assert [line["epoch"] for line in again.folder.read_metrics()] == [1, 2, 3]


def test_warn_goes_on_and_says_so_at_the_end_of_the_epoch(data: Path, tmp_path: Path) -> None:
    t = trainer(data, tmp_path)
    raise_alarm(t)
    t.fit()
    output = t.console.file.getvalue()  # type: ignore[attr-defined]
    assert "warning: gradients looked masked for 3 steps of this epoch" in output
    t.meter.add("loss", torch.ones(1))
    t.epoch_seconds = 1.0
    assert "gradients look masked" in t.figures()


def test_noise_starts_attacks_elsewhere_while_the_alarm_is_on(data: Path, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor | None]] = {}
    for name, options in (("warn", ()), ("noise", ("--on-masking", "noise", "--masking-noise", "0.25"))):
        t = trainer(data, tmp_path, *options)
        craft, seen[name] = t.defense.craft, []

        def crafted(model, batch: Batch, craft=craft, noises=seen[name]) -> Crafted:  # type: ignore[no-untyped-def]
            noises.append(batch.noise)
            return craft(model, batch)

        t.defense.craft = crafted  # type: ignore[method-assign]
        network = t.network(t.model)
        t.train_step(network)
        raise_alarm(t)
        t.train_step(network)
    assert seen["warn"] == [None, None]
    assert [float(x) for x in seen["noise"] if x is not None] == [0, 0.25]


def test_saturated_logits_raise_the_alarm_and_a_plain_network_does_not() -> None:
    """The real gradients: with logits 1e4 times as large the attack finds none, and all samples seem robust."""
    torch.manual_seed(0)
    pixels = torch.rand(64, 1, 6, 6)
    labels = (pixels[:, 0, :, :3].mean((1, 2)) > pixels[:, 0, :, 3:].mean((1, 2))).long()
    for scale, expected in ((1.0, False), (1e4, True)):
        model = Scaled(scale)
        defense, m = create("at", Threat(0.02, 5)), Monitor(2, 0.1, "cpu")
        for step in range(60):
            batch = Batch(pixels, labels, torch.arange(64), step)
            crafted = defense.craft(model, batch)
            crafted.adv.requires_grad_()
            loss = defense.loss(model.train(), batch, crafted)
            loss.total.backward()
            m.add(crafted, loss, labels, ONE)
        assert bool(m.alarm) == expected
        if expected:
            assert "samples have no gradient" in m.message()


class Scaled(nn.Module):
    """Which half is brighter."""

    def __init__(self, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1.0, 1.0]) * 20 * scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0, :, :3].mean((1, 2)) - x[:, 0, :, 3:].mean((1, 2)))[:, None] * self.weight
