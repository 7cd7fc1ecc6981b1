"""Losses against the formulas written out in float64, and the properties that the methods promise."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast import defenses
from dtrades_fast.defenses import Batch, Crafted, Threat
from dtrades_fast.defenses.base import outer_forward
from dtrades_fast.defenses.dtrades import permutation
from dtrades_fast.defenses.faal import class_weights

THREAT = Threat(epsilon=0.1, steps=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return nn.Sequential(*layers).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(9, 1, 8, 8, generator=generator, dtype=dtype)
    return Batch(images, torch.randint(5, (9,), generator=generator), torch.arange(9), key=11)


def make(method: str, threat: Threat = THREAT, **options: Any) -> defenses.Defense:
    """D-TRADES with alpha = beta = 1 unless given, instead of calibrated."""
    if method == "dtrades":
        options = {"lambda_alpha": 1.0, "lambda_beta": 1.0, **options}
    return defenses.create(method, threat, **options)


def step(method: str, model: nn.Module, data: Batch, **options: Any) -> tuple[defenses.Loss, Crafted]:
    defense = make(method, **options)
    model.train()
    crafted = defense.craft(model, data)
    return defense.loss(model, data, crafted), crafted


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def sensitivity(model: nn.Module, images: Tensor, adv: Tensor) -> Tensor:
    """||grad_{x'} KL(p || p')|| of each sample, by autograd through a model in eval mode."""
    x = adv.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(model(images), model(x)).sum(), x)
    return gradient.flatten(1).norm(dim=1)


def kl(z: Tensor, adv_z: Tensor) -> Tensor:
    log_p, log_q = z.log_softmax(-1), adv_z.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def textbook(
    method: str, z: Tensor, adv_z: Tensor, labels: Tensor, norm: Tensor | None = None, clamps: bool = False
) -> Tensor:
    """The loss per sample as the paper has it, for autograd."""
    ce, rows = F.cross_entropy(z, labels, reduction="none"), torch.arange(len(z))
    if method == "standard":
        return ce
    if method == "at":
        return F.cross_entropy(adv_z, labels, reduction="none")
    if method == "trades":
        return ce + 6.0 * kl(z, adv_z)
    if method == "dtrades":
        assert norm is not None
        return ce + (entropy(z).detach() + norm) * kl(z, adv_z)
    assert method == "mart"
    p, adv_p = z.softmax(-1), adv_z.softmax(-1)
    wrong = adv_p.clone()
    wrong[rows, labels] = 0
    boost = (1.0001 - wrong.max(1).values + 1e-12).log() if clamps else (1 - wrong.max(1).values).log()
    weight = (1.0000001 if clamps else 1) - p[rows, labels]
    return F.cross_entropy(adv_z, labels, reduction="none") - boost + 5.0 * kl(z, adv_z) * weight


def assert_step_is(loss: defenses.Loss, expected: Tensor, model: nn.Module) -> None:
    """The loss and every parameter gradient agree to 1e-10."""
    assert loss.total.dtype == torch.float64
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-10)
    for mine, reference in zip(gradients(loss.total, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def outer(model: nn.Module, data: Batch, crafted: Crafted, bn_mode: str) -> tuple[Tensor, Tensor]:
    """Both logits in train mode, normalised apart or jointly."""
    if bn_mode == "concat":
        z, adv_z = model(torch.cat((data.images, crafted.adv))).chunk(2)
        return z, adv_z
    return model(data.images), model(crafted.adv)


@pytest.mark.parametrize("bn_mode", ["clean_adv", "clean_adv_clean", "adv_clean", "concat"])
@pytest.mark.parametrize("method", ["standard", "at", "trades", "dtrades", "mart"])
def test_loss_and_gradients_are_the_textbooks(method: str, bn_mode: str) -> None:
    model, data = network(), batch()
    options = {"bn_mode": bn_mode} if "bn_mode" in defenses.options(method) else {}
    loss, crafted = step(method, model, data, **options)
    z, adv_z = outer(model, data, crafted, bn_mode if options else "clean_adv")
    norm = sensitivity(network().eval(), data.images, crafted.adv)
    assert_step_is(loss, textbook(method, z, adv_z, data.labels, norm).mean(), model)


def test_marts_published_clamps() -> None:
    model, data = network(), batch()
    loss, crafted = step("mart", model, data, clamps="published")
    z, adv_z = outer(model, data, crafted, "clean_adv")
    assert_step_is(loss, textbook("mart", z, adv_z, data.labels, clamps=True).mean(), model)
    exact = textbook("mart", z, adv_z, data.labels).mean()
    assert abs(loss.total - exact) > 1e-6


@pytest.mark.parametrize("gap", [0.0, 20.0, 100.0, 1000.0])
def test_mart_stays_finite_and_right_at_any_gap(gap: float) -> None:
    """In float32 log(1 - p) is -inf from a gap of 17 on; the loss itself grows with the gap only."""
    z = torch.tensor([[gap, 0.0, -1.0], [0.0, gap, 1.0]], requires_grad=True)
    adv_z = torch.tensor([[0.0, gap, -1.0], [0.0, -1.0, gap]], requires_grad=True)
    labels = torch.tensor([0, 0])
    defense = make("mart")
    loss = defense.loss(_Outputs(z, adv_z), Batch(torch.zeros(2), labels, torch.arange(2), 0), Crafted(torch.ones(2)))
    loss.total.backward()
    assert loss.per_sample.isfinite().all()
    assert z.grad is not None
    assert adv_z.grad is not None
    assert z.grad.isfinite().all()
    assert adv_z.grad.isfinite().all()
    torch.testing.assert_close(loss.terms["bce"], -adv_z.log_softmax(-1)[:, 0] - _log_rest(adv_z, [1, 2]))


def _log_rest(logits: Tensor, leaving_out: list[int]) -> Tensor:
    """log(1 - p_k) of each row, with k left out of the sum."""
    rows = [row[[c for c in range(len(row)) if c != k]] for row, k in zip(logits, leaving_out, strict=True)]
    return torch.stack([row.logsumexp(0) for row in rows]) - logits.logsumexp(-1)


class _Outputs(nn.Module):
    """Gives ``z`` for images of zeros, ``adv_z`` for any others."""

    def __init__(self, z: Tensor, adv_z: Tensor) -> None:
        super().__init__()
        self.z, self.adv_z = z, adv_z

    def forward(self, images: Tensor) -> Tensor:
        return self.adv_z if images.any() else self.z


# ---- FAAL ------------------------------------------------------------------------------------------------------------


def solved_weights(values: Tensor, considered: Tensor, radius: float) -> Tensor:
    """FAAL's inner maximisation by a convex solver."""
    cvxpy = pytest.importorskip("cvxpy", reason="the convex solver comes with the test extra")
    a = values[considered].numpy()
    u, q = 1 / len(a), cvxpy.Variable(len(a))
    inside = [q >= 0, cvxpy.sum(q) == 1, cvxpy.sum(cvxpy.rel_entr(u, q)) <= radius]
    cvxpy.Problem(cvxpy.Maximize(q @ a), inside).solve(
        solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )
    weights = torch.zeros_like(values)
    weights[considered] = torch.from_numpy(q.value)
    return weights


