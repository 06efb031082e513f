"""Masks of any shape and layout: of statistics, of `moments` with a count per channel, of `batch_norm` elementwise."""

import warnings

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests import exact as oracle
from tests.statistics import FUNCTIONS, PLAIN, check, report, results_of
from tests.support import NUMBERS, VIEWS, maker, some_slow

by_function = pytest.mark.parametrize("function", some_slow(FUNCTIONS, [*PLAIN, "nanvar"]))
MASKS = {  # of a shape
    "full": lambda shape, rng: rng.random(shape) < 0.7,
    "sparse": lambda shape, rng: rng.random(shape) < 0.1,
    "almost everything": lambda shape, rng: rng.random(shape) < 0.98,
    "last axis": lambda shape, rng: rng.random(shape[-1:]) < 0.7,
    "first axis": lambda shape, rng: rng.random((*shape[:1], *(1 for _ in shape[1:]))) < 0.7,
    "all but the first": lambda shape, rng: rng.random((1, *shape[1:])) < 0.7,
    "alternate axes": lambda shape, rng: rng.random([1 if k % 2 else n for k, n in enumerate(shape)]) < 0.7,
    "Fortran": lambda shape, rng: np.asfortranarray(rng.random(shape) < 0.7),
    "steps": lambda shape, rng: (rng.random((*shape[:-1], 2 * shape[-1])) < 0.7)[..., ::2],
    "backwards": lambda shape, rng: (rng.random(shape) < 0.7)[(slice(None, None, -1),) * len(shape)],
    "transposed": lambda shape, rng: (rng.random(shape[::-1]) < 0.7).T,
    "one byte off": lambda shape, rng: (rng.random(int(np.prod(shape)) + 1) < 0.7)[1:].reshape(shape),
    "stride 0": lambda shape, rng: np.broadcast_to(rng.random(shape[-1:]) < 0.7, shape),
    "everything": lambda shape, rng: np.ones(shape, bool),
}
SOME_VIEWS = [
    "1-d", "1-d every third", "2-d", "2-d tall", "2-d Fortran", "2-d columns", "3-d channels reversed", "4-d",
    "4-d transposed", "4-d positions", "4-d steps", "4-d of stride 0", "4-d windows", "5-d inner slices",
]  # fmt: skip


@by_function
def test_masks(function):
    """Each mask beside each view, for some of the functions."""
    check_masks("float32", function, of=3)


@pytest.mark.slow
@by_function
@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_mask(dtype, function):
    check_masks(dtype, function, of=1)


NO_DATA = {"float16": -65504.0, "float32": -3.4028235e38, "float64": 9.969209968386869e36}
LEFT_OUT = [
    ((6, 40), 1), ((40, 6), 0), ((3, 4, 5, 7), (0, 2, 3)), ((5000,), None), ((2, 3000), 1), ((5, 700), 0),
    ((300, 49), 1), ((90, 98), 1), ((80, 10), 1),
]  # fmt: skip


def check_masks(dtype, function, of):
    """Of slices in which something is left; what is left out is NaN."""
    failures = []
    for i, view in enumerate(SOME_VIEWS):
        x = VIEWS[view](maker(dtype))
        for k, (name, mask) in enumerate(MASKS.items()):
            if (i + k + FUNCTIONS.index(function)) % of:
                continue
            where = mask(x.shape, np.random.default_rng(k))
            axis = (None, 0, tuple(range(1, x.ndim)) or 0, -1, tuple(range(0, x.ndim, 2)))[k % 5]
            exact = oracle.exact(x, axis, where)
            if (exact.count > 0).all():
                check(failures, f"{view} {x.strides}, {name}", function, x, exact, axis=axis, where=where)
    report(failures)


PIXELS = [
    ((31, 9, 3), (0, 1)),
    ((40, 50, 3), (0, 1)),
    ((40, 50, 12), (0, 1)),
    ((13, 21, 4), (0, 1)),
    ((5, 40, 30, 2), (1, 2)),
]
SHORT_ROWS = [((70, 3), 1), ((70, 10), 1), ((53, 33), 1), ((41, 100), 1), ((20, 260), 1), ((19, 5, 7), (1, 2))]


