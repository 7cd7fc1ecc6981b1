"""d KL / d z' = softmax(z') - p and d CE / d z = softmax(z) - onehot(y)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    CLASSES,
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
    rows_grid,
    wide,
)

from dtrades_fast.ops import logit_grad_ce, logit_grad_kl, reference


def make(shape, dtype, scale=3.0):
    """z', log p, y"""
    log_p = normal(shape, F64, 2, scale).log_softmax(-1).to(dtype)
    labels = torch.arange(shape[0]) * 7 % shape[1]
    return normal(shape, dtype, 1, scale), log_p, labels


def oracle_kl(adv, log_p):
    q, log_p = Softmax(adv), wide(log_p)
    p = np.exp(log_p)
    unit = rounding(adv.dtype, adv.shape[1])
    return q.p - p, unit * (q.p * q.condition + p * (1 + np.where(p == 0, 0, np.abs(log_p))))


def oracle_ce(logits, labels):
    q = Softmax(logits)
    expected = q.p - np.eye(logits.shape[1], dtype=np.longdouble)[labels.numpy()]
    return expected, rounding(logits.dtype, logits.shape[1]) * (q.p * q.condition + np.abs(expected))


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@rows_grid
def test_matches_oracle(shape, dtype):
    adv, log_p, labels = make(shape, dtype)
    kl, ce = logit_grad_kl(adv, log_p), logit_grad_ce(adv, labels)
    assert kl.dtype == ce.dtype == dtype
    assert_within(kl, *oracle_kl(adv, log_p), "kl")
    assert_within(ce, *oracle_ce(adv, labels), "ce")


@needs_kernel
@each_dtype
@rows_grid
def test_twin_agrees(shape, dtype):
    adv, log_p, labels = make(shape, dtype)
    assert_within(reference.logit_grad_kl(adv, log_p), *oracle_kl(adv, log_p), "kl")
    assert_within(reference.logit_grad_ce(adv, labels), *oracle_ce(adv, labels), "ce")


@each_dtype
@pytest.mark.parametrize("classes", [10, 130])
def test_large_logits(classes, dtype):
    adv, log_p, labels = make((BATCH, classes), dtype)
    adv = adv + 1e4 * ((normal((BATCH, classes), F32, 5) > 0).to(dtype) * 2 - 1)
    assert_within(logit_grad_kl(adv, log_p), *oracle_kl(adv, log_p), "kl")
    assert_within(logit_grad_ce(adv, labels), *oracle_ce(adv, labels), "ce")


@pytest.mark.parametrize("classes", [10, 130])
def test_half_precision_does_not_overflow(classes):
    top = torch.finfo(F16).max
    logits = torch.full((1, classes), -top, dtype=F16)
    logits[0, 0] = top
    one_hot = torch.nn.functional.one_hot(torch.tensor([1]), classes)
    assert torch.equal(logit_grad_ce(logits, torch.tensor([1])), torch.eye(classes, dtype=F16)[:1] - one_hot)
    log_p = torch.full((1, classes), -INF, dtype=F16)
    log_p[0, 1] = 0
    assert torch.equal(logit_grad_kl(logits, log_p), torch.eye(classes, dtype=F16)[:1] - one_hot)


@each_dtype
@pytest.mark.parametrize("classes", [4, 128, 129])
@pytest.mark.parametrize(
    ("row", "softmax"),
    [
        pytest.param([0, 0, -INF], [0.5, 0.5, 0], id="-inf is probability 0"),
        pytest.param([-INF] * 3, [NAN] * 3, id="no class"),
        pytest.param([INF, 0, 0], [NAN, 0, 0], id="+inf"),
        pytest.param([NAN, 0, 0], [NAN] * 3, id="NaN first"),
        pytest.param([0, 0, NAN], [NAN] * 3, id="NaN last"),
    ],
)
def test_special_values(row, softmax, classes, dtype):
    pad = classes - 3
    logits = torch.tensor([row + [-INF] * pad], dtype=dtype)
    rest = 0 if softmax[1] == softmax[1] else NAN
    if row[0] == INF:  # inf - inf is NaN: so is the sum, and with it the row
        softmax, rest = [NAN] * 3, NAN
    expected = np.array([softmax + [rest] * pad], np.longdouble)
    unit = rounding(dtype)
    log_p = torch.full((1, classes), -INF, dtype=dtype)
    log_p[0, 0] = 0
    target = np.eye(classes, dtype=np.longdouble)[:1]
    assert_within(logit_grad_kl(logits, log_p), expected - target, unit, "kl")
    assert_within(logit_grad_ce(logits, torch.tensor([0])), expected - target, unit, "ce")


