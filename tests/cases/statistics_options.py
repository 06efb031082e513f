"""Options of `mean`, `var` and `std` as NumPy has them: dtype, out, ddof, mean, where."""

import ml_dtypes
import numpy as np
import pytest

import fastbn
from tests.cases.arguments import Own
from tests.cases.like_numpy import FUNCTIONS, assert_like_numpy, by_function, by_keepdims, by_spread, numbers
from tests.support import some_slow

# --- dtype= and out= --------------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize(
    "dtype", ["e", "f", "d", "float32", float, np.float64, np.dtype("f4"), ml_dtypes.bfloat16], ids=str
)
@pytest.mark.parametrize(
    "of", some_slow([np.float32, np.float64, np.uint8, np.int16, bool], [np.float32, np.float64, np.uint8])
)
def test_dtype(of, dtype, function):
    x = numbers((4, 5)).astype(of)
    for axis in (None, 1):
        actual = assert_like_numpy(function, x, axis=axis, dtype=dtype)
        assert actual.dtype == np.dtype(dtype)


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
def test_ddof_too_big_for_one_slice(function):
    where = np.array([[True] * 4, [True, False, False, True], [False] * 3 + [True]])
    actual = assert_like_numpy(function, numbers((3, 4)), axis=1, ddof=2, where=where)
    assert np.isfinite(actual[0])


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


@pytest.mark.slow
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


# Of the others each is like one of these, for kernels of their own.
OFTEN = [name for name in MASKS if name not in ("by column", "by plane", "array of True", "one column empty")]


@by_function
@pytest.mark.parametrize(
    "where", [pytest.param(m, marks=() if n in OFTEN else pytest.mark.slow) for n, m in MASKS.items()], ids=MASKS
)
def test_where(where, function):
    x = numbers((4, 5, 6))
    for options in ({}, {"axis": 0}, {"axis": 1, "keepdims": True}, {"axis": (0, 2)}, {"axis": -1}, {"axis": ()}):
        assert_like_numpy(function, x, where=where, **options)


@by_function
def test_where_true_is_everything(function):
    x = numbers((4, 5))
    np.testing.assert_array_equal(getattr(fastbn, function)(x, 0, where=True), getattr(fastbn, function)(x, 0))


@by_function
def test_where_skips_what_is_not_finite(function):
    x = numbers((4, 5))
    x[1] = np.nan
    x[2, ::2] = [np.inf, -np.inf, np.nan]
    actual = assert_like_numpy(function, x, axis=0, where=np.isfinite(x))
    np.testing.assert_array_equal(actual[1], getattr(fastbn, function)(x[[0, 2, 3], 1]))


@pytest.mark.parametrize("function", some_slow(FUNCTIONS, ["var"]))
@pytest.mark.parametrize("dtype", some_slow([np.uint8, np.int8, np.uint64, bool], [np.uint8]))
def test_where_and_integers(dtype, function):
    x = np.arange(16).reshape(4, 4).astype(dtype)
    where = np.array(
        [[False, True, False, True], [True, False, True, False], [True] * 2 + [False] * 2, [False, True] * 2]
    )
    for axis in (None, 0, 1):
        actual, expected = (getattr(library, function)(x, axis=axis, where=where) for library in (fastbn, np))
        np.testing.assert_allclose(actual, expected, rtol=1e-15, atol=0)


def test_where_by_hand():
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
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
