"""Sums along rows whose values are reduced: see `statistics`.

A row's quarters are read side by side if it is long; its values go to four sums of eight lanes each, which go on from
row to row of a part.
"""

import numpy as np

from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    bytes_not_zero,
    choose,
    everywhere,
    first_bytes_not_zero,
    first_values,
    how_many,
    lane,
    not_nan,
    value_at,
    values,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.statistics import (
    LOOKS,
    PEEKS,
    add,
    fetched,
    is_far,
    mask_of,
    merge_parts,
    place,
    row_at,
    row_counts,
    rows_from,
    short,
    two_sum,
)
from fastbn.cpu.statistics import (
    BUFFER,
    CAREFUL,
    COLUMNS,
    DIMENSIONS,
    FIELDS,
    KEPT_DIMENSIONS,
    MASK,
    OF_INNER,
    OF_VALUES,
    PARTS,
    PIECE,
    PIECES,
    ROWS,
    ROWS_OF_A_PART,
    STEP,
)

LONG = 4096  # values of a row from which its quarters are read side by side: up to twice as fast as one stream


@inline
def counted(x, at, where, w_at, masked, skip_nan, shift):
    """Eight values, those that do not count replaced by the shift; how many count."""
    v = values(x, at, None)
    mask = not_nan(bytes_not_zero(where, w_at), v, skip_nan, masked)
    return choose(mask, v, shift), how_many(mask)


@inline
def first_counted(x, at, where, w_at, masked, skip_nan, shift, n):
    """The same of the first n."""
    v = first_values(x, at, None, n)
    mask = not_nan(first_bytes_not_zero(where, w_at, n), v, skip_nan, masked)
    return choose(mask, v, shift), how_many(mask)


@inline
def total(a, b, squares, exact):
    """The sums over the lanes."""
    s, rest = lane(a, 0), lane(b, 0)
    for k in range(1, LANES):
        if squares is None and exact is not None:
            s, lost = two_sum(s, lane(a, k))
            rest += lost + lane(b, k)
        else:
            s += lane(a, k)
            rest += lane(b, k)
    return s, rest


@inline
def together(a, b, more_a, more_b, squares, exact):
    """Sums of vectors."""
    if squares is None and exact is not None:
        s, lost = two_sum(a, more_a)
        return s, lost + (b + more_b)
    return a + more_a, b + more_b


@inline
def value_of(x, raw, fetch, at, geometry, workspace, buffer):
    """One value of either array."""
    number = 0.0
    if x is not None:
        number = value_at(x, at)
    if raw is not None:
        fetched(raw, fetch, at, 1, 1, geometry, workspace, buffer)
        number = value_at(workspace, buffer)
    return number


@inline
def peek(x, raw, fetch, at, where, w_at, exact, geometry, r, rows, columns, workspace, buffer):
    """The mean of some values of a part, for a shift; around the first that counts, so that it is that of constants."""
    size = rows * columns
    count = min(PEEKS, max(1, size >> 4))
    origin, s, n = 0.0, 0.0, 0
    for k in range(count):
        i = k * size // count if k > 0 else 0
        row = i // columns if rows > 1 else 0
        x_at, w_k = at + (i - row * columns) * geometry[STEP], w_at
        if geometry[MASK] == OF_VALUES:
            w_k += i - row * columns
        if row > 0:
            here, there = row_at(r + row, geometry), row_at(r, geometry)
            x_at += here[0] - there[0]
            w_k += here[1] - there[1]
        number = value_of(x, raw, fetch, x_at, geometry, workspace, buffer)
        if np.isfinite(number) and (geometry[MASK] == 0 or value_at(where, w_k) != 0.0):
            if n == 0:
                origin = number
            s += number - origin
            n += 1
    return short(origin + s / n, exact) if n > 0 else 0.0


@inline
def add_row(x, at, columns, where, w_at, by, masked, skip_nan, squares, exact, q, n, a0, a1, a2, a3, b0, b1, b2, b3):
    """A row to four sums of eight lanes each, and to the count."""
    far, jump, end = LANES, 4 * LANES, columns & -4 * LANES
    done = end
    if columns >= LONG:
        far, jump, end = columns // 4 & -LANES, LANES, columns // 4 & -LANES
        done = 4 * end
    i = 0
    while i < end:  # a range of unknown step would be counted by a division for each row
        v, c = counted(x, at + i, where, w_at + i * by, masked, skip_nan, q)
        a0, b0 = add(a0, b0, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + far, where, w_at + (i + far) * by, masked, skip_nan, q)
        a1, b1 = add(a1, b1, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + 2 * far, where, w_at + (i + 2 * far) * by, masked, skip_nan, q)
        a2, b2 = add(a2, b2, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + 3 * far, where, w_at + (i + 3 * far) * by, masked, skip_nan, q)
        a3, b3 = add(a3, b3, v, q, squares, exact)
        n += c
        i += jump
    for i in range(done, columns & -LANES, LANES):
        v, c = counted(x, at + i, where, w_at + i * by, masked, skip_nan, q)
        a0, b0 = add(a0, b0, v, q, squares, exact)
        n += c
    i = columns & -LANES
    if i < columns:
        v, c = first_counted(x, at + i, where, w_at + i * by, masked, skip_nan, q, columns - i)
        a1, b1 = add(a1, b1, v, q, squares, exact)
        n += c
    return n, a0, a1, a2, a3, b0, b1, b2, b3


