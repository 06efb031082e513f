"""Every statistic of every dtype, layout and choice of axes against exact arithmetic.

`mean`, `var`, `std`, their nan forms, `mean_var` and `moments` alike. A test goes over many views and
lists the failures.
"""

import functools
import itertools

import numpy as np
import pytest

import fastbn
from tests import exact as oracle
from tests.statistics import FUNCTIONS, PLAIN, check, problems, report, results_of
from tests.support import DTYPES, NUMBERS, VIEWS, maker, some_slow, subsets_of_axes

by_function = pytest.mark.parametrize("function", FUNCTIONS)


def quick(dtype, function):
    """All functions of some floats and of a narrow and a wide integer, one of some others.

    Each dtype has kernels of its own, as have those that leave out NaN.
    """
    if function.startswith("nan"):
        return dtype in ("float32", "uint8")
    return dtype in ("float32", "float64", "float16", "uint8", "int64") or (dtype, function) in (
        ("bfloat16", "mean_var"), ("int16", "mean_var"), ("uint32", "mean_var")
    )  # fmt: skip


def by_dtype_and_function(dtypes=NUMBERS, functions=FUNCTIONS):
    cases = [
        pytest.param(dtype, function, marks=[] if quick(dtype, function) else pytest.mark.slow)
        for dtype, function in itertools.product(dtypes, functions)
    ]
    return pytest.mark.parametrize(("dtype", "function"), cases)


@functools.cache
def seen(view, dtype):
    return VIEWS[view](maker(dtype))


@functools.cache
def exactly(view, dtype, axis):
    return oracle.exact(seen(view, dtype), axis)


def some_axes(ndim):
    """Each axis, its complement, ends, all."""
    every = subsets_of_axes(ndim)
    if ndim <= 3:
        return every
    chosen = {(), tuple(range(ndim)), tuple(range(0, ndim, 2)), tuple(range(1, ndim, 2)), (1, 2), (ndim - 2, ndim - 1)}
    chosen |= {(axis,) for axis in range(ndim)} | {tuple(a for a in range(ndim) if a != axis) for axis in (1, ndim - 1)}
    return [None, *sorted(chosen)]


WRONG = {
    "value": lambda result: result * np.float32(1 + 3e-6),
    "one value": lambda result: result + np.float32(1e-3) * (np.arange(result.size).reshape(result.shape) == 2),
    "dtype": lambda result: result.astype(np.longdouble),
    "shape": lambda result: result[None],
    "type": lambda result: result.view(np.recarray),
    "nan": lambda result: result * np.float32(np.nan),
}


@by_function
@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_can_fail(wrong, function, monkeypatch):
    x, right = seen("3-d", "float32"), getattr(fastbn, function)
    assert not list(problems(function, x, oracle.exact(x, 1), axis=1))

    def changed(*arguments, **options):
        results = right(*arguments, **options)
        if isinstance(results, tuple):
            change = [WRONG[wrong](result) for result in results]
            return type(results)(*change) if function == "moments" else tuple(change)
        return WRONG[wrong](results)

    monkeypatch.setattr(fastbn, function, changed)
    assert list(problems(function, x, oracle.exact(x, 1), axis=1))


# --- the matrix -------------------------------------------------------------------------------------------------------


def share_of_views(dtype, function):
    """Every view of float32 and uint8, of each way to sum; of other dtypes a part of them, each its own."""
    views = list(VIEWS)
    parts = {"std": 4, "nanstd": 4, "moments": 4}.get(function, 1 if dtype in ("float32", "uint8") else 3)
    return views[(NUMBERS.index(dtype) + FUNCTIONS.index(function)) % parts :: parts]


@by_dtype_and_function()
def test_views(dtype, function):
    failures = []
    for view in share_of_views(dtype, function):
        x = seen(view, dtype)
        for axis in some_axes(x.ndim):
            check(failures, f"{view} {x.shape} {x.strides}", function, x, exactly(view, dtype, axis), axis=axis)
    report(failures)


@pytest.mark.slow
@by_function
@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_choice_of_axes(dtype, function):
    failures = []
    for view in VIEWS:
        x = seen(view, dtype)
        for axis in subsets_of_axes(x.ndim):
            for keepdims in (False, True) if function != "moments" else (False,):
                label = f"{view} {x.shape} {x.strides}"
                check(failures, label, function, x, exactly(view, dtype, axis), axis=axis, keepdims=keepdims)
    report(failures)


