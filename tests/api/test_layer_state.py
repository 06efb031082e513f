"""What a layer (`fastbn.BatchNorm`) holds: its state, copies, and what it folds into the layer before."""

import copy
import pickle
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastbn
from tests.cases.layers import (
    assert_same,
    assert_unchanged,
    contents,
    numbers,
    trained,
)
from tests.support import DTYPES

NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


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
        f"state['running_var']: expected an array for numpy, got {Elsewhere}: not here",
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
