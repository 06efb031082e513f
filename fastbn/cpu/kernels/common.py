"""Steps that both kernel families (`inner_reduction`, `outer_reduction`) share.

Squares that leave the compute type's range cost the common path nothing: too large ones make M2 infinite or NaN, too
small ones raise the processor's flag (`flags`), and `finished` takes such a channel again, value by value.

Arguments are arrays with strides (`records.Array`), of which functions take the rows of a channel (`rows_of`), and
tables (`records`), whose fields are pointers to their rows. A *kept index* t is ``batch * channels + channel``.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.pointers import advance, table_rows, value
from fastbn.cpu.kernels.simd import (
    converted,
    fma,
    lanes,
    load,
    load_first,
    root,
    rounded,
    splat,
    store,
    store_nontemporal,
    unit_of,
    zero_where_not_positive,
    zero_where_stored_not_positive,
    zero_where_uncounted,
    zero_where_zero,
)
from fastbn.cpu.records import Affine, Distances, GradientParameters, Linear, Parameters, Rows, Sums
from fastbn.cpu.sizes import AFFINE

FULL = 64  # bytes of a vector: one cache line of float32
NARROW, SINGLE = 32, 4  # at the ends of rows, where masked stores would be slow on AMD processors
LEAST_M2 = (
    2.0**-930
)  # in place of M2 that underflows, until `finished` computes it; far below what float32's squares give


class ManySlabs(NamedTuple):
    """How many slabs a channel has, how many near ones belong to one of the far ones, and the steps to the next."""

    count: Any
    of_far: Any
    far: Any
    near: Any


ONE_SLAB = ManySlabs(1, 1, 0, 0)


# --- arrays and tables ------------------------------------------------------------------------------------------------


@inline
def start_of_channel(array, t, shape):
    """Where the values of kept index t begin."""
    if t < shape.channel:
        return t * array.channel
    return t // shape.channel * array.batch + t % shape.channel * array.channel


@inline
def rows_of(array, t, shape):
    """The rows of kept index t."""
    return Rows(advance(array.values, start_of_channel(array, t, shape)), array.outer, array.twice)


@inline
def start_of_row(rows, row):
    """Where a row begins."""
    return (row >> 1) * rows.twice + (row & 1) * rows.step


@inline
def rows_from(rows, row, column):
    """What is left of them from a value on; the row is even, or all steps are equal."""
    return Rows(advance(rows.values, start_of_row(rows, row) + column), rows.step, rows.twice)


@inline
def put(y, at, v, nontemporal):
    """Store a vector, past the caches if so."""
    if nontemporal:
        store_nontemporal(y, at, v)
    else:
        store(y, at, v)


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def merged(n, mean, m2, count, other_mean, other_m2):
    """Chan's update of (n, mean, m2) by others (Chan, Golub & LeVeque 1983, eq. 2.1); an empty side is the identity."""
    if count == 0.0:
        return n, mean, m2
    if n == 0.0:
        return count, other_mean, other_m2
    together = n + count
    delta = other_mean - mean
    ratio = count / together
    between = delta * delta * (n * ratio)
    if between < LEAST_M2 and delta != 0.0:
        between = LEAST_M2  # so that M2 is 0 for constants alone, as in `marked`
    return together, mean + delta * ratio, m2 + (other_m2 + between)


@inline
def needs_new_shift(count, s1, s2):
    """Whether the shift was so far from the mean that s2 - s1^2/n loses a bit or more."""
    return s1 * s1 > 0.5 * count * s2


@inline
def least_variance(x):
    """Below it some squares of deviations may have lost digits to underflow that matter, above none: by 2^-29."""
    return 2.0**-120 if lanes(x, FULL) == 16 else 2.0**-900


@inline
def marked(x, m2):
    """M2 of a segment in which squares underflowed, but not 0: `finished` takes 0 for that of a constant."""
    least = least_variance(x) * 2.0**-29
    return least if m2 < least else m2


