"""BCE = -log p_y - log(1 - p_k + slack), k the most probable class other than y."""

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

from dtrades_fast.ops import boosted_ce, reference

PUBLISHED = 1e-4 + 1e-12  # log(1.0001 - p + 1e-12)
each_slack = pytest.mark.parametrize("slack", [0.0, PUBLISHED], ids=["exact", "published"])


class Oracle:
    """The formula as it stands, with 1 - p_k as the sum of the other probabilities, relative to their largest."""

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
            self.loss = (-np.where(self.target, p.log_p, 0).sum(1, keepdims=True) - boost)[:, 0]
            # log(1 - p_k) is a difference of two log-sums and of two maxima; slack passes on no more of it
            self.rest_condition = 1 + p.log_sum + np.log(rest_sum) + np.abs(top)
            label_condition = np.where(self.target, np.abs(p.shifted) + p.log_sum, 0).sum(1, keepdims=True)
            self.loss_tolerance = self.unit * (label_condition + self.share * self.rest_condition + np.abs(boost))[:, 0]

    def gradient(self, grad_loss):
        """d/dz of grad_loss . BCE, with its tolerance."""
        g = grad_loss.double().numpy().astype(np.longdouble)[:, None]
        p = self.p
        p_k = (p.p * self.boosted).sum(1, keepdims=True)
        pull = self.share * p_k * np.where(self.boosted, 1, -self.r)
        # each probability is off by what its exponent was rounded to, the share by what 1 - p_k was
        with np.errstate(all="ignore"):
            own = np.where(self.boosted | (self.r == 0), 0, np.abs(np.log(self.r)))
        relative = np.where(self.share == 0, 0, self.rest_condition) + (p.condition * self.boosted).sum(1)[:, None]
        tolerance = p.p * p.condition + np.abs(pull) * (own + relative) + p.p * relative + self.target
        return g * (p.p - self.target + pull), self.unit * np.abs(g) * tolerance


def make(shape, dtype, scale=3.0):
    return normal(shape, dtype, 1, scale), torch.arange(shape[0]) * 7 % shape[1]


def weight(rows, dtype):
    return normal((rows,), row_dtype(dtype), 3)


def gradient(logits, labels, slack, grad_loss, function=boosted_ce):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits, labels, slack), logits, grad_loss)[0]


def check(logits, labels, slack, function=boosted_ce):
    """Loss and gradient within their tolerance of the oracle."""
    oracle, g = Oracle(logits, labels, slack), weight(len(logits), logits.dtype)
    loss = function(logits, labels, slack)
    assert loss.dtype == row_dtype(logits.dtype)
    assert_within(loss, oracle.loss, oracle.loss_tolerance, "loss")
    expected, tolerance = oracle.gradient(g)
    info = torch.finfo(logits.dtype)
    stored = 0.0
    if logits.dtype != row_dtype(logits.dtype):  # the gradient is stored once before it meets grad_loss
        stored = np.abs(expected) * info.eps / 2 + np.abs(g.numpy())[:, None] * info.smallest_normal * info.eps
    grad = gradient(logits, labels, slack, g, function)
    assert grad.dtype == logits.dtype
    assert_within(grad, expected, tolerance + stored, "gradient")


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@rows_grid
@each_slack
def test_matches_oracle(slack, shape, dtype):
    check(*make(shape, dtype), slack)


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_slack
def test_twin_agrees(slack, classes, dtype):
    logits, labels = make((BATCH, classes), dtype)
    check(logits, labels, slack, reference.boosted_ce)
    oracle, g = Oracle(logits, labels, slack), weight(BATCH, dtype)
    assert_within(reference.boosted_ce_backward(g, logits, labels, slack), *oracle.gradient(g), "backward of the twin")


@pytest.mark.parametrize("classes", [2, 10, 70])
def test_published_expression(classes):
    """As MART's authors compute it: cross-entropy plus nll_loss of log(1.0001 - p + 1e-12) at the rival class."""
    logits, labels = make((BATCH, classes), F64)
    logits.requires_grad_()
    p = logits.softmax(1)
    top_two = p.argsort(1)[:, -2:]
    rival = torch.where(top_two[:, -1] == labels, top_two[:, -2], top_two[:, -1])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = expected + torch.nn.functional.nll_loss(torch.log(1.0001 - p + 1e-12), rival, reduction="none")
    ours = boosted_ce(logits, labels, slack=PUBLISHED)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    g = weight(BATCH, F64)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits, g, retain_graph=True)[0] for loss in (ours, expected)),
        rtol=1e-10,
        atol=1e-10,
    )


