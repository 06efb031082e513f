"""Statistics of dask arrays, larger than memory: tree reductions over blocks, by fastbn's kernels.

Each block gives count, mean and sum of squared distances from the mean, in float64; these are merged pair by pair (Chan
et al. 1979) along the tree. The mean goes through it in two parts, whose sum has twice the digits: so results are as
accurate as those of an array in memory, whatever the chunks and the mean: of float64 data, 13 digits of the deviation
at means of 1e12 deviations. For that a block of float64 or of integers whose mean is more than 32 deviations from 0 is
looked at twice.

All is lazy until ``compute``; a mean and a variance that are computed together read the blocks once. Blocks are taken
one thread each: dask has as many at work as there are cores. Blocks of integers go to the kernels as they are; integers
beyond 2^53 are rounded to float64.

Masked blocks mean what they mean to `numpy.ma`: what is masked does not count, and a result is masked where nothing is
left. Results are masked arrays where the input is one. `nanmean`, `nanvar` and `nanstd` leave out NaN as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

import fastbn
from fastbn import validation
from fastbn.formulas import united
from fastbn.merging import Moments

try:
    import dask.array as da
    from dask.core import flatten
except ImportError as error:
    from fastbn.extras import install

    raise ImportError(f"fastbn.dask needs dask, which is not installed: {install('dask')}") from error

__all__ = ["mean", "mean_var", "moments", "nanmean", "nanstd", "nanvar", "std", "var"]

Axes = int | tuple[int, ...] | None
NAMES = "count", "hi", "lo", "m2"  # the mean is hi + lo
PACKED = np.dtype([(name, np.float64) for name in NAMES])
CHANNELS_AT_ONCE = 1 << 14  # merged; their temporary arrays stay in the cache: half the time of 500 000
FAR = 32  # standard deviations of a block's mean from 0 up to which its rounding costs less than 1e-14 of m2


def mean(x: Any, axis: Axes = None, dtype: Any = None, *, keepdims: bool = False, split_every: Any = None) -> Any:
    """The mean over axes.

    Parameters
    ----------
    x : dask.array.Array
        Of real numbers, chunked in any way; blocks may be masked arrays.
    axis : int or tuple of int, optional
        The axes reduced; all.
    dtype : dtype, optional
        Of the result: float16, bfloat16, float32 or float64; by default float64 for integers, else that of `x`.
    keepdims : bool, optional
        Whether these stay, with size 1.
    split_every : int or dict, optional
        How many blocks are merged at once, as for `dask.array.reduction`.

    Returns
    -------
    dask.array.Array
        Of masked arrays where those of `x` are: masked where no element counts.

    Raises
    ------
    TypeError
        For what is no dask array of real numbers, or longdouble; a `dtype` that is none of the above.
    numpy.exceptions.AxisError
        For axes that x does not have.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(10, chunks=4)
    >>> float(fastbn.dask.mean(x).compute())
    4.5
    >>> float(fastbn.dask.mean(da.ma.masked_greater(x, 7)).compute())
    3.5
    """
    dtype = _dtype_of_result(x, dtype)
    return _result(_mean, x, _packed(x, axis, keepdims, split_every, dtype), dtype)


def var(
    x: Any,
    axis: Axes = None,
    dtype: Any = None,
    *,
    ddof: float = 0,
    keepdims: bool = False,
    correction: float | None = None,
    split_every: Any = None,
) -> Any:
    """The variance over axes: the sum of squared distances from the mean, divided by the count less `ddof`.

    Parameters
    ----------
    x, axis, dtype, keepdims, split_every
        As for `mean`.
    ddof : float, optional
        1 for the unbiased estimate.
    correction : float, optional
        The array API's name for `ddof`; give one of them.

    Returns
    -------
    dask.array.Array
        As for `mean`; of masked arrays, masked where the count is `ddof` or less.

    Raises
    ------
    ValueError
        `ddof` and `correction` both given.
    TypeError, numpy.exceptions.AxisError
        As `mean`.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.from_array([[1e8, 1e8 + 2], [3e8, 3e8 + 4]], chunks=1)
    >>> fastbn.dask.var(x, axis=1).compute()
    array([1., 4.])
    """
    dtype, ddof = _dtype_of_result(x, dtype), _degrees(ddof, correction)
    return _result(_var, x, _packed(x, axis, keepdims, split_every, dtype), dtype, ddof=ddof)


def std(
    x: Any,
    axis: Axes = None,
    dtype: Any = None,
    *,
    ddof: float = 0,
    keepdims: bool = False,
    correction: float | None = None,
    split_every: Any = None,
) -> Any:
    """The standard deviation over axes: the square root of `var`, with its parameters.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> float(fastbn.dask.std(da.from_array([1.0, 5.0], chunks=1)).compute())
    2.0
    """
    dtype, ddof = _dtype_of_result(x, dtype), _degrees(ddof, correction)
    return _result(_std, x, _packed(x, axis, keepdims, split_every, dtype), dtype, ddof=ddof)


def mean_var(
    x: Any, axis: Axes = None, *, correction: float = 0, keepdims: bool = False, split_every: Any = None
) -> tuple[Any, Any]:
    """Mean and variance; ``dask.compute`` both at once, and the blocks are read once.

    Examples
    --------
    >>> import dask, dask.array as da, fastbn.dask
    >>> mean, var = dask.compute(*fastbn.dask.mean_var(da.from_array([1.0, 5.0], chunks=1)))
    >>> float(mean), float(var)
    (3.0, 4.0)
    """
    dtype, ddof = _dtype_of_result(x, None), _degrees(0, correction)
    packed = _packed(x, axis, keepdims, split_every, dtype)
    return _result(_mean, x, packed, dtype), _result(_var, x, packed, dtype, ddof=ddof)


def nanmean(x: Any, axis: Axes = None, dtype: Any = None, *, keepdims: bool = False, split_every: Any = None) -> Any:
    """The mean over axes of what is not NaN.

    Parameters
    ----------
    x, axis, dtype, keepdims, split_every
        As for `mean`; integers have no NaN.

    Returns
    -------
    dask.array.Array
        NaN where all is NaN, without NumPy's warning; of masked arrays, masked where all is masked or NaN.

    Raises
    ------
    TypeError, numpy.exceptions.AxisError
        As `mean`.

    Examples
    --------
    >>> import numpy as np, dask.array as da, fastbn.dask
    >>> x = da.from_array([[1.0, np.nan], [3.0, 8.0], [np.nan, np.nan]], chunks=1)
    >>> fastbn.dask.nanmean(x, axis=0).compute()
    array([2., 8.])
    """
    dtype = _dtype_of_result(x, dtype)
    return _result(_mean, x, _packed(x, axis, keepdims, split_every, dtype, skipna=True), dtype)


def nanvar(
    x: Any,
    axis: Axes = None,
    dtype: Any = None,
    *,
    ddof: float = 0,
    keepdims: bool = False,
    correction: float | None = None,
    split_every: Any = None,
) -> Any:
    """The variance over axes of what is not NaN: `var`, and as `numpy.nanvar`, NaN where `ddof` or fewer are left.

    Parameters
    ----------
    x, axis, dtype, ddof, keepdims, correction, split_every
        As for `var`.

    Returns
    -------
    dask.array.Array
        As for `nanmean`.

    Raises
    ------
    ValueError, TypeError, numpy.exceptions.AxisError
        As `var`.

    Examples
    --------
    >>> import numpy as np, dask, dask.array as da, fastbn.dask
    >>> x = da.from_array([1.0, np.nan, 5.0, np.nan], chunks=2)
    >>> mean, var = dask.compute(fastbn.dask.nanmean(x), fastbn.dask.nanvar(x, ddof=1))  # blocks are read once
    >>> float(mean), float(var)
    (3.0, 8.0)
    """
    dtype, ddof = _dtype_of_result(x, dtype), _degrees(ddof, correction)
    return _result(_nanvar, x, _packed(x, axis, keepdims, split_every, dtype, skipna=True), dtype, ddof=ddof)


def nanstd(
    x: Any,
    axis: Axes = None,
    dtype: Any = None,
    *,
    ddof: float = 0,
    keepdims: bool = False,
    correction: float | None = None,
    split_every: Any = None,
) -> Any:
    """The standard deviation over axes of what is not NaN: the square root of `nanvar`, with its parameters.

    Examples
    --------
    >>> import numpy as np, dask.array as da, fastbn.dask
    >>> float(fastbn.dask.nanstd(da.from_array([1.0, np.nan, 5.0], chunks=1)).compute())
    2.0
    """
    dtype, ddof = _dtype_of_result(x, dtype), _degrees(ddof, correction)
    return _result(_nanstd, x, _packed(x, axis, keepdims, split_every, dtype, skipna=True), dtype, ddof=ddof)


def moments(x: Any, *, channel_axis: int | tuple[int, ...] = 1, split_every: Any = None) -> Moments:
    """Count, mean and sum of squared distances of each channel, as `fastbn.moments` gives them, but lazy.

    Parameters
    ----------
    x : dask.array.Array
        As for `mean`. What is masked does not count: a channel without other elements has count 0, mean and m2 NaN.
    channel_axis : int or tuple of int, optional
        The axes kept.
    split_every : int or dict, optional
        As for `mean`.

    Returns
    -------
    fastbn.Moments
        Of dask arrays in float64, plain ones also of masked input; ``dask.compute`` gives one of NumPy arrays, for
        `fastbn.merge` and `update_running`. Their means are rounded to float64: see `fastbn.merge`.

    Raises
    ------
    TypeError, numpy.exceptions.AxisError
        As `mean`.

    Examples
    --------
    >>> import dask, dask.array as da, fastbn.dask
    >>> (found,) = dask.compute(fastbn.dask.moments(da.from_array([[1.0, 2.0], [3.0, 6.0]], chunks=1)))
    >>> found.mean, found.var()
    (array([2., 4.]), array([1., 4.]))
    """
    dtype = _dtype_of_result(x, None)
    kept = np.lib.array_utils.normalize_axis_tuple(channel_axis, x.ndim, "channel_axis")
    packed = _packed(x, tuple(axis for axis in range(x.ndim) if axis not in kept), False, split_every, dtype)
    meta = np.empty((0,) * packed.ndim)
    return Moments(*(da.map_blocks(part, packed, dtype=np.float64, meta=meta) for part in (_count, _mean, _m2)))


# --- the tree ---------------------------------------------------------------------------------------------------------


def _packed(x: Any, axis: Axes, keepdims: bool, split_every: Any, dtype: Any, *, skipna: bool = False) -> Any:
    """A lazy array of counts, means in two parts and sums of squares, masked if x is."""
    axes = tuple(range(x.ndim)) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, x.ndim, "axis")
    if dtype.itemsize == 8 and validation.is_float(x.dtype):
        x = x.astype(np.float64)  # sums of float32 are good to 1e-7, those of integers to float64's digits
    return da.reduction(
        x, partial(_of_block, masked=_is_masked(x), skipna=skipna), _merged, axis=axes, keepdims=keepdims, dtype=PACKED,
        split_every=split_every, combine=_merged, name="fastbn-moments", concatenate=False,
        meta=np.empty((0,) * (x.ndim if keepdims else x.ndim - len(axes)), PACKED),
    )  # fmt: skip


def _of_block(block: Any, axis: tuple[int, ...], keepdims: bool, masked: bool, skipna: bool) -> Any:
    """The leaves; reduced axes stay."""
    mask, values = np.ma.getmask(block), np.asarray(np.ma.getdata(block))
    where = None if mask is np.ma.nomask else ~mask
    if skipna and validation.is_float(values.dtype):
        numbers = ~np.isnan(values)
        if not numbers.all():  # a mask costs several times what asking does
            where = numbers if where is None else where & numbers
    kept = tuple(a for a in range(values.ndim) if a not in axis)
    with fastbn.threads.num_threads(1):
        parts = _in_two_parts(values, kept, None if where is None else np.asarray(where))
    packed = np.empty([1 if a in axis else size for a, size in enumerate(values.shape)], PACKED)
    _fill(packed, (np.reshape(part, packed.shape) for part in parts))
    return _marked(packed, masked or isinstance(block, np.ma.MaskedArray))


def _in_two_parts(values: Any, kept: tuple[int, ...], where: Any) -> tuple[Any, Any, Any, Any]:
    """Count, mean as hi + lo, m2; lo from a second look, around hi, at those blocks for which it matters."""
    found = fastbn.moments(values, channel_axis=kept, where=where)
    lo = np.zeros_like(found.mean)
    in_float64 = values.itemsize == 8 or not validation.is_float(values.dtype)
    if in_float64 and (np.abs(found.mean) > FAR * found.std()).any():
        reduced = tuple(a for a in range(values.ndim) if a not in kept)
        with np.errstate(over="ignore", invalid="ignore"):
            around = values - np.expand_dims(found.mean, reduced)
        rest = fastbn.moments(around, channel_axis=kept, where=where).mean
        lo = np.where(np.isfinite(rest), rest, 0.0)
    return found.count, found.mean, lo, found.m2


def _merged(parts: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """The branches and the root: parts in their order, whatever was ready first."""
    listed: list[Any] = list(flatten(parts, container=list)) if isinstance(parts, list) else [parts]
    shape = listed[0].shape
    if not keepdims:
        shape = tuple(n for a, n in enumerate(shape) if a not in axis)
    flat = [np.ma.getdata(part).reshape(-1) for part in listed]
    whole = np.empty(flat[0].shape, PACKED)
    for start in range(0, whole.size, CHANNELS_AT_ONCE):
        piece = slice(start, start + CHANNELS_AT_ONCE)
        pieces: Any = ([part[name][piece] for name in NAMES] for part in flat)
        _fill(whole[piece], united(np, pieces))
    return _marked(whole.reshape(shape), any(map(np.ma.isMaskedArray, listed)))


def _fill(packed: Any, parts: Iterable[Any]) -> None:
    for name, part in zip(NAMES, parts, strict=True):
        packed[name] = part


def _marked(packed: Any, masked: bool) -> Any:
    """That it is a masked array, of which nothing is masked, says that the result will be one."""
    return packed.view(np.ma.MaskedArray) if masked else packed


# --- results ----------------------------------------------------------------------------------------------------------


def _result(of: Callable[..., Any], x: Any, packed: Any, dtype: Any, *, ddof: float = 0) -> Any:
    """A lazy statistic; masked where no more than ddof elements count, if x is masked."""
    meta = np.empty((0,) * packed.ndim, dtype)
    result = da.map_blocks(partial(_finished, of=of, ddof=ddof, kind=dtype), packed, dtype=dtype, meta=meta)
    if _is_masked(x):
        result._meta = meta.view(np.ma.MaskedArray)  # map_blocks itself takes no masked one without dimensions
    return result


def _finished(packed: Any, of: Callable[..., Any], ddof: float, kind: Any) -> Any:
    with np.errstate(all="ignore"):  # a lazy warning would come from somewhere else
        value = of(packed, ddof).astype(kind)
    if isinstance(packed, np.ma.MaskedArray):
        value = np.ma.MaskedArray(value, mask=_count(packed) <= ddof)
    return value[()]


def _is_masked(x: Any) -> bool:
    return isinstance(x._meta, np.ma.MaskedArray)


def _count(packed: Any) -> Any:
    return np.ma.getdata(packed)["count"]


def _mean(packed: Any, ddof: float = 0) -> Any:
    parts = np.ma.getdata(packed)
    return np.asarray(parts["hi"] + parts["lo"])


def _m2(packed: Any) -> Any:
    return np.ma.getdata(packed)["m2"]


def _var(packed: Any, ddof: float) -> Any:
    """NaN or infinity, as NumPy's, where nothing is left to divide by."""
    return _m2(packed) / np.maximum(_count(packed) - ddof, 0)


