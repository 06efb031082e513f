"""The contract of a backend, on NumPy arrays with Numba kernels.

Arrays of data are four-dimensional, ``(batch, outer, channel, inner)``, of one dtype: float16, bfloat16, float32 or
float64. Per-channel numbers are float64 vectors over ``batch * channel``. ``weight`` is None, bool or float64, with
size 1 where it does not vary. Arrays to be written must be `writable_in_place`; they may be the inputs themselves,
element for element. What is absent is None.

Two families of kernels: `rows` where the inner axis is contiguous, `columns` where the channel axis is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from fastbn.cpu import columns, jit, rows, slab
from fastbn.formulas import batch_rstd, input_numbers

__all__ = [
    "backward",
    "empty_like",
    "forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "overlap",
    "same_or_apart",
    "writable_in_place",
    "xp",
]

xp = np

CACHE_SHARE = 4 << 20  # bytes of output; below, streaming stores lose to plain ones, whose lines are still in cache
STREAMED_ROW = 512  # bytes of a channel's row from which streaming pays: its two ends are not streamed
SHORT = 1024  # values of a row, below which rows of many channels are read in one go
FEW_ROWS = 8  # below so many, spreading each channel's numbers over its columns costs more than it saves
FOLDED = 512  # columns, about, of folded rows
TILE = 512  # columns, at most, of which a task makes sums: with float64 sums of cells, 24 kB at most
ROW = 4096  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FOLDED_ROWS = 512  # rows of few channels are folded only while so many remain
FUSED_WIDTH = 1024  # bytes of a row of a fused tile, at least
FUSED_BYTES = 192 << 10  # read twice by one thread: with the output beside it, it stays in a second-level cache of 512 kB
Array = np.ndarray[Any, Any]


# --- arrays as kernels take them --------------------------------------------------------------------------------------

_AS_INTEGERS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
    "bool": np.dtype(np.uint8),
}
_NO_STRIDES = (0, 0, 0, 0)


@lru_cache(maxsize=64)
def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that kernels see (``dtype.name`` alone takes a microsecond)."""
    return _AS_INTEGERS.get(dtype.name, dtype)


class _Span:
    """Flat memory from an array's lowest to its highest element, whatever its strides."""

    def __init__(self, a: Array, start: int, count: int, dtype: np.dtype[Any]) -> None:
        self.owner = a
        address = a.__array_interface__["data"][0] - start * a.itemsize
        self.__array_interface__ = {
            "version": 3,
            "shape": (count,),
            "typestr": dtype.str,
            "data": (address, False),  # not read-only: one compiled kernel serves both; inputs are never written
        }


def _unit_stride(a: Array) -> bool:
    """Whether kernels can walk the array: contiguous inner or channel axis, other strides whole elements."""
    _, _, channel, inner = a.shape
    axis = 3 if inner > 1 or channel == 1 else 2
    unit = a.shape[axis] == 1 or a.strides[axis] == a.itemsize
    return unit and all(s % a.itemsize == 0 for s in a.strides)


def writable_in_place(a: Array) -> bool:
    """Whether kernels can write a folded array as it lies in memory."""
    return bool(a.dtype.isnative and (a.flags.carray or (a.flags.aligned and _unit_stride(a))))


