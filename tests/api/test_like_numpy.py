"""`mean`, `var` and `std` are drop-ins for NumPy's: value, dtype, shape, scalar or array, warnings, errors.

Dtype, shape, type and warnings are compared with what NumPy makes of the same call. Values are compared with NumPy's in
extended precision: its own float32 and float16 sums are less accurate than what is tested here.
"""

import array
import inspect
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from tests import support, tolerances

FUNCTIONS = ["mean", "var", "std"]
by_function = pytest.mark.parametrize("function", FUNCTIONS)
by_spread = pytest.mark.parametrize("function", ["var", "std"])
by_keepdims = pytest.mark.parametrize("keepdims", [False, True])

SHAPE = (2, 3, 4, 5)
AXES = [
    None, 0, 1, 3, -1, -4, np.int64(2), (),
    (0,), (0, 2), (1, 3), (0, 3), (1, 2), (-1, 0), (0, 2, 3), (3, 1, 0), (0, 1, 2, 3),
]  # fmt: skip


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


# --- signatures, axes and dtypes --------------------------------------------------------------------------------------


@by_function
def test_signature(function):
    """All but the name of the array, which is ``x`` throughout fastbn."""
    (_, *ours), (_, *numpys) = (
        [(p.name, p.kind) for p in inspect.signature(getattr(library, function)).parameters.values()]
        for library in (fastbn, np)
    )
    assert ours == numpys


@by_function
def test_positional_arguments(function):
    x, out = numbers((3, 4)), np.zeros((1, 4))
    arguments = (0, np.float64, out, True) if function == "mean" else (0, np.float64, out, 1, True)
    assert getattr(fastbn, function)(x, *arguments) is out
    np.testing.assert_allclose(out, getattr(np, function)(x, *arguments), rtol=1e-6)


@by_function
def test_what_wrappers_leave_out(function):
    """``numpy._NoValue`` is a keyword that was not given, in its place or by name, whoever computes."""
    left_out = {p.name: np._NoValue for p in inspect.signature(getattr(np, function)).parameters.values()
                if p.default is np._NoValue}  # fmt: skip
    assert {"keepdims", "where"} <= set(left_out)
    call = getattr(fastbn, function)
    for x in (numbers((3, 4)), numbers((3, 4)).astype(np.longdouble), np.zeros((3, 0)), [[1, 2], [3, 5]]):
        for options in ({}, {"axis": 0}, {"axis": 0, "keepdims": True}):
            (result, caught), (expected, warned) = run(call, x, **left_out | options), run(call, x, **options)
            np.testing.assert_array_equal(result, expected)
            assert (type(result), np.shape(result), caught) == (type(expected), np.shape(expected), warned)
            numpys = run(getattr(np, function), x, **left_out | options)[0]
            np.testing.assert_allclose(result, numpys, rtol=1e-5)
    x = numbers((3, 4))
    places = (0, None, None) if function == "mean" else (0, None, None, 1)
    np.testing.assert_array_equal(call(x, *places, np._NoValue), call(x, *places))
    if function != "mean":
        np.testing.assert_array_equal(call(x, ddof=1, correction=np._NoValue), call(x, ddof=1))
        np.testing.assert_array_equal(call(x, 0, correction=1, mean=np._NoValue), call(x, 0, correction=1))


def test_what_wrappers_leave_out_of_mean_var():
    x = numbers((3, 4))
    left_out = dict.fromkeys(("correction", "keepdims", "where"), np._NoValue)
    for a in (x, x.astype(np.longdouble)):
        np.testing.assert_array_equal(fastbn.mean_var(a, 0, **left_out), fastbn.mean_var(a, 0))


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
@pytest.mark.parametrize("code", "?" + np.typecodes["AllInteger"])
def test_integers(code, function):
    """In float64, as near to NumPy as one rounding or two; sums do not wrap round."""
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
            np.testing.assert_allclose(actual, expected, rtol=1e-15, atol=0)


@by_function
def test_longdouble_is_numpys(function):
    x = np.array([[1, 2, 4], [8, 16, 33]], np.longdouble) / 3
    for options in ({}, {"axis": 0}, {"axis": 1, "keepdims": True}, {"where": x > 1}):
        actual, expected = getattr(fastbn, function)(x, **options), getattr(np, function)(x, **options)
        assert actual.dtype == np.longdouble
        assert type(actual) is type(expected)
        np.testing.assert_array_equal(actual, expected)


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

