"""Sums along rows of kept indices: see `statistics`.

Each column has its sums in a thread's workspace, which stays in the first-level cache; four rows are added at once. A
*cell* is a kept index: one column, or ``size`` neighbouring ones, or several where rows of few kept indices are taken
together, ``fold`` of them; then the sums of a cell's columns are added up in the end.
"""

import numpy as np

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    array_at,
    both,
    choose,
    everywhere,
    finite,
    first_lanes,
    first_there,
    greater,
    only_if,
    put_values,
    repeat_value,
    row_sums,
    shortened,
    some_values,
    unless,
    values,
    which_count,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import address, any_greater, load, prefetch, store
from fastbn.cpu.kernels.statistics import (
    LOOKS,
    PEEKS,
    Options,
    Part,
    Results,
    Source,
    add,
    add_four,
    all_tallied,
    eight,
    far,
    fetched,
    kept_place,
    one_by_one,
    row_counts,
    rows_from,
    short,
    tallied,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import checks, merge_parts
from fastbn.cpu.kernels.statistics_table import (
    LONG_CELL,
    Table,
    buffer_of,
    clear,
    counts_at,
    fill_counts,
    gather_columns,
    loaded,
    masks_of,
    rest_at,
    shifts_at,
    stored,
    sums_at,
)
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.statistics import AHEAD, CAREFUL, FIELDS, OF_ROWS, OF_VALUES

OF_EIGHT_SHIFTS = (2 * LANES + 1) * LANES  # numbers: lanes of the sums and counts of eight cells, and their origins
BIG = 1.5 * 2.0**52  # added and taken off again, it rounds to a whole number


# --- rows -------------------------------------------------------------------------------------------------------------


@inline
def add_vector(x, source, at, w_at, w, some, o, table, c):
    """Eight columns, or ``some`` of them, of a row."""
    rest, counts = first_there(o.squares, o.exact), one_by_one(o)
    q, n, a, b = loaded(table, c, o.squares, rest, counts)
    prefetch(x, at + c + AHEAD // source.geometry.itemsize)
    e = eight(x, source, at + c, None, w_at + c, None, w, q, some, o)
    a, b = add(a, b, e, q, o.squares, o.exact)
    n = tallied(n, e, o)
    stored(table, c, n, a, b, rest, counts)


@inline
def add_vectors(x, source, at, step, far, w_at, w_far, weights, some, o, table, c):
    """The same of four rows, each ``far`` from the one before."""
    rest, counts = first_there(o.squares, o.exact), one_by_one(o)
    q, n, a, b = loaded(table, c, o.squares, rest, counts)
    at, w_at = at + c, w_at + c
    if c & (64 // source.geometry.itemsize - 1) == 0:
        prefetch(x, at + step)
        prefetch(x, at + far + step)
        prefetch(x, at + 2 * far + step)
        prefetch(x, at + 3 * far + step)
    e0 = eight(x, source, at, None, w_at, None, weights[0], q, some, o)
    e1 = eight(x, source, at + far, None, w_at + w_far, None, weights[1], q, some, o)
    e2 = eight(x, source, at + 2 * far, None, w_at + 2 * w_far, None, weights[2], q, some, o)
    e3 = eight(x, source, at + 3 * far, None, w_at + 3 * w_far, None, weights[3], q, some, o)
    a, b = add_four(a, b, (e0, e1, e2, e3), q, o.squares, o.exact)
    n = all_tallied(n, (e0, e1, e2, e3), o)
    stored(table, c, n, a, b, rest, counts)


@inline
def add_one_row(x, source, at, w_at, w, o, table, columns):
    whole = columns & -LANES
    for c in range(0, whole, LANES):
        add_vector(x, source, at, w_at, w, None, o, table, c)
    if whole < columns:
        add_vector(x, source, at, w_at, w, columns - whole, o, table, whole)


@inline
def add_four_rows(x, source, at, step, far, w_at, w_far, weights, o, table, columns):
    whole = columns & -LANES
    for c in range(0, whole, LANES):
        add_vectors(x, source, at, step, far, w_at, w_far, weights, None, o, table, c)
    if whole < columns:
        add_vectors(x, source, at, step, far, w_at, w_far, weights, columns - whole, o, table, whole)


@inline
def weight_at_row(source, at, o):
    return weight_of_row(source.where, at, weight_by_row(o))


@inline
def mask_of_row(source, w_at, columns, by_cell, table, k):
    """A row's mask, and where it begins there: as it lies, or, if it has a byte of each cell, in the k-th place for
    such, with one of each column.
    """
    if by_cell is None:
        return source.where, w_at
    into, size = array_at(address(table.numbers, masks_of(table)), source.where), source.geometry.channels
    for j in range((size - 1) & -LANES, -1, -LANES):  # the last first: what spills over is overwritten
        to = k * table.pitch + j
        for i in range(columns // size):
            repeat_value(source.where, w_at + i, into, to)
            to += size
    return into, k * table.pitch


@inline
def masked_by(source, where):
    return Source(source.x, source.raw, source.fetch, where, source.geometry, source.dimensions)


@inline
def add_quarters(x, source, at, step, w_at, w_step, rows, by_cell, o, table, columns):
    """Rows of four quarters, read side by side; how many, and what they weigh. None if rows may be left out."""
    if x is None:
        return 0, 0.0
    if source.geometry.mask == OF_ROWS and o.weighted is None:
        return 0, 0.0
    quarter, n = rows // 4, 0.0
    jump, w_jump = quarter * step, quarter * w_step
    for k in range(quarter):
        w_k = w_at + k * w_step
        w0, w1 = weight_at_row(source, w_k, o), weight_at_row(source, w_k + w_jump, o)
        w2, w3 = weight_at_row(source, w_k + 2 * w_jump, o), weight_at_row(source, w_k + 3 * w_jump, o)
        weights = everywhere(w0), everywhere(w1), everywhere(w2), everywhere(w3)
        where, w_first = mask_of_row(source, w_k, columns, by_cell, table, 0)
        w_far = w_jump
        if by_cell is not None:
            w_far = table.pitch
            for i in range(1, 4):
                mask_of_row(source, w_k + i * w_jump, columns, by_cell, table, i)
        masked = masked_by(source, where)
        add_four_rows(x, masked, at + k * step, step, jump, w_first, w_far, weights, o, table, columns)
        n += (w0 + w1) + (w2 + w3)
    return 4 * quarter, n


@inline
def add_any_row(x, raw, source, at, w_at, w, by_cell, o, table, columns):
    """`add_one_row` of either array."""
    where, w_at = mask_of_row(source, w_at, columns, by_cell, table, 0)
    source = masked_by(source, where)
    if x is not None:
        add_one_row(x, source, at, w_at, w, o, table, columns)
    if raw is not None:
        fetched(source, at, columns, table.numbers, buffer_of(table))
        add_one_row(table.numbers, source, buffer_of(table), w_at, w, o, table, columns)


@inline
def add_rows(source, part, by_cell, o, table):
    """Rows of a part to the sums of their columns; what a cell weighs of them, if values do not count one by one."""
    geometry = source.geometry
    r, n = part.first, 0.0
    while r < part.last:
        x_row, w_row, x_step, w_step, rows, left = rows_from(r, part.last, source)
        x_row, w_row = part.at + x_row, part.w_at + w_row
        r += rows
        whole = rows - 1 if geometry.tail > 0 and rows == left else rows  # the last one of folded rows may be short
        done, weight = add_quarters(
            source.x, source, x_row, x_step, w_row, w_step, whole, by_cell, o, table, part.columns
        )
        n += weight * geometry.fold
        for k in range(done, rows):
            width, w_k = part.columns if k < whole else geometry.tail, w_row + k * w_step
            if row_counts(source.where, w_k, geometry):
                weight = weight_at_row(source, w_k, o)
                w = everywhere(weight)
                add_any_row(source.x, source.raw, source, x_row + k * x_step, w_k, w, by_cell, o, table, width)
                n += weight * (geometry.fold if k < whole else geometry.tail // (geometry.channels * geometry.size))
    return n * geometry.size


# --- shifts -----------------------------------------------------------------------------------------------------------


@inline
def peek_at_row(x, source, at, w_at, masked, width, run, step, first, table):
    """A row to the sums around the first values that count in each column, and to their counts: vectors a step apart of
    every ``run`` columns.
    """
    numbers, zero, one = table.numbers, everywhere(0.0), everywhere(1.0)
    for start in range(0, width, run):
        end = min(start + run, width)
        for c in range(start, end, step):
            some = min(LANES, end - c)
            v = some_values(x, at + c, None, some)
            counts = both(finite(v), which_count(only_if(masked, source.where), w_at + c, None, v, some, None))
            n, q = load(numbers, counts_at(table, c), 64), load(numbers, shifts_at(table, c), 64)
            if first or masked is not None:
                q = choose(both(counts, greater(one, n)), v, q)
                store(numbers, shifts_at(table, c), q)
            store(numbers, sums_at(table, c), load(numbers, sums_at(table, c), 64) + choose(counts, v - q, zero))
            store(numbers, counts_at(table, c), n + choose(counts, one, zero))


@inline
def peek_at_any_row(x, raw, source, at, w_at, masked, width, run, step, first, by_cell, table):
    """The same of either array."""
    where, w_at = mask_of_row(source, w_at, width, by_cell, table, 0)
    source = masked_by(source, where)
    if x is not None:
        peek_at_row(x, source, at, w_at, masked, width, run, step, first, table)
    if raw is not None:
        fetched(source, at, width, table.numbers, buffer_of(table))
        peek_at_row(table.numbers, source, buffer_of(table), w_at, masked, width, run, step, first, table)


@inline
def peek_at_columns(source, part, cells, masked, by_cell, exact, table):
    """A shift for each column, the same for all of a cell, from some rows of a part; their sums are used meanwhile.

    Of a cell's columns some are enough: of neighbours a vector or two, of those in rows taken as one the first.
    """
    geometry, numbers, columns = source.geometry, table.numbers, part.columns
    size, seen, run, step = geometry.size, columns, columns, LANES
    if size >= LONG_CELL:
        run, step = size, size if size < 4 * LANES else (size + 1) // 2
    elif size == 1 and cells < columns:
        seen = min(columns, PEEKS * cells)
    clear(table, counts_at(table, 0), seen)
    clear(table, shifts_at(table, 0), seen)
    clear(table, sums_at(table, 0), seen)
    count = min(PEEKS, max(1, (part.last - part.first) >> (4 if exact is None else 2)))
    for k in range(count):
        r = part.first + k * (part.last - part.first) // count
        row, w_row, _, _, _, left = rows_from(r, part.last, source)
        w_row += part.w_at
        width = geometry.tail if geometry.tail > 0 and left == 1 else columns
        if row_counts(source.where, w_row, geometry):
            peek_at_any_row(
                source.x, source.raw, source, part.at + row, w_row, masked, min(width, seen), run, step, k == 0,
                by_cell, table,
            )  # fmt: skip
    if cells == columns:
        for c in range(0, columns, LANES):
            n, q = load(numbers, counts_at(table, c), 64), load(numbers, shifts_at(table, c), 64)
            s = load(numbers, sums_at(table, c), 64)
            mu = q + s / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
            store(numbers, shifts_at(table, c), shortened(mu, exact))
    else:
        if size >= LONG_CELL:
            for j in range(0, cells, LANES):
                store(numbers, sums_at(table, j), shortened(shifts_of_long_cells(j, size, step, table), exact))
        elif size > 1:
            for j in range(0, cells, LANES):
                store(numbers, sums_at(table, j), shortened(shifts_of_short_cells(j, size, table), exact))
        else:
            for j in range(cells):
                numbers[sums_at(table, j)] = short(shift_of_folds(j, cells, seen, table), exact)
        spread_shifts(size, columns, cells, table)


@inline
def shifts_of_short_cells(j, size, table):
    """Of eight cells, the means of what was looked at in columns side by side, around the first one that
    counts, so that they are those of constants. Lanes are cells.
    """
    numbers, zero, one = table.numbers, everywhere(0.0), everywhere(1.0)
    origin, n, s = zero, zero, zero
    for c in range(j * size, (j + 1) * size):
        more, q = values(numbers, counts_at(table, c), size), values(numbers, shifts_at(table, c), size)
        origin = choose(greater(n, zero), origin, q)
        s = s + choose(greater(more, zero), values(numbers, sums_at(table, c), size) + more * (q - origin), zero)
        n = n + more
    return origin + s / choose(greater(n, zero), n, one)


@inline
def shifts_of_long_cells(first, size, step, table):
    """The same of longer ones: lanes are columns."""
    numbers, zero, one = table.numbers, everywhere(0.0), everywhere(1.0)
    lanes = doubles(reserve(OF_EIGHT_SHIFTS))
    for k in range(LANES):
        c, origin, n, s = (first + k) * size, 0.0, zero, zero
        for i in range(c, c + size):
            if numbers[counts_at(table, i)] > 0.0:
                origin = numbers[shifts_at(table, i)]
                break
        for i in range(0, size, step):
            more = choose(first_lanes(size - i), load(numbers, counts_at(table, c + i), 64), zero)
            distances = load(numbers, shifts_at(table, c + i), 64) - everywhere(origin)
            sums = load(numbers, sums_at(table, c + i), 64) + more * distances
            s = s + choose(greater(more, zero), sums, zero)
            n = n + more
        store(lanes, k * LANES, s)
        store(lanes, (LANES + k) * LANES, n)
        lanes[2 * LANES * LANES + k] = origin
    n, origins = row_sums(lanes, LANES * LANES), load(lanes, 2 * LANES * LANES, 64)
    return origins + row_sums(lanes, 0) / choose(greater(n, zero), n, one)


@inline
def shift_of_folds(first, step, end, table):
    """The same of columns a step apart."""
    numbers, origin, n, s = table.numbers, 0.0, 0.0, 0.0
    for c in range(first, end, step):
        more, q = numbers[counts_at(table, c)], numbers[shifts_at(table, c)]
        if more > 0.0:
            origin = q if n == 0.0 else origin
            s += numbers[sums_at(table, c)] + more * (q - origin)
            n += more
    return origin + s / n if n > 0.0 else 0.0


@inline
def spread_shifts(size, columns, cells, table):
    """The shift of each cell, from where its sum stands, to all of its columns; what spills over is overwritten."""
    numbers = table.numbers
    if size == 1:
        for c in range(0, columns, cells):
            for j in range(0, cells, LANES):
                store(numbers, shifts_at(table, c + j), load(numbers, sums_at(table, j), 64))
    else:
        for j in range(cells):
            q = everywhere(numbers[sums_at(table, j)])
            for c in range(j * size, (j + 1) * size, LANES):
                store(numbers, shifts_at(table, c), q)


@inline
def some_are_far(cells, o, table):
    """`is_far` of any cell. The lanes behind the last one hold sums of other columns."""
    numbers, limit = table.numbers, everywhere(far(o.exact, o.weighted))
    found = False
    for j in range(0, cells, LANES):
        n, a = load(numbers, counts_at(table, j), 64), load(numbers, sums_at(table, j), 64)
        between = a * a / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        m2 = load(numbers, rest_at(table, j), 64) - between
        cell = first_lanes(min(LANES, cells - j))
        between = choose(finite(between), between, everywhere(-1.0))
        if any_greater(choose(cell, between, everywhere(-1.0)), choose(cell, limit * m2, everywhere(0.0))):
            found = True
    return found


@inline
def better_shifts(size, columns, cells, exact, table):
    """The mean of each cell, for another look."""
    numbers = table.numbers
    for j in range(cells):
        q, n, a = numbers[shifts_at(table, j)], numbers[counts_at(table, j)], numbers[sums_at(table, j)]
        better = short(q + a / n, exact)
        numbers[sums_at(table, j)] = better if n > 0.0 and np.isfinite(better) else q
    spread_shifts(size, columns, cells, table)


# --- cells ------------------------------------------------------------------------------------------------------------


@inline
def sums_of_columns(source, part, cells, squares, by_cell, o, table):
    """n, shift, A and B of each cell, side by side in the table; whether squares underflowed."""
    geometry, lost = source.geometry, False
    size, columns = geometry.size, part.columns
    if squares is not None:
        peek_at_columns(source, part, cells, o.masked, by_cell, o.exact, table)
    for look in range(LOOKS):
        clear(table, counts_at(table, 0), columns)
        lower_underflow_flag()
        clear(table, sums_at(table, 0), columns)
        clear(table, rest_at(table, 0), columns)
        n = add_rows(source, part, by_cell, o, table)
        lost = checks(squares, o.exact, o.weighted) and underflowed(table.numbers[rest_at(table, 0)])
        if columns > cells:
            gather_columns(geometry, cells, o, table)
        fill_counts(n, cells, one_by_one(o), table)
        if squares is None or look + 1 == LOOKS or not some_are_far(cells, o, table):
            break
        better_shifts(size, columns, cells, o.exact, table)
    return lost


# --- small integers ---------------------------------------------------------------------------------------------------


@inline
def add_integer_rows(source, part, table):
    """Rows of a part to the sums of their columns; how many values of a cell that are."""
    geometry, params, state = source.geometry, reserve(8), reserve(2)
    clear(table, counts_at(table, 0), 2 * table.pitch)  # a table of integers, where counts and shifts will be
    put_word(state, 0)
    put_word(state + 8, part.columns)
    put_word(params + 24, 1)
    put_word(params + 32, address(table.numbers, counts_at(table, 0)))
    put_word(params + 40, address(table.numbers, sums_at(table, 0)))
    put_word(params + 48, address(table.numbers, rest_at(table, 0)))
    put_word(params + 56, state)
    r, n = part.first, 0
    while r < part.last:
        x_row, _, step, _, rows, left = rows_from(r, part.last, source)
        r += rows
        whole = rows - 1 if geometry.tail > 0 and rows == left else rows
        put_word(params, address(source.raw, (part.at + x_row) * geometry.itemsize))
        put_word(params + 8, step)
        if whole > 0:
            put_word(params + 16, part.columns)
            enter(source.fetch, params, 0, 0, whole)
        n += whole * geometry.fold
        if whole < rows:
            put_word(params + 16, geometry.tail)
            enter(source.fetch, params, 0, whole, rows)
            n += geometry.tail // (geometry.channels * geometry.size)
    put_word(params + 16, part.columns)
    enter(source.fetch, params, 0, 0, 0)
    return n * geometry.size


@inline
def sums_of_integer_columns(source, part, cells, squares, o, table):
    """n, shift, A and B of each cell, exact; the shift is a whole number near the mean."""
    geometry, numbers, big = source.geometry, table.numbers, everywhere(BIG)
    clear(table, sums_at(table, 0), part.columns)
    clear(table, rest_at(table, 0), part.columns)
    count = add_integer_rows(source, part, table)
    if part.columns > cells:
        gather_columns(geometry, cells, o, table)
    fill_counts(float(count), cells, None, table)
    n, moved = everywhere(float(count)), everywhere(float(geometry.moved))
    for j in range(0, cells, LANES):
        a = load(numbers, sums_at(table, j), 64)
        if squares is not None:
            q = (a / n + big) - big
            a = a - q * n
            b = load(numbers, rest_at(table, j), 64) - q * (a + a + q * n)
            store(numbers, shifts_at(table, j), q - moved)
            store(numbers, rest_at(table, j), b)
        if squares is None:
            a = a - moved * n
        store(numbers, sums_at(table, j), a)


@inline
def sums_of(source, part, cells, squares, by_cell, o, integers, floats, table):
    """Of either; whether squares underflowed."""
    lost = False
    if integers is not None:
        sums_of_integer_columns(source, part, cells, squares, o, table)
    if floats is not None:
        lost = sums_of_columns(source, part, cells, squares, by_cell, o, table)
    return lost


# --- tasks ------------------------------------------------------------------------------------------------------------


@kernel
def outer(
    thread, first, last, x, raw, fetch, integers, where, masked, weighted, skip_nan, by_cell, squares, exact,
    geometry, dimensions, partials, workspace, count, mean, spread, ddof, status, formats,
):  # fmt: skip
    """A task is a tile of cells in a part of the rows; tiles of a row are neighbours."""
    o, source = Options(squares, exact, masked, weighted, skip_nan), Source(x, raw, fetch, where, geometry, dimensions)
    results = Results(count, mean, spread, ddof, status, formats)
    parts, channels, tile, pitch = geometry.parts, geometry.channels, geometry.tile, geometry.width
    tiles = -(-channels // tile)
    table = Table(workspace, thread * geometry.own, pitch)
    for task in range(first, last):
        rest = task // tiles
        cell = (task - rest * tiles) * tile
        k = rest // parts
        cells = min(tile, channels - cell)
        at, w_at, o_at = kept_place(k, geometry, dimensions)
        r = (rest - k * parts) * geometry.rows_of_a_part
        part = Part(
            at + cell * geometry.size * geometry.step,
            w_at + cell * geometry.size if geometry.mask == OF_VALUES else w_at,
            r, min(r + geometry.rows_of_a_part, geometry.rows), geometry.fold * cells * geometry.size,
        )  # fmt: skip
        if sums_of(source, part, cells, squares, by_cell, o, integers, unless(integers, True), table):
            status[CAREFUL] = 1.0
        if parts > 1:
            to = FIELDS * channels * rest + cell
            for f in range(FIELDS):
                for j in range(0, cells, LANES):
                    numbers = load(workspace, table.own + f * pitch + j, 64)
                    put_values(partials, to + f * channels + j, numbers, min(LANES, cells - j))
        else:
            o_at += cell * geometry.kept_step
            merge_parts(workspace, table.own, pitch, 0, 1, cells, o, results, o_at, geometry.kept_step)
