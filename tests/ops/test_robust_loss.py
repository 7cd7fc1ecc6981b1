"""CE, CE + w KL and BCE + beta w KL with their gradients, against the textbook expressions.

Each property is shown for every variant: cross-entropy, TRADES, D-TRADES (not clipped, and clipped with gradients
through the entropy) and MART, exact and with the published slacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    CLASSES,
    DTYPES,
    F16,
    F32,
    F64,
    INF,
    NAN,
    Softmax,
    assert_compiles,
    assert_deterministic,
    assert_rows_independent,
    assert_same_bits,
    assert_transforms,
    assert_vmaps,
    assert_within,
    each_dtype,
    layouts,
    needs_kernel,
    normal,
    rounding,
    row_dtype,
    rows_grid,
    uniform,
    wide,
)
from test_entropy_kl import Oracle as EntropyKLOracle

from dtrades_fast.ops import ce_loss, entropy_kl, lambda_x, mart_loss, reference, trades_loss

PUBLISHED = 1e-4 + 1e-12  # log(1.0001 - p + 1e-12)
Values = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> value and tolerance


# ---- oracles -------------------------------------------------------------------------------------------------------


def one_of_each(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[N, C] -> [N, 1], where the mask has one class; 0 where it has none."""
    return np.where(mask, rows, 0).sum(1, keepdims=True)


class CEOracle:
    def __init__(self, logits, labels):
        p = self.p = Softmax(logits)
        self.unit = rounding(logits.dtype, logits.shape[1])
        self.target = np.eye(logits.shape[1], dtype=bool)[labels.numpy()]
        size = np.abs(one_of_each(p.shifted, self.target))
        self.loss, self.loss_tolerance = -one_of_each(p.log_p, self.target), self.unit * (1 + size + p.log_sum)
        rival = np.where(self.target, 0, p.p).max(1, initial=0, keepdims=True)
        wrong = np.where(self.target, 0, p.p * p.condition).max(1, initial=0, keepdims=True)
        label, own = one_of_each(p.p, self.target), one_of_each(p.p * p.condition, self.target)
        smallest = torch.finfo(row_dtype(logits.dtype)).tiny
        self.margin = (rival - label)[:, 0], (self.unit * (wrong + own) + smallest)[:, 0]

    def values(self) -> Values:
        return {"loss": (self.loss[:, 0], self.loss_tolerance[:, 0]), "margin": self.margin}

    def gradients(self, grad_loss):
        g, p = wide(grad_loss)[:, None], self.p
        return [(g * (p.p - self.target), self.unit * np.abs(g) * (p.p * p.condition + self.target))]


class TradesOracle:
    def __init__(self, clean, adv, sensitivity, labels, base, alpha, beta, minimum, maximum, entropy_gradient):
        self.clean, self.rows = CEOracle(clean, labels), EntropyKLOracle(clean, adv)
        self.adv_margin = CEOracle(adv, labels).margin
        self.alpha = alpha if entropy_gradient else 0.0
        s = np.zeros(len(clean)) if sensitivity is None else wide(sensitivity)
        raw = base + alpha * self.rows.entropy + beta * s
        size = abs(base) + np.abs(alpha * self.rows.entropy) + np.abs(beta * s)
        self.weight_tolerance = self.clean.unit * size + abs(alpha) * self.rows.entropy_tolerance
        self.beta, self.weight = beta, raw.clip(minimum, maximum)
        self.inside = (raw >= minimum) & (raw <= maximum)

    def values(self) -> Values:
        rows, w = self.rows, np.abs(self.weight)
        ce, ce_tolerance = self.clean.values()["loss"]
        tolerance = ce_tolerance + w * rows.kl_tolerance + (self.weight_tolerance + self.clean.unit * w) * rows.kl
        return {
            "loss": (ce + self.weight * rows.kl, tolerance),
            "ce": (ce, ce_tolerance),
            "kl": (rows.kl, rows.kl_tolerance),
            "entropy": (rows.entropy, rows.entropy_tolerance),
            "weight": (self.weight, self.weight_tolerance),
            "margin": self.adv_margin,
        }

    def gradients(self, grad_loss):
        g, rows = wide(grad_loss), self.rows
        inside = g * self.inside
        d_ce, ce_tolerance = self.clean.gradients(grad_loss)[0]
        d_clean, d_adv = rows.gradients(*(torch.from_numpy(x.astype(float)) for x in (0 * g, g * self.weight)))
        one, none = torch.ones(len(g)), torch.zeros(len(g))
        d_kl = [np.abs(x) for x, _ in rows.gradients(none, one)]
        through, through_tolerance = rows.gradients(
            torch.from_numpy((self.alpha * inside * rows.kl).astype(float)), none
        )[0]
        d_entropy = np.abs(rows.gradients(one, none)[0][0])
        off = np.abs(g) * self.weight_tolerance
        through_tolerance = (
            through_tolerance + (abs(self.alpha) * np.abs(inside) * rows.kl_tolerance)[:, None] * d_entropy
        )
        clean_tolerance = ce_tolerance + d_clean[1] + through_tolerance + off[:, None] * d_kl[0]
        return [
            (d_ce + d_clean[0] + through, clean_tolerance),
            (d_adv[0], d_adv[1] + off[:, None] * d_kl[1]),
            (
                self.beta * inside * rows.kl,
                np.abs(self.beta * inside) * (rows.kl_tolerance + self.clean.unit * rows.kl),
            ),
        ]


