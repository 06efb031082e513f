"""Sums along rows of kept indices: see `statistics`.

Each column has its sums in a thread's workspace, which stays in the first-level cache; four rows are added at once. A
*cell* is a kept index: one column, or ``size`` neighbouring ones, or several where rows of few kept indices are taken
together, ``fold`` of them; then the sums of a cell's columns are added up in the end.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    both,
    bytes_not_zero,
    choose,
    everywhere,
    finite,
    first_bytes_not_zero,
    first_values,
    greater,
    not_nan,
    put_values,
    shortened,
    values,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import any_greater, load, store
from fastbn.cpu.kernels.statistics import (
    FAR,
    FAR_OF_FLOATS,
    LOOKS,
    PEEKS,
    add,
    fetched,
    field,
    mask_of,
    merge_parts,
    place,
    row_counts,
    rows_from,
    short,
    two_sum,
)
from fastbn.cpu.statistics import (
    CAREFUL,
    CHANNELS,
    DIMENSIONS,
    FIELDS,
    FOLD,
    KEPT_DIMENSIONS,
    KEPT_STEP,
    MASK,
    OF_VALUES,
    PARTS,
    ROWS,
    ROWS_OF_A_PART,
    SIZE,
    STEP,
    TAIL,
    TILE,
    WIDTH,
)


@inline
def add_to_columns(workspace, at, pitch, v, q, squares, exact):
    """Values to the sums of their columns."""
    a = load(workspace, at + 2 * pitch, 64)
    if squares is None and exact is None:
        store(workspace, at + 2 * pitch, a + v)
    else:
        a, b = add(a, load(workspace, at + 3 * pitch, 64), v, q, squares, exact)
        store(workspace, at + 2 * pitch, a)
        store(workspace, at + 3 * pitch, b)


@inline
def add_one_row(x, at, where, w_at, by, masked, skip_nan, squares, exact, columns, workspace, own, pitch):
    """A row to the sums of its columns, and to their counts if there are masks."""
    for c in range(0, columns, LANES):
        q = field(workspace, own + pitch + c, squares)
        if c + LANES <= columns:
            v = values(x, at + c, None)
            mask = not_nan(bytes_not_zero(where, w_at + c * by), v, skip_nan, masked)
            v = choose(mask, v, q)
        else:
            v = first_values(x, at + c, None, columns - c)
            mask = not_nan(first_bytes_not_zero(where, w_at + c * by, columns - c), v, skip_nan, masked)
            v = choose(mask, v, q)
        if masked is not None:
            one = choose(mask, everywhere(1.0), everywhere(0.0))
            store(workspace, own + c, load(workspace, own + c, 64) + one)
        add_to_columns(workspace, own + c, pitch, v, q, squares, exact)


@inline
def add_four(x, at, far, squares, exact, workspace, own, pitch, part):
    """Eight columns, or a part of them, of four rows, each ``far`` from the one before."""
    q = field(workspace, own + pitch, squares)
    a = load(workspace, own + 2 * pitch, 64)
    b = a
    if squares is not None or exact is not None:
        b = load(workspace, own + 3 * pitch, 64)
    for k in range(4):
        if part is None:
            v = values(x, at + k * far, None)
        else:
            v = choose(first_bytes_not_zero(None, 0, part), first_values(x, at + k * far, None, part), q)
        a, b = add(a, b, v, q, squares, exact)
    store(workspace, own + 2 * pitch, a)
    if squares is not None or exact is not None:
        store(workspace, own + 3 * pitch, b)


@inline
def add_four_rows(x, at, far, squares, exact, columns, workspace, own, pitch):
    whole = columns & -LANES
    for c in range(0, whole, LANES):
        add_four(x, at + c, far, squares, exact, workspace, own + c, pitch, None)
    if whole < columns:
        add_four(x, at + whole, far, squares, exact, workspace, own + whole, pitch, columns - whole)


@inline
def add_rows(
    x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, workspace, own, pitch
):
    """Rows from r to last to the sums of their columns; how many values a cell has of them, if there are no masks."""
    mask, by, skip_nan = mask_of(where, ones, geometry)
    buffer = own + FIELDS * pitch
    n = 0
    while r < last:
        x_row, w_row, x_step, w_step, rows, left = rows_from(r, last, geometry)
        x_row, w_row = at + x_row, w_at + w_row
        r += rows
        whole = rows - 1 if geometry[TAIL] > 0 and rows == left else rows  # the last one of folded rows may be short
        done = 0
        if x is not None and masked is None:
            quarter = whole // 4
            for k in range(quarter):
                add_four_rows(x, x_row + k * x_step, quarter * x_step, squares, exact, columns, workspace, own, pitch)
            done = 4 * quarter
        for k in range(done, rows):
            width, w_k = columns if k < whole else geometry[TAIL], w_row + k * w_step
            if row_counts(where, w_k, geometry):
                if x is not None:
                    add_one_row(
                        x, x_row + k * x_step, mask, w_k * by, by, masked, skip_nan, squares, exact, width,
                        workspace, own, pitch,
                    )  # fmt: skip
                if raw is not None:
                    fetched(raw, fetch, x_row + k * x_step, geometry[STEP], width, geometry, workspace, buffer)
                    add_one_row(
                        workspace, buffer, mask, w_k * by, by, masked, skip_nan, squares, exact, width, workspace, own,
                        pitch,
                    )  # fmt: skip
                n += geometry[FOLD] if k < whole else geometry[TAIL] // (geometry[CHANNELS] * geometry[SIZE])
        n += done * geometry[FOLD]
    return np.float64(n * geometry[SIZE])


@inline
def peek_at_row(x, at, where, w_at, by, masked, width, first, workspace, own, pitch):
    """A row to the sums around the first values that count in each column, and to their counts."""
    zero, one = everywhere(0.0), everywhere(1.0)
    for c in range(0, width, LANES):
        part = min(LANES, width - c)
        v = choose(first_bytes_not_zero(None, 0, part), first_values(x, at + c, None, part), zero)
        counts = both(finite(v), first_bytes_not_zero(where, w_at + c * by, part))
        if first and masked is None:
            store(workspace, own + pitch + c, choose(counts, v, zero))
        else:
            n, q = load(workspace, own + c, 64), load(workspace, own + pitch + c, 64)
            if masked is not None:
                q = choose(both(counts, greater(one, n)), v, q)
                store(workspace, own + pitch + c, q)
            d = choose(counts, v - q, zero)
            store(workspace, own + 2 * pitch + c, load(workspace, own + 2 * pitch + c, 64) + d)
            store(workspace, own + c, n + choose(counts, one, zero))


@inline
def peek_at_columns(
    x, raw, fetch, at, where, ones, w_at, masked, exact, geometry, r, last, columns, cells, workspace, own, pitch
):
    """A shift for each column, the same for all of a cell, from some rows of a part; their sums are used meanwhile."""
    buffer = own + FIELDS * pitch
    mask, by, _ = mask_of(where, ones, geometry)
    clear(workspace, own, columns)
    clear(workspace, own + pitch, columns)
    clear(workspace, own + 2 * pitch, columns)
    count = min(PEEKS, max(1, (last - r) >> (4 if exact is None else 2)))
    for k in range(count):
        row, w_row, _, _, _, left = rows_from(r + k * (last - r) // count, last, geometry)
        w_row += w_at
        width = geometry[TAIL] if geometry[TAIL] > 0 and left == 1 else columns
        if row_counts(where, w_row, geometry):
            if x is not None:
                peek_at_row(x, at + row, mask, w_row * by, by, masked, width, k == 0, workspace, own, pitch)
            if raw is not None:
                fetched(raw, fetch, at + row, geometry[STEP], width, geometry, workspace, buffer)
                peek_at_row(workspace, buffer, mask, w_row * by, by, masked, width, k == 0, workspace, own, pitch)
    for c in range(0, columns, LANES):
        n, q = load(workspace, own + c, 64), load(workspace, own + pitch + c, 64)
        if masked is None:
            n = n + everywhere(1.0)
        mu = q + load(workspace, own + 2 * pitch + c, 64) / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        store(workspace, own + pitch + c, shortened(mu, exact))
    if cells < columns:
        of_first = geometry[SIZE] if geometry[FOLD] == 1 else 1
        for j in range(cells):
            origin, s = workspace[own + pitch + j * geometry[SIZE]], 0.0
            for i in range(of_first):
                s += workspace[own + pitch + j * geometry[SIZE] + i] - origin
            workspace[own + 2 * pitch + j] = short(origin + s / of_first, exact)
        spread_shifts(geometry, columns, cells, workspace, own, pitch)


@inline
def spread_shifts(geometry, columns, cells, workspace, own, pitch):
    """The shift of each cell, from where its sum stands, to all of its columns."""
    size = geometry[SIZE]
    j, c = 0, 0
    while c < columns:
        q = workspace[own + 2 * pitch + j]
        for i in range(c, c + size):
            workspace[own + pitch + i] = q
        c += size
        j = j + 1 if j + 1 < cells else 0


@inline
def gather_columns(geometry, columns, cells, squares, exact, masked, workspace, own, pitch):
    """The sums of each cell's columns, moved side by side."""
    size, folds = geometry[SIZE], geometry[FOLD]
    for j in range(0, cells, LANES):
        n, a = everywhere(0.0), everywhere(0.0)
        b = n
        for k in range(folds):
            for i in range(size):
                at = own + (k * cells + j) * size + i
                v = values(workspace, at + 2 * pitch, size)
                if masked is not None:
                    n = n + values(workspace, at, size)
                if squares is not None:
                    a, b = a + v, b + values(workspace, at + 3 * pitch, size)
                elif exact is not None:
                    a, lost = two_sum(a, v)
                    b = b + (lost + values(workspace, at + 3 * pitch, size))
                else:
                    a = a + v
        if masked is not None:
            store(workspace, own + j, n)
        if squares is not None:
            store(workspace, own + pitch + j, values(workspace, own + pitch + j * size, size))
        store(workspace, own + 2 * pitch + j, a)
        if squares is not None or exact is not None:
            store(workspace, own + 3 * pitch + j, b)


