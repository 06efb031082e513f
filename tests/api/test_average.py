"""`average` is a drop-in for NumPy's: value, dtype, shape, scalar or array, the sum of weights, errors.

Values are compared with exact arithmetic.
"""

import inspect
import warnings

import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from tests import exact as oracle
from tests.support import NUMBERS, VIEWS, maker, one_in, some_slow

AXES = [None, 0, 1, 2, -1, (0,), (0, 1), (1, 2), (0, 2), (2, 0), (0, 1, 2)]
by_axis = pytest.mark.parametrize("axis", AXES, ids=str)


def numbers(dtype="float32", shape=(3, 4, 5)):
    return maker(dtype)(shape)


def some_weights(shape, dtype=np.float64, seed=7):
    return (np.random.default_rng(seed).integers(0, 9, shape) * 0.25 + 0.25).astype(dtype)


def spread(weights, x, axis):
    """Weights in x's dimensions, as NumPy takes them: of x's shape, or of the axes' in their order."""
    if weights.shape == x.shape:
        return weights
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    order = np.argsort(axes)
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    return np.broadcast_to(weights.transpose(order).reshape(shape), x.shape)


def exact_average(x, weights, axis):
    """Weighted mean, sum of weights and weighted mean of |x|, with kept dimensions, each rounded once."""
    values, e = oracle.integers(x)
    w, f = oracle.integers(np.ascontiguousarray(weights))
    axis = tuple(range(x.ndim)) if axis is None else axis

    def total(terms):
        return np.sum(np.asarray(terms, object), axis=axis, keepdims=True)

    ratios = [
        oracle.elementwise(lambda n, d: oracle.quotient(n, d, e), total(v * w), total(w)) for v in (values, abs(values))
    ]
    return ratios[0], oracle.elementwise(lambda n: oracle.quotient(n, 1, f), total(w)), ratios[1]


def assert_average(x, weights, axis, **options):
    """Against NumPy's call in everything but the values, and those against exact ones."""
    before = x.tobytes(), weights.tobytes()
    with np.errstate(over="ignore", invalid="ignore"):
        wanted, wanted_sum = np.average(x, axis, weights, returned=True, **options)
    actual, weight_sum = fastbn.average(x, axis, weights, returned=True, **options)
    alone = fastbn.average(x, axis, weights, **options)
    np.testing.assert_array_equal(alone, actual, strict=True)
    for ours, numpys in ((actual, wanted), (weight_sum, wanted_sum), (alone, wanted)):
        assert type(ours) is type(numpys)
        assert (ours.dtype, ours.shape) == (numpys.dtype, numpys.shape)
    mean, total, magnitude = exact_average(x, spread(weights, x, axis), axis)
    relative = {8: 2e-15, 4: 1e-7, 2: 1e-6}[actual.dtype.itemsize]
    assert (oracle.excess(np.reshape(actual, mean.shape), mean, magnitude, relative) <= 0).all()
    assert (oracle.excess(np.reshape(weight_sum, total.shape), total, total, relative) <= 0).all()
    assert (x.tobytes(), weights.tobytes()) == before
    return actual


# --- without weights --------------------------------------------------------------------------------------------------


def test_signature():
    ours, numpys = (
        [(p.name, p.kind) for p in list(inspect.signature(f).parameters.values())[1:]]
        for f in (fastbn.average, np.average)
    )
    assert ours == numpys
    assert "average" in fastbn.__all__


@by_axis
@pytest.mark.parametrize("dtype", some_slow(NUMBERS, ["float32", "float16", "uint8"]))
def test_without_weights_it_is_the_mean(dtype, axis):
    x = numbers(dtype)
    for keepdims in (False, True):
        expected = fastbn.mean(x, axis, keepdims=keepdims)
        np.testing.assert_array_equal(fastbn.average(x, axis, keepdims=keepdims), expected, strict=True)
        actual, total = fastbn.average(x, axis, returned=True, keepdims=keepdims)
        np.testing.assert_array_equal(actual, expected, strict=True)
        numpys = np.average(x, axis, returned=True, keepdims=keepdims)[1]
        np.testing.assert_array_equal(total, numpys, strict=True)
        assert type(total) is type(numpys)