class BoostedOracle:
    """BCE as it stands, with 1 - p_k as the sum of the other probabilities, relative to their largest."""

    def __init__(self, logits, labels, slack):
        p = self.p = Softmax(logits)
        rows, classes = logits.shape
        self.unit = rounding(logits.dtype, classes)
        self.target = np.eye(classes, dtype=bool)[labels.numpy()]
        self.boosted = np.zeros_like(self.target)
        if classes > 1:
            strongest = np.where(self.target, -np.inf, p.shifted).argmax(1)
            self.boosted = np.eye(classes, dtype=bool)[strongest] & ~self.target
        with np.errstate(all="ignore"):
            others = np.where(self.boosted, -np.inf, p.shifted)
            top = others.max(1, keepdims=True) if rows else others[:, :1]
            rest_sum = np.exp(others - top).sum(1, keepdims=True)
            self.r = np.exp(others - top) / rest_sum  # p_j / (1 - p_k)
            self.log_rest = top + np.log(rest_sum) - p.log_sum  # log(1 - p_k)
            rest = np.exp(self.log_rest)
            boost = np.log(rest + slack) if slack else self.log_rest
            self.share = rest / (rest + slack) if slack else np.ones_like(rest)
            self.bce = (-one_of_each(p.log_p, self.target) - boost)[:, 0]
            # log(1 - p_k) is a difference of two log-sums and of two maxima; slack passes on no more of it
            self.rest_condition = 1 + p.log_sum + np.log(rest_sum) + np.abs(top)
            label_condition = np.abs(one_of_each(p.shifted, self.target)) + p.log_sum
            self.bce_tolerance = self.unit * (label_condition + self.share * self.rest_condition + np.abs(boost))[:, 0]

    def gradient(self, grad_loss):
        """d/dz of grad_loss . BCE, with its tolerance."""
        g, p = wide(grad_loss)[:, None], self.p
        p_k = one_of_each(p.p, self.boosted)
        pull = self.share * p_k * np.where(self.boosted, 1, -self.r)
        # each probability is off by what its exponent was rounded to, the share by what 1 - p_k was
        with np.errstate(all="ignore"):
            own = np.where(self.boosted | (self.r == 0), 0, np.abs(np.log(self.r)))
        relative = np.where(self.share == 0, 0, self.rest_condition) + one_of_each(p.condition, self.boosted)
        tolerance = p.p * p.condition + np.abs(pull) * (own + relative) + p.p * relative + self.target
        return g * (p.p - self.target + pull), self.unit * np.abs(g) * tolerance


class MartOracle:
    def __init__(self, clean, adv, labels, beta, slack, weight_slack):
        self.boosted, self.rows = BoostedOracle(adv, labels, slack), EntropyKLOracle(clean, adv)
        self.adv_margin = CEOracle(adv, labels).margin
        p, target, unit = self.rows.p, self.boosted.target, self.boosted.unit
        self.beta = beta
        self.wrong = np.where(target, 0, p.p).sum(1)
        self.weight = self.wrong + weight_slack
        self.weight_tolerance = unit * (np.where(target, 0, p.p * p.condition).sum(1) + self.weight)

    def values(self) -> Values:
        rows, unit = self.rows, self.boosted.unit
        tolerance = self.weight * rows.kl_tolerance + (self.weight_tolerance + unit * self.weight) * rows.kl
        bce, bce_tolerance = self.boosted.bce, self.boosted.bce_tolerance
        return {
            "loss": (bce + self.beta * self.weight * rows.kl, bce_tolerance + abs(self.beta) * tolerance),
            "bce": (bce, bce_tolerance),
            "kl": (rows.kl, rows.kl_tolerance),
            "weight": (self.weight, self.weight_tolerance),
            "margin": self.adv_margin,
        }

    def gradients(self, grad_loss):
        rows, target, p = self.rows, self.boosted.target, self.rows.p
        g = self.beta * wide(grad_loss)
        none, one = torch.zeros(len(g)), torch.ones(len(g))
        d_kl = rows.gradients(none, torch.from_numpy((g * self.weight).astype(float)))
        off = (np.abs(g) * self.weight_tolerance)[:, None]
        size = [off * np.abs(x) for x, _ in rows.gradients(none, one)]
        d_weight = one_of_each(p.p, target) * np.where(target, -self.wrong[:, None], p.p)
        condition = p.condition.max(1, keepdims=True, initial=1) + one_of_each(p.condition, target)
        weight_tolerance = np.abs(d_weight) * (rows.kl_tolerance + self.boosted.unit * rows.kl)[:, None]
        weight_tolerance = np.abs(g)[:, None] * weight_tolerance * condition
        d_bce, bce_tolerance = self.boosted.gradient(grad_loss)
        return [
            (d_kl[0][0] + (g * rows.kl)[:, None] * d_weight, d_kl[0][1] + size[0] + weight_tolerance),
            (d_bce + d_kl[1][0], bce_tolerance + d_kl[1][1] + size[1]),
        ]


