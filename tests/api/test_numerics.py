"""The bounds that the package promises: large means, NIST's data, constant channels, the same bits always."""

import math
import os
import subprocess
import sys
import textwrap
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.check import NIST
from fastbn.cpu import plans
from tests.conftest import forget
from tests.support import DTYPES
from tests.tolerances import BOUNDS

# --- NIST Statistical Reference Datasets, univariate summary statistics ----------------------------------------------


def exact(values):
    """Mean and standard deviation (n - 1) of the stored doubles in rational arithmetic; the root has 50 digits."""
    numbers = [Fraction(v) for v in values.tolist()]
    mean = sum(numbers) / len(numbers)
    var = sum((n - mean) ** 2 for n in numbers) / (len(numbers) - 1)
    scale = 10**100
    return mean, Fraction(math.isqrt(var.numerator * scale // var.denominator), 10**50)


def digits(actual, expected):
    """Correct significant digits: -log10 of the relative error."""
    error = abs((Fraction(float(actual)) - expected) / expected)
    return 16.0 if error == 0 else min(16.0, -math.log10(error))


VIEWS = {  # as rows of one channel, and as one column among others
    "rows": lambda v: (v, None),
    "columns": lambda v: (np.stack([v, -v, v * 3], axis=1), 0),
}


@pytest.mark.parametrize("name", NIST)
@pytest.mark.parametrize("view", VIEWS)
def test_nist(name, view):
    values = NIST[name]
    mean, std = exact(values)
    x, axis = VIEWS[view](values)
    assert digits(np.ravel(fastbn.mean(x, axis))[0], mean) >= 15
    assert digits(np.ravel(fastbn.std(x, axis, ddof=1))[0], std) >= 13


def exact_merge(parts):
    """The standard deviation that exact arithmetic gives from moments whose means are rounded to doubles."""
    means = [sum(map(Fraction, p.tolist())) / len(p) for p in parts]
    squares = [sum((Fraction(v) - mean) ** 2 for v in p.tolist()) for p, mean in zip(parts, means, strict=True)]
    parts = [(len(p), Fraction(float(m)), m2) for p, m, m2 in zip(parts, means, squares, strict=True)]
    n = sum(count for count, _, _ in parts)
    mean = sum(count * m for count, m, _ in parts) / n
    return math.sqrt(sum(m2 + count * (m - mean) ** 2 for count, m, m2 in parts) / (n - 1))


@pytest.mark.parametrize("name", NIST)
@pytest.mark.parametrize("parts", [2, 3, 4, 5, 7, 10, 13, 100])
def test_nist_merged(name, parts):
    """11 digits of the standard deviation, or all that part means in float64 leave (10.0 to 16 of NumAcc4's)."""
    values = NIST[name]
    mean, std = exact(values)
    pieces = [p for p in np.array_split(values, parts) if len(p)]
    merged = fastbn.merge(*(fastbn.moments(p[:, None]) for p in pieces))
    assert digits(merged.mean[0], mean) >= 15
    assert digits(merged.std(correction=1)[0], std) >= min(11, digits(exact_merge(pieces), std) - 0.05)


# --- large means ------------------------------------------------------------------------------------------------------

SHAPES = {
    "rows": ((4, 3, 96, 100), 1),
    "short rows": ((64, 5, 7, 7), 1),
    "columns": ((4, 60, 80, 5), -1),
    "wide columns": ((70, 600), -1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4, 5e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_at_large_means(dtype, ratio, shape):
    """Mean 1e-7 (of |mean| + std), variance 1e-6 for mean/std up to 5e4; float64 at 1e-15 and 1e-13."""
    shape, channel_axis = SHAPES[shape]
    rng = np.random.default_rng(int(ratio))
    x = (rng.standard_normal(shape) + ratio * (-1) ** rng.integers(0, 2)).astype(DTYPES[dtype])
    ours, oracle = fastbn.moments(x, channel_axis=channel_axis), reference.moments(x, channel_axis=channel_axis)
    std = np.sqrt(oracle.m2 / oracle.count)
    assert (np.abs(ours.mean - oracle.mean) <= BOUNDS["mean"][dtype] * (np.abs(oracle.mean) + std)).all()
    assert (np.abs(ours.m2 - oracle.m2) <= BOUNDS["var"][dtype] * oracle.m2 + 1e-30).all()


@pytest.mark.parametrize("drift", ["ramp", "step", "outlier first", "sorted"])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_of_data_that_drift(drift, shape):
    """A guess taken from the chunks before is then far from the next chunk's mean."""
    shape, channel_axis = SHAPES[shape]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    positions = [1 if axis == channel_axis % len(shape) else n for axis, n in enumerate(shape)]
    rows = np.arange(math.prod(positions)).reshape(positions) // (100 if channel_axis == 1 and len(shape) > 2 else 1)
    if drift == "ramp":
        x += rows.astype(np.float32) * 10
    elif drift == "step":
        x += np.where(rows // 7 % 7 == 3, 1e4, 0.0).astype(np.float32)
    elif drift == "outlier first":
        x.reshape(-1)[: shape[-1]] = 3e5
    else:
        x = np.sort(x, axis=None).reshape(shape) * 100
    ours, oracle = fastbn.moments(x, channel_axis=channel_axis), reference.moments(x, channel_axis=channel_axis)
    np.testing.assert_allclose(ours.mean, oracle.mean, atol=1e-7 * np.sqrt(oracle.m2 / oracle.count).max())
    np.testing.assert_allclose(ours.m2, oracle.m2, rtol=1e-6)


@pytest.mark.parametrize("axis", [(0, 1, 2), (0, 2, 3)])
def test_the_case_that_numpy_and_torch_lose(axis):
    """float32 100 + U(0, 1): NumPy's channels-last mean is off by about 1 where sums run over 2^20 values."""
    shape = (4, 512, 512, 4) if axis == (0, 1, 2) else (4, 4, 512, 512)
    x = (100 + np.random.default_rng(0).random(shape, dtype=np.float32)).astype(np.float32)
    expected_mean, expected_var = reference.mean(x, axis), reference.var(x, axis)
    mean, var = fastbn.mean_var(x, axis)
    moments = fastbn.moments(x, channel_axis=3 if axis == (0, 1, 2) else 1)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-7)
    np.testing.assert_allclose(var, expected_var, rtol=1e-6)
    np.testing.assert_allclose(moments.mean, expected_mean, rtol=1e-9)
    if axis == (0, 1, 2):
        assert np.abs(x.mean(axis=axis) - expected_mean).max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 7, 11), (33, 19), (3, 2, 41, 53)])
@pytest.mark.parametrize("constant", [0.1, -3e4, 1e-3, 1.0])
def test_a_constant_channel_gives_beta(dtype, shape, constant):
    """Exactly: the mean is the constant, bit for bit, and (x - hi) - lo is 0."""
    x = np.full(shape, constant).astype(DTYPES[dtype])
    beta = np.linspace(-1, 1, shape[1])
    y, saved = fastbn.batch_norm(x, np.full(shape[1], 1e4), beta)
    np.testing.assert_array_equal(saved.mean, float(x.flat[0]))
    np.testing.assert_array_equal(saved.moments.m2, 0)
    expected = beta.astype(np.float32 if dtype != "float64" else np.float64).astype(x.dtype)
    np.testing.assert_array_equal(y, np.broadcast_to(expected.reshape(1, -1, *[1] * (len(shape) - 2)), shape))


def test_normalising_at_a_large_mean():
    """(x - hi) - lo keeps what x * s + (beta - mean * s) loses: 7.5e-4 at mean/std = 1e4."""
    x = (np.random.default_rng(0).standard_normal((64, 3, 5, 5)) + 1e4).astype(np.float32)
    y, _ = fastbn.batch_norm(x)
    np.testing.assert_allclose(y, reference.batch_norm(x).y, atol=2e-6)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 5), (4, 3, 0, 5), (0, 0), (4, 0, 5)])
