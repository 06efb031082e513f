"""Sums along rows whose values are reduced: see `statistics`.

In plain words, for the values x of a part that count, and their weights w or ones::

    q = mean of eight of them                          # the shift; 0, and no b, where squares are not wanted
    n, a, b = w.sum(), (w * (x - q)).sum(), (w * (x - q)**2).sum()
    q, n, a, b = the same around q + a / n             # if a**2 / n is large beside b - a**2 / n, twice at most

Values go to four sums of eight lanes each, which go on from row to row of a part. What rows need next is prefetched; a
long row's quarters are read side by side.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.calls import doubles, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import LANES, everywhere, hidden, lane, only_if, prefetch_values, unless, value_at
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.integers import ROW, ROW_SUMS
from fastbn.cpu.kernels.pointers import address
from fastbn.cpu.kernels.statistics import (
    LOOKS,
    PEEKS,
    RowRange,
    Values,
    add,
    add_four,
    all_tallied,
    eight,
    fetched,
    is_far,
    kept_place,
    one_by_one,
    row_at,
    row_counts,
    rows_from,
    short,
    tallied,
    together,
    weight_by_row,
    weight_of_row,
)
from fastbn.cpu.kernels.statistics_results import MERGE, checks, merge_parts, merging
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import load as word_at
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.kernels.vectors import two_sum
from fastbn.cpu.statistics_sizes import BUFFER, FIELDS, OF_INNER, OF_VALUES
from fastbn.operands import CAREFUL

LONG_ROW = 6 << 10  # values of a row whose quarters take turns: up to a tenth faster than prefetching


class LaneSums(NamedTuple):
    """What values weigh that count one by one, in eight lanes; four times `statistics.add`'s sums."""

    n: Any
    a0: Any
    a1: Any
    a2: Any
    a3: Any
    b0: Any
    b1: Any
    b2: Any
    b3: Any


@inline
def total(a, b, squares, compensated):
    """The sums over the lanes."""
    s, rest = lane(a, 0), lane(b, 0)
    for k in range(1, LANES):
        if squares is None and compensated is not None:
            s, lost = two_sum(s, lane(a, k))
            rest += lost + lane(b, k)
        else:
            s += lane(a, k)
            rest += lane(b, k)
    return s, rest


@inline
def value_of(x, raw, source, at, workspace, buffer):
    """One value of either array."""
    number = 0.0
    if x is not None:
        number = value_at(x, at)
    if raw is not None:
        fetched(source, at, 1, workspace, buffer)
        number = value_at(workspace, buffer)
    return number


@inline
def peek(source, part, compensated, workspace, buffer):
    """The mean of some values of a part, for a shift; around the first that counts, so that it is that of constants."""
    geometry, columns, rows = source.geometry, part.columns, part.last - part.first
    bits = 3 if rows * columns >= 16 * PEEKS else 0
    origin, s, n = 0.0, 0.0, 0
    for k in range(1 << bits):
        column = k * columns >> bits  # from rows and columns all over: without divisions, which take as long as a row
        x_row, w_at = row_at(part.first + (k * rows >> bits), source)
        x_row += part.at + column * geometry.step
        w_at += part.w_at + (column if geometry.mask == OF_VALUES else 0)
        number = value_of(source.x, source.raw, source, x_row, workspace, buffer)
        if np.isfinite(number) and (geometry.mask == 0 or value_at(source.where, w_at) != 0.0):
            if n == 0:
                origin = number
            s += number - origin
            n += 1
    return short(origin + s / n, compensated) if n > 0 else 0.0


@inline
def add_each(s, e, q, squares, compensated):
    """Four times eight values to sums of their own, or to the first ones."""
    if compensated is not None and squares is None:
        a0, b0 = add_four(s.a0, s.b0, e, q, squares, compensated)
        return LaneSums(s.n, a0, s.a1, s.a2, s.a3, b0, s.b1, s.b2, s.b3)
    a0, b0 = add(s.a0, s.b0, e[0], q, squares, compensated)
    a1, b1 = add(s.a1, s.b1, e[1], q, squares, compensated)
    a2, b2 = add(s.a2, s.b2, e[2], q, squares, compensated)
    a3, b3 = add(s.a3, s.b3, e[3], q, squares, compensated)
    return LaneSums(s.n, a0, a1, a2, a3, b0, b1, b2, b3)


