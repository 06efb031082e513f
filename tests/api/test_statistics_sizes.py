"""Statistics of arrays of any size: lengths around every width of a kernel, the same bits on any number of threads."""

import ctypes
import itertools
import mmap
import sys

import numpy as np
import pytest

import fastbn
from tests import exact as oracle
from tests.statistics import FUNCTIONS, report, results_of
from tests.support import NUMBERS, VIEWS, maker, some_slow

by_function = pytest.mark.parametrize("function", FUNCTIONS)
by_sum = pytest.mark.parametrize(
    "function", some_slow(["mean", "var", "mean_var", "nanmean", "nanvar"], ["mean", "var"])
)


def expected_of(x, axis):
    """Mean, variance and mean magnitude, with kept dimensions, summed in extended precision: of moderate values.

    Integers of 64 bits become float64 first, as in the kernels.
    """
    wide = x.astype(float if x.dtype.itemsize == 8 else np.longdouble).astype(np.longdouble)
    mean = wide.mean(axis, keepdims=True)
    return mean, np.square(wide - mean).mean(axis, keepdims=True), np.abs(wide).mean(axis, keepdims=True)


def compare(failures, label, function, x, axis, expected, **options):
    mean, var, magnitude = expected
    wide = x.dtype.kind in "iub" or x.dtype.itemsize == 8
    of_mean, of_var = oracle.MEAN["float64" if wide else "float32"], oracle.SPREAD["float64" if wide else "float32"]
    if function in ("moments", "mean_var") and not wide:
        of_mean = 1e-7
    count = options["where"].sum() if options else x.size // mean.size
    wanted = {
        "mean": (mean, magnitude, of_mean),
        "var": (var, var, of_var),
        "std": (np.sqrt(var), np.sqrt(var), of_var),
        "m2": (var * count, var * count, of_var),
        "count": (np.full(mean.shape, count), 0, 0),
    }
    for name, actual in results_of(function, x, axis, **options).items():
        value, scale, relative = wanted[name]
        beyond = oracle.excess(
            np.reshape(actual, mean.shape), *(np.asarray(a, float) for a in (value, scale)), relative
        )
        if (beyond > 0).any():
            worst = int(np.argmax(beyond))
            failures.append(f"{label}: {name}[{worst}] {np.ravel(actual)[worst]!r}, expected {np.ravel(value)[worst]}")


LENGTHS = [
    *range(1, 35), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 255, 256, 257, 383, 511, 512, 513, 1000,
    1023, 1024, 1025, 2047, 2048, 2049, 3333, 4095, 4096, 4097, 8191, 8193, 16385, 32769, 70_001,
]  # fmt: skip
SOME_DTYPES = some_slow(NUMBERS, ["float32", "uint8"])
SOME_SIZES = some_slow(["float32", "float64", "float16", "uint8", "int16", "int32", "int64"], ["float32", "uint8"])
by_some = pytest.mark.parametrize("function", some_slow(["mean", "var", "nanvar"], ["mean", "var"]))


@by_sum
@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_lengths_of_a_row(dtype, function):
    """Of one row, from any element on; of rows side by side."""
    line, failures = maker(dtype)((72_017,)), []
    for n in LENGTHS:
        first = n % 16
        x = line[first : first + n]
        compare(failures, f"row of {n} from {first}", function, x, None, expected_of(x, None))
    for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 100, 255, 257, 1023):
        x = line[: 21 * n].reshape(21, n)
        compare(failures, f"21 rows of {n}", function, x, 1, expected_of(x, 1))
        x = line[: 23 * (n + 3)].reshape(23, n + 3)[:, 1:-2]
        compare(failures, f"23 slices of {n}", function, x, 1, expected_of(x, 1))
        compare(failures, f"all of 23 slices of {n}", function, x, None, expected_of(x, None))
    report(failures)


@by_sum
@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_numbers_of_columns(dtype, function):
    """Few and many columns, few and many rows, slices of columns."""
    line, failures = maker(dtype)((72_017,)), []
    for columns in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 100, 127, 129, 250, 513, 1031):
        for rows in {1, 2, 3, 9, 33, 68 if columns > 500 else 257}:
            x = line[: rows * columns].reshape(rows, columns)
            compare(failures, f"{rows} x {columns}", function, x, 0, expected_of(x, 0))
        x = line[: 30 * (columns + 2)].reshape(30, columns + 2)[::2, 1:-1]
        compare(failures, f"every second row of {columns}", function, x, 0, expected_of(x, 0))
    report(failures)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_few_columns_of_few_rows(dtype):
    """Rows are folded then, and lanes behind the last column hold sums of others."""
    failures = []
    for columns in (2, 3, 5, 6, 7, 11):
        for rows in (*range(5, 30), 61):
            x = maker(dtype, seed=rows)((rows, columns))
            compare(failures, f"{rows} x {columns}", "mean_var", x, 0, expected_of(x, 0))
    report(failures)


