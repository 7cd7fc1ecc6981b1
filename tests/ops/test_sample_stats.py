"""||g||_2, ||g||_1, ||g||_inf and FOSC = sum_i max(g_i (hi_i - x'_i), g_i (lo_i - x'_i))."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    BF16,
    F16,
    F32,
    F64,
    IMAGES,
    INF,
    NAN,
    assert_compiles,
    assert_deterministic,
    assert_rows_independent,
    assert_same_bits,
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
    uniform,
)

from dtrades_fast.ops import SampleStats, reference, sample_stats

EPSILON = 8 / 255


def make(shape, dtype, epsilon=EPSILON):
    """g, x' inside ball and box, x"""
    clean = uniform(shape, F64, 1)
    adv = (clean + epsilon * (2 * uniform(shape, F64, 2) - 1)).clamp(0, 1)
    return normal(shape, dtype, 3), adv.to(dtype), clean.to(dtype)


def oracle(grad, adv, clean, epsilon, lower=0.0, upper=1.0):
    g, a, x = per_sample(grad), per_sample(adv), per_sample(clean)
    hi, lo = np.minimum(x + epsilon, upper), np.maximum(x - epsilon, lower)
    rise = np.maximum(g * (hi - a), g * (lo - a)).sum(1)
    size = np.abs(g)
    unit = rounding(grad.dtype, g.shape[1])
    # Norms: sums of positive terms; squares are summed in float64. FOSC: terms round x +- epsilon and a difference.
    l2 = np.sqrt((g**2).sum(1))
    tolerance = (
        (torch.finfo(row_dtype(grad.dtype)).eps + rounding(F64, g.shape[1])) * l2,
        unit * size.sum(1),
        0.0,
        unit * (size * (np.abs(a) + np.maximum(np.abs(x) + epsilon, np.maximum(np.abs(hi), np.abs(lo))))).sum(1),
    )
    return (l2, size.sum(1), size.max(1, initial=0), rise), tolerance


def check(actual, expected):
    for name, x, value, tolerance in zip(SampleStats._fields, actual, *expected, strict=True):
        assert_within(x, value, tolerance, name)


@each_dtype
@images_grid
def test_matches_oracle(shape, dtype):
    inputs = make(shape, dtype)
    result = sample_stats(*inputs, EPSILON)
    assert isinstance(result, SampleStats)
    assert {x.dtype for x in result} == {row_dtype(dtype)}
    check(result, oracle(*inputs, EPSILON))


@each_dtype
@pytest.mark.parametrize("box", [(0.25, 0.75), (-INF, INF), (0.5, 0.5)])
def test_other_boxes(box, dtype):
    inputs = make((5, 3, 5, 7), dtype)
    check(sample_stats(*inputs, 0.5, *box), oracle(*inputs, 0.5, *box))


@needs_kernel
@each_dtype
@images_grid
def test_twin_agrees(shape, dtype):
    inputs = make(shape, dtype)
    check(reference.sample_stats(*inputs, EPSILON, 0.0, 1.0), oracle(*inputs, EPSILON))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e-30, F32), (1e30, F32), (1e-30, BF16), (1e30, BF16), (1e-38, F32), (6e-8, F16), (65504, F16), (1e-150, F64)],
)
def test_extreme_gradients(size, dtype):
    grad = torch.full((3, 3, 5, 7), size, dtype=dtype)
    _, adv, clean = make((3, 3, 5, 7), dtype)
    result = sample_stats(grad, adv, clean, EPSILON)
    check(result, oracle(grad, adv, clean, EPSILON))
    for x in result[:3]:
        assert x.isfinite().all()
        assert (x > 0).all()


def test_samples_without_pixels_are_zero():
    empty = torch.zeros(4, 0)
    for x in sample_stats(empty, empty, empty, EPSILON):
        assert torch.equal(x, torch.zeros(4))


# ---- the first-order stationary condition ----------------------------------------------------------------------------


@each_dtype
def test_fosc_is_not_negative_inside(dtype):
    grad, adv, clean = make((200, 3, 5, 7), dtype)
    a, x = (t.to(row_dtype(dtype)) for t in (adv, clean))
    inside = (a <= (x + EPSILON).clamp(max=1)) & (a >= (x - EPSILON).clamp(min=0))
    adv = torch.where(inside, adv, clean)  # half precision may round x' out of the ball
    assert (sample_stats(grad, adv, clean, EPSILON).fosc >= 0).all()


@each_dtype
def test_fosc_is_zero_at_the_maximiser(dtype):
    grad, _, clean = make((50, 3, 5, 7), dtype)
    epsilon = 0.125
    clean = (clean * 64).round() / 64  # so that x +- epsilon is exact in every dtype
    best = torch.where(grad > 0, (clean + epsilon).clamp(max=1), (clean - epsilon).clamp(min=0))
    assert not sample_stats(grad, best, clean, epsilon).fosc.any()
    assert (sample_stats(-grad, best, clean, epsilon).fosc > 0).all()


@each_dtype
def test_fosc_is_the_best_corner(dtype):
    """max over ball and box of <g, v - x'>, which is linear in v, is reached at a corner: try them all."""
    grad, adv, clean = make((40, 2, 3), dtype, epsilon=0.3)
    g, a, x = per_sample(grad), per_sample(adv), per_sample(clean)
    hi, lo = np.minimum(x + 0.3, 1), np.maximum(x - 0.3, 0)
    corners = itertools.product([False, True], repeat=6)
    best = np.max([(g * (np.where(np.array(corner), hi, lo) - a)).sum(1) for corner in corners], axis=0)
    assert_within(sample_stats(grad, adv, clean, 0.3).fosc, best, oracle(grad, adv, clean, 0.3)[1][3])


