"""Public reports against other projects, tried on fastbn: what they found wrong must be right here.

A line a report, its id the tracker's. Each gives what was computed, what is true, and the relative error allowed: none
unless it is said; or it asserts by itself. True values are numbers worked out by hand, fractions, float64 formulas of
`fastbn.reference`, finite differences, or what PyTorch makes of contiguous float64 tensors.
"""

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests.cases.reports import BF16, F16, F32, F64, HALF_ULP, LARGEST, exact_var, hold, normal, reports, rng


@pytest.mark.parametrize("outcome", [(1, 2), (np.nan, 1), ([1, 1 + 1e-6], 1, 1e-7), (np.inf, -np.inf)])
def test_the_comparison_can_fail(outcome):
    with pytest.raises(AssertionError):
        hold(outcome)


# --- mean, var and std ------------------------------------------------------------------------------------------------


def column_of_many():
    x = np.zeros((10, 2), F32)
    x[:, 0] = 0.1
    return [*fastbn.var(x, axis=0), fastbn.var(x[:, 0], axis=0)], 0


def uniform_columns():
    x = rng().uniform(250, 320, (32 * 32 * 320, 4, 2)).astype(F32)
    return fastbn.mean(x, axis=(0, 1)), x.mean((0, 1), dtype=F64), 1e-7


def pictures():
    x = rng().random((20, 256, 256, 3), F32) * F32(255)
    return fastbn.mean(x, axis=(0, 1, 2)), x.mean((0, 1, 2), dtype=F64), 1e-7


def column_beside_itself():
    x = (rng().random((500_000, 2)) * 100).astype(F32)
    return fastbn.mean(x, axis=0)[0], fastbn.mean(x[:, 0]), 1e-7


def skewed():
    x = rng().lognormal(size=(10, 10, 200, 200)).astype(F32)
    return [fastbn.mean(x), fastbn.mean(x, axis=(0, 1, 2, 3))], x.mean(dtype=F64), 1e-7


def many_values():
    return fastbn.mean_var(np.tile(F32([0.25, 0.75]), 25_000_000)), [0.5, 0.0625]


def half_columns():
    x = rng().random((5000, 50)).astype(F16)
    return fastbn.mean(x, axis=0), x.mean(0, dtype=F64), HALF_ULP


