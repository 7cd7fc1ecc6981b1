"""What the operator tests share: shapes with their reasons, tolerances with their derivation, layouts, checks.

Oracles are numpy in ``longdouble`` (at least float64), written from the textbook formula in each test.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dtrades_fast.ops import BACKEND

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = (F32, F64, F16, BF16)
LOW = (F16, BF16)
INF, NAN = math.inf, math.nan

needs_kernel = pytest.mark.skipif(
    BACKEND.name != "cpp",
    reason=f"needs the compiled kernels: {BACKEND.problems.get('_C', 'DTRADES_FAST_BACKEND=' + BACKEND.requested)}",
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])

# [N, C] of logits, each with the reason for which it is here. A block is 16 rows in float32, 8 in float64.
ROWS = {
    (0, 10): "empty batch",
    (1, 10): "one row, far less than a block",
    (5, 1): "one class: everything is exactly 0",
    (17, 2): "one row beyond a block, binary",
    (33, 7): "two blocks and a row, an odd class count",
    (64, 10): "whole blocks only, the common case",
    (19, 33): "more classes than a vector has lanes",
    (18, 128): "the last class count for which a lane is a row",
    (18, 129): "the first for which a lane is a class, with a tail of one lane",
    (3, 1000): "ImageNet: many vectors and a tail",
}
# Class counts on both sides of the change of regime, for the properties that must hold in each.
CLASSES = (1, 10, 128, 129, 1000)
# The first and last lane of a float32 and a float64 block, the first row of the next, and the end of the batch.
POSITIONS = (0, 7, 8, 15, 16, 17, 34)
BATCH = 35

# [N, ...] of images, each with its reason.
IMAGES = {
    (0, 3, 8, 8): "empty batch",
    (1, 1, 1, 1): "a single pixel",
    (6,): "no dimension after the batch: one pixel per sample",
    (4, 0): "samples without a pixel",
    (2, 3, 8, 8): "whole vectors only",
    (5, 3, 5, 7): "105 pixels: a tail that is no multiple of 4, 8 or 16",
    (3, 1, 28, 28): "MNIST",
    (17, 3): "samples shorter than a vector",
    (2, 2, 3, 5, 3): "five dimensions",
}

rows_grid = pytest.mark.parametrize("shape", ROWS, ids=str)
images_grid = pytest.mark.parametrize("shape", IMAGES, ids=str)


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def uniform(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


# ---- oracles and tolerances ----------------------------------------------------------------------------------------


def wide(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy().astype(np.longdouble)


def per_sample(x: Tensor) -> np.ndarray:
    """[N, pixels] in longdouble."""
    return wide(x).reshape(x.shape[0], math.prod(x.shape[1:]))


class Softmax:
    """A row of logits as the textbook has it: shifted = z - max z, log p = shifted - log sum exp shifted."""

    def __init__(self, logits: Tensor) -> None:
        z = wide(logits)
        with np.errstate(all="ignore"):
            self.shifted = z - z.max(1, keepdims=True) if len(z) else z
            self.log_sum = np.log(np.exp(self.shifted).sum(1, keepdims=True))
            self.log_p = self.shifted - self.log_sum
            self.p = np.exp(self.log_p)
            # How far rounding moves log p and so, relatively, p: one rounding of (z - max) and one of the log-sum.
            self.condition = 1 + np.where(self.p == 0, 0, np.abs(self.shifted)) + np.abs(self.log_sum)

    def expect(self, value: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.where(self.p == 0, 0, self.p * value).sum(1)


def rounding(dtype: torch.dtype, terms: int = 1) -> float:
    """Relative error of arithmetic in the dtype that ``dtype`` is computed in.

    A few roundings (1.4 ulp each of exp and log, half an ulp each of a product and a quotient: 4) and a sum of
    ``terms``, whose half ulps add up like a random walk. The worst seen is a quarter to a half of this.
    """
    return torch.finfo(row_dtype(dtype)).eps * (4 + math.sqrt(terms) / 2)


def assert_within(actual: Tensor, expected: np.ndarray, tolerance: np.ndarray | float, what: str = "") -> None:
    """|actual - expected| <= tolerance, plus half an ulp where ``actual`` is stored in half precision.

    Infinities and NaN must be the same.
    """
    result = wide(actual)
    assert result.shape == expected.shape, what
    tolerance = np.broadcast_to(np.asarray(tolerance, np.longdouble), expected.shape)
    if actual.dtype in LOW:
        info = torch.finfo(actual.dtype)
        subnormal = info.smallest_normal * info.eps
        tolerance = tolerance + np.maximum(np.abs(expected) * info.eps, subnormal) / 2
    with np.errstate(all="ignore"):
        same = (result == expected) | (np.isnan(result) & np.isnan(expected))
        bad = ~same & ~(np.abs(result - expected) <= tolerance)
    if bad.any():
        worst = np.argwhere(bad)[0]
        at = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what} at {at}: got {result[at]}, expected {expected[at]} +- {tolerance[at]} ({bad.sum()} of {bad.size})"
        )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual: object, expected: object, what: str = "") -> None:
    """Bit for bit, sign of zero and NaN included, of tensors or tuples of them."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected), what
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, e, f"{what} [{i}]")
    else:
        assert actual.dtype == expected.dtype, what
        assert actual.shape == expected.shape, what
        assert torch.equal(bits(actual), bits(expected)), what


