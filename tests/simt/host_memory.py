"""The memory of CuPy's arrays on the host: seen from both sides, allocated, copied; and what is counted."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

operations: Counter[str] = Counter()
"""What would have run on the GPU since `installed` was entered: ufuncs and reductions by their names, `copy` (a kernel
that copies, as `astype` and `ascontiguousarray` do), `fill`, `take` and `put` (indexing by arrays), `concatenate`,
`memset`, `memcpy`, and the transfers `set` and `get`, of which `get` makes the host wait. Ufuncs, reductions and copies
of size 0 run no kernel and are not counted."""

allocations: list[int] = []
"""Bytes of every allocation since then; these are no operations."""

WATCHERS: list[Callable[[int, int, Any], None]] = []
"""Told of memory that kernels may use: its address, bytes, and the object whose end it does not outlive."""

ALIGNMENT = 512  # of CuPy's memory pools
POISON = 0xFF  # NaN in every float dtype


class _Viewed:
    """NumPy's way to memory that a `cupy.ndarray` holds, which it keeps alive as the base of the NumPy array."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": array.strides,
            "data": (array.data.ptr, False),
            "version": 3,
        }


def to_numpy(array: Any) -> np.ndarray:
    """A view on the memory of a `cupy.ndarray`, with its strides."""
    if array.size == 0:  # perhaps without an address
        return np.empty(array.shape, array.dtype)
    return np.asarray(_Viewed(array)).view(array.dtype)  # whose typestr of bfloat16 says no more than two bytes


def to_cupy(array: np.ndarray, device: int = 0) -> Any:
    """A `cupy.ndarray` over the same memory, with the same strides, negative and zero ones too.

    Arrays on a GPU are aligned and of its byte order: others are copied. Views of one NumPy array have one memory, as
    views of an allocation have, which `cupy.may_share_memory` asks for. There are no read-only arrays in CuPy. Another
    `device` than 0 is for what refuses arrays of several; operations do not look at it.
    """
    import cupy

    array = np.asarray(array)
    if array.dtype.char not in "?bhilqBHILQefdFD" and array.dtype.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {array.dtype}")
    aligned = array.ctypes.data % array.itemsize == 0 and all(
        stride % array.itemsize == 0 for n, stride in zip(array.shape, array.strides, strict=True) if n > 1
    )
    if not (aligned and array.dtype.isnative):
        array = np.array(array, array.dtype.newbyteorder("="), order="K")
    first, end = byte_bounds(array) if array.size else (array.ctypes.data,) * 2
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    viewed = owner.base
    if isinstance(viewed, _Viewed):
        memory = viewed.array.data.mem
    else:
        low, high = byte_bounds(owner) if owner.size else (first, end)
        if not low <= first <= end <= high:  # strides made by hand
            low, high = first, end
        memory = cupy.cuda.UnownedMemory(low, high - low, owner, device)
        for watcher in WATCHERS:
            watcher(low, high - low, owner)
    pointer = _pointer_type()(memory, array.ctypes.data - memory.ptr)
    return cupy.ndarray(array.shape, array.dtype, pointer, array.strides)


def allocate(size: int) -> Any:
    """What CuPy's pools do, on poisoned host memory."""
    import cupy

    allocations.append(size)
    if size == 0:
        return _pointer_type()(cupy.cuda.UnownedMemory(0, 0, None, 0), 0)
    buffer = np.full(size + ALIGNMENT, POISON, np.uint8)
    memory = cupy.cuda.UnownedMemory(buffer.ctypes.data + -buffer.ctypes.data % ALIGNMENT, size, buffer, 0)
    for watcher in WATCHERS:
        watcher(memory.ptr, size, buffer)
    return _pointer_type()(memory, 0)


@functools.cache
def _pointer_type() -> type:
    from cupy.cuda import MemoryPointer

    def moved(name: str, to_self: bool) -> Any:
        def copy(self: Any, other: Any, size: int, stream: Any = None) -> None:
            if size:
                operations[name] += 1
                address = other.ptr if isinstance(other, MemoryPointer) else getattr(other, "value", other)
                ctypes.memmove(*((self.ptr, address) if to_self else (address, self.ptr)), size)

        return copy

    class HostPointer(MemoryPointer):
        """A pointer whose copies are the host's; CuPy's compiled code calls these too."""

        def __add__(self, offset: int) -> Any:
            return HostPointer(self.mem, self.ptr - self.mem.ptr + offset)

        def memset(self, value: int, size: int, stream: Any = None) -> None:
            if size:
                operations["memset"] += 1
                ctypes.memset(self.ptr, value, size)

        memset_async = memset
        copy_from_device = copy_from_device_async = moved("memcpy", True)
        copy_from_host = copy_from_host_async = moved("set", True)
        copy_to_host = copy_to_host_async = moved("get", False)

    return HostPointer
