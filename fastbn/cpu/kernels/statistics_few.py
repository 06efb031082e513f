"""Statistics of few values of each kept index, such as (5, 1 000 000) has on axis 0: see `statistics`.

In plain words, for the values x of each kept index that count, and their weights w or ones::

    q = the first x of some                            # the shift; 0, and no b, where squares are not wanted
    n, a, b = w.sum(), (w * (x - q)).sum(), (w * (x - q)**2).sum()
    mean, m2 = q + a / n, b - a**2 / n                 # around q = mean again, if a**2 / n is large beside m2

Eight kept indices at a time, a lane for each. Of up to 17 floats a**2 / n is never as large as `statistics.far` has it,
of a hundred seldom; then values are looked at again, in the first-level cache. Nothing is kept in memory between. Three
ways lead to the lanes:

- across: kept indices are neighbours, or everything lies apart;
- blocks: values of a kept index are neighbours, as in (1 000 000, 10) on axis 1: blocks of eight kept indices and
  eight, four or two values are transposed;
- along: there are enough of them for a vector, as in (1 000 000, 50): eight of one are read at once, and the lanes of
  eight such sums are added up in the end.
"""

from typing import Any, NamedTuple

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
    prefetch_values,
    row_sums,
    shortened,
    unless,
    values_to_test,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.shuffles import transposed
from fastbn.cpu.kernels.simd import any_greater, fma, prefetch, zero_where_not_positive
from fastbn.cpu.kernels.simd import store as put
from fastbn.cpu.kernels.statistics import (
    LOOKS,
    PEEKS,
    Eight,
    Values,
    add,
    eight,
    eight_of_a_column,
    far,
    kept_place,
    one_by_one,
    row_counts,
    rows_from,
    tallied,
    together,
    totals,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import Targets, checks, finish
from fastbn.cpu.statistics_sizes import AHEAD_BYTES
from fastbn.operands import CAREFUL


class Columns(NamedTuple):
    """Eight kept indices, a column of values each."""

    at: Any
    step: Any
    """From one to the next, or None if they are neighbours."""
    w_at: Any
    """The same of a mask."""
    w_step: Any
    some: Any
    """How many there are, if not eight."""
    count: Any
    """How many there are."""


COUNTS, RESTS, SHIFTS = (k * LANES * LANES for k in (1, 2, 3))  # behind the sums, in the table of `sums_of_rows`
NUMBERS = SHIFTS + LANES


@inline
def sums_of_columns(x, source, first, c, q, squares, compensated, o):
    """Of eight columns from a place on: their counts, and the sums around q that `add` makes.

    Of every run of rows, of which the first is given, the second, fourth, ... values have sums of their own.
    """
    zero, geometry = everywhere(0.0), source.geometry
    n, a0, b0, a1, b1, of_rows, r, line = zero, zero, zero, zero, zero, 0.0, 0, 64 // geometry.itemsize
    x_row, w_row, x_step, w_step, rows, _ = first
    ahead = c.at + AHEAD_BYTES // geometry.itemsize
    while True:
        r += rows
        x_row, w_row = c.at + x_row, c.w_at + w_row
        for _ in range(rows):
            if row_counts(source.where, w_row, geometry):
                weight = weight_of_row(source.where, w_row, weight_by_row(o))
                if c.step is not None and geometry.rows >= LANES:
                    prefetch(x, ahead)
                    ahead += line
                e = eight(x, source, x_row, c.step, w_row, c.w_step, everywhere(weight), q, c.some, o)
                a0, b0 = add(a0, b0, e, q, squares, compensated)
                n, of_rows = tallied(n, e, o), of_rows + weight
            a0, b0, a1, b1 = a1, b1, a0, b0
            x_row += x_step
            w_row += w_step
        if rows & 1 == 1:
            a0, b0, a1, b1 = a1, b1, a0, b0
        if r >= geometry.rows:
            break
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, geometry.rows, source)
    a, b = together(a0, b0, a1, b1, squares, compensated)
    return count_of(n, of_rows, one_by_one(o)), a, b


