"""A thread's table of the columns that `statistics_outer` sums up: rows of numbers in its workspace, a pitch apart."""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.doubles import (
    LANES,
    choose,
    everywhere,
    first_lanes,
    first_there,
    hidden,
    row_sums,
    values,
)
from fastbn.cpu.kernels.simd import load, store
from fastbn.cpu.kernels.statistics import field, one_by_one, together, totals
from fastbn.cpu.statistics import FIELDS

LONG_CELL = 12  # neighbouring columns of a cell, from which they are read eight at once
OF_EIGHT = 3 * LANES * LANES  # numbers: lanes of the sums, of what these lost, and of the counts of eight cells


class Table(NamedTuple):
    """A thread's: rows of counts, shifts, A and B of its columns, a pitch apart, and behind them what is fetched,
    and masks of four rows.
    """

    numbers: Any
    own: Any
    pitch: Any


@inline
def counts_at(table, c):
    return table.own + c


@inline
def shifts_at(table, c):
    return table.own + table.pitch + c


@inline
def sums_at(table, c):
    return table.own + 2 * table.pitch + c


@inline
def rest_at(table, c):
    """B: sums of squares, or what sums lost."""
    return table.own + 3 * table.pitch + c


@inline
def buffer_of(table):
    return table.own + FIELDS * table.pitch


@inline
def masks_of(table):
    return table.own + (FIELDS + 1) * table.pitch


@inline
def store_if(option, numbers, at, v):
    if option is not None:
        store(numbers, at, v)


@inline
def loaded(table, c, q_is_used, rest_is_used, counts):
    """The numbers of eight columns; zeros of those that are not used."""
    numbers = table.numbers
    a, b = load(numbers, sums_at(table, c), 64), field(numbers, rest_at(table, c), rest_is_used)
    n = field(numbers, counts_at(table, c), counts)
    if q_is_used is None:
        return everywhere(hidden(0.0)), n, a, b  # see `statistics_inner.sums_around_a_shift`
    return load(numbers, shifts_at(table, c), 64), n, a, b


@inline
def stored(table, c, n, a, b, rest_is_used, counts):
    store(table.numbers, sums_at(table, c), a)
    store_if(rest_is_used, table.numbers, rest_at(table, c), b)
    store_if(counts, table.numbers, counts_at(table, c), n)


@inline
def clear(table, at, count):
    for c in range(0, count, LANES):
        store(table.numbers, at + c, everywhere(0.0))


@inline
def fill_counts(n, cells, counts, table):
    """What each cell weighs, if all weigh the same."""
    if counts is None:
        for j in range(0, cells, LANES):
            store(table.numbers, counts_at(table, j), everywhere(n))


@inline
def values_if(option, a, at, step):
    if option is None:
        return everywhere(0.0)
    return values(a, at, step)


@inline
def gather_columns(geometry, cells, o, table):
    """The sums of each cell's columns, moved side by side."""
    if geometry.size == 1:
        add_folds(geometry.fold * cells, cells, o, table)
    elif geometry.size < LONG_CELL:
        add_short_cells(geometry.size, cells, o, table)
    else:
        add_long_cells(geometry.size, cells, o, table)


@inline
def add_folds(columns, cells, o, table):
    """Of cells whose columns are in each of the rows that were taken as one."""
    rest, counts = first_there(o.squares, o.exact), one_by_one(o)
    for j in range(0, cells, LANES):
        n, a, b = everywhere(0.0), everywhere(0.0), everywhere(0.0)
        for c in range(j, columns, cells):
            _, more_n, more_a, more_b = loaded(table, c, None, rest, counts)
            n = n + more_n
            a, b = together(a, b, more_a, more_b, o.squares, o.exact)
        stored(table, j, n, a, b, rest, counts)


@inline
def add_short_cells(size, cells, o, table):
    """Of cells whose columns lie side by side: lanes are cells."""
    rest, counts = first_there(o.squares, o.exact), one_by_one(o)
    for j in range(0, cells, LANES):
        n, a, b = everywhere(0.0), everywhere(0.0), everywhere(0.0)
        for c in range(j * size, (j + 1) * size):
            n = n + values_if(counts, table.numbers, counts_at(table, c), size)
            more = values_if(rest, table.numbers, rest_at(table, c), size)
            a, b = together(a, b, values(table.numbers, sums_at(table, c), size), more, o.squares, o.exact)
        store_if(o.squares, table.numbers, shifts_at(table, j), values(table.numbers, shifts_at(table, j * size), size))
        stored(table, j, n, a, b, rest, counts)


@inline
def add_long_cells(size, cells, o, table):
    """Of longer ones: lanes are columns, and eight cells' are added up together."""
    rest, counts, zero = first_there(o.squares, o.exact), one_by_one(o), everywhere(0.0)
    lanes = doubles(reserve(OF_EIGHT))
    for j in range(0, cells, LANES):
        for k in range(LANES):
            n, a, b, first = zero, zero, zero, (j + k) * size
            for i in range(0, size, LANES):
                there = first_lanes(size - i)
                _, more_n, more_a, more_b = loaded(table, first + i, None, rest, counts)
                n = n + choose(there, more_n, zero)
                a, b = together(a, b, choose(there, more_a, zero), choose(there, more_b, zero), o.squares, o.exact)
            store(lanes, k * LANES, a)
            store(lanes, (LANES + k) * LANES, b)
            store(lanes, (2 * LANES + k) * LANES, n)
        store_if(o.squares, table.numbers, shifts_at(table, j), values(table.numbers, shifts_at(table, j * size), size))
        a, b = totals(lanes, 0, LANES * LANES, o.squares, o.exact)
        stored(table, j, row_sums(lanes, 2 * LANES * LANES), a, b, rest, counts)
