"""H(p) = -sum p log p and KL(p || p') = sum p (log p - log p'), forward and backward."""

from __future__ import annotations

import math

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
)

from dtrades_fast.ops import BACKEND, EntropyKL, entropy_kl, reference


class Oracle:
    def __init__(self, clean, adv):
        self.terms = clean.shape[1]
        self.unit = rounding(clean.dtype, self.terms)
        p, q = self.p, self.q = Softmax(clean), Softmax(adv)
        with np.errstate(all="ignore"):
            self.entropy, self.kl = -p.expect(p.log_p), p.expect(p.log_p - q.log_p)
            # Each term of the sums is off by its own rounding and by that of its p.
            size = np.abs(p.shifted) + np.abs(q.shifted)
            self.entropy_tolerance = self.unit * (1 + p.log_sum[:, 0] + p.expect(np.abs(p.shifted) * p.condition))
            self.kl_tolerance = self.unit * (1 + p.log_sum[:, 0] + q.log_sum[:, 0] + p.expect(size * p.condition))

    def gradients(self, grad_entropy, grad_kl):
        """d/dz and d/dz' of grad_entropy . H + grad_kl . KL, each with its tolerance."""
        p, q = self.p, self.q
        a, b = (x.double().numpy().astype(np.longdouble)[:, None] for x in (grad_entropy, grad_kl))
        entropy, kl = self.entropy[:, None], self.kl[:, None]
        d_clean = -a * p.p * (p.log_p + entropy) + b * p.p * (p.log_p - q.log_p - kl)
        d_adv = b * (q.p - p.p)
        size = np.abs(a) * (np.abs(p.log_p) + entropy) + np.abs(b) * (np.abs(p.log_p) + np.abs(q.log_p) + kl)
        inherited = np.abs(a) * self.entropy_tolerance[:, None] + np.abs(b) * self.kl_tolerance[:, None]
        clean_tolerance = self.unit * p.p * p.condition * (1 + size) + p.p * inherited
        adv_tolerance = self.unit * np.abs(b) * (p.p * p.condition + q.p * q.condition)
        return (d_clean, clean_tolerance), (d_adv, adv_tolerance)


def make(shape, dtype, scale=3.0):
    return normal(shape, dtype, 1, scale), normal(shape, dtype, 2, scale)


def weights(rows, dtype):
    return normal((rows,), row_dtype(dtype), 3), normal((rows,), row_dtype(dtype), 4)


def gradients(clean, adv, grad_entropy, grad_kl, function=entropy_kl):
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    entropy, kl = function(clean, adv)
    return torch.autograd.grad((entropy, kl), (clean, adv), (grad_entropy, grad_kl))


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@rows_grid
def test_forward_matches_oracle(shape, dtype):
    clean, adv = make(shape, dtype)
    result, oracle = entropy_kl(clean, adv), Oracle(clean, adv)
    assert isinstance(result, EntropyKL)
    assert result.entropy.dtype == result.kl.dtype == row_dtype(dtype)
    assert_within(result.entropy, oracle.entropy, oracle.entropy_tolerance, "entropy")
    assert_within(result.kl, oracle.kl, oracle.kl_tolerance, "kl")


@each_dtype
@rows_grid
def test_backward_matches_oracle(shape, dtype):
    clean, adv = make(shape, dtype)
    g = weights(shape[0], dtype)
    (d_clean, clean_tolerance), (d_adv, adv_tolerance) = Oracle(clean, adv).gradients(*g)
    grad_clean, grad_adv = gradients(clean, adv, *g)
    assert grad_clean.dtype == grad_adv.dtype == dtype
    assert_within(grad_clean, d_clean, clean_tolerance, "d/dclean")
    assert_within(grad_adv, d_adv, adv_tolerance, "d/dadv")


def test_float64_is_good_to_1e_12():
    clean, adv = make((40, 10), F64)
    oracle = Oracle(clean, adv)
    assert oracle.kl_tolerance.max() < 1e-12
    assert oracle.entropy_tolerance.max() < 1e-12


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_twin_agrees(classes, dtype):
    clean, adv = make((BATCH, classes), dtype)
    oracle, g = Oracle(clean, adv), weights(BATCH, dtype)
    entropy, kl = reference.entropy_kl(clean, adv)
    assert_within(entropy, oracle.entropy, oracle.entropy_tolerance, "entropy")
    assert_within(kl, oracle.kl, oracle.kl_tolerance, "kl")
    exact = oracle.gradients(*g)
    for name, actual in (
        ("autograd of the twin", gradients(clean, adv, *g, function=reference.entropy_kl)),
        ("backward of the twin", reference.entropy_kl_backward(*g, clean, adv)),
    ):
        for x, (expected, tolerance) in zip(actual, exact, strict=True):
            assert_within(x, expected, tolerance, name)