@inline
def add_short_row(x, source, first, at, w_at, q, squares, compensated, o):
    """The values of one kept index to sums in lanes; the last ones are read together with some that were before."""
    zero, geometry = everywhere(0.0), source.geometry
    n, a, b, r, ahead = zero, zero, zero, 0, AHEAD_BYTES // geometry.itemsize
    x_row, w_row, _, _, rows, _ = first
    while True:
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for i in range(0, rows & -LANES, LANES):
            prefetch(x, x_row + i + ahead)
            e = eight(x, source, x_row + i, None, w_row + i, None, zero, q, None, o)
            a, b = add(a, b, e, q, squares, compensated)
            n = tallied(n, e, o)
        if rows % LANES > 0:
            last = rows - LANES
            e = eight(x, source, x_row + last, None, w_row + last, None, zero, q, None, o)
            mask = both(last_lanes(rows % LANES), e.mask)
            e = Eight(choose(mask, e.v, q), mask, e.w)
            a, b = add(a, b, e, q, squares, compensated)
            n = tallied(n, e, o)
        if r >= geometry.rows:
            break
        x_row, w_row, _, _, rows, _ = rows_from(r, geometry.rows, source)
    return n, a, b


@inline
def sums_of_rows(x, source, first, c, q, squares, compensated, o):
    """As `sums_of_columns`, of kept indices a step apart."""
    table, zero = doubles(reserve(NUMBERS)), everywhere(0.0)
    put(table, SHIFTS, q)
    for k in range(LANES):
        n, a, b = zero, zero, zero
        if k < c.count:
            shift = everywhere(table[SHIFTS + k])
            n, a, b = add_short_row(
                x, source, first, c.at + k * c.step, c.w_at + k * c.w_step, shift, squares, compensated, o
            )
        put(table, k * LANES, a)
        put(table, COUNTS + k * LANES, n)
        put(table, RESTS + k * LANES, b)
    n = count_of(row_sums(table, COUNTS), float(source.geometry.rows), one_by_one(o))
    a, b = totals(table, 0, RESTS, squares, compensated)
    return n, a, b


@inline
def add_two_columns(one, other, q, squares, compensated, o, sums):
    """Values of eight kept indices each to the sums n, A and B of either."""
    n, a0, b0, a1, b1 = sums
    e0, e1 = eight_of_a_column(one, q, o), eight_of_a_column(other, q, o)
    a0, b0 = add(a0, b0, e0, q, squares, compensated)
    a1, b1 = add(a1, b1, e1, q, squares, compensated)
    return tallied(tallied(n, e0, o), e1, o), a0, b0, a1, b1


@inline
def sums_of_blocks(x, source, first, c, q, squares, compensated, o):
    """As `sums_of_columns`, where values of a kept index are neighbours: eight, four or two of each are transposed."""
    zero, geometry, skip_nan = everywhere(0.0), source.geometry, o.skip_nan
    sums, r, ahead = (zero, zero, zero, zero, zero), 0, AHEAD_BYTES // geometry.itemsize
    x_row, _, _, _, rows, _ = first
    while True:
        r += rows
        i, end = c.at + x_row, c.at + x_row + rows
        while i + 8 <= end:
            prefetch_values(x, i + ahead)
            v = transposed(x, i, c.step, 8, skip_nan)
            sums = add_two_columns(v[0], v[1], q, squares, compensated, o, sums)
            sums = add_two_columns(v[2], v[3], q, squares, compensated, o, sums)
            sums = add_two_columns(v[4], v[5], q, squares, compensated, o, sums)
            sums = add_two_columns(v[6], v[7], q, squares, compensated, o, sums)
            i += 8
        if i + 4 <= end:
            v = transposed(x, i, c.step, 4, skip_nan)
            sums = add_two_columns(v[0], v[1], q, squares, compensated, o, sums)
            sums = add_two_columns(v[2], v[3], q, squares, compensated, o, sums)
            i += 4
        if i + 2 <= end:
            v = transposed(x, i, c.step, 2, skip_nan)
            sums = add_two_columns(v[0], v[1], q, squares, compensated, o, sums)
            i += 2
        if i < end:
            e = eight_of_a_column(values_to_test(x, i, c.step, None, skip_nan), q, o)
            a, b = add(sums[1], sums[2], e, q, squares, compensated)
            sums = tallied(sums[0], e, o), a, b, sums[3], sums[4]
        if r >= geometry.rows:
            break
        x_row, _, _, _, rows, _ = rows_from(r, geometry.rows, source)
    n, a0, b0, a1, b1 = sums
    a, b = together(a0, b0, a1, b1, squares, compensated)
    return count_of(n, float(geometry.rows), one_by_one(o)), a, b


