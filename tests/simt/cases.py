"""What each kernel is held to: inputs, launches, the operator's oracle.

    CHECKS["entropy_kl"](Kernels(), rows, classes, dtype, kind)
    CHECKS["sample_stats"](Kernels(), samples, size, dtype)

A check asserts that the results are right and returns all of them, for comparisons bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from helpers import F32, F64, assert_same_bits, assert_within, normal, row_dtype, uniform
from kernels import START_KINDS, Kernels
from test_entropy_kl import Oracle as EntropyKLOracle
from test_entropy_kl import weights
from test_lambda_x import oracle as lambda_x_oracle
from test_logit_grad import oracle_ce, oracle_kl
from test_pgd_step import l2_oracle
from test_random_start import oracle as random_start_oracle
from test_robust_loss import VARIANTS, Variant
from test_sample_stats import oracle as sample_stats_oracle
from torch import Tensor

from dtrades_fast import ops

# Class counts around every change of regime, and of what a lane holds: 8 lanes for a row up to 32 classes, a warp up to
# 256 and 1024 (8 and 32 items a lane), above that a block of 256.
CLASSES = (1, 2, 8, 9, 10, 31, 32, 33, 255, 256, 257, 1000, 1023, 1024, 1025, 3000)
# One in each regime, not a multiple of its lanes.
CLASS_REGIMES = (10, 33, 1000, 1025)
KINDS = ("normal", "large", "holes")

# Around a pack of 16 bytes, around a block of 256 threads and what it reads as packs, around the change to a block of
# 1024 threads.
SIZES = (1, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 16384, 16385)
# The last sample whose L2 step is kept in shared memory, 47 KiB of floats or doubles, and the first that is not.
KEPT_SIZES = (12032, 12033, 6016, 6017)
# With a tail after the packs of every dtype: less than a block, kept in shared memory, too large for that, a block of
# 1024 threads.
SIZE_REGIMES = (105, 3075, 12045, 16389)

EPSILON, STEP = 8 / 255, 2 / 255
KEY = 0x1234_5678_9ABC_DEF0


def logits(rows: int, classes: int, dtype: torch.dtype, seed: int, kind: str = "normal") -> Tensor:
    """normal; +-1e4 apart; or with -inf in some places, the same for every seed, but never for class 0."""
    z = normal((rows, classes), dtype, seed, 3.0)
    if kind == "large":
        return z + 1e4 * normal((rows, classes), F32, 5).sign().to(dtype)
    if kind == "holes":
        z[:, 1:][uniform((rows, classes), F32, 6)[:, 1:] < 0.3] = -torch.inf
    return z


def labels(rows: int, classes: int) -> Tensor:
    return torch.arange(rows) * 7 % classes


@cache
def image(samples: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x' around the edge of the ball, g with some zeros, x"""
    clean = uniform((samples, size), F64, 1)
    adv = clean + 1.5 * EPSILON * (2 * uniform((samples, size), F64, 2) - 1)
    grad = normal((samples, size), F64, 3)
    grad[uniform((samples, size), F64, 4) < 0.1] = 0
    return adv.to(dtype), grad.to(dtype), clean.to(dtype)


# ---- rows of logits ------------------------------------------------------------------------------------------------


def entropy_kl(k: Kernels, rows: int, classes: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, ...]:
    clean, adv = logits(rows, classes, dtype, 1, kind), logits(rows, classes, dtype, 2, kind)
    if kind == "large":
        adv[::2] = -adv[::2]  # the most probable class of the one is impossible in the other
    oracle, g = EntropyKLOracle(clean, adv), weights(rows, dtype)
    forward = entropy, kl, normalisers = k.entropy_kl(clean, adv)
    assert_within(entropy, oracle.entropy, oracle.entropy_tolerance, "entropy")
    assert_within(kl, oracle.kl, oracle.kl_tolerance, "kl")
    for i, (z, p) in enumerate(((clean, oracle.p), (adv, oracle.q))):
        assert_same_bits(normalisers[:, 2 * i], z.amax(1).to(row_dtype(dtype)), "maximum")
        assert_within(normalisers[:, 2 * i + 1], p.log_sum[:, 0], oracle.unit * (1 + p.log_sum[:, 0]), "log-sum")

    gradients = []
    for use_entropy, use_kl in ((True, True), (True, False), (False, True)):
        given = (g[0] if use_entropy else None, g[1] if use_kl else None)
        with np.errstate(invalid="ignore"):
            expected = oracle.gradients(*(torch.zeros(rows) if x is None else x for x in given))
        gradients += k.entropy_kl_backward(*given, clean, adv, *forward)
        for name, x, (value, tolerance) in zip(("clean", "adv"), gradients[-2:], expected, strict=True):
            impossible = (oracle.p.p == 0) & np.isnan(value)  # 0 times infinity in the textbook expression
            value, tolerance = (np.where(impossible, 0, v) for v in (value, tolerance))
            assert_within(x, value, tolerance, f"d/d{name}, {use_entropy=}, {use_kl=}")
    return (*forward, *gradients)


