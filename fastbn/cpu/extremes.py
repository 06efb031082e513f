"""Data that deviate so little that ``gamma / sqrt(var + eps)`` is beyond the type which kernels compute in.

That type is float32 but for float64 data, and only what is subnormal there (below 1.2e-38) deviates so little.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.cpu.memory import Array

LEAST_EPS = 1e-30  # from here on the reciprocal deviation is below 1e15, and nothing is asked
_MOST = float(np.finfo(np.float32).max)


def needs_float64(x: Array, rstd: Array, gamma: Any, eps: float | None) -> bool:
    """Whether some channel of x is to be normalized in float64; without eps the rstd may be anything."""
    if x.itemsize == 8 or (eps is not None and eps >= LEAST_EPS):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.abs(rstd * gamma)
    return bool(((scale > _MOST) & (scale < np.inf)).any())
