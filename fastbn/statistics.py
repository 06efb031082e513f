"""Statistics: `mean`, `var`, `std` as drop-ins for NumPy's, `mean_var` and `moments` in one pass.

Accumulation is by corrected two-pass sums in chunks, merged by Chan's update in float64 (``cpu/kernels/rows.py``):
float32 data with a mean 50 000 times their deviation keep a mean good to 1e-7 and a variance good to 1e-6.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from fastbn import arguments
from fastbn import statistics_again as again
from fastbn.dispatch import backend_of, is_foreign, kind_of, on_device, one_kind
from fastbn.layout import layout_of
from fastbn.merging import Moments
from fastbn.operands import Ways

__all__ = ["mean", "mean_var", "moments", "std", "var"]


@on_device
def mean(
    x: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: bool = False,
    *,
    where: Any = True,
) -> Any:
    """Arithmetic mean over axes: `numpy.mean`, accurate and parallel.

    Parameters
    ----------
    x : array_like
        Real numbers of any dtype and layout; lists and scalars as NumPy takes them.
    axis : int or tuple of ints, optional
        The axes reduced; all by default.
    dtype : dtype, optional
        Of the result: by default float64 for integers, else that of `x`. Sums are in float64 whatever it is.
    out : array, optional
        Written and returned; of the result's shape.
    keepdims : bool
        Leave the reduced axes in the result, with size 1.
    where : array_like of bool
        Elements to include; broadcasts to `x`.

    Returns
    -------
    array or scalar

    Raises
    ------
    TypeError
        Complex, object and time dtypes, masked arrays and other subclasses, arrays of other libraries.
    numpy.exceptions.AxisError
        An axis that `x` has not; ValueError for a repeated one.

    Notes
    -----
    Infinities of one sign give that infinity, NaN and infinities of both signs NaN. An empty slice gives NaN and
    NumPy's RuntimeWarning. Extended precision (longdouble) and an integer `dtype` are left to NumPy, and errors for
    CuPy arrays.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.full((1 << 20, 2), 100.3, np.float32)  # whose running sum outgrows float32
    >>> abs(np.mean(x, axis=0) - x[0]).max() > 0.1, abs(fastbn.mean(x, axis=0) - x[0]).max()
    (np.True_, np.float32(0.0))
    >>> fastbn.mean([[1, 2], [3, 5]], axis=0)
    array([2. , 3.5])
    """
    key = again.key_of("mean", x, axis, dtype, out, keepdims, where)
    done = again.find(key, x)
    if done is not None:
        return done
    x, keepdims, where = _array(x, out), _given(keepdims, False), _given(where, True)
    if _is_numpys(x, dtype):
        return np.mean(x, axis, dtype, out, keepdims, where=where)
    _remember(key, x, axis, keepdims)
    _check_out(x, axis, keepdims, dtype, out)
    count, centre, *_, shape = _reduced(_precise(x, dtype, out), axis, keepdims, where)
    _warn_if(lambda: count == 0, count, "Mean of empty slice.", 4)
    return _result(centre.reshape(shape), x, dtype, out)


@on_device
def var(
    x: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    where: Any = True,
    mean: Any = None,
    correction: float | None = None,
) -> Any:
    """Variance over axes: `numpy.var`, accurate and parallel.

    Parameters
    ----------
    x, axis, dtype, out, keepdims, where
        As for `mean`.
    ddof : float
        The divisor is the number of elements less `ddof`.
    mean : array_like, optional
        Measure deviations from these values instead of the mean; of the shape that ``keepdims=True`` gives.
    correction : float, optional
        The array API's name for `ddof`; give one of them.

    Returns
    -------
    array or scalar
        ``sum((x - mean)^2) / (n - ddof)``.

    Raises
    ------
    ValueError
        `ddof` and `correction` both given; otherwise as `mean`.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.var([1.0, 2.0, 3.0, 4.0]), fastbn.var([1.0, 2.0, 3.0, 4.0], correction=1)
    (np.float64(1.25), np.float64(1.6666666666666667))
    """
    key = None
    if mean is None and correction is None:
        key = again.key_of("var", x, axis, dtype, out, keepdims, where, ddof)
        done = again.find(key, x)
        if done is not None:
            return done
    x, ddof = _array(x, out), _degrees(ddof, correction)
    keepdims, where, mean = _given(keepdims, False), _given(where, True), _given(mean, None)
    if _is_numpys(x, dtype):
        options = {} if mean is None else {"mean": mean}
        return np.var(x, axis, dtype, out, ddof, keepdims, where=where, **options)
    _remember(key, x, axis, keepdims, ddof)
    value, dtype = _variance(x, axis, dtype, out, ddof, keepdims, where, mean)
    return _result(value, x, dtype, out)


@on_device
def std(
    x: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    where: Any = True,
    mean: Any = None,
    correction: float | None = None,
) -> Any:
    """Standard deviation over axes, ``sqrt(var(...))``: `numpy.std`, accurate and parallel.

    Parameters, results and errors are those of `var`.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.std([1.0, 1.0, 5.0, 5.0])
    np.float64(2.0)
    """
    key = None
    if mean is None and correction is None:
        key = again.key_of("std", x, axis, dtype, out, keepdims, where, ddof)
        done = again.find(key, x)
        if done is not None:
            return done
    x, ddof = _array(x, out), _degrees(ddof, correction)
    keepdims, where, mean = _given(keepdims, False), _given(where, True), _given(mean, None)
    if _is_numpys(x, dtype):
        options = {} if mean is None else {"mean": mean}
        return np.std(x, axis, dtype, out, ddof, keepdims, where=where, **options)
    _remember(key, x, axis, keepdims, ddof)
    value, dtype = _variance(x, axis, dtype, out, ddof, keepdims, where, mean, root=True)
    return _result(value, x, dtype, out)


@on_device
def mean_var(
    x: Any, axis: Any = None, *, correction: float = 0, keepdims: bool = False, where: Any = True, weights: Any = None
) -> tuple[Any, Any]:
    """Mean and variance in one pass over the data.

    Parameters
    ----------
    x, axis, keepdims, where
        As for `mean`.
    correction : float
        The variance's divisor is the number of elements, or the sum of their weights, less `correction`.
    weights : array_like, optional
        Finite real weights >= 0 that broadcast to `x`: how often each element counts, as in `moments`. Extended
        precision is float64 then.

    Returns
    -------
    mean, var : array or scalar

    Raises
    ------
    TypeError, numpy.exceptions.AxisError
        As `mean`.
    ValueError
        As `mean`; weights that do not broadcast to `x`, negative or not finite ones.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.mean_var(np.array([[0.0, 1.0], [2.0, 5.0]]), axis=0)
    (array([1., 3.]), array([1., 4.]))
    """
    key = None
    if weights is None:
        key = again.key_of("mean_var", x, axis, None, None, keepdims, where, correction)
        done: tuple[Any, Any] | None = again.find(key, x)
        if done is not None:
            return done
    x, keepdims, where = _array(x), _given(keepdims, False), _given(where, True)
    correction = _given(correction, 0)
    if weights is None and _is_numpys(x, None):
        return np.mean(x, axis, None, None, keepdims, where=where), np.var(
            x, axis, None, None, correction, keepdims, where=where
        )
    _remember(key, x, axis, keepdims, correction)
    count, centre, m2, rstd, shape = _reduced(x, axis, keepdims, where, weights)
    _warn_if(lambda: count == 0, count, "Mean of empty slice.", 4)
    variance = _divided(m2, count, correction, 5)
    if x.dtype == np.float64:
        variance = _in_range(variance, m2, count, rstd, correction, root=False)
    return _result(centre.reshape(shape), x, None, None), _result(variance.reshape(shape), x, None, None)


@on_device
def moments(x: Any, *, channel_axis: Any = 1, where: Any = None, weights: Any = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, in one pass.

    Parameters
    ----------
    x : array_like
        Real numbers of any layout.
    channel_axis : int or tuple of ints
        The axes kept; all others are reduced. The default is that of batches of channels, ``(N, C, ...)``: of an image
        ``(H, W, 3)`` it would give statistics of the columns, of which nothing tells; pass -1.
    where : array of bool, optional
        Elements to include; broadcasts to `x`. Channels may differ in it: each has its own count.
    weights : array, optional
        Finite real weights >= 0 that broadcast to `x`: how often each element counts. Both given, they multiply. What
        weighs zero is skipped, NaN or not. Rounded to the type that sums run in: float32, but for float64 arrays.

    Returns
    -------
    Moments
        Float64 arrays of the kept axes' shape, in x's order: ``count = sum w``, ``mean = sum(w x) / count``,
        ``m2 = sum(w (x - mean)^2)``.

    Raises
    ------
    TypeError
        As `mean`; a `where` that is not bool.
    ValueError
        A `where` or `weights` that does not broadcast to `x`, negative or non-finite weights.
    numpy.exceptions.AxisError
        A channel axis that `x` has not.

    References
    ----------
    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> image = np.tile(np.array([0.2, 0.5, 0.75]), (480, 640, 1))
    >>> fastbn.moments(image, channel_axis=-1).mean
    array([0.2 , 0.5 , 0.75])

    Missing values, of each channel its own, in data that come in parts:

    >>> parts = np.array([[1.0, 10.0], [3.0, np.nan]]), np.array([[np.nan, 20.0], [5.0, 60.0]])
    >>> seen = fastbn.merge(*(fastbn.moments(x, where=np.isfinite(x)) for x in parts))
    >>> seen.count, seen.mean
    (array([3., 3.]), array([ 3., 30.]))
    """
    key = None
    if weights is None and type(channel_axis) is int:
        key = again.key_of("moments", x, None, None, None, channel_axis, True if where is None else where)
        done: Moments | None = again.find(key, x)
        if done is not None:
            return done
    x = _array(x)
    kept = arguments.channel_axes(x.ndim, channel_axis)
    kind = one_kind({"x": x}, where=where, weights=weights)
    backend = backend_of(kind)
    weight = arguments.combined_weight(backend.xp, where, weights, x.shape)
    if key is not None:
        again.remember(backend, key, x, kept, ())
    x = _floating(x)
    return Moments(*_channel_moments(backend, x, kept, weight)[:3])