@pytest.mark.parametrize("classes", [10, 129])
def test_single_gradients_match_oracle(classes):
    """Only the entropy or only the KL is used: the other's gradient is None inside."""
    clean, adv = make((BATCH, classes), F32)
    g, none = weights(BATCH, F32)[0], torch.zeros(BATCH)
    for field, pair in (("entropy", (g, none)), ("kl", (none, g))):
        a, b = clean.clone().requires_grad_(), adv.clone().requires_grad_()
        getattr(entropy_kl(a, b), field).backward(g)
        (d_clean, clean_tolerance), (d_adv, adv_tolerance) = Oracle(clean, adv).gradients(*pair)
        assert_within(a.grad, d_clean, clean_tolerance, field)
        if field == "entropy":
            assert b.grad is None or not b.grad.any()
        else:
            assert_within(b.grad, d_adv, adv_tolerance, field)


@each_dtype
@pytest.mark.parametrize("classes", [10, 130])
def test_large_logits(classes, dtype):
    """+-1e4: values and gradients keep the digits of the differences."""
    clean, adv = make((BATCH, classes), dtype, scale=2)
    signs = (normal((BATCH, classes), F32, 5) > 0).to(dtype) * 2 - 1
    clean, adv = clean + 1e4 * signs, adv + 1e4 * signs
    adv[::2] = -adv[::2]
    oracle, g = Oracle(clean, adv), weights(BATCH, dtype)
    result = entropy_kl(clean, adv)
    assert_within(result.entropy, oracle.entropy, oracle.entropy_tolerance, "entropy")
    assert_within(result.kl, oracle.kl, oracle.kl_tolerance, "kl")
    for name, x, (expected, tolerance) in zip(
        ("clean", "adv"), gradients(clean, adv, *g), oracle.gradients(*g), strict=True
    ):
        assert_within(x, expected, tolerance, f"d/d{name}")


def test_gradient_at_ten_thousand_in_closed_form():
    clean = torch.tensor([[1e4, 1e4, -1e4]])
    adv = torch.tensor([[1e4, -1e4, -1e4]])
    d_clean, d_adv = gradients(clean, adv, torch.zeros(1), torch.ones(1))
    # p = (1/2, 1/2, 0), p' = (1, 0, 0), log p - log p' = (-log 2, 2e4 - log 2, -)
    assert_within(d_adv, np.array([[0.5, -0.5, 0]], np.longdouble), 1e-7)
    assert_within(d_clean, np.array([[-5000, 5000, 0]], np.longdouble), 5000 * 4 * torch.finfo(F32).eps)


@pytest.mark.parametrize("classes", [10, 130])
def test_half_precision_does_not_overflow(classes):
    top = torch.finfo(F16).max
    clean, adv = torch.full((2, classes), -top, dtype=F16), torch.full((2, classes), top, dtype=F16)
    clean[:, 0], adv[:, 0] = top, -top
    result = entropy_kl(clean, adv)
    assert_within(result.entropy, np.zeros(2, np.longdouble), 0)
    # p = (1, 0, ...), log p' of class 0 = -2 top - log(C - 1)
    assert_within(result.kl, np.full(2, 2 * top + math.log(classes - 1), np.longdouble), 2 * top * 2.0**-23)
    d_clean, d_adv = gradients(clean, adv, torch.ones(2), torch.ones(2))
    assert not d_clean.any()
    assert d_adv[0, 0] == -1


# ---- special values ------------------------------------------------------------------------------------------------


def embedded(row, classes, dtype):
    """``row`` padded to ``classes`` with -inf, which counts nothing."""
    return torch.tensor([row + [-INF] * (classes - len(row))], dtype=dtype)


