"""What every function makes of one case, held by the oracle."""

import types
import warnings

import numpy as np

import fastbn
from fastbn import Moments, reference, update_running  # these on NumPy arrays, wherever the checks run
from tests import tolerances

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


def running_statistics(case):
    """Of two dtypes, as parameters are."""
    rng, types = np.random.default_rng(6), {"float32": ("float64", "float32"), "float16": ("float32", "float16")}
    dtypes = types.get(case.dtype.name, ("float32", "float64"))
    return tuple((1 + rng.random(case.layout.channels)).astype(dtype) for dtype in dtypes)


def check_forward(case):
    keywords = case.keywords | case.epilogue
    running, before = running_statistics(case), running_statistics(case)
    update = {"rate": 0.3, "correction": 0.5}
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, running=running, **update, **keywords)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **keywords)
    for ours, alone in zip(running, update_running(*before, Moments(*saved.moments), **update), strict=True):
        np.testing.assert_array_equal(ours, alone)
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


# --- wrong backends ---------------------------------------------------------------------------------------------------


def check_merged(case):
    """Moments of two parts of the batch, together and into running statistics."""
    axis = next(axis for axis in range(case.x.ndim) if axis not in case.layout.kept)
    parts = np.array_split(case.x, 2, axis)
    keywords = {"channel_axis": case.layout.channel_axis}
    expected = [reference.moments(part, **keywords) for part in parts]
    given = [Moments(part.count, part.mean, part.m2) for part in expected]
    name, whole = case.dtype.name, reference.merge(*expected)
    merged = fastbn.merge(*given)
    for field in ("count", "mean", "m2"):
        theirs = getattr(whole, field)
        assert_close(f"{name} {field}", getattr(merged, field), theirs, 1e-13 * np.abs(theirs))
    running = np.zeros(case.layout.channels), np.ones(case.layout.channels)
    found = fastbn.update_running(*running, given[0])
    for ours, theirs in zip(found, reference.update_running(*running, expected[0]), strict=True):
        assert_close(name, ours, theirs, 1e-14 * np.abs(theirs))


CHECKS = {
    "merged": check_merged,
    "moments": check_moments,
    "training": check_backward,
    "frozen": check_frozen,
    "parts": check_parts,
    "statistics": check_statistics,
}
