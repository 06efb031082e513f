"""Prepared calls of statistics: what `fastbn.call` keeps for them (see `fastbn.prepare`).

Kernels give count, mean, M2 and rstd of each kept index, from which a statistic follows in one of two ways: fast, for
plain arguments and ordinary numbers, or with care for everything else: `where`, `out`, NumPy's warnings, squares beyond
the range of float64, variances beyond that of their dtype.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from fastbn import validation
from fastbn.arrays import device_of, is_foreign, kind_of, one_kind
from fastbn.backend import backend_of
from fastbn.layout import Shape, layout_of
from fastbn.merging import Moments
from fastbn.operands import Mask, Statistic
from fastbn.ways import Way, Ways

Call = Callable[..., Any]

LEAST, MOST = 1e-290, 1e300  # of sums of squares in float64, between which no square has left its range


class Options(NamedTuple):
    """What decides a statistic beside its arrays."""

    axis: Any
    dtype: Any
    keepdims: Any
    ddof: Any = 0
    skip_nan: bool = False


def statistic(what: str, x: Any, where: Any, weights: Any, given: Any, out: Any, options: Options) -> Call:
    """``call(x, where, weights, given, out)`` for "mean", "var", "std" or "mean_var"; see `fastbn.reductions`.

    `given` are the values from which a variance is measured, where it is not the mean.
    """
    if x.dtype.kind in "cOmMSUV" and not validation.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got dtype {x.dtype}; numpy.mean and numpy.var take other dtypes")
    with device_of(x):
        kind = one_kind({"x": x}, out=out)
        if options.skip_nan:
            _check_nan_form(x, where, options.dtype, out)
        if weights is None and kind == "numpy" and _is_numpys(x, options.dtype):
            return _numpys(what, options)
        if weights is None and given is None:
            direct = _direct(what, x, where, out, options)
            if direct is not None:
                return direct
        if options.skip_nan and x.dtype.kind not in "biu":
            return _without_nans(what, x, given, out, options)
        return _general(what, x, where, weights, given, out, options)


def _check_nan_form(x: Any, where: Any, dtype: Any, out: Any) -> None:
    """What NumPy says in other words, of arguments that are not named."""
    if where is not None and _operand("where", where, x).dtype != bool:
        raise TypeError(f"where: expected dtype bool, got {_operand('where', where, x).dtype}")
    if x.dtype.kind not in "biu":
        for name, other in (("dtype", dtype), ("out", getattr(out, "dtype", None))):
            if other is not None and np.dtype(other).kind in "biuO":
                raise TypeError(f"{name}: expected a float dtype for an array of floats, got {np.dtype(other)}")


def _direct(what: str, x: Any, where: Any, out: Any, options: Options) -> Call | None:
    """By the backend's kernel for it, which writes results; None if there is none that takes these arrays."""
    if not isinstance(options.ddof, (int, float)):
        return None
    backend = backend_of(kind_of("x", x))
    kept, dtype = _kept(x, options.axis), np.dtype(_dtype(x, options.dtype))
    shape = tuple(n if axis in kept else 1 for axis, n in enumerate(x.shape) if options.keepdims or axis in kept)
    _check_out(shape, dtype, out)
    if out is not None and options.dtype is None:  # its digits are wanted
        dtype = out.dtype.newbyteorder("=") if validation.is_float(out.dtype) else np.dtype(np.float64)
    into_out = out is not None and _lies_well(out, dtype)
    strides = _steps(out if into_out else np.empty(shape, dtype), x.ndim, kept, options.keepdims)
    plain = validation.plainer(x)
    if isinstance(x, np.ndarray) and not (x.dtype.isnative and x.flags.aligned):
        plain = _native
    seen = x if plain is None else plain(x)
    given = _operand("where", where, x)
    if given is not None and given.dtype != bool:
        return None
    has_mean, has_spread = "mean" in what, what != "mean"
    spread_is = what if what in ("var", "std") else "var"
    wanted = Statistic(spread_is, options.skip_nan, None, dtype if has_mean else None, dtype if has_spread else None)
    run, to_mask = _kernel(backend, seen, given, kept, wanted, strides)
    if run is None:
        return None
    count, ddof = x.size // max(1, math.prod(x.shape[axis] for axis in kept)), float(options.ddof)
    sure = where is None and not options.skip_nan and x.dtype.itemsize < 8 and (count > ddof or not has_spread)
    careful, empty, scalar = _Once(), backend.xp.empty, shape == () and isinstance(x, np.ndarray)

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        seen = x if plain is None else plain(x)
        mask = where
        if where is not None:
            mask = _operand("where", where, x)
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
                    return careful(_careful, what, x, where, out, options)(x, where, None, None, out)
                if is_empty and has_mean:
                    _warn(_EMPTY[options.skip_nan])
                if no_degrees and has_spread:
                    _warn(_NO_DEGREES)
        if out is not None:
            return _written(mean if has_mean else spread, out)
        if scalar:
            mean, spread = mean[()] if has_mean else None, spread[()] if has_spread else None
        if has_mean:
            return (mean, spread) if has_spread else mean
        return spread

    return backend.on_its_device(call, x)