@each_dtype
@pytest.mark.parametrize("classes", [4, 128, 129])
@pytest.mark.parametrize(
    ("clean", "adv", "entropy", "kl"),
    [
        pytest.param([0, 0, -INF], [0, 0, -INF], math.log(2), 0, id="p = p' = 0 counts nothing"),
        pytest.param([0, 0, -INF], [0, 0, 0], math.log(2), math.log(1.5), id="p = 0 counts nothing"),
        pytest.param([0, 0, 0], [0, 0, -INF], math.log(3), INF, id="p > 0 against p' = 0"),
        pytest.param([-INF] * 3, [0, 0, 0], NAN, NAN, id="no clean class"),
        pytest.param([0, 0, 0], [-INF] * 3, math.log(3), NAN, id="no adversarial class"),
        pytest.param([INF, 0, 0], [0, 0, 0], NAN, NAN, id="clean +inf"),
        pytest.param([0, 0, 0], [0, INF, 0], math.log(3), NAN, id="adversarial +inf"),
        pytest.param([NAN, 0, 0], [0, 0, 0], NAN, NAN, id="clean NaN first"),
        pytest.param([0, 0, NAN], [0, 0, 0], NAN, NAN, id="clean NaN last"),
        pytest.param([0, 0, 0], [0, NAN, 0], math.log(3), NAN, id="adversarial NaN"),
    ],
)
def test_special_values(clean, adv, entropy, kl, classes, dtype):
    result = entropy_kl(embedded(clean, classes, dtype), embedded(adv, classes, dtype))
    unit = rounding(dtype)
    assert_within(result.entropy, np.array([entropy], np.longdouble), unit)
    assert_within(result.kl, np.array([kl], np.longdouble), unit)


@each_dtype
@pytest.mark.parametrize("classes", [10, 128, 129])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_in_its_row(value, classes, dtype):
    clean, adv = make((BATCH, classes), dtype)
    g = weights(BATCH, dtype)
    expected = (*entropy_kl(clean, adv), *gradients(clean, adv, *g))
    spoiled = clean.clone()
    spoiled[16, classes - 1] = value
    actual = (*entropy_kl(spoiled, adv), *gradients(spoiled, adv, *g))
    others = torch.arange(BATCH) != 16
    assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))
    assert all(x[16].isnan().any() for x in actual)


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_equal_logits_have_no_divergence(classes, dtype):
    clean, _ = make((BATCH, classes), dtype)
    assert not entropy_kl(clean, clean.clone()).kl.any()
    if BACKEND.name == "cpp":  # exactly p - p; autograd of the twin rounds on its way
        zeros, ones = (torch.full((BATCH,), v, dtype=row_dtype(dtype)) for v in (0.0, 1.0))
        assert not gradients(clean, clean.clone(), zeros, ones)[1].any()


# ---- invariants ----------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_bounds(classes, dtype):
    clean = normal((512, classes), dtype, 6, 4)
    adv = clean + normal((512, classes), dtype, 7, 1e-3)  # so close that rounding could make the KL negative
    entropy, kl = entropy_kl(clean, adv)
    unit = rounding(dtype, classes)
    assert (kl >= 0).all()
    assert (entropy >= -unit).all()
    assert (entropy <= math.log(classes) * (1 + unit) + unit).all()
    uniform = entropy_kl(torch.zeros(1, classes, dtype=dtype), torch.zeros(1, classes, dtype=dtype)).entropy
    assert_within(uniform, np.array([np.log(np.longdouble(classes))]), unit * (1 + math.log(classes)))


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_gradients_of_a_row_sum_to_zero(classes, dtype):
    clean, adv = make((BATCH, classes), dtype)
    zeros, ones = (torch.full((BATCH,), v, dtype=row_dtype(dtype)) for v in (0.0, 1.0))
    d_clean, d_adv = gradients(clean, adv, zeros, ones)
    oracle = Oracle(clean, adv)
    stored = torch.finfo(dtype).eps / 2  # each entry is rounded once when stored
    tiny = classes * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for x, (_, tolerance) in zip((d_clean, d_adv), oracle.gradients(zeros, ones), strict=True):
        total = x.double().sum(1).numpy()
        allowed = tolerance.sum(1) + stored * x.double().abs().sum(1).numpy() + tiny
        assert (np.abs(total) <= allowed).all()


@pytest.mark.parametrize("classes", CLASSES)
def test_shift_invariance_is_exact(classes):
    """Adding a constant to a row changes no bit where the addition itself is exact."""
    clean, adv = ((x * 256).round() / 256 for x in make((BATCH, classes), F32))
    assert_same_bits(entropy_kl(clean + 64, adv - 32), entropy_kl(clean, adv))
    g = weights(BATCH, F32)
    assert_same_bits(gradients(clean + 64, adv - 32, *g), gradients(clean, adv, *g))


# ---- rows, layouts, threads ------------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_row_alone_has_the_bits_of_the_batch(classes, dtype):
    clean, adv = make((BATCH, classes), dtype)
    assert_rows_independent(lambda *a: tuple(entropy_kl(*a)), clean, adv)
    assert_rows_independent(gradients, clean, adv, *weights(BATCH, dtype))


@needs_kernel
@each_dtype
@pytest.mark.parametrize("shape", [(8192, 10), (200, 1000)], ids=str)
def test_deterministic(shape, dtype):
    clean, adv = make(shape, dtype)
    g = weights(shape[0], dtype)
    assert_deterministic(lambda: tuple(entropy_kl(clean, adv)))
    assert_deterministic(lambda: gradients(clean, adv, *g))


