"""dx across memory, and the fused backward pass: of the sums that `outer_gradients` makes, whose formulas these are.

``dx = unit * (scale * dz - w * (offset + slope * (x - hi)))``, of numbers of all columns of a tile, which a thread has
in a table (`records.Linear`).

Bytes moved, S = the bytes of x: grad_input 3S; backward 3S where a tile of all rows of dy and x stays in cache between
the two passes over it.
"""

from typing import Any, NamedTuple

from fastbn.cpu.kernels.cells import (
    AHEAD,
    columns_of_last_row,
    pitch_of,
    places,
    repeat,
    rows_of_tile,
    spread,
    spread_affine_again,
    task_at,
)
from fastbn.cpu.kernels.common import (
    FULL,
    affine_table,
    around,
    dgamma_of,
    distances_at,
    distances_of,
    input_gradient,
    linear_of,
    put,
    rows_of,
    write_linear,
)
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.outer_gradients import (
    Inputs,
    dz_at,
    first_weight,
    inputs_from,
    segment_grad_sums,
    spread_hi_and_unit,
    weight_at,
)
from fastbn.cpu.kernels.pointers import advance, table_rows
from fastbn.cpu.kernels.simd import (
    lanes,
    load,
    load_first,
    prefetch,
    store_first,
)
from fastbn.cpu.records import ColumnSums, Distances, GradientParameters, Linear, Rows, SegmentSums, Sums
from fastbn.cpu.sizes import LINEAR, SUMS


class Outputs(NamedTuple):
    """Rows of a tile's gradients."""

    dx: Any
    dresidual: Any


@inline
def linear_at(linear, c):
    """A vector of columns."""
    return Linear(
        load(linear.scale, c, FULL), load(linear.hi, c, FULL), load(linear.slope, c, FULL),
        load(linear.offset, c, FULL), load(linear.unit, c, FULL),
    )  # fmt: skip


@inline
def put_if_there(y, at, v, nontemporal):
    if y is not None:
        put(y, at, v, nontemporal)


@inline
def grad_input_rows(inputs, results, rows, columns, end_columns, linear, nontemporal, ahead):
    """As `outer_reduction.normalize_rows`, with a `Linear` of all columns."""
    dy, x, dx, dresidual = inputs.dy, inputs.x, results.dx, results.dresidual
    n = lanes(dy.values, FULL)
    for r in range(rows):
        width = end_columns if r == rows - 1 else columns
        whole, shared = width - width % n, first_weight(inputs, r)
        for c in range(0, whole, n):
            prefetch(dy.values, r * dy.step + c + ahead)
            prefetch(x.values, r * x.step + c + ahead)
            dz = dz_at(inputs, r, c, None)
            weight = weight_at(inputs, r, c, None, shared, dz)
            v = input_gradient(dz, load(x.values, r * x.step + c, FULL), weight, linear_at(linear, c))
            put(dx.values, r * dx.step + c, v, nontemporal)
            put_if_there(dresidual.values, r * dresidual.step + c, dz, nontemporal)
        if whole < width:
            c, part = whole, width - whole
            dz = dz_at(inputs, r, c, part)
            weight = weight_at(inputs, r, c, part, shared, dz)
            v = input_gradient(dz, load_first(x.values, r * x.step + c, part, FULL), weight, linear_at(linear, c))
            store_first(dx.values, r * dx.step + c, part, v)
            store_first(dresidual.values, r * dresidual.step + c, part, dz)


@inline
def spread_linear(x, d, at, size, linear):
    """What `grad_input_rows` wants of one cell, from its `Distances`."""
    one = linear_of(x, d.mean, d.scale, d.offset, d.slope, d.unit)
    spread(linear.scale, at, one.scale, size)
    spread(linear.hi, at, one.hi, size)
    spread(linear.slope, at, one.slope, size)
    spread(linear.offset, at, one.offset, size)
    spread(linear.unit, at, one.unit, size)


@inline
def spread_all_linear(x, distances, first, j, channels, cells, size, linear):
    """The same of the cells from j on, from a table; ``first`` is channel 0's kept index."""
    if size == 1 and (j == 0 or j + cells <= channels):
        write_linear(linear, distances, first + j % channels, min(cells, channels))
        repeat(linear.scale, channels, cells)
        repeat(linear.hi, channels, cells)
        repeat(linear.slope, channels, cells)
        repeat(linear.offset, channels, cells)
        repeat(linear.unit, channels, cells)
    else:
        c = first + j % channels
        for i in range(cells):
            spread_linear(x, distances_at(distances, c), i * size, size, linear)
            c = c + 1 if c + 1 < first + channels else first


