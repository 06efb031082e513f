"""Rows of cells in memory: how they are divided, and numbers of channels in all columns of a cell.

The words are those of `outer_reduction`.
"""

from fastbn.cpu.kernels.common import (
    FULL,
    affine_of,
    affine_vectors,
)
from fastbn.cpu.kernels.compiler import inline
from fastbn.cpu.kernels.simd import (
    converted,
    lanes,
    load,
    load_first,
    rounded,
    splat,
    store,
    store_first,
    total,
)
from fastbn.cpu.sizes import PAD, padded

AHEAD = 256  # values: asking for what comes a kilobyte later makes elementwise passes 5 % faster
places = inline(padded)  # the same for kernels


@inline
def place_of_cell(j, tile):
    """Where the result of cell j stands among those of a segment."""
    return j // tile * -(-tile // PAD) * PAD + j % tile


@inline
def task_at(k, rows, cells, height, tile):
    """Batch, row, end row, first cell and cells of task k: ``height`` rows of a tile, tiles of a row neighbours."""
    tiles = -(-cells // tile)
    pieces = -(-rows // height)
    cell = k % tiles * tile
    row = k // tiles % pieces * height
    return k // tiles // pieces, row, min(row + height, rows), cell, min(tile, cells - cell)


@inline
def pitch_of(tile, size):
    return tile * size + PAD


@inline
def fill(a, at, n, number):
    """Write n values, and padding to whole vectors."""
    for i in range(0, n, lanes(a, FULL)):
        store(a, at + i, splat(a, number, FULL))


@inline
def spread(workspace, at, number, size):
    """A number into the columns of a cell; what spills over, the next cell overwrites."""
    for i in range(0, size, lanes(workspace, FULL)):
        store(workspace, at + i, splat(workspace, number, FULL))


@inline
def repeat(workspace, at, channels, cells):
    """Copy the first ``channels`` values to all that follow."""
    n = lanes(workspace, FULL)
    if channels >= n:
        for i in range(channels, cells, n):
            store(workspace, at + i, load(workspace, at + i - channels, FULL))
    else:
        for i in range(channels, cells):
            workspace[at + i] = workspace[at + i - channels]


@inline
def spread_rounded(x, partials, at, cells, size, workspace, into):
    """Round each cell's number to the compute type, in its place and in all columns of the cell."""
    if size == 1:
        for j in range(0, cells, lanes(partials, FULL)):
            number = load(partials, at + j, FULL)
            short = converted(number, load(workspace, into + j, number))
            store(workspace, into + j, short)
            store(partials, at + j, converted(short, number))
    else:
        for j in range(cells):
            number = rounded(x, partials[at + j])
            partials[at + j] = number
            spread(workspace, into + j * size, number, size)


@inline
def spread_affine(x, coefficients, first, j, channels, kept, eps, cells, size, workspace, at, pitch):
    """Hi, scale and bias (see `affine_of`) of the cells from j on, in all their columns, a pitch apart."""
    if size == 1 and (j == 0 or j + cells <= channels):
        affine_vectors(coefficients, first + j % channels, min(cells, channels), kept, eps, workspace, at, pitch)
        for k in range(3):
            repeat(workspace, at + k * pitch, channels, cells)
    else:
        c = j % channels
        for i in range(cells):
            hi, scale, bias = affine_of(x, coefficients, first + c, kept, eps)
            spread(workspace, at + i * size, hi, size)
            spread(workspace, at + pitch + i * size, scale, size)
            spread(workspace, at + 2 * pitch + i * size, bias, size)
            c = c + 1 if c + 1 < channels else 0  # a division would take as long as the rest


@inline
def cell_totals(workspace, at, cells, size, partials):
    """Sum up each cell's columns in float64, and move the sums side by side."""
    n = lanes(workspace, FULL)
    like = splat(partials, 0.0, FULL)
    for j in range(cells if size > 1 else 0):
        first = at + j * size
        part = converted(load_first(workspace, first, min(n, size), FULL), like)
        for i in range(n, size, n):
            part = part + converted(load_first(workspace, first + i, min(n, size - i), FULL), like)
        workspace[at + j] = total(part)


@inline
def in_float64(workspace, at, partials):
    """As many values as a vector of ``partials`` has."""
    like = splat(partials, 0.0, FULL)
    return converted(load(workspace, at, like), like)


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


@inline
def width_of_last_row(end, j, width, shape, fold):
    """How many of ``width`` cells from j on there are in row ``end - 1``: the rest, in the last row of folded ones."""
    rows = -(-shape[1] // fold)
    if end < rows:
        return width
    return max(0, min(width, (fold - (rows * fold - shape[1])) * shape[2] - j))