@each_dtype
@pytest.mark.parametrize("classes", [2, 10, 70])
@each_slack
def test_large_logits(slack, classes, dtype):
    """+-1e4: whoever wins, the loss keeps the digits of the differences."""
    logits, labels = make((BATCH, classes), dtype)
    check(logits + 1e4 * ((normal((BATCH, classes), F32, 5) > 0).to(dtype) * 2 - 1), labels, slack)


@pytest.mark.parametrize("gap", [20.0, 80.0, 1000.0, 2e4])
def test_exact_where_one_minus_p_vanishes(gap):
    """1 - p_k = e^-gap (1 + e^-gap)^-1, far below what 1 - softmax could tell from 0."""
    logits, label = torch.tensor([[0.0, gap]]), torch.tensor([0])
    assert_within(boosted_ce(logits, label), np.array([2 * gap], np.longdouble), 2 * gap * 2.0**-23)
    grad = gradient(logits, label, 0.0, torch.ones(1))
    assert_within(grad, np.array([[-2, 2]], np.longdouble), 1e-6)  # p_1 doubles and is 1


@pytest.mark.parametrize("classes", [10, 70])
def test_half_precision_does_not_overflow(classes):
    top = torch.finfo(F16).max
    logits = torch.full((2, classes), -top, dtype=F16)
    logits[0, 0] = logits[1, 1] = top
    labels = torch.tensor([0, 0])
    # the label is certain; and a wrong class is: -log p_0 = 2 top, -log(1 - p_1) = 2 top - log(C - 1)
    assert_within(boosted_ce(logits, labels), np.array([0, 4 * top - math.log(classes - 1)]), 4 * top * 2.0**-23)
    expected = np.zeros((2, classes))
    expected[1] = -1 / (classes - 1)
    expected[1, :2] = -1 - 1 / (classes - 1), 2
    assert_within(gradient(logits, labels, 0.0, torch.ones(2)), expected, 1e-6)


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_first_of_equal_rivals_is_boosted(classes, dtype):
    """All classes alike, a label in turn: the gradient stands out at the label and at the first other class."""
    rows = min(classes, BATCH)
    logits, labels = torch.zeros(rows, classes, dtype=dtype), torch.arange(rows)
    check(logits, labels, 0.0)
    grad = gradient(logits, labels, 0.0, torch.ones(rows, dtype=row_dtype(dtype)))
    if classes > 1:
        assert grad.argmax(1).tolist() == [1] + [0] * (rows - 1)
        assert grad.argmin(1).tolist() == list(range(rows))


@each_slack
def test_single_class_has_no_rival(slack):
    logits, labels = torch.tensor([[3.0], [-INF], [NAN]]), torch.zeros(3, dtype=torch.int64)
    expected = np.array([-math.log1p(slack), NAN, NAN])
    assert_within(boosted_ce(logits, labels, slack), expected, 1e-7)
    assert_within(gradient(logits, labels, slack, torch.ones(3)), np.array([[0], [NAN], [NAN]]), 0)


