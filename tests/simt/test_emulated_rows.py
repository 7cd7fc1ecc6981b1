"""Kernels over rows of logits: every launch regime and its edges, extreme logits, independence of the launch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import CLASS_REGIMES, CLASSES, KINDS, ROW_CHECKS, logits
from cases import labels as labels_for
from emulator import SCHEDULES
from helpers import (
    BATCH,
    BF16,
    F32,
    INF,
    NAN,
    assert_rows_independent,
    assert_same_bits,
    assert_within,
    each_dtype,
    rounding,
    uniform,
)
from kernels import Kernels
from test_robust_loss import VARIANTS

each_operator = pytest.mark.parametrize("operator", ROW_CHECKS)
each_regime = pytest.mark.parametrize("classes", CLASS_REGIMES)

# A launch's own choices, which must not show in the results: the order of threads, a grid smaller than the batch,
# pointers that are no multiple of 16 bytes.
ORDERS = [{"schedule": schedule, "seed": seed} for seed, schedule in enumerate(SCHEDULES)]
LAUNCHES = [order | {"max_blocks": blocks} for order in ORDERS for blocks in (1, 2, 3)]
SHIFTS = (0, 1, 3)


def rows_for(classes: int) -> int:
    """A whole block and a row: 16 rows share one up to 32 classes, 4 up to 1024."""
    return 17 if classes <= 32 else 5 if classes <= 1024 else 3


@each_dtype
@each_operator
@pytest.mark.parametrize("classes", CLASSES)
def test_matches_oracle(operator, classes, dtype):
    for kind in KINDS:
        ROW_CHECKS[operator](Kernels(), rows_for(classes), classes, dtype, kind)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_operator
@each_regime
def test_launch_does_not_show(operator, classes, dtype):
    """The same bits on repetition, in every order of threads, for every grid and alignment."""
    check = ROW_CHECKS[operator]
    rows = 3 * rows_for(classes)
    expected = check(Kernels(), rows, classes, dtype)
    assert_same_bits(check(Kernels(), rows, classes, dtype), expected, "repetition")
    for launch, shift in zip(LAUNCHES, itertools.cycle(SHIFTS), strict=False):
        assert_same_bits(check(Kernels(shift=shift, **launch), rows, classes, dtype), expected, f"{launch}, {shift=}")


@each_dtype
@each_regime
def test_row_alone_has_the_bits_of_the_batch(classes, dtype):
    k, y = Kernels(), labels_for(BATCH, classes)
    clean, adv = (logits(BATCH, classes, dtype, seed) for seed in (1, 2))
    forward = k.entropy_kl(clean, adv)
    assert_rows_independent(k.entropy_kl, clean, adv)
    assert_rows_independent(k.entropy_kl_backward, *forward[:2], clean, adv, *forward)
    assert_rows_independent(k.logit_grad_kl, adv, clean)
    assert_rows_independent(k.logit_grad_ce, adv, y)
    sensitivity = 3 * uniform((BATCH,), forward[0].dtype, 4)
    for variant in VARIANTS.values():
        inputs = (clean, adv, sensitivity)[: variant.count]
        assert_rows_independent(lambda *x, v=variant: getattr(k, v.operator)(*x, *v.arguments), *inputs, y)


@each_operator
def test_no_rows(operator):
    assert all(x.numel() == 0 for x in ROW_CHECKS[operator](Kernels(), 0, 10, F32))


@each_dtype
@each_regime
@pytest.mark.parametrize("at", [0, -1], ids=["first class", "last class"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_in_its_row(value, at, classes, dtype):
    """A NaN or +inf makes all results of its row NaN and changes no bit of the others."""
    k, y = Kernels(), labels_for(BATCH, classes)
    clean, adv = (logits(BATCH, classes, dtype, seed) for seed in (1, 2))
    spoiled, row = adv.clone(), 17
    spoiled[row, at] = value

    def results(adv):
        forward = k.entropy_kl(adv, clean)
        ones = torch.ones_like(forward[0])
        backward = k.entropy_kl_backward(ones, ones, adv, clean, *forward)
        losses = (*k.ce_loss(adv, y), *k.mart_loss(clean, adv, y, 6.0)[:3])
        return (*forward[:2], backward[0], k.logit_grad_kl(adv, clean), k.logit_grad_ce(adv, y), *losses)

    others = torch.arange(BATCH) != row
    for name, x, expected in zip(
        ("entropy", "kl", "backward", "logit_grad_kl", "logit_grad_ce", "ce", "margin", "ce grad", "mart", "bce", "kl"),
        results(spoiled),
        results(adv),
        strict=True,
    ):
        assert x[row].isnan().all(), name
        assert_same_bits(x[others], expected[others], name)


@each_dtype
@each_regime
def test_impossible_classes(classes, dtype):
    """p > 0 against p' = 0 is infinitely far away, p_y = 0 too; p = 0 counts nothing; no class at all is NaN."""
    two, three, none = (torch.full((1, classes), -INF, dtype=dtype) for _ in range(3))
    two[0, [0, classes - 1]] = 0
    three[0, [0, 1, classes - 1]] = 0
    rows = ((two, three), (three, two), (none, two), (two, none))
    entropy, kl, _ = Kernels().entropy_kl(*(torch.cat(side) for side in zip(*rows, strict=True)))
    assert_within(entropy, np.log(np.array([2, 3, NAN, 2], np.longdouble)), rounding(dtype), "entropy")
    assert_within(kl, np.array([np.log(np.longdouble(1.5)), INF, NAN, NAN]), rounding(dtype), "kl")
    loss, bce, *_ = Kernels().mart_loss(three, two, torch.tensor([1]), 6.0)
    assert loss.item() == bce.item() == INF
    assert Kernels().ce_loss(two, torch.tensor([1]))[0].item() == INF


@each_dtype
@each_regime
@pytest.mark.parametrize("label", [-1, 10**6, -(2**40)])
def test_label_out_of_range_makes_the_row_nan(label, classes, dtype):
    z, y, row = logits(BATCH, classes, dtype, 1), labels_for(BATCH, classes), 20
    wrong = y.clone()
    wrong[row] = label
    others = torch.arange(BATCH) != row
    k, none = Kernels(), (6.0, 0.0, 0.0, -INF, INF, False)
    for function in (
        lambda y: (k.logit_grad_ce(z, y),),
        lambda y: k.ce_loss(z, y),
        lambda y: k.trades_loss(z, z, None, y, *none)[:-1],
        lambda y: k.mart_loss(z, z, y, 6.0),
    ):
        for x, expected in zip(function(wrong), function(y), strict=True):
            assert x[row].isnan().all()
            assert_same_bits(x[others], expected[others])
