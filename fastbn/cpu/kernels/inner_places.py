"""Where the values of kept indices in rows are: chunks and segments of sums, places in the order of memory.

A division takes as long as 20 values, so small arrays, of one chunk, do without.
"""

from typing import Any, NamedTuple

from fastbn.cpu import sizes
from fastbn.cpu.kernels.compiler import inline, shared
from fastbn.cpu.kernels.pointers import advance
from fastbn.cpu.sizes import PIECE

chunk_count, segment_count = shared(sizes.chunk_count), shared(sizes.segment_count)


class Chunk(NamedTuple):
    """A part of a slab."""

    row: Any
    rows: Any
    column: Any
    columns: Any


class Place(NamedTuple):
    """Of a value in an array."""

    batch: Any
    outer: Any
    channel: Any
    column: Any


@inline
def chunk_at(k, shape, largest):
    """Chunk k of a slab."""
    if k == 0:
        return Chunk(0, min(largest.rows, shape.outer), 0, min(largest.columns, shape.inner))
    pieces = -(-shape.inner // largest.columns)
    row = k // pieces * largest.rows
    column = k % pieces * largest.columns
    return Chunk(row, min(largest.rows, shape.outer - row), column, min(largest.columns, shape.inner - column))


@inline
def piece_start(p, inner):
    """The position of piece p among the values in the order of memory."""
    pieces = -(-inner // PIECE)
    return p // pieces * inner + p % pieces * PIECE


@inline
def place_of(position, shape):
    """The place of a position among the values in the order of memory."""
    row = position // shape.inner
    return Place(
        row // (shape.channel * shape.outer), row // shape.channel % shape.outer, row % shape.channel,
        position % shape.inner,
    )  # fmt: skip


@inline
def place_after(place, shape):
    """Where the row behind that of a place begins."""
    if place.channel + 1 < shape.channel:
        return Place(place.batch, place.outer, place.channel + 1, 0)
    if place.outer + 1 < shape.outer:
        return Place(place.batch, place.outer + 1, 0, 0)
    return Place(place.batch + 1, 0, 0, 0)


@inline
def values_in_run(position, end, place, shape, walk):
    """How many values side by side in all arrays follow from a position on, before the end."""
    if walk.run == shape.inner:
        return min(end - position, shape.inner - place.column)
    return min(end, (position // walk.run + 1) * walk.run) - position


@inline
def place_behind(position, place, shape, walk):
    """The place of a position where a run begins, given a place in the run before."""
    return place_after(place, shape) if walk.run == shape.inner else place_of(position, shape)


@inline
def row_in_turn(k, shape):
    """Of a channel's rows: each other one, then those between, so that halves are written one after the other."""
    half = (shape.outer + 1) >> 1
    return 2 * k if k < half else 2 * (k - half) + 1


@inline
def values_from(array, place):
    """The values from a place on."""
    start = place.batch * array.batch + place.outer * array.outer + place.channel * array.channel + place.column
    return advance(array.values, start)


@inline
def kept_at(place, walk):
    """The kept index of a place."""
    return place.batch * walk.batch + place.outer * walk.outer + place.channel * walk.channel


@inline
def kept_range(start, end, walk):
    """The kept indices, first and last + 1, that values between two positions may belong to."""
    return start // walk.values * walk.kept, -(-end // walk.values) * walk.kept


@inline
def row_after(t, outer, channel, shape, walk):
    """Kept index, outer and channel of the row that follows in memory; a division would be slow."""
    if channel + 1 < shape.channel:
        return t + walk.channel, outer, channel + 1
    t -= channel * walk.channel
    if outer + 1 < shape.outer:
        return t + walk.outer, outer + 1, 0
    return t - outer * walk.outer + walk.batch, 0, 0
