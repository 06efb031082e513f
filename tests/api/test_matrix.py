"""Every function x layout x dtype x option against the oracle; and wrong backends, which every check must reject."""

import types
import warnings

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.cpu import memory, plans, team
from tests import tolerances
from tests.conftest import forget
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case
from tests.wrong_backends import broken, use

by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def by_dtype_and_options(*options):
    """float32 with the first three options, the other dtypes with one: the rest, compilation, is slow."""
    cases = []
    for dtype in DTYPES:
        one = "plain" if dtype == "bfloat16" else options[0]
        for name in options:
            left_out = name in options[3:] if dtype == "float32" else name != one
            cases.append(pytest.param(dtype, name, marks=[pytest.mark.slow] if left_out else []))
    return pytest.mark.parametrize(("dtype", "options"), cases)


TRAINING = ("affine residual relu", "where weights residual", "plain", "where", "weights relu")


SAME_BITS = True
"""Whether functions that share a step give the same bits of it: on the CPU, whose chunks are the same for all."""


# --- the checks -------------------------------------------------------------------------------------------------------


def assert_close(what, actual, expected, bound):
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, what
    wrong = ~((np.abs(actual - expected) <= bound) | (np.isnan(actual) & np.isnan(expected)) | (actual == expected))
    if wrong.any():
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where all are NaN
            worst = np.nanmax(np.where(wrong, np.abs(actual - expected), 0.0) / np.broadcast_to(bound, wrong.shape))
        raise AssertionError(f"{what}: {wrong.sum()} of {wrong.size} beyond the bound, the worst by {worst:.3g} times")


def spread(parameter, case):
    """A parameter in the dimensions of x; 1 for None."""
    shape = [n if axis in case.layout.kept else 1 for axis, n in enumerate(case.layout.shape)]
    return np.broadcast_to(1.0 if parameter is None else parameter, case.layout.channels).reshape(shape).astype(float)


def assert_like(result, case):
    """dtype, shape and element order of a result."""
    assert result.dtype == case.x.dtype
    assert result.shape == case.x.shape
    assert result.strides == np.empty_like(case.x).strides


def check_moments(case, actual=None):
    if actual is None:
        actual = fastbn.moments(case.x, **case.keywords)
    expected = reference.moments(case.x, **case.keywords)
    name = case.dtype.name
    std = np.sqrt(expected.m2 / expected.count)
    weighted = 2.0 if "weights" in case.keywords else 1.0  # weights are rounded to the compute type
    for array in actual:
        assert array.dtype == np.float64
        assert array.flags.c_contiguous
    assert_close("count", actual.count, expected.count, tolerances.BOUNDS["count"][name] * expected.count)
    mean_bound = tolerances.BOUNDS["mean"][name] * (np.abs(expected.mean) + std)
    assert_close("mean", actual.mean, expected.mean, weighted * mean_bound)
    m2_bound = tolerances.BOUNDS["var"][name] * expected.m2 + 1e-28 * expected.count * expected.mean**2
    assert_close("m2", actual.m2, expected.m2, weighted * m2_bound)


def y_bound(case, forward):
    """Roundings of |gamma * rstd| * |x - mean| + |beta| + |residual|, and what the statistics may be off."""
    name = case.dtype.name
    a = np.abs(spread(case.gamma, case) * spread(forward.rstd, case))
    distance = np.abs(case.x.astype(float) - spread(forward.mean, case))
    scale = a * distance + np.abs(spread(0.0 if case.beta is None else case.beta, case)) + np.abs(forward.y)
    if "residual" in case.epilogue:
        scale = scale + np.abs(case.epilogue["residual"].astype(float))
    statistics = 0.0
    if forward.statistics is not None:
        off = tolerances.BOUNDS["mean"][name] * (np.abs(forward.mean) + 1 / forward.rstd)
        statistics = a * (spread(off, case) + tolerances.BOUNDS["var"][name] * distance)
    return tolerances.elementwise(case.dtype, forward.y, scale) + statistics


def check_forward(case):
    keywords = case.keywords | case.epilogue
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **keywords)
    assert_like(y, case)
    assert_close("y", y, forward.y, y_bound(case, forward))
    if SAME_BITS:
        direct = fastbn.moments(case.x, **case.keywords)
        for ours, alone in zip(saved.moments, direct, strict=True):
            np.testing.assert_array_equal(ours, alone)
    else:
        check_moments(case, saved.moments)
    return y, saved, forward