def _steps(result: Any, ndim: int, kept: frozenset[int], keepdims: Any) -> Shape:
    """A result's strides in elements for each axis of what is reduced."""
    steps = iter(s // result.itemsize for s in result.strides)
    of_axes = ((axis in kept, next(steps) if keepdims or axis in kept else 0) for axis in range(ndim))
    return tuple(step if is_kept else 0 for is_kept, step in of_axes)


def _written(result: Any, out: Any) -> Any:
    if result is not out:
        with np.errstate(over="ignore"):  # float16 results beyond 65504 are infinite
            out[...] = result
    return out


_UNREAD = np.zeros(3)  # the status of calls that cannot change it
_EMPTY = {False: "Mean of empty slice.", True: "Mean of empty slice"}  # as NumPy says it
_NO_DEGREES = "Degrees of freedom <= 0 for slice."


def _native(x: Any) -> Any:
    """A copy whose elements are in the machine's byte order, and where it wants them."""
    return np.array(x, x.dtype.newbyteorder("="), order="K", subok=False)


class _Once:
    """What is prepared when it is wanted first."""

    def __init__(self) -> None:
        self._made: Call | None = None

    def __call__(self, prepare: Callable[..., Call], *arguments: Any) -> Call:
        if self._made is None:
            self._made = prepare(*arguments)
        return self._made


def _careful(what: str, x: Any, where: Any, out: Any, options: Options) -> Call:
    if options.skip_nan:
        return _without_nans(what, x, None, out, options)
    return _general(what, x, where, None, None, out, options)


def _lies_well(out: Any, dtype: Any) -> bool:
    """Whether kernels can write it."""
    return (
        out.dtype == dtype
        and out.dtype.isnative
        and (is_foreign(out) or out.flags.aligned)
        and all(s % dtype.itemsize == 0 for s in out.strides)
        and not any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True))
    )


def _kernel(
    backend: Any, x: Any, where: Any, kept: frozenset[int], wanted: Statistic, strides: Shape
) -> tuple[Call | None, Way]:
    """The backend's kernel, and what makes a mask one that it reads: itself if it can."""
    if where is None:
        return backend.statistic(x, None, kept, wanted, strides), None
    as_it_lies = Mask(tuple(0 if n == 1 else s for n, s in zip(where.shape, where.strides, strict=True)))
    run = backend.statistic(x, as_it_lies, kept, wanted, strides)
    if run is not None:
        return run, None
    mask, to_mask = _mask_of(backend.xp, where, x)
    return backend.statistic(x, mask, kept, wanted, strides), to_mask


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


def _without_nans(what: str, x: Any, given: Any, out: Any, options: Options) -> Call:
    """With a mask, where no kernel looks for NaNs itself."""
    xp, prepared = backend_of(kind_of("x", x)).xp, _Once()

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        numbers = ~xp.isnan(x)
        if where is not None:
            numbers &= _operand("where", where, x)
        return prepared(_general, what, x, numbers, None, given, out, options)(x, numbers, None, given, out)

    return call


