"""Gradients along memory, for what `inner_reduction` takes: sums of dz, and dx.

For each channel, and each batch index if the batch is kept, with x, dy, y and the weights w as (outer, inner):

    dz = np.where(y <= 0, 0, dy)                       # or dy, without relu; this is the residual's gradient
                                                       # without a residual y may be computed of x again: S bytes less
    xhat = (x - mean) * rstd
    dbeta, dgamma = dz.sum(), (dz * xhat).sum()
    dx = gamma * rstd * (dz - w / n * (dbeta + xhat * dgamma))
    dx += w / n * (dmean + 2 * dvar * (x - mean))      # what comes back through the moments themselves
    dx = gamma * rstd * dz                             # instead, if the statistics are frozen

Chunks, segments and the order of sums are those of `inner_reduction`, so the fused kernel (`backward`) gives the same
bits as the separate kernels. Elements are taken relative to hi, the mean rounded to the compute type, and what that
leaves out is added to the finished sums. In terms of `records.Distances`, of which `common.distances_of` has the
formulas: ``dx = unit * (scale * dz - w * (offset + slope * (x - mean)))``, the unit a power of two, 1 unless rstd is
so far from it (30 binary orders) that squares could leave float32's range.

Bytes moved, S = the bytes of x: grad_sums 2S, grad_input 3S; backward 3S where the slabs of dy and x stay in cache
between the two passes over them.
"""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.common import (
    FULL,
    NARROW,
    SINGLE,
    affine_again,
    affine_table,
    around,
    dgamma_of,
    distances_of,
    input_gradient,
    linear_of,
    parameters_of_y,
    put,
    relu_gradient,
    rows_from,
    rows_of,
    start_of_row,
    write_affine,
    write_distances,
    write_linear,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.inner_places import (
    Place,
    chunk_at,
    chunk_count,
    kept_at,
    kept_range,
    piece_start,
    place_behind,
    place_of,
    row_after,
    row_in_turn,
    segment_count,
    values_from,
    values_in_run,
)
from fastbn.cpu.kernels.inner_reduction import (
    ONE_ROW,
    affine_in_all_lanes,
    blended_affine,
    gap_of,
    load_across,
    misaligned,
    narrowed_affine,
    write_one_affine,
)
from fastbn.cpu.kernels.pointers import advance, table_rows
from fastbn.cpu.kernels.simd import (
    blended,
    converted,
    fma,
    lanes,
    load,
    load_first,
    narrowed,
    splat,
    store,
    total,
    unit_of,
    zero_where_uncounted,
)
from fastbn.cpu.records import Affine, Distances, GradientParameters, Linear, SegmentSums, Sums
from fastbn.cpu.sizes import LINEAR, PAD, SEGMENT


class ChannelRows(NamedTuple):
    """The rows of a channel that sums are made of; an `Affine` where y is computed again, else None."""

    dy: Any
    x: Any
    y: Any
    weight: Any
    affine: Any


class Inputs(NamedTuple):
    """Pointers to values that lie side by side."""

    dy: Any
    x: Any
    y: Any
    weight: Any


class GradientGaps(NamedTuple):
    """Values between their rows, where rows of the results have none."""

    dy: Any
    x: Any
    y: Any
    weight: Any


class Numbers(NamedTuple):
    """Tables, or vectors of a channel: a `Linear`, and an `Affine` where y is computed again, else None."""

    linear: Any
    affine: Any


class Outputs(NamedTuple):
    """Pointers to where their gradients go."""

    dx: Any
    dresidual: Any


@inline
def channel_rows(dy, x, y, weight, affine, t, shape):
    return ChannelRows(
        rows_of(dy, t, shape), rows_of(x, t, shape), rows_of(y, t, shape), rows_of(weight, t, shape), affine
    )


# --- sums -------------------------------------------------------------------------------------------------------------


@inline
def dz_at(slabs, row, column, affine):
    """A vector of dz."""
    dy = load(slabs.dy.values, start_of_row(slabs.dy, row) + column, FULL)
    y = load(slabs.y.values, start_of_row(slabs.y, row) + column, FULL)
    x = load(slabs.x.values, start_of_row(slabs.x, row) + column, FULL)
    return relu_gradient(slabs.x.values, dy, y, x, affine)


@inline
def dz_at_end(slabs, row, column, n, affine):
    """Its first n lanes."""
    dy = load_first(slabs.dy.values, start_of_row(slabs.dy, row) + column, n, FULL)
    y = load_first(slabs.y.values, start_of_row(slabs.y, row) + column, n, FULL)
    x = load_first(slabs.x.values, start_of_row(slabs.x, row) + column, n, FULL)
    return relu_gradient(slabs.x.values, dy, y, x, affine)


@inline
def affine_in_lanes(x, one):
    """Of a channel; None without."""
    if one is None:
        return None
    return Affine(splat(x, one.hi, FULL), splat(x, one.scale, FULL), splat(x, one.bias, FULL))


@inline
def distance_at(slabs, row, column, dz, hi, unit):
    """A vector of (x - hi) * unit; 0 where neither weight nor dz counts the element."""
    x, weight = slabs.x, slabs.weight
    distance = (load(x.values, start_of_row(x, row) + column, FULL) - hi) * unit
    return zero_where_uncounted(load(weight.values, start_of_row(weight, row) + column, dz), dz, distance)


@inline
def distance_at_end(slabs, row, column, n, dz, hi, unit):
    """Its first n lanes."""
    x, weight = slabs.x, slabs.weight
    distance = (load_first(x.values, start_of_row(x, row) + column, n, FULL) - hi) * unit
    return zero_where_uncounted(load_first(weight.values, start_of_row(weight, row) + column, n, dz), dz, distance)


@inline
def chunk_grad_sums(slabs, rows, columns, mean, rstd):
    """sum(dz), sum(dz * (x - hi)) in units of 1/unit.

    Two rows at a time, as in `inner_reduction.unweighted_sums`.
    """
    x = slabs.x.values
    n = lanes(x, FULL)
    hi, unit = splat(x, mean, FULL), splat(x, unit_of(x, rstd), FULL)
    affine = around(hi, affine_in_lanes(x, slabs.affine))
    s1 = splat(x, 0.0, FULL)
    s2, t1, t2 = s1, s1, s1
    pairs, whole = rows - rows % 2, columns - columns % n
    for r in range(0, pairs, 2):
        for c in range(0, whole, n):
            dz = dz_at(slabs, r, c, affine)
            s1 = s1 + dz
            s2 = fma(dz, distance_at(slabs, r, c, dz, hi, unit), s2)
            dz = dz_at(slabs, r + 1, c, affine)
            t1 = t1 + dz
            t2 = fma(dz, distance_at(slabs, r + 1, c, dz, hi, unit), t2)
    for r in range(pairs if whole == columns else 0, rows):
        for c in range(whole if r < pairs else 0, columns, n):
            dz = dz_at_end(slabs, r, c, columns - c, affine)
            s1 = s1 + dz
            s2 = fma(dz, distance_at_end(slabs, r, c, columns - c, dz, hi, unit), s2)
    return total(s1 + t1), total(s2 + t2)


@inline
def segment_grad_sums(slabs, shape, largest, segment, mean, rstd):
    """The same of a segment."""
    end = min((segment + 1) * SEGMENT, chunk_count(shape, largest))
    return add_chunks(slabs, shape, largest, segment * SEGMENT, end, mean, rstd, 0.0, 0.0)


@inline
def add_chunks(slabs, shape, largest, first, end, mean, rstd, a, b):
    """Sums that go on with those of some chunks."""
    for k in range(first, end):
        chunk = chunk_at(k, shape, largest)
        part = ChannelRows(
            rows_from(slabs.dy, chunk.row, chunk.column), rows_from(slabs.x, chunk.row, chunk.column),
            rows_from(slabs.y, chunk.row, chunk.column), rows_from(slabs.weight, chunk.row, chunk.column),
            slabs.affine,
        )  # fmt: skip
        s1, s2 = chunk_grad_sums(part, chunk.rows, chunk.columns, mean, rstd)
        a, b = a + s1, b + s2
    return a, b


@kernel
def grad_sums_of_segments(thread, first, last, dy, x, y, weight, shape, chunks, parameters, partials, recompute):
    """A table of `SegmentSums`, of every segment of every kept index.

    Of the parameters it reads mean and rstd and, to compute y again, gamma and beta.
    """
    segments, kept = segment_count(shape, chunks), shape.batch * shape.channel
    given, parts = table_rows(GradientParameters, parameters, kept), table_rows(SegmentSums, partials, kept * segments)
    for k in range(first, last):
        t = k // segments
        slabs = channel_rows(dy, x, y, weight, affine_again(x.values, given, t, recompute), t, shape)
        parts.dz[k], parts.distance[k] = segment_grad_sums(
            slabs, shape, chunks, k % segments, given.mean[t], given.rstd[t]
        )


@kernel
def channel_grad_sums(
    thread, first, last, x, kept, segments, parameters, partials, sums, distances, frozen, mixed
):  # fmt: skip
    """The results from the segments' sums and, if they are asked for, the `records.Distances` of dx."""
    given, results = table_rows(GradientParameters, parameters, kept), table_rows(Sums, sums, kept)
    parts = table_rows(SegmentSums, partials, kept * segments)
    for t in range(first, last):
        a, b = 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            a, b = a + parts.dz[k], b + parts.distance[k]
        results.dgamma[t], results.dbeta[t] = dgamma_of(x, given.mean[t], given.rstd[t], a, b), a
    if distances is not None:
        write_distances(x, given, first, last, frozen, mixed, results, table_rows(Distances, distances, kept))


# --- dx ---------------------------------------------------------------------------------------------------------------


@inline
def write_one_linear(linear, one):
    """Into a table's first place."""
    linear.scale[0], linear.hi[0], linear.slope[0] = one.scale, one.hi, one.slope
    linear.offset[0], linear.unit[0] = one.offset, one.unit


@inline
def write_affine_again(table, one):
    """The same of an `Affine`, if there is one."""
    if table is not None:
        write_one_affine(table, one)


@inline
def numbers_in_all_lanes(dy, tables, t):
    table = tables.linear
    linear = Linear(
        splat(dy, table.scale[t], FULL), splat(dy, table.hi[t], FULL), splat(dy, table.slope[t], FULL),
        splat(dy, table.offset[t], FULL), splat(dy, table.unit[t], FULL),
    )  # fmt: skip
    return Numbers(linear, around(linear.hi, affine_in_all_lanes(dy, tables.affine, t)))


@inline
def narrowed_numbers(dy, numbers, width):
    of = numbers.linear
    linear = Linear(
        narrowed(dy, of.scale, width), narrowed(dy, of.hi, width), narrowed(dy, of.slope, width),
        narrowed(dy, of.offset, width), narrowed(dy, of.unit, width),
    )  # fmt: skip
    return Numbers(linear, around(linear.hi, narrowed_affine(dy, numbers.affine, width)))


@inline
def blended_numbers(n, first, second):
    a, b = first.linear, second.linear
    linear = Linear(
        blended(n, a.scale, b.scale), blended(n, a.hi, b.hi), blended(n, a.slope, b.slope),
        blended(n, a.offset, b.offset), blended(n, a.unit, b.unit),
    )  # fmt: skip
    return Numbers(linear, around(linear.hi, blended_affine(n, first.affine, second.affine)))


@inline
def write_vector(inputs, results, i, width, numbers, nontemporal):
    """A vector of dx, and of dz where there is a residual."""
    x = load(inputs.x, i, width)
    dz = relu_gradient(inputs.dy, load(inputs.dy, i, width), load(inputs.y, i, width), x, numbers.affine)
    weight = converted(load(inputs.weight, i, dz), dz)
    put(results.dx, i, input_gradient(dz, x, weight, numbers.linear), nontemporal)
    store(results.dresidual, i, dz)


@inline
def weight_across(weight, i, n, gap, dz):
    """As `inner_reduction.load_across`, in the type of dz."""
    return blended(n, converted(load(weight, i, dz), dz), converted(load(weight, i + gap, dz), dz))


@inline
def write_vector_across(inputs, results, i, n, gaps, numbers, nontemporal):
    """The same with n values of one row and the first ones of the next."""
    x, y = load_across(inputs.x, i, n, gaps.x), load_across(inputs.y, i, n, gaps.y)
    dz = relu_gradient(inputs.dy, load_across(inputs.dy, i, n, gaps.dy), y, x, numbers.affine)
    weight = weight_across(inputs.weight, i, n, gaps.weight, dz)
    put(results.dx, i, input_gradient(dz, x, weight, numbers.linear), nontemporal)
    store(results.dresidual, i, dz)


@inline
def behind_gaps(inputs, gaps):
    """The inputs from where they go on behind a row."""
    return Inputs(
        advance(inputs.dy, gaps.dy), advance(inputs.x, gaps.x), advance(inputs.y, gaps.y),
        advance(inputs.weight, gaps.weight),
    )  # fmt: skip


@inline
def grad_input_end(inputs, results, start, end, numbers):
    """Less than a vector of values, at either end of a row: by short vectors, then one by one."""
    narrow, single = narrowed_numbers(inputs.dy, numbers, NARROW), narrowed_numbers(inputs.dy, numbers, SINGLE)
    i = start
    while i + lanes(inputs.dy, NARROW) <= end:
        write_vector(inputs, results, i, NARROW, narrow, False)
        i += lanes(inputs.dy, NARROW)
    while i < end:
        write_vector(inputs, results, i, SINGLE, single, False)
        i += 1


@inline
def grad_input_run(inputs, results, gaps, tables, t, place, count, shape, walk, nontemporal):
    """As `inner_reduction.normalize_run`, with tables of `Numbers`."""
    n = lanes(inputs.dy, FULL)
    outer, channel = place.outer, place.channel
    lead = misaligned(results.dx, count) if nontemporal else 0
    i, edge = 0, min(shape.inner - place.column, count)
    while i < count:
        numbers = numbers_in_all_lanes(inputs.dy, tables, t)
        t, outer, channel = row_after(t, outer, channel, shape, walk)
        if i < lead:
            grad_input_end(inputs, results, i, min(lead, edge), numbers)
            i = min(lead, edge)
        if i >= lead:
            while i + n <= edge:
                write_vector(inputs, results, i, FULL, numbers, nontemporal)
                i += n
            if i < edge and (shape.inner < n or i + n > count):
                grad_input_end(inputs, results, i, edge, numbers)
                i = edge
            elif i < edge:
                both = blended_numbers(edge - i, numbers, numbers_in_all_lanes(inputs.dy, tables, t))
                write_vector_across(inputs, results, i, edge - i, gaps, both, nontemporal)
                i += n
        inputs = behind_gaps(inputs, gaps)
        edge = min(edge + shape.inner, count)


@kernel
def grad_input(
    thread, first, last, dy, x, y, weight, dx, dresidual, shape, walk, parameters, distances, workspace, affine,
    nontemporal,
):  # fmt: skip
    """``dx`` (and ``dresidual = dz``), in the order of memory, as `inner_reduction.normalize`.

    With a workspace for `Affine` y is computed again, of parameters that are None else.
    """
    start, end, kept = piece_start(first, shape.inner), piece_start(last, shape.inner), shape.batch * walk.batch
    linear = table_rows(Linear, advance(workspace, LINEAR * thread * walk.pitch), walk.pitch)
    tables = Numbers(linear, affine_table(affine, thread, walk.pitch))
    t, t_end = kept_range(start, end, walk)
    write_linear(linear, table_rows(Distances, distances, kept), t, t_end - t)
    if affine is not None:
        given = parameters_of_y(table_rows(GradientParameters, parameters, kept))
        write_affine(tables.affine, given, t, t_end - t, 0.0, True)
    place = place_of(start, shape)
    gaps = GradientGaps(
        gap_of(dy, shape, walk), gap_of(x, shape, walk), gap_of(y, shape, walk), gap_of(weight, shape, walk)
    )
    while start < end:
        count = values_in_run(start, end, place, shape, walk)
        inputs = Inputs(
            values_from(dy, place), values_from(x, place), values_from(y, place), values_from(weight, place)
        )
        results = Outputs(values_from(dx, place), values_from(dresidual, place))
        grad_input_run(inputs, results, gaps, tables, kept_at(place, walk) - t, place, count, shape, walk, nontemporal)
        start += count
        place = place_behind(start, place, shape, walk)


@inline
def row_of(rows, r):
    """A pointer to its values."""
    return advance(rows.values, start_of_row(rows, r))


@kernel
def backward(
    thread, first, last, dy, x, y, weight, dx, dresidual, live, shape, chunks, parameters, mixed, sums, workspace,
    affine, nontemporal,
):  # fmt: skip
    """Sums and dx, a channel at a time: the second pass finds the slabs of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. With a workspace for `Affine`
    y is computed again.
    """
    kept = shape.batch * shape.channel
    given, out = table_rows(GradientParameters, parameters, kept), table_rows(Sums, sums, kept)
    linear = table_rows(Linear, advance(workspace, LINEAR * thread * PAD), PAD)
    tables = Numbers(linear, affine_table(affine, thread, PAD))
    for t in range(first, last):
        of_y = affine_again(x.values, given, t, affine)
        slabs, of_live = channel_rows(dy, x, y, weight, of_y, t, shape), rows_of(live, t, shape)
        of_dx, of_dresidual = rows_of(dx, t, shape), rows_of(dresidual, t, shape)
        mean, rstd = given.mean[t], given.rstd[t]
        a, b = 0.0, 0.0
        for s in range(segment_count(shape, chunks)):
            s1, s2 = segment_grad_sums(slabs, shape, chunks, s, mean, rstd)
            a, b = a + s1, b + s2
        b = dgamma_of(slabs.x.values, mean, rstd, a, b)
        out.dgamma[t], out.dbeta[t] = b, a
        d = distances_of(slabs.x.values, given, t, live.values is None, mixed, b, a)
        one = linear_of(slabs.x.values, d.mean, d.scale, d.offset, d.slope, d.unit)
        write_one_linear(linear, one)
        write_affine_again(tables.affine, of_y)
        for k in range(shape.outer):
            r = row_in_turn(k, shape)
            inputs = Inputs(row_of(slabs.dy, r), row_of(of_live, r), row_of(slabs.y, r), row_of(slabs.weight, r))
            results = Outputs(row_of(of_dx, r), row_of(of_dresidual, r))
            place = Place(0, r, t, 0)
            grad_input_run(
                inputs, results, GradientGaps(0, 0, 0, 0), tables, 0, place, shape.inner, shape, ONE_ROW, nontemporal
            )
