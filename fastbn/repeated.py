"""Calls like an earlier one: same kinds, shapes, strides, dtypes and options, so that nothing is left to check.

A training loop makes the same calls again and again. The first goes the documented way, through every check; from what
that found, a function of the arrays alone is kept, which takes a fifth of the time. Backends make it (``again.py``), or
None where arrays are out of the ordinary: masks, weights, synchronised statistics, channels on several axes, slices.
What it returns is None where the arrays at hand cannot take the short way, as when `out` overlaps an input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn.saved import Saved

Call = Callable[..., Any]

MOST = 4096  # calls remembered, for programs whose shapes never repeat
_calls: dict[Any, Call | None] = {}


def find(key: Any) -> Call | None:
    """What was remembered, if anything."""
    try:
        return _calls.get(key)
    except TypeError:  # an activation that cannot be hashed
        return None


def remember(key: Any, call: Call | None) -> None:
    """Keep what was made for a key."""
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[key] = call


def forget() -> None:
    """Drop everything remembered, for those who change how work is divided."""
    _calls.clear()


# --- what two calls must share ----------------------------------------------------------------------------------------


def _data(a: Any) -> Any:
    return None if a is None else (type(a), a.shape, a.strides, a.dtype)


def _parameter(a: Any) -> Any:
    return None if a is None else (type(a), a.shape, a.strides, a.dtype)


def forward_key(
    x: Any, gamma: Any, beta: Any, channel_axis: Any, eps: Any, residual: Any, activation: Any, out: Any
) -> Any:
    """The key of a call of `batch_norm`; None for arguments out of the ordinary, among them wrong ones."""
    try:
        if type(channel_axis) is not int or type(eps) is not float:
            return None
        return (
            type(x), x.shape, x.strides, x.dtype, _parameter(gamma), _parameter(beta),
            channel_axis, eps, activation, _data(residual), _data(out),
        )  # fmt: skip
    except AttributeError:
        return None


def backward_key(dy: Any, saved: Any, out: Any) -> Any:
    """The same of `batch_norm_backward`."""
    try:
        x, y, gamma, weight, moments, mean, rstd, count, channel_axis, activation, has_residual, gathered = saved
        if weight is not None or gathered or type(saved) is not Saved or type(channel_axis) is not int:
            return None
        return (
            moments is None, type(dy), dy.shape, dy.strides, dy.dtype, type(x), x.shape, x.strides, x.dtype,
            _data(y), _parameter(gamma), _parameter(mean), _parameter(rstd), _parameter(count),
            channel_axis, activation, has_residual, _data(out),
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        return None


def inference_key(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any,
    channel_axis: Any, eps: Any, residual: Any, activation: Any, out: Any,
) -> Any:  # fmt: skip
    """The same of `batch_norm_inference`."""
    try:
        if type(channel_axis) is not int or type(eps) is not float:
            return None
        return (
            type(x), x.shape, x.strides, x.dtype, _parameter(mean), _parameter(var), _parameter(gamma),
            _parameter(beta), channel_axis, eps, activation, _data(residual), _data(out),
        )  # fmt: skip
    except AttributeError:
        return None
