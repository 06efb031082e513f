"""Which kernels run, and how their work is divided: from shapes and strides to a function of flat arrays.

A plan is made once for each shape, strides, size of element and number of threads. It chooses between

- `rows`, a channel's rows one after the other, and `columns`, rows through all channels;
- one trip over memory, where what is read twice stays in a core's cache, and two;
- plain stores and stores past the caches.

What changes the bits of sums (chunks, segments, folding, the family of kernels) follows from shape and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fastbn.cpu import cells, columns, columns_gradients, rows, rows_gradients, slab, threads
from fastbn.cpu.memory import Array, Strides

Shape = tuple[int, ...]
Run = Callable[..., None]

STREAMED_ROW = 512  # bytes side by side from which streaming pays: their two ends are not streamed
SHORT = 1024  # values of a row, below which rows of many channels are read in one go
FEW_ROWS = 8  # below so many, spreading each channel's numbers over its columns costs more than it saves
LINE = 16  # values of a channel's row from which elementwise passes go in the order of memory, whatever the channels
FOLDED = 1024  # columns, about, of folded rows
FOLDED_ROWS = 256  # rows of few channels are folded only while so many remain
TILE = 1024  # columns, at most, of which a task makes sums; 512 read half as fast, 2048 short rows slower
ROW = 2048  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FUSED_WIDTH = 1024  # bytes of a row of a fused tile, at least: from memory, narrow tiles are slower than two passes
FROM_MEMORY = 4 << 20  # bytes of x from which it is taken to come from there
FUSED_BYTES = 192 << 10  # about so many are read twice by a thread; the next tile's are asked for meanwhile
FUSED_FROM = 2 << 20  # bytes of x from which fusing pays, if threads share it: two passes over less stay in cache
FUSED_MOST = 384 << 10  # what stays in a second-level cache of 512 kB beside the output

NOWHERE = (0, 0, 0, 0)


def in_columns(shape: Shape, *strides: Strides | None, weighted: bool = False) -> bool:
    """Whether the kernels of `columns` take these arrays: channels-last, or many short rows side by side."""
    _, outer, channel, inner = shape
    if inner == 1 or channel == 1:
        return channel > 1
    adjacent = all(s is None or s[3] == inner for s in strides)
    return inner <= SHORT and outer >= FEW_ROWS and not weighted and adjacent


def folding(shape: Shape, itemsize: int, *strides: Strides | None, weighted: bool = False) -> int:
    """How many rows of few channels are taken as one; whole cache lines of them where that is possible."""
    _, outer, channel, inner = shape
    fold = min(FOLDED // max(1, channel), outer // FOLDED_ROWS)
    lines = 64 // math.gcd(64, channel * itemsize)
    fold -= fold % lines if fold > lines else 0
    if inner > 1 or fold < 2 or weighted:
        return 1
    return fold if all(s is None or s[2] == channel for s in strides) else 1


def _tile(channels: int, size: int, itemsize: int, most: int) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def _fused_tile(shape: Shape, itemsize: int, twice: int, shares: int) -> int:
    """Cells of a tile whose rows all stay in a core's cache between two passes over ``twice`` arrays, or 0."""
    batch, outer, channel, inner = shape
    tile = _tile(channel, inner, itemsize, min(TILE, FUSED_BYTES // max(1, outer * itemsize * twice)))
    if shares == 1 and math.prod(shape) < threads.PARALLEL_FROM:
        return tile
    width = tile * inner * itemsize
    narrowest = FUSED_WIDTH if math.prod(shape) * itemsize >= FROM_MEMORY else FUSED_WIDTH // 8
    if (
        math.prod(shape) * itemsize < FUSED_FROM
        or width < narrowest
        or width * outer * twice > FUSED_MOST
        or batch * -(-channel // tile) < 2 * shares
    ):
        return 0
    return tile


def _whole_channels(shape: Shape, shares: int) -> bool:
    """Whether one thread does all, or there are channels enough to give each thread whole ones."""
    return shares == 1 or shape[0] * shape[2] >= 4 * shares


def _geometry(shape: Shape, family: tuple[int, ...], *strides: Strides | None) -> Array:
    """The integers of a kernel in one vector; see `fastbn.cpu.slab`."""
    return np.array([*shape, *family, *(step for s in strides for step in s or NOWHERE)], np.int64)


def _chunks(shape: Shape) -> tuple[int, ...]:
    """The geometry's integers of the family `rows`, for one channel at a time."""
    return (*rows.chunk_grid(shape[1], shape[3]), max(1, shape[3]), rows.PAD)


def _halved(shape: Shape, *strides: Strides | None) -> tuple[Any, ...]:
    """Shape and strides with the only row of each channel as two, which are read faster than one; else as they are."""
    batch, outer, channel, inner = shape
    if outer > 1 or inner < 2 * rows.CHUNK or inner % (2 * rows.CHUNK) > 0:
        return shape, *strides
    half = inner // 2
    return (batch, 2, channel, half), *(None if s is None else (s[0], s[1], half, s[3]) for s in strides)


class _Rows:
    """A division of ``rows``' elementwise passes: equal shares of the values in the order of memory."""

    def __init__(self, shape: Shape, itemsize: int, shares: int, *strides: Strides | None) -> None:
        batch, outer, channel, inner = shape
        run = max(1, inner)  # values side by side in all arrays
        for axis, n in ((3, channel), (2, outer), (1, batch)):
            if any(s is not None and n > 1 and s[axis] != run for s in strides):
                break
            run *= n
        self.tasks = rows.piece_count(shape)
        most = -(-self.tasks // shares) // max(1, -(-inner // rows.PIECE)) + 2  # rows of a share
        batches = most if outer == 1 else (most // max(1, outer * channel) + 2) * channel
        self.pitch = min(batch * channel, batches) + rows.PAD
        self.family = (*rows.chunk_grid(outer, inner), run, self.pitch)
        self.streams = run * itemsize >= STREAMED_ROW
        self.compute = np.float64 if itemsize == 8 else np.float32


class _Columns:
    """A division of ``columns``: segments of rows for sums, shares of the rows, or whole tiles for both at once."""

    def __init__(
        self, shape: Shape, fold: int, tile: int, itemsize: int, shares: int,
        sums: int = 0, scratch: int = 0, work: int = cells.WORK, fused: bool = False,
    ) -> None:  # fmt: skip
        batch, outer, channel, inner = shape
        # Sums take whole folds and leave the rest to their last step; elementwise passes take the rest as a row.
        folded = outer // fold if sums else -(-outer // fold)
        self.fold, self.tile, self.itemsize, self.inner, self.cells = fold, tile, itemsize, inner, channel * fold
        of_segments = cells.segment_rows(folded, self.cells)
        self.height = of_segments if sums or fused else max(1, -(-folded // shares))
        segments = -(-folded // self.height)
        pieces = 1 if fused else segments
        self.tasks = batch * pieces * -(-self.cells // tile)
        pitch = tile * inner + cells.PAD
        of_a_share = scratch * (1 + segments if fused else 1) * cells.padded(tile, tile)
        self.parts = sums * batch * segments * cells.padded(self.cells, tile) + shares * of_a_share
        self.work = shares * work * pitch
        self.compute = np.float64 if itemsize == 8 else np.float32
        self.family = (fold, tile, self.height, 0)

    def streams(self, *strides: Strides | None) -> bool:
        """Whether every row of a tile is whole cache lines, if the array starts on one."""
        width = 0 if self.tile >= self.cells else self.tile * self.inner
        steps = [width, *(step for s in strides if s is not None for step in (s[0], s[1], s[2] * self.fold))]
        return all(step * self.itemsize % 64 == 0 for step in steps)


# --- plans ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def moments(shape: Shape, xs: Strides, ws: Strides | None, itemsize: int, shares: int) -> Run:
    """``run(x, weight, table, eps)``: see `slab.enter_moments`."""
    weighted, kept = ws is not None, shape[0] * shape[2]
    if in_columns(shape, xs, weighted=weighted):
        fold = folding(shape, itemsize, xs, weighted=weighted)
        tile = _tile(shape[2] * fold, shape[3], itemsize, TILE)
        c = _Columns(shape, fold, tile, itemsize, shares, 3 if weighted else 2, cells.PARTS)
        geometry = _geometry(shape, c.family, xs, ws)

        def sums(x: Array, weight: Array | None, pivots: Array, table: Array, eps: float) -> None:
            parts, work = np.empty(c.parts), np.empty(c.work, c.compute)
            columns.segment_moments.run(c.tasks, shares, x, weight, geometry, pivots, parts, work)
            columns.channel_moments.run(kept, shares, x, weight, geometry, pivots, parts, table, eps)

    else:
        shape, xs, ws = _halved(shape, xs, ws)
        segments = kept * rows.segment_count(shape[1], shape[3])
        geometry = _geometry(shape, _chunks(shape), xs, ws)

        def sums(x: Array, weight: Array | None, pivots: Array, table: Array, eps: float) -> None:
            parts = np.empty(3 * segments)
            rows.moments_of_segments.run(segments, shares, x, weight, geometry, pivots, parts)
            rows.channel_moments.run(kept, shares, x, weight, geometry, pivots, parts, table, eps)

    def run(x: Array, weight: Array | None, table: Array, eps: float) -> None:
        pivots = np.empty(kept if weighted else 0)
        if weighted:
            slab.find_pivots.run(kept, shares, x, weight, geometry, pivots)
        sums(x, weight, pivots, table, eps)

    return run


@lru_cache(maxsize=1024)
def normalize(shape: Shape, xs: Strides, ys: Strides, rs: Strides | None, itemsize: int, shares: int) -> Run:
    """``run(x, y, residual, numbers, eps, relu, past)``: see `slab.affine_of`; past is that of `memory.past_caches`."""
    if shape[3] < LINE and in_columns(shape, xs, ys, rs):
        fold = folding(shape, itemsize, xs, ys, rs)
        tile = _tile(shape[2] * fold, shape[3], itemsize, ROW)
        c = _Columns(shape, fold, tile, itemsize, shares)
        geometry, can_stream = _geometry(shape, c.family, xs, ys, rs), c.streams(ys)

        def of_columns(
            x: Array, y: Array, residual: Array | None, numbers: Array, eps: float, relu: Any, past: int
        ) -> None:
            work = np.empty(c.work, c.compute)
            columns.normalize.run(
                c.tasks, shares, x, y, residual, geometry, numbers, eps, work, relu, past > 1 and can_stream
            )

        return of_columns
    r = _Rows(shape, itemsize, shares, xs, ys, rs)
    geometry = _geometry(shape, r.family, xs, ys, rs)

    def of_rows(x: Array, y: Array, residual: Array | None, numbers: Array, eps: float, relu: Any, past: int) -> None:
        work = np.empty(3 * shares * r.pitch, r.compute)
        rows.normalize.run(r.tasks, shares, x, y, residual, geometry, numbers, eps, work, relu, past > 0 and r.streams)

    return of_rows


@lru_cache(maxsize=1024)
def forward(
    shape: Shape, xs: Strides, ws: Strides | None, ys: Strides, rs: Strides | None, itemsize: int, shares: int
) -> Run:
    """``run(x, weight, y, residual, table, eps, relu, past)``: gamma and beta stand in `slab.enter_moments`' table."""
    weighted, kept = ws is not None, shape[0] * shape[2]
    tile = 0
    if not weighted and in_columns(shape, xs, ys, rs) and folding(shape, itemsize, xs) == 1:
        tile = _fused_tile(shape, itemsize, 1, shares)
    if tile:
        c = _Columns(shape, 1, tile, itemsize, shares, scratch=cells.PARTS, fused=True)
        geometry, can_stream = _geometry(shape, c.family, xs, ys, rs), c.streams(ys)

        def of_columns(
            x: Array, weight: None, y: Array, residual: Array | None,
            table: Array, eps: float, relu: Any, past: int,
        ) -> None:  # fmt: skip
            parts, work = np.empty(c.parts), np.empty(c.work, c.compute)
            columns.forward.run(
                c.tasks, shares, x, y, residual, geometry, table, eps, parts, work, relu, past > 1 and can_stream
            )

        return of_columns
    if _whole_channels(shape, shares) and not in_columns(shape, xs, weighted=weighted):
        shape, xs, ws, ys, rs = _halved(shape, xs, ws, ys, rs)
        geometry = _geometry(shape, _chunks(shape), xs, ws, ys, rs)
        can_stream = shape[3] * itemsize >= STREAMED_ROW

        def of_rows(
            x: Array, weight: Array | None, y: Array, residual: Array | None,
            table: Array, eps: float, relu: Any, past: int,
        ) -> None:  # fmt: skip
            pivots = np.empty(kept if weighted else 0)
            if weighted:
                slab.find_pivots.run(kept, shares, x, weight, geometry, pivots)
            work = np.empty(3 * shares * rows.PAD, np.float64 if itemsize == 8 else np.float32)
            rows.forward.run(
                kept, shares, x, weight, y, residual, geometry, pivots, table, eps, work, relu, past > 0 and can_stream
            )

        return of_rows
    first, second = moments(shape, xs, ws, itemsize, shares), normalize(shape, xs, ys, rs, itemsize, shares)

    def of_parts(
        x: Array, weight: Array | None, y: Array, residual: Array | None,
        table: Array, eps: float, relu: Any, past: int,
    ) -> None:  # fmt: skip
        first(x, weight, table, eps)
        second(x, y, residual, table[2 * kept :], -1.0, relu, past)

    return of_parts


@lru_cache(maxsize=1024)
def grad_sums(
    shape: Shape, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, itemsize: int, shares: int
) -> Run:
    """``run(dy, x, y, weight, numbers, out, linear, frozen)``: (dgamma, dbeta) from (mean, rstd).

    For linear and frozen see `slab.enter_linear`.
    """
    kept, weighted = shape[0] * shape[2], ws is not None
    if in_columns(shape, dys, xs, ys, weighted=weighted):
        fold = folding(shape, itemsize, dys, xs, ys, weighted=weighted)
        tile = _tile(shape[2] * fold, shape[3], itemsize, TILE)
        c = _Columns(shape, fold, tile, itemsize, shares, 2, work=columns_gradients.SUMMED)
        geometry = _geometry(shape, c.family, dys, xs, ys, ws)

        def of_columns(
            dy: Array, x: Array, y: Array | None, weight: Array | None, numbers: Array, out: Array, linear: Array,
            frozen: bool,
        ) -> None:  # fmt: skip
            parts, work = np.empty(c.parts), np.empty(c.work, c.compute)
            columns_gradients.segment_grad_sums.run(c.tasks, shares, dy, x, y, weight, geometry, numbers, parts, work)
            columns_gradients.channel_grad_sums.run(
                kept, shares, dy, x, y, geometry, numbers, parts, out, linear, frozen
            )

        return of_columns
    shape, dys, xs, ys, ws = _halved(shape, dys, xs, ys, ws)
    geometry = _geometry(shape, _chunks(shape), dys, xs, ys, ws)
    segments = kept * rows.segment_count(shape[1], shape[3])

    def of_rows(
        dy: Array, x: Array, y: Array | None, weight: Array | None, numbers: Array, out: Array, linear: Array,
        frozen: bool,
    ) -> None:  # fmt: skip
        parts = np.empty(2 * segments)
        rows_gradients.grad_sums_of_segments.run(segments, shares, dy, x, y, weight, geometry, numbers, parts)
        rows_gradients.channel_grad_sums.run(kept, shares, x, geometry, numbers, parts, out, linear, frozen)

    return of_rows


@lru_cache(maxsize=1024)
def grad_input(
    shape: Shape, dys: Strides, xs: Strides | None, ys: Strides | None, ws: Strides | None, dxs: Strides,
    drs: Strides | None, itemsize: int, shares: int,
) -> Run:  # fmt: skip
    """``run(dy, x, y, weight, dx, dresidual, numbers, past)``: numbers are (mean, scale, offset, slope, unit)."""
    strides = (dys, xs, ys, ws, dxs, drs)
    if shape[3] < LINE and in_columns(shape, dys, xs, ys, dxs, drs, weighted=ws is not None):
        fold = folding(shape, itemsize, dys, xs, ys, dxs, drs, weighted=ws is not None)
        tile = _tile(shape[2] * fold, shape[3], itemsize, ROW // 2)  # with five numbers a column, not three
        c = _Columns(shape, fold, tile, itemsize, shares, work=columns_gradients.LINEAR)
        geometry, can_stream = _geometry(shape, c.family, *strides), c.streams(dxs, drs)

        def of_columns(
            dy: Array, x: Array | None, y: Array | None, weight: Array | None, dx: Array, dresidual: Array | None,
            numbers: Array, past: int,
        ) -> None:  # fmt: skip
            work = np.empty(c.work, c.compute)
            streaming = past > 1 and can_stream
            columns_gradients.grad_input.run(
                c.tasks, shares, dy, x, y, weight, dx, dresidual, geometry, numbers, work, streaming
            )

        return of_columns
    r = _Rows(shape, itemsize, shares, *strides)
    geometry = _geometry(shape, r.family, *strides)

    def of_rows(
        dy: Array, x: Array | None, y: Array | None, weight: Array | None, dx: Array, dresidual: Array | None,
        numbers: Array, past: int,
    ) -> None:  # fmt: skip
        work = np.empty(rows_gradients.LINEAR * shares * r.pitch, r.compute)
        rows_gradients.grad_input.run(
            r.tasks, shares, dy, x, y, weight, dx, dresidual, geometry, numbers, work, past > 0 and r.streams
        )

    return of_rows


@lru_cache(maxsize=1024)
def backward(
    shape: Shape, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, dxs: Strides,
    drs: Strides | None, itemsize: int, shares: int, frozen: bool,
) -> Run:  # fmt: skip
    """``run(dy, x, y, weight, dx, dresidual, numbers, past, out)``: see `slab.input_numbers`; to (dgamma, dbeta)."""
    strides, kept = (dys, xs, ys, ws, dxs, drs), shape[0] * shape[2]
    tile = 0
    if ws is None and in_columns(shape, dys, xs, ys, dxs, drs) and folding(shape, itemsize, dys, xs, ys) == 1:
        tile = _fused_tile(shape, itemsize, 2, shares)
    if tile:
        c = _Columns(
            shape, 1, tile, itemsize, shares, scratch=columns_gradients.SUMS, work=columns_gradients.LINEAR, fused=True
        )
        geometry, can_stream = _geometry(shape, c.family, *strides), c.streams(dxs, drs)

        def of_columns(
            dy: Array, x: Array, y: Array | None, weight: None, dx: Array, dresidual: Array | None,
            numbers: Array, past: int, out: Array,
        ) -> None:  # fmt: skip
            parts, work, live = np.empty(c.parts), np.empty(c.work, c.compute), None if frozen else x
            columns_gradients.backward.run(
                c.tasks,
                shares,
                dy,
                x,
                y,
                live,
                dx,
                dresidual,
                geometry,
                numbers,
                out,
                parts,
                work,
                past > 1 and can_stream,
            )

        return of_columns
    if _whole_channels(shape, shares) and not in_columns(shape, dys, xs, ys, weighted=ws is not None):
        shape, *halved = _halved(shape, *strides)
        geometry, can_stream = _geometry(shape, _chunks(shape), *halved), shape[3] * itemsize >= STREAMED_ROW

        def of_rows(
            dy: Array, x: Array, y: Array | None, weight: Array | None, dx: Array, dresidual: Array | None,
            numbers: Array, past: int, out: Array,
        ) -> None:  # fmt: skip
            live, work = (
                None if frozen else x,
                np.empty(rows_gradients.LINEAR * shares * rows.PAD, np.float64 if itemsize == 8 else np.float32),
            )
            rows_gradients.backward.run(
                kept,
                shares,
                dy,
                x,
                y,
                live,
                weight,
                dx,
                dresidual,
                geometry,
                numbers,
                out,
                work,
                past > 0 and can_stream,
            )

        return of_rows
    first = grad_sums(shape, dys, xs, ys, ws, itemsize, shares)
    second = grad_input(shape, dys, None if frozen else xs, ys, ws, dxs, drs, itemsize, shares)

    def of_parts(
        dy: Array, x: Array, y: Array | None, weight: Array | None, dx: Array, dresidual: Array | None,
        numbers: Array, past: int, out: Array,
    ) -> None:  # fmt: skip
        live = None if frozen else x
        # Each channel's in the place of what it is made of, if that is enough.
        linear = numbers[: 5 * kept] if numbers.size > 5 * kept else np.empty(5 * kept)
        first(dy, x, y, weight, numbers, out, linear, frozen)
        second(dy, live, y, weight, dx, dresidual, linear, past)

    return of_parts
