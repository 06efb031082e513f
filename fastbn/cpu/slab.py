"""Steps on one channel's slab that both kernel families (`rows`, `columns`) share."""

import numpy as np

from fastbn.cpu.jit import inner
from fastbn.cpu.simd import value


@inner
def channel_start(strides, t, shape):
    """Where the slab of kept index t = batch * channels + channel begins."""
    return strides[0] + t // shape[2] * strides[1] + t % shape[2] * strides[3]


@inner
def merged(n, mean, m2, count, part_mean, part_m2):
    """Chan's update of (n, mean, m2) by a part (Chan, Golub & LeVeque 1983, eq. 2.1); an empty side is the identity."""
    if count == 0.0:
        return n, mean, m2
    if n == 0.0:
        return count, part_mean, part_m2
    together = n + count
    delta = part_mean - mean
    share = count / together
    return together, mean + delta * share, m2 + (part_m2 + delta * delta * (n * share))


@inner
def needs_new_guess(count, s1, s2):
    """Whether the guess was so far from the mean that s2 - s1^2/n loses a bit or more."""
    return s1 * s1 > 0.5 * count * s2


@inner
def positive_or_nan(m2):
    """Rounding may leave a constant chunk a negative M2."""
    return 0.0 if m2 < 0.0 else m2


@inner
def find_pivot(x, x_at, x_step, weight, w_at, w_step, shape):
    """The channel's first finite value of non-zero weight, or 0."""
    for r in range(shape[1]):
        for i in range(shape[3]):
            number = value(x, x_at + r * x_step + i)
            if np.isfinite(number) and (weight is None or value(weight, w_at + r * w_step + i) != 0.0):
                return number
    return 0.0


@inner
def finished(x, x_at, x_step, weight, w_at, w_step, shape, n, mean, m2, pivot):
    """The channel's moments from those relative to the pivot.

    Where they are not finite, plain float64 sums decide between what overflowed on the way (a float32 square) and
    what is infinite: like NumPy, the mean of infinities of one sign is that infinity.
    """
    if n == 0.0:
        return 0.0, np.nan, np.nan
    if np.isfinite(mean) and np.isfinite(m2):
        return n, pivot + mean, m2
    mean = 0.0
    for r in range(shape[1]):
        for i in range(shape[3]):
            w = 1.0 if weight is None else value(weight, w_at + r * w_step + i)
            if w != 0.0:
                mean += w * value(x, x_at + r * x_step + i)
    mean /= n
    m2 = np.nan
    if np.isfinite(mean):
        m2 = 0.0
        for r in range(shape[1]):
            for i in range(shape[3]):
                w = 1.0 if weight is None else value(weight, w_at + r * w_step + i)
                if w != 0.0:
                    d = value(x, x_at + r * x_step + i) - mean
                    m2 += w * d * d
    return n, mean, m2