# ---- variants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A loss with one choice of settings and ``count`` inputs: clean logits, adversarial logits, sensitivity."""

    operator: str
    oracle: Callable
    count: int
    settings: dict[str, float] | None = None

    def __call__(self, *inputs):
        """The public function of (*inputs, labels)."""
        settings = self.settings or {}
        if self.operator == "ce_loss":
            return ce_loss(*inputs)
        if self.operator == "mart_loss":
            return mart_loss(*inputs, **settings)
        clean, adv, sensitivity, labels = inputs
        return trades_loss(clean, adv, labels, sensitivity=sensitivity, **settings)

    @property
    def arguments(self):
        return tuple((self.settings or {}).values())

    def twin(self, *inputs):
        return getattr(reference, self.operator)(*inputs, *self.arguments)

    def twin_backward(self, grad_loss, *inputs):
        return getattr(reference, f"{self.operator}_backward")(grad_loss, *inputs, *self.arguments)

    def kernel(self, *inputs):
        return getattr(torch.ops.dtrades_fast, self.operator)(*inputs, *self.arguments)

    def expected(self, *inputs):
        return self.oracle(*inputs, *self.arguments)

    def make(self, shape, dtype, scale=3.0):
        """(*inputs, labels)"""
        sensitivity = 3 * uniform(shape[:1], row_dtype(dtype), 4)
        inputs = normal(shape, dtype, 1, scale), normal(shape, dtype, 2, scale), sensitivity
        return (*inputs[: self.count], torch.arange(shape[0]) * 7 % shape[1])


def _trades(base, alpha=0.0, beta=0.0, minimum=-INF, maximum=INF, entropy_gradient=False):
    names = ("base", "alpha", "beta", "minimum", "maximum", "entropy_gradient")
    values = (base, alpha, beta, minimum, maximum, entropy_gradient)
    return Variant("trades_loss", TradesOracle, 3, dict(zip(names, values, strict=True)))


def _mart(beta, slack=0.0, weight_slack=0.0):
    return Variant("mart_loss", MartOracle, 2, {"beta": beta, "slack": slack, "weight_slack": weight_slack})


VARIANTS = {
    "ce": Variant("ce_loss", CEOracle, 1),
    "trades": _trades(6.0),
    "dtrades": _trades(0.125, 0.75, -0.3),
    "dtrades clipped": _trades(0.5, 0.75, 0.9, 1.2, 3.1, entropy_gradient=True),
    "mart": _mart(6.0),
    "mart published": _mart(5.0, PUBLISHED, 1e-7),
}
BCE = _mart(0.0)
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
each_slack = pytest.mark.parametrize("slack", [0.0, PUBLISHED], ids=["exact", "published"])


def weight(rows, dtype):
    return normal((rows,), row_dtype(dtype), 3)


def gradients(function, grad_loss, *inputs):
    """Of the loss, to all inputs but the labels."""
    leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
    return torch.autograd.grad(function(*leaves, inputs[-1])[0], leaves, grad_loss)


def stored(expected, dtype, grad_loss):
    """Rounding of a gradient that is stored in half precision before it meets grad_loss."""
    info = torch.finfo(dtype)
    g = np.abs(wide(grad_loss)).reshape(-1, *[1] * (expected.ndim - 1))
    return np.abs(expected) * info.eps / 2 + g * info.smallest_normal * info.eps


def check(variant, *inputs, function=None):
    """Every result and gradient within its tolerance of the oracle."""
    function = function or variant
    oracle, g = variant.expected(*inputs), weight(len(inputs[-1]), inputs[0].dtype)
    for x, (name, (value, tolerance)) in zip(function(*inputs), oracle.values().items(), strict=True):
        assert x.dtype == row_dtype(inputs[0].dtype)
        assert_within(x, value, tolerance, name)
    for i, (x, (value, tolerance)) in enumerate(zip(gradients(function, g, *inputs), oracle.gradients(g), strict=True)):
        assert x.dtype == inputs[i].dtype
        assert_within(x, value, tolerance + stored(value, x.dtype, g), f"gradient {i}")


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@rows_grid
@each_variant
def test_matches_oracle(variant, shape, dtype):
    check(variant, *variant.make(shape, dtype))


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_variant
def test_twin_agrees(variant, classes, dtype):
    inputs = variant.make((BATCH, classes), dtype)
    check(variant, *inputs, function=variant.twin)
    oracle, g = variant.expected(*inputs), weight(BATCH, dtype)
    for x, (value, tolerance) in zip(variant.twin_backward(g, *inputs), oracle.gradients(g), strict=True):
        assert_within(x, value, tolerance, "backward of the twin")


def test_variants_are_not_all_clipped_and_not_all_free():
    for classes in CLASSES[1:]:
        variant = VARIANTS["dtrades clipped"]
        inside = variant.expected(*variant.make((BATCH, classes), F32)).inside
        assert inside.any()
        assert not inside.all()


@each_dtype
@pytest.mark.parametrize("classes", [2, 10, 130])
@each_variant
def test_large_logits(variant, classes, dtype):
    """+-1e4: whoever wins, the results keep the digits of the differences."""
    clean, *rest = variant.make((BATCH, classes), dtype)
    far = [1e4 * normal((BATCH, classes), F32, seed).sign().to(dtype) for seed in (5, 6)]
    check(variant, clean + far[0], *(x + far[1] if x.dim() == 2 else x for x in rest))


