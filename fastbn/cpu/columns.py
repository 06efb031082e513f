"""Kernels for memory whose rows run through all channels: channels-last, and channels-first with short rows.

An array is flat memory plus the element strides ``(start, batch, outer, channel)``. Kernels see rows of contiguous
columns; a *cell* of ``inner`` neighbouring columns belongs to one channel, and cell j to channel ``j % channels``:

=============================  =====================  ===================  ============
memory                         rows                   columns of a row     a cell
=============================  =====================  ===================  ============
channels-last                  outer                  channels             one column
channels-last, few channels    outer // fold          fold * channels      one column
channels-first, short rows     outer                  channels * inner     inner columns
=============================  =====================  ===================  ============

Folding few channels fills whole vectors; rows beyond the last whole fold (`rest`) are taken value by value. Rows are
taken in chunks of 64 and in segments, by shape alone; threads share segments and tiles of columns. The sums of a chunk
live in one small array per tile, so memory is read in its own order. The numerics are those of `rows`: each cell has
its own guess, and a chunk in which some guess was poor is summed again, with a better guess for those cells alone.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S; forward 2S and backward 3S where
a tile of all rows stays in cache between the two passes over it. Second passes run backwards, so that they begin with
what the first one left in the last cache.
"""

import numpy as np
from numba import prange, types
from numba.extending import overload

from fastbn.cpu.jit import inner, kernel
from fastbn.cpu.simd import (
    any_greater,
    converted,
    fma,
    lanes,
    prefetch,
    load,
    load_first,
    rounded,
    splat,
    store,
    store_first,
    stream,
    total,
    value,
    zero_where_not_positive,
    zero_where_zero,
)
from fastbn.cpu.slab import channel_start, find_pivot, finished, merged, needs_new_guess, positive_or_nan

WIDTH = 64  # bytes of a vector: one cache line of float32
CHUNK = 64  # rows: 8 + 3 float32 additions per sum keep its rounding below 1e-6
SEGMENT = 1024  # rows, at most: two float64 a cell and segment are 0.4 % of float32 data, 0.8 % of halves
PEEK = 64  # values of a channel from whose mean the first guess comes


def scratch(x, n):
    """An uninitialised array of n values of the compute type of x, padded so that whole vectors may be read."""
    raise TypeError("compiled code only")


@overload(scratch)
def _scratch(x, n):
    dtype = np.float64 if x.dtype == types.float64 else np.float32
    return lambda x, n: np.empty(n + 16, dtype)


@inner
def fill(a, n, number):
    """Write n values and the padding."""
    for i in range(0, n, lanes(a, WIDTH)):
        store(a, i, splat(a, number, WIDTH))


