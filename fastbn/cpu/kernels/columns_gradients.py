"""Gradient kernels of the family `columns`, which go through all channels: sums of dz, and dx.

Memory, chunks, geometry and bytes moved are described there.
"""

from fastbn.cpu.kernels.cells import (
    AHEAD,
    cell_totals,
    fill,
    in_float64,
    part_of,
    pitch_of,
    place_of_cell,
    places,
    repeat,
    spread,
    store_part,
    task_at,
    width_of_last_row,
)
from fastbn.cpu.kernels.compiler import inner, kernel
from fastbn.cpu.kernels.simd import (
    converted,
    fma,
    lanes,
    load,
    load_first,
    prefetch,
    rounded,
    splat,
    store,
    store_first,
    unit_of,
    value,
    zero_where_not_positive,
    zero_where_uncounted,
)
from fastbn.cpu.kernels.slab import (
    WIDTH,
    channel_start,
    enter_linear,
    four,
    input_gradient,
    input_numbers,
    linear_of,
    linear_vectors,
    put,
)
from fastbn.cpu.sizes import LINEAR, ROW_CHUNK, SUMMED, SUMS


@inner
def add_two_grad_rows(
    dy, g, g_far, x, i, i_far, y, o, o_far, weight, far_weight, part, work, c, pitch
):  # fmt: skip
    """Add two rows' dz and dz * (x - hi) * unit of one vector of columns, or a part, to the sums at c in ``work``."""
    hi, unit, s1, s2 = load(work, c, WIDTH), load(work, c + pitch, WIDTH), c + 2 * pitch, c + 3 * pitch
    p = zero_where_not_positive(part_of(y, o, part), part_of(dy, g, part))
    q = zero_where_not_positive(part_of(y, o + o_far, part), part_of(dy, g + g_far, part))
    store(work, s1, load(work, s1, WIDTH) + (p + q))
    of_p = zero_where_uncounted(weight, p, (part_of(x, i, part) - hi) * unit)
    of_q = zero_where_uncounted(far_weight, q, (part_of(x, i + i_far, part) - hi) * unit)
    store(work, s2, load(work, s2, WIDTH) + fma(p, of_p, q * of_q))