@each_dtype
@pytest.mark.parametrize("classes", [10, 128, 129])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_in_its_row(value, classes, dtype):
    adv, log_p, labels = make((BATCH, classes), dtype)
    spoiled = adv.clone()
    spoiled[16, classes - 1] = value
    others = torch.arange(BATCH) != 16
    for call, other in ((logit_grad_kl, log_p), (logit_grad_ce, labels)):
        actual = call(spoiled, other)
        assert actual[16].isnan().all()
        assert_same_bits(actual[others], call(adv, other)[others])
    log_p[16, 0] = NAN
    actual = logit_grad_kl(adv, log_p)
    assert actual.isnan().sum() == 1
    assert actual[16, 0].isnan()


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_sum_to_zero(classes, dtype):
    adv, log_p, labels = make((BATCH, classes), dtype)
    info = torch.finfo(dtype)
    for call, other, oracle in ((logit_grad_kl, log_p, oracle_kl), (logit_grad_ce, labels, oracle_ce)):
        expected, tolerance = oracle(adv, other)
        grad = wide(call(adv, other))
        stored = info.eps / 2 * np.abs(grad).sum(1) + classes * info.smallest_normal * info.eps
        assert (np.abs(grad.sum(1) - expected.sum(1)) <= tolerance.sum(1) + stored).all()
        if call is logit_grad_ce:
            assert (np.abs(expected.sum(1)) < 1e-12).all()


@pytest.mark.parametrize("classes", CLASSES)
def test_shift_invariance_is_exact(classes):
    adv, log_p, labels = make((BATCH, classes), F32)
    adv = (adv * 256).round() / 256
    assert_same_bits(logit_grad_kl(adv + 64, log_p), logit_grad_kl(adv, log_p))
    assert_same_bits(logit_grad_ce(adv - 32, labels), logit_grad_ce(adv, labels))


@each_dtype
@pytest.mark.parametrize("classes", [10, 129])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
def test_wrong_label_that_cannot_be_seen_gives_nan(implementation, classes, dtype):
    """Where the public function cannot look at the labels (CUDA, compiled code, vmap) a wrong one shows."""
    call = torch.ops.dtrades_fast.logit_grad_ce if implementation == "kernel" else reference.logit_grad_ce
    adv, _, labels = make((BATCH, classes), dtype)
    wrong = labels.clone()
    wrong[3], wrong[16], wrong[34] = -1, classes, 2**40
    actual = call(adv, wrong)
    bad = torch.zeros(BATCH, dtype=torch.bool)
    bad[[3, 16, 34]] = True
    assert actual[bad].isnan().all()
    assert_same_bits(actual[~bad], call(adv, labels)[~bad])


# ---- rows, layouts, threads ------------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_row_alone_has_the_bits_of_the_batch(classes, dtype):
    adv, log_p, labels = make((BATCH, classes), dtype)
    assert_rows_independent(logit_grad_kl, adv, log_p)
    assert_rows_independent(logit_grad_ce, adv, labels)


@needs_kernel
@each_dtype
@pytest.mark.parametrize("shape", [(8192, 10), (200, 1000)], ids=str)
def test_deterministic(shape, dtype):
    adv, log_p, labels = make(shape, dtype)
    assert_deterministic(lambda: logit_grad_kl(adv, log_p))
    assert_deterministic(lambda: logit_grad_ce(adv, labels))


@each_dtype
@pytest.mark.parametrize("classes", [7, 129])
def test_any_layout(classes, dtype):
    adv, log_p, labels = make((19, classes), dtype)
    kl, ce = logit_grad_kl(adv, log_p), logit_grad_ce(adv, labels)
    others = layouts(log_p)
    for name, x in layouts(adv).items():
        assert_same_bits(logit_grad_kl(x, log_p), kl, name)
        assert_same_bits(logit_grad_kl(x, others[name]), kl, name)
        assert_same_bits(logit_grad_ce(x, labels), ce, name)
    assert_same_bits(logit_grad_ce(adv, labels.repeat_interleave(2)[::2]), ce, "strided labels")


# ---- derivatives, compilation, transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 7, 129])
def test_gradcheck(classes):
    adv, log_p, labels = make((2, classes), F64, 1.0)
    adv.requires_grad_(), log_p.requires_grad_()
    fast = classes > 7
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(logit_grad_kl, (adv, log_p), fast_mode=fast)
        assert check(lambda z: logit_grad_ce(z, labels), (adv,), fast_mode=fast)