ARRAY_LIKE = {
    "int": 5,
    "float": 2.5,
    "bool": True,
    "float16": np.float16(1.5),
    "bfloat16": ml_dtypes.bfloat16(1.5),
    "float32": np.float32(1.5),
    "int8": np.int8(-3),
    "list": [1, 2, 4],
    "tuple": (1.5, 2.0, 4.5),
    "nested": [[1, 2], (3, 5)],
    "list of float32": [np.float32(0.1), np.float32(0.7)],
    "list of arrays": [np.arange(3), np.ones(3, np.int8)],
    "bools": [True, False, True],
    "range": range(7),
    "array.array": array.array("d", [1.0, 2.0, 5.0]),
    "memoryview": memoryview(array.array("f", [1.0, 2.0, 5.0])),
}


@by_function
@pytest.mark.parametrize("x", ARRAY_LIKE.values(), ids=ARRAY_LIKE)
def test_array_like(x, function):
    assert_like_numpy(function, x)
    assert_like_numpy(function, x, keepdims=True)


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


@by_function
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "u4", "i8"])
def test_byte_orders(dtype, function):
    """The result is in the machine's order."""
    swapped = numbers((4, 6)).astype(np.dtype(dtype).newbyteorder())
    assert not swapped.dtype.isnative
    for axis in (None, 0):
        actual = assert_like_numpy(function, swapped, axis=axis)
        assert actual.dtype.isnative
        native = getattr(fastbn, function)(swapped.astype(dtype), axis=axis)
        np.testing.assert_array_equal(actual, native)


@by_function
def test_read_only(function):
    x = numbers()
    x.flags.writeable = False
    for axis in (None, (0, 2)):
        assert_like_numpy(function, x, axis=axis)


@by_function
def test_memmap(function, tmp_path):
    path = tmp_path / "x"
    numbers().tofile(path)
    x = np.memmap(path, np.float32, "r", shape=SHAPE)
    for axis in (None, (0, 2)):
        assert_like_numpy(function, x, axis=axis)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=SHAPE[1:])
    assert getattr(fastbn, function)(x, axis=0, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), getattr(fastbn, function)(x, axis=0))


class Own(np.ndarray):
    """A subclass could mean anything."""


REFUSED = {
    "complex64": np.ones(3, np.complex64),
    "complex128": np.ones((2, 3), complex),
    "complex number": 1j,
    "list of complex": [1, 2j],
    "object": np.array([1, Fraction(1, 2)], object),
    "list of fractions": [Fraction(1, 2), Fraction(1, 3)],
    "None": None,
    "text": ["a", "b"],
    "bytes": b"ab",
    "records": np.zeros(3, [("a", np.float32)]),
    "datetime": np.zeros(3, "datetime64[s]"),
    "timedelta": np.zeros(3, "timedelta64[s]"),
    "float8": np.ones(3, ml_dtypes.float8_e4m3fn),
    "masked": np.ma.masked_array([1.0, 2.0], mask=[False, True]),
    "matrix": np.ones((2, 2)).view(np.matrix),
    "recarray": np.zeros(3).view(np.recarray),
    "subclass": np.ones(3).view(Own),
    "empty subclass": np.ones(0).view(Own),
}


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
@pytest.mark.parametrize("x", REFUSED.values(), ids=REFUSED)
def test_refused(x, function):
    with pytest.raises(TypeError, match=r"^x: expected .* got "):
        getattr(fastbn, function)(x)


@by_function
def test_axis_errors(function):
    x = numbers((2, 3))
    for axis in (2, -3, (0, 2), (-3, 1)):
        for a in (x, x.astype(int), x[:0], x.astype(np.longdouble)):
            with pytest.raises(AxisError):
                getattr(fastbn, function)(a, axis=axis)
    for axis in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="axis"):
            getattr(fastbn, function)(x, axis=axis)
    for axis in (1.0, "0", (0.0, 1)):
        with pytest.raises(TypeError):
            getattr(fastbn, function)(x, axis=axis)