def _channel_moments(backend: Any, x: Any, kept: frozenset[int], weight: Any) -> tuple[Any, ...]:
    """Count, mean, M2 and rstd."""
    layout = layout_of(x.shape, x.strides, kept)
    ways = Ways(backend, layout, x)
    (x_, to_x), (weight_, to_weight) = ways.data(x), ways.combined_weight(weight)
    run = backend.moments(x_, weight_)
    vectors = run(x if to_x is None else to_x(x), weight if to_weight is None else to_weight(weight))
    return tuple(layout.kept_array(backend.xp, vector) for vector in vectors)


# --- what the NumPy drop-ins share ------------------------------------------------------------------------------------


def _array(x: Any, out: Any = None) -> Any:
    """X as an array of real numbers: lists and scalars as NumPy takes them, foreign arrays refused."""
    if type(x) is not np.ndarray and not _is_cupy(x):
        if is_foreign(x):
            kind_of("x", x)  # raises, naming what to pass instead
        x = np.asarray(x)
    if x.dtype.kind in "cOmMSUV" and not arguments.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got dtype {x.dtype}; numpy.mean and numpy.var take other dtypes")
    one_kind({"x": x}, out=out)
    return x


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def _is_numpys(x: Any, dtype: Any) -> bool:
    """Whether NumPy computes this: extended precision, an integer result, or nothing to reduce."""
    if type(x) is not np.ndarray:
        return False
    wanted = x.dtype if dtype is None else np.dtype(dtype)
    longs = x.dtype.char == "g" or wanted.char == "g"
    return longs or x.size == 0 or not (arguments.is_float(wanted) or (dtype is None and wanted.kind in "iub"))