# ---- special values ------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("classes", [4, 64, 65])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
@pytest.mark.parametrize(
    ("row", "loss", "slack_loss", "grad"),
    [
        pytest.param([0, 0, -INF], 2 * math.log(2), math.log(2) - math.log(0.75), [-1, 1, 0], id="-inf counts nothing"),
        pytest.param([0, -INF, -INF], 0, -math.log(1.25), [0, 0, 0], id="the label alone is possible"),
        pytest.param([-INF, 0, 0], INF, INF, [-1, 1, 0], id="the label is impossible"),
        pytest.param([-INF, 0, -INF], INF, INF, [-1, 1, 0], id="only a wrong class is possible"),
        pytest.param([-INF] * 3, NAN, NAN, [NAN] * 3, id="no class"),
        pytest.param([INF, 0, 0], NAN, NAN, [NAN] * 3, id="+inf at the label"),
        pytest.param([0, INF, 0], NAN, NAN, [NAN] * 3, id="+inf beside the label"),
        pytest.param([NAN, 0, 0], NAN, NAN, [NAN] * 3, id="NaN at the label"),
        pytest.param([0, 0, NAN], NAN, NAN, [NAN] * 3, id="NaN beside the label"),
        pytest.param([-INF, 0, NAN], NAN, NAN, [NAN] * 3, id="NaN and an impossible label"),
    ],
)
def test_special_values(row, loss, slack_loss, grad, implementation, classes, dtype):
    """Label 0, so that class 1 is the rival of equals; the other classes have the logit -inf."""
    pad = classes - 3
    logits, label = torch.tensor([row + [-INF] * pad], dtype=dtype), torch.tensor([0])
    expected = np.array([grad + [grad[2] * 0] * pad])
    one = torch.ones(1, dtype=row_dtype(dtype))
    function = boosted_ce if implementation == "kernel" else reference.boosted_ce
    for slack, value in ((0.0, loss), (0.25, slack_loss)):
        assert_within(function(logits, label, slack), np.array([value]), rounding(dtype))
        found = {"autograd": gradient(logits, label, slack, one, function)}
        if implementation == "twin":
            found["backward of the twin"] = reference.boosted_ce_backward(one, logits, label, slack)
        for name, x in found.items():
            if slack == 0:
                assert_within(x, expected, rounding(dtype), name)
            else:  # a smaller share of the second term, but NaN where it was
                assert torch.equal(x.isnan(), torch.from_numpy(np.isnan(expected))), name


@each_dtype
@pytest.mark.parametrize("classes", [10, 64, 65])
@pytest.mark.parametrize("value", [NAN, INF])
@each_slack
def test_nan_stays_in_its_row(slack, value, classes, dtype):
    logits, labels = make((BATCH, classes), dtype)
    g = weight(BATCH, dtype)
    spoiled = logits.clone()
    spoiled[16, classes - 1] = value
    others = torch.arange(BATCH) != 16
    actual, expected = ((boosted_ce(x, labels, slack), gradient(x, labels, slack, g)) for x in (spoiled, logits))
    assert all(x[16].isnan().all() for x in actual)
    assert_same_bits(tuple(x[others] for x in actual), tuple(x[others] for x in expected))


@each_dtype
@pytest.mark.parametrize("classes", [10, 65])
@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_kernel), "twin"])
def test_wrong_label_that_cannot_be_seen_gives_nan(implementation, classes, dtype):
    """Where the public function cannot look at the labels (CUDA, compiled code, vmap) a wrong one shows."""
    logits, labels = make((BATCH, classes), dtype)
    g = torch.ones(BATCH, dtype=row_dtype(dtype))

    def call(labels):
        if implementation == "kernel":
            return torch.ops.dtrades_fast.boosted_ce(logits, labels, PUBLISHED)
        arguments = logits, labels, PUBLISHED
        return reference.boosted_ce(*arguments), reference.boosted_ce_backward(g, *arguments)

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
def test_bounds(classes, dtype):
    """Never below the cross-entropy; slack lowers it, to no less than -log(1 + slack)."""
    logits, labels = make((BATCH, classes), dtype, 6.0)
    ce = torch.nn.functional.cross_entropy(logits.to(row_dtype(dtype)), labels, reduction="none")
    exact, published = (boosted_ce(logits, labels, slack) for slack in (0.0, PUBLISHED))
    unit = rounding(dtype, classes) * (1 + math.log(classes) + logits.abs().max().item())
    assert (exact >= ce - unit).all()
    assert (published <= exact + unit).all()
    assert (published >= -math.log1p(PUBLISHED) - unit).all()
    assert (published - ce <= -math.log(PUBLISHED) + unit).all()


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_slack
def test_gradients_of_a_row_sum_to_zero(slack, classes, dtype):
    logits, labels = make((BATCH, classes), dtype)
    g = torch.ones(BATCH, dtype=row_dtype(dtype))
    grad = gradient(logits, labels, slack, g).double()
    _, tolerance = Oracle(logits, labels, slack).gradient(g)
    info = torch.finfo(dtype)
    stored = info.eps * grad.abs().sum(1).numpy() + classes * info.smallest_normal * info.eps
    assert (np.abs(grad.sum(1).numpy()) <= tolerance.sum(1) + stored).all()


