"""Kernels for channels-first memory: the innermost reduced axis is contiguous.

An array is flat memory plus the element strides ``(start, batch, outer, channel)``; a channel's slab is ``outer`` rows
of ``inner`` contiguous values. A slab is cut into chunks of about 1024 values and 64 chunks make a segment, by shape
alone; a segment is what threads share, and merges run in the order of chunks and segments. So the bits do not depend
on threads, and the fused kernels (`forward`, `backward`) give the same ones as the separate kernels.

Statistics, per chunk, around a guess q of its mean (the rounded mean of the chunks before it):
    s1 = sum(x - q), s2 = sum((x - q)^2);  mean = q + s1/n, M2 = s2 - s1^2/n.
This is the corrected two-pass algorithm (Chan, Golub & LeVeque 1983, eq. 1.7) with the first pass guessed: any q near
the mean serves, and where q turns out more than 0.7 standard deviations away the chunk, still in L1, is summed again
around its mean. Chunks are merged by Chan's update in float64, relative to the channel's first selected finite value.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S; forward 2S and backward 3S where
a slab stays in cache between the two passes over it.

The geometry's four integers of this family are ``(rows, columns, _, _)`` of a chunk.
"""

import numpy as np

from fastbn.cpu.jit import inner, kernel
from fastbn.cpu.simd import (
    address,
    converted,
    first_lanes,
    fma,
    lanes,
    load,
    load_first,
    narrowed,
    rounded,
    splat,
    store,
    stream,
    total,
    zero_where_not_positive,
    zero_where_zero,
)
from fastbn.cpu.slab import (
    affine_of,
    channel_start,
    enter_moments,
    finished,
    four,
    input_numbers,
    linear_of,
    merged,
    needs_new_guess,
    pivot_of,
    positive_or_nan,
)

WIDTH = 128  # bytes of a vector: four AVX2 registers, so that two sums keep eight additions in flight
NARROW, SINGLE = 32, 4  # bytes at the ends of rows, where masked stores would be slow on AMD processors
CHUNK = 1024  # values: 32 float32 additions per lane (rounding below 1e-6), and L1 holds it for a second look
SEGMENT = 64  # chunks


