"""`fastbn.dask`'s `nanmean`, `nanvar`, `nanstd` beside NumPy's and dask's own; integers in every function."""

import inspect
import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest

da = pytest.importorskip("dask.array")
import dask  # noqa: E402

import fastbn  # noqa: E402
import fastbn.dask as fd  # noqa: E402
from fastbn import environment  # noqa: E402

SHAPE = (6, 5, 7, 4)
CHUNKS = {"one": SHAPE, "uneven": ((1, 5), (2, 3), (3, 3, 1), (4,)), "elements": (2, 1, 3, 1)}
AXES = [None, 0, -1, (0, 2, 3), (1, 3), ()]
INTEGERS = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"]


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


def with_nan(kind, dtype="float64"):
    """Numbers about 30, of which some are NaN."""
    rng = np.random.default_rng(0)
    x = 10 * rng.standard_normal(SHAPE) + 30
    x[{
        "none": np.zeros(SHAPE, bool),
        "scattered": rng.random(SHAPE) < 0.4,
        "whole slices": np.tile(rng.random((1, 5, 1, 4)) < 0.5, (6, 1, 7, 1)),
        "all": np.ones(SHAPE, bool),
    }[kind]] = np.nan  # fmt: skip
    return x.astype(dtype)


def numpys(name, x, *args, **keywords):
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of slices where nothing is left
        return getattr(np, name)(x, *args, **keywords)


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("kind", ["none", "scattered", "whole slices", "all"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_as_numpys(chunks, kind, axis):
    x = with_nan(kind)
    lazy = da.from_array(x, CHUNKS[chunks])
    calls = ("nanmean", {}), ("nanvar", {}), ("nanvar", {"ddof": 1}), ("nanstd", {"ddof": 2})
    for keepdims, (name, keywords) in itertools.product((False, True), calls):
        found = getattr(fd, name)(lazy, axis, keepdims=keepdims, **keywords)
        expected = numpys(name, x, axis, keepdims=keepdims, **keywords)
        computed = found.compute()
        assert found.shape == np.shape(computed) == np.shape(expected)
        assert found.dtype == computed.dtype == x.dtype
        np.testing.assert_allclose(computed, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ddof", [0, 1, 2, 3, 4])
def test_nan_where_no_more_than_ddof_are_left(ddof):
    """NumPy's: not infinite where the divisor is 0, as `var` is."""
    x = np.full((4, 5), np.nan)
    x[np.triu_indices(4, 1)] = np.arange(6.0)
    for name in ("nanvar", "nanstd"):
        found = getattr(fd, name)(da.from_array(x, (3, 2)), 0, correction=ddof).compute()
        np.testing.assert_allclose(found, numpys(name, x, 0, ddof=ddof), rtol=1e-12)
    assert fd.var(da.from_array(np.array([1.0, 2.0]), 1), ddof=2).compute() == np.inf


@pytest.mark.parametrize("name", ["nanmean", "nanvar", "nanstd"])
def test_dasks_parameters(name):
    """All of dask's by keyword but `out`, and the same before the star."""
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (da, fd))
    assert set(theirs) - set(ours) == {"a", "out"}
    assert [*theirs][1:3] == [*ours][1:3] == ["axis", "dtype"]
    assert all(ours[key].default == theirs[key].default for key in set(theirs) & set(ours))
    x = da.from_array(with_nan("scattered"), 3)
    keywords = {"axis": (0, 1), "dtype": "float32", "keepdims": True, "split_every": 2}
    keywords |= {} if name == "nanmean" else {"ddof": 1}
    found, expected = (getattr(module, name)(x, **keywords) for module in (fd, da))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found.compute(), expected.compute(), rtol=1e-5)


@pytest.mark.parametrize("dtype", environment.float_dtypes())
@pytest.mark.parametrize("wanted", [None, "float32", "float64"])
def test_dtypes(dtype, wanted):
    x = with_nan("scattered", environment.float_dtypes()[dtype])
    for name in ("nanmean", "nanvar", "nanstd"):
        found = getattr(fd, name)(da.from_array(x, 3), (0, 1), wanted)
        assert found.dtype == found.compute().dtype == (wanted or x.dtype)
        expected = getattr(np, name)(x.astype(np.float64), (0, 1))
        tolerance = {"float64": 1e-13, "float32": 1e-6}.get(found.dtype.name, 1e-2)
        if wanted == "float64" and dtype != "float64":
            tolerance = 1e-13  # summed in float64, not in x's dtype
        np.testing.assert_allclose(found.compute().astype(np.float64), expected, rtol=tolerance)


@pytest.mark.parametrize("ratio", [0, 100, 1e8, 1e12])
@pytest.mark.parametrize("chunk", [1, 7, 150])
def test_digits_at_large_means(ratio, chunk):
    rng = np.random.default_rng(chunk)
    x = rng.standard_normal(150) + ratio
    x[rng.random(150) < 0.3] = np.nan
    numbers = [Fraction(v) for v in x.tolist() if v == v]
    mean = sum(numbers) / len(numbers)
    var = sum((v - mean) ** 2 for v in numbers) / len(numbers)
    found = fd.nanvar(da.from_array(x, chunk), split_every=2).compute()
    assert abs(Fraction(float(found)) - var) < var / 10**13


def test_many_channels(monkeypatch):
    """Merged a few thousand at a time, with the same bits as all at once."""
    x = np.random.default_rng(0).standard_normal((6, 211, 97))
    x[x > 1] = np.nan
    assert x[0].size > fd.CHANNELS_AT_ONCE
    lazy = da.from_array(x, (2, 211, 97))
    np.testing.assert_allclose(fd.nanvar(lazy, 0).compute(), numpys("nanvar", x, 0), rtol=1e-12)
    results = []
    for piece in (fd.CHANNELS_AT_ONCE, 1 << 20, 1000):
        monkeypatch.setattr(fd, "CHANNELS_AT_ONCE", piece)
        results.append(fd.nanvar(lazy, 0).compute(scheduler="synchronous").tobytes())
    assert len(set(results)) == 1


def test_infinities_count():
    x = np.array([[1, np.nan, np.inf], [np.inf, 2, np.nan], [np.nan, -np.inf, -np.inf]])
    for axis in (0, 1):
        lazy = da.from_array(x, 1)
        np.testing.assert_array_equal(fd.nanmean(lazy, axis).compute(), numpys("nanmean", x, axis))
        np.testing.assert_array_equal(fd.nanvar(lazy, axis).compute(), numpys("nanvar", x, axis))


def test_masks_and_nan():
    """Neither counts; masked is where nothing is left."""
    values = np.array([[1, np.nan, 7, np.nan], [5, 2, np.nan, np.nan], [900, 4, 900, np.nan]])
    lazy = da.from_array(np.ma.array(values, mask=values == 900), (2, 2))
    for found, expected in (
        (fd.nanmean(lazy, 0), [3, 3, 7, -1]),
        (fd.nanvar(lazy, 0), [4, 1, 0, -1]),
        (fd.nanstd(lazy, 0, ddof=1), [8**0.5, 2**0.5, -1, -1]),
    ):
        assert isinstance(found._meta, np.ma.MaskedArray)
        np.testing.assert_allclose(found.compute().filled(-1), expected, rtol=1e-15)
    assert np.isnan(fd.mean(lazy, 0).compute()[1])  # a NaN that is not masked stays


def test_lazy_and_read_once():
    blocks = []

    def read(block):
        blocks.append(block.shape)
        return block

    x = da.from_array(np.array([1.0, np.nan, 5.0]), 1).map_blocks(read, dtype=np.float64, meta=np.empty(0))
    lazy = fd.nanmean(x), fd.nanvar(x), fd.nanstd(x), fd.mean(x)
    assert blocks == []
    found = dask.compute(*lazy)
    assert len(blocks) == 3
    np.testing.assert_array_equal(found, [3, 4, 2, np.nan])  # what skips and what does not are kept apart


def test_no_warning_from_somewhere_else():
    """Warnings are errors here; NumPy's "Mean of empty slice" would come at `compute`."""
    x = da.from_array(np.full((4, 3), np.nan), 2)
    for name in ("nanmean", "nanvar", "nanstd"):
        assert np.isnan(getattr(fd, name)(x, 0).compute()).all()
    assert np.isnan(fd.nanmean(da.zeros((0, 3), chunks=1), 0).compute()).all()
    assert fd.nanmean(da.zeros((3, 0), chunks=1), 0).compute().shape == (0,)


def test_unknown_chunks():
    x = da.from_array(np.array([9.0, np.nan, 1.0, 3.0, np.nan, 8.0]), 2)
    assert float(fd.nanmean(x[~(x > 5)]).compute()) == 2


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype, axis):
    """As in memory, over the whole range of the type (of 53 bits of the largest)."""
    rng, kind = np.random.default_rng(0), np.dtype(dtype)
    low, high = (0, 1) if kind.kind == "b" else (max(np.iinfo(kind).min, -(2**53)), min(np.iinfo(kind).max, 2**53))
    x = rng.integers(low, high, (20, 3, 2), endpoint=True).astype(kind)
    lazy = da.from_array(x, (7, 2, 2))
    for name in ("mean", "var", "std"):
        expected = getattr(x.astype(np.float64), name)(axis)
        for found in (getattr(fd, name)(lazy, axis), getattr(fd, f"nan{name}")(lazy, axis)):
            assert found.dtype == found.compute().dtype == np.float64
            # The mean of a symmetric range is the rest of what cancels.
            np.testing.assert_allclose(found.compute(), expected, rtol=1e-13, atol=1e-13 * abs(high))
    (found,) = dask.compute(fd.moments(lazy, channel_axis=2))
    of_memory = fastbn.moments(x, channel_axis=2)
    for ours, expected in zip(found, of_memory, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13 * abs(high))