@each_dtype
@pytest.mark.parametrize("classes", [7, 129])
def test_any_layout(classes, dtype):
    clean, adv = make((19, classes), dtype)
    g = weights(19, dtype)
    expected, expected_grad = tuple(entropy_kl(clean, adv)), gradients(clean, adv, *g)
    others = layouts(adv)
    for name, x in layouts(clean).items():
        for other in ("contiguous", name):
            assert_same_bits(tuple(entropy_kl(x, others[other])), expected, f"{name}, {other}")
            assert_same_bits(gradients(x, others[other], *g), expected_grad, f"{name}, {other}")
    for name, x in layouts(torch.stack(g, 1)).items():  # strided, unaligned incoming gradients
        assert_same_bits(gradients(clean, adv, *x.unbind(1)), expected_grad, name)
    broadcast = g[0][:1].expand(19)
    assert_same_bits(gradients(clean, adv, broadcast, broadcast), gradients(clean, adv, *[broadcast.clone()] * 2))


# ---- derivatives, compilation, transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 7, 129])
@pytest.mark.parametrize("field", ["both", "entropy", "kl"])
def test_gradcheck(field, classes):
    clean, adv = (x.requires_grad_() for x in make((2, classes), F64, 1.0))

    def function(a, b):
        result = entropy_kl(a, b)
        return tuple(result) if field == "both" else getattr(result, field)

    fast = classes > 7  # random projections instead of each entry of the Jacobian
    assert torch.autograd.gradcheck(function, (clean, adv), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, (clean, adv), fast_mode=fast)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 10), (3, 10), (18, 129)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, layout, dtype):
    clean, adv = (x if layout == "contiguous" else x.t().contiguous().t() for x in make(shape, dtype))
    ops = torch.ops.dtrades_fast
    torch.library.opcheck(ops.entropy_kl.default, (clean, adv))
    saved = ops.entropy_kl(clean, adv)
    g, h = weights(shape[0], dtype)
    for pair in ((g, h), (None, h), (g, None), (None, None)):
        torch.library.opcheck(ops.entropy_kl_backward.default, (*pair, clean, adv, *saved))


def test_compile():
    assert_compiles(entropy_kl, *make((BATCH, 10), F64))


def test_func_transforms():
    clean, adv = make((4, 3, 10), F64)
    assert_vmaps(entropy_kl, clean, adv)
    assert_vmaps(entropy_kl, clean.movedim(0, 2), adv[0], in_dims=(2, None))
    assert_vmaps(entropy_kl, clean[0], adv.movedim(0, 1), in_dims=(None, 1))
    assert_transforms(lambda z, w: entropy_kl(z, w).kl.sum() + (entropy_kl(z, w).entropy ** 2).sum(), clean, adv)
    assert_transforms(lambda w, z: (entropy_kl(z, w).kl ** 2).sum(), adv, clean)


def test_no_gradient_is_recorded_unasked():
    clean, adv = make((3, 10), F32)
    assert not entropy_kl(clean, adv).kl.requires_grad
    with torch.no_grad():
        assert not entropy_kl(clean.requires_grad_(), adv).kl.requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------

Z = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Z.tolist(), Z), TypeError, r"clean_logits must be a torch.Tensor, got list"),
        ((Z, None), TypeError, r"adv_logits must be a torch.Tensor, got NoneType"),
        ((Z.long(), Z), TypeError, r"clean_logits must have dtype float32, .*bfloat16, got torch.int64"),
        ((Z, Z.long()), TypeError, r"adv_logits must have dtype float32, .*bfloat16, got torch.int64"),
        (
            (Z, Z.double()),
            TypeError,
            r"adv_logits must have the dtype of clean_logits, torch.float32, got torch.float64",
        ),
        ((Z[0], Z[0]), ValueError, r"clean_logits must have shape \[N, C\] .*, got \[4\]"),
        ((Z[None], Z[None]), ValueError, r"clean_logits must have shape \[N, C\] .*, got \[1, 3, 4\]"),
        ((Z[:, :0], Z[:, :0]), ValueError, r"clean_logits must have .* at least one class, got \[3, 0\]"),
        ((Z, Z[:2]), ValueError, r"adv_logits must have the shape of clean_logits, \[3, 4\], got \[2, 4\]"),
        ((Z, Z.to("meta")), ValueError, r"adv_logits must be on the device of clean_logits, cpu, got meta"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        entropy_kl(*arguments)


def test_every_dtype_is_listed():
    assert {entropy_kl(Z.to(d), Z.to(d)).kl.dtype for d in DTYPES} == {F32, F64}
