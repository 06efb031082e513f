"""A thread's table of the columns that `statistics_outer` sums up: rows of numbers in its workspace, a pitch apart.

In plain words, of a part whose rows have ``columns`` values, ``size`` neighbours of each cell, coalesced rows behind
each other::

    n, q, A, B = table                                        # of each column: counts, shift, and the sums
    A += v - q;  B += (v - q) ** 2;  n += counts              # for each row v of the part (`statistics_outer`)
    n, A, B = (a.reshape(-1, cells, size).sum(axis=(0, 2)) for a in (n, A, B))      # of each cell, at the end
"""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.doubles import (
    LANES,
    array_at,
    choose,
    everywhere,
    first_lanes,
    first_there,
    hidden,
    repeat_value,
    repeat_values,
    row_sums,
    values,
)
from fastbn.cpu.kernels.pointers import address
from fastbn.cpu.kernels.simd import load, store
from fastbn.cpu.kernels.statistics import field, one_by_one, together, totals
from fastbn.cpu.statistics_sizes import FIELDS

LONG_CELL = 12  # neighbouring columns of a cell, from which they are read eight at once
OF_EIGHT = 3 * LANES * LANES  # numbers: lanes of the sums, of what these lost, and of the counts of eight cells


class Table(NamedTuple):
    """A thread's: where its rows begin, of which each column has a number."""

    numbers: Any
    counts: Any
    shifts: Any
    sums: Any
    """A: sums of values, or of distances from the shift."""
    rest: Any
    """B: sums of squares, or what sums lost."""
    buffer: Any
    """For what is fetched."""
    masks: Any
    """Of four rows, a byte or a weight of each column."""
    pitch: Any


@inline
def table_at(numbers, own, pitch):
    """The table of a thread whose workspace begins there."""
    buffer = own + FIELDS * pitch
    return Table(numbers, own, own + pitch, own + 2 * pitch, own + 3 * pitch, buffer, buffer + pitch, pitch)


@inline
def store_if(option, numbers, at, v):
    if option is not None:
        store(numbers, at, v)


@inline
def loaded(table, c, q_is_used, rest_is_used, counts):
    """The numbers of eight columns; zeros of those that are not used."""
    numbers = table.numbers
    a, b = load(numbers, table.sums + c, 64), field(numbers, table.rest + c, rest_is_used)
    n = field(numbers, table.counts + c, counts)
    if q_is_used is None:
        return everywhere(hidden(0.0)), n, a, b  # see `statistics_inner.sums_around_a_shift`
    return load(numbers, table.shifts + c, 64), n, a, b


@inline
def stored(table, c, n, a, b, rest_is_used, counts):
    store(table.numbers, table.sums + c, a)
    store_if(rest_is_used, table.numbers, table.rest + c, b)
    store_if(counts, table.numbers, table.counts + c, n)


@inline
def clear(table, at, count):
    for c in range(0, count, LANES):
        store(table.numbers, at + c, everywhere(0.0))


@inline
def fill_counts(n, cells, counts, table):
    """What each cell weighs, if all weigh the same."""
    if counts is None:
        for j in range(0, cells, LANES):
            store(table.numbers, table.counts + j, everywhere(n))


@inline
def mask_of_row(source, w_at, columns, by_cell, table, k):
    """A row's mask, and where it begins there: as it lies, or, if it has a byte of each cell, in the k-th place for
    such, with one of each column.
    """
    if by_cell is None:
        return source.where, w_at
    into, size = array_at(address(table.numbers, table.masks), source.where), source.geometry.channels
    first, cells, done = k * table.pitch, columns // size, 0
    if size == 3:  # of pixels
        done = repeat_each(source.where, w_at, cells, into, first, 3)
    elif size == 4:
        done = repeat_each(source.where, w_at, cells, into, first, 4)
    elif size == 2:
        done = repeat_each(source.where, w_at, cells, into, first, 2)
    for j in range((size - 1) & -LANES, -1, -LANES):  # the last first: what spills over is overwritten
        to = first + done * size + j
        for i in range(done, cells):
            repeat_value(source.where, w_at + i, into, to)
            to += size
    return into, first


@inline
def repeat_each(where, w_at, cells, into, to, size):
    """Of the bytes of cells eight at a time, each so often: how far it has come. Twice as fast as one at a time."""
    whole = cells & -LANES
    for i in range(0, whole, LANES):
        repeat_values(where, w_at + i, into, to + i * size, size)
    return whole


@inline
def values_if(option, a, at, step):
    if option is None:
        return everywhere(0.0)
    return values(a, at, step)


@inline
def gather_columns(geometry, cells, o, table):
    """The sums of each cell's columns, moved side by side."""
    if geometry.size < LONG_CELL:
        add_columns(geometry.coalesced, geometry.size, cells, o, table)
    else:
        add_long_cells(geometry.size, cells, o, table)


@inline
def add_columns(coalesced, size, cells, o, table):
    """Of cells with few neighbouring columns, or one in each of the rows that were taken as one: lanes are cells."""
    rest, counts = first_there(o.squares, o.compensated), one_by_one(o)
    for j in range(0, cells, LANES):
        n, a, b = everywhere(0.0), everywhere(0.0), everywhere(0.0)
        for k in range(coalesced):
            for i in range(size):
                c = (k * cells + j) * size + i
                n = n + values_if(counts, table.numbers, table.counts + c, size)
                more = values_if(rest, table.numbers, table.rest + c, size)
                a, b = together(a, b, values(table.numbers, table.sums + c, size), more, o.squares, o.compensated)
        store_if(o.squares, table.numbers, table.shifts + j, values(table.numbers, table.shifts + j * size, size))
        stored(table, j, n, a, b, rest, counts)


@inline
def add_long_cells(size, cells, o, table):
    """Of cells with many: lanes are columns, and eight cells' are added up together."""
    rest, counts, zero = first_there(o.squares, o.compensated), one_by_one(o), everywhere(0.0)
    lanes = doubles(reserve(OF_EIGHT))
    for j in range(0, cells, LANES):
        for k in range(min(LANES, cells - j)):
            n, a, b, first = zero, zero, zero, (j + k) * size
            for i in range(0, size, LANES):
                there = first_lanes(size - i)
                _, more_n, more_a, more_b = loaded(table, first + i, None, rest, counts)
                n = n + choose(there, more_n, zero)
                a, b = together(
                    a, b, choose(there, more_a, zero), choose(there, more_b, zero), o.squares, o.compensated
                )
            store(lanes, k * LANES, a)
            store(lanes, (LANES + k) * LANES, b)
            store(lanes, (2 * LANES + k) * LANES, n)
        store_if(o.squares, table.numbers, table.shifts + j, values(table.numbers, table.shifts + j * size, size))
        a, b = totals(lanes, 0, LANES * LANES, o.squares, o.compensated)
        stored(table, j, row_sums(lanes, 2 * LANES * LANES), a, b, rest, counts)
