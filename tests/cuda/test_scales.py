"""What lies at the ends of a type's range, and what is masked out, on CuPy arrays.

Scaling x by a power of two scales statistics and gradients by powers of two, and leaves y alone: results at any scale
are checked as those at scale 1 are, by the float64 oracle. Mixed scales have exact fractions for oracle. What weighs
nothing is replaced by 0 for the oracle.
"""

import itertools

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.cuda import plans
from tests import tolerances
from tests.cases import checks
from tests.cases.checks import assert_close
from tests.cuda.scales import (
    MASKED,
    SCALES,
    STRATEGIES,
    check_masked,
    check_mixed,
    check_statistics,
    check_training,
    check_whatever_a_channel_holds,
    forward_over,
    masked_case,
    on_a_grid,
    put_at_scale,
    scaled,
    statistics_keywords,
    with_garbage,
)
from tests.simt import cuda
from tests.support import DTYPES, OPTIONS, Layout, make_case, one_in, some_slow

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


@one_in(4, layout=BY_STRATEGY, dtype=DTYPES, options=["plain", "where"])
def test_strategies(planned, cuda_device, cuda_arrays, layout, dtype, options):
    """Are what they are called."""
    for strategy in STRATEGIES:
        planned(strategy)
        case = make_case(BY_STRATEGY[layout], dtype, OPTIONS[options])
        cuda_device.launches.clear()
        _, saved = cuda_arrays.batch_norm(case.x, **case.keywords)
        cuda_arrays.batch_norm_backward(case.dy, saved)
        kernels = [step.kernel for step in cuda_device.launches if not step.kernel.startswith("finish")]
        passes = ["statistics", "normalize", "grad_sums", "grad_input"]
        assert kernels == (passes if strategy == "two passes" else ["forward", "backward"])
        assert all(step.cooperative == (strategy == "cooperative") for step in cuda_device.launches)
        assert all((step.macros["CLUSTER"] > 1) == (strategy == "cluster") for step in cuda_device.launches)


# --- powers of two ----------------------------------------------------------------------------------------------------


def made(layout, dtype, options, exponent):
    """A case at scale 1, x and dy at the scale, and the exponent of dy."""
    case = make_case(layout, dtype, OPTIONS[options])
    return case, *put_at_scale(case, exponent)


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", cuda_arrays)


CASES = [
    pytest.param(dtype, options, marks=[] if dtype in chosen else pytest.mark.slow)
    for options, chosen in {
        "plain": ("float16", "float64"),
        "affine residual relu": ("float32",),
        "where weights residual": ("bfloat16",),
        "weights relu": (),
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
        y, saved = checks.fastbn.batch_norm(x, case.gamma, case.beta, **case.keywords, **one_rank)
        grads = checks.fastbn.batch_norm_backward(dy, saved, **one_rank)
        forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
        assert_close("y", y, forward.y, checks.y_bound(case, forward))
        gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
        back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, None)
        checks.check_gradients(case, y, saved, forward, back)


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
    distance = x.astype(float) - checks.spread(np.ldexp(reference.moments(case.x).mean, exponent), case)
    expected = 2 * distance / checks.spread(saved.count, case)
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
        assert_close("y", y, forward.y, checks.y_bound(case, forward))
        saved = fastbn.Saved.frozen(x, means, np.ones_like(var))._replace(rstd=rstd)
        grads = cuda_arrays.batch_norm_backward(dy, saved)
        gamma, beta = (np.ldexp(a, -along) for a in (grads.gamma, grads.beta))
        back = fastbn.Gradients(scaled(grads.x, exponent - along), gamma, beta, None)
        checks.check_gradients(case, y, saved, forward, back)
        if abs(exponent) < 500:
            inference = cuda_arrays.batch_norm_inference(x, means, np.ldexp(var, 2 * exponent), eps=0)
            assert_close("y", inference, forward.y, checks.y_bound(case, forward))


# --- beside other scales ----------------------------------------------------------------------------------------------


@one_in(2, view=["rows", "columns"], strategy=STRATEGIES, dtype=["float32", "float64"])
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
        distance = case.x - checks.spread(reference.mean(case.x, axes), case)
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


def test_subnormal_weights_count_as_0(planned, cuda_arrays):
    """Of float32 and bfloat16, as conversions are compiled; beside float32 data also float64 ones that are 0 there."""
    x = np.arange(64.0, dtype=np.float32).reshape(32, 2)
    for dtype, least, counts in (
        ("float32", -130, False), ("bfloat16", -130, False), ("float64", -130, False), ("float16", -24, True),
    ):  # fmt: skip
        weights = np.where(np.arange(32) % 4 == 0, np.ldexp(1.0, least), 1.0).astype(DTYPES[dtype])
        assert weights[0] > 0
        for strategy in ("block", "two passes"):
            planned(strategy)
            _, saved = cuda_arrays.batch_norm(x, weights=weights[:, None])
            seen = weights.astype(float) if counts else np.where(weights == 1, 1.0, 0.0)
            np.testing.assert_allclose(saved.mean, (seen @ x) / seen.sum(), rtol=1e-12)


# --- what is masked out -----------------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("kind", some_slow(MASKED, [*MASKED][::2]))
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
        check_masked(checks.case_without_residual(case), garbage, grads, clean, y)


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
