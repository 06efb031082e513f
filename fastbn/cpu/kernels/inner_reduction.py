"""Kernels for channels-first memory: the innermost reduced axis is contiguous.

An array is flat memory plus the element strides ``(start, batch, outer, channel)``; a channel's slab is ``outer`` rows
of ``inner`` contiguous values. A slab is cut into chunks of about 1024 values and 64 chunks make a segment, by shape
alone; a segment is what threads share, and merges run in the order of chunks and segments. So the bits do not depend
on threads, and the fused kernels (`forward`, `backward`) give the same ones as the separate kernels.

Statistics, per chunk, around a shift q of its mean (the rounded mean of the chunks before it):
    s1 = sum(x - q), s2 = sum((x - q)^2);  mean = q + s1/n, M2 = s2 - s1^2/n.
This is the corrected two-pass algorithm (Chan, Golub & LeVeque 1983, eq. 1.7) with the first pass guessed: any q near
the mean serves, and where q turns out more than 0.7 standard deviations away the chunk, still in L1, is summed again
around its mean. Chunks are merged by Chan's update in float64, relative to the channel's first selected finite value.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S; forward 2S and backward 3S where
a slab stays in cache between the two passes over it.

The geometry's four integers of this family are ``(rows, columns, run, pitch)``: those of a chunk, how many values lie
side by side in all arrays, and how far apart the tables of channels in ``workspace`` are.
"""

import numpy as np

