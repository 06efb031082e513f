"""Kernels that reduce along memory: the innermost reduced axis is contiguous, as channels-first.

For each channel, and each batch index if the batch is kept:

    x = x.reshape(outer, inner)                        # the channel's slab: rows of contiguous values
    n = w.sum()                                        # w: weights, or ones
    mean = (w * x).sum() / n
    m2 = (w * (x - mean)**2).sum()
    rstd = 1 / np.sqrt(m2 / n + eps)
    y = (x - mean) * (rstd * gamma) + beta + residual
    y = np.maximum(y, 0)                               # if relu

A slab is cut into chunks of about 1024 values and 64 chunks make a segment, by shape alone; a segment is what threads
share, and merges run in the order of chunks and segments. So the bits do not depend on threads, and the fused kernel
(`forward`) gives the same ones as the separate kernels.

Statistics, per chunk, around a shift q near its mean (the rounded mean of the chunks before it):
    s1 = sum(x - q), s2 = sum((x - q)^2);  mean = q + s1/n, M2 = s2 - s1^2/n.
This is the corrected two-pass algorithm (Chan, Golub & LeVeque 1983, eq. 1.7) with the first pass guessed: any q near
the mean serves, and where q turns out more than 0.7 standard deviations away the chunk, still in L1, is summed again
around its mean. Chunks are merged by Chan's update in float64, relative to the channel's origin: its first selected
finite value.

Bytes moved, S = the bytes of x: moments S, normalize 2S; forward 2S where a slab stays in cache between the two passes
over it.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.common import (
    FULL,
    NARROW,
    SINGLE,
    affine_of,
    finished,
    marked,
    merged,
    needs_new_shift,
    normalized,
    origin_of,
    positive_or_nan,
    put,
    rows_from,
    rows_of,
    start_of_row,
    write_affine,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.inner_places import (
    Place,
    chunk_at,
    chunk_count,
    kept_at,
    kept_range,
    piece_start,
    place_behind,
    place_of,
    row_after,
    row_in_turn,
    segment_count,
    values_from,
    values_in_run,
)
from fastbn.cpu.kernels.pointers import address, advance, present, table_rows
from fastbn.cpu.kernels.simd import (
    blended,
    converted,
    exactly_summed,
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
from fastbn.cpu.records import Affine, MomentRows, Parameters, Part, Walk
from fastbn.cpu.sizes import AFFINE, PAD, SEGMENT

WIDE = 128  # bytes of a vector where weights cost precision: fewer additions a lane
ONE_ROW = Walk(0, 0, 0, 0, 0, 0, 0, 0)  # after which none follows
# Values that are prefetched, as processors do it within 4 kB alone: elementwise passes are 1.1 times as fast, sums of
# rows of 12 kB and more 1.2 times.
AHEAD = 2048


# --- statistics -------------------------------------------------------------------------------------------------------


class Some(NamedTuple):
    """Moments of some values, the mean relative to an origin, and the shift for those that follow."""

    n: Any
    mean: Any
    m2: Any
    shift: Any


@inline
def ahead_of(chunk, x, shape):
    """From a value of a chunk to one that is summed later, in the same pair of rows or the next; 0 if there is none."""
    ahead = min(AHEAD, shape.inner)
    if chunk.column + ahead < shape.inner:
        return ahead
    return ahead - shape.inner + x.twice if chunk.row + 2 < shape.outer else 0


@inline
def unweighted_sums(x, rows, columns, shift, ahead):
    """n, sum(x - shift), sum((x - shift)^2); what follows ``ahead`` is prefetched.

    Two rows at a time: two streams from memory are read half as fast again as one (30 GB/s against 20).
    """
    n = lanes(x.values, FULL)
    q = splat(x.values, shift, FULL)
    s1 = splat(x.values, 0.0, FULL)
    s2 = splat(x.values, 0.0, FULL)
    t1, t2 = s1, s2
    pairs, whole = rows - rows % 2, columns - columns % n
    for r in range(0, pairs, 2):
        row = start_of_row(x, r)
        for i in range(row, row + whole, n):
            prefetch(x.values, i + ahead)
            prefetch(x.values, i + x.step + ahead)
            e = load(x.values, i, FULL) - q
            s1 = s1 + e
            s2 = fma(e, e, s2)
            e = load(x.values, i + x.step, FULL) - q
            t1 = t1 + e
            t2 = fma(e, e, t2)
    for r in range(pairs if whole == columns else 0, rows):
        for c in range(whole if r < pairs else 0, columns, n):
            e = first_lanes(load_first(x.values, start_of_row(x, r) + c, columns - c, FULL) - q, columns - c)
            s1 = s1 + e
            s2 = fma(e, e, s2)
    return np.float64(rows * columns), total(s1 + t1), total(s2 + t2)


@inline
def weighted_sums(x, weight, rows, columns, shift):
    """n, sum(w * (x - shift)), sum(w * (x - shift)^2), n the sum of weights."""
    n = lanes(x.values, WIDE)
    q = splat(x.values, shift, WIDE)
    s1 = splat(x.values, 0.0, WIDE)
    s2 = splat(x.values, 0.0, WIDE)
    count = exactly_summed(weight.values, load_first(weight.values, 0, 0, s1))
    for r in range(rows):
        for i in range(0, columns, n):
            stored = load_first(weight.values, start_of_row(weight, r) + i, min(n, columns - i), s1)
            count = count + exactly_summed(weight.values, stored)
            w = converted(stored, s1)
            e = load_first(x.values, start_of_row(x, r) + i, min(n, columns - i), WIDE) - q
            e = zero_where_zero(w, e)
            s1 = s1 + w * e
            s2 = fma(w * e, e, s2)
    return total(count), total(s1), total(s2)


@inline
def chunk_sums(x, weight, chunk, shift, shape):
    """Of one chunk of a slab."""
    part = rows_from(x, chunk.row, chunk.column)
    if weight is None:
        return unweighted_sums(part, chunk.rows, chunk.columns, shift, ahead_of(chunk, x, shape))
    return weighted_sums(part, rows_from(weight, chunk.row, chunk.column), chunk.rows, chunk.columns, shift)


@inline
def segment_moments(x, weight, shape, largest, segment, origin):
    """n, mean - origin and M2 of one segment."""
    lower_underflow_flag()
    end = min((segment + 1) * SEGMENT, chunk_count(shape, largest))
    some = merge_chunks(x, weight, shape, largest, segment * SEGMENT, end, origin, Some(0.0, 0.0, 0.0, origin))
    return some.n, some.mean, marked(x.values, some.m2) if underflowed(some.m2) else some.m2


@inline
def merge_chunks(x, weight, shape, largest, first, end, origin, some):
    """The moments of some values, and of some chunks as well."""
    n, mean, m2, shift = some.n, some.mean, some.m2, some.shift
    for k in range(first, end):
        chunk = chunk_at(k, shape, largest)
        count, s1, s2 = chunk_sums(x, weight, chunk, shift, shape)
        if needs_new_shift(count, s1, s2):
            shift = rounded(x.values, shift + s1 / count)
            count, s1, s2 = chunk_sums(x, weight, chunk, shift, shape)
        if count != 0.0:
            from_shift = s1 / count
            n, mean, m2 = merged(n, mean, m2, count, shift - origin + from_shift, positive_or_nan(s2 - s1 * from_shift))
            shift = rounded(x.values, origin + mean)
    return Some(n, mean, m2, shift)


@inline
def slab_moments(x, weight, shape, largest, origin):
    """As `finished` gives them."""
    n, mean, m2 = 0.0, 0.0, 0.0
    for s in range(segment_count(shape, largest)):
        count, other_mean, other_m2 = segment_moments(x, weight, shape, largest, s, origin)
        n, mean, m2 = merged(n, mean, m2, count, other_mean, other_m2)
    return finished(x, weight, shape, n, mean, m2, origin)


@kernel
def moments_of_segments(thread, first, last, x, weight, shape, chunks, origins, partials):
    """Sum of weights, mean - origin and M2 of every segment of every kept index: a table of `Part`."""
    segments = segment_count(shape, chunks)
    parts = table_rows(Part, partials, shape.batch * shape.channel * segments)
    for k in range(first, last):
        t = k // segments
        rows, weights = rows_of(x, t, shape), present(rows_of(weight, t, shape))
        origin = origin_of(rows, weights, origins, t)
        n, mean, m2 = segment_moments(rows, weights, shape, chunks, k % segments, origin)
        parts.count[k], parts.mean[k], parts.m2[k] = n, mean, m2


@kernel
def channel_moments(thread, first, last, x, weight, shape, chunks, origins, partials, table, eps):
    """Moments of every kept index from those of its segments."""
    segments, kept = segment_count(shape, chunks), shape.batch * shape.channel
    parts, moments = table_rows(Part, partials, kept * segments), table_rows(MomentRows, table, kept)
    for t in range(first, last):
        n, mean, m2 = 0.0, 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            n, mean, m2 = merged(n, mean, m2, parts.count[k], parts.mean[k], parts.m2[k])
        rows, weights = rows_of(x, t, shape), present(rows_of(weight, t, shape))
        n, mean, m2, unit = finished(rows, weights, shape, n, mean, m2, origin_of(rows, weights, origins, t))
        write_moments(moments, t, n, mean, m2, unit, eps)


# --- y ----------------------------------------------------------------------------------------------------------------


class Gaps(NamedTuple):
    """Values between the rows of arrays that are read, where rows of those that are written have none."""

    x: Any
    residual: Any


@inline
def misaligned(y, limit):
    """How many values lie before the next 64-byte line of ``y``."""
    size = address(y, 1) - address(y, 0)
    return min(-address(y, 0) % 64 // size, limit)


@inline
def write_one_affine(affine, one):
    """Into a table's first place."""
    affine.hi[0], affine.scale[0], affine.bias[0] = one.hi, one.scale, one.bias


