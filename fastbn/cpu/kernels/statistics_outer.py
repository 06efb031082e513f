"""Sums along rows of kept indices: see `statistics`.

In plain words, for the rows of a part that count, x as (rows, columns), and their weights w or ones::

    q = mean of some rows of each cell                 # the shift; 0, and no b, where squares are not wanted
    n, a, b = w.sum(0), (w * (x - q)).sum(0), (w * (x - q)**2).sum(0)
    n, a, b = sums of each over the columns of a cell
    q, n, a, b = the same around q + a / n             # if a**2 / n is large beside b - a**2 / n, twice at most

Each column has its sums in a thread's workspace, which stays in the first-level cache; four rows are added at once. A
*cell* is a kept index: one column, or ``size`` neighbouring ones, or several where rows of few kept indices are taken
together, ``coalesced`` of them; then the sums of a cell's columns are added up in the end.
"""

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    choose,
    everywhere,
    finite,
    first_lanes,
    first_there,
    greater,
    put_values,
    unless,
    value_at,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.integers import COLUMNS, HOLDS
from fastbn.cpu.kernels.pointers import address
from fastbn.cpu.kernels.simd import any_greater, load, prefetch, store
from fastbn.cpu.kernels.statistics import (
    LOOKS,
    RowRange,
    Values,
    add,
    add_four,
    all_tallied,
    eight,
    far,
    fetched,
    kept_place,
    masked_by,
    one_by_one,
    row_counts,
    rows_from,
    tallied,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import MERGE, checks, merge_parts, merging
from fastbn.cpu.kernels.statistics_shifts import better_shifts, peek_at_columns
from fastbn.cpu.kernels.statistics_table import (
    clear,
    fill_counts,
    gather_columns,
    loaded,
    mask_of_row,
    stored,
    table_at,
)
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.statistics_sizes import AHEAD_BYTES, FIELDS, OF_VALUES
from fastbn.operands import CAREFUL

BIG = 1.5 * 2.0**52  # added and taken off again, it rounds to a whole number


# --- rows -------------------------------------------------------------------------------------------------------------


@inline
def add_vector(x, source, at, w_at, w, some, o, table, c):
    """Eight columns, or ``some`` of them, of a row."""
    rest, counts = first_there(o.squares, o.compensated), one_by_one(o)
    q, n, a, b = loaded(table, c, o.squares, rest, counts)
    prefetch(x, at + c + AHEAD_BYTES // source.geometry.itemsize)
    e = eight(x, source, at + c, None, w_at + c, None, w, q, some, o)
    a, b = add(a, b, e, q, o.squares, o.compensated)
    n = tallied(n, e, o)
    stored(table, c, n, a, b, rest, counts)


@inline
def add_vectors(x, source, at, step, w_at, weights, some, o, table, c):
    """The same of four rows, whose places are given; what is a step on is prefetched."""
    rest, counts = first_there(o.squares, o.compensated), one_by_one(o)
    q, n, a, b = loaded(table, c, o.squares, rest, counts)
    if c & (64 // source.geometry.itemsize - 1) == 0:
        prefetch(x, at[0] + c + step)
        prefetch(x, at[1] + c + step)
        prefetch(x, at[2] + c + step)
        prefetch(x, at[3] + c + step)
    e0 = eight(x, source, at[0] + c, None, w_at[0] + c, None, weights[0], q, some, o)
    e1 = eight(x, source, at[1] + c, None, w_at[1] + c, None, weights[1], q, some, o)
    e2 = eight(x, source, at[2] + c, None, w_at[2] + c, None, weights[2], q, some, o)
    e3 = eight(x, source, at[3] + c, None, w_at[3] + c, None, weights[3], q, some, o)
    a, b = add_four(a, b, (e0, e1, e2, e3), q, o.squares, o.compensated)
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
def add_four_rows(x, source, at, step, w_at, weights, o, table, columns):
    whole = columns & -LANES
    for c in range(0, whole, LANES):
        add_vectors(x, source, at, step, w_at, weights, None, o, table, c)
    if whole < columns:
        add_vectors(x, source, at, step, w_at, weights, columns - whole, o, table, whole)


@inline
def four_places(at, far):
    return at, at + far, at + 2 * far, at + 3 * far


@inline
def weight_at_row(source, at, o):
    return weight_of_row(source.where, at, weight_by_row(o))


@inline
def add_quarters(x, mask_of_rows, source, at, step, w_at, w_step, rows, by_cell, o, table, columns):
    """Rows of four quarters, read side by side: how many, and what those weigh that count."""
    if x is None:
        return 0, 0.0
    if mask_of_rows is not None:
        return add_counted_rows(x, source, at, step, w_at, w_step, rows, o, table, columns)
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
        masked, w_places = masked_by(source, where), four_places(w_first, w_far)
        add_four_rows(x, masked, four_places(at + k * step, jump), step, w_places, weights, o, table, columns)
        n += (w0 + w1) + (w2 + w3)
    return 4 * quarter, n


@inline
def counted_from(source, row, last, w_at, w_step):
    """The first row from one on, before the last, that a mask of rows has; else the last."""
    while row < last and value_at(source.where, w_at + row * w_step) == 0.0:
        row += 1
    return row


@inline
def add_counted_rows(x, source, at, step, w_at, w_step, rows, o, table, columns):
    """The same with a mask of rows: of each quarter the next one that counts, until one of them has no more."""
    quarter, n, one = rows // 4, 0.0, everywhere(1.0)
    end1, end2, end3 = 2 * quarter, 3 * quarter, 4 * quarter
    k0, k1, k2, k3 = 0, quarter, end1, end2
    while True:
        k0, k1 = counted_from(source, k0, quarter, w_at, w_step), counted_from(source, k1, end1, w_at, w_step)
        k2, k3 = counted_from(source, k2, end2, w_at, w_step), counted_from(source, k3, end3, w_at, w_step)
        if k0 == quarter or k1 == end1 or k2 == end2 or k3 == end3:
            break
        places = at + k0 * step, at + k1 * step, at + k2 * step, at + k3 * step
        unread = four_places(w_at, 0)  # all values of these rows count
        add_four_rows(x, source, places, step, unread, (one, one, one, one), o, table, columns)
        k0, k1, k2, k3, n = k0 + 1, k1 + 1, k2 + 1, k3 + 1, n + 4.0
    for k, end in ((k0, quarter), (k1, end1), (k2, end2), (k3, end3)):
        while k < end:
            add_one_row(x, source, at + k * step, w_at, one, o, table, columns)
            k, n = counted_from(source, k + 1, end, w_at, w_step), n + 1.0
    return end3, n


@inline
def add_any_row(x, raw, source, at, w_at, w, by_cell, o, table, columns):
    """`add_one_row` of either array."""
    where, w_at = mask_of_row(source, w_at, columns, by_cell, table, 0)
    source = masked_by(source, where)
    if x is not None:
        add_one_row(x, source, at, w_at, w, o, table, columns)
    if raw is not None:
        fetched(source, at, columns, table.numbers, table.buffer)
        add_one_row(table.numbers, source, table.buffer, w_at, w, o, table, columns)


@inline
def add_rows(source, part, by_cell, o, table):
    """Rows of a part to the sums of their columns; what a cell weighs of them, if values do not count one by one."""
    geometry = source.geometry
    mask_of_rows = unless(first_there(o.masked, o.weighted), source.where)
    r, n = part.first, 0.0
    while r < part.last:
        x_row, w_row, x_step, w_step, rows, left = rows_from(r, part.last, source)
        x_row, w_row = part.at + x_row, part.w_at + w_row
        r += rows
        whole = rows - 1 if geometry.tail > 0 and rows == left else rows  # the last one of coalesced rows may be short
        done, weight = add_quarters(
            source.x, mask_of_rows, source, x_row, x_step, w_row, w_step, whole, by_cell, o, table, part.columns
        )
        n += weight * geometry.coalesced
        for k in range(done, rows):
            width, w_k = part.columns if k < whole else geometry.tail, w_row + k * w_step
            if row_counts(source.where, w_k, geometry):
                weight = weight_at_row(source, w_k, o)
                w = everywhere(weight)
                add_any_row(source.x, source.raw, source, x_row + k * x_step, w_k, w, by_cell, o, table, width)
                n += weight * (
                    geometry.coalesced if k < whole else geometry.tail // (geometry.channels * geometry.size)
                )
    return n * geometry.size


@inline
def some_are_far(cells, o, table):
    """`is_far` of any cell. The lanes behind the last one hold sums of other columns."""
    numbers, limit = table.numbers, everywhere(far(o.compensated, o.weighted))
    found = False
    for j in range(0, cells, LANES):
        n, a = load(numbers, table.counts + j, 64), load(numbers, table.sums + j, 64)
        between = a * a / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        m2 = load(numbers, table.rest + j, 64) - between
        cell = first_lanes(min(LANES, cells - j))
        between = choose(finite(between), between, everywhere(-1.0))
        if any_greater(choose(cell, between, everywhere(-1.0)), choose(cell, limit * m2, everywhere(0.0))):
            found = True
    return found


# --- cells ------------------------------------------------------------------------------------------------------------


@inline
def sums_of_columns(source, part, cells, squares, by_cell, o, table):
    """n, shift, A and B of each cell, side by side in the table; whether squares underflowed."""
    geometry, lost = source.geometry, False
    size, columns = geometry.size, part.columns
    if squares is not None:
        peek_at_columns(source, part, cells, o.masked, by_cell, o.compensated, table)
    for look in range(LOOKS):
        clear(table, table.counts, columns)
        lower_underflow_flag()
        clear(table, table.sums, columns)
        clear(table, table.rest, columns)
        n = add_rows(source, part, by_cell, o, table)
        lost = checks(squares, o.compensated, o.weighted) and underflowed(table.numbers[table.rest])
        if columns > cells:
            gather_columns(geometry, cells, o, table)
        fill_counts(n, cells, one_by_one(o), table)
        if squares is None or look + 1 == LOOKS or not some_are_far(cells, o, table):
            break
        better_shifts(size, columns, cells, o.compensated, table)
    return lost


# --- small integers ---------------------------------------------------------------------------------------------------


@inline
def add_integer_rows(source, part, table):
    """Rows of a part to the sums of their columns; how many values of a cell that are."""
    geometry, params, holds = source.geometry, reserve(COLUMNS), reserve(HOLDS)
    clear(table, table.counts, 2 * table.pitch)  # a table of integers, where counts and shifts will be
    put_word(holds + HOLDS.rows, 0)
    put_word(holds + HOLDS.columns, part.columns)
    put_word(params + COLUMNS.squares, 1)
    put_word(params + COLUMNS.table, address(table.numbers, table.counts))
    put_word(params + COLUMNS.sums, address(table.numbers, table.sums))
    put_word(params + COLUMNS.rest, address(table.numbers, table.rest))
    put_word(params + COLUMNS.state, holds)
    r, n = part.first, 0
    while r < part.last:
        x_row, _, step, _, rows, left = rows_from(r, part.last, source)
        r += rows
        whole = rows - 1 if geometry.tail > 0 and rows == left else rows
        put_word(params + COLUMNS.x, address(source.raw, (part.at + x_row) * geometry.itemsize))
        put_word(params + COLUMNS.step, step)
        if whole > 0:
            put_word(params + COLUMNS.width, part.columns)
            enter(source.fetch, params, 0, 0, whole)
        n += whole * geometry.coalesced
        if whole < rows:
            put_word(params + COLUMNS.width, geometry.tail)
            enter(source.fetch, params, 0, whole, rows)
            n += geometry.tail // (geometry.channels * geometry.size)
    put_word(params + COLUMNS.width, part.columns)
    enter(source.fetch, params, 0, 0, 0)
    return n * geometry.size


@inline
def sums_of_integer_columns(source, part, cells, squares, o, table):
    """n, shift, A and B of each cell, exact; the shift is a whole number near the mean."""
    geometry, numbers, big = source.geometry, table.numbers, everywhere(BIG)
    clear(table, table.sums, part.columns)
    clear(table, table.rest, part.columns)
    count = add_integer_rows(source, part, table)
    if part.columns > cells:
        gather_columns(geometry, cells, o, table)
    fill_counts(float(count), cells, None, table)
    n, moved = everywhere(float(count)), everywhere(float(geometry.moved))
    for j in range(0, cells, LANES):
        a = load(numbers, table.sums + j, 64)
        if squares is not None:
            q = (a / n + big) - big
            a = a - q * n
            b = load(numbers, table.rest + j, 64) - q * (a + a + q * n)
            store(numbers, table.shifts + j, q - moved)
            store(numbers, table.rest + j, b)
        if squares is None:
            a = a - moved * n
        store(numbers, table.sums + j, a)


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
    thread, first, last, x, raw, fetch, integers, where, by_cell, options, geometry, dimensions, partials, workspace,
    merge, results,
):  # fmt: skip
    """A task is a tile of cells in a part of the rows; tiles of a row are neighbours."""
    o, source = options, Values(x, raw, fetch, where, geometry, dimensions)
    parts, channels, tile, pitch = geometry.parts, geometry.channels, geometry.tile, geometry.pitch
    tiles = -(-channels // tile)
    table, params = table_at(workspace, thread * geometry.own, pitch), merging(reserve(MERGE), results)
    for task in range(first, last):
        rest = task // tiles
        cell = (task - rest * tiles) * tile
        k = rest // parts
        cells = min(tile, channels - cell)
        at, w_at, o_at = kept_place(k, geometry, dimensions)
        r = (rest - k * parts) * geometry.rows_of_a_part
        part = RowRange(
            at + cell * geometry.size * geometry.step,
            w_at + cell * geometry.size if geometry.mask == OF_VALUES else w_at,
            r, min(r + geometry.rows_of_a_part, geometry.rows), geometry.coalesced * cells * geometry.size,
        )  # fmt: skip
        if sums_of(source, part, cells, o.squares, by_cell, o, integers, unless(integers, True), table):
            doubles(results.status)[CAREFUL] = 1.0
        if parts > 1:
            to = FIELDS * channels * rest + cell
            for f in range(FIELDS):
                for j in range(0, cells, LANES):
                    numbers = load(workspace, table.counts + f * pitch + j, 64)
                    put_values(partials, to + f * channels + j, numbers, min(LANES, cells - j))
        else:
            o_at += cell * geometry.kept_step
            merge_parts(merge, params, address(workspace, table.counts), pitch, 0, 1, cells, o_at, geometry.kept_step)
