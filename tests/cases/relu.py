"""The gradient of relu where y is computed again: it passes just where y, as it was written, is not 0 or below."""

import numpy as np

import fastbn
from tests.support import make_case

SMALL = {"float16": 2.0**-23, "bfloat16": 2.0**-132, "float32": 2.0**-147, "float64": 2.0**-1072}
"""Standard deviations of y of which many are rounded to 0, or to the numbers next to it."""


def make_relu_case(layout, dtype, options, *, small=False):
    """With outputs that are 0, or round to it: whole numbers near their mean, or tiny ones."""
    case = make_case(layout, dtype, options)
    near_0(case)
    if small:
        tiny(case)
    return case


def near_0(case):
    case.x = case.layout.place(np.round(case.x.astype(float)).astype(case.dtype))
    if case.beta is not None:
        case.beta[...] = 0


def tiny(case):
    case.gamma, case.beta = np.full(case.layout.channels, SMALL[case.dtype.name]), np.zeros(case.layout.channels)


def beside_the_mean(case):
    """The mean as float64 has it, and the next number: y is 0 or above it by what rounding left of the mean."""
    least = np.random.default_rng(1).random(case.layout.shape) < 0.25
    case.x = case.layout.place(np.where(least, np.nextafter(3.0, 4.0), 3.0).astype(case.dtype))
    case.gamma, case.beta = np.full(case.layout.channels, -1.0), np.zeros(case.layout.channels)


def check_gradient(case, library=None):
    """The bits of what follows from y itself."""
    bn = library or fastbn
    y, saved = bn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    assert saved.y is None
    assert saved.beta is case.beta
    grads = bn.batch_norm_backward(case.dy, saved)
    of_y = bn.batch_norm_backward(case.dy, saved._replace(y=y, beta=None))
    for name in ("x", "gamma", "beta"):
        ours, theirs = (np.asarray(getattr(g, name)) for g in (grads, of_y))
        np.testing.assert_array_equal(ours, theirs, err_msg=name, strict=True)
    return np.asarray(y)
