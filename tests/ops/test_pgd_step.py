"""One projected step in place, Linf and L2; and the conversions to and from half precision, which it shows best."""

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
    LOW,
    NAN,
    assert_compiles,
    assert_deterministic,
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

from dtrades_fast.ops import BACKEND, pgd_step_, reference

STEP, EPSILON = 2 / 255, 8 / 255
each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def make(shape, dtype, epsilon=EPSILON):
    """x' around the edge of the ball, g with some zeros, x"""
    clean = uniform(shape, F64, 1)
    adv = (clean + epsilon * (2 * uniform(shape, F64, 2) - 1)).clamp(0, 1)
    grad = normal(shape, F64, 3)
    return adv.to(dtype), torch.where(uniform(shape, F64, 4) < 0.1, 0, grad).to(dtype), clean.to(dtype)


def radius_for(norm, shape):
    """A ball that some samples leave and others do not."""
    return EPSILON if norm == "linf" else EPSILON * math.sqrt(max(1, math.prod(shape[1:])) / 3)


def step(adv, grad, clean, *settings, **options):
    """pgd_step_ on a copy of adv that has its strides."""
    return pgd_step_(torch.empty_like(adv).copy_(adv), grad, clean, *settings, **options)


def linf_in_torch(adv, grad, clean, step_size, epsilon, lower=0.0, upper=1.0):
    """The published expression, in the dtype that is computed in."""
    a, g, x = (t.to(row_dtype(adv.dtype)) for t in (adv, grad, clean))
    moved = torch.minimum(torch.maximum(a + step_size * g.sign(), x - epsilon), x + epsilon)
    return moved.clamp(lower, upper).to(adv.dtype)


def l2_oracle(adv, grad, clean, step_size, epsilon, lower=0.0, upper=1.0):
    a, g, x = per_sample(adv), per_sample(grad), per_sample(clean)
    norm = np.sqrt((g**2).sum(1, keepdims=True))
    delta = a + step_size * np.divide(g, norm, where=norm > 0, out=np.zeros_like(g)) - x
    size = np.sqrt((delta**2).sum(1, keepdims=True))
    shrink = np.where(size > epsilon, epsilon / np.maximum(size, 1e-300), 1)
    tolerance = rounding(adv.dtype, g.shape[1]) * (np.abs(a) + np.abs(x) + step_size)
    return np.clip(x + shrink * delta, lower, upper), tolerance


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@images_grid
def test_linf_is_the_pytorch_expression_bit_for_bit(shape, dtype):
    inputs = make(shape, dtype)
    for box in ((0.0, 1.0), (0.25, 0.75), (-INF, INF)):
        expected = linf_in_torch(*inputs, STEP, EPSILON, *box)
        assert_same_bits(step(*inputs, STEP, EPSILON, *box), expected, str(box))


@each_dtype
@images_grid
def test_l2_matches_oracle(shape, dtype):
    inputs, epsilon = make(shape, dtype), radius_for("l2", shape)
    for box in ((0.0, 1.0), (-INF, INF)):
        actual = step(*inputs, STEP, epsilon, *box, norm="l2")
        expected, tolerance = l2_oracle(*inputs, STEP, epsilon, *box)
        assert actual.shape == shape
        assert_within(actual.reshape(expected.shape), expected, tolerance, str(box))


def test_l2_ball_is_reached_by_some_samples_only():
    adv, grad, clean = make((BATCH, 3, 5, 7), F64)
    epsilon = radius_for("l2", adv.shape)
    distance = (step(adv, grad, clean, STEP, epsilon, -INF, INF, "l2") - clean).flatten(1).norm(dim=1)
    on_edge = (distance - epsilon).abs() < 1e-12
    assert 0 < on_edge.sum() < BATCH


@needs_kernel
@each_dtype
@images_grid
def test_twin_agrees(shape, dtype):
    adv, grad, clean = make(shape, dtype)
    twin = adv.clone()
    reference.pgd_step_(twin, grad, clean, STEP, EPSILON, 0.0, 1.0, "linf")
    assert_same_bits(twin, step(adv, grad, clean, STEP, EPSILON))
    twin, epsilon = adv.clone(), radius_for("l2", shape)
    reference.pgd_step_(twin, grad, clean, STEP, epsilon, 0.0, 1.0, "l2")
    expected, tolerance = l2_oracle(adv, grad, clean, STEP, epsilon)
    assert_within(twin.reshape(expected.shape), expected, tolerance)


