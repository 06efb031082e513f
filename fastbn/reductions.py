"""Statistics: `mean`, `var`, `std` as drop-ins for NumPy's, `mean_var` and `moments` in one pass.

Accumulation is by corrected two-pass sums in chunks, merged by Chan's update in float64 (``cpu/kernels/rows.py``):
float32 data with a mean 50 000 times their deviation keep a mean good to 1e-7 and a variance good to 1e-6.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastbn import prepare_reductions
from fastbn.arrays import is_foreign, kind_of
from fastbn.call import Unlike, axes_of, describe, find, keep, number_of
from fastbn.merging import Moments
from fastbn.prepare_reductions import Options, statistic

__all__ = ["mean", "mean_var", "moments", "std", "var"]


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
    if type(x) is not np.ndarray:
        x = _array(x)
    where, keepdims = _mask(where), _given(keepdims, False)
    axes, number = _normal(axis)
    signature = "mean", describe(x, where, out), axes, dtype, keepdims, type(keepdims)
    run = find(signature)
    if run is None:
        options = _options(axes, number, axis, dtype, keepdims)
        run = keep(signature, statistic("mean", x, where, None, None, out, options))
    return run(x, where, None, None, out)


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
    return _spread("var", x, axis, dtype, out, _degrees(ddof, correction), keepdims, where, mean)


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
    return _spread("std", x, axis, dtype, out, _degrees(ddof, correction), keepdims, where, mean)


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
    if type(x) is not np.ndarray:
        x = _array(x)
    where, keepdims, correction = _mask(where), _given(keepdims, False), _given(correction, 0)
    axes, number = _normal(axis, correction)
    signature = "mean_var", describe(x, where, weights), axes, number, keepdims, type(keepdims)
    run = find(signature)
    if run is None:
        options = _options(axes, number, axis, None, keepdims, correction)
        run = keep(signature, statistic("mean_var", x, where, weights, None, None, options))
    both: tuple[Any, Any] = run(x, where, weights, None, None)
    return both


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
    if type(x) is not np.ndarray:
        x = _array(x)
    signature = (
        "moments", describe(x, where, weights), axes_of(channel_axis),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_reductions.moments(x, where, weights, channel_axis))
    found: Moments = run(x, where, weights)
    return found


# --- what the NumPy drop-ins share ------------------------------------------------------------------------------------


def _spread(
    what: str, x: Any, axis: Any, dtype: Any, out: Any, ddof: Any, keepdims: Any, where: Any, given: Any
) -> Any:
    """The variance, or its root."""
    if type(x) is not np.ndarray:
        x = _array(x)
    where, keepdims, given = _mask(where), _given(keepdims, False), _given(given, None)
    number = isinstance(given, (int, float))
    axes, divided_by = _normal(axis, ddof)
    signature = (
        what, describe(x, where, None if number else given, out), type(given) if number else None, axes, dtype,
        divided_by, keepdims, type(keepdims),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        options = _options(axes, divided_by, axis, dtype, keepdims, ddof)
        run = keep(signature, statistic(what, x, where, None, given, out, options))
    return run(x, where, None, given, out)


def _array(x: Any) -> Any:
    """Lists and scalars as NumPy takes them; foreign arrays are refused."""
    cupy = sys.modules.get("cupy")
    if isinstance(x, np.memmap) or (cupy is not None and isinstance(x, cupy.ndarray)):
        return x
    if is_foreign(x):
        kind_of("x", x)  # raises, naming what to pass instead
    return np.asarray(x)


def _normal(axis: Any, ddof: Any = 0) -> tuple[Any, Any]:
    """Both as a signature has them."""
    return (
        axis if axis is None or type(axis) is int else axes_of(axis),
        ddof if type(ddof) is int else number_of(ddof),
    )


def _options(axis: Any, ddof: Any, given_axis: Any, dtype: Any, keepdims: Any, given_ddof: Any = 0) -> Options:
    """What was normalized if it could be, else what was given: then the call is not kept."""
    return Options(
        given_axis if type(axis) is Unlike else axis, dtype, keepdims, given_ddof if type(ddof) is Unlike else ddof
    )


def _mask(where: Any) -> Any:
    """None for True, which leaves nothing out; None itself is no mask."""
    if where is True or where is np._NoValue:
        return None
    return np.asarray(None) if where is None else where


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
