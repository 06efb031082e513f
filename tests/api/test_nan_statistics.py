"""`nanmean`, `nanvar` and `nanstd` are drop-ins for NumPy's, which `numpy/lib/tests/test_nanfunctions.py` describes.

Dtype, shape, type and warnings are compared with NumPy's of the same call, values with exact arithmetic. Where NumPy's
bfloat16 is no float to its nan functions, ours are.
"""

import inspect
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from tests import exact as oracle
from tests.statistics import check, report
from tests.support import DTYPES, NUMBERS, VIEWS, maker, some_slow

FUNCTIONS = ["nanmean", "nanvar", "nanstd"]
by_function = pytest.mark.parametrize("function", FUNCTIONS)
by_spread = pytest.mark.parametrize("function", ["nanvar", "nanstd"])
COMPILED = ("float32",)
by_float = pytest.mark.parametrize("dtype", some_slow(DTYPES, COMPILED))

EMPTY = "Mean of empty slice"
DEGREES = "Degrees of freedom <= 0 for slice"


def holed(make, fraction=0.3, seed=1):
    """A maker of arrays with NaN, of both signs, here and there."""

    def make_holed(shape):
        x = make(shape)
        holes = np.random.default_rng(seed).random(shape)
        return np.where(holes < fraction, np.where(holes < fraction / 2, -np.nan, np.nan), x).astype(x.dtype)

    return make_holed


def run(function, *arguments, **options):
    """The result and the warnings of a call, without the full stop that only some of NumPy's have."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, [(w.category, str(w.message).rstrip(".")) for w in caught]


def assert_like_numpy(function, x, **options):
    """Of values, too: for data where NumPy's own sums are good."""
    before = x.tobytes()
    expected, warned = run(getattr(np, function), x, **options)
    actual, caught = run(getattr(fastbn, function), x, **options)
    assert type(actual) is type(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert caught == [w for w in warned if w[1].endswith("slice")]
    rtol = 4 * float(np.finfo(expected.dtype).eps) + (1e-6 if x.dtype.itemsize < 8 else 1e-12)
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol)
    assert x.tobytes() == before
    return actual


def table(dtype=np.float64):
    """Rows of 4, 5, 2 and 3 numbers."""
    return np.array(
        [
            [0.6, np.nan, 0.25, 0.01, np.nan, 0.125],
            [0.5, -0.9, np.nan, 0.2, 0.4, 0.3],
            [np.nan, np.nan, np.nan, 0.1, np.nan, -0.6],
            [0.15, np.nan, np.nan, 0.2, 0.3, np.nan],
        ]
    ).astype(dtype)


# --- signatures -------------------------------------------------------------------------------------------------------


@by_function
def test_signature(function):
    """NumPy's, but for the name of the array; defaults are those of the function without NaN."""

    def described(call, *attributes):
        parameters = list(inspect.signature(call).parameters.values())[1:]
        return [tuple(getattr(p, attribute) for attribute in attributes) for p in parameters]

    ours, plain = getattr(fastbn, function), getattr(fastbn, function[3:])
    assert described(ours, "name", "kind") == described(getattr(np, function), "name", "kind")
    assert described(ours, "name", "default") == described(plain, "name", "default")
    assert function in fastbn.__all__


@by_function
def test_positional_arguments(function):
    x, out = table(), np.zeros((1, 6))
    arguments = (0, np.float64, out, True) if function == "nanmean" else (0, np.float64, out, 0, True)
    assert getattr(fastbn, function)(x, *arguments) is out
    np.testing.assert_allclose(out, getattr(np, function)(x, *arguments), rtol=1e-13)


@by_function
def test_what_wrappers_leave_out(function):
    left_out = {p.name: p.default for p in inspect.signature(getattr(np, function)).parameters.values()
                if p.default is np._NoValue}  # fmt: skip
    assert {"keepdims", "where"} <= set(left_out)
    call = getattr(fastbn, function)
    np.testing.assert_array_equal(call(table(), 1, **left_out), call(table(), 1))


# --- values -----------------------------------------------------------------------------------------------------------