@each_dtype
@each_norm
def test_stays_in_ball_and_box(norm, dtype):
    adv, grad, clean = make((BATCH, 3, 5, 7), dtype)
    epsilon = radius_for(norm, adv.shape)
    for _ in range(5):
        pgd_step_(adv, grad, clean, epsilon / 2, epsilon, norm=norm)
    assert (adv >= 0).all()
    assert (adv <= 1).all()
    # Each pixel below 1 is stored with at most half an ulp, eps / 2 of its dtype; float32 arithmetic adds the like.
    distance = (adv.double() - clean.double()).flatten(1)
    ulp = torch.finfo(dtype).eps / 2 + torch.finfo(row_dtype(dtype)).eps
    if norm == "linf":
        assert (distance.abs() <= epsilon + ulp).all()
    else:
        assert (distance.norm(dim=1) <= epsilon + ulp * math.sqrt(distance.shape[1])).all()


@each_dtype
@each_norm
def test_projection_is_idempotent(norm, dtype):
    adv, grad, clean = make((BATCH, 3, 5, 7), dtype, epsilon=0.3)
    grad = torch.zeros_like(grad)
    epsilon = radius_for(norm, adv.shape)
    once = step(adv, grad, clean, 0.0, epsilon, norm=norm)
    twice = step(once, grad, clean, 0.0, epsilon, norm=norm)
    assert not torch.equal(once, adv)
    if norm == "linf":
        assert_same_bits(twice, once)
    else:  # the norm of the projected difference is epsilon up to rounding, so it may be scaled once more
        move = rounding(dtype, 105) * np.ones((), np.longdouble)
        assert_within(twice.flatten(1), per_sample(once), move + (dtype in LOW) * torch.finfo(dtype).eps / 2)


@each_dtype
@each_norm
def test_no_step_inside_the_ball_changes_nothing(norm, dtype):
    adv, grad, clean = make((5, 3, 5, 7), dtype)
    result = step(adv, grad, clean, 0, 10.0, norm=norm)
    if norm == "linf":
        assert torch.equal(result, adv)
    else:  # x + (x' - x): two roundings
        two = torch.finfo(row_dtype(dtype)).eps
        assert_within(result.flatten(1), per_sample(adv), two)


@each_dtype
@each_norm
def test_no_radius_gives_the_clean_image(norm, dtype):
    adv, grad, clean = make((5, 3, 5, 7), dtype)
    assert torch.equal(step(adv, grad, clean, STEP, 0, norm=norm), clean)


@each_dtype
def test_l2_without_gradient_does_not_move(dtype):
    adv, grad, clean = make((5, 3, 5, 7), dtype)
    clean = torch.zeros_like(clean)  # so that x' - x is exact
    grad[2] = 0
    result = step(adv, grad, clean, 0.5, 100.0, norm="l2")
    assert torch.equal(result[2], adv[2])
    assert all(not torch.equal(result[i], adv[i]) for i in (0, 1, 3, 4))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_l2_moves_by_the_step_whatever_the_size_of_the_gradient(size, dtype):
    adv = clean = torch.zeros(4, 3, 5, 7, dtype=dtype)
    result = step(adv, normal(adv.shape, dtype, 3, size), clean, 0.25, 1.0, -INF, INF, "l2")
    distance = np.sqrt((per_sample(result) ** 2).sum(1))
    stored = torch.finfo(dtype).eps / 2 + rounding(dtype, 105)
    assert (np.abs(distance - 0.25) <= 0.25 * stored).all()


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1.0])
def test_l2_step_of_length_zero_does_not_move(size):
    """Neither the kernel nor the twin, even where 1 / ||g|| overflows."""
    clean, grad = uniform((2, 12), F32, 1), torch.full((2, 12), size)
    for implementation in (pgd_step_, reference.pgd_step_):
        adv = clean.clone()
        implementation(adv, grad, clean, 0.0, 0.5, 0.0, 1.0, "l2")
        assert torch.equal(adv, clean)


