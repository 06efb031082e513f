"""`fastbn.BatchNorm` beside finite differences and the functions that it calls."""

import gc
import weakref

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastbn
from tests.cases.layers import (
    CLOSE,
    LAYOUTS,
    MODES,
    OPTIONS,
    Place,
    assert_same,
    layer_of,
    numbers,
    options_of,
)
from tests.support import DTYPES, Layout, one_in, some_slow

# --- gradients --------------------------------------------------------------------------------------------------------


def by_differences(function, array):
    """Central differences of a function of no arguments in every element of an array."""
    gradient = np.empty(array.shape)
    for i in np.ndindex(array.shape):
        value, step = array[i], 1e-5
        array[i] = value + step
        above = function()
        array[i] = value - step
        gradient[i] = (above - function()) / (2 * step)
        array[i] = value
    return gradient


def assert_gradients(layout, mode, options, dtype="float64", parameters="float64"):
    """Those of a layer beside finite differences in float64 of the same values."""
    x, dy = (layout.place(numbers(layout.shape, dtype, seed)) for seed in (1, 2))
    norm, keywords = layer_of(layout, mode, dtype=DTYPES[parameters]), options_of(layout, options, dtype)
    exact = layer_of(layout, mode, dtype="float64")
    for name in ("gamma", "beta"):
        getattr(exact, name)[...] = getattr(norm, name)
    wide = {key: a.astype(float) if key == "residual" else a for key, a in keywords.items()}
    inputs = {"x": x.astype(float), "gamma": exact.gamma, "beta": exact.beta, "residual": wide.get("residual")}

    def loss():
        return float((exact.forward(inputs["x"], **wide) * dy.astype(float)).sum())

    y = norm.forward(x, **keywords)
    dx = norm.backward(dy)
    assert (dx.dtype, dx.strides) == (y.dtype, y.strides) == (x.dtype, np.empty_like(x).strides)
    assert norm.dgamma.dtype == norm.dbeta.dtype == norm.gamma.dtype == np.dtype(DTYPES[parameters])
    found = {"x": dx, "gamma": norm.dgamma, "beta": norm.dbeta, "residual": norm.dresidual}
    assert (norm.dresidual is None) == (inputs["residual"] is None)
    for name, gradient in found.items():
        if gradient is not None:
            expected = by_differences(loss, inputs[name])
            close = max(CLOSE[dtype], CLOSE[parameters] if name in ("gamma", "beta") else 0)
            assert np.abs(expected).max() > 0.1
            assert_allclose(gradient.astype(float), expected, rtol=0, atol=close * np.abs(expected).max(), err_msg=name)


@one_in(3, layout=LAYOUTS, mode=MODES)
@pytest.mark.parametrize("options", some_slow(OPTIONS, ["residual relu", "where"]))
def test_gradients(layout, options, mode):
    assert_gradients(LAYOUTS[layout], mode, options)


DTYPES_OF_BOTH = [
    "float32 float32", "float16 float32", "float32 float64", "float64 float32", "float16 float16", "bfloat16 float32",
    "bfloat16 bfloat16",
]  # fmt: skip