@kernel
def grad_input(
    thread, first, last, dy, x, y, weight, dx, dresidual, shape, tiles, parameters, distances, workspace, affine,
    nontemporal,
):  # fmt: skip
    """``dx`` (and ``dresidual = dz``), as `outer_reduction.normalize`.

    With a workspace for `Affine` y is computed again, of parameters that are None else.
    """
    channels, size, coalesced = shape.channel, shape.inner, tiles.coalesced
    rows, cells, pitch = -(-shape.outer // coalesced), channels * coalesced, pitch_of(tiles, size)
    given = table_rows(Distances, distances, shape.batch * channels)
    linear = table_rows(Linear, advance(workspace, thread * LINEAR * pitch), pitch)
    of_y = affine_table(affine, thread, pitch)
    for k in range(first, last):
        task = task_at(k, rows, cells, tiles)
        batch, row, column = task.batch, task.row, task.cell * size
        spread_all_linear(dy.values, given, batch * channels, task.cell, channels, task.cells, size, linear)
        if affine is not None:
            of_index = table_rows(GradientParameters, parameters, shape.batch * channels)
            spread_affine_again(x.values, of_index, batch * channels, task.cell, channels, task.cells, size, of_y)
        inputs = Inputs(
            rows_of_tile(dy, batch, row, column, coalesced), rows_of_tile(x, batch, row, column, coalesced),
            rows_of_tile(y, batch, row, column, coalesced),
            rows_of_tile(weight, batch, row, task.cell * weight.channel, 1), weight.channel, around(linear.hi, of_y),
        )  # fmt: skip
        results = Outputs(
            rows_of_tile(dx, batch, row, column, coalesced), rows_of_tile(dresidual, batch, row, column, coalesced)
        )
        grad_input_rows(
            inputs, results, task.end - row, task.cells * size, columns_of_last_row(task, shape, coalesced), linear,
            nontemporal, AHEAD,
        )  # fmt: skip


@inline
def add_to_sums(t, cells, found, sums):
    """A segment's sums of cells that are whole channels, from kept index t on."""
    for c in range(cells):
        sums.dbeta[t + c] += found.dz[c]
        sums.dgamma[t + c] += found.distance[c]


@inline
def finish_tile(x, t, cells, size, given, frozen, mixed, sums, linear):
    """The results of a tile's channels, from kept index t on, and what their dx needs."""
    for c in range(cells):
        a = sums.dbeta[t + c]
        b = dgamma_of(x, given.mean[t + c], given.rstd[t + c], a, sums.dgamma[t + c])
        sums.dgamma[t + c] = b
        spread_linear(x, distances_of(x, given, t + c, frozen, mixed, b, a), c * size, size, linear)


@kernel
def backward(
    thread, first, last, dy, x, y, dx, dresidual, live, shape, tiles, parameters, mixed, sums, partials, workspace,
    affine, nontemporal,
):  # fmt: skip
    """Sums and dx, a tile of cells at a time: the second pass finds its rows of dy and x in cache.

    ``live`` is x again, or None where statistics are frozen and dx does not depend on it. Rows are not coalesced. With
    a workspace for `Affine` y is computed again.
    """
    channels, size, rows, kept = shape.channel, shape.inner, shape.outer, shape.batch * shape.channel
    pitch, room = pitch_of(tiles, size), places(tiles.width, tiles.width)
    given, out = table_rows(GradientParameters, parameters, kept), table_rows(Sums, sums, kept)
    of_thread = advance(workspace, thread * LINEAR * pitch)
    columns, linear = table_rows(ColumnSums, of_thread, pitch), table_rows(Linear, of_thread, pitch)
    found = table_rows(SegmentSums, advance(partials, thread * SUMS * room), room)
    of_y = affine_table(affine, thread, pitch)
    for k in range(first, last):
        tile = task_at(k, 1, channels, tiles)
        t, cells, wide = tile.batch * channels + tile.cell, tile.cells, tile.cells * size
        no_weight = Rows(None, 0, 0)
        rows_of_y, again = rows_of(y, t, shape), around(columns.hi, of_y)
        inputs = Inputs(rows_of(dy, t, shape), rows_of(x, t, shape), rows_of_y, no_weight, 0, again)
        spread_hi_and_unit(x.values, given, t, 0, cells, cells, size, columns)
        spread_affine_again(x.values, given, t, 0, cells, cells, size, of_y)
        for c in range(cells):
            out.dgamma[t + c] = out.dbeta[t + c] = 0.0
        for row in range(0, rows, tiles.height):
            high = min(tiles.height, rows - row)
            segment_grad_sums(inputs_from(inputs, row), high, cells, size, found, columns)
            add_to_sums(t, cells, found, out)
        finish_tile(x.values, t, cells, size, given, live.values is None, mixed, out, linear)
        again = around(linear.hi, of_y)
        of_live = Inputs(inputs.dy, rows_of(live, t, shape), rows_of_y, no_weight, 0, again)
        results = Outputs(rows_of(dx, t, shape), rows_of(dresidual, t, shape))
        grad_input_rows(of_live, results, rows, wide, wide, linear, nontemporal, wide)