@pytest.mark.parametrize("size", [1e-45, 1e-40])
def test_l2_of_a_gradient_too_small_to_normalise(size):
    """step / ||g|| overflows: the sample stays, rather than becoming NaN."""
    adv, clean = torch.full((2, 7), 0.5), torch.full((2, 7), 0.5)
    grad = torch.zeros(2, 7)
    grad[0, 3], grad[1, 3] = size, 1.0
    result = step(adv, grad, clean, 0.25, 1.0, norm="l2")
    assert torch.equal(result[0], adv[0])
    assert result[1, 3] == 0.75


@each_dtype
@each_norm
@pytest.mark.parametrize("where", [0, 17, 104])
def test_nan_gradient_shows(where, norm, dtype):
    adv, grad, clean = make((5, 3, 5, 7), dtype)
    expected = step(adv, grad, clean, STEP, EPSILON, norm=norm)
    grad[3].view(-1)[where] = NAN
    actual = step(adv, grad, clean, STEP, EPSILON, norm=norm)
    others = torch.arange(5) != 3
    assert_same_bits(actual[others], expected[others])
    hit = actual[3].isnan().view(-1)
    assert hit[where]
    assert hit.sum() == (1 if norm == "linf" else 105)


@each_dtype
@each_norm
def test_nan_images_stay_nan(norm, dtype):
    for spoiled in (0, 2):
        inputs = make((5, 3, 5, 7), dtype)
        inputs[spoiled][3, 1, 2, 3] = NAN
        assert step(*inputs, STEP, EPSILON, norm=norm)[3, 1, 2, 3].isnan()


def test_infinite_gradient():
    adv, grad, clean = make((2, 105), F32)
    grad[0, 5], grad[1, 7] = INF, -INF
    linf = step(adv, grad, clean, STEP, EPSILON)
    assert_same_bits(linf, linf_in_torch(adv, grad, clean, STEP, EPSILON))
    assert step(adv, grad, clean, STEP, EPSILON, norm="l2")[0, 5].isnan()  # inf / inf shows


# ---- in place, layouts, samples, threads -----------------------------------------------------------------------------


@each_norm
def test_returns_adv_itself_and_leaves_the_rest(norm):
    adv, grad, clean = make((5, 3, 5, 7), F32)
    before = adv.clone(), grad.clone(), clean.clone()
    assert pgd_step_(adv, grad, clean, STEP, EPSILON, norm=norm) is adv
    assert not torch.equal(adv, before[0])
    assert_same_bits((grad, clean), before[1:])


@each_norm
def test_autograd_notices_the_change(norm):
    """x' saved for a backward pass and then stepped must raise, not give a wrong gradient."""
    adv, grad, clean = make((5, 3, 5, 7), F32)
    weight = torch.ones_like(adv).requires_grad_()
    loss = (weight * adv).sum()
    pgd_step_(adv, grad, clean, STEP, EPSILON, norm=norm)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adv_that_requires_grad():
    adv, grad, clean = make((5, 3, 5, 7), F32)
    expected = step(adv, grad, clean, STEP, EPSILON)
    adv.requires_grad_()
    with pytest.raises(ValueError, match=r"adv must not require a gradient .* \(use torch.no_grad\(\)\)"):
        pgd_step_(adv, grad, clean, STEP, EPSILON)
    with torch.no_grad():
        assert torch.equal(pgd_step_(adv, grad, clean, STEP, EPSILON), expected)
    with torch.inference_mode():
        assert torch.equal(step(*make((5, 3, 5, 7), F32), STEP, EPSILON), expected)


@each_norm
def test_adv_may_be_clean_or_grad(norm):
    adv, grad, _ = make((5, 3, 5, 7), F32)
    assert_same_bits(
        pgd_step_(x := adv.clone(), grad, x, STEP, EPSILON, norm=norm), step(adv, grad, adv, STEP, EPSILON, norm=norm)
    )
    assert_same_bits(
        pgd_step_(x := adv.clone(), x, adv, STEP, EPSILON, norm=norm), step(adv, adv, adv, STEP, EPSILON, norm=norm)
    )


