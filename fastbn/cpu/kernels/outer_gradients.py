"""Gradient kernels of the family `outer_reduction`, which go through all channels: sums of dz, and dx.

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
from fastbn.cpu.kernels.common import (
    FULL,
    channel_start,
    four,
    input_coefficients,
    input_gradient,
    linear_of,
    linear_vectors,
    put,
    write_linear,
)
from fastbn.cpu.kernels.compiler import inline, kernel
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
from fastbn.cpu.sizes import LINEAR, ROW_CHUNK, SUMMED, SUMS


@inline
def add_two_grad_rows(
    dy, g, g_far, x, i, i_far, y, o, o_far, weight, far_weight, part, workspace, c, pitch
):  # fmt: skip
    """Add two rows' dz and dz * (x - hi) * unit of one vector of columns, or a part, to the sums at c."""
    hi, unit, s1, s2 = load(workspace, c, FULL), load(workspace, c + pitch, FULL), c + 2 * pitch, c + 3 * pitch
    p = zero_where_not_positive(part_of(y, o, part), part_of(dy, g, part))
    q = zero_where_not_positive(part_of(y, o + o_far, part), part_of(dy, g + g_far, part))
    store(workspace, s1, load(workspace, s1, FULL) + (p + q))
    of_p = zero_where_uncounted(weight, p, (part_of(x, i, part) - hi) * unit)
    of_q = zero_where_uncounted(far_weight, q, (part_of(x, i + i_far, part) - hi) * unit)
    store(workspace, s2, load(workspace, s2, FULL) + fma(p, of_p, q * of_q))