@by_function
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "float16", "int16"], ["float32"]))
def test_pixels_and_short_rows(dtype, function):
    """Masks of a pixel's channels together, and those of a few values a kept index, which are read eight at once."""
    failures = []
    for shape, axis in [*PIXELS, *SHORT_ROWS]:
        x, rng = maker(dtype)(shape), np.random.default_rng(len(failures))
        masks = {"pixels": (*shape[:-1], 1), "all": shape, "last axis": shape[-1:]}
        for name, of in masks.items():
            where = rng.random(of) < 0.7
            if of[-1] > 1:
                where[..., 0] |= ~where.any(axis=-1)
            backwards = x[::-1], where[::-1] if name != "last axis" else where
            steps = x[..., ::2], where[..., ::2].copy()
            for seen, mask in (x, where), backwards, steps:
                exact = oracle.exact(seen, axis, mask)
                if (exact.count > 0).all():
                    check(failures, f"{shape} {axis}, {name}", function, seen, exact, axis=axis, where=mask)
    report(failures)


@pytest.mark.parametrize("n", [3, 10, 33, 100])
def test_short_rows_left_out_whole(n):
    """A mask of kept indices alone: the others have the results that they have without one."""
    x, where = maker("float32")((70, n)), np.random.default_rng(n).random((70, 1)) < 0.7
    kept = where[:, 0]
    for function in (fastbn.mean, fastbn.var):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of empty slices
            found = function(x, axis=1, where=where)
        np.testing.assert_allclose(found[kept], function(x, axis=1)[kept], rtol=1e-6)
        assert np.isnan(found[~kept]).all()


@by_function
@pytest.mark.parametrize("dtype", some_slow(["float16", "float32", "float64"], ["float32"]))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of slices without values
def test_what_is_left_out_is_not_seen(dtype, function):
    """NaN, infinities and the numbers that stand for no data change no bit under the mask."""
    for shape, axis in LEFT_OUT:
        x = maker(dtype)(shape)
        where = np.random.default_rng(1).random(shape) < 0.6
        expected = results_of(function, x, axis, where=where)
        for bad in (np.nan, np.inf, -np.inf, NO_DATA[dtype]):
            found = results_of(function, np.where(where, x, bad).astype(x.dtype), axis, where=where)
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{shape}, {bad}")


