"""The recipes of `examples/recipes.py` and `examples/training.py`, beside what they stand for."""

import doctest
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fastbn
from tests.conftest import missing
from tests.on_cupy import without_gpu
from tests.support import DTYPES


def imported(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes():
    pytest.importorskip("sklearn")
    return imported("recipes")


@pytest.fixture
def training():
    return imported("training")


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


class Interface:
    """What another library's array on a GPU shows of itself."""

    def __init__(self, array):
        self.__cuda_array_interface__, self.array = array.__cuda_array_interface__, array


class Exchange:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_the_way_to_cupy(recipes, monkeypatch):
    """By DLPack where there is such a thing."""
    cupy = types.SimpleNamespace(from_dlpack=lambda a: ("from_dlpack", a), asarray=lambda a: ("asarray", a))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    exchange, interface = Exchange(None), types.SimpleNamespace(__cuda_array_interface__={})
    assert recipes.on_gpu(exchange) == ("from_dlpack", exchange)
    assert recipes.on_gpu(interface) == ("asarray", interface)


@pytest.mark.parametrize("producer", [Exchange, Interface])
def test_arrays_on_a_gpu(request, recipes, producer):
    """A view, which functions take and write."""
    if reason := without_gpu():
        missing(request, reason, "--require-cuda")
    import cupy

    x = cupy.random.default_rng(0).standard_normal((6, 3), dtype=cupy.float32)
    seen = recipes.on_gpu(producer(x))
    assert (seen.data.ptr, seen.strides) == (x.data.ptr, x.strides)
    expected, _ = fastbn.batch_norm(x)
    fastbn.batch_norm(seen, out=seen)
    cupy.testing.assert_array_equal(x, expected)


# --- training loops ---------------------------------------------------------------------------------------------------


def test_their_own_examples_of_training(training):
    result = doctest.testmod(training, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (result.failed, result.attempted) == (0, 3)


def by_formula(x, gamma, beta, axes, shape, eps=1e-5):
    """Group norm of x in this shape, whose `axes` have a mean together; gamma and beta broadcast to x."""
    grouped = x.reshape(shape)
    mean, var = grouped.mean(axis=axes, keepdims=True), grouped.var(axis=axes, keepdims=True)
    return ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape) * gamma + beta


NORMS = {  # shape of x, channel axis, groups (None: layer norm), axes that have a mean together in another shape
    "group": ((3, 6, 2, 4), 1, 2, (2, 3, 4), (3, 2, 3, 2, 4)),
    "group of a sequence": ((4, 6, 5), 1, 3, (2, 3), (4, 3, 2, 5)),
    "group without positions": ((5, 6), 1, 2, 2, (5, 2, 3)),
    "one group": ((3, 4, 5), 1, 1, (1, 2), (3, 4, 5)),
    "a group a channel": ((3, 4, 5), 1, 4, 2, (3, 4, 5)),
    "layer": ((5, 7), -1, None, -1, (5, 7)),
    "layer of sequences": ((2, 3, 7), -1, None, -1, (2, 3, 7)),
}


def case_of(name, dtype="float64"):
    """The pair of functions of a norm, its arrays, and the same by its formula."""
    shape, axis, groups, *grouping = NORMS[name]
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape) * 2 + 3).astype(dtype), rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype("float32" if dtype != "float64" else dtype)
    gamma[0] = 0  # nothing divides by it
    spread = [1] * len(shape)
    spread[axis] = -1

    def formula(x, gamma, beta):
        return by_formula(x, gamma.reshape(spread), beta.reshape(spread), *grouping)

    return (() if groups is None else (groups,)), x, dy, gamma, beta, formula


def functions_of(training, name):
    kind = "layer_norm" if NORMS[name][2] is None else "group_norm"
    return getattr(training, kind), getattr(training, f"{kind}_backward")