@by_function
@by_float
@pytest.mark.parametrize("fraction", [0.02, 0.4])
def test_views_with_nan(fraction, dtype, function):
    """Of every layout, but slices without a number."""
    failures = []
    for view in list(VIEWS)[FUNCTIONS.index(function) % 3 :: 1 if dtype == "float32" else 3]:
        x = VIEWS[view](holed(maker(dtype), fraction))
        for axis in (None, 0, -1, tuple(range(0, x.ndim, 2)), tuple(range(1, x.ndim))) if x.ndim else (None, ()):
            exact = oracle.exact(x, axis, skip_nan=True)
            if (exact.count > 0).all():
                check(failures, f"{view} {x.shape} {x.strides}", function, x, exact, axis=axis)
    report(failures)


@by_function
@by_float
def test_lengths_with_nan(dtype, function):
    line, failures = holed(maker(dtype), 0.2)((4200,)), []
    for n in (*range(2, 35), 63, 64, 65, 127, 129, 255, 257, 511, 1000, 1025, 4097):
        x = line[n % 5 : n % 5 + n]
        for a, axis in ((x, None), (np.stack([x] * 3), 1), (np.stack([x] * 5, 1), 0)):
            check(failures, f"{a.shape}", function, a, oracle.exact(a, axis, skip_nan=True), axis=axis)
    report(failures)


@by_function
@by_float
def test_without_nan_it_is_the_plain_function(dtype, function):
    for view in ("1-d", "2-d tall", "4-d", "4-d positions"):
        x = VIEWS[view](maker(dtype))
        for axis in (None, 0, tuple(range(1, x.ndim))):
            actual, plain = getattr(fastbn, function)(x, axis), getattr(fastbn, function[3:])(x, axis)
            rtol = 2 * float(ml_dtypes.finfo(x.dtype).eps)
            np.testing.assert_allclose(np.asarray(actual, float), np.asarray(plain, float), rtol=rtol)
            assert (type(actual), actual.dtype) == (type(plain), plain.dtype)


@by_function
def test_values_by_hand(function):
    x = np.array([[1.0, np.nan, 5.0], [np.nan, np.nan, 7.0]])
    expected = {"nanmean": [3.0, 7.0], "nanvar": [4.0, 0.0], "nanstd": [2.0, 0.0]}[function]
    assert getattr(fastbn, function)(x, axis=1).tolist() == expected
    assert getattr(fastbn, function)(x[0, :2]) == (1.0 if function == "nanmean" else 0.0)


@by_function
@pytest.mark.parametrize("dtype", some_slow([d for d in NUMBERS if d not in DTYPES], ["uint8", "int64"]))
def test_integers_have_no_nan(dtype, function):
    """The bits of the plain function."""
    for view in ("0-d", "1-d", "2-d tall", "4-d positions"):
        x = VIEWS[view](maker(dtype))
        for axis in (None, ()) if x.ndim == 0 else (None, 0, -1):
            actual, plain = getattr(fastbn, function)(x, axis), getattr(fastbn, function[3:])(x, axis)
            np.testing.assert_array_equal(actual, plain, strict=True)


@by_function
def test_infinities_are_numbers(function):
    x = np.array([[1, np.inf, np.nan], [np.nan, -np.inf, 2], [np.inf, -np.inf, np.nan]])
    expected = [np.inf, -np.inf, np.nan] if function == "nanmean" else [np.nan] * 3
    actual, caught = run(getattr(fastbn, function), x, axis=1)
    np.testing.assert_array_equal(actual, expected)
    assert not caught


@by_function
@pytest.mark.parametrize("value", [0.1, -7.3, 1e30])
@pytest.mark.parametrize("shape", [(40, 3), (9, 700), (70_000,)], ids=str)
def test_constants(shape, value, function):
    x = np.full(shape, value, np.float32)
    x[np.random.default_rng(0).random(shape) < 0.4] = np.nan
    expected = np.float32(value) if function == "nanmean" else 0
    for axis in (None, 0) if len(shape) == 1 else (None, 0, 1):
        assert (getattr(fastbn, function)(x, axis) == expected).all()


