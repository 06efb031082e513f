"""Statistics from the moments that batch norm's kernels give, where the kernel for statistics is not the way.

So with weights on CuPy arrays, deviations from given values (``mean=``), `moments` of floats that batch norm walks, and
numbers that need care: squares beyond the range of float64, variances beyond that of their dtype. The moments are
count, mean, M2 and rstd of each kept index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn import validation
from fastbn.arrays import device_of, kind_of
from fastbn.backend import backend_of
from fastbn.call import Call, Once
from fastbn.cuts import walked_by
from fastbn.layout import Shape, layout_of
from fastbn.merging import Moments
from fastbn.reduction_validation import (
    EMPTY,
    NO_DEGREES,
    ReductionOptions,
    beside,
    broadcastable,
    check_out,
    is_float64,
    kept_axes,
    reduced_shape,
    result_dtype,
    warn_if,
)
from fastbn.ways import Way, Ways

LEAST_SQUARES = 1e-290  # of sums of squares in float64: below, squares may have underflowed


def statistic(what: str, x: Any, where: Any, weights: Any, given: Any, out: Any, options: ReductionOptions) -> Call:
    """From the moments of a kernel for floats, in layouts that it can walk: others are copied."""
    with device_of(x):
        kind = kind_of("x", x)
        kept, dtype = kept_axes(x, options.axis), options.dtype
        single = tuple(axis for axis in range(x.ndim) if axis not in kept)
        shape = reduced_shape(x, kept, options.keepdims)
        wide = not validation.is_float(x.dtype) or is_float64(getattr(out, "dtype", None) if dtype is None else dtype)
        if given is not None:
            values = beside("mean", given, x, single)
            if dtype is None and type(given) not in (bool, int, float):  # Python's numbers do not widen a result
                own = np.float64 if x.dtype.kind in "iub" else x.dtype.newbyteorder("=")
                dtype = np.result_type(own, values.dtype)
        dtype = np.dtype(result_dtype(x, dtype))
        check_out(shape, dtype, out)
        table_of, to_kept = table(x, kept, wide, where, weights)
        backend = backend_of(kind)
    f, finish = _Result(dtype, shape, options.ddof, wide or x.dtype == np.float64, options.skip_nan), _FINISH[what]

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        vectors = table_of(x, where, weights)
        count, mean, m2, rstd = vectors if to_kept is None else map(to_kept, vectors)
        if given is not None:
            values = beside("mean", given, x, single).astype(np.float64).squeeze(single)
            m2, rstd = np.where(count == 0, 0.0, m2 + count * (values - mean) ** 2), None
        return finish(f, count, mean, m2, rstd, out)

    return backend.on_its_device(call, x)


def without_nans(what: str, x: Any, given: Any, out: Any, options: ReductionOptions) -> Call:
    """With a mask, where no kernel looks for NaNs itself."""
    backend = backend_of(kind_of("x", x))
    masked = Once(lambda x, numbers, given, out: statistic(what, x, numbers, None, given, out, options))

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        numbers = ~backend.xp.isnan(x)
        if where is not None:
            numbers &= broadcastable("where", where, x)
        return masked(x, numbers, given, out)(x, numbers, None, given, out)

    return backend.on_its_device(call, x)


def moments(x: Any, where: Any, weights: Any, kept: frozenset[int]) -> Call:
    """``call(x, where, weights)``."""
    table_of, to_kept = table(x, kept, not validation.is_float(x.dtype), where, weights)

    def call(x: Any, where: Any, weights: Any) -> Moments:
        count, mean, m2, _ = table_of(x, where, weights)
        if to_kept is None:
            return Moments(count, mean, m2)
        return Moments(to_kept(count), to_kept(mean), to_kept(m2))

    return call


def table(x: Any, kept: frozenset[int], wide: bool, where: Any, weights: Any) -> tuple[Call, Way]:
    """``table(x, where, weights)`` gives vectors count, mean, M2, rstd, in float64 sums if wide; and `Ways.shaped`."""
    backend, plain = backend_of(kind_of("x", x)), validation.plainer(x)
    x = validation.plain(x)
    widened = wide and x.dtype != np.float64
    seen = backend.xp.empty_like(x, dtype=float) if widened else x
    layout = layout_of(seen.shape, seen.strides, kept)
    if where is None and weights is None:
        layout = walked_by(backend, layout, [seen]) or layout
    ways = Ways(backend, layout, seen)
    weight_, weigh = ways.weight(broadcastable("where", where, x), broadcastable("weights", weights, x))
    x_, to_x = ways.data(seen)
    run = backend.moments(x_, weight_)
    if weigh is None and to_x is None and not widened:
        return (lambda x, where, weights: run(x, None)), ways.shaped()

    def read(x: Any, where: Any, weights: Any) -> Any:
        if plain is not None:
            x = plain(x)
        w = None if weigh is None else weigh(broadcastable("where", where, x), broadcastable("weights", weights, x))[1]
        if widened:
            x = x.astype(np.float64)
        return run(x if to_x is None else to_x(x), w)

    return read, ways.shaped()


# --- results ----------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    """What is known of one before the numbers."""

    dtype: Any
    shape: Shape
    ddof: Any
    sums_are_float64: bool
    skip_nan: bool

    def cast(self, value: Any, out: Any) -> Any:
        """As NumPy does; written to `out` if given; a full reduction is a scalar."""
        value = (np.asarray(value) if isinstance(value, np.generic) else value).reshape(self.shape)
        with np.errstate(over="ignore"):  # float16 results beyond 65504 are infinite
            if out is not None:
                out[...] = value
                return out
            value = value.astype(self.dtype, copy=False)
        return value[()] if isinstance(value, np.ndarray) else value


def _mean(f: _Result, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    warn_if(lambda: count == 0, count, EMPTY[f.skip_nan])
    return f.cast(mean, out)


def _var(f: _Result, count: Any, mean: Any, m2: Any, rstd: Any, out: Any, root: bool = False) -> Any:
    """By rstd where the squares of float64 left the range."""
    warn_if(lambda: count - f.ddof <= 0, count, NO_DEGREES)
    with np.errstate(all="ignore"):
        value = m2 / np.maximum(count - f.ddof, 0)
        if root:
            value = np.sqrt(value)
        if rstd is not None and f.sums_are_float64:
            std = np.sqrt(count / np.maximum(count - f.ddof, 0)) / rstd
            lost = ((m2 < LEAST_SQUARES) | (m2 == np.inf)) & (rstd > 0) & (rstd < np.inf)
            value = np.where(lost, std if root else std * std, value)
        if f.skip_nan:
            value = np.where(count - f.ddof <= 0, np.nan, value)
    return f.cast(value, out)


def _std(f: _Result, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    return _var(f, count, mean, m2, rstd, out, root=True)


def _mean_var(f: _Result, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    return _mean(f, count, mean, m2, rstd, out), _var(f, count, mean, m2, rstd, out)


_FINISH: dict[str, Call] = {"mean": _mean, "var": _var, "std": _std, "mean_var": _mean_var}
