"""Guard rails: each mistake is recognised by name, a sound network gives no finding, and nothing is left changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Literal

import pytest
import small_nets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrades_fast.evaluation import guards
from dtrades_fast.evaluation.guards import GuardError, Report

CLASSES = 4
EPSILON = 8 / 255

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(count: int = 32, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Each class has its own bright quadrant."""
    generator = torch.Generator().manual_seed(1)
    images = 0.3 * torch.rand(count, channels, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 0.6
    return images, labels


def network(classes: int = CLASSES) -> nn.Sequential:
    """With BatchNorm and dropout, and right on :func:`batch`: its last layer is the least-squares one."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    head = nn.Linear(64, classes)
    model = nn.Sequential(*features, nn.Dropout(0.2), head).eval()
    features[1].running_mean.uniform_(-0.1, 0.1)
    images, labels = batch()
    with torch.no_grad():
        wanted = 10 * F.one_hot(labels.clamp(max=classes - 1), classes).float()
        head.weight.copy_(torch.linalg.lstsq(features(images), wanted, driver="gelsd").solution.T)
        head.bias.zero_()
    return model


class Planted(nn.Module):
    """A sound network with a function around it."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.network = network()
        self.around = forward
        self.register_buffer("seen", torch.zeros(()))
        self.eval()

    def forward(self, images: Tensor) -> object:
        return self.around(self, images)


def planted(forward: Callable[[Planted, Tensor], object]) -> Callable[[], nn.Module]:
    return lambda: Planted(forward)  # type: ignore[arg-type]


def noisy(m: Planted, x: Tensor) -> Tensor:
    return m.network(x + 0.01 * torch.randn_like(x))


def dropping(m: Planted, x: Tensor) -> Tensor:
    return m.network(F.dropout(x, 0.05, training=True))


def seeded(m: Planted, x: Tensor) -> Tensor:
    """The same noise in every pass, but other noise for an image at another place."""
    torch.manual_seed(0)
    return m.network(x + 0.1 * torch.randn_like(x))


def without_gradient(m: Planted, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.network(x)


def inference_mode(m: Planted, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return m.network(x)


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise RuntimeError("one way only")


def counting(m: Planted, x: Tensor) -> Tensor:
    m.seen += 1
    return m.network(x)


def adapting(m: Planted, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.network[-1].bias += x.mean()
    return m.network(x)


def moving_batchnorm(m: Planted, x: Tensor) -> Tensor:
    m.network[1].train()
    return m.network(x)


def purifying(m: Planted, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(m.network(z).logsumexp(1).sum(), z)
    return m.network(x + 0.001 * g.sign())


def purifying_by_backward(m: Planted, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        m.network(z).logsumexp(1).sum().backward()
    return m.network(x + 0.001 * z.grad.sign())


def batch_statistics(m: Planted, x: Tensor) -> Tensor:
    return m.network(F.batch_norm(x, None, None, training=True) * 0.3 + 0.4)


def half_dead(m: Planted, x: Tensor) -> Tensor:
    """No gradient for darker images."""
    bright = (x.flatten(1).mean(1) > x.flatten(1).mean(1).median())[:, None]
    logits = m.network(x)
    return torch.where(bright, logits, logits.detach())


NETWORKS: dict[str, tuple[set[str], Callable[[], nn.Module]]] = {
    "softmax": ({"probabilities"}, planted(lambda m, x: m.network(x).softmax(1))),
    "mean of softmaxes": ({"probabilities"}, planted(lambda m, x: (m.network(x).softmax(1) + 0.25) / 2)),
    "log-softmax": ({"log_probabilities"}, planted(lambda m, x: m.network(x).log_softmax(1))),
    "train mode": ({"training"}, lambda: network().train()),
    "a module in train mode": ({"training"}, lambda: train_one(network())),
    "noise": ({"random"}, planted(noisy)),
    "dropout that stays on": ({"random"}, planted(dropping)),
    "seeded noise": ({"batch_dependent"}, planted(seeded)),
    "nan": ({"not_finite"}, planted(lambda m, x: m.network(x) / 0 * 0)),
    "infinite": ({"not_finite"}, planted(lambda m, x: (1000 * m.network(x).abs()).exp())),
    "infinite gradient": (
        {"not_finite"},
        planted(lambda m, x: m.network(x) + (x[:, :, :1] * 0).sqrt().sum((1, 2, 3))[:, None] * torch.arange(CLASSES)),
    ),
    "three classes": ({"few_classes"}, lambda: network(3)),
    "two classes": ({"few_classes"}, lambda: network(2)),
    "one number per image": ({"shape"}, planted(lambda m, x: m.network(x)[:, 0])),
    "one class": ({"shape"}, planted(lambda m, x: m.network(x)[:, :1])),
    "a map of logits": ({"shape"}, planted(lambda m, x: m.network(x)[:, :, None, None])),
    "one output for all": ({"shape"}, planted(lambda m, x: m.network(x).mean(0, keepdim=True))),
    "a tuple": ({"shape"}, planted(lambda m, x: (m.network(x), x))),
    "classes as integers": ({"shape"}, planted(lambda m, x: F.one_hot(m.network(x).argmax(1), CLASSES))),
    "wrong channels": ({"forward"}, planted(lambda m, x: m.network(x.expand(-1, 3, -1, -1)))),
    "softmax in half precision": (
        {"probabilities"},
        planted(lambda m, x: m.network(x).half().softmax(1).float()),
    ),
    "softmax in bfloat16": ({"probabilities"}, planted(lambda m, x: m.network(x).bfloat16().softmax(1).float())),
    "softmax, clipped": ({"probabilities"}, planted(lambda m, x: m.network(x).softmax(1).clamp(1e-4, 1))),
    "untrained": ({"chance"}, planted(lambda m, x: m.network(x.flip(-1).flip(-2)))),
    "no_grad": ({"not_differentiable"}, planted(without_gradient)),
    "inference_mode": ({"not_differentiable"}, planted(inference_mode)),
    "detach": ({"not_differentiable"}, planted(lambda m, x: m.network(x.detach()))),
    "numpy": ({"not_differentiable"}, planted(lambda m, x: m.network(torch.from_numpy(x.detach().numpy())))),
    "failing backward": ({"not_differentiable"}, planted(lambda m, x: m.network(OneWay.apply(x)))),
    "rounding": ({"zero_gradient"}, planted(lambda m, x: m.network((16 * x).round() / 16))),
    "no gradient for some": ({"zero_gradient"}, planted(half_dead)),
    "autograd.grad": ({"autograd_inside"}, planted(purifying)),
    "backward": ({"autograd_inside"}, planted(purifying_by_backward)),
    "batch statistics": ({"batch_dependent"}, planted(batch_statistics)),
    "output minus the batch's": ({"batch_dependent"}, planted(lambda m, x: m.network(x) - m.network(x).mean(0) / 2)),
    "a counter": ({"changes_itself"}, planted(counting)),
    "weights that adapt": ({"changes_itself", "batch_dependent"}, planted(adapting)),
    "train mode from inside": ({"training", "changes_itself", "batch_dependent"}, planted(moving_batchnorm)),
}
WARNINGS = {"log_probabilities", "few_classes", "chance"}


def train_one(model: nn.Sequential) -> nn.Sequential:
    model[5].train()
    return model


def found(model: nn.Module, images: Tensor | None = None, labels: Tensor | None = None, **options: object) -> Report:
    """All findings, whether they stop an evaluation or not."""
    clean, true = batch()
    images, labels = clean if images is None else images, true if labels is None else labels
    options = {"epsilon": EPSILON, **options}
    try:
        return guards.check(model, images, labels, ignore=guards.NAMES, **options)  # type: ignore[arg-type]
    except GuardError as error:
        fatal = {finding.name for finding in error.report.findings} & set(guards.FATAL)
        if not fatal or "ignore" in str(error):  # there is no going on
            raise
        return error.report


def names(report: Report) -> set[str]:
    return {finding.name for finding in report.findings}


@pytest.mark.parametrize(("expected", "make"), NETWORKS.values(), ids=NETWORKS)
def test_planted_networks_are_recognised(expected: set[str], make: Callable[[], nn.Module]) -> None:
    labels = batch()[1]
    if expected == {"few_classes"}:
        labels = labels.clamp(max=make()(batch()[0]).shape[1] - 1)
    report = found(make(), labels=labels)
    assert names(report) == expected
    for finding in report.findings:
        assert finding.name in guards.NAMES
        assert len(finding.message) > 60
    stops = expected - WARNINGS and make is not NETWORKS["no gradient for some"][1]
    if stops:
        with pytest.raises(GuardError) as caught:
            guards.check(make(), batch()[0], labels, EPSILON)
        assert all(f"{name}: " in str(caught.value) for name in expected)
    else:
        assert names(guards.check(make(), batch()[0], labels, EPSILON)) == expected


@pytest.mark.parametrize("count", [1, 2, 5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sound_network_gives_no_finding(count: int, dtype: torch.dtype) -> None:
    images, labels = batch(count)
    for norm, epsilon in (("linf", EPSILON), ("linf", 1.0), ("l2", 0.5), ("l2", 8.0)):
        assert found(network().to(dtype), images.to(dtype), labels, epsilon=epsilon, norm=norm) == Report(())
    assert guards.check(network(), *batch(), EPSILON) == Report(())


def test_a_function_is_a_network_too() -> None:
    model = network().requires_grad_(False)
    assert guards.check(lambda images: model(images), *batch(), EPSILON) == Report(())


IMAGES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "uint8": (lambda x: (255 * x).byte(), "dtype is torch.uint8.*float.. / 255"),
    "bytes as floats": (lambda x: (255 * x).round(), "as bytes have them: divide them by 255"),
    "normalised": (lambda x: (x - 0.5) / 0.25, "as normalised images have them.*normalisation in the network"),
    "a little outside": (lambda x: x + 0.2, "slightly outside: clamp them"),
    "nan": (lambda x: x.where(x > 0.1, torch.nan), "NaN or infinite"),
    "one image": (lambda x: x[0], "shape is"),
    "none": (lambda x: x[:0], "shape is"),
    "array": (lambda x: x.numpy(), "they are ndarray"),
}


@pytest.mark.parametrize(("change", "message"), IMAGES.values(), ids=IMAGES)
def test_images_that_are_not_in_0_1(change: Callable[[Tensor], object], message: str) -> None:
    images, labels = batch()
    with pytest.raises(GuardError, match=f"images: .*{message}") as caught:
        guards.check(network(), change(images), labels, EPSILON)  # type: ignore[arg-type]
    assert "images" in names(caught.value.report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1, "label 4, but the network has 4 classes"),
        (lambda y: y - 1, "label -1; classes count from 0"),
        (lambda y: y.int(), "they are torch.int32"),
        (lambda y: y[:-1], r"shape is \[31\] for 32 images"),
        (lambda y: F.one_hot(y), r"shape is \[32, 4\]"),
        (lambda y: y.tolist(), "they are list"),
    ],
)
def test_labels_that_are_no_classes(change: Callable[[Tensor], Tensor], message: str) -> None:
    images, labels = batch()
    with pytest.raises(GuardError, match=f"labels: .*{message}"):
        guards.check(network(), images, change(labels), EPSILON)


@pytest.mark.parametrize(
    ("norm", "epsilon", "message"),
    [
        ("linf", 8.0, "give 8/255"),
        ("linf", 1.001, "already holds every image"),
        ("l2", 128.0, "L2 ball of radius 8 already .* give 128/255"),
        ("linf", 0.0, "must be above 0"),
        ("linf", -0.1, "must be above 0"),
        ("l2", float("nan"), "must be above 0"),
    ],
)
def test_epsilon_that_is_not_in_pixel_units(norm: str, epsilon: float, message: str) -> None:
    with pytest.raises(GuardError, match=f"epsilon: .*{message}"):
        guards.check(network(), *batch(), epsilon, norm=norm)  # type: ignore[arg-type]


def test_renamed_classes_are_told_from_an_untrained_network() -> None:
    labels = batch()[1]
    model = network()
    model[-1].weight.data = model[-1].weight.data[[1, 2, 3, 0]]
    (finding,) = found(model).findings
    assert "another order" in finding.message
    (finding,) = found(NETWORKS["untrained"][1](), labels=labels.roll(1)).findings
    assert "is it trained" in finding.message


def test_chance_is_a_matter_of_counts() -> None:
    assert guards.at_chance(10, 100, 10)
    assert not guards.at_chance(30, 100, 10)
    assert guards.at_chance(0, 64, 10)
    assert not guards.at_chance(0, 1, 10)  # a single image says nothing
    assert guards.at_chance(5000, 10_000, 2)
    assert not guards.at_chance(5200, 10_000, 2)
    # against drawing: 17 or more of 64 among 10 classes happen in fewer than 1 % of all cases, 12 in more
    hits = torch.distributions.Binomial(64, torch.tensor(0.1)).sample((20_000,))
    for correct in (12, 17):
        assert guards.at_chance(correct, 64, 10) == ((hits >= correct).double().mean().item() > guards.GUESSING)


def test_as_many_names_as_logits() -> None:
    assert found(network(), classes=CLASSES) == Report(())
    for classes in (CLASSES - 1, CLASSES + 1):
        report = found(network(), classes=classes)
        assert names(report) == {"class_names"}
        assert f"{classes} names for {CLASSES} logits" in report.findings[0].message


def test_another_dtype_is_to_be_wrapped() -> None:
    report = found(network().double())
    assert names(report) == {"forward"}
    assert "wrapped so that it takes these" in report.findings[0].message


def test_several_findings_stand_in_one_message() -> None:
    images, labels = batch()
    model = NETWORKS["softmax"][1]()
    with pytest.raises(GuardError) as caught:
        guards.check(model, images * 255, labels, 8.0)
    assert {"images", "epsilon", "probabilities"} <= names(caught.value.report)
    for name in ("images", "epsilon", "probabilities"):
        assert f"error: {name}: " in str(caught.value)
    assert "to go on regardless, ignore images, epsilon, probabilities" in str(caught.value)


def test_ignored_findings_stay_in_the_report() -> None:
    images, labels = batch()
    model = NETWORKS["noise"][1]()
    with pytest.raises(GuardError, match="random"):
        guards.check(model, images, labels, EPSILON, ignore=["training"])
    report = guards.check(model, images, labels, EPSILON, ignore=["random"])
    assert report.has("random")
    assert not report.has("training")
    with pytest.raises(ValueError, match="no finding 'noise'; known are images, labels"):
        guards.check(model, images, labels, EPSILON, ignore=["noise"])


@pytest.mark.parametrize("name", ["a tuple", "wrong channels", "no_grad", "failing backward"])
def test_no_offer_to_go_on_where_nothing_can_be_evaluated(name: str) -> None:
    with pytest.raises(GuardError) as caught:
        guards.check(NETWORKS[name][1](), *batch(), EPSILON, ignore=guards.NAMES)
    assert "to go on regardless" not in str(caught.value)


@pytest.mark.parametrize("kind", ["standard", "robust", "masked"])
@pytest.mark.parametrize("count", [1, 64])
def test_logits_of_trained_networks_are_no_probabilities(kind: Literal["standard", "robust", "masked"], count: int):
    images, labels, _ = small_nets.batch(count)
    model = small_nets.network(kind)
    assert guards.check(model, images, labels, EPSILON, classes=10) == Report(())
    assert guards.check(lambda x: model(x).softmax(1), images, labels, EPSILON, ignore=guards.NAMES).has(
        "probabilities"
    )


@pytest.mark.parametrize("name", ["a counter", "weights that adapt", "train mode from inside", "noise", "backward"])
def test_everything_is_left_as_it_was(name: str) -> None:
    model = NETWORKS[name][1]()
    model.train()
    model.network[1].eval()
    model.network[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    images, labels = batch()
    given = images.clone()
    random, profile = torch.get_rng_state(), sys.getprofile()

    found(model, images, labels)

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.network[0].parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert sys.getprofile() is profile
    assert torch.equal(images, given)
    assert images.grad is None


def test_autograd_is_recognised_under_another_name() -> None:
    from torch.autograd import grad as another_name

    def forward(m: Planted, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return m.network(x) + 0 * another_name(m.network(z).sum(), z)[0].sum()

    assert names(found(Planted(forward))) == {"autograd_inside"}  # type: ignore[arg-type]
