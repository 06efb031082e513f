"""Kernels for memory whose rows run through all channels: channels-last, and channels-first with short rows.

An array is flat memory plus the element strides ``(start, batch, outer, channel)``. Kernels see rows of contiguous
columns; a *cell* of ``inner`` neighbouring columns belongs to one channel, and cell j to channel ``j % channels``:

=============================  =====================  ===================  ============
memory                         rows                   columns of a row     a cell
=============================  =====================  ===================  ============
channels-last                  outer                  channels             one column
channels-last, few channels    outer // fold          fold * channels      one column
channels-first, short rows     outer                  channels * inner     inner columns
=============================  =====================  ===================  ============

Folding few channels fills whole vectors; rows beyond the last whole fold are taken value by value. Rows are taken in
chunks of 128 and in segments, by shape alone; threads share segments and tiles of cells. The sums of a chunk live in
one small array per tile, so memory is read in its own order. The numerics are those of `inner_reduction`: each cell
has its own shift, and a chunk in which some shift was poor is summed again, with a better shift for those cells alone.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S; forward 2S and backward 3S where
a tile of all rows stays in cache between the two passes over it.

The geometry's four integers of this family are ``(fold, tile, height, _)``: rows taken as one, cells of a tile, rows of
a task. Each thread has its own arrays in ``workspace`` (of the compute type) and ``partials`` (float64).
"""

import numpy as np

