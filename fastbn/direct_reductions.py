"""Statistics by the backend's kernel for them (`Backend.statistic`), which reads arrays as they lie and writes results.

It tells of numbers that want more care: squares that leave float64's range, and infinities of 8-byte dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastbn import validation
from fastbn.arrays import is_foreign, kind_of
from fastbn.backend import backend_of
from fastbn.call import Call, Once
from fastbn.layout import Shape
from fastbn.merging import Moments
from fastbn.operands import CAREFUL, STATUS, Mask, Statistic
from fastbn.reduction_validation import (
    EMPTY,
    NO_DEGREES,
    ReductionOptions,
    broadcastable,
    check_out,
    kept_axes,
    reduced_shape,
    result_dtype,
    warn,
)

_CLEAR = np.zeros(STATUS).tobytes()  # the status of usual results
_UNREAD = np.zeros(STATUS)  # the status of calls that cannot change it


def statistic(
    what: str, x: Any, where: Any, weights: Any, out: Any, options: ReductionOptions, with_care: Callable[..., Call]
) -> Call | None:  # fmt: skip
    """As `fastbn.prepare_reductions.statistic`; None where no kernel takes these arrays.

    ``with_care(x, where, weights, out)`` prepares the call for numbers that the kernel does not finish.
    """
    if not isinstance(options.ddof, (int, float)) or options.ddof != options.ddof or x.size == 0:
        return None
    backend, result = backend_of(kind_of("x", x)), _result_of(x, options, out)
    plain = validation.plainer(x)
    if isinstance(x, np.ndarray) and not (x.dtype.isnative and x.flags.aligned):
        plain = _native
    seen = x if plain is None else plain(x)
    if where is not None and broadcastable("where", where, x).dtype != bool:
        return None
    has_mean, has_spread, dtype = "mean" in what, what != "mean", result.dtype
    spread_is = what if what in ("var", "std") else "var"
    wanted = Statistic(spread_is, options.skip_nan, None, dtype if has_mean else None, dtype if has_spread else None)
    run, select = _kernel(backend, where, weights, x, seen, result.kept, wanted, result.strides)
    if run is None:
        return None
    count, ddof = x.size // max(1, math.prod(x.shape[axis] for axis in result.kept)), float(options.ddof)
    sure = select is None and not options.skip_nan and x.dtype.itemsize < 8 and (count > ddof or not has_spread)
    careful, shape, into_out, empty = Once(with_care), result.shape, result.into_out, backend.xp.empty
    # Where `out` shares memory with what is read: a kernel writes by the strides that it was prepared for.
    into_new = Once(partial(_kernel, backend, kept=result.kept, wanted=wanted, strides=result.strides_of_new))
    tell, deliver = _teller(wanted), _deliverer(wanted, shape == () and isinstance(x, np.ndarray))

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        seen = x if plain is None else plain(x)
        mask = None if select is None else select(x, where, weights)
        mean: Any
        spread: Any
        launch: Any = run
        if into_out and backend.disjoint(out, seen, mask):
            mean, spread = (out, None) if has_mean else (None, out)
        else:
            mean, spread = empty(shape, dtype) if has_mean else None, empty(shape, dtype) if has_spread else None
            if into_out:
                launch, as_new = into_new(where, weights, x, seen)
                if launch is None:  # an `out` may have fewer dimensions to walk than a new array
                    return careful(x, where, weights, out)(x, where, weights, None, out)
                mask = None if as_new is None else as_new(x, where, weights)
        if sure:
            launch(seen, mask, None, mean, spread, _UNREAD, ddof)
        else:
            status = np.zeros(STATUS)
            launch(seen, mask, None, mean, spread, status, ddof)
            if status.tobytes() != _CLEAR and tell(status):  # a tenth of the time of any()
                return careful(x, where, weights, out)(x, where, weights, None, out)
        return deliver(mean, spread, out)

    return backend.on_its_device(call, x)


def moments(x: Any, where: Any, weights: Any, kept: frozenset[int]) -> Call | None:
    """``found(x, where, weights)`` by the backend's kernel for statistics, or None where that needs more care."""
    float64 = np.dtype(np.float64)
    run = _prepared(x, where, weights, kept, False, Statistic("m2", False, float64, float64, float64))
    if run is None:
        return None

    def found(x: Any, where: Any, weights: Any) -> Moments | None:
        (count, mean, m2), needs_care = run(x, where, weights)
        return None if needs_care else Moments(count, mean, m2)

    return found


