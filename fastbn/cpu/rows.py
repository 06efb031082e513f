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
    merged,
    needs_new_guess,
    pivot_of,
    positive_or_nan,
)

WIDTH = 128  # bytes of a vector: four AVX2 registers
PAIRED = 64  # where two rows are taken at once: two sums of each keep eight additions in flight
NARROW, SINGLE = 32, 4  # bytes at the ends of rows, where masked stores would be slow on AMD processors
CHUNK = 1024  # values: 32 float32 additions per lane (rounding below 1e-6), and L1 holds it for a second look
SEGMENT = 64  # chunks


def chunk_grid(outer, inner):
    """Rows and columns of a chunk: whole rows while two fit, else pieces of two rows, or of the only one."""
    if 2 * inner <= CHUNK:
        return CHUNK // max(inner, 1), max(inner, 1)
    rows = min(2, outer)
    pieces = max(1, round(rows * inner / CHUNK))
    return rows, -(-inner // (16 * pieces)) * 16


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
    """n, sum(w * (x - guess)), sum(w * (x - guess)^2).

    Two rows at a time: two streams from memory are read half as fast again as one (30 GB/s against 20).
    """
    n = lanes(x, PAIRED)
    q = splat(x, guess, PAIRED)
    s1 = splat(x, 0.0, PAIRED)
    s2 = splat(x, 0.0, PAIRED)
    if weight is None:
        t1, t2 = s1, s2
        pairs, whole = rows - rows % 2, columns - columns % n
        for r in range(0, pairs, 2):
            row = x_at + r * x_step
            for i in range(row, row + whole, n):
                e = load(x, i, PAIRED) - q
                s1 = s1 + e
                s2 = fma(e, e, s2)
                e = load(x, i + x_step, PAIRED) - q
                t1 = t1 + e
                t2 = fma(e, e, t2)
        for r in range(pairs if whole == columns else 0, rows):
            for c in range(whole if r < pairs else 0, columns, n):
                e = first_lanes(load_first(x, x_at + r * x_step + c, columns - c, PAIRED) - q, columns - c)
                s1 = s1 + e
                s2 = fma(e, e, s2)
        return np.float64(rows * columns), total(s1 + t1), total(s2 + t2)
    else:
        count = load_first(weight, w_at, 0, s1)
        for r in range(rows):
            for i in range(0, columns, n):
                stored = load_first(weight, w_at + r * w_step + i, min(n, columns - i), s1)
                count = count + stored
                w = converted(stored, s1)
                e = load_first(x, x_at + r * x_step + i, min(n, columns - i), PAIRED) - q
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
