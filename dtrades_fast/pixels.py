"""Pixel values such as ``8/255``, kept as they were written: 8/255 is not 0.031."""

from __future__ import annotations

import math
from fractions import Fraction

__all__ = ["pixels"]


def pixels(value: str | float, name: str = "epsilon") -> float:
    """The number that ``"8/255"``, ``"0.031"`` or ``0.3`` stands for, in units of the [0, 1] pixel range.

    Raises:
        ValueError: not a fraction or a finite number >= 0.
    """
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a number >= 0 in pixel units of [0, 1], e.g. 8/255 or 0.3, got {value!r}")
    return number