def dx_scale(case, forward, dgamma, dbeta, dz):
    """Size of the terms of dx before they cancel."""
    a = np.abs(spread(case.gamma, case) * spread(forward.rstd, case))
    xhat = np.abs(case.x.astype(float) - spread(forward.mean, case)) * spread(forward.rstd, case)
    if forward.statistics is None:
        return a * np.abs(dz)
    share = 5.0 / spread(forward.statistics.count, case)  # weights are below 5
    return a * (np.abs(dz) + share * (np.abs(spread(dbeta, case)) + (1 + xhat) * np.abs(spread(dgamma, case))))


def check_gradients(case, y, saved, forward, grads):
    dx, dgamma, dbeta, dz = reference.batch_norm_backward(case.dy, forward, y=y)
    axes = tuple(axis for axis in range(case.x.ndim) if axis not in case.layout.kept)
    xhat = np.abs(case.x.astype(float) - spread(forward.mean, case)) * spread(forward.rstd, case)
    # The rounding of mean and rstd themselves enters dgamma by 1e-7 of each term.
    sizes = (np.abs(dz) * (xhat + 0.1)).sum(axis=axes), np.abs(dz).sum(axis=axes)
    assert_close("dgamma", grads.gamma, dgamma, tolerances.summed(case.dtype, sizes[0]))
    assert_close("dbeta", grads.beta, dbeta, tolerances.summed(case.dtype, sizes[1]))
    assert grads.gamma.dtype == grads.beta.dtype == np.float64
    assert_like(grads.x, case)
    scale = dx_scale(case, forward, *sizes, dz)
    assert_close("dx", grads.x, dx, tolerances.elementwise(case.dtype, dx, scale))
    if "residual" in case.epilogue:
        assert_like(grads.residual, case)
        np.testing.assert_array_equal(grads.residual.astype(float), dz)
    else:
        assert grads.residual is None


def check_backward(case):
    y, saved, forward = check_forward(case)
    check_gradients(case, y, saved, forward, fastbn.batch_norm_backward(case.dy, saved))


def check_frozen(case):
    """Inference and its backward pass, with statistics that are not the batch's."""
    rng = np.random.default_rng(1)
    mean, var = rng.standard_normal(case.layout.channels) + 3, rng.random(case.layout.channels) + 0.5
    epilogue = case.epilogue
    channel_axis = case.layout.channel_axis
    arguments = (case.x, mean, var, case.gamma, case.beta)
    y = fastbn.batch_norm_inference(*arguments, channel_axis=channel_axis, **epilogue)
    forward = reference.batch_norm_inference(*arguments, channel_axis=channel_axis, **epilogue)
    assert_like(y, case)
    assert_close("y", y, forward.y, y_bound(case, forward))
    same = fastbn.normalize(
        case.x, mean, 1 / np.sqrt(var + 1e-5), case.gamma, case.beta, channel_axis=channel_axis, **epilogue
    )
    if SAME_BITS:
        np.testing.assert_array_equal(same, y)
    else:
        assert_close("y", same, forward.y, y_bound(case, forward))
    saved = fastbn.Saved.frozen(
        case.x, mean, var, case.gamma, channel_axis=channel_axis, y=y, activation=epilogue.get("activation")
    )
    grads = fastbn.batch_norm_backward(case.dy, saved)
    check_gradients(case_without_residual(case), y, saved, forward, grads)


def case_without_residual(case):
    return types.SimpleNamespace(**vars(case) | {"epilogue": {}})


def check_parts(case):
    """The kernels by themselves, as a user chains them."""
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    mean, rstd, channel_axis = forward.mean, forward.rstd, case.layout.channel_axis
    dgamma, dbeta = fastbn.grad_sums(case.dy, case.x, mean, rstd, channel_axis=channel_axis)
    dx = fastbn.grad_input(
        case.dy, case.x, mean, rstd, case.gamma, dgamma, dbeta, forward.statistics.count, **case.keywords
    )
    check_gradients(case_without_residual(case), None, None, forward, fastbn.Gradients(dx, dgamma, dbeta, None))


