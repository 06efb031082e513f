"""Rows of cells in memory: how they are divided, and numbers of channels in all columns of a cell.

The words are those of `outer_reduction`.
"""

from typing import Any, NamedTuple

from fastbn.cpu import sizes
from fastbn.cpu.kernels.common import FULL, affine_of_index, parameters_of_y, write_affine
from fastbn.cpu.kernels.compiler import inline, shared
from fastbn.cpu.kernels.pointers import advance
from fastbn.cpu.kernels.simd import converted, lanes, load, load_first, rounded, splat, store, store_first, total
from fastbn.cpu.records import Affine, Rows
from fastbn.cpu.sizes import PAD

AHEAD = 256  # values: asking for what comes a kilobyte later makes elementwise passes 5 % faster
places, pitch_of_columns = shared(sizes.padded), shared(sizes.pitch)


# --- divisions --------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Rows of a tile, which is some cells of each row."""

    batch: Any
    row: Any
    end: Any
    cell: Any
    cells: Any


class SegmentResults(NamedTuple):
    """Where the sums of all segments are: their number, places of each, and of all together."""

    segments: Any
    of_segment: Any
    together: Any


class Quarters(NamedTuple):
    """Pointers to rows of the four quarters of a segment: four streams from memory."""

    first: Any
    second: Any
    third: Any
    last: Any


@inline
def task_at(k, rows, cells, tiles):
    """Task k: rows of a tile, tiles of a row neighbours."""
    tiles_of_row = -(-cells // tiles.width)
    pieces = -(-rows // tiles.height)
    cell = k % tiles_of_row * tiles.width
    row = k // tiles_of_row % pieces * tiles.height
    batch = k // tiles_of_row // pieces
    return Task(batch, row, min(row + tiles.height, rows), cell, min(tiles.width, cells - cell))


@inline
def results_of(shape, rows, cells, tiles):
    segments, of_segment = -(-rows // tiles.height), places(cells, tiles.width)
    return SegmentResults(segments, of_segment, shape.batch * segments * of_segment)


@inline
def place_of_cell(j, tiles):
    """Where the result of cell j stands among those of a segment."""
    return j // tiles.width * -(-tiles.width // PAD) * PAD + j % tiles.width


@inline
def pitch_of(tiles, size):
    return pitch_of_columns(tiles.width * size + PAD)


@inline
def rows_of_tile(array, batch, row, column, coalesced):
    """The rows of a tile from its first value on, so many taken as one."""
    step = array.outer * coalesced
    return Rows(advance(array.values, batch * array.batch + row * step + column), step, 2 * step)


@inline
def quarters_of(x, quarter):
    """Pointers to rows, so many rows apart."""
    far = quarter * x.step
    return Quarters(x.values, advance(x.values, far), advance(x.values, 2 * far), advance(x.values, 3 * far))


@inline
def columns_of_last_row(task, shape, coalesced):
    """How many of the task's columns its last row has: all, but in the last row of coalesced ones."""
    rows = -(-shape.outer // coalesced)
    if task.end < rows:
        return task.cells * shape.inner
    there = (coalesced - (rows * coalesced - shape.outer)) * shape.channel - task.cell
    return max(0, min(task.cells, there)) * shape.inner


# --- numbers of cells -------------------------------------------------------------------------------------------------


@inline
def fill(a, n, number):
    """Write n values, and padding to whole vectors."""
    for i in range(0, n, lanes(a, FULL)):
        store(a, i, splat(a, number, FULL))


@inline
def clear_sums(count, columns):
    """Those of a chunk's columns."""
    fill(columns.s1, count, 0.0)
    fill(columns.s2, count, 0.0)


@inline
def spread(row, at, number, size):
    """A number into the columns of a cell; what spills over, the next cell overwrites."""
    for i in range(0, size, lanes(row, FULL)):
        store(row, at + i, splat(row, number, FULL))


@inline
def repeat(row, channels, cells):
    """Copy the first ``channels`` values to all that follow."""
    n = lanes(row, FULL)
    if channels >= n:
        for i in range(channels, cells, n):
            store(row, i, load(row, i - channels, FULL))
    else:
        for i in range(channels, cells):
            row[i] = row[i - channels]


@inline
def spread_rounded(x, numbers, cells, size, row):
    """Round each cell's number to the compute type, in its place and in all columns of the cell."""
    if size == 1:
        for j in range(0, cells, lanes(numbers, FULL)):
            number = load(numbers, j, FULL)
            short = converted(number, load(row, j, number))
            store(row, j, short)
            store(numbers, j, converted(short, number))
    else:
        for j in range(cells):
            number = rounded(x, numbers[j])
            numbers[j] = number
            spread(row, j * size, number, size)


@inline
def spread_affine(x, parameters, first, j, channels, eps, given_rstd, cells, size, affine):
    """`common.affine_of` of the cells from j on, in all their columns; ``first`` is channel 0's kept index."""
    if size == 1 and (j == 0 or j + cells <= channels):
        write_affine(affine, parameters, first + j % channels, min(cells, channels), eps, given_rstd)
        repeat(affine.hi, channels, cells)
        repeat(affine.scale, channels, cells)
        repeat(affine.bias, channels, cells)
    else:
        c = j % channels
        for i in range(cells):
            one = affine_of_index(x, parameters, first + c, eps, given_rstd)
            spread(affine.hi, i * size, one.hi, size)
            spread(affine.scale, i * size, one.scale, size)
            spread(affine.bias, i * size, one.bias, size)
            c = c + 1 if c + 1 < channels else 0  # a division would take as long as the rest


@inline
def affine_at(affine, c):
    """A vector of columns; None without a table."""
    if affine is None:
        return None
    return Affine(load(affine.hi, c, FULL), load(affine.scale, c, FULL), load(affine.bias, c, FULL))


@inline
def spread_affine_again(x, given, first, j, channels, cells, size, affine):
    """`spread_affine` from a table of `GradientParameters`, if there is one of `Affine`."""
    if affine is not None:
        spread_affine(x, parameters_of_y(given), first, j, channels, 0.0, True, cells, size, affine)


@inline
def cell_totals(row, cells, size, wide):
    """Sum up each cell's columns in float64, as ``wide`` has it, and move the sums side by side."""
    n = lanes(row, FULL)
    like = splat(wide, 0.0, FULL)
    for j in range(cells if size > 1 else 0):
        part = converted(load_first(row, j * size, min(n, size), FULL), like)
        for i in range(n, size, n):
            part = part + converted(load_first(row, j * size + i, min(n, size - i), FULL), like)
        row[j] = total(part)


@inline
def in_float64(row, at, wide):
    """As many values as a vector of ``wide`` has."""
    like = splat(wide, 0.0, FULL)
    return converted(load(row, at, like), like)


@inline
def part_of(a, at, part):
    """A vector from ``at`` on, or its first ``part`` lanes."""
    return load(a, at, FULL) if part is None else load_first(a, at, part, FULL)


@inline
def store_part(a, at, part, v, n):
    if part == n:
        store(a, at, v)
    else:
        store_first(a, at, part, v)
