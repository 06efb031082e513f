"""Stand-ins for the package in tests written for NumPy arrays: they take and return these, and compute on CuPy arrays.

`OnCupy` lays CuPy arrays over the NumPy arrays' memory, for kernels executed on the CPU; `OnGpu` copies there and back.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

import fastbn


def without_gpu() -> str | None:
    """None, or why nothing runs on a GPU here."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    return None if cupy.cuda.is_available() else "CuPy finds no CUDA device"


class SameMemory:
    """CuPy arrays over host memory."""

    def to_device(self, array: np.ndarray) -> Any:
        from tests.simt import host_cupy

        return host_cupy.to_cupy(array)

    def to_host(self, array: Any) -> np.ndarray:
        from tests.simt import host_cupy

        return host_cupy.to_numpy(array)

    def written(self) -> None:
        """The device has written all it will."""


class Copied:
    """CuPy arrays on a device with the strides of NumPy's; views of one array are views of one copy."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[np.ndarray, Any, int, int]] = {}

    def to_device(self, array: np.ndarray) -> Any:
        import cupy

        if array.size == 0:
            return cupy.empty(array.shape, array.dtype)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if id(owner) not in self.copies:
            low, high = byte_bounds(owner)
            memory = cupy.cuda.alloc(high - low)
            memory.copy_from_host(ctypes.c_void_p(low), high - low)
            self.copies[id(owner)] = owner, memory, low, high
        _, memory, low, _ = self.copies[id(owner)]
        return cupy.ndarray(array.shape, array.dtype, memory + (array.ctypes.data - low), array.strides)

    def to_host(self, array: Any) -> np.ndarray:
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        first, end = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + array.itemsize
        buffer = np.empty(end - first, np.uint8)
        (array.data + first).copy_to_host(ctypes.c_void_p(buffer.ctypes.data), buffer.nbytes)
        return np.ndarray(array.shape, array.dtype, buffer, -first, array.strides)

    def written(self) -> None:
        """Bring everything back: outputs may lie in any of the arrays."""
        for owner, memory, low, high in self.copies.values():
            if owner.flags.writeable:
                memory.copy_to_host(ctypes.c_void_p(low), high - low)


class OnCupy:
    """The package, or one of its functions or classes."""

    way: type = SameMemory

    def __init__(self, what: Any = fastbn) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._what, name)
        return type(self)(value) if callable(value) else value

    def __eq__(self, other: object) -> bool:  # tests keep functions as keys
        return bool(self._what == getattr(other, "_what", other))

    def __hash__(self) -> int:
        return hash(self._what)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        call = _Call(self.way())
        result = self._what(*call.to_device(args), **call.to_device(keywords))
        call.way.written()
        return call.to_host(result)


class OnGpu(OnCupy):
    """The same on a GPU."""

    way = Copied


class _Call:
    """The arrays of one call, so that an `out` that comes back is the array that was given."""

    def __init__(self, way: Any) -> None:
        self.way = way
        self.known: dict[int, tuple[np.ndarray, Any]] = {}

    def to_device(self, value: Any) -> Any:
        if type(value) in (np.ndarray, np.memmap):  # others are refused as they are
            array = self.way.to_device(value)
            self.known[id(array)] = value, array  # the array itself too: numbers of dead objects are given again
            return array
        if isinstance(value, dict):
            return {name: self.to_device(item) for name, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.to_device(item) for item in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.to_device(item) for item in value)
        if callable(value) and not isinstance(value, (type, np.dtype)):  # a gather hook
            return lambda vector: self.to_device(value(_Call(self.way).to_host(vector)))
        return value

    def to_host(self, value: Any) -> Any:
        import cupy

        if isinstance(value, cupy.ndarray):
            return self.known[id(value)][0] if id(value) in self.known else self.way.to_host(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.to_host(item) for item in value))
        if isinstance(value, tuple):
            return tuple(self.to_host(item) for item in value)
        return value
