"""Floating-point arithmetic as PTX rounds it, on NumPy arrays.

A float32 fma is taken in float64 and rounded to odd before it is rounded to float32; float64 has that in pairs of
numbers (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums", 2008), and in fractions near the ends of
its range. Approximate instructions err within what the ISA allows, by a number that their input's bits choose:

rcp.approx.ftz.f32           one of the two float32 numbers beside 1 / a: at most 1 ulp, which the ISA states
rcp, rsqrt.approx.ftz.f64    of the upper 32 bits of a, up to two of the last of 20 bits beside the right ones; the ISA
                             gives the format and calls them gross
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any  # np.ndarray of one dimension

U2, U4, U8, I4, I8 = np.uint16, np.uint32, np.uint64, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64

EXPONENT32, SIGN32 = U4(0x7F800000), U4(0x80000000)
SPLIT = F8(2**27 + 1)
LEAST, MOST = F8(2.0**-900), F8(2.0**990)  # of numbers whose products are exact in pairs


def ftz(x: Array) -> Array:
    """Subnormal float32 numbers as zeros of their sign."""
    bits = x.view(U4)
    small = (bits & EXPONENT32) == 0
    return np.where(small, bits & SIGN32, bits).view(F4) if small.any() else x


# --- rounding to odd, and from there ----------------------------------------------------------------------------------


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _to_odd(total: Array, rest: Array) -> Array:
    """A float64 sum whose last bit says whether something was lost, so that it can be rounded again."""
    bits = total.view(I8)
    change = (rest != 0) & (rest == rest) & ((bits & 1) == 0)
    if not change.any():
        return total
    away = (rest > 0) == (total > 0)
    return np.where(change, bits + np.where(away, 1, -1), bits).view(F8)


def narrowed(x: Array, rounding: str = "rn") -> Array:
    """float64 as float32."""
    near = x.astype(F4)
    return near if rounding == "rn" else directed(near, x, rounding)


def directed(near: Array, exact: Array, rounding: str) -> Array:
    """The nearest number's neighbour where it lies on the wrong side; `exact` is float64."""
    over, under = near.astype(F8) > exact, near.astype(F8) < exact
    down = {"rz": over & (exact > 0), "rm": over, "rp": np.zeros_like(over)}[rounding]
    up = {"rz": under & (exact < 0), "rm": np.zeros_like(over), "rp": under}[rounding]
    dtype = near.dtype.type
    lower, upper = np.nextafter(near, dtype(-np.inf)), np.nextafter(near, dtype(np.inf))
    return np.where(down, lower, np.where(up, upper, near))


def fma32(a: Array, b: Array, c: Array, rounding: str = "rn") -> Array:
    product = a.astype(F8) * b.astype(F8)  # exact
    return narrowed(_to_odd(*_two_sum(product, c.astype(F8))), rounding)


def add32(a: Array, b: Array, rounding: str = "rn") -> Array:
    return a + b if rounding == "rn" else fma32(a, np.ones_like(a), b, rounding)


def mul32(a: Array, b: Array, rounding: str = "rn") -> Array:
    return a * b if rounding == "rn" else narrowed(a.astype(F8) * b.astype(F8), rounding)


# --- float64 ----------------------------------------------------------------------------------------------------------


def fma64(a: Array, b: Array, c: Array, rounding: str = "rn") -> Array:
    if rounding != "rn":
        return _each(lambda a, b, c: a * b + c, rounding, a, b, c)
    product, size_c = a * b, np.abs(c)
    zero = (a == 0) | (b == 0)
    size = np.abs(product)
    easy = (zero | ((size > LEAST) & (size < MOST))) & (np.abs(a) < MOST) & (np.abs(b) < MOST)
    easy &= (size_c < MOST) & ((size_c > LEAST) | (c == 0))
    result = _to_pairs(a, b, c, product)
    if zero.any():
        result = np.where(zero, product + c, result)  # the sign of zero, too
    if easy.all():
        return result
    a, b, c, easy = np.broadcast_arrays(a, b, c, easy)  # some may be constants
    finite = np.isfinite(a) & np.isfinite(b)
    result = np.where(easy, result, np.where(finite & np.isinf(c), c, product + c))  # whose product may overflow
    hard = np.nonzero(~easy & finite & np.isfinite(c))[0]
    if hard.size:
        result[hard] = _each(lambda a, b, c: a * b + c, "rn", a[hard], b[hard], c[hard])
    return result


def _to_pairs(a: Array, b: Array, c: Array, high: Array) -> Array:
    part = SPLIT * a
    a1 = part - (part - a)
    a2 = a - a1
    part = SPLIT * b
    b1 = part - (part - b)
    b2 = b - b1
    low = a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2)
    middle, least = _two_sum(c, low)
    most, rest = _two_sum(high, middle)
    return most + _to_odd(*_two_sum(least, rest))


def add64(a: Array, b: Array, rounding: str = "rn") -> Array:
    return a + b if rounding == "rn" else _each(lambda a, b: a + b, rounding, a, b)


def mul64(a: Array, b: Array, rounding: str = "rn") -> Array:
    return a * b if rounding == "rn" else _each(lambda a, b: a * b, rounding, a, b)


