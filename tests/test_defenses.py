"""Losses against the formulas written out in float64, and the properties that the methods promise."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast import defenses
from dtrades_fast.defenses import Batch, Crafted, Threat
from dtrades_fast.defenses.base import outer_forward

THREAT = Threat(epsilon=0.1, steps=3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For tensors this small, waking threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return nn.Sequential(*layers).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(9, 1, 8, 8, generator=generator, dtype=dtype)
    return Batch(images, torch.randint(5, (9,), generator=generator), torch.arange(9), key=11)


def make(method: str, threat: Threat = THREAT, **options: Any) -> defenses.Defense:
    return defenses.create(method, threat, **options)


def step(method: str, model: nn.Module, data: Batch, **options: Any) -> tuple[defenses.Loss, Crafted]:
    defense = make(method, **options)
    model.train()
    crafted = defense.craft(model, data)
    return defense.loss(model, data, crafted), crafted


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def kl(z: Tensor, adv_z: Tensor) -> Tensor:
    log_p, log_q = z.log_softmax(-1), adv_z.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def textbook(method: str, z: Tensor, adv_z: Tensor, labels: Tensor, gradient: Tensor | None) -> Tensor:
    if method == "standard":
        return F.cross_entropy(z, labels)
    if method == "at":
        return F.cross_entropy(adv_z, labels)
    weight: Tensor | float = 6.0
    if method == "dtrades":
        assert gradient is not None
        weight = entropy(z).detach() + gradient.flatten(1).norm(dim=1)
    return F.cross_entropy(z, labels) + (weight * kl(z, adv_z)).mean()


@pytest.mark.parametrize("method", ["standard", "at", "trades", "dtrades"])
def test_loss_and_gradients_are_the_textbooks(method: str) -> None:
    model, data = network(), batch()
    loss, crafted = step(method, model, data)
    expected = textbook(method, model(data.images), model(crafted.adv), data.labels, crafted.gradient)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-6, atol=1e-7)  # cross-entropy is in float32
    for mine, reference in zip(gradients(loss.total, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_terms_make_up_the_total() -> None:
    loss, _ = step("dtrades", network(), batch())
    terms = loss.terms
    assert list(terms) == ["ce", "kl", "lambda", "entropy", "sensitivity"]
    torch.testing.assert_close(loss.total.double(), (terms["ce"] + terms["lambda"] * terms["kl"]).mean().double())
    torch.testing.assert_close(terms["lambda"], terms["entropy"] + terms["sensitivity"])
    assert not any(values.requires_grad for values in terms.values())
    assert all(values.shape == (9,) for values in terms.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [1.0, 6.0, 0.3])
@pytest.mark.parametrize("bn_mode", ["clean_adv", "clean_adv_clean", "adv_clean", "concat"])
def test_dtrades_with_a_constant_weight_is_trades(dtype: torch.dtype, base: float, bn_mode: str) -> None:
    results = []
    for method, options in (
        ("trades", {"beta": base}),
        ("dtrades", {"lambda_alpha": 0.0, "lambda_beta": 0.0, "lambda_base": base}),
    ):
        model, data = network(dtype), batch(dtype)
        loss, crafted = step(method, model, data, bn_mode=bn_mode, **options)
        results.append((crafted.adv, loss.total, *gradients(loss.total, model), *model.buffers()))
    for trades, dtrades in zip(*results, strict=True):
        assert torch.equal(trades, dtrades)


@pytest.mark.parametrize("method", ["trades", "dtrades"])
def test_the_clean_target_is_not_detached(method: str) -> None:
    model, data = network(), batch()
    loss, crafted = step(method, model, data)
    z, adv_z = model(data.images), model(crafted.adv)
    detached = textbook(method, z.detach(), adv_z, data.labels, crafted.gradient) + F.cross_entropy(z, data.labels)
    mine, cut = gradients(loss.total, model)[0], gradients(detached, model)[0]
    assert (mine - cut).norm() > 1e-3 * mine.norm()


def test_lambda_gradient_through_the_entropy() -> None:
    model, data = network(), batch()
    loss, crafted = step("dtrades", model, data, lambda_gradient="entropy", lambda_alpha=2.0)
    assert crafted.gradient is not None
    z, adv_z = model(data.images), model(crafted.adv)
    sensitivity = crafted.gradient.flatten(1).norm(dim=1)
    expected = F.cross_entropy(z, data.labels) + ((2 * entropy(z) + sensitivity) * kl(z, adv_z)).mean()
    constant = F.cross_entropy(z, data.labels) + ((2 * entropy(z).detach() + sensitivity) * kl(z, adv_z)).mean()
    kept, mine = gradients(constant, model)[0], gradients(loss.total, model)
    assert (mine[0] - kept).norm() > 1e-3 * kept.norm()
    for a, b in zip(mine, gradients(expected, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["final", "last_step"])
def test_sensitivity_is_each_samples_own_gradient(where: str) -> None:
    model, data = network(), batch()
    loss, crafted = step("dtrades", model, data, sensitivity_at=where)
    at = crafted.adv
    if where == "last_step":  # the gradient that the last step used, at the images one step before
        shorter = dataclasses.replace(THREAT, steps=THREAT.steps - 1, step_size=THREAT.epsilon / 4)
        model_before = network().train()
        at = make("dtrades", shorter).craft(model_before, data).adv
    model = network().eval()
    for i in range(len(at)):
        x = at[i : i + 1].clone().requires_grad_()
        (alone,) = torch.autograd.grad(kl(model(data.images[i : i + 1]).detach(), model(x)).sum(), x)
        torch.testing.assert_close(loss.terms["sensitivity"][i].double(), alone.norm(), rtol=1e-5, atol=1e-9)
    assert loss.terms["sensitivity"].min() > 0


def test_lambda_is_clipped() -> None:
    terms = step("dtrades", network(), batch())[0].terms
    low, high = terms["lambda"].quantile(0.3).item(), terms["lambda"].quantile(0.7).item()
    clipped = step("dtrades", network(), batch(), lambda_min=low, lambda_max=high)[0].terms
    torch.testing.assert_close(clipped["lambda"], terms["lambda"].clamp(low, high))
    assert torch.equal(clipped["entropy"], terms["entropy"])


@pytest.mark.parametrize("method", ["at", "trades", "dtrades"])
def test_crafting_leaves_the_model_as_found(method: str) -> None:
    model, data = network().train(), batch()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    crafted = make(method).craft(model, data)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (crafted.adv - data.images).abs().max() <= THREAT.epsilon + 1e-6
    assert not crafted.adv.requires_grad


@pytest.mark.parametrize(
    ("bn_mode", "share"), [("clean_adv", 0.526), ("adv_clean", 0.474), ("clean_adv_clean", 0.332), ("concat", 0.5)]
)
def test_share_of_adversarial_batches_in_batchnorm(bn_mode: str, share: float) -> None:
    """Clean batches of mean 0 and adversarial ones of mean 1: the running mean converges to the share."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    clean, adv = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    for _ in range(200):
        outer_forward(model, clean, adv, bn_mode)  # type: ignore[arg-type]
    assert model[0].running_mean.item() == pytest.approx(share, abs=1e-3)


