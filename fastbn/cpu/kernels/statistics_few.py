"""Statistics of few rows of kept indices, such as the five rows of an array of (5, 1 000 000): see `statistics`.

Eight columns at a time go through all rows twice, and the second time their values are in the first-level cache: for
the mean, which is the shift of the sums of squares, and for these. Nothing is kept in memory between.
"""

from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import LANES, choose, everywhere, finite, first_there, greater, lane, only_if, shortened
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import zero_where_not_positive
from fastbn.cpu.kernels.statistics import (
    Options,
    Results,
    Source,
    add,
    eight,
    kept_place,
    one_by_one,
    row_counts,
    rows_from,
    tallied,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import Cells, checks, finish
from fastbn.cpu.statistics import CAREFUL, OF_VALUES


@inline
def sums(x, source, at, step, w_at, some, q, squares, exact, o):
    """Of eight columns from a place on: their counts, and the sums around q that `add` makes."""
    zero, geometry = everywhere(0.0), source.geometry
    n, a, b, of_rows, r = zero, zero, zero, 0.0, 0
    while r < geometry.rows:
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, geometry.rows, source)
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for _ in range(rows):
            if row_counts(source.where, w_row, geometry):
                weight = weight_of_row(source.where, w_row, weight_by_row(o))
                e = eight(x, source, x_row, step, w_row, everywhere(weight), q, some, o)
                a, b = add(a, b, e, q, squares, exact)
                n, of_rows = tallied(n, e, o), of_rows + weight
            x_row += x_step
            w_row += w_step
    return count_of(n, of_rows, one_by_one(o)), a, b


@inline
def count_of(of_values, of_rows, counts):
    """Each column's own, or the same of all."""
    if counts is None:
        return everywhere(of_rows)
    return of_values


@inline
def finish_columns(x, source, at, step, w_at, some, squares, o, results, to):
    """Results of eight columns, or the first ``some``."""
    zero, checked = everywhere(0.0), first_there(o.exact, o.weighted)
    n, hi, lo = sums(x, source, at, step, w_at, some, zero, None, checked, o)
    each = everywhere(1.0) / n
    if squares is not None:
        mu = (hi + lo) * each
        q = choose(finite(mu), shortened(mu, o.exact), zero)
        lower_underflow_flag()
        _, a, b = sums(x, source, at, step, w_at, some, q, squares, o.exact, o)
        m2 = b - a * (a * choose(greater(n, zero), each, zero))
        if checks(squares, o.exact, o.weighted) and underflowed(lane(b, 0)):
            results.status[CAREFUL] = 1.0
        m2 = zero_where_not_positive(m2, m2)
        finish(n, each, q, a, zero, m2, squares, checked, results, to)
    if squares is None:
        finish(n, each, zero, hi, lo, zero, squares, checked, results, to)


@kernel
def few(
    thread, first, last, x, strided, where, masked, weighted, skip_nan, squares, exact, geometry, dimensions, count,
    mean, spread, ddof, status, formats,
):  # fmt: skip
    """A task is a tile of columns."""
    o, source = Options(squares, exact, masked, weighted, skip_nan), Source(x, None, 0, where, geometry, dimensions)
    results = Results(count, mean, spread, ddof, status, formats)
    channels, tile, step = geometry.channels, geometry.tile, only_if(strided, geometry.step)
    tiles = -(-channels // tile)
    for task in range(first, last):
        k = task // tiles
        cell = (task - k * tiles) * tile
        end = min(cell + tile, channels)
        at, w_at, o_at = kept_place(k, geometry, dimensions)
        by = 1 if geometry.mask == OF_VALUES else 0
        for c in range(cell, end, LANES):
            x_at, w_c = at + c * geometry.step, w_at + c * by
            to = Cells(o_at + c * geometry.kept_step, geometry.kept_step, min(LANES, end - c))
            if to.count == LANES:
                finish_columns(x, source, x_at, step, w_c, None, squares, o, results, to)
            else:
                finish_columns(x, source, x_at, step, w_c, to.count, squares, o, results, to)