@pytest.mark.parametrize("name", NORMS)
def test_norms(training, name):
    """The formula; and of its sum with dy, central differences in every element of x, gamma and beta."""
    groups, x, dy, gamma, beta, formula = case_of(name)
    forward, backward = functions_of(training, name)
    y, saved = forward(x, *groups, gamma, beta)
    np.testing.assert_allclose(y, formula(x, gamma, beta), rtol=0, atol=1e-12)
    kept = dy.copy()
    for array, gradient in zip((x, gamma, beta), backward(dy, saved), strict=True):
        assert gradient.shape == array.shape
        expected = np.empty_like(array)
        for i in np.ndindex(array.shape):
            value, step = array[i], 1e-5
            array[i] = value + step
            above = (formula(x, gamma, beta) * dy).sum()
            array[i] = value - step
            expected[i] = (above - (formula(x, gamma, beta) * dy).sum()) / (2 * step)
            array[i] = value
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_array_equal(dy, kept)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-6), ("float16", 4e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", ["group", "layer of sequences"])
def test_norms_of_other_dtypes(training, name, dtype, close):
    """Of the same values in float64; layer norm rounds xhat and its products."""
    groups, x, dy, gamma, beta, formula = case_of(name, DTYPES[dtype])
    forward, backward = functions_of(training, name)
    y, saved = forward(x, *groups, gamma, beta)
    expected, wide = forward(x.astype(float), *groups, gamma.astype(float), beta.astype(float))
    np.testing.assert_allclose(expected, formula(x.astype(float), gamma, beta), rtol=0, atol=1e-6)
    for ours, exact in zip((y, *backward(dy, saved)), (expected, *backward(dy.astype(float), wide)), strict=True):
        assert ours.dtype in (x.dtype, np.float64)
        np.testing.assert_allclose(ours.astype(float), exact, rtol=0, atol=close * np.abs(exact).max())
    assert y.dtype == x.dtype


@pytest.mark.parametrize("name", ["group", "layer"])
def test_norms_on_cupy_arrays(training, name, cuda_device, monkeypatch):
    """With ``import cupy as np``, as the recipes say."""
    import cupy

    from tests.simt import host_cupy

    groups, *arrays, formula = case_of(name)
    forward, backward = functions_of(training, name)
    y, saved = forward(arrays[0], *groups, *arrays[2:])
    expected = y, *backward(arrays[1], saved)
    monkeypatch.setattr(training, "np", cupy)
    x, dy, gamma, beta = map(host_cupy.to_cupy, arrays)
    y, saved = forward(x, *groups, gamma, beta)
    for ours, theirs in zip((y, *backward(dy, saved)), expected, strict=True):
        assert type(ours) is cupy.ndarray
        np.testing.assert_allclose(host_cupy.to_numpy(ours), theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(host_cupy.to_numpy(y), formula(arrays[0], *arrays[2:]), rtol=0, atol=1e-12)


def test_norms_beside_pytorchs(training):
    torch = pytest.importorskip("torch")
    for name, call in (
        ("group", torch.nn.functional.group_norm),
        ("layer of sequences", torch.nn.functional.layer_norm),
    ):
        groups, x, dy, gamma, beta, _ = case_of(name)
        forward, backward = functions_of(training, name)
        tensors = [torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta)]
        theirs = call(tensors[0], *(groups or (x.shape[-1:],)), *tensors[1:])
        theirs.backward(torch.from_numpy(dy))
        y, saved = forward(x, *groups, gamma, beta)
        expected = theirs.detach(), *(t.grad for t in tensors)
        for ours, tensor in zip((y, *backward(dy, saved)), expected, strict=True):
            np.testing.assert_allclose(ours, tensor.numpy(), rtol=0, atol=1e-12)


def test_groups_that_do_not_divide_the_channels(training):
    with pytest.raises(ValueError, match="groups: expected a divisor of 3 channels, got 2"):
        training.group_norm(np.ones((2, 3, 2)), 2, np.ones(3), np.zeros(3))


def norms_of(dtype, seed):
    """Two layers that were trained."""
    norms = {"bn1": fastbn.BatchNorm(3, dtype=DTYPES[dtype]), "bn10": fastbn.BatchNorm(2, affine=False)}
    rng = np.random.default_rng(seed)
    for norm in norms.values():
        norm.forward(rng.standard_normal((5, *norm.mean.shape), np.float32))
        if norm.gamma is not None:
            norm.gamma += rng.standard_normal(3).astype(norm.gamma.dtype)
    return norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_checkpoints(training, tmp_path, ending, dtype):
    """What is loaded has the bits of what was saved, whatever it was."""
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path, norms, others = tmp_path / f"norms.{ending}", norms_of(dtype, 0), norms_of(dtype, 1)
    training.save(path, norms)
    training.load(path, others)
    for name, norm in norms.items():
        for key, array in others[name].state().items():
            np.testing.assert_array_equal(array, norm.state()[key])
            assert array.dtype == norm.state()[key].dtype
    with pytest.raises(ValueError, match=r"got no \['weight', 'bias'"):
        training.load(path, {"bn2": fastbn.BatchNorm(3)})


def test_checkpoints_of_cupy_arrays(training, tmp_path, cuda_device):
    """They are the host's in the file, and for layers of either kind."""
    import cupy

    from tests.simt import host_cupy

    norm = fastbn.BatchNorm(3, xp=cupy)
    norm.forward(host_cupy.to_cupy(np.random.default_rng(0).standard_normal((5, 3))))
    training.save(tmp_path / "norms.npz", {"norm": norm})
    for xp in (np, cupy):
        other = fastbn.BatchNorm(3, xp=xp)
        training.load(tmp_path / "norms.npz", {"norm": other})
        state = {key: a if xp is np else host_cupy.to_numpy(a) for key, a in other.state().items()}
        for key, array in norm.state().items():
            np.testing.assert_array_equal(state[key], host_cupy.to_numpy(array))


def test_checkpoints_of_pytorchs_models(training, tmp_path):
    """A .safetensors file goes both ways."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model(torch.from_numpy(np.random.default_rng(0).standard_normal((5, 4), np.float32)))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    norm = fastbn.BatchNorm(3)
    training.load(tmp_path / "model.safetensors", {"1": norm})
    np.testing.assert_array_equal(norm.mean, model[1].running_mean.numpy())
    norm.forward(np.random.default_rng(1).standard_normal((5, 3), np.float32))
    training.save(tmp_path / "norms.safetensors", {"1": norm})
    missing, unexpected = model.load_state_dict(safetensors.load_file(tmp_path / "norms.safetensors"), strict=False)
    assert (sorted(missing), unexpected) == (["0.bias", "0.weight"], [])
    np.testing.assert_array_equal(model[1].running_var.numpy(), norm.var.astype(np.float32))
    assert model[1].num_batches_tracked == 2
