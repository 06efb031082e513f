"""Gradient kernels of the family `inner_reduction`, which go along a channel's rows: sums of dz, and dx.

Memory, chunks, geometry and bytes moved are described there.
"""

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
from fastbn.cpu.kernels.inner_reduction import (
    NARROW,
    SINGLE,
    chunk_at,
    chunk_count,
    kept_range,
    misaligned,
    piece_start,
    place_of,
    row_after,
    start_of,
)
from fastbn.cpu.kernels.simd import (
    blended,
    converted,
    fma,
    lanes,
    load,
    load_first,
    narrowed,
    rounded,
    splat,
    store,
    total,
    unit_of,
    zero_where_not_positive,
    zero_where_uncounted,
)
from fastbn.cpu.sizes import LINEAR, SEGMENT


@inline
def distance(x, i, weight, w, part, dz, hi, unit):
    """A vector of (x - hi) * unit, or its first ``part`` lanes; 0 where neither weight nor dz counts the element."""
    if part is None:
        return zero_where_uncounted(load(weight, w, dz), dz, (load(x, i, FULL) - hi) * unit)
    return zero_where_uncounted(load_first(weight, w, part, dz), dz, (load_first(x, i, part, FULL) - hi) * unit)


@inline
def chunk_grad_sums(
    dy, dy_at, dy_step, x, x_at, x_step, y, y_at, y_step, weight, w_at, w_step, rows, columns, mean, rstd
):  # fmt: skip
    """sum(dz), sum(dz * (x - hi)) in units of 1/unit, with dz = dy, or 0 where y <= 0, and hi the mean rounded.

    Two rows at a time, as in `inner_reduction.chunk_sums`.
    """
    n = lanes(x, FULL)
    hi, unit = splat(x, mean, FULL), splat(x, unit_of(x, rstd), FULL)
    s1 = splat(x, 0.0, FULL)
    s2, t1, t2 = s1, s1, s1
    pairs, whole = rows - rows % 2, columns - columns % n
    for r in range(0, pairs, 2):
        g, i, o, w = dy_at + r * dy_step, x_at + r * x_step, y_at + r * y_step, w_at + r * w_step
        for k in range(0, whole, n):
            dz = zero_where_not_positive(load(y, o + k, FULL), load(dy, g + k, FULL))
            s1 = s1 + dz
            s2 = fma(dz, distance(x, i + k, weight, w + k, None, dz, hi, unit), s2)
            dz = zero_where_not_positive(load(y, o + y_step + k, FULL), load(dy, g + dy_step + k, FULL))
            t1 = t1 + dz
            t2 = fma(dz, distance(x, i + x_step + k, weight, w + w_step + k, None, dz, hi, unit), t2)
    for r in range(pairs if whole == columns else 0, rows):
        g, i, o, w = dy_at + r * dy_step, x_at + r * x_step, y_at + r * y_step, w_at + r * w_step
        for k in range(whole if r < pairs else 0, columns, n):
            dz = load_first(dy, g + k, columns - k, FULL)
            dz = zero_where_not_positive(load_first(y, o + k, columns - k, FULL), dz)
            s1 = s1 + dz
            s2 = fma(dz, distance(x, i + k, weight, w + k, columns - k, dz, hi, unit), s2)
    return total(s1 + t1), total(s2 + t2)


@inline
def grad_segment(
    dy, dy_at, dy_step, x, x_at, x_step, y, y_at, y_step, weight, w_at, w_step, shape, grid, segment, mean, rstd
):  # fmt: skip
    a, b = 0.0, 0.0
    for k in range(segment * SEGMENT, min((segment + 1) * SEGMENT, chunk_count(shape, grid))):
        row, rows, column, columns = chunk_at(k, shape, grid)
        s1, s2 = chunk_grad_sums(
            dy, dy_at + row * dy_step + column, dy_step, x, x_at + row * x_step + column, x_step,
            y, y_at + row * y_step + column, y_step, weight, w_at + row * w_step + column, w_step,
            rows, columns, mean, rstd,
        )  # fmt: skip
        a, b = a + s1, b + s2
    return a, b


@inline
def around_mean(x, mean, rstd, a, b):
    """Dgamma from a = sum(dz) and b = sum(dz * (x - hi)) in units of 1/unit."""
    unit = unit_of(x, rstd)
    return (b - (mean - rounded(x, mean)) * unit * a) * (rstd / unit)


