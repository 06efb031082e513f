"""Channels-last arrays in slabs, as images without their border are: rows that do not all follow at one step.

Of each task, some slabs of a tile of columns, x being ``(far, near, outer, channel)``, in plain words::

    slabs, fours = x[task].reshape(-1, outer, columns), len(slabs) // 4
    for k in range(fours):                                    # four streams from memory; of gradients two
        for r in range(outer):
            add rows r of slabs k, k + fours, k + 2 * fours, k + 3 * fours to the sums of their columns
            every ROW_CHUNK rows: moments = merged(moments, moments_of(sums)), and the sums begin anew
    slabs[4 * fours:] one by one, each as a segment of `outer_reduction`: rows of its four quarters

The first rows of a task only tell a better shift, and are added up again. The formulas are those of `outer_reduction`
and `outer_gradients`, and so are cells, coalesced rows, tiles and chunks. The channels' numbers are spread over the
columns of a tile once for all slabs of a task.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.cells import (
    AHEAD,
    Quarters,
    clear_sums,
    fill,
    pitch_of,
    place_of_cell,
    places,
    quarters_of,
    results_of,
    spread_affine,
    spread_affine_again,
    spread_rounded,
    task_at,
)
from fastbn.cpu.kernels.common import (
    affine_table,
    around,
    finished_slabs,
    marked,
    merged,
    origin_of,
    rows_from,
    rows_of_slab,
    slab_at,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.outer_gradients import (
    Inputs,
    add_row,
    add_rows_of_two,
    inputs_from,
    move_sums,
    spread_hi_and_unit,
)
from fastbn.cpu.kernels.outer_input_gradients import Outputs, grad_input_rows, spread_all_linear
from fastbn.cpu.kernels.outer_reduction import (
    PEEK,
    TileCells,
    add_rows,
    better_shifts,
    merge_chunk,
    normalize_rows,
    some_shift_is_poor,
)
from fastbn.cpu.kernels.pointers import advance, table_rows
from fastbn.cpu.records import (
    Affine,
    ColumnMoments,
    ColumnSums,
    Distances,
    GradientParameters,
    Linear,
    MomentRows,
    Parameters,
    Rows,
    SegmentSums,
    Shape,
)
from fastbn.cpu.sizes import AFFINE, COLUMN_MOMENTS, COLUMN_SUMS, LINEAR, ORIGINS, ROW_CHUNK


@inline
def cells_of(shape, tiles):
    return shape.channel * tiles.coalesced


@inline
def rows_at(array, s, column, shape, tiles):
    """The rows of slab s, from a column on."""
    step = array.outer * tiles.coalesced
    return Rows(advance(array.values, slab_at(array, s, shape.near) + column), step, 2 * step)


@inline
def results_of_slabs(shape, tiles):
    """Where the sums of all tasks are."""
    return results_of(Shape(1, 1, 1, 1), shape.far * shape.near, cells_of(shape, tiles), tiles)


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def find_slab_origins(x, task, shape, out):
    """`common.origin_of` of the cells of a tile."""
    fill(out, task.cells, 0.0)
    for i in range(task.cells):
        out[i] = origin_of(rows_of_slab(x, (task.cell + i) % shape.channel, 0, shape), None, None, 0)


@inline
def moments_of_task(x, task, shape, tiles, cells, columns):
    """Mean - origin and M2 of each cell, as `outer_reduction.segment`: given are the origins.

    A chunk has rows of four slabs, of several four of them if they are short, or of the quarters of one.
    """
    lower_underflow_flag()
    fill(cells.mean, task.cells, 0.0)
    fill(cells.m2, task.cells, 0.0)
    for i in range(task.cells):
        cells.centre[i] = cells.origin[i]
    rows, fours = shape.outer // tiles.coalesced, (task.end - task.row) // 4
    together = max(1, ROW_CHUNK // 4 // rows)
    u, first, before, looks = task.row, 0, 0.0, 0
    while u < task.end:
        of_four = u < task.row + fours
        deep = rows if of_four else rows // 4
        count = min(ROW_CHUNK // 4 if looks > 0 else PEEK // 4, deep - first)
        rest = 0 if of_four or first + count < deep else rows % 4
        end = min(u + together, task.row + fours) if of_four else u + 1
        spread_rounded(x.values, cells.centre, task.cells, 1, columns.shift)
        clear_sums(task.cells, columns)
        for k in range(u, end):
            part = rows_from(rows_at(x, k, task.cell, shape, tiles), first, 0)
            quarters = quarters_of(part, rows // 4)
            if of_four:
                second = rows_at(x, k + fours, task.cell, shape, tiles)
                third = rows_at(x, k + 2 * fours, task.cell, shape, tiles)
                last = rows_at(x, k + 3 * fours, task.cell, shape, tiles)
                at = first * part.step
                quarters = Quarters(
                    part.values, advance(second.values, at), advance(third.values, at), advance(last.values, at)
                )
            add_rows(quarters, part.step, count, rest, task.cells, columns)
        n = np.float64((4 * count + rest) * (end - u))
        if looks == 0 or (looks == 1 and some_shift_is_poor(task.cells, n, columns, cells.mean)):
            better_shifts(task.cells, n, columns, cells, looks == 0)
            looks += 1
        else:
            merge_chunk(task.cells, before, n, columns, cells)
            before += n
            looks = 1
            first += count
            if first >= deep:
                first = 0
                u = end if end < task.row + fours or not of_four else task.row + 4 * fours
    if underflowed(cells.m2[0]):
        for j in range(task.cells):
            cells.m2[j] = marked(x.values, cells.m2[j])


@kernel
def moments_of_segments(thread, first, last, x, shape, tiles, partials, workspace):
    """Of each cell of each task, in ``partials``: the means, and all M2. Behind these each thread has two rows."""
    results, room = results_of_slabs(shape, tiles), places(tiles.width, tiles.width)
    pitch = pitch_of(tiles, 1)
    columns = table_rows(ColumnMoments, advance(workspace, thread * COLUMN_MOMENTS * pitch), pitch)
    own = advance(partials, 2 * results.together + thread * ORIGINS * room)
    for k in range(first, last):
        task = task_at(k, shape.far * shape.near, cells_of(shape, tiles), tiles)
        find_slab_origins(x, task, shape, own)
        mean = advance(partials, task.row // tiles.height * results.of_segment + place_of_cell(task.cell, tiles))
        cells = TileCells(own, advance(own, room), mean, advance(mean, results.together))
        moments_of_task(x, task, shape, tiles, cells, columns)


@kernel
def channel_moments(thread, first, last, x, shape, tiles, partials, table, eps):
    """Moments of every channel from those of its cells, into a table of `MomentRows`."""
    moments, cells = table_rows(MomentRows, table, shape.channel), cells_of(shape, tiles)
    results = results_of_slabs(shape, tiles)
    means, m2s = partials, advance(partials, results.together)
    for t in range(first, last):
        origin = origin_of(rows_of_slab(x, t, 0, shape), None, None, t)
        n, mean, m2 = 0.0, 0.0, 0.0
        for s in range(results.segments):
            slabs = min(tiles.height, shape.far * shape.near - s * tiles.height)
            count = np.float64(slabs * (shape.outer // tiles.coalesced))
            for j in range(t, cells, shape.channel):
                k = s * results.of_segment + place_of_cell(j, tiles)
                n, mean, m2 = merged(n, mean, m2, count, means[k], m2s[k])
        n, mean, m2, unit = finished_slabs(x, t, shape, n, mean, m2, origin)
        write_moments(moments, t, n, mean, m2, unit, eps)


# --- y ----------------------------------------------------------------------------------------------------------------


@kernel
def normalize(
    thread, first, last, x, y, residual, shape, tiles, table, eps, given_rstd, workspace, relu, nontemporal
):  # fmt: skip
    """As `outer_reduction.normalize`."""
    rows, channels, pitch = shape.outer // tiles.coalesced, shape.channel, pitch_of(tiles, 1)
    parameters = table_rows(Parameters, table, channels)
    affine = table_rows(Affine, advance(workspace, thread * AFFINE * pitch), pitch)
    for k in range(first, last):
        task = task_at(k, shape.far * shape.near, cells_of(shape, tiles), tiles)
        cell, cells = task.cell, task.cells
        spread_affine(x.values, parameters, 0, cell, channels, eps, given_rstd, cells, 1, affine)
        for s in range(task.row, task.end):
            normalize_rows(
                rows_at(x, s, cell, shape, tiles), rows_at(y, s, cell, shape, tiles),
                rows_at(residual, s, cell, shape, tiles), rows, cells, cells, affine, relu, nontemporal, AHEAD,
            )  # fmt: skip


# --- sums of gradients ------------------------------------------------------------------------------------------------


class GradientArrays(NamedTuple):
    """Those that gradients are made of; and of all columns an `Affine` where y is computed again, else None."""

    dy: Any
    x: Any
    y: Any
    affine: Any


@inline
def inputs_at(arrays, s, cell, shape, tiles):
    """Rows of slab s, without weights."""
    return Inputs(
        rows_at(arrays.dy, s, cell, shape, tiles), rows_at(arrays.x, s, cell, shape, tiles),
        rows_at(arrays.y, s, cell, shape, tiles), Rows(None, 0, 0), 0, arrays.affine,
    )  # fmt: skip


@inline
def sums_of_task(arrays, task, shape, tiles, found, sums):
    """sum(dz) and sum(dz * (x - hi) * unit) of each cell."""
    cells = task.cells
    fill(found.dz, cells, 0.0)
    fill(found.distance, cells, 0.0)
    clear_sums(cells, sums)
    rows, half = shape.outer // tiles.coalesced, (task.end - task.row) // 2
    s, first, pending = task.row, 0, 0
    while s < task.end:
        of_two = s < task.row + half
        deep = rows if of_two else rows // 2
        if pending >= ROW_CHUNK // 2:
            move_sums(cells, 1, sums, found)
            clear_sums(cells, sums)
            pending = 0
        count = min(deep - first, ROW_CHUNK // 2 - pending)
        near = inputs_at(arrays, s, task.cell, shape, tiles)
        far = inputs_from(inputs_at(arrays, s + half if of_two else s, task.cell, shape, tiles), 0 if of_two else deep)
        add_rows_of_two(inputs_from(near, first), inputs_from(far, first), count, cells, sums)
        first += count
        pending += count
        if first >= deep:
            if not of_two and rows % 2 > 0:
                add_row(near, rows - 1, cells, sums)
            first = 0
            s += 1 if s + 1 != task.row + half else half + 1
    move_sums(cells, 1, sums, found)


@kernel
def grad_sums_of_segments(thread, first, last, dy, x, y, shape, tiles, parameters, partials, workspace, affine):
    """A table of `SegmentSums` in ``partials``, of each cell of each task."""
    results, channels, pitch = results_of_slabs(shape, tiles), shape.channel, pitch_of(tiles, 1)
    given = table_rows(GradientParameters, parameters, channels)
    sums = table_rows(ColumnSums, advance(workspace, thread * COLUMN_SUMS * pitch), pitch)
    arrays = GradientArrays(dy, x, y, around(sums.hi, affine_table(affine, thread, pitch)))
    for k in range(first, last):
        task = task_at(k, shape.far * shape.near, cells_of(shape, tiles), tiles)
        spread_hi_and_unit(x.values, given, 0, task.cell, channels, task.cells, 1, sums)
        spread_affine_again(x.values, given, 0, task.cell, channels, task.cells, 1, arrays.affine)
        place = advance(partials, task.row // tiles.height * results.of_segment + place_of_cell(task.cell, tiles))
        sums_of_task(arrays, task, shape, tiles, table_rows(SegmentSums, place, results.together), sums)


# --- dx ---------------------------------------------------------------------------------------------------------------


@kernel
def grad_input(
    thread, first, last, dy, x, y, dx, dresidual, shape, tiles, parameters, distances, workspace, affine, nontemporal
):  # fmt: skip
    """As `outer_input_gradients.grad_input`."""
    rows, channels, pitch = shape.outer // tiles.coalesced, shape.channel, pitch_of(tiles, 1)
    given = table_rows(Distances, distances, channels)
    linear = table_rows(Linear, advance(workspace, thread * LINEAR * pitch), pitch)
    arrays = GradientArrays(dy, x, y, around(linear.hi, affine_table(affine, thread, pitch)))
    for k in range(first, last):
        task = task_at(k, shape.far * shape.near, cells_of(shape, tiles), tiles)
        cell, cells = task.cell, task.cells
        spread_all_linear(dy.values, given, 0, cell, channels, cells, 1, linear)
        if affine is not None:
            of_channel = table_rows(GradientParameters, parameters, channels)
            spread_affine_again(x.values, of_channel, 0, cell, channels, cells, 1, arrays.affine)
        for s in range(task.row, task.end):
            results = Outputs(rows_at(dx, s, cell, shape, tiles), rows_at(dresidual, s, cell, shape, tiles))
            inputs = inputs_at(arrays, s, cell, shape, tiles)
            grad_input_rows(inputs, results, rows, cells, cells, linear, nontemporal, AHEAD)
