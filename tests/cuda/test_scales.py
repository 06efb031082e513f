"""What lies at the ends of a type's range, and what is masked out, on CuPy arrays.

Scaling x by a power of two scales statistics and gradients by powers of two, and leaves y alone: results at any scale
are checked as those at scale 1 are, by the float64 oracle. Mixed scales have exact fractions for oracle. What weighs
nothing is replaced by 0 for the oracle.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.cuda import plans
from tests import tolerances
from tests.api import test_matrix
from tests.api.test_matrix import assert_close
from tests.simt import cuda
from tests.support import DTYPES, OPTIONS, Layout, make_case

STRATEGIES = ("block", "cluster", "cooperative", "two passes")
BY_STRATEGY = {"channels first": Layout((3, 5, 6, 44)), "channels last": Layout((90, 20))}
"""Small enough for a block, in several chunks."""
SPLIT = {"channels first": Layout((6, 3, 12, 60)), "channels last": Layout((400, 20))}
"""Large enough for several blocks of a pass, whose parts are merged."""


@pytest.fixture
def planned(cuda_arrays, monkeypatch):
    """A function that chooses the strategy of all that follows."""

    def choose(strategy):
        monkeypatch.setitem(plans.FORCED, "strategy", strategy)
        cuda.forget()

    yield choose
    monkeypatch.undo()
    cuda.forget()


by_layout = pytest.mark.parametrize("layout", BY_STRATEGY.values(), ids=BY_STRATEGY)
by_split_layout = pytest.mark.parametrize("layout", SPLIT.values(), ids=SPLIT)


@by_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "where"])
def test_strategies(planned, cuda_device, cuda_arrays, layout, dtype, options):
    """Are what they are called."""
    for strategy in STRATEGIES:
        planned(strategy)
        case = make_case(layout, dtype, OPTIONS[options])
        cuda_device.launches.clear()
        _, saved = cuda_arrays.batch_norm(case.x, **case.keywords)
        cuda_arrays.batch_norm_backward(case.dy, saved)
        kernels = [step.kernel for step in cuda_device.launches]
        passes = ["statistics", "normalize", "grad_sums", "grad_input"]
        assert kernels == (passes if strategy == "two passes" else ["forward", "backward"])
        assert all(step.cooperative == (strategy == "cooperative") for step in cuda_device.launches)
        assert all((step.macros["CLUSTER"] > 1) == (strategy == "cluster") for step in cuda_device.launches)


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


def made(layout, dtype, options, exponent):
    """A case at scale 1, x and dy at the scale, and the exponent of dy."""
    case = make_case(layout, dtype, OPTIONS[options])
    return case, *put_at_scale(case, exponent)


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
    y, saved = test_matrix.fastbn.batch_norm(x, case.gamma, case.beta, **options)
    grads = test_matrix.fastbn.batch_norm_backward(dy, saved)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **options)
    check_statistics(case, saved.moments, saved.rstd, exponent)
    assert_close("y", y, forward.y, test_matrix.y_bound(case, forward))
    # The residual's gradient, which is dz, back at scale 1 as the others are.
    residual = None if grads.residual is None else scaled(grads.residual, -along)
    gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
    back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, residual)
    test_matrix.check_gradients(case, y, saved, forward, back)


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(test_matrix, "fastbn", cuda_arrays)


CASES = [
    pytest.param(dtype, options, marks=[] if dtype in chosen else pytest.mark.slow)
    for options, chosen in {
        "plain": ("float32", "float64", "float16", "bfloat16"),
        "affine residual relu": ("float32",),
        "where weights residual": ("float64",),
        "weights relu": ("float32",),
    }.items()
    for dtype in SCALES
]


@by_layout
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_training_at_any_scale(planned, on_cupy, layout, dtype, options):
    strategies = itertools.cycle(STRATEGIES)
    for exponent in SCALES[dtype]:
        planned(next(strategies))
        check_training(*made_for_check(layout, dtype, options, exponent))


def made_for_check(layout, dtype, options, exponent):
    case, x, dy, along = made(layout, dtype, options, exponent)
    return case, x, dy, exponent, along


@by_layout
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_strategy_at_both_ends(planned, on_cupy, layout, strategy, dtype):
    planned(strategy)
    for exponent in (SCALES[dtype][0], SCALES[dtype][-1]):
        check_training(*made_for_check(layout, dtype, "plain", exponent))


@by_split_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", ["plain", "weights relu"])
def test_parts_of_several_blocks_at_both_ends(planned, on_cupy, layout, dtype, options):
    planned("two passes")
    for exponent in (SCALES[dtype][0], SCALES[dtype][-1]):
        check_training(*made_for_check(layout, dtype, options, exponent))


@by_split_layout
@pytest.mark.parametrize("dtype", SCALES)
def test_moments_at_any_scale(planned, cuda_arrays, layout, dtype):
    """By themselves, whose parts another kernel merges."""
    planned(None)
    for exponent, options in itertools.product(SCALES[dtype], ["plain", "where"]):
        case, x, _, _ = made(layout, dtype, options, exponent)
        moments = cuda_arrays.moments(x, **statistics_keywords(case))
        with np.errstate(all="ignore"):
            rstd = 1 / np.sqrt(moments.m2 / moments.count)
        if dtype == "float64":
            expected = reference.moments(case.x, **statistics_keywords(case))
            rstd = np.ldexp(np.sqrt(expected.count / expected.m2), -exponent)  # which moments do not have
        check_statistics(case, moments, rstd, exponent)


@by_split_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_drop_ins_at_any_scale(planned, cuda_arrays, layout, dtype):
    planned(None)
    axes = tuple(axis for axis in range(len(layout.shape)) if axis not in layout.kept)
    for exponent, where in itertools.product(SCALES[dtype], [False, True]):
        case, x, _, _ = made(layout, dtype, "plain", exponent)
        options = {"where": np.random.default_rng(3).random(x.shape) < 0.8} if where else {}
        var = np.ldexp(reference.var(case.x, axes, 1, **options).astype(np.longdouble), 2 * exponent)
        rounding = 2 * tolerances.ROUNDING[dtype] + tolerances.BOUNDS["var"][dtype]
        std = cuda_arrays.std(x, axes, ddof=1, **options)
        assert std.dtype == x.dtype
        np.testing.assert_allclose(std.astype(np.longdouble), np.sqrt(var), rtol=rounding)
        with np.errstate(over="ignore", under="ignore"):
            expected = var.astype(dtype)  # 0 or infinite where the dtype ends
        close = {"rtol": rounding, "atol": np.finfo(dtype).tiny}  # subnormal results are 0, or rounded
        np.testing.assert_allclose(cuda_arrays.var(x, axes, ddof=1, **options), expected, **close)
        np.testing.assert_allclose(cuda_arrays.mean_var(x, axes, correction=1, **options)[1], expected, **close)


def test_a_variance_whose_squares_overflow_only_together(cuda_arrays):
    x = np.where(np.arange(4096) % 2, 1e153, -1e153)
    assert cuda_arrays.moments(x[:, np.newaxis]).m2[0] == np.inf
    np.testing.assert_allclose(cuda_arrays.var(x), 1e306, rtol=1e-14)
    np.testing.assert_allclose(cuda_arrays.mean_var(x)[1], 1e306, rtol=1e-14)


@by_layout
def test_synchronised_at_any_scale(planned, on_cupy, layout):
    """The ways of one rank among others: statistics, sums and dx by kernels of their own, numbers by formulas."""
    planned(None)
    for exponent in SCALES["float32"]:
        case, x, dy, along = made(layout, "float32", "where", exponent)
        one_rank = {"gather": lambda vector: vector[np.newaxis]}
        y, saved = test_matrix.fastbn.batch_norm(x, case.gamma, case.beta, **case.keywords, **one_rank)
        grads = test_matrix.fastbn.batch_norm_backward(dy, saved, **one_rank)
        forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
        assert_close("y", y, forward.y, test_matrix.y_bound(case, forward))
        gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
        back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, None)
        test_matrix.check_gradients(case, y, saved, forward, back)


@by_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_statistics_at_any_scale(planned, cuda_arrays, layout, dtype):
    """dmean and dvar, of the sizes that go with dx."""
    rng = np.random.default_rng(7)
    strategies = itertools.cycle(STRATEGIES)
    for exponent in (e for e in SCALES[dtype] if abs(e) < 400):
        planned(next(strategies))
        case, x, dy, along = made(layout, dtype, "plain", exponent)
        dmean, dvar = rng.standard_normal((2, *layout.channels)) * 30
        _, saved = cuda_arrays.batch_norm(x, **case.keywords)
        of = {"dmean": np.ldexp(dmean, along - exponent), "dvar": np.ldexp(dvar, along - 2 * exponent)}
        dx = scaled(cuda_arrays.batch_norm_backward(dy, saved, **of).x, exponent - along)
        forward = reference.batch_norm(case.x, **case.keywords)
        expected, *_ = reference.batch_norm_backward(case.dy, forward, dmean=dmean, dvar=dvar)
        np.testing.assert_allclose(dx, expected, atol={"float32": 1e-5, "float64": 1e-13}[dtype])


@by_layout
@pytest.mark.parametrize("strategy", ["block", "two passes"])
@pytest.mark.parametrize(("dtype", "exponent"), [("float32", 100), ("float64", 900)])
def test_large_gradients_of_statistics_of_large_data(planned, cuda_arrays, layout, strategy, dtype, exponent):
    """Beside which the rest of dx is nothing."""
    planned(strategy)
    case, x, _, _ = made(layout, dtype, "plain", exponent)
    _, saved = cuda_arrays.batch_norm(x, **case.keywords)
    dx = cuda_arrays.batch_norm_backward(case.dy, saved, dvar=np.ones(layout.channels)).x
    distance = x.astype(float) - test_matrix.spread(np.ldexp(reference.moments(case.x).mean, exponent), case)
    expected = 2 * distance / test_matrix.spread(saved.count, case)
    np.testing.assert_allclose(dx, expected, atol=1e-6 * np.abs(expected).max())


@by_layout
@pytest.mark.parametrize(
    ("dtype", "exponent", "of_gamma", "of_dy"),
    [
        ("float32", -90, -90, 0),  # takes dx back to 1
        ("float32", 90, 90, 0),
        ("float32", -110, 60, -100),  # gamma * rstd is beyond float32
        ("float32", 110, -20, 100),
        ("float64", -900, -900, 0),
        ("float64", 900, 900, 0),
        ("float64", -1000, 200, -900),
    ],
)
def test_gamma_of_another_scale(planned, on_cupy, layout, dtype, exponent, of_gamma, of_dy):
    for strategy in ("block", "two passes"):
        planned(strategy)
        case, x, _, _ = made(layout, dtype, "plain", exponent)
        case.gamma = np.ldexp(np.linspace(1, 2, layout.channels[0]), of_gamma)
        check_training(case, x, scaled(case.dy, of_dy), exponent, of_dy)


@by_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_given_statistics_at_any_scale(planned, cuda_arrays, layout, dtype):
    """Inference, its backward pass, and the kernels by themselves."""
    planned(None)
    for exponent in SCALES[dtype]:
        case, x, dy, along = made(layout, dtype, "plain", exponent)
        mean, var = np.random.default_rng(9).random((2, *layout.channels)) + 0.5
        means, rstd = np.ldexp(mean, exponent), np.ldexp(1 / np.sqrt(var), -exponent)
        forward = reference.batch_norm_inference(case.x, mean, var, eps=0)
        y = cuda_arrays.normalize(x, means, rstd)
        assert_close("y", y, forward.y, test_matrix.y_bound(case, forward))
        saved = fastbn.Saved.frozen(x, means, np.ones_like(var))._replace(rstd=rstd)
        grads = cuda_arrays.batch_norm_backward(dy, saved)
        gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
        back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, None)
        test_matrix.check_gradients(case, y, saved, forward, back)
        if abs(exponent) < 500:
            inference = cuda_arrays.batch_norm_inference(x, means, np.ldexp(var, 2 * exponent), eps=0)
            assert_close("y", inference, forward.y, test_matrix.y_bound(case, forward))


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
    y, saved = test_matrix.fastbn.batch_norm(x, channel_axis=axis, eps=0)
    stds = test_matrix.fastbn.std(x, 1 - axis)
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


@pytest.mark.parametrize("view", ["rows", "columns"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mixed_scales(planned, on_cupy, dtype, strategy, view):
    planned(strategy)
    check_mixed(dtype, view)


def test_dead_channels_go_the_common_way(planned, cuda_arrays):
    """Constant ones have variance 0 exactly, at every scale."""
    planned(None)
    for dtype, constants in {"float32": (0.0, 0.1, 1e-37, 3e38), "float64": (0.0, 0.1, 1e-300, 1.7e308)}.items():
        x = np.tile(np.array(constants, dtype), (301, 1))
        moments = cuda_arrays.moments(x)
        np.testing.assert_array_equal(moments.m2, 0)
        np.testing.assert_array_equal(moments.mean, x[0])
        y, saved = cuda_arrays.batch_norm(x, beta=np.arange(4.0), eps=1e-5)
        np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4.0), x.shape))
        dx = cuda_arrays.batch_norm_backward(np.ones_like(x), saved).x
        np.testing.assert_allclose(dx, 0, atol=1e-4)  # rstd is 316


@by_layout
@pytest.mark.parametrize("eps", [1e-5, 1e-20])
def test_small_data_beside_eps(planned, cuda_arrays, layout, eps):
    """y is far below 1, and as exact; so where the low part of a mean of 2500 deviations would be subnormal."""
    axes = tuple(axis for axis in range(len(layout.shape)) if axis not in layout.kept)
    for strategy in ("block", "two passes"):
        planned(strategy)
        case = make_case(layout, "float32", OPTIONS["plain"], mean=5000.0)
        case.x = on_a_grid(case.x, np.float32)
        y, saved = cuda_arrays.batch_norm(scaled(case.x, -119), eps=eps)
        distance = case.x - test_matrix.spread(reference.mean(case.x, axes), case)
        expected = np.ldexp(distance / np.sqrt(eps), -119)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        dgamma, terms = ((form(case.dy.astype(float) * expected)).sum(axes) for form in (np.positive, np.abs))
        grads = cuda_arrays.batch_norm_backward(case.dy, saved)
        assert_close("dgamma", grads.gamma, dgamma, tolerances.summed("float32", terms))


def test_subnormal_numbers_count_as_0(cuda_arrays):
    """Of float32 and bfloat16, since CuPy compiles kernels so. Those of float16 count."""
    for dtype in ("float32", "bfloat16"):
        x = np.ldexp(np.arange(64.0).reshape(32, 2), -133).astype(DTYPES[dtype])
        assert x[1, 0] != 0
        moments = cuda_arrays.moments(x)
        assert not moments.mean.any()
        assert not moments.m2.any()
    x = np.ldexp(np.arange(64.0).reshape(32, 2), -24).astype(np.float16)
    np.testing.assert_allclose(cuda_arrays.moments(x).mean, x.astype(float).mean(0), rtol=1e-7)


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
    test_matrix.check_gradients(case, y, None, clean, grads)


def forward_over(case, garbage, cuda_arrays, **options):
    """y and saved of the kernels, with garbage; what the oracle makes without."""
    keywords = case.keywords | case.epilogue
    y, saved = cuda_arrays.batch_norm(with_garbage(case, garbage), case.gamma, case.beta, **keywords, **options)
    return y, saved, reference.batch_norm(case.x, case.gamma, case.beta, **keywords)


@by_layout
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", "affine residual relu"),
        ("float64", "plain"),
        ("float16", "plain"),
        ("bfloat16", "affine residual relu"),
    ],
)
def test_what_is_masked_out_stays_out(planned, cuda_arrays, layout, kind, dtype, options):
    for strategy in STRATEGIES:
        planned(strategy)
        case, garbage = masked_case(layout, dtype, kind, options)
        y, saved, clean = forward_over(case, garbage, cuda_arrays)
        check_masked(case, garbage, cuda_arrays.batch_norm_backward(case.dy, saved), clean, y)


@by_split_layout
@pytest.mark.parametrize("kind", MASKED)
def test_what_is_masked_out_of_parts_of_several_blocks(planned, cuda_arrays, layout, kind):
    planned("two passes")
    case, garbage = masked_case(layout, "float32", kind)
    y, saved, clean = forward_over(case, garbage, cuda_arrays)
    check_masked(case, garbage, cuda_arrays.batch_norm_backward(case.dy, saved), clean, y)


@by_layout
@pytest.mark.parametrize("kind", MASKED)
def test_what_is_masked_out_of_one_rank(planned, cuda_arrays, layout, kind):
    """The sums and dx by kernels of their own."""
    planned(None)
    case, garbage = masked_case(layout, "float32", kind)
    one_rank = {"gather": lambda vector: vector[np.newaxis]}
    y, saved, clean = forward_over(case, garbage, cuda_arrays, **one_rank)
    check_masked(case, garbage, cuda_arrays.batch_norm_backward(case.dy, saved, **one_rank), clean, y)


@by_layout
@pytest.mark.parametrize("kind", MASKED)
def test_what_is_masked_out_with_frozen_statistics(planned, cuda_arrays, layout, kind):
    for strategy in STRATEGIES:
        planned(strategy)
        case, garbage = masked_case(layout, "float32", kind)
        mean, var = np.random.default_rng(2).random((2, *layout.channels)) + 0.5
        arguments, x = (mean, var, case.gamma, case.beta), with_garbage(case, garbage)
        y = cuda_arrays.batch_norm_inference(x, *arguments, **case.epilogue)
        saved = fastbn.Saved.frozen(x, mean, var, case.gamma, y=y, activation="relu")
        _, trained = cuda_arrays.batch_norm(x, **case.keywords)
        grads = cuda_arrays.batch_norm_backward(case.dy, saved._replace(weight=trained.weight))
        clean = reference.batch_norm_inference(case.x, *arguments, **case.epilogue)
        check_masked(test_matrix.case_without_residual(case), garbage, grads, clean, y)


def check_whatever_a_channel_holds(case, kind):
    """What weighs nothing and has no gradient gets 0 where gamma is NaN, and where rstd is infinite."""
    layout = case.layout
    selected = np.random.default_rng(3).random(layout.weight_shape) < 0.5
    dead = np.broadcast_to(~selected, layout.shape)
    case.x[:, 1] = 7
    case.x[dead], case.dy[dead] = np.nan, 0
    gamma = np.where(np.arange(layout.channels[0]) == 0, np.nan, 1.0)
    mask = {kind: selected if kind == "where" else selected * 0.5}
    _, saved = test_matrix.fastbn.batch_norm(case.x, gamma, **mask, eps=0)
    assert np.isinf(saved.rstd[1])
    grads = test_matrix.fastbn.batch_norm_backward(case.dy, saved)
    assert not grads.x[dead].any()
    assert np.isnan(grads.x[:, :2][~dead[:, :2]]).all()
    assert np.isfinite(grads.x[:, 2:]).all()
    assert np.isfinite(np.delete(grads.gamma, 1)).all()


@by_layout
@pytest.mark.parametrize("kind", ["where", "weights"])
def test_whatever_a_channel_holds(planned, on_cupy, layout, kind):
    for strategy in STRATEGIES:
        planned(strategy)
        check_whatever_a_channel_holds(make_case(layout, "float32"), kind)


@by_layout
@pytest.mark.parametrize("kind", ["where", "weights"])
def test_nothing_is_selected(planned, cuda_arrays, layout, kind):
    """Neither a mean nor an rstd: 0 without a gradient, NaN with one."""
    for strategy in STRATEGIES:
        planned(strategy)
        case = make_case(layout, "float32")
        nothing = np.zeros(layout.weight_shape, {"where": bool, "weights": float}[kind])
        _, saved = cuda_arrays.batch_norm(case.x, **{kind: nothing})
        assert np.isnan(saved.mean).all()
        grads = cuda_arrays.batch_norm_backward(0 * case.dy, saved)
        for gradient in grads[:3]:
            assert not gradient.any()
        assert np.isnan(cuda_arrays.batch_norm_backward(case.dy, saved).x[case.dy != 0]).all()


def test_a_gradient_of_what_weighs_nothing_counts(planned, cuda_arrays):
    """By hand: dx = rstd dz there, and the sums have it."""
    planned("block")
    x = np.array([[1.0], [3.0], [4.0], [np.nan]])
    where = np.array([[True], [True], [False], [False]])
    _, saved = cuda_arrays.batch_norm(x, where=where, eps=0)
    grads = cuda_arrays.batch_norm_backward(np.array([[0.0], [0.0], [2.0], [0.0]]), saved)
    np.testing.assert_allclose(grads.beta, [2])
    np.testing.assert_allclose(grads.gamma, [4])
    np.testing.assert_allclose(grads.x, [[-(2 - 4) / 2], [-(2 + 4) / 2], [2], [0]])
    grads = cuda_arrays.batch_norm_backward(np.array([[0.0], [0.0], [2.0], [1.0]]), saved)
    assert np.isnan(grads.gamma).all()