def test_array_like():
    assert fastbn.average([1, 2, 3, 4]) == 2.5
    assert fastbn.average(range(1, 11), weights=range(10, 0, -1)) == 4.0
    assert fastbn.average([[0, 1], [2, 3], [4, 5]], axis=1, weights=[0.25, 0.75]).tolist() == [0.75, 2.75, 4.75]
    assert fastbn.average(3.5) == 3.5
    assert fastbn.average(np.array(3.5), weights=np.array(2.0)) == 3.5


def test_by_hand():
    x = np.arange(8).reshape(2, 2, 2)
    weights = [[0.25, 0.75], [1.0, 0.5]]
    np.testing.assert_allclose(fastbn.average(x, axis=(0, 1), weights=weights), [3.4, 4.4], rtol=1e-15)
    average, total = fastbn.average([1.0, 2.0, 6.0], weights=[2, 1, 1], returned=True)
    assert (average, total) == (2.5, 4.0)


@pytest.mark.parametrize("axis", [None, 0])
def test_empty(axis):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.isnan(fastbn.average(np.zeros((0, 3)), axis)).all()
    assert "Mean of empty slice" in {str(w.message).rstrip(".") for w in caught}
    with pytest.raises(ZeroDivisionError):
        fastbn.average(np.zeros((0, 3)), axis, weights=np.zeros((0, 3)))


# --- with weights -----------------------------------------------------------------------------------------------------


@by_axis
@pytest.mark.parametrize("keepdims", [False, True])
def test_weights_of_the_shape_of_x(axis, keepdims):
    x = numbers()
    for weights in (
        some_weights(x.shape),
        np.asfortranarray(some_weights(x.shape)),
        some_weights((3, 4, 10))[..., ::-2],
    ):
        assert_average(x, weights, axis, keepdims=keepdims)


@by_axis
@pytest.mark.parametrize("keepdims", [False, True])
def test_weights_of_the_shape_of_the_axes(axis, keepdims):
    """In the order in which the axes are named."""
    x = numbers("float64")
    if axis is not None:
        axes = axis if isinstance(axis, tuple) else (axis,)
        assert_average(x, some_weights([x.shape[a] for a in axes]), axis, keepdims=keepdims)
    one = numbers("float64", (37,))
    assert_average(one, some_weights(37), None, keepdims=keepdims)


@one_in(
    24, of=["float64", "float32", "float16", "int64", "uint8", "bool"], dtype=[d for d in NUMBERS if d != "bfloat16"]
)
def test_dtypes(of, dtype):
    """The result's is NumPy's promotion."""
    x = numbers(dtype)
    weights = (some_weights(5) * 4 + 1).astype(of)
    for axis in (2, -1):
        assert_average(x, weights, axis)
    assert_average(x, np.broadcast_to(weights, x.shape), (0, 2))


@pytest.mark.parametrize("view", [v for v in VIEWS if v != "0-d"])
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "uint8"], ["float32"]))
def test_views(dtype, view):
    x = VIEWS[view](maker(dtype))
    for axis in (None, 0, -1, tuple(range(1, x.ndim)) or 0):
        assert_average(x, some_weights(x.shape, np.float32), axis)
    for axis in (0, -1):
        assert_average(x, some_weights(x.shape[axis]), axis)


def test_accurate_sums():
    """NumPy's float32 sums of such data are off in the fourth digit."""
    x = (100 + np.random.default_rng(2).random((1 << 17, 3))).astype(np.float32)
    weights = np.random.default_rng(3).random(1 << 17).astype(np.float32)
    average, total = fastbn.average(x, 0, weights, returned=True)
    assert average.dtype == total.dtype == np.float32
    np.testing.assert_allclose(average, np.average(x.astype(float), 0, weights.astype(float)), rtol=2e-7)
    np.testing.assert_allclose(total, np.full(3, weights.astype(float).sum()), rtol=2e-7)


def test_large_arrays():
    for shape, axis in (((5, 300_001), 1), ((300_001, 5), 0), ((8, 16, 60, 70), (0, 2, 3))):
        x = numbers("float32", shape)
        weights = some_weights(shape, np.float32)
        expected = np.average(x.astype(float), axis, weights.astype(float))
        np.testing.assert_allclose(fastbn.average(x, axis, weights), expected, rtol=2e-7)


