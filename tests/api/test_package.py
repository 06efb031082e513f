"""The package as a thing that is imported, upgraded, and run beside others."""

import inspect
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import extras, reference
from tests import interpreters

PACKAGE = Path(fastbn.__file__).parent


def test_import_stays_light():
    """Neither compilers nor other array libraries are loaded before they are needed."""
    program = "import sys, fastbn; print(*sys.modules)"
    loaded = interpreters.run(interpreters.python(program, options=["-W", "error::RuntimeWarning"])).split()
    heavy = {"numba", "llvmlite", "cupy", "torch", "jax", "scipy", "ml_dtypes", "dask", "mpi4py"}
    assert "fastbn.functional" in loaded
    assert heavy.isdisjoint(loaded)
    assert not [name for name in loaded if name.startswith(("fastbn.cpu", "fastbn.reference"))]


def test_oracle_stands_alone():
    """The oracle imports NumPy and nothing of what it judges."""
    imports = re.findall(r"^(?:from|import) (\S+)", (PACKAGE / "reference.py").read_text(), re.MULTILINE)
    assert set(imports) == {"__future__", "typing", "numpy"}


def test_extras_are_those_of_the_project():
    """What errors tell to install."""
    project = PACKAGE.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("installed without it")
    declared = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    for extra, requirement in extras.REQUIREMENTS.items():
        assert declared[extra] == [requirement]
        assert extras.install(extra) == f'pip install "{requirement}"'


def test_public_names():
    assert sorted(fastbn.__all__) == fastbn.__all__
    for name in fastbn.__all__:
        documented = getattr(fastbn, name)
        assert inspect.getdoc(documented), name
        if inspect.isfunction(documented):
            for section in ("Parameters\n", "Returns\n", "Raises\n", "Examples\n"):
                assert section in inspect.getdoc(documented) or name == "std", f"{name}: no {section.strip()}"


SIGNATURES = {
    "BatchNorm": "(channels, *, channel_axis=1, eps=1e-05, rate=0.1, correction=1, affine=True, dtype='float32', "
    "xp=None)",
    "mean": "(x, axis=None, dtype=None, out=None, keepdims=False, *, where=True)",
    "var": "(x, axis=None, dtype=None, out=None, ddof=0, keepdims=False, *, where=True, mean=None, correction=None)",
    "mean_var": "(x, axis=None, *, correction=0, keepdims=False, where=True, weights=None)",
    "moments": "(x, *, channel_axis=1, where=None, weights=None)",
    "merge": "(*moments)",
    "update_running": "(mean, var, moments, *, rate=0.1, correction=1, skip_nonfinite=False, out=None)",
    "population": "(moments_of_batches)",
    "normalize": "(x, mean, rstd, gamma=None, beta=None, *, channel_axis=1, residual=None, activation=None, out=None)",
    "grad_sums": "(dy, x, mean, rstd, *, channel_axis=1, where=None, weights=None)",
    "grad_input": "(dy, x, mean, rstd, gamma, dgamma, dbeta, count, *, channel_axis=1, where=None, weights=None, "
    "out=None)",
    "batch_norm": "(x, gamma=None, beta=None, *, channel_axis=1, eps=1e-05, where=None, weights=None, residual=None, "
    "activation=None, gather=None, running=None, rate=0.1, correction=1, out=None)",
    "batch_norm_backward": "(dy, saved, *, dmean=None, dvar=None, gather=None, out=None)",
    "batch_norm_inference": "(x, mean, var, gamma=None, beta=None, *, channel_axis=1, eps=1e-05, residual=None, "
    "activation=None, out=None)",
    "fold": "(kernel, kernel_bias, mean, var, gamma=None, beta=None, *, eps=1e-05, axis=0, groups=1)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_a_promise(name):
    signature = inspect.signature(getattr(fastbn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_oracle_and_package_have_the_same_functions():
    for name in ("moments", "mean", "var", "merge", "update_running", "population", "normalize", "grad_sums",
                 "grad_input", "batch_norm", "batch_norm_backward", "batch_norm_inference", "fold"):  # fmt: skip
        assert callable(getattr(reference, name))
        assert name in fastbn.__all__


# --- what the matrix does not reach -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fold(axis, dtype):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((5, 4, 3)).astype(dtype)
    n = kernel.shape[axis]
    bias, mean, gamma, beta = rng.standard_normal((4, n))
    var = rng.random(n) + 0.1
    for arguments in ((kernel, bias, mean, var, gamma, beta), (kernel, None, mean, var)):
        folded, expected = fastbn.fold(*arguments, axis=axis), reference.fold(*arguments, axis=axis)
        for ours, theirs in zip(folded, expected, strict=True):
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours, theirs, rtol=4 * np.finfo(dtype).eps)


def test_population():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((n, 3)) for n in (5, 1, 9, 2)]
    ours = fastbn.population(fastbn.moments(b) for b in batches)
    for a, b in zip(ours, reference.population([reference.moments(b) for b in batches]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    assert np.isnan(fastbn.population([fastbn.moments(batches[1])])).all()


def test_memmap(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
    values.tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=values.shape)
    y, saved = fastbn.batch_norm(x)
    np.testing.assert_array_equal(y, fastbn.batch_norm(values)[0])
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x, saved).x, fastbn.batch_norm_backward(values, saved).x)
    out = np.memmap(tmp_path / "y", np.float32, "w+", shape=values.shape)
    assert fastbn.batch_norm(values, out=out)[0] is out
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(fastbn.mean(x, 0), fastbn.mean(values, 0))


def test_readme_example():
    """The first code block of the README runs."""
    readme = PACKAGE.parent / "README.md"
    if not readme.exists():
        pytest.skip("installed without the README")
    (code, *_) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["z"].shape == names["x"].shape
    assert abs(names["running"][1] - 1).max() < 0.01


def test_documented_gradients_of_frozen_statistics():
    """The docs' dmean and dvar, by finite differences on the functions themselves."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 6, 2))
    mean, var, gamma = rng.standard_normal(2), rng.random(2) + 0.5, rng.standard_normal(2)
    saved = fastbn.Saved.frozen(x, mean, var, gamma)
    grads = fastbn.batch_norm_backward(dy, saved)

    def loss(mean, var):
        return (dy * fastbn.batch_norm_inference(x, mean, var, gamma)).sum(axis=0)

    step = 1e-6
    by_mean = (loss(mean + step, var) - loss(mean - step, var)) / (2 * step)
    by_var = (loss(mean, var + step) - loss(mean, var - step)) / (2 * step)
    np.testing.assert_allclose(-gamma * saved.rstd * grads.beta, by_mean, rtol=1e-6)
    np.testing.assert_allclose(-gamma * saved.rstd**2 * grads.gamma / 2, by_var, rtol=1e-6)