@each_dtype
@each_norm
def test_any_layout(norm, dtype):
    inputs = make((5, 3, 4, 6), dtype)
    epsilon = radius_for(norm, (5, 3, 4, 6))
    exact = step(*inputs, STEP, epsilon, norm=norm)
    expected, tolerance = l2_oracle(*inputs, STEP, epsilon)
    names = layouts(inputs[0])
    kinds = ("contiguous", "unaligned", "channels_last", "strided in the last dimension")
    mixes = [(n, n, n) for n in names] + list(itertools.product(names, kinds, kinds))
    for mix in mixes:
        adv, grad, clean = (layouts_of[m] for layouts_of, m in zip(map(layouts, inputs), mix, strict=True))
        strides = adv.stride()
        result = pgd_step_(adv, grad, clean, STEP, epsilon, norm=norm)
        assert result is adv
        assert adv.stride() == strides
        if norm == "linf":
            assert_same_bits(adv, exact, str(mix))
        else:  # sums run in the order of memory
            assert_within(adv.flatten(1), expected, tolerance, str(mix))


@each_norm
def test_a_view_is_written_and_its_surroundings_are_not(norm):
    adv, grad, clean = make((5, 3, 4, 6), F32)
    expected = step(adv, grad, clean, STEP, EPSILON, norm=norm)
    big = torch.full((7, 3, 8, 6), -7.0)
    window = big[1:6, :, 2:6]
    window.copy_(adv)
    pgd_step_(window, grad, clean, STEP, EPSILON, norm=norm)
    assert_same_bits(big[1:6, :, 2:6], expected)
    assert (big == -7).sum() == big.numel() - adv.numel()


@needs_kernel
@each_dtype
@each_norm
@pytest.mark.parametrize("shape", [(BATCH, 3, 5, 7), (BATCH, 64), (BATCH,)], ids=str)
def test_sample_alone_has_the_bits_of_the_batch(shape, norm, dtype):
    inputs = make(shape, dtype)
    whole = step(*inputs, STEP, EPSILON, norm=norm)
    for i in (0, 7, 8, 15, 16, 17, BATCH - 1):
        alone = step(*(x[i : i + 1].clone() for x in inputs), STEP, EPSILON, norm=norm)
        assert_same_bits(alone, whole[i : i + 1], f"sample {i}")


@needs_kernel
@each_dtype
@each_norm
def test_deterministic(norm, dtype):
    inputs = make((64, 3, 32, 32), dtype)
    assert_deterministic(lambda: step(*inputs, STEP, EPSILON, norm=norm))


# ---- half precision --------------------------------------------------------------------------------------------------


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_but_nan(actual, expected):
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_same_bits(actual[~nan], expected[~nan])


@needs_kernel
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_every_half_passes_through(offset, dtype):
    """All 65,536 bit patterns are widened and narrowed without a change, in vectors and in the tail."""
    x = every_pattern(dtype)[offset:]
    negative_zero = torch.full_like(x, -0.0)  # the one gradient for which even -0 + step * sign(g) is -0
    same_but_nan(step(x, negative_zero, x, 0.0, 3e38, -INF, INF), x)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_that_of_torch(dtype):
    """Every half plus every power of two: exact ties, just beside them, subnormals, overflow."""
    x = every_pattern(dtype)
    x = x[x.isfinite() & (x != 0)]
    least, most = (-26, 6) if dtype == F16 else (-134, 121)
    ties = 0
    for power in range(least, most):
        for size in (2.0**power, 2.0**power * (1 + 2**-12)) if dtype == F16 else (2.0**power,):
            moved = step(x, x, x, size, 3e38, -INF, INF)
            exact = x.float() + size * x.float().sign()
            assert_same_bits(moved, exact.to(dtype), f"2^{power}")
            neighbour = moved.float() + 2 * (exact - moved.float())  # of a tie, the other half beside it
            ties += int(((neighbour.to(dtype).float() == neighbour) & (exact != moved)).sum())
    assert ties > 30_000


@pytest.mark.parametrize(
    ("dtype", "start", "move", "result"),
    [
        (F16, 1.0, 2**-11, 1.0),  # a tie goes to the even neighbour, here below
        (F16, 1 + 2**-10, 2**-11, 1 + 2**-9),  # and here above
        (F16, 1.0, 2**-11 * (1 + 2**-10), 1 + 2**-10),  # just above the tie
        (F16, 65504.0, 15.99, 65504.0),
        (F16, 65504.0, 16.0, INF),  # the tie with the first number that there is not
        (F16, 2**-24, 2**-25, 2**-23),  # ties among subnormals
        (F16, 2**-23, 2**-25, 2**-23),
        (F16, 1023 * 2**-24, 2**-25, 2**-14),  # from the largest subnormal to the smallest normal
        (BF16, 1.0, 2**-8, 1.0),
        (BF16, 1 + 2**-7, 2**-8, 1 + 2**-6),
        (BF16, 2**-133, 2**-134, 2**-132),
    ],
)
def test_rounding_by_hand(dtype, start, move, result):
    x = torch.tensor([start, -start], dtype=dtype)
    assert step(x, x, x, move, 3e38, -INF, INF).tolist() == [result, -result]