# --- dtype= and out= --------------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize(
    "dtype", ["e", "f", "d", "float32", float, np.float64, np.dtype("f4"), ml_dtypes.bfloat16], ids=str
)
@pytest.mark.parametrize("of", [np.float32, np.float64, np.int16, bool])
def test_dtype(of, dtype, function):
    x = numbers((4, 5)).astype(of)
    for axis in (None, 1):
        actual = assert_like_numpy(function, x, axis=axis, dtype=dtype)
        assert actual.dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(function, np.longdouble) for function in FUNCTIONS] + [("mean", np.int64), ("mean", np.int8), ("var", np.int64)],
)
def test_dtypes_left_to_numpy(function, dtype):
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for axis in (None, 1):
        actual, expected = (getattr(library, function)(x, axis=axis, dtype=dtype) for library in (fastbn, np))
        assert type(actual) is type(expected)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


OUTPUTS = {
    "float32": lambda shape: np.zeros(shape, np.float32),
    "float64": lambda shape: np.zeros(shape),
    "float16": lambda shape: np.zeros(shape, np.float16),
    "longdouble": lambda shape: np.zeros(shape, np.longdouble),
    "other byte order": lambda shape: np.zeros(shape, np.dtype(np.float32).newbyteorder()),
    "Fortran": lambda shape: np.zeros(shape, np.float32, order="F"),
    "strided": lambda shape: np.zeros((*shape, 2), np.float32)[..., 0],
    "reversed": lambda shape: np.zeros(shape, np.float32)[(slice(None, None, -1),) * len(shape) + (...,)],
}


@by_function
@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_out(make, function):
    x, call = numbers(), getattr(fastbn, function)
    for options in ({"axis": 1}, {"axis": (0, 2), "keepdims": True}, {"axis": None}, {"axis": None, "keepdims": True}):
        out = make(call(x, **options).shape)
        assert call(x, **options, out=out) is out
        # As in NumPy, sums are in float64 where the output is.
        result = call(x, **options, dtype=np.float64 if out.dtype.itemsize >= 8 else None)
        np.testing.assert_array_equal(out, np.asarray(result).astype(out.dtype))


@by_function
def test_out_of_integers(function):
    x, out = np.arange(10), np.array(0.0)
    assert getattr(fastbn, function)(x, out=out) is out
    assert out == getattr(np, function)(x)


@by_function
def test_out_and_dtype(function):
    """`dtype` is what the statistic is rounded to, `out` what it is written as."""
    x, out = numbers((50, 4)), np.zeros(4)
    assert getattr(fastbn, function)(x, axis=0, dtype=np.float64, out=out) is out
    np.testing.assert_array_equal(out, getattr(fastbn, function)(x, axis=0, dtype=np.float64))


@by_function
def test_out_within_x(function):
    x = numbers((5, 6))
    expected = getattr(fastbn, function)(x.copy(), axis=0)
    getattr(fastbn, function)(x, axis=0, out=x[2])
    np.testing.assert_array_equal(x[2], expected)


@by_function
def test_out_with_where(function):
    x, out = numbers((5, 6)), np.zeros(6, np.float32)
    where = np.random.default_rng(3).random((5, 6)) < 0.8
    assert getattr(fastbn, function)(x, axis=0, where=where, out=out) is out
    np.testing.assert_array_equal(out, getattr(fastbn, function)(x, axis=0, where=where))


@by_function
def test_out_beyond_float16(function):
    """A result too large is infinite, with `out` as without: no warning."""
    x = np.array([[-9e4, 9e4, 8e4]] * 2) if function == "mean" else np.array([[-9e4], [9e4]])
    expected = getattr(fastbn, function)(x, axis=0, dtype=np.float16)
    assert np.isinf(expected).any()
    out = np.zeros(expected.shape, np.float16)
    getattr(fastbn, function)(x, axis=0, dtype=np.float16, out=out)
    np.testing.assert_array_equal(out, expected)


def frozen(a):
    a.flags.writeable = False
    return a


WRONG_OUT = {
    "too short": (lambda: np.zeros(2), ValueError),
    "too many dimensions": (lambda: np.zeros((2, 2)), ValueError),
    "kept dimensions": (lambda: np.zeros((3, 1)), ValueError),
    "broadcastable": (lambda: np.zeros(1), ValueError),
    "read-only": (lambda: frozen(np.zeros(3)), ValueError),
    "list": (lambda: [0.0, 0.0, 0.0], TypeError),
    "masked": (lambda: np.ma.zeros(3), TypeError),
    "subclass": (lambda: np.zeros(3).view(Own), TypeError),
}


