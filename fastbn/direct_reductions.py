"""Statistics by the backend's kernel for them (`Backend.statistic`), which reads arrays as they lie and writes results.

It tells of numbers that want more care: squares that leave float64's range, and infinities of 8-byte dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn import validation
from fastbn.arrays import kind_of
from fastbn.backend import backend_of
from fastbn.layout import Shape
from fastbn.merging import Moments
from fastbn.operands import Mask, Statistic
from fastbn.reduction_arguments import (
    EMPTY,
    NO_DEGREES,
    Call,
    Once,
    Options,
    check_out,
    kept_axes,
    operand,
    result_dtype,
    warn,
)
from fastbn.ways import Way

_UNREAD = np.zeros(3)  # the status of calls that cannot change it


def statistic(what: str, x: Any, where: Any, out: Any, options: Options, with_care: Callable[..., Call]) -> Call | None:
    """As `fastbn.prepare_reductions.statistic`; None where no kernel takes these arrays.

    ``with_care(x, where, out)`` prepares the call for numbers that the kernel does not finish.
    """
    if not isinstance(options.ddof, (int, float)):
        return None
    backend = backend_of(kind_of("x", x))
    kept, dtype = kept_axes(x, options.axis), np.dtype(result_dtype(x, options.dtype))
    shape = tuple(n if axis in kept else 1 for axis, n in enumerate(x.shape) if options.keepdims or axis in kept)
    check_out(shape, dtype, out)
    if out is not None and options.dtype is None:  # its digits are wanted
        dtype = out.dtype.newbyteorder("=") if validation.is_float(out.dtype) else np.dtype(np.float64)
    into_out = out is not None and _lies_well(out, dtype)
    strides = _steps(out if into_out else np.empty(shape, dtype), x.ndim, kept, options.keepdims)
    plain = validation.plainer(x)
    if isinstance(x, np.ndarray) and not (x.dtype.isnative and x.flags.aligned):
        plain = _native
    seen = x if plain is None else plain(x)
    mask, to_mask = None, None
    if where is not None:
        given = operand("where", where, x)
        if given.dtype != bool:
            return None
        mask, to_mask = _mask_of(backend.xp, given, seen)
    has_mean, has_spread = "mean" in what, what != "mean"
    spread_is = what if what in ("var", "std") else "var"
    wanted = Statistic(spread_is, options.skip_nan, None, dtype if has_mean else None, dtype if has_spread else None)
    run = backend.statistic(seen, mask, kept, wanted, strides)
    if run is None:
        return None
    if has_mean and has_spread and x.dtype.itemsize == 8:
        run = _one_by_one(backend, seen, mask, kept, wanted, strides)
    count, ddof = x.size // max(1, math.prod(x.shape[axis] for axis in kept)), float(options.ddof)
    sure = mask is None and not options.skip_nan and x.dtype.itemsize < 8 and (count > ddof or not has_spread)
    careful, empty, scalar = Once(with_care), np.empty, shape == ()

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        seen = x if plain is None else plain(x)
        mask = where
        if where is not None:
            mask = operand("where", where, x)
            mask = mask if to_mask is None else to_mask(mask)
        mean: Any
        spread: Any
        if into_out and backend.apart(out, seen, mask):
            mean, spread = (out, None) if has_mean else (None, out)
        else:
            mean, spread = empty(shape, dtype) if has_mean else None, empty(shape, dtype) if has_spread else None
        if sure:
            run(seen, mask, None, mean, spread, _UNREAD, ddof)
        else:
            status = np.zeros(3)
            run(seen, mask, None, mean, spread, status, ddof)
            if status.any():
                needs_care, no_degrees, is_empty = status.tolist()
                if needs_care:
                    return careful(x, where, out)(x, where, None, None, out)
                if is_empty and has_mean:
                    warn(EMPTY[options.skip_nan])
                if no_degrees and has_spread:
                    warn(NO_DEGREES)
        if out is not None:
            return _written(mean if has_mean else spread, out)
        if scalar:
            mean, spread = mean[()] if has_mean else None, spread[()] if has_spread else None
        if has_mean:
            return (mean, spread) if has_spread else mean
        return spread

    return backend.on_its_device(call, x)


def moments(x: Any, where: Any, kept: frozenset[int]) -> Call | None:
    """``found(x, where)`` by the backend's kernel for statistics, or None where that needs more care."""
    plain = validation.plainer(x)
    x = validation.plain(x)
    shape = tuple(n for axis, n in enumerate(x.shape) if axis in kept)
    strides = _steps(np.empty(shape), x.ndim, kept, False)
    backend = backend_of(kind_of("x", x))
    mask, to_mask = (None, None) if where is None else _mask_of(backend.xp, operand("where", where, x), x)
    float64 = np.dtype(np.float64)
    run = None
    if x.size > 0:
        wanted = Statistic("m2", False, float64, float64, float64)
        run = backend.statistic(x, mask, kept, wanted, strides)
    if run is None:
        return None
    if x.dtype.itemsize == 8:
        run = _one_by_one(backend, x, mask, kept, wanted, strides)

    def found(x: Any, where: Any) -> Moments | None:
        if plain is not None:
            x = plain(x)
        if where is not None:
            where = operand("where", where, x)
            where = where if to_mask is None else to_mask(where)
        count, mean, m2, status = np.empty(shape), np.empty(shape), np.empty(shape), np.zeros(3)
        run(x, where, count, mean, m2, status, 0.0)
        return None if status[0] else Moments(count, mean, m2)

    return found


