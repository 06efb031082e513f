"""Statistics of dask arrays, larger than memory: tree reductions over blocks, by fastbn's kernels.

Each block gives count, mean and sum of squared distances from the mean, in float64; these are merged pair by pair (Chan
et al. 1979) along the tree. So results are as accurate as those of an array in memory, whatever the mean and the
chunks. All is lazy until ``compute``; a mean and a variance that are computed together read the blocks once. Blocks are
taken one thread each: dask has as many at work as there are cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

import fastbn
from fastbn.merging import Moments

try:
    import dask.array as da
    from dask.core import flatten
except ImportError as error:
    raise ImportError("fastbn.dask needs dask, which is not installed: pip install 'fastbn[dask]'") from error

__all__ = ["mean", "mean_var", "moments", "std", "var"]

Axes = int | tuple[int, ...] | None
NAMES = Moments._fields
PACKED = np.dtype([(name, np.float64) for name in NAMES])


def mean(x: Any, axis: Axes = None, *, keepdims: bool = False, split_every: Any = None) -> Any:
    """The mean over axes.

    Parameters
    ----------
    x : dask.array.Array
        Of real numbers, chunked in any way.
    axis : int or tuple of int, optional
        The axes reduced; all.
    keepdims : bool, optional
        Whether these stay, with size 1.
    split_every : int or dict, optional
        How many blocks are merged at once, as for `dask.array.reduction`.

    Returns
    -------
    dask.array.Array
        In x's dtype, float64 for integers.

    Raises
    ------
    TypeError
        For what is no dask array of real numbers.
    numpy.exceptions.AxisError
        For axes that x does not have.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(10, chunks=4)
    >>> float(fastbn.dask.mean(x).compute())
    4.5
    """
    return _packed(x, axis, keepdims, split_every)["mean"].astype(_kind(x))


def var(x: Any, axis: Axes = None, *, correction: float = 0, keepdims: bool = False, split_every: Any = None) -> Any:
    """The variance over axes: the sum of squared distances from the mean, divided by the count less `correction`.

    Parameters
    ----------
    x, axis, keepdims, split_every
        As for `mean`.
    correction : float, optional
        1 for the unbiased estimate.

    Returns
    -------
    dask.array.Array

    Raises
    ------
    TypeError, numpy.exceptions.AxisError
        As `mean`.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.from_array([[1e8, 1e8 + 2], [3e8, 3e8 + 4]], chunks=1)
    >>> fastbn.dask.var(x, axis=1).compute()
    array([1., 4.])
    """
    return _variance(_packed(x, axis, keepdims, split_every), correction).astype(_kind(x))


def std(x: Any, axis: Axes = None, *, correction: float = 0, keepdims: bool = False, split_every: Any = None) -> Any:
    """The standard deviation over axes: the square root of `var`, with its parameters.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> float(fastbn.dask.std(da.from_array([1.0, 5.0], chunks=1)).compute())
    2.0
    """
    return np.sqrt(_variance(_packed(x, axis, keepdims, split_every), correction)).astype(_kind(x))


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
    packed, kind = _packed(x, axis, keepdims, split_every), _kind(x)
    return packed["mean"].astype(kind), _variance(packed, correction).astype(kind)


def moments(x: Any, *, channel_axis: int | tuple[int, ...] = 1, split_every: Any = None) -> Moments:
    """Count, mean and sum of squared distances of each channel, as `fastbn.moments` gives them, but lazy.

    Parameters
    ----------
    x : dask.array.Array
        As for `mean`.
    channel_axis : int or tuple of int, optional
        The axes kept.
    split_every : int or dict, optional
        As for `mean`.

    Returns
    -------
    fastbn.Moments
        Of dask arrays in float64; ``dask.compute`` gives one of NumPy arrays, for `fastbn.merge` and `update_running`.

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
    _check(x)
    kept = np.lib.array_utils.normalize_axis_tuple(channel_axis, x.ndim, "channel_axis")
    packed = _packed(x, tuple(axis for axis in range(x.ndim) if axis not in kept), False, split_every)
    return Moments(*(packed[name] for name in NAMES))


# --- the tree ---------------------------------------------------------------------------------------------------------


def _packed(x: Any, axis: Axes, keepdims: bool, split_every: Any) -> Any:
    """A lazy array of counts, means and sums of squares."""
    _check(x)
    axes = tuple(range(x.ndim)) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, x.ndim, "axis")
    return da.reduction(
        x, _of_block, _merged, axis=axes, keepdims=keepdims, dtype=PACKED, split_every=split_every,
        combine=_merged, name="fastbn-moments", concatenate=False, meta=np.empty((0,) * x.ndim, PACKED),
    )  # fmt: skip


def _of_block(block: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """The leaves; reduced axes stay."""
    block = np.asarray(block)
    values = block if block.dtype.kind in "fV" else block.astype(np.float64)
    with _one_thread():
        found = fastbn.moments(values, channel_axis=tuple(a for a in range(block.ndim) if a not in axis))
    shape = tuple(1 if a in axis else size for a, size in enumerate(block.shape))
    return _pack(Moments(*(np.reshape(part, shape) for part in found)))


def _merged(parts: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """The branches and the root: parts in their order, whatever was ready first."""
    listed: Iterable[Any] = flatten(parts, container=list) if isinstance(parts, list) else [parts]
    whole = _pack(fastbn.merge(*(Moments(*(part[name] for name in NAMES)) for part in listed)))
    return whole if keepdims else whole.reshape([n for a, n in enumerate(whole.shape) if a not in axis])


def _pack(found: Moments) -> Any:
    packed = np.empty(np.shape(found.mean), PACKED)
    for name, part in zip(NAMES, found, strict=True):
        packed[name] = part
    return packed


class _one_thread:
    """Numba's number of threads, which is each thread's own, is 1 within."""

    def __enter__(self) -> None:
        import numba

        self.before = numba.get_num_threads()
        numba.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        import numba

        numba.set_num_threads(self.before)


def _variance(packed: Any, correction: float) -> Any:
    """NaN where nothing is left to divide by, without a warning: a lazy one would come from somewhere else."""
    return da.map_blocks(_divided, packed, correction, dtype=np.float64)


def _divided(packed: Any, correction: float) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return packed["m2"] / np.maximum(packed["count"] - correction, 0)


def _kind(x: Any) -> Any:
    return x.dtype if x.dtype.kind in "fV" else np.dtype(np.float64)


def _check(x: Any) -> None:
    if not isinstance(x, da.Array):
        raise TypeError(f"x: expected a dask.array.Array, got {type(x).__name__}")
    if x.dtype.kind not in "biufV":
        raise TypeError(f"x: expected real numbers, got {x.dtype}")