@inline
def some_are_far(cells, exact, workspace, own, pitch):
    """`is_far` of any cell. The lanes behind the last one hold sums of other columns."""
    limit = everywhere(FAR if exact is not None else FAR_OF_FLOATS)
    found = False
    for j in range(0, cells, LANES):
        n, a = load(workspace, own + j, 64), load(workspace, own + 2 * pitch + j, 64)
        between = a * a / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        m2 = load(workspace, own + 3 * pitch + j, 64) - between
        cell = first_bytes_not_zero(None, 0, min(LANES, cells - j))
        between = choose(finite(between), between, everywhere(-1.0))
        if any_greater(choose(cell, between, everywhere(-1.0)), choose(cell, limit * m2, everywhere(0.0))):
            found = True
    return found


@inline
def better_shifts(exact, geometry, columns, cells, workspace, own, pitch):
    """The mean of each cell, for another look."""
    for j in range(cells):
        q, n, a = workspace[own + pitch + j], workspace[own + j], workspace[own + 2 * pitch + j]
        better = short(q + a / n, exact)
        workspace[own + 2 * pitch + j] = better if n > 0.0 and np.isfinite(better) else q
    spread_shifts(geometry, columns, cells, workspace, own, pitch)


@inline
def clear(workspace, at, count):
    for c in range(0, count, LANES):
        store(workspace, at + c, everywhere(0.0))


