"""Checks at the ends of a type's range, and of what is masked out."""

import math
from fractions import Fraction

import numpy as np

import fastbn
from fastbn import reference
from tests import tolerances
from tests.cases import checks
from tests.cases.checks import assert_close
from tests.support import OPTIONS, make_case

STRATEGIES = ("block", "cluster", "cooperative", "two passes")

# --- powers of two ----------------------------------------------------------------------------------------------------

SCALES = {  # of deviations of about 2 and values of up to 12, multiples of 2^-7
    "float16": (-17, -8, 6, 12),
    "bfloat16": (-119, -60, 60, 123),
    "float32": (-119, -100, -64, -40, 40, 64, 100, 123),
    "float64": (-1000, -500, -300, 300, 500, 1000),
}
DY_SCALES = {"float16": 12, "bfloat16": 100, "float32": 100, "float64": 900}
"""Exponents by which dy is scaled at most, so that dx, which is dy / std, is in range."""


def on_a_grid(values, dtype):
    """Multiples of 2^-7, none of which becomes subnormal where the scale leaves the least of them normal."""
    return (np.round(values.astype(float) * 128) / 128).astype(dtype)


def scaled(array, exponent):
    """Exact, also where numpy.ldexp has no loop."""
    wide = np.float64 if array.dtype.itemsize < 8 else np.longdouble
    return np.ldexp(array.astype(wide), exponent).astype(array.dtype)


def put_at_scale(case, exponent):
    """Put a case on the grid; x and dy at the scale, and the exponent of dy."""
    case.x, case.dy = on_a_grid(case.x, case.dtype), on_a_grid(case.dy, case.dtype)
    case.keywords["eps"] = 0.0
    most = DY_SCALES[case.dtype.name]
    along = min(max(exponent, -most), most)
    return scaled(case.x, exponent), scaled(case.dy, along), along


def statistics_keywords(case):
    return {name: value for name, value in case.keywords.items() if name != "eps"}


def check_statistics(case, moments, rstd, exponent):
    """Of x at a scale, against the oracle at scale 1."""
    bound = tolerances.BOUNDS
    expected, name = reference.moments(case.x, **statistics_keywords(case)), case.dtype.name
    std = np.sqrt(expected.m2 / expected.count)
    weighted = 2.0 if "weights" in case.keywords else 1.0  # weights are rounded to the compute type
    back = np.ldexp(moments.mean, -exponent)
    assert_close("mean", back, expected.mean, weighted * bound["mean"][name] * (np.abs(expected.mean) + std))
    with np.errstate(over="ignore", under="ignore"):
        m2 = np.ldexp(expected.m2, 2 * exponent)  # 0 or infinite where float64 ends
    np.testing.assert_allclose(moments.m2, m2, rtol=weighted * bound["var"][name])
    np.testing.assert_allclose(np.ldexp(rstd, exponent), 1 / std, rtol=weighted * bound["var"][name])


def check_training(case, x, dy, exponent, along):
    options = case.keywords | case.epilogue
    y, saved = checks.fastbn.batch_norm(x, case.gamma, case.beta, **options)
    grads = checks.fastbn.batch_norm_backward(dy, saved)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **options)
    check_statistics(case, saved.moments, saved.rstd, exponent)
    assert_close("y", y, forward.y, checks.y_bound(case, forward))
    # The residual's gradient, which is dz, back at scale 1 as the others are.
    residual = None if grads.residual is None else scaled(grads.residual, -along)
    gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
    back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, residual)
    checks.check_gradients(case, y, saved, forward, back)


# --- beside other scales ----------------------------------------------------------------------------------------------