@inline
def add_row(x, source, at, w_at, columns, w, q, o, sums, in_memory):
    """A row of one weight, or of a mask's, to the sums; what is in memory behind it is prefetched."""
    n, a0, a1, a2, a3, b0, b1, b2, b3 = sums
    geometry = source.geometry
    far, jump, end = LANES, 4 * LANES, columns & -4 * LANES
    done = end
    if columns >= LONG_ROW:
        far, jump, end = columns // 4 & -LANES, LANES, columns // 4 & -LANES
        done = 4 * end
    i = 0
    while i < end:  # a range of unknown step would be counted by a division for each row
        if far == LANES:
            later = geometry.ahead + (geometry.skip if i >= geometry.turn else 0)
            prefetch_values(only_if(in_memory, x), at + i + later)
        e0 = eight(x, source, at + i, None, w_at + i, None, w, q, None, o)
        e1 = eight(x, source, at + i + far, None, w_at + i + far, None, w, q, None, o)
        e2 = eight(x, source, at + i + 2 * far, None, w_at + i + 2 * far, None, w, q, None, o)
        e3 = eight(x, source, at + i + 3 * far, None, w_at + i + 3 * far, None, w, q, None, o)
        n = all_tallied(n, (e0, e1, e2, e3), o)
        sums = add_each(LaneSums(n, a0, a1, a2, a3, b0, b1, b2, b3), (e0, e1, e2, e3), q, o.squares, o.compensated)
        n, a0, a1, a2, a3, b0, b1, b2, b3 = sums
        i += jump
    if done < columns:
        later = geometry.ahead + (geometry.skip if done >= geometry.turn else 0)
        prefetch_values(only_if(in_memory, x), at + done + later)
    for i in range(done, columns & -LANES, LANES):
        e = eight(x, source, at + i, None, w_at + i, None, w, q, None, o)
        n = tallied(n, e, o)
        a0, b0 = add(a0, b0, e, q, o.squares, o.compensated)
    i = columns & -LANES
    if i < columns:
        e = eight(x, source, at + i, None, w_at + i, None, w, q, columns - i, o)
        n = tallied(n, e, o)
        a1, b1 = add(a1, b1, e, q, o.squares, o.compensated)
    return LaneSums(n, a0, a1, a2, a3, b0, b1, b2, b3)


@inline
def add_any_row(x, raw, source, at, w_at, columns, w, q, o, sums, workspace, buffer):
    """`add_row` of either array."""
    if x is not None:
        sums = add_row(x, source, at, w_at, columns, w, q, o, sums, True)
    if raw is not None:
        for c in range(0, columns, BUFFER):
            some = min(BUFFER, columns - c)
            fetched(source, at + c * source.geometry.step, some, workspace, buffer)
            sums = add_row(workspace, source, buffer, w_at + c, some, w, q, o, sums, None)
    return sums


@inline
def sums_of_rows(source, part, shift, o, workspace, buffer):
    """n, A and B of a part."""
    q, zero = everywhere(shift), everywhere(0.0)
    sums = LaneSums(zero, zero, zero, zero, zero, zero, zero, zero, zero)
    r, n = part.first, 0.0
    while r < part.last:
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, part.last, source)
        r += rows
        x_row, w_row = part.at + x_row, part.w_at + w_row
        for _ in range(rows):
            if row_counts(source.where, w_row, source.geometry):
                weight = weight_of_row(source.where, w_row, weight_by_row(o))
                w = everywhere(weight)
                sums = add_any_row(
                    source.x, source.raw, source, x_row, w_row, part.columns, w, q, o, sums, workspace, buffer
                )
                n += weight * part.columns
            x_row += x_step
            w_row += w_step
    a0, b0 = together(sums.a0, sums.b0, sums.a1, sums.b1, o.squares, o.compensated)
    a2, b2 = together(sums.a2, sums.b2, sums.a3, sums.b3, o.squares, o.compensated)
    a0, b0 = together(a0, b0, a2, b2, o.squares, o.compensated)
    a, b = total(a0, b0, o.squares, o.compensated)
    return count_of(n, sums.n, one_by_one(o)), a, b