@each_dtype
def test_backward_rounds_once(dtype):
    """d/dz' of sum g (softmax(z') - p) is p' (g - sum p' g), d/d log p is -g p: computed wide, stored once."""
    adv, log_p, labels = make((BATCH, 10), dtype)
    weight = normal((BATCH, 10), dtype, 9)
    q, g, p = Softmax(adv), wide(weight), np.exp(wide(log_p))
    mean = (q.p * g).sum(1, keepdims=True)
    unit = rounding(dtype, 10)
    d_adv, d_log_p = q.p * (g - mean), -g * p
    spread = q.p * q.condition * (np.abs(g) + (q.p * q.condition * np.abs(g)).sum(1, keepdims=True))
    adv.requires_grad_(), log_p.requires_grad_()
    actual = torch.autograd.grad(logit_grad_kl(adv, log_p), (adv, log_p), weight)
    assert_within(actual[0], d_adv, unit * spread, "d/dz'")
    assert_within(actual[1], d_log_p, unit * np.abs(d_log_p) * (1 + np.abs(wide(log_p))), "d/d log p")
    assert_within(torch.autograd.grad(logit_grad_ce(adv, labels), adv, weight)[0], d_adv, unit * spread, "ce")


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 10), (3, 10), (18, 129)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, layout, dtype):
    adv, log_p, labels = make(shape, dtype)
    if layout == "transposed":
        adv, log_p = (x.t().contiguous().t() for x in (adv, log_p))
    torch.library.opcheck(torch.ops.dtrades_fast.logit_grad_kl.default, (adv, log_p))
    torch.library.opcheck(torch.ops.dtrades_fast.logit_grad_ce.default, (adv, labels))


def test_compile():
    adv, log_p, labels = make((BATCH, 10), F64)
    assert_compiles(logit_grad_kl, adv, log_p)
    assert_compiles(logit_grad_ce, adv, labels)


def test_func_transforms():
    adv, log_p = (x.unflatten(0, (4, 3)) for x in make((12, 10), F64)[:2])
    labels = torch.arange(12).view(4, 3) % 10
    assert_vmaps(logit_grad_kl, adv, log_p)
    assert_vmaps(logit_grad_kl, adv.movedim(0, 2), log_p[1], in_dims=(2, None))
    assert_vmaps(logit_grad_ce, adv, labels)
    assert_vmaps(logit_grad_ce, adv, labels[1], in_dims=(0, None))
    assert_vmaps(logit_grad_ce, adv[1], labels, in_dims=(None, 0))
    assert_transforms(lambda z, w: (logit_grad_kl(z, w) ** 2).sum(), adv, log_p)
    assert_transforms(lambda w, z: (logit_grad_kl(z, w) ** 2).sum(), log_p, adv)
    assert_transforms(lambda z, y: (logit_grad_ce(z, y) ** 2).sum(), adv, labels)


# ---- errors ----------------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "arguments", "error", "message"),
    [
        (logit_grad_kl, ([0.0], Z), TypeError, r"adv_logits must be a torch.Tensor, got list"),
        (logit_grad_kl, (Z, 1.0), TypeError, r"clean_log_probs must be a torch.Tensor, got float"),
        (logit_grad_kl, (Z.int(), Z), TypeError, r"adv_logits must have dtype float32, .*, got torch.int32"),
        (
            logit_grad_kl,
            (Z, Z.half()),
            TypeError,
            r"clean_log_probs must have the dtype of adv_logits, torch.float32, got torch.float16",
        ),
        (logit_grad_kl, (Z[0], Z[0]), ValueError, r"adv_logits must have shape \[N, C\] .*, got \[4\]"),
        (
            logit_grad_kl,
            (Z, Z[:, :3]),
            ValueError,
            r"clean_log_probs must have the shape of adv_logits, \[3, 4\], got \[3, 3\]",
        ),
        (
            logit_grad_kl,
            (Z, Z.to("meta")),
            ValueError,
            r"clean_log_probs must be on the device of adv_logits, cpu, got meta",
        ),
        (logit_grad_ce, (None, Y), TypeError, r"logits must be a torch.Tensor, got NoneType"),
        (logit_grad_ce, (Z, [0, 1, 2]), TypeError, r"labels must be a torch.Tensor, got list"),
        (logit_grad_ce, (Z.bool(), Y), TypeError, r"logits must have dtype float32, .*, got torch.bool"),
        (logit_grad_ce, (Z, Y.int()), TypeError, r"labels must have dtype torch.int64, got torch.int32"),
        (logit_grad_ce, (Z[:, :0], Y), ValueError, r"logits must have .* at least one class, got \[3, 0\]"),
        (logit_grad_ce, (Z, Y[:2]), ValueError, r"labels must have shape \[3\], one per row of logits, got \[2\]"),
        (
            logit_grad_ce,
            (Z, Y[:, None]),
            ValueError,
            r"labels must have shape \[3\], one per row of logits, got \[3, 1\]",
        ),
        (logit_grad_ce, (Z, Y + 4), ValueError, r"labels must lie in 0\.\.3 \(logits has 4 classes\), got 4"),
        (logit_grad_ce, (Z, Y - 1), ValueError, r"labels must lie in 0\.\.3 \(logits has 4 classes\), got -1"),
        (logit_grad_ce, (Z, Y.to("meta")), ValueError, r"labels must be on the device of logits, cpu, got meta"),
    ],
)
def test_errors(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(*arguments)
