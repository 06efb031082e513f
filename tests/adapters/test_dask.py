"""`fastbn.dask`: any axes and chunks as the whole array in memory; lazy; on threads and on processes."""

import importlib.util
import itertools
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

da = pytest.importorskip("dask.array")
import dask  # noqa: E402

import fastbn  # noqa: E402
import fastbn.dask as fd  # noqa: E402
from fastbn import environment  # noqa: E402
from tests import interpreters  # noqa: E402

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


AXES = [None, 0, 1, -1, (0, 2, 3), (1, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_as_in_memory(chunks, axis):
    x = np.random.default_rng(0).standard_normal(SHAPE) + 100
    lazy = da.from_array(x, CHUNKS[chunks])
    for keepdims in (False, True):
        for name, keywords in (("mean", {}), ("var", {}), ("var", {"correction": 1}), ("std", {"ddof": 2})):
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


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64", "int8", "bool"])
@pytest.mark.parametrize("wanted", [None, "float16", "float32", "float64"])
def test_dtype_of_the_result(dtype, wanted):
    x = np.array([[0, 1], [1, 1], [1, 0], [0, 1]]).astype(dtype)
    lazy = da.from_array(x, (3, 1))
    for name, keywords in (("mean", {}), ("var", {"ddof": 1}), ("std", {"correction": 1})):
        found = getattr(fd, name)(lazy, 0, wanted, **keywords)
        expected = getattr(np, name)(x.astype(np.float64), 0, **keywords)
        assert found.dtype == found.compute().dtype == np.mean(x, 0, dtype=wanted).dtype.newbyteorder("=")
        np.testing.assert_allclose(found.compute(), expected, rtol=np.finfo(found.dtype).eps)


def test_float64_results_of_float32_are_summed_in_it():
    x = (100 + np.random.default_rng(0).standard_normal((300, 2))).astype(np.float32)
    found = fd.var(da.from_array(x, 100), 0, "float64").compute()
    np.testing.assert_allclose(found, x.astype(np.float64).var(0), rtol=1e-13)


def test_float16_overflows_without_a_warning():
    x = da.from_array(np.array([6e4, -6e4], np.float16), 1)
    assert fd.var(x).compute() == np.inf
    assert fd.std(x, dtype="float32").compute() == np.float32(np.float16(6e4))


def digits(found, exact):
    error = abs(Fraction(float(found)) - exact) / abs(exact)
    return 16 if error == 0 else min(16, -np.log10(float(error)))


@pytest.mark.parametrize("ratio", [0, 1, 20, 100, 1e4, 1e8, 1e10, 1e12, -1e12])
@pytest.mark.parametrize("chunk", [1, 7, 50, 150])
def test_digits_at_large_means(ratio, chunk):
    """Of the stored doubles, in rational arithmetic; means that are rounded to doubles leave 6 digits at 1e12."""
    rng = np.random.default_rng(chunk)
    x = rng.standard_normal(150) + ratio + np.linspace(0, rng.integers(0, 9), 150)
    numbers = [Fraction(v) for v in x.tolist()]
    mean = sum(numbers) / len(numbers)
    var = sum((v - mean) ** 2 for v in numbers) / len(numbers)
    spoilt = np.concatenate([x, [np.nan, -1e300]])  # masked out
    masked = da.from_array(np.ma.array(spoilt, mask=np.arange(152) >= 150), chunk)
    for lazy in (da.from_array(x, chunk), masked):
        for split_every in (2, 500):
            assert digits(fd.var(lazy, split_every=split_every).compute(), var) >= 13
        assert digits(fd.mean(lazy).compute(), mean) >= (15 if ratio else 13)


def test_digits_of_integers():
    x = 2_000_000_000 + np.random.default_rng(0).integers(-2, 3, 300).astype(np.int64)
    exact = (x - 2_000_000_000).astype(np.float64).var()
    np.testing.assert_allclose(fd.var(da.from_array(x, 7)).compute(), exact, rtol=1e-13)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_digits_where_one_channel_is_infinite(rows):
    x = np.array([[1e12, np.inf], [1e12 + 1, 1], [1e12 + 3, 2]])
    mean, var = dask.compute(*fd.mean_var(da.from_array(x, (rows, 2)), 0))
    np.testing.assert_array_equal(mean, [np.float64(3e12 + 4) / 3, np.inf])
    np.testing.assert_allclose(var, [14 / 9, np.nan], rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("values", [(1, np.inf, 2), (np.inf, np.inf, 1), (np.inf, -np.inf, 1), (np.nan, -np.inf, 2)])
def test_infinities_in_any_order(values, dtype):
    """datatable#314: one sign gives it, both or a NaN give NaN, wherever the blocks end."""
    expected = sum(values)
    for order, chunk in itertools.product(itertools.permutations(values), (1, 2)):
        x = da.from_array(np.array(order, dtype), chunk)
        np.testing.assert_equal(fd.mean(x, split_every=2).compute(), expected)
        assert np.isnan(fd.var(x, split_every=2).compute())


def test_accuracy_where_the_mean_is_large():
    """Channels last, float32 sums of blocks lose a mean of 100 000: dask's own variance is off by a factor."""
    x = (np.random.default_rng(0).standard_normal((64, 50, 50, 4)) + 100_000).astype(np.float32)
    lazy, axis = da.from_array(x, (8, 50, 50, 4)), (0, 1, 2)
    exact = x.astype(np.float64).var(axis)
    ours, theirs = (np.abs(v.compute() / exact - 1).max() for v in (fd.var(lazy, axis), da.var(lazy, axis)))
    assert ours < 1e-6
    assert theirs > 1


def test_the_example(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "dask_statistics.py"
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


def test_unknown_chunks_that_are_kept():
    x = da.from_array(np.arange(30.0).reshape(10, 3), (3, 2))
    x = x[x[:, 0] > 7]
    expected = np.arange(9.0, 30).reshape(7, 3)
    np.testing.assert_allclose(fd.mean(x, 1).compute(), expected.mean(1))
    np.testing.assert_allclose(fd.var(x, 0, ddof=1).compute(), expected.var(0, ddof=1))
    np.testing.assert_allclose(fd.std(x, ()).compute(), np.zeros((7, 3)))


def test_without_dimensions():
    x = da.from_array(np.array(3.0))
    for axis in (None, ()):
        assert [float(v) for v in dask.compute(fd.mean(x, axis), fd.var(x, axis))] == [3, 0]
    (found,) = dask.compute(fd.moments(x, channel_axis=()))
    assert [v.shape for v in found] == [()] * 3
    assert [float(v) for v in found] == [1, 3, 0]


# --- masked arrays ----------------------------------------------------------------------------------------------------


def masked_data(dtype, mask):
    """The masks of dask#2095 and dask#5338 and others; what they hide would show."""
    rng = np.random.default_rng(3)
    x = (10 * rng.standard_normal(SHAPE) + 30).astype(dtype)
    hidden = {
        "scattered": rng.random(SHAPE) < 0.4,
        "whole slices": np.tile(rng.random((1, 5, 1, 4)) < 0.5, (6, 1, 7, 1)),
        "all": np.ones(SHAPE, bool),
        "an empty mask": np.zeros(SHAPE, bool),
        "none": np.ma.nomask,
    }[mask]
    x[hidden if mask != "none" else ()] += np.asarray(0 if mask == "none" else 90, dtype)
    return np.ma.array(x, mask=hidden)


def assert_as_numpys(found, expected):
    """A lazy array computes to numpy.ma's result."""
    assert isinstance(found._meta, np.ma.MaskedArray)
    computed = found.compute()
    assert found.shape == np.shape(computed) == np.shape(expected)
    assert isinstance(computed, np.ma.MaskedArray) == isinstance(expected, np.ma.MaskedArray)
    np.testing.assert_array_equal(np.ma.getmaskarray(computed), np.ma.getmaskarray(expected))
    if computed is not np.ma.masked:
        assert found.dtype == computed.dtype
        rtol = 1e-6 if found.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(np.ma.filled(computed, 0), np.ma.filled(expected, 0), rtol=rtol)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2, 3), (1, 3), ()], ids=str)
@pytest.mark.parametrize("mask", ["scattered", "whole slices", "all", "an empty mask", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_masks(dtype, mask, axis):
    x = masked_data(dtype, mask)
    precise = x.astype(np.float64)
    lazy = da.from_array(x, (4, 3, 4, 4))
    for keepdims, name in itertools.product((False, True), ("mean", "var", "std")):
        expected = getattr(precise, name)(axis, keepdims=keepdims)
        assert_as_numpys(getattr(fd, name)(lazy, axis, keepdims=keepdims), expected)
    for found, name in zip(fd.mean_var(lazy, axis), ("mean", "var"), strict=True):
        assert_as_numpys(found, getattr(precise, name)(axis))


@pytest.mark.parametrize("ddof", [1, 2, 6, 7])
def test_masked_where_nothing_is_left_to_divide_by(ddof):
    x = masked_data("float64", "scattered")
    expected = x.var(0, ddof=ddof)
    assert_as_numpys(fd.var(da.from_array(x, 2), 0, ddof=ddof), expected)
    assert_as_numpys(fd.std(da.from_array(x, 2), 0, correction=ddof), np.ma.sqrt(expected))


def test_functions_of_da_ma():
    """dask#2095: a mean of 5.5 for 3.5."""
    x = da.arange(12, chunks=5)
    assert fd.mean(da.ma.masked_greater(x, 7)).compute() == 3.5
    assert fd.mean(da.ma.masked_where(x % 2 == 0, x)).compute() == 6
    values = np.array([[1, np.nan, 3], [np.inf, np.nan, 5]])
    for lazy in (
        da.ma.masked_invalid(da.from_array(values, 1)),
        da.from_array(values, 1).map_blocks(np.ma.masked_invalid),
    ):
        mean, var = dask.compute(*fd.mean_var(lazy, 0))
        np.testing.assert_array_equal(mean.filled(-1), [1, -1, 4])
        np.testing.assert_array_equal(var.filled(-1), [0, -1, 1])
    shown = da.ma.masked_array(x, mask=x > 7, fill_value=-5)
    assert fd.var(shown).compute() == np.arange(8).var()
    assert fd.mean(da.ma.masked_equal(x, 3)).compute() == np.delete(np.arange(12), 3).mean()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("along", [0, 1])
def test_masked_blocks_among_plain_ones(first, along):
    masked = np.ma.array(np.arange(12.0).reshape(4, 3), mask=[[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]])
    parts = [masked, np.full((4, 3), 5.0)][:: 1 if first else -1]
    lazy = da.concatenate([da.from_array(part, 2) for part in parts], along)
    whole = np.ma.concatenate(parts, along)
    for axis in (None, 0, 1):
        assert_as_numpys(fd.mean(lazy, axis), whole.mean(axis))
        assert_as_numpys(fd.var(lazy, axis), whole.var(axis))
    assert {type(fd.mean(lazy, 0).blocks[i].compute()) for i in range(2)} == {np.ma.MaskedArray}


def test_masked_blocks_that_nobody_told_of():
    x = np.ma.array([[1.0, 2], [3, 4]], mask=[[0, 1], [0, 1]])
    lazy = da.from_array(x, 1).map_blocks(lambda block: block, dtype=float, meta=np.empty((0, 0)))
    np.testing.assert_array_equal(fd.mean(lazy, 0).compute().filled(-1), [2, -1])


def test_plain_arrays_stay_plain():
    x = da.ones((4, 3), chunks=2)
    for found in (*fd.mean_var(x, 0), fd.std(x, keepdims=True), *fd.moments(x)):
        assert type(found._meta) is type(found.compute()) is np.ndarray


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_of_masked_arrays(dtype):
    """Plain arrays, for `merge` and `update_running`: count 0, NaN where all is masked."""
    x = masked_data(dtype, "whole slices")
    x[:, 2] = np.ma.masked
    lazy = fd.moments(da.from_array(x, 2))
    assert all(type(part._meta) is np.ndarray for part in lazy)
    (found,) = dask.compute(lazy)
    precise = x.astype(np.float64)
    np.testing.assert_array_equal(found.count, x.count((0, 2, 3)))
    np.testing.assert_allclose(found.mean, precise.mean((0, 2, 3)).filled(np.nan), rtol=1e-6)
    np.testing.assert_allclose(found.var(), precise.var((0, 2, 3)).filled(np.nan), rtol=1e-6)
    assert found.count[2] == 0
    twice = fastbn.merge(found, found)
    np.testing.assert_allclose(twice.var(), found.var(), rtol=1e-12)
    running = fastbn.update_running(np.zeros(5), np.ones(5), found)
    assert (running[0][2], running[1][2]) == (0, 1)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_nan_stays_where_it_is():
    x = np.ones((6, 3))
    x[2, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(fd.mean(da.from_array(x, 2), 0).compute()), [False, True, False])


def test_blocks_take_one_thread_each(monkeypatch):
    moments, asked = fastbn.moments, []

    def noted(*args, **kwargs):
        asked.append(fastbn.threads.get_num_threads())
        return moments(*args, **kwargs)

    monkeypatch.setattr(fastbn, "moments", noted)
    before = fastbn.threads.get_num_threads()
    for scheduler in ("synchronous", "threads"):
        fd.mean(da.ones((4, 3), chunks=2)).compute(scheduler=scheduler)
    assert set(asked) == {1}
    assert fastbn.threads.get_num_threads() == before


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: expected a dask\.array\.Array, got ndarray", lambda: fd.mean(np.ones(3))),
        (TypeError, "x: expected real numbers, got complex128", lambda: fd.var(da.ones(3, dtype=complex))),
        (TypeError, "x: expected real numbers, got object", lambda: fd.std(da.ones(3, chunks=1, dtype=object))),
        (TypeError, "x: expected real numbers, got datetime64", lambda: fd.mean(da.zeros(3, dtype="M8[s]"))),
        (TypeError, r"x: expected real numbers, got \[", lambda: fd.mean(da.zeros(3, dtype="f4,f4"))),
        (TypeError, "dtype: expected float16, .* got int64", lambda: fd.mean(da.ones(3), dtype=int)),
        (TypeError, "dtype: expected float16, .* got complex128", lambda: fd.var(da.ones(3), None, complex)),
        (TypeError, "unexpected keyword argument 'out'", lambda: fd.std(da.ones(3), out=np.ones(()))),
        (TypeError, "ddof: expected a real number, got str", lambda: fd.std(da.ones(3), ddof="1")),
        (TypeError, "correction: expected a real number, got list", lambda: fd.mean_var(da.ones(3), correction=[1])),
        (
            ValueError,
            "correction: expected ddof or correction, got both",
            lambda: fd.var(da.ones(3), ddof=1, correction=1),
        ),
        (np.exceptions.AxisError, "axis", lambda: fd.mean(da.ones((3, 2)), 2)),
        (np.exceptions.AxisError, "channel_axis", lambda: fd.moments(da.ones((3, 2)), channel_axis=5)),
        (ValueError, "repeated axis", lambda: fd.mean(da.ones((3, 2)), (1, 1))),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_extended_precision():
    with pytest.raises(TypeError, match=r"x: expected real numbers, got float.*up to 64 bits"):
        fd.mean(da.ones(3, dtype=np.longdouble))
    with pytest.raises(TypeError, match=r"dtype: expected float16, .* got float"):
        fd.mean(da.ones(3), dtype=np.longdouble)


def test_without_dask():
    program = "import sys; sys.modules['dask'] = None\nimport fastbn\nimport fastbn.dask"
    ((_, err),) = interpreters.end(interpreters.begin(interpreters.python(program)), returns=1)
    assert 'fastbn.dask needs dask, which is not installed: pip install "dask[array]>=2024.12"' in err


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
    assert interpreters.run([sys.executable, path], timeout=240).split() == ["True", "True"]