def _floating(x: Any) -> Any:
    """Integers and bools as float64, so that their sums are exact as far as NumPy's are."""
    return x if arguments.is_float(x.dtype) else x.astype(np.float64)


def _given(value: Any, default: Any) -> Any:
    """A keyword's value, or its default for ``numpy._NoValue``, which NumPy's wrappers pass on for what is left out."""
    return default if value is np._NoValue else value


def _degrees(ddof: float, correction: float | None) -> float:
    correction = _given(correction, None)
    if correction is None:
        return ddof
    if ddof != 0:
        raise ValueError("correction: expected ddof or correction, got both")
    return correction


def _reduced(
    x: Any, axis: Any, keepdims: bool, where: Any, weights: Any = None
) -> tuple[Any, Any, Any, Any, tuple[int, ...]]:
    """Count, mean, M2 and rstd over the axes, and the shape that NumPy gives the result."""
    kept = _kept(x, axis)
    where = None if where is True else _operand("where", where, x)
    weights = None if weights is None else _operand("weights", weights, x)
    backend = backend_of(kind_of("x", x))
    weight = arguments.combined_weight(backend.xp, where, weights, x.shape)
    count, centre, m2, rstd = _channel_moments(backend, _floating(x), kept, weight)
    return count, centre, m2, rstd, _shape(x, kept, keepdims)


def _kept(x: Any, axis: Any) -> frozenset[int]:
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    return frozenset(range(x.ndim)).difference(axes)