# ---- layouts -------------------------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to ``x`` that lie differently in memory."""
    result = {"contiguous": x.clone(memory_format=torch.contiguous_format)}
    shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    result["unaligned"] = shifted.copy_(x)
    result["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
    result["strided in the last dimension"] = x.repeat_interleave(2, -1)[..., ::2]
    result["strided in the batch"] = x.repeat_interleave(3, 0)[::3]
    result["flipped twice"] = x.flip(-1).contiguous().flip(-1)
    if x.dim() == 4:
        result["channels_last"] = x.contiguous(memory_format=torch.channels_last)
        result["channels_last slice"] = x.repeat(1, 1, 1, 2).contiguous(memory_format=torch.channels_last)[
            ..., : x.shape[3]
        ]
        result["columns before rows"] = x.transpose(2, 3).contiguous().transpose(2, 3)
    for name, y in result.items():
        assert torch.equal(y, x), name
    return result


# ---- properties ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert torch.get_num_threads() == count
        yield
    finally:
        torch.set_num_threads(before)


def assert_deterministic(call: Callable[[], object]) -> None:
    """The same bits on 20 repetitions and for 1 and 2 threads."""
    with threads(1):
        expected = call()
    for repetition in range(20):
        with threads(1 + repetition % 2):
            assert_same_bits(call(), expected, f"repetition {repetition}")


def assert_rows_independent(call: Callable[..., object], *inputs: Tensor) -> None:
    """Row i alone, and row i after others, gives the bits that it has in the batch."""
    whole = call(*inputs)
    whole = whole if isinstance(whole, tuple) else (whole,)
    for i in POSITIONS:
        alone = call(*(x[i : i + 1].contiguous() for x in inputs))
        alone = alone if isinstance(alone, tuple) else (alone,)
        assert_same_bits(tuple(alone), tuple(x[i : i + 1] for x in whole), f"row {i} alone")
    tail = call(*(x[3:] for x in inputs))
    tail = tail if isinstance(tail, tuple) else (tail,)
    assert_same_bits(tuple(tail), tuple(x[3:] for x in whole), "rows from the fourth on")


def assert_compiles(call: Callable[..., object], *inputs: Tensor, grad: bool = True) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, values and gradients: inductor, and one dynamic graph.

    Inputs are float64, so that the reordering that a compiler may do in PyTorch code stays below 1e-12.
    """
    assert all(x.dtype in (F64, torch.int64) for x in inputs)

    def run(function: Callable[..., object], *arguments: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(grad and x.is_floating_point()) for x in arguments]
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if grad:
            sum((o * o).sum() for o in outputs if o.requires_grad).backward()
            return [o.detach() for o in outputs] + [x.grad for x in leaves if x.requires_grad]
        return outputs + leaves  # leaves too: they may have been changed in place

    torch._dynamo.reset()
    torch.testing.assert_close(
        run(torch.compile(call, fullgraph=True), *inputs), run(call, *inputs), rtol=1e-12, atol=1e-12
    )
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for size in (8, 9, 11):  # equal to no other dimension, which would be taken for the same symbol
        part = [x[:size] for x in inputs]
        torch.testing.assert_close(run(compiled, *part), run(call, *part), rtol=1e-12, atol=1e-12)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3, f"one graph should serve every batch size, but their number grew: {graphs}"


def assert_vmaps(call: Callable[..., object], *inputs: Tensor, in_dims: object = 0) -> None:
    """vmap gives the bits of a loop."""
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)
    count = next(x.shape[d] for x, d in zip(inputs, dims, strict=True) if d is not None)
    mapped = torch.func.vmap(call, in_dims=dims)(*inputs)
    each = [
        call(*(x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True))) for i in range(count)
    ]
    if isinstance(mapped, tuple):
        assert_same_bits(tuple(mapped), tuple(torch.stack(parts) for parts in zip(*each, strict=True)), "vmap")
    else:
        assert_same_bits(mapped, torch.stack(each), "vmap")


def assert_transforms(scalar: Callable[..., Tensor], *inputs: Tensor) -> None:
    """torch.func.grad, vmap(grad), grad(vmap) and backward through vmap agree with autograd, for float64 inputs.

    ``scalar`` maps tensors to one number and differentiates with respect to the first.
    """

    def autograd(x: Tensor, *rest: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(scalar(x, *rest), x)[0]

    count = inputs[0].shape[0]
    expected = torch.stack([autograd(*(x[i] for x in inputs)) for i in range(count)])
    assert expected.abs().sum() > 0

    def check(name: str, actual: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")

    check("grad", torch.stack([torch.func.grad(scalar)(*(x[i] for x in inputs)) for i in range(count)]))
    check("vmap(grad)", torch.func.vmap(torch.func.grad(scalar))(*inputs))
    check("grad(vmap)", torch.func.grad(lambda *a: torch.func.vmap(scalar)(*a).sum())(*inputs))
    leaf = inputs[0].clone().requires_grad_()
    torch.func.vmap(scalar)(leaf, *inputs[1:]).sum().backward()
    check("backward through vmap", leaf.grad)
