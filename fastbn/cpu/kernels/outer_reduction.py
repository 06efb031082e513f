"""Kernels that reduce across memory, whose rows run through all channels: channels-last, and short rows of channels.

For each channel c, and each batch index if the batch is kept:

    x = x[:, c]                                        # (outer, inner), of (outer, channels, inner)
    n = w.sum()                                        # w: weights, or ones
    mean = (w * x).sum() / n
    m2 = (w * (x - mean)**2).sum()
    rstd = 1 / np.sqrt(m2 / n + eps)
    y = (x - mean) * (rstd * gamma) + beta + residual
    y = np.maximum(y, 0)                               # if relu

Kernels see rows of contiguous columns; a *cell* of ``size`` neighbouring columns belongs to one channel, and cell j to
channel ``j % channels``:

=============================  ===================  =====================  =============
memory                         rows                 columns of a row       a cell
=============================  ===================  =====================  =============
channels-last                  outer                channels               one column
channels-last, few channels    outer // coalesced   coalesced * channels   one column
channels-first, short rows     outer                channels * inner       inner columns
=============================  ===================  =====================  =============

Coalescing rows of few channels fills whole vectors; rows beyond the last whole group are taken value by value. Rows are
taken in chunks of 128 and in segments, by shape alone; threads share segments and tiles of cells. The sums of a chunk
live in one small array per tile, so memory is read in its own order. The numerics are those of `inner_reduction`: each
cell has its own shift, and a chunk in which some shift was poor is summed again, with a better shift for those cells
alone.

A chunk has as many rows of each quarter of its segment: four streams from memory, far apart, are read up to twice as
fast as one or as neighbouring rows.

Bytes moved, S = the bytes of x: moments S, normalize 2S; forward 2S where a tile of all rows stays in cache between the
two passes over it.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.cells import (
    AHEAD,
    affine_at,
    cell_totals,
    clear_sums,
    columns_of_last_row,
    fill,
    in_float64,
    part_of,
    pitch_of,
    place_of_cell,
    places,
    quarters_of,
    results_of,
    rows_of_tile,
    spread_affine,
    spread_rounded,
    store_part,
    task_at,
)
from fastbn.cpu.kernels.common import (
    FULL,
    ONE_SLAB,
    careful_moments,
    finished,
    is_sound,
    least_variance,
    marked,
    merged,
    needs_new_shift,
    normalized,
    origin_of,
    put,
    rows_from,
    rows_of,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.outer_weighted import WeightedCells, weighted_segment
from fastbn.cpu.kernels.pointers import advance, present, table_rows, value
from fastbn.cpu.kernels.simd import (
    any_greater,
    any_nan,
    first_lanes,
    fma,
    lanes,
    load,
    load_first,
    prefetch,
    root,
    splat,
    store,
    store_first,
    total,
    zero_where_not_positive,
    zero_where_zero,
)
from fastbn.cpu.records import Affine, ColumnMoments, MomentRows, Parameters
from fastbn.cpu.sizes import AFFINE, COLUMN_MOMENTS, ORIGINS, ROW_CHUNK

PEEK = 64  # values of a channel from whose mean the first shift comes: off by an eighth of the deviation


class TileCells(NamedTuple):
    """Pointers to numbers of a tile's cells: origins, shifts before they are rounded, and a segment's results."""

    origin: Any
    centre: Any
    mean: Any
    m2: Any


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def add_four_rows(quarters, at, part, columns, c):
    """Add one vector of columns, or a part, of a row of each quarter to the sums.

    Two rows at a time: with all at once sixteen registers overflow.
    """
    q = load(columns.shift, c, FULL)
    a, b = part_of(quarters.first, at, part) - q, part_of(quarters.second, at, part) - q
    sums, squares = a + b, fma(a, a, b * b)
    a, b = part_of(quarters.third, at, part) - q, part_of(quarters.last, at, part) - q
    store(columns.s1, c, load(columns.s1, c, FULL) + (sums + (a + b)))
    store(columns.s2, c, load(columns.s2, c, FULL) + (squares + fma(a, a, b * b)))


@inline
def add_rows(quarters, step, fours, rest, count, columns):
    """Add ``fours`` rows of each quarter to the sums of columns, and the ``rest`` behind those of the last."""
    n = lanes(quarters.first, FULL)
    whole = count - count % n
    for r in range(fours):
        for c in range(0, whole, n):
            add_four_rows(quarters, r * step + c, None, columns, c)
        if whole < count:
            add_four_rows(quarters, r * step + whole, count - whole, columns, whole)
    for r in range(fours, fours + rest):
        for c in range(0, count, n):
            e = load_first(quarters.last, r * step + c, count - c, FULL) - load(columns.shift, c, FULL)
            store(columns.s1, c, load(columns.s1, c, FULL) + e)
            store(columns.s2, c, fma(e, e, load(columns.s2, c, FULL)))


@inline
def peek_at_cells(x, rows, count, size, cells):
    """As centres the means of some values of each cell, from rows all over the segment."""
    part = min(size, lanes(x.values, FULL))
    looked_at = min(rows, -(-PEEK // part))
    jump = rows // looked_at * x.step
    for j in range(count):
        origin = splat(x.values, cells.origin[j], FULL)
        s = splat(x.values, 0.0, FULL)
        for k in range(looked_at):
            s = s + (load_first(x.values, k * jump + j * size, part, FULL) - origin)
        cells.centre[j] = cells.origin[j] + total(first_lanes(s, part)) / (looked_at * part)


@inline
def some_shift_is_poor(count, n, columns, wide):
    """`needs_new_shift` of any of the cells, of which a chunk has n values each."""
    half = splat(wide, 0.5 * n, FULL)
    poor = False
    for j in range(0, count, lanes(wide, FULL)):
        sums = in_float64(columns.s1, j, wide)
        if any_greater(sums * sums, half * in_float64(columns.s2, j, wide)):
            poor = True
    return poor


@inline
def merge_chunk(count, before, n, columns, cells):
    """Chan's update of each cell's moments, of ``before`` values, by a chunk of n values around its centre."""
    each = splat(cells.mean, 1.0 / n, FULL)
    ratio = splat(cells.mean, n / (before + n), FULL)
    cross = splat(cells.mean, before * (n / (before + n)), FULL)
    for j in range(0, count, lanes(cells.mean, FULL)):
        origin, mean = load(cells.origin, j, FULL), load(cells.mean, j, FULL)
        sums = in_float64(columns.s1, j, cells.mean)
        from_shift = sums * each
        m2 = in_float64(columns.s2, j, cells.mean) - sums * from_shift
        m2 = zero_where_not_positive(m2, m2)
        delta = ((load(cells.centre, j, FULL) - origin) + from_shift) - mean
        mean = fma(delta, ratio, mean)
        store(cells.mean, j, mean)
        store(cells.m2, j, load(cells.m2, j, FULL) + fma(delta * delta, cross, m2))
        store(cells.centre, j, origin + mean)


@inline
def better_shifts(count, n, columns, cells, all_of_them):
    """The centres of cells whose shifts were poor, or of all, to the means that were found."""
    for j in range(count):
        sums = np.float64(columns.s1[j])
        if all_of_them or needs_new_shift(n, sums, np.float64(columns.s2[j])):
            cells.centre[j] += sums / n


@inline
def first_shifts(x, rows, count, size, cells):
    """The origins, around which `segment` looks at a few rows first; of cells of several columns a better guess."""
    if size == 1:
        for j in range(count):
            cells.centre[j] = cells.origin[j]
    else:
        peek_at_cells(x, rows, count, size, cells)


@inline
def segment(x, rows, count, size, cells, columns):
    """Mean - origin and M2 of each of ``count`` cells of one segment.

    Given are the origins. The columns' shifts are the centres, rounded to the compute type.
    """
    lower_underflow_flag()
    fill(cells.mean, count, 0.0)
    fill(cells.m2, count, 0.0)
    first_shifts(x, rows, count, size, cells)
    quarter, beyond = rows // 4, rows % 4
    peek = min(quarter, PEEK // 4)
    first = 0
    before = 0.0
    looks = 0 if size == 1 else 1  # at a few rows for the first shift, the chunk, the chunk around better shifts
    while before < rows * size:
        fours = min(ROW_CHUNK // 4, quarter - first) if looks > 0 else peek
        rest = beyond if first + fours == quarter else 0
        spread_rounded(x.values, cells.centre, count, size, columns.shift)
        clear_sums(count * size, columns)
        add_rows(quarters_of(rows_from(x, first, 0), quarter), x.step, fours, rest, count * size, columns)
        cell_totals(columns.s1, count, size, cells.mean)
        cell_totals(columns.s2, count, size, cells.mean)
        n = np.float64((4 * fours + rest) * size)
        if looks == 0 or (looks == 1 and some_shift_is_poor(count, n, columns, cells.mean)):
            better_shifts(count, n, columns, cells, looks == 0)
            looks += 1
        else:
            merge_chunk(count, before, n, columns, cells)
            first += fours
            before += n
            looks = 1
    if underflowed(cells.m2[0]):
        for j in range(count):
            cells.m2[j] = marked(x.values, cells.m2[j])


@inline
def find_cell_origins(x, weight, origins, task, shape, out):
    """`common.origin_of` of the cells of a tile."""
    fill(out, task.cells, 0.0)
    c, t = task.cell % shape.channel, task.batch * shape.channel
    rows = rows_of(x, t, shape)
    for i in range(task.cells):
        out[i] = origin_of(rows_from(rows, 0, c * x.channel), weight, origins, t + c)
        c = c + 1 if c + 1 < shape.channel else 0


@inline
def write_segment(x, weight, across, task, size, own, room, mean, together, columns):
    """The moments of a task's cells to where its means are, and all M2 and sums of weights behind all means."""
    rows, m2, n = task.end - task.row, advance(mean, together), advance(mean, 2 * together)
    if weight is None:
        segment(x, rows, task.cells, size, TileCells(own, advance(own, room), mean, m2), columns)
    else:
        cells = WeightedCells(own, advance(own, room), n, mean, m2)
        weighted_segment(x, weight, across, rows, task.cells, cells, columns)


