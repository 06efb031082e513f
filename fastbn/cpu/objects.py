"""Where CPython and NumPy keep what compiled code reads of their objects, in bytes from the object's address.

Both layouts are part of their binary interfaces; free-threaded CPython has another beginning of objects. All of it is
looked for when this is imported, in objects whose values are known; what is not where it should be is an error.
"""

from __future__ import annotations

import ctypes
import struct
from itertools import chain
from typing import Any

import numpy as np


def _offset(obj: object, word: int) -> int:
    words = (ctypes.c_int64 * (type(obj).__basicsize__ // 8)).from_address(id(obj))
    return 8 * list(words).index(word)


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


_array = np.empty((3, 5), ">f4")[:, 1::2]
DATA_AT = _offset(_array, _array.ctypes.data)  # of an array, the address of its first element
DTYPE_AT = _offset(_array, id(_array.dtype))
DIMENSIONS_AT, FLAGS_AT = DATA_AT + 8, DTYPE_AT + 8  # an int each
SHAPE_AT, STRIDES_AT = DATA_AT + 16, DATA_AT + 24  # addresses of as many words
TYPE_AT = _offset(_array, id(np.ndarray))  # of any object
SCALAR_AT = _offset(_array.dtype, id(np.float32))  # of a dtype, the type of its elements
NUMBER_AT = SCALAR_AT + 8  # its kind, character, byte order and flags, a byte each; its number
FLOAT_AT = _offset(1.5, 0x3FF8000000000000)  # of a float, its value
ALIGNED, WRITABLE = 0x100, 0x400  # of NumPy's flags


def words_of(a: Any) -> bytes:
    """What a signature has of an array, or of None: as `kernels.signatures` has it, while that is not compiled."""
    if a is None:
        return bytes(8)
    dtype, flags = a.dtype, a.ndim << 32 | a.flags.num & (ALIGNED | WRITABLE)
    number = _word(id(dtype) + NUMBER_AT)
    return struct.pack(
        f"{3 + 2 * a.ndim}q", id(dtype.type), number, flags, *chain.from_iterable(zip(a.shape, a.strides, strict=True))
    )


def check() -> None:
    """That what was not looked for is where it is taken to be."""
    place, dtype = id(_array), id(_array.dtype) + NUMBER_AT
    found = (
        _word(place + DIMENSIONS_AT) & 0xFFFFFFFF,
        ctypes.c_int.from_address(place + FLAGS_AT).value,
        [_word(_word(place + SHAPE_AT) + 8 * axis) for axis in range(2)],
        [_word(_word(place + STRIDES_AT) + 8 * axis) for axis in range(2)],
        ctypes.string_at(dtype, 3).decode(),
        ctypes.c_int.from_address(dtype + 4).value,
    )
    wanted = 2, _array.flags.num, [3, 2], [20, 8], "ff>", _array.dtype.num
    if found != wanted:
        raise ImportError(f"NumPy's objects are not as expected: {found}, not {wanted}")


check()
