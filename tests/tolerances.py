"""How far a result may lie from the float64 oracle, and why: factors of scales that a check takes from the oracle."""

import numpy as np

from fastbn.check import COMPUTE, ROUNDING

BOUNDS = {
    # dtype-independent bounds of the statistics (the contract, section numerics): relative to |mean| + std, and to var
    "mean": {"float16": 1e-7, "bfloat16": 1e-7, "float32": 1e-7, "float64": 1e-15},
    "var": {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-13},
    # weights enter sums in the compute type, rounded once, beside the statistics' own error
    "count": {"float16": 1e-14, "bfloat16": 1e-14, "float32": 1e-14, "float64": 1e-14},
}


def elementwise(dtype, expected, scale):
    """Of y and dx: one rounding of the result, and 8 roundings of intermediate values as large as ``scale``."""
    name = np.dtype(dtype).name
    smallest = {"float16": 2.0**-25, "bfloat16": 2.0**-134}.get(name, 0.0)  # rounding of subnormal results
    return 1.01 * ROUNDING[name] * np.abs(expected) + 8 * COMPUTE[name] * scale + smallest


def summed(dtype, magnitude):
    """Of dgamma and dbeta: 20 roundings in the compute type, relative to the sum of the magnitudes."""
    return 20 * COMPUTE[np.dtype(dtype).name] * magnitude + 1e-300
