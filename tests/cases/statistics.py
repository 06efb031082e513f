"""`mean`, `var` and `std` of arrays as NumPy has them: axes, dtypes, strides, edges."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from tests import support, tolerances
from tests.cases.like_numpy import SHAPE, assert_like_numpy, by_function, by_keepdims, numbers, run

AXES = [
    None, 0, 1, 3, -1, -4, np.int64(2), (),
    (0,), (0, 2), (1, 3), (0, 3), (1, 2), (-1, 0), (0, 2, 3), (3, 1, 0), (0, 1, 2, 3),
]  # fmt: skip

# --- signatures, axes and dtypes --------------------------------------------------------------------------------------


@by_function
def test_positional_arguments(function):
    x, out = numbers((3, 4)), np.zeros((1, 4))
    arguments = (0, np.float64, out, True) if function == "mean" else (0, np.float64, out, 1, True)
    assert getattr(fastbn, function)(x, *arguments) is out
    np.testing.assert_allclose(out, getattr(np, function)(x, *arguments), rtol=1e-6)


@by_keepdims
@pytest.mark.parametrize("axis", AXES, ids=str)
@by_function
def test_axes(function, axis, keepdims):
    assert_like_numpy(function, numbers(), axis=axis, keepdims=keepdims)


@pytest.mark.parametrize("shape", [(6,), (1,), (4, 1), (1, 5), (1, 1, 1), (3, 1, 2, 1, 2, 1)], ids=str)
@by_function
def test_sizes_of_one(function, shape):
    for axis in (None, 0, -1):
        assert_like_numpy(function, numbers(shape), axis=axis)


@by_function
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_float_dtypes(dtype, function):
    x = numbers(dtype=support.DTYPES[dtype])
    for axis in (None, 0, (0, 2)):
        assert_like_numpy(function, x, axis=axis)


@by_function
@pytest.mark.parametrize("code", support.some_slow("?" + np.typecodes["AllInteger"], "Bl"))
def test_integers(code, function):
    """In float64, as near to NumPy as one rounding or two; sums do not wrap round.

    NumPy rounds numbers beyond 2^53 before it adds them up: its mean of -2^63 and 2^63 - 1 is 0, not -0.5.
    """
    rng = np.random.default_rng(1)
    low, high = (0, 1) if code == "?" else (np.iinfo(code).min, np.iinfo(code).max)
    inputs = [
        np.eye(3, dtype=code),
        rng.integers(0, 2, (3, 300)).astype(code) * np.array(high, code),
        np.array([[low, high, high, 1], [high, high, low, low]], code),
        np.full(1000, high, code),
    ]
    for x in inputs:
        for axis in (None, 0, -1):
            actual, expected = getattr(fastbn, function)(x, axis=axis), getattr(np, function)(x, axis=axis)
            assert type(actual) is type(expected)
            assert actual.dtype == np.float64
            rounded = function == "mean" and x.dtype.itemsize == 8
            off = np.abs(x.astype(float)).mean(axis) * 2.0**-53 if rounded else np.zeros_like(expected)
            assert (np.abs(actual - expected) <= 1e-15 * np.abs(expected) + off).all()


def test_float16_sums_do_not_overflow():
    assert fastbn.mean(np.ones(100_000, np.float16)) == 1
    assert fastbn.mean(np.full((64, 3), 60_000, np.float16), axis=0).tolist() == [60_000] * 3
    x = np.array([-50_000, 50_000, -50_000, 50_000], np.float16)
    assert fastbn.std(x) == np.float16(50_000)
    assert fastbn.var(x) == np.inf  # 2.5e9 is beyond float16
    assert fastbn.var(x, dtype=np.float32) == np.float32(np.float64(x[1]) ** 2)


def test_float32_sums_do_not_drift():
    """NumPy's own float32 mean over axis 0 of such data is off in the fifth digit, its variance altogether."""
    x = (100 + np.random.default_rng(2).random((1 << 18, 3))).astype(np.float32)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(fastbn.mean(x, axis=0), exact.mean(0), rtol=2e-7)
    np.testing.assert_allclose(fastbn.var(x, axis=0), exact.var(0), rtol=1e-6)
    np.testing.assert_allclose(fastbn.std(x, axis=0), exact.std(0), rtol=1e-6)


def test_values_by_hand():
    x = np.array([[1, 2, 3], [4, 5, 6]])
    assert fastbn.mean(x) == 3.5
    assert fastbn.mean(x, 0).tolist() == [2.5, 3.5, 4.5]
    assert fastbn.mean(x, 1).tolist() == [2.0, 5.0]
    assert fastbn.var(x) == float(Fraction(35, 12))
    assert fastbn.var(x, 0).tolist() == [2.25] * 3
    assert fastbn.std(x, 0).tolist() == [1.5] * 3
    np.testing.assert_allclose(fastbn.var(x, 1), [2 / 3] * 2, rtol=1e-15)
    np.testing.assert_allclose(fastbn.std(x), float(Fraction(35, 12)) ** 0.5, rtol=1e-15)


@by_function
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e30])
def test_constants(value, function):
    """The mean is the value and the variance 0, exactly."""
    x = np.full((7, 3), value, np.float32)
    expected = x[0] if function == "mean" else np.zeros(3, np.float32)
    np.testing.assert_array_equal(getattr(fastbn, function)(x, axis=0), expected)


# --- what is taken for an array ---------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, bool])
def test_zero_dimensions(dtype, function):
    x = np.array(3.25).astype(dtype)
    for axis in (None, ()):
        assert_like_numpy(function, x, axis=axis)
        assert_like_numpy(function, x, axis=axis, keepdims=True)
    for axis in (0, -1):
        with pytest.raises(AxisError):
            getattr(fastbn, function)(x, axis=axis)


