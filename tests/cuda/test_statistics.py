"""`mean`, `var` and `std` of CuPy arrays are NumPy's: value, dtype, shape, errors; by the tests of tests/cases.

What differs does so in CuPy's own functions: a full reduction is an array without dimensions, and nothing warns, since
to know whether a slice is empty would be to wait for the device.
"""

import warnings

import numpy as np
import pytest

import fastbn
from fastbn import prepare_reductions, reference
from fastbn.cuda import problems
from tests.cases import like_numpy, statistics, statistics_options
from tests.cases.like_numpy import FUNCTIONS, by_function, by_spread, numbers
from tests.cases.statistics import SPECIAL, STRIDES
from tests.cases.statistics_options import MASKS, OUTPUTS, WRONG_OUT
from tests.cuda import harness
from tests.cuda.harness import by_call, calls, on_device, slow
from tests.simt import cuda, host_cupy
from tests.support import DTYPES

SPREADS = ("var", "std")
POSSIBLE = [name for name in STRIDES if name not in ("unaligned", "other byte order", "field of records")]


@pytest.fixture
def scalars(cuda_arrays, monkeypatch):
    """In the tests of NumPy arrays: CuPy's, of which those without dimensions are the scalars that NumPy gives."""

    stand_in = harness.scalars(cuda_arrays)
    for module in (like_numpy, statistics, statistics_options):
        monkeypatch.setattr(module, "fastbn", stand_in)
    monkeypatch.setattr(like_numpy, "about_slices", lambda caught: [])


def without(table, *names):
    return {name: value for name, value in table.items() if name not in names}


@by_call(
    calls(statistics.test_positional_arguments, function=FUNCTIONS),
    calls(statistics.test_axes, axis=statistics.AXES, keepdims=[False, True], function=["mean"]),
    calls(statistics.test_axes, axis=[None, 0, -1, (), (0, 2)], keepdims=[False, True], function=SPREADS),
    calls(statistics.test_sizes_of_one, shape=[(6,), (1,), (1, 5), (3, 1, 2, 1, 2, 1)], function=["std"]),
    calls(statistics.test_float_dtypes, dtype=[*DTYPES], function=FUNCTIONS),
    calls(statistics.test_integers, code="Bl", function=["mean", "var"]),
    calls(statistics.test_integers, slow, code="?bHlQBhiIqLpP", function=FUNCTIONS),
    calls(statistics.test_float16_sums_do_not_overflow, slow),
    calls(statistics.test_float32_sums_do_not_drift, slow),
    calls(statistics.test_values_by_hand),
    calls(statistics.test_constants, value=[0.0, 0.1, 1e30], function=FUNCTIONS),
    calls(statistics.test_zero_dimensions, dtype=[np.float32, np.int32, bool], function=FUNCTIONS),
    calls(statistics.test_strides, strides=POSSIBLE, function=["var"]),
    calls(statistics.test_strides_of_zero, repeated=[(0,), (3,), (0, 2), (0, 1, 2, 3)], function=["var"]),
)
def test_arrays(scalars, call):
    call()


@by_call(
    calls(
        statistics_options.test_dtype,
        of=[np.float32, np.uint8], dtype=["e", "f", "d", np.float64, DTYPES["bfloat16"]], function=["mean", "std"],
    ),
    calls(
        statistics_options.test_dtype, slow,
        of=[np.float64, np.int16, bool], dtype=["e", "f", "d", np.float64, DTYPES["bfloat16"]],
        function=["mean", "std"],
    ),
    calls(statistics_options.test_out, make=without(OUTPUTS, "longdouble", "other byte order"), function=FUNCTIONS),
    calls(statistics_options.test_wrong_out, function=FUNCTIONS, **{"make,error": without(WRONG_OUT, "read-only")}),
    calls(statistics_options.test_out_of_integers, function=FUNCTIONS),
    calls(statistics_options.test_out_and_dtype, function=FUNCTIONS),
    calls(statistics_options.test_out_within_x, function=FUNCTIONS),
    calls(statistics_options.test_out_with_where, function=FUNCTIONS),
    calls(statistics_options.test_out_beyond_float16, function=FUNCTIONS),
    calls(statistics_options.test_ddof, ddof=[0, 1, 2, 1.5, -1, np.int64(1), np.float32(0.5), True], function=SPREADS),
    calls(statistics_options.test_ddof_by_hand, function=SPREADS),
    calls(statistics_options.test_ddof_too_big_for_one_slice, function=SPREADS),
    calls(statistics_options.test_mean_given, axis=[None, 1, (0, 2)], keepdims=[False, True], function=SPREADS),
    calls(statistics_options.test_mean_given_and_where, function=SPREADS),
    calls(statistics_options.test_mean_given_of_other_kinds, function=SPREADS),
    calls(
        statistics_options.test_mean_given_of_a_wider_dtype,
        centre={"array": np.full((1, 4), 2.5), "list": [[1, 2, 3, 4]]}, function=SPREADS,
    ),
    calls(statistics_options.test_mean_given_that_broadcasts, function=SPREADS),
    calls(
        statistics_options.test_mean_given_of_another_shape, function=["var"],
        **{"axis,shape": [(1, (6,)), (1, (3, 2)), (1, (2, 1, 3)), (2, (3, 3)), (0, (1, 3, 3)), (None, (2,))]},
    ),
)  # fmt: skip
def test_options(scalars, call):
    call()


