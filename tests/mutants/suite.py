"""Whether anybody notices: compact, sharp cases for each operator, against the float64 oracles of the other tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from cases import CHECKS, EPSILON, KEY, KINDS, ROW_CHECKS, STEP, check_loss, image, labels, lambda_x, logits
from helpers import INF, NAN, assert_same_bits, assert_within, normal, rounding, row_dtype, wide
from kernels import START_KINDS, Kernels
from test_random_start import words
from test_robust_loss import BCE
from torch import Tensor

from dtrades_fast import ops


def check(operator: str, dtype: torch.dtype, program: Path) -> None:
    """Raises AssertionError or EmulatorError if the operator of this program is wrong."""
    for launch in ({}, {"max_blocks": 2, "schedule": "random", "seed": 1}):
        k = Kernels(build=program, **launch)
        if operator in ROW_CHECKS:
            _rows(operator, k, dtype)
        else:
            _images(operator, k, dtype)
        EDGES[operator](k, dtype)


def check_briefly(operator: str, dtype: torch.dtype, program: Path) -> None:
    """For a slow program that watches its memory: a case in each regime, on a grid smaller than the batch."""
    shapes = ((35, 10), (9, 33), (3, 1025)) if operator in ROW_CHECKS else ((5, 105), (3, 3075), (3, 16389))
    for shape in shapes:
        CHECKS[operator](Kernels(build=program, max_blocks=2), *shape, dtype)


def _rows(operator: str, k: Kernels, dtype: torch.dtype) -> None:
    # every regime and its edges; more rows than the blocks of a small grid take at once
    for rows, classes in ((17, 1), (40, 2), (35, 10), (35, 32), (9, 33), (9, 256), (9, 257), (5, 1024), (3, 1025)):
        for kind in KINDS:
            CHECKS[operator](k, rows, classes, dtype, kind)


def _images(operator: str, k: Kernels, dtype: torch.dtype) -> None:
    # packs, tails, more than a block, both sizes of a block; with and without alignment
    for samples, size in ((1, 1), (3, 7), (5, 105), (3, 1025), (3, 3075), (3, 16384), (3, 16389)):
        CHECKS[operator](k, samples, size, dtype)
    shifted = Kernels(shift=1, **k.options)
    CHECKS[operator](shifted, 3, 1025, dtype)


# ---- what each operator does at its edges ----------------------------------------------------------------------------


def _entropy_kl(k: Kernels, dtype: torch.dtype) -> None:
    for classes in (10, 1025):
        clean, adv = logits(5, classes, dtype, 1), logits(5, classes, dtype, 2)
        near = clean + normal(clean.shape, dtype, 3, 1e-3)
        assert (k.entropy_kl(clean, near)[1] >= 0).all()
        clean[1, 0], adv[2, 1], adv[3, 0], clean[4], clean[4, 0] = NAN, NAN, -INF, -INF, 0
        entropy, kl, _ = forward = k.entropy_kl(clean, adv)
        assert torch.isnan(entropy).tolist() == [False, True, False, False, False]
        assert torch.isnan(kl).tolist() == [False, True, True, False, False]
        assert kl[3] == INF
        assert entropy[4] == 0
        ones = torch.ones_like(entropy)
        d_clean, d_adv = k.entropy_kl_backward(ones, ones, clean, adv, *forward)
        assert d_clean.isnan().all(1).tolist() == [False, True, True, False, False]
        assert d_adv.isnan().any(1).tolist() == [False, True, True, False, False]
        # the entropy's gradient alone knows nothing of the adversarial row
        d_clean, _ = k.entropy_kl_backward(ones, None, clean, adv, *forward)
        assert d_clean.isnan().all(1).tolist() == [False, True, False, False, False]


def _logit_grad(k: Kernels, dtype: torch.dtype) -> None:
    for classes in (10, 1025):
        z, y = logits(5, classes, dtype, 1), labels(5, classes)
        expected = k.logit_grad_ce(z, y)
        wrong = torch.tensor([-1, classes, 2**40])
        actual = k.logit_grad_ce(z, torch.cat((wrong, y[3:])))
        assert actual[:3].isnan().all()
        assert_same_bits(actual[3:], expected[3:])
        z[1, 0], z[2, classes - 1] = NAN, INF
        assert k.logit_grad_ce(z, y).isnan().all(1).tolist() == [False, True, True, False, False]


def _robust_loss(k: Kernels, dtype: torch.dtype) -> None:
    for classes in (10, 1025):
        z, y = logits(5, classes, dtype, 1), labels(5, classes)
        _labels_out_of_range(k, z, y)
        # of equals the first is boosted, wherever the label is
        flat, y = torch.zeros(5, classes, dtype=dtype), torch.tensor([0, 1, 2, classes - 2, classes - 1])
        check_loss(k, "equal classes", BCE, flat, flat, y)
        _impossible_classes(k, classes, dtype)
        # a weight at its bound, and beyond it: what flows to the sensitivity
        zero = torch.zeros(5, dtype=row_dtype(dtype))
        for bounds, flows in (((2.0, 2.0), 1.0), ((2.5, 3.0), 0.0), ((1.0, 1.5), 0.0)):
            results = k.trades_loss(z, flat, zero, y, 2.0, 0.0, 0.25, *bounds, False)
            assert_same_bits(results[-1], 0.25 * flows * results[2])
        # none is 0, whatever it is weighted with
        given, none = (k.trades_loss(z, flat, s, y, 2.0, 0.0, 0.25, -INF, INF, False) for s in (zero, None))
        for actual, expected in zip(none[:-1], given[:-1], strict=True):
            assert_same_bits(actual, expected)


def _labels_out_of_range(k: Kernels, z: Tensor, y: Tensor) -> None:
    free = (6.0, 0.0, 0.0, -INF, INF, False)

    def results(y: Tensor) -> tuple[Tensor, ...]:
        return *k.ce_loss(z, y), *k.trades_loss(z, z, None, y, *free)[:-1], *k.mart_loss(z, z, y, 6.0)

    wrong = torch.cat((torch.tensor([-1, z.shape[1], 2**40]), y[3:]))
    for actual, expected in zip(results(wrong), results(y), strict=True):
        assert actual[:3].isnan().all()
        assert_same_bits(actual[3:], expected[3:])


def _impossible_classes(k: Kernels, classes: int, dtype: torch.dtype) -> None:
    """An impossible label, alone or not; only the label is possible; NaN; no class; a class of three."""
    z = torch.full((6, classes), -INF, dtype=dtype)
    z[0, 1:3], z[1, 1], z[2, 0], z[3], z[3, 1], z[5, :2], z[5, 2] = 0, 0, 0, 1, NAN, 0, -INF
    y, target = torch.zeros(6, dtype=torch.int64), torch.zeros(classes, dtype=dtype)
    target[:2] = torch.tensor([-1.0, 1.0])
    margin = np.array([0.5, 1, -1, NAN, NAN, 0])
    for slack, second in ((0.0, 0.5), (0.25, 0.75)):
        loss, bce, kl, weight, found, d_clean, d_adv = k.mart_loss(z, z, y, 6.0, slack)
        expected = np.array([INF, INF, -np.log1p(slack), NAN, NAN, -np.log(0.5) - np.log(second)])
        assert_within(loss, expected, rounding(dtype), "impossible classes")
        assert torch.equal(loss.nan_to_num(7.0), bce.nan_to_num(7.0))
        assert_within(weight, np.array([1, 1, 0, NAN, NAN, 0.5]), rounding(dtype), "weight")
        assert_within(found, margin, rounding(dtype), "margin")
        assert kl.nan_to_num(7.0).tolist() == [0, 0, 0, 7, 7, 0]
        for grad in (d_clean, d_adv):
            assert grad.isnan().all(1).tolist() == [False, False, False, True, True, False]
            assert not grad[2].any()
        assert_within(d_adv[1], target.double().numpy(), 0, "only a wrong class is possible")
    ce = np.array([INF, INF, 0, NAN, NAN, np.log(2)])
    for loss, *_, found, grad in (k.ce_loss(z, y), k.trades_loss(z, z, None, y, 6.0, 0.0, 0.0, -INF, INF, False)[:7]):
        assert_within(loss, ce, rounding(dtype), "impossible classes")
        assert_within(found, margin, rounding(dtype), "margin")
        assert grad.isnan().all(1).tolist() == [False, False, False, True, True, False]
    # infinitely far away; with one NaN the other row keeps what is its own
    far = torch.zeros(2, classes, dtype=dtype)
    near = far.clone()
    far[0, 1], far[1, 2] = -INF, NAN
    _, ce, kl, entropy, *_ = k.trades_loss(near, far, None, y[:2], 6.0, 0.0, 0.0, -INF, INF, False)
    assert kl[0] == INF
    assert kl[1].isnan()
    assert_within(torch.stack((ce, entropy)), np.full((2, 2), np.log(classes)), 1e-5, "of the clean row alone")


def _pgd_step(k: Kernels, dtype: torch.dtype) -> None:
    info = torch.finfo(row_dtype(dtype))
    values = [NAN, INF, -INF, 0.0, -0.0, 1.0, -0.5, 2e-3, torch.finfo(dtype).max]
    adv, grad, clean = (x.flatten() for x in torch.meshgrid(*[torch.tensor(values, dtype=dtype)] * 3, indexing="ij"))
    for box in ((0.0, 1.0), (-INF, INF)):
        actual = k.pgd_step(adv, grad, clean, STEP, EPSILON, *box, "linf")
        expected = ops.pgd_step_(adv.clone(), grad, clean, STEP, EPSILON, *box)
        assert_same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0), "Linf")
    # no gradient; one too small to be divided by; neither gradient nor distance; a NaN in each of the inputs
    adv, grad, clean = (x.clone() for x in image(7, 105, dtype))
    grad[:3] = adv[1] = clean[1] = 0
    grad[1, 7] = info.smallest_normal * info.eps
    adv[2] = clean[2]
    grad[3, 7] = adv[4, 7] = clean[5, 7] = NAN
    for epsilon in (EPSILON, INF):
        actual = k.pgd_step(adv, grad, clean, STEP, epsilon, -INF, INF, "l2")
        expected = adv.clone()
        ops.reference.pgd_step_(expected, grad, clean, STEP, epsilon, -INF, INF, "l2")
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
        for step in (0.0, STEP):
            unmoved = k.pgd_step(adv, grad, clean, step, epsilon, -INF, INF, "l2")[1:3]
            assert_same_bits(unmoved, adv[1:3], "nowhere to go")


def _sample_stats(k: Kernels, dtype: torch.dtype) -> None:
    adv, grad, clean = (x.clone() for x in image(4, 1025, dtype))
    grad[0], grad[1], grad[2, 1024], grad[3, 0] = 1e-30, 1e30, NAN, NAN
    actual = k.sample_stats(grad, adv, clean, EPSILON)
    expected = ops.reference.sample_stats(grad, adv, clean, EPSILON, 0.0, 1.0)
    for x, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, value, rtol=1e-5, atol=0, equal_nan=True)


def _lambda_x(k: Kernels, dtype: torch.dtype) -> None:
    for classes in (1, 2, 256, 257, 1025):
        for kind in KINDS:
            lambda_x(k, 3, 105, dtype, classes, kind)
    z, grad = logits(4, 10, dtype, 1), normal((4, 105), dtype, 2)
    z[1, 9], grad[2, 104] = NAN, NAN
    z[3], z[3, 0] = -INF, 0
    value, entropy, sensitivity = k.lambda_x(z, grad, 0.75, 0.3, 0.125, 2.5, 4.0)
    assert value.isnan().tolist() == [False, True, True, False]
    assert entropy.isnan().tolist() == [False, True, False, False]
    assert sensitivity.isnan().tolist() == [False, False, True, False]
    assert entropy[3] == 0


def _random_start(k: Kernels, dtype: torch.dtype) -> None:
    """index and key are 64 bits wide; the noise of each sample is its own."""
    clean, index = torch.full((3, 100), 0.5, dtype=dtype), torch.tensor([0, 1 << 32, 1])
    for kind in START_KINDS:
        starts = [k.random_start(clean, index, kind, 0.25, key) for key in (KEY, KEY ^ 1, KEY ^ 1 << 40)]
        assert len({tuple(x) for x in torch.cat(starts).tolist()}) == 9
    # the direction that a pair of normals points in is its angle to the last digits
    clean = torch.zeros(1, 2048, dtype=dtype)
    pairs = wide(k.random_start(clean, index[:1], "gaussian", 1.0, KEY)).reshape(-1, 2)
    direction = pairs / np.hypot(*pairs.T)[:, None]
    assert np.abs(direction - _directions()).max() < 1.5 * torch.finfo(dtype).eps


@cache
def _directions() -> np.ndarray:
    """Of the 1024 pairs of sample 0."""
    turn = (words(0, 2048, 0, KEY)[1::2] >> np.uint64(8)) * np.longdouble(2) ** -24
    angle = 2 * np.longdouble("3.14159265358979323846264338327950288") * turn
    return np.stack((np.cos(angle), np.sin(angle)), 1)


EDGES = {
    "entropy_kl": _entropy_kl,
    "logit_grad": _logit_grad,
    "robust_loss": _robust_loss,
    "pgd_step": _pgd_step,
    "sample_stats": _sample_stats,
    "lambda_x": _lambda_x,
    "random_start": _random_start,
}
