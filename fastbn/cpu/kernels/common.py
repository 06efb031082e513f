"""Steps that both kernel families (`inner_reduction`, `outer_reduction`) share.

Squares that leave the compute type's range cost the common path nothing: too large ones make M2 infinite or NaN, too
small ones raise the processor's flag (`flags`), and `finished` takes such a channel again, value by value.

Kernels take their integers as one vector, the geometry, which a caller may keep: ``(batch, outer, channel, inner)``,
four integers of the family, then ``(start, batch, outer, channel)`` strides of each array in the order of arguments.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel
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
    value,
    zero_where_not_positive,
    zero_where_uncounted,
    zero_where_zero,
)

FULL = 64  # bytes of a vector: one cache line of float32
LEAST_M2 = 2.0**-930  # of what is not constant, until `finished` finds it; far below what float32's squares give


@inline
def four(geometry, k):
    return geometry[k], geometry[k + 1], geometry[k + 2], geometry[k + 3]


@inline
def channel_start(strides, t, shape):
    """Where the slab of kept index t = batch * channels + channel begins."""
    if t < shape[2]:
        return strides[0] + t * strides[3]
    return strides[0] + t // shape[2] * strides[1] + t % shape[2] * strides[3]


@inline
def merged(n, mean, m2, count, other_mean, other_m2):
    """Chan's update of (n, mean, m2) by a part (Chan, Golub & LeVeque 1983, eq. 2.1); an empty side is the identity."""
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
def origin_of(x, at, weight, origins, t):
    """What the mean of kept index t is taken relative to: its first selected value, or 0 if that is not finite."""
    if weight is None:
        number = value(x, at)
        return number if np.isfinite(number) else 0.0
    return origins[t]


@kernel
def find_origins(thread, first, last, x, weight, geometry, origins):
    """The first finite value of non-zero weight of each kept index, or 0."""
    shape, xs, ws = four(geometry, 0), four(geometry, 8), four(geometry, 12)
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        origins[t] = 0.0
        for k in range(shape[1] * shape[3]):
            r, i = k // shape[3], k % shape[3]
            number = value(x, x_at + r * xs[2] + i)
            if value(weight, w_at + r * ws[2] + i) != 0.0 and np.isfinite(number):
                origins[t] = number
                break


@inline
def finished(x, x_at, x_step, weight, w_at, w_step, shape, n, mean, m2, origin):
    """The channel's moments from those relative to the origin: n, mean, M2 in squares of 1/unit, and unit.

    The unit is 1, unless squares may have left the range of the compute type.
    """
    if n == 0.0:
        return 0.0, np.nan, np.nan, 1.0
    if is_sound(mean, m2, max(n, np.float64(shape[1] * shape[3])) * least_variance(x)):
        return n, origin + mean, m2, 1.0
    return careful_moments(x, x_at, x_step, weight, w_at, w_step, shape, n, origin)


@inline
def careful_moments(x, x_at, x_step, weight, w_at, w_step, shape, n, origin):
    """The same in float64, in a unit that brings the largest value near 1, so that no square leaves the range.

    Like NumPy, the mean of infinities of one sign is that infinity.
    """
    unit, scaled_origin, from_origin, rest, m2 = 1.0, 0.0, 0.0, 0.0, 0.0
    largest, infinite = 0.0, 0.0
    for look in range(3):
        for k in range(shape[1] * shape[3]):
            r, i = k // shape[3], k % shape[3]
            w = 1.0 if weight is None else value(weight, w_at + r * w_step + i)
            if w == 0.0:
                continue
            v = value(x, x_at + r * x_step + i)
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
            unit = 1.0 / unit_of(x, largest)
            scaled_origin = origin * unit
    return n, (scaled_origin + (from_origin + rest / n)) / unit, positive_or_nan(m2 - rest * rest / n), unit


@inline
def write_moments(table, t, kept, n, mean, m2, unit, eps):
    """Into the rows count, M2, mean, rstd of a table, which go on with gamma and beta; see `finished` for the unit.

    So its last four rows are the coefficients of `affine_of`. M2 may be 0 or infinite where rstd is neither.
    """
    table[t], table[kept + t], table[2 * kept + t] = n, m2 / unit / unit, mean
    plus = eps * unit * unit
    table[3 * kept + t] = unit / np.sqrt(m2 / n + plus) if np.isfinite(plus) else 1.0 / np.sqrt(eps)


@inline
def affine_of(x, coefficients, t, kept, eps):
    """Three coefficients hi, scale, bias with ``(x - hi) * scale + bias = (x - mean) * scale + beta`` of kept index t.

    The coefficients are (mean, variance, gamma, beta), or with eps < 0 (mean, rstd, gamma, beta). ``hi`` is the mean in
    the compute type; what that rounding leaves goes into the bias.
    """
    mean, rstd = coefficients[t], coefficients[kept + t]
    if eps >= 0.0:
        rstd = 1.0 / np.sqrt(rstd + eps)
    hi = rounded(x, mean)
    scale = rstd * coefficients[2 * kept + t]
    return hi, scale, coefficients[3 * kept + t] - (mean - hi) * scale


