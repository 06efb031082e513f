"""`nanmean`, `nanvar` and `nanstd`: statistics of what is not NaN, with NumPy's signatures and warnings."""

from __future__ import annotations

from typing import Any

from fastbn.reduction_calls import degrees_of, mean_call, spread_call


def nanmean(
    x: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, *, where: Any = True
) -> Any:
    """Mean of what is not NaN: `numpy.nanmean`, accurate, parallel and in one pass, without a mask array.

    Parameters
    ----------
    x, axis, dtype, out, keepdims, where
        As for `mean`.

    Returns
    -------
    array or scalar

    Raises
    ------
    TypeError
        As `mean`; an integer `dtype` or `out` for floats.
    ValueError, numpy.exceptions.AxisError
        As `mean`.

    Notes
    -----
    A slice of nothing but NaNs gives NaN and NumPy's RuntimeWarning.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.nanmean([[1.0, np.nan], [3.0, 5.0]], axis=0)
    array([2., 5.])
    """
    return mean_call("nanmean", x, axis, dtype, out, keepdims, where)


def nanvar(
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
    """Variance of what is not NaN: `numpy.nanvar`, accurate, parallel and in one pass, without a mask array.

    Parameters
    ----------
    x, axis, dtype, out, keepdims, where
        As for `mean`.
    ddof, mean, correction
        As for `var`.

    Returns
    -------
    array or scalar

    Raises
    ------
    TypeError
        As `mean`; an integer `dtype` or `out` for floats.
    ValueError, numpy.exceptions.AxisError
        As `var`.

    Notes
    -----
    A slice of no more numbers than `ddof` gives NaN and NumPy's RuntimeWarning.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.nanvar([1.0, np.nan, 3.0, 5.0], ddof=1)
    np.float64(4.0)
    """
    return spread_call("nanvar", x, axis, dtype, out, degrees_of(ddof, correction), keepdims, where, mean)


def nanstd(
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
    """Standard deviation of what is not NaN, ``sqrt(nanvar(...))``: `numpy.nanstd`, accurate, parallel and in one pass.

    Parameters
    ----------
    x, axis, dtype, out, keepdims, where
        As for `mean`.
    ddof, mean, correction
        As for `var`.

    Returns
    -------
    array or scalar

    Raises
    ------
    TypeError
        As `mean`; an integer `dtype` or `out` for floats.
    ValueError, numpy.exceptions.AxisError
        As `var`.

    Notes
    -----
    That of `nanvar`, rounded once.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.nanstd([1.0, np.nan, 5.0])
    np.float64(2.0)
    """
    return spread_call("nanstd", x, axis, dtype, out, degrees_of(ddof, correction), keepdims, where, mean)
