"""Formulas on per-channel float64 numbers that the functions and the backends share.

Divisions by zero give what the formulas say, infinity or NaN, without a warning: counts are 0 where a channel has no
samples, variances where it is constant and eps is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def reciprocal_std(var: Any, eps: float) -> Any:
    """``1 / sqrt(var + eps)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 / np.sqrt(var + eps)


def batch_rstd(count: Any, m2: Any, eps: float) -> Any:
    """The same of a batch's moments, with the biased variance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return reciprocal_std(m2 / count, eps)


def unit_of(rstd: Any, itemsize: int) -> Any:
    """The power of two below an rstd further than 30 binary orders from 1, else 1; kernels compute in its terms.

    So neither rstd^2 nor a product with it leaves the type that elements of this size are computed in.
    """
    most = 1000 if itemsize == 8 else 120
    _, exponent = np.frexp(rstd)
    far = (rstd > 0) & (rstd < np.inf) & ((rstd < 2.0**-30) | (rstd > 2.0**30))
    return np.where(far, np.ldexp(1.0, np.clip(exponent - 1, -most, most)), 1.0)


def input_numbers(
    gamma: Any, rstd: Any, dgamma: Any, dbeta: Any, count: Any, dmean: Any, dvar: Any, itemsize: int
) -> tuple[Any, Any, Any, Any]:
    """unit, scale, offset, slope of ``dx = unit * (scale * dz - w * (offset + slope * (x - mean)))``."""
    unit = unit_of(rstd, itemsize)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = gamma * (rstd / unit)
        offset = (scale * dbeta - dmean / unit) / count
        return unit, scale, offset, (scale * rstd * dgamma - 2.0 * dvar / unit) / count
