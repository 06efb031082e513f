"""Data of every magnitude: times a power of two, results are the same or times a power of two.

The oracle is the float64 formula on data near 1, which kernels see scaled: nothing that could underflow or overflow.
"""

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests.support import DTYPES, LAYOUTS, Layout
from tests.tolerances import BOUNDS, summed

EXPONENTS = {
    "float16": [-4, 12],
    "bfloat16": [-100, -75, -62, 62, 120],
    "float32": [-118, -75, -62, -50, 50, 62, 100, 120],
    "float64": [-960, -600, -530, -460, 460, 508, 600, 1010],
}
SHAPES = {
    "rows": LAYOUTS["NCHW"],
    "long rows": Layout((2, 3, 70_001)),
    "short rows": LAYOUTS["NCHW short rows"],
    "columns": LAYOUTS["NHWC many rows"],
    "collapsed": Layout((9000, 3), -1),
    "instance": LAYOUTS["instance NHWC"],
}
CASES = [
    pytest.param(dtype, k, marks=[] if dtype in ("float32", "float64") or k in (-75, -4) else [pytest.mark.slow])
    for dtype in DTYPES
    for k in EXPONENTS[dtype]
]


def scaled(values, dtype, exponent):
    """Times a power of two in a dtype, and the same before."""
    values = values.astype(DTYPES[dtype])
    return values, np.ldexp(values.astype(np.float64), exponent).astype(DTYPES[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "exponent"), CASES)
def test_statistics(shape, dtype, exponent):
    layout = SHAPES[shape]
    near_1, x = scaled(np.random.default_rng(0).standard_normal(layout.shape) * 2 + 1, dtype, exponent)
    expected = reference.moments(near_1, channel_axis=layout.channel_axis)
    found = fastbn.moments(x, channel_axis=layout.channel_axis)
    std = np.sqrt(expected.m2 / expected.count)
    mean = np.ldexp(found.mean, -exponent)
    np.testing.assert_allclose(mean, expected.mean, rtol=0, atol=BOUNDS["mean"][dtype] * (1 + std.max()))
    with np.errstate(over="ignore"):
        m2 = np.ldexp(expected.m2, 2 * exponent)
    np.testing.assert_allclose(found.m2, m2, rtol=BOUNDS["var"][dtype], atol=1e-320)  # subnormal ones have few digits
    axes = tuple(axis for axis in range(x.ndim) if axis not in layout.kept)
    with np.errstate(under="ignore"):
        result = fastbn.std(x, axes, dtype=np.float64)
    np.testing.assert_allclose(np.ldexp(result, -exponent), std, rtol=max(BOUNDS["var"][dtype], 1e-13))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "exponent"), CASES)
