"""Statistics in the place of NumPy's: `mean`, `var`, `std`, `average`; `mean_var` and `moments`.

Sums are in float64, those of squares around values near the mean, and arrays are read where they lie, in whatever
dtype (``cpu/kernels/statistics.py``); GPUs add up groups of narrower floats in float32 (``cuda/include/sums.cuh``).
So float32 data with a mean 50 000 times their deviation keep a mean good to 1e-7 and a variance good to 1e-6. `moments`
of floats in layouts that batch norm walks are batch norm's, bit by bit: chunks of narrower floats are summed in
float32, and merged in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn import prepare_reductions
from fastbn.arrays import device_of
from fastbn.call import axes_of, describe, find, keep
from fastbn.merging import Moments, namespace
from fastbn.prepare_reductions import statistic
from fastbn.reduction_calls import (
    array_beside,
    array_of,
    degrees_of,
    mask_of,
    mean_call,
    normalized,
    options_of,
    or_default,
    spread_call,
)

__all__ = ["average", "mean", "mean_var", "moments", "std", "var"]


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
    return mean_call("mean", x, axis, dtype, out, keepdims, where)


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
    return spread_call("var", x, axis, dtype, out, degrees_of(ddof, correction), keepdims, where, mean)


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
    return spread_call("std", x, axis, dtype, out, degrees_of(ddof, correction), keepdims, where, mean)


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
        Those of `mean` and `var`, bit by bit: of NumPy arrays float64 and integers of 64 bits are read twice for that.

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
        x = array_of(x)
    where, keepdims, correction = mask_of(where, x), or_default(keepdims, False), or_default(correction, 0)
    axes, number = normalized(axis, correction)
    if weights is not None:
        weights = array_beside(weights, x)
    signature = "mean_var", describe(x, where, weights), axes, number, keepdims, type(keepdims)
    run = find(signature)
    if run is None:
        options = options_of(axes, number, axis, None, keepdims, correction)
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
        x = array_of(x)
    signature = (
        "moments", describe(x, where, weights), axes_of(channel_axis),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_reductions.moments(x, where, weights, channel_axis))
    found: Moments = run(x, where, weights)
    return found


# --- with weights -----------------------------------------------------------------------------------------------------


def average(x: Any, axis: Any = None, weights: Any = None, returned: bool = False, *, keepdims: bool = False) -> Any:
    """Weighted average over axes: `numpy.average`, with sums in float64.

    Parameters
    ----------
    x, axis, keepdims
        As for `mean`.
    weights : array_like, optional
        Real numbers of x's shape, or of the shape of the axes reduced, in their order. By default all weigh the same.
    returned : bool
        Return the sums of the weights, too.

    Returns
    -------
    average : array or scalar
        ``sum(weights * x) / sum(weights)``, in the dtype to which x and the weights promote, for integers float64.
    sum_of_weights : array or scalar
        Of the same shape, if `returned`.

    Raises
    ------
    ZeroDivisionError
        Weights whose sum is zero.
    TypeError
        Complex and other weights that are no real numbers; weights of another shape than x's without an axis;
        otherwise as `mean`.
    ValueError
        Weights that have not the shape of the axes.

    Notes
    -----
    What weighs zero is left out, infinite or NaN as it may be, where NumPy's product of them is NaN. Weights that are
    negative, infinite or NaN are multiplied as in NumPy, in float64.

    See Also
    --------
    mean_var : mean and variance with weights that broadcast to x.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.average([[1.0, 2.0], [3.0, 6.0]], axis=1, weights=[1, 3])
    array([1.75, 5.25])
    """
    keepdims = or_default(keepdims, False)
    if type(x) is not np.ndarray:
        x = array_of(x)
    if weights is None:
        result = mean(x, axis, keepdims=keepdims)
        scale = np.asarray(result) if isinstance(result, np.generic) else result
        number = x.size // max(1, scale.size)
        return (result, _like(scale, number)) if returned else result
    weights = array_beside(weights, x)
    normal, _ = normalized(axis)
    signature = "average", describe(x, weights), normal, keepdims, type(keepdims)
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_reductions.average(x, weights, axis, keepdims))
    result, scale = run(x, weights)
    if not returned:
        return result
    with device_of(x):
        return result, scale.astype(result.dtype)


def _like(a: Any, number: int) -> Any:
    """A number in an array's shape and dtype."""
    with device_of(a):
        full = namespace(a).full_like(a, number)
    return full[()] if isinstance(full, np.ndarray) else full