def _general(what: str, x: Any, where: Any, weights: Any, given: Any, out: Any, options: Options) -> Call:
    """From the moments of a kernel for floats, in layouts that it can walk: others are copied."""
    with device_of(x):
        kind = kind_of("x", x)
        kept, dtype = _kept(x, options.axis), options.dtype
        single = tuple(axis for axis in range(x.ndim) if axis not in kept)
        shape = tuple(n if axis in kept else 1 for axis, n in enumerate(x.shape) if options.keepdims or axis in kept)
        wide = not validation.is_float(x.dtype) or _is_float64(getattr(out, "dtype", None) if dtype is None else dtype)
        if given is not None:
            values = _beside("mean", given, x, single)
            if dtype is None and not isinstance(given, (int, float)):  # Python's numbers do not widen a result
                own = np.float64 if x.dtype.kind in "iub" else x.dtype.newbyteorder("=")
                dtype = np.result_type(own, values.dtype)
        dtype = np.dtype(_dtype(x, dtype))
        _check_out(shape, dtype, out)
        table_of, to_kept = _table(x, kept, wide, where, weights)
        backend = backend_of(kind)
    plain = where is None and weights is None and given is None and out is None and kind == "numpy"
    divisor = 0.0
    if plain and isinstance(options.ddof, (int, float)):
        divisor = x.size / max(1, math.prod(x.shape[axis] for axis in kept)) - options.ddof
    f = _Finish(dtype, shape, to_kept, options.ddof, divisor, wide or x.dtype == np.float64, options.skip_nan)
    careful, fast = _CAREFUL[what], _FAST[what]
    usual = divisor > 0 and dtype in (x.dtype, np.float64)

    def call(x: Any, where: Any, weights: Any, given: Any, out: Any) -> Any:
        vectors = table_of(x, where, weights)
        if usual:
            done = fast(f, vectors)
            if done is not None:
                return done
        count, mean, m2, rstd = vectors if to_kept is None else map(to_kept, vectors)
        if given is not None:
            values = _beside("mean", given, x, single).astype(np.float64).squeeze(single)
            m2, rstd = np.where(count == 0, 0.0, m2 + count * (values - mean) ** 2), None
        return careful(f, count, mean, m2, rstd, out)

    return backend.on_its_device(call, x)


def moments(x: Any, where: Any, weights: Any, channel_axis: Any) -> Call:
    """``call(x, where, weights)``."""
    if x.dtype.kind in "cOmMSUV" and not validation.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got dtype {x.dtype}")
    with device_of(x):
        kept = validation.channel_axes(x.ndim, channel_axis)
        backend = backend_of(one_kind({"x": x}, where=where, weights=weights))
        validation.combined_weight(backend.xp, where, weights, x.shape)
        direct = None
        if weights is None and not _is_batch_norms(x, where, kept):
            direct = _direct_moments(x, where, kept)
        if direct is None:
            return backend.on_its_device(_moments_by_table(x, where, weights, kept), x)
    found, careful = direct, _Once()

    def call(x: Any, where: Any, weights: Any) -> Moments:
        moments: Moments | None = found(x, where)
        if moments is None:
            moments = careful(_moments_by_table, x, where, weights, kept)(x, where, weights)
        return moments

    return backend.on_its_device(call, x)


def _moments_by_table(x: Any, where: Any, weights: Any, kept: frozenset[int]) -> Call:
    """``call(x, where, weights)`` by the kernels of batch norm."""
    table_of, to_kept = _table(x, kept, not validation.is_float(x.dtype), where, weights)

    def call(x: Any, where: Any, weights: Any) -> Moments:
        count, mean, m2, _ = table_of(x, where, weights)
        if to_kept is None:
            return Moments(count, mean, m2)
        return Moments(to_kept(count), to_kept(mean), to_kept(m2))

    return call


def _is_batch_norms(x: Any, where: Any, kept: frozenset[int]) -> bool:
    """Whether `fastbn.batch_norm` takes such arrays: its moments are the same, bit by bit."""
    if where is None or not validation.is_float(x.dtype):
        return validation.is_float(x.dtype)
    mask = _operand("where", where, x)
    return all(mask.shape[axis] == 1 for axis in kept)


