"""Running statistics on CuPy arrays: the bits that NumPy gives, kept where nothing changes, whatever `out` overlaps."""

import itertools

import numpy as np
import pytest

import fastbn
from tests.cuda.running import CHANNELS, assert_same, check_bits, check_rounding, expected, numbers
from tests.on_cupy import OnCupy
from tests.support import DTYPES

pytestmark = pytest.mark.usefixtures("cuda_device")

PAIRS = [*itertools.product(DTYPES, DTYPES)]


@pytest.mark.parametrize(("mean", "var"), PAIRS)
def test_bits_are_numpys(mean, var):
    check_bits(OnCupy(), mean, var, [*DTYPES][(PAIRS.index((mean, var)) + 2) % 4])


def test_halves_are_rounded_once():
    check_rounding(OnCupy())


@pytest.mark.parametrize("channels", [0, 1, 127, 128, 129])
def test_any_number_of_channels(channels):
    mean, var, moments = numbers(channels=channels)
    assert_same(OnCupy().update_running(mean, var, moments), expected(mean, var, moments))


def test_channels_of_several_axes():
    """In place, in the caller's shape, whatever its order."""
    mean, var, moments = numbers()
    theirs = expected(mean, var, moments)
    for order in "CF":
        shaped = [np.asarray(a.reshape(5, 60), order=order) for a in (mean, var, *moments)]
        out = tuple(np.asarray(a.reshape(5, 60).copy(), order=order) for a in (mean, var))
        new = OnCupy().update_running(*shaped[:2], fastbn.Moments(*shaped[2:]))
        OnCupy().update_running(*out, fastbn.Moments(*shaped[2:]), out=out)
        for pair in (new, out):
            assert_same([np.ascontiguousarray(a).ravel() for a in pair], theirs)


def test_out_overlaps_its_inputs():
    """Swapped, or shifted: as if all had been read before."""
    mean, var, moments = numbers("float64", "float64")
    theirs = expected(mean, var, moments)
    swapped = mean.copy(), var.copy()
    OnCupy().update_running(*swapped, moments, out=swapped[::-1])
    assert_same(swapped[::-1], theirs)
    for shift in (-1, 1):
        buffer = np.zeros(2 * CHANNELS + 2)
        a, b = buffer[1 : CHANNELS + 1], buffer[CHANNELS + 1 : -1]
        a[...], b[...] = mean, var
        start = 1 + shift
        out = buffer[start : start + CHANNELS], np.empty(CHANNELS)
        OnCupy().update_running(a, b, moments, out=out)
        assert_same(out, theirs)
    m2 = moments.m2.copy()
    out = np.empty(CHANNELS), m2.view(np.float32)[:CHANNELS]
    narrow = var.astype(np.float32)
    OnCupy().update_running(mean, narrow, moments._replace(m2=m2), out=out)
    assert_same(out, expected(mean, narrow, moments))
