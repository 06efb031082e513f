"""Rows of cells in memory: how the family `columns` divides them, and numbers of channels in all columns of a cell.

The words are those of `columns`.
"""

from fastbn.cpu.kernels.compiler import inner
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
from fastbn.cpu.kernels.slab import (
    WIDTH,
    affine_of,
    affine_vectors,
)
from fastbn.cpu.sizes import PAD, padded

AHEAD = 256  # values: asking for what comes a kilobyte later makes elementwise passes 5 % faster
places = inner(padded)  # the same for kernels


@inner
def place_of_cell(j, tile):
    """Where the result of cell j stands among those of a segment."""
    return j // tile * -(-tile // PAD) * PAD + j % tile


@inner
def task_at(k, rows, cells, height, tile):
    """Batch, row, end row, first cell and cells of task k: ``height`` rows of a tile, tiles of a row neighbours."""
    tiles = -(-cells // tile)
    pieces = -(-rows // height)
    cell = k % tiles * tile
    row = k // tiles % pieces * height
    return k // tiles // pieces, row, min(row + height, rows), cell, min(tile, cells - cell)


@inner
def pitch_of(tile, size):
    return tile * size + PAD


@inner
def fill(a, at, n, number):
    """Write n values, and padding to whole vectors."""
    for i in range(0, n, lanes(a, WIDTH)):
        store(a, at + i, splat(a, number, WIDTH))


@inner
def spread(work, at, number, size):
    """A number into the columns of a cell; what spills over, the next cell overwrites."""
    for i in range(0, size, lanes(work, WIDTH)):
        store(work, at + i, splat(work, number, WIDTH))


@inner
def repeat(work, at, channels, cells):
    """Copy the first ``channels`` values to all that follow."""
    n = lanes(work, WIDTH)
    if channels >= n:
        for i in range(channels, cells, n):
            store(work, at + i, load(work, at + i - channels, WIDTH))
    else:
        for i in range(channels, cells):
            work[at + i] = work[at + i - channels]


@inner
def spread_rounded(x, parts, at, cells, size, work, into):
    """Round each cell's number to the compute type, in its place and in all columns of the cell."""
    if size == 1:
        for j in range(0, cells, lanes(parts, WIDTH)):
            number = load(parts, at + j, WIDTH)
            short = converted(number, load(work, into + j, number))
            store(work, into + j, short)
            store(parts, at + j, converted(short, number))
    else:
        for j in range(cells):
            number = rounded(x, parts[at + j])
            parts[at + j] = number
            spread(work, into + j * size, number, size)


@inner
def spread_affine(x, numbers, first, j, channels, kept, eps, cells, size, work, at, pitch):
    """Hi, scale and shift (see `affine_of`) of the cells from j on, in all their columns, a pitch apart."""
    if size == 1 and (j == 0 or j + cells <= channels):
        affine_vectors(numbers, first + j % channels, min(cells, channels), kept, eps, work, at, pitch)
        for k in range(3):
            repeat(work, at + k * pitch, channels, cells)
    else:
        c = j % channels
        for i in range(cells):
            hi, scale, shift = affine_of(x, numbers, first + c, kept, eps)
            spread(work, at + i * size, hi, size)
            spread(work, at + pitch + i * size, scale, size)
            spread(work, at + 2 * pitch + i * size, shift, size)
            c = c + 1 if c + 1 < channels else 0  # a division would take as long as the rest


@inner
def cell_totals(work, at, cells, size, parts):
    """Sum up each cell's columns in float64, and move the sums side by side."""
    n = lanes(work, WIDTH)
    like = splat(parts, 0.0, WIDTH)
    for j in range(cells if size > 1 else 0):
        first = at + j * size
        part = converted(load_first(work, first, min(n, size), WIDTH), like)
        for i in range(n, size, n):
            part = part + converted(load_first(work, first + i, min(n, size - i), WIDTH), like)
        work[at + j] = total(part)


@inner
def in_float64(work, at, parts):
    """As many values as a vector of ``parts`` has."""
    like = splat(parts, 0.0, WIDTH)
    return converted(load(work, at, like), like)


@inner
def part_of(a, at, part):
    """A vector from ``at`` on, or its first ``part`` lanes."""
    return load(a, at, WIDTH) if part is None else load_first(a, at, part, WIDTH)


@inner
def store_part(a, at, part, v, n):
    if part == n:
        store(a, at, v)
    else:
        store_first(a, at, part, v)


@inner
def width_of_last_row(end, j, width, shape, fold):
    """How many of ``width`` cells from j on there are in row ``end - 1``: the rest, in the last row of folded ones."""
    rows = -(-shape[1] // fold)
    if end < rows:
        return width
    return max(0, min(width, (fold - (rows * fold - shape[1])) * shape[2] - j))