@kernel
def grad_sums_of_segments(thread, first, last, dy, x, y, weight, geometry, coefficients, partials):
    """sum(dz) and sum(dz * (x - hi)) of every segment of every kept index; the coefficients begin with (mean, rstd)."""
    shape, grid, dys = four(geometry, 0), four(geometry, 4), four(geometry, 8)
    xs, ys, ws = four(geometry, 12), four(geometry, 16), four(geometry, 20)
    segments, kept = -(-chunk_count(shape, grid) // SEGMENT), shape[0] * shape[2]
    for k in range(first, last):
        t = k // segments
        partials[2 * k], partials[2 * k + 1] = grad_segment(
            dy, channel_start(dys, t, shape), dys[2], x, channel_start(xs, t, shape), xs[2],
            y, channel_start(ys, t, shape), ys[2], weight, channel_start(ws, t, shape), ws[2],
            shape, grid, k % segments, coefficients[t], coefficients[kept + t],
        )  # fmt: skip


@kernel
def channel_grad_sums(thread, first, last, x, geometry, coefficients, partials, out, linear, frozen, mixed):
    """The results (dgamma, dbeta) from the segments' sums; the coefficients begin with (mean, rstd).

    If they are those of `input_coefficients`, then for ``linear`` see `write_linear`; else it is None.
    """
    shape, grid = four(geometry, 0), four(geometry, 4)
    segments = -(-chunk_count(shape, grid) // SEGMENT)
    kept = shape[0] * shape[2]
    for t in range(first, last):
        a, b = 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            a, b = a + partials[2 * k], b + partials[2 * k + 1]
        out[t], out[kept + t] = around_mean(x, coefficients[t], coefficients[kept + t], a, b), a
    if linear is not None:
        write_linear(x, coefficients, first, last, kept, frozen, mixed, out, linear)


@inline
def grad_input_end(dy, g, x, i, y, o, weight, w, dx, d, dresidual, e, n, linear):
    """The n values, less than a vector, at either end of a row: by short vectors, then one by one."""
    scale, hi, slope, offset, unit = linear
    k = 0
    while k + lanes(dy, NARROW) <= n:
        dz = zero_where_not_positive(load(y, o + k, NARROW), load(dy, g + k, NARROW))
        x_, w_ = load(x, i + k, NARROW), converted(load(weight, w + k, dz), dz)
        out = input_gradient(
            dz, x_, w_, narrowed(dy, scale, NARROW), narrowed(dy, hi, NARROW),
            narrowed(dy, slope, NARROW), narrowed(dy, offset, NARROW), narrowed(dy, unit, NARROW),
        )  # fmt: skip
        store(dx, d + k, out)
        store(dresidual, e + k, dz)
        k += lanes(dy, NARROW)
    while k < n:
        dz = zero_where_not_positive(load(y, o + k, SINGLE), load(dy, g + k, SINGLE))
        x_, w_ = load(x, i + k, SINGLE), converted(load(weight, w + k, dz), dz)
        out = input_gradient(
            dz, x_, w_, narrowed(dy, scale, SINGLE), narrowed(dy, hi, SINGLE),
            narrowed(dy, slope, SINGLE), narrowed(dy, offset, SINGLE), narrowed(dy, unit, SINGLE),
        )  # fmt: skip
        store(dx, d + k, out)
        store(dresidual, e + k, dz)
        k += 1


@inline
def grad_input_run(
    dy, g, x, i, y, o, weight, w, dx, d, dresidual, e, place, count, shape, workspace, at, pitch, nontemporal
):  # fmt: skip
    """As `inner_reduction.normalize_run`, with scale, hi, slope, offset and unit of `linear_of`."""
    n, inner = lanes(dy, FULL), shape[3]
    _, outer, channel, column = place
    lead = misaligned(dx, d, count) if nontemporal else 0
    k, edge = 0, min(inner - column, count)
    while k < count:
        scale, hi = splat(dy, workspace[at], FULL), splat(dy, workspace[at + pitch], FULL)
        slope, offset = splat(dy, workspace[at + 2 * pitch], FULL), splat(dy, workspace[at + 3 * pitch], FULL)
        unit = splat(dy, workspace[at + 4 * pitch], FULL)
        at, outer, channel = row_after(at, outer, channel, shape)
        if k < lead:
            part = min(lead, edge) - k
            grad_input_end(
                dy, g + k, x, i + k, y, o + k, weight, w + k, dx, d + k, dresidual, e + k, part,
                (scale, hi, slope, offset, unit),
            )  # fmt: skip
            k += part
        if k >= lead:
            while k + n <= edge:
                dz = zero_where_not_positive(load(y, o + k, FULL), load(dy, g + k, FULL))
                x_, w_ = load(x, i + k, FULL), converted(load(weight, w + k, dz), dz)
                put(dx, d + k, input_gradient(dz, x_, w_, scale, hi, slope, offset, unit), nontemporal)
                store(dresidual, e + k, dz)
                k += n
            if k < edge and (inner < n or k + n > count):
                grad_input_end(
                    dy, g + k, x, i + k, y, o + k, weight, w + k, dx, d + k, dresidual, e + k, edge - k,
                    (scale, hi, slope, offset, unit),
                )  # fmt: skip
                k = edge
            elif k < edge:
                scale = blended(edge - k, scale, splat(dy, workspace[at], FULL))
                hi = blended(edge - k, hi, splat(dy, workspace[at + pitch], FULL))
                slope = blended(edge - k, slope, splat(dy, workspace[at + 2 * pitch], FULL))
                offset = blended(edge - k, offset, splat(dy, workspace[at + 3 * pitch], FULL))
                unit = blended(edge - k, unit, splat(dy, workspace[at + 4 * pitch], FULL))
                dz = zero_where_not_positive(load(y, o + k, FULL), load(dy, g + k, FULL))
                x_, w_ = load(x, i + k, FULL), converted(load(weight, w + k, dz), dz)
                put(dx, d + k, input_gradient(dz, x_, w_, scale, hi, slope, offset, unit), nontemporal)
                store(dresidual, e + k, dz)
                k += n
        edge = min(edge + inner, count)


@kernel
def grad_input(thread, first, last, dy, x, y, weight, dx, dresidual, geometry, coefficients, workspace, nontemporal):
    """``dx`` (and ``dresidual = dz``), in the order of memory; coefficients: (mean, scale, offset, slope, unit)."""
    shape, dys, xs, ys = four(geometry, 0), four(geometry, 8), four(geometry, 12), four(geometry, 16)
    ws, dxs, drs = four(geometry, 20), four(geometry, 24), four(geometry, 28)
    _, _, run, pitch = four(geometry, 4)
    start, end = piece_start(first, shape[3]), piece_start(last, shape[3])
    own = LINEAR * thread * pitch
    t, t_end = kept_range(start, end, shape)
    linear_vectors(coefficients, t, t_end - t, shape[0] * shape[2], workspace, own, pitch)
    while start < end:
        place = place_of(start, shape)
        count = min(end, (start // run + 1) * run) - start
        grad_input_run(
            dy, start_of(dys, place), x, start_of(xs, place), y, start_of(ys, place), weight, start_of(ws, place),
            dx, start_of(dxs, place), dresidual, start_of(drs, place), place, count, shape,
            workspace, own + place[0] * shape[2] + place[2] - t, pitch, nontemporal,
        )  # fmt: skip
        start += count


@kernel
def backward(
    thread,
    first,
    last,
    dy,
    x,
    y,
    live,
    weight,
    dx,
    dresidual,
    geometry,
    coefficients,
    mixed,
    out,
    workspace,
    nontemporal,
):
    """Gradient sums and dx, a channel at a time: the second pass finds the slabs of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. The coefficients are those of
    `input_coefficients`, the results (dgamma, dbeta).
    """
    shape, grid, dys = four(geometry, 0), four(geometry, 4), four(geometry, 8)
    xs, ys, ws = four(geometry, 12), four(geometry, 16), four(geometry, 20)
    dxs, drs = four(geometry, 24), four(geometry, 28)
    kept, pitch = shape[0] * shape[2], geometry[7]
    own = LINEAR * thread * pitch
    for t in range(first, last):
        dy_at, x_at, y_at = channel_start(dys, t, shape), channel_start(xs, t, shape), channel_start(ys, t, shape)
        w_at, dx_at, dr_at = channel_start(ws, t, shape), channel_start(dxs, t, shape), channel_start(drs, t, shape)
        mean, rstd = coefficients[t], coefficients[kept + t]
        a, b = 0.0, 0.0
        for s in range(-(-chunk_count(shape, grid) // SEGMENT)):
            s1, s2 = grad_segment(
                dy, dy_at, dys[2], x, x_at, xs[2], y, y_at, ys[2], weight, w_at, ws[2], shape, grid, s, mean, rstd
            )
            a, b = a + s1, b + s2
        b = around_mean(x, mean, rstd, a, b)
        out[t], out[kept + t] = b, a
        scale, offset, slope, unit = input_coefficients(x, coefficients, t, kept, live is None, mixed, a, b)
        linear = linear_of(x, mean, scale, offset, slope, unit)
        for k in range(LINEAR):
            workspace[own + k * pitch] = linear[k]
        for r in range(shape[1]):
            grad_input_run(
                dy, dy_at + r * dys[2], live, x_at + r * xs[2], y, y_at + r * ys[2], weight, w_at + r * ws[2],
                dx, dx_at + r * dxs[2], dresidual, dr_at + r * drs[2], (0, r, t, 0), shape[3], shape,
                workspace, own, pitch, nontemporal,
            )  # fmt: skip
