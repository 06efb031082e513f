"""Statistics of few values of each kept index, such as (5, 1 000 000) has on axis 0: see `statistics`.

In plain words, for the values x of each kept index that count, and their weights w or ones::

    n, s = w.sum(), (w * x).sum()                      # the first time
    q = s / n                                          # in float32, but for dtypes of 8 bytes
    a, b = (w * (x - q)).sum(), (w * (x - q)**2).sum() # the second time, if squares are wanted
    mean, m2 = q + a / n, b - a**2 / n

Eight kept indices at a time go through their values twice, and the second time these are in the first-level cache: for
the mean, which is the shift of the sums of squares, and for these. Nothing is kept in memory between. Where kept
indices are neighbours, a lane is one of them; where their own values are, as in (1 000 000, 50) on axis 1, eight values
of one are read at once, and the lanes of eight such sums are added up in the end.
"""

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    both,
    choose,
    everywhere,
    finite,
    first_there,
    greater,
    lane,
    last_lanes,
    only_if,
    row_sums,
    shortened,
    unless,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import prefetch, zero_where_not_positive
from fastbn.cpu.kernels.simd import store as put
from fastbn.cpu.kernels.statistics import (
    Eight,
    Values,
    add,
    eight,
    kept_place,
    one_by_one,
    row_counts,
    rows_from,
    tallied,
    totals,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import Targets, checks, finish
from fastbn.cpu.sizes import AHEAD_BYTES
from fastbn.operands import CAREFUL

COUNTS, RESTS, SHIFTS = (k * LANES * LANES for k in (1, 2, 3))  # behind the sums, in the table of `sums_of_rows`
NUMBERS = SHIFTS + LANES


@inline
def sums_of_columns(x, source, at, step, w_at, w_across, some, q, squares, exact, o):
    """Of eight columns from a place on: their counts, and the sums around q that `add` makes."""
    zero, geometry = everywhere(0.0), source.geometry
    n, a, b, of_rows, r, line = zero, zero, zero, 0.0, 0, 64 // geometry.itemsize
    ahead = at + AHEAD_BYTES // geometry.itemsize
    while r < geometry.rows:
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, geometry.rows, source)
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for _ in range(rows):
            if row_counts(source.where, w_row, geometry):
                weight = weight_of_row(source.where, w_row, weight_by_row(o))
                if step is not None and squares is None and geometry.rows >= LANES:
                    prefetch(x, ahead)
                    ahead += line
                e = eight(x, source, x_row, step, w_row, w_across, everywhere(weight), q, some, o)
                a, b = add(a, b, e, q, squares, exact)
                n, of_rows = tallied(n, e, o), of_rows + weight
            x_row += x_step
            w_row += w_step
    return count_of(n, of_rows, one_by_one(o)), a, b


@inline
def add_short_row(x, source, at, w_at, q, squares, exact, o):
    """The values of one kept index to sums in lanes; the last ones are read together with some that were before."""
    zero, geometry = everywhere(0.0), source.geometry
    n, a, b, r, ahead = zero, zero, zero, 0, AHEAD_BYTES // geometry.itemsize
    while r < geometry.rows:
        x_row, w_row, _, _, rows, _ = rows_from(r, geometry.rows, source)
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for i in range(0, rows & -LANES, LANES):
            if squares is None:
                prefetch(x, x_row + i + ahead)
            e = eight(x, source, x_row + i, None, w_row + i, None, zero, q, None, o)
            a, b = add(a, b, e, q, squares, exact)
            n = tallied(n, e, o)
        if rows % LANES > 0:
            last = rows - LANES
            e = eight(x, source, x_row + last, None, w_row + last, None, zero, q, None, o)
            mask = both(last_lanes(rows % LANES), e.mask)
            e = Eight(choose(mask, e.v, q), mask, e.w)
            a, b = add(a, b, e, q, squares, exact)
            n = tallied(n, e, o)
    return n, a, b