def average(x: Any, weights: Any, dtype: Any, axis: Any, keepdims: Any) -> Call | None:
    """``found(x, weights)`` gives averages and sums of weights, or None where that needs more care."""
    float64 = np.dtype(np.float64)
    if not validation.is_float(dtype) or not isinstance(x, np.ndarray) or not x.dtype.isnative:
        return None
    wanted = Statistic("m2", False, float64, np.dtype(dtype), None)
    run = _prepared(x, None, weights, kept_axes(x, axis), keepdims, wanted, sensible=False)
    if run is None:
        return None

    def found(x: Any, weights: Any) -> tuple[Any, Any] | None:
        (count, mean, _), needs_care = run(x, None, weights)
        return None if needs_care else (mean[()], count[()])

    return found


def _prepared(
    x: Any, where: Any, weights: Any, kept: frozenset[int], keepdims: Any, wanted: Statistic, sensible: bool = True
) -> Call | None:
    """``run(x, where, weights)`` gives new arrays of count, mean and spread, and whether these need more care."""
    plain = validation.plainer(x)
    seen = validation.plain(x)
    backend = backend_of(kind_of("x", x))
    shape = reduced_shape(x, kept, keepdims)
    strides = _steps(np.empty(shape), x.ndim, kept, keepdims)
    if x.size == 0:
        return None
    launch, select = _kernel(backend, where, weights, x, seen, kept, wanted, strides, sensible)
    if launch is None:
        return None
    empty = backend.xp.empty

    def run(x: Any, where: Any, weights: Any) -> tuple[tuple[Any, ...], bool]:
        seen = x if plain is None else plain(x)
        results = tuple(None if t is None else empty(shape, t) for t in (wanted.count, wanted.mean, wanted.spread))
        status = np.zeros(STATUS)
        launch(seen, None if select is None else select(x, where, weights), *results, status, 0.0)
        return results, bool(status[CAREFUL])

    return run


# --- results ----------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    """Of a reduction."""

    kept: frozenset[int]
    shape: Shape
    dtype: np.dtype[Any]
    strides: Shape
    """In elements, for each axis of what is reduced."""
    strides_of_new: Shape
    """The same of a new array."""
    into_out: bool
    """Kernels can write ``out`` itself, if it shares no memory with what they read."""


def _result_of(x: Any, options: ReductionOptions, out: Any) -> _Result:
    kept, dtype = kept_axes(x, options.axis), np.dtype(result_dtype(x, options.dtype))
    shape = reduced_shape(x, kept, options.keepdims)
    check_out(shape, dtype, out)
    if out is not None and options.dtype is None:  # its digits are wanted
        dtype = out.dtype.newbyteorder("=") if validation.is_float(out.dtype) else np.dtype(np.float64)
    into_out = out is not None and _lies_well(out, dtype)
    of_new = _steps(np.empty(shape, dtype), x.ndim, kept, options.keepdims)
    strides = _steps(out, x.ndim, kept, options.keepdims) if into_out else of_new
    return _Result(kept, shape, dtype, strides, of_new, into_out)


def _teller(wanted: Statistic) -> Callable[[Any], bool]:
    """``tell(status)`` warns of what a kernel has met. True of numbers that want more care: then it says nothing."""

    def tell(status: Any) -> bool:
        needs_care, no_degrees, is_empty = status.tolist()
        if not needs_care:
            if is_empty and wanted.mean is not None:
                warn(EMPTY[wanted.skip_nan])
            if no_degrees and wanted.spread is not None:
                warn(NO_DEGREES)
        return bool(needs_care)

    return tell