@inline
def is_sound(mean, m2, least):
    """Whether no square has left the compute type's range."""
    return np.isfinite(mean) and np.isfinite(m2) and (m2 == 0.0 or m2 >= least)


@inline
def positive_or_nan(m2):
    """Rounding may leave a constant chunk a negative M2."""
    return 0.0 if m2 < 0.0 else m2


@inline
def origin_of(x, weight, origins, t):
    """What the mean of kept index t is taken relative to: its first selected value, or 0 if that is not finite."""
    if weight is None:
        number = value(x.values, 0)
        return number if np.isfinite(number) else 0.0
    return origins[t]


@kernel
def find_origins(thread, first, last, x, weight, shape, origins):
    """The first finite value of non-zero weight of each kept index, or 0."""
    for t in range(first, last):
        rows, weights = rows_of(x, t, shape), rows_of(weight, t, shape)
        origins[t] = 0.0
        for k in range(shape.outer * shape.inner):
            r, i = k // shape.inner, k % shape.inner
            number = value(rows.values, start_of_row(rows, r) + i)
            if value(weights.values, start_of_row(weights, r) + i) != 0.0 and np.isfinite(number):
                origins[t] = number
                break


@inline
def finished(x, weight, shape, n, mean, m2, origin):
    """The channel's moments from those relative to the origin: n, mean, M2 in squares of 1/unit, and unit.

    The unit is 1, unless squares may have left the range of the compute type.
    """
    if n == 0.0:
        return 0.0, np.nan, np.nan, 1.0
    if is_sound(mean, m2, max(n, np.float64(shape.outer * shape.inner)) * least_variance(x.values)):
        return n, origin + mean, m2, 1.0
    return careful_moments(x, weight, shape, ONE_SLAB, n, origin)


@inline
def slab_at(steps, s, of_far):
    """Where slab s begins, from the first one on; so many near ones belong to one of the far ones."""
    return s // of_far * steps.far + s % of_far * steps.near


@inline
def rows_of_slab(array, t, s, shape):
    """The rows of a slab of channel t."""
    start = slab_at(array, s, shape.near) + t * array.channel
    return Rows(advance(array.values, start), array.outer, 2 * array.outer)


@inline
def finished_slabs(x, t, shape, n, mean, m2, origin):
    """As `finished`, of a channel in slabs."""
    if n == 0.0:
        return 0.0, np.nan, np.nan, 1.0
    if is_sound(mean, m2, n * least_variance(x.values)):
        return n, origin + mean, m2, 1.0
    slabs = ManySlabs(shape.far * shape.near, shape.near, x.far, x.near)
    return careful_moments(rows_of_slab(x, t, 0, shape), None, shape, slabs, n, origin)


