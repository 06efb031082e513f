"""Formulas on per-channel float64 numbers that the functions and the backends share.

Divisions by zero give what the formulas say, infinity or NaN, without a warning: counts are 0 where a channel has no
samples, variances where it is constant and eps is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

LEAST_EPS = 1e-30  # from here on 1 / std is below 1e15, so that y of narrow dtypes is never computed in float64


def reciprocal_std(var: Any, eps: float) -> Any:
    """``1 / sqrt(var + eps)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 / np.sqrt(var + eps)


def batch_rstd(count: Any, m2: Any, eps: float) -> Any:
    """The same of a batch's moments, with the biased variance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return reciprocal_std(m2 / count, eps)


def rstd_with(xp: Any, rstd: Any, eps: float) -> Any:
    """With eps, from an rstd without; the variance may be beyond float64."""
    if eps == 0.0:
        return rstd
    with np.errstate(over="ignore", invalid="ignore"):
        added = rstd * rstd * eps
        return xp.where(added == np.inf, 1.0 / math.sqrt(eps), rstd / xp.sqrt(1.0 + added))


def united(xp: Any, parts: Iterable[tuple[Any, Any, Any, Any]]) -> tuple[Any, Any, Any, Any]:
    """Count, mean and m2 of a union whose means are each the sum of two numbers: (count, hi, lo, m2) of each part.

    ``hi`` is the sum rounded to float64. So merging adds no error of the mean's size, however many parts there are.
    """
    first, *others = parts
    n, hi, lo, m2 = (xp.array(a, dtype=xp.float64) for a in first)
    rest = xp.zeros_like(m2)  # of m2: 20 000 equal parts would cost a digit and a half
    with np.errstate(all="ignore"):
        for count, other_hi, other_lo, other_m2 in others:
            together = xp.asarray(n + count)
            share = count / together
            delta = (other_hi - hi) + (other_lo - lo)
            high, low = two_sum(hi, lo + delta * share)
            # Infinities, or finite means so far apart that their difference overflows.
            finite = xp.isfinite(delta)
            high = xp.where(finite, high, hi * (n / together) + other_hi * share)
            squares, left = two_sum(m2, other_m2 + delta * delta * (n * share))
            squares = xp.where(xp.isfinite(high), squares, np.nan)
            both, none = (count != 0) & (n != 0), n == 0
            hi = xp.where(both, high, xp.where(none, other_hi, hi))
            lo = xp.where(both, xp.where(finite, low, 0.0), xp.where(none, other_lo, lo))
            m2 = xp.where(both, squares, xp.where(none, other_m2, m2))
            rest = rest + xp.where(both & xp.isfinite(left), left, 0.0)
            n = together
    return n, hi, lo, xp.where(rest == 0, m2, m2 + rest)


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The rounded sum and what rounding left of it (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B)."""
    total = a + b
    shared = total - a
    return total, (a - (total - shared)) + (b - shared)


def running(
    xp: Any, mean: Any, var: Any, count: Any, batch_mean: Any, m2: Any, rate: float, correction: float,
    skip_nonfinite: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Running mean and variance after one more batch, of count, mean and M2, in float64.

    Channels with ``count <= correction`` stay as they are.
    """
    divisor = count - correction
    batch_var = m2 / xp.where(divisor > 0, divisor, np.nan)
    update = count > correction
    if skip_nonfinite:
        update = update & xp.isfinite(batch_mean) & xp.isfinite(batch_var)
    results = []
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs
        for array, batch in ((mean, batch_mean), (var, batch_var)):
            old = array.astype(xp.float64)
            # The ends are exact and take nothing of the other side, which may be infinite.
            mixed = batch if rate == 1 else old if rate == 0 else (1.0 - rate) * old + rate * batch
            results.append(xp.where(update, mixed, old))
    return results[0], results[1]
