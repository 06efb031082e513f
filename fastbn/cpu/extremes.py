"""Numbers beyond the type that kernels compute in, which is float32 but for float64 data.

``gamma / sqrt(var + eps)`` is beyond it where the data are subnormal (below 1.2e-38); weights may have any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn.cpu import vector_plans
from fastbn.cpu.memory import Array, kernel_type_or_none


def find_beyond(kept: int, rstd: Any, gamma: Any) -> Callable[[Array, Array | None], bool]:
    """``beyond(rstd, gamma)``: whether channels of float32 data, or narrower, are to be normalized in float64."""
    launch = vector_plans.find_beyond(kept, (kernel_type_or_none(rstd), kernel_type_or_none(gamma))).prepared()

    def beyond(rstd: Array, gamma: Array | None) -> bool:
        out = np.empty(1)
        launch(rstd, gamma, out)
        return bool(out[0])

    return beyond


def weight_in_range(weight: Array | None, x: Array) -> tuple[Array | None, int]:
    """The weight over 2^k, and k: 0, unless products with float32 squares could leave the range."""
    if weight is None or weight.dtype == np.bool_ or x.itemsize == 8 or weight.size == 0:
        return weight, 0
    _, k = math.frexp(float(weight.max()))
    return (weight, 0) if abs(k) <= 60 else (np.ldexp(weight, -k), k)
