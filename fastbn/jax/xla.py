"""Calls from XLA into Python by its foreign function interface: arrays of XLA's own buffers, no copy, no compiler.

XLA hands a C function a call frame, which this reads with ctypes: the structures are those of version 0 of the
interface (``xla/ffi/api/c_api.h``, which every jaxlib brings along). Fields after those used may be added by later
minor versions; a structure says its size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from typing import Any

import jax
import ml_dtypes
import numpy as np

Function = Callable[[dict[str, Any], Sequence[np.ndarray[Any, Any]], Sequence[np.ndarray[Any, Any]]], None]
"""Of attributes, inputs, and outputs to write."""

_DTYPES = {
    1: np.dtype(np.bool_), 8: np.dtype(np.uint32), 10: np.dtype(np.float16), 11: np.dtype(np.float32),
    12: np.dtype(np.float64), 16: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_SCALARS: dict[int, Any] = {1: c_uint8, 4: c_int32, 5: c_int64, 11: c_float, 12: c_double}
_METADATA, _SCALAR, _EXECUTE, _INTERNAL = 1, 3, 3, 13


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class _Version(Structure):
    _fields_ = (("struct_size", c_size_t), ("extensions", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extensions", c_void_p), ("dtype", c_int), ("data", c_void_p), ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )  # fmt: skip


class _Buffers(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extensions", c_void_p), ("size", c_int64), ("types", c_void_p),
        ("values", POINTER(POINTER(_Buffer))),
    )  # fmt: skip


class _Name(Structure):
    _fields_ = (("text", c_void_p), ("length", c_size_t))


class _Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", c_void_p))


class _Attributes(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extensions", c_void_p), ("size", c_int64), ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(_Name))), ("values", POINTER(POINTER(_Scalar))),
    )  # fmt: skip


class _Error(Structure):
    _fields_ = (("struct_size", c_size_t), ("extensions", c_void_p), ("message", c_char_p), ("code", c_int))


class _Api(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extensions", c_void_p), ("version", _Version), ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))),
    )  # fmt: skip


class _Frame(Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("extensions", POINTER(_MetadataExtension)), ("api", POINTER(_Api)),
        ("context", c_void_p), ("stage", c_int), ("inputs", _Buffers), ("outputs", _Buffers),
        ("attributes", _Attributes),
    )  # fmt: skip


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
_kept: list[Any] = []  # handlers, as long as XLA may call them


def register(name: str, function: Function) -> None:
    """Let XLA call a function on the CPU by this name; what it raises becomes XLA's error."""

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extensions and frame.extensions.contents.base.type == _METADATA:
            frame.extensions.contents.metadata.contents.version.major = 0  # the version these structures are of
            frame.extensions.contents.metadata.contents.version.minor = 1
            return None
        if frame.stage != _EXECUTE:
            return None
        try:
            function(_attributes(frame.attributes), _arrays(frame.inputs), _arrays(frame.outputs))
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()
            described = _Error(ctypes.sizeof(_Error), None, message, _INTERNAL)
            pointer_to_error: int = frame.api.contents.create_error(ctypes.byref(described))
            return pointer_to_error
        return None

    _kept.append(_Handler(handle))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(_kept[-1]), platform="cpu")


def _arrays(buffers: _Buffers) -> list[np.ndarray[Any, Any]]:
    """NumPy's view of each buffer, in rows."""
    found = []
    for i in range(buffers.size):
        buffer = buffers.values[i].contents
        dtype, shape = _DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = (c_uint8 * nbytes).from_address(buffer.data) if nbytes else bytearray()
        found.append(np.frombuffer(memory, dtype).reshape(shape))
    return found


def _attributes(attributes: _Attributes) -> dict[str, Any]:
    """Scalars by name."""
    found = {}
    for i in range(attributes.size):
        name, scalar = attributes.names[i].contents, attributes.values[i].contents
        assert attributes.types[i] == _SCALAR
        value = _SCALARS[scalar.dtype].from_address(scalar.value).value
        found[ctypes.string_at(name.text, name.length).decode()] = value
    return found