def _std(packed: Any, ddof: float) -> Any:
    return np.sqrt(_var(packed, ddof))


def _nanvar(packed: Any, ddof: float) -> Any:
    """NaN, as `numpy.nanvar`'s, also where the divisor would be 0."""
    return np.where(_count(packed) > ddof, _var(packed, ddof), np.nan)


def _nanstd(packed: Any, ddof: float) -> Any:
    return np.sqrt(_nanvar(packed, ddof))


# --- checks -----------------------------------------------------------------------------------------------------------


def _dtype_of_result(x: Any, dtype: Any) -> Any:
    """A check of x and dtype."""
    if not isinstance(x, da.Array):
        raise TypeError(f"x: expected a dask.array.Array, got {type(x).__name__}")
    if x.dtype.kind not in "biu" and not validation.is_float(x.dtype):
        raise TypeError(f"x: expected real numbers, got {x.dtype}; known are integers and floats of up to 64 bits")
    if dtype is None:
        return x.dtype.newbyteorder("=") if validation.is_float(x.dtype) else np.dtype(np.float64)
    dtype = np.dtype(dtype)
    if not validation.is_float(dtype):
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    return dtype


def _degrees(ddof: Any, correction: Any) -> float:
    if correction is None:
        return validation.real("ddof", ddof)
    if ddof != 0:
        raise ValueError("correction: expected ddof or correction, got both")
    return validation.real("correction", correction)