@by_dtype_and_function(functions=[f for f in FUNCTIONS if f not in ("mean_var", "moments")])
def test_a_dtype_of_the_result(dtype, function):
    """float64 is good to float64 whatever x is; narrower ones are one rounding."""
    failures = []
    for view in ("1-d", "2-d tall", "4-d", "4-d positions transposed", "4-d steps", "4-d windows", "4-d big-endian"):
        x = seen(view, dtype)
        for wanted in ("float64", "float32", "float16"):
            for axis in (None, 0, tuple(range(1, x.ndim))):
                check(failures, view, function, x, exactly(view, dtype, axis), axis=axis, dtype=wanted)
    report(failures)


@by_dtype_and_function()
def test_ddof_and_kept_dimensions(dtype, function):
    failures = []
    for view in ("1-d backwards", "2-d one column", "4-d positions", "4-d of stride 0", "5-d transposed"):
        x = seen(view, dtype)
        for axis in (-1, tuple(range(0, x.ndim, 2))):
            exact = exactly(view, dtype, axis)
            for ddof in (0, 1, 1.5) if function not in ("mean", "nanmean", "moments") else (0,):
                for keepdims in (False, True) if function != "moments" else (False,):
                    if not (exact.count - ddof <= 0).any():
                        check(failures, view, function, x, exact, axis=axis, ddof=ddof, keepdims=keepdims)
    report(failures)


@by_function
def test_longdouble_is_numpys(function):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 6, 9)) * 2 + 3).astype(np.longdouble)[:, ::-1, 1::2]
    if function == "moments":
        np.testing.assert_allclose(fastbn.moments(x).mean, x.mean((0, 2)), rtol=1e-15)
        return
    for axis in (None, 0, (0, 2)):
        expected = (np.mean(x, axis), np.var(x, axis)) if function == "mean_var" else getattr(np, function)(x, axis)
        actual = getattr(fastbn, function)(x, axis)
        np.testing.assert_array_equal(actual, expected, strict=True)


# --- values -----------------------------------------------------------------------------------------------------------


@by_function
@pytest.mark.parametrize("dtype", some_slow(["int64", "uint64", "int32", "uint8"], ["int64", "uint8"]))
def test_integers_at_the_ends_of_their_range(dtype, function):
    info = np.iinfo(dtype)
    big, tenth = info.max, info.max // 10
    failures = []
    for values in (
        [big] * 21, [big, big - 1] * 40, [info.min, big] * 33, [info.min] * 19, [big, 0, 0, 1] * 9,
        list(range(big - 99, big + 1)), [tenth * k for k in range(11)],
    ):  # fmt: skip
        row = np.array(values, dtype)
        for x, axis in ((row, 0), (np.stack([row, row[::-1]], 1), 0), (np.stack([row, row]), 1)):
            exact = oracle.exact(x, axis)
            spread = np.all(exact.var() > 1e-4 * exact.mean**2)  # more than 64 bits lose when they become float64
            if spread or function in ("mean", "nanmean"):
                check(failures, f"{values[:3]}.. x {len(values)}", function, x, exact, axis=axis)
    report(failures)


@by_dtype_and_function()
def test_constants(dtype, function):
    """The mean is the value, the variance 0, exactly."""
    kind = np.dtype(maker(dtype)(()).dtype)
    values = {"b": [True], "u": [3, 251], "i": [-77, 101]}.get(kind.kind, [0.1, -7.3, 6e4, 1e-3])
    shapes = (1,), (7,), (1000,), (40_000,), (33, 5), (5, 700), (3, 4, 31)
    for value, shape in itertools.product(values, shapes):
        x = np.full(shape, value, kind)
        for axis in (None, 0, -1):
            for name, actual in results_of(function, x, axis).items():
                if name != "count":
                    expected = np.broadcast_to(x.flat[0] if name == "mean" else 0, np.shape(actual))
                    np.testing.assert_array_equal(actual, expected, err_msg=f"{name} of {value}, axis {axis}")


SETS = {  # of more digits than float32 has; means far from 0, as in NIST's
    "small spread": 1e6 + np.tile([0.2, 0.1, 0.3], 341)[:1001],
    "many digits": 1e9 + np.arange(500) * 0.1,
    "ramp": np.linspace(-1.0, 3.0, 999),
    "powers": 2.0 ** np.arange(-60, 61),
    "alternating": np.tile([1e8 + 1, -1e8], 300) + 5e8,
    "lottery": np.random.default_rng(0).integers(0, 999, 218).astype(float),
}