@pytest.mark.parametrize("chunk", [1, 7, 150])
@pytest.mark.parametrize("offset", [0, 1_800_000_000, 2**52])
def test_digits_of_integers(offset, chunk):
    """Seconds since 1970 and what is just below 2^53: means in two parts, as of float64."""
    x = offset + np.random.default_rng(0).integers(-2, 3, 150)
    numbers = [Fraction(v) for v in x.tolist()]
    mean = sum(numbers) / len(numbers)
    var = sum((v - mean) ** 2 for v in numbers) / len(numbers)
    for function in (fd.var, fd.nanvar):
        found = function(da.from_array(x, chunk), split_every=2).compute()
        assert abs(Fraction(float(found)) - var) < var / 10**13


def test_masked_integers():
    x = np.ma.array(np.arange(12, dtype=np.uint8).reshape(4, 3), mask=np.eye(4, 3, dtype=bool))
    for name in ("mean", "nanmean", "var", "nanvar"):
        expected = getattr(x.astype(np.float64), name.removeprefix("nan"))(0)
        np.testing.assert_allclose(getattr(fd, name)(da.from_array(x, 2), 0).compute(), expected, rtol=1e-14)


def test_integers_are_not_converted_in_the_graph(monkeypatch):
    """Blocks reach the kernels in their own type: of uint8 an eighth of float64's memory."""
    moments, seen = fastbn.moments, []

    def noted(x, **keywords):
        seen.append(x.dtype)
        return moments(x, **keywords)

    monkeypatch.setattr(fastbn, "moments", noted)
    x = da.from_array(np.array([0, 200, 1, 100], np.uint8), 4)
    assert fd.mean(x).compute() == fd.nanmean(x, dtype="float32").compute() == 75.25
    assert set(seen) == {np.dtype(np.uint8)}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: expected a dask\.array\.Array, got ndarray", lambda: fd.nanmean(np.ones(3))),
        (TypeError, "x: expected real numbers, got complex128", lambda: fd.nanvar(da.ones(3, dtype=complex))),
        (TypeError, "dtype: expected float16, .* got int64", lambda: fd.nanstd(da.ones(3), dtype=int)),
        (ValueError, "expected ddof or correction, got both", lambda: fd.nanvar(da.ones(3), ddof=1, correction=1)),
        (np.exceptions.AxisError, "axis", lambda: fd.nanmean(da.ones((3, 2)), 2)),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()