@inline
def sums_of_columns(
    x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, cells, workspace, own,
    pitch,
):  # fmt: skip
    """n, shift, A and B of each cell, side by side in ``workspace``, a pitch apart; whether squares underflowed."""
    lost = False
    if squares is not None:
        peek_at_columns(
            x, raw, fetch, at, where, ones, w_at, masked, exact, geometry, r, last, columns, cells, workspace, own,
            pitch,
        )  # fmt: skip
    for look in range(LOOKS):
        if masked is not None:
            clear(workspace, own, columns)
        lower_underflow_flag()
        clear(workspace, own + 2 * pitch, columns)
        if squares is not None or exact is not None:
            clear(workspace, own + 3 * pitch, columns)
        n = add_rows(
            x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, workspace, own,
            pitch,
        )  # fmt: skip
        lost = exact is not None and squares is not None and underflowed(workspace[own + 3 * pitch])
        if columns > cells:
            gather_columns(geometry, columns, cells, squares, exact, masked, workspace, own, pitch)
        if masked is None:
            for j in range(0, cells, LANES):
                store(workspace, own + j, everywhere(n))
        if squares is None or look + 1 == LOOKS or not some_are_far(cells, exact, workspace, own, pitch):
            break
        better_shifts(exact, geometry, columns, cells, workspace, own, pitch)
    return lost


@kernel
def outer(
    thread, first, last, x, raw, fetch, where, ones, masked, squares, exact, geometry, partials, workspace,
    count, mean, spread, ddof, status,
):  # fmt: skip
    """A task is a tile of cells in a part of the rows; tiles of a row are neighbours."""
    parts, channels, tile, pitch = geometry[PARTS], geometry[CHANNELS], geometry[TILE], geometry[WIDTH]
    tiles = -(-channels // tile)
    own = thread * (FIELDS + 1) * pitch
    for task in range(first, last):
        rest = task // tiles
        cell = (task - rest * tiles) * tile
        k = rest // parts
        part = rest - k * parts
        cells = min(tile, channels - cell)
        columns = geometry[FOLD] * cells * geometry[SIZE]
        at, w_at, o_at = place(k, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
        r = part * geometry[ROWS_OF_A_PART]
        at += cell * geometry[SIZE] * geometry[STEP]
        w_at += cell * geometry[SIZE] if geometry[MASK] == OF_VALUES else 0
        lost = sums_of_columns(
            x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry,
            r, min(r + geometry[ROWS_OF_A_PART], geometry[ROWS]), columns, cells, workspace, own, pitch,
        )  # fmt: skip
        if lost:
            status[CAREFUL] = 1.0
        if parts > 1:
            to = FIELDS * channels * (k * parts + part) + cell
            for f in range(FIELDS):
                for j in range(0, cells, LANES):
                    numbers = load(workspace, own + f * pitch + j, 64)
                    put_values(partials, to + f * channels + j, numbers, min(LANES, cells - j))
        else:
            merge_parts(
                workspace, own, pitch, 0, 1, cells, squares, exact, geometry, count, mean, spread,
                o_at + cell * geometry[KEPT_STEP], ddof, status,
            )  # fmt: skip