@inline
def affine_in_all_lanes(x, table, t):
    """None without a table."""
    if table is None:
        return None
    return Affine(splat(x, table.hi[t], FULL), splat(x, table.scale[t], FULL), splat(x, table.bias[t], FULL))


@inline
def narrowed_affine(x, affine, width):
    if affine is None:
        return None
    return Affine(narrowed(x, affine.hi, width), narrowed(x, affine.scale, width), narrowed(x, affine.bias, width))


@inline
def blended_affine(n, a, b):
    if a is None:
        return None
    return Affine(blended(n, a.hi, b.hi), blended(n, a.scale, b.scale), blended(n, a.bias, b.bias))


@inline
def normalize_end(x, y, residual, start, end, affine, relu):
    """Less than a vector of values, at either end of a row: by short vectors, then one by one."""
    narrow, single = narrowed_affine(x, affine, NARROW), narrowed_affine(x, affine, SINGLE)
    i = start
    while i + lanes(x, NARROW) <= end:
        store(y, i, normalized(load(x, i, NARROW), load(residual, i, NARROW), narrow, relu))
        i += lanes(x, NARROW)
    while i < end:
        store(y, i, normalized(load(x, i, SINGLE), load(residual, i, SINGLE), single, relu))
        i += 1


@inline
def normalize_vectors(x, y, residual, start, end, affine, relu, nontemporal):
    """The whole vectors from start on, in one row; where they end."""
    n, i = lanes(x, FULL), start
    if nontemporal:
        while i + n <= end:
            prefetch(x, i + AHEAD)
            prefetch(residual, i + AHEAD)
            store_nontemporal(y, i, normalized(load(x, i, FULL), load(residual, i, FULL), affine, relu))
            i += n
    else:
        while i + n <= end:
            store(y, i, normalized(load(x, i, FULL), load(residual, i, FULL), affine, relu))
            i += n
    return i


