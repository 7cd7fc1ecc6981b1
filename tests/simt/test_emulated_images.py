"""Kernels over images: packs and tails, blocks of 256 and 1024, shared memory or not, extreme values."""

from __future__ import annotations

import pytest
import torch
from cases import EPSILON, IMAGE_CHECKS, KEPT_SIZES, KEY, KINDS, SIZE_REGIMES, SIZES, STEP, image, lambda_x, logits
from helpers import BATCH, F16, F32, F64, INF, LOW, NAN, assert_rows_independent, assert_same_bits, each_dtype
from kernels import START_KINDS, Kernels
from test_emulated_rows import LAUNCHES

from dtrades_fast import ops

each_operator = pytest.mark.parametrize("operator", IMAGE_CHECKS)
each_regime = pytest.mark.parametrize("size", SIZE_REGIMES)


@each_dtype
@each_operator
@pytest.mark.parametrize("size", SIZES)
def test_matches_oracle(operator, size, dtype):
    IMAGE_CHECKS[operator](Kernels(), 3, size, dtype)


@each_dtype
@pytest.mark.parametrize("size", KEPT_SIZES)
def test_pgd_step_with_and_without_shared_memory(size, dtype):
    IMAGE_CHECKS["pgd_step"](Kernels(), 3, size, dtype)


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 255, 256, 257, 1025])
def test_lambda_x_of_any_logits(classes, kind, dtype):
    lambda_x(Kernels(), 3, 105, dtype, classes, kind)


@pytest.mark.parametrize(("dtype", "shift"), [(F32, 0), (F16, 1)], ids=str)
@each_operator
@each_regime
def test_launch_does_not_show(operator, size, dtype, shift):
    """The same bits on repetition, in every order of threads, for every grid and alignment."""
    check = IMAGE_CHECKS[operator]
    expected = check(Kernels(shift=shift), 5, size, dtype)
    assert_same_bits(check(Kernels(shift=shift), 5, size, dtype), expected, "repetition")
    assert_same_bits(check(Kernels(shift=1 - shift), 5, size, dtype), expected, "another alignment")
    for launch in LAUNCHES:
        assert_same_bits(check(Kernels(shift=shift, **launch), 5, size, dtype), expected, str(launch))


@each_dtype
@each_operator
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned(operator, shift, dtype):
    for size in (1, 9, 64, 3072, 12045):
        IMAGE_CHECKS[operator](Kernels(shift=shift), 2, size, dtype)


@each_dtype
def test_sample_alone_has_the_bits_of_the_batch(dtype):
    """Also of samples that lie at other addresses than alone: 105 elements are no whole number of packs."""
    k = Kernels()
    adv, grad, clean = image(BATCH, 105, dtype)
    index = torch.arange(BATCH) * 3
    assert_rows_independent(lambda a, g, x: k.pgd_step(a, g, x, STEP, 0.2, 0.0, 1.0, "l2"), adv, grad, clean)
    assert_rows_independent(lambda a, g, x: k.pgd_step(a, g, x, STEP, EPSILON, 0.0, 1.0, "linf"), adv, grad, clean)
    assert_rows_independent(lambda *a: k.sample_stats(*a, EPSILON), grad, adv, clean)
    settings = (0.75, 0.3, 0.125, -INF, INF)
    assert_rows_independent(lambda *a: k.lambda_x(*a, *settings), logits(BATCH, 10, dtype, 1), grad)
    for kind in START_KINDS:
        assert_rows_independent(lambda *a, kind=kind: k.random_start(*a, kind, EPSILON, KEY), clean, index)


@each_operator
@pytest.mark.parametrize("shape", [(0, 12), (3, 0)], ids=["no samples", "no pixels"])
def test_nothing_to_do(operator, shape):
    IMAGE_CHECKS[operator](Kernels(), *shape, F32)


def with_nan_as_one(x):
    """NaN has other bits on a GPU than on a CPU."""
    return torch.where(x.isnan(), torch.full_like(x, NAN), x)