@pytest.mark.parametrize("classes", [1, 10, 129])
@each_dtype
def test_margin_is_that_of_the_adversarial_row(classes, dtype):
    for variant in VARIANTS.values():
        inputs = variant.make((BATCH, classes), dtype)
        p = wide(inputs[min(1, variant.count - 1)].to(row_dtype(dtype)).softmax(1))
        others = p.copy()
        np.put_along_axis(others, inputs[-1].numpy()[:, None], 0, 1)
        expected = others.max(1) - np.take_along_axis(p, inputs[-1].numpy()[:, None], 1)[:, 0]
        assert_within(variant(*inputs).margin, expected, 20 * torch.finfo(row_dtype(dtype)).eps)


@each_dtype
def test_trades_figures_are_those_of_their_own_operators(dtype):
    """Entropy and KL as entropy_kl has them, the weight as lambda_x has it."""
    variant = VARIANTS["dtrades clipped"]
    clean, adv, sensitivity, labels = variant.make((BATCH, 10), dtype)
    ours, pair = variant(clean, adv, sensitivity, labels), entropy_kl(clean, adv)
    assert_same_bits((ours.entropy, ours.kl), tuple(pair))
    s = variant.settings
    value = lambda_x(clean, sensitivity.to(dtype), s["alpha"], s["beta"], s["base"], s["minimum"], s["maximum"]).value
    torch.testing.assert_close(ours.weight, value, rtol=1e-2 if dtype in (DTYPES[2:]) else 1e-5, atol=0)


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_dtrades_without_its_terms_has_the_bits_of_trades(entropy_gradient, classes, dtype):
    variant, dtrades = VARIANTS["trades"], _trades(6.0, 0.0, 0.0, 0.0, 100.0, entropy_gradient)
    clean, adv, sensitivity, labels = variant.make((BATCH, classes), dtype)
    g = weight(BATCH, dtype)

    def without(clean, adv, labels):
        return trades_loss(clean, adv, labels, base=6.0)

    assert_same_bits(tuple(dtrades(clean, adv, sensitivity, labels)), tuple(without(clean, adv, labels)))
    actual = gradients(dtrades, g, clean, adv, sensitivity, labels)
    assert_same_bits(actual[:2], gradients(without, g, clean, adv, labels))
    assert not actual[2].any()


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
def test_a_weight_at_its_bound_is_not_clipped(implementation, entropy_gradient):
    """base 2 between bounds at 2, and beyond them: only there nothing flows to what the weight is made of."""
    clean, adv, sensitivity, labels = VARIANTS["dtrades"].make((BATCH, 10), F64)
    ones = torch.ones(BATCH, dtype=F64)
    for bounds, flows in (((2.0, 2.0), True), ((2.5, 3.0), False), ((1.0, 1.5), False), ((-INF, INF), True)):
        variant = _trades(2.0, 0.0, 0.25, *bounds, entropy_gradient)
        function = variant if implementation == "kernel" else variant.twin
        zero = torch.zeros_like(sensitivity)
        found = gradients(function, ones, clean, adv, zero, labels)[2]
        expected = 0.25 * function(clean, adv, zero, labels)[2] if flows else torch.zeros(BATCH, dtype=F64)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
@pytest.mark.parametrize("classes", [10, 130])
def test_no_sensitivity_is_one_of_zero(implementation, classes):
    variant = _trades(2.0, 0.5, 0.25)
    function = variant if implementation == "kernel" else variant.twin
    clean, adv, sensitivity, labels = variant.make((BATCH, classes), F64)
    without = function(clean, adv, None, labels)
    assert_same_bits(tuple(without), tuple(function(clean, adv, torch.zeros_like(sensitivity), labels)))


@pytest.mark.parametrize("classes", [2, 10, 130])
def test_published_mart(classes):
    """As MART's authors compute it, with autograd through all of it."""
    variant = _mart(5.0, PUBLISHED, 1e-7)
    clean, adv, labels = variant.make((BATCH, classes), F64)
    clean, adv = clean.requires_grad_(), adv.requires_grad_()
    p, q = clean.softmax(1), adv.softmax(1)
    top_two = q.argsort(1)[:, -2:]
    rival = torch.where(top_two[:, -1] == labels, top_two[:, -2], top_two[:, -1])
    bce = torch.nn.functional.cross_entropy(adv, labels, reduction="none")
    bce = bce + torch.nn.functional.nll_loss(torch.log(1.0001 - q + 1e-12), rival, reduction="none")
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(1)
    expected = bce + 5.0 * kl * (1.0000001 - p.gather(1, labels[:, None])[:, 0])
    ours = variant(clean, adv, labels).loss
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    g = weight(BATCH, F64)
    for pair in zip(
        *(torch.autograd.grad(x, (clean, adv), g, retain_graph=True) for x in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 130])
