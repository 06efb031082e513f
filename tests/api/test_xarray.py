"""The recipe of ``docs/xarray.md`` beside xarray's own statistics, eager and lazy."""

import warnings

import numpy as np
import pytest

import fastbn
from tests.pages import recipe_of

xr = pytest.importorskip("xarray")

DIMS = [None, ..., "lat", ("time",), ("time", "lon"), ("lon", "time"), ["time", "lat", "lon"], ()]


@pytest.fixture(scope="module")
def reduced():
    return recipe_of("xarray.md")["reduced"]


def air(dtype="float64", missing=True):
    rng = np.random.default_rng(0)
    values = (10 * rng.standard_normal((4, 5, 6)) + 30).astype(dtype)
    if missing and values.dtype.kind == "f":
        values[rng.random(values.shape) < 0.3] = np.nan
        values[:, 2] = np.nan  # whole slices, too
    coords = {"lat": np.arange(5), "month": ("time", np.arange(4)), "height": 2.0}
    return xr.DataArray(values, dims=("time", "lat", "lon"), coords=coords, attrs={"units": "K"}, name="air")


def xarrays(name, array, dim, skipna, **options):
    return getattr(array, name)(None if dim is ... else dim, skipna=skipna, keep_attrs=True, **options)


@pytest.mark.parametrize("skipna", [None, True, False])
@pytest.mark.parametrize("dim", DIMS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "bool"])
def test_as_xarrays_own(reduced, dtype, dim, skipna):
    """Values, dims, coordinates, attributes, names and dtypes."""
    array = air(dtype)
    exact = array.astype(np.float64)
    for name, options in (("mean", {}), ("var", {}), ("std", {"ddof": 1})):
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of slices of NaN alone
            found = reduced(getattr(fastbn, name), array, dim, skipna, **options)
            expected = xarrays(name, exact, dim, skipna, **options)
        assert found.dtype == (array.dtype if array.dtype.kind == "f" else np.float64)
        xr.testing.assert_allclose(found, expected.astype(found.dtype), rtol=1e-5 if dtype == "float32" else 1e-12)
        assert (found.attrs, found.name) == (expected.attrs, expected.name)
        assert set(found.coords) == set(expected.coords)


def test_nan_is_seen_by_this_test(reduced):
    """What skips and what does not differ here."""
    skipped, kept = (reduced(fastbn.mean, air(), ("lat", "lon"), skipna) for skipna in (None, False))
    assert not np.isnan(skipped).any()
    assert np.isnan(kept).all()


@pytest.mark.parametrize("skipna", [None, False])
@pytest.mark.parametrize(("chunks", "parts"), [({}, 1), ({"lat": 2}, 3), ({"lat": (1, 4), "time": 4}, 2)], ids=str)
def test_lazy(reduced, chunks, parts, skipna):
    """`dask="parallelized"`: nothing is computed before it is asked for, by the blocks of the dims that stay."""
    dask = pytest.importorskip("dask")
    blocks = []

    def noted(block, *args, **options):
        blocks.append(block.shape)
        return fastbn.var(block, *args, **options)

    array = air(missing=False)
    array[0, 0, 0] = np.nan
    found = reduced(noted, array.chunk(chunks), ("time", "lon"), skipna)
    assert dask.is_dask_collection(found.data)
    assert blocks == []
    xr.testing.assert_allclose(found.compute(), xarrays("var", array, ("time", "lon"), skipna), rtol=1e-12)
    assert len(blocks) == parts
    assert found.attrs == {"units": "K"}


def test_reduced_dims_in_chunks(reduced):
    """Refused where it would be rechunked in silence; `fastbn.dask` by `reduce` takes them as they are."""
    fd = pytest.importorskip("fastbn.dask")
    array = air()
    lazy = array.chunk({"time": 1, "lon": 4})
    with pytest.raises(ValueError, match="consists of multiple chunks"):
        reduced(fastbn.mean, lazy, "time")
    for name in ("mean", "var", "std"):
        for skipna in (True, False):
            statistic = getattr(fd, f"nan{name}" if skipna else name)
            found = lazy.reduce(statistic, ("time", "lon"), keep_attrs=True)
            assert found.chunks is not None
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                expected = xarrays(name, array, ("time", "lon"), skipna)
            xr.testing.assert_allclose(found.compute(), expected, rtol=1e-12)
            assert found.attrs == {"units": "K"}
