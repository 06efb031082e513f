"""Sums with weights, for `outer_reduction`: each cell is one column, and has a sum of weights of its own.

In plain words, for the rows of a chunk, x and w as (rows, cells), where x is left out whose w is 0::

    n = w.sum(0)
    s1, s2 = (w * (x - shift)).sum(0), (w * (x - shift)**2).sum(0)
    mean, m2 = shift + s1 / n, s2 - s1**2 / n          # which are merged with those of the chunks before

The numerics are those without weights; with them, all shifts are looked at cell by cell.

Bytes moved: those of x and of the weights once, from memory; chunks with a poor shift again, from the cache.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.cells import fill
from fastbn.cpu.kernels.common import FULL, marked, merged, needs_new_shift, positive_or_nan, rows_from
from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.pointers import value
from fastbn.cpu.kernels.simd import converted, fma, lanes, load, load_first, splat, store, zero_where_zero

WEIGHTED_CHUNK = 32  # rows: with weights each column has one sum, whose roundings of equal values add up


class WeightedCells(NamedTuple):
    """Pointers to numbers of a tile's cells: origins, sums of weights in a chunk, and a segment's results."""

    origin: Any
    count: Any
    n: Any
    mean: Any
    m2: Any


@inline
def weighted_chunk_sums(x, weight, across, rows, count, cells, columns):
    """Sums of ``w``, ``w * (x - shift)`` and ``w * (x - shift)^2``; weights of a row are ``across`` apart, maybe 0."""
    n = lanes(x.values, FULL)
    fill(columns.s1, count, 0.0)
    fill(columns.s2, count, 0.0)
    fill(cells.count, count, 0.0)
    for r in range(rows):
        w_row = r * weight.step
        for i in range(count):
            cells.count[i] += value(weight.values, w_row + i * across)
        for i in range(0, count, n):
            part = min(n, count - i)
            e = load_first(x.values, r * x.step + i, part, FULL) - load(columns.shift, i, FULL)
            if across == 0:
                w = splat(x.values, value(weight.values, w_row), FULL)
            else:
                w = converted(load_first(weight.values, w_row + i, part, e), e)
            e = zero_where_zero(w, e)
            store(columns.s1, i, load(columns.s1, i, FULL) + w * e)
            store(columns.s2, i, fma(w * e, e, load(columns.s2, i, FULL)))


@inline
def better_weighted_shifts(count, cells, columns, is_first):
    """Shifts that were poor, or any on the first chunk, to the means that were found; whether there were some.

    A chunk has few values per channel: on the first one, half a standard deviation would cost the mean 1e-7.
    """
    poor = False
    for i in range(count):
        n = cells.count[i]
        s1, s2 = np.float64(columns.s1[i]), np.float64(columns.s2[i])
        if n != 0.0 and (is_first or needs_new_shift(n, s1, s2)):
            columns.shift[i] += s1 / n
            poor = True
    return poor


@inline
def merge_weighted_chunk(count, cells, columns):
    """Chan's update of each cell's moments."""
    for i in range(count):
        n = cells.count[i]
        if n != 0.0:
            from_shift = columns.s1[i] / n
            m2 = positive_or_nan(columns.s2[i] - columns.s1[i] * from_shift)
            mean = (columns.shift[i] - cells.origin[i]) + from_shift
            cells.n[i], cells.mean[i], cells.m2[i] = merged(cells.n[i], cells.mean[i], cells.m2[i], n, mean, m2)
            columns.shift[i] = cells.origin[i] + cells.mean[i]


@inline
def weighted_segment(x, weight, across, rows, count, cells, columns):
    """As `segment`, of cells of one column each, with the sum of weights."""
    lower_underflow_flag()
    fill(columns.shift, count, 0.0)
    for i in range(count):
        columns.shift[i] = cells.origin[i]
        cells.n[i] = cells.mean[i] = cells.m2[i] = 0.0
    first = 0
    again = False
    while first < rows:
        high = min(WEIGHTED_CHUNK, rows - first)
        weighted_chunk_sums(rows_from(x, first, 0), rows_from(weight, first, 0), across, high, count, cells, columns)
        again = not again and better_weighted_shifts(count, cells, columns, first == 0)
        if not again:
            merge_weighted_chunk(count, cells, columns)
            first += high
    if underflowed(cells.m2[0]):
        for i in range(count):
            cells.m2[i] = marked(x.values, cells.m2[i])
