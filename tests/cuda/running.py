"""Running statistics: numbers of every kind, what NumPy makes of them, and checks of a library against that."""

import ml_dtypes
import numpy as np

import fastbn
from fastbn import formulas
from tests.support import DTYPES

CHANNELS = 300  # three blocks, the last of which is not full
OPTIONS = (
    {},
    {"rate": 1.0, "correction": 0.0},
    {"rate": 0.0},
    {"rate": 0.25, "correction": 2.5, "skip_nonfinite": True},
)


def numbers(mean="float32", var="float32", of_moments="float64", channels=CHANNELS):
    """Running statistics and a batch's moments, of which some are NaN or infinite, of few samples or none."""
    rng = np.random.default_rng(0)
    count = np.arange(channels) % 7 - 0.5 * (np.arange(channels) == 1)
    values = rng.standard_normal((4, CHANNELS)) * np.exp(rng.normal(0, 3, CHANNELS))
    special = np.array([np.nan, np.inf, -np.inf])
    for i, row in enumerate(values):
        row[20 + 11 * i : 23 + 11 * i] = special
    running_mean, running_var, batch_mean, m2 = values[:, :channels]
    tiny = np.finfo(np.float64).smallest_subnormal
    running_mean, running_var = running_mean.astype(DTYPES[mean]), running_var.astype(DTYPES[var])
    for array in (running_mean, running_var):  # subnormal, where no number of the batch counts
        array[:1] = max(float(ml_dtypes.finfo(array.dtype).smallest_subnormal), tiny)
    moments = (a.astype(DTYPES[of_moments]) for a in (count, batch_mean, m2))
    return running_mean, running_var, fastbn.Moments(*moments)


def expected(mean, var, moments, rate=0.1, correction=1.0, skip_nonfinite=False):
    """By NumPy. What stays keeps its bits."""
    with np.errstate(all="ignore"):
        count, batch_mean, m2 = (a.astype(float) for a in moments)
        both = formulas.running(np, mean, var, count, batch_mean, m2, rate, correction, skip_nonfinite)
        return tuple(new.astype(old.dtype) for new, old in zip(both, (mean, var), strict=True))


def assert_same(ours, theirs):
    """Bits, but of NaN."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        bits = f"u{a.itemsize}"
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_array_equal(np.where(np.isnan(a), 0, a.view(bits)), np.where(np.isnan(b), 0, b.view(bits)))


def check_bits(library, *types):
    """With every option, into new arrays and in place."""
    mean, var, moments = numbers(*types)
    for options in OPTIONS:
        theirs = expected(mean, var, moments, **options)
        assert_same(library.update_running(mean, var, moments, **options), theirs)
        roomy = [np.append(a, a.dtype.type(7)) for a in (mean, var)]
        out = tuple(a[:-1] for a in roomy)
        updated = library.update_running(*out, moments, out=out, **options)
        assert all(a is b for a, b in zip(updated, out, strict=True))
        assert_same(out, theirs)
        assert [float(a[-1]) for a in roomy] == [7, 7]  # what lies behind


def check_rounding(library):
    """To halves at once, not by way of float32: numbers next to a tie, on either side."""
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        ulp, off = float(ml_dtypes.finfo(dtype).eps), 2.0**-40
        ties = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2, 1 + 3 * ulp / 2])
        nearby = np.array([off, off, -off, -off])
        batch = np.concatenate([ties + nearby, nearby - ties])
        wanted = [1 + ulp, 1 + 2 * ulp, 1, 1 + ulp, -1, -1 - ulp, -1 - ulp, -1 - 2 * ulp]
        moments = fastbn.Moments(np.ones(8), batch, batch)
        new = library.update_running(*np.zeros((2, 8), dtype), moments, rate=1.0, correction=0.0)
        for array in new:
            np.testing.assert_array_equal(array.astype(float), wanted)