def test_published_trades(classes):
    clean, adv, _, labels = VARIANTS["trades"].make((BATCH, classes), F64)
    clean, adv = clean.requires_grad_(), adv.requires_grad_()
    kl = torch.nn.functional.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    expected = torch.nn.functional.cross_entropy(clean, labels, reduction="none") + 6.0 * kl
    ours = trades_loss(clean, adv, labels, base=6.0).loss
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    g = weight(BATCH, F64)
    for pair in zip(
        *(torch.autograd.grad(x, (clean, adv), g, retain_graph=True) for x in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


# ---- the digits of 1 - p -------------------------------------------------------------------------------------------


def bce_gradient(logits, labels, slack=0.0):
    ones = torch.ones(len(logits), dtype=row_dtype(logits.dtype))
    return gradients(_mart(0.0, slack), ones, logits, logits, labels)[1]


@pytest.mark.parametrize("gap", [20.0, 80.0, 1000.0, 2e4])
def test_bce_is_exact_where_one_minus_p_vanishes(gap):
    """1 - p_k = e^-gap (1 + e^-gap)^-1, far below what 1 - softmax could tell from 0."""
    logits, label = torch.tensor([[0.0, gap]]), torch.tensor([0])
    assert_within(BCE(logits, logits, label).loss, np.array([2 * gap], np.longdouble), 2 * gap * 2.0**-23)
    assert_within(bce_gradient(logits, label), np.array([[-2, 2]], np.longdouble), 1e-6)  # p_1 doubles and is 1


@pytest.mark.parametrize("gap", [20.0, 50.0, 80.0])
@pytest.mark.parametrize("classes", [2, 10, 129])
def test_mart_weight_is_exact_where_the_label_is_certain(classes, gap):
    """1 - p_y = (C - 1) e^-gap (1 + (C - 1) e^-gap)^-1, and its gradient at the label -p_y (1 - p_y)."""
    clean = torch.zeros(1, classes)
    clean[0, 0] = gap
    adv, label = normal((1, classes), F32, 1), torch.tensor([0])
    small = (classes - 1) * np.exp(np.longdouble(-gap))
    result = mart_loss(clean, adv, label, 1.0)
    assert_within(result.weight, np.array([small / (1 + small)]), 1e-5 * float(small))
    grad = gradients(_mart(1.0), torch.ones(1), clean, adv, label)[0]
    expected = _mart(1.0).expected(clean, adv, label).gradients(torch.ones(1))[0][0]
    assert_within(grad[:, 0], expected[:, 0], 1e-5 * np.abs(expected[:, 0]))


@pytest.mark.parametrize("classes", [10, 130])
def test_half_precision_does_not_overflow(classes):
    top = torch.finfo(F16).max
    logits = torch.full((2, classes), -top, dtype=F16)
    logits[0, 0] = logits[1, 1] = top
    labels = torch.tensor([0, 0])
    # the label is certain; and a wrong class is: -log p_0 = 2 top, -log(1 - p_1) = 2 top - log(C - 1)
    assert_within(ce_loss(logits, labels).loss, np.array([0, 2 * top]), 2 * top * 2.0**-23)
    loss = BCE(logits, logits, labels).loss
    assert_within(loss, np.array([0, 4 * top - math.log(classes - 1)]), 4 * top * 2.0**-23)
    expected = np.zeros((2, classes))
    expected[1] = -1 / (classes - 1)
    expected[1, :2] = -1 - 1 / (classes - 1), 2
    assert_within(bce_gradient(logits, labels), expected, 1e-6)


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_first_of_equal_rivals_is_boosted(classes, dtype):
    """All classes alike, a label in turn: the gradient stands out at the label and at the first other class."""
    rows = min(classes, BATCH)
    logits, labels = torch.zeros(rows, classes, dtype=dtype), torch.arange(rows)
    check(BCE, logits, logits, labels)
    grad = bce_gradient(logits, labels)
    if classes > 1:
        assert grad.argmax(1).tolist() == [1] + [0] * (rows - 1)
        assert grad.argmin(1).tolist() == list(range(rows))


# ---- special values ------------------------------------------------------------------------------------------------

LN2 = math.log(2)


@each_dtype
@pytest.mark.parametrize("classes", [4, 128, 129])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
@pytest.mark.parametrize(
    ("row", "bce", "slack_bce", "bce_grad", "ce", "margin"),
    [
        pytest.param([0, 0, -INF], 2 * LN2, LN2 - math.log(0.75), [-1, 1, 0], LN2, 0, id="-inf counts nothing"),
        pytest.param([0, -INF, -INF], 0, -math.log(1.25), [0, 0, 0], 0, -1, id="the label alone is possible"),
        pytest.param([-INF, 0, 0], INF, INF, [-1, 1, 0], INF, 0.5, id="the label is impossible"),
        pytest.param([-INF, 0, -INF], INF, INF, [-1, 1, 0], INF, 1, id="only a wrong class is possible"),
        pytest.param([-INF] * 3, NAN, NAN, [NAN] * 3, NAN, NAN, id="no class"),
        pytest.param([INF, 0, 0], NAN, NAN, [NAN] * 3, NAN, NAN, id="+inf at the label"),
        pytest.param([0, INF, 0], NAN, NAN, [NAN] * 3, NAN, NAN, id="+inf beside the label"),
        pytest.param([NAN, 0, 0], NAN, NAN, [NAN] * 3, NAN, NAN, id="NaN at the label"),
        pytest.param([0, 0, NAN], NAN, NAN, [NAN] * 3, NAN, NAN, id="NaN beside the label"),
        pytest.param([-INF, 0, NAN], NAN, NAN, [NAN] * 3, NAN, NAN, id="NaN and an impossible label"),
    ],
)
def test_special_values(row, bce, slack_bce, bce_grad, ce, margin, implementation, classes, dtype):
    """Label 0, so that class 1 is the rival of equals; the other classes have the logit -inf. Both rows are alike, so
    that KL is 0 or NaN."""
    pad = classes - 3
    logits, label = torch.tensor([row + [-INF] * pad], dtype=dtype), torch.tensor([0])
    expected = np.array([bce_grad + [bce_grad[2] * 0] * pad])
    one, unit = torch.ones(1, dtype=row_dtype(dtype)), rounding(dtype)

    def found(variant, *inputs):
        function = variant if implementation == "kernel" else variant.twin
        grads = {"autograd": gradients(function, one, *inputs)}
        if implementation == "twin":
            grads["backward of the twin"] = variant.twin_backward(one, *inputs)
        return function(*inputs), grads

    for slack, value in ((0.0, bce), (0.25, slack_bce)):
        result, grads = found(_mart(0.0, slack), logits, logits, label)
        assert_within(result[0], np.array([value]), unit, "loss")
        assert_within(result[1], np.array([value]), unit, "bce")
        assert_within(result[4], np.array([margin]), unit, "margin")
        for name, (_, grad) in grads.items():
            if slack == 0:
                assert_within(grad, expected, unit, name)
            else:  # a smaller share of the second term, but NaN where it was
                assert torch.equal(grad.isnan(), torch.from_numpy(np.isnan(expected))), name

    p = torch.tensor([row + [-INF] * pad], dtype=F64).softmax(1).numpy()
    p[0, 0] -= 1
    for variant, inputs in ((VARIANTS["ce"], (logits,)), (VARIANTS["trades"], (logits, logits, one))):
        result, grads = found(variant, *inputs, label)
        assert_within(result[0], np.array([ce]), unit, "loss")
        assert_within(result[-1], np.array([margin]), unit, "margin")
        for name, (grad, *_) in grads.items():
            assert_within(grad, p, unit, name)


@each_dtype
@pytest.mark.parametrize("classes", [10, 128, 129])
@pytest.mark.parametrize("value", [NAN, INF])
@each_variant
def test_nan_stays_in_its_row(variant, value, classes, dtype):
    inputs = variant.make((BATCH, classes), dtype)
    g = weight(BATCH, dtype)
    others = torch.arange(BATCH) != 16
    for at in range(min(variant.count, 2)):
        spoiled = [x.clone() for x in inputs]
        spoiled[at][16, classes - 1] = value
        actual, expected = ((*variant(*x), *gradients(variant, g, *x)) for x in (spoiled, inputs))
        assert actual[0][16].isnan()
        assert actual[len(actual) - variant.count + at][16].isnan().all()
        assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))


