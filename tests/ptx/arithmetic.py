"""What the arithmetic instructions of PTX compute, as functions on numpy arrays.

``SEMANTICS[mnemonic]`` has every instruction that is known. Rounding is IEEE's, exactly; the approximations of the
hardware (``.approx``) are rounded exact values here, and may be perturbed by the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Values = np.ndarray
#: The types of PTX. Half precision is handled as its bits.
DTYPES = {"pred": np.bool_, "f16": np.uint16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
DTYPES |= {f"{kind}{8 * size}": np.dtype(f"u{size}").type for kind in "bu" for size in (1, 2, 4, 8)}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}").type for size in (1, 2, 4, 8)}
SIZES = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}


@dataclass(frozen=True)
class Semantics:
    function: Callable[..., Values]
    operands: tuple[str, ...]  # their types
    result: str  # its type


# ---- rounding ------------------------------------------------------------------------------------------------------


def two_sum(a: Values, b: Values) -> tuple[Values, Values]:
    """a + b rounded, and what rounding left out (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def two_product(a: Values, b: Values) -> tuple[Values, Values]:
    """a * b rounded, and what rounding left out (Dekker)."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    product = a * b
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x: Values) -> tuple[Values, Values]:
    """Upper and lower half of the digits (Veltkamp)."""
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


def sum_to_odd(a: Values, b: Values) -> Values:
    """a + b in double, rounded to the neighbour with an odd last bit where it is not exact.

    Rounding that once more, to at least two digits less, gives what rounding a + b at once would give.
    """
    total, error = two_sum(a, b)
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    return np.where(inexact, bits + away, bits).view(np.float64)


def fma_f32(a: Values, b: Values, c: Values) -> Values:
    return _exact_fma_f32(a, b, c).astype(np.float32)


def fma_f32_down(a: Values, b: Values, c: Values) -> Values:
    """Rounded towards -infinity."""
    exact = _exact_fma_f32(a, b, c)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _exact_fma_f32(a: Values, b: Values, c: Values) -> Values:
    """The product of two floats is exact in double."""
    a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
    return sum_to_odd(a * b, c)


def fma_f64(a: Values, b: Values, c: Values) -> Values:
    """Rounded once (Boldo and Melquiond 2008), where nothing over- or underflows on the way; else with fractions."""
    product, product_error = two_product(a, b)
    low, low_error = two_sum(c, product_error)
    high, high_error = two_sum(product, low)
    result = high + sum_to_odd(low_error, high_error)

    size = np.abs(product)
    tame = (size >= 2.0**-900) & (size <= 2.0**900) & (np.maximum(np.abs(a), np.abs(b)) <= 2.0**900)
    tame &= np.abs(c) <= 2.0**900
    if tame.all():
        return result
    a, b, c = np.broadcast_arrays(a, b, c)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    plain = ~finite | (a == 0) | (b == 0)  # nothing is rounded, or only the sum
    result = np.where(plain, a * b + c, result)
    for i in np.flatnonzero(~tame & ~plain):
        result[i] = _fraction_fma(float(a[i]), float(b[i]), float(c[i]))
    return result


def _fraction_fma(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        size = float(abs(exact))
    except OverflowError:
        size = math.inf
    return -size if exact < 0 else size


def flush(x: Values) -> Values:
    """.ftz: subnormal floats become zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def saturate(x: Values) -> Values:
    """To [0, 1], and NaN to 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def exp2_approx(x: Values) -> Values:
    return flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32))


def reciprocal_approx(x: Values) -> Values:
    """Only the upper 32 bits of the operand are looked at, and only those of the result are set."""
    upper = np.uint64(0xFFFF_FFFF_0000_0000)
    x = (np.asarray(x).view(np.uint64) & upper).view(np.float64)
    x = np.where(np.abs(x) < np.finfo(np.float64).tiny, np.copysign(0.0, x), x)
    return ((1 / x).view(np.uint64) & upper).view(np.float64)


# ---- half precision ------------------------------------------------------------------------------------------------


def to_half(x: Values) -> Values:
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x).astype(np.float16).view(np.uint16))


def from_half(bits: Values) -> Values:
    return np.asarray(bits).view(np.float16).astype(np.float32)


def to_bfloat16(x: Values) -> Values:
    bits = np.asarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bfloat16(bits: Values) -> Values:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


# ---- integers ------------------------------------------------------------------------------------------------------


def shift(direction: Callable[..., Values], kind: str) -> Callable[..., Values]:
    """By the width or more: all bits leave, of which right shifts of signed numbers keep the sign."""
    width, dtype = 8 * SIZES[kind], DTYPES[kind]

    def function(x: Values, count: Values) -> Values:
        kept = direction(x, np.minimum(count, width - 1).astype(dtype))
        gone = kept if kind[0] == "s" else dtype(0)
        return np.where(np.asarray(count) >= width, gone, kept)

    return function


def divide(a: Values, b: Values) -> Values:
    if np.any(np.asarray(b) == 0):
        raise ZeroDivisionError("integer division by zero")
    return a // b


def widen_multiply(kind: str) -> Callable[..., Values]:
    wide = DTYPES[f"{kind[0]}{16 * SIZES[kind]}"]
    return lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


# ---- the table -----------------------------------------------------------------------------------------------------

COMPARISONS: dict[str, Callable[..., Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _ordered(compare: Callable[..., Values]) -> Callable[..., Values]:
    return lambda a, b: compare(a, b) & ~unordered(a, b)


def _or_unordered(compare: Callable[..., Values]) -> Callable[..., Values]:
    return lambda a, b: compare(a, b) | unordered(a, b)


def unordered(a: Values, b: Values) -> Values:
    return np.isnan(a) | np.isnan(b)


def _table() -> dict[str, Semantics]:
    table: dict[str, Semantics] = {}

    def define(mnemonic: str, function: Callable[..., Values], operands: str, result: str) -> None:
        table[mnemonic] = Semantics(function, tuple(operands.split()), result)

    integers = [f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64)]
    for t in integers:
        define(f"add.{t}", np.add, f"{t} {t}", t)
        define(f"sub.{t}", np.subtract, f"{t} {t}", t)
        define(f"mul.lo.{t}", np.multiply, f"{t} {t}", t)
        define(f"min.{t}", np.minimum, f"{t} {t}", t)
        define(f"max.{t}", np.maximum, f"{t} {t}", t)
        define(f"shr.{t}", shift(np.right_shift, t), f"{t} u32", t)
        for name, compare in COMPARISONS.items():
            define(f"setp.{name}.{t}", compare, f"{t} {t}", "pred")
        for other in integers:
            define(f"cvt.{other}.{t}", lambda x, to=DTYPES[other]: np.asarray(x).astype(to), t, other)
    for t in ("u16", "s16", "u32", "s32"):
        define(f"mul.wide.{t}", widen_multiply(t), f"{t} {t}", f"{t[0]}{16 * SIZES[t]}")
    for t in ("u32", "u64"):
        define(f"div.{t}", divide, f"{t} {t}", t)
    for t in ("b16", "b32", "b64"):
        define(f"shl.{t}", shift(np.left_shift, t), f"{t} u32", t)
        for name in ("eq", "ne"):
            define(f"setp.{name}.{t}", COMPARISONS[name], f"{t} {t}", "pred")
    for t in ("b16", "b32", "b64", "pred"):
        define(f"and.{t}", np.bitwise_and, f"{t} {t}", t)
        define(f"or.{t}", np.bitwise_or, f"{t} {t}", t)
        define(f"xor.{t}", np.bitwise_xor, f"{t} {t}", t)
        define(f"not.{t}", np.invert, t, t)
    for t in ("b16", "b32", "b64", *integers, "f32", "f64"):
        define(f"selp.{t}", lambda a, b, chosen: np.where(chosen, a, b), f"{t} {t} pred", t)
    for t in ("b16", "b32", "b64", *integers, "f32", "f64", "pred"):
        define(f"mov.{t}", np.array, t, t)
    for t in ("f32", "f64"):
        define(f"add.rn.{t}", np.add, f"{t} {t}", t)
        define(f"sub.rn.{t}", np.subtract, f"{t} {t}", t)
        define(f"mul.rn.{t}", np.multiply, f"{t} {t}", t)
        define(f"div.rn.{t}", np.divide, f"{t} {t}", t)
        define(f"sqrt.rn.{t}", np.sqrt, t, t)
        define(f"rcp.rn.{t}", np.reciprocal, t, t)
        define(f"neg.{t}", np.negative, t, t)
        define(f"abs.{t}", np.abs, t, t)
        define(f"min.{t}", np.fmin, f"{t} {t}", t)
        define(f"max.{t}", np.fmax, f"{t} {t}", t)
        define(f"setp.nan.{t}", unordered, f"{t} {t}", "pred")
        for name, compare in COMPARISONS.items():
            define(f"setp.{name}.{t}", _ordered(compare), f"{t} {t}", "pred")
            define(f"setp.{name}u.{t}", _or_unordered(compare), f"{t} {t}", "pred")
        define(f"cvt.rmi.{t}.{t}", np.floor, t, t)
        for other in ("s32", "u32", "s64", "u64"):
            define(f"cvt.rn.{t}.{other}", lambda x, to=DTYPES[t]: np.asarray(x).astype(to), other, t)
    define("fma.rn.f32", fma_f32, "f32 f32 f32", "f32")
    define("fma.rm.f32", fma_f32_down, "f32 f32 f32", "f32")
    define("fma.rn.f64", fma_f64, "f64 f64 f64", "f64")
    define("ex2.approx.ftz.f32", exp2_approx, "f32", "f32")
    define("rcp.approx.ftz.f64", reciprocal_approx, "f64", "f64")
    define("cvt.sat.f32.f32", saturate, "f32", "f32")
    define("cvt.f64.f32", lambda x: np.asarray(x).astype(np.float64), "f32", "f64")
    define("cvt.rn.f32.f64", lambda x: np.asarray(x).astype(np.float32), "f64", "f32")
    define("cvt.f32.f16", from_half, "f16", "f32")
    define("cvt.rn.f16.f32", to_half, "f32", "f16")
    define("cvt.f32.bf16", from_bfloat16, "bf16", "f32")
    define("cvt.rn.bf16.f32", to_bfloat16, "f32", "bf16")
    define("cvta.to.global.u64", np.array, "u64", "u64")
    return table


SEMANTICS = _table()
