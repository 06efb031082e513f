"""Integers of 8 and 16 bits, and bools, are added up as integers: sums and sums of squares are exact."""

import math
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn.cpu.kernels import integers
from tests.support import some_slow

DTYPES = ["uint8", "int8", "bool", "uint16", "int16"]
by_dtype = pytest.mark.parametrize("dtype", some_slow(DTYPES, ["uint8", "int16", "bool"]))


def extremes(dtype):
    return (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)


def largest(dtype, shape):
    return np.full(shape, extremes(dtype)[1], dtype)


def smallest(dtype, shape):
    """Whose distance from the middle is the largest: sums in few bits would overflow first."""
    return np.full(shape, extremes(dtype)[0], dtype)


def both(dtype, shape):
    return np.random.default_rng(0).choice(np.array(extremes(dtype), dtype), shape)


def one_other(dtype, shape):
    """A variance far smaller than the square of the mean."""
    x = largest(dtype, shape)
    x.flat[x.size // 3] = extremes(dtype)[1] - 1
    return x


def anything(dtype, shape):
    low, high = extremes(dtype)
    return np.random.default_rng(1).integers(low, high, shape, endpoint=True).astype(dtype)


def exact(x, axis):
    """Means and variances, rounded once."""
    kept = np.moveaxis(x, axis, range(len(axis))).reshape(math.prod(x.shape[a] for a in axis), -1).astype(np.int64)
    n, sums, squares = len(kept), kept.sum(0).tolist(), (kept**2).sum(0).tolist()
    mean = [float(Fraction(s, n)) for s in sums]
    var = [float(Fraction(n * q - s * s, n * n)) for s, q in zip(sums, squares, strict=True)]
    return np.array(mean), np.array(var)


SHAPES = {  # by the way that they are added up
    "shorter than a vector": ((7,), (0,)),
    "of vectors and a rest": ((1000,), (0,)),
    "of quarters": ((integers.BYTES * integers.LONG_ROUNDS * 4 + 77,), (0,)),
    "of pieces": ((200_001,), (0,)),
    "rows, each a result": ((5, 9001), (1,)),
    "short rows, each a result": ((70, 100), (1,)),
    "rows of many": ((3, 4, 700), (0, 2)),
    "columns": ((2 * integers.MOST_ROWS + 3, 200), (0,)),
    "wide columns": ((300, 9000), (0,)),
    "few columns": ((70, 90, 3), (0, 1)),
    "cells": ((40, 5, 49), (0, 2)),
    "middle axes": ((3, 300, 65), (1,)),
}


@by_dtype
@pytest.mark.parametrize("values", [largest, smallest, both, one_other, anything])
@pytest.mark.parametrize("name", SHAPES)
def test_exact(name, values, dtype):
    shape, axis = SHAPES[name]
    x = values(dtype, shape)
    mean, var = exact(x, axis)
    np.testing.assert_array_max_ulp(fastbn.mean(x, axis=axis).ravel(), mean, 1)
    # Parts of a channel are merged in float64.
    np.testing.assert_allclose(fastbn.var(x, axis=axis).ravel(), var, rtol=1e-15, atol=0)


@by_dtype
@pytest.mark.parametrize("size", range(1, 300, 7))
def test_lengths(size, dtype):
    """Whatever is left of rows and columns behind whole vectors; nothing behind them is read."""
    wide = anything(dtype, (12, size + 70))
    for x in (wide[:, :size], wide[:, 70:]):
        for axis in (0, 1):
            mean, var = exact(x, (axis,))
            np.testing.assert_array_max_ulp(fastbn.mean(x, axis=axis), mean, 1)
            np.testing.assert_allclose(fastbn.var(x, axis=axis), var, rtol=1e-15, atol=0)


@by_dtype
@pytest.mark.parametrize("values", [smallest, anything])
@pytest.mark.parametrize("border", [1, 3])
def test_images_without_their_border(border, values, dtype):
    """Rows of some columns, or some rows of them, before the next lie elsewhere; in all more than a table holds."""
    x = values(dtype, (3, 160, 70, 5))[:, border:-border, border:-border]
    for axis in ((0, 1, 2), (1, 2), (0, 1)):
        mean, var = exact(x, axis)
        np.testing.assert_array_max_ulp(fastbn.mean(x, axis=axis).ravel(), mean, 1)
        np.testing.assert_allclose(fastbn.var(x, axis=axis).ravel(), var, rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(1000,), (300, 200)])
def test_every_byte_of_a_bool_that_is_not_zero_counts_once(shape):
    """As in NumPy's sums of bools that are views of other bytes."""
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(fastbn.mean(x.view(bool), axis=0), fastbn.mean(x != 0, axis=0))
    np.testing.assert_array_equal(fastbn.var(x.view(bool), axis=0), fastbn.var(x != 0, axis=0))


@by_dtype
def test_as_where_they_lie_otherwise(dtype):
    """The kernels for values apart, which convert them, find the same to the last digits."""
    x = anything(dtype, (300, 200))
    apart = np.repeat(x, 3, axis=1)[:, ::3]
    for function in (fastbn.mean, fastbn.var):
        np.testing.assert_allclose(function(apart, axis=0), function(x, axis=0), rtol=1e-15)
        np.testing.assert_allclose(function(apart, axis=1), function(x, axis=1), rtol=1e-15)