@by_call(
    calls(statistics_options.test_where, where=without(MASKS, "read-only"), function=["var"]),
    calls(statistics_options.test_where, slow, where=without(MASKS, "read-only"), function=["mean", "std"]),
    calls(statistics_options.test_where_true_is_everything, function=FUNCTIONS),
    calls(statistics_options.test_where_skips_what_is_not_finite, function=FUNCTIONS),
    calls(statistics_options.test_where_and_integers, dtype=[np.uint8], function=["mean", "var"]),
    calls(statistics_options.test_where_and_integers, slow, dtype=[np.int8, np.uint64, bool], function=["mean", "var"]),
    calls(statistics_options.test_where_by_hand),
    calls(
        statistics_options.test_wrong_where, function=FUNCTIONS,
        **{"where,error": {
            "integers": (np.ones((3, 4), int), TypeError),
            "floats": (np.ones((3, 4)), TypeError),
            "list of integers": ([1, 0, 1, 1], TypeError),
            "too short": (np.ones(3, bool), ValueError),
            "transposed": (np.ones((4, 3), bool), ValueError),
            "too many dimensions": (np.ones((1, 3, 4), bool), ValueError),
            "empty": (np.ones((0, 4), bool), ValueError),
        }},
    ),
    calls(
        statistics_options.test_wrong_where,
        where=[None], error=[TypeError], function=FUNCTIONS,
    ),
)  # fmt: skip
def test_where(scalars, call):
    call()


@by_call(
    calls(
        statistics.test_empty,
        shape=[(0,), (0, 3), (3, 0), (2, 0, 3)], dtype=[np.float32, bool], function=FUNCTIONS,
    ),
    calls(
        statistics.test_empty, slow, shape=[(0,), (0, 3), (3, 0), (2, 0, 3)],
        dtype=[np.float16, DTYPES["bfloat16"], np.float64, np.int32], function=FUNCTIONS,
    ),
    calls(
        statistics.test_not_finite,
        special=[*SPECIAL], dtype=[np.float32, np.float64], function=["mean", "std"],
    ),
    calls(statistics.test_mean_keeps_infinity, dtype=[np.float32, np.float64]),
    calls(
        statistics.test_mean_of_huge_values, shares=[*statistics.HUGE],
        **{"dtype,largest": [(np.float32, 3.4e38), (np.float64, 1.7e308)]},
    ),
    calls(statistics.test_spread_of_huge_values),
)  # fmt: skip
def test_edges(scalars, call):
    call()


@by_function
def test_the_comparison_can_fail(scalars, monkeypatch, function):
    for wrong in like_numpy.WRONG:
        with monkeypatch.context() as patch:
            like_numpy.test_the_comparison_can_fail(wrong, function, patch)


# --- on CuPy arrays themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
def test_full_reductions_are_arrays(cuda_device, function):
    import cupy

    x = numbers((3, 4))
    for options, shape in (({}, ()), ({"keepdims": True}, (1, 1)), ({"axis": (0, 1)}, ()), ({"where": False}, ())):
        results = getattr(fastbn, function)(on_device(x), **options)
        for result in results if function == "mean_var" else [results]:
            assert type(result) is cupy.ndarray
            assert (result.shape, result.dtype) == (shape, x.dtype)


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
def test_nothing_warns(cuda_device, function):
    """Nor waits, for the mask or the count of a slice."""
    call = getattr(fastbn, function)
    host_cupy.operations.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (numbers((3, 4)), np.zeros((0, 4), np.float32), np.arange(12).reshape(3, 4)):
            call(on_device(x), 0, where=on_device(np.zeros(x.shape, bool)))
            call(on_device(x), 0, **({} if function == "mean" else {"correction": 3}))
    assert host_cupy.operations["get"] == 0


@pytest.mark.parametrize("function", [*FUNCTIONS, "mean_var"])
def test_what_wrappers_leave_out(cuda_arrays, function):
    call, x = getattr(cuda_arrays, function), numbers((3, 4))
    left_out = {"keepdims": np._NoValue, "where": np._NoValue}
    if function != "mean":
        left_out["correction"] = np._NoValue
    np.testing.assert_array_equal(call(x, 0, **left_out), call(x, 0))