@pytest.mark.parametrize("dtype", some_slow(["float16", "float32", "float64"], ["float32"]))
@pytest.mark.parametrize("of", ["values", "rows"])
def test_what_weighs_nothing_is_not_seen(dtype, of):
    """The same, of weights."""
    for shape, axis in LEFT_OUT:
        x, rng = maker(dtype)(shape), np.random.default_rng(1)
        rows = (*shape[:1], *[1] * (len(shape) - 1)) if axis in (0, (0, 2, 3)) else shape
        weights = rng.random(shape if of == "values" else rows) * (rng.random(shape if of == "values" else rows) < 0.7)
        weights.flat[0], weights.flat[-1] = 0, 1
        fills = np.where(np.broadcast_to(weights, shape) > 0, x, NO_DATA[dtype]).astype(x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for w in (weights, weights.astype(np.float32)):
                for found, expected in zip(*(fastbn.mean_var(a, axis, weights=w) for a in (fills, x)), strict=True):
                    np.testing.assert_array_equal(found, expected, err_msg=f"{shape}")


@pytest.mark.parametrize("counted", [1, 7, 8, 9, 33, 49, 98])
def test_no_data_first(counted):
    """However many of the first values do not count, the variance is as exact as without them."""
    rng = np.random.default_rng(0)
    for dtype, fill in ((np.float32, -3.4028235e38), (float, 9.969209968386869e36), (float, 1e60)):
        x = (rng.standard_normal((700, 100)) + 3).astype(dtype)
        x[:, : 100 - counted] = fill
        where = np.zeros(x.shape, bool)
        where[:, 100 - counted :] = True
        wide = x[:, 100 - counted :].astype(np.longdouble)
        for a, mask, axis in ((x, where, 1), (np.asfortranarray(x), where, 1), (x.T.copy(), where.T.copy(), 0)):
            expected = (wide.var(1)).astype(dtype)
            limit = 1e-6 if dtype is np.float32 else 1e-12
            np.testing.assert_allclose(fastbn.var(a, axis, where=mask), expected, rtol=limit)
            weighted = fastbn.mean_var(a, axis, weights=mask.astype(dtype))[1]
            np.testing.assert_allclose(weighted, expected, rtol=limit)


@by_function
def test_the_mask_is_read_at_every_call(function):
    """Of two masks of one signature, and of one that has changed."""
    x, masks = maker("float32")((30, 8)), np.random.default_rng(2).random((3, 30, 8)) < 0.5
    for where in masks:
        (name, actual), *_ = [(n, a) for n, a in results_of(function, x, 0, where=where).items() if n != "count"]
        expected = [results_of(function, x[where[:, c], c][:, None], 0)[name][0] for c in range(8)]
        np.testing.assert_allclose(actual, expected, rtol=3e-7)
    where = masks[0].copy()
    first = results_of(function, x, 0, where=where)
    where[...] = masks[1]
    second, expected = results_of(function, x, 0, where=where), results_of(function, x, 0, where=masks[1])
    for name in first:
        np.testing.assert_array_equal(second[name], expected[name])
        assert (np.asarray(first[name]) != second[name]).any()


@by_function
def test_bytes_that_are_not_0_or_1(function):
    """A bool array may hold other bytes, which NumPy takes for True."""
    x = maker("float32")((9, 70))
    odd = np.where(np.random.default_rng(3).random(x.shape) < 0.5, 2, 0).astype(np.uint8).view(bool)
    for axis in (None, 0, 1):
        found, expected = (results_of(function, x, axis, where=w) for w in (odd, odd.view(np.uint8) > 0))
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


@by_function
@pytest.mark.parametrize("dtype", some_slow(["float32", "float64", "int16"], ["float32"]))
def test_slices_of_which_nothing_is_left(dtype, function):
    """NaN, and one warning; `moments` counts 0."""
    for shape, axis in (((7, 50), 1), ((50, 7), 0), ((4, 7, 9), (0, 2))):
        x, kept = maker(dtype)(shape), 7
        where = np.random.default_rng(4).random(shape) < 0.8
        np.moveaxis(where, shape.index(kept), 0)[[0, 3]] = False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = results_of(function, x, axis, where=where)
        for name, value in results.items():
            empty = [0, 3]
            if name == "count":
                assert (value[empty] == 0).all()
            elif name != "m2":
                assert np.isnan(value[empty]).all()
                assert not np.isnan(np.delete(value, empty)).any()
        texts = [str(w.message).rstrip(".") for w in caught]
        of_mean, of_var = "Mean of empty slice", "Degrees of freedom <= 0 for slice"
        kinds = {"mean": [of_mean], "nanmean": [of_mean], "moments": [], "mean_var": [of_mean, of_var]}
        assert texts == kinds.get(function, [of_var])


def test_masks_of_large_arrays():
    """Of several threads and chunks, the same bits on any number."""
    rng = np.random.default_rng(5)
    for shape, axis in (((1_500_001,), None), ((3, 400_001), 1), ((400_001, 3), 0), ((8, 16, 60, 70), (0, 2, 3))):
        x = (rng.standard_normal(shape) + 3).astype(np.float32)
        for where in (
            rng.random(shape) < 0.5,
            rng.random(shape[-1:]) < 0.5 if shape[-1] > 3 else rng.random(shape) < 0.9,
        ):
            mean, var = np.mean(x, axis, dtype=float, where=where), np.var(x, axis, dtype=float, where=where)
            for function in PLAIN:
                expected = None
                for threads in (1, 2, 3):
                    with fastbn.threads.num_threads(threads):
                        results = results_of(function, x, axis, where=where)
                    expected = expected or results
                    for name in results:
                        np.testing.assert_array_equal(results[name], expected[name])
                wanted = {"mean": mean, "var": var, "std": np.sqrt(var)}
                for name in {"mean", "var", "std"} & set(results):
                    np.testing.assert_allclose(results[name], wanted[name], rtol=1.3e-7 if name == "mean" else 1.1e-6)


# --- moments and batch_norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [((6, 5), 1), ((4, 3, 5, 7), 1), ((4, 5, 7, 3), -1), ((2, 3, 4, 5), (0, 1)), ((2, 9, 1000), 1), ((900, 33), 1)],
    ids=str,
)
def test_moments_with_a_count_of_each_channel(shape, channel_axis, dtype):
    x, where = maker(dtype)(shape), np.random.default_rng(6).random(shape) < 0.6
    found, expected = (m.moments(x, channel_axis=channel_axis, where=where) for m in (fastbn, reference))
    np.testing.assert_array_equal(found.count, expected.count)
    wide = np.dtype(x.dtype).itemsize == 8
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14 if wide else 2e-7)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-12 if wide else 1e-6)


def placed_like(x, order):
    return (
        np.asfortranarray(x)
        if order == "F"
        else np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)
        if order == "last"
        else x
    )


def test_a_mask_of_a_number_that_is_not_aligned():
    number = np.frombuffer(b"..\x07\x00.", np.uint8)[1:3].view(np.uint16).reshape(())
    assert not number.flags.aligned or number.ctypes.data % 2 == 0
    found = fastbn.moments(number, channel_axis=(), where=np.array(True))
    assert (found.count, found.mean, found.m2) == (1.0, float(number), 0.0)
