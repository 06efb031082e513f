"""Statistics of CuPy arrays as they lie: every dtype, stride, axis and mask against exact arithmetic; what is launched,
allocated and compiled for it.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import fastbn
from fastbn.cuda import launch, strided
from fastbn.dimensions import dimensions
from tests import exact as oracle
from tests import statistics as judged
from tests.conftest import missing
from tests.cuda import harness
from tests.cuda.harness import on_device
from tests.simt import cuda, host_cupy
from tests.statistics import FUNCTIONS, check, report, results_of
from tests.support import NUMBERS, VIEWS, maker, one_in, some_slow

POSSIBLE = [view for view in VIEWS if view not in ("4-d unaligned", "4-d big-endian")]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
by_dtype = pytest.mark.parametrize("dtype", NUMBERS)
by_function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(judged, "fastbn", harness.scalars(cuda_arrays))


@pytest.fixture(params=["as planned", "many splits"])
def splits(request, on_cupy, monkeypatch):
    """Also with parts for every vector, so that small arrays have some."""
    if request.param == "many splits":
        monkeypatch.setattr(strided, "BYTES_OF_PART", 0)
        monkeypatch.setattr(strided, "BATCHES_OF_SPLIT", 0)
    cuda.forget()
    yield request.param
    cuda.forget()


# --- the matrix -------------------------------------------------------------------------------------------------------


def some_axes(ndim):
    """Each axis, its complement, ends, all, none."""
    each = {(axis,) for axis in range(ndim)}
    others = {tuple(a for a in range(ndim) if a != axis) for axis in range(ndim)}
    return [None, *sorted({(), tuple(range(0, ndim, 2)), *each, *others})]


def share(dtype, of):
    """A part of the views for each dtype: kernels are compiled for the first time."""
    return POSSIBLE[NUMBERS.index(dtype) % of :: of]


def check_views(dtype, views, of):
    """Of as many functions one in turn, for each choice of axes."""
    failures = []
    for i, view in enumerate(views):
        x = VIEWS[view](maker(dtype))
        for k, axis in enumerate(some_axes(x.ndim)):
            exact = oracle.exact(x, axis)
            for function in FUNCTIONS[(i + k) % of :: of]:
                check(failures, f"{view} {x.shape} {x.strides}", function, x, exact, axis=axis)
    report(failures)


@by_dtype
def test_views(splits, dtype):
    """Of all dtypes together each view, and each function."""
    check_views(dtype, share(dtype, 13 if splits == "as planned" else 39), of=len(FUNCTIONS))


@pytest.mark.slow
@by_dtype
def test_every_view(splits, dtype):
    check_views(dtype, POSSIBLE, of=1)


MASKS = {  # of a shape
    "full": lambda shape, rng: rng.random(shape) < 0.7,
    "last axis": lambda shape, rng: rng.random(shape[-1:]) < 0.7,
    "first axis": lambda shape, rng: rng.random((*shape[:1], *(1 for _ in shape[1:]))) < 0.7,
    "alternate axes": lambda shape, rng: rng.random([1 if k % 2 else n for k, n in enumerate(shape)]) < 0.7,
    "Fortran": lambda shape, rng: np.asfortranarray(rng.random(shape) < 0.7),
    "steps": lambda shape, rng: (rng.random((*shape[:-1], 2 * shape[-1])) < 0.7)[..., ::2],
    "backwards": lambda shape, rng: (rng.random(shape) < 0.7)[(slice(None, None, -1),) * len(shape)],
    "one byte off": lambda shape, rng: (rng.random(int(np.prod(shape)) + 1) < 0.7)[1:].reshape(shape),
    "stride 0": lambda shape, rng: np.broadcast_to(rng.random(shape[-1:]) < 0.7, shape),
    "other bytes": lambda shape, rng: (2 * (rng.random(shape) < 0.7)).astype(np.uint8).view(bool),
}
MASKED = [
    "1-d every third", "2-d", "2-d tall", "2-d Fortran", "2-d columns", "3-d channels reversed", "4-d transposed",
    "4-d positions", "4-d of stride 0", "4-d windows", "5-d inner slices",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_masks(splits, dtype):
    check_masks(dtype, of=8)


@pytest.mark.slow
@by_dtype
def test_more_masks(splits, dtype):
    check_masks(dtype, of=2)


def check_masks(dtype, of):
    """Read in place; what is left out is NaN."""
    failures = []
    for (i, view), (k, name) in itertools.product(enumerate(MASKED), enumerate(MASKS)):
        if (i + k) % 2:
            continue
        x = VIEWS[view](maker(dtype))
        where = MASKS[name](x.shape, np.random.default_rng(k))
        axis = (None, 0, tuple(range(1, x.ndim)) or 0, -1, tuple(range(0, x.ndim, 2)))[(i + k) % 5]
        exact = oracle.exact(x, axis, where)
        if x.dtype.kind not in "iub":
            x = np.where(where, x, [np.nan, np.inf][k % 2]).astype(x.dtype)
        if (exact.count > 0).all():
            for function in FUNCTIONS[(i + k) // 2 % of :: of]:
                label = f"{view} {x.strides}, {name}"
                check(failures, label, function, x, exact, axis=axis, where=where)
    report(failures)


@pytest.mark.parametrize("dtype", some_slow(FLOATS, ["float32"]))
def test_nan(splits, dtype):
    """Left out by the nan forms, also beside a mask."""
    failures = []
    for view in MASKED[FLOATS.index(dtype) % 2 :: 2]:
        x = VIEWS[view](maker(dtype))
        rng = np.random.default_rng(1)
        x = np.where(rng.random(x.shape) < 0.3, np.nan, x).astype(x.dtype)
        for axis in (None, 0, -1, tuple(range(1, x.ndim)) or 0):
            for where in (True, rng.random(x.shape) < 0.8):
                exact = oracle.exact(x, axis, where, skip_nan=True)
                if (exact.count > 0).all():
                    given = {} if where is True else {"where": where}
                    for function in ("nanmean", "nanvar", "nanstd"):
                        check(failures, f"{view} {x.strides}", function, x, exact, axis=axis, **given)
    report(failures)


@pytest.mark.parametrize("dtype", some_slow(["float16", "float32", "uint8", "int16", "int64"], ["float16", "uint8"]))
def test_lengths(splits, dtype):
    """Of a row that begins and ends anywhere in a vector."""
    line, failures = maker(dtype)((1300,)), []
    for n in (*range(1, 20), 31, 33, 127, 128, 129, 141, 255, 257, 511, 513, 515, 700, 1025, 1101):
        x = line[n % 17 : n % 17 + n]
        for function in ("mean", "mean_var"):
            check(failures, f"{n}", function, x, oracle.exact(x, None))
    for n in (129, 131, 512 + 3):  # rows of other places each
        x = maker(dtype)((3, n + 5))[:, 2 : n + 2]
        check(failures, f"3 x {n}", "mean_var", x, oracle.exact(x, 1), axis=1)
    report(failures)


@pytest.mark.parametrize("dtype", some_slow(["uint8", "int32", "float16", "float32", "float64"], ["uint8"]))
def test_a_dtype_of_the_result(on_cupy, dtype):
    """In float64 they are good to float64; narrower ones are one rounding."""
    failures = []
    for view in ("1-d", "2-d tall", "4-d positions transposed", "4-d steps"):
        x = VIEWS[view](maker(dtype))
        for wanted, axis in itertools.product(("float64", "float32", "float16"), (None, 0, tuple(range(1, x.ndim)))):
            for function in ("mean", "std", "mean_var", "nanvar"):
                if not (function == "mean_var" and wanted != "float64"):
                    more = {} if function == "mean_var" else {"dtype": wanted}
                    check(failures, view, function, x, oracle.exact(x, axis), axis=axis, **more)
    report(failures)


# --- values -----------------------------------------------------------------------------------------------------------


@one_in(8, function=FUNCTIONS, dtype=["int64", "uint64", "int32", "uint16"])
def test_integers_at_the_ends_of_their_range(splits, dtype, function):
    """Sums of any of them are exact: the mean of the largest and the smallest is -0.5."""
    info, failures = np.iinfo(dtype), []
    for values in (
        [info.max] * 21, [info.max, info.max - 1] * 40, [info.min, info.max] * 33, [info.min] * 19,
        [info.max, 0, 0, 1] * 9, list(range(info.max - 99, info.max + 1)),
    ):  # fmt: skip
        row = np.array(values, dtype)
        for x, axis in ((row, 0), (np.stack([row, row[::-1]], 1), 0), (np.stack([row, row]), 1)):
            exact = oracle.exact(x, axis)
            check(failures, f"{values[:3]}.. x {len(values)}", function, x, exact, axis=axis)
            if function == "mean":
                actual = np.ravel(results_of("mean", x, axis)["mean"])
                np.testing.assert_allclose(actual, exact.mean.ravel(), rtol=2.3e-16)
    report(failures)


@one_in(16, function=FUNCTIONS, dtype=NUMBERS)
def test_constants(on_cupy, dtype, function):
    """The mean is the value, the variance 0, exactly."""
    kind = maker(dtype)(()).dtype
    values = {"b": [True], "u": [251], "i": [-77]}.get(kind.kind, [0.1, -7.3, 6e4, 1e-3, 0.0])
    for value, shape in itertools.product(values, [(1,), (1000,), (33, 5), (5, 700)]):
        x = np.full(shape, value, kind)
        for axis in (None, 0, -1):
            for name, actual in results_of(function, x, axis).items():
                if name != "count":
                    expected = np.broadcast_to(x.flat[0] if name == "mean" else 0, np.shape(actual))
                    np.testing.assert_array_equal(actual, expected, err_msg=f"{name} of {value}, axis {axis}")


SETS = {
    "small spread": 1e6 + np.tile([0.2, 0.1, 0.3], 341)[:1001],
    "many digits": 1e9 + np.arange(500) * 0.1,
    "powers": 2.0 ** np.arange(-60, 61),
    "alternating": np.tile([1e8 + 1, -1e8], 300) + 5e8,
}


@pytest.mark.parametrize("function", some_slow(["mean", "var", "std", "mean_var", "nanmean", "nanvar"], ["mean_var"]))
@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_float64_to_15_digits(splits, values, function):
    for x, axis in (
        (values, None), (values[::-1], 0), (np.repeat(values, 3)[1::3], 0), (np.stack([values, 2 * values], 1), 0),
        (np.stack([values, values]), 1), (np.stack([values] * 40, 1), 0),
    ):  # fmt: skip
        exact = oracle.exact(x, axis)
        for name, actual in results_of(function, x, axis).items():
            expected = exact.mean if name == "mean" else getattr(exact, name)()
            np.testing.assert_allclose(np.ravel(actual), expected.ravel(), rtol=1e-15 if name == "mean" else 1e-13)


OUTLIERS = {  # float32 rows, whose squares would lose digits around a bad shift
    "first": lambda x: np.where(np.arange(x.size) == 0, 1e6, x),
    "first vectors": lambda x: np.where(np.arange(x.size) < 40, 1e4, x),
    "one in the middle": lambda x: np.where(np.arange(x.size) == x.size // 2, -3e7, x),
    "ascending": np.sort,
    "steps": lambda x: x + 1e4 * (np.arange(x.size) // 100),
    "far from 0": lambda x: x + 1e5,
}


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_outliers(splits, outlier):
    failures = []
    for n in (9, 100, 3000):
        row = OUTLIERS[outlier](np.random.default_rng(n).standard_normal(n)).astype(np.float32)
        for x, axis in ((row, None), (np.stack([row, row[::-1]], 1), 0), (np.stack([row, row]), 1), (row[::-1], 0)):
            for function in ("var", "mean_var", "mean"):
                check(failures, f"{n}", function, x, oracle.exact(x, axis), axis=axis)
    report(failures)


@pytest.mark.parametrize("fill", [-3.4028235e38, 9.969209968386869e36])
def test_no_data_first(splits, fill):
    """However large a number stands for values that do not count, they change no digit of the variance."""
    failures = []
    for n, first in ((9, 1), (100, 51), (100, 2), (1500, 1)):
        x = (np.random.default_rng(n).standard_normal((5, n)) + 3).astype(np.float32)
        x[:, :first] = fill
        where = np.broadcast_to(np.arange(n) >= first, x.shape).copy()
        for a, mask, axis in ((x, where, 1), (x.T.copy(), where.T.copy(), 0), (x, where[0], None)):
            exact = oracle.exact(a, axis, np.broadcast_to(mask, a.shape))
            for function in ("var", "mean_var"):
                check(failures, f"{a.shape}", function, a, exact, axis=axis, where=mask)
    report(failures)


SPECIAL = {
    "nan": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "both infinities": [np.inf, -np.inf],
    "inf and nan": [np.inf, np.nan],
}


@one_in(8, special=SPECIAL, dtype=FLOATS)
def test_not_finite(splits, special, dtype):
    """Other slices are not touched."""
    failures, values = [], SPECIAL[special]
    for n in (6, 300):
        for place in (0, n // 3, n - len(values)):
            rows = np.resize([1.0, -2.5, 3.0, 7.25, 0.5], (3, n)).astype(maker(dtype)(()).dtype)
            rows[1, place : place + len(values)] = values
            for x, axis in ((rows, 1), (np.ascontiguousarray(rows.T), 0), (rows, None)):
                for function in FUNCTIONS:
                    exact = oracle.exact(x, axis, skip_nan=function.startswith("nan"))
                    check(failures, f"{n}, {place}", function, x, exact, axis=axis)
    report(failures)


HUGE = ([1], [1, 0.5], [1, -1], [1, -1, 1], [0, 0, 1], [1, 0.99, 0.98], [-1, -0.5, -0.75], [0.9, 1e-5], [0, 1, -1, 1])


@one_in(4, function=FUNCTIONS, dtype=FLOATS)
def test_huge_values(splits, dtype, function):
    """Infinite only where the exact value is beyond the result's dtype, or NumPy's sum beyond float64."""
    dtype, failures = maker(dtype)(()).dtype, []
    largest = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38, "float64": 1.7e308}[dtype.name]
    for shares in HUGE:
        row = (np.resize(shares, 24) * largest).astype(dtype)
        for x, axis in ((row, None), (np.stack([row, row], 1), 0), (np.stack([row, row]), 1)):
            exact = oracle.exact(x, axis)
            with np.errstate(over="ignore", invalid="ignore"):
                if dtype == np.float64 and function == "moments":
                    continue  # of floats they are batch norm's
                check(failures, f"{shares}", function, x, exact, axis=axis)
    report(failures)


AT_ENDS = [
    ("float32", -120), ("float32", -40), ("float32", 100), ("bfloat16", -110), ("float64", -900), ("float64", -500),
    ("float64", 600),
]  # fmt: skip


@by_function
@pytest.mark.parametrize(("dtype", "exponent"), AT_ENDS)
def test_scales(splits, dtype, exponent, function):
    """Deviations at both ends of a range, where their squares are beyond it; also around numbers of another scale."""
    if function == "moments":
        pytest.skip("of floats they are batch norm's, which tests/cuda/test_scales.py has")
    failures = []
    for n in (5, 130, 1000):
        row = ((np.random.default_rng(n).standard_normal(n) + 1) * 2.0**exponent).astype(maker(dtype)(()).dtype)
        if exponent > -500:
            row[np.abs(row) < 2.0**-125] = 0  # as float32 and bfloat16 numbers below 2^-126 are
        for x, axis in ((row, None), (np.stack([row, -row], 1), 0), (np.stack([row, row]), 1)):
            check(failures, f"{n}", function, x, oracle.exact(x, axis), axis=axis)
        one = row.copy()
        one[n // 2] = 2.0 ** (exponent + 20)
        check(failures, f"{n}, one of 2^20 times that", function, one, oracle.exact(one, None))
    report(failures)


@pytest.mark.parametrize("dtype", some_slow(FLOATS, ["float32", "float64"]))
def test_mean_var_is_mean_and_var(splits, dtype):
    """Bit by bit."""
    for shape, axis in (((700, 9), 0), ((9, 700), 1), ((5, 6, 7, 8), (0, 2, 3)), ((61, 3), 0), ((4001,), None)):
        for x in (maker(dtype)(shape), maker(dtype)((*shape, 2))[..., 1]):
            both = results_of("mean_var", x, axis)
            for name in ("mean", "var"):
                np.testing.assert_array_equal(both[name], results_of(name, x, axis)[name])


# --- launches and memory ----------------------------------------------------------------------------------------------

X = np.random.default_rng(0).random((100, 40, 60), np.float32)
CASES = {
    "uint8": ((X * 255).astype(np.uint8), {"axis": (0, 2)}),
    "bool": (X < 0.5, {"axis": 0}),
    "int64": ((X * 1e6).astype(np.int64), {"axis": 1}),
    "float64 of float32": (X, {"axis": 1, "dtype": np.float64}),
    "float32 of float64": (X.astype(float), {"axis": None, "dtype": np.float32}),
    "float16": (X.astype(np.float16), {"axis": None}),
    "channels-last images": ((X * 255).astype(np.uint8).reshape(4, 250, 80, 3), {"axis": (0, 1, 2)}),
    "slice": (X[::2, 1:-1, 3:-5], {"axis": (0, 1)}),
    "steps": (X[..., ::3], {"axis": 2}),
    "backwards": (X[:, ::-1, ::-2], {"axis": (0, 2)}),
    "mask": (X, {"axis": (0, 1), "where": X[:, :1] < 0.5}),
    "mask of x's shape": (X, {"axis": (0, 2), "where": X < 0.5}),
    "mask of another order": (X, {"axis": 2, "where": np.asfortranarray(X < 0.5)}),
    "mask of every other byte": (X[:, :, ::2], {"axis": 0, "where": (X < 0.5)[:, :, ::2]}),
}


@pytest.mark.usefixtures("nothing_waits")
@one_in(5, case=CASES, function=["mean", "var", "nanmean", "nanstd", "mean_var"])
def test_one_launch_or_two_and_no_copy(counted, case, function):
    """On first calls and on others; beside the results 2 % of x."""
    x, options = CASES[case]
    options = dict(options)
    if function == "mean_var" and "dtype" in options:
        options.pop("dtype")
    x, options = on_device((x, options))
    for _ in range(2):
        found = counted(getattr(fastbn, function), x, **options)
        assert counted.kernels in (["strided_statistics"], ["strided_statistics", "finish_strided"])
        assert counted.operations == {}
        results = found if isinstance(found, tuple) else (found,)
        parts = sum(counted.allocations) - sum(r.nbytes for r in results)
        assert len(counted.allocations) == len(results) + (len(counted.kernels) == 2)
        assert parts <= 0.02 * max(x.nbytes, X.nbytes // 4) * (2 if function == "mean_var" else 1)


@pytest.mark.usefixtures("nothing_waits")
@pytest.mark.parametrize("case", ["uint8", "bool", "int64", "slice of integers", "mask of x's shape"])
def test_moments_are_one_launch_or_two(counted, case):
    x, options = CASES.get(case, ((X * 1000).astype(np.int16)[:, ::2, 1:-1], {}))
    x, where = on_device((x, options.get("where")))
    for _ in range(2):
        counted(fastbn.moments, x, channel_axis=1, where=where)
        assert counted.kernels in (["strided_statistics"], ["strided_statistics", "finish_strided"])
        assert sum(counted.allocations) <= 3 * 8 * x.shape[1] + 0.05 * x.nbytes
        assert not {"get", "set"} & counted.operations.keys()


@pytest.mark.usefixtures("nothing_waits")
@pytest.mark.parametrize("function", ["mean", "var", "std"])
def test_written_where_it_is_wanted(counted, function):
    """Into `out` of any strides; float16 results of float64 sums are rounded once."""
    x = np.random.default_rng(1).random((50, 6, 7)).astype(np.float32)
    out = on_device(np.zeros((14, 6), np.float32))[::2].T
    counted(getattr(fastbn, function), on_device(x), axis=0, out=out)
    assert (counted.kernels, counted.operations, len(counted.allocations)) == (["strided_statistics"], {}, 0)
    expected = getattr(np, function)(x.astype(float), axis=0)
    np.testing.assert_allclose(host_cupy.to_numpy(out), expected, rtol=1e-6)


def test_float16_results_are_rounded_once(on_cupy):
    """By way of float32 this would be 1, the even one of two halves."""
    above = 1 + 2.0**-11 + 2.0**-40
    assert results_of("mean", np.full(7, above), None)["mean"] == above
    half = judged.fastbn.mean(np.full(7, above), dtype=np.float16)
    assert half == np.float16(1 + 2.0**-10)


def test_every_order_of_threads_gives_the_same_bits(request, monkeypatch):
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    monkeypatch.setattr(strided, "BYTES_OF_PART", 0)
    monkeypatch.setattr(strided, "BATCHES_OF_SPLIT", 0)
    x = np.random.default_rng(2).standard_normal((30, 7, 12)).astype(np.float32)
    for axis in (None, (0, 2), (0, 1)):
        found = set()
        for schedule in range(5):
            with cuda.installed(schedule=schedule):
                mean, var = fastbn.mean_var(host_cupy.to_cupy(x), axis)
                found.add((host_cupy.to_numpy(mean).tobytes(), host_cupy.to_numpy(var).tobytes()))
        assert len(found) == 1


def test_more_dimensions_than_kernels_walk(counted):
    """Ten that do not merge: copied, as other arrays were."""
    x = np.random.default_rng(3).random((4,) * 9).astype(np.float32)[(slice(None, None, 2),) * 9]
    mean = counted(fastbn.mean, on_device(x), axis=None)
    assert counted.kernels[0] == "statistics"
    np.testing.assert_allclose(host_cupy.to_numpy(mean), x.mean(), rtol=1e-6)


# --- division ---------------------------------------------------------------------------------------------------------

DEVICE = launch.Device(0, 90, 132, 227 << 10)
sizes = st.lists(st.sampled_from([1, 2, 3, 5, 8, 30, 64, 500, 3000, 70_000, 1 << 33]), min_size=1, max_size=5)


@given(
    sizes, st.sets(st.integers(0, 4)), st.sampled_from(range(13)), st.sampled_from([0, 1, 2, 8]),
    st.sampled_from([(True, False), (False, True), (True, True)]), st.integers(0, 3),
)  # fmt: skip
def test_divisions(shape, kept, dtype, off, wanted, pad):
    """All vectors are in one split, threads have a place each, parts are 2 % of x."""
    assume(math.prod(shape) < 1 << 50)
    kept = frozenset(kept) & set(range(len(shape)))
    steps = [1]
    for n in shape[:0:-1]:
        steps.insert(0, steps[0] * (n + pad))
    itemsize = (2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1)[dtype]
    d, _ = dimensions(tuple(shape), tuple(steps), (0,) * len(shape), (0,) * len(shape), kept)
    data = strided.Data(tuple(d), dtype, itemsize, off * itemsize % 16, False, False, dtype == 3, *wanted)
    c = strided.divide(data, DEVICE)
    if c is None:
        assert max(shape) > 1 << 31
        return
    assert (c.splits - 1) * c.share < c.vectors <= c.splits * c.share
    channels = c.vector if c.along_kept else 1
    assert c.along * c.beside <= c.threads <= 256
    assert c.threads % 32 == 0
    assert c.along * c.beside * channels % c.width == 0
    assert c.tiles_of_row * c.width >= c.row
    if c.along_kept and c.beside == 1:  # each element of a thread's vectors has one kept index
        assert c.along * c.vector % c.width == c.share * c.vector % c.width == 0
    numbers = strided.fields_of(c)
    assert all(-(1 << 63) <= n < 1 << 63 for n in numbers.values())
    total = math.prod(shape) * itemsize
    parts = c.all_kept * c.splits * 8 * strided._numbers_of_part(data) if c.splits > 1 else 0
    assert parts <= 0.02 * total