@each_dtype
@pytest.mark.parametrize("classes", [10, 129])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
@each_variant
def test_wrong_label_that_cannot_be_seen_gives_nan(variant, implementation, classes, dtype):
    """Where the public function cannot look at the labels (CUDA, compiled code, vmap) a wrong one shows."""
    *inputs, labels = variant.make((BATCH, classes), dtype)
    g = torch.ones(BATCH, dtype=row_dtype(dtype))

    def call(labels):
        if implementation == "kernel":
            results = variant.kernel(*inputs, labels)
        else:
            results = (*variant.twin(*inputs, labels), *variant.twin_backward(g, *inputs, labels))
        # a weight that is NaN lies in no range, so the sensitivity has no gradient
        return results[: len(variant.expected(*inputs, labels.remainder(classes)).values()) + min(variant.count, 2)]

    wrong = labels.clone()
    wrong[3], wrong[16], wrong[34] = -1, classes, 2**40
    bad = torch.zeros(BATCH, dtype=torch.bool)
    bad[[3, 16, 34]] = True
    for actual, expected in zip(call(wrong), call(labels), strict=True):
        assert actual[bad].isnan().all()
        assert_same_bits(actual[~bad], expected[~bad])


# ---- invariants ----------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_bounds_of_bce(classes, dtype):
    """Never below the cross-entropy; slack lowers it, to no less than -log(1 + slack)."""
    logits, labels = VARIANTS["ce"].make((BATCH, classes), dtype, 6.0)
    ce = ce_loss(logits, labels).loss
    exact, published = (mart_loss(logits, logits, labels, 0.0, slack).bce for slack in (0.0, PUBLISHED))
    unit = rounding(dtype, classes) * (1 + math.log(classes) + logits.abs().max().item())
    assert (exact >= ce - unit).all()
    assert (published <= exact + unit).all()
    assert (published >= -math.log1p(PUBLISHED) - unit).all()
    assert (published - ce <= -math.log(PUBLISHED) + unit).all()


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_variant
def test_gradients_of_a_row_sum_to_zero(variant, classes, dtype):
    inputs = variant.make((BATCH, classes), dtype)
    g = torch.ones(BATCH, dtype=row_dtype(dtype))
    info = torch.finfo(dtype)
    exact = variant.expected(*inputs).gradients(g)
    for grad, (_, tolerance) in list(zip(gradients(variant, g, *inputs), exact, strict=True))[:2]:
        rounded = info.eps * grad.double().abs().sum(1).numpy() + classes * info.smallest_normal * info.eps
        assert (np.abs(grad.double().sum(1).numpy()) <= tolerance.sum(1) + rounded).all()