@kernel
def moments_of_segments(thread, first, last, x, weight, shape, tiles, origins, partials, workspace):
    """Of each cell of each segment, in ``partials``: the means, all M2, and with weights all their sums.

    Behind these each thread has its origins and centres, or origins and counts.
    """
    size, rows, cells = shape.inner, shape.outer // tiles.coalesced, shape.channel * tiles.coalesced
    results, room = results_of(shape, rows, cells, tiles), places(tiles.width, tiles.width)
    pitch = pitch_of(tiles, size)
    columns = table_rows(ColumnMoments, advance(workspace, thread * COLUMN_MOMENTS * pitch), pitch)
    own = advance(partials, results.together * (2 if present(weight) is None else 3) + thread * ORIGINS * room)
    for k in range(first, last):
        task = task_at(k, rows, cells, tiles)
        find_cell_origins(x, present(weight), origins, task, shape, own)
        at = task.batch * results.segments + task.row // tiles.height
        mean = advance(partials, at * results.of_segment + place_of_cell(task.cell, tiles))
        part = rows_of_tile(x, task.batch, task.row, task.cell * size, tiles.coalesced)
        weights = present(rows_of_tile(weight, task.batch, task.row, task.cell * weight.channel, 1))
        write_segment(part, weights, weight.channel, task, size, own, room, mean, results.together, columns)


