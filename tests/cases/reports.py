"""How what a public report asks for is compared."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
LARGEST = np.finfo(F64).max
HALF_ULP = 2.0**-11  # of a float16 result


def rng():
    return np.random.default_rng(0)


def reports(table):
    return pytest.mark.parametrize("report", table.values(), ids=table.keys())


def hold(outcome):
    if outcome is not None:
        actual, expected, *rtol = outcome
        actual, expected = (np.asarray(a, F64) for a in (actual, expected))
        np.testing.assert_allclose(actual, expected, rtol=rtol[0] if rtol else 0, atol=0)


def exact_var(values, ddof=0):
    values = [Fraction(float(v)) for v in values]
    mean = sum(values) / len(values)
    return float(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def normal(*shape, dtype=F32, loc=0.0, seed=0):
    return (loc + np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
