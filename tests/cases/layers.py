"""Layers (`fastbn.BatchNorm`) to be tested, on either kind of array."""

from typing import Any, NamedTuple

import numpy as np
from numpy.testing import assert_array_equal

import fastbn
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


def trained(place=None, **keywords):
    place = place or Place(np, lambda a: a, lambda a: a)
    norm = layer_of(Layout((5, 3)), place=place, **keywords)
    norm.forward(place.there(numbers((5, 3), "float32")))
    return norm


def assert_same(place, ours, theirs):
    assert type(ours) is type(theirs) is place.xp.ndarray
    assert (ours.dtype, ours.strides) == (theirs.dtype, theirs.strides)
    assert_array_equal(place.back(ours), place.back(theirs))
