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
# Bytes of a row from which streaming pays: its two ends are not streamed and break the write combining.
STREAMED_ROW = 4096  # in memory order, where a row's end shares its line with the next row
STREAMED_ROW_OF_CHANNEL = 512  # channel by channel, where it does not
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


def _in_rows(shape: tuple[int, ...]) -> bool:
    return shape[3] > 1 or shape[2] == 1


def _whole_channels(shape: tuple[int, ...]) -> bool:
    """Whether one thread does all, or there are channels enough to give each thread whole ones."""
    return math.prod(shape) < jit.PARALLEL_FROM or shape[0] * shape[2] >= 4 * numba.get_num_threads()


def _streams(out: Array, by_channel: bool = False) -> bool:
    """Whether to write past the caches; rows of channels only where each starts on a line of its own."""
    if out.nbytes < CACHE_SHARE:
        return False
    if _in_rows(out.shape):
        return bool(out.shape[3] * out.itemsize >= (STREAMED_ROW_OF_CHANNEL if by_channel else STREAMED_ROW))
    places = (out.__array_interface__["data"][0], out.strides[0], out.strides[1])
    return all(place % 64 == 0 for place in places)


def _flag(on: bool) -> bool | None:
    """Options are True or None to kernels: each is compiled without the branches of the other."""
    return True if on else None


# --- the contract -----------------------------------------------------------------------------------------------------


def moments(x: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Count, mean and M2."""
    count, mean, m2 = np.empty((3, x.shape[0] * x.shape[2]))
    (x_, xs), (w_, ws) = _memory(x), _weight_memory(weight)
    if _in_rows(x.shape):
        grid = rows.chunk_grid(x.shape[1], x.shape[3])
        rows.moments.run(x.size, x_, xs, w_, ws, x.shape, grid, count, mean, m2)
    else:
        columns.moments.run(x.size, x_, xs, w_, ws, x.shape, count, mean, m2)
    return count, mean, m2


def normalize(x: Array, mean: Array, scale: Array, shift: Array, residual: Array | None, relu: bool, y: Array) -> None:
    """``y = (x - mean) * scale + shift + residual``, through relu."""
    (x_, xs), (y_, ys), (r_, rs) = _memory(x), _memory(y), _memory(residual)
    numbers = (mean, scale, shift, _flag(relu), _streams(y))
    family = rows if _in_rows(x.shape) else columns
    family.normalize.run(x.size, x_, xs, y_, ys, r_, rs, x.shape, *numbers)


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
    if not (_in_rows(x.shape) and _whole_channels(x.shape)):
        count, mean, m2 = moments(x, weight)
        normalize(x, mean, batch_rstd(count, m2, eps) * gamma, beta, residual, relu, y)
        return count, mean, m2
    count, mean, m2 = np.empty((3, x.shape[0] * x.shape[2]))
    (x_, xs), (w_, ws), (y_, ys), (r_, rs) = _memory(x), _weight_memory(weight), _memory(y), _memory(residual)
    grid = rows.chunk_grid(x.shape[1], x.shape[3])
    rows.forward.run(
        x.size, x_, xs, w_, ws, y_, ys, r_, rs, x.shape, grid,
        gamma, beta, eps, _flag(relu), _streams(y, by_channel=True), count, mean, m2,
    )  # fmt: skip
    return count, mean, m2


def grad_sums(dy: Array, x: Array, y: Array | None, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """``dgamma = sum(dz * xhat)`` and ``dbeta = sum(dz)``; dz = dy, or 0 where y <= 0."""
    if x.size == 0:  # the empty sum, though rstd is NaN
        dgamma, dbeta = np.zeros((2, x.shape[0] * x.shape[2]))
        return dgamma, dbeta
    dgamma, dbeta = np.empty((2, x.shape[0] * x.shape[2]))
    (dy_, dys), (x_, xs), (y_, ys) = _memory(dy), _memory(x), _memory(y)
    if _in_rows(x.shape):
        grid = rows.chunk_grid(x.shape[1], x.shape[3])
        rows.grad_sums.run(x.size, dy_, dys, x_, xs, y_, ys, x.shape, grid, mean, rstd, dgamma, dbeta)
    else:
        columns.grad_sums.run(x.size, dy_, dys, x_, xs, y_, ys, x.shape, mean, rstd, dgamma, dbeta)
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
    numbers = (mean, scale, offset, slope, _streams(dx))
    family = rows if _in_rows(dy.shape) else columns
    family.grad_input.run(dy.size, *arrays, *numbers)


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
    if not (_in_rows(x.shape) and _whole_channels(x.shape)) or x.size == 0:
        dgamma, dbeta = grad_sums(dy, x, y, mean, rstd)
        numbers = input_numbers(gamma, rstd, dgamma, dbeta, count, dmean, dvar)
        grad_input(dy, None if frozen else x, y, weight, mean, *numbers, dx, dresidual)
        return dgamma, dbeta
    dgamma, dbeta = np.empty((2, x.shape[0] * x.shape[2]))
    (dy_, dys), (x_, xs), (y_, ys), (w_, ws) = _memory(dy), _memory(x), _memory(y), _weight_memory(weight)
    (dx_, dxs), (dr_, drs) = _memory(dx), _memory(dresidual)
    rows.backward.run(
        x.size, dy_, dys, x_, xs, y_, ys, w_, ws, dx_, dxs, dr_, drs,
        x.shape, rows.chunk_grid(x.shape[1], x.shape[3]),
        mean, rstd, gamma, count, dmean, dvar, None if frozen else x_, _streams(dx, by_channel=True), dgamma, dbeta,
    )  # fmt: skip
    return dgamma, dbeta
