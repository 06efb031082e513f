"""Small work on a number per kept index, in float64: what NumPy takes a microsecond for, and many steps of it.

    beyond = np.isfinite(rstd * gamma) & (abs(rstd * gamma) > FLOAT32_MAX)
    mean, var = (1 - rate) * mean + rate * batch_mean, (1 - rate) * var + rate * m2 / (count - correction)
    n, mean, m2 = n + count, ...                       # `merge`: Chan's update, the mean in two parts, hi + lo

Each function is one task. Tables are those of `records`: a row for each field.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.pointers import table_rows
from fastbn.cpu.records import Part, Running, Scale, Union

MOST_FLOAT32 = float(np.finfo(np.float32).max)


@kernel
def find_beyond(thread, first, last, table, kept, out):
    """Whether some finite ``rstd * gamma`` is beyond float32, of a table of `Scale`."""
    given = table_rows(Scale, table, kept)
    out[0] = 0.0
    for t in range(kept):
        scale = abs(given.rstd[t] * given.gamma[t])
        if MOST_FLOAT32 < scale < np.inf:
            out[0] = 1.0


@kernel
def update_running(thread, first, last, table, kept, rate, correction, skip_nonfinite, new_mean, new_var):
    """Running mean and variance after one more batch: `fastbn.formulas.running` on a table of `Running`."""
    given = table_rows(Running, table, kept)
    for t in range(kept):
        mean, var = given.mean[t], given.var[t]
        count, batch_mean, divisor = given.count[t], given.batch_mean[t], given.count[t] - correction
        batch_var = given.m2[t] / divisor if divisor > 0.0 else np.nan
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
    """`fastbn.formulas.two_sum`: the rounded sum and what it lost, of numbers or of vectors of them."""
    total = a + b
    shared = total - a
    return total, (a - (total - shared)) + (b - shared)


@kernel
def begin_union(thread, first, last, part, kept, state):
    """The first `Part` as a `Union`."""
    given, union = table_rows(Part, part, kept), table_rows(Union, state, kept)
    for t in range(kept):
        union.n[t], union.hi[t], union.lo[t] = given.count[t], given.mean[t], 0.0
        union.m2[t], union.left[t] = given.m2[t], 0.0


@kernel
def add_to_union(thread, first, last, part, kept, state):
    """One more `Part`: a step of `fastbn.formulas.united`."""
    given, union = table_rows(Part, part, kept), table_rows(Union, state, kept)
    for t in range(kept):
        n, hi, lo, m2 = union.n[t], union.hi[t], union.lo[t], union.m2[t]
        count, mean, other = given.count[t], given.mean[t], given.m2[t]
        together = n + count
        union.n[t] = together
        if n == 0.0:
            union.hi[t], union.lo[t], union.m2[t] = mean, 0.0, other
            continue
        if count == 0.0:  # a NaN is none
            continue
        part_of_all = count / together
        delta = (mean - hi) + (0.0 - lo)
        high, low = two_sum(hi, lo + delta * part_of_all)
        if not np.isfinite(delta):
            high, low = hi * (n / together) + mean * part_of_all, 0.0
        squares, left = two_sum(m2, other + delta * delta * (n * part_of_all))
        union.hi[t], union.lo[t] = high, low
        union.m2[t] = squares if np.isfinite(high) else np.nan
        if np.isfinite(left):
            union.left[t] += left


@kernel
def end_union(thread, first, last, kept, state):
    """What rounding left goes to M2."""
    union = table_rows(Union, state, kept)
    for t in range(kept):
        if union.left[t] != 0.0:
            union.m2[t] += union.left[t]