@inline
def sums_of_rows(
    x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, shift, workspace, buffer
):
    """n, A and B of rows from r to last. `at` and `w_at` are where row 0 begins."""
    q = everywhere(shift)
    a0 = everywhere(0.0)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    mask, by, skip_nan = mask_of(where, ones, geometry)
    n = 0
    while r < last:
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, last, geometry)
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for _ in range(rows):
            if row_counts(where, w_row, geometry):
                if x is not None:
                    n, a0, a1, a2, a3, b0, b1, b2, b3 = add_row(
                        x, x_row, columns, mask, w_row * by, by, masked, skip_nan, squares, exact,
                        q, n, a0, a1, a2, a3, b0, b1, b2, b3,
                    )  # fmt: skip
                if raw is not None:
                    for c in range(0, columns, BUFFER):
                        part = min(BUFFER, columns - c)
                        fetched(
                            raw, fetch, x_row + c * geometry[STEP], geometry[STEP], part, geometry, workspace, buffer
                        )
                        n, a0, a1, a2, a3, b0, b1, b2, b3 = add_row(
                            workspace, buffer, part, mask, (w_row + c) * by, by, masked, skip_nan, squares, exact,
                            q, n, a0, a1, a2, a3, b0, b1, b2, b3,
                        )  # fmt: skip
            x_row += x_step
            w_row += w_step
    a0, b0 = together(a0, b0, a1, b1, squares, exact)
    a2, b2 = together(a2, b2, a3, b3, squares, exact)
    a0, b0 = together(a0, b0, a2, b2, squares, exact)
    a, b = total(a0, b0, squares, exact)
    return np.float64(n), a, b


@kernel
def inner(
    thread, first, last, x, raw, fetch, where, ones, masked, squares, exact, geometry, partials, workspace,
    count, mean, spread, ddof, status,
):  # fmt: skip
    """A task is a part of a kept index: rows, or a piece of one."""
    parts, pieces, columns = geometry[PARTS], geometry[PIECES], geometry[COLUMNS]
    own = thread * OF_INNER
    buffer = own + FIELDS * LANES
    for task in range(first, last):
        t, part = task, 0
        if parts > 1:
            t = task // parts
            part = task - t * parts
        at, w_at, o_at = place(t, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
        r, width = part * geometry[ROWS_OF_A_PART], columns
        end = min(r + geometry[ROWS_OF_A_PART], geometry[ROWS])
        if pieces > 1:
            r = part // pieces
            end, start = r + 1, (part - r * pieces) * geometry[PIECE]
            width = min(geometry[PIECE], columns - start)
            at += start * geometry[STEP]
            w_at += start if geometry[MASK] == OF_VALUES else 0
        shift = 0.0
        if squares is not None:
            x_row, w_row = row_at(r, geometry)
            shift = peek(
                x, raw, fetch, at + x_row, where, w_at + w_row, exact, geometry, r, end - r, width, workspace, buffer
            )
        n, a, b, lost = 0.0, 0.0, 0.0, False
        for look in range(LOOKS):
            lower_underflow_flag()
            n, a, b = sums_of_rows(
                x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, end, width, shift,
                workspace, buffer,
            )  # fmt: skip
            lost = exact is not None and squares is not None and underflowed(b)
            if squares is None or n == 0.0 or look + 1 == LOOKS or not is_far(n, a, b, exact):
                break
            shift = short(shift + a / n, exact)
        if lost:
            status[CAREFUL] = 1.0
        if parts > 1:
            partials[FIELDS * task], partials[FIELDS * task + 1] = n, shift
            partials[FIELDS * task + 2], partials[FIELDS * task + 3] = a, b
        else:
            workspace[own], workspace[own + LANES], workspace[own + 2 * LANES], workspace[own + 3 * LANES] = (
                n,
                shift,
                a,
                b,
            )
            merge_parts(
                workspace, own, LANES, 0, 1, 1, squares, exact, geometry, count, mean, spread, o_at, ddof, status
            )