def divergence(considered: Tensor, q: Tensor) -> Tensor:
    u = considered.double() / considered.sum()
    return torch.where(considered, u * (u / q).log(), 0).sum()


def test_faals_weights_are_a_convex_solvers() -> None:
    generator = torch.Generator().manual_seed(5)
    for problem in range(200):
        classes = (2, 5, 10, 30)[problem % 4]
        scale, radius = 10.0 ** (problem % 5 - 2), (0.5, 0.1, 2.0)[problem % 3]
        values = torch.randn(classes, generator=generator, dtype=torch.float64) * scale
        considered = torch.rand(classes, generator=generator) > 0.3
        considered[:2] = True
        mine = class_weights(values, considered, radius)
        torch.testing.assert_close(mine.sum().item(), 1.0)
        assert (mine[~considered] == 0).all()
        assert divergence(considered, mine).item() == pytest.approx(radius, rel=1e-9)  # the constraint is active
        expected = solved_weights(values / scale, considered, radius)
        torch.testing.assert_close(mine, expected, rtol=0, atol=5e-5)  # the solver is less exact
        assert values @ mine >= values @ expected - 1e-6 * scale


@pytest.mark.parametrize(
    ("values", "radius", "expected"),
    [
        ([0.3, 0.3, 0.3, 0.3], 0.5, [0.25] * 4),
        ([0.9, -0.2, 0.1, 0.3], 0.0, [0.25] * 4),
        ([1.0, 1.0, 1.0, 1.0 - 1e-14], 0.5, None),
        ([1e-300, 0.0, 0.0, 0.0], 0.5, None),
        ([1e300, 0.0, -1e300, 5.0], 0.5, None),
    ],
)
def test_faals_weights_at_the_edges(values: list[float], radius: float, expected: list[float] | None) -> None:
    a, everything = torch.tensor(values, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    q = class_weights(a, everything, radius)
    assert q.sum().item() == pytest.approx(1)
    assert (q > 0).all()
    if expected is not None:
        assert q.tolist() == expected
    else:
        assert divergence(everything, q).item() == pytest.approx(radius, rel=1e-6)
    for c in range(4):  # one class alone
        alone = class_weights(a, torch.arange(4) == c, radius)
        assert alone.tolist() == [float(i == c) for i in range(4)]


def test_faals_weights_with_thousands_of_equal_values() -> None:
    a = torch.ones(10_000, dtype=torch.float64)
    a[0] = 0
    q = class_weights(a, torch.ones(10_000, dtype=torch.bool), 0.5)
    assert q.isfinite().all()
    torch.testing.assert_close(q[1:], torch.full((9_999,), 1 / 9_999, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("absent_class", ["mask", "official"])
@pytest.mark.parametrize("margin", ["count", "mean"])
@pytest.mark.parametrize("base", ["at", "trades", "mart"])
def test_faals_loss_and_gradients_are_the_textbooks(base: str, margin: str, absent_class: str) -> None:
    model, data = network(), batch()
    labels = data.labels.clone()
    labels[labels == 3] = 1  # class 3 is missing
    data = dataclasses.replace(data, labels=labels)
    beta = 5.0 if base == "mart" else 6.0
    loss, crafted = step("faal", model, data, base_loss=base, beta=beta, margin=margin, absent_class=absent_class)
    z, adv_z = outer(model, data, crafted, "clean_adv")
    values, counts = torch.zeros(5, dtype=torch.float64), torch.zeros(5)
    p = adv_z.detach().softmax(-1)
    for c in range(5):
        counts[c] = (labels == c).sum()
        if counts[c]:
            wrong = [max(float(row[k]) for k in range(5) if k != c) - float(row[c]) for row in p[labels == c]]
            values[c] = sum(wrong) / len(wrong) * (float(counts[c]) if margin == "count" else 1)
    considered = counts > 0 if absent_class == "mask" else torch.ones(5, dtype=torch.bool)
    q = class_weights(values, considered, 0.5)
    expected = int(considered.sum()) / len(labels) * (q[labels] * textbook(base, z, adv_z, labels)).sum()
    assert_step_is(loss, expected, model)
    assert not loss.terms["class_weight"].requires_grad


def test_faal_attacks_like_its_base() -> None:
    for base in ("at", "trades", "mart"):
        crafted = [make(m, **o).craft(network(), batch()) for m, o in (("faal", {"base_loss": base}), (base, {}))]
        assert torch.equal(crafted[0].adv, crafted[1].adv)
    defense, data = make("faal"), batch()
    defense.threat = dataclasses.replace(THREAT, epsilon=0.01)  # as the trainer sets it while epsilon grows
    assert (defense.craft(network(), data).adv - data.images).abs().max() <= 0.01 + 1e-6


# ---- D-TRADES and what the methods share -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", ["trades", "dtrades", "mart"])
def test_the_clean_target_is_not_detached(method: str) -> None:
    model, data = network(), batch()
    loss, crafted = step(method, model, data)
    z, adv_z = model(data.images), model(crafted.adv)
    norm = sensitivity(network().eval(), data.images, crafted.adv)
    detached = textbook(method, z.detach(), adv_z, data.labels, norm).mean()
    if method != "mart":
        detached = detached + F.cross_entropy(z, data.labels)
    mine, cut = gradients(loss.total, model)[0], gradients(detached, model)[0]
    assert (mine - cut).norm() > 1e-3 * mine.norm()


def test_shuffled_weights_are_those_of_other_samples() -> None:
    """A control: the same weights in the batch, in an order that has nothing to do with the samples."""
    options = {"lambda_alpha": 2.0, "lambda_beta": 3.0}
    (plain, _), model, data = step("dtrades", network(), batch(), **options), network(), batch()
    loss, crafted = step("dtrades", model, data, lambda_shuffle=True, **options)
    order = permutation(data)
    assert sorted(order.tolist()) == list(range(len(order))) != order.tolist()
    assert permutation(dataclasses.replace(data, key=data.key + 1)).tolist() != order.tolist()
    weight = plain.terms["lambda"][order]
    assert torch.equal(loss.terms["lambda"], weight)
    assert torch.equal(loss.terms["sensitivity"], plain.terms["sensitivity"])
    z, adv_z = model(data.images), model(crafted.adv)
    expected = (F.cross_entropy(z, data.labels, reduction="none") + weight * kl(z, adv_z)).mean()
    for mine, textbooks in zip(gradients(loss.total, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, textbooks, rtol=1e-5, atol=1e-7)


def test_lambda_gradient_through_the_entropy() -> None:
    model, data = network(), batch()
    loss, crafted = step("dtrades", model, data, lambda_gradient="entropy", lambda_alpha=2.0)
    z, adv_z = model(data.images), model(crafted.adv)
    norm = sensitivity(network().eval(), data.images, crafted.adv)
    expected = F.cross_entropy(z, data.labels) + ((2 * entropy(z) + norm) * kl(z, adv_z)).mean()
    constant = F.cross_entropy(z, data.labels) + ((2 * entropy(z).detach() + norm) * kl(z, adv_z)).mean()
    kept, mine = gradients(constant, model)[0], gradients(loss.total, model)
    assert (mine[0] - kept).norm() > 1e-3 * kept.norm()
    for a, b in zip(mine, gradients(expected, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bn_mode", ["clean_adv", "concat"])
def test_lambda_gradient_through_the_gradient_norm(bn_mode: str) -> None:
    """Autograd through the textbook's expression, with the norm's own graph in eval mode."""
    model, data = smooth_network(), batch()
    loss, crafted = step("dtrades", model, data, lambda_gradient="full", bn_mode=bn_mode, lambda_beta=3.0)
    twin = copy.deepcopy(model).eval()
    twin[1].load_state_dict(smooth_network()[1].state_dict())  # statistics from before the outer passes
    adv = crafted.adv.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(twin(data.images), twin(adv)).sum(), adv, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    z, adv_z = outer(model, data, crafted, bn_mode)
    weight = entropy(z) + 3 * norm.detach()
    direct = F.cross_entropy(z, data.labels) + (weight * kl(z, adv_z)).mean()
    through = (3 * norm * kl(z, adv_z).detach()).mean()
    torch.testing.assert_close(loss.total, direct, rtol=1e-10, atol=1e-10)
    expected = [a + b for a, b in zip(gradients(direct, model), gradients(through, twin), strict=True)]
    for mine, reference in zip(gradients(loss.total, model), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-10)
    assert max(g.abs().max() for g in gradients(through, twin)) > 1e-4  # it is no small thing
    torch.testing.assert_close(loss.terms["sensitivity"], norm.detach())
    assert all(module.training for module in model.modules())


def smooth_network() -> nn.Sequential:
    """Twice differentiable, so that second derivatives are not zero almost everywhere."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return nn.Sequential(*layers).double()


def test_double_backward_of_the_full_lambda_by_gradcheck() -> None:
    torch.manual_seed(3)
    images, adv = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    defense = make("dtrades", lambda_gradient="full", lambda_alpha=2.0, lambda_beta=3.0)
    data = Batch(images, torch.tensor([0, 2]), torch.arange(2), 0)

    def total(first: Tensor, second: Tensor) -> Tensor:
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
        for layer, weight in ((model[0], first), (model[2], second)):
            del layer.weight
            layer.weight = weight
        return defense.loss(model.double(), data, Crafted(adv)).total

    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (3, 4))]
    torch.autograd.gradcheck(total, weights, atol=1e-7)


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
        alone = sensitivity(model, data.images[i : i + 1], at[i : i + 1])[0]
        torch.testing.assert_close(loss.terms["sensitivity"][i], alone, rtol=1e-10, atol=1e-12)
    assert loss.terms["sensitivity"].min() > 0


def test_lambda_is_clipped() -> None:
    terms = step("dtrades", network(), batch())[0].terms
    low, high = terms["lambda"].quantile(0.3).item(), terms["lambda"].quantile(0.7).item()
    clipped = step("dtrades", network(), batch(), lambda_min=low, lambda_max=high)[0].terms
    torch.testing.assert_close(clipped["lambda"], terms["lambda"].clamp(low, high))
    assert torch.equal(clipped["entropy"], terms["entropy"])


@pytest.mark.parametrize("method", ["at", "trades", "dtrades", "mart", "faal"])
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
    assert defenses.names() == ["at", "dtrades", "faal", "mart", "standard", "trades"]
    assert list(defenses.options("trades")) == ["beta", "bn_mode"]
    with pytest.raises(ValueError, match="unknown method 'nope'; known are at, dtrades"):
        make("nope")
    with pytest.raises(ValueError, match=r"beta is not an option of method 'dtrades'; it belongs to .*trades"):
        make("dtrades", beta=1.0)
    with pytest.raises(ValueError, match="lambda_min must not exceed lambda_max"):
        make("dtrades", lambda_min=2.0, lambda_max=1.0)
    with pytest.raises(ValueError, match="at least one attack step"):
        make("dtrades", dataclasses.replace(THREAT, steps=0), sensitivity_at="last_step")
    with pytest.raises(ValueError, match="lambda_gradient='full' needs sensitivity_at='final'"):
        make("dtrades", lambda_gradient="full", sensitivity_at="last_step")
    with pytest.raises(ValueError, match="lambda_shuffle needs lambda_gradient='none', got 'entropy'"):
        make("dtrades", lambda_gradient="entropy", lambda_shuffle=True)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        make("faal", radius=-1.0)
    with pytest.raises(ValueError, match=r"pass what DTRADES\.craft returned"):
        make("dtrades").loss(network(), batch(), Crafted(batch().images))
    assert defenses.options("dtrades")["lambda_max"].default == math.inf