def test_mean_var_and_moments(cuda_arrays):
    """Of any real dtype, with a mask and weights."""
    where = np.random.default_rng(5).random((4, 1, 5)) < 0.8
    for dtype in (np.float32, np.int16, bool):
        x = (numbers((4, 3, 5)) * 2).astype(dtype)
        exact, mask = x.astype(float), np.broadcast_to(where, x.shape)
        mean, var = cuda_arrays.mean_var(x, (0, 2), where=where, keepdims=True, correction=1)
        assert mean.dtype == var.dtype == (x.dtype if dtype == np.float32 else np.float64)
        np.testing.assert_allclose(mean, exact.mean((0, 2), where=mask, keepdims=True), rtol=1e-6)
        np.testing.assert_allclose(var, exact.var((0, 2), where=mask, keepdims=True, ddof=1), rtol=1e-6)
        moments = cuda_arrays.moments(x, where=where, weights=where * 2.5)
        for ours, oracle in zip(moments, reference.moments(exact, where=where, weights=where * 2.5), strict=True):
            np.testing.assert_allclose(ours, oracle, rtol=1e-6)


@by_spread
def test_options_of_either_kind(cuda_device, function):
    """Lists and numbers beside CuPy arrays, which NumPy arrays are not."""
    x, call = numbers((3, 4)), getattr(fastbn, function)
    mask, centre = [True, False, True, True], [[2.0], [3.0], [4.0]]
    expected = getattr(np, function)(x, 1, where=np.array(mask), mean=np.array(centre))
    for where in (mask, on_device(np.array(mask))):
        for mean in (centre, on_device(np.array(centre))):
            result = call(on_device(x), 1, where=where, mean=mean)
            assert result.dtype == np.float64
            np.testing.assert_allclose(host_cupy.to_numpy(result), expected, rtol=1e-6)
    for options in ({"where": np.array(mask)}, {"mean": np.array(centre)}, {"out": np.zeros(3, np.float32)}):
        with pytest.raises(TypeError, match=f"^{next(iter(options))}: expected a cupy.ndarray like x, got a numpy"):
            call(on_device(x), 1, **options)


@pytest.mark.parametrize("dtype", [np.longdouble, np.int64, bool, complex])
@by_function
def test_a_dtype_that_is_not_computed_in(cuda_device, function, dtype):
    launched = len(cuda_device.launches)
    with pytest.raises(TypeError, match=f"^dtype: expected float16, .* or float64, got {np.dtype(dtype)}"):
        getattr(fastbn, function)(on_device(numbers((3, 4))), dtype=dtype)
    assert len(cuda_device.launches) == launched


@pytest.mark.parametrize("n", [2, 3, 16])
def test_squares_that_overflow_about_the_first_value(cuda_device, monkeypatch, n):
    """But not about the mean: one thread, which takes all values of a channel, then takes them one by one."""
    tuning = cuda.SMALL | {"threads": 32, "along_channels": 512}
    monkeypatch.setitem(problems.TUNING, cuda.ARCHITECTURE, problems.Tuning(**tuning))
    cuda.forget()
    rng = np.random.default_rng(n)
    x = np.full((n, 64), 1e154)
    x[rng.integers(0, n, 64), np.arange(64)] = 0.0
    x[0, :32], x[1:, :32] = 0.0, 1e154
    mean, var = (host_cupy.to_numpy(a) for a in fastbn.mean_var(on_device(x), 0))
    monkeypatch.undo()
    cuda.forget()
    assert {step.threads for step in cuda_device.launches[-1:]} == {32}
    assert (((x - x[0]) / 1e154) ** 2).sum(0).max() > 1.8 or n == 2  # times 1e308
    np.testing.assert_allclose(var, reference.var(x, 0), rtol=1e-13)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-15)


NEGATIVE = np.where(np.arange(20) % 5 == 1, -0.5, 1.0).reshape(4, 5)


@pytest.mark.parametrize("weights", [None, np.ones((4, 5)), NEGATIVE], ids=["none", "ones", "negative"])
def test_average_is_on_the_arrays_device(devices, weights):
    """Which is not the current one."""
    x, weights = on_device(numbers((4, 5)), 1), None if weights is None else on_device(weights, 1)
    for _ in range(2):
        for result in fastbn.average(x, 0, weights, returned=True):
            assert result.data.device_id == 1
    assert set(devices.launched) <= {(1, 1)}


def test_average_is_prepared_once(cuda_device, monkeypatch):
    prepared, statistic = [], prepare_reductions.statistic
    monkeypatch.setattr(prepare_reductions, "statistic", lambda *given: prepared.append(1) or statistic(*given))
    x, weights = on_device(numbers((4, 5))), on_device(np.arange(1.0, 21.0).reshape(4, 5))
    for _ in range(3):
        fastbn.average(x, 0, weights)
    assert len(prepared) == 1