from fastbn.cpu.kernels.cells import (
    AHEAD,
    cell_totals,
    fill,
    in_float64,
    part_of,
    pitch_of,
    place_of_cell,
    places,
    spread_affine,
    spread_rounded,
    store_part,
    task_at,
    width_of_last_row,
)
from fastbn.cpu.kernels.common import (
    FULL,
    careful_moments,
    channel_start,
    finished,
    four,
    is_sound,
    least_variance,
    marked,
    merged,
    needs_new_shift,
    normalized,
    origin_of,
    positive_or_nan,
    put,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import (
    any_greater,
    any_nan,
    converted,
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
    value,
    zero_where_not_positive,
    zero_where_zero,
)
from fastbn.cpu.sizes import AFFINE, ORIGINS, ROW_CHUNK, SHIFT_AND_SUMS

WEIGHTED_CHUNK = 32  # rows: with weights each column has one sum, whose roundings of equal values add up
PEEK = 64  # values of a channel from whose mean the first shift comes: off by an eighth of the deviation


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def add_four_rows(x, at, far, part, workspace, shift, s1, s2):
    """Add one vector of columns, or a part, of four rows, each ``far`` from the one before, to the sums.

    Two rows at a time: with all at once sixteen registers overflow.
    """
    q = load(workspace, shift, FULL)
    a, b = part_of(x, at, part) - q, part_of(x, at + far, part) - q
    sums, squares = a + b, fma(a, a, b * b)
    a, b = part_of(x, at + 2 * far, part) - q, part_of(x, at + 3 * far, part) - q
    store(workspace, s1, load(workspace, s1, FULL) + (sums + (a + b)))
    store(workspace, s2, load(workspace, s2, FULL) + (squares + fma(a, a, b * b)))


@inline
def chunk_sums(x, at, step, far, fours, rest, columns, workspace, shift, s1, s2):
    """s1 = sum(x - shift), s2 = sum((x - shift)^2) per column; shift, s1 and s2 are places in ``workspace``.

    The rows are ``fours`` of each quarter of a segment, the quarters ``far`` apart, and the ``rest`` behind the last.
    """
    n = lanes(x, FULL)
    fill(workspace, s1, columns, 0.0)
    fill(workspace, s2, columns, 0.0)
    whole = columns - columns % n
    for r in range(fours):
        row = at + r * step
        for c in range(0, whole, n):
            add_four_rows(x, row + c, far, None, workspace, shift + c, s1 + c, s2 + c)
        if whole < columns:
            add_four_rows(x, row + whole, far, columns - whole, workspace, shift + whole, s1 + whole, s2 + whole)
    for r in range(fours, fours + rest):
        row = at + 3 * far + r * step
        for c in range(0, columns, n):
            e = load_first(x, row + c, columns - c, FULL) - load(workspace, shift + c, FULL)
            store(workspace, s1 + c, load(workspace, s1 + c, FULL) + e)
            store(workspace, s2 + c, fma(e, e, load(workspace, s2 + c, FULL)))


@inline
def peek_at_cells(x, at, step, rows, cells, size, partials, own, centre):
    """Into ``centre`` the mean of some values of each cell, from rows all over the segment."""
    part = min(size, lanes(x, FULL))
    count = min(rows, -(-PEEK // part))
    apart = rows // count * step
    for j in range(cells):
        origin = splat(x, partials[own + j], FULL)
        s = splat(x, 0.0, FULL)
        for k in range(count):
            s = s + (load_first(x, at + k * apart + j * size, part, FULL) - origin)
        partials[centre + j] = partials[own + j] + total(first_lanes(s, part)) / (count * part)


@inline
def some_shift_is_poor(cells, count, workspace, s1, s2, partials):
    """`needs_new_shift` of any cell."""
    half = splat(partials, 0.5 * count, FULL)
    poor = False
    for j in range(0, cells, lanes(partials, FULL)):
        sums = in_float64(workspace, s1 + j, partials)
        if any_greater(sums * sums, half * in_float64(workspace, s2 + j, partials)):
            poor = True
    return poor


@inline
def merge_chunk(cells, before, count, workspace, s1, s2, partials, own, centre, mean, m2):
    """Chan's update of each cell's moments, of ``before`` values, by a chunk of ``count`` values around its centre."""
    each = splat(partials, 1.0 / count, FULL)
    ratio = splat(partials, count / (before + count), FULL)
    cross = splat(partials, before * (count / (before + count)), FULL)
    for j in range(0, cells, lanes(partials, FULL)):
        origin, mu = load(partials, own + j, FULL), load(partials, mean + j, FULL)
        sums = in_float64(workspace, s1 + j, partials)
        from_shift = sums * each
        m2_of_chunk = in_float64(workspace, s2 + j, partials) - sums * from_shift
        m2_of_chunk = zero_where_not_positive(m2_of_chunk, m2_of_chunk)
        delta = ((load(partials, centre + j, FULL) - origin) + from_shift) - mu
        mu = fma(delta, ratio, mu)
        store(partials, mean + j, mu)
        store(partials, m2 + j, load(partials, m2 + j, FULL) + fma(delta * delta, cross, m2_of_chunk))
        store(partials, centre + j, origin + mu)


@inline
def segment(x, at, step, rows, cells, size, partials, own, centre, mean, m2, workspace, loose, pitch):
    """Mean - origin and M2 of each cell of one segment, written to ``partials`` at ``mean`` and ``m2``.

    Arrays of this thread are in ``partials`` the origin (given, at ``own``) and the centre; in ``workspace``, a pitch
    apart from ``loose`` on, the shift, which is the centre in the compute type, and two sums.

    A chunk has as many rows of each quarter of the segment: four streams from memory, far apart, are read up to twice
    as fast as one or as neighbouring rows.
    """
    s1, s2 = loose + pitch, loose + 2 * pitch
    lower_underflow_flag()
    fill(partials, mean, cells, 0.0)
    fill(partials, m2, cells, 0.0)
    if size == 1:
        for j in range(cells):
            partials[centre + j] = partials[own + j]
    else:
        peek_at_cells(x, at, step, rows, cells, size, partials, own, centre)
    quarter, beyond = rows // 4, rows % 4
    peek = min(quarter, PEEK // 4)
    first = 0
    before = 0.0
    looks = 0 if size == 1 else 1  # at a few rows for the first shift, the chunk, the chunk around better shifts
    while before < rows * size:
        fours = min(ROW_CHUNK // 4, quarter - first) if looks > 0 else peek
        rest = beyond if first + fours == quarter else 0
        spread_rounded(x, partials, centre, cells, size, workspace, loose)
        chunk_sums(x, at + first * step, step, quarter * step, fours, rest, cells * size, workspace, loose, s1, s2)
        cell_totals(workspace, s1, cells, size, partials)
        cell_totals(workspace, s2, cells, size, partials)
        count = np.float64((4 * fours + rest) * size)
        if looks == 0 or (looks == 1 and some_shift_is_poor(cells, count, workspace, s1, s2, partials)):
            for j in range(cells):
                sums = np.float64(workspace[s1 + j])
                if looks == 0 or needs_new_shift(count, sums, np.float64(workspace[s2 + j])):
                    partials[centre + j] += sums / count
            looks += 1
        else:
            merge_chunk(cells, before, count, workspace, s1, s2, partials, own, centre, mean, m2)
            first += fours
            before += count
            looks = 1
    if underflowed(partials[m2]):
        for j in range(cells):
            partials[m2 + j] = marked(x, partials[m2 + j])


@inline
def weighted_segment(
    x,
    at,
    step,
    weight,
    w_at,
    w_step,
    w_across,
    rows,
    columns,
    partials,
    own,
    count,
    n_at,
    mean,
    m2,
    workspace,
    loose,
    pitch,
):
    """The same of one column each, with the sum of weights at ``n_at``; ``w_across`` is 0 for all channels."""
    n = lanes(x, FULL)
    shift, s1, s2 = loose, loose + pitch, loose + 2 * pitch
    lower_underflow_flag()
    fill(workspace, shift, columns, 0.0)
    for i in range(columns):
        workspace[shift + i] = partials[own + i]
        partials[n_at + i] = partials[mean + i] = partials[m2 + i] = 0.0
    first = 0
    again = False
    while first < rows:
        high = min(WEIGHTED_CHUNK, rows - first)
        fill(workspace, s1, columns, 0.0)
        fill(workspace, s2, columns, 0.0)
        fill(partials, count, columns, 0.0)
        for r in range(first, first + high):
            w_row = w_at + r * w_step
            for i in range(columns):
                partials[count + i] += value(weight, w_row + i * w_across)
            for i in range(0, columns, n):
                part = min(n, columns - i)
                e = load_first(x, at + r * step + i, part, FULL) - load(workspace, shift + i, FULL)
                if w_across == 0:
                    w = splat(x, value(weight, w_row), FULL)
                else:
                    w = converted(load_first(weight, w_row + i, part, e), e)
                e = zero_where_zero(w, e)
                store(workspace, s1 + i, load(workspace, s1 + i, FULL) + w * e)
                store(workspace, s2 + i, fma(w * e, e, load(workspace, s2 + i, FULL)))
        poor = False
        if not again:
            # A chunk has few values per channel: on the first one, half a standard deviation would cost the mean 1e-7.
            for i in range(columns):
                m = partials[count + i]
                a, b = np.float64(workspace[s1 + i]), np.float64(workspace[s2 + i])
                if m != 0.0 and (first == 0 or needs_new_shift(m, a, b)):
                    workspace[shift + i] += a / m
                    poor = True
        if poor:
            again = True
            continue
        for i in range(columns):
            m = partials[count + i]
            if m != 0.0:
                from_shift = workspace[s1 + i] / m
                q = positive_or_nan(workspace[s2 + i] - workspace[s1 + i] * from_shift)
                centre = (workspace[shift + i] - partials[own + i]) + from_shift
                partials[n_at + i], partials[mean + i], partials[m2 + i] = merged(
                    partials[n_at + i], partials[mean + i], partials[m2 + i], m, centre, q
                )
                workspace[shift + i] = partials[own + i] + partials[mean + i]
        first += high
        again = False
    if underflowed(partials[m2]):
        for i in range(columns):
            partials[m2 + i] = marked(x, partials[m2 + i])


@kernel
def segment_moments(thread, first, last, x, weight, geometry, origins, partials, workspace):
    """Mean - origin and M2 (and count, with weights) of each cell of each segment, at the beginning of ``partials``."""
    shape, xs, ws = four(geometry, 0), four(geometry, 8), four(geometry, 12)
    fold, tile, height, _ = four(geometry, 4)
    channels, size = shape[2], shape[3]
    rows, cells = shape[1] // fold, channels * fold
    step, pitch, segments = xs[2] * fold, pitch_of(tile, size), -(-rows // height)
    row_of_results = places(cells, tile)
    results = shape[0] * segments * row_of_results
    own = results * (2 if weight is None else 3) + thread * ORIGINS * places(tile, tile)
    centre = own + places(tile, tile)
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        fill(partials, own, width, 0.0)
        c, x_start = j % channels, channel_start(xs, b * channels, shape)
        for i in range(width):
            partials[own + i] = origin_of(x, x_start + c * xs[3], weight, origins, b * channels + c)
            c = c + 1 if c + 1 < channels else 0
        x_at = channel_start(xs, b * channels, shape) + row * step + j * size
        mean = (b * segments + row // height) * row_of_results + place_of_cell(j, tile)
        m2, loose = results + mean, thread * SHIFT_AND_SUMS * pitch
        if weight is None:
            segment(x, x_at, step, end - row, width, size, partials, own, centre, mean, m2, workspace, loose, pitch)
        else:
            w_at = channel_start(ws, b * channels + j, shape) + row * ws[2]
            weighted_segment(
                x, x_at, step, weight, w_at, ws[2], ws[3], end - row, width, partials, own, centre,
                results + m2, mean, m2, workspace, loose, pitch,
            )  # fmt: skip


@inline
def find_cell_origins(x, x_at, channels_apart, cells, coefficients, at):
    for i in range(cells):
        coefficients[at + i] = origin_of(x, x_at + i * channels_apart, None, coefficients, 0)


@inline
def write_cells(x, x_at, x_step, channels_apart, shape, t, cells, partials, at, m2, apart, height, table, eps):
    """Moments of cells that are whole channels, from kept index t on, into the table of `write_moments`.

    Their segments' means and M2 stand from ``at`` and ``at + m2`` on, ``apart`` from segment to segment,
    their origins in the table's first row. The same as `merged`, `finished` and `write_moments`, eight at a time.
    """
    n, kept = lanes(partials, FULL), shape[0] * shape[2]
    one, plus, all_rows = splat(partials, 1.0, FULL), splat(partials, eps, FULL), np.float64(shape[1] * shape[3])
    if all_rows == 0.0:
        for k in range(t, t + cells):
            write_moments(table, k, kept, 0.0, np.nan, np.nan, 1.0, eps)
        return
    least, zero = splat(partials, all_rows * least_variance(x), FULL), splat(partials, 0.0, FULL)
    lower_underflow_flag()
    for i in range(0, cells, n):
        part = min(n, cells - i)
        mu, q = load(partials, at + i, FULL), load(partials, at + m2 + i, FULL)
        before = np.float64(min(height, shape[1]) * shape[3])
        for s in range(1, -(-shape[1] // height)):
            count = np.float64(min(height, shape[1] - s * height) * shape[3])
            ratio = count / (before + count)
            delta = load(partials, at + s * apart + i, FULL) - mu
            mu = mu + delta * splat(partials, ratio, FULL)
            q = q + (
                load(partials, at + m2 + s * apart + i, FULL) + delta * delta * splat(partials, before * ratio, FULL)
            )
            before += count
        mean = load_first(table, t + i, part, FULL) + mu
        counts = splat(partials, all_rows, FULL)
        store_part(table, t + i, part, counts, n)
        store_part(table, kept + t + i, part, q, n)
        store_part(table, 2 * kept + t + i, part, mean, n)
        store_part(table, 3 * kept + t + i, part, one / root(q / counts + plus), n)
        lost = underflowed(table[kept + t + i]) and any_greater(least, q)  # between segments
        if lost or any_greater(zero_where_zero(q, least - q), zero) or any_nan((mean - mean) + (q - q)):
            for k in range(t + i, t + i + part):
                q_k = table[kept + k]
                if is_sound(table[2 * kept + k], q_k, all_rows * least_variance(x)) and not (lost and q_k == 0.0):
                    continue
                at_k = x_at + (k - t) * channels_apart
                count, centre, q_k, unit = careful_moments(
                    x, at_k, x_step, None, 0, 0, shape, all_rows, origin_of(x, at_k, None, table, 0)
                )
                write_moments(table, k, kept, count, centre, q_k, unit, eps)
            lower_underflow_flag()


@kernel
def channel_moments(thread, first, last, x, weight, geometry, origins, partials, table, eps):
    """Moments of every kept index from those of its cells, into the table of `write_moments`."""
    shape, xs, ws = four(geometry, 0), four(geometry, 8), four(geometry, 12)
    fold, tile, height, _ = four(geometry, 4)
    channels, size, kept = shape[2], shape[3], shape[0] * shape[2]
    rows, cells = shape[1] // fold, channels * fold
    segments, row_of_results = -(-rows // height), places(cells, tile)
    results = shape[0] * segments * row_of_results
    if weight is None and fold == 1:
        t = first
        while t < last:
            j = t % channels
            width = min(last - t, channels - j, tile - j % tile)
            x_at = channel_start(xs, t, shape)
            find_cell_origins(x, x_at, xs[3], width, table, t)
            at = t // channels * segments * row_of_results + place_of_cell(j, tile)
            write_cells(
                x, x_at, xs[2], xs[3], shape, t, width, partials, at, results, row_of_results, height, table, eps
            )
            t += width
        return
    for t in range(first, last):
        x_at, w_at = channel_start(xs, t, shape), channel_start(ws, t, shape)
        origin = origin_of(x, x_at, weight, origins, t)
        a, mu, q = 0.0, 0.0, 0.0
        for s in range(segments):
            at = (t // channels * segments + s) * row_of_results
            for j in range(t % channels, cells, channels):
                k = at + place_of_cell(j, tile)
                n = np.float64(min(height, rows - s * height) * size)
                if weight is not None:
                    n = partials[2 * results + k]
                a, mu, q = merged(a, mu, q, n, partials[k], partials[results + k])
        for r in range(rows * fold, shape[1]):  # without weights: these are not folded
            a, mu, q = merged(a, mu, q, 1.0, value(x, x_at + r * xs[2]) - origin, 0.0)
        n, mean, m2, unit = finished(x, x_at, xs[2], weight, w_at, ws[2], shape, a, mu, q, origin)
        write_moments(table, t, kept, n, mean, m2, unit, eps)


# --- normalize --------------------------------------------------------------------------------------------------------


@inline
def normalize_rows(
    x, x_at, x_step, y, y_at, y_step, residual, r_at, r_step, rows, columns, end_columns,
    workspace, loose, pitch, relu, nontemporal, ahead,
):  # fmt: skip
    """In ``workspace`` are hi, scale and bias of every column; the last row has ``end_columns``.

    They ask for the columns ``ahead``; fused kernels for the next tile's, whose statistics then find them in cache.
    """
    n = lanes(x, FULL)
    hi, scale, bias = loose, loose + pitch, loose + 2 * pitch
    for r in range(rows):
        width = end_columns if r == rows - 1 else columns
        whole = width - width % n
        i, j, k = x_at + r * x_step, y_at + r * y_step, r_at + r * r_step
        for c in range(0, whole, n):
            prefetch(x, i + c + ahead)
            prefetch(residual, k + c + ahead)
            h, a, b = load(workspace, hi + c, FULL), load(workspace, scale + c, FULL), load(workspace, bias + c, FULL)
            put(y, j + c, normalized(load(x, i + c, FULL), load(residual, k + c, FULL), h, a, b, relu), nontemporal)
        if whole < width:
            c, part = whole, width - whole
            h, a, b = load(workspace, hi + c, FULL), load(workspace, scale + c, FULL), load(workspace, bias + c, FULL)
            z = load_first(residual, k + c, part, FULL)
            store_first(y, j + c, part, normalized(load_first(x, i + c, part, FULL), z, h, a, b, relu))


@kernel
def normalize(thread, first, last, x, y, residual, geometry, coefficients, eps, workspace, relu, nontemporal):
    """``y = ((x - mean) * scale + bias, + residual, relu)``; see `affine_of` for the coefficients and eps."""
    shape, xs, ys, rs = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    fold, tile, height, _ = four(geometry, 4)
    channels, size = shape[2], shape[3]
    rows, cells = -(-shape[1] // fold), channels * fold
    x_step, y_step, r_step = xs[2] * fold, ys[2] * fold, rs[2] * fold
    pitch = pitch_of(tile, size)
    loose = thread * AFFINE * pitch
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        t = b * channels
        spread_affine(x, coefficients, t, j, channels, shape[0] * channels, eps, width, size, workspace, loose, pitch)
        normalize_rows(
            x, channel_start(xs, t, shape) + row * x_step + j * size, x_step,
            y, channel_start(ys, t, shape) + row * y_step + j * size, y_step,
            residual, channel_start(rs, t, shape) + row * r_step + j * size, r_step,
            end - row, width * size, width_of_last_row(end, j, width, shape, fold) * size,
            workspace, loose, pitch, relu, nontemporal, AHEAD,
        )  # fmt: skip


@kernel
def forward(thread, first, last, x, y, residual, geometry, table, eps, partials, workspace, relu, nontemporal):
    """Moments and normalise, a tile of cells at a time: the second pass finds its rows in cache.

    The table is that of `write_moments`. Rows are not folded.
    """
    shape, xs, ys, rs = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    _, tile, height, _ = four(geometry, 4)
    channels, size, rows, kept = shape[2], shape[3], shape[1], shape[0] * shape[2]
    pitch = pitch_of(tile, size)
    apart, loose = places(tile, tile), thread * AFFINE * pitch
    own = thread * (ORIGINS + 2 * -(-rows // height)) * apart
    moments = own + ORIGINS * apart
    for k in range(first, last):
        b, _, _, j, width = task_at(k, 1, channels, 1, tile)
        t = b * channels + j
        x_at, y_at, r_at = channel_start(xs, t, shape), channel_start(ys, t, shape), channel_start(rs, t, shape)
        fill(partials, own, width, 0.0)
        find_cell_origins(x, x_at, xs[3], width, partials, own)
        for i in range(width):
            table[t + i] = partials[own + i]
        for row in range(0, rows, height):
            at = moments + row // height * 2 * apart
            segment(
                x, x_at + row * xs[2], xs[2], min(height, rows - row), width, size,
                partials, own, own + apart, at, at + apart, workspace, loose, pitch,
            )  # fmt: skip
        write_cells(x, x_at, xs[2], xs[3], shape, t, width, partials, moments, apart, 2 * apart, height, table, eps)
        spread_affine(x, table, 2 * kept + t, 0, width, kept, -1.0, width, size, workspace, loose, pitch)
        columns = width * size
        normalize_rows(
            x, x_at, xs[2], y, y_at, ys[2], residual, r_at, rs[2], rows, columns, columns,
            workspace, loose, pitch, relu, nontemporal, columns,
        )  # fmt: skip
