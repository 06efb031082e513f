"""Checks of what users pass. Each names the argument, what was expected and what came; nothing was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from operator import index
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from fastbn.arrays import kind_of, one_kind
from fastbn.layout import Layout, Shape, layout_of

FLOATS = ("float16", "bfloat16", "float32", "float64")
_known: dict[Any, bool] = {}


def is_float(dtype: Any) -> bool:
    """Whether kernels compute on this dtype. ``dtype.name`` takes a microsecond, hence the table."""
    known = _known.get(dtype)
    if known is None:
        known = _known[dtype] = dtype.name in FLOATS
    return known


def float_dtype(name: str, dtype: Any) -> Any:
    """A dtype on which kernels compute, from what NumPy makes one of."""
    try:
        found = None if dtype is None else np.dtype(dtype)  # which makes float64 of None
    except TypeError:
        found = None
    if found is None or not is_float(found):
        raise TypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {dtype!r}")
    return found


def data(name: str, array: Any) -> Any:
    """An array of data: one of the float dtypes. A memmap is seen as the plain array it is."""
    if not is_float(array.dtype):
        instead = {"i": "; convert it with .astype(numpy.float32)", "u": "; convert it with .astype(numpy.float32)"}
        instead["c"] = "; normalise its real and imaginary parts"
        raise TypeError(
            f"{name}: expected one of {', '.join(FLOATS)}, got dtype {array.dtype}{instead.get(array.dtype.kind, '')}"
        )
    return plain(array)


def plain(array: Any) -> Any:
    """A memmap as the plain array it is."""
    return array.view(np.ndarray) if type(array) is np.memmap else array


def plainer(array: Any) -> Callable[[Any], Any] | None:
    """What makes arrays of this kind plain, if that takes something."""
    return plain if type(array) is np.memmap else None


def like(name: str, array: Any, x: Any, of: str = "x") -> Any:
    """An input of the shape and dtype of another."""
    if array is None:
        return None
    if array.shape != x.shape or array.dtype != x.dtype:
        raise ValueError(
            f"{name}: expected {of}'s shape {x.shape} and dtype {x.dtype}, "
            f"got shape {array.shape} and dtype {array.dtype}"
        )
    return plain(array)


def output(name: str, array: Any, x: Any, of: str = "x") -> Any:
    """An array to write, of the shape and dtype of another."""
    like(name, array, x, of)
    if array is not None and isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if array is not None and any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True)):
        raise ValueError(f"{name}: expected a place for each element, got strides {array.strides}")
    return array


def channel_axes(ndim: int, channel_axis: Any, name: str = "channel_axis") -> frozenset[int]:
    """The kept axes, not negative."""
    if isinstance(channel_axis, int):
        return frozenset((normalize_axis_index(channel_axis, ndim, name),))
    try:
        return frozenset(normalize_axis_tuple(channel_axis, ndim, name))
    except TypeError:
        raise TypeError(f"{name}: expected an int or a tuple of ints, got {channel_axis!r}") from None


def static_axes(channel_axis: Any) -> int | tuple[int, ...]:
    """Checked channel axes as plain, hashable numbers."""
    try:
        return index(channel_axis)
    except TypeError:
        return tuple(map(index, channel_axis))


def sizes(name: str, numbers: Any, channel_axis: Any) -> Shape:
    """The shape of channels: a size for each of the channel axes."""
    try:
        shape = tuple(map(index, numbers if isinstance(numbers, (tuple, list)) else (numbers,)))
    except TypeError:
        raise TypeError(f"{name}: expected an int or a tuple of ints, got {numbers!r}") from None
    try:
        axes = static_axes(channel_axis)
    except TypeError:
        raise TypeError(f"channel_axis: expected an int or a tuple of ints, got {channel_axis!r}") from None
    count = 1 if isinstance(axes, int) else len(axes)
    if not isinstance(axes, int) and len(set(axes)) < count:
        raise ValueError(f"channel_axis: expected different axes, got {channel_axis!r}")
    if len(shape) != count or min(shape, default=1) < 1:
        raise ValueError(f"{name}: expected sizes >= 1, one for each of {count} channel axes, got {numbers!r}")
    return shape


def layout_for(x: Any, channel_axis: Any, name: str = "channel_axis") -> Layout:
    """The layout of x with these kept axes."""
    return layout_of(x.shape, x.strides, channel_axes(x.ndim, channel_axis, name))


def real(name: str, number: Any) -> float:
    """A real number, Python's or NumPy's."""
    if type(number) is not int and not isinstance(number, Real):  # to ask takes as long as all else
        raise TypeError(f"{name}: expected a real number, got {type(number).__name__}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}: expected a number in the range of float64, got a larger one") from None


def parameter(name: str, array: Any, layout: Layout) -> Any:
    """A per-channel parameter: any float dtype, of a shape that broadcasts to the kept axes'."""
    if not (is_float(array.dtype) or array.dtype.kind == "f"):
        raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    if array.shape != layout.kept_shape and not _broadcasts(array.shape, layout.kept_shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {layout.kept_shape}, got {array.shape}")
    return array


def running(name: str, array: Any, layout: Layout) -> Any:
    """A running statistic that is updated in place: any float dtype, of the kept axes' shape."""
    if array.shape == layout.kept_shape:
        parameter(name, array, layout)
    else:
        raise ValueError(f"{name}: expected the shape of the channel axes, {layout.kept_shape}, got {array.shape}")
    return output(name, array, array)


def pair(name: str, arrays: Any) -> dict[str, Any]:
    """Two arrays by their names; none of None."""
    if arrays is None:
        return {}
    if not isinstance(arrays, tuple) or len(arrays) != 2:
        got = f"{len(arrays)} of them" if isinstance(arrays, tuple) else type(arrays).__name__
        raise TypeError(f"{name}: expected a pair of arrays, got {got}")
    named = {f"{name}[{i}]": array for i, array in enumerate(arrays)}
    for each, array in named.items():
        kind_of(each, array)  # None, too, is none
    return named


def rate_and_correction(rate: Any, correction: Any) -> tuple[float, float]:
    """The weight of a new batch in running statistics, and what is taken from its count. Usual ones take 0.1 us."""
    if type(rate) is not float or not 0.0 <= rate <= 1.0:
        found = real("rate", rate)
        if not 0.0 <= found <= 1.0:
            raise ValueError(f"rate: expected a number in [0, 1], got {rate}")
        rate = found
    if type(correction) is not float:
        correction = real("correction", correction)
    return rate, correction


def combined_weight(xp: Any, where: Any, weights: Any, shape: Shape) -> Any:
    """Where * weights with the dimensions of x: None, bool, float64, or float32 as such weights are."""
    if where is not None:
        if where.dtype != bool:
            raise TypeError(f"where: expected dtype bool, got {where.dtype}")
        where = _spread("where", where, shape)
    if weights is not None:
        dtype = xp.float32 if weights.dtype == xp.float32 else xp.float64
        weights = _spread("weights", sensible_weights(xp, weights), shape).astype(dtype, copy=False)
    if where is None or weights is None:
        return where if weights is None else weights
    return xp.where(where, weights, weights.dtype.type(0.0))


def sensible_weights(xp: Any, weights: Any) -> Any:
    """Real, finite and >= 0; of a device nothing is asked, which would be to wait for it."""
    if weights.dtype.kind not in "fiub" and not is_float(weights.dtype):
        raise TypeError(f"weights: expected a real dtype, got {weights.dtype}")
    if xp is np and weights.size > 0 and not (weights.min() >= 0 and np.isfinite(weights.max())):  # NaN is neither
        raise ValueError("weights: expected finite values >= 0, got others among them")
    return weights


def _spread(name: str, array: Any, shape: Shape) -> Any:
    """The array with the dimensions of x, to which it broadcasts."""
    if not _broadcasts(array.shape, shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {array.shape}")
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def _broadcasts(shape: Shape, to: Shape) -> bool:
    """Whether an array of one shape can be read as one of another."""
    if len(shape) > len(to):
        return False
    return all(size in (1, want) for size, want in zip(reversed(shape), reversed(to), strict=False))


def epsilon(eps: Any) -> float:
    """A finite number >= 0."""
    number = real("eps", eps)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return number


def hook(gather: Any) -> Any:
    """None or something to call."""
    if gather is not None and not callable(gather):
        raise TypeError(f"gather: expected a callable, got {type(gather).__name__}")
    return gather


def is_relu(activation: Any) -> bool:
    """None or "relu"."""
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return activation is not None


def gathered(xp: Any, rows: Any, width: int) -> Any:
    """What a gather hook returned: (ranks, width) numbers of x's kind."""
    one_kind({"gather's argument": xp.empty(0), "gather's result": rows})
    if rows.dtype.kind not in "fiu":
        raise TypeError(f"gather: expected a result of real numbers, got dtype {rows.dtype}")
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != width:
        raise ValueError(f"gather: expected a result of shape (ranks, {width}), got {rows.shape}")
    return rows.astype(xp.float64, copy=False)