@one_in(3, mode=MODES, layout=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtypes", some_slow(DTYPES_OF_BOTH, DTYPES_OF_BOTH[:4]))
def test_gradients_of_other_dtypes(layout, dtypes, mode):
    """Of x and of the parameters."""
    assert_gradients(LAYOUTS[layout], mode, "residual relu", *dtypes.split())


def test_without_parameters():
    """There are no gradients of them, and that of x is that of gamma = 1 and beta = 0."""
    layout = LAYOUTS["NCHW"]
    x, dy = numbers(layout.shape), numbers(layout.shape, seed=1)
    norm, other = fastbn.BatchNorm(4, affine=False), fastbn.BatchNorm(4)
    for mode in (True, False):
        assert_array_equal(norm.train(mode).forward(x), other.train(mode).forward(x))
        assert_array_equal(norm.backward(dy), other.backward(dy))
    assert norm.gamma is norm.beta is norm.dgamma is norm.dbeta is None


def test_a_gradient_that_its_dtype_cannot_hold():
    norm, x = fastbn.BatchNorm(1, dtype="float16"), np.array([[-1.0], [1.0]])
    norm.forward(x)
    norm.backward(np.full((2, 1), 1e5))
    assert_array_equal(norm.dbeta, [np.inf])


# --- beside the functions ---------------------------------------------------------------------------------------------


def assert_steps(layout, options, dtype, place, parameters="float32"):
    """Training steps, and then a backward pass by running statistics, have the bits of the functions."""
    axis = {"channel_axis": layout.channel_axis, "eps": 0.01}
    norm = layer_of(layout, place=place, dtype=parameters, eps=0.01)
    affine = norm.gamma, norm.beta
    keywords = options_of(layout, options, dtype, place)
    mean, var = norm.mean.copy(), norm.var.copy()
    epilogue = {key: keywords[key] for key in ("residual", "activation") if key in keywords}
    for step in (1, 2, 3):
        x, dy = (place.there(layout.place(numbers(layout.shape, dtype, 10 * step + i, 3))) for i in range(2))
        y, saved = fastbn.batch_norm(x, *affine, **axis, **keywords)
        fastbn.update_running(mean, var, saved.moments, out=(mean, var))
        grads = fastbn.batch_norm_backward(dy, saved)
        assert_same(place, norm.forward(x, **keywords), y)
        assert_same(place, norm.backward(dy), grads.x)
        assert_same(place, norm.dgamma, grads.gamma.astype(norm.gamma.dtype))
        assert_same(place, norm.dbeta, grads.beta.astype(norm.beta.dtype))
        for ours, theirs in zip((norm.mean, norm.var, *norm.moments), (mean, var, *saved.moments), strict=True):
            assert_same(place, ours, theirs)
        assert norm.batches == step
        if "residual" in keywords:
            assert_same(place, norm.dresidual, grads.residual)
    y = fastbn.batch_norm_inference(x, mean, var, *affine, **axis, **epilogue)
    saved = fastbn.Saved.frozen(x, mean, var, norm.gamma, y=y, **axis, activation=keywords.get("activation"))
    grads = fastbn.batch_norm_backward(dy, saved)
    for frozen in (False, True):
        norm.train(frozen).frozen = frozen
        moments = norm.moments
        assert_same(place, norm.forward(x, **keywords), y)
        assert_same(place, norm.backward(dy), grads.x)
        assert_same(place, norm.dgamma, grads.gamma.astype(norm.gamma.dtype))
        assert_same(place, norm.mean, mean)
        assert_same(place, norm.var, var)
        assert norm.batches == 3
        assert norm.moments is moments


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps(layout, options):
    assert_steps(LAYOUTS[layout], options, "float32", Place(np, lambda a: a, lambda a: a))


@pytest.mark.parametrize(("layout", "options", "dtype", "parameters"), [
    ("NCHW", "plain", "float64", "float64"), ("NCHW", "residual relu", "float16", "float32"),
    ("NHWC", "residual relu", "float32", "float32"), ("NCHW", "where", "float32", "bfloat16"),
])  # fmt: skip
def test_steps_on_both_kinds_of_array(layout, options, dtype, parameters, place):
    assert_steps(LAYOUTS[layout], options, dtype, place, parameters)


def test_two_ranks():
    """One layer on each has the statistics and the input's gradient of one layer on both batches."""
    x, dy, parts = numbers((10, 3)), numbers((10, 3), seed=1), (slice(7), slice(7, 10))
    whole = fastbn.BatchNorm(3, dtype="float64")
    y = whole.forward(x)
    dx = whole.backward(dy)
    moments = [fastbn.moments(x[part]) for part in parts]
    sums = [np.stack(fastbn.grad_sums(dy[part], x[part], *_mean_and_rstd(whole))) for part in parts]
    for part, own in zip(parts, sums, strict=True):
        norm = fastbn.BatchNorm(3, dtype="float64")
        exchanged = iter([[np.concatenate(m) for m in moments], [np.concatenate(s) for s in sums]])

        def gather(vector, rows=exchanged):
            return np.stack(next(rows))

        assert_allclose(norm.forward(x[part], gather=gather), y[part], rtol=0, atol=1e-13)
        assert_allclose([norm.mean, norm.var], [whole.mean, whole.var], rtol=1e-14)
        assert_allclose(norm.backward(dy[part]), dx[part], rtol=0, atol=1e-13)
        assert_allclose([norm.dgamma, norm.dbeta], own, rtol=1e-13)  # of this rank alone
        assert next(exchanged, None) is None


def _mean_and_rstd(norm):
    return norm.moments.mean, norm.moments.rstd(norm.eps)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_a_cumulative_average():
    """Every batch weighs the same: the population's statistics of `fastbn.population`."""
    norm = fastbn.BatchNorm(3, rate=None)
    batches = [numbers((n, 3), "float32", seed=n, loc=n) for n in (5, 9, 2, 30)]
    moments = []
    for count, batch in enumerate(batches, start=1):
        norm.forward(batch)
        moments.append(norm.moments)
        assert norm.batches == count
        assert_allclose([norm.mean, norm.var], fastbn.population(moments), rtol=1e-14)
    assert_allclose(norm.mean, np.mean([b.mean(axis=0, dtype=float) for b in batches], axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("correction", "expected"), [(1, 0.9 + 0.1 * 2), (0, 0.9 + 0.1 * 1), (0.5, 0.9 + 0.1 * 2 / 1.5)]
)
def test_the_running_variance(correction, expected):
    """Of -1 and 1: unbiased 2, biased 1."""
    norm = fastbn.BatchNorm(1, correction=correction)
    norm.forward(np.array([[-1.0], [1.0]]))
    assert_allclose(norm.var, [expected], rtol=1e-15)


@pytest.mark.parametrize(("rate", "mean"), [(0.0, 0.0), (0.25, 1.0), (1.0, 4.0), (1, 4.0)])
def test_the_rate(rate, mean):
    norm = fastbn.BatchNorm(1, rate=rate)
    norm.forward(np.array([[3.0], [5.0]]))
    assert_array_equal(norm.mean, [mean])


def test_batches_without_statistics():
    """None, or one value per channel: they are seen, and change nothing."""
    norm = layer_of(Layout((1, 3)))
    mean, var = norm.mean.copy(), norm.var.copy()
    for count in (0, 1):
        x = np.ones((count, 3), np.float32)
        assert norm.forward(x).shape == x.shape
        assert norm.backward(x).shape == x.shape
        assert_array_equal([norm.mean, norm.var], [mean, var])
        assert norm.batches == count + 1


def test_modes_return_the_layer():
    norm = fastbn.BatchNorm(2)
    assert norm.training
    assert norm.eval() is norm
    assert norm.training is False
    assert norm.train() is norm
    assert norm.training is True
    assert norm.train(False).training is False


# --- one backward pass for a forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_backward_takes_a_forward_pass(mode):
    norm, x = layer_of(LAYOUTS["NC"], mode), numbers((7, 3))
    message = "backward: expected a forward pass before it, one for each backward pass, got none"
    with pytest.raises(RuntimeError, match=message):
        norm.backward(x)
    norm.forward(x)
    with pytest.raises(ValueError, match=r"dy: expected x's shape \(7, 3\)"):
        norm.backward(x[:3])
    assert norm.dgamma is None
    first = norm.backward(x)  # after an error it can be tried again
    with pytest.raises(RuntimeError, match=message):
        norm.backward(x)
    norm.forward(x)
    out = x.copy()
    assert norm.backward(out, out=out) is out
    assert_array_equal(out, first)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_kept_after_the_backward_pass(mode):
    norm, x = layer_of(LAYOUTS["NC"], mode), numbers((7, 3))
    alive = weakref.ref(x)
    norm.forward(x, activation="relu")
    dy = np.ones_like(x)
    del x
    gc.collect()
    assert alive() is not None
    norm.backward(dy)
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("mode", MODES)
def test_out(mode):
    layout = LAYOUTS["NCHW"]
    x, dy = numbers(layout.shape), numbers(layout.shape, seed=1)
    norm = layer_of(layout, mode)
    expected, expected_dx = norm.forward(x), norm.backward(dy)
    out = np.zeros_like(x)
    assert norm.forward(x, out=out) is out
    assert_array_equal(out, expected)
    assert_array_equal(norm.backward(dy), expected_dx)
    assert norm.forward(x, out=x) is x
    assert_array_equal(x, expected)
    with pytest.raises(ValueError, match="saved: expected the input x, but out overwrote it"):
        norm.backward(dy)


def test_gradients_are_new_arrays():
    """An optimizer may keep them."""
    norm, x = fastbn.BatchNorm(3), numbers((7, 3), "float32")
    norm.forward(x)
    norm.backward(x)
    kept, values = norm.dgamma, norm.dgamma.copy()
    norm.forward(x)
    norm.backward(2 * x)
    assert norm.dgamma is not kept
    assert_array_equal(kept, values)


def test_no_channel_axes():
    """One number of each kind."""
    norm, x = fastbn.BatchNorm((), channel_axis=()), np.arange(8, dtype=np.float32)
    y = norm.forward(x)
    assert abs(y.mean()) < 1e-6
    norm.backward(x)
    norm.eval().forward(x)
    assert norm.backward(x).shape == x.shape


def test_gamma_without_beta():
    norm, x = fastbn.BatchNorm(2), np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    norm.beta = None
    norm.forward(x)
    norm.backward(x)
    assert norm.dbeta is None
    assert norm.dgamma.shape == (2,)
