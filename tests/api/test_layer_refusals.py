"""What a layer (`fastbn.BatchNorm`) refuses, before anything is written."""

import re

import numpy as np
import pytest
from numpy.exceptions import AxisError
from numpy.testing import assert_array_equal

import fastbn
from tests.cases.layers import (
    MODES,
    assert_unchanged,
    contents,
    layer_of,
    numbers,
)
from tests.support import Layout

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
    "an infinite correction": ({"correction": np.inf}, ValueError, "correction: expected a finite number, got inf"),
    "an axis twice": (
        {"channels": (2, 2), "channel_axis": (1, 1)}, ValueError, "channel_axis: expected different axes, got (1, 1)",
    ),
    "None as dtype": ({"dtype": None}, TypeError, "float64, got None"),
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