@inline
def sums(x, source, first, c, q, squares, compensated, o, along, blocks, across):
    """By whichever lies side by side; two of the three ways are None."""
    n, a, b = q, q, q
    if along is not None:
        n, a, b = sums_of_rows(x, source, first, c, q, squares, compensated, o)
    if blocks is not None:
        n, a, b = sums_of_blocks(x, source, first, c, q, squares, compensated, o)
    if across is not None:
        n, a, b = sums_of_columns(x, source, first, c, q, squares, compensated, o)
    return n, a, b


@inline
def count_of(of_values, of_rows, counts):
    """Each column's own, or the same of all."""
    if counts is None:
        return everywhere(of_rows)
    return of_values


@inline
def peeks(where):
    """Values of each kept index among which the first one that counts is looked for."""
    if where is None:
        return 1
    return PEEKS


@inline
def first_values(x, source, first, c, count, o):
    """Of each column the first finite value that counts, of so many; else 0. What does not count may be anything."""
    zero = everywhere(0.0)
    x_row, w_row, x_step, w_step, rows, _ = first
    q = zero
    for k in range(min(count, rows) - 1, -1, -1):
        w_at = c.w_at + w_row + k * w_step
        if row_counts(source.where, w_at, source.geometry):
            v = eight(x, source, c.at + x_row + k * x_step, c.step, w_at, c.w_step, zero, q, c.some, o).v
            q = choose(finite(v), v, q)
    return q


@inline
def sums_around_a_shift(x, source, first, c, o, along, blocks, across):
    """n, shift, A and m2 of eight columns; and B."""
    zero, one = everywhere(0.0), everywhere(1.0)
    q = shortened(first_values(x, source, first, c, peeks(source.where), o), o.compensated)
    n, a, b, m2 = zero, zero, zero, zero
    for look in range(LOOKS):
        if checks(o.squares, o.compensated, o.weighted):
            lower_underflow_flag()
        n, a, b = sums(x, source, first, c, q, o.squares, o.compensated, o, along, blocks, across)
        each = choose(greater(n, zero), one / n, zero)
        square = a * a
        between = square * each
        # B - A^2/n in one rounding, beside those of A and B: exact for integers.
        m2 = (fma(n, b, zero - square) - fma(a, a, zero - square)) * each
        is_far = any_greater(choose(finite(between), between, zero), everywhere(far(o.compensated, o.weighted)) * m2)
        if look + 1 == LOOKS or not is_far:
            break
        mu = q + a * each
        q = choose(finite(mu), shortened(mu, o.compensated), q)
    return n, q, a, zero_where_not_positive(m2, m2), b


@inline
def finish_columns(x, source, first, c, o, squares, along, blocks, results, o_at):
    """Results of eight columns."""
    zero, one, checked = everywhere(0.0), everywhere(1.0), first_there(o.compensated, o.weighted)
    across = unless(first_there(along, blocks), True)
    to = Targets(o_at, source.geometry.kept_step, c.count)
    if squares is not None:
        n, q, a, m2, b = sums_around_a_shift(x, source, first, c, o, along, blocks, across)
        if checks(squares, o.compensated, o.weighted) and underflowed(lane(b, 0)):
            results.status[CAREFUL] = 1.0
        finish(n, one / n, q, a, zero, m2, squares, checked, results, to)
    if squares is None:
        n, hi, lo = sums(x, source, first, c, zero, None, checked, o, along, blocks, across)
        finish(n, one / n, zero, hi, lo, zero, squares, checked, results, to)


@kernel
def few(thread, first, last, x, strided, along, blocks, where, options, geometry, dimensions, results):
    """A task is a tile of columns."""
    source, o = Values(x, None, 0, where, geometry, dimensions), options
    channels, tile = geometry.channels, geometry.tile
    step, w_step = only_if(strided, geometry.step), only_if(strided, geometry.mask_step)
    tiles, run = -(-channels // tile), rows_from(0, geometry.rows, source)
    for task in range(first, last):
        k = task // tiles
        cell = (task - k * tiles) * tile
        end = min(cell + tile, channels)
        at, w_at, o_at = kept_place(k, geometry, dimensions)
        for i in range(cell, end, LANES):
            there = at + i * geometry.step, step, w_at + i * geometry.mask_step, w_step
            count, to = min(LANES, end - i), o_at + i * geometry.kept_step
            if count == LANES:
                finish_columns(x, source, run, Columns(*there, None, LANES), o, o.squares, along, blocks, results, to)
            else:
                finish_columns(x, source, run, Columns(*there, count, count), o, o.squares, along, None, results, to)