def test_equal_weights_are_the_mean():
    x = numbers("float64", (40, 30))
    np.testing.assert_allclose(fastbn.average(x, 0, np.full(40, 0.3)), fastbn.mean(x, 0), rtol=1e-15)


def test_integer_weights_are_frequencies():
    x, weights = numbers("float64", (9, 4)), np.array([1, 2, 0, 3, 1, 0, 0, 2, 5])
    np.testing.assert_allclose(fastbn.average(x, 0, weights), fastbn.mean(np.repeat(x, weights, 0), 0), rtol=1e-15)


def test_negative_weights():
    x, weights = numbers("float64", (6, 5)), np.array([1.0, -0.5, 2.0, 0.25, -1.0, 1.0])
    assert_average(x, weights, 0)


def test_weights_and_data_that_are_not_finite():
    """What weighs zero is left out, as everywhere here; NumPy multiplies, and has NaN."""
    x = np.array([[1.0, np.nan, np.inf, 3.0], [2.0, 1.0, 1.0, np.inf]])
    np.testing.assert_array_equal(fastbn.average(x, 0, [1.0, 1.0]), np.average(x, 0, [1.0, 1.0]))
    np.testing.assert_array_equal(fastbn.average(x, 0, [1.0, 0.0]), x[0])
    np.testing.assert_array_equal(fastbn.average(x, 0, [0.0, 1.0]), x[1])
    assert np.isnan(fastbn.average([1.0, 2.0], weights=[1.0, np.nan]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_weights_whose_sum_has_no_reciprocal(dtype):
    x = np.array([[1, 2, 3, 6], [5, 5, 9, 9]], dtype)
    for a, axis in ((x, 1), (np.ascontiguousarray(x.T), 0), (np.tile(x, 50), 1)):
        found, scale = fastbn.average(a, axis, np.full(a.shape, 1e-310), returned=True)
        np.testing.assert_allclose(found, [3, 7], rtol=1e-6)
        np.testing.assert_allclose(scale, a.shape[axis] * 1e-310)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "weights"),
    [((4,), None, np.zeros(4)), ((3, 2), 0, np.zeros((3, 2))), ((3, 2), 1, [0.0, 0.0]), ((2,), None, [1.0, -1.0]),
     ((2, 2), 0, np.array([[0.0, 1.0], [0.0, 1.0]])), ((3,), None, np.zeros(3, int))],
)  # fmt: skip
def test_weights_that_sum_to_zero(shape, axis, weights):
    """Even of one slice."""
    x = numbers("float32", shape)
    with pytest.raises(ZeroDivisionError):
        np.average(x, axis, weights)
    for returned in (False, True):
        with pytest.raises(ZeroDivisionError, match=r"^weights: "):
            fastbn.average(x, axis, weights, returned)


@pytest.mark.parametrize(
    ("axis", "shape", "error"),
    [(None, (5,), TypeError), (None, (4, 5), TypeError), (0, (4,), ValueError), (1, (3, 4), ValueError),
     ((0, 1), (4, 3), ValueError), ((0, 1), (12,), ValueError), (0, (3, 1, 1), ValueError), (2, (), ValueError)],
)  # fmt: skip
def test_weights_of_another_shape(axis, shape, error):
    x = numbers()
    with pytest.raises(error):
        np.average(x, axis, np.ones(shape))
    with pytest.raises(error, match=r"^(weights|axis): expected .* got "):
        fastbn.average(x, axis, np.ones(shape))


REFUSED = {
    "complex": np.ones(3, complex),
    "object": np.ones(3, object),
    "text": ["a", "b", "c"],
    "masked": np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, False]),
    "matrix": np.ones((1, 3)).view(np.matrix),
}


@pytest.mark.parametrize("wrong", REFUSED.values(), ids=REFUSED)
def test_refused(wrong):
    with pytest.raises(TypeError, match=r"^x: expected .* got "):
        fastbn.average(wrong)
    with pytest.raises(TypeError, match=r"^weights: expected .* got "):
        fastbn.average(np.ones(np.shape(wrong)), weights=wrong)


def test_axis_errors():
    for axis, error in ((3, AxisError), (-4, AxisError), ((0, 0), ValueError), (1.5, TypeError)):
        for weights in (None, some_weights((3, 4, 5))):
            with pytest.raises(error):
                fastbn.average(numbers(), axis, weights)