@inline
def gap_of(array, shape, walk):
    """Values between two rows of a run."""
    return (array.channel - shape.inner) * walk.gapped


@inline
def load_across(array, i, n, gap):
    """A vector of n values of one row and the first ones of the next; both rows are longer than a vector."""
    return blended(n, load(array, i, FULL), load(array, i + gap, FULL))


@inline
def normalize_run(x, y, residual, gaps, table, t, place, count, shape, walk, relu, nontemporal):
    """``count`` values that lie side by side in y, from a place on; t is its row's index in the table.

    A vector may go on from one row to the next: whole lines in the order of memory are what nontemporal stores need,
    and so rows of 49 values are as fast as a copy.
    """
    n = lanes(x, FULL)
    outer, channel = place.outer, place.channel
    lead = misaligned(y, count) if nontemporal else 0
    i, edge = 0, min(shape.inner - place.column, count)
    while i < count:
        affine = affine_in_all_lanes(x, table, t)
        t, outer, channel = row_after(t, outer, channel, shape, walk)
        if i < lead:
            normalize_end(x, y, residual, i, min(lead, edge), affine, relu)
            i = min(lead, edge)
        if i >= lead:
            i = normalize_vectors(x, y, residual, i, edge, affine, relu, nontemporal)
            if i < edge and (shape.inner < n or i + n > count):
                normalize_end(x, y, residual, i, edge, affine, relu)
                i = edge
            elif i < edge:
                both = blended_affine(edge - i, affine, affine_in_all_lanes(x, table, t))
                added = load_across(residual, i, edge - i, gaps.residual)
                put(y, i, normalized(load_across(x, i, edge - i, gaps.x), added, both, relu), nontemporal)
                i += n
        x = advance(x, gaps.x)
        residual = advance(residual, gaps.residual)
        edge = min(edge + shape.inner, count)