def logit_grad(k: Kernels, rows: int, classes: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, ...]:
    adv, y = logits(rows, classes, dtype, 1, kind), labels(rows, classes)
    log_p = logits(rows, classes, F64, 2, kind).log_softmax(-1).to(dtype)
    kl, ce = k.logit_grad_kl(adv, log_p), k.logit_grad_ce(adv, y)
    assert_within(kl, *oracle_kl(adv, log_p), "kl")
    assert_within(ce, *oracle_ce(adv, y), "ce")
    return kl, ce


def robust_loss(k: Kernels, rows: int, classes: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, ...]:
    clean, adv = logits(rows, classes, dtype, 1, kind), logits(rows, classes, dtype, 2, kind)
    if kind == "large":
        adv[::2] = -adv[::2]
    y = labels(rows, classes)
    y[clean[torch.arange(rows), y].isinf()] = 0
    sensitivity = 3 * uniform((rows,), row_dtype(dtype), 4)
    results: list[Tensor] = []
    for name, variant in VARIANTS.items():
        inputs = (clean, adv, None if name == "trades" else sensitivity)[: variant.count]
        results += check_loss(k, name, variant, *inputs, y)
    return tuple(results)


def check_loss(k: Kernels, name: str, variant: Variant, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Results and gradients within their tolerance of the oracle, whose sums take no infinity; exp(-3e4) is 0."""
    results = getattr(k, variant.operator)(*inputs, *variant.arguments)
    oracle = variant.expected(*(x.clamp(min=-3e4) if x is not None and x.is_floating_point() else x for x in inputs))
    expected = [*oracle.values().items()]
    expected += [(f"gradient {i}", pair) for i, pair in enumerate(oracle.gradients(torch.ones(len(inputs[-1]))))]
    for x, (what, (value, tolerance)) in zip(results, expected, strict=True):
        assert_within(x, value, tolerance, f"{name}, {what}")
    return results


# ---- images --------------------------------------------------------------------------------------------------------


def pgd_step(k: Kernels, samples: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    adv, grad, clean = image(samples, size, dtype)
    radius = EPSILON * size**0.5 * 0.8  # some samples leave this ball, others do not
    results = []
    for box in ((0.0, 1.0), (-torch.inf, torch.inf)):
        linf = k.pgd_step(adv, grad, clean, STEP, EPSILON, *box, "linf")
        l2 = k.pgd_step(adv, grad, clean, STEP, radius, *box, "l2")
        assert_same_bits(linf, ops.pgd_step_(adv.clone(), grad, clean, STEP, EPSILON, *box), "Linf")
        assert_within(l2, *l2_oracle(adv, grad, clean, STEP, radius, *box), "L2")
        results += [linf, l2]
    return tuple(results)


def sample_stats(k: Kernels, samples: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    adv, grad, clean = image(samples, size, dtype)
    results = k.sample_stats(grad, adv, clean, EPSILON)
    expected = sample_stats_oracle(grad, adv, clean, EPSILON)
    for name, x, value, tolerance in zip(ops.SampleStats._fields, results, *expected, strict=True):
        assert_within(x, value, tolerance, name)
    return results


def lambda_x(
    k: Kernels, samples: int, size: int, dtype: torch.dtype, classes: int = 10, kind: str = "normal"
) -> tuple[Tensor, ...]:
    z, grad = logits(samples, classes, dtype, 1, kind), normal((samples, size), dtype, 2)
    results: list[Tensor] = []
    for settings in ((0.75, -0.3, 0.125, -torch.inf, torch.inf), (0.75, 0.3, 0.125, 2.5, 4.0)):
        part = k.lambda_x(z, grad, *settings)
        for name, x, value, tolerance in zip(
            ops.LambdaX._fields, part, *lambda_x_oracle(z, grad, *settings), strict=True
        ):
            assert_within(x, value, tolerance, name)
        results += part
    return tuple(results)


def random_start(k: Kernels, samples: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    clean, index, expected, linf = _random_start_oracle(samples, size, dtype)
    results = tuple(k.random_start(clean, index, kind, EPSILON, KEY) for kind in START_KINDS)
    for kind, start, (value, tolerance) in zip(START_KINDS, results, expected, strict=True):
        assert_within(start, value, tolerance, kind)
    assert_same_bits(results[0], linf, "Linf")
    return results


@cache  # a few thousand Philox blocks on Python integers
def _random_start_oracle(samples: int, size: int, dtype: torch.dtype) -> tuple:
    """x, index; the oracle for each kind; and the bits of the Linf start, from x + radius u in two roundings."""
    clean, index = uniform((samples, size), dtype, 1), torch.arange(samples) * 3 + (1 << 33)
    expected = [random_start_oracle(clean, index, kind, EPSILON, KEY) for kind in START_KINDS]
    return clean, index, expected, ops.reference.random_start(clean, index, "linf", EPSILON, 0.0, 1.0, KEY)


Check = Callable[..., tuple[Tensor, ...]]
ROW_CHECKS: dict[str, Check] = {"entropy_kl": entropy_kl, "logit_grad": logit_grad, "robust_loss": robust_loss}
IMAGE_CHECKS: dict[str, Check] = {
    "pgd_step": pgd_step,
    "sample_stats": sample_stats,
    "lambda_x": lambda_x,
    "random_start": random_start,
}
CHECKS = ROW_CHECKS | IMAGE_CHECKS
