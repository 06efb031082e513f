"""`fastbn.dask`: any axes and chunks as the whole array in memory; lazy; on threads and on processes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

da = pytest.importorskip("dask.array")
import dask  # noqa: E402

import fastbn  # noqa: E402
import fastbn.dask as fd  # noqa: E402
from fastbn import environment  # noqa: E402

SHAPE = (6, 5, 7, 4)
CHUNKS = {
    "one": SHAPE,
    "uneven": ((1, 5), (2, 3), (3, 3, 1), (4,)),
    "single rows": (1, 5, 7, 4),
    "elements": (2, 1, 3, 1),
}


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2, 3), (1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_as_in_memory(chunks, axis):
    x = np.random.default_rng(0).standard_normal(SHAPE) + 100
    lazy = da.from_array(x, CHUNKS[chunks])
    for keepdims in (False, True):
        for name, keywords in (("mean", {}), ("var", {}), ("var", {"correction": 1}), ("std", {})):
            found = getattr(fd, name)(lazy, axis, keepdims=keepdims, **keywords)
            expected = getattr(fastbn, name)(x, axis, keepdims=keepdims, **keywords)
            assert found.shape == np.shape(expected)
            assert found.dtype == x.dtype
            computed = found.compute()
            assert np.shape(computed) == np.shape(expected)
            np.testing.assert_allclose(computed, expected, rtol=1e-12)


@pytest.mark.parametrize("split_every", [2, 3, 100])
def test_moments(split_every):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for channel_axis in (1, -1, (0, 1), (0, 2)):
        lazy = fd.moments(da.from_array(x, 2), channel_axis=channel_axis, split_every=split_every)
        assert isinstance(lazy, fastbn.Moments)
        (found,) = dask.compute(lazy)
        expected = fastbn.moments(x, channel_axis=channel_axis)
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-6)
        running = fastbn.update_running(np.zeros(found.mean.shape), np.ones(found.mean.shape), found)
        assert running[0].shape == found.mean.shape


@pytest.mark.parametrize("dtype", [*environment.float_dtypes(), "int32", "uint8", "bool"])
def test_dtypes(dtype):
    kind = environment.float_dtypes().get(dtype, np.dtype(dtype))
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 9, (20, 3)).astype(kind)
    expected = kind if dtype in environment.float_dtypes() else np.float64
    for found, right in zip(fd.mean_var(da.from_array(x, (7, 2)), 0), (np.mean, np.var), strict=True):
        assert found.dtype == found.compute().dtype == expected
        tolerance = 1e-2 if "16" in dtype else 1e-6
        np.testing.assert_allclose(found.compute().astype(np.float64), right(x.astype(np.float64), 0), rtol=tolerance)


def test_accuracy_where_the_mean_is_large():
    """Channels last, float32 sums of blocks lose a mean of 100 000: dask's own variance is off by a factor."""
    x = (np.random.default_rng(0).standard_normal((64, 50, 50, 4)) + 100_000).astype(np.float32)
    lazy, axis = da.from_array(x, (8, 50, 50, 4)), (0, 1, 2)
    exact = x.astype(np.float64).var(axis)
    ours, theirs = (np.abs(v.compute() / exact - 1).max() for v in (fd.var(lazy, axis), da.var(lazy, axis)))
    assert ours < 1e-6
    assert theirs > 1


def test_the_example(monkeypatch, capsys):
    path = Path(__file__).parent.parent / "examples" / "dask_statistics.py"
    spec = importlib.util.spec_from_file_location("dask_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick"])
    printed = capsys.readouterr().out
    assert "0.3 GB in 2 blocks" in printed
    assert float(printed.split(": error ")[1].split(",")[0]) < 1e-6


def test_lazy_and_read_once():
    blocks = []

    def read(block):
        blocks.append(block.shape)
        return block

    x = da.ones((12, 3), chunks=(4, 3)).map_blocks(read, dtype=np.float64, meta=np.empty((0, 0)))
    mean, var = fd.mean_var(x, 0)
    assert blocks == []
    dask.compute(mean, var)
    assert len(blocks) == 3


def test_the_same_bits_whatever_was_ready_first():
    x = da.from_array(np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32), (10, 3))
    results = {fd.var(x, 0).compute(scheduler=s).tobytes() for s in ("threads", "synchronous", "threads")}
    assert len(results) == 1


def test_empty_blocks_and_arrays():
    x = da.concatenate([da.zeros((0, 3), chunks=1), da.ones((4, 3), chunks=2), da.zeros((0, 3), chunks=1)])
    np.testing.assert_array_equal(fd.mean(x, 0).compute(), 1)
    assert np.isnan(fd.var(da.zeros((0, 3), chunks=1), 0).compute()).all()
    assert np.isnan(fd.var(da.ones(1, chunks=1), correction=1).compute())


def test_unknown_chunks():
    x = da.arange(10, chunks=3).astype(np.float64)
    assert float(fd.mean(x[x > 4]).compute()) == 7


def test_nan_stays_where_it_is():
    x = np.ones((6, 3))
    x[2, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(fd.mean(da.from_array(x, 2), 0).compute()), [False, True, False])


def test_threads_are_given_back():
    import numba

    before = numba.get_num_threads()
    fd.mean(da.ones((4, 3), chunks=2)).compute(scheduler="synchronous")
    assert numba.get_num_threads() == before


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: expected a dask\.array\.Array, got ndarray", lambda: fd.mean(np.ones(3))),
        (TypeError, "x: expected real numbers, got complex128", lambda: fd.var(da.ones(3, dtype=complex))),
        (np.exceptions.AxisError, "axis", lambda: fd.mean(da.ones((3, 2)), 2)),
        (np.exceptions.AxisError, "channel_axis", lambda: fd.moments(da.ones((3, 2)), channel_axis=5)),
        (ValueError, "repeated axis", lambda: fd.mean(da.ones((3, 2)), (1, 1))),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_without_dask():
    program = "import sys; sys.modules['dask'] = None\nimport fastbn\nimport fastbn.dask"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "fastbn.dask needs dask, which is not installed: pip install 'fastbn[dask]'" in run.stderr


CLUSTER = """
import dask.array as da, fastbn.dask, numpy as np
from dask.distributed import Client, LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with Client(cluster):
            x = da.random.default_rng(0).normal(1e4, 1, (400, 3, 20), chunks=(30, 3, 20)).astype(np.float32)
            mean, var = fastbn.dask.mean_var(x, (0, 2))
            whole = x.compute().astype(np.float64)
            print(np.abs(mean.compute() - whole.mean((0, 2))).max() < 1e-3)
            print(np.abs(var.compute() - whole.var((0, 2))).max() < 1e-5)
"""


def test_a_cluster_of_processes(tmp_path):
    pytest.importorskip("distributed")
    path = tmp_path / "program.py"
    path.write_text(CLUSTER)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=240)
    assert run.stdout.split() == ["True", "True"], run.stderr
