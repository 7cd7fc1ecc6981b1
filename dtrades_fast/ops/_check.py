"""Argument checks shared by the operators: each error names the argument, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FLOATING = "float32, float64, float16 or bfloat16"


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must have dtype {_FLOATING}, got {x.dtype}")


def logits(name: str, x: Tensor) -> None:
    floating(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, C] with at least one class, got {list(x.shape)}")


def images(name: str, x: Tensor) -> None:
    floating(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape [N, ...], one entry per sample first, got a scalar")


def same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` must agree with ``other`` in dtype, shape and device."""
    floating(name, x)
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}")
    on_device(name, x, other_name, other)


def on_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def indices(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """int64 [N], one entry per row of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {x.dtype}")
    _one_per_row(name, x, other_name, other)


def labels(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Class indices of the rows of ``other`` [N, C]. Values are checked where that costs no synchronisation."""
    indices(name, x, other_name, other)
    values_hidden = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x) or x.device.type != "cpu"
    if values_hidden or x.shape[0] == 0:
        return
    low, high = (int(v) for v in torch.aminmax(x))
    if low < 0 or high >= other.shape[1]:
        wrong = low if low < 0 else high
        classes = other.shape[1]
        raise ValueError(f"{name} must lie in 0..{classes - 1} ({other_name} has {classes} classes), got {wrong}")


def per_row(name: str, x: Tensor, dtype: torch.dtype, other_name: str, other: Tensor) -> None:
    """[N] in ``dtype``, one entry per row of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, in which {other_name} is computed, got {x.dtype}")
    _one_per_row(name, x, other_name, other)


def _one_per_row(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dim() != 1 or x.shape[0] != other.shape[0]:
        rows = other.shape[0]
        raise ValueError(f"{name} must have shape [{rows}], one per row of {other_name}, got {list(x.shape)}")
    on_device(name, x, other_name, other)


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def number(name: str, value: float, minimum: float = -math.inf, *, finite: bool = True) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    # comparisons, which are false for NaN, instead of math.isnan: torch.compile can trace them for a symbolic float
    if not value >= minimum or (finite and not -math.inf < value < math.inf):
        kind = "a finite number" if finite else "a number"
        at_least = f" of at least {minimum:g}" if minimum != -math.inf else ""
        raise ValueError(f"{name} must be {kind}{at_least}, got {value}")


def interval(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    number(lower_name, lower, finite=False)
    number(upper_name, upper, finite=False)
    if lower > upper:
        raise ValueError(f"{lower_name} must not exceed {upper_name}, got {lower} and {upper}")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
