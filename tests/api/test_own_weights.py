"""Masks and weights of x's full shape, so that each channel has its own: batch norm, `moments` and `mean_var`.

Held by the oracle, by numpy.ma, `numpy.average` and fractions; what is left out is NaN.
"""

from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests.cases import checks
from tests.cases.checks import check_backward, check_moments, check_parts
from tests.support import DTYPES, LAYOUTS, Options, make_case, one_in, some_slow

OWN = ("where", "weights", "where weights")


def own_case(layout, dtype, given, seed=7):
    """A case whose channels each miss other values, some of them all."""
    case, rng = make_case(LAYOUTS[layout], dtype, mean=3.0), np.random.default_rng(seed)
    shape = case.layout.shape
    where, weights = rng.random(shape) < 0.7, rng.integers(0, 4, shape) * 0.3
    kept = case.layout.kept
    where[tuple(0 if axis in kept else slice(None) for axis in range(len(shape)))] = False
    if given == "where weights":
        weights = weights[..., :1]
    case.keywords |= {name: {"where": where, "weights": weights}[name] for name in given.split()}
    if case.layout.writable:
        selected = np.broadcast_to(np.float64(1), shape)
        for array in (case.keywords.get("where", True), case.keywords.get("weights", 1.0)):
            selected = selected * array
        case.x[selected == 0] = np.nan
    return case


@pytest.fixture(params=["numpy", "cupy"])
def kind(request, monkeypatch):
    """The functions for either kind of array; kernels for CuPy's are executed on the CPU."""
    if request.param == "cupy":
        monkeypatch.setattr(checks, "fastbn", request.getfixturevalue("cuda_arrays"))
    return checks.fastbn


# --- moments ----------------------------------------------------------------------------------------------------------


by_given = pytest.mark.parametrize("given", some_slow(OWN, ["where weights"]))
by_dtype = pytest.mark.parametrize("dtype", some_slow(DTYPES, ["float32"]))


@by_given
@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_moments(layout, dtype, given):
    check_moments(own_case(layout, dtype, given))


ON_A_DEVICE = ("NC", "NCHW", "NHWC", "NHWC 3 channels", "NHWC as NCHW", "instance NHWC", "alternating", "one axis")


@one_in(3, layout=ON_A_DEVICE, given=OWN)
def test_moments_of_cupy(layout, given, cuda_arrays, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", cuda_arrays)
    check_moments(own_case(layout, "float32", given))


def test_the_check_sees_a_mask_that_is_not_its_channels_own():
    case = own_case("NCHW", "float32", "where")
    rolled = case.keywords | {"where": np.roll(case.keywords["where"], 1, axis=1)}
    with pytest.raises(AssertionError):
        check_moments(case, fastbn.moments(np.nan_to_num(case.x), **rolled))


@pytest.mark.parametrize("axis", some_slow([1, -1], [1]))
@pytest.mark.parametrize("dtype", some_slow(DTYPES, ["float32"]))
def test_float32_weights(dtype, axis, kind):
    """They are not converted, and give the bits of the same numbers in float64, at every scale."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 7, 6)).astype(DTYPES[dtype])
    for scale in (1.0, 2.0**110, 2.0**-110):
        weights = (rng.random(x.shape) * scale).astype(np.float32)
        for where in (None, rng.random(x.shape) < 0.7):
            found = trained(kind, x, weights, where, axis)
            assert found[1].weight.dtype == np.float32
            assert kind is not fastbn or where is not None or np.shares_memory(found[1].weight, weights)
            expected = trained(kind, x, weights.astype(float), where, axis)
            for one, other in zip(arrays_of(found), arrays_of(expected), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_that_the_output_overwrites(dtype, kind):
    """The backward pass has them still."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((4, 3, 5)).astype(dtype), rng.random((4, 3, 5)).astype(dtype)
    expected, gradients = trained(kind, x, weights.copy(), None, 1)[::2]
    y, saved = kind.batch_norm(x, weights=weights, out=weights)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(kind.batch_norm_backward(y, saved).x, gradients.x)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-90])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_count_of_another_dtype_beside_scaled_weights(dtype, scale):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 60, 3)).astype(np.float32)
    weights = rng.integers(1, 4, (60, 3)).astype(np.float32)
    mean, rstd, one = np.zeros(3), np.ones(3), np.ones(3)
    expected = fastbn.grad_input(dy, x, mean, rstd, None, one, one, weights.sum(0, dtype=float), weights=weights)
    count = (weights.sum(0, dtype=float) * scale).astype(dtype)
    found = fastbn.grad_input(dy, x, mean, rstd, None, one, one, count, weights=weights * np.float32(scale))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def trained(kind, x, weights, where, axis):
    y, saved = kind.batch_norm(x, weights=weights, where=where, channel_axis=axis)
    sums = kind.grad_sums(y, x, saved.mean, saved.rstd, weights=weights, where=where, channel_axis=axis)
    return y, saved, kind.batch_norm_backward(y, saved), sums