@kernel
def normalize(
    thread, first, last, x, y, residual, shape, walk, table, eps, given_rstd, workspace, relu, nontemporal
):  # fmt: skip
    """All values in the order of memory. Where rows of one channel follow each other, outer and channel are exchanged.

    The table is of `Parameters`; in the workspace, a thread's part has an `Affine` of the channels that it meets.
    """
    start, end = piece_start(first, shape.inner), piece_start(last, shape.inner)
    affine = table_rows(Affine, advance(workspace, AFFINE * thread * walk.pitch), walk.pitch)
    t, t_end = kept_range(start, end, walk)
    write_affine(affine, table_rows(Parameters, table, shape.batch * walk.batch), t, t_end - t, eps, given_rstd)
    place, gaps = place_of(start, shape), Gaps(gap_of(x, shape, walk), gap_of(residual, shape, walk))
    while start < end:
        count = values_in_run(start, end, place, shape, walk)
        normalize_run(
            values_from(x, place), values_from(y, place), values_from(residual, place), gaps, affine,
            kept_at(place, walk) - t, place, count, shape, walk, relu, nontemporal,
        )  # fmt: skip
        start += count
        place = place_behind(start, place, shape, walk)


@kernel
def forward(
    thread, first, last, x, weight, y, residual, shape, chunks, origins, table, eps, workspace, relu, nontemporal
):  # fmt: skip
    """Moments and y, a channel at a time: the second pass finds the slab in cache. The table is of `MomentRows`."""
    moments = table_rows(MomentRows, table, shape.batch * shape.channel)
    affine = table_rows(Affine, advance(workspace, AFFINE * thread * PAD), PAD)
    for t in range(first, last):
        rows, weights = rows_of(x, t, shape), present(rows_of(weight, t, shape))
        origin = origin_of(rows, weights, origins, t)
        n, mean, m2, unit = slab_moments(rows, weights, shape, chunks, origin)
        write_moments(moments, t, n, mean, m2, unit, eps)
        one = affine_of(x.values, moments.mean[t], moments.rstd[t], moments.gamma[t], moments.beta[t])
        write_one_affine(affine, one)
        of_y, of_residual = rows_of(y, t, shape), rows_of(residual, t, shape)
        for k in range(shape.outer):
            r = row_in_turn(k, shape)
            normalize_run(
                advance(rows.values, start_of_row(rows, r)), advance(of_y.values, start_of_row(of_y, r)),
                advance(of_residual.values, start_of_row(of_residual, r)), Gaps(0, 0), affine, 0, Place(0, r, t, 0),
                shape.inner, shape, ONE_ROW, relu, nontemporal,
            )  # fmt: skip