def lengths_beyond_float32():
    n = 2**24 + 1
    x = np.zeros(n, F32)
    x[n // 2] = 2**24 - 1
    return [fastbn.mean(x), fastbn.moments(x[:, None]).count[0]], [F32((2**24 - 1) / n), n]


def first_value_far_off():
    """`moments` documents 1e-7 of |mean| + std, where std is 4096 times the mean."""
    x = np.zeros(2**24 + 1, F32)
    x[0] = 2**24 - 1
    assert abs(fastbn.mean(x) - 1) < 1e-7 * 4097


def uninitialised_values_under_a_mask():
    x, where = np.array([1.0, 3.0, np.nan, -1.5e304]), np.array([True, True, False, False])
    with np.errstate(all="raise"):
        return fastbn.var(x, where=where), 1


def mask_of_the_last_axis():
    x = rng().standard_normal((2, 3, 4))
    where = [False, True, False, True]
    return fastbn.mean(x, axis=2, where=where), (x[..., 1] + x[..., 3]) / 2, 1e-15


def nan_beside_a_mask():
    x = np.array([[1, 2, 4, np.inf], [np.nan, 1, 4, 16]])
    where = np.array([[True, True, True, False], [True, True, True, True]])
    return fastbn.var(x, axis=1, where=where), [14 / 9, np.nan], 1e-15


def values_at_the_end_of_float32():
    x = np.array([-1, -1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]) * F64(np.finfo(F32).max)
    return fastbn.std(x.astype(F32)), np.finfo(F32).max / 2, 1e-7


def short_windows():
    x = [0, 0, 3.16188252e-18, 2.95781651e-16, 2.23153542e-51, 0, 0, 5.39943432e-48, 1.38206260e-73, 0]
    windows = [x[i : i + 3] for i in range(8)]
    return [fastbn.var(w, ddof=1) for w in windows], [exact_var(w, 1) for w in windows], 1e-13


def large_mean_beside_fractions():
    x = np.random.default_rng(42).normal(1e8, 1, 1000)
    return fastbn.var(x, ddof=1), exact_var(x, 1), 1e-13


def never_negative():
    x = (100 + 1e-3 * rng().standard_normal((4096, 3))).astype(F32)
    assert (fastbn.var(x, axis=0) >= 0).all()
    return fastbn.var(x, axis=0), x.astype(F64).var(0), 1e-6


def integers_whose_squares_wrap_round():
    x = np.array([763, -970, 5, 300_000, -(2**40)], np.int64)
    return fastbn.var(x), exact_var(x), 1e-15


STATISTICS = {
    "numpy#5681 mean of float32 coins": lambda: (fastbn.mean(np.tile(F32([0, 1]), 2**24)), 0.5),
    "numpy#8170 mean of columns and of a column": column_beside_itself,
    "numpy#8869 mean of ones over two axes": lambda: (fastbn.mean(np.ones((5_000_000, 4, 2), F32), axis=(0, 1)), 1),
    "numpy#11331 mean of pictures": pictures,
    "numpy#14691 std of constant float32 columns": lambda: (
        fastbn.std(np.tile(F32([100, -100]), (1_000_000, 1)), axis=0),
        0,
    ),
    "numpy#20381 var of a column among others": column_of_many,
    "numpy#20684 mean of a constant column": lambda: (
        fastbn.mean(np.full((18, 3), -0.10294339, F32), axis=0),
        F32(-0.10294339),
    ),
    "numpy#22956 mean of ones over axis 0": lambda: (fastbn.mean(np.ones((20_000_000, 2), F32), axis=0), 1),
    "numpy#29772 mean of large float32 columns": uniform_columns,
    "numpy#9631 var of a constant float64": lambda: (fastbn.var([6715266981.538051] * 10), 0),
    "numpy#27782 std of a large constant": lambda: (fastbn.std(np.full(7, 45.0**10)), 0),
    "numpy#32445 std of constants": lambda: (
        [fastbn.std(np.full(1448, v, t), ddof=1) for t in (F32, F64) for v in (1.81, 0.576)],
        0,
    ),
    "bottleneck#443 std of a float32 constant": lambda: (fastbn.std(np.full(150_000, 271.46, F32)), 0),
    "bottleneck#462 mean and std of 50 million float32": many_values,
    "pandas#22385 mean and std of 1e6": lambda: (
        [fastbn.mean(np.full(60_000, 1e6, F32)), fastbn.std(np.full(60_000, 1e6, F32))],
        [1e6, 0],
    ),
    "pandas#10448 std of three equal values": lambda: (fastbn.std(np.full(3, 0.832845131556193)), 0),
    "pandas#52407 var of tiny windows": short_windows,
    "pandas#2888 var of large integers": integers_whose_squares_wrap_round,
    "xarray#1346 mean of 2^25 ones": lambda: (fastbn.mean(np.ones(2**25, F32)), 1),
    "xarray#2401 mean of a skewed float32 array": skewed,
    "numba#10647 divisor beyond 2^24": lengths_beyond_float32,
    "numba#10647 and an outlier first": first_value_far_off,
    "numpy#7930 mean of many float16": lambda: (fastbn.mean(np.resize(F16([0.5, 1.5]), 100_000)), 1),
    "numpy#7933 mean of float16 columns": half_columns,
    "numpy#8133 mean of a float16 picture": lambda: (fastbn.mean(np.resize(F16([100, 154]), (64, 64))), 127),
    "numpy#21941 var of many float16": lambda: (fastbn.var(np.resize(F16([-1, 1]), 100_000)), 1),
    "numpy#23075 mean of float16 over axis 0": lambda: (fastbn.mean(np.full((4350, 11), 300, F16), axis=0), 300),
    "pandas#43929 mean of large float16": lambda: (fastbn.mean(F16([60_000, 60_000])), 60_000),
    "pytorch#44350 mean and var near the end of a dtype": lambda: (
        [fastbn.mean_var(np.full(3, v, t)) for v, t in ((40_000, F16), (3e38, F32), (1.7e308, F64))],
        [[40_000, 0], [F32(3e38), 0], [1.7e308, 0]],
    ),
    "CommonLoopUtils#380 statistics of bfloat16 ones": lambda: (
        [fastbn.mean(np.ones(768, BF16)), fastbn.std(np.ones(768, BF16))],
        [1, 0],
    ),
    "numpy#18552 where of the last axis alone": mask_of_the_last_axis,
    "numpy#20493 no warning from under where": uninitialised_values_under_a_mask,
    "numpy#12461 NaN beside a mask": nan_beside_a_mask,
    "numpy#25362 an infinity of weight 0": lambda: (
        fastbn.moments(np.array([[np.inf], [1]]), weights=np.array([[0.0], [1]])).mean,
        1,
    ),
    "anesthetic#111 NaN of weight 0": lambda: (
        np.ravel(fastbn.moments(np.array([[np.nan], [1], [3]]), weights=np.array([[0.0], [1], [1]]))),
        [2, 2, 2],
    ),
    "WeightedOnlineStats.jl#42 the first weight is 0": lambda: (
        np.ravel(fastbn.moments(np.ones((3, 1)), weights=np.array([[0.0], [0.5], [1]]))),
        [1.5, 1, 0],
    ),
    "jax#37993 std near the end of float32": values_at_the_end_of_float32,
    "polars#27392 var at a mean of 1e8": large_mean_beside_fractions,
    "daft#7468 var of 1e9 + (1, 2, 3)": lambda: (fastbn.var([1e9 + 1, 1e9 + 2, 1e9 + 3], ddof=1), 1),
    "matrixone#27543 var of 1e12 + (0 ... 6)": lambda: (fastbn.var(1e12 + np.arange(7)), 4),
    "velox#4225 std of a large integer": lambda: (fastbn.std(np.full(4, -3833098290310622212)), 0),
    "crate#19760 std of a date in milliseconds": lambda: (fastbn.std(np.full(5, 1_783_468_800_000)), 0),
    "tensorflow#3290, #118701, flax#1491 negative variance": never_negative,
    "statsmodels#10252 var whose sum of squares overflows": lambda: (
        fastbn.var(2.0**511 * np.array([1, -1, 1, -1])),
        2.0**1022,
    ),
    "scikit-learn#5602 mean of values near the largest": lambda: (
        fastbn.mean(np.array([[1.7e308], [1.6e308]] * 8), axis=0),
        1.65e308,
        1e-15,
    ),
}


@reports(STATISTICS)
def test_statistics(report):
    hold(report())


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-21, 1e-19, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("columns", [1, 3])
def test_scales_of_float32(columns, size):
    """scikit-learn#19726, pytorch#162489, gluonts#3070, tt-metal#52614: the std of v and -v is v, whatever v is."""
    x = np.repeat(F32([[size], [-size]] * 100), columns, axis=1)
    size = F64(F32(size))
    hold((fastbn.std(x, axis=0), size, 1e-6))
    hold((fastbn.moments(x).std(), size, 1e-6))
    hold((fastbn.batch_norm(x, eps=0)[0], np.sign(x), 1e-6))
    hold((fastbn.batch_norm(x, eps=size**2)[0], np.sign(x) / np.sqrt(2), 1e-6))


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-150, 1e150, 1e200, 1e300])
def test_scales_of_float64(size):
    """The same reports: of float64."""
    x = np.array([[size], [-size]] * 100)
    hold((fastbn.std(x, axis=0), size, 1e-13))
    hold((fastbn.batch_norm(x, eps=0)[0], np.sign(x), 1e-13))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("log_weight", [600, 100, -60, -95, -110, -600])
