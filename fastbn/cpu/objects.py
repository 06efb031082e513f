"""Where CPython and NumPy keep what compiled code reads of their objects, in bytes from the object's address.

Both layouts are part of their binary interfaces; free-threaded CPython has another beginning of objects.
"""

from __future__ import annotations

import ctypes

import numpy as np


def _offset(obj: object, word: int) -> int:
    words = (ctypes.c_int64 * (type(obj).__basicsize__ // 8)).from_address(id(obj))
    return 8 * list(words).index(word)


_array = np.empty(1)
DATA_AT = _offset(_array, _array.ctypes.data)  # of an array, the address of its first element
FLOAT_AT = _offset(1.5, 0x3FF8000000000000)  # of a float, its value