def check_statistics(case):
    axes = tuple(axis for axis in range(case.x.ndim) if axis not in case.layout.kept)
    where = case.keywords.get("where", True)
    expected_mean, expected_var = reference.mean(case.x, axes, where), reference.var(case.x, axes, where=where)
    name, std = case.dtype.name, np.sqrt(expected_var)
    mean, var = fastbn.mean_var(case.x, axes, where=where)
    bound = tolerances.BOUNDS["mean"][name] * (np.abs(expected_mean) + std)
    rounding = 1.01 * tolerances.ROUNDING[name]
    assert_close("mean", mean, expected_mean, bound + rounding * np.abs(expected_mean))
    bound = (tolerances.BOUNDS["var"][name] + rounding) * expected_var
    assert_close("var", var, expected_var, bound + 1e-28 * expected_mean**2)
    np.testing.assert_array_equal(fastbn.mean(case.x, axes, where=where), mean)
    np.testing.assert_array_equal(fastbn.var(case.x, axes, where=where), var)
    assert_close("std", fastbn.std(case.x, axes, where=where), std, bound / (std + 1e-300) + rounding * std + 1e-14)


# --- the matrix -------------------------------------------------------------------------------------------------------


@by_dtype_and_options(*TRAINING)
@by_layout
def test_moments(dtype, layout, options):
    check_moments(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_dtype_and_options(*TRAINING)
@by_layout
def test_training(dtype, layout, options):
    check_backward(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_dtype_and_options("plain", "affine residual relu")
@by_layout
def test_frozen(dtype, layout, options):
    check_frozen(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_dtype_and_options("plain", "where")
@by_layout
def test_parts(dtype, layout, options):
    check_parts(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_dtype_and_options("plain", "where")
@by_layout
def test_statistics(dtype, layout, options):
    check_statistics(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


# --- strategies: tuning is not correctness ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [TRAINING[0], *(pytest.param(o, marks=pytest.mark.slow) for o in TRAINING[1:3])])
@pytest.mark.parametrize(
    ("serial_below", "whole_channels", "streaming"), [(0, True, True), (0, False, True), (1 << 60, False, True)]
)
def test_forced_strategies(monkeypatch, fresh_plans, options, serial_below, whole_channels, streaming):
    """Parallel and serial, fused and split, plain and streaming stores: right, and bit for bit the same."""
    case = make_case(LAYOUTS["NCHW long rows"], "float32", OPTIONS[options])
    last = make_case(LAYOUTS["NHWC wide"], "float32", OPTIONS[options])
    short = make_case(LAYOUTS["NCHW short rows"], "float32", OPTIONS[options])
    results = []
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(team, "PARALLEL_FROM", serial_below)
            monkeypatch.setattr(plans, "_whole_channels", lambda problem: whole_channels)
            if not whole_channels:
                monkeypatch.setattr(plans, "_fused_tile", lambda *_: 0)
            if streaming:
                monkeypatch.setattr(memory, "CACHE_SHARE", 0)
                monkeypatch.setattr(plans, "NONTEMPORAL_ROW", 0)
            forget()
        for c in (case, last, short):
            check_backward(c)
            check_frozen(c)
            y, saved = fastbn.batch_norm(c.x, c.gamma, c.beta, **c.keywords, **c.epilogue)
            results.append((y, *saved.moments, *fastbn.batch_norm_backward(c.dy, saved)[:3]))
    half = len(results) // 2
    for before, after in zip(results[:half], results[half:], strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 4, 5, 12, 15])
@pytest.mark.parametrize(
    ("shape", "axis"), [((9, 13, 7, 7), 1), ((2, 5, 33, 31), 1), ((3, 50, 4, 4), 1), ((7, 9, 96), -1), ((40, 3), -1)]
)
def test_out_anywhere_in_memory(monkeypatch, fresh_plans, shape, axis, offset):
    """Stores past the caches need whole lines; what lies before and behind an `out` that starts between two stays."""
    monkeypatch.setattr(memory, "CACHE_SHARE", 0)
    monkeypatch.setattr(plans, "NONTEMPORAL_ROW", 0)
    rng = np.random.default_rng(offset)
    x = rng.standard_normal(shape, dtype=np.float32)
    gamma, beta = rng.random((2, shape[axis]))
    buffer = np.full(x.size + 64, 7, np.float32)
    first = 16 + offset - buffer.ctypes.data % 64 // 4
    out = buffer[first : first + x.size].reshape(shape)
    y, saved = fastbn.batch_norm(x, gamma, beta, channel_axis=axis)
    mean, var = saved.mean, saved.moments.var()
    given = {"gamma": gamma, "beta": beta, "channel_axis": axis}
    calls = {
        "forward": (lambda out: fastbn.batch_norm(x, **given, out=out)[0], y),
        "inference": (lambda out: fastbn.batch_norm_inference(x, mean, var, **given, out=out), y),
        "backward": (lambda out: fastbn.batch_norm_backward(x, saved, out=out).x, None),
    }
    for what, (call, expected) in calls.items():
        expected = call(None) if expected is None or what == "inference" else expected
        for _ in range(2):  # the second is prepared
            out[...] = 0
            np.testing.assert_array_equal(call(out), expected, what)
            np.testing.assert_array_equal(np.delete(buffer, np.s_[first : first + x.size]), 7)


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.writable])
@pytest.mark.parametrize("out_layout", ["same", "C", "Fortran", "spatial slice"])
def test_out(layout, out_layout):
    """`out` of any layout holds what the call without it returns, and is returned."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    keywords = case.keywords | case.epilogue
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)

    def output():
        if out_layout == "same":
            return layout.place(np.zeros(layout.shape, case.x.dtype))
        if out_layout == "spatial slice":
            return np.zeros((*layout.shape[:-1], 2 * layout.shape[-1] + 1), case.x.dtype)[..., 1::2]
        return np.zeros(layout.shape, case.x.dtype, order=out_layout[0])

    def assert_written(out, returned, expected):
        assert returned is out
        np.testing.assert_array_equal(out, expected)

    out = output()
    assert_written(out, fastbn.batch_norm(case.x, case.gamma, case.beta, out=out, **keywords)[0], expected)
    mean, var = saved.mean, saved.moments.var()
    inference = fastbn.batch_norm_inference(case.x, mean, var, channel_axis=layout.channel_axis)
    out = output()
    returned = fastbn.batch_norm_inference(case.x, mean, var, channel_axis=layout.channel_axis, out=out)
    assert_written(out, returned, inference)
    out = output()
    returned = fastbn.normalize(case.x, mean, saved.moments.rstd(), channel_axis=layout.channel_axis, out=out)
    assert_written(out, returned, inference)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    out = output()
    assert_written(out, fastbn.batch_norm_backward(case.dy, saved, out=out).x, grads.x)
    arguments = (case.dy, case.x, mean, saved.rstd, case.gamma, grads.gamma, grads.beta, saved.count)
    expected = fastbn.grad_input(*arguments, **case.keywords)
    out = output()
    assert_written(out, fastbn.grad_input(*arguments, out=out, **case.keywords), expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "instance Fortran", "spatial slice", "alternating", "NC"])
def test_out_is_an_input(layout):
    """In place over x, residual, dy: the same bits as out of place."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    keywords = case.keywords | case.epilogue
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)
    x = layout.place(case.x)
    y, _ = fastbn.batch_norm(x, case.gamma, case.beta, out=x, **keywords)
    np.testing.assert_array_equal(y, expected)
    residual = layout.place(case.epilogue["residual"])
    y, _ = fastbn.batch_norm(
        case.x, case.gamma, case.beta, channel_axis=layout.channel_axis, residual=residual, activation="relu",
        out=residual,
    )  # fmt: skip
    np.testing.assert_array_equal(y, expected)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    dy = layout.place(case.dy)
    np.testing.assert_array_equal(fastbn.batch_norm_backward(dy, saved, out=dy).x, grads.x)


@pytest.mark.parametrize("shift", [1, 3, 35, 210])
@pytest.mark.parametrize("forwards", [True, False])
def test_out_partly_overlaps(shift, forwards):
    """An output askew over the input is right too."""
    shape = (4, 6, 5, 7)
    size = int(np.prod(shape))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected, _ = fastbn.batch_norm(values)
    mean, var = np.zeros(6), np.ones(6)
    expected_inference = fastbn.batch_norm_inference(values, mean, var)
    for call, wanted in (
        (lambda x, out: fastbn.batch_norm(x, out=out)[0], expected),
        (lambda x, out: fastbn.batch_norm_inference(x, mean, var, out=out), expected_inference),
    ):
        buffer = np.empty(size + shift, np.float32)
        first, second = buffer[:size].reshape(shape), buffer[shift:].reshape(shape)
        x, out = (first, second) if forwards else (second, first)
        x[...] = values
        call(x, out)
        np.testing.assert_array_equal(out, wanted)


def test_interleaved_out_is_not_an_overlap():
    """Two channel slices of one buffer (a DenseNet block): x stays, and the backward pass works."""
    buffer = np.random.default_rng(0).standard_normal((3, 8, 4, 4)).astype(np.float32)
    x, out = buffer[:, :4], buffer[:, 4:]
    before = x.copy()
    _, saved = fastbn.batch_norm(x, out=out)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(out, fastbn.batch_norm(before)[0])
    fastbn.batch_norm_backward(x, saved)


def test_parameters_overlap_out():
    """gamma and beta may lie in the memory that is written."""
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float64)
    expected, _ = fastbn.batch_norm(x, x[0].copy(), x[1].copy())
    y, _ = fastbn.batch_norm(x, x[0], x[1], out=x)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "spatial slice"])
