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

from fastbn.cpu import columns, jit, rows
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
TILE = 2048  # columns, at most, of which a task makes sums: three arrays of a tile are 24 kB
ROW = 4096  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FOLDED_ROWS = 512  # rows of few channels are folded only while so many remain
FUSED_WIDTH = 1024 # XXX
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
def _tile(channels: int, size: int, itemsize: int, most: int = TILE) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def _fused_tile(shape: tuple[int, ...], row_bytes: int) -> int:
    """Cells of a tile whose rows all stay in a core's cache between two passes; 0 where there is none to use.

    ``row_bytes`` are those of one column's value in all arrays that are read twice.
    """
    batch, outer, channel, inner = shape
    elements = math.prod(shape)
    if elements < jit.PARALLEL_FROM:
        return _tile(channel, inner, row_bytes)
    tile = _tile(channel, inner, row_bytes, min(ROW, max(1, FUSED_BYTES // (outer * row_bytes))))
    width = tile * inner * row_bytes
    if width < FUSED_WIDTH or width * outer > 2 * FUSED_BYTES or batch * -(-channel // tile) < 2 * numba.get_num_threads():
        return 0
    return tile


def _piece(outer: int) -> int:
    """Rows of a task: threads share the rows of a tile evenly, since starting a task costs its parameters' spreading."""
    return max(1, -(-outer // numba.get_num_threads()))


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
    count, mean, m2 = np.empty((3, x.shape[0] * x.shape[2]))
    (x_, xs), (w_, ws) = _memory(x), _weight_memory(weight)
    if _in_columns(weight, x):
        fold = _fold(weight, x)
        tile = _tile(x.shape[2] * fold, x.shape[3], x.itemsize)
        columns.moments.run(x.size, x_, xs, w_, ws, x.shape, fold, tile, count, mean, m2)
    else:
        grid = rows.chunk_grid(x.shape[1], x.shape[3])
        rows.moments.run(x.size, x_, xs, w_, ws, x.shape, grid, count, mean, m2)
    return count, mean, m2


def normalize(x: Array, mean: Array, scale: Array, shift: Array, residual: Array | None, relu: bool, y: Array) -> None:
    """``y = (x - mean) * scale + shift + residual``, through relu."""
    (x_, xs), (y_, ys), (r_, rs) = _memory(x), _memory(y), _memory(residual)
    arrays = (x_, xs, y_, ys, r_, rs, x.shape)
    if _in_columns(None, x, y, residual):
        fold = _fold(None, x, y, residual)
        tile = _tile(x.shape[2] * fold, x.shape[3], x.itemsize, ROW)
        numbers = (mean, scale, shift, _flag(relu), _streams_columns(fold, tile, y))
        columns.normalize.run(x.size, *arrays, fold, _piece(-(-x.shape[1] // fold)), tile, *numbers)
    else:
        rows.normalize.run(x.size, *arrays, mean, scale, shift, _flag(relu), _streams(y))


def forward(
    x: Array,
    weight: Array | None,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> tuple[Array, Array, Array]:
    """Moments of x, and y normalised by them."""
    in_columns, in_rows, tile = _in_columns(weight, x, y, residual), not _in_columns(weight, x), 0
    if in_columns and weight is None and _fold(None, x) == 1:
        tile = _fused_tile(x.shape, x.itemsize)
    if not (tile or (in_rows and _whole_channels(x.shape))):
        count, mean, m2 = moments(x, weight)
        normalize(x, mean, batch_rstd(count, m2, eps) * gamma, beta, residual, relu, y)
        return count, mean, m2
    count, mean, m2 = np.empty((3, x.shape[0] * x.shape[2]))
    (x_, xs), (w_, ws), (y_, ys), (r_, rs) = _memory(x), _weight_memory(weight), _memory(y), _memory(residual)
    if tile:
        columns.forward.run(
            x.size, x_, xs, y_, ys, r_, rs, x.shape, tile,
            gamma, beta, eps, _flag(relu), _streams_columns(1, tile, y), count, mean, m2,
        )  # fmt: skip
    else:
        grid = rows.chunk_grid(x.shape[1], x.shape[3])
        rows.forward.run(
            x.size, x_, xs, w_, ws, y_, ys, r_, rs, x.shape, grid,
            gamma, beta, eps, _flag(relu), _streams(y), count, mean, m2,
        )  # fmt: skip
    return count, mean, m2


def grad_sums(dy: Array, x: Array, y: Array | None, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """``dgamma = sum(dz * xhat)`` and ``dbeta = sum(dz)``; dz = dy, or 0 where y <= 0."""
    if x.size == 0:  # the empty sum, though rstd is NaN
        dgamma, dbeta = np.zeros((2, x.shape[0] * x.shape[2]))
        return dgamma, dbeta
    dgamma, dbeta = np.empty((2, x.shape[0] * x.shape[2]))
    (dy_, dys), (x_, xs), (y_, ys) = _memory(dy), _memory(x), _memory(y)
    if _in_columns(None, dy, x, y):
        fold = _fold(None, dy, x, y)
        tile = _tile(x.shape[2] * fold, x.shape[3], x.itemsize)
        columns.grad_sums.run(x.size, dy_, dys, x_, xs, y_, ys, x.shape, fold, tile, mean, rstd, dgamma, dbeta)
    else:
        grid = rows.chunk_grid(x.shape[1], x.shape[3])
        rows.grad_sums.run(x.size, dy_, dys, x_, xs, y_, ys, x.shape, grid, mean, rstd, dgamma, dbeta)
    return dgamma, dbeta


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
    arrays = (dy_, dys, x_, xs, y_, ys, w_, ws, dx_, dxs, dr_, drs, dy.shape)
    numbers = (mean, scale, offset, slope)
    if _in_columns(weight, dy, x, y, dx, dresidual):
        fold = _fold(weight, dy, x, y, dx, dresidual)
        tile = _tile(dy.shape[2] * fold, dy.shape[3], dy.itemsize, ROW)
        streaming = _streams_columns(fold, tile, dx, dresidual)
        columns.grad_input.run(dy.size, *arrays, fold, _piece(-(-dy.shape[1] // fold)), tile, *numbers, streaming)
    else:
        rows.grad_input.run(dy.size, *arrays, *numbers, _streams(dx, dresidual))


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
        tile = _fused_tile(x.shape, 2 * x.itemsize)
    if not (tile or (in_rows and _whole_channels(x.shape))) or x.size == 0:
        dgamma, dbeta = grad_sums(dy, x, y, mean, rstd)
        numbers = input_numbers(gamma, rstd, dgamma, dbeta, count, dmean, dvar)
        grad_input(dy, None if frozen else x, y, weight, mean, *numbers, dx, dresidual)
        return dgamma, dbeta
    dgamma, dbeta = np.empty((2, x.shape[0] * x.shape[2]))
    (dy_, dys), (x_, xs), (y_, ys), (w_, ws) = _memory(dy), _memory(x), _memory(y), _weight_memory(weight)
    (dx_, dxs), (dr_, drs) = _memory(dx), _memory(dresidual)
    numbers = (mean, rstd, gamma, count, dmean, dvar, None if frozen else x_)
    if tile:
        columns.backward.run(
            x.size, dy_, dys, x_, xs, y_, ys, dx_, dxs, dr_, drs, x.shape, tile,
            *numbers, _streams_columns(1, tile, dx, dresidual), dgamma, dbeta,
        )  # fmt: skip
    else:
        rows.backward.run(
            x.size, dy_, dys, x_, xs, y_, ys, w_, ws, dx_, dxs, dr_, drs,
            x.shape, rows.chunk_grid(x.shape[1], x.shape[3]), *numbers, _streams(dx, dresidual), dgamma, dbeta,
        )  # fmt: skip
    return dgamma, dbeta
