"""Statistics in exact arithmetic: the values of an array as integers of one exponent, their sums, and one rounding.

Sums of float64 values from 1e-308 to 1e308 have some 2000 bits; Python's integers hold them, and their division rounds
correctly, to subnormal numbers, too. About 0.3 us a value and a sum.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from fastbn.check import ROUNDING

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
MEAN = {"float32": 4e-8, "float64": 1e-15}  # of the mean of |x|: with a rounding to float32, 1e-7
SPREAD = {"float32": 1e-6, "float64": 1e-13}  # of the variance


def integers(x):
    """Integers and an exponent: ``x == integers * 2**exponent``, with 0 for what is not finite."""
    if x.dtype.kind in "iub":
        return np.asarray(x.astype(int) if x.dtype.kind == "b" else x).astype(object), 0
    fraction, exponent = np.frexp(np.where(np.isfinite(x), x, 0).astype(np.float64))
    mantissa = np.asarray(fraction * 2.0**53).astype(np.int64)
    least = int(exponent[mantissa != 0].min(initial=1100)) - 53
    shifts = np.where(mantissa == 0, 0, exponent - 53 - least)
    return np.asarray(mantissa.astype(object) << np.asarray(shifts).astype(object), object), least


def quotient(numerator, denominator, exponent):
    """``numerator / denominator * 2**exponent``, correctly rounded; infinite beyond float64; NaN of 0 / 0."""
    if denominator == 0:
        return math.nan if numerator == 0 else math.inf
    numerator, denominator = numerator << max(exponent, 0), denominator << max(-exponent, 0)
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def root(numerator, denominator, exponent):
    """The root of ``numerator / denominator * 2**exponent``, to a relative 2^-100 and one rounding."""
    if denominator == 0 or numerator == 0:
        return quotient(numerator, denominator, 0)
    shift = 200 + denominator.bit_length()
    shift += (exponent - shift) % 2
    return quotient(math.isqrt((numerator << shift) // denominator), 1, (exponent - shift) // 2)


def elementwise(function, *arrays):
    """Float64 results of a function of Python's numbers."""
    arrays = np.broadcast_arrays(*(np.asarray(a, object) for a in arrays))
    found = np.empty(arrays[0].shape)
    found.flat = [function(*numbers) for numbers in zip(*(a.flat for a in arrays), strict=True)]
    return found


@dataclass
class Exact:
    """Sums over axes of the elements of x that are selected: all of them, those in `where`, those not NaN.

    Attributes are arrays of the shape that ``keepdims=True`` gives: float64, each rounded once.
    """

    count: Any
    mean: Any
    magnitude: Any  # the mean of |x|
    numerator: Any  # count^2 times the variance, as integers
    exponent: int
    undefined: Any  # where a NaN or an infinity takes part
    found: dict = field(default_factory=dict)

    def _spread(self, function, ddof):
        if (function, ddof) not in self.found:
            ddof_ = ddof if isinstance(ddof, int) else Fraction(ddof)
            divisors = [Fraction(n * max(n - ddof_, 0)) for n in self.count.ravel().tolist()]
            ratios = zip(self.numerator.flat, divisors, strict=True)
            values = [function(n * d.denominator, d.numerator, 2 * self.exponent) for n, d in ratios]
            shaped = np.reshape(np.array(values, float), self.count.shape)
            self.found[function, ddof] = np.where(self.undefined | (self.count == 0), np.nan, shaped)
        return self.found[function, ddof]

    def var(self, ddof=0):
        return self._spread(quotient, ddof)

    def std(self, ddof=0):
        return self._spread(root, ddof)

    @property
    def m2(self):
        """Of `moments`: 0 where nothing is selected."""
        counts = np.maximum(self.count, 1).astype(object)
        values = elementwise(lambda n, c: quotient(n, c, 2 * self.exponent), self.numerator, counts)
        return np.where(self.undefined, np.nan, values)


def exact(x, axis=None, where=True, skip_nan=False):
    """`Exact` of an array of real numbers, as large as patience allows."""
    x = np.asarray(x)
    numbers, exponent = integers(x)
    squares = np.asarray(numbers * numbers, object)
    finite = np.ones(x.shape, bool)
    selected = np.broadcast_to(np.asarray(where), x.shape)
    if x.dtype.kind not in "iub":
        finite = np.isfinite(x)
        selected = selected & ~np.isnan(x) if skip_nan else selected

    def total(values, dtype=object):
        return np.asarray(np.sum(values, axis=axis, where=selected, keepdims=True, initial=0, dtype=dtype), dtype)

    count, first, second = total(1 + 0 * finite, int), total(numbers), total(squares)
    mean = elementwise(lambda s, n: quotient(s, n, exponent), first, count.astype(object))
    bad = total(~finite, int) > 0
    if bad.any():
        with np.errstate(invalid="ignore"):
            limits = total(np.where(finite, 0.0, x.astype(np.float64)), float)
        mean = np.where(bad, limits, mean)
    magnitude = elementwise(
        lambda s, n: quotient(s, n, exponent), total(np.asarray(abs(numbers), object)), count.astype(object)
    )
    spread = np.asarray(count.astype(object) * second - first * first, object)
    return Exact(count, mean, magnitude, spread, exponent, bad)


def excess(actual, expected, magnitude, relative):
    """How far float results lie beyond their bound, which is one rounding to their dtype and `relative * magnitude`.

    NaN and infinities must be where they are expected; 0 or less is right.
    """
    actual = np.asarray(actual)
    name = actual.dtype.name
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.asarray(expected).astype(actual.dtype).astype(np.float64)
        actual = actual.astype(np.float64)
        bound = 1.01 * ROUNDING[name] * np.abs(expected) + relative * magnitude + 0.51 * SMALLEST[name]
        same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
        beyond = np.abs(actual - expected) - bound
    return np.where(same, 0.0, np.where(np.isnan(beyond), np.inf, beyond))