def test_bn_mode_order_does_not_change_logits() -> None:
    model, data = network().train(), batch()
    adv = data.images.flip(0)
    expected = outer_forward(model, data.images, adv, "clean_adv")
    for mode in ("adv_clean", "clean_adv_clean"):
        for mine, reference in zip(outer_forward(model, data.images, adv, mode), expected, strict=True):  # type: ignore[arg-type]
            assert torch.equal(mine, reference)
    clean_z, adv_z = outer_forward(model.eval(), data.images, adv, "concat")
    torch.testing.assert_close(torch.cat((clean_z, adv_z)), model(torch.cat((data.images, adv))))


def test_registry_and_refusals() -> None:
    assert {"at", "dtrades", "standard", "trades"} <= set(defenses.names())
    assert list(defenses.options("trades")) == ["beta", "bn_mode"]
    with pytest.raises(ValueError, match="unknown method 'nope'; known are at, dtrades"):
        make("nope")
    with pytest.raises(ValueError, match=r"beta is not an option of method 'dtrades'; it belongs to .*trades"):
        make("dtrades", beta=1.0)
    with pytest.raises(ValueError, match="lambda_min must not exceed lambda_max"):
        make("dtrades", lambda_min=2.0, lambda_max=1.0)
    with pytest.raises(ValueError, match="at least one attack step"):
        make("dtrades", dataclasses.replace(THREAT, steps=0), sensitivity_at="last_step")
    with pytest.raises(ValueError, match=r"pass what DTRADES\.craft returned"):
        make("dtrades").loss(network(), batch(), Crafted(batch().images))
    assert defenses.options("dtrades")["lambda_max"].default == math.inf