@pytest.mark.parametrize("classes", CLASSES)
@each_slack
def test_shift_invariance_is_exact(slack, classes):
    """Adding a constant to a row changes no bit where the addition itself is exact."""
    logits, labels = make((BATCH, classes), F32)
    logits = (logits * 256).round() / 256
    g = weight(BATCH, F32)
    assert_same_bits(boosted_ce(logits + 64, labels, slack), boosted_ce(logits, labels, slack))
    assert_same_bits(gradient(logits + 64, labels, slack, g), gradient(logits, labels, slack, g))


# ---- rows, layouts, threads ------------------------------------------------------------------------------------------


@needs_kernel
@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
def test_row_alone_has_the_bits_of_the_batch(classes, dtype):
    logits, labels = make((BATCH, classes), dtype)
    assert_rows_independent(lambda *a: torch.ops.dtrades_fast.boosted_ce(*a, PUBLISHED), logits, labels)


@needs_kernel
@each_dtype
@pytest.mark.parametrize("shape", [(8192, 10), (200, 1000)], ids=str)
def test_deterministic(shape, dtype):
    logits, labels = make(shape, dtype)
    assert_deterministic(lambda: torch.ops.dtrades_fast.boosted_ce(logits, labels, PUBLISHED))


@each_dtype
@pytest.mark.parametrize("classes", [7, 65])
def test_any_layout(classes, dtype):
    logits, labels = make((19, classes), dtype)
    g = weight(19, dtype)
    loss, grad = boosted_ce(logits, labels), gradient(logits, labels, 0.0, g)
    for name, x in layouts(logits).items():
        assert_same_bits(boosted_ce(x, labels), loss, name)
        assert_same_bits(gradient(x, labels, 0.0, g), grad, name)
    strided = labels.repeat_interleave(2)[::2]
    assert_same_bits(boosted_ce(logits, strided), loss, "strided labels")
    broadcast = g[:1].expand(19)
    assert_same_bits(gradient(logits, labels, 0.0, broadcast), gradient(logits, labels, 0.0, broadcast.clone()))


# ---- derivatives, compilation, transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 7, 65])
@each_slack
def test_gradcheck(slack, classes):
    logits, labels = make((2, classes), F64, 1.0)
    logits.requires_grad_()
    fast = classes > 7  # random projections instead of each entry of the Jacobian
    for verify in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert verify(lambda z: boosted_ce(z, labels, slack), (logits,), fast_mode=fast)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 10), (3, 10), (18, 65)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(shape, layout, dtype):
    logits, labels = make(shape, dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    torch.library.opcheck(torch.ops.dtrades_fast.boosted_ce.default, (logits, labels, PUBLISHED))


@each_slack
def test_compile(slack):
    logits, labels = make((BATCH, 10), F64)
    assert_compiles(lambda z, y: boosted_ce(z, y, slack), logits, labels)


@each_slack
def test_func_transforms(slack):
    logits, labels = make((12, 10), F64)
    logits, labels = logits.unflatten(0, (4, 3)), labels.view(4, 3)

    def call(z, y):
        return boosted_ce(z, y, slack)

    assert_vmaps(call, logits, labels)
    assert_vmaps(call, logits.movedim(0, 2), labels[1], in_dims=(2, None))
    assert_vmaps(call, logits[1], labels, in_dims=(None, 0))
    assert_transforms(lambda z, y: (call(z, y) ** 2).sum(), logits, labels)


def test_no_gradient_is_recorded_unasked():
    logits, labels = make((3, 10), F32)
    assert not boosted_ce(logits, labels).requires_grad
    with torch.no_grad():
        assert not boosted_ce(logits.requires_grad_(), labels).requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


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
        ((Z, Y, torch.tensor(0.1)), TypeError, r"slack must be a Python number, got Tensor"),
        ((Z, Y, -1e-4), ValueError, r"slack must be a finite number of at least 0, got -0.0001"),
        ((Z, Y, NAN), ValueError, r"slack must be a finite number of at least 0, got nan"),
        ((Z, Y, INF), ValueError, r"slack must be a finite number of at least 0, got inf"),
        ((Z, Y, 1e-40), ValueError, r"slack must be 0 or at least 1e-30, got 1e-40"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        boosted_ce(*arguments)


def test_every_dtype_is_listed():
    assert {boosted_ce(Z.to(d), Y).dtype for d in DTYPES} == {F32, F64}
