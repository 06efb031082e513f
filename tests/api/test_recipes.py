"""The recipes of `examples/recipes.py`, beside what they stand for."""

import doctest
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastbn

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def recipes():
    path = Path(__file__).parents[2] / "examples" / "recipes.py"
    spec = importlib.util.spec_from_file_location("recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_their_own_examples(recipes):
    pytest.importorskip("xarray")
    result = doctest.testmod(recipes, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (result.failed, result.attempted) == (0, 8)


def test_a_scaler_in_parts(recipes):
    """As scikit-learn's, in however many parts, within a pipeline."""
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(0).standard_normal((100, 4)) * [1, 2, 3, 0] + [0, 5, -3, 7]
    ours, theirs = recipes.Scaler(), StandardScaler()
    for part in np.split(x, [7, 30, 31]):
        ours.partial_fit(part)
        theirs.partial_fit(part)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), atol=1e-12)
    pipeline = make_pipeline(clone(ours), recipes.Scaler())
    np.testing.assert_allclose(pipeline.fit_transform(x), theirs.transform(x), atol=1e-12)
    merged = fastbn.merge(recipes.Scaler().fit(x[:50]).moments_, recipes.Scaler().fit(x[50:]).moments_)
    np.testing.assert_allclose(merged.var(), theirs.var_, atol=1e-12)


def test_a_scaler_of_halves_does_not_overflow(recipes):
    x = (np.random.default_rng(0).standard_normal((5000, 2)) * 100 + 3000).astype(np.float16)
    y = recipes.Scaler().fit(x).transform(x)
    assert y.dtype == np.float16
    assert abs(y.astype(np.float64).std() - 1) < 1e-2


@pytest.mark.parametrize("dim", ["time", "lat", "lon"])
def test_xarray(recipes, dim):
    xr = pytest.importorskip("xarray")
    values = np.random.default_rng(0).standard_normal((4, 5, 6)) + 3
    array = xr.DataArray(values, dims=("time", "lat", "lon"), coords={"lat": np.arange(5)}, attrs={"units": "K"})
    found = recipes.standardized(array, dim)
    others = [name for name in array.dims if name != dim]
    xr.testing.assert_allclose(found, (array - array.mean(others)) / array.std(others))
    assert found.dims == array.dims
    assert found.attrs == {"units": "K"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the other operators' cases, all made at once
def test_onnx(recipes):
    """ONNX' own node tests of the operator: example and epsilon, each in training as well."""
    pytest.importorskip("onnx")
    from onnx.backend.test.case.node import collect_testcases
    from onnx.helper import get_attribute_value

    cases = [case for case in collect_testcases("BatchNormalization") if "batchnorm" in case.name]
    assert len(cases) == 4
    for case in cases:
        attributes = {a.name: get_attribute_value(a) for a in case.model.graph.node[0].attribute}
        for inputs, expected in case.data_sets:
            found = recipes.onnx_batch_normalization(*inputs, **attributes)
            found = found if isinstance(found, tuple) else (found,)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=1e-6, err_msg=case.name)


def test_dlpack(recipes):
    """A library's array of its own, here PyTorch's or JAX's."""
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    made = [x]
    for name, convert in (("torch", lambda m: m.from_numpy(x)), ("jax.numpy", lambda m: m.asarray(x))):
        try:
            made.append(convert(importlib.import_module(name)))
        except ImportError:
            continue
    for producer in made:
        np.testing.assert_array_equal(recipes.moments_of(producer).mean, fastbn.moments(x).mean)