@by_function
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [5, 11, 20, 70])
def test_constants_behind_nans(size, dtype, function):
    """Of each channel's values the first ones are left out."""
    x = np.full((40, 99, size), np.arange(99)[:, np.newaxis] * 0.1, dtype)
    expected = x[0, :, 0].copy() if function == "nanmean" else 0
    x[:, :, : size // 2] = np.nan
    x[0, 3] = np.nan
    assert (getattr(fastbn, function)(x, (0, 2)) == expected).all()


@pytest.mark.parametrize("shape", [(5, 999, 11), (2, 999, 60), (9, 999, 1)], ids=str)
def test_constants_of_few_values(shape):
    """In float64, where the mean has no digits to spare."""
    rng = np.random.default_rng(0)
    x = np.broadcast_to(rng.integers(-300, 300, (999, 1)) * 1.0, shape).copy()
    x[rng.random(shape) < 0.2] = np.nan
    x[0, :, 0] = np.nanmax(x, (0, 2))
    assert (fastbn.nanvar(x, (0, 2)) == 0).all()


def test_float32_sums_do_not_drift():
    x = (100 + np.random.default_rng(2).random((1 << 17, 3))).astype(np.float32)
    x[::3, 0] = x[1::5, 2] = np.nan
    exact = x.astype(np.float64)
    np.testing.assert_allclose(fastbn.nanmean(x, axis=0), np.nanmean(exact, 0), rtol=1e-7)
    np.testing.assert_allclose(fastbn.nanvar(x, axis=0), np.nanvar(exact, 0), rtol=1e-6)
    np.testing.assert_allclose(fastbn.nanmean(x, dtype=float), np.nanmean(exact), rtol=1e-15)


@by_function
def test_longdouble_is_numpys(function):
    x = table(np.longdouble) / 3
    np.testing.assert_array_equal(getattr(fastbn, function)(x, 1), getattr(np, function)(x, 1), strict=True)


@by_function
def test_array_like(function):
    for x in ([1.0, np.nan, 4.0], [[1.0, 2.0], [np.nan, 5.0]], 0.0, np.nan, np.float32(2.5), (1, 2, 4), True):
        (expected, warned), (actual, caught) = (run(getattr(m, function), x) for m in (np, fastbn))
        assert (type(actual), actual.dtype, caught) == (type(expected), expected.dtype, warned)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


# --- slices without a number ------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("dtype", some_slow(["float16", "float32", "float64"], COMPILED))
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_all_nan(axis, dtype, function):
    for shape in ((3, 3), (2, 900), (900, 2)):
        assert np.isnan(assert_like_numpy(function, np.full(shape, np.nan, dtype), axis=axis)).all()
        x = np.ones(shape, dtype)
        x[:, 1] = np.nan
        x[1] = np.nan
        actual = assert_like_numpy(function, x, axis=axis)
        if axis is not None:
            assert np.isnan(actual).tolist() == [k == 1 for k in range(actual.size)]


@by_function
def test_all_nan_of_bfloat16(function):
    actual, caught = run(getattr(fastbn, function), np.array([[np.nan, np.nan], [1, np.nan]], ml_dtypes.bfloat16), 1)
    assert actual.dtype == ml_dtypes.bfloat16
    assert np.isnan(actual.astype(float)).tolist() == [True, False]
    assert caught == [(RuntimeWarning, EMPTY if function == "nanmean" else DEGREES)]


@by_function
def test_zero_dimensions(function):
    for x in (np.array(np.nan), np.array(2.5), np.array(np.nan, np.float32)):
        for axis in (None, ()):
            assert_like_numpy(function, x, axis=axis)
            assert_like_numpy(function, x, axis=axis, keepdims=True)
        with pytest.raises(AxisError):
            getattr(fastbn, function)(x, axis=0)


@by_function
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_empty(shape, dtype, function):
    for axis in (None, *range(len(shape)), ()):
        for keepdims in (False, True):
            x = np.zeros(shape, dtype)
            expected, warned = run(getattr(np, function), x, axis=axis, keepdims=keepdims)
            actual, caught = run(getattr(fastbn, function), x, axis=axis, keepdims=keepdims)
            np.testing.assert_array_equal(actual, expected, strict=True)
            assert caught[:1] == [w for w in warned if w[1].endswith("slice")][:1]


@by_function
def test_warnings_point_at_the_caller(function):
    with pytest.warns(RuntimeWarning, match=EMPTY if function == "nanmean" else DEGREES) as caught:
        getattr(fastbn, function)(np.full((2, 3), np.nan), axis=0)
    assert [w.filename for w in caught] == [__file__]


# --- options ----------------------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), ()], ids=str)
def test_axes_and_kept_dimensions(axis, function):
    for keepdims in (False, True):
        if axis == ():
            x = np.arange(6.0).reshape(2, 3)
            assert_like_numpy(function, x, axis=axis, keepdims=keepdims)
        else:
            assert_like_numpy(function, table(), axis=axis, keepdims=keepdims)


@by_function
@pytest.mark.parametrize("code", "efdg")
def test_dtype(code, function):
    for x in (table(), table(np.float32), np.eye(3)):
        for axis in (None, 1):
            actual, expected = (getattr(m, function)(x, axis=axis, dtype=code) for m in (fastbn, np))
            assert (type(actual), actual.dtype) == (type(expected), expected.dtype)
            if code == "g":  # left to NumPy, whose deviations of float32 are float32
                np.testing.assert_array_equal(actual, expected)
                continue
            exact = getattr(np, function)(x.astype(np.longdouble), axis=axis)
            np.testing.assert_allclose(
                actual, exact, rtol=2 * np.finfo(code).eps + (1e-15 if x.itemsize == 8 else 1e-13)
            )


@by_function
@pytest.mark.parametrize("dtype", [bool, int, object])
def test_dtype_must_be_a_float(dtype, function):
    with pytest.raises(TypeError, match=r"^dtype: expected "):
        getattr(fastbn, function)(table(), axis=1, dtype=dtype)
    out = np.zeros(4, dtype)
    with pytest.raises(TypeError, match=r"^out: expected "):
        getattr(fastbn, function)(table(), axis=1, out=out)
    np.testing.assert_array_equal(out, np.zeros(4, dtype))


@by_function
def test_out(function):
    x, call = table(), getattr(fastbn, function)
    for out in (np.zeros(4), np.zeros((4, 2))[:, 0], np.zeros(4)[::-1], np.zeros(4, np.float32)):
        assert call(x, axis=1, out=out) is out
        np.testing.assert_allclose(out, getattr(np, function)(x, axis=1), rtol=max(1e-13, 2 * np.finfo(out.dtype).eps))
    kept, whole = np.zeros((1, 6)), np.array(0.0)
    assert call(x, axis=0, keepdims=True, out=kept) is kept
    np.testing.assert_allclose(kept, getattr(np, function)(x, axis=0, keepdims=True), rtol=1e-13)
    assert call(x, out=whole) is whole
    np.testing.assert_allclose(whole, getattr(np, function)(x), rtol=1e-13)
    within = table()
    call(within, axis=0, out=within[2])
    np.testing.assert_allclose(within[2], getattr(np, function)(x, axis=0), rtol=1e-13)


@by_function
@pytest.mark.parametrize("out", [np.zeros(3), np.zeros((4, 1)), np.zeros((2, 4))], ids=lambda out: str(out.shape))
def test_out_of_another_shape(out, function):
    with pytest.raises(ValueError, match=rf"^out: expected shape \(4,\), got {re.escape(str(out.shape))}"):
        getattr(fastbn, function)(table(), axis=1, out=out)
    assert not out.any()


@by_spread
@pytest.mark.parametrize("ddof", [0, 1, 2, 3, 4, 5, 0.5, 1.5])
def test_ddof(ddof, function):
    """NaN, not an infinity, where too few numbers are left; one warning for all slices."""
    actual = assert_like_numpy(function, table(), axis=1, ddof=ddof)
    assert np.isnan(actual).tolist() == [n <= ddof for n in (4, 5, 2, 3)]
    _, caught = run(getattr(fastbn, function), table(), axis=1, correction=ddof)
    assert len(caught) == (ddof >= 2)
    np.testing.assert_array_equal(
        run(getattr(fastbn, function), table(), axis=1, correction=ddof)[0], actual, strict=True
    )


@by_spread
def test_ddof_and_correction(function):
    for options in ({"ddof": 0.5, "correction": 0.5}, {"ddof": 1, "correction": 0}):
        with pytest.raises(ValueError, match="correction: expected ddof or correction, got both"):
            getattr(fastbn, function)(table(), **options)


@by_spread
def test_mean_given(function):
    x = np.random.default_rng(1234).standard_normal((10, 20, 5)) + 0.5
    x[:, 5] = x[3, 2:4] = np.nan
    mean, out = np.zeros((10, 1, 5)), np.zeros((10, 1, 5))
    assert fastbn.nanmean(x, axis=1, keepdims=True, out=mean) is mean
    assert getattr(fastbn, function)(x, axis=1, keepdims=True, mean=mean, out=out) is out
    np.testing.assert_allclose(out, getattr(fastbn, function)(x, axis=1, keepdims=True), rtol=1e-14)
    assert_like_numpy(function, x, axis=1, mean=mean + 1)
    assert_like_numpy(function, x, axis=1, mean=mean, ddof=1, where=x > 0)


MASKS = {
    "full": np.random.default_rng(4).random((4, 6)) < 0.7,
    "columns": np.array([True, False, True, True, True, False]),
    "rows": np.array([[True], [True], [False], [True]]),
    "Fortran": np.asfortranarray(np.random.default_rng(5).random((4, 6)) < 0.7),
    "nothing": np.zeros((4, 6), bool),
    "True": True,
}
OFTEN = ("full", "nothing")


@pytest.mark.parametrize("function", some_slow(FUNCTIONS, ["nanvar"]))
@pytest.mark.parametrize("dtype", some_slow(["float16", "float32", "float64"], ["float32"]))
@pytest.mark.parametrize(
    "where", [pytest.param(m, marks=() if n in OFTEN else pytest.mark.slow) for n, m in MASKS.items()], ids=MASKS
)
def test_where(where, dtype, function):
    """What is masked or NaN does not count."""
    for axis in (None, 0, 1):
        assert_like_numpy(function, table(dtype), axis=axis, where=where)


@by_function
@pytest.mark.parametrize(
    ("where", "error"), [(np.ones((4, 6), int), TypeError), (np.ones((3, 6), bool), ValueError), (None, TypeError)]
)
def test_wrong_where(where, error, function):
    with pytest.raises(error, match=r"^where: expected "):
        getattr(fastbn, function)(table(), axis=0, where=where)


# --- what is taken for an array ---------------------------------------------------------------------------------------


class Own(np.ndarray):
    """A subclass could mean anything."""


REFUSED = {
    "complex": np.ones(3, complex),
    "object": np.array([1.0, np.nan], object),
    "timedelta": np.zeros(3, "m8[s]"),
    "masked": np.ma.masked_array([1.0, 2.0], mask=[False, True]),
    "matrix": np.ones((2, 2)).view(np.matrix),
    "subclass": np.ones(3).view(Own),
    "text": ["a"],
    "None": None,
}


@by_function
@pytest.mark.parametrize("x", REFUSED.values(), ids=REFUSED)
def test_refused(x, function):
    with pytest.raises(TypeError, match=r"^x: expected .* got "):
        getattr(fastbn, function)(x)


@by_function
def test_axis_errors(function):
    for axis, error in ((2, AxisError), (-3, AxisError), ((0, 0), ValueError), (1.0, TypeError)):
        with pytest.raises(error):
            getattr(fastbn, function)(table(), axis=axis)


@by_function
def test_memory_map(function, tmp_path):
    table().tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float64, "r", shape=(4, 6))
    np.testing.assert_array_equal(getattr(fastbn, function)(x, 1), getattr(fastbn, function)(table(), 1), strict=True)
