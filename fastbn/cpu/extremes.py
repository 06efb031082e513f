"""Numbers beyond the type that kernels compute in, which is float32 but for float64 data.

``gamma / sqrt(var + eps)`` is beyond it where the data are subnormal (below 1.2e-38); weights may have any size.
"""

from __future__ import annotations

import math

import numpy as np

from fastbn.cpu.memory import Array

LEAST_EPS = 1e-30  # an eps from here on keeps the reciprocal deviation below 1e15
_MOST = float(np.finfo(np.float32).max)


def beyond_float32(rstd: Array, gamma: Array | None) -> bool:
    """Whether some channel of float32 data, or narrower, is to be normalized in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.abs(rstd.astype(np.float64) * (1.0 if gamma is None else gamma))
    return bool(((scale > _MOST) & (scale < np.inf)).any())


def weight_in_range(weight: Array | None, x: Array) -> tuple[Array | None, int]:
    """The weight over 2^k, and k: 0, unless products with float32 squares could leave the range."""
    if weight is None or weight.dtype != np.float64 or x.itemsize == 8 or weight.size == 0:
        return weight, 0
    _, k = math.frexp(float(weight.max()))
    return (weight, 0) if abs(k) <= 60 else (np.ldexp(weight, -k), k)