@inline
def careful_moments(x, weight, shape, slabs, n, origin):
    """The same in float64, in a unit that brings the largest value near 1, so that no square leaves the range.

    Like NumPy, the mean of infinities of one sign is that infinity.
    """
    unit, scaled_origin, from_origin, rest, m2 = 1.0, 0.0, 0.0, 0.0, 0.0
    largest, infinite = 0.0, 0.0
    for look in range(3):
        for k in range(slabs.count * shape.outer * shape.inner):
            r, i = k // shape.inner, k % shape.inner
            slab, r = slab_at(slabs, r // shape.outer, slabs.of_far), r % shape.outer
            w = 1.0 if weight is None else value(weight.values, start_of_row(weight, r) + i)
            if w == 0.0:
                continue
            v = value(x.values, slab + start_of_row(x, r) + i)
            if look == 0:
                largest = max(largest, abs(v)) if np.isfinite(v) else largest
                infinite += 0.0 if np.isfinite(v) else v
            elif look == 1:
                from_origin += w / n * (v * unit - scaled_origin)
            else:
                d = (v * unit - scaled_origin) - from_origin
                rest += w * d
                m2 += w * d * d
        if look == 0:
            if infinite != 0.0:  # or NaN
                return n, infinite, np.nan, 1.0
            unit = 1.0 / unit_of(x.values, largest)
            scaled_origin = origin * unit
    return n, (scaled_origin + (from_origin + rest / n)) / unit, positive_or_nan(m2 - rest * rest / n), unit


@inline
def write_moments(moments, t, n, mean, m2, unit, eps):
    """Into a table of `MomentRows`; see `finished` for the unit. M2 may be 0 or infinite where rstd is neither."""
    moments.count[t], moments.m2[t], moments.mean[t] = n, m2 / unit / unit, mean
    plus = eps * unit * unit
    moments.rstd[t] = unit / np.sqrt(m2 / n + plus) if np.isfinite(plus) else 1.0 / np.sqrt(eps)


# --- y ----------------------------------------------------------------------------------------------------------------


@inline
def affine_of(x, mean, rstd, gamma, beta):
    """`Affine` with ``(x - hi) * scale + bias = (x - mean) * (rstd * gamma) + beta``.

    What rounding the mean to x's compute type leaves goes into the bias.
    """
    hi = rounded(x, mean)
    scale = rstd * gamma
    return Affine(hi, scale, beta - (mean - hi) * scale)


@inline
def affine_of_index(x, parameters, t, eps, given_rstd):
    """The same of kept index t, from a table of `Parameters`, in which the spread is rstd or the variance."""
    rstd = parameters.spread[t]
    if not given_rstd:
        rstd = 1.0 / np.sqrt(rstd + eps)
    return affine_of(x, parameters.mean[t], rstd, parameters.gamma[t], parameters.beta[t])


@inline
def write_affine(affine, parameters, t, count, eps, given_rstd):
    """The same of ``count`` indices from t on into a table; up to whole vectors are written."""
    n = lanes(parameters.mean, FULL)
    one, plus = splat(parameters.mean, 1.0, FULL), splat(parameters.mean, eps, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        mean = load_first(parameters.mean, t + i, part, FULL)
        rstd = load_first(parameters.spread, t + i, part, FULL)
        if not given_rstd:
            rstd = one / root(rstd + plus)
        scale = rstd * load_first(parameters.gamma, t + i, part, FULL)
        hi = converted(mean, load(affine.hi, i, mean))
        bias = load_first(parameters.beta, t + i, part, FULL) - (mean - converted(hi, mean)) * scale
        store(affine.hi, i, hi)
        store(affine.scale, i, converted(scale, hi))
        store(affine.bias, i, converted(bias, hi))


@inline
def normalized(x, residual, affine, relu):
    """Vectors of y from vectors of x and residual."""
    z = fma(x - affine.hi, affine.scale, affine.bias)
    if residual is not None:
        z = z + residual
    if relu is not None:
        z = zero_where_not_positive(z, z)
    return z


# --- dz: of y, where that is given, or of x, of which y is computed again ---------------------------------------------


@inline
def relu_gradient(array, dy, y, x, affine):
    """A vector of dz: dy, or 0 where y <= 0. Without y it has the sign that a forward pass found, bit for bit."""
    if affine is None:
        return zero_where_not_positive(y, dy)
    return zero_where_stored_not_positive(array, normalized(x, None, affine, None), dy)


@inline
def parameters_of_y(given):
    """From a table of `GradientParameters`."""
    return Parameters(given.mean, given.rstd, given.gamma, given.beta)


@inline
def affine_again(x, given, t, recompute):
    """`affine_of` kept index t, or None where y is not computed again."""
    if recompute is None:
        return None
    return affine_of(x, given.mean[t], given.rstd[t], given.gamma[t], given.beta[t])


@inline
def around(hi, affine):
    """An `Affine` whose hi is the vector, or the row, of others: what is subtracted from x is loaded once for both."""
    if affine is None:
        return None
    return Affine(hi, affine.scale, affine.bias)


@inline
def affine_table(workspace, thread, pitch):
    """A thread's table of `Affine`; None without."""
    if workspace is None:
        return None
    return table_rows(Affine, advance(workspace, AFFINE * thread * pitch), pitch)


# --- dx ---------------------------------------------------------------------------------------------------------------


@inline
def linear_of(x, mean, scale, offset, slope, unit):
    """`Linear` from `Distances`, which have the mean itself."""
    hi = rounded(x, mean)
    return Linear(scale, hi, slope, offset + slope * (hi - mean), unit)


@inline
def write_linear(linear, distances, t, count):
    """The same of ``count`` indices from t on, from a table into a table; up to whole vectors are written."""
    n = lanes(distances.mean, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        mean = load_first(distances.mean, t + i, part, FULL)
        slope = load_first(distances.slope, t + i, part, FULL)
        hi = converted(mean, load(linear.hi, i, mean))
        offset = load_first(distances.offset, t + i, part, FULL) + slope * (converted(hi, mean) - mean)
        store(linear.scale, i, converted(load_first(distances.scale, t + i, part, FULL), hi))
        store(linear.hi, i, hi)
        store(linear.slope, i, converted(slope, hi))
        store(linear.offset, i, converted(offset, hi))
        store(linear.unit, i, converted(load_first(distances.unit, t + i, part, FULL), hi))


@inline
def input_gradient(dz, x, weight, linear):
    """``unit * (scale * dz - weight * (offset + slope * (x - hi)))``; without x, ``unit * (scale * dz)``.

    It is 0 where weight and dz are, whatever x and the numbers are.
    """
    if x is None:
        return linear.unit * (linear.scale * dz)
    back = fma(x - linear.hi, linear.slope, linear.offset)
    if weight is None:
        return linear.unit * (linear.scale * dz - back)
    back = zero_where_zero(weight, weight * back)
    return zero_where_uncounted(weight, dz, linear.unit * (linear.scale * dz - back))


@inline
def dgamma_of(x, mean, rstd, a, b):
    """From a = sum(dz) and b = sum(dz * (x - hi) * unit), hi the rounded mean."""
    unit = unit_of(x, rstd)
    return (b - (mean - rounded(x, mean)) * unit * a) * (rstd / unit)


@inline
def distances_of(x, parameters, t, frozen, mixed, dgamma, dbeta):
    """`Distances` from a table of `GradientParameters` and the sums, as `fastbn.backend` has the formulas.

    They are mixed with gradients of the moments, or not; frozen statistics have none.
    """
    mean, rstd = parameters.mean[t], parameters.rstd[t]
    unit = unit_of(x, rstd)
    scale = parameters.gamma[t] * (rstd / unit)
    if frozen:
        return Distances(mean, scale, 0.0, 0.0, unit)
    count = parameters.count[t]
    if not mixed:
        return Distances(mean, scale, scale * dbeta / count, scale * rstd * dgamma / count, unit)
    offset = (scale * dbeta - parameters.dmean[t] / unit) / count
    return Distances(mean, scale, offset, (scale * rstd * dgamma - 2.0 * parameters.dvar[t] / unit) / count, unit)


@inline
def distances_at(distances, t):
    """Of one kept index, from a table."""
    return Distances(distances.mean[t], distances.scale[t], distances.offset[t], distances.slope[t], distances.unit[t])


@inline
def write_distances(x, parameters, first, last, frozen, mixed, sums, distances):
    """The same of kept indices from first to last, from tables into a table."""
    for t in range(first, last):
        one = distances_of(x, parameters, t, frozen, mixed, sums.dgamma[t], sums.dbeta[t])
        distances.mean[t], distances.scale[t], distances.offset[t] = one.mean, one.scale, one.offset
        distances.slope[t], distances.unit[t] = one.slope, one.unit


@kernel
def find_distances(thread, first, last, x, parameters, kept, mixed, sums, distances):
    """`write_distances` by itself, for sums that come from elsewhere."""
    write_distances(
        x, table_rows(GradientParameters, parameters, kept), first, last, False, mixed, table_rows(Sums, sums, kept),
        table_rows(Distances, distances, kept),
    )  # fmt: skip