def test_scales_of_weights(log_weight, dtype):
    """SSAPy#127, posterior#463, RestrictedBoltzmannMachines.jl#149: weights of any size give the same statistics."""
    x, dy, weights = normal(50, 3, dtype=dtype), normal(50, 3, dtype=dtype, seed=1), 0.5 + rng().random((50, 1))
    _, expected = fastbn.batch_norm(x.astype(F64), weights=weights)
    _, saved = fastbn.batch_norm(x, weights=weights * np.exp(log_weight))
    rtol = 1e-5 if dtype is F32 else 1e-12
    hold(([saved.mean, saved.moments.std()], [expected.mean, expected.moments.std()], rtol))
    dx = fastbn.batch_norm_backward(dy, saved).x
    expected_dx = fastbn.batch_norm_backward(dy.astype(F64), expected).x
    np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=rtol * abs(expected_dx).max())


# --- merging ----------------------------------------------------------------------------------------------------------

EMPTY = (0, np.nan, np.nan)


def merged(*parts):
    """Count, mean and M2 of one channel's parts."""
    return np.ravel(fastbn.merge(*(fastbn.Moments(*(np.array([v], F64) for v in part)) for part in parts)))


def infinities():
    one = (2, np.inf, np.nan)
    orders = [(one, (2, 1, 1)), ((2, 1, 1), one), (one, one), (one, (1, 5, 0), (2, 1, 1)), ((1, 5, 0), one, EMPTY, one)]
    return [merged(*parts)[1] for parts in orders], np.inf