@each_dtype
def test_linf_takes_every_value_as_the_operator_does(dtype):
    """NaN, infinities, zeros of both signs and subnormals in each of the three places."""
    info = torch.finfo(dtype)
    values = [NAN, INF, -INF, 0.0, -0.0, 1.0, -0.5, 2e-3, info.max, info.min, info.tiny, -info.tiny * info.eps]
    adv, grad, clean = (x.flatten() for x in torch.meshgrid(*[torch.tensor(values, dtype=dtype)] * 3, indexing="ij"))
    for box in ((0.0, 1.0), (-INF, INF)):
        actual = Kernels().pgd_step(adv, grad, clean, STEP, EPSILON, *box, "linf")
        expected = ops.pgd_step_(adv.clone(), grad, clean, STEP, EPSILON, *box)
        assert_same_bits(with_nan_as_one(actual), with_nan_as_one(expected), str(box))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_half_precision_is_converted_exactly(dtype):
    """A step from each of the 65536 values, without ball and box: read, added to and rounded as torch does."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    ones = torch.ones_like(every)
    for step in (0.0, 2.0**-25, 2.0**-24 * 1.5, 1e-3, 1 / 3, 40.0, 65504.0, 1e30, 3e38):
        moved = Kernels().pgd_step(every, ones, torch.zeros_like(every), step, INF, -INF, INF, "linf")
        expected = (every.float() + torch.tensor(step)).to(dtype)
        assert_same_bits(with_nan_as_one(moved), with_nan_as_one(expected), str(step))


@each_dtype
@each_regime
def test_nan_stays_in_its_sample(size, dtype):
    k, sample = Kernels(), 1
    adv, grad, clean = image(3, size, dtype)
    spoiled = grad.clone()
    spoiled[sample, size - 1] = NAN
    z = logits(3, 10, dtype, 1)

    def results(grad):
        stats = k.sample_stats(grad, adv, clean, EPSILON)
        weight, _, norm = k.lambda_x(z, grad, 0.75, 0.3, 0.125, -INF, INF)
        return (*stats, weight, norm, k.pgd_step(adv, grad, clean, STEP, 0.2, 0.0, 1.0, "l2"))

    for x, expected in zip(results(spoiled), results(grad), strict=True):
        assert x[sample].isnan().all()
        assert_same_bits(x[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("size", "dtype"), [(1e-30, F32), (1e30, F32), (6e-8, F16), (65504, F16), (1e-150, F64)])
def test_extreme_gradients_have_a_norm(size, dtype):
    grad = torch.full((2, 1031), size, dtype=dtype)
    adv, _, clean = image(2, 1031, dtype)
    norm = grad.double().norm(dim=1)
    for l2 in (Kernels().sample_stats(grad, adv, clean, EPSILON)[0], Kernels().lambda_x(clean, grad, 0, 1, 0, 0, 1)[2]):
        torch.testing.assert_close(l2.double(), norm, rtol=1e-6, atol=0)
    moved = Kernels().pgd_step(adv, grad, clean, STEP, 10.0, -INF, INF, "l2")
    step = STEP / 1031**0.5
    torch.testing.assert_close(moved.double(), adv.double() + step, rtol=float(torch.finfo(dtype).eps), atol=1e-6)


def test_no_gradient_no_step():
    adv, grad, clean = image(2, 300, F32)
    moved = Kernels().pgd_step(adv, torch.zeros_like(grad), clean, STEP, INF, -INF, INF, "l2")
    assert torch.allclose(moved, adv, rtol=0, atol=1e-7)
    assert not torch.allclose(Kernels().pgd_step(adv, grad, clean, STEP, INF, -INF, INF, "l2"), adv, rtol=0, atol=1e-4)


def test_random_numbers_follow_key_and_index():
    """Both are 64 bits wide; a sample's numbers are its own wherever it stands in the batch."""
    k, clean = Kernels(), torch.full((4, 100), 0.5)
    index = torch.tensor([0, 1 << 32, 1, 1 << 62])
    for kind in START_KINDS:
        start = k.random_start(clean, index, kind, 0.25, KEY)
        assert len({tuple(x) for x in start.tolist()}) == 4
        assert_same_bits(k.random_start(clean, index.flip(0), kind, 0.25, KEY).flip(0), start)
        for key in (KEY ^ 1, KEY ^ 1 << 40, (1 << 64) - 1):
            assert not torch.equal(k.random_start(clean, index, kind, 0.25, key), start)