_shares_memory: Any = np.shares_memory  # whose stub knows only two of max_work's values


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; yes where that is too hard to decide."""
    try:
        return bool(np.may_share_memory(a, b) and _shares_memory(a, b, max_work=1000))
    except np.exceptions.TooHardError:
        return True


def same_or_apart(a: Array, b: Array) -> bool:
    """Whether each element of `a` lies where the same element of `b` does, or the arrays share no memory."""
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides
    ) or not overlap(a, b)


def _memory(a: Array | None) -> tuple[Array | None, tuple[int, ...]]:
    """Flat memory and the element strides (start, batch, outer, channel); copies what kernels cannot walk."""
    if a is None:
        return None, _NO_STRIDES
    if not writable_in_place(a):
        a = np.array(a, dtype=a.dtype.newbyteorder("="), order="C")
    dtype = _stored(a.dtype)
    _, outer, channel, inner = a.shape
    if a.flags.carray:
        strides = (0, outer * channel * inner, channel * inner, inner)
        return a.reshape(-1).view(dtype), strides
    steps = tuple(s // a.itemsize if n > 1 else 0 for s, n in zip(a.strides, a.shape, strict=True))
    reach = [(n - 1) * s for n, s in zip(a.shape, steps, strict=True)]
    start = -sum(r for r in reach if r < 0)
    count = 1 + start + sum(r for r in reach if r > 0) if a.size else 0
    return np.asarray(_Span(a, start, count, dtype)), (start, *steps[:3])


def _weight_memory(weight: Array | None) -> tuple[Array | None, tuple[int, ...]]:
    """The same for weights: contiguous, and stride 0 along batch and channel where they do not vary."""
    if weight is None:
        return None, _NO_STRIDES
    batch, outer, channel, inner = weight.shape
    strides = (0, outer * channel * inner * (batch > 1), channel * inner, inner * (channel > 1))
    return weight.reshape(-1).view(_stored(weight.dtype)), strides


def _adjacent(shape: tuple[int, ...], *arrays: Array | None) -> bool:
    """Whether neighbouring channels lie next to each other in all of these arrays."""
    return shape[2] == 1 or all(a is None or a.strides[2] == shape[3] * a.itemsize for a in arrays)


def _in_columns(weight: Array | None, *arrays: Array | None) -> bool:
    """Whether the kernels of `columns` take these arrays: channels-last, or many short rows side by side."""
    shape = next(a.shape for a in arrays if a is not None)
    _, outer, channel, inner = shape
    if inner == 1:
        return channel > 1
    short = inner <= SHORT and outer >= FEW_ROWS and channel > 1
    return short and weight is None and _adjacent(shape, *arrays)


def _fold(weight: Array | None, *arrays: Array | None) -> int:
    """How many rows of few channels are taken as one."""
    shape = next(a.shape for a in arrays if a is not None)
    _, outer, channel, inner = shape
    fold = min(FOLDED // max(1, channel), outer // FOLDED_ROWS)
    if inner > 1 or fold < 2 or weight is not None:
        return 1
    return fold if all(a is None or a.strides[1] == channel * a.itemsize for a in arrays) else 1


@lru_cache(maxsize=1024)
def _tile(channels: int, size: int, itemsize: int, most: int) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def _fused_tile(shape: tuple[int, ...], itemsize: int, twice: int) -> int:
    """Cells of a tile whose rows all stay in a core's cache between two passes over ``twice`` arrays; 0 if there is none.

    A narrow tile of many rows is no stream to the memory system: two passes over wide ones are faster.
    """
    batch, outer, channel, inner = shape
    most = FUSED_BYTES // max(1, outer * itemsize * twice)
    tile = _tile(channel, inner, itemsize, min(TILE, most))
    if math.prod(shape) < jit.PARALLEL_FROM:
        return tile
    width = tile * inner * itemsize
    if width < FUSED_WIDTH or width * outer * twice > 2 * FUSED_BYTES:
        return 0
    return tile if batch * -(-channel // tile) >= 2 * numba.get_num_threads() else 0


def _whole_channels(shape: tuple[int, ...]) -> bool:
    """Whether one thread does all, or there are channels enough to give each thread whole ones."""
    return math.prod(shape) < jit.PARALLEL_FROM or shape[0] * shape[2] >= 4 * numba.get_num_threads()


def _streams(*outs: Array | None) -> bool:
    """Whether to write past the caches, by rows of one channel."""
    return all(
        out is None or (out.nbytes >= CACHE_SHARE and out.shape[3] * out.itemsize >= STREAMED_ROW) for out in outs
    )


def _streams_columns(fold: int, tile: int, *outs: Array | None) -> bool:
    """The same for rows of all channels: each row of a tile must be whole cache lines."""
    for out in outs:
        if out is None:
            continue
        width = tile * out.shape[3] * out.itemsize
        one_tile = tile >= out.shape[2] * fold
        places = (out.__array_interface__["data"][0], out.strides[0], out.strides[1] * fold, 0 if one_tile else width)
        if out.nbytes < CACHE_SHARE or any(place % 64 for place in places):
            return False
    return True


def _flag(on: bool) -> bool | None:
    """Options are True or None to kernels: each is compiled without the branches of the other."""
    return True if on else None


def _geometry(shape: tuple[int, ...], family: tuple[int, ...], *strides: tuple[int, ...]) -> Array:
    """The integers of a kernel in one vector."""
    return np.array([*shape, *family, *(s for four in strides for s in four)], np.int64)


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The family's integers of `rows`."""
    return (*rows.chunk_grid(shape[1], shape[3]), 0, 0)