@inner
def segment_rows(rows):
    """Rows of a segment: an even number of equal segments, so that two threads have the same to do."""
    if rows < 2 * CHUNK:
        return max(rows, 1)
    return -(-rows // (2 * -(-rows // (2 * SEGMENT))))


@inner
def segment_count(rows):
    return -(-rows // segment_rows(rows))


@inner
def task_at(k, rows, columns, piece, tile):
    """Batch, row, end row, first column and columns of task k: ``piece`` rows of a tile, tiles of a row neighbours."""
    tiles = -(-columns // tile)
    pieces = -(-rows // piece)
    column = k % tiles * tile
    row = k // tiles % pieces * piece
    return k // tiles // pieces, row, min(row + piece, rows), column, min(tile, columns - column)


@inner
def task_count(batch, rows, columns, piece, tile):
    return batch * -(-rows // piece) * -(-columns // tile)


@inner
def spread(x, numbers, cells, size, into):
    """Each cell's number in all its columns."""
    if size == 1:
        for i in range(cells):
            into[i] = numbers[i]
    else:
        for j in range(cells):
            v = splat(x, numbers[j], WIDTH)
            for i in range(0, size, lanes(x, WIDTH)):
                store(into, j * size + i, v)  # what spills over the cell, the next one overwrites


@inner
def cell_totals(sums, cells, size, into):
    """The sum of each cell's columns in float64."""
    if size == 1:
        for j in range(cells):
            into[j] = sums[j]
    else:
        n = lanes(sums, WIDTH)
        for j in range(cells):
            part = 0.0
            for i in range(0, size, n):
                part += total(load_first(sums, j * size + i, min(n, size - i), WIDTH))
            into[j] = part


# --- statistics -------------------------------------------------------------------------------------------------------


@inner
def part_of(a, at, part, n):
    return load(a, at, WIDTH) if part == n else load_first(a, at, part, WIDTH)


@inner
def add_eight_rows(x, at, step, c, n, part, guess, s1, s2):
    """Add n <= one vector of columns of eight rows to the sums, and ask for the next eight rows.

    Without asking, eight streams at once read a fifth slower than one.
    """
    q = load(guess, c, WIDTH)
    at += c
    for k in range(8, 16):
        prefetch(x, at + k * step)
    a, b = part_of(x, at, part, n) - q, part_of(x, at + step, part, n) - q
    d, e = part_of(x, at + 2 * step, part, n) - q, part_of(x, at + 3 * step, part, n) - q
    f, g = part_of(x, at + 4 * step, part, n) - q, part_of(x, at + 5 * step, part, n) - q
    h, i = part_of(x, at + 6 * step, part, n) - q, part_of(x, at + 7 * step, part, n) - q
    squares = (fma(a, a, b * b) + fma(d, d, e * e)) + (fma(f, f, g * g) + fma(h, h, i * i))
    store(s1, c, load(s1, c, WIDTH) + (((a + b) + (d + e)) + ((f + g) + (h + i))))
    store(s2, c, load(s2, c, WIDTH) + squares)


@inner
def chunk_sums(x, at, step, rows, columns, guess, s1, s2):
    """s1 = sum(x - guess), s2 = sum((x - guess)^2) per column."""
    n = lanes(x, WIDTH)
    fill(s1, columns, 0.0)
    fill(s2, columns, 0.0)
    eights = rows - rows % 8
    for r in range(0, eights, 8):
        for c in range(0, columns, n):
            add_eight_rows(x, at + r * step, step, c, n, min(n, columns - c), guess, s1, s2)
    for r in range(eights, rows):
        for c in range(0, columns, n):
            e = load_first(x, at + r * step + c, min(n, columns - c), WIDTH) - load(guess, c, WIDTH)
            store(s1, c, load(s1, c, WIDTH) + e)
            store(s2, c, fma(e, e, load(s2, c, WIDTH)))


@inner
def some_guess_is_poor(cells, count, t1, t2):
    """`needs_new_guess` of any cell."""
    half = splat(t1, 0.5 * count, WIDTH)
    for j in range(0, cells, lanes(t1, WIDTH)):
        s1 = load(t1, j, WIDTH)
        if any_greater(s1 * s1, half * load(t2, j, WIDTH)):
            return True
    return False


@inner
def merge_chunk(cells, before, count, t1, t2, centre, pivot, mean, m2):
    """Chan's update of each cell's moments, of ``before`` values, by a chunk of ``count`` values around its centre."""
    each = splat(t1, 1.0 / count, WIDTH)
    share = splat(t1, count / (before + count), WIDTH)
    cross = splat(t1, before * (count / (before + count)), WIDTH)
    for j in range(0, cells, lanes(t1, WIDTH)):
        s1, s2, origin, mu = load(t1, j, WIDTH), load(t2, j, WIDTH), load(pivot, j, WIDTH), load(mean, j, WIDTH)
        shift = s1 * each
        part = s2 - s1 * shift
        part = zero_where_not_positive(part, part)
        delta = ((load(centre, j, WIDTH) - origin) + shift) - mu
        mu = fma(delta, share, mu)
        store(mean, j, mu)
        store(m2, j, load(m2, j, WIDTH) + fma(delta * delta, cross, part))
        store(centre, j, origin + mu)


@inner
def round_centres(x, centre, cells, size, guess):
    """Guesses are centres rounded to the compute type; both must be the same number."""
    for j in range(cells):
        centre[j] = rounded(x, centre[j])
    spread(x, centre, cells, size, guess)


@inner
def segment_moments(x, at, step, rows, cells, size, pivot, mean, m2):
    """Mean - pivot and M2 of each cell of one segment."""
    columns = cells * size
    guess, s1, s2 = scratch(x, columns), scratch(x, columns), scratch(x, columns)
    t1, t2, centre = np.empty(cells + 16), np.empty(cells + 16), np.empty(cells + 16)
    for a in (t1, t2, centre, mean, m2):
        fill(a, cells, 0.0)
    for j in range(cells):
        centre[j] = pivot[j]
    peek = min(rows, CHUNK, -(-PEEK // size))
    first = 0
    looked = 0  # times: at a few rows for the first guess, at the chunk, at the chunk around better guesses
    while first < rows:
        high = min(CHUNK, rows - first) if looked > 0 else peek
        if looked < 2:
            round_centres(x, centre, cells, size, guess)
        else:
            spread(x, centre, cells, size, guess)
        chunk_sums(x, at + first * step, step, high, columns, guess, s1, s2)
        cell_totals(s1, cells, size, t1)
        cell_totals(s2, cells, size, t2)
        count = np.float64(high * size)
        if looked == 0:
            for j in range(cells):
                centre[j] += t1[j] / count
            looked = 1
        elif looked == 1 and some_guess_is_poor(cells, count, t1, t2):
            for j in range(cells):
                if needs_new_guess(count, t1[j], t2[j]):
                    centre[j] = rounded(x, centre[j] + t1[j] / count)
            looked = 2
        else:
            merge_chunk(cells, np.float64(first * size), count, t1, t2, centre, pivot, mean, m2)
            first += high
            looked = 1


@inner
def weighted_chunk_sums(x, at, step, weight, w_at, w_step, w_across, rows, columns, guess, count, s1, s2):
    """The sums with weights, and count = sum(w); ``w_across`` is 0 where all channels share a weight."""
    n = lanes(x, WIDTH)
    fill(s1, columns, 0.0)
    fill(s2, columns, 0.0)
    fill(count, columns, 0.0)
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
def weighted_segment_moments(x, at, step, weight, w_at, w_step, w_across, rows, columns, pivot, n, mean, m2):
    """n, mean - pivot and M2 of each column of one segment."""
    guess, s1, s2 = scratch(x, columns), scratch(x, columns), scratch(x, columns)
    counts = np.empty(columns + 16)
    fill(guess, columns, 0.0)
    for i in range(columns):
        guess[i] = pivot[i]
        n[i] = mean[i] = m2[i] = 0.0
    first = 0
    again = False
    while first < rows:
        high = min(CHUNK, rows - first)
        weighted_chunk_sums(
            x, at + first * step, step, weight, w_at + first * w_step, w_step, w_across, high, columns,
            guess, counts, s1, s2,
        )  # fmt: skip
        poor = False
        if not again:
            # A chunk has few values per channel: on the first one, half a standard deviation would cost the mean 1e-7.
            for i in range(columns):
                if counts[i] != 0.0 and (
                    first == 0 or needs_new_guess(counts[i], np.float64(s1[i]), np.float64(s2[i]))
                ):
                    guess[i] += s1[i] / counts[i]
                    poor = True
        if poor:
            again = True
            continue
        for i in range(columns):
            if counts[i] != 0.0:
                shift = s1[i] / counts[i]
                part = positive_or_nan(s2[i] - s1[i] * shift)
                n[i], mean[i], m2[i] = merged(n[i], mean[i], m2[i], counts[i], (guess[i] - pivot[i]) + shift, part)
                guess[i] = pivot[i] + mean[i]
        first += high
        again = False


@inner
def pivots_of(x, xs, weight, ws, shape, first, pivot):
    """The pivots of neighbouring cells, the first of which belongs to kept index ``first``."""
    batch = first // shape[2] * shape[2]
    for j in range(pivot.size):
        t = batch + (first - batch + j) % shape[2]
        pivot[j] = find_pivot(
            x, channel_start(xs, t, shape), xs[2], weight, channel_start(ws, t, shape), ws[2], shape
        )


@kernel
def moments(x, xs, weight, ws, shape, fold, tile, count, mean, m2):
    """Count, mean and M2 of every kept index; ``tile`` counts cells."""
    channels, size = shape[2], shape[3]
    rows, cells = shape[1] // fold, channels * fold
    step = xs[2] * fold
    height = segment_rows(rows)
    segments = segment_count(rows)
    pivots = np.empty(shape[0] * cells)
    for t in range(shape[0]):
        pivots_of(x, xs, weight, ws, shape, t * channels, pivots[t * cells : (t + 1) * cells])
    parts = np.empty((2 if weight is None else 3, shape[0], segments, cells))
    for k in prange(task_count(shape[0], rows, cells, height, tile)):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        pivot = np.empty(width + 16)
        mu, q = np.empty(width + 16), np.empty(width + 16)
        fill(pivot, width, 0.0)
        for i in range(width):
            pivot[i] = pivots[b * cells + j + i]
        x_at = channel_start(xs, b * channels, shape) + row * step + j * size
        s = row // height
        if weight is None:
            segment_moments(x, x_at, step, end - row, width, size, pivot, mu, q)
        else:
            w_at = channel_start(ws, b * channels + j, shape) + row * ws[2]
            n = parts[2, b, s, j : j + width]
            weighted_segment_moments(x, x_at, step, weight, w_at, ws[2], ws[3], end - row, width, pivot, n, mu, q)
        for i in range(width):
            parts[0, b, s, j + i] = mu[i]
            parts[1, b, s, j + i] = q[i]
    for t in prange(shape[0] * channels):
        b, channel = t // channels, t % channels
        pivot = pivots[b * cells + channel]
        a, mu, q = 0.0, 0.0, 0.0
        for s in range(segments):
            height_of_s = min(height, rows - s * height)
            for j in range(channel, cells, channels):
                n = np.float64(height_of_s * size) if weight is None else parts[2, b, s, j]
                a, mu, q = merged(a, mu, q, n, parts[0, b, s, j], parts[1, b, s, j])
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        for r in range(rows * fold, shape[1]):
            a, mu, q = merged(a, mu, q, 1.0, value(x, x_at + r * xs[2]) - pivot, 0.0)
        count[t], mean[t], m2[t] = finished(x, x_at, xs[2], weight, w_at, ws[2], shape, a, mu, q, pivot)


# --- normalise, scale, shift ------------------------------------------------------------------------------------------


@inner
def as_compute(x, numbers, first, channels, t, cells, size):
    """In all columns of the cells, in the compute type: ``numbers[first + t]`` and so on, cyclic after ``channels``."""
    taken, out = np.empty(cells), scratch(x, cells * size)
    for j in range(cells):
        taken[j] = numbers[first + t]
        t += 1
        if t == channels:
            t = 0
    spread(x, taken, cells, size, out)
    return out


@inner
def as_affine(x, mean, scale, shift, first, channels, t, cells, size):
    """As arrays of columns hi, scale, shift with ``(x - hi) * scale + shift == (x - mean) * scale + given shift``.

    What rounding the mean to the compute type leaves goes into the shift.
    """
    a, b, c = np.empty(cells), np.empty(cells), np.empty(cells)
    hi, by, plus = scratch(x, cells * size), scratch(x, cells * size), scratch(x, cells * size)
    for j in range(cells):
        a[j] = rounded(x, mean[first + t])
        b[j] = scale[first + t]
        c[j] = shift[first + t] - (mean[first + t] - a[j]) * b[j]
        t += 1
        if t == channels:
            t = 0
    spread(x, a, cells, size, hi)
    spread(x, b, cells, size, by)
    spread(x, c, cells, size, plus)
    return hi, by, plus


@inner
def normalized(x, residual, hi, scale, shift, relu):
    z = fma(x - hi, scale, shift)
    if residual is not None:
        z = z + residual
    if relu is not None:
        z = zero_where_not_positive(z, z)
    return z


@inner
def put(y, at, v, streaming):
    if streaming:
        stream(y, at, v)
    else:
        store(y, at, v)


@inner
def normalize_rows(
    x, x_at, x_step, y, y_at, y_step, residual, r_at, r_step, rows, columns, last, affine, relu, streaming
):  # fmt: skip
    """Affine is (hi, scale, shift) of every column; the last row has ``last`` columns."""
    n = lanes(x, WIDTH)
    hi, scale, shift = affine
    for r in range(rows):
        width = last if r == rows - 1 else columns
        whole = width - width % n
        i, j, k = x_at + r * x_step, y_at + r * y_step, r_at + r * r_step
        for c in range(0, whole, n):
            h, a, b = load(hi, c, WIDTH), load(scale, c, WIDTH), load(shift, c, WIDTH)
            put(y, j + c, normalized(load(x, i + c, WIDTH), load(residual, k + c, WIDTH), h, a, b, relu), streaming)
        if whole < width:
            c, part = whole, width - whole
            h, a, b = load(hi, c, WIDTH), load(scale, c, WIDTH), load(shift, c, WIDTH)
            z = load_first(residual, k + c, part, WIDTH)
            store_first(y, j + c, part, normalized(load_first(x, i + c, part, WIDTH), z, h, a, b, relu))


@inner
def last_width(end, j, width, shape, fold):
    """How many of ``width`` cells from j on there are in row ``end - 1``: the rest, in the last row of folded ones."""
    rows = -(-shape[1] // fold)
    if end < rows:
        return width
    return max(0, min(width, (fold - (rows * fold - shape[1])) * shape[2] - j))


@kernel
def normalize(x, xs, y, ys, residual, rs, shape, fold, piece, tile, mean, scale, shift, relu, streaming):
    """``y = ((x - mean) * scale + shift, + residual, relu)``; tasks are ``piece`` rows of ``tile`` cells."""
    channels, size = shape[2], shape[3]
    rows, cells = -(-shape[1] // fold), channels * fold
    tasks = task_count(shape[0], rows, cells, piece, tile)
    for k in prange(tasks):
        b, row, end, j, width = task_at(k, rows, cells, piece, tile)
        first, t = b * channels, j % channels
        affine = as_affine(x, mean, scale, shift, first, channels, t, width, size)
        last = last_width(end, j, width, shape, fold)
        x_step, y_step, r_step = xs[2] * fold, ys[2] * fold, rs[2] * fold
        normalize_rows(
            x, channel_start(xs, first, shape) + row * x_step + j * size, x_step,
            y, channel_start(ys, first, shape) + row * y_step + j * size, y_step,
            residual, channel_start(rs, first, shape) + row * r_step + j * size, r_step,
            end - row, width * size, last * size, affine, relu, streaming,
        )  # fmt: skip


@kernel
def forward(x, xs, y, ys, residual, rs, shape, tile, gamma, beta, eps, relu, streaming, count, mean, m2):
    """Moments and normalise, a tile of cells at a time: the second pass finds its rows in cache."""
    channels, size, rows = shape[2], shape[3], shape[1]
    height = segment_rows(rows)
    for k in prange(task_count(shape[0], 1, channels, 1, tile)):
        b, _, _, j, width = task_at(k, 1, channels, 1, tile)
        t = b * channels + j
        x_at, y_at, r_at = channel_start(xs, t, shape), channel_start(ys, t, shape), channel_start(rs, t, shape)
        pivot, mu, q = np.empty(width + 16), np.empty(width + 16), np.empty(width + 16)
        fill(pivot, width, 0.0)
        for i in range(width):
            pivot[i] = find_pivot(x, x_at + i * xs[3], xs[2], None, 0, 0, shape)
            count[t + i] = mean[t + i] = m2[t + i] = 0.0
        for row in range(0, rows, height):
            high = min(height, rows - row)
            segment_moments(x, x_at + row * xs[2], xs[2], high, width, size, pivot, mu, q)
            for i in range(width):
                count[t + i], mean[t + i], m2[t + i] = merged(
                    count[t + i], mean[t + i], m2[t + i], np.float64(high * size), mu[i], q[i]
                )
        scale = np.empty(width)
        for i in range(width):
            n, c, d = finished(
                x, x_at + i * xs[3], xs[2], None, 0, 0, shape, count[t + i], mean[t + i], m2[t + i], pivot[i]
            )
            count[t + i], mean[t + i], m2[t + i] = n, c, d
            scale[i] = 1.0 / np.sqrt(d / n + eps) * gamma[t + i]
        affine = as_affine(x, mean[t : t + width], scale, beta[t : t + width], 0, width, 0, width, size)
        columns = width * size
        normalize_rows(
            x, x_at, xs[2], y, y_at, ys[2], residual, r_at, rs[2], rows, columns, columns, affine, relu, streaming
        )


# --- gradients --------------------------------------------------------------------------------------------------------


@inner
def add_four_grad_rows(dy, g, g_step, x, i, i_step, y, o, o_step, c, n, part, hi, s1, s2):
    """Add four rows' dz and dz * (x - mean) of n <= one vector of columns to the sums."""
    h = load(hi, c, WIDTH)
    g, i, o = g + c, i + c, o + c
    p, u = part_of(dy, g, part, n), part_of(x, i, part, n) - h
    q, v = part_of(dy, g + g_step, part, n), part_of(x, i + i_step, part, n) - h
    p = zero_where_not_positive(part_of(y, o, part, n), p)
    q = zero_where_not_positive(part_of(y, o + o_step, part, n), q)
    g, i, o = g + 2 * g_step, i + 2 * i_step, o + 2 * o_step
    r, w = part_of(dy, g, part, n), part_of(x, i, part, n) - h
    s, z = part_of(dy, g + g_step, part, n), part_of(x, i + i_step, part, n) - h
    r = zero_where_not_positive(part_of(y, o, part, n), r)
    s = zero_where_not_positive(part_of(y, o + o_step, part, n), s)
    store(s1, c, load(s1, c, WIDTH) + ((p + q) + (r + s)))
    store(s2, c, load(s2, c, WIDTH) + (fma(p, u, q * v) + fma(r, w, s * z)))


@inner
def add_grad_row(dy, g, x, i, y, o, c, part, hi, s1, s2):
    """The same for one row."""
    dz = zero_where_not_positive(load_first(y, o + c, part, WIDTH), load_first(dy, g + c, part, WIDTH))
    centred = load_first(x, i + c, part, WIDTH) - load(hi, c, WIDTH)
    store(s1, c, load(s1, c, WIDTH) + dz)
    store(s2, c, fma(dz, centred, load(s2, c, WIDTH)))


@inner
def segment_grad_sums(dy, g, g_step, x, i, i_step, y, o, o_step, rows, cells, size, hi, sums, products):
    """sum(dz) and sum(dz * (x - hi)) of each cell of one segment."""
    n, columns = lanes(x, WIDTH), cells * size
    s1, s2, t1, t2 = scratch(x, columns), scratch(x, columns), np.empty(cells), np.empty(cells)
    for j in range(cells):
        sums[j] = products[j] = 0.0
    for first in range(0, rows, CHUNK):
        fill(s1, columns, 0.0)
        fill(s2, columns, 0.0)
        end = min(first + CHUNK, rows)
        fours = end - (end - first) % 4
        for r in range(first, fours, 4):
            for c in range(0, columns, n):
                add_four_grad_rows(
                    dy, g + r * g_step, g_step, x, i + r * i_step, i_step, y, o + r * o_step, o_step,
                    c, n, min(n, columns - c), hi, s1, s2,
                )  # fmt: skip
        for r in range(fours, end):
            for c in range(0, columns, n):
                part = min(n, columns - c)
                add_grad_row(dy, g + r * g_step, x, i + r * i_step, y, o + r * o_step, c, part, hi, s1, s2)
        cell_totals(s1, cells, size, t1)
        cell_totals(s2, cells, size, t2)
        for j in range(cells):
            sums[j] += t1[j]
            products[j] += t2[j]


@kernel
def grad_sums(dy, dys, x, xs, y, ys, shape, fold, tile, mean, rstd, dgamma, dbeta):
    """sum(dz * xhat) and sum(dz) of every kept index; ``tile`` counts cells."""
    channels, size = shape[2], shape[3]
    rows, cells = shape[1] // fold, channels * fold
    height = segment_rows(rows)
    segments = segment_count(rows)
    parts = np.empty((2, shape[0], segments, cells))
    for k in prange(task_count(shape[0], rows, cells, height, tile)):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        first, t, s = b * channels, j % channels, row // height
        hi = as_compute(x, mean, first, channels, t, width, size)
        g_step, i_step, o_step = dys[2] * fold, xs[2] * fold, ys[2] * fold
        segment_grad_sums(
            dy, channel_start(dys, first, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, first, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, first, shape) + row * o_step + j * size, o_step,
            end - row, width, size, hi, parts[0, b, s, j : j + width], parts[1, b, s, j : j + width],
        )  # fmt: skip
    for t in prange(shape[0] * channels):
        b, channel = t // channels, t % channels
        p, q = 0.0, 0.0
        for s in range(segments):
            for j in range(channel, cells, channels):
                p, q = p + parts[0, b, s, j], q + parts[1, b, s, j]
        hi = rounded(x, mean[t])
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        for r in range(rows * fold, shape[1]):
            dz = value(dy, g + r * dys[2])
            if y is not None and value(y, o + r * ys[2]) <= 0.0:
                dz = 0.0
            p, q = p + dz, q + dz * (value(x, i + r * xs[2]) - hi)
        dbeta[t], dgamma[t] = p, (q - (mean[t] - hi) * p) * rstd[t]


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
def put_if_there(y, at, v, streaming):
    if y is not None:
        put(y, at, v, streaming)


@inner
def grad_input_rows(
    dy, g, g_step, x, i, i_step, y, o, o_step, weight, w, w_step, dx, d, d_step, dresidual, e, e_step,
    rows, columns, last, linear, streaming,
):  # fmt: skip
    """As `normalize_rows`; linear is (scale, hi, slope, offset) of every column."""
    n = lanes(dy, WIDTH)
    scale, hi, slope, offset = linear
    for r in range(rows):
        width = last if r == rows - 1 else columns
        whole = width - width % n
        w_ = splat(dy, value(weight, w + r * w_step), WIDTH)
        for c in range(0, whole, n):
            a, h, p, q = load(scale, c, WIDTH), load(hi, c, WIDTH), load(slope, c, WIDTH), load(offset, c, WIDTH)
            dz = zero_where_not_positive(load(y, o + r * o_step + c, WIDTH), load(dy, g + r * g_step + c, WIDTH))
            x_ = load(x, i + r * i_step + c, WIDTH)
            put(dx, d + r * d_step + c, input_gradient(dz, x_, w_, a, h, p, q), streaming)
            put_if_there(dresidual, e + r * e_step + c, dz, streaming)
        if whole < width:
            c, part = whole, width - whole
            a, h, p, q = load(scale, c, WIDTH), load(hi, c, WIDTH), load(slope, c, WIDTH), load(offset, c, WIDTH)
            dz = load_first(dy, g + r * g_step + c, part, WIDTH)
            dz = zero_where_not_positive(load_first(y, o + r * o_step + c, part, WIDTH), dz)
            x_ = load_first(x, i + r * i_step + c, part, WIDTH)
            store_first(dx, d + r * d_step + c, part, input_gradient(dz, x_, w_, a, h, p, q))
            store_first(dresidual, e + r * e_step + c, part, dz)


@kernel
def grad_input(
    dy, dys, x, xs, y, ys, weight, ws, dx, dxs, dresidual, drs, shape, fold, piece, tile,
    mean, scale, offset, slope, streaming,
):  # fmt: skip
    """``dx`` (and ``dresidual = dz``) with given per-channel numbers; tasks are ``piece`` rows of ``tile`` cells."""
    channels, size = shape[2], shape[3]
    rows, cells = -(-shape[1] // fold), channels * fold
    tasks = task_count(shape[0], rows, cells, piece, tile)
    for k in prange(tasks):
        b, row, end, j, width = task_at(k, rows, cells, piece, tile)
        first, t = b * channels, j % channels
        by = as_compute(dy, scale, first, channels, t, width, size)
        hi, by_x, plus = as_affine(dy, mean, slope, offset, first, channels, t, width, size)
        last = last_width(end, j, width, shape, fold)
        g_step, i_step, o_step = dys[2] * fold, xs[2] * fold, ys[2] * fold
        d_step, e_step = dxs[2] * fold, drs[2] * fold
        grad_input_rows(
            dy, channel_start(dys, first, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, first, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, first, shape) + row * o_step + j * size, o_step,
            weight, channel_start(ws, first, shape) + row * ws[2], ws[2],
            dx, channel_start(dxs, first, shape) + row * d_step + j * size, d_step,
            dresidual, channel_start(drs, first, shape) + row * e_step + j * size, e_step,
            end - row, width * size, last * size, (by, hi, by_x, plus), streaming,
        )  # fmt: skip


@kernel
def backward(
    dy, dys, x, xs, y, ys, dx, dxs, dresidual, drs, shape, tile,
    mean, rstd, gamma, count, dmean, dvar, live, streaming, dgamma, dbeta,
):  # fmt: skip
    """Gradient sums and dx, a tile of cells at a time: the second pass finds its rows of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it.
    """
    channels, size, rows = shape[2], shape[3], shape[1]
    height = segment_rows(rows)
    for k in prange(task_count(shape[0], 1, channels, 1, tile)):
        b, _, _, j, width = task_at(k, 1, channels, 1, tile)
        t = b * channels + j
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        d, e = channel_start(dxs, t, shape), channel_start(drs, t, shape)
        hi = as_compute(x, mean, t, channels, 0, width, size)
        s1, s2 = np.empty(width), np.empty(width)
        for c in range(width):
            dgamma[t + c] = dbeta[t + c] = 0.0
        for row in range(0, rows, height):
            segment_grad_sums(
                dy, g + row * dys[2], dys[2], x, i + row * xs[2], xs[2], y, o + row * ys[2], ys[2],
                min(height, rows - row), width, size, hi, s1, s2,
            )  # fmt: skip
            for c in range(width):
                dbeta[t + c] += s1[c]
                dgamma[t + c] += s2[c]
        scale, offset, slope = np.empty(width), np.empty(width), np.empty(width)
        for c in range(width):
            dgamma[t + c] = (dgamma[t + c] - (mean[t + c] - rounded(x, mean[t + c])) * dbeta[t + c]) * rstd[t + c]
            scale[c] = gamma[t + c] * rstd[t + c]
            offset[c] = slope[c] = 0.0
            if live is not None:
                offset[c] = (scale[c] * dbeta[t + c] - dmean[t + c]) / count[t + c]
                slope[c] = (scale[c] * rstd[t + c] * dgamma[t + c] - 2.0 * dvar[t + c]) / count[t + c]
        by = as_compute(x, scale, 0, width, 0, width, size)
        hi, by_x, plus = as_affine(x, mean[t : t + width], slope, offset, 0, width, 0, width, size)
        columns = width * size
        grad_input_rows(
            dy, g, dys[2], live, i, xs[2], y, o, ys[2], None, 0, 0, dx, d, dxs[2], dresidual, e, drs[2],
            rows, columns, columns, (by, hi, by_x, plus), streaming,
        )  # fmt: skip