@by_function
@pytest.mark.parametrize(("make", "error"), WRONG_OUT.values(), ids=WRONG_OUT)
def test_wrong_out(make, error, function):
    out = make()
    before = np.array(out)
    with pytest.raises(error, match=r"^out: expected .* got "):
        getattr(fastbn, function)(np.eye(3), axis=1, out=out)
    np.testing.assert_array_equal(np.array(out), before)


# --- ddof=, correction= and mean= -------------------------------------------------------------------------------------


@by_spread
@pytest.mark.parametrize("ddof", [0, 1, 2, 0.5, 1.5, -1, np.int64(1), np.float32(0.5), True])
def test_ddof(ddof, function):
    x = numbers((4, 5))
    for axis in (None, 0, 1):
        assert_like_numpy(function, x, axis=axis, ddof=ddof)
        np.testing.assert_array_equal(
            getattr(fastbn, function)(x, axis=axis, correction=ddof), getattr(fastbn, function)(x, axis=axis, ddof=ddof)
        )


@by_spread
def test_ddof_by_hand(function):
    x = np.array([1, -1, 1, -1])
    for ddof in (0, 1, 2):
        expected = 4 / (4 - ddof)
        np.testing.assert_allclose(
            getattr(fastbn, function)(x, ddof=ddof), expected ** (0.5 if function == "std" else 1)
        )


@by_spread
@pytest.mark.parametrize("ddof", [5, 5.0, 6, 100, 4.5])
def test_ddof_too_big(ddof, function):
    """Infinite, or NaN where there is no deviation either; never negative; NumPy's warning."""
    x = numbers((3, 5))
    x[1] = 2
    actual = assert_like_numpy(function, x, axis=1, ddof=ddof)
    if ddof >= 5:
        assert np.isposinf(actual[[0, 2]]).all()
        assert np.isnan(actual[1])
        with pytest.warns(RuntimeWarning, match="Degrees of freedom <= 0 for slice"):
            getattr(fastbn, function)(x, axis=1, ddof=ddof)


@by_spread
def test_ddof_too_big_for_one_slice(function):
    where = np.array([[True] * 4, [True, False, False, True], [False] * 3 + [True]])
    actual = assert_like_numpy(function, numbers((3, 4)), axis=1, ddof=2, where=where)
    assert np.isfinite(actual[0])


@by_spread
def test_ddof_and_correction(function):
    x, call = [1, -1, 1, -1], getattr(fastbn, function)
    for ddof, correction in ((1, 0), (1, 1), (2, 1)):
        with pytest.raises(ValueError, match="correction: expected ddof or correction, got both"):
            call(x, ddof=ddof, correction=correction)
    assert call(x, ddof=0, correction=1) == call(x, ddof=1) == call(x, ddof=1, correction=None)


@by_keepdims
@pytest.mark.parametrize("axis", [None, 1, -1, (0, 2)], ids=str)
@by_spread
def test_mean_given(function, axis, keepdims):
    x = numbers((10, 8, 5), np.float64)
    centre = fastbn.mean(x, axis=axis, keepdims=True)
    without = getattr(fastbn, function)(x, axis=axis, keepdims=keepdims)
    given = assert_like_numpy(function, x, axis=axis, keepdims=keepdims, mean=centre)
    np.testing.assert_allclose(given, without, rtol=1e-14)

    elsewhere = assert_like_numpy(function, x, axis=axis, keepdims=keepdims, mean=centre + 2)
    assert (elsewhere > without).all()
    out = np.zeros(np.shape(without))
    assert getattr(fastbn, function)(x, axis=axis, keepdims=keepdims, mean=centre, out=out) is out
    np.testing.assert_array_equal(out, given)


@by_spread
def test_mean_given_and_where(function):
    x = numbers((10, 8, 5), np.float64)
    where = x > 2.5
    centre = fastbn.mean(x, axis=1, keepdims=True, where=where)
    given = assert_like_numpy(function, x, axis=1, mean=centre, where=where)
    np.testing.assert_allclose(given, getattr(fastbn, function)(x, axis=1, where=where), rtol=1e-14)
    assert_like_numpy(function, x, axis=1, mean=centre + 1, where=where, ddof=1)