@by_sum
@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_middle_axes(dtype, function):
    line, failures = maker(dtype)((72_017,)), []
    for shape in (
        (3, 40, 17),
        (2, 9, 300),
        (50, 3, 2),
        (7, 64, 1),
        (4, 1, 33),
        (1, 513, 5),
        (17, 16, 16),
        (2, 700, 40),
    ):
        x = line[: np.prod(shape)].reshape(shape)
        for axis in (1, (0, 2), (0, 1), (1, 2)):
            compare(failures, f"{shape} over {axis}", function, x, axis, expected_of(x, axis))
            turned = x.transpose(2, 0, 1)
            compare(failures, f"{shape} turned over {axis}", function, turned, axis, expected_of(turned, axis))
    report(failures)


@by_sum
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "float16", "int32"], ["float32"]))
def test_short_rows_beside_each_other(dtype, function):
    """Of small images: a kept index has neighbouring columns, of which some are looked at for a shift."""
    line, failures = maker(dtype)((300_017,)), []
    for images, channels in ((8, 9), (11, 1), (13, 3), (40, 17)):
        for size in (2, 3, 7, 8, 9, 11, 12, 13, 16, 17, 24, 31, 32, 33, 49, 65, 127, 128, 130, 300):
            x = line[: images * channels * size].reshape(images, channels, size)
            compare(failures, f"{x.shape}", function, x, (0, 2), expected_of(x, (0, 2)))
    report(failures)


@by_some
@pytest.mark.parametrize("dtype", SOME_SIZES)
def test_rows_of_few_values(dtype, function):
    """Eight rows are read at once; some begin far from their mean, of which the shift is made."""
    line, failures = maker(dtype)((72_017,)), []
    for n in range(2, 41):
        for rows in (8, 21):
            x = line[: rows * n].reshape(rows, n).copy()
            compare(failures, f"{rows} rows of {n}", function, x, 1, expected_of(x, 1))
            x[1::3, 0] = x.max() if x.dtype.kind == "b" else 100
            compare(failures, f"{rows} rows of {n}, the first value far", function, x, 1, expected_of(x, 1))
    for shape in ((16, 3, 5), (19, 4, 11), (33, 7, 2)):
        x = line[: np.prod(shape) * 2].reshape(shape[0], 2 * shape[1], shape[2])[:, ::2]
        compare(failures, f"{shape}, every second row", function, x, (1, 2), expected_of(x, (1, 2)))
    report(failures)


@by_some
@pytest.mark.parametrize("dtype", SOME_SIZES)
@pytest.mark.parametrize("step", [2, 3, 4, 5, -1, -2, -3])
def test_values_apart(step, dtype, function):
    """One row, and rows, of every so many values."""
    line, failures = maker(dtype)((72_017,)), []
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 33, 100, 601, 3000):
        x = line[::step][:n]
        compare(failures, f"{n} values", function, x, None, expected_of(x, None))
        x = line[: 12 * n * abs(step)].reshape(12, n * abs(step))[:, ::step] if 12 * n * abs(step) < 70_000 else None
        if x is not None:
            compare(failures, f"12 rows of {n}", function, x, 1, expected_of(x, 1))
    report(failures)


@by_some
@pytest.mark.parametrize("dtype", SOME_SIZES)
def test_masks_of_rows(dtype, function):
    """Four rows are read at once, of those that count."""
    line, failures, draw = maker(dtype)((72_017,)), [], np.random.default_rng(5)
    for rows, columns in ((5, 3), (8, 40), (67, 33), (200, 129), (4001, 9)):
        x = line[: rows * columns].reshape(rows, columns)
        place = np.arange(rows)
        for name, counts in {
            "one": place == rows - 1,
            "first": place < 0.3 * rows,
            "last": place > 0.6 * rows,
            "some": draw.random(rows) < 0.5,
            "all": place >= 0,
        }.items():
            label, expected = f"{name} of {rows} x {columns}", expected_of(x[counts], 0)
            compare(failures, label, function, x, 0, expected, where=counts[:, None])
    report(failures)


@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "int32"], ["float32"]))
@pytest.mark.parametrize("what", some_slow(["mean", "var", "weights"], ["mean", "var"]))
def test_masks_of_several_rows(dtype, what):
    """Few rows may be taken as one, each with a byte or a weight of its own: of wide rows two or three, or none."""
    draw, make = np.random.default_rng(7), maker(dtype)
    for a, b in itertools.product((1, 5, 16), (3, 4, 12, 20, 28)):
        for c in (33, 129, 200, 228, 300, 341, 512, 700, 1024, 1500):
            x, counts = make((a, b, c)), draw.random((1, b, 1)) < 0.7
            counts[0, 0] = True
            kept = np.broadcast_to(counts[0, :, 0], (a, b))
            mean, var, magnitude = expected_of(x[kept], 0)
            if what == "mean":
                found, expected, limit = fastbn.mean(x, (0, 1), where=counts), mean[0], 1e-6 * magnitude[0]
            elif what == "var":
                found, expected, limit = fastbn.var(x, (0, 1), where=counts), var[0], 1e-5 * var[0]
            else:
                found, expected = fastbn.mean_var(x, (0, 1), weights=counts.astype("f4"))[1], var[0]
                limit = 1e-5 * var[0]
            assert (abs(found - expected) <= limit).all(), f"{x.shape}"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as Linux does it")
