"""A thread's table of the columns that `statistics_outer` sums up: rows of numbers in its workspace, a pitch apart."""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.doubles import LANES, everywhere, first_there, hidden, values
from fastbn.cpu.kernels.simd import load, store
from fastbn.cpu.kernels.statistics import field, one_by_one, together
from fastbn.cpu.statistics import FIELDS


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
    size, numbers = geometry.size, table.numbers
    rest, counts = first_there(o.squares, o.exact), one_by_one(o)
    for j in range(0, cells, LANES):
        n, a, b = everywhere(0.0), everywhere(0.0), everywhere(0.0)
        for k in range(geometry.fold):
            for i in range(size):
                c = (k * cells + j) * size + i
                n = n + values_if(counts, numbers, counts_at(table, c), size)
                more = values_if(rest, numbers, rest_at(table, c), size)
                a, b = together(a, b, values(numbers, sums_at(table, c), size), more, o.squares, o.exact)
        store_if(o.squares, numbers, shifts_at(table, j), values(numbers, shifts_at(table, j * size), size))
        stored(table, j, n, a, b, rest, counts)
