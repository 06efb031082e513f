"""Arrays as kernels take them: strides in elements, kinds; memory of results; what may be written where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np

from fastbn.caches import last_cache
from fastbn.cpu import program
from fastbn.cpu.program import kernel_type
from fastbn.cpu.records import Shape, Slabs, SlabStrides, Strides
from fastbn.cpu.sizes import ROW_CHUNK, rows_together
from fastbn.layout import Layout
from fastbn.operands import Operand, dense

Array = np.ndarray[Any, Any]

CACHE_SHARE = 4 << 20  # bytes of output; below, nontemporal stores lose to plain ones, whose lines are still in cache
# How many times as much of a result that is allocated here, in memory that was in use a moment ago: plain stores of
# 6 MB are 1.1 to 1.4 times faster where the last cache has 32 MB, and up to 1.8 where it holds x as well; into an `out`
# that has left the caches they are 1.3 times slower. Nontemporal ones of 13 MB are 1.5 times faster.
OWN_TIMES = min(max(1, last_cache() // 4 // CACHE_SHARE), 4)


def reads(view: Array) -> bool:
    """Whether kernels can walk a collapsed array: contiguous inner or channel axis, other strides whole elements."""
    if not (view.dtype.isnative and view.flags.aligned):
        return False
    channel, inner = view.shape[-2:]
    axis = -1 if inner > 1 or channel == 1 else -2
    unit = view.shape[axis] == 1 or view.strides[axis] == view.itemsize
    return view.flags.c_contiguous or (unit and all(s % view.itemsize == 0 for s in view.strides))


ROW_OF_A_SLAB = 32  # bytes of a row from which walking it takes less time than to copy it
FEWEST_SLABS = 64  # of channels-last arrays: each is for one thread


def reads_slabs(views: Sequence[Array]) -> bool:
    """The same in slabs, whose rows must not be short."""
    far, near, outer, channel, inner = divided(views[0].shape)
    row = inner
    if inner == 1:
        side_by_side = all(v.strides[2] == v.strides[3] * channel for v in views)
        row = channel * rows_together(outer, channel) if side_by_side else channel
    many = inner > 1 or far * near >= FEWEST_SLABS
    return bool(many and row * views[0].itemsize >= ROW_OF_A_SLAB and all(map(reads, views)))


_shares_memory: Any = np.shares_memory  # whose stub knows only two of max_work's values


def disjoint(out: Array, *others: Array | None) -> bool:
    """By first and last bytes, in compiled code: for the gradients' arrays 0.4 us, where asking NumPy takes 2."""
    return program.disjoint()(out, *others)


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; yes where that is too hard to decide."""
    if a is b:
        return a.size > 0
    try:
        return not disjoint(a, b) and bool(_shares_memory(a, b, max_work=1000))
    except np.exceptions.TooHardError:
        return True


def same_or_apart(a: Array, b: Array) -> bool:
    """Whether each element of `a` lies where the same element of `b` does, or the arrays share no memory."""
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
        and a.shape == b.shape
    ) or not overlap(a, b)


def divided(shape: tuple[int, ...]) -> Slabs:
    """Slabs of an array: few large ones of channels-last rows are more that follow each other, if near ones are absent.

    All have equally many rows.
    """
    far, near, outer, channel, inner = shape
    if inner > 1 or near > 1 or far >= FEWEST_SLABS:
        return Slabs(*shape)
    wanted = -(-FEWEST_SLABS // far)
    near = next((n for n in range(wanted, min(8 * wanted, outer // ROW_CHUNK) + 1) if outer % n == 0), 1)
    return Slabs(far, near, outer // near, channel, inner)


def shape_of(o: Operand) -> Shape | Slabs:
    return divided(o.shape) if len(o.shape) == 5 else Shape(*o.shape)


def strides_of(o: Operand | None) -> Strides | SlabStrides | None:
    """Strides in elements; 0 where there is one element, so that arrays that lie alike have one plan."""
    if o is None:
        return None
    if len(o.shape) == 5:
        steps = (s // o.dtype.itemsize if n > 1 else 0 for s, n in zip(o.strides, o.shape, strict=True))
        far, near, outer, channel, _ = steps
        slabs = divided(o.shape)
        return SlabStrides(far, slabs.outer * outer if slabs.near != o.shape[1] else near, outer, channel)
    _, outer, channel, inner = o.shape
    whole = zip(o.strides, dense(o.shape, o.dtype).strides, o.shape, strict=True)
    if 0 in o.shape or all(s == d or n == 1 for s, d, n in whole):
        return Strides(outer * channel * inner, channel * inner, inner, 2 * channel * inner)
    batch, outer, channel = (
        s // o.dtype.itemsize if n > 1 else 0 for s, n in zip(o.strides, o.shape[:3], strict=False)
    )
    return Strides(batch, outer, channel, twice=2 * outer)


def strides_of_weight(o: Operand | None) -> tuple[Strides | None, str | None]:
    """The same of a weight, which is contiguous, and its kind; 0 along batch and channel where it does not vary."""
    if o is None:
        return None, None
    batch, outer, channel, inner = o.shape
    strides = Strides(
        outer * channel * inner * (batch > 1), channel * inner, inner * (channel > 1), twice=2 * channel * inner
    )
    return strides, kernel_type(o.dtype)


def kernel_type_or_none(dtype: np.dtype[Any] | None) -> str | None:
    """Of a vector of parameters, which may be absent."""
    return None if dtype is None else kernel_type(dtype)


def viewed(o: Operand, a: Any) -> Array:
    """A caller's array as its operand says that it lies."""
    return np.lib.stride_tricks.as_strided(a, o.shape, o.strides)