def test_empty_batch(shape):
    x = np.empty(shape, np.float32)
    y, saved = fastbn.batch_norm(x, activation="relu", residual=x)
    assert y.shape == shape
    assert (saved.count == 0).all()
    mean, var = fastbn.update_running(np.ones(shape[1]), np.ones(shape[1]), saved.moments)
    assert (mean == 1).all()
    assert (var == 1).all()
    grads = fastbn.batch_norm_backward(x, saved)
    assert grads.x.shape == grads.residual.shape == shape
    assert grads.gamma.tolist() == grads.beta.tolist() == [0.0] * shape[1]
    assert fastbn.batch_norm_inference(x, np.ones(shape[1]), np.ones(shape[1])).shape == shape


@pytest.mark.parametrize("shape", [(3, 4, 2), (5, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_selected(shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for none in ({"where": np.zeros([1] * len(shape), bool)}, {"weights": np.zeros([1] * len(shape))}):
        y, saved = fastbn.batch_norm(x, **none)
        assert np.isnan(y).all()
        assert np.isnan(saved.mean).all()
        assert np.isnan(saved.moments.var()).all()
        assert np.isnan(fastbn.batch_norm_backward(x, saved).x).all()
        assert (fastbn.update_running(np.ones(4), np.ones(4), saved.moments)[0] == 1).all()


def test_one_value_per_channel():
    beta = np.array([1.0, 2.0, 3.0])
    y, saved = fastbn.batch_norm(np.array([[5.0, -7.0, 1e30]]), None, beta)
    assert y.tolist() == [[1, 2, 3]]
    mean, var = fastbn.update_running(np.ones(3), np.ones(3), saved.moments)
    assert (mean == 1).all()
    assert (var == 1).all()


def test_merging_nothing_is_the_identity():
    some = fastbn.moments(np.random.default_rng(0).standard_normal((5, 3)))
    none = fastbn.Moments(np.zeros(3), np.full(3, np.nan), np.full(3, np.inf))
    for merged in (fastbn.merge(some, none), fastbn.merge(none, some), fastbn.merge(none, some, none)):
        for ours, theirs in zip(merged, some, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_running_statistics_rules():
    moments = fastbn.Moments(np.array([1.0, 4.0, 4.0]), np.array([9.0, 2.0, np.nan]), np.array([0.0, 12.0, 1.0]))
    mean, var = np.zeros(3, np.float16), np.ones(3, np.float32)
    new = fastbn.update_running(mean, var, moments, rate=0.5, skip_nonfinite=True)
    assert [a.dtype for a in new] == [np.float16, np.float32]
    assert new[0].tolist() == [0, 1, 0]
    assert new[1].tolist() == [1, 2.5, 1]
    assert np.isnan(fastbn.update_running(mean, var, moments)[0][2])
    returned = fastbn.update_running(mean, var, moments, rate=1.0, correction=0, out=(mean, var))
    assert returned[0] is mean
    assert returned[1] is var
    assert mean[:2].tolist() == [9, 2]
    assert var[:2].tolist() == [0, 3]


# --- the same bits, whatever the threads ------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import hashlib
    import numpy as np
    import fastbn
    from fastbn.cpu import team

    digest = hashlib.sha256()
    for below in (0, 1 << 60):  # in parallel, and serially
        team.PARALLEL_FROM = below
        digest = hashlib.sha256()
        for shape in ((3, 2, 300, 301), (64, 5, 7, 7), (2600, 37), (3, 9, 7, 530)):
            rng = np.random.default_rng(0)
            x, dy = (rng.standard_normal(shape, dtype=np.float32) + 5 for _ in range(2))
            weights = rng.random((shape[0], *[1] * (len(shape) - 1)))
            y, saved = fastbn.batch_norm(x)
            parts = [y, *saved.moments, *fastbn.batch_norm_backward(dy, saved)[:3]]
            parts += [*fastbn.moments(x, weights=weights), fastbn.var(x), fastbn.var(x, axis=1)]
            for part in parts:
                digest.update(np.ascontiguousarray(part))
        print(digest.hexdigest())
""")


def test_bits_do_not_depend_on_threads():
    hashes = set()
    for threads in (1, 2, 4):
        environment = os.environ | {"NUMBA_NUM_THREADS": str(threads)}
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        hashes.update(run.stdout.split())
    assert len(hashes) == 1


def test_bits_do_not_depend_on_alignment():
    shape = (3, 5, 40, 41)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y, saved = fastbn.batch_norm(x)
    for shift in range(1, 16):
        buffer = np.empty(x.size + shift, np.float32)
        moved = buffer[shift:].reshape(shape)
        moved[...] = x
        z, other = fastbn.batch_norm(moved)
        np.testing.assert_array_equal(other.mean, saved.mean)
        np.testing.assert_array_equal(other.moments.m2, saved.moments.m2)
        np.testing.assert_array_equal(z, y)


def test_bits_do_not_depend_on_the_number_of_channels_per_thread(monkeypatch, fresh_plans):
    """Fused and split strategies agree."""
    x = np.random.default_rng(0).standard_normal((4, 6, 50, 60)).astype(np.float32)
    y, saved = fastbn.batch_norm(x)
    grads = fastbn.batch_norm_backward(x, saved)
    for fused in (True, False):
        monkeypatch.setattr(plans, "_whole_channels", lambda problem, fused=fused: fused)
        forget()
        z, other = fastbn.batch_norm(x)
        np.testing.assert_array_equal(other.moments.m2, saved.moments.m2)
        np.testing.assert_array_equal(z, y)
        np.testing.assert_array_equal(fastbn.batch_norm_backward(x, other).x, grads.x)


def test_more_channels_in_a_row_than_a_tile():
    x = np.random.default_rng(0).standard_normal((40, 3 * 1024 + 5)).astype(np.float32)
    np.testing.assert_array_equal(fastbn.moments(x[:, 512:]).m2, fastbn.moments(x).m2[512:])
