"""How statistics are divided, and that nothing as large as the array is allocated."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn.cpu import sizes
from fastbn.cpu import statistics as division
from tests.support import some_slow

shapes = st.lists(st.sampled_from([1, 2, 3, 5, 8, 30, 64, 500, 3000, 70_000]), min_size=1, max_size=5)


def dimensions(shape, kept):
    """Of a contiguous array, whose results are contiguous as well."""
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    results = [math.prod(n for a, n in enumerate(shape) if a > axis and a in kept) for axis in range(len(shape))]
    results = [step if axis in kept else 0 for axis, step in enumerate(results)]
    return division.dimensions(tuple(shape), tuple(steps), (0,) * len(shape), tuple(results), kept)[0]


@given(shapes, st.sets(st.integers(0, 4)), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans(), st.booleans())
def test_divisions(shape, kept, itemsize, exact, squares, small):
    """Each row is in one part, and parts have numbers of their own for a fiftieth of the array at most."""
    d = dimensions(shape, frozenset(kept) & set(range(len(shape))))
    c = division.divide(d, division.Summing(itemsize, exact, squares, small=small))
    g = c.geometry
    assert c.tasks > 0
    if g.pieces == 1:
        assert (g.parts - 1) * g.rows_of_a_part < g.rows <= g.parts * g.rows_of_a_part
    assert c.partials * 8 <= max(0.02 * itemsize * math.prod(shape), 1 << 16)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("shape", [(1985, 528), (1900, 2500), (850, 600), (600, 2000), (300, 1000)])
def test_threads_share_few_rows(shape, squares):
    """By parts of the rows where their numbers are little beside them, or else by tiles of columns."""
    c = division.divide(dimensions(shape, frozenset({1})), division.Summing(4, False, squares))
    assert c.tasks > 1
    assert (c.geometry.parts > 1) == (shape[0] >= 850)


@pytest.mark.parametrize("itemsize", [4, 8])
def test_rows_of_a_table_are_not_a_page_apart(itemsize):
    """Nor are two rows: a load would wait for the store to another one. 32 numbers lie between at least."""
    for columns in range(40, 4200, 8):
        pitch = sizes.pitch(columns)
        assert columns <= pitch <= columns + 64
        for rows in (1, 2):
            beyond = rows * pitch * itemsize % 4096
            assert 32 * itemsize <= beyond <= 4096 - 32 * itemsize


X = np.random.default_rng(0).random((1000, 40, 100), np.float32)  # 16 MB
CASES = {
    "uint8": ((X * 255).astype(np.uint8), {"axis": (0, 2)}),
    "int64": ((X[:250] * 1e6).astype(np.int64), {"axis": 0}),
    "float64 of float32": (X, {"axis": 1, "dtype": np.float64}),
    "float16": (X.astype(np.float16), {"axis": None}),
    "slice": (X[::2, 1:-1, 3:-5], {"axis": (0, 1)}),
    "steps": (X[..., ::3], {"axis": 2}),
    "mask": (X, {"axis": (0, 1), "where": X[:, :1] < 0.5}),
    "mask of x's shape": (X, {"axis": (0, 2), "where": X < 0.5}),
}


@pytest.mark.parametrize("function", some_slow(["mean", "var", "nanmean", "nanstd"], ["mean", "var"]))
@pytest.mark.parametrize("case", CASES)
def test_memory(case, function):
    x, options = CASES[case]
    call = getattr(fastbn, function)
    result = call(x, **options)
    tracemalloc.start()
    try:
        call(x, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    workspaces = fastbn.threads.get_num_threads() * 100_000  # whatever the size
    assert peak < np.asarray(result).nbytes + 0.02 * x.nbytes + workspaces


@pytest.mark.parametrize("dtype", some_slow(["uint8", "float32", "float64"], ["float32"]))
@pytest.mark.parametrize("case", ["of each value", "of rows", "of columns"])
def test_weights_are_read_where_they_lie(case, dtype):
    x = (X[:, :, 0] * 200).astype(dtype)  # 40 columns a row
    w = np.random.default_rng(1).random(x.shape, np.float32)
    axis, weights = {"of each value": (0, w), "of rows": (0, w[:, 0]), "of columns": (1, w[0])}[case]
    spread = weights if weights.ndim == 2 else weights[:, np.newaxis] if axis == 0 else weights
    fastbn.average(x, axis, weights)
    tracemalloc.start()
    try:
        result, scale = fastbn.average(x, axis, weights, returned=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    workspaces = fastbn.threads.get_num_threads() * 120_000
    assert peak < 4 * np.asarray(result, float).nbytes + 0.02 * x.nbytes + workspaces
    spread = np.broadcast_to(spread, x.shape).astype(float)
    np.testing.assert_allclose(scale, spread.sum(axis), rtol=1e-6)
    np.testing.assert_allclose(result, (spread * x).sum(axis) / spread.sum(axis), rtol=1e-6)


@pytest.mark.parametrize("rows", [3, 8, 12, 13, 40])
@pytest.mark.parametrize("shape", [(5, 7), (8, 3), (2, 17), (1, 64)], ids=str)
def test_results_whose_steps_change(shape, rows):
    """Eight results are made at once, and go where the kept axes, in x's order or another, have them."""
    numbers = np.random.default_rng(2).standard_normal((*shape, rows * 16)).astype(np.float32)
    for x in (numbers, numbers[..., ::16], numbers.transpose(1, 0, 2), numbers[::-1, :, : rows + 1]):
        for lying in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 2, 0)), 0, 2)):
            out = np.empty(x.shape[:2], np.float32).T.copy().T
            for function, expected in ((fastbn.mean, x.mean(2, np.float64)), (fastbn.var, x.var(2, np.float64))):
                np.testing.assert_allclose(function(lying, 2), expected, rtol=1e-6, atol=1e-7)
                np.testing.assert_array_equal(function(lying, 2, out=out), function(lying, 2))


@pytest.mark.parametrize("shape", [(7, 3, 2), (64, 33), (5, 100_000)])
def test_dtypes_are_read_as_numpy_reads_them(shape):
    """Converted on the way, value by value: sums of small integers are exact."""
    numbers = np.arange(math.prod(shape)).reshape(shape) % 97
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "?"):
        x = numbers.astype(dtype)
        for axis in range(x.ndim):
            np.testing.assert_array_equal(
                fastbn.mean(x, axis, np.float64),
                x.sum(axis, np.int64 if x.dtype.kind != "f" else np.float64) / x.shape[axis],
            )