def chunk_grid(outer, inner):
    """Rows and columns of a chunk: whole rows while they fit, else pieces of one row."""
    if inner <= CHUNK:
        return max(1, CHUNK // max(inner, 1)), max(inner, 1)
    return 1, CHUNK


def segment_count(outer, inner):
    """Segments of a slab."""
    rows, columns = chunk_grid(outer, inner)
    return -(-(-(-outer // rows) * -(-inner // columns)) // SEGMENT)


@inner
def chunk_count(shape, grid):
    return -(-shape[1] // grid[0]) * -(-shape[3] // grid[1])


@inner
def chunk_at(k, shape, grid):
    """First row, rows, first column, columns of chunk k."""
    pieces = -(-shape[3] // grid[1])
    row = k // pieces * grid[0]
    column = k % pieces * grid[1]
    return row, min(grid[0], shape[1] - row), column, min(grid[1], shape[3] - column)


PIECE = 16384  # values of a row at most that one turn of a loop in memory order takes


def piece_count(shape):
    """Pieces of rows in the whole array: tasks in the order of memory."""
    return shape[0] * shape[1] * shape[2] * -(-shape[3] // PIECE)


@inner
def piece_at(p, shape):
    """Place (batch, outer, channel, column) of a piece; pieces are numbered as they lie in memory."""
    pieces = -(-shape[3] // PIECE)
    row = p // pieces
    return row // (shape[2] * shape[1]), row // shape[2] % shape[1], row % shape[2], p % pieces * PIECE


@inner
def piece_after(place, shape):
    """The next place; the divisions of `piece_at` take longer than a row of 49 values."""
    batch, outer, channel, column = place
    column += PIECE
    if column >= shape[3]:
        column = 0
        channel += 1
        if channel == shape[2]:
            channel = 0
            outer += 1
            if outer == shape[1]:
                outer = 0
                batch += 1
    return batch, outer, channel, column


@inner
def start_of(strides, place):
    """Where a piece begins."""
    return strides[0] + place[0] * strides[1] + place[1] * strides[2] + place[2] * strides[3] + place[3]


# --- statistics -------------------------------------------------------------------------------------------------------


@inner
def chunk_sums(x, x_at, x_step, weight, w_at, w_step, rows, columns, guess):
    """n, sum(w * (x - guess)), sum(w * (x - guess)^2)."""
    n = lanes(x, WIDTH)
    whole = columns - columns % n
    q = splat(x, guess, WIDTH)
    s1 = splat(x, 0.0, WIDTH)
    s2 = splat(x, 0.0, WIDTH)
    if weight is None:
        for r in range(rows):
            row = x_at + r * x_step
            for i in range(row, row + whole, n):
                e = load(x, i, WIDTH) - q
                s1 = s1 + e
                s2 = fma(e, e, s2)
            if whole < columns:
                e = first_lanes(load_first(x, row + whole, columns - whole, WIDTH) - q, columns - whole)
                s1 = s1 + e
                s2 = fma(e, e, s2)
        return np.float64(rows * columns), total(s1), total(s2)
    else:
        count = load_first(weight, w_at, 0, s1)
        for r in range(rows):
            for i in range(0, columns, n):
                stored = load_first(weight, w_at + r * w_step + i, min(n, columns - i), s1)
                count = count + stored
                w = converted(stored, s1)
                e = load_first(x, x_at + r * x_step + i, min(n, columns - i), WIDTH) - q
                e = zero_where_zero(w, e)
                s1 = s1 + w * e
                s2 = fma(w * e, e, s2)
        return total(count), total(s1), total(s2)


@inner
def segment_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, segment, pivot):
    """n, mean - pivot and M2 of one segment."""
    n, mean, m2 = 0.0, 0.0, 0.0
    guess = pivot
    for k in range(segment * SEGMENT, min((segment + 1) * SEGMENT, chunk_count(shape, grid))):
        row, rows, column, columns = chunk_at(k, shape, grid)
        x_chunk = x_at + row * x_step + column
        w_chunk = w_at + row * w_step + column
        count, s1, s2 = chunk_sums(x, x_chunk, x_step, weight, w_chunk, w_step, rows, columns, guess)
        if needs_new_guess(count, s1, s2):
            guess = rounded(x, guess + s1 / count)
            count, s1, s2 = chunk_sums(x, x_chunk, x_step, weight, w_chunk, w_step, rows, columns, guess)
        if count != 0.0:
            shift = s1 / count
            n, mean, m2 = merged(n, mean, m2, count, guess - pivot + shift, positive_or_nan(s2 - s1 * shift))
            guess = rounded(x, pivot + mean)
    return n, mean, m2


@inner
def slab_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, pivot):
    n, mean, m2 = 0.0, 0.0, 0.0
    for s in range(-(-chunk_count(shape, grid) // SEGMENT)):
        part = segment_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, s, pivot)
        n, mean, m2 = merged(n, mean, m2, part[0], part[1], part[2])
    return finished(x, x_at, x_step, weight, w_at, w_step, shape, n, mean, m2, pivot)


@kernel
def moments_of_segments(share, first, last, x, weight, geometry, pivots, parts):
    """n, mean - pivot and M2 of every segment of every kept index."""
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    for k in range(first, last):
        t = k // segments
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        pivot = pivot_of(x, x_at, weight, pivots, t)
        part = segment_moments(x, x_at, xs[2], weight, w_at, ws[2], shape, grid, k % segments, pivot)
        parts[3 * k], parts[3 * k + 1], parts[3 * k + 2] = part


@kernel
def channel_moments(share, first, last, x, weight, geometry, pivots, parts, table, eps):
    """Moments of every kept index from those of its segments, into the table of `enter_moments`."""
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        n, mean, m2 = 0.0, 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            n, mean, m2 = merged(n, mean, m2, parts[3 * k], parts[3 * k + 1], parts[3 * k + 2])
        pivot = pivot_of(x, x_at, weight, pivots, t)
        n, mean, m2 = finished(x, x_at, xs[2], weight, w_at, ws[2], shape, n, mean, m2, pivot)
        enter_moments(table, t, kept, n, mean, m2, eps)


# --- normalise, scale, shift ------------------------------------------------------------------------------------------


@inner
def misaligned(y, at, limit):
    """How many values lie before the next 64-byte line of ``y``."""
    size = address(y, 1) - address(y, 0)
    return min(-address(y, at) % 64 // size, limit)


@inner
def normalized(x, residual, hi, scale, shift, relu):
    z = fma(x - hi, scale, shift)
    if residual is not None:
        z = z + residual
    if relu is not None:
        z = zero_where_not_positive(z, z)
    return z


@inner
def normalize_end(x, i, y, j, residual, k, n, affine, relu):
    """The n values, less than a vector, at either end of a row: by short vectors, then one by one."""
    hi, scale, shift = affine
    done = 0
    while done + lanes(x, NARROW) <= n:
        z = load(residual, k + done, NARROW)
        out = normalized(
            load(x, i + done, NARROW), z, narrowed(x, hi, NARROW),
            narrowed(x, scale, NARROW), narrowed(x, shift, NARROW), relu,
        )  # fmt: skip
        store(y, j + done, out)
        done += lanes(x, NARROW)
    while done < n:
        z = load(residual, k + done, SINGLE)
        out = normalized(
            load(x, i + done, SINGLE), z, narrowed(x, hi, SINGLE),
            narrowed(x, scale, SINGLE), narrowed(x, shift, SINGLE), relu,
        )  # fmt: skip
        store(y, j + done, out)
        done += 1


@inner
def normalize_row(x, i, y, j, residual, k, columns, affine, relu, streaming):
    """``y = ((x - hi) * scale + shift, + residual, relu)``; affine is (hi, scale, shift) of `affine_of`."""
    n = lanes(x, WIDTH)
    hi, scale, shift = affine
    hi = splat(x, hi, WIDTH)
    scale = splat(x, scale, WIDTH)
    shift = splat(x, shift, WIDTH)
    end = i + columns
    if streaming:
        head = misaligned(y, j, columns)
        if head > 0:
            normalize_end(x, i, y, j, residual, k, head, (hi, scale, shift), relu)
            i, j, k = i + head, j + head, k + head
        while i + n <= end:
            z = load(residual, k, WIDTH)
            stream(y, j, normalized(load(x, i, WIDTH), z, hi, scale, shift, relu))
            i, j, k = i + n, j + n, k + n
    else:
        while i + n <= end:
            z = load(residual, k, WIDTH)
            store(y, j, normalized(load(x, i, WIDTH), z, hi, scale, shift, relu))
            i, j, k = i + n, j + n, k + n
    if i < end:
        normalize_end(x, i, y, j, residual, k, end - i, (hi, scale, shift), relu)


@kernel
def normalize(share, first, last, x, y, residual, geometry, numbers, eps, relu, streaming):
    """Pieces of rows in the order of memory; see `affine_of` for the numbers and eps."""
    shape, xs, ys, rs = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    place = piece_at(first, shape)
    for _ in range(first, last):
        t, columns = place[0] * shape[2] + place[2], min(PIECE, shape[3] - place[3])
        affine = affine_of(x, numbers, t, shape[0] * shape[2], eps)
        i, j, k = start_of(xs, place), start_of(ys, place), start_of(rs, place)
        normalize_row(x, i, y, j, residual, k, columns, affine, relu, streaming)
        place = piece_after(place, shape)


@kernel
def forward(share, first, last, x, weight, y, residual, geometry, pivots, table, eps, relu, streaming):
    """Moments and normalise, a channel at a time: the second pass finds the slab in cache.

    The table is that of `enter_moments`.
    """
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    ys, rs = four(geometry, 16), four(geometry, 20)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        pivot = pivot_of(x, x_at, weight, pivots, t)
        n, mean, m2 = slab_moments(x, x_at, xs[2], weight, w_at, ws[2], shape, grid, pivot)
        enter_moments(table, t, kept, n, mean, m2, eps)
        affine = affine_of(x, table, 2 * kept + t, kept, -1.0)
        y_at, r_at = channel_start(ys, t, shape), channel_start(rs, t, shape)
        for r in range(shape[1]):
            i, j, k = x_at + r * xs[2], y_at + r * ys[2], r_at + r * rs[2]
            normalize_row(x, i, y, j, residual, k, shape[3], affine, relu, streaming)


# --- gradients --------------------------------------------------------------------------------------------------------


@inner
def chunk_grad_sums(dy, dy_at, dy_step, x, x_at, x_step, y, y_at, y_step, rows, columns, mean):
    """sum(dz), sum(dz * (x - hi)), with dz = dy, or 0 where y <= 0, and hi the mean in the compute type."""
    n = lanes(x, WIDTH)
    whole = columns - columns % n
    hi = splat(x, mean, WIDTH)
    s1 = splat(x, 0.0, WIDTH)
    s2 = splat(x, 0.0, WIDTH)
    for r in range(rows):
        g, i, o = dy_at + r * dy_step, x_at + r * x_step, y_at + r * y_step
        for k in range(0, whole, n):
            dz = load(dy, g + k, WIDTH)
            dz = zero_where_not_positive(load(y, o + k, WIDTH), dz)
            s1 = s1 + dz
            s2 = fma(dz, load(x, i + k, WIDTH) - hi, s2)
        if whole < columns:
            rest = columns - whole
            dz = load_first(dy, g + whole, rest, WIDTH)
            dz = zero_where_not_positive(load_first(y, o + whole, rest, WIDTH), dz)
            s1 = s1 + dz
            s2 = fma(dz, load_first(x, i + whole, rest, WIDTH) - hi, s2)
    return total(s1), total(s2)


@inner
def grad_segment(dy, dy_at, dy_step, x, x_at, x_step, y, y_at, y_step, shape, grid, segment, mean):
    a, b = 0.0, 0.0
    for k in range(segment * SEGMENT, min((segment + 1) * SEGMENT, chunk_count(shape, grid))):
        row, rows, column, columns = chunk_at(k, shape, grid)
        s1, s2 = chunk_grad_sums(
            dy, dy_at + row * dy_step + column, dy_step, x, x_at + row * x_step + column, x_step,
            y, y_at + row * y_step + column, y_step, rows, columns, mean,
        )  # fmt: skip
        a, b = a + s1, b + s2
    return a, b


@inner
def around_mean(x, mean, rstd, a, b):
    """Dgamma from a = sum(dz) and b = sum(dz * (x - hi))."""
    return (b - (mean - rounded(x, mean)) * a) * rstd


@kernel
def grad_sums_of_segments(share, first, last, dy, x, y, geometry, numbers, parts):
    """sum(dz) and sum(dz * (x - hi)) of every segment of every kept index; the numbers begin with the means."""
    shape, grid, dys = four(geometry, 0), four(geometry, 4), four(geometry, 8)
    xs, ys = four(geometry, 12), four(geometry, 16)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    for k in range(first, last):
        t = k // segments
        dy_at, x_at, y_at = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        parts[2 * k], parts[2 * k + 1] = grad_segment(
            dy, dy_at, dys[2], x, x_at, xs[2], y, y_at, ys[2], shape, grid, k % segments, numbers[t]
        )


@kernel
def channel_grad_sums(share, first, last, x, geometry, numbers, parts, out):
    """The results (dgamma, dbeta) from the segments' sums; the numbers are (mean, rstd)."""
    shape, grid = four(geometry, 0), four(geometry, 4)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        a, b = 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            a, b = a + parts[2 * k], b + parts[2 * k + 1]
        out[t], out[kept + t] = around_mean(x, numbers[t], numbers[kept + t], a, b), a


@inner
def input_gradient(dz, x, weight, scale, hi, slope, offset):
    """``scale * dz - weight * (offset + slope * (x - hi))``; without x, ``scale * dz``."""
    if x is None:
        return scale * dz
    back = fma(x - hi, slope, offset)
    if weight is not None:
        back = zero_where_zero(weight, weight * back)
    return scale * dz - back


@inner
def grad_input_end(dy, g, x, i, y, o, weight, w, dx, d, dresidual, e, n, linear):
    """The n values, less than a vector, at either end of a row: by short vectors, then one by one."""
    scale, hi, slope, offset = linear
    k = 0
    while k + lanes(dy, NARROW) <= n:
        dz = zero_where_not_positive(load(y, o + k, NARROW), load(dy, g + k, NARROW))
        x_, w_ = load(x, i + k, NARROW), converted(load(weight, w + k, dz), dz)
        out = input_gradient(
            dz, x_, w_, narrowed(dy, scale, NARROW), narrowed(dy, hi, NARROW),
            narrowed(dy, slope, NARROW), narrowed(dy, offset, NARROW),
        )  # fmt: skip
        store(dx, d + k, out)
        store(dresidual, e + k, dz)
        k += lanes(dy, NARROW)
    while k < n:
        dz = zero_where_not_positive(load(y, o + k, SINGLE), load(dy, g + k, SINGLE))
        x_, w_ = load(x, i + k, SINGLE), converted(load(weight, w + k, dz), dz)
        out = input_gradient(
            dz, x_, w_, narrowed(dy, scale, SINGLE), narrowed(dy, hi, SINGLE),
            narrowed(dy, slope, SINGLE), narrowed(dy, offset, SINGLE),
        )  # fmt: skip
        store(dx, d + k, out)
        store(dresidual, e + k, dz)
        k += 1


@inner
def grad_input_row(dy, g, x, i, y, o, weight, w, dx, d, dresidual, e, columns, linear, streaming):
    """The argument ``linear`` is (scale, hi, slope, offset) of `linear_of`."""
    n = lanes(dy, WIDTH)
    scale, hi, slope, offset = linear
    hi = splat(dy, hi, WIDTH)
    scale = splat(dy, scale, WIDTH)
    offset = splat(dy, offset, WIDTH)
    slope = splat(dy, slope, WIDTH)
    k = 0
    if streaming:
        k = misaligned(dx, d, columns)
        if k > 0:
            grad_input_end(dy, g, x, i, y, o, weight, w, dx, d, dresidual, e, k, (scale, hi, slope, offset))
    while k + n <= columns:
        dz = zero_where_not_positive(load(y, o + k, WIDTH), load(dy, g + k, WIDTH))
        x_, w_ = load(x, i + k, WIDTH), converted(load(weight, w + k, dz), dz)
        out = input_gradient(dz, x_, w_, scale, hi, slope, offset)
        if streaming:
            stream(dx, d + k, out)
        else:
            store(dx, d + k, out)
        store(dresidual, e + k, dz)
        k += n
    if k < columns:
        grad_input_end(
            dy, g + k, x, i + k, y, o + k, weight, w + k, dx, d + k, dresidual, e + k, columns - k,
            (scale, hi, slope, offset),
        )  # fmt: skip


@kernel
def grad_input(share, first, last, dy, x, y, weight, dx, dresidual, geometry, numbers, streaming):
    """``dx`` (and ``dresidual = dz``), pieces of rows in the order of memory; numbers: (mean, scale, offset, slope)."""
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws, dxs, drs = four(geometry, 20), four(geometry, 24), four(geometry, 28)
    kept = shape[0] * shape[2]
    place = piece_at(first, shape)
    for _ in range(first, last):
        t, columns = place[0] * shape[2] + place[2], min(PIECE, shape[3] - place[3])
        linear = linear_of(dy, numbers[t], numbers[kept + t], numbers[2 * kept + t], numbers[3 * kept + t])
        grad_input_row(
            dy, start_of(dys, place), x, start_of(xs, place), y, start_of(ys, place), weight, start_of(ws, place),
            dx, start_of(dxs, place), dresidual, start_of(drs, place), columns, linear, streaming,
        )  # fmt: skip
        place = piece_after(place, shape)


@kernel
def backward(share, first, last, dy, x, y, live, weight, dx, dresidual, geometry, numbers, out, streaming):
    """Gradient sums and dx, a channel at a time: the second pass finds the slabs of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. The numbers are those of
    `input_numbers`, the results (dgamma, dbeta).
    """
    shape, grid, dys = four(geometry, 0), four(geometry, 4), four(geometry, 8)
    xs, ys, ws = four(geometry, 12), four(geometry, 16), four(geometry, 20)
    dxs, drs = four(geometry, 24), four(geometry, 28)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        dy_at, x_at, y_at = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        w_at, dx_at, dr_at = channel_start(ws, t, shape), channel_start(dxs, t, shape), channel_start(drs, t, shape)
        mean = numbers[t]
        a, b = 0.0, 0.0
        for s in range(-(-chunk_count(shape, grid) // SEGMENT)):
            s1, s2 = grad_segment(dy, dy_at, dys[2], x, x_at, xs[2], y, y_at, ys[2], shape, grid, s, mean)
            a, b = a + s1, b + s2
        b = around_mean(x, mean, numbers[kept + t], a, b)
        out[t], out[kept + t] = b, a
        scale, offset, slope = input_numbers(numbers, t, kept, live, a, b)
        linear = linear_of(x, mean, scale, offset, slope)
        for r in range(shape[1]):
            grad_input_row(
                dy, dy_at + r * dys[2], live, x_at + r * xs[2], y, y_at + r * ys[2], weight, w_at + r * ws[2],
                dx, dx_at + r * dxs[2], dresidual, dr_at + r * drs[2], shape[3], linear, streaming,
            )  # fmt: skip