@pytest.mark.parametrize("function", ["mean", "var", "nanvar"])
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "float16", "uint8", "int32"], ["float32", "uint8"]))
def test_nothing_is_read_beside_an_array(dtype, function):
    """Memory ends where the array does, and begins there: the bits are those of a copy."""
    page, make = mmap.PAGESIZE, maker(dtype)
    memory = mmap.mmap(-1, 18 * page)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    protect(place, page, 0)
    protect(place + 17 * page, page, 0)
    inside = np.frombuffer(memory, dtype, 16 * page // np.dtype(dtype).itemsize, page)
    inside[:] = make((inside.size,))
    try:
        for rows, n, step in itertools.product(
            (1, 3, 8, 20), (1, 2, 3, 5, 7, 8, 11, 16, 19, 31, 40), (1, 2, 3, 4, -1, -2)
        ):
            for near in (inside[-(rows * n * abs(step)) :], inside[: rows * n * abs(step)]):
                # The last value of a row is its last one in memory, or for negative steps its first one in x.
                first = step - 1 if step > 1 else None
                x, other = (a.reshape(rows, n * abs(step))[:, first::step] for a in (near, near.copy()))
                for axis in (0, 1, None):
                    label = rows, n, step, axis
                    assert bits(results_of(function, x, axis)) == bits(results_of(function, other, axis)), label
    finally:
        protect(place, page, 3)
        protect(place + 17 * page, page, 3)


LARGE = {
    "one row": ((3_000_001,), (None,)),
    "long rows": ((5, 400_003), (1, None)),
    "many rows": ((3100, 700), (1, 0)),
    "tall": ((600_001, 3), (0,)),
    "short rows": ((90_001, 7), (1,)),
    "columns": ((2000, 1031), (0,)),
    "NCHW": ((8, 16, 65, 67), ((0, 2, 3), (2, 3), 1)),
    "NHWC": ((8, 65, 67, 16), ((0, 1, 2), (1, 2), 3)),
    "slice": ((8, 16, 65, 80), ((0, 2, 3), (1, 2, 3))),
}


def large(name, dtype):
    shape, axes = LARGE[name]
    x = maker(dtype)(shape)
    return (x[:, :, 1:-1, 2:-3] if name == "slice" else x), axes


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    "dtype", some_slow(["float32", "uint8", "float64", "float16", "int32", "int64"], ["float32", "uint8"])
)
def test_large_arrays(dtype, name):
    """Of several chunks and threads. What is expected is summed once for all functions."""
    x, axes = large(name, dtype)
    failures = []
    for axis in axes:
        expected = expected_of(x, axis)
        for function in FUNCTIONS:
            if hasattr(fastbn, function):
                compare(failures, f"{function} over {axis}", function, x, axis, expected)
    report(failures)


def bits(results):
    return {name: np.asarray(value).tobytes() for name, value in results.items()}


@pytest.mark.parametrize("function", ["mean", "mean_var", "nanmean", "nanvar"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("uint8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_on_any_number_of_threads(name, dtype, function):
    x, axes = large(name, dtype)
    for axis in axes[:2]:
        expected = None
        for threads in (1, 2, 3, 1):
            with fastbn.threads.num_threads(threads):
                found = bits(results_of(function, x, axis))
                assert found == bits(results_of(function, x, axis))  # from the second call on without checks
            expected = expected or found
            assert found == expected, f"{threads} threads, axis {axis}"


@by_function
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "float16", "uint8", "int64"], ["float32", "uint8"]))
def test_the_same_bits_wherever_an_array_lies(dtype, function):
    """A copy of the same memory order, at another address, read-only or a memory map."""
    for view in ("1-d", "2-d Fortran", "3-d transposed", "4-d", "4-d transposed", "5-d"):
        x = VIEWS[view](maker(dtype))
        for axis in (None, 0, tuple(range(1, x.ndim))):
            expected = bits(results_of(function, x, axis))
            for first in (1, 3, 8):
                order = np.argsort([-s for s in x.strides], kind="stable")
                buffer = np.empty(x.size + first, x.dtype)[first:]
                other = buffer.reshape([x.shape[a] for a in order]).transpose(np.argsort(order))
                other[...] = x
                other.flags.writeable = False
                assert other.strides == x.strides
                assert bits(results_of(function, other, axis)) == expected, (view, axis, first)