@pytest.mark.parametrize("classes", CLASSES)
@each_variant
def test_shift_invariance_is_exact(variant, classes):
    """Adding a constant to a row changes no bit where the addition itself is exact."""
    inputs = [(x * 256).round() / 256 if x.dim() == 2 else x for x in variant.make((BATCH, classes), F32)]
    shifted = [x + 64 if x.dim() == 2 else x for x in inputs]
    g = weight(BATCH, F32)
    assert_same_bits(tuple(variant(*shifted)), tuple(variant(*inputs)))
    assert_same_bits(gradients(variant, g, *shifted), gradients(variant, g, *inputs))


# ---- rows, layouts, threads ------------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_variant
def test_row_alone_has_the_bits_of_the_batch(variant, classes, dtype):
    assert_rows_independent(variant.kernel, *variant.make((BATCH, classes), dtype))


@needs_kernel
@each_dtype
@pytest.mark.parametrize("shape", [(8192, 10), (200, 1000)], ids=str)
@each_variant
def test_deterministic(variant, shape, dtype):
    inputs = variant.make(shape, dtype)
    assert_deterministic(lambda: variant.kernel(*inputs))


@each_dtype
@pytest.mark.parametrize("classes", [7, 129])
@each_variant
def test_any_layout(variant, classes, dtype):
    inputs = variant.make((19, classes), dtype)
    g = weight(19, dtype)
    expected = tuple(variant(*inputs)), gradients(variant, g, *inputs)
    for others in zip(*(layouts(x).items() for x in inputs[: min(variant.count, 2)]), strict=True):
        names, moved = zip(*others, strict=True)
        strided = (x.repeat_interleave(2)[::2] for x in inputs[len(moved) :])
        given = (*moved, *strided)
        assert_same_bits((tuple(variant(*given)), gradients(variant, g, *given)), expected, names[0])
    broadcast = g[:1].expand(19)
    assert_same_bits(gradients(variant, broadcast, *inputs), gradients(variant, broadcast.clone(), *inputs))


# ---- derivatives, compilation, transforms ----------------------------------------------------------------------------

#: those whose weight is no hidden constant: finite differences see all that depends on the logits
DIFFERENTIABLE = {name: VARIANTS[name] for name in ("ce", "trades", "dtrades clipped", "mart", "mart published")}


@pytest.mark.parametrize("classes", [1, 2, 7, 129])
@pytest.mark.parametrize("variant", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradcheck(variant, classes):
    *inputs, labels = variant.make((2, classes), F64, 1.0)
    inputs = [x.requires_grad_() for x in inputs]
    fast = classes > 7  # random projections instead of each entry of the Jacobian
    for verify in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert verify(lambda *x: variant(*x, labels).loss, inputs, fast_mode=fast)


def test_second_order_keeps_the_weight_constant():
    """Without entropy_gradient the gradient's own gradient is that of the twin, whose weight is detached."""
    variant = VARIANTS["dtrades"]
    *inputs, labels = variant.make((5, 10), F64)
    inputs = [x.requires_grad_() for x in inputs]

    def second(function):
        first = torch.autograd.grad(function(*inputs, labels)[0].sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((x * x).sum() for x in first), inputs)

    for pair in zip(second(variant), second(variant.twin), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_that_is_not_wanted_is_left_out(wanted):
    for name in ("trades", "mart"):
        variant = VARIANTS[name]
        clean, adv, *rest = variant.make((5, 10), F32)
        leaves = [x.clone().requires_grad_(w) for x, w in zip((clean, adv), wanted, strict=True)]
        variant(*leaves, *rest).loss.sum().backward()
        assert [x.grad is not None for x in leaves] == list(wanted)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 10), (3, 10), (18, 129)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16])
@each_variant
def test_opcheck(variant, shape, layout, dtype):
    inputs = variant.make(shape, dtype)
    if layout == "transposed":
        inputs = tuple(x.t().contiguous().t() if x.dim() == 2 else x for x in inputs)
    operator = getattr(torch.ops.dtrades_fast, variant.operator).default
    torch.library.opcheck(operator, (*inputs, *variant.arguments))


def test_opcheck_without_sensitivity():
    if not hasattr(torch.ops.dtrades_fast, "trades_loss"):
        pytest.skip("needs the compiled kernels")
    variant = VARIANTS["trades"]
    clean, adv, _, labels = variant.make((3, 10), F32)
    torch.library.opcheck(torch.ops.dtrades_fast.trades_loss.default, (clean, adv, None, labels, *variant.arguments))


@each_variant
def test_compile(variant):
    inputs = variant.make((BATCH, 10), F64)
    assert_compiles(lambda *x: tuple(variant(*x)), *inputs)


@each_variant
def test_func_transforms(variant):
    inputs = [x.unflatten(0, (4, 3)) for x in variant.make((12, 10), F64)]

    def call(*x):
        return tuple(variant(*x))

    assert_vmaps(call, *inputs)
    first, *rest, labels = inputs
    assert_vmaps(call, first.movedim(0, 2), *rest, labels[1], in_dims=(2, *[0] * len(rest), None))
    assert_vmaps(call, first[1], *rest, labels, in_dims=(None, *[0] * len(rest), 0))
    assert_transforms(lambda *x: (variant(*x).loss ** 2).sum(), *inputs)