@pytest.mark.parametrize("other", ["C", "F"])
def test_inputs_in_other_orders(layout, other):
    """dy and residual need not lie in memory as x does."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    case.epilogue["residual"] = np.array(case.epilogue["residual"], order=other)
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    np.testing.assert_array_equal(y, expected)
    again = fastbn.batch_norm_backward(np.array(case.dy, order=other), saved)
    np.testing.assert_array_equal(again.x, grads.x)
    np.testing.assert_array_equal(again.gamma, grads.gamma)


def test_read_only_inputs():
    case = make_case(LAYOUTS["NCHW"], "float32", OPTIONS["affine residual relu"])
    for array in (case.x, case.dy, case.gamma, case.beta, case.epilogue["residual"]):
        array.flags.writeable = False
    check_backward(case)


# --- wrong backends ---------------------------------------------------------------------------------------------------

CHECKS = {
    "moments": check_moments,
    "training": check_backward,
    "frozen": check_frozen,
    "parts": check_parts,
    "statistics": check_statistics,
}


def scaled(index, factor):
    def change(args, result):
        changed = list(result)
        changed[index] = changed[index] * factor
        return tuple(changed)

    return change


def nudged(position, by):
    """One element of an output array is off by a few roundings."""

    def change(args, result):
        args[position].reshape(-1)[-1] += by
        return result

    return change


FAULTS = {
    "moments": [
        ("moments", scaled(0, 1 + 1e-12)),
        ("moments", scaled(1, 1 + 1e-6)),
        ("moments", scaled(2, 1 + 5e-6)),
    ],
    "statistics": [("moments", scaled(1, 1 + 1e-6)), ("moments", scaled(2, 1 + 5e-6))],
    "training": [
        ("forward", nudged(5, 1e-4)),
        ("forward", scaled(1, 1 + 1e-6)),
        ("backward", scaled(0, 1 + 1e-5)),
        ("backward", scaled(1, 1 + 1e-4)),
        ("backward", nudged(10, 1e-4)),
        ("backward", nudged(11, 1e-3)),
    ],
    "frozen": [("normalize", nudged(2, 1e-4)), ("backward", nudged(10, 1e-4)), ("backward", scaled(0, 1.001))],
    "parts": [
        ("grad_sums", scaled(0, 1 + 1e-4)),
        ("grad_sums", scaled(1, 1 + 1e-4)),
        ("grad_input", nudged(12, 1e-4)),
    ],
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("check", "function", "change"),
    [pytest.param(c, f, g, id=f"{c}-{f}-{i}") for c, faults in FAULTS.items() for i, (f, g) in enumerate(faults)],
)
def test_wrong_backend_is_rejected(monkeypatch, layout, check, function, change):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS["affine residual relu"])
    CHECKS[check](case)
    use(monkeypatch, broken(function, change))
    with pytest.raises(AssertionError):
        CHECKS[check](case)