@inner
def grad_segment(
    dy, g, g_step, x, i, i_step, y, o, o_step, weight, w, w_step, rows, cells, size,
    parts, first_sum, second_sum, pitch, work, loose,
):  # fmt: skip
    """sum(dz) and sum(dz * (x - hi) * unit) of each cell of one segment, into two places of ``parts``.

    hi and unit are at ``loose``. A chunk has as many rows of both halves of the segment: four streams from memory, as
    in `columns.segment`. All columns share a weight.
    """
    n, columns = lanes(x, WIDTH), cells * size
    s1, s2 = loose + 2 * pitch, loose + 3 * pitch
    fill(parts, first_sum, cells, 0.0)
    fill(parts, second_sum, cells, 0.0)
    half, whole = rows // 2, columns - columns % n
    g_far, i_far, o_far = half * g_step, half * i_step, half * o_step
    for first in range(0, max(1, half), ROW_CHUNK // 2):
        fill(work, s1, columns, 0.0)
        fill(work, s2, columns, 0.0)
        end = min(first + ROW_CHUNK // 2, half)
        for r in range(first, end):
            g_row, i_row, o_row = g + r * g_step, i + r * i_step, o + r * o_step
            near = splat(x, value(weight, w + r * w_step), WIDTH)
            far = splat(x, value(weight, w + (half + r) * w_step), WIDTH)
            for c in range(0, whole, n):
                add_two_grad_rows(
                    dy, g_row + c, g_far, x, i_row + c, i_far, y, o_row + c, o_far, near, far, None,
                    work, loose + c, pitch,
                )  # fmt: skip
            if whole < columns:
                c = whole
                add_two_grad_rows(
                    dy, g_row + c, g_far, x, i_row + c, i_far, y, o_row + c, o_far, near, far, columns - c,
                    work, loose + c, pitch,
                )  # fmt: skip
        if rows % 2 > 0 and end == half:
            g_row, i_row, o_row = g + (rows - 1) * g_step, i + (rows - 1) * i_step, o + (rows - 1) * o_step
            w_ = splat(x, value(weight, w + (rows - 1) * w_step), WIDTH)
            for c in range(0, columns, n):
                dz = load_first(dy, g_row + c, columns - c, WIDTH)
                dz = zero_where_not_positive(load_first(y, o_row + c, columns - c, WIDTH), dz)
                e = load_first(x, i_row + c, columns - c, WIDTH) - load(work, loose + c, WIDTH)
                e = zero_where_uncounted(w_, dz, e * load(work, loose + pitch + c, WIDTH))
                store(work, s1 + c, load(work, s1 + c, WIDTH) + dz)
                store(work, s2 + c, fma(dz, e, load(work, s2 + c, WIDTH)))
        cell_totals(work, s1, cells, size, parts)
        cell_totals(work, s2, cells, size, parts)
        for j in range(0, cells, lanes(parts, WIDTH)):
            a, b = first_sum + j, second_sum + j
            store(parts, a, load(parts, a, WIDTH) + in_float64(work, s1 + j, parts))
            store(parts, b, load(parts, b, WIDTH) + in_float64(work, s2 + j, parts))


@kernel
def segment_grad_sums(share, first, last, dy, x, y, weight, geometry, numbers, parts, work):
    """sum(dz) and sum(dz * (x - hi) * unit) of each segment of each cell, first in ``parts``.

    The numbers begin with (mean, rstd).
    """
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws = four(geometry, 20)
    fold, tile, height, _ = four(geometry, 4)
    channels, size = shape[2], shape[3]
    rows, cells = shape[1] // fold, channels * fold
    g_step, i_step, o_step = dys[2] * fold, xs[2] * fold, ys[2] * fold
    pitch, loose = pitch_of(tile, size), share * SUMMED * pitch_of(tile, size)
    segments, kept = -(-rows // height), shape[0] * channels
    row_of_results = places(cells, tile)
    results = shape[0] * segments * row_of_results
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        t = b * channels
        c = j % channels
        for i in range(width):
            spread(work, loose + i * size, rounded(x, numbers[t + c]), size)
            spread(work, loose + pitch + i * size, unit_of(x, numbers[kept + t + c]), size)
            c = c + 1 if c + 1 < channels else 0
        at = (b * segments + row // height) * row_of_results + place_of_cell(j, tile)
        grad_segment(
            dy, channel_start(dys, t, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, t, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, t, shape) + row * o_step + j * size, o_step,
            weight, channel_start(ws, t, shape) + row * ws[2], ws[2],
            end - row, width, size, parts, at, results + at, pitch, work, loose,
        )  # fmt: skip


@inner
def enter_grad_sums(x, t, count, kept, parts, at, second, apart, segments, numbers, out):
    """(dgamma, dbeta) of channels from t on, whose segments' sums are ``apart``: eight at a time."""
    n = lanes(parts, WIDTH)
    for i in range(0, count, n):
        part = min(n, count - i)
        p = splat(parts, 0.0, WIDTH)
        q = p
        for s in range(segments):
            p = p + load_first(parts, at + s * apart + i, part, WIDTH)
            q = q + load_first(parts, second + at + s * apart + i, part, WIDTH)
        mean, rstd = load_first(numbers, t + i, part, WIDTH), load_first(numbers, kept + t + i, part, WIDTH)
        hi, unit = converted(converted(mean, splat(x, 0.0, mean)), mean), unit_of(x, rstd)
        store_part(out, t + i, part, (q - (mean - hi) * unit * p) * (rstd / unit), n)
        store_part(out, kept + t + i, part, p, n)


@kernel
def channel_grad_sums(share, first, last, dy, x, y, geometry, numbers, parts, out, linear, frozen, mixed):
    """The results (dgamma, dbeta) of every kept index from its cells' sums; the numbers begin with (mean, rstd).

    If they are those of `input_numbers`, then for ``linear`` see `enter_linear`; else it is None.
    """
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    fold, tile, height, _ = four(geometry, 4)
    channels, kept = shape[2], shape[0] * shape[2]
    rows, cells = shape[1] // fold, channels * fold
    segments = -(-rows // height)
    row_of_results = places(cells, tile)
    results = shape[0] * segments * row_of_results
    whole = first
    while fold == 1 and whole < last:
        j = whole % channels
        width = min(last - whole, channels - j, tile - j % tile)
        at = whole // channels * segments * row_of_results + place_of_cell(j, tile)
        enter_grad_sums(x, whole, width, kept, parts, at, results, row_of_results, segments, numbers, out)
        whole += width
    for t in range(whole, last):
        p, q = 0.0, 0.0
        for s in range(segments):
            at = (t // channels * segments + s) * row_of_results
            for j in range(t % channels, cells, channels):
                k = at + place_of_cell(j, tile)
                p, q = p + parts[k], q + parts[results + k]
        hi, unit, rstd = rounded(x, numbers[t]), unit_of(x, numbers[kept + t]), numbers[kept + t]
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        for r in range(rows * fold, shape[1]):
            dz = value(dy, g + r * dys[2])
            if y is not None and value(y, o + r * ys[2]) <= 0.0:
                dz = 0.0
            p, q = p + dz, q + dz * ((value(x, i + r * xs[2]) - hi) * unit)
        out[t], out[kept + t] = (q - (numbers[t] - hi) * unit * p) * (rstd / unit), p
    if linear is not None:
        enter_linear(x, numbers, first, last, kept, frozen, mixed, out, linear)


@inner
def put_if_there(y, at, v, streaming):
    if y is not None:
        put(y, at, v, streaming)


@inner
def grad_input_rows(
    dy, g, g_step, x, i, i_step, y, o, o_step, weight, w, w_step, dx, d, d_step, dresidual, e, e_step,
    rows, columns, end_columns, work, loose, pitch, streaming, ahead,
):  # fmt: skip
    """As `normalize_rows`; in ``work`` are scale, hi, slope, offset and unit of every column."""
    n = lanes(dy, WIDTH)
    scale, hi, slope, offset = loose, loose + pitch, loose + 2 * pitch, loose + 3 * pitch
    unit = loose + 4 * pitch
    for r in range(rows):
        width = end_columns if r == rows - 1 else columns
        whole = width - width % n
        w_ = splat(dy, value(weight, w + r * w_step), WIDTH)
        for c in range(0, whole, n):
            prefetch(dy, g + r * g_step + c + ahead)
            prefetch(x, i + r * i_step + c + ahead)
            a, h = load(work, scale + c, WIDTH), load(work, hi + c, WIDTH)
            p, q = load(work, slope + c, WIDTH), load(work, offset + c, WIDTH)
            dz = zero_where_not_positive(load(y, o + r * o_step + c, WIDTH), load(dy, g + r * g_step + c, WIDTH))
            x_ = load(x, i + r * i_step + c, WIDTH)
            dx_ = input_gradient(dz, x_, w_, a, h, p, q, load(work, unit + c, WIDTH))
            put(dx, d + r * d_step + c, dx_, streaming)
            put_if_there(dresidual, e + r * e_step + c, dz, streaming)
        if whole < width:
            c, part = whole, width - whole
            a, h = load(work, scale + c, WIDTH), load(work, hi + c, WIDTH)
            p, q = load(work, slope + c, WIDTH), load(work, offset + c, WIDTH)
            dz = load_first(dy, g + r * g_step + c, part, WIDTH)
            dz = zero_where_not_positive(load_first(y, o + r * o_step + c, part, WIDTH), dz)
            x_ = load_first(x, i + r * i_step + c, part, WIDTH)
            dx_ = input_gradient(dz, x_, w_, a, h, p, q, load(work, unit + c, WIDTH))
            store_first(dx, d + r * d_step + c, part, dx_)
            store_first(dresidual, e + r * e_step + c, part, dz)


@inner
def spread_linear(x, work, at, pitch, size, mean, scale, offset, slope, unit):
    """What `grad_input_rows` wants of one cell."""
    linear = linear_of(x, mean, scale, offset, slope, unit)
    for k in range(LINEAR):
        spread(work, at + k * pitch, linear[k], size)


@inner
def spread_all_linear(x, numbers, t, j, channels, kept, cells, size, work, at, pitch):
    """The same of the cells from j on; t is the kept index of channel 0."""
    if size == 1 and (j == 0 or j + cells <= channels):
        linear_vectors(numbers, t + j % channels, min(cells, channels), kept, work, at, pitch)
        for k in range(LINEAR):
            repeat(work, at + k * pitch, channels, cells)
    else:
        c = t + j % channels
        for i in range(cells):
            spread_linear(
                x, work, at + i * size, pitch, size,
                numbers[c], numbers[kept + c], numbers[2 * kept + c], numbers[3 * kept + c], numbers[4 * kept + c],
            )  # fmt: skip
            c = c + 1 if c + 1 < t + channels else t


@kernel
def grad_input(share, first, last, dy, x, y, weight, dx, dresidual, geometry, numbers, work, streaming):
    """``dx`` (and ``dresidual = dz``); the numbers are (mean, scale, offset, slope, unit)."""
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws, dxs, drs = four(geometry, 20), four(geometry, 24), four(geometry, 28)
    fold, tile, height, _ = four(geometry, 4)
    channels, size, kept = shape[2], shape[3], shape[0] * shape[2]
    rows, cells = -(-shape[1] // fold), channels * fold
    g_step, i_step, o_step, d_step, e_step = dys[2] * fold, xs[2] * fold, ys[2] * fold, dxs[2] * fold, drs[2] * fold
    pitch = pitch_of(tile, size)
    loose = share * LINEAR * pitch
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        t = b * channels
        spread_all_linear(dy, numbers, t, j, channels, kept, width, size, work, loose, pitch)
        grad_input_rows(
            dy, channel_start(dys, t, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, t, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, t, shape) + row * o_step + j * size, o_step,
            weight, channel_start(ws, t, shape) + row * ws[2], ws[2],
            dx, channel_start(dxs, t, shape) + row * d_step + j * size, d_step,
            dresidual, channel_start(drs, t, shape) + row * e_step + j * size, e_step,
            end - row, width * size, width_of_last_row(end, j, width, shape, fold) * size,
            work, loose, pitch, streaming, AHEAD,
        )  # fmt: skip


@kernel
def backward(share, first, last, dy, x, y, live, dx, dresidual, geometry, numbers, mixed, out, parts, work, streaming):
    """Gradient sums and dx, a tile of cells at a time: the second pass finds its rows of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. The numbers are those of
    `input_numbers`, the results (dgamma, dbeta). Rows are not folded.
    """
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    dxs, drs = four(geometry, 24), four(geometry, 28)
    _, tile, height, _ = four(geometry, 4)
    channels, size, rows, kept = shape[2], shape[3], shape[1], shape[0] * shape[2]
    pitch = pitch_of(tile, size)
    loose, own, apart = share * LINEAR * pitch, share * SUMS * places(tile, tile), places(tile, tile)
    for k in range(first, last):
        b, _, _, j, width = task_at(k, 1, channels, 1, tile)
        t = b * channels + j
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        d, e = channel_start(dxs, t, shape), channel_start(drs, t, shape)
        for c in range(width):
            spread(work, loose + c * size, rounded(x, numbers[t + c]), size)
            spread(work, loose + pitch + c * size, unit_of(x, numbers[kept + t + c]), size)
            out[t + c] = out[kept + t + c] = 0.0
        for row in range(0, rows, height):
            grad_segment(
                dy, g + row * dys[2], dys[2], x, i + row * xs[2], xs[2], y, o + row * ys[2], ys[2], None, 0, 0,
                min(height, rows - row), width, size, parts, own, own + apart, pitch, work, loose,
            )  # fmt: skip
            for c in range(width):
                out[kept + t + c] += parts[own + c]
                out[t + c] += parts[own + apart + c]
        for c in range(width):
            mean, rstd, a = numbers[t + c], numbers[kept + t + c], out[kept + t + c]
            unit = unit_of(x, rstd)
            b_ = (out[t + c] - (mean - rounded(x, mean)) * unit * a) * (rstd / unit)
            out[t + c] = b_
            scale, offset, slope, unit = input_numbers(x, numbers, t + c, kept, live is None, mixed, a, b_)
            spread_linear(x, work, loose + c * size, pitch, size, mean, scale, offset, slope, unit)
        columns = width * size
        grad_input_rows(
            dy, g, dys[2], live, i, xs[2], y, o, ys[2], None, 0, 0, dx, d, dxs[2], dresidual, e, drs[2],
            rows, columns, columns, work, loose, pitch, streaming, columns,
        )  # fmt: skip
