"""What statistics are asked for, and the checks of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from fastbn import validation
from fastbn.arrays import is_foreign, kind_of, one_kind
from fastbn.layout import Shape


class ReductionOptions(NamedTuple):
    """What decides a statistic beside its arrays."""

    axis: Any
    dtype: Any
    keepdims: Any
    ddof: Any = 0
    skip_nan: bool = False


def kept_axes(x: Any, axis: Any) -> frozenset[int]:
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    return frozenset(range(x.ndim)).difference(axes)


def reduced_shape(x: Any, kept: frozenset[int], keepdims: Any) -> Shape:
    """Of a result."""
    return tuple(n if axis in kept else 1 for axis, n in enumerate(x.shape) if keepdims or axis in kept)


def is_float64(dtype: Any) -> bool:
    """Whether a result is asked for in float64: then sums are, too; of float32 those of chunks are good to 1e-7."""
    return dtype is not None and np.dtype(dtype).itemsize >= 8


def result_dtype(x: Any, dtype: Any) -> Any:
    """Of a result."""
    if dtype is not None:
        return np.dtype(dtype).newbyteorder("=")
    return x.dtype.newbyteorder("=") if validation.is_float(x.dtype) else np.float64


def check_out(shape: Shape, wanted: Any, out: Any) -> None:
    """What `out` must be, before anything is computed."""
    if not validation.is_float(wanted):  # of NumPy's arrays, these were left to it
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {wanted}")
    if out is None:
        return
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not np.can_cast(wanted, out.dtype, "same_kind"):
        raise TypeError(f"out: expected a dtype that {wanted} can be cast to, got {out.dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")


def check_keepdims(keepdims: Any) -> None:
    if not isinstance(keepdims, (bool, np.bool, int, np.integer)):
        raise TypeError(f"keepdims: expected a bool, got {keepdims!r}")


def check_nan_form(x: Any, where: Any, dtype: Any, out: Any) -> None:
    """What NumPy says in other words, of arguments that are not named."""
    if where is not None and broadcastable("where", where, x).dtype != bool:
        raise TypeError(f"where: expected dtype bool, got {broadcastable('where', where, x).dtype}")
    if x.dtype.kind not in "biu":
        for name, other in (("dtype", dtype), ("out", getattr(out, "dtype", None))):
            if other is not None and np.dtype(other).kind in "biuO":
                raise TypeError(f"{name}: expected a float dtype for an array of floats, got {np.dtype(other)}")


def broadcastable(name: str, value: Any, x: Any) -> Any:
    return None if value is None else beside(name, value, x, ())


def beside(name: str, value: Any, x: Any, single: tuple[int, ...]) -> Any:
    """An argument beside x, with x's dimensions: broadcasts to x, with size 1 on the axes ``single``."""
    if isinstance(value, np.ndarray) or is_foreign(value):
        one_kind({"x": x, name: value})
    else:
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            raise TypeError(f"{name}: expected real numbers, got dtype {value.dtype}")
        value = sys.modules[kind_of("x", x)].asarray(value)
    expected = tuple(1 if axis in single else n for axis, n in enumerate(x.shape))
    padded = value[(np.newaxis,) * (x.ndim - value.ndim)] if value.ndim < x.ndim else value
    fits = padded.ndim == x.ndim and all(n in (1, want) for n, want in zip(padded.shape, expected, strict=True))
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {expected}, got {value.shape}")
    return padded


# --- warnings, in NumPy's words ---------------------------------------------------------------------------------------


EMPTY = {False: "Mean of empty slice.", True: "Mean of empty slice"}  # as NumPy says it

NO_DEGREES = "Degrees of freedom <= 0 for slice."


def warn_if(condition: Callable[[], Any], count: Any, message: str) -> None:
    """NumPy's warnings, which CuPy does not have: to ask a device would be to wait for it."""
    if isinstance(count, (np.ndarray, np.generic)) and condition().any():
        warn(message)


def warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """Of the first function outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastbn."):
        frame, level = frame.f_back, level + 1
    return level
