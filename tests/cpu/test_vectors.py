"""Small work on a number per channel: compiled steps give the bits of the formulas that other backends run."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import cpu, formulas
from fastbn.operands import RunningTypes
from tests.support import DTYPES

ENDS = [0.0, -0.0, 1.0, 2.0, 1e-300, 1e300, np.inf, -np.inf, np.nan]
numbers = st.one_of(st.sampled_from(ENDS), st.floats(-1e6, 1e6), st.floats())
counts = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 1e9, np.inf]), st.floats(0, 1e12))
F8 = np.dtype(float)


def triples(kept):
    return st.tuples(*(st.lists(s, min_size=kept, max_size=kept).map(np.array) for s in (counts, numbers, numbers)))


@given(st.lists(triples(3), min_size=1, max_size=2 * cpu.MERGED_AT_ONCE + 3))
def test_merge(parts):
    run = cpu.merge(3, ((F8, F8, F8),) * len(parts))
    found = run(*(vector for part in parts for vector in part))
    count, mean, _, m2 = formulas.united(np, ((n, mean, np.zeros(3), m2) for n, mean, m2 in parts))
    for ours, theirs in zip(found, (count, mean, m2), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=300)
@given(
    *(st.lists(s, min_size=4, max_size=4).map(np.array) for s in (numbers, numbers, counts, numbers, numbers)),
    st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(0, 1)), st.sampled_from([0.0, 1.0, 1.5]), st.booleans(),
)  # fmt: skip
def test_running(mean, var, count, batch_mean, m2, rate, correction, skip):
    new = np.empty((2, 4))
    run = cpu.update_running(4, RunningTypes(*[F8] * 7), skip, True)
    run(mean, var, count, batch_mean, m2, new[0], new[1], rate, correction)
    with np.errstate(all="ignore"):
        expected = formulas.running(np, mean, var, count, batch_mean, m2, rate, correction, skip)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, "new", "itself", "crossed", "strided"])
def test_running_of_every_dtype(dtype, out):
    """Computed in float64, rounded once; an `out` may be the old statistics, and in any order."""
    rng = np.random.default_rng(0)
    batch = fastbn.moments(rng.standard_normal((7, 12)))
    mean, var = rng.standard_normal(12).astype(DTYPES[dtype]), rng.random(12).astype(DTYPES[dtype])
    expected = [
        ((1 - 0.25) * old.astype(float) + 0.25 * new).astype(DTYPES[dtype])
        for old, new in ((mean, batch.mean), (var, batch.var(1)))
    ]
    places = {
        None: None,
        "new": (np.empty_like(mean), np.empty_like(var)),
        "itself": (mean, var),
        "crossed": (var, mean),
        "strided": (np.empty(24, DTYPES[dtype])[::2], np.empty(24, DTYPES[dtype])[::-2]),
    }[out]
    found = fastbn.update_running(mean, var, batch, rate=0.25, out=places)
    assert places is None or (found[0] is places[0] and found[1] is places[1])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_shapes(shape):
    rng = np.random.default_rng(0)
    parts = [fastbn.Moments(*(np.asarray(rng.random(shape) + 1) for _ in range(3))) for _ in range(3)]
    merged = fastbn.merge(*parts)
    assert all(a.shape == shape for a in merged)
    np.testing.assert_allclose(merged.count, sum(p.count for p in parts))
    mean, var = fastbn.update_running(np.zeros(shape), np.ones(shape, np.float32), merged, rate=1)
    np.testing.assert_array_equal(mean, merged.mean)
    np.testing.assert_array_equal(var, merged.var(1).astype(np.float32))
    assert (mean.shape, var.shape, var.dtype) == (shape, shape, np.float32)


def test_a_rate_that_changes_is_no_other_call(monkeypatch):
    """As in a cumulative average: nothing is prepared again for it."""
    monkeypatch.setattr("fastbn.call._prepared", prepared := {})
    mean, var = np.zeros(3), np.ones(3)
    for n in range(1, 20):
        batch = fastbn.moments(np.random.default_rng(n).standard_normal((8, 3)))
        mean, var = fastbn.update_running(mean, var, batch, rate=1 / n)
    assert len(prepared) == 2


@pytest.mark.parametrize("correction", ["1", None, 1j])
def test_wrong_correction(correction):
    one = np.ones(2)
    with pytest.raises(TypeError, match="correction: expected a real number"):
        fastbn.update_running(one, one, fastbn.Moments(one, one, one), correction=correction)


def test_beyond_float32():
    """Of `rstd * gamma`, finite and beyond float32 in some channel."""
    from fastbn.cpu.extremes import find_beyond

    most = float(np.finfo(np.float32).max)
    for gamma in (None, np.float32, np.float64):
        beyond = find_beyond(3, F8, None if gamma is None else np.dtype(gamma))
        for worst, expected in (
            (most, False),
            (most * 1.001, True),
            (-most * 2, True),
            (math.inf, False),
            (math.nan, False),
        ):
            rstd = np.array([1.0, worst, 0.0])
            assert beyond(rstd, None if gamma is None else np.ones(3, gamma)) == expected