def exact_moments(values):
    """Mean and standard deviation of stored numbers in rational arithmetic; the root has 16 digits."""
    numbers = [Fraction(value) for value in values.tolist()]
    mean = sum(numbers) / len(numbers)
    var = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    unit = Fraction(2) ** ((var.numerator.bit_length() - var.denominator.bit_length()) // 2)
    return mean, Fraction(math.sqrt(var / unit**2)) * unit


def mixed(dtype):
    """Channels of numbers of several scales, in several orders, and constant ones."""
    rng, n = np.random.default_rng(11), 1024
    small, large = {"float32": (-110, 110), "float64": (-950, 950)}[dtype]
    rising = {"float32": (-60, -40, -36), "float64": (-460, -95, -85)}[dtype]

    def grid(exponent):
        return np.ldexp(np.round(rng.standard_normal(n) * 128) / 128, exponent)

    first, last, sparse = np.arange(n) < 200, np.arange(n) >= 800, np.arange(n) % 97 == 5
    channels = {
        "small, then ordinary": np.where(last, grid(0), grid(small)),
        "ordinary, then small": np.where(first, grid(0), grid(small)),
        "small, then large": np.where(last, grid(large), grid(small)),
        "large, then small": np.where(first, grid(large), grid(small)),
        "rising": np.concatenate([grid(e)[:m] for e, m in zip(rising, (250, 262, 512), strict=True)]),
        "ordinary, large here and there": np.where(sparse, grid(large), grid(0)),
        "0, small here and there": np.where(sparse, grid(small), 0),
        "0, then small": np.where(last, grid(small), 0),
        "one number is another": np.where(np.arange(n) == 600, np.ldexp(1.0, small), 0),
        "the first is another": np.where(np.arange(n) == 0, np.ldexp(1.0, small), 0),
        "constants of parts": np.repeat(np.ldexp(np.arange(4.0), small), n // 4),
        "small, far from 0": np.ldexp(rng.integers(0, 9, n) + 2.0**18, small),
        "large, far from 0": np.ldexp(rng.integers(0, 9, n) + 2.0**14, large),
        # Distances overflow, and the reciprocal deviation is a normal number.
        "both ends": np.where(sparse, np.where(first, 1, -1) * float(np.finfo(dtype).max), 0),
    }
    return {name: values.astype(dtype) for name, values in channels.items()}


def check_mixed(dtype, view):
    channels = mixed(dtype)
    x, axis = np.stack(list(channels.values())), 0
    if view == "columns":
        x, axis = np.ascontiguousarray(x.T), 1
    y, saved = checks.fastbn.batch_norm(x, channel_axis=axis, eps=0)
    stds = checks.fastbn.std(x, 1 - axis)
    within = {"float32": 1e-6, "float64": 1e-13}[dtype]
    for i, (name, values) in enumerate(channels.items()):
        mean, std = exact_moments(values)
        rounding = within * std + Fraction(2) ** -52 * abs(mean)
        for what, actual in {"mean": saved.mean, "rstd": saved.rstd, "std": stds}.items():
            assert np.isfinite(actual[i]), (what, name)
        assert abs(Fraction(float(saved.mean[i])) - mean) <= rounding, name
        assert abs(Fraction(float(saved.rstd[i])) * std - 1) <= within, name
        assert abs(Fraction(float(stds[i])) / std - 1) <= within, name
        expected = [float((Fraction(value) - mean) / std) for value in values.tolist()]
        np.testing.assert_allclose(np.take(y, i, axis), expected, rtol=within, atol=10 * within, err_msg=name)


# --- what is masked out -----------------------------------------------------------------------------------------------

GARBAGE = (np.nan, np.inf, -np.inf, 65504.0, 3e38)
MASKED = {"where": (True, False), "weights": (False, True), "both": (True, True)}


def masked_case(layout, dtype, kind, options="affine residual relu"):
    """A case, and which of the elements that weigh nothing are garbage; the others have a dy."""
    case = make_case(layout, dtype, OPTIONS[options])
    rng = np.random.default_rng(5)
    where, weights = MASKED[kind]
    empty = rng.random(layout.weight_shape) < 0.3
    if where:
        case.keywords["where"] = ~empty
    if weights:
        own = empty if not where else rng.random(layout.weight_shape) < 0.2
        case.keywords["weights"] = np.where(own, 0.0, rng.integers(1, 4, layout.weight_shape) * 0.5)
        empty = empty | own
    garbage = np.broadcast_to(empty, layout.shape) & (rng.random(layout.shape) < 0.7)
    case.dy[garbage] = 0
    case.x[garbage] = 0
    return case, garbage


def with_garbage(case, garbage):
    x = case.x.copy()
    with np.errstate(over="ignore"):
        x[garbage] = np.resize(np.array(GARBAGE), int(garbage.sum())).astype(case.dtype)
    return x


def check_masked(case, garbage, grads, clean, y):
    """Gradients as if 0 stood where there is garbage, and 0 there."""
    assert np.isfinite(grads.x.astype(float)).all()
    assert not grads.x[garbage].astype(float).any()
    checks.check_gradients(case, y, None, clean, grads)


def forward_over(case, garbage, cuda_arrays, **options):
    """y and saved of the kernels, with garbage; what the oracle makes without."""
    keywords = case.keywords | case.epilogue
    y, saved = cuda_arrays.batch_norm(with_garbage(case, garbage), case.gamma, case.beta, **keywords, **options)
    return y, saved, reference.batch_norm(case.x, case.gamma, case.beta, **keywords)


def check_whatever_a_channel_holds(case, kind):
    """What weighs nothing and has no gradient gets 0 where gamma is NaN, and where rstd is infinite."""
    layout = case.layout
    selected = np.random.default_rng(3).random(layout.weight_shape) < 0.5
    dead = np.broadcast_to(~selected, layout.shape)
    case.x[:, 1] = 7
    case.x[dead], case.dy[dead] = np.nan, 0
    gamma = np.where(np.arange(layout.channels[0]) == 0, np.nan, 1.0)
    mask = {kind: selected if kind == "where" else selected * 0.5}
    _, saved = checks.fastbn.batch_norm(case.x, gamma, **mask, eps=0)
    assert np.isinf(saved.rstd[1])
    grads = checks.fastbn.batch_norm_backward(case.dy, saved)
    assert not grads.x[dead].any()
    assert np.isnan(grads.x[:, :2][~dead[:, :2]]).all()
    assert np.isfinite(grads.x[:, 2:]).all()
    assert np.isfinite(np.delete(grads.gamma, 1)).all()