def arrays_of(results):
    y, saved, gradients, sums = results
    return y, *saved.moments, saved.rstd, *gradients[:3], *sums


SHAPES = [(4, 3, 6), (1, 3, 1), (4, 3, 1), (3, 6), (3, 1), (6,), (1, 1, 1), ()]


@pytest.mark.parametrize("shape", some_slow(SHAPES, [(4, 3, 6), (3, 6), ()]), ids=str)
def test_what_broadcasts(shape, kind):
    """As NumPy broadcasts: numpy.ma's count, mean and variance."""
    rng = np.random.default_rng(1)
    x, where = rng.standard_normal((4, 3, 6)), np.array(rng.random(shape) < 0.8)
    where.flat[0] = True
    found = kind.moments(x, where=where)
    masked = np.ma.array(x, mask=~np.broadcast_to(where, x.shape))
    np.testing.assert_array_equal(found.count, masked.count((0, 2)))
    some = found.count > 0
    for ours, theirs in ((found.mean, masked.mean((0, 2))), (found.m2 / found.count, masked.var((0, 2)))):
        np.testing.assert_allclose(ours[some], theirs[some].filled(np.nan), rtol=1e-13)
        assert np.isnan(ours[~some]).all()


def test_streamed(kind):
    """Parts of data whose channels miss other values merge to the moments of all that is there."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((64, 5)) + 1e3
    x[rng.random(x.shape) < 0.3] = np.nan
    x[:48, 1] = np.nan  # three parts without a value of this channel
    x[:, 4] = np.nan
    parts = [kind.moments(part, where=np.isfinite(part)) for part in np.split(x, 4)]
    merged = kind.merge(*parts)
    for c in range(4):
        values = [Fraction(v) for v in x[:, c] if np.isfinite(v)]
        mean = sum(values) / len(values)
        m2 = sum((v - mean) ** 2 for v in values)
        assert merged.count[c] == len(values)
        np.testing.assert_allclose(merged.mean[c], float(mean), rtol=1e-15)
        np.testing.assert_allclose(merged.m2[c], float(m2), rtol=1e-11)
    assert merged.count[4] == 0
    assert np.isnan(merged.mean[4])


def test_running_statistics_of_them(kind):
    """A channel without values is left alone, the others move."""
    x = np.array([[1.0, np.nan], [3.0, np.nan]])
    seen = kind.moments(x, where=np.isfinite(x))
    mean, var = kind.update_running(np.zeros(2), np.ones(2), seen, rate=0.5)
    np.testing.assert_array_equal([mean, var], [[1.0, 0.0], [1.5, 1.0]])


def test_an_image_and_its_channels():
    """The default's statistics are those of the columns."""
    image = np.random.default_rng(0).random((6, 8, 3))
    for axis, reduced in ((1, (0, 2)), (-1, (0, 1))):
        np.testing.assert_allclose(fastbn.moments(image, channel_axis=axis).mean, image.mean(reduced), rtol=1e-14)
    assert fastbn.moments(image).mean.shape == (8,)


# --- batch norm -------------------------------------------------------------------------------------------------------


def training_case(layout, dtype, given, seed=3, **options):
    """A case whose channels each count other values: of 0 to 3 in weight, and all finite."""
    case = make_case(LAYOUTS[layout], dtype, Options(affine=True, **options), seed)
    rng = np.random.default_rng(seed)
    arrays = {"where": rng.random(case.layout.shape) < 0.7, "weights": rng.integers(0, 4, case.layout.shape) * 0.3}
    for array in arrays.values():  # each channel has some
        array[tuple(slice(None) if axis in case.layout.kept else 0 for axis in range(array.ndim))] = 1
    case.keywords |= {name: arrays[name] for name in given.split()}
    return case


@pytest.fixture
def other_bits(monkeypatch):
    """`moments` of such masks has a kernel of its own."""
    monkeypatch.setattr(checks, "SAME_BITS", False)


# The float64 oracle rounds as often as float64 kernels.
@by_given
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", some_slow(["float32", "float16", "bfloat16"], ["float32"]))
def test_training(layout, dtype, given, other_bits):
    check_backward(training_case(layout, dtype, given, relu="where" in given, residual=given == "where"))


@by_given
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts(layout, given):
    check_parts(training_case(layout, "float32", given))


@one_in(3, layout=ON_A_DEVICE, given=OWN)
def test_training_of_cupy(layout, given, cuda_arrays, monkeypatch, other_bits):
    monkeypatch.setattr(checks, "fastbn", cuda_arrays)
    check_backward(training_case(layout, "float32", given, relu="where" in given))


