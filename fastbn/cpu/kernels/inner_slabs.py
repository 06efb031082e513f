"""Channels-first arrays in slabs, as images without their border are: not all rows of a channel follow at one step.

Of each channel, x being ``(far, near, outer, channel, inner)``, in plain words::

    for slab in x[:, :, :, c].reshape(-1, outer, inner):      # far and near step by step, the last one fastest
        for chunk in slab:                                    # rows r and r + outer / 2 in turn
            moments = merged(moments, moments_of(chunk))      # forward; sums += ..., of gradients
    y[..., c, :] = (x[..., c, :] - mean) * rstd * gamma + beta      # slab by slab; likewise dx

The formulas are those of `inner_reduction` and `inner_gradients`, and so are chunks, which do not go beyond a slab. A
segment is some slabs, or a part of one that is large: threads share segments. What is written side by side, all rows
of a slab, goes in one run.

Bytes moved, S = the bytes of x: moments S, normalize 2S, grad_sums 2S, grad_input 3S; forward 2S and backward 3S where
the slabs of a channel stay in cache between the two passes over them.
"""

from typing import Any, NamedTuple

from fastbn.cpu import sizes
from fastbn.cpu.kernels.common import (
    affine_again,
    affine_of,
    affine_of_index,
    affine_table,
    dgamma_of,
    distances_at,
    distances_of,
    finished_slabs,
    linear_of,
    marked,
    merged,
    origin_of,
    rows_of_slab,
    slab_at,
    write_moments,
)
from fastbn.cpu.kernels.compiler import inline, kernel, shared
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.inner_gradients import (
    ChannelRows,
    GradientGaps,
    Inputs,
    Numbers,
    Outputs,
    add_chunks,
    grad_input_run,
    write_affine_again,
    write_one_linear,
)
from fastbn.cpu.kernels.inner_places import (
    Place,
    chunk_count,
    segment_count,
)
from fastbn.cpu.kernels.inner_reduction import (
    ONE_ROW,
    Gaps,
    Some,
    merge_chunks,
    normalize_run,
    write_one_affine,
)
from fastbn.cpu.kernels.pointers import advance, table_rows
from fastbn.cpu.records import (
    Affine,
    Distances,
    GradientParameters,
    Linear,
    MomentRows,
    Parameters,
    Part,
    Rows,
    SegmentSums,
    Shape,
    Sums,
)
from fastbn.cpu.sizes import AFFINE, LINEAR, PAD, SEGMENT

segments_of, slabs_together = shared(sizes.segments_of_slabs), shared(sizes.slabs_of_segment)
rows_of_part = shared(sizes.rows_of_part)


class Segment(NamedTuple):
    """Slabs and chunks of each, from first to last + 1."""

    slab: Any
    end_slab: Any
    chunk: Any
    end_chunk: Any


class SlabTask(NamedTuple):
    """Of an elementwise pass: rows of a slab."""

    channel: Any
    slab: Any
    row: Any
    rows: Any