def _deliverer(wanted: Statistic, scalar: bool) -> Call:
    """``deliver(mean, spread, out)`` gives what was asked for: into ``out``, of either; else arrays, or scalars."""
    has_mean, has_spread = wanted.mean is not None, wanted.spread is not None

    def deliver(mean: Any, spread: Any, out: Any) -> Any:
        if out is not None:
            return _written(mean if has_mean else spread, out)
        if scalar:
            mean, spread = mean[()] if has_mean else None, spread[()] if has_spread else None
        if has_mean:
            return (mean, spread) if has_spread else mean
        return spread

    return deliver


def _steps(result: Any, ndim: int, kept: frozenset[int], keepdims: Any) -> Shape:
    """A result's strides in elements for each axis of what is reduced."""
    steps = iter(s // result.itemsize for s in result.strides)
    of_axes = ((axis in kept, next(steps) if keepdims or axis in kept else 0) for axis in range(ndim))
    return tuple(step if is_kept else 0 for is_kept, step in of_axes)


def _lies_well(out: Any, dtype: Any) -> bool:
    """Whether kernels can write it."""
    return (
        out.dtype == dtype
        and out.dtype.isnative
        and (is_foreign(out) or out.flags.aligned)
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


def _kernel(
    backend: Any, where: Any, weights: Any, x: Any, seen: Any, kept: frozenset[int], wanted: Statistic, strides: Shape,
    sensible: bool = True,
) -> tuple[Call | None, Call | None]:  # fmt: skip
    """The backend's kernel, and ``select(x, where, weights)``, which says what counts and what it weighs.

    x is seen in the machine's byte order. Weights are sensible if they are to be finite and >= 0.
    """
    if where is None and weights is None:
        return backend.statistic(seen, None, kept, wanted, strides), None
    xp = backend.xp

    def selected(x: Any, where: Any, weights: Any) -> Any:
        if weights is None:
            return broadcastable("where", where, x)
        if where is not None:
            return validation.combined_weight(
                xp, broadcastable("where", where, x), broadcastable("weights", weights, x), x.shape
            )
        weights = broadcastable("weights", weights, x)
        if sensible:
            validation.sensible_weights(xp, weights)
        known = weights.dtype.kind in "biu" or validation.is_float(weights.dtype)
        if known and weights.dtype.isnative and getattr(weights.flags, "aligned", True):
            return weights
        return weights.astype(xp.float64)

    given = selected(x, where, weights)
    mask = Mask(tuple(0 if n == 1 else s for n, s in zip(given.shape, given.strides, strict=True)), given.dtype)
    run = backend.statistic(seen, mask, kept, wanted, strides)
    if run is not None or x.ndim == 0:  # whose mask cannot lie otherwise
        return run, selected
    mask, beside = _beside(xp, given, seen)
    return backend.statistic(seen, mask, kept, wanted, strides), lambda *arrays: beside(selected(*arrays))


def _beside(xp: Any, where: Any, x: Any) -> tuple[Mask, Call]:
    """How a mask lies that goes in memory as x does, and what makes one of such a mask."""
    lying = [axis for axis in range(x.ndim) if x.shape[axis] > 1 and x.strides[axis] != 0]
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]) if axis in lying else -math.inf)
    signs = tuple(slice(None, None, -1 if s < 0 else None) for s in x.strides)
    back = tuple(int(axis) for axis in np.argsort(order))

    def beside(where: Any) -> Any:
        return xp.ascontiguousarray(where[signs].transpose(order)).transpose(back)[signs]

    copied = beside(where)
    strides = tuple(0 if n == 1 else s for n, s in zip(copied.shape, copied.strides, strict=True))
    return Mask(strides, copied.dtype), beside