def opposite_infinities():
    up, down = (1, np.inf, np.nan), (1, -np.inf, np.nan)
    return [merged(up, down)[1], merged(down, (1, 0, 0), up)[1], merged((1, np.nan, np.nan), up)[1]], np.nan


def batches_that_grow():
    x = rng().normal(1e3, 1, (160, 3))
    found = fastbn.merge(*(fastbn.moments(x[a:b]) for a, b in ((0, 3), (3, 20), (20, 160))))
    return found.var(1), x.var(0, ddof=1), 1e-11


MERGING = {
    "datafusion#13248, druid#11617 an empty part first": lambda: (merged(EMPTY, (2, 3, 4)), [2, 3, 4]),
    "whylogs#635 empty parts alone": lambda: (merged(EMPTY, EMPTY)[0], 0),
    "questdb#7165 an empty part between": lambda: (merged((1, 1, 0), EMPTY, (1, 3, 0)), [2, 2, 2]),
    "cudf#22391 an empty part and the largest float64": lambda: (merged((0, 0, 0), (1, LARGEST, 0)), [1, LARGEST, 0]),
    "ClickHouse#119721 the same, the other way round": lambda: (merged((16, 1e155, 0), (0, 0, 0)), [16, 1e155, 0]),
    "spark#57460 two parts of 1e155": lambda: (merged((0, 0, 0), (1, 1e155, 0), (1, 1e155, 0)), [2, 1e155, 0]),
    "scikit-learn#5602 parts at both ends": lambda: (merged((1, LARGEST, 0), (1, -LARGEST, 0))[1], 0),
    "scikit-learn#5602 a hundred parts of 1e303": lambda: (merged(*[(500_000, 1e303, 0)] * 100)[1:], [1e303, 0]),
    "scikit-learn#16448 parts that grow": batches_that_grow,
    "heat#2507 ranks of one value": lambda: (merged(EMPTY, EMPTY, (1, 1, 0), (1, 2, 0), (1, 6, 0)), [3, 3, 14]),
    "datatable#314 infinities of one sign": infinities,
    "datatable#314 infinities of both signs, NaN": opposite_infinities,
}


@reports(MERGING)
def test_merging(report):
    hold(report())


# --- batch norm of arrays ---------------------------------------------------------------------------------------------


def agree(x, channel_axis=1, rtol=2e-6, **options):
    """Forward and backward as the formulas have it; errors relative to the largest number."""
    dy = normal(*x.shape, dtype=x.dtype, seed=1)
    y, saved = fastbn.batch_norm(x, channel_axis=channel_axis, **options)
    grads = fastbn.batch_norm_backward(dy, saved)
    forward = reference.batch_norm(x, channel_axis=channel_axis, **options)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, forward)
    pairs = (y, forward.y), (grads.x, dx), (grads.gamma, dgamma), (grads.beta, dbeta)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual.astype(F64), expected, rtol=0, atol=rtol * max(1, abs(expected).max()))