@by_spread
def test_mean_given_of_other_kinds(function):
    x = numbers((3, 4))
    for axis, centre in ((None, 2), (None, 2.5), (1, np.ones((3, 1), np.float16)), ((), x - 1)):
        assert_like_numpy(function, x, axis=axis, mean=centre)
    np.testing.assert_array_equal(getattr(fastbn, function)(x, 0, mean=None), getattr(fastbn, function)(x, 0))


@by_spread
@pytest.mark.parametrize("centre", [np.full((1, 4), 2.5), [[2.5] * 4], [[1, 2, 3, 4]]], ids=["array", "list", "ints"])
def test_mean_given_of_a_wider_dtype(centre, function):
    """The result's dtype is that of ``x - mean``."""
    actual = assert_like_numpy(function, numbers((3, 4)), axis=0, mean=centre)
    assert actual.dtype == np.float64


@by_spread
def test_mean_given_that_broadcasts(function):
    """To the shape of the result with keepdims=True, as in NumPy."""
    x = numbers((3, 4))
    assert_like_numpy(function, x, axis=0, mean=2.0)
    assert_like_numpy(function, x, axis=0, mean=np.full(4, 2.0))
    assert_like_numpy(function, x, axis=1, mean=np.full((1, 1), 2.0))


@by_spread
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(1, (6,)), (1, (3, 2)), (1, (2, 1, 3)), (0, (2, 3)), (2, (3, 3)), (0, (1, 3, 3)), (None, (2,))],
)
def test_mean_given_of_another_shape(function, axis, shape):
    """Refused, or what NumPy makes of it: never values taken in another order because their number is right."""
    x, centre = numbers((3, 3, 2)), np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    actual, refusal = None, ""
    try:
        actual = getattr(fastbn, function)(x, axis=axis, mean=centre)
    except ValueError as error:
        refusal = str(error)
    if actual is None:
        assert refusal.startswith("mean: expected")
        assert str(shape) in refusal
    else:
        np.testing.assert_allclose(actual, getattr(np, function)(x, axis=axis, mean=centre), rtol=1e-6)


# --- where= -----------------------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(4).random((4, 5, 6)) < 0.7
MASKS = {
    "full": RANDOM,
    "by column": RANDOM[:1, :1],
    "by row": RANDOM[:1, :, :1],
    "by plane": np.array([[[True]], [[False]], [[True]], [[True]]]),
    "fewer dimensions": RANDOM[0],
    "one dimension": RANDOM[0, 0],
    "list": [True, False, True, True, False, True],
    "array of True": np.array(True),
    "True_": np.True_,
    "Fortran": np.asfortranarray(RANDOM),
    "strided": np.repeat(RANDOM, 2, axis=2)[..., ::2],
    "read-only": frozen(RANDOM.copy()),
    "nothing": False,
    "nothing, full": np.zeros((4, 5, 6), bool),
    "one slice empty": np.arange(4)[:, None, None] != 1,
    "one column empty": np.arange(6) != 2,
    "one value left": np.arange(120).reshape(4, 5, 6) == 77,
}


@by_function
@pytest.mark.parametrize("where", MASKS.values(), ids=MASKS)
def test_where(where, function):
    x = numbers((4, 5, 6))
    for options in ({}, {"axis": 0}, {"axis": 1, "keepdims": True}, {"axis": (0, 2)}, {"axis": -1}, {"axis": ()}):
        assert_like_numpy(function, x, where=where, **options)


@by_function
def test_where_true_is_everything(function):
    x = numbers((4, 5))
    np.testing.assert_array_equal(getattr(fastbn, function)(x, 0, where=True), getattr(fastbn, function)(x, 0))


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
def test_where_selects_nothing(function):
    text = "Degrees of freedom <= 0 for slice" if function in ("var", "std") else "Mean of empty slice"
    with pytest.warns(RuntimeWarning) as caught:
        result = getattr(fastbn, function)(numbers((3, 4)), where=False)
    assert str(caught[0].message).rstrip(".") == text
    assert np.isnan(result).all()


@by_function
def test_where_skips_what_is_not_finite(function):
    x = numbers((4, 5))
    x[1] = np.nan
    x[2, ::2] = [np.inf, -np.inf, np.nan]
    actual = assert_like_numpy(function, x, axis=0, where=np.isfinite(x))
    np.testing.assert_array_equal(actual[1], getattr(fastbn, function)(x[[0, 2, 3], 1]))