def _work(x: Array, tile: int, shares: int, results: int = 0) -> tuple[Array, Array]:
    """What `columns` kernels want: ``parts`` for so many results and each share's float64 arrays, and ``work``."""
    pitch = tile * x.shape[3] + columns.PAD
    compute = np.float64 if x.itemsize == 8 else np.float32
    return np.empty(results + shares * columns.PARTS * pitch), np.empty(shares * columns.WORK * pitch, compute)


def _packed(*vectors: Array) -> Array:
    """Per-channel numbers as kernels take them."""
    return np.concatenate(vectors)


def _segments(shape: tuple[int, ...], fold: int) -> tuple[int, int]:
    """Rows of a segment and the number of results, one for each cell and segment."""
    batch, outer, channel, _ = shape
    height = columns.segment_rows(outer // fold)
    return height, batch * -(-(outer // fold) // height) * channel * fold


# --- the contract -----------------------------------------------------------------------------------------------------


def empty_like(a: Array) -> Array:
    """An uninitialised array like `a`; a large one starts on a cache line, so that it can be written past the caches."""
    if a.nbytes < CACHE_SHARE:
        return np.empty_like(a)
    buffer = np.empty(a.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    order = sorted(range(a.ndim), key=lambda axis: -abs(a.strides[axis]))
    flat = buffer[start : start + a.nbytes].view(a.dtype).reshape([a.shape[axis] for axis in order])
    return flat.transpose(np.argsort(order))


def moments(x: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Count, mean and M2."""
    shape, kept = x.shape, x.shape[0] * x.shape[2]
    out = np.empty((3, kept))
    flat_out, pivots, shares = out.reshape(-1), np.empty(kept if weight is not None else 0), jit.shares_of(x.size)
    (x_, xs), (w_, ws) = _memory(x), _weight_memory(weight)
    in_columns = _in_columns(weight, x)
    if in_columns:
        fold = _fold(weight, x)
        height, results = _segments(shape, fold)
        tile = _tile(shape[2] * fold, shape[3], x.itemsize, TILE)
        geometry = _geometry(shape, (fold, tile, height, 0), xs, ws)
        parts, work = _work(x, tile, shares, results * (2 if weight is None else 3))
    else:
        geometry, parts = _geometry(shape, _chunks(shape), xs, ws), np.empty(0)
    if weight is not None:
        slab.find_pivots.run(kept, shares, x_, w_, geometry, pivots)
    if in_columns:
        tasks = columns.task_count(shape[0], shape[1] // fold, shape[2] * fold, height, tile)
        columns.segment_moments.run(tasks, shares, x_, w_, geometry, pivots, parts, work)
        columns.channel_moments.run(kept, shares, x_, w_, geometry, pivots, parts, flat_out)
    else:
        segments = kept * rows.segment_count(shape[1], shape[3])
        parts = np.empty(3 * segments)
        rows.moments_of_segments.run(segments, shares, x_, w_, geometry, pivots, parts)
        rows.channel_moments.run(kept, shares, x_, w_, geometry, pivots, parts, flat_out)
    return out[0], out[1], out[2]


def normalize(
    x: Array,
    mean: Array,
    spread: Array,
    gamma: Array,
    beta: Array,
    eps: float | None,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> None:
    """``y = (x - mean) * rstd * gamma + beta + residual``, through relu.

    ``spread`` is the variance, to which eps is added, or without eps the rstd.
    """
    (x_, xs), (y_, ys), (r_, rs) = _memory(x), _memory(y), _memory(residual)
    numbers = (_packed(mean, spread, gamma, beta), -1.0 if eps is None else eps)
    shares = jit.shares_of(x.size)
    if _in_columns(None, x, y, residual):
        fold = _fold(None, x, y, residual)
        tile = _tile(x.shape[2] * fold, x.shape[3], x.itemsize, ROW)
        tasks, height = _row_tasks(x.shape, fold, tile, shares)
        geometry = _geometry(x.shape, (fold, tile, height, 0), xs, ys, rs)
        _, work = _work(x, tile, shares)
        streaming = _streams_columns(fold, tile, y)
        columns.normalize.run(tasks, shares, x_, y_, r_, geometry, *numbers, work, _flag(relu), streaming)
    else:
        geometry, tasks = _geometry(x.shape, _chunks(x.shape), xs, ys, rs), rows.piece_count(x.shape)
        rows.normalize.run(tasks, shares, x_, y_, r_, geometry, *numbers, _flag(relu), _streams(y))


def _row_tasks(shape: tuple[int, ...], fold: int, tile: int, shares: int) -> tuple[int, int]:
    """Tasks of a pass over rows, and rows of one: few, since starting a task costs its parameters' spreading."""
    folded = -(-shape[1] // fold)
    height = max(1, -(-folded // shares))
    return columns.task_count(shape[0], folded, shape[2] * fold, height, tile), height


def forward(
    x: Array,
    weight: Array | None,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> tuple[Array, Array, Array, Array]:
    """Count, mean, M2 and rstd of x, and y normalised by them."""
    in_columns, in_rows, tile = _in_columns(weight, x, y, residual), not _in_columns(weight, x), 0
    if in_columns and weight is None and _fold(None, x) == 1:
        tile = _fused_tile(x.shape, x.itemsize, 1)
    if not (tile or (in_rows and _whole_channels(x.shape))):
        count, mean, m2 = moments(x, weight)
        rstd = batch_rstd(count, m2, eps)
        normalize(x, mean, rstd, gamma, beta, None, residual, relu, y)
        return count, mean, m2, rstd
    kept, shares = x.shape[0] * x.shape[2], jit.shares_of(x.size)
    out = np.empty((4, kept))
    flat_out, numbers = out.reshape(-1), _packed(gamma, beta)
    (x_, xs), (w_, ws), (y_, ys), (r_, rs) = _memory(x), _weight_memory(weight), _memory(y), _memory(residual)
    if tile:
        geometry = _geometry(x.shape, (1, tile, _segments(x.shape, 1)[0], 0), xs, ys, rs)
        parts, work = _work(x, tile, shares)
        columns.forward.run(
            x.shape[0] * -(-x.shape[2] // tile), shares, x_, y_, r_, geometry,
            numbers, eps, flat_out, parts, work, _flag(relu), _streams_columns(1, tile, y),
        )  # fmt: skip
    else:
        geometry = _geometry(x.shape, _chunks(x.shape), xs, ws, ys, rs)
        pivots = np.empty(kept if weight is not None else 0)
        if weight is not None:
            slab.find_pivots.run(kept, shares, x_, w_, geometry, pivots)
        rows.forward.run(
            kept, shares, x_, w_, y_, r_, geometry, pivots, numbers, eps, flat_out, _flag(relu), _streams(y)
        )
    return out[0], out[1], out[2], out[3]


def grad_sums(dy: Array, x: Array, y: Array | None, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """``dgamma = sum(dz * xhat)`` and ``dbeta = sum(dz)``; dz = dy, or 0 where y <= 0."""
    kept, shares = x.shape[0] * x.shape[2], jit.shares_of(x.size)
    out = np.zeros((2, kept))
    if x.size == 0:  # the empty sum, though rstd is NaN
        return out[0], out[1]
    (dy_, dys), (x_, xs), (y_, ys) = _memory(dy), _memory(x), _memory(y)
    numbers, flat_out = _packed(mean, rstd), out.reshape(-1)
    if _in_columns(None, dy, x, y):
        fold = _fold(None, dy, x, y)
        height, results = _segments(x.shape, fold)
        tile = _tile(x.shape[2] * fold, x.shape[3], x.itemsize, TILE)
        geometry = _geometry(x.shape, (fold, tile, height, 0), dys, xs, ys)
        parts, work = _work(x, tile, shares, 2 * results)
        tasks = columns.task_count(x.shape[0], x.shape[1] // fold, x.shape[2] * fold, height, tile)
        columns.segment_grad_sums.run(tasks, shares, dy_, x_, y_, geometry, numbers, parts, work)
        columns.channel_grad_sums.run(kept, shares, dy_, x_, y_, geometry, numbers, parts, flat_out)
    else:
        geometry = _geometry(x.shape, _chunks(x.shape), dys, xs, ys)
        segments = kept * rows.segment_count(x.shape[1], x.shape[3])
        parts = np.empty(2 * segments)
        rows.grad_sums_of_segments.run(segments, shares, dy_, x_, y_, geometry, numbers, parts)
        rows.channel_grad_sums.run(kept, shares, x_, geometry, numbers, parts, flat_out)
    return out[0], out[1]


def grad_input(
    dy: Array,
    x: Array | None,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    scale: Array,
    offset: Array,
    slope: Array,
    dx: Array,
    dresidual: Array | None,
) -> None:
    """``dx = scale * dz - weight * (offset + slope * (x - mean))``, without x ``scale * dz``; dresidual = dz."""
    (dy_, dys), (x_, xs), (y_, ys), (w_, ws) = _memory(dy), _memory(x), _memory(y), _weight_memory(weight)
    (dx_, dxs), (dr_, drs) = _memory(dx), _memory(dresidual)
    arrays, strides = (dy_, x_, y_, w_, dx_, dr_), (dys, xs, ys, ws, dxs, drs)
    numbers, shares = _packed(mean, scale, offset, slope), jit.shares_of(dy.size)
    if _in_columns(weight, dy, x, y, dx, dresidual):
        fold = _fold(weight, dy, x, y, dx, dresidual)
        tile = _tile(dy.shape[2] * fold, dy.shape[3], dy.itemsize, ROW)
        tasks, height = _row_tasks(dy.shape, fold, tile, shares)
        geometry = _geometry(dy.shape, (fold, tile, height, 0), *strides)
        _, work = _work(dy, tile, shares)
        streaming = _streams_columns(fold, tile, dx, dresidual)
        columns.grad_input.run(tasks, shares, *arrays, geometry, numbers, work, streaming)
    else:
        geometry, tasks = _geometry(dy.shape, _chunks(dy.shape), *strides), rows.piece_count(dy.shape)
        rows.grad_input.run(tasks, shares, *arrays, geometry, numbers, _streams(dx))


def backward(
    dy: Array,
    x: Array,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    gamma: Array,
    count: Array,
    dmean: Array,
    dvar: Array,
    frozen: bool,
    dx: Array,
    dresidual: Array | None,
) -> tuple[Array, Array]:
    """The two sums; dx from them (frozen: without the statistics' share); dresidual = dz."""
    in_columns, in_rows, tile = _in_columns(weight, dy, x, y, dx, dresidual), not _in_columns(None, dy, x, y), 0
    if in_columns and weight is None and _fold(None, dy, x, y) == 1:
        tile = _fused_tile(x.shape, x.itemsize, 2)
    if not (tile or (in_rows and _whole_channels(x.shape))) or x.size == 0:
        dgamma, dbeta = grad_sums(dy, x, y, mean, rstd)
        terms = input_numbers(gamma, rstd, dgamma, dbeta, count, dmean, dvar)
        grad_input(dy, None if frozen else x, y, weight, mean, *terms, dx, dresidual)
        return dgamma, dbeta
    kept, shares = x.shape[0] * x.shape[2], jit.shares_of(x.size)
    out = np.empty((2, kept))
    flat_out, numbers = out.reshape(-1), _packed(mean, rstd, gamma, count, dmean, dvar)
    (dy_, dys), (x_, xs), (y_, ys), (w_, ws) = _memory(dy), _memory(x), _memory(y), _weight_memory(weight)
    (dx_, dxs), (dr_, drs) = _memory(dx), _memory(dresidual)
    strides, live = (dys, xs, ys, ws, dxs, drs), None if frozen else x_
    if tile:
        geometry = _geometry(x.shape, (1, tile, _segments(x.shape, 1)[0], 0), *strides)
        parts, work = _work(x, tile, shares)
        columns.backward.run(
            x.shape[0] * -(-x.shape[2] // tile), shares, dy_, x_, y_, live, dx_, dr_, geometry,
            numbers, flat_out, parts, work, _streams_columns(1, tile, dx, dresidual),
        )  # fmt: skip
    else:
        geometry = _geometry(x.shape, _chunks(x.shape), *strides)
        rows.backward.run(
            kept, shares, dy_, x_, y_, live, w_, dx_, dr_, geometry, numbers, flat_out, _streams(dx)
        )
    return out[0], out[1]