def constants(dtype=F32):
    x = np.resize(np.array([100, 1e10, -0.087, np.log(1e-5), 14.62], F64), (22, 5)).astype(dtype)
    return fastbn.batch_norm(x, eps=1e-12)[0], 0


def running(batch, **options):
    return fastbn.update_running(np.zeros(1), np.ones(1), fastbn.moments(np.array(batch)[:, None]), **options)


def eps_is_in_no_statistics():
    _, saved = fastbn.batch_norm(np.array([[1.0], [3]]), eps=1.0)
    return [saved.moments.var()[0], saved.rstd[0]], [1, 0.5**0.5], 1e-15


def gamma_of_two_values():
    x, target = np.array([[0.18527887], [-1.23678724]]), np.array([[2.57767984], [-1.55019435]])
    y, saved = fastbn.batch_norm(x)
    grads = fastbn.batch_norm_backward(y - target, saved)
    xhat = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return [grads.gamma[0], grads.beta[0]], [((xhat - target) * xhat).sum(), (xhat - target).sum()], 1e-12


def frozen_backward():
    x, dy = normal(4, 3, dtype=F64), normal(4, 3, dtype=F64, seed=1)
    saved = fastbn.Saved.frozen(x, np.zeros(3), np.full(3, 3.0), eps=1)
    return fastbn.batch_norm_backward(dy, saved).x, dy / 2, 1e-15


def through_the_statistics():
    x, dy, h = normal(5, 2, dtype=F64), normal(5, 2, dtype=F64, seed=1), 1e-6
    _, saved = fastbn.batch_norm(x)
    e = np.zeros_like(x)
    e[1, 1] = h
    slope = (dy * (reference.batch_norm(x + e).y - reference.batch_norm(x - e).y)).sum() / (2 * h)
    np.testing.assert_allclose(fastbn.batch_norm_backward(dy, saved).x[1, 1], slope, rtol=1e-6, atol=1e-8)


def permuted():
    x = normal(3, 15, 15, 3).transpose(0, 3, 1, 2)
    return fastbn.batch_norm(x)[0], fastbn.batch_norm(x.copy())[0], 1e-4


def repeated_gradient():
    _, saved = fastbn.batch_norm(normal(4, 10))
    grads = fastbn.batch_norm_backward(np.broadcast_to(F32(1), (4, 10)), saved)
    assert abs(grads.x).max() < 1e-6
    return grads.beta, 4


def order_of_the_gradient():
    x = normal(2, 4, 5, 3).transpose(0, 3, 1, 2)
    return fastbn.batch_norm_backward(x, fastbn.batch_norm(x)[1]).x.strides, x.strides


def masked(value):
    """A padded position: it counts in no sum, whatever it holds, if no gradient arrives there."""
    x, dy = normal(6, 3, dtype=F64), normal(6, 3, dtype=F64, seed=1)
    where = np.arange(6)[:, None] < 4
    dy[4:], x[4:] = 0, value
    _, saved = fastbn.batch_norm(x, where=where)
    grads = fastbn.batch_norm_backward(dy, saved)
    _, alone = fastbn.batch_norm(x[:4])
    expected = fastbn.batch_norm_backward(dy[:4], alone)
    np.testing.assert_array_equal(grads.x[4:], 0)
    for actual, right in (grads.x[:4], expected.x), (grads.gamma, expected.gamma), (grads.beta, expected.beta):
        np.testing.assert_allclose(actual, right, rtol=0, atol=1e-12)


