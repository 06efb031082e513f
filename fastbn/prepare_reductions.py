"""Prepared calls of statistics: what `fastbn.call` keeps for them (see `fastbn.prepare_forward`).

There are three ways: NumPy's own functions, for dtypes that only NumPy has; the backend's kernel for statistics
(`direct_reductions`); and batch norm's moments (`reductions_by_moments`), where that is not the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from fastbn import direct_reductions, reductions_by_moments, validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import Backend, backend_of
from fastbn.call import Call, Once
from fastbn.cuts import is_cut
from fastbn.layout import layout_of
from fastbn.merging import Moments
from fastbn.reduction_validation import ReductionOptions, broadcastable, check_keepdims, check_nan_form, kept_axes


def statistic(what: str, x: Any, where: Any, weights: Any, given: Any, out: Any, options: ReductionOptions) -> Call:
    """``call(x, where, weights, given, out)`` for "mean", "var", "std" or "mean_var"; see `fastbn.reductions`.

    `given` are the values from which a variance is measured, where it is not the mean.
    """
    if x.dtype.kind in "cOmMSUV" and not validation.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got dtype {x.dtype}; numpy.mean and numpy.var take other dtypes")
    with device_of(x):
        kind = one_kind({"x": x}, out=out)
        if options.skip_nan:
            check_nan_form(x, where, options.dtype, out)
        if weights is None and kind == "numpy" and _is_numpys(x, options.dtype):
            return _numpys(what, options)
        if given is None:

            def with_care(x: Any, where: Any, weights: Any, out: Any) -> Call:
                return _by_moments(what, x, where, weights, None, out, options)

            direct = direct_reductions.statistic(what, x, where, weights, out, options, with_care)
            if direct is not None:
                return direct
        return _by_moments(what, x, where, weights, given, out, options)


def _by_moments(what: str, x: Any, where: Any, weights: Any, given: Any, out: Any, options: ReductionOptions) -> Call:
    if options.skip_nan and x.dtype.kind not in "biu":
        return reductions_by_moments.without_nans(what, x, given, out, options)
    return reductions_by_moments.statistic(what, x, where, weights, given, out, options)


def average(x: Any, weights: Any, axis: Any, keepdims: Any) -> Call:
    """``call(x, weights)`` gives averages and the sums of weights, for any real weights of x's shape or the axes'."""
    backend = backend_of(one_kind({"x": x}, weights=weights))
    check_keepdims(keepdims)
    beside = _beside(x, weights, axis)
    dtype = np.result_type(x.dtype, weights.dtype, *([np.float64] if x.dtype.kind in "iub" else []))
    with device_of(x):
        found = direct_reductions.average(x, beside(weights), dtype, axis, keepdims)
    axes = tuple(set(range(x.ndim)) - kept_axes(x, axis))
    xp, wide, mean = backend.xp, np.result_type(dtype, np.float64), Once(statistic)

    def some(scale: Any) -> Any:
        if (scale == 0.0).any():
            raise ZeroDivisionError("weights: expected weights whose sum is not zero along the axis")
        return scale

    def by_moments(x: Any, weights: Any) -> tuple[Any, Any]:
        with np.errstate(over="ignore"):
            scale = some(xp.broadcast_to(weights, x.shape).sum(axis=axes, dtype=wide, keepdims=keepdims))
        if dtype.char != "g" and bool((xp.isfinite(weights) & (weights >= 0)).all()):
            run = mean("mean", x, None, weights, None, None, ReductionOptions(axis, dtype, keepdims))
            return run(x, None, weights, None, None), scale
        # Sums that may cancel, and what is not finite, as NumPy has them.
        result = xp.multiply(x, weights, dtype=wide).sum(axis=axes, keepdims=keepdims) / scale
        return result.astype(dtype), scale

    def call(x: Any, weights: Any) -> tuple[Any, Any]:
        weights = beside(weights)
        both = None if found is None else found(x, weights)
        if both is None:
            return by_moments(x, weights)
        return both[0], some(both[1])

    return backend.on_its_device(call, x)


def _beside(x: Any, weights: Any, axis: Any) -> Call:
    """``beside(weights)`` has x's dimensions, where weights have x's shape or that of the axes."""
    if weights.dtype.kind not in "biuf" and not validation.is_float(weights.dtype):
        raise TypeError(f"weights: expected real numbers, got dtype {weights.dtype}")
    if weights.shape == x.shape:
        return lambda weights: weights
    if axis is None:
        raise TypeError(f"weights: expected x's shape {x.shape} where there is no axis, got {weights.shape}")
    axes = normalize_axis_tuple(axis, x.ndim)
    expected = tuple(x.shape[a] for a in axes)
    if weights.shape != expected:
        raise ValueError(f"weights: expected x's shape {x.shape} or that of its axes, {expected}, got {weights.shape}")
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    return lambda weights: weights.transpose(order).reshape(shape)


def moments(x: Any, where: Any, weights: Any, channel_axis: Any) -> Call:
    """``call(x, where, weights)``."""
    if x.dtype.kind in "cOmMSUV" and not validation.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got dtype {x.dtype}")
    with device_of(x):
        kept = validation.channel_axes(x.ndim, channel_axis)
        backend = backend_of(one_kind({"x": x}, where=where, weights=weights))
        validation.combined_weight(backend.xp, where, weights, x.shape)
        found = None
        if not _is_batch_norms(backend, x, (where, weights), kept):
            found = direct_reductions.moments(x, where, weights, kept)
        if found is None:
            return backend.on_its_device(reductions_by_moments.moments(x, where, weights, kept), x)
    direct, careful = found, Once(reductions_by_moments.moments)

    def call(x: Any, where: Any, weights: Any) -> Moments:
        moments: Moments | None = direct(x, where, weights)
        if moments is None:
            moments = careful(x, where, weights, kept)(x, where, weights)
        return moments

    return backend.on_its_device(call, x)


def _is_batch_norms(backend: Backend, x: Any, selection: tuple[Any, ...], kept: frozenset[int]) -> bool:
    """Whether `fastbn.batch_norm` takes such arrays as a whole: its moments are the same, bit by bit."""
    given = [broadcastable("where", a, x) for a in selection if a is not None]
    if not validation.is_float(x.dtype) or any(a.shape[axis] != 1 for a in given for axis in kept):
        return False
    return bool(given) or not is_cut(backend, layout_of(x.shape, x.strides, kept), x)


# --- what is NumPy's --------------------------------------------------------------------------------------------------


_NUMPYS: dict[tuple[bool, bool], Any] = {
    (False, False): np.var, (True, False): np.std, (False, True): np.nanvar, (True, True): np.nanstd
}  # fmt: skip


def _is_numpys(x: Any, dtype: Any) -> bool:
    """Whether NumPy computes this: extended precision, an integer result, or nothing to reduce."""
    wanted = x.dtype if dtype is None else np.dtype(dtype)
    longs = x.dtype.char == "g" or wanted.char == "g"
    return bool(longs or x.size == 0 or not (validation.is_float(wanted) or (dtype is None and wanted.kind in "iub")))


def _numpys(what: str, o: ReductionOptions) -> Call:
    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        where = True if where is None else where
        average = np.nanmean if o.skip_nan else np.mean
        means = average(x, o.axis, o.dtype, out, o.keepdims, where=where) if "mean" in what else None
        if what == "mean":
            return means
        more = {} if given is None else {"mean": given}
        spread = _NUMPYS[what == "std", o.skip_nan]
        spreads = spread(x, o.axis, o.dtype, out, o.ddof, o.keepdims, where=where, **more)
        return spreads if means is None else (means, spreads)

    return call
