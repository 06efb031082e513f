"""Arrays as kernels take them: strides in elements, vectors of numbers; what may be written where."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.caches import last_cache
from fastbn.cpu.program import kind_of
from fastbn.layout import Layout

Array = np.ndarray[Any, Any]
Strides = tuple[int, ...]  # in elements: where the first one is, then of batch, outer and channel

CACHE_SHARE = 4 << 20  # bytes of output; below, streaming stores lose to plain ones, whose lines are still in cache
# How many times as much of a result that is allocated here, in memory that was in use a moment ago: plain stores of
# 6 MB are 1.1 to 1.4 times faster where the last cache has 32 MB, and up to 1.8 where it holds x as well; into an `out`
# that has left the caches they are 1.3 times slower. Streaming 13 MB is 1.5 times faster.
OWN_TIMES = min(max(1, last_cache() // 4 // CACHE_SHARE), 4)


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


def walkable(a: Array | None) -> tuple[Array | None, Strides | None]:
    """An array as kernels can walk it, copied if need be, and its strides in elements (0, batch, outer, channel)."""
    if a is None:
        return None, None
    if not writable_in_place(a):
        a = np.array(a, dtype=a.dtype.newbyteorder("="), order="C")
    _, outer, channel, inner = a.shape
    if a.flags.c_contiguous:
        return a, (0, outer * channel * inner, channel * inner, inner)
    return a, (0, *(s // a.itemsize if n > 1 else 0 for s, n in zip(a.strides[:3], a.shape, strict=False)))


def folded_view(layout: Layout, a: Array) -> Array | None:
    """An array as kernels see it; None where that takes a copy."""
    try:
        return a.transpose(layout.order).reshape(layout.folded, copy=False)
    except ValueError:
        return None


def vector(layout: Layout, parameter: Any, default: float) -> Array:
    """A parameter as kernels take it: a float64 vector; the default for None."""
    if parameter is None:
        return np.full(layout.folded[0] * layout.folded[2], default)
    numbers: Array = layout.vector(np, parameter)
    return numbers


def walkable_weight(weight: Array | None) -> tuple[Array | None, Strides | None, str | None]:
    """The same for weights, and their kind: contiguous, and stride 0 along batch and channel where they do not vary."""
    if weight is None:
        return None, None, None
    batch, outer, channel, inner = weight.shape
    strides = (0, outer * channel * inner * (batch > 1), channel * inner, inner * (channel > 1))
    return np.ascontiguousarray(weight), strides, kind_of(weight.dtype)


# New pages cost more than a kernel (25 ms for 100 MB, the kernel 8), and malloc asks the system for new ones whenever
# an array is larger than 32 MB. So a few large buffers of results that nobody uses any more are kept for the next ones.
MAPPED, KEPT = 32 << 20, 256 << 20  # bytes from which buffers are kept, and kept at most
_kept: dict[int, Array] = {}


class _Lease:
    """The owner of a result's memory: when the last array that refers to it is gone, the buffer is kept."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = _kept_buffer(nbytes)
        self.__array_interface__ = self.buffer.__array_interface__

    def __del__(self) -> None:
        if _kept is not None:  # at the interpreter's end modules lose their names
            _kept[id(self.buffer)] = self.buffer
            while sum(buffer.nbytes for buffer in tuple(_kept.values())) > KEPT:
                _kept.pop(next(iter(tuple(_kept))), None)


def _kept_buffer(nbytes: int) -> Array:
    """A kept buffer of about this size, or a new one. Threads may take and return buffers meanwhile."""
    for key, buffer in tuple(_kept.items()):
        if nbytes <= buffer.nbytes <= 1.25 * nbytes and _kept.pop(key, None) is not None:
            return buffer
    return np.empty(nbytes, np.uint8)


def empty_like(a: Array) -> Array:
    """An uninitialised array like `a`; a large one starts on a cache line, so it can be written past the caches."""
    if a.nbytes < CACHE_SHARE:
        return np.empty_like(a)
    nbytes = a.nbytes + 64
    buffer = np.empty(nbytes, np.uint8) if nbytes < MAPPED else np.asarray(_Lease(nbytes))
    start = -buffer.__array_interface__["data"][0] % 64
    order = sorted(range(a.ndim), key=lambda axis: -abs(a.strides[axis]))
    flat = buffer[start : start + a.nbytes].view(a.dtype).reshape([a.shape[axis] for axis in order])
    return flat.transpose(np.argsort(order))


def past_caches(*arrays: Array | None) -> float:
    """Which kernels may write to arrays past the caches: 0 none, they are small; 1 those that find the first line
    themselves; 2 all, the arrays start at a multiple of 16 bytes, as NumPy's own do.
    """
    if any(a is not None and a.nbytes < CACHE_SHARE for a in arrays):
        return 0.0
    return 2.0 if all(a is None or a.__array_interface__["data"][0] % 16 == 0 for a in arrays) else 1.0