def _one_by_one(backend: Any, x: Any, mask: Any, kept: frozenset[int], wanted: Statistic, strides: Shape) -> Call:
    """Mean and variance by a pass each: so the mean has the digits that a sum of float64 alone has, and the bits."""
    first = backend.statistic(x, mask, kept, wanted._replace(count=None, spread=None), strides)
    second = backend.statistic(x, mask, kept, wanted._replace(mean=None), strides)

    def run(x: Any, mask: Any, count: Any, mean: Any, spread: Any, status: Any, ddof: float) -> None:
        first(x, mask, None, mean, None, status, ddof)
        second(x, mask, count, None, spread, status, ddof)

    return run


# --- results ----------------------------------------------------------------------------------------------------------


def _steps(result: Any, ndim: int, kept: frozenset[int], keepdims: Any) -> Shape:
    """A result's strides in elements for each axis of what is reduced."""
    steps = iter(s // result.itemsize for s in result.strides)
    of_axes = ((axis in kept, next(steps) if keepdims or axis in kept else 0) for axis in range(ndim))
    return tuple(step if is_kept else 0 for is_kept, step in of_axes)


def _lies_well(out: Any, dtype: Any) -> bool:
    """Whether kernels can write it."""
    return (
        isinstance(out, np.ndarray)
        and out.dtype == dtype
        and out.dtype.isnative
        and out.flags.aligned
        and all(s % dtype.itemsize == 0 for s in out.strides)
        and not any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True))
    )


def _written(result: Any, out: Any) -> Any:
    if result is not out:
        with np.errstate(over="ignore"):  # float16 results beyond 65504 are infinite
            out[...] = result
    return out


# --- arrays that lie otherwise ----------------------------------------------------------------------------------------


def _native(x: Any) -> Any:
    """A copy whose elements are in the machine's byte order, and where it wants them."""
    return np.array(x, x.dtype.newbyteorder("="), order="K", subok=False)


def _mask_of(xp: Any, where: Any, x: Any) -> tuple[Mask, Way]:
    """A mask beside x, and what makes it one that kernels read: side by side, or the same, where x's numbers are."""
    strides = tuple(0 if n == 1 else s for n, s in zip(where.shape, where.strides, strict=True))
    lying = [axis for axis in range(x.ndim) if x.shape[axis] > 1 and x.strides[axis] != 0]
    innermost = min(lying, key=lambda axis: abs(x.strides[axis]), default=None)
    if innermost is None or strides[innermost] * (1 if x.strides[innermost] > 0 else -1) in (0, 1):
        return Mask(strides), None
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]) if axis in lying else -math.inf)
    signs = tuple(slice(None, None, -1 if s < 0 else None) for s in x.strides)
    back = tuple(int(axis) for axis in np.argsort(order))

    def beside(where: Any) -> Any:
        return xp.ascontiguousarray(where[signs].transpose(order)).transpose(back)[signs]

    copied = beside(where)
    return Mask(tuple(0 if n == 1 else s for n, s in zip(copied.shape, copied.strides, strict=True))), beside