def _remember(key: Any, x: Any, axis: Any, keepdims: bool, ddof: float = 0) -> None:
    """Prepare for calls like this one, whose arguments are right."""
    if key is not None:
        kept = _kept(x, axis)
        again.remember(backend_of(kind_of("x", x)), key, x, kept, _shape(x, kept, keepdims), ddof)


def _shape(x: Any, kept: frozenset[int], keepdims: bool) -> tuple[int, ...]:
    """Of a result."""
    return tuple(n if i in kept else 1 for i, n in enumerate(x.shape) if keepdims or i in kept)


def _operand(name: str, value: Any, x: Any, single: tuple[int, ...] = ()) -> Any:
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


def _precise(x: Any, dtype: Any, out: Any) -> Any:
    """X in float64 where the result is asked for in float64: float32 sums in chunks are good to 1e-7."""
    if dtype is None:
        dtype = getattr(out, "dtype", None)
    wanted = dtype is not None and np.dtype(dtype).itemsize >= 8
    return x.astype(np.float64, copy=False) if wanted else x


def _variance(
    x: Any, axis: Any, dtype: Any, out: Any, ddof: float, keepdims: bool, where: Any, given: Any, root: bool = False
) -> tuple[Any, Any]:
    """The variance, or its root, in float64, and the dtype that NumPy would give it."""
    precise = _precise(x, dtype, out)
    if given is not None:
        axes = tuple(range(x.ndim)) if axis is None else normalize_axis_tuple(axis, x.ndim)
        weak = isinstance(given, (int, float))  # Python's numbers do not widen a result
        given = _operand("mean", given, x, axes)
        if dtype is None and not weak:
            dtype = np.result_type(np.float64 if x.dtype.kind in "iub" else x.dtype.newbyteorder("="), given.dtype)
    _check_out(x, axis, keepdims, dtype, out)
    count, centre, m2, rstd, shape = _reduced(precise, axis, keepdims, where)
    if given is not None:
        kept = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
        away = np.broadcast_to(given.astype(np.float64).squeeze(axes), kept) - centre
        m2 = m2 + count * away**2
    value = _divided(m2, count, ddof, 6)
    if root:
        value = np.sqrt(value)
    if given is None and precise.dtype == np.float64:
        value = _in_range(value, m2, count, rstd, ddof, root)
    return value.reshape(shape), dtype


def _in_range(value: Any, m2: Any, count: Any, rstd: Any, ddof: float, root: bool) -> Any:
    """The variance, or its root, by rstd where the squares of float64 left the range."""
    with np.errstate(all="ignore"):
        std = np.sqrt(count / np.maximum(count - ddof, 0)) / rstd
        lost = ((m2 < 1e-290) | (m2 == np.inf)) & (rstd > 0) & (rstd < np.inf)
        return np.where(lost, std if root else std * std, value)


def _divided(m2: Any, count: Any, ddof: float, stacklevel: int) -> Any:
    """m2 / max(count - ddof, 0), with NumPy's warning where nothing is left."""
    _warn_if(lambda: count - ddof <= 0, count, "Degrees of freedom <= 0 for slice.", stacklevel)
    with np.errstate(divide="ignore", invalid="ignore"):
        return m2 / np.maximum(count - ddof, 0)


def _warn_if(condition: Callable[[], Any], count: Any, message: str, stacklevel: int) -> None:
    """NumPy's warnings, which CuPy does not have: to ask a device would be to wait for it."""
    if isinstance(count, (np.ndarray, np.generic)) and condition().any():
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def _dtype(x: Any, dtype: Any) -> Any:
    """Of a result."""
    if dtype is not None:
        return dtype
    return x.dtype.newbyteorder("=") if arguments.is_float(x.dtype) else np.float64


def _check_out(x: Any, axis: Any, keepdims: bool, dtype: Any, out: Any) -> None:
    """What `out` must be, before anything is computed."""
    wanted = np.dtype(_dtype(x, dtype))
    if not arguments.is_float(wanted):  # of NumPy's arrays, these were left to it
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {wanted}")
    if out is None:
        return
    shape = _shape(x, _kept(x, axis), keepdims)
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not np.can_cast(wanted, out.dtype, "same_kind"):
        raise TypeError(f"out: expected a dtype that {wanted} can be cast to, got {out.dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")


def _result(value: Any, x: Any, dtype: Any, out: Any) -> Any:
    """Cast as NumPy does; write to `out` if given; a full reduction is a scalar."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    with np.errstate(over="ignore"):  # float16 results beyond 65504 are infinite
        if out is not None:
            out[...] = value
            return out
        value = value.astype(_dtype(x, dtype), copy=False)
    return value[()] if isinstance(value, np.ndarray) else value