def _direct_moments(x: Any, where: Any, kept: frozenset[int]) -> Call | None:
    """``found(x, where)`` by the backend's kernel for statistics, or None where that needs more care."""
    plain = validation.plainer(x)
    x = validation.plain(x)
    shape = tuple(n for axis, n in enumerate(x.shape) if axis in kept)
    strides = _steps(np.empty(shape), x.ndim, kept, False)
    backend = backend_of(kind_of("x", x))
    float64, run = np.dtype(np.float64), None
    if x.size > 0:
        wanted = Statistic("m2", False, float64, float64, float64)
        run, to_mask = _kernel(backend, x, _operand("where", where, x), kept, wanted, strides)
    if run is None:
        return None
    empty = backend.xp.empty

    def found(x: Any, where: Any) -> Moments | None:
        if plain is not None:
            x = plain(x)
        if where is not None:
            where = _operand("where", where, x)
            where = where if to_mask is None else to_mask(where)
        count, mean, m2, status = empty(shape), empty(shape), empty(shape), np.zeros(3)
        run(x, where, count, mean, m2, status, 0.0)
        return None if status[0] else Moments(count, mean, m2)

    return found


def _table(x: Any, kept: frozenset[int], wide: bool, where: Any, weights: Any) -> tuple[Call, Way]:
    """``table(x, where, weights)`` gives vectors count, mean, M2, rstd, in float64 sums if wide; and `Ways.shaped`."""
    backend, plain = backend_of(kind_of("x", x)), validation.plainer(x)
    x = validation.plain(x)
    widened = wide and x.dtype != np.float64
    seen = backend.xp.empty_like(x, dtype=float) if widened else x
    layout = layout_of(seen.shape, seen.strides, kept)
    ways = Ways(backend, layout, seen)
    weight_, weigh = ways.weight(_operand("where", where, x), _operand("weights", weights, x), shared=False)
    x_, to_x = ways.data(seen)
    run = backend.moments(x_, weight_)
    if weigh is None and to_x is None and not widened:
        return (lambda x, where, weights: run(x, None)), ways.shaped()

    def table(x: Any, where: Any, weights: Any) -> Any:
        if plain is not None:
            x = plain(x)
        w = None if weigh is None else weigh(_operand("where", where, x), _operand("weights", weights, x))[1]
        if widened:
            x = x.astype(np.float64)
        return run(x if to_x is None else to_x(x), w)

    return table, ways.shaped()


# --- what is NumPy's --------------------------------------------------------------------------------------------------


_NUMPYS: dict[tuple[bool, bool], Any] = {
    (False, False): np.var, (True, False): np.std, (False, True): np.nanvar, (True, True): np.nanstd
}  # fmt: skip


def _is_numpys(x: Any, dtype: Any) -> bool:
    """Whether NumPy computes this: extended precision, an integer result, or nothing to reduce."""
    wanted = x.dtype if dtype is None else np.dtype(dtype)
    longs = x.dtype.char == "g" or wanted.char == "g"
    return bool(longs or x.size == 0 or not (validation.is_float(wanted) or (dtype is None and wanted.kind in "iub")))


def _numpys(what: str, o: Options) -> Call:
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


# --- checks -----------------------------------------------------------------------------------------------------------


def _kept(x: Any, axis: Any) -> frozenset[int]:
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    return frozenset(range(x.ndim)).difference(axes)


def _is_float64(dtype: Any) -> bool:
    """Whether a result is asked for in float64: then sums are, too; of float32 those of chunks are good to 1e-7."""
    return dtype is not None and np.dtype(dtype).itemsize >= 8


def _dtype(x: Any, dtype: Any) -> Any:
    """Of a result."""
    if dtype is not None:
        return dtype
    return x.dtype.newbyteorder("=") if validation.is_float(x.dtype) else np.float64


def _check_out(shape: Shape, wanted: Any, out: Any) -> None:
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


def _operand(name: str, value: Any, x: Any) -> Any:
    return None if value is None else _beside(name, value, x, ())


def _beside(name: str, value: Any, x: Any, single: tuple[int, ...]) -> Any:
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


# --- results ----------------------------------------------------------------------------------------------------------


