"""Kernels for channels-last memory: the channel axis is contiguous.

An array is flat memory plus the element strides ``(start, batch, outer, channel)``: ``outer`` rows of ``channel``
contiguous values. Rows are taken in chunks of 64 and segments of 1024, channels in tiles of 512, by shape alone; a
segment of a tile is what threads share. Sums of a chunk live in one small array per tile (L1), so memory is read in
its own order. The numerics are those of `rows`: each channel has its own guess, and a chunk in which some channel's
guess was poor is summed again, with a better guess for those channels alone.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S.
"""

import numpy as np
from numba import prange, types
from numba.extending import overload

from fastbn.cpu.jit import inner, kernel
from fastbn.cpu.simd import (
    converted,
    fma,
    lanes,
    load,
    load_first,
    rounded,
    splat,
    store,
    store_first,
    stream,
    value,
    zero_where_not_positive,
    zero_where_zero,
)
from fastbn.cpu.slab import channel_start, find_pivot, finished, merged, needs_new_guess, positive_or_nan

WIDTH = 64  # bytes of a vector: one cache line of float32
CHUNK = 64  # rows: 16 + 4 float32 additions per sum keep its rounding below 1e-6
SEGMENT = 1024  # rows: the partial results are 0.4 % of float32 data
TILE = 512  # channels: four parameter arrays of a tile are 8 kB, in L1 beside the data


def scratch(x, n):
    """An uninitialised array of n values of the compute type of x, padded so that whole vectors may be read."""
    raise TypeError("compiled code only")


@overload(scratch)
def _scratch(x, n):
    dtype = np.float64 if x.dtype == types.float64 else np.float32
    return lambda x, n: np.empty(n + 16, dtype)