@inline
def sums_of_integers(source, part, squares):
    """n, shift, A and B of a part of small integers: exact, the shift being a whole number near the mean."""
    geometry, sums, params = source.geometry, reserve(ROW_SUMS), reserve(ROW)
    put_word(sums + ROW_SUMS.sum, 0)
    put_word(sums + ROW_SUMS.squares, 0)
    put_word(params + ROW.squares, 1)
    put_word(params + ROW.out, sums)
    put_word(params + ROW.ahead, geometry.ahead)
    put_word(params + ROW.turn, geometry.turn)
    put_word(params + ROW.skip, geometry.skip)
    r = part.first
    while r < part.last:
        x_row, _, x_step, _, rows, _ = rows_from(r, part.last, source)
        r += rows
        x_row += part.at
        for _ in range(rows):
            put_word(params + ROW.x, address(source.raw, x_row * geometry.itemsize))
            enter(source.fetch, params, 0, 0, part.columns)
            x_row += x_step
    n, q = (part.last - part.first) * part.columns, 0
    a, b = word_at(sums + ROW_SUMS.sum), word_at(sums + ROW_SUMS.squares)
    if squares is not None:
        q = (2 * a + n) // (2 * n)
        a -= q * n
        b -= q * (2 * a + q * n)
    if squares is None:
        a -= geometry.moved * n
    return float(n), float(q - geometry.moved), float(a), float(b)


@inline
def sums_around_a_shift(source, part, o, squares, workspace, buffer):
    """n, shift, A and B of a part, and whether squares underflowed."""
    # LLVM would choose a known number in place of NaNs after the conversion to float64: nanmean 0.9 times as fast.
    shift, n, a, b, lost = hidden(0.0), 0.0, 0.0, 0.0, False
    if squares is not None:
        shift = peek(source, part, o.compensated, workspace, buffer)
    for look in range(LOOKS):
        if checks(squares, o.compensated, o.weighted):
            lower_underflow_flag()
        n, a, b = sums_of_rows(source, part, shift, o, workspace, buffer)
        lost = checks(squares, o.compensated, o.weighted) and underflowed(b)
        if squares is None or n == 0.0 or look + 1 == LOOKS or not is_far(n, a, b, o):
            break
        shift = short(shift + a / n, o.compensated)
    return n, shift, a, b, lost


@inline
def sums_of(source, part, o, squares, integers, floats, workspace, buffer):
    """Of either."""
    n, shift, a, b, lost = 0.0, 0.0, 0.0, 0.0, False
    if integers is not None:
        n, shift, a, b = sums_of_integers(source, part, squares)
    if floats is not None:
        n, shift, a, b, lost = sums_around_a_shift(source, part, o, squares, workspace, buffer)
    return n, shift, a, b, lost


@inline
def count_of(of_rows, of_values, counts):
    """Whichever it is that counts."""
    if counts is None:
        return of_rows
    n = lane(of_values, 0)
    for k in range(1, LANES):
        n += lane(of_values, k)
    return n


@kernel
def inner(
    thread, first, last, x, raw, fetch, integers, where, options, geometry, dimensions, partials, workspace, merge,
    results,
):  # fmt: skip
    """A task is a part of a kept index: rows, or a piece of one. Results of up to eight are made at once."""
    o, source = options, Values(x, raw, fetch, where, geometry, dimensions)
    parts, pieces, columns = geometry.parts, geometry.pieces, geometry.columns
    own, params = thread * OF_INNER, merging(reserve(MERGE), results)
    buffer, table = own + FIELDS * LANES, address(workspace, own)
    waiting, first_at, last_at, step = 0, 0, 0, 1
    for task in range(first, last):
        t, k = task, 0
        if parts > 1:
            t = task // parts
            k = task - t * parts
        at, w_at, o_at = kept_place(t, geometry, dimensions)
        r, width = k * geometry.rows_of_a_part, columns
        end = min(r + geometry.rows_of_a_part, geometry.rows)
        if pieces > 1:
            r = k // pieces
            end, start = r + 1, (k - r * pieces) * geometry.piece
            width = min(geometry.piece, columns - start)
            at += start * geometry.step
            w_at += start if geometry.mask == OF_VALUES else 0
        part = RowRange(at, w_at, r, end, width)
        n, shift, a, b, lost = sums_of(source, part, o, o.squares, integers, unless(integers, True), workspace, buffer)
        if lost:
            doubles(results.status)[CAREFUL] = 1.0
        if parts > 1:
            put_part(partials, FIELDS * task, 1, n, shift, a, b)
            continue
        if (waiting > 0 and o_at - last_at != step and waiting > 1) or waiting == LANES:
            merge_parts(merge, params, table, LANES, 0, 1, waiting, first_at, step)
            waiting = 0
        put_part(workspace, own + waiting, LANES, n, shift, a, b)
        if waiting == 0:
            first_at = o_at
        step, last_at, waiting = o_at - last_at, o_at, waiting + 1
    if waiting > 0:
        merge_parts(merge, params, table, LANES, 0, 1, waiting, first_at, step)


@inline
def put_part(to, at, pitch, n, shift, a, b):
    to[at], to[at + pitch], to[at + 2 * pitch], to[at + 3 * pitch] = n, shift, a, b
