"""Gradients across memory, for what `outer_reduction` takes: sums of dz; dx is made by `outer_input_gradients`.

For each channel c, and each batch index if the batch is kept, with x, dy and y as (outer, inner) of the channel, and
weights w: one of each row, which all channels share, or one of each row and column:

    dz = np.where(y <= 0, 0, dy)                       # or dy, without relu; this is the residual's gradient
                                                       # without a residual y may be computed of x again: S bytes less
    xhat = (x - mean) * rstd
    dbeta, dgamma = dz.sum(), (dz * xhat).sum()
    dx = gamma * rstd * (dz - w / n * (dbeta + xhat * dgamma))
    dx += w / n * (dmean + 2 * dvar * (x - mean))      # what comes back through the moments themselves
    dx = gamma * rstd * dz                             # instead, if the statistics are frozen

Cells, coalesced rows, chunks and segments are those of `outer_reduction`, units and what is relative to the rounded
mean that of `inner_gradients`. A chunk has as many rows of both halves of the segment: four streams from memory.

Bytes moved, S = the bytes of x: 2S.
"""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.cells import (
    affine_at,
    cell_totals,
    clear_sums,
    fill,
    in_float64,
    part_of,
    pitch_of,
    place_of_cell,
    repeat,
    results_of,
    rows_of_tile,
    spread,
    spread_affine_again,
    store_part,
    task_at,
)
from fastbn.cpu.kernels.common import (
    FULL,
    SINGLE,
    affine_again,
    affine_table,
    around,
    dgamma_of,
    relu_gradient,
    rows_from,
    rows_of,
    write_distances,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.pointers import advance, table_rows, value
from fastbn.cpu.kernels.simd import (
    converted,
    fma,
    lanes,
    load,
    load_first,
    rounded,
    splat,
    store,
    total,
    unit_of,
    zero_where_uncounted,
)
from fastbn.cpu.records import Affine, ColumnSums, Distances, GradientParameters, SegmentSums, Sums
from fastbn.cpu.sizes import COLUMN_SUMS, ROW_CHUNK


class Inputs(NamedTuple):
    """Rows of a tile; weights of a row are ``across`` apart, which is 0 where columns share one.

    Where y is computed again there is a table of `Affine` for all columns, else None.
    """

    dy: Any
    x: Any
    y: Any
    weight: Any
    across: Any
    affine: Any


@inline
def inputs_from(inputs, row):
    """What is left of them from a row on."""
    return Inputs(
        rows_from(inputs.dy, row, 0), rows_from(inputs.x, row, 0), rows_from(inputs.y, row, 0),
        rows_from(inputs.weight, row, 0), inputs.across, inputs.affine,
    )  # fmt: skip


# --- sums -------------------------------------------------------------------------------------------------------------


@inline
def dz_at(inputs, row, c, part):
    """A vector of dz, or its first lanes."""
    dy = part_of(inputs.dy.values, row * inputs.dy.step + c, part)
    y = part_of(inputs.y.values, row * inputs.y.step + c, part)
    x = part_of(inputs.x.values, row * inputs.x.step + c, part)
    return relu_gradient(inputs.dy.values, dy, y, x, affine_at(inputs.affine, c))


@inline
def own_weights(weight, at, part, like):
    """A vector of weights from a place on, or its first lanes, in the type of a vector."""
    return converted(load(weight, at, like) if part is None else load_first(weight, at, part, like), like)


@inline
def first_weight(inputs, row):
    """In all lanes: that of the row, if its columns share one."""
    return splat(inputs.dy.values, value(inputs.weight.values, row * inputs.weight.step), FULL)


@inline
def weight_at(inputs, row, c, part, shared, like):
    """The weights of a vector of columns, or its first lanes."""
    if inputs.across == 0:
        return shared
    return own_weights(inputs.weight.values, row * inputs.weight.step + c, part, like)


@inline
def distance_at(inputs, row, c, part, shared, dz, hi, unit):
    """A vector of (x - hi) * unit, or its first lanes; 0 where neither weight nor dz counts the element."""
    x = part_of(inputs.x.values, row * inputs.x.step + c, part)
    return zero_where_uncounted(weight_at(inputs, row, c, part, shared, dz), dz, (x - hi) * unit)


@inline
def add_two_rows(near, far, row, near_weight, far_weight, part, sums, c):
    """Add one vector of columns, or a part, of a row of each to the sums."""
    hi, unit = load(sums.hi, c, FULL), load(sums.unit, c, FULL)
    dz, far_dz = dz_at(near, row, c, part), dz_at(far, row, c, part)
    distance = distance_at(near, row, c, part, near_weight, dz, hi, unit)
    far_distance = distance_at(far, row, c, part, far_weight, far_dz, hi, unit)
    store(sums.s1, c, load(sums.s1, c, FULL) + (dz + far_dz))  # behind all loads of x: LLVM would repeat those
    store(sums.s2, c, load(sums.s2, c, FULL) + fma(dz, distance, far_dz * far_distance))


@inline
def add_rows_of_two(near, far, rows, columns, sums):
    """Add so many rows of each to the sums."""
    n = lanes(near.x.values, FULL)
    whole = columns - columns % n
    for r in range(rows):
        near_weight, far_weight = first_weight(near, r), first_weight(far, r)
        for c in range(0, whole, n):
            add_two_rows(near, far, r, near_weight, far_weight, None, sums, c)
        if whole < columns:
            add_two_rows(near, far, r, near_weight, far_weight, columns - whole, sums, whole)


@inline
def add_row(inputs, row, columns, sums):
    """Add one row to the sums, by parts of vectors."""
    weight = first_weight(inputs, row)
    for c in range(0, columns, lanes(inputs.x.values, FULL)):
        dz = dz_at(inputs, row, c, columns - c)
        hi, unit = load(sums.hi, c, FULL), load(sums.unit, c, FULL)
        distance = distance_at(inputs, row, c, columns - c, weight, dz, hi, unit)
        store(sums.s1, c, load(sums.s1, c, FULL) + dz)
        store(sums.s2, c, fma(dz, distance, load(sums.s2, c, FULL)))


@inline
def move_sums(cells, size, sums, found):
    """What was added up of columns, to that of their cells, in float64."""
    cell_totals(sums.s1, cells, size, found.dz)
    cell_totals(sums.s2, cells, size, found.dz)
    for j in range(0, cells, lanes(found.dz, FULL)):
        store(found.dz, j, load(found.dz, j, FULL) + in_float64(sums.s1, j, found.dz))
        store(found.distance, j, load(found.distance, j, FULL) + in_float64(sums.s2, j, found.dz))


@inline
def segment_grad_sums(inputs, rows, cells, size, found, sums):
    """sum(dz) and sum(dz * (x - hi) * unit) of each cell of one segment, with hi and unit of its columns."""
    columns, half = cells * size, rows // 2
    fill(found.dz, cells, 0.0)
    fill(found.distance, cells, 0.0)
    for first in range(0, max(1, half), ROW_CHUNK // 2):
        clear_sums(columns, sums)
        end = min(first + ROW_CHUNK // 2, half)
        add_rows_of_two(inputs_from(inputs, first), inputs_from(inputs, half + first), end - first, columns, sums)
        if rows % 2 > 0 and end == half:
            add_row(inputs, rows - 1, columns, sums)
        move_sums(cells, size, sums, found)


@inline
def write_hi_and_unit(x, given, t, count, sums):
    """Of ``count`` indices from t on, a column each; up to whole vectors are written."""
    n = lanes(given.mean, FULL)
    for i in range(0, count, n):
        mean = load_first(given.mean, t + i, min(n, count - i), FULL)
        rstd = load_first(given.rstd, t + i, min(n, count - i), FULL)
        hi = load(sums.hi, i, mean)  # for its type
        store(sums.hi, i, converted(mean, hi))
        store(sums.unit, i, converted(unit_of(x, rstd), hi))


@inline
def spread_hi_and_unit(x, given, first, j, channels, cells, size, sums):
    """Of the cells from j on, in all their columns; ``first`` is channel 0's kept index."""
    c = j % channels
    if size == 1 and c + min(cells, channels) <= channels:
        write_hi_and_unit(x, given, first + c, min(cells, channels), sums)
        repeat(sums.hi, channels, cells)
        repeat(sums.unit, channels, cells)
    else:
        for i in range(cells):
            spread(sums.hi, i * size, rounded(x, given.mean[first + c]), size)
            spread(sums.unit, i * size, unit_of(x, given.rstd[first + c]), size)
            c = c + 1 if c + 1 < channels else 0


@kernel
def grad_sums_of_segments(
    thread, first, last, dy, x, y, weight, shape, tiles, parameters, partials, workspace, affine
):  # fmt: skip
    """A table of `SegmentSums` in ``partials``, of each cell of each segment.

    With a workspace for `Affine` y is computed again.
    """
    channels, size, coalesced = shape.channel, shape.inner, tiles.coalesced
    rows, cells, pitch = shape.outer // coalesced, channels * coalesced, pitch_of(tiles, size)
    results = results_of(shape, rows, cells, tiles)
    given = table_rows(GradientParameters, parameters, shape.batch * channels)
    sums = table_rows(ColumnSums, advance(workspace, thread * COLUMN_SUMS * pitch), pitch)
    of_y = affine_table(affine, thread, pitch)
    for k in range(first, last):
        task = task_at(k, rows, cells, tiles)
        spread_hi_and_unit(x.values, given, task.batch * channels, task.cell, channels, task.cells, size, sums)
        spread_affine_again(x.values, given, task.batch * channels, task.cell, channels, task.cells, size, of_y)
        at = task.batch * results.segments + task.row // tiles.height
        place = advance(partials, at * results.of_segment + place_of_cell(task.cell, tiles))
        inputs = Inputs(
            rows_of_tile(dy, task.batch, task.row, task.cell * size, coalesced),
            rows_of_tile(x, task.batch, task.row, task.cell * size, coalesced),
            rows_of_tile(y, task.batch, task.row, task.cell * size, coalesced),
            rows_of_tile(weight, task.batch, task.row, task.cell * weight.channel, 1),
            weight.channel,
            around(sums.hi, of_y),
        )
        found = table_rows(SegmentSums, place, results.together)
        segment_grad_sums(inputs, task.end - task.row, task.cells, size, found, sums)


@inline
def write_grad_sums(x, t, count, found, results, given, sums):
    """The results of channels from t on, from their first segments' `SegmentSums`: eight at a time."""
    n = lanes(found.dz, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        a = splat(found.dz, 0.0, FULL)
        b = a
        for s in range(results.segments):
            a = a + load_first(found.dz, s * results.of_segment + i, part, FULL)
            b = b + load_first(found.distance, s * results.of_segment + i, part, FULL)
        mean, rstd = load_first(given.mean, t + i, part, FULL), load_first(given.rstd, t + i, part, FULL)
        hi, unit = converted(converted(mean, splat(x, 0.0, mean)), mean), unit_of(x, rstd)
        store_part(sums.dgamma, t + i, part, (b - (mean - hi) * unit * a) * (rstd / unit), n)
        store_part(sums.dbeta, t + i, part, a, n)


@inline
def single_dz(dy, dy_at, y, y_at, x, x_at, affine):
    """One value of dz; the `Affine` is its channel's, or None."""
    one, of_y = splat(dy, 0.0, SINGLE), affine_in_one_lane(dy, affine)
    gradient = load(dy, dy_at, one), load(y, y_at, one), load(x, x_at, one)
    return total(relu_gradient(dy, *gradient, of_y))


@inline
def affine_in_one_lane(x, affine):
    """None without."""
    if affine is None:
        return None
    return Affine(splat(x, affine.hi, SINGLE), splat(x, affine.scale, SINGLE), splat(x, affine.bias, SINGLE))


@inline
def sums_of_rest(dy, x, y, affine, t, first_row, shape, mean, rstd, a, b):
    """And of the rows behind the coalesced ones."""
    of_dy, of_x, of_y = rows_of(dy, t, shape), rows_of(x, t, shape), rows_of(y, t, shape)
    hi, unit = rounded(x.values, mean), unit_of(x.values, rstd)
    for r in range(first_row, shape.outer):
        dz = single_dz(of_dy.values, r * of_dy.step, of_y.values, r * of_y.step, of_x.values, r * of_x.step, affine)
        a, b = a + dz, b + dz * ((value(of_x.values, r * of_x.step) - hi) * unit)
    return a, b


@kernel
def channel_grad_sums(
    thread, first, last, dy, x, y, shape, tiles, parameters, partials, sums, distances, frozen, mixed, recompute
):  # fmt: skip
    """The results from the cells' sums and, if they are asked for, the `records.Distances` of dx."""
    channels, kept = shape.channel, shape.batch * shape.channel
    rows, cells = shape.outer // tiles.coalesced, channels * tiles.coalesced
    results, given = results_of(shape, rows, cells, tiles), table_rows(GradientParameters, parameters, kept)
    out, found = table_rows(Sums, sums, kept), table_rows(SegmentSums, partials, results.together)
    whole = first
    while tiles.coalesced == 1 and whole < last:
        j = whole % channels
        count = min(last - whole, channels - j, tiles.width - j % tiles.width)
        at = whole // channels * results.segments * results.of_segment + place_of_cell(j, tiles)
        of_these = table_rows(SegmentSums, advance(partials, at), results.together)
        write_grad_sums(x.values, whole, count, of_these, results, given, out)
        whole += count
    for t in range(whole, last):
        a, b = 0.0, 0.0
        for s in range(results.segments):
            at = (t // channels * results.segments + s) * results.of_segment
            for j in range(t % channels, cells, channels):
                k = at + place_of_cell(j, tiles)
                a, b = a + found.dz[k], b + found.distance[k]
        mean, rstd = given.mean[t], given.rstd[t]
        affine = affine_again(x.values, given, t, recompute)
        a, b = sums_of_rest(dy, x, y, affine, t, rows * tiles.coalesced, shape, mean, rstd, a, b)
        out.dgamma[t], out.dbeta[t] = dgamma_of(x.values, mean, rstd, a, b), a
    if distances is not None:
        write_distances(x.values, given, first, last, frozen, mixed, out, table_rows(Distances, distances, kept))
