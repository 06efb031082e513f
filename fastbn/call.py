"""From a call's signature to the prepared call that runs it.

A signature is all that decides how a call goes, but for the numbers in its arrays: kinds, shapes, strides, dtypes,
alignment, options. The first call of a signature is prepared (`fastbn.prepare_forward` and the like): arguments are
checked, layouts and kernels chosen. What comes of that is kept and runs this call and all later ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Real
from operator import index
from typing import Any, Generic, TypeVar

import numpy as np

Call = Callable[..., Any]
T = TypeVar("T")

MOST_CALLS = 4096  # prepared calls that are kept, for programs whose shapes never repeat
_prepared: dict[Any, Call] = {}


class Unlike:
    """In a signature, what is like nothing else: it cannot be hashed, so such a call is checked and never kept."""

    __hash__ = None  # type: ignore[assignment]  # None is how a class says so


def describe(*arrays: Any) -> Any:
    """What a signature has of arrays, or of None. All else becomes `Unlike`, so the call is prepared, which raises."""
    if arrays and type(arrays[0]) is _cupy_ndarray:
        return _of_cupys(arrays)
    return _compiled(*arrays) or in_python(arrays)


def in_python(arrays: tuple[Any, ...]) -> Any:
    """Of NumPy arrays and Nones the bytes that `_compiled` makes of them, unless these are too many for it."""
    if any(type(a) is np.ndarray for a in arrays) and all(a is None or type(a) is np.ndarray for a in arrays):
        from fastbn.cpu.objects import words_of

        return b"".join(map(words_of, arrays))
    return tuple(map(_of, arrays))


def _first(*arrays: Any) -> bytes | None:
    """For NumPy arrays there is a compiled function, twenty times as fast as asking for their attributes."""
    global _compiled
    if not any(type(a) is np.ndarray for a in arrays):
        return None
    from fastbn.cpu.program import describe

    compiled = describe()
    if compiled is None:
        return None
    _compiled = compiled
    return compiled(*arrays)


_compiled: Callable[..., bytes | None] = _first


def _of(a: Any) -> Any:
    global _cupy_ndarray
    if a is None:
        return None
    if type(a) in (np.ndarray, np.memmap):
        return type(a), a.shape, a.strides, a.dtype, a.flags.aligned, a.flags.writeable
    cupy = sys.modules.get("cupy")
    if cupy is not None and type(a) is cupy.ndarray:
        _cupy_ndarray = cupy.ndarray
        return _of_cupys((a,))[0]
    return Unlike()


_cupy_ndarray: Any = Unlike  # which no array is; CuPy's once there was one


def _of_cupys(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """In a loop, in half the time of a function for each."""
    described: list[Any] = []
    for a in arrays:
        if type(a) is _cupy_ndarray:
            memory = a.data
            described.append((_cupy_ndarray, a.shape, a.strides, a.dtype, memory.device_id, memory.ptr & 15))
        else:
            described.append(None if a is None else _of(a))
    return tuple(described)


def axes_of(channel_axis: Any) -> Any:
    """Axes in hashable form; a float, which would hash like an int, becomes `Unlike`."""
    if type(channel_axis) is int:
        return channel_axis
    try:
        if isinstance(channel_axis, (tuple, list)):
            return tuple(int(index(axis)) for axis in channel_axis)
        return int(index(channel_axis))
    except TypeError:
        return Unlike()


def number_of(number: Any) -> Any:
    """A real number in hashable form; a NaN, which is not equal to itself, becomes `Unlike`."""
    if type(number) is not float:
        if not isinstance(number, Real):
            return Unlike()
        try:
            number = float(number)
        except OverflowError:
            return Unlike()
    return number if number == number else Unlike()


def find(signature: Any) -> Call | None:
    """The call that was prepared, if any."""
    try:
        return _prepared.get(signature)
    except TypeError:  # what cannot be hashed
        return None


def keep(signature: Any, call: Call) -> Call:
    """For later calls, if they can find it."""
    try:
        hash(signature)
    except TypeError:
        return call
    if len(_prepared) >= MOST_CALLS:
        _prepared.clear()
    _prepared[signature] = call
    return call


class Once(Generic[T]):
    """What is prepared when it is wanted first."""

    def __init__(self, prepare: Callable[..., T]) -> None:
        self._prepare = prepare
        self._made: T | None = None

    def __call__(self, *arguments: Any) -> T:
        if self._made is None:
            self._made = self._prepare(*arguments)
        return self._made


def forget() -> None:
    """Drop what was prepared, for those who change how work is divided."""
    _prepared.clear()
