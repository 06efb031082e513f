"""The short way of statistics like earlier ones (see `repeated`): NumPy arrays that lie alike, with plain options.

What is out of the ordinary is found after the sums (a variance beyond its dtype's range, squares beyond float64's) and
goes the documented way then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn import arguments, call
from fastbn.layout import Layout, layout_of
from fastbn.merging import Moments
from fastbn.operands import Ways

Key = tuple[Any, ...]
Finish = Callable[["Prepared", Any], Any]
LEAST, MOST = 1e-290, 1e300  # of sums of squares in float64, between which no square has left its range


class Prepared:
    """What is known before the numbers: ``prepared(x)`` gives the result, or None."""

    def __init__(
        self, x: Any, layout: Layout, table_of: Any, shape: tuple[int, ...], ddof: float, finish: Finish
    ) -> None:
        self.layout, self.shape, self.dtype = layout, shape, x.dtype
        self.divisor = x.size / (layout.folded[0] * layout.folded[2]) - ddof
        largest = MOST if x.dtype == np.float64 else 3e38 if x.itemsize == 4 or x.dtype.name == "bfloat16" else 65504.0
        self.most = min(MOST, largest * self.divisor)
        self._table_of, self._finish = table_of, finish

    def __call__(self, x: Any) -> Any:
        return self._finish(self, self._table_of(x, None))


def key_of(what: str, x: Any, axis: Any, dtype: Any, out: Any, keepdims: Any, where: Any, ddof: Any = 0) -> Key | None:
    """What decides a result's shape, dtype and plan; None for calls out of the ordinary."""
    if type(x) is not np.ndarray or dtype is not None or out is not None or where is not True:
        return None
    if not (axis is None or type(axis) is int or (type(axis) is tuple and all(type(a) is int for a in axis))):
        return None
    if type(ddof) not in (int, float) or type(keepdims) not in (int, bool):
        return None
    return what, x.shape, x.strides, x.dtype, x.flags.aligned, axis, keepdims, ddof


def find(key: Key | None, x: Any) -> Any:
    """The result, if a call like this one was prepared and its numbers are ordinary."""
    made = None if key is None else call.find(key)
    return None if made is None else made(x)


def remember(backend: Any, key: Key, x: Any, kept: frozenset[int], shape: tuple[int, ...], ddof: float = 0) -> None:
    """Prepare for calls like this one, whose arguments are right; also that they have no short way."""
    if call.find(key) is not None:
        return
    made: Callable[[Any], Any] = _no_short_way
    if arguments.is_float(x.dtype) and x.dtype.isnative and x.size > 0:
        layout = layout_of(x.shape, x.strides, kept)
        x_, to_x = Ways(backend, layout, x).data(x)
        if to_x is None and x_ is not None:
            prepared = Prepared(x, layout, backend.moments(x_, None), shape, ddof, _FINISH[key[0]])
            made = prepared if prepared.divisor > 0 else made
    call.keep(key, made)


def _no_short_way(x: Any) -> None:
    """Of arrays that kernels cannot walk, of integers, of more degrees of freedom than elements."""


# --- from the table (count, M2, mean, rstd) ---------------------------------------------------------------------------


def _mean(p: Prepared, table: Any) -> Any:
    if p.shape == ():
        return p.dtype.type(table[1][0])
    return p.layout.kept_array(np, table[1]).astype(p.dtype).reshape(p.shape)


def _variance(p: Prepared, table: Any) -> Any:
    """In float64; None where a square, or it, is out of range, or there are NaNs."""
    m2 = table[2]
    if p.shape == ():
        number = float(m2[0])
        return number / p.divisor if LEAST < number < p.most else None
    if not (m2.min() > LEAST and m2.max() < p.most):
        return None
    return p.layout.kept_array(np, m2 / p.divisor).reshape(p.shape)


def _var(p: Prepared, table: Any) -> Any:
    return _cast(p, _variance(p, table))


def _std(p: Prepared, table: Any) -> Any:
    variance = _variance(p, table)
    return None if variance is None else _cast(p, math.sqrt(variance) if p.shape == () else np.sqrt(variance))


def _mean_var(p: Prepared, table: Any) -> Any:
    variance = _var(p, table)
    return None if variance is None else (_mean(p, table), variance)


def _moments(p: Prepared, table: Any) -> Moments:
    count, mean, m2, _ = (p.layout.kept_array(np, row) for row in table)
    return Moments(count, mean, m2)


def _cast(p: Prepared, value: Any) -> Any:
    if value is None:
        return None
    return p.dtype.type(value) if p.shape == () else value.astype(p.dtype, copy=False)


_FINISH: dict[str, Finish] = {"mean": _mean, "var": _var, "std": _std, "mean_var": _mean_var, "moments": _moments}
