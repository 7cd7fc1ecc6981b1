"""The launches that every kernel's PTX is run with, each checked against the operator's oracle.

They reach every instruction: each class count of ROWS fills a shape to its last item or leaves a tail, each size of
IMAGES leaves something to every loop that the compiler unrolled. A grid of one or two blocks makes them stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from cases import CHECKS, IMAGE_CHECKS, ROW_CHECKS, logits
from engine import Engine, Library, library
from helpers import INF, NAN, normal, row_dtype
from kernels import Kernels
from torch import Tensor

from dtrades_fast.ops import reference

#: rows, classes, kind of logits: one block and a part of the next
ROWS = (
    (17, 10, "normal"),
    (17, 10, "large"),
    (17, 27, "holes"),
    (5, 33, "normal"),
    (5, 250, "large"),
    (5, 250, "holes"),
    (5, 1000, "normal"),
    (5, 1000, "large"),
    (5, 1000, "holes"),
    (3, 1300, "large"),
    (3, 1900, "normal"),
    (3, 1900, "holes"),
)
#: size of a sample, by how many elements the buffers begin after a multiple of 16 bytes
IMAGES = ((3, 0), (105, 0), (111, 1), (1799, 1), (5523, 0), (16399, 0), (18439, 1))
#: For loops over packs: five or six of doubles and halves for each of 256 threads, samples too large for shared memory,
#: packs for 1024 threads.
PACKED = ((2763, 0), (11043, 0), (12045, 0), (14135, 1), (45069, 0))
#: size, classes: the entropy that comes with a sample's norm has loops of its own
LAMBDA_X = ((105, 1300), (105, 1900), (16387, 5200), (16387, 7200))
#: class counts of `extreme_rows`: all items of each shape, and from one to eight classes for a lane
EXTREMES = (10, 27, 40, 250, 1000, 1300, 1900)


@dataclass(frozen=True)
class Case:
    operator: str
    arguments: tuple[int | str, ...]
    shift: int = 0

    def check(
        self, run: Callable[..., dict[str, np.ndarray]], dtype: torch.dtype, max_blocks: int | None = None
    ) -> tuple[Tensor, ...]:
        kernels = Kernels(run, shift=self.shift, max_blocks=max_blocks or (2 if self.operator in IMAGE_CHECKS else 1))
        if self.operator in EXTREME_CHECKS:
            return EXTREME_CHECKS[self.operator](kernels, *self.arguments, dtype)
        count, size, *rest = self.arguments
        return CHECKS[self.operator](kernels, count, size, dtype, *rest)


CASES = [Case(operator, rows) for operator in ROW_CHECKS for rows in ROWS]
CASES += [Case("extreme rows", (classes,)) for classes in EXTREMES]
CASES += [Case(operator, (3, size), shift) for operator in IMAGE_CHECKS for size, shift in IMAGES]
CASES += [
    Case(operator, (3, size), shift)
    for operator in ("pgd_step", "sample_stats", "lambda_x")  # the random start's loops are shorter
    for size, shift in PACKED
]
CASES += [Case("lambda_x", (3, 61445)), *(Case("extreme lambda_x", sizes) for sizes in LAMBDA_X)]


def extreme_logits(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows with NaN, infinities and probabilities that are no normal numbers."""
    z, other = (logits(8, classes, dtype, seed) for seed in (1, 2))
    z[1, 3], z[2, 4], z[3], z[4, 5] = NAN, INF, -INF, -INF
    z[5:7] = other[5:7] = -720 - torch.arange(classes).to(dtype) % 8
    z[5, 0] = z[6, 1] = other[5, 0] = other[6, 2] = 0
    other[0, 1] = NAN
    return z, other


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        near = 1024 * torch.finfo(y.dtype).eps  # differences of logits as large as that
        torch.testing.assert_close(x, y, rtol=near, atol=near, equal_nan=True)


def extreme_rows(k: Kernels, classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Extreme logits, labels out of range, and a backward of which nothing is wanted."""
    z, other = extreme_logits(classes, dtype)
    labels = torch.tensor([-1, 0, 1, 2, 3, 0, 4, classes])
    ones = torch.ones(8, dtype=row_dtype(dtype))
    forward = k.entropy_kl(z, other)
    results = (*forward[:2], *k.entropy_kl_backward(ones, ones, z, other, *forward))
    results += (k.logit_grad_kl(z, other), k.logit_grad_ce(z, labels))
    expected = (*reference.entropy_kl(z, other), *reference.entropy_kl_backward(ones, ones, z, other))
    expected += (reference.logit_grad_kl(z, other), reference.logit_grad_ce(z, labels))
    for name, inputs, settings in (
        ("ce_loss", (z, labels), ()),
        ("trades_loss", (z, other, ones, labels), (0.5, 0.75, 0.9, 1.2, 3.1, True)),
        ("mart_loss", (z, other, labels), (6.0, 1e-4, 1e-7)),
        ("mart_loss", (other, z, labels), (6.0, 0.0, 0.0)),
    ):
        results += getattr(k, name)(*inputs, *settings)
        expected += getattr(reference, name)(*inputs, *settings)
        expected += getattr(reference, f"{name}_backward")(ones, *inputs, *settings)
    assert_near(results, expected)
    for grad in k.entropy_kl_backward(None, None, z, other, *forward):
        assert not grad.any()
    return results


def extreme_lambda_x(k: Kernels, size: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    z, _ = extreme_logits(classes, dtype)
    grad, settings = normal((8, size), dtype, 3), (0.75, 0.3, 0.125, -INF, INF)
    results = k.lambda_x(z, grad, *settings)
    assert_near(results, reference.lambda_x(z, grad, *settings))
    return results


EXTREME_CHECKS: dict[str, Callable[..., tuple[Tensor, ...]]]
EXTREME_CHECKS = {"extreme rows": extreme_rows, "extreme lambda_x": extreme_lambda_x}


#: how a kernel's mangled name tells the dtype
MARKS = {torch.float32: "If", torch.float64: "Id", torch.float16: "INS_4Half", torch.bfloat16: "INS_8BFloat16"}


def kernels_of(library: Library, dtype: torch.dtype) -> list[str]:
    return [name for name in library.names() if MARKS[dtype] in name]


def kernel_named(library: Library, kernel: str, threads: int, dtype: torch.dtype) -> str:
    """The mangled name of the kernel whose block or row has so many threads."""
    (name,) = [n for n in kernels_of(library, dtype) if f"{len(kernel)}{kernel}I" in n and f"Li{threads}E" in n]
    return name


@cache
def checked(case: Case, arch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Its results, right and without a report; what is executed on the way counts as covered."""
    return case.check(Engine(library(arch)).run, dtype)