@by_function
@pytest.mark.parametrize("dtype", [np.int8, np.uint64, bool])
def test_where_and_integers(dtype, function):
    x = np.arange(16).reshape(4, 4).astype(dtype)
    where = np.array(
        [[False, True, False, True], [True, False, True, False], [True] * 2 + [False] * 2, [False, True] * 2]
    )
    for axis in (None, 0, 1):
        actual, expected = (getattr(library, function)(x, axis=axis, where=where) for library in (fastbn, np))
        np.testing.assert_allclose(actual, expected, rtol=1e-15, atol=0)


def test_where_by_hand():
    x = np.arange(16.0).reshape(4, 4)
    rows = np.array([[False], [True], [True], [False]])
    assert fastbn.mean(x, axis=0, where=rows).tolist() == [6, 7, 8, 9]
    assert fastbn.var(x, axis=0, where=rows).tolist() == [4] * 4
    assert fastbn.std(x, axis=0, where=rows).tolist() == [2] * 4
    columns = np.array([False, True, True, False])
    assert fastbn.mean(x, axis=1, where=columns).tolist() == [1.5, 5.5, 9.5, 13.5]
    assert fastbn.var(x, axis=1, where=columns).tolist() == [0.25] * 4


@by_function
@pytest.mark.parametrize(
    ("where", "error"),
    [
        (np.ones((3, 4), int), TypeError),
        (np.ones((3, 4)), TypeError),
        ([1, 0, 1, 1], TypeError),
        (None, TypeError),
        (np.ones(3, bool), ValueError),
        (np.ones((4, 3), bool), ValueError),
        (np.ones((2, 3, 4), bool), ValueError),
        (np.ones((1, 3, 4), bool), ValueError),
        (np.ones((0, 4), bool), ValueError),
    ],
)
def test_wrong_where(where, error, function):
    with pytest.raises(error, match=r"^where: expected .* got "):
        getattr(fastbn, function)(numbers((3, 4)), axis=0, where=where)


# --- empty, not finite, huge ------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, bool])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_empty(shape, dtype, function):
    x = np.zeros(shape, dtype)
    for axis in (None, *range(len(shape)), ()):
        for keepdims in (False, True):
            assert_like_numpy(function, x, axis=axis, keepdims=keepdims)


def test_empty_warnings():
    for x in ([], np.zeros((0, 3), np.float32)):
        for function in FUNCTIONS:
            result, caught = run(getattr(fastbn, function), x, axis=0)
            assert np.isnan(result).all()
            text = "Mean of empty slice" if function == "mean" else "Degrees of freedom <= 0 for slice"
            assert caught[0] == (RuntimeWarning, text)
    assert fastbn.mean(np.zeros((0, 3), np.float32), axis=1).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fastbn.mean(x, where=False),
        lambda x: fastbn.var(x, ddof=12),
        lambda x: fastbn.std(x, ddof=12),
        lambda x: fastbn.mean_var(x, correction=12),
    ],
    ids=[*FUNCTIONS, "mean_var"],
)
def test_warnings_point_at_the_caller(call):
    with pytest.warns(RuntimeWarning, match="slice") as caught:
        call(numbers((3, 4)))
    assert caught[0].filename == __file__


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


# --- mean_var ---------------------------------------------------------------------------------------------------------


@by_keepdims
@pytest.mark.parametrize("axis", [None, 1, (0, 2), ()], ids=str)
def test_mean_var(axis, keepdims):
    x = numbers()
    where = np.random.default_rng(5).random(SHAPE) < 0.9
    for a in (x, x.astype(np.longdouble), (x * 100).astype(np.int16)):
        for options in ({}, {"where": where | (axis == ())}):
            options |= {"axis": axis, "keepdims": keepdims}
            mean, var = fastbn.mean_var(a, **options)
            for result, expected in ((mean, fastbn.mean(a, **options)), (var, fastbn.var(a, **options))):
                assert type(result) is type(expected)
                assert result.dtype == expected.dtype
                np.testing.assert_array_equal(result, expected)
    _, var = fastbn.mean_var(x, (0, 2), correction=1)
    np.testing.assert_array_equal(var, fastbn.var(x, (0, 2), correction=1))