def fold_transposed(groups):
    """A transposed convolution with a kernel of one position: its weight is (in, out / groups, 1)."""
    kernel, x = normal(4, 3, 1, dtype=F64), normal(5, 4, dtype=F64, seed=1)
    mean, var, gamma, beta = normal(3 * groups, dtype=F64), 1 + rng().random(3 * groups), *normal(2, 3 * groups)

    def convolved(kernel, bias):
        inputs, kernels = np.split(x, groups, axis=1), np.split(kernel[..., 0], groups)
        return np.hstack([part @ weight for part, weight in zip(inputs, kernels, strict=True)]) + bias

    options = {} if groups == 1 else {"groups": groups}
    folded = fastbn.fold(kernel, None, mean, var, gamma, beta, axis=1, **options)
    expected = reference.batch_norm_inference(convolved(kernel, 0), mean, var, gamma, beta).y
    np.testing.assert_allclose(convolved(*folded), expected, rtol=1e-12, atol=1e-12)


ARRAYS = {
    "caffe#3963, pytorch#5410 constant channels": constants,
    "scikit-learn#3722, #17794, scipy#12815, StatsBase.jl#196 float64 constants": lambda: constants(F64),
    "tt-metal#45968, flax#1491 mean 5, std 0.1": lambda: agree(0.1 * normal(2, 64, 32, 32, loc=50)),
    "pytorch#162489 values of 1e30": lambda: agree(1e30 * normal(8, 3, 4, 4)),
    "pytorch#147303, tensorflow#30230 more float16 than it can count": lambda: agree(
        normal(8, 96, 96, 3, dtype=F16), -1, 1e-3
    ),
    "coreai-torch#54 float16 and variances beyond it": lambda: (
        fastbn.batch_norm_inference(F16([[100, 0]]), np.zeros(2, F32), F32([1e6, 1e-9]))[0, 0],
        0.1,
        HALF_ULP,
    ),
    "pytorch#57077, apex#1768 65 channels, channels-last": lambda: agree(normal(1, 100, 100, 65, loc=3), -1),
    "apex#411 more than 2^16 rows": lambda: agree(normal(2**16 + 1, 3)),
    "oneDNN#14 one position": lambda: agree(normal(2, 10, 1, 1)),
    "MIOpen#1109 one position, 1024 samples": lambda: agree(normal(1024, 2, 1, 1)),
    "MIOpen#1974 one sample, many positions": lambda: agree(normal(1, 16, 32, 64, 64)),
    "mxnet#14559 other axes": lambda: [agree(normal(3, 4, 5, 6), axis) for axis in (0, 2, 3)] and None,
    "deeplearning4j#8597, pytorch#63224 permuted input": lambda: agree(normal(3, 15, 15, 3).transpose(0, 3, 1, 2)),
    "pytorch#1866 a gradient of stride 0": repeated_gradient,
    "pytorch#107199 the gradient's order of elements": order_of_the_gradient,
    "mxnet#12899 gamma's gradient of two values": gamma_of_two_values,
    "CrypTen#143 the gradient through mean and variance": through_the_statistics,
    "torch/nn#768, pytorch#586 evaluation's gradient": frozen_backward,
    "tensorflow#34062, Flux.jl#1992, pytorch#1381 running variance of one value": lambda: (running([5.0]), [[0], [1]]),
    "pytorch#12013 running statistics of no value": lambda: (running(np.empty(0)), [[0], [1]]),
    "pytorch#7028, tt-metal#55438, mlx#3817, keras#10443 running variance": lambda: (
        running([1.0, 2, 3, 4], rate=1),
        [[2.5], [5 / 3]],
        1e-15,
    ),
    "chainer#4505, #7506, nntrainer#677 eps in no statistics": eps_is_in_no_statistics,
    "chainer#2214 eps in evaluation": lambda: (
        fastbn.batch_norm_inference(np.ones((1, 1)), np.zeros(1), np.full(1, 3.0), eps=1.0),
        0.5,
    ),
    "keras#15451 NaN under a mask": lambda: masked(np.nan),
    "tensorflow#30161 an infinity under a mask": lambda: masked(np.inf),
    "ultralytics#25364 fold into a transposed convolution": lambda: fold_transposed(1),
    "pytorch#180995, #184076 and into one of groups": lambda: fold_transposed(2),
}  # fmt: skip


@reports(ARRAYS)
def test_arrays(report):
    hold(report())