class _Finish:
    """What is known of a result before the numbers."""

    def __init__(
        self, dtype: Any, shape: Shape, to_kept: Way, ddof: Any, divisor: float, in_float64: bool, skip_nan: bool
    ) -> None:
        self.dtype, self.shape, self.to_kept, self.ddof, self.divisor = dtype, shape, to_kept, ddof, divisor
        self.skip_nan = skip_nan
        self.sums_are_float64 = in_float64
        largest = {2: 65504.0, 4: 3e38}.get(dtype.itemsize, MOST) if dtype.name != "bfloat16" else 3e38
        self.most = min(MOST, largest * divisor)

    def kept(self, vector: Any) -> Any:
        """A vector in the result's shape."""
        return (vector if self.to_kept is None else self.to_kept(vector)).reshape(self.shape)

    def cast(self, value: Any, out: Any) -> Any:
        """As NumPy does; written to `out` if given; a full reduction is a scalar."""
        value = (np.asarray(value) if isinstance(value, np.generic) else value).reshape(self.shape)
        with np.errstate(over="ignore"):  # float16 results beyond 65504 are infinite
            if out is not None:
                out[...] = value
                return out
            value = value.astype(self.dtype, copy=False)
        return value[()] if isinstance(value, np.ndarray) else value


def _fast_mean(f: _Finish, vectors: Any) -> Any:
    mean = vectors[1]
    return f.dtype.type(mean[0]) if f.shape == () else f.kept(mean).astype(f.dtype)


def _fast_var(f: _Finish, vectors: Any) -> Any:
    """None where a square, or the variance, is out of range, or there are NaNs."""
    m2 = vectors[2]
    if f.shape == ():
        number = float(m2[0])
        return f.dtype.type(number / f.divisor) if LEAST < number < f.most else None
    if not (m2.min() > LEAST and m2.max() < f.most):
        return None
    return f.kept(m2 / f.divisor).astype(f.dtype, copy=False)


def _fast_std(f: _Finish, vectors: Any) -> Any:
    m2 = vectors[2]
    if f.shape == ():
        number = float(m2[0])
        return f.dtype.type(math.sqrt(number / f.divisor)) if LEAST < number < f.most else None
    if not (m2.min() > LEAST and m2.max() < f.most):
        return None
    return f.kept(np.sqrt(m2 / f.divisor)).astype(f.dtype, copy=False)


def _fast_mean_var(f: _Finish, vectors: Any) -> Any:
    variance = _fast_var(f, vectors)
    return None if variance is None else (_fast_mean(f, vectors), variance)


def _mean(f: _Finish, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    _warn_if(lambda: count == 0, count, _EMPTY[f.skip_nan])
    return f.cast(mean, out)


def _var(f: _Finish, count: Any, mean: Any, m2: Any, rstd: Any, out: Any, root: bool = False) -> Any:
    """By rstd where the squares of float64 left the range."""
    _warn_if(lambda: count - f.ddof <= 0, count, _NO_DEGREES)
    with np.errstate(all="ignore"):
        value = m2 / np.maximum(count - f.ddof, 0)
        if root:
            value = np.sqrt(value)
        if rstd is not None and f.sums_are_float64:
            std = np.sqrt(count / np.maximum(count - f.ddof, 0)) / rstd
            lost = ((m2 < LEAST) | (m2 == np.inf)) & (rstd > 0) & (rstd < np.inf)
            value = np.where(lost, std if root else std * std, value)
        if f.skip_nan:
            value = np.where(count - f.ddof <= 0, np.nan, value)
    return f.cast(value, out)


def _std(f: _Finish, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    return _var(f, count, mean, m2, rstd, out, root=True)


def _mean_var(f: _Finish, count: Any, mean: Any, m2: Any, rstd: Any, out: Any) -> Any:
    return _mean(f, count, mean, m2, rstd, out), _var(f, count, mean, m2, rstd, out)


_FAST = {"mean": _fast_mean, "var": _fast_var, "std": _fast_std, "mean_var": _fast_mean_var}
_CAREFUL: dict[str, Call] = {"mean": _mean, "var": _var, "std": _std, "mean_var": _mean_var}


def _warn_if(condition: Callable[[], Any], count: Any, message: str) -> None:
    """NumPy's warnings, which CuPy does not have: to ask a device would be to wait for it."""
    if isinstance(count, (np.ndarray, np.generic)) and condition().any():
        _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """Of the first function outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastbn."):
        frame, level = frame.f_back, level + 1
    return level