STRIDES = {
    "C": support.c_order,
    "Fortran": support.fortran,
    "NHWC as NCHW": support.channels_last,
    "slice of channels": support.channel_slice,
    "every other channel": support.channel_steps,
    "slice of positions": support.spatial_slice,
    "every other position": support.spatial_steps,
    "first axis reversed": support.reversed_axes(0),
    "inner axes reversed": support.reversed_axes(2, 3),
    "all axes reversed": support.reversed_axes(0, 1, 2, 3),
    "unaligned": support.unaligned,
    "other byte order": support.swapped_bytes,
    "field of records": lambda shape, dtype: np.empty(shape, [("before", np.int8), ("x", dtype)])["x"],
}


@by_function
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, function):
    x = support.placed(numbers(), STRIDES[strides])
    for axis in (None, 0, 1, 3, (0, 2), (1, 3), (0, 2, 3), ()):
        assert_like_numpy(function, x, axis=axis)


@by_function
@pytest.mark.parametrize("repeated", [(0,), (1,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_strides_of_zero(repeated, function):
    x = support.Layout(SHAPE, repeated=repeated).place(numbers())
    assert any(stride == 0 for stride in x.strides)
    for axis in (None, 0, 1, (0, 2), (1, 3)):
        assert_like_numpy(function, x, axis=axis)


# --- empty, not finite, huge ------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, bool])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_empty(shape, dtype, function):
    x = np.zeros(shape, dtype)
    for axis in (None, *range(len(shape)), ()):
        for keepdims in (False, True):
            assert_like_numpy(function, x, axis=axis, keepdims=keepdims)


SPECIAL = {
    "nan": [1, np.nan, 3, 4],
    "nan first": [np.nan, 2, 3, 4],
    "only nan": [np.nan] * 4,
    "inf": [1, 2, np.inf, 4],
    "inf first": [np.inf, 2, 3, 4],
    "-inf": [1, 2, 3, -np.inf],
    "both": [1, np.inf, -np.inf, 4],
    "infs": [np.inf] * 4,
    "-infs": [-np.inf] * 4,
    "inf and nan": [np.inf, np.nan, 1, 2],
    "zeros": [0.0, -0.0, 0.0, -0.0],
}


@by_function
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("special", SPECIAL)
def test_not_finite(special, dtype, function):
    """The mean keeps an infinity, the variance is NaN then; other slices are not touched."""
    x = np.stack([SPECIAL[special], [1, 2, 4, 8]]).astype(dtype)
    for a, axis in ((x, 1), (np.ascontiguousarray(x.T), 0), (x, None), (x, 0)):
        assert_like_numpy(function, a, axis=axis)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mean_keeps_infinity(dtype):
    x = np.array([[1, np.inf, 3], [-np.inf, 2, 3], [np.inf, -np.inf, 0]], dtype)
    np.testing.assert_array_equal(fastbn.mean(x, axis=1), np.array([np.inf, -np.inf, np.nan], dtype))
    np.testing.assert_array_equal(fastbn.var(x, axis=1), np.full(3, np.nan, dtype))
    long = np.ones(100_000, dtype)  # more than one chunk
    long[77_777] = np.inf
    assert fastbn.mean(long) == np.inf
    assert np.isnan(fastbn.var(long))


HUGE = {
    "equal": [1, 1, 1, 1, 1, 1, 1, 1],
    "near": [1, 0.99, 0.98, 1, 0.97, 0.99, 1, 0.96],
    "negative": [-1, -0.99, -0.98, -1, -1, -1, -1, -1],
    "one": [1e-30, 0, 1e-30, 0, 1, 0, 0, 0],
    "both signs": [1, -1, 1, -1, 1, -1, 1, -0.5],
    "both signs, small first": [0, 1, -1, 1, -1, 1, -1, 0.5],
}


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 3.4e38), (np.float64, 1.7e308)])
@pytest.mark.parametrize("shares", HUGE)
def test_mean_of_huge_values(shares, dtype, largest):
    """Exact in float32; in float64 exact unless it is infinite in NumPy, whose sum overflows."""
    values = (np.array(HUGE[shares]) * largest).astype(dtype)
    sixteenth = np.mean(values.astype(np.float64) / 16)
    bound = 4 * tolerances.ROUNDING[np.dtype(dtype).name] * np.abs(values).max() / 16
    pair = np.stack([values, values])
    for x, axis in ((values, None), (values[:, None], 0), (pair, 1), (np.ascontiguousarray(pair.T), 0)):
        actual = np.asarray(fastbn.mean(x, axis=axis)).astype(np.float64)
        overflows = np.isinf(run(np.mean, x.astype(np.float64), axis=axis)[0])
        near = np.abs(actual / 16 - sixteenth) <= bound
        assert (near | (overflows & (actual == np.sign(sixteenth) * np.inf))).all(), actual


def test_spread_of_huge_values():
    """As far as the result goes: a deviation where NumPy's squares overflow, a variance that does infinite."""
    x = np.array([3e38, 1e38, 2e38, 2e38], np.float32)
    np.testing.assert_allclose(fastbn.std(x), x.astype(np.float64).std(), rtol=1e-6)
    assert fastbn.var(x) == np.inf
    wide = np.array([1e306, -1e306, 5e305, 0.0])
    with np.errstate(over="ignore"):
        assert np.std(wide) == np.inf
    np.testing.assert_allclose(fastbn.std(wide), np.std(wide / 2**1000) * 2.0**1000, rtol=1e-14)
    assert fastbn.var(wide) == np.inf
    moderate = np.array([1e153, -1e153, 5e152, 0.0])
    np.testing.assert_allclose(fastbn.var(moderate), np.var(moderate), rtol=1e-14)
