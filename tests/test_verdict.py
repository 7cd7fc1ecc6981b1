"""The verdict on masked gradients: right on planted networks, and a plain function of its figures."""

import pytest
import small_nets
import torch
from torch import Tensor, nn

from dtrades_fast.attacks import FGSM, PGD
from dtrades_fast.evaluation import verdict
from dtrades_fast.evaluation.averaged import Averaged

pytestmark = pytest.mark.usefixtures("one_thread")


def verdict_on(model: nn.Module, count: int = 64, norm: verdict.Norm = "linf", epsilon: float = small_nets.EPSILON):
    images, labels, index = small_nets.batch(count)
    return verdict.judge(*verdict.probe(model, images, labels, index, epsilon=epsilon, norm=norm, key=1))


class Changed(nn.Module):
    """A network behind or before a change."""

    def __init__(self, network: nn.Module, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.network(self.before(images)))


@pytest.mark.parametrize("kind", ["standard", "robust"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", small_nets.EPSILON), ("l2", 0.5)])
def test_healthy(kind: str, norm: verdict.Norm, epsilon: float) -> None:
    got = verdict_on(small_nets.network(kind), norm=norm, epsilon=epsilon)  # type: ignore[arg-type]
    assert (got.verdict, got.reasons) == ("healthy", ())
    assert got.points > 40


def test_single_steps_that_mislead() -> None:
    model = small_nets.network("masked")
    images, labels, _ = small_nets.batch(64)
    stands = [(model(attack(model, images, labels)).argmax(1) == labels).float().mean() for attack in ATTACKS]
    assert stands[0] > 0.5  # it looks robust to the attack that it was trained with
    assert stands[1] < 0.1
    got = verdict_on(model)
    assert got.verdict == "masked"
    assert "stand after a single step" in got.reasons[0]


ATTACKS = (FGSM(small_nets.EPSILON), PGD(small_nets.EPSILON, 20))


def test_saturated_logits() -> None:
    got = verdict_on(Changed(small_nets.network("robust"), after=lambda z: 1000 * z))
    assert got.verdict == "masked"
    assert got.figures["zero_gradient"] > 0.5


def test_quantised_input() -> None:
    got = verdict_on(Changed(small_nets.network("robust"), before=lambda x: (8 * x).round() / 8))
    assert got.verdict == "masked"
    assert got.figures["zero_gradient"] == 1.0


def test_gradients_that_point_nowhere() -> None:
    """A zigzag on the pixels shatters the gradients without making them zero: Square sees through it."""

    def shatter(x: Tensor) -> Tensor:
        return x + 0.02 * torch.sin(2000 * x)

    got = verdict_on(Changed(small_nets.network("standard"), before=shatter))
    assert got.verdict in ("masked", "suspicious")
    assert got.figures["score_only"] + got.figures["noise_only"] > 0


def test_random_forward_pass_is_no_proof() -> None:
    got = verdict.judge({"noise_only": 0.9, "larger_is_harder": 0.5}, 64, random=True)
    assert got.verdict == "suspicious"
    assert "attack the average" in got.reasons[0]
    assert verdict.judge({}, 64, random=True).verdict == "suspicious"


def test_a_little_noise_hides_no_zero_gradients() -> None:
    quantised = Changed(small_nets.network("robust"), before=lambda x: (8 * x).round() / 8)
    noisy = Changed(quantised, after=lambda z: z + 0.01 * torch.randn_like(z))
    images, labels, index = small_nets.batch(64)
    figures, points = verdict.probe(noisy, images, labels, index, epsilon=small_nets.EPSILON, norm="linf", key=1)
    got = verdict.judge(figures, points, random=True)
    assert got.verdict == "masked"
    assert "attack the average" in got.reasons[0]


def test_average_over_random_passes() -> None:
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :4] * (1 + torch.randn(len(images), 1))

    images = torch.rand(3, 1, 4, 4).requires_grad_()
    averaged = Averaged(Noisy(), 4000)(images)
    torch.testing.assert_close(averaged, images.flatten(1)[:, :4], rtol=0.1, atol=0.05)
    (gradient,) = torch.autograd.grad(averaged.sum(), images)
    torch.testing.assert_close(gradient.flatten(1)[:, :4], torch.ones(3, 4), rtol=0.1, atol=0.05)
    with pytest.raises(ValueError, match="passes must be at least 1"):
        Averaged(Noisy(), 0)


@pytest.mark.parametrize("name", verdict.RULES)
def test_every_rule_counts(name: str) -> None:
    rule = verdict.RULES[name]
    calm = dict.fromkeys(verdict.RULES, 0.0)
    for value, word in ((rule.suspicious - 1e-6, "healthy"), (rule.suspicious, "suspicious"), (rule.masked, "masked")):
        got = verdict.judge({**calm, name: value}, 1000)
        assert got.verdict == word
        assert len(got.reasons) == (word != "healthy")


def test_few_points_prove_nothing() -> None:
    for points in (0, 1, 19):
        got = verdict.judge({}, points)
        assert got.verdict == "suspicious"
        assert got.reasons == (f"too few correctly classified points to tell: {points}, at least 20 are needed",)
    for broken, word in ((2, "healthy"), (3, "masked")):
        assert verdict.judge({"noise_only": broken / 30}, 30).verdict == word
    # of more points the same share is more of them
    assert verdict.judge({"transfer_only": 0.03}, 64).verdict == "healthy"
    assert verdict.judge({"transfer_only": 0.03}, 64, of={"transfer_only": 500}).verdict == "suspicious"
    assert verdict.judge({"zero_gradient": 1.0}, 10).verdict == "masked"


def test_slices_of_a_healthy_network_are_not_masked() -> None:
    images, labels, index = small_nets.batch(96)
    model = small_nets.network("robust")
    for rows in torch.arange(96).split(12):
        figures, points = verdict.probe(
            model, images[rows], labels[rows], index[rows], epsilon=small_nets.EPSILON, norm="linf", key=1
        )
        assert verdict.judge(figures, points).verdict != "masked"


def test_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 16), nn.Flatten(), nn.Linear(4, 10)).eval()
    random = torch.get_rng_state()
    verdict_on(model, 8)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