@inline
def write_affine(x, coefficients, t, kept, workspace, at, pitch):
    """The three of (mean, rstd, gamma, beta) into ``workspace``, a pitch apart."""
    hi, scale, bias = affine_of(x, coefficients, t, kept, -1.0)
    workspace[at], workspace[at + pitch], workspace[at + 2 * pitch] = hi, scale, bias


@inline
def affine_vectors(coefficients, t, count, kept, eps, workspace, at, pitch):
    """The same three of ``count`` indices from t on into ``workspace``; up to whole vectors are written."""
    n = lanes(coefficients, FULL)
    one, plus = splat(coefficients, 1.0, FULL), splat(coefficients, eps, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        mean = load_first(coefficients, t + i, part, FULL)
        rstd = load_first(coefficients, kept + t + i, part, FULL)
        if eps >= 0.0:
            rstd = one / root(rstd + plus)
        scale = rstd * load_first(coefficients, 2 * kept + t + i, part, FULL)
        short = converted(mean, load(workspace, at + i, mean))
        bias = load_first(coefficients, 3 * kept + t + i, part, FULL) - (mean - converted(short, mean)) * scale
        store(workspace, at + i, short)
        store(workspace, at + pitch + i, converted(scale, short))
        store(workspace, at + 2 * pitch + i, converted(bias, short))


@inline
def put(y, at, v, nontemporal):
    """Store a vector, past the caches if it is nontemporal."""
    if nontemporal:
        store_nontemporal(y, at, v)
    else:
        store(y, at, v)


@inline
def normalized(x, residual, hi, scale, bias, relu):
    """Vectors of y from vectors of x and residual."""
    z = fma(x - hi, scale, bias)
    if residual is not None:
        z = z + residual
    if relu is not None:
        z = zero_where_not_positive(z, z)
    return z


@inline
def linear_of(x, mean, scale, offset, slope, unit):
    """Five coefficients of ``unit * (scale * dz - w * (offset + slope * (x - hi)))``; hi as in `affine_of`."""
    hi = rounded(x, mean)
    return scale, hi, slope, offset + slope * (hi - mean), unit


@inline
def linear_vectors(coefficients, t, count, kept, workspace, at, pitch):
    """The same five of ``count`` indices from t on, from (mean, scale, offset, slope, unit) of each."""
    n = lanes(coefficients, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        mean = load_first(coefficients, t + i, part, FULL)
        slope = load_first(coefficients, 3 * kept + t + i, part, FULL)
        hi = converted(mean, load(workspace, at + i, mean))
        offset = load_first(coefficients, 2 * kept + t + i, part, FULL) + slope * (converted(hi, mean) - mean)
        store(workspace, at + i, converted(load_first(coefficients, kept + t + i, part, FULL), hi))
        store(workspace, at + pitch + i, hi)
        store(workspace, at + 2 * pitch + i, converted(slope, hi))
        store(workspace, at + 3 * pitch + i, converted(offset, hi))
        store(workspace, at + 4 * pitch + i, converted(load_first(coefficients, 4 * kept + t + i, part, FULL), hi))


@inline
def input_gradient(dz, x, weight, scale, hi, slope, offset, unit):
    """``unit * (scale * dz - weight * (offset + slope * (x - hi)))``; without x, ``unit * (scale * dz)``.

    It is 0 where weight and dz are, whatever x and the coefficients are.
    """
    if x is None:
        return unit * (scale * dz)
    back = fma(x - hi, slope, offset)
    if weight is None:
        return unit * (scale * dz - back)
    back = zero_where_zero(weight, weight * back)
    return zero_where_uncounted(weight, dz, unit * (scale * dz - back))


@inline
def input_coefficients(x, coefficients, t, kept, frozen, mixed, a, b):
    """scale, offset, slope and unit of dx from the sums a = dbeta, b = dgamma: `fastbn.formulas.input_numbers` here.

    The coefficients are (mean, rstd, gamma, count), and if they are mixed (dmean, dvar).
    """
    rstd = coefficients[kept + t]
    unit = unit_of(x, rstd)
    scale = coefficients[2 * kept + t] * (rstd / unit)
    if frozen:
        return scale, 0.0, 0.0, unit
    count = coefficients[3 * kept + t]
    if not mixed:
        return scale, scale * a / count, scale * rstd * b / count, unit
    offset = (scale * a - coefficients[4 * kept + t] / unit) / count
    return scale, offset, (scale * rstd * b - 2.0 * coefficients[5 * kept + t] / unit) / count, unit


@inline
def write_linear(x, coefficients, first, last, kept, frozen, mixed, sums, linear):
    """Rows (mean, scale, offset, slope, unit) of dx from those of `input_coefficients` and the sums (dgamma, dbeta)."""
    for t in range(first, last):
        scale, offset, slope, unit = input_coefficients(
            x, coefficients, t, kept, frozen, mixed, sums[kept + t], sums[t]
        )
        linear[t], linear[kept + t] = coefficients[t], scale
        linear[2 * kept + t], linear[3 * kept + t], linear[4 * kept + t] = offset, slope, unit


@kernel
def linear_rows(thread, first, last, x, coefficients, kept, mixed, sums, linear):
    """`write_linear` by itself, for sums that come from elsewhere."""
    write_linear(x, coefficients, first, last, kept[0], False, mixed, sums, linear)