@pytest.mark.parametrize("layout", some_slow(["NCHW", "NHWC", "NHWC wide", "NCHW short rows"], ["NHWC"]))
def test_what_is_left_out_may_be_anything(layout, kind):
    """Where a channel's mask is False and dy 0, NaN in x changes nothing and has no gradient."""
    case = training_case(layout, "float64", "where")
    where, dy = case.keywords["where"], np.where(case.keywords["where"], case.dy, 0.0)
    _, saved = kind.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    expected = kind.batch_norm_backward(dy, saved)
    hidden = np.where(where, case.x, np.nan)
    y, saved = kind.batch_norm(hidden, case.gamma, case.beta, **case.keywords)
    found = kind.batch_norm_backward(dy, saved)
    assert (np.isnan(y) == ~where).all()
    for mine, other in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", some_slow(["NCHW", "NHWC", "instance NHWC"], ["NHWC"]))
def test_a_shared_mask_is_one_that_each_channel_has(layout, kind):
    case = training_case(layout, "float64", "")
    mask = np.random.default_rng(0).random(case.layout.weight_shape) < 0.6
    given = case.x, case.gamma, case.beta
    results = []
    for where in (mask, np.array(np.broadcast_to(mask, case.x.shape))):
        y, saved = kind.batch_norm(*given, where=where, **case.keywords)
        results.append((y, *kind.batch_norm_backward(case.dy, saved)[:3]))
    for shared, own in zip(*results, strict=True):
        np.testing.assert_allclose(own, shared, rtol=1e-11, atol=1e-12)


def test_the_check_sees_gradients_of_the_next_channels_mask():
    case = training_case("NHWC", "float32", "where")
    rolled = case.keywords | {"where": np.roll(case.keywords["where"], 1, axis=-1)}
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **rolled)
    with pytest.raises(AssertionError):
        checks.check_gradients(case, y, saved, forward, fastbn.batch_norm_backward(case.dy, saved))


# --- mean_var ---------------------------------------------------------------------------------------------------------


@one_in(3, shape=[(4, 3, 6), (3, 1), (4, 1, 1)], axis=[None, 1, (0, 2), -1, ()])
def test_weighted_mean_var(shape, axis):
    """`numpy.average`'s mean, and the mean squared distance from it."""
    rng = np.random.default_rng(3)
    x, weights = rng.standard_normal((4, 3, 6)), rng.random(shape) + 0.1
    full = np.broadcast_to(weights, x.shape)
    axes = tuple(range(3)) if axis is None else axis
    expected = np.average(x, axes, weights=full, keepdims=True) if axis != () else x
    spread = np.average((x - expected) ** 2, axes, weights=full, keepdims=True) if axis != () else np.zeros_like(x)
    mean, var = fastbn.mean_var(x, axis, weights=weights, keepdims=True)
    np.testing.assert_allclose(mean, expected, rtol=1e-13)
    np.testing.assert_allclose(var, spread, rtol=1e-12, atol=1e-30)
    flat_mean, flat_var = fastbn.mean_var(x, axis, weights=weights)
    np.testing.assert_array_equal(np.ravel(flat_mean), np.ravel(mean))
    np.testing.assert_array_equal(np.ravel(flat_var), np.ravel(var))


def test_weights_are_frequencies(kind):
    """Of integers too, with a list of weights, a correction and a mask."""
    often, where = [1, 2, 0, 3], [True, True, True, False]
    x = np.array([[5, -3, 100, 7], [1, 2, 1000, 8]])
    repeated = np.repeat(x, often, axis=1)
    mean, var = kind.mean_var(x, 1, weights=often, correction=1)
    np.testing.assert_allclose([mean, var], [repeated.mean(1), repeated.var(1, ddof=1)], rtol=1e-15)
    mean, var = kind.mean_var(x, 1, weights=often, where=where)
    np.testing.assert_allclose([mean, var], [repeated[:, :3].mean(1), repeated[:, :3].var(1)], rtol=1e-15)


def test_weights_that_select_nothing():
    warns = pytest.warns(RuntimeWarning, match="Mean of empty slice|Degrees of freedom <= 0")
    with warns:
        mean, var = fastbn.mean_var(np.array([[1.0, 2.0], [np.inf, 4.0]]), 1, weights=np.array([[0.0], [1.0]]))
    np.testing.assert_array_equal(mean, [np.nan, np.inf])
    assert np.isnan(var).all()
    with warns:
        assert np.isnan(fastbn.mean_var(np.ones((0, 3), np.float32), 0, weights=np.ones((0, 1)))).all()


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        (np.ones(3), ValueError, r"^weights: expected a shape that broadcasts to \(3, 4\), got \(3,\)"),
        (np.full(4, -1.0), ValueError, "^weights: expected finite values >= 0"),
        ([1.0, np.nan, 1.0, 1.0], ValueError, "^weights: expected finite values >= 0"),
        (np.ones(4, complex), TypeError, "^weights: expected a real dtype, got complex128"),
        (["a", "b", "c", "d"], TypeError, "^weights: expected a real dtype, got <U1"),
        (np.ma.ones(4), TypeError, "^weights: expected a numpy.ndarray .* got numpy.ma.MaskedArray"),
    ],
)
def test_wrong_weights(weights, error, match):
    with pytest.raises(error, match=match):
        fastbn.mean_var(np.ones((3, 4)), 0, weights=weights)
