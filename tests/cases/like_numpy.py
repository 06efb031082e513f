"""The comparison of `mean`, `var` and `std` with NumPy's: value, dtype, shape, scalar or array, warnings.

Dtype, shape, type and warnings are compared with what NumPy makes of the same call. Values are compared with NumPy's in
extended precision: its own float32 and float16 sums are less accurate than what is tested here.
"""

import warnings

import numpy as np
import pytest

import fastbn
from tests import tolerances

FUNCTIONS = ["mean", "var", "std"]
by_function = pytest.mark.parametrize("function", FUNCTIONS)
by_spread = pytest.mark.parametrize("function", ["var", "std"])
by_keepdims = pytest.mark.parametrize("keepdims", [False, True])

SHAPE = (2, 3, 4, 5)


def numbers(shape=SHAPE, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + 3).astype(dtype)


# --- the comparison ---------------------------------------------------------------------------------------------------


def run(function, x, **options):
    """The result and the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(x, **options)
    return result, [(w.category, str(w.message).rstrip(".")) for w in caught]


def about_slices(caught):
    return [warning for warning in caught if warning[1].endswith("slice")]


def extended(function, x, **options):
    """NumPy's value of a statistic, free of overflow and of rounding that could be seen."""
    options = {name: value for name, value in options.items() if name not in ("dtype", "out")}
    return run(getattr(np, function), np.asarray(x).astype(np.longdouble), **options)[0]


def assert_close(function, actual, exact, std, of):
    """Within the tests' bound for data of this dtype; infinities and NaN in the same places."""
    what = "mean" if function == "mean" else "var"
    scale = np.abs(exact) + (std if what == "mean" else 0.0)
    bound = 1.01 * tolerances.ROUNDING[actual.dtype.name] * np.abs(exact)
    bound = bound + tolerances.BOUNDS[what].get(of.name, tolerances.BOUNDS[what]["float64"]) * np.nan_to_num(
        scale, posinf=0.0
    )
    with np.errstate(over="ignore"):
        expected = np.asarray(exact).astype(actual.dtype).astype(np.longdouble)
    actual = np.asarray(actual).astype(np.longdouble)
    with np.errstate(invalid="ignore"):
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        same |= np.isfinite(exact) & (np.abs(actual - exact) <= bound)
    assert same.all(), f"{function}: expected {expected}, got {actual}"


def assert_like_numpy(function, x, **options):
    """fastbn's and NumPy's call agree; x is only read. Returns fastbn's result."""
    before = x.tobytes() if isinstance(x, np.ndarray) else None
    numpys, numpys_warnings = run(getattr(np, function), x, **options)
    actual, caught = run(getattr(fastbn, function), x, **options)

    assert type(actual) is type(numpys)
    assert actual.dtype == numpys.dtype
    assert actual.shape == numpys.shape
    assert about_slices(caught) == about_slices(numpys_warnings)
    assert set(caught) <= set(numpys_warnings)
    spread = {name: options[name] for name in ("axis", "keepdims", "where") if name in options}
    exact, std = extended(function, x, **options), extended("std", x, **spread)
    assert_close(function, actual, exact, std, np.asarray(x).dtype)
    if before is not None:
        assert x.tobytes() == before
    return actual


WRONG = {
    "value": lambda result: result * np.float32(1 + 1e-5),
    "one value": lambda result: result + np.float32(1e-3) * (np.arange(result.size).reshape(result.shape) == 7),
    "dtype": lambda result: result.astype(np.float64),
    "shape": lambda result: result[None],
    "nan": lambda result: result * np.float32(np.nan),
    "no infinity": lambda result: np.nan_to_num(result, posinf=1, nan=1),
}


@by_function
@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_can_fail(wrong, function, monkeypatch):
    x, right = numbers(), getattr(fastbn, function)
    if wrong == "no infinity":
        x[0, 0, 0, 0] = np.inf
    assert_like_numpy(function, x, axis=0)
    monkeypatch.setattr(fastbn, function, lambda *a, **k: WRONG[wrong](right(*a, **k)))
    with pytest.raises(AssertionError):
        assert_like_numpy(function, x, axis=0)