@inline
def grad_segment(
    dy, g, g_step, x, i, i_step, y, o, o_step, weight, w, w_step, rows, cells, size,
    partials, first_sum, second_sum, pitch, workspace, loose,
):  # fmt: skip
    """sum(dz) and sum(dz * (x - hi) * unit) of each cell of one segment, into two places of ``partials``.

    hi and unit are at ``loose``. A chunk has as many rows of both halves of the segment: four streams from memory, as
    in `outer_reduction.segment`. All columns thread a weight.
    """
    n, columns = lanes(x, FULL), cells * size
    s1, s2 = loose + 2 * pitch, loose + 3 * pitch
    fill(partials, first_sum, cells, 0.0)
    fill(partials, second_sum, cells, 0.0)
    half, whole = rows // 2, columns - columns % n
    g_far, i_far, o_far = half * g_step, half * i_step, half * o_step
    for first in range(0, max(1, half), ROW_CHUNK // 2):
        fill(workspace, s1, columns, 0.0)
        fill(workspace, s2, columns, 0.0)
        end = min(first + ROW_CHUNK // 2, half)
        for r in range(first, end):
            g_row, i_row, o_row = g + r * g_step, i + r * i_step, o + r * o_step
            near = splat(x, value(weight, w + r * w_step), FULL)
            far = splat(x, value(weight, w + (half + r) * w_step), FULL)
            for c in range(0, whole, n):
                add_two_grad_rows(
                    dy, g_row + c, g_far, x, i_row + c, i_far, y, o_row + c, o_far, near, far, None,
                    workspace, loose + c, pitch,
                )  # fmt: skip
            if whole < columns:
                c = whole
                add_two_grad_rows(
                    dy, g_row + c, g_far, x, i_row + c, i_far, y, o_row + c, o_far, near, far, columns - c,
                    workspace, loose + c, pitch,
                )  # fmt: skip
        if rows % 2 > 0 and end == half:
            g_row, i_row, o_row = g + (rows - 1) * g_step, i + (rows - 1) * i_step, o + (rows - 1) * o_step
            w_ = splat(x, value(weight, w + (rows - 1) * w_step), FULL)
            for c in range(0, columns, n):
                dz = load_first(dy, g_row + c, columns - c, FULL)
                dz = zero_where_not_positive(load_first(y, o_row + c, columns - c, FULL), dz)
                e = load_first(x, i_row + c, columns - c, FULL) - load(workspace, loose + c, FULL)
                e = zero_where_uncounted(w_, dz, e * load(workspace, loose + pitch + c, FULL))
                store(workspace, s1 + c, load(workspace, s1 + c, FULL) + dz)
                store(workspace, s2 + c, fma(dz, e, load(workspace, s2 + c, FULL)))
        cell_totals(workspace, s1, cells, size, partials)
        cell_totals(workspace, s2, cells, size, partials)
        for j in range(0, cells, lanes(partials, FULL)):
            a, b = first_sum + j, second_sum + j
            store(partials, a, load(partials, a, FULL) + in_float64(workspace, s1 + j, partials))
            store(partials, b, load(partials, b, FULL) + in_float64(workspace, s2 + j, partials))


@kernel
def segment_grad_sums(thread, first, last, dy, x, y, weight, geometry, coefficients, partials, workspace):
    """sum(dz) and sum(dz * (x - hi) * unit) of each segment of each cell, first in ``partials``.

    The coefficients begin with (mean, rstd).
    """
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws = four(geometry, 20)
    fold, tile, height, _ = four(geometry, 4)
    channels, size = shape[2], shape[3]
    rows, cells = shape[1] // fold, channels * fold
    g_step, i_step, o_step = dys[2] * fold, xs[2] * fold, ys[2] * fold
    pitch, loose = pitch_of(tile, size), thread * SUMMED * pitch_of(tile, size)
    segments, kept = -(-rows // height), shape[0] * channels
    row_of_results = places(cells, tile)
    results = shape[0] * segments * row_of_results
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        t = b * channels
        c = j % channels
        for i in range(width):
            spread(workspace, loose + i * size, rounded(x, coefficients[t + c]), size)
            spread(workspace, loose + pitch + i * size, unit_of(x, coefficients[kept + t + c]), size)
            c = c + 1 if c + 1 < channels else 0
        at = (b * segments + row // height) * row_of_results + place_of_cell(j, tile)
        grad_segment(
            dy, channel_start(dys, t, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, t, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, t, shape) + row * o_step + j * size, o_step,
            weight, channel_start(ws, t, shape) + row * ws[2], ws[2],
            end - row, width, size, partials, at, results + at, pitch, workspace, loose,
        )  # fmt: skip


@inline
def write_grad_sums(x, t, count, kept, partials, at, second, apart, segments, coefficients, out):
    """(dgamma, dbeta) of channels from t on, whose segments' sums are ``apart``: eight at a time."""
    n = lanes(partials, FULL)
    for i in range(0, count, n):
        part = min(n, count - i)
        p = splat(partials, 0.0, FULL)
        q = p
        for s in range(segments):
            p = p + load_first(partials, at + s * apart + i, part, FULL)
            q = q + load_first(partials, second + at + s * apart + i, part, FULL)
        mean, rstd = load_first(coefficients, t + i, part, FULL), load_first(coefficients, kept + t + i, part, FULL)
        hi, unit = converted(converted(mean, splat(x, 0.0, mean)), mean), unit_of(x, rstd)
        store_part(out, t + i, part, (q - (mean - hi) * unit * p) * (rstd / unit), n)
        store_part(out, kept + t + i, part, p, n)


@kernel
def channel_grad_sums(thread, first, last, dy, x, y, geometry, coefficients, partials, out, linear, frozen, mixed):
    """The results (dgamma, dbeta) of every kept index from its cells' sums; the coefficients begin with (mean, rstd).

    If they are those of `input_coefficients`, then for ``linear`` see `write_linear`; else it is None.
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
        write_grad_sums(x, whole, width, kept, partials, at, results, row_of_results, segments, coefficients, out)
        whole += width
    for t in range(whole, last):
        p, q = 0.0, 0.0
        for s in range(segments):
            at = (t // channels * segments + s) * row_of_results
            for j in range(t % channels, cells, channels):
                k = at + place_of_cell(j, tile)
                p, q = p + partials[k], q + partials[results + k]
        hi, unit, rstd = rounded(x, coefficients[t]), unit_of(x, coefficients[kept + t]), coefficients[kept + t]
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        for r in range(rows * fold, shape[1]):
            dz = value(dy, g + r * dys[2])
            if y is not None and value(y, o + r * ys[2]) <= 0.0:
                dz = 0.0
            p, q = p + dz, q + dz * ((value(x, i + r * xs[2]) - hi) * unit)
        out[t], out[kept + t] = (q - (coefficients[t] - hi) * unit * p) * (rstd / unit), p
    if linear is not None:
        write_linear(x, coefficients, first, last, kept, frozen, mixed, out, linear)


@inline
def put_if_there(y, at, v, nontemporal):
    if y is not None:
        put(y, at, v, nontemporal)


@inline
def grad_input_rows(
    dy, g, g_step, x, i, i_step, y, o, o_step, weight, w, w_step, dx, d, d_step, dresidual, e, e_step,
    rows, columns, end_columns, workspace, loose, pitch, nontemporal, ahead,
):  # fmt: skip
    """As `normalize_rows`; in ``workspace`` are scale, hi, slope, offset and unit of every column."""
    n = lanes(dy, FULL)
    scale, hi, slope, offset = loose, loose + pitch, loose + 2 * pitch, loose + 3 * pitch
    unit = loose + 4 * pitch
    for r in range(rows):
        width = end_columns if r == rows - 1 else columns
        whole = width - width % n
        w_ = splat(dy, value(weight, w + r * w_step), FULL)
        for c in range(0, whole, n):
            prefetch(dy, g + r * g_step + c + ahead)
            prefetch(x, i + r * i_step + c + ahead)
            a, h = load(workspace, scale + c, FULL), load(workspace, hi + c, FULL)
            p, q = load(workspace, slope + c, FULL), load(workspace, offset + c, FULL)
            dz = zero_where_not_positive(load(y, o + r * o_step + c, FULL), load(dy, g + r * g_step + c, FULL))
            x_ = load(x, i + r * i_step + c, FULL)
            dx_ = input_gradient(dz, x_, w_, a, h, p, q, load(workspace, unit + c, FULL))
            put(dx, d + r * d_step + c, dx_, nontemporal)
            put_if_there(dresidual, e + r * e_step + c, dz, nontemporal)
        if whole < width:
            c, part = whole, width - whole
            a, h = load(workspace, scale + c, FULL), load(workspace, hi + c, FULL)
            p, q = load(workspace, slope + c, FULL), load(workspace, offset + c, FULL)
            dz = load_first(dy, g + r * g_step + c, part, FULL)
            dz = zero_where_not_positive(load_first(y, o + r * o_step + c, part, FULL), dz)
            x_ = load_first(x, i + r * i_step + c, part, FULL)
            dx_ = input_gradient(dz, x_, w_, a, h, p, q, load(workspace, unit + c, FULL))
            store_first(dx, d + r * d_step + c, part, dx_)
            store_first(dresidual, e + r * e_step + c, part, dz)


@inline
def spread_linear(x, workspace, at, pitch, size, mean, scale, offset, slope, unit):
    """What `grad_input_rows` wants of one cell."""
    linear = linear_of(x, mean, scale, offset, slope, unit)
    for k in range(LINEAR):
        spread(workspace, at + k * pitch, linear[k], size)


@inline
def spread_all_linear(x, coefficients, t, j, channels, kept, cells, size, workspace, at, pitch):
    """The same of the cells from j on; t is the kept index of channel 0."""
    if size == 1 and (j == 0 or j + cells <= channels):
        linear_vectors(coefficients, t + j % channels, min(cells, channels), kept, workspace, at, pitch)
        for k in range(LINEAR):
            repeat(workspace, at + k * pitch, channels, cells)
    else:
        c = t + j % channels
        for i in range(cells):
            spread_linear(
                x, workspace, at + i * size, pitch, size,
                coefficients[c], coefficients[kept + c], coefficients[2 * kept + c],
                coefficients[3 * kept + c], coefficients[4 * kept + c],
            )  # fmt: skip
            c = c + 1 if c + 1 < t + channels else t


@kernel
def grad_input(thread, first, last, dy, x, y, weight, dx, dresidual, geometry, coefficients, workspace, nontemporal):
    """``dx`` (and ``dresidual = dz``); the coefficients are (mean, scale, offset, slope, unit)."""
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws, dxs, drs = four(geometry, 20), four(geometry, 24), four(geometry, 28)
    fold, tile, height, _ = four(geometry, 4)
    channels, size, kept = shape[2], shape[3], shape[0] * shape[2]
    rows, cells = -(-shape[1] // fold), channels * fold
    g_step, i_step, o_step, d_step, e_step = dys[2] * fold, xs[2] * fold, ys[2] * fold, dxs[2] * fold, drs[2] * fold
    pitch = pitch_of(tile, size)
    loose = thread * LINEAR * pitch
    for k in range(first, last):
        b, row, end, j, width = task_at(k, rows, cells, height, tile)
        t = b * channels
        spread_all_linear(dy, coefficients, t, j, channels, kept, width, size, workspace, loose, pitch)
        grad_input_rows(
            dy, channel_start(dys, t, shape) + row * g_step + j * size, g_step,
            x, channel_start(xs, t, shape) + row * i_step + j * size, i_step,
            y, channel_start(ys, t, shape) + row * o_step + j * size, o_step,
            weight, channel_start(ws, t, shape) + row * ws[2], ws[2],
            dx, channel_start(dxs, t, shape) + row * d_step + j * size, d_step,
            dresidual, channel_start(drs, t, shape) + row * e_step + j * size, e_step,
            end - row, width * size, width_of_last_row(end, j, width, shape, fold) * size,
            workspace, loose, pitch, nontemporal, AHEAD,
        )  # fmt: skip


@kernel
def backward(
    thread,
    first,
    last,
    dy,
    x,
    y,
    live,
    dx,
    dresidual,
    geometry,
    coefficients,
    mixed,
    out,
    partials,
    workspace,
    nontemporal,
):
    """Gradient sums and dx, a tile of cells at a time: the second pass finds its rows of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. The coefficients are those of
    `input_coefficients`, the results (dgamma, dbeta). Rows are not folded.
    """
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    dxs, drs = four(geometry, 24), four(geometry, 28)
    _, tile, height, _ = four(geometry, 4)
    channels, size, rows, kept = shape[2], shape[3], shape[1], shape[0] * shape[2]
    pitch = pitch_of(tile, size)
    loose, own, apart = thread * LINEAR * pitch, thread * SUMS * places(tile, tile), places(tile, tile)
    for k in range(first, last):
        b, _, _, j, width = task_at(k, 1, channels, 1, tile)
        t = b * channels + j
        g, i, o = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        d, e = channel_start(dxs, t, shape), channel_start(drs, t, shape)
        for c in range(width):
            spread(workspace, loose + c * size, rounded(x, coefficients[t + c]), size)
            spread(workspace, loose + pitch + c * size, unit_of(x, coefficients[kept + t + c]), size)
            out[t + c] = out[kept + t + c] = 0.0
        for row in range(0, rows, height):
            grad_segment(
                dy, g + row * dys[2], dys[2], x, i + row * xs[2], xs[2], y, o + row * ys[2], ys[2], None, 0, 0,
                min(height, rows - row), width, size, partials, own, own + apart, pitch, workspace, loose,
            )  # fmt: skip
            for c in range(width):
                out[kept + t + c] += partials[own + c]
                out[t + c] += partials[own + apart + c]
        for c in range(width):
            mean, rstd, a = coefficients[t + c], coefficients[kept + t + c], out[kept + t + c]
            unit = unit_of(x, rstd)
            b_ = (out[t + c] - (mean - rounded(x, mean)) * unit * a) * (rstd / unit)
            out[t + c] = b_
            scale, offset, slope, unit = input_coefficients(x, coefficients, t + c, kept, live is None, mixed, a, b_)
            spread_linear(x, workspace, loose + c * size, pitch, size, mean, scale, offset, slope, unit)
        columns = width * size
        grad_input_rows(
            dy, g, dys[2], live, i, xs[2], y, o, ys[2], None, 0, 0, dx, d, dxs[2], dresidual, e, drs[2],
            rows, columns, columns, workspace, loose, pitch, nontemporal, columns,
        )  # fmt: skip