@inline
def careful_cells(x, shape, t, first, end, moments, all_rows, lost, eps):
    """Again those of the channels from t + first on whose squares left the range; ``lost``: also those of M2 = 0."""
    for k in range(t + first, t + end):
        m2 = moments.m2[k]
        if is_sound(moments.mean[k], m2, all_rows * least_variance(x.values)) and not (lost and m2 == 0.0):
            continue
        rows = rows_of(x, k, shape)
        n, mean, m2, unit = careful_moments(rows, None, shape, ONE_SLAB, all_rows, origin_of(rows, None, None, k))
        write_moments(moments, k, n, mean, m2, unit, eps)
    lower_underflow_flag()


@inline
def merge_segments(cells_mean, cells_m2, at, pitch, height, shape):
    """A vector of means and M2 over all segments, which are a pitch apart: as `common.merged`."""
    mean, m2 = load(cells_mean, at, FULL), load(cells_m2, at, FULL)
    before = np.float64(min(height, shape.outer) * shape.inner)
    for s in range(1, -(-shape.outer // height)):
        n = np.float64(min(height, shape.outer - s * height) * shape.inner)
        ratio = n / (before + n)
        delta = load(cells_mean, s * pitch + at, FULL) - mean
        mean = mean + delta * splat(cells_mean, ratio, FULL)
        between = delta * delta * splat(cells_mean, before * ratio, FULL)
        m2 = m2 + (load(cells_m2, s * pitch + at, FULL) + between)
        before += n
    return mean, m2


@inline
def write_cells(x, shape, t, count, origins, cells_mean, cells_m2, pitch, height, moments, eps):
    """Moments of cells that are whole channels, from kept index t on, into a table of `MomentRows`.

    Their segments' means, relative to their origins, and M2 are a pitch apart from segment to segment. As `merged`,
    `finished` and `write_moments`, eight at a time.
    """
    n, all_rows = lanes(cells_mean, FULL), np.float64(shape.outer * shape.inner)
    one, plus = splat(cells_mean, 1.0, FULL), splat(cells_mean, eps, FULL)
    if all_rows == 0.0:
        for k in range(t, t + count):
            write_moments(moments, k, 0.0, np.nan, np.nan, 1.0, eps)
        return
    least, zero = splat(cells_mean, all_rows * least_variance(x.values), FULL), splat(cells_mean, 0.0, FULL)
    lower_underflow_flag()
    for i in range(0, count, n):
        part = min(n, count - i)
        from_origin, m2 = merge_segments(cells_mean, cells_m2, i, pitch, height, shape)
        mean = load_first(origins, i, part, FULL) + from_origin
        counts = splat(cells_mean, all_rows, FULL)
        store_part(moments.count, t + i, part, counts, n)
        store_part(moments.m2, t + i, part, m2, n)
        store_part(moments.mean, t + i, part, mean, n)
        store_part(moments.rstd, t + i, part, one / root(m2 / counts + plus), n)
        lost = underflowed(moments.m2[t + i]) and any_greater(least, m2)  # between segments
        if lost or any_greater(zero_where_zero(m2, least - m2), zero) or any_nan((mean - mean) + (m2 - m2)):
            careful_cells(x, shape, t, i, i + part, moments, all_rows, lost, eps)


@inline
def write_channels(x, shape, first, last, tiles, results, partials, moments, eps):
    """`write_cells` of all channels, of which each tile's results are neighbours."""
    t = first
    while t < last:
        j = t % shape.channel
        count = min(last - t, shape.channel - j, tiles.width - j % tiles.width)
        rows, origins = rows_of(x, t, shape), advance(moments.count, t)  # the row of counts is free until `write_cells`
        for i in range(count):
            origins[i] = origin_of(rows_from(rows, 0, i * x.channel), None, None, t + i)
        at = t // shape.channel * results.segments * results.of_segment + place_of_cell(j, tiles)
        mean, m2 = advance(partials, at), advance(partials, at + results.together)
        write_cells(x, shape, t, count, origins, mean, m2, results.of_segment, tiles.height, moments, eps)
        t += count


@inline
def count_of(weight, counts, k, values):
    """The sum of weights of a cell in a segment; without weights it has as many values."""
    if weight is None:
        return np.float64(values)
    return counts[k]


@kernel
def channel_moments(thread, first, last, x, weight, shape, tiles, origins, partials, table, eps):
    """Moments of every kept index from those of its cells, into a table of `MomentRows`."""
    channels, moments = shape.channel, table_rows(MomentRows, table, shape.batch * shape.channel)
    rows, cells = shape.outer // tiles.coalesced, channels * tiles.coalesced
    results = results_of(shape, rows, cells, tiles)
    means, m2s, counts = partials, advance(partials, results.together), advance(partials, 2 * results.together)
    if present(weight) is None and tiles.coalesced == 1:
        write_channels(x, shape, first, last, tiles, results, partials, moments, eps)
        return
    for t in range(first, last):
        part, weights = rows_of(x, t, shape), present(rows_of(weight, t, shape))
        origin = origin_of(part, weights, origins, t)
        n, mean, m2 = 0.0, 0.0, 0.0
        for s in range(results.segments):
            at = (t // channels * results.segments + s) * results.of_segment
            for j in range(t % channels, cells, channels):
                k = at + place_of_cell(j, tiles)
                count = count_of(weights, counts, k, min(tiles.height, rows - s * tiles.height) * shape.inner)
                n, mean, m2 = merged(n, mean, m2, count, means[k], m2s[k])
        for r in range(rows * tiles.coalesced, shape.outer):  # without weights: these are not coalesced
            n, mean, m2 = merged(n, mean, m2, 1.0, value(part.values, r * part.step) - origin, 0.0)
        n, mean, m2, unit = finished(part, weights, shape, n, mean, m2, origin)
        write_moments(moments, t, n, mean, m2, unit, eps)


# --- y ----------------------------------------------------------------------------------------------------------------


@inline
def normalize_rows(x, y, residual, rows, columns, end_columns, affine, relu, nontemporal, ahead):
    """Rows of y; the last has ``end_columns``.

    They ask for the columns ``ahead``; fused kernels for the next tile's, whose statistics then find them in cache.
    """
    n = lanes(x.values, FULL)
    for r in range(rows):
        width = end_columns if r == rows - 1 else columns
        whole = width - width % n
        i, j, k = r * x.step, r * y.step, r * residual.step
        for c in range(0, whole, n):
            prefetch(x.values, i + c + ahead)
            prefetch(residual.values, k + c + ahead)
            added = load(residual.values, k + c, FULL)
            v = normalized(load(x.values, i + c, FULL), added, affine_at(affine, c), relu)
            put(y.values, j + c, v, nontemporal)
        if whole < width:
            c, part = whole, width - whole
            added = load_first(residual.values, k + c, part, FULL)
            v = normalized(load_first(x.values, i + c, part, FULL), added, affine_at(affine, c), relu)
            store_first(y.values, j + c, part, v)


@kernel
def normalize(
    thread, first, last, x, y, residual, shape, tiles, table, eps, given_rstd, workspace, relu, nontemporal
):  # fmt: skip
    """From a table of `Parameters`, of which each task puts an `Affine` of all its columns into the workspace."""
    channels, size, coalesced = shape.channel, shape.inner, tiles.coalesced
    rows, cells = -(-shape.outer // coalesced), channels * coalesced
    parameters, pitch = table_rows(Parameters, table, shape.batch * channels), pitch_of(tiles, size)
    affine = table_rows(Affine, advance(workspace, thread * AFFINE * pitch), pitch)
    for k in range(first, last):
        task = task_at(k, rows, cells, tiles)
        spread_affine(
            x.values, parameters, task.batch * channels, task.cell, channels, eps, given_rstd, task.cells, size, affine
        )
        normalize_rows(
            rows_of_tile(x, task.batch, task.row, task.cell * size, coalesced),
            rows_of_tile(y, task.batch, task.row, task.cell * size, coalesced),
            rows_of_tile(residual, task.batch, task.row, task.cell * size, coalesced),
            task.end - task.row, task.cells * size, columns_of_last_row(task, shape, coalesced), affine, relu,
            nontemporal, AHEAD,
        )  # fmt: skip


@kernel
def forward(
    thread, first, last, x, y, residual, shape, tiles, table, eps, partials, workspace, relu, nontemporal
):  # fmt: skip
    """Moments and y, a tile of cells at a time: the second pass finds its rows in cache. Rows are not coalesced.

    The table is of `MomentRows`. In ``partials`` a thread has origins and centres, then each segment's means and M2.
    """
    channels, size, rows, height = shape.channel, shape.inner, shape.outer, tiles.height
    pitch, room = pitch_of(tiles, size), places(tiles.width, tiles.width)
    moments = table_rows(MomentRows, table, shape.batch * channels)
    parameters = Parameters(moments.mean, moments.rstd, moments.gamma, moments.beta)
    own = advance(partials, thread * (ORIGINS + 2 * -(-rows // height)) * room)
    results = advance(own, ORIGINS * room)
    of_thread = advance(workspace, thread * COLUMN_MOMENTS * pitch)
    columns, affine = table_rows(ColumnMoments, of_thread, pitch), table_rows(Affine, of_thread, pitch)
    for k in range(first, last):
        tile = task_at(k, 1, channels, tiles)
        t = tile.batch * channels + tile.cell
        part, of_y, of_residual = rows_of(x, t, shape), rows_of(y, t, shape), rows_of(residual, t, shape)
        find_cell_origins(x, None, None, tile, shape, own)
        for row in range(0, rows, height):
            mean = advance(results, row // height * 2 * room)
            numbers = TileCells(own, advance(own, room), mean, advance(mean, room))
            segment(rows_from(part, row, 0), min(height, rows - row), tile.cells, size, numbers, columns)
        write_cells(x, shape, t, tile.cells, own, results, advance(results, room), 2 * room, height, moments, eps)
        spread_affine(x.values, parameters, t, 0, tile.cells, 0.0, True, tile.cells, size, affine)
        wide = tile.cells * size
        normalize_rows(part, of_y, of_residual, rows, wide, wide, affine, relu, nontemporal, wide)
