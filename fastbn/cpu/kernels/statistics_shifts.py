"""Shifts of `statistics_outer`'s squares: numbers near the mean of each kept index, before it is known.

Of a cell, over some values v of up to eight rows of the part that count, q the first of them, in plain words::

    shift = q + sum(v - q) / n          # of constants that constant itself, so that their squares are exactly 0

and once more, of all values, where the mean has turned out to be far from it: ``shift += A / n``.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.doubles import (
    LANES,
    both,
    choose,
    everywhere,
    finite,
    greater,
    only_if,
    shortened,
    some_values,
    which_count,
)
from fastbn.cpu.kernels.simd import load, store
from fastbn.cpu.kernels.statistics import PEEKS, fetched, masked_by, row_counts, rows_from, short
from fastbn.cpu.kernels.statistics_table import (
    LONG_CELL,
    clear,
    mask_of_row,
)


@inline
def peek_at_row(x, source, at, w_at, masked, width, run, skip, first, table):
    """A row to the sums around the first values that count in each column, and to their counts: of every ``run``
    columns all, or a vector behind those to skip.
    """
    numbers, zero, one = table.numbers, everywhere(0.0), everywhere(1.0)
    for start in range(0, width, run):
        end = min(start + run, width)
        for c in range(start + skip, end, LANES if skip == 0 else run):
            some = min(LANES, end - c)
            v = some_values(x, at + c, None, some)
            counts = both(finite(v), which_count(only_if(masked, source.where), w_at + c, None, v, some, None))
            n, q = load(numbers, table.counts + c, 64), load(numbers, table.shifts + c, 64)
            if first or masked is not None:
                q = choose(both(counts, greater(one, n)), v, q)
                store(numbers, table.shifts + c, q)
            store(numbers, table.sums + c, load(numbers, table.sums + c, 64) + choose(counts, v - q, zero))
            store(numbers, table.counts + c, n + choose(counts, one, zero))


@inline
def peek_at_any_row(x, raw, source, at, w_at, masked, width, run, skip, first, by_cell, table):
    """The same of either array."""
    where, w_at = mask_of_row(source, w_at, width, by_cell, table, 0)
    source = masked_by(source, where)
    if x is not None:
        peek_at_row(x, source, at, w_at, masked, width, run, skip, first, table)
    if raw is not None:
        fetched(source, at, width, table.numbers, table.buffer)
        peek_at_row(table.numbers, source, table.buffer, w_at, masked, width, run, skip, first, table)


@inline
def peek_at_columns(source, part, cells, masked, by_cell, compensated, table):
    """A shift for each column, the same for all of a cell, from some rows of a part; their sums are used meanwhile.

    Of a cell's columns some are enough: of many neighbours a vector in the middle, since at borders of images values
    are left out or others than elsewhere; of those in rows taken as one the first ones.
    """
    geometry, numbers, columns = source.geometry, table.numbers, part.columns
    size, seen, run, skip = geometry.size, columns, columns, 0
    look, step = size, 1  # how far a cell's columns reach, and how far apart they are
    if size >= LONG_CELL:
        run, skip = size, size // 2
        look = min(LANES, size - skip)
    elif size == 1 and cells < columns:
        seen = min(columns, PEEKS * cells)
        look, step = seen, cells
    clear(table, table.counts, seen)
    clear(table, table.shifts, seen)
    clear(table, table.sums, seen)
    count = min(PEEKS, max(1, (part.last - part.first) >> (4 if compensated is None else 2)))
    for k in range(count):
        r = part.first + k * (part.last - part.first) // count
        row, w_row, _, _, _, left = rows_from(r, part.last, source)
        w_row += part.w_at
        width = geometry.tail if geometry.tail > 0 and left == 1 else columns
        if row_counts(source.where, w_row, geometry):
            peek_at_any_row(
                source.x, source.raw, source, part.at + row, w_row, masked, min(width, seen), run, skip, k == 0,
                by_cell, table,
            )  # fmt: skip
    if cells == columns:
        for c in range(0, columns, LANES):
            n, q = load(numbers, table.counts + c, 64), load(numbers, table.shifts + c, 64)
            s = load(numbers, table.sums + c, 64)
            mu = q + s / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
            store(numbers, table.shifts + c, shortened(mu, compensated))
    else:
        for j in range(cells):
            first = j * size + skip
            shift = shift_of_columns(first, step, first + look, table)
            numbers[table.sums + j] = short(shift, compensated)
        spread_shifts(size, columns, cells, table)


@inline
def shift_of_columns(first, step, end, table):
    """The mean of what was looked at in some columns: around the first one that counts, and so that of constants."""
    numbers, origin, n, s = table.numbers, 0.0, 0.0, 0.0
    for c in range(first, end, step):
        more, q = numbers[table.counts + c], numbers[table.shifts + c]
        if more > 0.0:
            origin = q if n == 0.0 else origin
            s += numbers[table.sums + c] + more * (q - origin)
            n += more
    return origin + s / n if n > 0.0 else 0.0


@inline
def spread_shifts(size, columns, cells, table):
    """The shift of each cell, from where its sum stands, to all of its columns; what spills over is overwritten."""
    numbers = table.numbers
    if size == 1:
        for c in range(0, columns, cells):
            for j in range(0, cells, LANES):
                store(numbers, table.shifts + c + j, load(numbers, table.sums + j, 64))
    else:
        for j in range(cells):
            q = everywhere(numbers[table.sums + j])
            for c in range(j * size, (j + 1) * size, LANES):
                store(numbers, table.shifts + c, q)


@inline
def better_shifts(size, columns, cells, compensated, table):
    """The mean of each cell, for another look."""
    numbers = table.numbers
    for j in range(cells):
        q, n, a = numbers[table.shifts + j], numbers[table.counts + j], numbers[table.sums + j]
        better = short(q + a / n, compensated)
        numbers[table.sums + j] = better if n > 0.0 and np.isfinite(better) else q
    spread_shifts(size, columns, cells, table)