def collapsed_view(layout: Layout, a: Array) -> Array | None:
    """An array as kernels see it; None where that takes a copy."""
    try:
        return a.transpose(layout.order).reshape(layout.collapsed, copy=False)
    except ValueError:
        return None


# New pages cost more than a kernel (25 ms for 100 MB, the kernel 8), and malloc asks the system for new ones whenever
# an array is larger than 32 MB. So a few large buffers of results that nobody uses any more are kept for the next ones.
MAPPED, KEPT_BYTES = 32 << 20, 256 << 20  # bytes from which buffers are kept, and kept at most
_kept: dict[int, Array] = {}


class _Lease:
    """The owner of a result's memory: when the last array that refers to it is gone, the buffer is kept."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = _kept_buffer(nbytes)
        self.__array_interface__ = self.buffer.__array_interface__

    def __del__(self) -> None:
        if _kept is not None:  # at the interpreter's end modules lose their names
            _kept[id(self.buffer)] = self.buffer
            while sum(buffer.nbytes for buffer in tuple(_kept.values())) > KEPT_BYTES:
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


def alike(a: Array) -> Array:
    """An array that lies as results like this one, which nobody reads or writes."""
    return empty_like(a)


def allocator(a: Array) -> Callable[[Array], Array]:
    """What makes results like arrays that lie like this one."""
    plain = type(a) is np.ndarray and a.nbytes < CACHE_SHARE
    return np.empty_like if plain else empty_like


class Nontemporal(float, Enum):
    """Which kernels may write a result past the caches. Compiled code reads these as any float."""

    NONE = 0.0  # it is small: the cache has its lines when they are read again
    FROM_FIRST_LINE = 1.0  # those that store plainly up to the first whole line
    ALL = 2.0  # it starts at a multiple of 16 bytes


PLAIN = Nontemporal.NONE  # asking a class for it takes a call 40 ns


def nontemporal_stores(*operands: Operand | None) -> Callable[..., Nontemporal] | None:
    """What decides it for the results of a call, from the arrays; None where they are small."""
    for o in operands:
        if o is not None and max(o.size, o.of) * o.dtype.itemsize < CACHE_SHARE * (OWN_TIMES if o.fresh else 1):
            return None

    def allowed(*arrays: Array | None) -> Nontemporal:
        aligned = all(a is None or a.__array_interface__["data"][0] % 16 == 0 for a in arrays)
        return Nontemporal.ALL if aligned else Nontemporal.FROM_FIRST_LINE

    return allowed