@inline
def sums_of_rows(x, source, at, step, w_at, w_step, some, q, squares, exact, o):
    """Of eight kept indices from a place on, or the first ``some``, a step apart: as `sums_of_columns`."""
    table, zero = doubles(reserve(NUMBERS)), everywhere(0.0)
    put(table, SHIFTS, q)
    for k in range(LANES):
        n, a, b = zero, zero, zero
        if k < some:
            shift = everywhere(table[SHIFTS + k])
            n, a, b = add_short_row(x, source, at + k * step, w_at + k * w_step, shift, squares, exact, o)
        put(table, k * LANES, a)
        put(table, COUNTS + k * LANES, n)
        put(table, RESTS + k * LANES, b)
    n = count_of(row_sums(table, COUNTS), float(source.geometry.rows), one_by_one(o))
    a, b = totals(table, 0, RESTS, squares, exact)
    return n, a, b


@inline
def sums(x, source, at, step, w_at, w_step, some, q, squares, exact, along, across, o, count):
    """By columns or by rows, whichever lies side by side."""
    n, a, b = q, q, q
    if along is not None:
        n, a, b = sums_of_rows(x, source, at, step, w_at, w_step, count, q, squares, exact, o)
    if across is not None:
        n, a, b = sums_of_columns(x, source, at, step, w_at, w_step, some, q, squares, exact, o)
    return n, a, b


@inline
def count_of(of_values, of_rows, counts):
    """Each column's own, or the same of all."""
    if counts is None:
        return everywhere(of_rows)
    return of_values


@inline
def divided(a, n, each, exact):
    """The mean, which of equal values is theirs: so rounded for float64, in any way for narrower ones."""
    if exact is None:
        return a * each
    return a / n


@inline
def finish_columns(x, source, at, step, w_at, w_step, some, squares, along, o, results, to):
    """Results of eight columns, or the first ``some``."""
    zero, checked = everywhere(0.0), first_there(o.exact, o.weighted)
    across = unless(along, True)
    n, hi, lo = sums(x, source, at, step, w_at, w_step, some, zero, None, checked, along, across, o, to.count)
    each = everywhere(1.0) / n
    if squares is not None:
        mu = divided(hi + lo, n, each, o.exact)
        q = choose(finite(mu), shortened(mu, o.exact), zero)
        if checks(squares, o.exact, o.weighted):
            lower_underflow_flag()
        _, a, b = sums(x, source, at, step, w_at, w_step, some, q, squares, o.exact, along, across, o, to.count)
        m2 = b - a * (a * choose(greater(n, zero), each, zero))
        if checks(squares, o.exact, o.weighted) and underflowed(lane(b, 0)):
            results.status[CAREFUL] = 1.0
        m2 = zero_where_not_positive(m2, m2)
        finish(n, each, q, a, zero, m2, squares, checked, results, to)
    if squares is None:
        finish(n, each, zero, hi, lo, zero, squares, checked, results, to)


@kernel
def few(thread, first, last, x, strided, along, where, options, geometry, dimensions, results):
    """A task is a tile of columns."""
    source = Values(x, None, 0, where, geometry, dimensions)
    channels, tile = geometry.channels, geometry.tile
    step, w_step = only_if(strided, geometry.step), only_if(strided, geometry.mask_step)
    tiles = -(-channels // tile)
    for task in range(first, last):
        k = task // tiles
        cell = (task - k * tiles) * tile
        end = min(cell + tile, channels)
        at, w_at, o_at = kept_place(k, geometry, dimensions)
        for c in range(cell, end, LANES):
            x_at, w_c = at + c * geometry.step, w_at + c * geometry.mask_step
            to = Targets(o_at + c * geometry.kept_step, geometry.kept_step, min(LANES, end - c))
            if to.count == LANES:
                finish_columns(x, source, x_at, step, w_c, w_step, None, options.squares, along, options, results, to)
            else:
                finish_columns(
                    x, source, x_at, step, w_c, w_step, to.count, options.squares, along, options, results, to
                )