@inline
def segment_at(k, shape, largest):
    slabs, chunks = shape.far * shape.near, chunk_count(shape, largest)
    together = slabs_together(slabs, shape.outer * shape.inner)
    if together > 1:
        return Segment(k * together, min((k + 1) * together, slabs), 0, chunks)
    of_slab = segment_count(shape, largest)
    part = k % of_slab
    return Segment(k // of_slab, k // of_slab + 1, part * SEGMENT, min((part + 1) * SEGMENT, chunks))


@inline
def halves_of_slab(array, t, s, shape):
    """The rows of a slab of channel t, of its two halves in turn."""
    rows = rows_of_slab(array, t, s, shape)
    return Rows(rows.values, (shape.outer + 1) // 2 * rows.step, rows.step)


@inline
def run_at(array, t, s, row):
    """A pointer to the values of a slab from a row on; ``s`` has its place."""
    return advance(array.values, s + t * array.channel + row * array.outer)


@inline
def slab_task_at(k, shape):
    """Task k of an elementwise pass."""
    most = rows_of_part(shape.inner)
    parts = -(-shape.outer // most)
    row, slab = k % parts * most, k // parts
    return SlabTask(slab % shape.channel, slab // shape.channel, row, min(most, shape.outer - row))


# --- statistics -------------------------------------------------------------------------------------------------------


@inline
def moments_of(x, t, shape, largest, k, origin):
    """n, mean - origin and M2 of segment k."""
    lower_underflow_flag()
    part, some = segment_at(k, shape, largest), Some(0.0, 0.0, 0.0, origin)
    for s in range(part.slab, part.end_slab):
        rows = halves_of_slab(x, t, s, shape)
        some = merge_chunks(rows, None, shape, largest, part.chunk, part.end_chunk, origin, some)
    return some.n, some.mean, marked(x.values, some.m2) if underflowed(some.m2) else some.m2


@kernel
def moments_of_segments(thread, first, last, x, shape, chunks, partials):
    """n, mean - origin and M2 of every segment of every channel: a table of `Part`."""
    segments = segments_of(shape, chunks)
    parts = table_rows(Part, partials, shape.channel * segments)
    for k in range(first, last):
        t = k // segments
        origin = origin_of(rows_of_slab(x, t, 0, shape), None, None, t)
        parts.count[k], parts.mean[k], parts.m2[k] = moments_of(x, t, shape, chunks, k % segments, origin)


@kernel
def channel_moments(thread, first, last, x, shape, chunks, partials, table, eps):
    """Moments of every channel from those of its segments."""
    segments = segments_of(shape, chunks)
    parts, moments = table_rows(Part, partials, shape.channel * segments), table_rows(MomentRows, table, shape.channel)
    for t in range(first, last):
        n, mean, m2 = 0.0, 0.0, 0.0
        for k in range(t * segments, (t + 1) * segments):
            n, mean, m2 = merged(n, mean, m2, parts.count[k], parts.mean[k], parts.m2[k])
        origin = origin_of(rows_of_slab(x, t, 0, shape), None, None, t)
        n, mean, m2, unit = finished_slabs(x, t, shape, n, mean, m2, origin)
        write_moments(moments, t, n, mean, m2, unit, eps)


# --- y ----------------------------------------------------------------------------------------------------------------


@inline
def normalize_slab_rows(x, y, residual, t, s, row, rows, shape, affine, relu, side_by_side, nontemporal):
    """Rows of a slab, in one run if those of y lie side by side; an `Affine` stands in the table's first place."""
    of_x, of_y = slab_at(x, s, shape.near), slab_at(y, s, shape.near)
    of_residual = slab_at(residual, s, shape.near)
    gaps, one = Gaps(x.outer - shape.inner, residual.outer - shape.inner), Shape(1, 1, rows, shape.inner)
    runs, count = (1, rows * shape.inner) if side_by_side else (rows, shape.inner)
    for r in range(row, row + runs):
        normalize_run(
            run_at(x, t, of_x, r), run_at(y, t, of_y, r), run_at(residual, t, of_residual, r), gaps, affine, 0,
            Place(0, 0, 0, 0), count, one, ONE_ROW, relu, nontemporal,
        )  # fmt: skip


@kernel
def normalize(
    thread, first, last, x, y, residual, shape, table, eps, given_rstd, workspace, relu, side_by_side, nontemporal
):  # fmt: skip
    """A part of a slab at a time, from a table of `Parameters`."""
    parameters = table_rows(Parameters, table, shape.channel)
    affine = table_rows(Affine, advance(workspace, AFFINE * thread * PAD), PAD)
    for k in range(first, last):
        task = slab_task_at(k, shape)
        one = affine_of_index(x.values, parameters, task.channel, eps, given_rstd)
        write_one_affine(affine, one)
        normalize_slab_rows(
            x, y, residual, task.channel, task.slab, task.row, task.rows, shape, affine, relu, side_by_side, nontemporal
        )


@kernel
def forward(
    thread, first, last, x, y, residual, shape, chunks, table, eps, workspace, relu, side_by_side, nontemporal
):  # fmt: skip
    """Moments and y, a channel at a time: the second pass finds its slabs in cache. The table is of `MomentRows`."""
    moments = table_rows(MomentRows, table, shape.channel)
    affine = table_rows(Affine, advance(workspace, AFFINE * thread * PAD), PAD)
    for t in range(first, last):
        origin = origin_of(rows_of_slab(x, t, 0, shape), None, None, t)
        n, mean, m2 = 0.0, 0.0, 0.0
        for k in range(segments_of(shape, chunks)):
            count, other_mean, other_m2 = moments_of(x, t, shape, chunks, k, origin)
            n, mean, m2 = merged(n, mean, m2, count, other_mean, other_m2)
        n, mean, m2, unit = finished_slabs(x, t, shape, n, mean, m2, origin)
        write_moments(moments, t, n, mean, m2, unit, eps)
        one = affine_of(x.values, moments.mean[t], moments.rstd[t], moments.gamma[t], moments.beta[t])
        write_one_affine(affine, one)
        for s in range(shape.far * shape.near):
            normalize_slab_rows(x, y, residual, t, s, 0, shape.outer, shape, affine, relu, side_by_side, nontemporal)


# --- sums of gradients ------------------------------------------------------------------------------------------------


@inline
def grad_sums_of(dy, x, y, affine, t, shape, largest, k, mean, rstd):
    """sum(dz), sum(dz * (x - hi)) in units of 1/unit, of segment k."""
    part = segment_at(k, shape, largest)
    a, b = 0.0, 0.0
    for s in range(part.slab, part.end_slab):
        slabs = ChannelRows(
            halves_of_slab(dy, t, s, shape), halves_of_slab(x, t, s, shape), halves_of_slab(y, t, s, shape),
            Rows(None, 0, 0), affine,
        )  # fmt: skip
        a, b = add_chunks(slabs, shape, largest, part.chunk, part.end_chunk, mean, rstd, a, b)
    return a, b


@kernel
def grad_sums_of_segments(thread, first, last, dy, x, y, shape, chunks, parameters, partials, recompute):
    """A table of `SegmentSums`, of every segment of every channel; for parameters see `inner_gradients`."""
    segments, given = segments_of(shape, chunks), table_rows(GradientParameters, parameters, shape.channel)
    parts = table_rows(SegmentSums, partials, shape.channel * segments)
    for k in range(first, last):
        t = k // segments
        affine = affine_again(x.values, given, t, recompute)
        parts.dz[k], parts.distance[k] = grad_sums_of(
            dy, x, y, affine, t, shape, chunks, k % segments, given.mean[t], given.rstd[t]
        )


# --- dx ---------------------------------------------------------------------------------------------------------------


@inline
def tables_of_thread(workspace, affine, thread):
    """`Numbers` of one channel."""
    linear = table_rows(Linear, advance(workspace, LINEAR * thread * PAD), PAD)
    return Numbers(linear, affine_table(affine, thread, PAD))


@inline
def grad_input_slab_rows(dy, x, y, dx, dresidual, t, s, row, rows, shape, tables, side_by_side, nontemporal):
    """As `normalize_slab_rows`, with `Numbers`."""
    of_dy, of_x, of_y = slab_at(dy, s, shape.near), slab_at(x, s, shape.near), slab_at(y, s, shape.near)
    of_dx, of_dresidual = slab_at(dx, s, shape.near), slab_at(dresidual, s, shape.near)
    gaps = GradientGaps(dy.outer - shape.inner, x.outer - shape.inner, y.outer - shape.inner, 0)
    one = Shape(1, 1, rows, shape.inner)
    runs, count = (1, rows * shape.inner) if side_by_side else (rows, shape.inner)
    for r in range(row, row + runs):
        inputs = Inputs(run_at(dy, t, of_dy, r), run_at(x, t, of_x, r), run_at(y, t, of_y, r), None)
        results = Outputs(run_at(dx, t, of_dx, r), run_at(dresidual, t, of_dresidual, r))
        grad_input_run(inputs, results, gaps, tables, 0, Place(0, 0, 0, 0), count, one, ONE_ROW, nontemporal)


@kernel
def grad_input(
    thread, first, last, dy, x, y, dx, dresidual, shape, parameters, distances, workspace, affine, side_by_side,
    nontemporal,
):  # fmt: skip
    """``dx`` (and ``dresidual = dz``), a part of a slab at a time; for parameters see `inner_gradients`."""
    of_dx = table_rows(Distances, distances, shape.channel)
    tables = tables_of_thread(workspace, affine, thread)
    for k in range(first, last):
        task = slab_task_at(k, shape)
        d = distances_at(of_dx, task.channel)
        write_one_linear(tables.linear, linear_of(dy.values, d.mean, d.scale, d.offset, d.slope, d.unit))
        if affine is not None:
            given = table_rows(GradientParameters, parameters, shape.channel)
            write_one_affine(tables.affine, affine_again(x.values, given, task.channel, affine))
        grad_input_slab_rows(
            dy, x, y, dx, dresidual, task.channel, task.slab, task.row, task.rows, shape, tables, side_by_side,
            nontemporal,
        )  # fmt: skip


@kernel
def backward(
    thread, first, last, dy, x, y, dx, dresidual, live, shape, chunks, parameters, mixed, sums, workspace, affine,
    side_by_side, nontemporal,
):  # fmt: skip
    """Sums and dx, a channel at a time: the second pass finds the slabs of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. With a workspace for `Affine`
    y is computed again.
    """
    given = table_rows(GradientParameters, parameters, shape.channel)
    out = table_rows(Sums, sums, shape.channel)
    tables = tables_of_thread(workspace, affine, thread)
    for t in range(first, last):
        mean, rstd, of_y = given.mean[t], given.rstd[t], affine_again(x.values, given, t, affine)
        a, b = 0.0, 0.0
        for k in range(segments_of(shape, chunks)):
            s1, s2 = grad_sums_of(dy, x, y, of_y, t, shape, chunks, k, mean, rstd)
            a, b = a + s1, b + s2
        b = dgamma_of(x.values, mean, rstd, a, b)
        out.dgamma[t], out.dbeta[t] = b, a
        d = distances_of(x.values, given, t, live.values is None, mixed, b, a)
        write_one_linear(tables.linear, linear_of(x.values, d.mean, d.scale, d.offset, d.slope, d.unit))
        write_affine_again(tables.affine, of_y)
        for s in range(shape.far * shape.near):
            grad_input_slab_rows(
                dy, live, y, dx, dresidual, t, s, 0, shape.outer, shape, tables, side_by_side, nontemporal
            )