def test_training_and_inference(shape, dtype, exponent):
    """With eps = 0 the output does not depend on the scale, nor do the parameters' gradients; that of x does."""
    layout, rng = SHAPES[shape], np.random.default_rng(0)
    near_1, x = scaled(rng.standard_normal(layout.shape) * 2 + 1, dtype, exponent)
    dy = rng.standard_normal(layout.shape).astype(x.dtype)
    gamma = rng.standard_normal(layout.channels)
    keywords = {"channel_axis": layout.channel_axis, "eps": 0}
    y, saved = fastbn.batch_norm(x, gamma, **keywords)
    forward = reference.batch_norm(near_1, gamma, **keywords)
    rounding = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-13}[dtype]
    np.testing.assert_allclose(y.astype(np.float64), forward.y, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(np.ldexp(saved.rstd, exponent), forward.rstd, rtol=max(BOUNDS["var"][dtype], 1e-13))
    if dtype != "float64" or abs(exponent) < 500:  # whose variance float64 holds
        var = np.ldexp(forward.statistics.m2 / forward.statistics.count, 2 * exponent)
        inference = fastbn.batch_norm_inference(x, np.ldexp(forward.mean, exponent), var, gamma, **keywords)
        np.testing.assert_allclose(inference.astype(np.float64), forward.y, rtol=rounding, atol=rounding)
    gradients = fastbn.batch_norm_backward(dy, saved)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, forward)
    axes = tuple(axis for axis in range(x.ndim) if axis not in layout.kept)
    size, xhat = np.abs(dy.astype(np.float64)), np.abs(reference.batch_norm(near_1, **keywords).y)
    # The rounding of mean and rstd themselves enters dgamma by 1e-7 of each term.
    assert (np.abs(gradients.gamma - dgamma) <= summed(dtype, (size * (xhat + 0.1)).sum(axes))).all()
    assert (np.abs(gradients.beta - dbeta) <= summed(dtype, size.sum(axes))).all()
    if dtype != "float16":  # where that of x may overflow
        found = np.ldexp(gradients.x.astype(np.float64), exponent)
        np.testing.assert_allclose(found, dx, rtol=2 * rounding, atol=2 * rounding * np.abs(dx).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "pattern",
    {
        "balanced about the first value": [0, 1, -1],
        "alternating": [1, -1],
        "two constant halves": [0] * 6000 + [1] * 6000,
        "one among equals": [0] * 5000 + [1],
        "a constant chunk, and others": [0] * 4096 + [1, 0, -1, 0] * 1024,
    }.items(),
    ids=lambda item: item[0],
)
def test_what_looks_constant_when_squared(dtype, axis, pattern):
    """Sums of squares underflow to 0, or even sums of deviations cancel: still not a constant."""
    exponent = {"float32": -100, "float64": -800}[dtype]
    values = np.resize(pattern[1], max(12_000, len(pattern[1]))).astype(np.float64)
    values = np.stack([values, np.roll(values, 1), np.zeros_like(values)], axis=axis)
    near_1, x = scaled(values, dtype, exponent)
    found = fastbn.moments(x, channel_axis=axis)  # by float32 kernels; of float64, m2 itself underflows
    std = found.std() if dtype == "float32" else fastbn.std(x, axis=1 - axis)
    np.testing.assert_allclose(np.ldexp(std, -exponent), np.std(near_1.astype(np.float64), axis=1 - axis), rtol=1e-7)
    mean = np.ldexp(found.mean, -exponent)
    np.testing.assert_allclose(mean, np.mean(near_1.astype(np.float64), axis=1 - axis), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-4, 3.0])
@pytest.mark.parametrize("axis", [1, -1])
def test_constant_beside_small(dtype, value, axis):
    """What is constant stays so beside channels whose squares underflow: variance 0 and, with eps, exactly beta."""
    x = np.full((4, 6, 40, 6), value, DTYPES[dtype])
    rng = np.random.default_rng(0)
    np.moveaxis(x, axis, 0)[1:3] = rng.standard_normal((2, *np.moveaxis(x, axis, 0).shape[1:])) * 1e-25
    y, saved = fastbn.batch_norm(x, beta=np.full(6, 0.25), channel_axis=axis)
    constant = [0, 3, 4, 5]
    assert (saved.moments.m2[constant] == 0).all()
    assert (np.take(y, constant, axis) == np.asarray(0.25, x.dtype)).all()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("dtype", "exponent"),  # -133 is bfloat16's smallest number
    [("bfloat16", -126), ("bfloat16", -130), ("float32", -126), ("float32", -130), ("float32", -138)],
)
def test_subnormal_data(dtype, layout, exponent):
    """1 / std is beyond float32 then, the output is not: in place too, and in a second call alike."""
    layout, rng = LAYOUTS[layout], np.random.default_rng(0)
    values = rng.integers(-3, 4, layout.shape).astype(np.float64)
    x = np.ldexp(values, exponent).astype(DTYPES[dtype])
    keywords = {"channel_axis": layout.channel_axis, "eps": 0}
    forward = reference.batch_norm(values, **keywords)
    rounding = {"bfloat16": 8e-3, "float32": 1e-6}[dtype]

    def check(y):
        np.testing.assert_allclose(y.astype(np.float64), forward.y, rtol=rounding, atol=rounding)

    for _ in range(2):
        y, saved = fastbn.batch_norm(x, **keywords)
        check(y)
        var = saved.moments.var()
        check(fastbn.batch_norm_inference(x, saved.mean, var, **keywords))
    check(fastbn.normalize(x, saved.mean, saved.rstd, channel_axis=layout.channel_axis))
    check(fastbn.batch_norm(x.copy(), gather=lambda v: v[None], **keywords)[0])
    check(fastbn.batch_norm_inference(x, saved.mean, var, out=np.empty_like(x), **keywords))
    same = x.copy()
    check(fastbn.batch_norm(same, out=same, **keywords)[0])
