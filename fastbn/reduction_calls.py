"""What the statistics that take NumPy's place share: arguments as NumPy has them; calls that are found or prepared."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastbn.arrays import device_of, is_foreign, kind_of
from fastbn.call import Unlike, axes_of, describe, find, keep, number_of
from fastbn.merging import namespace
from fastbn.prepare_reductions import statistic
from fastbn.reduction_validation import ReductionOptions, check_keepdims


def mean_call(name: str, x: Any, axis: Any, dtype: Any, out: Any, keepdims: Any, where: Any) -> Any:
    if type(x) is not np.ndarray:
        x = array_of(x)
    where, keepdims = mask_of(where, x), or_default(keepdims, False)
    axes, number = normalized(axis)
    signature = name, describe(x, where, out), axes, dtype, keepdims, type(keepdims)
    run = find(signature)
    if run is None:
        options = options_of(axes, number, axis, dtype, keepdims, 0, name == "nanmean")
        run = keep(signature, statistic("mean", x, where, None, None, out, options))
    return run(x, where, None, None, out)


def spread_call(
    name: str, x: Any, axis: Any, dtype: Any, out: Any, ddof: Any, keepdims: Any, where: Any, given: Any
) -> Any:
    """The variance, or its root."""
    if type(x) is not np.ndarray:
        x = array_of(x)
    where, keepdims, given = mask_of(where, x), or_default(keepdims, False), or_default(given, None)
    number = isinstance(given, (int, float))
    axes, divided_by = normalized(axis, ddof)
    signature = (
        name, describe(x, where, None if number else given, out), type(given) if number else None, axes, dtype,
        divided_by, keepdims, type(keepdims),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        options = options_of(axes, divided_by, axis, dtype, keepdims, ddof, name.startswith("nan"))
        run = keep(signature, statistic(name.removeprefix("nan"), x, where, None, given, out, options))
    return run(x, where, None, given, out)


def array_of(x: Any) -> Any:
    """Lists and scalars as NumPy takes them; foreign arrays are refused."""
    cupy = sys.modules.get("cupy")
    if isinstance(x, np.memmap) or (cupy is not None and isinstance(x, cupy.ndarray)):
        return x
    if is_foreign(x):
        kind_of("x", x)  # raises, naming what to pass instead
    return np.asarray(x)


def normalized(axis: Any, ddof: Any = 0) -> tuple[Any, Any]:
    """Both as a signature has them."""
    return (
        axis if axis is None or type(axis) is int else Unlike() if isinstance(axis, bool) else axes_of(axis),
        ddof if type(ddof) is int else number_of(ddof),
    )


def options_of(
    axis: Any, ddof: Any, given_axis: Any, dtype: Any, keepdims: Any, given_ddof: Any = 0, skip_nan: bool = False
) -> ReductionOptions:
    """What was normalized if it could be, else what was given: then the call is not kept."""
    if isinstance(given_axis, bool):
        raise TypeError(f"axis: expected an int or a tuple of ints, got {given_axis}")
    check_keepdims(keepdims)
    if isinstance(given_ddof, int) and abs(given_ddof) > sys.float_info.max:
        raise ValueError("ddof: expected a number that a float64 can be, got an int beyond it")
    axis, ddof = given_axis if type(axis) is Unlike else axis, given_ddof if type(ddof) is Unlike else ddof
    return ReductionOptions(axis, dtype, keepdims, ddof, skip_nan)


def mask_of(where: Any, x: Any) -> Any:
    """An array of x's kind; None for True, which leaves nothing out. None itself is no mask."""
    if where is True or where is np._NoValue or where is np.True_:
        return None
    return np.asarray(None) if where is None else array_beside(where, x)


def array_beside(values: Any, x: Any) -> Any:
    """Lists and scalars as an array of x's kind; arrays as they are."""
    if type(values) is np.ndarray or is_foreign(values):
        return values
    values = np.asarray(values)
    with device_of(x):
        return values if isinstance(x, np.ndarray) else namespace(x).asarray(values)


def or_default(value: Any, default: Any) -> Any:
    """A keyword's value, or its default for ``numpy._NoValue``, which NumPy's wrappers pass on for what is left out."""
    return default if value is np._NoValue else value


def degrees_of(ddof: float, correction: float | None) -> float:
    correction = or_default(correction, None)
    if correction is None:
        return ddof
    if ddof != 0:
        raise ValueError("correction: expected ddof or correction, got both")
    return correction