@inner
def task_at(k, shape):
    """Batch, segment, first row, end row, first channel and channels of task k; tiles of one segment are neighbours."""
    tiles = -(-shape[2] // TILE)
    segments = -(-shape[1] // SEGMENT)
    channel = k % tiles * TILE
    segment = k // tiles % segments
    row = segment * SEGMENT
    return (
        k // tiles // segments,
        segment,
        row,
        min(row + SEGMENT, shape[1]),
        channel,
        min(TILE, shape[2] - channel),
    )


@inner
def task_count(shape):
    return shape[0] * -(-shape[1] // SEGMENT) * -(-shape[2] // TILE)


# --- statistics -------------------------------------------------------------------------------------------------------


@inner
def add_four_rows(x, at, step, i, n, part, guess, s1, s2):
    """Add n <= one vector of channels of four rows to the sums."""
    q = load(guess, i, WIDTH)
    if part == n:
        a = load(x, at + i, WIDTH) - q
        b = load(x, at + step + i, WIDTH) - q
        c = load(x, at + 2 * step + i, WIDTH) - q
        d = load(x, at + 3 * step + i, WIDTH) - q
    else:
        a = load_first(x, at + i, part, WIDTH) - q
        b = load_first(x, at + step + i, part, WIDTH) - q
        c = load_first(x, at + 2 * step + i, part, WIDTH) - q
        d = load_first(x, at + 3 * step + i, part, WIDTH) - q
    store(s1, i, load(s1, i, WIDTH) + ((a + b) + (c + d)))
    store(s2, i, load(s2, i, WIDTH) + (fma(a, a, b * b) + fma(c, c, d * d)))


@inner
def chunk_sums(x, at, step, rows, columns, guess, s1, s2):
    """s1 = sum(x - guess), s2 = sum((x - guess)^2) per channel."""
    n = lanes(x, WIDTH)
    whole = columns - columns % n
    s1[:] = 0
    s2[:] = 0
    fours = rows - rows % 4
    for r in range(0, fours, 4):
        for i in range(0, whole, n):
            add_four_rows(x, at + r * step, step, i, n, n, guess, s1, s2)
        if whole < columns:
            add_four_rows(x, at + r * step, step, whole, n, columns - whole, guess, s1, s2)
    for r in range(fours, rows):
        for i in range(0, columns, n):
            e = load_first(x, at + r * step + i, min(n, columns - i), WIDTH) - load(guess, i, WIDTH)
            store(s1, i, load(s1, i, WIDTH) + e)
            store(s2, i, fma(e, e, load(s2, i, WIDTH)))


@inner
def weighted_chunk_sums(x, at, step, weight, w_at, w_step, w_across, rows, columns, guess, count, s1, s2):
    """The same with weights, and count = sum(w); ``w_across`` is 0 where all channels share a weight."""
    n = lanes(x, WIDTH)
    s1[:] = 0
    s2[:] = 0
    count[:] = 0
    for r in range(rows):
        w_row = w_at + r * w_step
        for i in range(columns):
            count[i] += value(weight, w_row + i * w_across)
        for i in range(0, columns, n):
            part = min(n, columns - i)
            e = load_first(x, at + r * step + i, part, WIDTH) - load(guess, i, WIDTH)
            if w_across == 0:
                w = splat(x, value(weight, w_row), WIDTH)
            else:
                w = converted(load_first(weight, w_row + i, part, e), e)
            e = zero_where_zero(w, e)
            store(s1, i, load(s1, i, WIDTH) + w * e)
            store(s2, i, fma(w * e, e, load(s2, i, WIDTH)))


@inner
def better_guesses(columns, counts, s1, s2, guess, first):
    """Move the guesses that were poor to the mean just found, on the first chunk all of them; whether there were any.

    A chunk has few values per channel, so that a guess half a standard deviation away would cost the mean 1e-7.
    """
    poor = False
    for i in range(columns):
        if needs_new_guess(counts[i], np.float64(s1[i]), np.float64(s2[i])) or (first and counts[i] != 0.0):
            guess[i] += s1[i] / counts[i]
            poor = True
    return poor


@inner
def segment_moments(x, at, step, weight, w_at, w_step, w_across, rows, columns, pivot, n, mean, m2):
    """n, mean - pivot and M2 of each channel of one segment, written to ``n``, ``mean``, ``m2``."""
    guess, s1, s2 = scratch(x, columns), scratch(x, columns), scratch(x, columns)
    counts = np.empty(columns)
    guess[:] = 0
    for i in range(columns):
        guess[i] = pivot[i]
        n[i] = mean[i] = m2[i] = 0.0
    for r in range(0, rows, CHUNK):
        high = min(CHUNK, rows - r)
        if weight is None:
            counts[:] = high
            chunk_sums(x, at + r * step, step, high, columns, guess, s1, s2)
            if better_guesses(columns, counts, s1, s2, guess, r == 0):
                chunk_sums(x, at + r * step, step, high, columns, guess, s1, s2)
            each = 1.0 / high
            share = high / (r + high)
            for i in range(columns):
                shift = s1[i] * each
                part = positive_or_nan(s2[i] - s1[i] * shift)
                delta = (guess[i] - pivot[i]) + shift - mean[i]
                mean[i] += delta * share
                m2[i] += part + delta * delta * (r * share)
                guess[i] = pivot[i] + mean[i]
        else:
            w_chunk = w_at + r * w_step
            weighted_chunk_sums(
                x, at + r * step, step, weight, w_chunk, w_step, w_across, high, columns, guess, counts, s1, s2
            )
            if better_guesses(columns, counts, s1, s2, guess, r == 0):
                weighted_chunk_sums(
                    x, at + r * step, step, weight, w_chunk, w_step, w_across, high, columns, guess, counts, s1, s2
                )
            for i in range(columns):
                if counts[i] != 0.0:
                    shift = s1[i] / counts[i]
                    part = positive_or_nan(s2[i] - s1[i] * shift)
                    n[i], mean[i], m2[i] = merged(n[i], mean[i], m2[i], counts[i], (guess[i] - pivot[i]) + shift, part)
                    guess[i] = pivot[i] + mean[i]
    if weight is None:
        n[:] = rows


@kernel
def moments(x, xs, weight, ws, shape, count, mean, m2):
    """Count, mean and M2 of every kept index."""
    channels = shape[0] * shape[2]
    segments = -(-shape[1] // SEGMENT)
    pivots = np.empty(channels)
    parts = np.empty((3, segments, channels))
    for t in prange(channels):
        pivots[t] = find_pivot(x, channel_start(xs, t, shape), xs[2], weight, channel_start(ws, t, shape), ws[2], shape)
    for k in prange(task_count(shape)):
        b, s, row, end, c, columns = task_at(k, shape)
        t = b * shape[2] + c
        segment_moments(
            x, channel_start(xs, t, shape) + row * xs[2], xs[2],
            weight, channel_start(ws, t, shape) + row * ws[2], ws[2], ws[3], end - row, columns,
            pivots[t:t + columns],
            parts[0, s, t:t + columns], parts[1, s, t:t + columns], parts[2, s, t:t + columns],
        )  # fmt: skip
    for t in prange(channels):
        a, b, c = 0.0, 0.0, 0.0
        for s in range(segments):
            a, b, c = merged(a, b, c, parts[0, s, t], parts[1, s, t], parts[2, s, t])
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        count[t], mean[t], m2[t] = finished(x, x_at, xs[2], weight, w_at, ws[2], shape, a, b, c, pivots[t])


# --- normalise, scale, shift ------------------------------------------------------------------------------------------


@inner
def as_compute(x, numbers):
    """Float64 per-channel numbers in the compute type."""
    out = scratch(x, numbers.size)
    for i in range(numbers.size):
        out[i] = numbers[i]
    return out


@inner
def rest_of_mean(x, mean):
    """What rounding a mean to the compute type leaves."""
    out = scratch(x, mean.size)
    for i in range(mean.size):
        out[i] = mean[i] - rounded(x, mean[i])
    return out


@inner
def normalized(x, residual, i, hi, lo, scale, shift, relu):
    z = fma((x - load(hi, i, WIDTH)) - load(lo, i, WIDTH), load(scale, i, WIDTH), load(shift, i, WIDTH))
    if residual is not None:
        z = z + residual
    if relu is not None:
        z = zero_where_not_positive(z, z)
    return z


@kernel
def normalize(x, xs, y, ys, residual, rs, shape, mean, scale, shift, relu, streaming):
    """``y = ((x - mean) * scale + shift, + residual, relu)``."""
    n = lanes(x, WIDTH)
    for k in prange(task_count(shape)):
        b, _, row, end, c, columns = task_at(k, shape)
        t = b * shape[2] + c
        hi, lo = as_compute(x, mean[t : t + columns]), rest_of_mean(x, mean[t : t + columns])
        a, z = as_compute(x, scale[t : t + columns]), as_compute(x, shift[t : t + columns])
        x_at, y_at, r_at = channel_start(xs, t, shape), channel_start(ys, t, shape), channel_start(rs, t, shape)
        whole = columns - columns % n
        for r in range(row, end):
            x_row, y_row, r_row = x_at + r * xs[2], y_at + r * ys[2], r_at + r * rs[2]
            for i in range(0, whole, n):
                extra = load(residual, r_row + i, WIDTH)
                out = normalized(load(x, x_row + i, WIDTH), extra, i, hi, lo, a, z, relu)
                if streaming:
                    stream(y, y_row + i, out)
                else:
                    store(y, y_row + i, out)
            if whole < columns:
                part = columns - whole
                extra = load_first(residual, r_row + whole, part, WIDTH)
                out = normalized(load_first(x, x_row + whole, part, WIDTH), extra, whole, hi, lo, a, z, relu)
                store_first(y, y_row + whole, part, out)


# --- gradients --------------------------------------------------------------------------------------------------------


@inner
def add_grad_row(dy, g, x, i, y, o, k, part, hi, lo, s1, s2):
    """Add one row's dz and dz * (x - mean) of ``part`` channels from k on to the sums."""
    dz = load_first(dy, g + k, part, WIDTH)
    dz = zero_where_not_positive(load_first(y, o + k, part, WIDTH), dz)
    centred = (load_first(x, i + k, part, WIDTH) - load(hi, k, WIDTH)) - load(lo, k, WIDTH)
    store(s1, k, load(s1, k, WIDTH) + dz)
    store(s2, k, fma(dz, centred, load(s2, k, WIDTH)))


@inner
def add_grad_pair(dy, g, g_step, x, i, i_step, y, o, o_step, k, hi, lo, s1, s2):
    """The same for whole vectors of two rows."""
    u, v = load(dy, g + k, WIDTH), load(dy, g + g_step + k, WIDTH)
    u = zero_where_not_positive(load(y, o + k, WIDTH), u)
    v = zero_where_not_positive(load(y, o + o_step + k, WIDTH), v)
    high, low = load(hi, k, WIDTH), load(lo, k, WIDTH)
    p = u * ((load(x, i + k, WIDTH) - high) - low)
    store(s1, k, load(s1, k, WIDTH) + (u + v))
    store(s2, k, load(s2, k, WIDTH) + fma(v, (load(x, i + i_step + k, WIDTH) - high) - low, p))


@kernel
def grad_sums(dy, dys, x, xs, y, ys, shape, mean, rstd, dgamma, dbeta):
    """sum(dz * xhat) and sum(dz) of every kept index."""
    n = lanes(x, WIDTH)
    channels = shape[0] * shape[2]
    segments = -(-shape[1] // SEGMENT)
    parts = np.empty((2, segments, channels))
    for k in prange(task_count(shape)):
        b, s, row, end, c, columns = task_at(k, shape)
        t = b * shape[2] + c
        hi, lo = as_compute(x, mean[t : t + columns]), rest_of_mean(x, mean[t : t + columns])
        s1, s2 = scratch(x, columns), scratch(x, columns)
        dy_at, x_at, y_at = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        whole = columns - columns % n
        parts[:, s, t : t + columns] = 0.0
        for first in range(row, end, CHUNK):
            s1[:] = 0
            s2[:] = 0
            last = min(first + CHUNK, end)
            pairs = last - (last - first) % 2
            for r in range(first, pairs, 2):
                g, i, o = dy_at + r * dys[2], x_at + r * xs[2], y_at + r * ys[2]
                for v in range(0, whole, n):
                    add_grad_pair(dy, g, dys[2], x, i, xs[2], y, o, ys[2], v, hi, lo, s1, s2)
                if whole < columns:
                    add_grad_row(dy, g, x, i, y, o, whole, columns - whole, hi, lo, s1, s2)
                    g, i, o = g + dys[2], i + xs[2], o + ys[2]
                    add_grad_row(dy, g, x, i, y, o, whole, columns - whole, hi, lo, s1, s2)
            if pairs < last:
                g, i, o = dy_at + pairs * dys[2], x_at + pairs * xs[2], y_at + pairs * ys[2]
                for v in range(0, columns, n):
                    add_grad_row(dy, g, x, i, y, o, v, min(n, columns - v), hi, lo, s1, s2)
            for v in range(columns):
                parts[0, s, t + v] += s1[v]
                parts[1, s, t + v] += s2[v]
    for t in prange(channels):
        p, q = 0.0, 0.0
        for s in range(segments):
            p, q = p + parts[0, s, t], q + parts[1, s, t]
        dbeta[t], dgamma[t] = p, q * rstd[t]


@inner
def input_gradient(dz, x, weight, i, hi, lo, scale, offset, slope):
    """``scale * dz - weight * (offset + slope * (x - mean))``; without x, ``scale * dz``."""
    if x is None:
        return load(scale, i, WIDTH) * dz
    back = fma((x - load(hi, i, WIDTH)) - load(lo, i, WIDTH), load(slope, i, WIDTH), load(offset, i, WIDTH))
    if weight is not None:
        back = zero_where_zero(weight, weight * back)
    return load(scale, i, WIDTH) * dz - back


@kernel
def grad_input(
    dy, dys, x, xs, y, ys, weight, ws, dx, dxs, dresidual, drs, shape, mean, scale, offset, slope, streaming
):
    """``dx`` (and ``dresidual = dz``) with given per-channel numbers."""
    n = lanes(dy, WIDTH)
    for k in prange(task_count(shape)):
        b, _, row, end, c, columns = task_at(k, shape)
        t = b * shape[2] + c
        hi, lo = as_compute(dy, mean[t : t + columns]), rest_of_mean(dy, mean[t : t + columns])
        a, p, q = (
            as_compute(dy, scale[t : t + columns]),
            as_compute(dy, offset[t : t + columns]),
            as_compute(dy, slope[t : t + columns]),
        )
        dy_at, x_at, y_at = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        w_at, dx_at, dr_at = channel_start(ws, t, shape), channel_start(dxs, t, shape), channel_start(drs, t, shape)
        whole = columns - columns % n
        for r in range(row, end):
            g, i, o, w = dy_at + r * dys[2], x_at + r * xs[2], y_at + r * ys[2], w_at + r * ws[2]
            d, e = dx_at + r * dxs[2], dr_at + r * drs[2]
            for v in range(0, whole, n):
                dz = load(dy, g + v, WIDTH)
                dz = zero_where_not_positive(load(y, o + v, WIDTH), dz)
                xv = load(x, i + v, WIDTH)
                wv = splat(dy, value(weight, w), WIDTH)
                out = input_gradient(dz, xv, wv, v, hi, lo, a, p, q)
                if streaming:
                    stream(dx, d + v, out)
                else:
                    store(dx, d + v, out)
                store(dresidual, e + v, dz)
            if whole < columns:
                v, part = whole, columns - whole
                dz = load_first(dy, g + v, part, WIDTH)
                dz = zero_where_not_positive(load_first(y, o + v, part, WIDTH), dz)
                xv = load_first(x, i + v, part, WIDTH)
                wv = splat(dy, value(weight, w), WIDTH)
                store_first(dx, d + v, part, input_gradient(dz, xv, wv, v, hi, lo, a, p, q))
                store_first(dresidual, e + v, part, dz)