def _each(formula: Callable[..., Any], rounding: str, *given: Array) -> Array:
    """Number by number, in fractions."""
    given = np.broadcast_arrays(*given)
    natural = formula(*given)  # of infinities and NaN, and of zeros with their signs
    result = np.array(natural)
    for i, numbers in enumerate(zip(*(g.tolist() for g in given), strict=True)):
        if all(map(math.isfinite, numbers)) and (exact := formula(*map(Fraction, numbers))) != 0:
            result[i] = _rounded(exact, rounding)
    return result


def _rounded(exact: Fraction, rounding: str) -> float:
    try:
        near = math.copysign(float(exact), -1.0 if exact < 0 else 1.0)  # the nearest; Python divides integers right
    except OverflowError:
        near = math.inf if exact > 0 else -math.inf
    if rounding == "rn":
        return near
    over = near == math.inf or (math.isfinite(near) and Fraction(near) > exact)
    under = near == -math.inf or (math.isfinite(near) and Fraction(near) < exact)
    if over and (rounding == "rm" or (rounding == "rz" and exact > 0)):
        return math.nextafter(near, -math.inf)
    if under and (rounding == "rp" or (rounding == "rz" and exact < 0)):
        return math.nextafter(near, math.inf)
    return near


# --- minima and maxima ------------------------------------------------------------------------------------------------


def smallest(a: Array, b: Array) -> Array:
    """Of a number and NaN the number; -0 is below 0."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))


def largest(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


# --- conversions ------------------------------------------------------------------------------------------------------


def to_half(x: Array, rounding: str = "rn") -> Array:
    """float32 as bits of a float16."""
    half = x.astype(F2)
    if rounding != "rn":
        half = directed(half, x.astype(F8), rounding)
    return np.where(np.isnan(x), U2(0x7FFF), half.view(U2))


def from_half(bits: Array) -> Array:
    return bits.view(F2).astype(F4)


def to_bfloat16(x: Array, rounding: str = "rn") -> Array:
    """float32 as bits of a bfloat16."""
    bits = x.view(U4)
    if rounding == "rn":
        bits = bits + (U4(0x7FFF) + ((bits >> U4(16)) & U4(1)))
    return np.where(np.isnan(x), U2(0x7FFF), (bits >> U4(16)).astype(U2))


def integers(x: Array, dtype: Any, rounding: str) -> Array:
    """float as integer, within its range; of NaN the bit of the sign where one of the two has 64 bits, otherwise 0."""
    info = np.iinfo(dtype)
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(F8))
    high, low = whole >= F8(2.0 ** (info.bits - (info.kind == "i"))), whole <= F8(info.min)
    found = np.where(high | low | np.isnan(whole), F8(0), whole).astype(dtype)
    found = np.where(high, dtype(info.max), np.where(low, dtype(info.min), found))
    nan = np.array(1 << (info.bits - 1), f"u{info.bits // 8}").view(dtype) if 8 in (x.itemsize, info.bits // 8) else 0
    return np.where(np.isnan(whole), dtype(nan), found)


# --- approximations ---------------------------------------------------------------------------------------------------


def chosen(bits: Array, choices: int) -> Array:
    """A number below `choices` that bits choose."""
    mixed = bits.astype(U8) * U8(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> U8(29))) * U8(0xBF58476D1CE4E5B9)
    return ((mixed >> U8(40)) % U8(choices)).astype(I8)


def reciprocal32(x: Array, flush: bool = True) -> Array:
    x = ftz(x) if flush else x
    exact = F8(1) / x.astype(F8)
    above = directed(exact.astype(F4), exact, "rp")
    below = directed(exact.astype(F4), exact, "rm")
    result = np.where(chosen(x.view(U4), 2) == 0, below, above)
    return ftz(result) if flush else result


def _gross(x: Array, formula: Callable[[Array], Array]) -> Array:
    """A function of the upper 32 bits, whose result has the upper 32 bits; subnormal numbers are zeros."""
    bits = x.view(U8)
    upper = bits & U8(0xFFFFFFFF00000000)
    upper = np.where((bits & U8(0x7FF0000000000000)) == 0, bits & U8(0x8000000000000000), upper)
    exact = formula(upper.view(F8))
    found = exact.view(U8) & U8(0xFFFFFFFF00000000)
    off = (chosen(bits >> U8(32), 5) - 2).view(U8) << U8(32)
    normal = np.isfinite(exact) & (exact != 0)
    power_of_2 = (found & U8(0x000FFFFF00000000)) == 0  # below which the last bit is worth half
    found = np.where(normal & ~power_of_2, found + off, found)
    found = np.where((found & U8(0x7FF0000000000000)) == 0, found & U8(0x8000000000000000), found)
    return np.where(np.isnan(exact), U8(0x7FFFFFFF00000000), found).view(F8)


def reciprocal64(x: Array) -> Array:
    return _gross(x, lambda upper: F8(1) / upper)


def reciprocal_sqrt64(x: Array) -> Array:
    return _gross(x, lambda upper: F8(1) / np.sqrt(upper))