# ---- registration, compilation, transforms ---------------------------------------------------------------------------


@needs_kernel
@each_norm
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, norm, dtype):
    inputs = make(shape, dtype)
    torch.library.opcheck(torch.ops.dtrades_fast.pgd_step_.default, (*inputs, STEP, EPSILON, 0.0, 1.0, norm))
    strided = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs)
    torch.library.opcheck(torch.ops.dtrades_fast.pgd_step_.default, (*strided, STEP, EPSILON, 0.0, 1.0, norm))


@each_norm
def test_compile(norm):
    assert_compiles(lambda *a: pgd_step_(*a, STEP, EPSILON, norm=norm), *make((BATCH, 3, 5), F64), grad=False)


def test_compile_with_changing_numbers():
    """A radius that is ramped up becomes symbolic in the compiled graph."""
    inputs = make((BATCH, 3, 5), F64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, g, x, s, e: pgd_step_(a, g, x, s, e), fullgraph=True, backend="aot_eager")
    for epsilon in (0.1, 0.2, 0.3, 0.4):
        actual = compiled(inputs[0].clone(), *inputs[1:], epsilon / 4, epsilon)
        assert_same_bits(actual, step(*inputs, epsilon / 4, epsilon))


def test_vmap():
    adv, grad, clean = (x.unflatten(0, (4, 3)) for x in make((12, 2, 5), F32))
    if BACKEND.name == "cpp":  # PyTorch has no fallback for operators that write: refused, not wrong
        with pytest.raises(RuntimeError, match="atching rule not implemented for dtrades_fast::pgd_step_"):
            torch.func.vmap(lambda *a: pgd_step_(*a, STEP, EPSILON))(adv, grad, clean)
    else:
        assert_vmaps(lambda *a: step(*a, STEP, EPSILON), adv, grad, clean)


# ---- errors ----------------------------------------------------------------------------------------------------------

A = torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, A, A, 0.1, 0.1), TypeError, r"adv must be a torch.Tensor, got NoneType"),
        ((A.byte(), A, A, 0.1, 0.1), TypeError, r"adv must have dtype float32, .*, got torch.uint8"),
        ((A[0, 0, 0], A, A, 0.1, 0.1), ValueError, r"adv must have shape \[N, ...\], .*, got a scalar"),
        ((A, A.half(), A, 0.1, 0.1), TypeError, r"grad must have the dtype of adv, torch.float32, got torch.float16"),
        ((A, A[:2], A, 0.1, 0.1), ValueError, r"grad must have the shape of adv, \[3, 2, 5\], got \[2, 2, 5\]"),
        ((A, A.to("meta"), A, 0.1, 0.1), ValueError, r"grad must be on the device of adv, cpu, got meta"),
        ((A, A, 0, 0.1, 0.1), TypeError, r"clean must be a torch.Tensor, got int"),
        ((A, A, A[:, :1], 0.1, 0.1), ValueError, r"clean must have the shape of adv, \[3, 2, 5\], got \[3, 1, 5\]"),
        ((A, A, A, -0.1, 0.1), ValueError, r"step_size must be a finite number of at least 0, got -0.1"),
        ((A, A, A, INF, 0.1), ValueError, r"step_size must be a finite number of at least 0, got inf"),
        ((A, A, A, 0.1, -1), ValueError, r"epsilon must be a finite number of at least 0, got -1"),
        ((A, A, A, 0.1, NAN), ValueError, r"epsilon must be a finite number of at least 0, got nan"),
        ((A, A, A, A, 0.1), TypeError, r"step_size must be a Python number, got Tensor"),
        ((A, A, A, 0.1, 0.1, 1, 0), ValueError, r"lower must not exceed upper, got 1 and 0"),
        ((A, A, A, 0.1, 0.1, 0, 1, "L2"), ValueError, r"norm must be one of 'linf', 'l2', got 'L2'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pgd_step_(*arguments)