from fastbn.cpu.kernels.common import (
    FULL,
    affine_vectors,
    channel_start,
    finished,
    four,
    marked,
    merged,
    needs_new_shift,
    normalized,
    origin_of,
    positive_or_nan,
    put,
    write_affine,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import (
    address,
    blended,
    converted,
    first_lanes,
    fma,
    lanes,
    load,
    load_first,
    narrowed,
    prefetch,
    rounded,
    splat,
    store,
    store_nontemporal,
    total,
    zero_where_zero,
)
from fastbn.cpu.sizes import AFFINE, PIECE, SEGMENT

WIDE = 128  # bytes of a vector where weights cost precision: fewer additions a lane
NARROW, SINGLE = 32, 4  # bytes at the ends of rows, where masked stores would be slow on AMD processors
AHEAD = 256  # values: asking for what comes a kilobyte later makes elementwise passes 5 % faster


# Divisions take as long as 20 values: of a small array most of the time, if they were not avoided for its one chunk.


@inline
def chunk_count(shape, grid):
    if 0 < shape[1] <= grid[0] and 0 < shape[3] <= grid[1]:
        return 1
    return -(-shape[1] // grid[0]) * -(-shape[3] // grid[1])


@inline
def chunk_at(k, shape, grid):
    """First row, rows, first column, columns of chunk k."""
    if k == 0:
        return 0, min(grid[0], shape[1]), 0, min(grid[1], shape[3])
    pieces = -(-shape[3] // grid[1])
    row = k // pieces * grid[0]
    column = k % pieces * grid[1]
    return row, min(grid[0], shape[1] - row), column, min(grid[1], shape[3] - column)


@inline
def piece_start(p, inner):
    """The position of piece p among the values in the order of memory."""
    pieces = -(-inner // PIECE)
    return p // pieces * inner + p % pieces * PIECE


@inline
def place_of(position, shape):
    """Batch, outer, channel and column of a position among the values in the order of memory."""
    row = position // shape[3]
    return row // (shape[2] * shape[1]), row // shape[2] % shape[1], row % shape[2], position % shape[3]


@inline
def start_of(strides, place):
    """Where a place is."""
    return strides[0] + place[0] * strides[1] + place[1] * strides[2] + place[2] * strides[3] + place[3]


@inline
def kept_range(start, end, shape):
    """The kept indices, first and last + 1, that values between two positions may belong to."""
    rows = shape[1] * shape[2] if shape[1] > 1 else 1
    kept = shape[2] if shape[1] > 1 else 1
    size = rows * shape[3]
    return start // size * kept, -(-end // size) * kept


@inline
def row_after(at, outer, channel, shape):
    """Index in a table of channels, outer and channel of the row that follows in memory; a division would be slow."""
    if channel + 1 < shape[2]:
        return at + 1, outer, channel + 1
    if outer + 1 < shape[1]:
        return at + 1 - shape[2], outer + 1, 0
    return at + 1, 0, 0


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def chunk_sums(x, x_at, x_step, weight, w_at, w_step, rows, columns, shift):
    """n, sum(w * (x - shift)), sum(w * (x - shift)^2).

    Two rows at a time: two streams from memory are read half as fast again as one (30 GB/s against 20).
    """
    if weight is None:
        n = lanes(x, FULL)
        q = splat(x, shift, FULL)
        s1 = splat(x, 0.0, FULL)
        s2 = splat(x, 0.0, FULL)
        t1, t2 = s1, s2
        pairs, whole = rows - rows % 2, columns - columns % n
        for r in range(0, pairs, 2):
            row = x_at + r * x_step
            for i in range(row, row + whole, n):
                e = load(x, i, FULL) - q
                s1 = s1 + e
                s2 = fma(e, e, s2)
                e = load(x, i + x_step, FULL) - q
                t1 = t1 + e
                t2 = fma(e, e, t2)
        for r in range(pairs if whole == columns else 0, rows):
            for c in range(whole if r < pairs else 0, columns, n):
                e = first_lanes(load_first(x, x_at + r * x_step + c, columns - c, FULL) - q, columns - c)
                s1 = s1 + e
                s2 = fma(e, e, s2)
        return np.float64(rows * columns), total(s1 + t1), total(s2 + t2)
    else:
        n = lanes(x, WIDE)
        q = splat(x, shift, WIDE)
        s1 = splat(x, 0.0, WIDE)
        s2 = splat(x, 0.0, WIDE)
        count = load_first(weight, w_at, 0, s1)
        for r in range(rows):
            for i in range(0, columns, n):
                stored = load_first(weight, w_at + r * w_step + i, min(n, columns - i), s1)
                count = count + stored
                w = converted(stored, s1)
                e = load_first(x, x_at + r * x_step + i, min(n, columns - i), WIDE) - q
                e = zero_where_zero(w, e)
                s1 = s1 + w * e
                s2 = fma(w * e, e, s2)
        return total(count), total(s1), total(s2)


@inline
def segment_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, segment, origin):
    """n, mean - origin and M2 of one segment."""
    n, mean, m2 = 0.0, 0.0, 0.0
    shift = origin
    lower_underflow_flag()
    for k in range(segment * SEGMENT, min((segment + 1) * SEGMENT, chunk_count(shape, grid))):
        row, rows, column, columns = chunk_at(k, shape, grid)
        x_chunk = x_at + row * x_step + column
        w_chunk = w_at + row * w_step + column
        count, s1, s2 = chunk_sums(x, x_chunk, x_step, weight, w_chunk, w_step, rows, columns, shift)
        if needs_new_shift(count, s1, s2):
            shift = rounded(x, shift + s1 / count)
            count, s1, s2 = chunk_sums(x, x_chunk, x_step, weight, w_chunk, w_step, rows, columns, shift)
        if count != 0.0:
            from_shift = s1 / count
            n, mean, m2 = merged(n, mean, m2, count, shift - origin + from_shift, positive_or_nan(s2 - s1 * from_shift))
            shift = rounded(x, origin + mean)
    return n, mean, marked(x, m2) if underflowed(m2) else m2


@inline
def slab_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, origin):
    n, mean, m2 = 0.0, 0.0, 0.0
    for s in range(-(-chunk_count(shape, grid) // SEGMENT)):
        part = segment_moments(x, x_at, x_step, weight, w_at, w_step, shape, grid, s, origin)
        n, mean, m2 = merged(n, mean, m2, part[0], part[1], part[2])
    return finished(x, x_at, x_step, weight, w_at, w_step, shape, n, mean, m2, origin)


@kernel
def moments_of_segments(thread, first, last, x, weight, geometry, origins, partials):
    """n, mean - origin and M2 of every segment of every kept index."""
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    for k in range(first, last):
        t = k // segments
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        origin = origin_of(x, x_at, weight, origins, t)
        part = segment_moments(x, x_at, xs[2], weight, w_at, ws[2], shape, grid, k % segments, origin)
        partials[3 * k], partials[3 * k + 1], partials[3 * k + 2] = part


@kernel
def channel_moments(thread, first, last, x, weight, geometry, origins, partials, table, eps):
    """Moments of every kept index from those of its segments, into the table of `write_moments`."""
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        n, mean, m2 = 0.0, 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            n, mean, m2 = merged(n, mean, m2, partials[3 * k], partials[3 * k + 1], partials[3 * k + 2])
        origin = origin_of(x, x_at, weight, origins, t)
        n, mean, m2, unit = finished(x, x_at, xs[2], weight, w_at, ws[2], shape, n, mean, m2, origin)
        write_moments(table, t, kept, n, mean, m2, unit, eps)


# --- normalize --------------------------------------------------------------------------------------------------------


@inline
def misaligned(y, at, limit):
    """How many values lie before the next 64-byte line of ``y``."""
    size = address(y, 1) - address(y, 0)
    return min(-address(y, at) % 64 // size, limit)


@inline
def normalize_end(x, i, y, j, residual, k, n, affine, relu):
    """The n values, less than a vector, at either end of a row: by short vectors, then one by one."""
    hi, scale, bias = affine
    done = 0
    while done + lanes(x, NARROW) <= n:
        z = load(residual, k + done, NARROW)
        out = normalized(
            load(x, i + done, NARROW), z, narrowed(x, hi, NARROW),
            narrowed(x, scale, NARROW), narrowed(x, bias, NARROW), relu,
        )  # fmt: skip
        store(y, j + done, out)
        done += lanes(x, NARROW)
    while done < n:
        z = load(residual, k + done, SINGLE)
        out = normalized(
            load(x, i + done, SINGLE), z, narrowed(x, hi, SINGLE),
            narrowed(x, scale, SINGLE), narrowed(x, bias, SINGLE), relu,
        )  # fmt: skip
        store(y, j + done, out)
        done += 1


@inline
def normalize_run(x, i, y, j, residual, k, place, count, shape, workspace, at, pitch, relu, nontemporal):
    """``count`` values that lie side by side in each array, from a place on, with hi, scale and bias of `affine_of`.

    At ``at`` is the first channel. A vector may go on from one channel to the next: whole lines
    in the order of memory are what nontemporal stores need, and so rows of 49 values are as fast as a copy.
    """
    n, inner = lanes(x, FULL), shape[3]
    _, outer, channel, column = place
    lead = misaligned(y, j, count) if nontemporal else 0
    done, edge = 0, min(inner - column, count)
    while done < count:
        hi, scale = splat(x, workspace[at], FULL), splat(x, workspace[at + pitch], FULL)
        bias = splat(x, workspace[at + 2 * pitch], FULL)
        at, outer, channel = row_after(at, outer, channel, shape)
        if done < lead:
            part = min(lead, edge) - done
            normalize_end(x, i + done, y, j + done, residual, k + done, part, (hi, scale, bias), relu)
            done += part
        if done >= lead:
            if nontemporal:
                while done + n <= edge:
                    prefetch(x, i + done + AHEAD)
                    prefetch(residual, k + done + AHEAD)
                    z = load(residual, k + done, FULL)
                    store_nontemporal(y, j + done, normalized(load(x, i + done, FULL), z, hi, scale, bias, relu))
                    done += n
            else:
                while done + n <= edge:
                    z = load(residual, k + done, FULL)
                    store(y, j + done, normalized(load(x, i + done, FULL), z, hi, scale, bias, relu))
                    done += n
            if done < edge and (inner < n or done + n > count):
                normalize_end(x, i + done, y, j + done, residual, k + done, edge - done, (hi, scale, bias), relu)
                done = edge
            elif done < edge:
                hi = blended(edge - done, hi, splat(x, workspace[at], FULL))
                scale = blended(edge - done, scale, splat(x, workspace[at + pitch], FULL))
                bias = blended(edge - done, bias, splat(x, workspace[at + 2 * pitch], FULL))
                z = load(residual, k + done, FULL)
                put(y, j + done, normalized(load(x, i + done, FULL), z, hi, scale, bias, relu), nontemporal)
                done += n
        edge = min(edge + inner, count)


@kernel
def normalize(thread, first, last, x, y, residual, geometry, coefficients, eps, workspace, relu, nontemporal):
    """All values in the order of memory; see `affine_of` for the coefficients and eps."""
    shape, xs, ys, rs = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    _, _, run, pitch = four(geometry, 4)
    start, end = piece_start(first, shape[3]), piece_start(last, shape[3])
    own = AFFINE * thread * pitch
    t, t_end = kept_range(start, end, shape)
    affine_vectors(coefficients, t, t_end - t, shape[0] * shape[2], eps, workspace, own, pitch)
    while start < end:
        place = place_of(start, shape)
        count = min(end, (start // run + 1) * run) - start
        normalize_run(
            x, start_of(xs, place), y, start_of(ys, place), residual, start_of(rs, place), place, count, shape,
            workspace, own + place[0] * shape[2] + place[2] - t, pitch, relu, nontemporal,
        )  # fmt: skip
        start += count


@kernel
def forward(thread, first, last, x, weight, y, residual, geometry, origins, table, eps, workspace, relu, nontemporal):
    """Moments and normalise, a channel at a time: the second pass finds the slab in cache.

    The table is that of `write_moments`.
    """
    shape, grid, xs, ws = four(geometry, 0), four(geometry, 4), four(geometry, 8), four(geometry, 12)
    ys, rs = four(geometry, 16), four(geometry, 20)
    kept, pitch = shape[0] * shape[2], geometry[7]
    own = AFFINE * thread * pitch
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        origin = origin_of(x, x_at, weight, origins, t)
        n, mean, m2, unit = slab_moments(x, x_at, xs[2], weight, w_at, ws[2], shape, grid, origin)
        write_moments(table, t, kept, n, mean, m2, unit, eps)
        write_affine(x, table, 2 * kept + t, kept, workspace, own, pitch)
        y_at, r_at = channel_start(ys, t, shape), channel_start(rs, t, shape)
        for r in range(shape[1]):
            i, j, k = x_at + r * xs[2], y_at + r * ys[2], r_at + r * rs[2]
            normalize_run(
                x, i, y, j, residual, k, (0, r, t, 0), shape[3], shape, workspace, own, pitch, relu, nontemporal
            )  # fmt: skip