@pytest.mark.parametrize("function", some_slow(FUNCTIONS, PLAIN))
@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_float64_to_15_digits(values, function):
    failures = []
    for x, axis in (
        (values, None), (values[::-1], 0), (np.repeat(values, 3)[1::3], 0), (np.stack([values, 2 * values], 1), 0),
        (np.stack([values, values]), 1), (np.stack([values] * 40, 1), 0),
    ):  # fmt: skip
        exact = oracle.exact(x, axis)
        results = results_of(function, x, axis)
        for name in {"mean", "var", "std"} & set(results):
            expected = exact.mean if name == "mean" else getattr(exact, name)()
            error = np.max(np.abs(np.ravel(results[name]) / expected.ravel() - 1))
            # moments are those of batch_norm, whose mean is made of distances from another one.
            of_mean = 4e-15 if function == "moments" else 1e-15
            if error > (of_mean if name == "mean" else 1e-13):
                failures.append(f"{name} {x.shape}: relative error {error}")
    report(failures)


FINITE = [1.0, -2.5, 3.0, 7.25, 0.5]
SPECIAL = {
    "nan": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "both infinities": [np.inf, -np.inf],
    "inf and nan": [np.inf, np.nan],
    "infs": [np.inf] * 3,
}


@functools.cache
def spoilt(special, dtype, skip):
    """Rows and columns, of which one has special values at the front, within, or at the end; exactly."""
    cases = []
    for n in (6, 41, 300):
        for place in (0, n // 3, n - len(SPECIAL[special])):
            rows = np.resize(FINITE, (3, n)).astype(maker(dtype)(()).dtype)
            rows[1, place : place + len(SPECIAL[special])] = SPECIAL[special]
            for x, axis in ((rows, 1), (np.ascontiguousarray(rows.T), 0), (rows, None)):
                cases.append((f"{n}, {place}", x, axis, oracle.exact(x, axis, skip_nan=skip)))
    return cases


@by_dtype_and_function(DTYPES)
@pytest.mark.parametrize("special", SPECIAL)
def test_not_finite(special, dtype, function):
    """Other slices are not touched."""
    failures = []
    for label, x, axis, exact in spoilt(special, dtype, function.startswith("nan")):
        check(failures, label, function, x, exact, axis=axis)
    report(failures)


@by_dtype_and_function(DTYPES)
def test_huge_values(dtype, function):
    """Infinite only where the exact value is beyond the result's dtype, or a sum beyond float64."""
    dtype = maker(dtype)(()).dtype
    largest = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38, "float64": 1.7e308}[dtype.name]
    failures = []
    for shares in ([1], [1, 0.5], [1, -1], [1, -1, 1], [0, 0, 1], [1, 0.99, 0.98], [-1, -0.5, -0.75], [0.9, 1e-5]):
        row = (np.resize(shares, 24) * largest).astype(dtype)
        for x, axis in ((row, None), (np.stack([row, row], 1), 0), (np.stack([row, row]), 1)):
            exact = oracle.exact(x, axis)
            if dtype.name == "float64":
                with np.errstate(over="ignore", invalid="ignore"):
                    infinite = ~np.isfinite(np.sum(x, axis))
                if np.any(infinite) or (np.max(np.abs(x)) > 1e150 and function in ("moments", "mean_var")):
                    continue
            with np.errstate(over="ignore"):
                check(failures, f"{shares}", function, x, exact, axis=axis)
    report(failures)


@by_function
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-130, 2.0**-126], ids=["1", "512", "5e5", "normal"])
def test_subnormal_float32(scale, function):
    """Means of subnormal numbers are rounded as numbers; their squares are below float32."""
    if function in ("var", "nanvar"):
        function = {"var": "std", "nanvar": "nanstd"}[function]
    failures = []
    for n in (5, 24, 101, 3000):
        row = (np.random.default_rng(n).integers(-99, 400, n) * scale).astype(np.float32)
        for x, axis in ((row, None), (np.stack([row, -row], 1), 0), (np.stack([row, row]), 1)):
            if function == "moments":
                np.testing.assert_allclose(
                    fastbn.moments(x, channel_axis=() if axis is None else 1 - axis).mean,
                    np.mean(x, axis, dtype=float), rtol=1e-6, atol=1e-6 * 200 * scale,
                )  # fmt: skip
            else:
                check(failures, f"{n}", function, x, oracle.exact(x, axis), axis=axis)
    report(failures)
