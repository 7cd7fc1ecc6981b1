"""lambda(x) = clip(base + alpha H(softmax z) + beta ||g||_2, minimum, maximum)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    CLASSES,
    F16,
    F32,
    F64,
    IMAGES,
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
    images_grid,
    layouts,
    needs_kernel,
    normal,
    per_sample,
    rounding,
    row_dtype,
)

from dtrades_fast.ops import LambdaX, lambda_x, reference

ALPHA, BETA, BASE = 0.75, 0.3, 0.125


def make(shape, dtype, classes=10):
    return normal((shape[0], classes), dtype, 1, 2.0), normal(shape, dtype, 2)


def oracle(logits, grad, alpha, beta, base, minimum=-INF, maximum=INF):
    """value, entropy, sensitivity and the tolerance of each."""
    p, dtype = Softmax(logits), logits.dtype
    unit, eps = rounding(dtype, logits.shape[1]), torch.finfo(row_dtype(dtype)).eps
    entropy = -p.expect(p.log_p)
    sensitivity = np.sqrt((per_sample(grad) ** 2).sum(1))
    value = np.clip(base + alpha * entropy + beta * sensitivity, minimum, maximum)
    of_entropy = unit * (1 + p.log_sum[:, 0] + p.expect(np.abs(p.shifted) * p.condition))
    of_norm = (eps + rounding(F64, math.prod(grad.shape[1:]))) * sensitivity  # summed in float64, rounded once
    own = 2 * eps * (abs(base) + np.abs(alpha * entropy) + np.abs(beta * sensitivity))
    return (value, entropy, sensitivity), (abs(alpha) * of_entropy + abs(beta) * of_norm + own, of_entropy, of_norm)


def check(actual, expected):
    for name, x, value, tolerance in zip(LambdaX._fields, actual, *expected, strict=True):
        assert_within(x, value, tolerance, name)


@each_dtype
@images_grid
def test_matches_oracle(shape, dtype):
    logits, grad = make(shape, dtype)
    result = lambda_x(logits, grad, ALPHA, BETA, BASE)
    assert isinstance(result, LambdaX)
    assert {x.dtype for x in result} == {row_dtype(dtype)}
    check(result, oracle(logits, grad, ALPHA, BETA, BASE))


@each_dtype
@pytest.mark.parametrize("classes", [*CLASSES, 2, 7, 33])
def test_every_class_count(classes, dtype):
    logits, grad = make((BATCH, 3, 4, 5), dtype, classes)
    check(lambda_x(logits, grad, ALPHA, -BETA, BASE), oracle(logits, grad, ALPHA, -BETA, BASE))


@each_dtype
def test_clipping(dtype):
    logits, grad = make((BATCH, 3, 4, 5), dtype)
    result = lambda_x(logits, grad, ALPHA, BETA, BASE, 3.5, 3.75)
    check(result, oracle(logits, grad, ALPHA, BETA, BASE, 3.5, 3.75))
    assert (result.value == 3.5).any()
    assert (result.value == 3.75).any()


@needs_kernel
@each_dtype
@images_grid
def test_twin_agrees(shape, dtype):
    logits, grad = make(shape, dtype)
    settings = (ALPHA, BETA, BASE, 1.0, 3.5)
    check(reference.lambda_x(logits, grad, *settings), oracle(logits, grad, *settings))


@each_dtype
@pytest.mark.parametrize("base", [0.0, 6.0, 1 / 3])
def test_without_alpha_and_beta_it_is_exactly_base(base, dtype):
    logits, grad = make((BATCH, 3, 4, 5), dtype)
    value = lambda_x(logits, grad, 0, 0, base).value
    assert torch.equal(value, torch.full_like(value, base))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_gradients_have_a_norm(size):
    logits, _ = make((3, 5), F32)
    grad = torch.full((3, 100), size)
    check(lambda_x(logits, grad, 0.0, 1.0), oracle(logits, grad, 0.0, 1.0, 0.0))


@each_dtype
@pytest.mark.parametrize("classes", [4, 129])
@pytest.mark.parametrize(
    ("row", "entropy"),
    [
        ([0, 0, -INF], math.log(2)),
        ([1e4, -1e4, -1e4], 0.0),
        ([-INF] * 3, NAN),
        ([INF, 0, 0], NAN),
        ([NAN, 0, 0], NAN),
        ([0, 0, NAN], NAN),
    ],
    ids=str,
)
def test_special_logits(row, entropy, classes, dtype):
    logits = torch.zeros(BATCH, classes, dtype=dtype)
    grad = normal((BATCH, 7), dtype, 3)
    expected = lambda_x(logits, grad, 1.0, 1.0, 0.0, 0.0, 9.0)
    logits[16] = torch.tensor(row + [-INF] * (classes - 3), dtype=dtype)
    actual = lambda_x(logits, grad, 1.0, 1.0, 0.0, 0.0, 9.0)
    assert_within(actual.entropy[16:17], np.array([entropy], np.longdouble), rounding(dtype))
    assert bool(actual.value[16].isnan()) == math.isnan(entropy)
    others = torch.arange(BATCH) != 16
    assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))


@each_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_gradient_stays_in_its_sample(value, dtype):
    logits, grad = make((BATCH, 3, 5, 7), dtype)
    expected = lambda_x(logits, grad, ALPHA, BETA)
    grad[16, 2, 4, 6] = value
    actual = lambda_x(logits, grad, ALPHA, BETA)
    others = torch.arange(BATCH) != 16
    assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))
    for x in (actual.value[16], actual.sensitivity[16]):
        assert x.isnan() if math.isnan(value) else x == INF
    clipped = lambda_x(logits, grad, ALPHA, BETA, 0.0, 0.0, 2.0).value[16]
    assert clipped.isnan() if math.isnan(value) else clipped == 2


# ---- samples, layouts, threads ---------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_sample_alone_has_the_bits_of_the_batch(classes, dtype):
    assert_rows_independent(lambda z, g: tuple(lambda_x(z, g, ALPHA, BETA)), *make((BATCH, 3, 5, 7), dtype, classes))


@needs_kernel
@each_dtype
def test_deterministic(dtype):
    logits, grad = make((64, 3, 32, 32), dtype)
    assert_deterministic(lambda: tuple(lambda_x(logits, grad, ALPHA, BETA)))


@each_dtype
def test_any_layout(dtype):
    logits, grad = make((5, 3, 4, 6), dtype)
    exact = tuple(lambda_x(logits, grad, ALPHA, BETA))
    expected = oracle(logits, grad, ALPHA, BETA, 0.0)
    for name, x in layouts(grad).items():
        actual = lambda_x(logits, x, ALPHA, BETA)
        check(actual, expected)  # the sum runs in the order of memory
        if x.is_contiguous():
            assert_same_bits(tuple(actual), exact, name)
    for name, x in layouts(logits).items():
        assert_same_bits(tuple(lambda_x(x, grad, ALPHA, BETA)), exact, name)


# ---- derivatives, compilation, transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 7, 129])
@pytest.mark.parametrize("clip", [(-INF, INF), (1.0, 1.4)], ids=["free", "clipped"])
def test_gradcheck(clip, classes):
    logits = normal((4, classes), F64, 1).requires_grad_()
    grad = (normal((4, 2, 3), F64, 2) * torch.tensor([0.1, 0.5, 1.0, 3.0]).view(4, 1, 1)).requires_grad_()
    alpha = 1 / max(1.0, math.log(classes))

    def function(z, g):
        return lambda_x(z, g, alpha, 0.5, 0.1, *clip).value

    if clip[1] < INF and classes > 1:
        value = function(logits, grad)
        assert 0 < ((value == clip[0]) | (value == clip[1])).sum() < 4
    fast = classes > 7
    assert torch.autograd.gradcheck(function, (logits, grad), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, (logits, grad), fast_mode=fast)


@each_dtype
def test_backward_matches_oracle(dtype):
    logits, grad = make((BATCH, 3, 5), dtype)
    weight = normal((BATCH,), row_dtype(dtype), 3)
    (value, entropy, norm), (_, of_entropy, _) = oracle(logits, grad, ALPHA, BETA, BASE, 1.5, 2.5)
    p, g = Softmax(logits), per_sample(grad)
    w = weight.double().numpy() * ((value > 1.5) & (value < 2.5))
    assert 0 < np.count_nonzero(w) < BATCH
    w, entropy, norm, of_entropy = (x[:, None] for x in (w, entropy, norm, of_entropy))
    unit = rounding(dtype, 10)
    d_logits, d_grad = -ALPHA * w * p.p * (p.log_p + entropy), BETA * w * g / norm
    logits.requires_grad_(), grad.requires_grad_()
    result = lambda_x(logits, grad, ALPHA, BETA, BASE, 1.5, 2.5)
    assert not result.entropy.requires_grad
    assert not result.sensitivity.requires_grad
    actual = torch.autograd.grad(result.value, (logits, grad), weight)
    tolerance = ALPHA * np.abs(w) * p.p * (unit * p.condition * (1 + np.abs(p.log_p) + entropy) + of_entropy)
    assert_within(actual[0], d_logits, tolerance, "d/dlogits")
    assert_within(actual[1].flatten(1), d_grad, unit * np.abs(d_grad), "d/dgrad")


def test_zero_gradient_has_a_zero_derivative():
    logits, grad = make((3, 5), F32)
    grad = torch.zeros_like(grad).requires_grad_()
    lambda_x(logits, grad, 1.0, 1.0).value.sum().backward()
    assert torch.equal(grad.grad, torch.zeros_like(grad))


@needs_kernel
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, dtype):
    logits, grad = make(shape, dtype)
    arguments = (ALPHA, BETA, BASE, -INF, 3.0)
    torch.library.opcheck(torch.ops.dtrades_fast.lambda_x.default, (logits, grad, *arguments))
    strided = grad.transpose(0, -1).contiguous().transpose(0, -1)
    torch.library.opcheck(torch.ops.dtrades_fast.lambda_x.default, (logits.t().contiguous().t(), strided, *arguments))


def test_compile():
    assert_compiles(lambda z, g: lambda_x(z, g, ALPHA, BETA, BASE, 0.0, 2.5).value, *make((BATCH, 3, 5), F64))


def test_func_transforms():
    logits, grad = (x.unflatten(0, (4, 3)) for x in make((12, 3, 5), F64))
    assert_vmaps(lambda z, g: lambda_x(z, g, ALPHA, BETA), logits, grad)
    assert_vmaps(lambda z, g: lambda_x(z, g, ALPHA, BETA), logits.movedim(0, 1), grad[0], in_dims=(1, None))
    assert_transforms(lambda z, g: (lambda_x(z, g, ALPHA, BETA).value ** 2).sum(), logits, grad)
    assert_transforms(lambda g, z: (lambda_x(z, g, ALPHA, BETA).value ** 2).sum(), grad, logits)


# ---- errors ----------------------------------------------------------------------------------------------------------

Z, G = torch.zeros(3, 4), torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("z", G, 1, 1), TypeError, r"clean_logits must be a torch.Tensor, got str"),
        ((Z, 2.0, 1, 1), TypeError, r"grad must be a torch.Tensor, got float"),
        ((Z.long(), G, 1, 1), TypeError, r"clean_logits must have dtype float32, .*, got torch.int64"),
        ((Z, G.long(), 1, 1), TypeError, r"grad must have dtype float32, .*, got torch.int64"),
        (
            (Z, G.double(), 1, 1),
            TypeError,
            r"grad must have the dtype of clean_logits, torch.float32, got torch.float64",
        ),
        ((Z[0], G, 1, 1), ValueError, r"clean_logits must have shape \[N, C\] .*, got \[4\]"),
        ((Z, G[0, 0, 0], 1, 1), ValueError, r"grad must have shape \[N, ...\], .*, got a scalar"),
        ((Z, G[:2], 1, 1), ValueError, r"grad must have one entry per row of clean_logits, 3, got \[2, 2, 5\]"),
        ((Z, G.to("meta"), 1, 1), ValueError, r"grad must be on the device of clean_logits, cpu, got meta"),
        ((Z, G, "1", 1), TypeError, r"alpha must be a Python number, got str"),
        ((Z, G, torch.ones(()), 1), TypeError, r"alpha must be a Python number, got Tensor"),
        ((Z, G, 1, INF), ValueError, r"beta must be a finite number, got inf"),
        ((Z, G, NAN, 1), ValueError, r"alpha must be a finite number, got nan"),
        ((Z, G, 1, 1, -INF), ValueError, r"base must be a finite number, got -inf"),
        ((Z, G, 1, 1, 0, NAN, 1), ValueError, r"minimum must be a number, got nan"),
        ((Z, G, 1, 1, 0, None, 1), TypeError, r"minimum must be a Python number, got NoneType"),
        ((Z, G, 1, 1, 0, 2, 1), ValueError, r"minimum must not exceed maximum, got 2 and 1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        lambda_x(*arguments)