@each_variant
def test_no_gradient_is_recorded_unasked(variant):
    inputs = variant.make((3, 10), F32)
    assert not variant(*inputs).loss.requires_grad
    leaf = inputs[0].clone().requires_grad_()
    with torch.no_grad():
        assert not variant(leaf, *inputs[1:]).loss.requires_grad
    assert [x.requires_grad for x in variant(leaf, *inputs[1:])] == [True] + [False] * (len(variant(*inputs)) - 1)


# ---- errors ----------------------------------------------------------------------------------------------------------

Z, Y, S = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, Y), TypeError, r"logits must be a torch.Tensor, got NoneType"),
        ((Z, [0, 1, 2]), TypeError, r"labels must be a torch.Tensor, got list"),
        ((Z.bool(), Y), TypeError, r"logits must have dtype float32, .*, got torch.bool"),
        ((Z, Y.int()), TypeError, r"labels must have dtype torch.int64, got torch.int32"),
        ((Z[0], Y), ValueError, r"logits must have shape \[N, C\] .*, got \[4\]"),
        ((Z[:, :0], Y), ValueError, r"logits must have .* at least one class, got \[3, 0\]"),
        ((Z, Y[:2]), ValueError, r"labels must have shape \[3\], one per row of logits, got \[2\]"),
        ((Z, Y + 4), ValueError, r"labels must lie in 0\.\.3 \(logits has 4 classes\), got 4"),
        ((Z, Y - 1), ValueError, r"labels must lie in 0\.\.3 \(logits has 4 classes\), got -1"),
        ((Z, Y.to("meta")), ValueError, r"labels must be on the device of logits, cpu, got meta"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ce_loss(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, Z, Y), TypeError, r"clean_logits must be a torch.Tensor, got NoneType"),
        ((Z, None, Y), TypeError, r"adv_logits must be a torch.Tensor, got NoneType"),
        ((Z, Z.double(), Y), TypeError, r"adv_logits must have the dtype of clean_logits, torch.float32, got"),
        ((Z, Z[:, :2], Y), ValueError, r"adv_logits must have the shape of clean_logits, \[3, 4\], got \[3, 2\]"),
        ((Z, Z.to("meta"), Y), ValueError, r"adv_logits must be on the device of clean_logits, cpu, got meta"),
        ((Z, Z, Y + 4), ValueError, r"labels must lie in 0\.\.3 \(clean_logits has 4 classes\), got 4"),
    ],
)
def test_errors_of_a_pair_of_logits(arguments, error, message):
    with pytest.raises(error, match=message):
        trades_loss(*arguments, base=1.0)
    with pytest.raises(error, match=message):
        mart_loss(*arguments, 1.0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base": torch.tensor(1.0)}, TypeError, r"base must be a Python number, got Tensor"),
        ({"base": INF}, ValueError, r"base must be a finite number, got inf"),
        ({"alpha": NAN}, ValueError, r"alpha must be a finite number, got nan"),
        ({"beta": INF}, ValueError, r"beta must be a finite number, got inf"),
        ({"minimum": NAN}, ValueError, r"minimum must be a number, got nan"),
        ({"minimum": 2.0, "maximum": 1.0}, ValueError, r"minimum must not exceed maximum, got 2.0 and 1.0"),
        ({"entropy_gradient": "entropy"}, TypeError, r"entropy_gradient must be True or False, got 'entropy'"),
        ({"sensitivity": 1.0}, TypeError, r"sensitivity must be a torch.Tensor, got float"),
        ({"sensitivity": S.double()}, TypeError, r"sensitivity must have dtype torch.float32, .*, got torch.float64"),
        ({"sensitivity": S[:2]}, ValueError, r"sensitivity must have shape \[3\], one per row of clean_logits"),
        ({"sensitivity": S.to("meta")}, ValueError, r"sensitivity must be on the device of clean_logits, cpu, got"),
    ],
)
def test_errors_of_trades_settings(settings, error, message):
    with pytest.raises(error, match=message):
        trades_loss(Z, Z, Y, **{"base": 1.0, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ((torch.tensor(0.1),), TypeError, r"beta must be a Python number, got Tensor"),
        ((NAN,), ValueError, r"beta must be a finite number, got nan"),
        ((1.0, torch.tensor(0.1)), TypeError, r"slack must be a Python number, got Tensor"),
        ((1.0, -1e-4), ValueError, r"slack must be a finite number of at least 0, got -0.0001"),
        ((1.0, NAN), ValueError, r"slack must be a finite number of at least 0, got nan"),
        ((1.0, INF), ValueError, r"slack must be a finite number of at least 0, got inf"),
        ((1.0, 1e-40), ValueError, r"slack must be 0 or at least 1e-30, got 1e-40"),
        ((1.0, 0.0, -1.0), ValueError, r"weight_slack must be a finite number of at least 0, got -1.0"),
    ],
)
def test_errors_of_mart_settings(settings, error, message):
    with pytest.raises(error, match=message):
        mart_loss(Z, Z, Y, *settings)


def test_half_precision_takes_its_sensitivity_in_float32():
    result = trades_loss(Z.half(), Z.half(), Y, base=0.0, beta=2.0, sensitivity=S + 1)
    assert result.weight.tolist() == [2.0] * 3


def test_every_dtype_is_listed():
    assert {ce_loss(Z.to(d), Y).loss.dtype for d in DTYPES} == {F32, F64}
