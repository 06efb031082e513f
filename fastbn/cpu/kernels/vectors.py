"""Small work on a number per kept index, in float64: what NumPy takes a microsecond for, and many steps of it.

Each function is one task; rows of coefficients are ``kept`` apart.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel

MOST = float(np.finfo(np.float32).max)


@kernel
def find_beyond(thread, first, last, coefficients, kept, out):
    """Whether some finite ``rstd * gamma`` is beyond float32, of the rows rstd and gamma."""
    out[0] = 0.0
    for t in range(kept[0]):
        scale = abs(coefficients[t] * coefficients[kept[0] + t])
        if MOST < scale < np.inf:
            out[0] = 1.0


@kernel
def update_running(thread, first, last, coefficients, kept, rate, correction, skip_nonfinite, new_mean, new_var):
    """Running mean and variance after one more batch: `fastbn.formulas.running` on the rows of its arguments."""
    n = kept[0]
    for t in range(n):
        mean, var = coefficients[t], coefficients[n + t]
        count, batch_mean, divisor = (
            coefficients[2 * n + t],
            coefficients[3 * n + t],
            coefficients[2 * n + t] - correction,
        )
        batch_var = coefficients[4 * n + t] / divisor if divisor > 0.0 else np.nan
        counts = count > correction
        if skip_nonfinite:
            counts = counts and np.isfinite(batch_mean) and np.isfinite(batch_var)
        if counts and rate == 1.0:
            mean, var = batch_mean, batch_var
        elif counts and rate != 0.0:
            mean = (1.0 - rate) * mean + rate * batch_mean
            var = (1.0 - rate) * var + rate * batch_var
        new_mean[t], new_var[t] = mean, var


@inline
def two_sum(a, b):
    """`fastbn.formulas.two_sum`."""
    total = a + b
    shared = total - a
    return total, (a - (total - shared)) + (b - shared)


@kernel
def begin_union(thread, first, last, part, kept, state):
    """The first part's rows count, mean, M2 as the state: rows n, hi, lo, M2, and what rounding left of M2."""
    n = kept[0]
    for t in range(n):
        state[t], state[n + t], state[2 * n + t] = part[t], part[n + t], 0.0
        state[3 * n + t], state[4 * n + t] = part[2 * n + t], 0.0


@kernel
def add_to_union(thread, first, last, part, kept, state):
    """One more part: a step of `fastbn.formulas.united`."""
    k = kept[0]
    for t in range(k):
        n, hi, lo, m2 = state[t], state[k + t], state[2 * k + t], state[3 * k + t]
        count, mean, other = part[t], part[k + t], part[2 * k + t]
        together = n + count
        state[t] = together
        if n == 0.0:
            state[k + t], state[2 * k + t], state[3 * k + t] = mean, 0.0, other
            continue
        if count == 0.0:  # a NaN is none
            continue
        part_of_all = count / together
        delta = (mean - hi) + (0.0 - lo)
        high, low = two_sum(hi, lo + delta * part_of_all)
        if not np.isfinite(delta):
            high, low = hi * (n / together) + mean * part_of_all, 0.0
        squares, left = two_sum(m2, other + delta * delta * (n * part_of_all))
        state[k + t], state[2 * k + t] = high, low
        state[3 * k + t] = squares if np.isfinite(high) else np.nan
        if np.isfinite(left):
            state[4 * k + t] += left


@kernel
def end_union(thread, first, last, kept, state):
    """What rounding left goes to M2."""
    k = kept[0]
    for t in range(k):
        if state[4 * k + t] != 0.0:
            state[3 * k + t] += state[4 * k + t]
