"""`fastbn.BatchNorm` beside finite differences and the functions that it calls; its state, and what it refuses."""

import copy
import gc
import pickle
import re
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.exceptions import AxisError
from numpy.testing import assert_allclose, assert_array_equal

import fastbn
from tests.on_cupy import without_gpu
from tests.support import DTYPES, Layout, channels_last, fortran, spatial_slice

LAYOUTS = {
    "NC": Layout((7, 3)),
    "NCHW": Layout((3, 4, 2, 3)),
    "NHWC": Layout((3, 2, 3, 4), -1),
    "NHWC as NCHW": Layout((3, 4, 2, 3), 1, channels_last),
    "Fortran": Layout((3, 4, 2, 3), 1, fortran),
    "spatial slice": Layout((3, 4, 2, 3), 1, spatial_slice),
    "two axes kept": Layout((4, 3, 2, 2), (3, 1)),
}
MODES = ("training", "evaluation", "frozen")
OPTIONS = ("plain", "residual relu", "where", "weights relu")
CLOSE = {"float64": 1e-8, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Of the largest gradient: what central differences leave of float64, and some roundings of the others."""


class Place(NamedTuple):
    """Where a layer's arrays are: their library, and the ways there and back."""

    xp: Any
    there: Any
    back: Any


@pytest.fixture(params=["numpy", "cupy"])
def place(request):
    if request.param == "numpy":
        return Place(np, lambda a: a, lambda a: a)
    if request.config.getoption("require_cuda"):
        if reason := without_gpu():
            pytest.fail(f"--require-cuda: {reason}")
        import cupy

        return Place(cupy, cupy.asarray, cupy.asnumpy)
    request.getfixturevalue("cuda_device")
    import cupy

    from tests.simt import host_cupy

    return Place(cupy, host_cupy.to_cupy, host_cupy.to_numpy)


def numbers(shape, dtype="float64", seed=0, loc=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + loc).astype(DTYPES[dtype])


def options_of(layout, name, dtype="float64", place=None):
    """Keywords of `forward`."""
    rng, shape, keywords = np.random.default_rng(5), layout.weight_shape, {}
    if "residual" in name:
        keywords["residual"] = layout.place(numbers(layout.shape, dtype, seed=6))
    if "where" in name:
        keywords["where"] = rng.random(shape) < 0.7
        keywords["where"].flat[:2] = True
    if "weights" in name:
        keywords["weights"] = rng.integers(1, 5, shape) * 0.5
    if place is not None:
        keywords = {key: place.there(array) for key, array in keywords.items()}
    return keywords | ({"activation": "relu"} if "relu" in name else {})


def layer_of(layout, mode="training", place=None, **keywords):
    """Parameters and statistics are not those it begins with."""
    xp, there = (np, lambda a: a) if place is None else place[:2]
    norm = fastbn.BatchNorm(layout.channels, channel_axis=layout.channel_axis, xp=xp, **keywords)
    rng = np.random.default_rng(3)
    values = rng.uniform(0.5, 2, (2, *layout.channels)), rng.standard_normal((2, *layout.channels))
    for (positive, other), (a, b) in zip((("gamma", "beta"), ("var", "mean")), zip(*values, strict=True), strict=True):
        for name, new in ((positive, a), (other, b)):
            if getattr(norm, name) is not None:
                getattr(norm, name)[...] = there(new.astype(getattr(norm, name).dtype))
    norm.frozen = mode == "frozen"
    return norm.train(mode != "evaluation")


def contents(norm):
    """Everything a layer holds that a call may change."""
    arrays = {name: np.array(getattr(norm, name)) for name in ("gamma", "beta", "mean", "var")}
    return arrays | {"batches": norm.batches, "moments": norm.moments, "dgamma": norm.dgamma}


def assert_unchanged(norm, before):
    for name, value in contents(norm).items():
        assert_array_equal(value, before[name], err_msg=name)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout, options, mode):
    assert_gradients(LAYOUTS[layout], mode, options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "parameters"), [
    ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64"),
    ("float64", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_of_other_dtypes(layout, dtype, parameters, mode):
    assert_gradients(LAYOUTS[layout], mode, "residual relu", dtype, parameters)


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


def assert_same(place, ours, theirs):
    assert type(ours) is type(theirs) is place.xp.ndarray
    assert (ours.dtype, ours.strides) == (theirs.dtype, theirs.strides)
    assert_array_equal(place.back(ours), place.back(theirs))


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


# --- state ------------------------------------------------------------------------------------------------------------

NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained(place=None, **keywords):
    place = place or Place(np, lambda a: a, lambda a: a)
    norm = layer_of(Layout((5, 3)), place=place, **keywords)
    norm.forward(place.there(numbers((5, 3), "float32")))
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_state(dtype):
    norm = trained(dtype=DTYPES[dtype])
    state = norm.state()
    assert list(state) == NAMES
    for name, array in zip(NAMES, (norm.gamma, norm.beta, norm.mean, norm.var), strict=False):
        assert_array_equal(state[name], array)
        assert not np.shares_memory(state[name], array)
    assert {name: array.dtype for name, array in state.items()} == {
        "weight": DTYPES[dtype], "bias": DTYPES[dtype], "running_mean": float, "running_var": float,
        "num_batches_tracked": np.int64,
    }  # fmt: skip
    assert [array.shape for array in state.values()] == [(3,)] * 4 + [()]
    assert state["num_batches_tracked"] == 1


@pytest.mark.parametrize("affine", [True, False])
def test_state_and_back(affine, place):
    """Into another layer's own arrays, and from the host, as files are read there."""
    norm = trained(place, affine=affine)
    state = norm.state()
    assert list(state) == (NAMES if affine else NAMES[2:])
    assert {type(array) for array in state.values()} == {place.xp.ndarray}
    for given in (state, {name: place.back(array).copy() for name, array in state.items()}):
        other = fastbn.BatchNorm(3, affine=affine, xp=place.xp)
        arrays = other.gamma, other.beta, other.mean, other.var
        assert other.load(given) is other
        assert all(a is b for a, b in zip((other.gamma, other.beta, other.mean, other.var), arrays, strict=True))
        for name, array in other.state().items():
            assert_same(place, array, state[name])
        assert other.batches == 1
        assert type(other.batches) is int


def test_load_converts():
    """To the layer's dtypes; whatever NumPy makes arrays of."""
    norm = fastbn.BatchNorm(2, dtype="float16").load(
        {"weight": [1, 2], "bias": np.array([1e9, 0.1]), "running_mean": np.array([1, 2], np.uint8),
         "running_var": (np.float32(3), 4), "num_batches_tracked": 7},
    )  # fmt: skip
    assert_array_equal(norm.gamma, np.array([1, 2], np.float16))
    assert_array_equal(norm.beta, np.array([np.inf, 0.1], np.float16))
    assert_array_equal([norm.mean, norm.var], [[1, 2], [3, 4]])
    assert norm.gamma.dtype == norm.beta.dtype == np.float16
    assert norm.mean.dtype == norm.var.dtype == np.float64
    assert norm.batches == 7


def test_a_state_is_where_training_was():
    """Training goes on with the same bits."""
    x = numbers((5, 3), "float32", seed=9)
    norm = trained(rate=None)
    other = fastbn.BatchNorm(3, rate=None).load(norm.state())
    for _ in range(2):
        assert_array_equal(norm.forward(x), other.forward(x))
        assert_array_equal([norm.mean, norm.var], [other.mean, other.var])


class Elsewhere:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not here")


WRONG_STATES = {
    "no mapping": (
        lambda state: list(state.items()), TypeError, "state: expected a mapping of names to arrays, got list",
    ),
    "a name is missing": (
        lambda state: {n: a for n, a in state.items() if n != "running_var"}, ValueError,
        f"state: expected the names {NAMES}, got no ['running_var']",
    ),
    "an unknown name": (
        lambda state: state | {"running_std": np.ones(3)}, ValueError,
        f"state: expected the names {NAMES}, got also ['running_std']",
    ),
    "names of a model": (
        lambda state: {f"bn1.{n}": a for n, a in state.items()}, ValueError,
        f"got no {NAMES} and also {[f'bn1.{n}' for n in NAMES]}",
    ),
    "a shape": (
        lambda state: state | {"running_var": np.ones(4)}, ValueError,
        "state['running_var']: expected the shape (3,), got (4,)",
    ),
    "a shape that broadcasts": (
        lambda state: state | {"bias": np.ones(1)}, ValueError, "state['bias']: expected the shape (3,), got (1,)",
    ),
    "no count": (
        lambda state: state | {"num_batches_tracked": np.ones(1, int)}, ValueError,
        "state['num_batches_tracked']: expected the shape (), got (1,)",
    ),
    "a fraction of a batch": (
        lambda state: state | {"num_batches_tracked": 1.5}, ValueError,
        "state['num_batches_tracked']: expected an integer >= 0, got float64 1.5",
    ),
    "less than no batch": (
        lambda state: state | {"num_batches_tracked": -1}, ValueError,
        "state['num_batches_tracked']: expected an integer >= 0, got int64 -1",
    ),
    "nothing": (
        lambda state: state | {"running_var": None}, TypeError,
        "state['running_var']: expected real numbers, got dtype object",
    ),
    "complex numbers": (
        lambda state: state | {"running_var": np.ones(3, complex)}, TypeError,
        "state['running_var']: expected real numbers, got dtype complex128",
    ),
    "bool": (
        lambda state: state | {"weight": np.ones(3, bool)}, TypeError,
        "state['weight']: expected real numbers, got dtype bool",
    ),
    "text": (
        lambda state: state | {"weight": ["a", "b", "c"]}, TypeError,
        "state['weight']: expected real numbers, got dtype <U1",
    ),
    "lists of several lengths": (
        lambda state: state | {"running_var": [[1], [2, 3], []]}, TypeError,
        "state['running_var']: expected an array for numpy, got <class 'list'>: setting an array element",
    ),
    "no array here": (
        lambda state: state | {"running_var": Elsewhere()}, TypeError,
        "state['running_var']: expected an array for numpy, got <class 'tests.api.test_layer.Elsewhere'>: not here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_wrong_states(wrong):
    """The name, what was expected, what came; the layer is as it was."""
    change, error, message = WRONG_STATES[wrong]
    norm = trained()
    state = {name: array + 1 for name, array in norm.state().items()}
    before = contents(norm)
    with pytest.raises(error) as caught:
        norm.load(change(state))
    assert message in str(caught.value)
    assert_unchanged(norm, before)
    norm.load(state)
    assert_array_equal(norm.gamma, before["gamma"] + 1)


def test_parameters_for_a_layer_without():
    norm = fastbn.BatchNorm(3, affine=False)
    with pytest.raises(ValueError, match=re.escape("got also ['weight', 'bias']")):
        norm.load(fastbn.BatchNorm(3).state())


def test_a_state_of_cupy_arrays_for_numpy(cuda_device):
    import cupy

    state = fastbn.BatchNorm(3, xp=cupy).state()
    norm = trained()
    before = contents(norm)
    with pytest.raises(TypeError, match=r"state\['weight'\]: expected an array for numpy, got <class 'cupy.*explicit"):
        norm.load(state)
    assert_unchanged(norm, before)


DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda norm: pickle.loads(pickle.dumps(norm)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies(duplicate, place, request):
    """They go on as the layer does, but with a forward pass."""
    if duplicate == "deepcopy" and place.xp is not np and not request.config.getoption("require_cuda"):
        pytest.skip("CuPy's own deepcopy of an array asks a driver for the device")
    shallow, duplicate = duplicate == "copy", DUPLICATES[duplicate]
    norm = trained(place, rate=None, eps=1e-3, correction=0)
    x = place.there(numbers((5, 3), "float32", seed=1))
    norm.eval().forward(x)
    other = duplicate(norm)
    assert repr(other) == repr(norm)
    assert (other.training, other.batches, other.frozen) == (False, 1, False)
    with pytest.raises(RuntimeError, match="backward: expected a forward pass"):
        other.backward(x)
    assert norm.backward(x).shape == x.shape
    assert (other.gamma is norm.gamma) == shallow
    assert_same(place, other.forward(x), norm.forward(x))
    for name, array in other.state().items():
        assert_same(place, array, norm.state()[name])


@pytest.mark.parametrize("keywords", [
    {}, {"channel_axis": -1, "eps": 0.001, "rate": None, "correction": 0, "dtype": "float16"}, {"affine": False},
])  # fmt: skip
def test_a_layer_prints_what_makes_it(keywords):
    norm = fastbn.BatchNorm(3, **keywords)
    names = {"BatchNorm": fastbn.BatchNorm, "numpy": np} | {name: name for name in DTYPES}
    assert repr(eval(repr(norm), names)) == repr(norm)
    assert repr(norm).startswith("BatchNorm(3, channel_axis=")
    assert "BatchNorm((2, 3), channel_axis=(1, 3)" in repr(fastbn.BatchNorm((2, 3), channel_axis=(1, 3)))


# --- folding ----------------------------------------------------------------------------------------------------------


def test_folding(place):
    """A dense layer with the folded kernel is that layer and the inference of the batch norm."""
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.standard_normal((6, 4)), rng.standard_normal((4, 3)), rng.standard_normal(3)
    norm = trained(place, dtype="float64", eps=0.1).eval()
    for given in (bias, None):
        expected = norm.forward(place.there(x @ kernel + (0 if given is None else given)))
        sent = None if given is None else place.there(given)
        folded, shift = (place.back(a) for a in norm.fold_into(place.there(kernel), sent, axis=-1))
        assert_allclose(x @ folded + shift, place.back(expected), rtol=0, atol=1e-13)


def test_folding_into_groups():
    norm = trained(dtype="float64")
    kernel, bias = numbers((6, 1, 2)), numbers(3)
    statistics = norm.mean, norm.var, norm.gamma, norm.beta
    expected = fastbn.fold(kernel, bias, *statistics, axis=1, groups=3)
    for ours, theirs in zip(norm.fold_into(kernel, bias, axis=1, groups=3), expected, strict=True):
        assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="groups"):
        norm.fold_into(kernel, axis=1, groups=4)


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "channels of no number": ({"channels": "3"}, TypeError, "channels: expected an int or a tuple of ints, got '3'"),
    "half a channel": ({"channels": 3.5}, TypeError, "channels: expected an int or a tuple of ints, got 3.5"),
    "no channel": ({"channels": 0}, ValueError, "channels: expected sizes >= 1, one for each of 1 channel axes, got 0"),
    "too many sizes": ({"channels": (2, 3)}, ValueError, "one for each of 1 channel axes, got (2, 3)"),
    "too few sizes": (
        {"channels": 3, "channel_axis": (0, 1)}, ValueError, "one for each of 2 channel axes, got 3",
    ),
    "an axis": ({"channel_axis": "C"}, TypeError, "channel_axis: expected an int or a tuple of ints, got 'C'"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
    "an infinite eps": ({"eps": np.inf}, ValueError, "eps: expected a finite number >= 0, got inf"),
    "no eps": ({"eps": None}, TypeError, "eps: expected a real number, got NoneType"),
    "the rate": ({"rate": 1.5}, ValueError, "rate: expected None or a number in [0, 1], got 1.5"),
    "no rate": ({"rate": np.nan}, ValueError, "rate: expected None or a number in [0, 1], got nan"),
    "a rate of no number": ({"rate": "0.1"}, TypeError, "rate: expected a real number, got str"),
    "correction": ({"correction": None}, TypeError, "correction: expected a real number, got NoneType"),
    "integer parameters": (
        {"dtype": int}, TypeError, f"dtype: expected one of float16, bfloat16, float32, float64, got {int!r}",
    ),
    "no dtype": ({"dtype": "float23"}, TypeError, "float64, got 'float23'"),
    "another library": ({"xp": re}, TypeError, "xp: expected numpy or cupy, got <module 're'"),
    "its name": ({"xp": "numpy"}, TypeError, "xp: expected numpy or cupy, got 'numpy'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_wrong_settings(wrong):
    keywords, error, message = WRONG_SETTINGS[wrong]
    with pytest.raises(error) as caught:
        fastbn.BatchNorm(**{"channels": 3} | keywords)
    assert message in str(caught.value)


X = np.ones((4, 3, 5), np.float32)
WRONG_INPUTS = {
    "a list": ({"x": X.tolist()}, TypeError, "x: expected a numpy.ndarray or a cupy.ndarray, got list"),
    "a masked array": ({"x": np.ma.array(X)}, TypeError, "x: expected a numpy.ndarray or a cupy.ndarray, got numpy.ma"),
    "integers": ({"x": X.astype(int)}, TypeError, "x: expected one of float16"),
    "other channels": (
        {"x": X[:, :2]}, ValueError,
        "x: expected (3,) as the sizes of channel_axis 1, got (2,), x's shape being (4, 2, 5)",
    ),
    "one channel": ({"x": X[:, :1]}, ValueError, "x: expected (3,) as the sizes of channel_axis 1, got (1,)"),
    "no channel axis": ({"x": X[0, 0]}, AxisError, "channel_axis: axis 1 is out of bounds"),
    "a residual": ({"residual": X[:2]}, ValueError, "residual: expected x's shape"),
    "an activation": ({"activation": "tanh"}, ValueError, "activation: expected None or 'relu', got 'tanh'"),
    "an out": ({"out": X.astype(float)}, ValueError, "out: expected x's shape"),
}  # fmt: skip
WRONG_IN_TRAINING = {
    "a mask": ({"where": X}, TypeError, "where: expected dtype bool"),
    "weights": ({"weights": -X[:, :1]}, ValueError, "weights: expected finite values >= 0"),
    "a hook": ({"gather": 3}, TypeError, "gather: expected a callable"),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("mode", "wrong"),
    [
        *((mode, wrong) for mode in MODES for wrong in WRONG_INPUTS),
        *(("training", wrong) for wrong in WRONG_IN_TRAINING),
    ],
)
def test_wrong_inputs(mode, wrong, affine):
    """Nothing is written, and what was kept for a backward pass still is."""
    keywords, error, message = (WRONG_INPUTS | WRONG_IN_TRAINING)[wrong]
    norm, x = layer_of(Layout((4, 3, 5)), mode, affine=affine), numbers((4, 3, 5), "float32")
    expected = norm.forward(x) * 0 + norm.backward(x)
    norm.forward(x)
    before, out = contents(norm), np.zeros_like(X)
    with pytest.raises(error) as caught:
        norm.forward(**{"x": X, "out": out} | keywords)
    assert message in str(caught.value)
    assert not out.any()
    assert_unchanged(norm, before)
    assert_array_equal(norm.backward(x), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_mixed_kinds(cuda_device, mode, affine):
    """Nothing is copied from one to the other."""
    from tests.simt import host_cupy

    norm = layer_of(Layout((4, 3, 5)), mode, affine=affine)
    before = contents(norm)
    with pytest.raises(TypeError, match=r"mean: expected a cupy\.ndarray like x, got a numpy\.ndarray"):
        norm.forward(host_cupy.to_cupy(X))
    assert_unchanged(norm, before)


def test_settings_changed_later_are_checked():
    norm, x = fastbn.BatchNorm(3), numbers((7, 3))
    norm.rate = 2.0
    before = contents(norm)
    with pytest.raises(ValueError, match=r"rate: expected a number in \[0, 1\], got 2"):
        norm.forward(x)
    assert_unchanged(norm, before)


def test_no_channel_axes():
    """One number of each kind."""
    norm, x = fastbn.BatchNorm((), channel_axis=()), np.arange(8, dtype=np.float32)
    y = norm.forward(x)
    assert abs(y.mean()) < 1e-6
    norm.backward(x)
    norm.eval().forward(x)
    assert norm.backward(x).shape == x.shape


def test_settings_that_are_refused_early():
    for given, message in (
        ({"correction": float("nan")}, "^correction: expected a finite number"),
        ({"channel_axis": (1, 1)}, "^channel_axis: expected different axes"),
    ):
        with pytest.raises(ValueError, match=message):
            fastbn.BatchNorm((2, 2) if "channel_axis" in given else 2, **given)
    with pytest.raises(TypeError, match=r"^dtype: expected one of .* got None"):
        fastbn.BatchNorm(2, dtype=None)


def test_gamma_without_beta():
    norm, x = fastbn.BatchNorm(2), np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    norm.beta = None
    norm.forward(x)
    norm.backward(x)
    assert norm.dbeta is None
    assert norm.dgamma.shape == (2,)
