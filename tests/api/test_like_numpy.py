"""`mean`, `var` and `std` are drop-ins for NumPy's: value, dtype, shape, scalar or array, warnings, errors."""

import array
import inspect
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from fastbn import call, direct_reductions
from tests.cases.arguments import Own
from tests.cases.like_numpy import *  # noqa: F403
from tests.cases.like_numpy import (
    FUNCTIONS,
    SHAPE,
    assert_like_numpy,
    by_function,
    by_keepdims,
    by_spread,
    numbers,
    run,
)
from tests.cases.statistics import *  # noqa: F403
from tests.cases.statistics_options import *  # noqa: F403

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


@by_function
def test_longdouble_is_numpys(function):
    x = np.array([[1, 2, 4], [8, 16, 33]], np.longdouble) / 3
    for options in ({}, {"axis": 0}, {"axis": 1, "keepdims": True}, {"where": x > 1}):
        actual, expected = getattr(fastbn, function)(x, **options), getattr(np, function)(x, **options)
        assert actual.dtype == np.longdouble
        assert type(actual) is type(expected)
        np.testing.assert_array_equal(actual, expected)


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
    for axis in (1.0, "0", (0.0, 1), True, np.True_):
        with pytest.raises(TypeError):
            getattr(fastbn, function)(x, axis=axis)


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var", "average"])
@pytest.mark.parametrize("keepdims", ["yes", None, 1.0, np.array([1, 0])], ids=str)
def test_keepdims_that_is_no_bool(function, keepdims):
    options = {"weights": [1, 2, 3]} if function == "average" else {}
    with pytest.raises(TypeError, match=r"^keepdims: expected a bool, got "):
        getattr(fastbn, function)(numbers((3, 4)), 0, keepdims=keepdims, **options)


# --- dtype= and out= --------------------------------------------------------------------------------------------------


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


@by_function
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f4"])
def test_dtypes_in_another_byte_order(function, dtype):
    """NumPy refuses these. A dtype says how exact a result is; the order of its bytes is ``out``'s."""
    x = numbers((3, 4))
    expected = getattr(np, function)(x, 0, dtype=np.dtype(dtype).newbyteorder("="))
    result = getattr(fastbn, function)(x, 0, dtype=dtype)
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-6 if dtype != ">f2" else 1e-3)
    out = np.empty(4, dtype)
    assert getattr(fastbn, function)(x, 0, dtype=dtype, out=out) is out
    np.testing.assert_array_equal(out, result)


@by_function
@pytest.mark.parametrize("n", [5, 300])
def test_out_in_x(function, n):
    """Whatever its steps are: results are computed before x is written."""
    line = np.random.default_rng(0).standard_normal(n * n * 3).astype(np.float32)
    for axis, place in {
        "column": (1, np.s_[:, 0, 0]),
        "column upwards": (1, np.s_[::-1, 1, 0]),
        "row": (0, np.s_[2, :, 0]),
        "row backwards": (0, np.s_[0, ::-1, 2]),
        "steps": (0, np.s_[1, ::-1, 0]),
    }.values():
        x = line.copy().reshape(n, n, 3)
        expected = getattr(fastbn, function)(x, (axis, 2))
        out = x[place]
        for _ in range(2):  # the second is prepared
            x[...] = line.reshape(x.shape)
            assert getattr(fastbn, function)(x, (axis, 2), out=out) is out
            np.testing.assert_array_equal(out, expected)
    x = line.copy().reshape(3, n, n)
    for out in (x[0].T, x[1], x[2, ::-1]):
        x[...] = line.reshape(x.shape)
        expected = getattr(fastbn, function)(x, 0)
        np.testing.assert_array_equal(getattr(fastbn, function)(x, 0, out=out), expected)


@by_function
def test_out_in_x_where_only_out_can_be_walked(function, monkeypatch):
    """Kernels may take the strides of an `out` and not those of a new array."""
    kernel, asked = direct_reductions._kernel, []

    def first_alone(*given, **named):
        asked.append(given)
        return kernel(*given, **named) if len(asked) == 1 else (None, None)

    call.forget()
    monkeypatch.setattr(direct_reductions, "_kernel", first_alone)
    x = numbers((6, 7))
    expected = getattr(np, function)(x, 1)
    found = getattr(fastbn, function)(x, 1, out=x[::-1, 2])
    monkeypatch.undo()
    call.forget()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(asked) > 1


# --- ddof=, correction= and mean= -------------------------------------------------------------------------------------


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
def test_ddof_that_is_no_number_of_values(function):
    x = numbers((3, 4))
    for axis in (None, 0, 1):
        actual, expected = (run(getattr(library, function), x, axis=axis, ddof=np.nan) for library in (fastbn, np))
        np.testing.assert_array_equal(actual[0], expected[0])
        assert actual[1] == expected[1]
    with pytest.raises(ValueError, match=r"^ddof: "):
        getattr(fastbn, function)(x, ddof=10**400)


@by_spread
@pytest.mark.parametrize("mean", [1, 1.0, True, np.float64(1), np.float32(1), np.array(1.0)], ids=repr)
def test_dtype_beside_a_given_mean(function, mean):
    x = numbers((3, 4))
    assert getattr(fastbn, function)(x, 0, mean=mean).dtype == getattr(np, function)(x, 0, mean=mean).dtype


@by_spread
def test_ddof_and_correction(function):
    x, call = [1, -1, 1, -1], getattr(fastbn, function)
    for ddof, correction in ((1, 0), (1, 1), (2, 1)):
        with pytest.raises(ValueError, match="correction: expected ddof or correction, got both"):
            call(x, ddof=ddof, correction=correction)
    assert call(x, ddof=0, correction=1) == call(x, ddof=1) == call(x, ddof=1, correction=None)


# --- where= -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
def test_where_selects_nothing(function):
    text = "Degrees of freedom <= 0 for slice" if function in ("var", "std") else "Mean of empty slice"
    with pytest.warns(RuntimeWarning) as caught:
        result = getattr(fastbn, function)(numbers((3, 4)), where=False)
    assert str(caught[0].message).rstrip(".") == text
    assert np.isnan(result).all()


# --- empty, not finite, huge ------------------------------------------------------------------------------------------


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