# ---- special values ------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("where", [0, 17, 104])
def test_nan_shows_in_its_sample_alone(where, dtype):
    grad, adv, clean = make((BATCH, 3, 5, 7), dtype)
    expected = sample_stats(grad, adv, clean, EPSILON)
    others = torch.arange(BATCH) != 16
    for spoiled in (grad, adv, clean):
        before = spoiled.clone()
        spoiled[16].view(-1)[where] = NAN
        actual = sample_stats(grad, adv, clean, EPSILON)
        assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))
        assert actual.fosc[16].isnan()
        assert [bool(x[16].isnan()) for x in actual[:3]] == [spoiled is grad] * 3
        spoiled.copy_(before)


def test_infinite_gradient():
    grad, adv, clean = make((2, 3, 5, 7), F32)
    grad[1, 0, 0, 0] = -INF
    result = sample_stats(grad, adv, clean, EPSILON)
    assert [float(x[1]) for x in result[:3]] == [INF] * 3


# ---- samples, layouts, threads ---------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("shape", [(BATCH, 3, 5, 7), (BATCH, 64), (BATCH,)], ids=str)
def test_sample_alone_has_the_bits_of_the_batch(shape, dtype):
    assert_rows_independent(lambda *a: tuple(sample_stats(*a, EPSILON)), *make(shape, dtype))


@needs_kernel
@each_dtype
def test_deterministic(dtype):
    inputs = make((64, 3, 32, 32), dtype)
    assert_deterministic(lambda: tuple(sample_stats(*inputs, EPSILON)))


@each_dtype
def test_any_layout(dtype):
    inputs = make((5, 3, 4, 6), dtype)
    expected, exact = oracle(*inputs, EPSILON), tuple(sample_stats(*inputs, EPSILON))
    g, a, x = (layouts(t) for t in inputs)
    for name in g:
        for mix in ((name,) * 3, (name, "contiguous", "contiguous"), ("contiguous", name, "channels_last")):
            views = g[mix[0]], a[mix[1]], x[mix[2]]
            check(sample_stats(*views, EPSILON), expected)  # sums run in the order of memory
            if all(v.is_contiguous() for v in views):
                assert_same_bits(tuple(sample_stats(*views, EPSILON)), exact, str(mix))


# ---- registration, compilation, transforms ---------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, dtype):
    inputs = make(shape, dtype)
    torch.library.opcheck(torch.ops.dtrades_fast.sample_stats.default, (*inputs, EPSILON, 0.0, 1.0))
    strided = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs)
    torch.library.opcheck(torch.ops.dtrades_fast.sample_stats.default, (*strided, EPSILON, 0.0, 1.0))


def test_compile():
    assert_compiles(lambda *a: sample_stats(*a, EPSILON), *make((BATCH, 3, 5), F64), grad=False)


def test_vmap():
    inputs = tuple(x.unflatten(0, (4, 3)) for x in make((12, 2, 5), F32))
    assert_vmaps(lambda *a: sample_stats(*a, EPSILON), *inputs)
    assert_vmaps(
        lambda *a: sample_stats(*a, EPSILON), inputs[0].movedim(0, 2), inputs[1], inputs[2][1], in_dims=(2, 0, None)
    )


# ---- errors ----------------------------------------------------------------------------------------------------------

G = torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], G, G, 0.1), TypeError, r"grad must be a torch.Tensor, got list"),
        ((G.long(), G, G, 0.1), TypeError, r"grad must have dtype float32, .*, got torch.int64"),
        ((G[0, 0, 0], G, G, 0.1), ValueError, r"grad must have shape \[N, ...\], .*, got a scalar"),
        ((G, G.double(), G, 0.1), TypeError, r"adv must have the dtype of grad, torch.float32, got torch.float64"),
        ((G, G[:2], G, 0.1), ValueError, r"adv must have the shape of grad, \[3, 2, 5\], got \[2, 2, 5\]"),
        ((G, G, None, 0.1), TypeError, r"clean must be a torch.Tensor, got NoneType"),
        ((G, G, G[:, :1], 0.1), ValueError, r"clean must have the shape of grad, \[3, 2, 5\], got \[3, 1, 5\]"),
        ((G, G, G.to("meta"), 0.1), ValueError, r"clean must be on the device of grad, cpu, got meta"),
        ((G, G, G, -0.1), ValueError, r"epsilon must be a finite number of at least 0, got -0.1"),
        ((G, G, G, NAN), ValueError, r"epsilon must be a finite number of at least 0, got nan"),
        ((G, G, G, INF), ValueError, r"epsilon must be a finite number of at least 0, got inf"),
        ((G, G, G, "8/255"), TypeError, r"epsilon must be a Python number, got str"),
        ((G, G, G, 0.1, 1, 0), ValueError, r"lower must not exceed upper, got 1 and 0"),
        ((G, G, G, 0.1, 0, NAN), ValueError, r"upper must be a number, got nan"),
        ((G, G, G, 0.1, torch.zeros(3)), TypeError, r"lower must be a Python number, got Tensor"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_stats(*arguments)


def test_grid_covers_the_empty_sample():
    assert any(math.prod(shape[1:]) == 0 for shape in IMAGES)
