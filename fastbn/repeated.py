"""Calls like an earlier one: same kinds, shapes, strides, dtypes and options, so that nothing is left to check.

A training loop makes the same calls again and again. The first goes the documented way, through every check; from what
that found, a function of the arrays alone is kept, which takes a fifth of the time. These functions make it, or return
None where arrays are out of the ordinary: masks, weights, synchronised statistics, channels on several axes, slices.
What it returns is None where the arrays at hand cannot take the short way, as when `out` overlaps an input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn.layout import Layout
from fastbn.merging import Moments
from fastbn.saved import Gradients, Saved

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
    return None if a is None else (type(a), a.shape, a.dtype)


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
        x, y, gamma, weight, moments, mean, _, _, channel_axis, activation, has_residual, gathered = saved
        if weight is not None or gathered or type(saved) is not Saved or type(channel_axis) is not int:
            return None
        return (
            moments is None, type(dy), dy.shape, dy.strides, dy.dtype, type(x), x.shape, x.strides, x.dtype,
            _data(y), _parameter(gamma), _parameter(mean), channel_axis, activation, has_residual, _data(out),
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
            type(x), x.shape, x.strides, x.dtype, type(mean), mean.shape, mean.dtype, type(var), var.shape, var.dtype,
            _parameter(gamma), _parameter(beta), channel_axis, eps, activation, _data(residual), _data(out),
        )  # fmt: skip
    except AttributeError:
        return None


# --- the short way ----------------------------------------------------------------------------------------------------


def forward(backend: Any, layout: Layout, saved: Saved, x: Any, eps: float, residual: Any, out: Any) -> Call | None:
    """``call(x, gamma, beta, residual, out)`` does what `batch_norm` does."""
    dense: Any = backend.dense(layout, x, residual, out)
    if dense is None or len(layout.kept_shape) != 1:
        return None
    flat, usable, empty_like, past_caches, small = dense
    xp = backend.xp
    channels, run = layout.kept_shape[0], backend.dense_forward(layout.folded, x, residual)
    simple = small and residual is None and out is None
    relu, channel_axis, activation = (saved.activation is not None) or None, saved.channel_axis, saved.activation

    def call(x: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> tuple[Any, Saved] | None:
        if not x.flags.behaved or out is x or not (simple or usable(out, x, residual, gamma, beta)):
            return None
        table = xp.empty((6, channels))
        count, m2, mean, rstd, scale, shift = table
        scale[...] = 1.0 if gamma is None else gamma
        shift[...] = 0.0 if beta is None else beta
        y = empty_like(x) if out is None else out
        rest = None if residual is None else flat(residual)
        run(flat(x), None, flat(y), rest, table.ravel(), eps, relu, past_caches(y))
        return y, Saved(
            x, None if relu is None else y, gamma, None, Moments(count, mean, m2), mean, rstd, count,
            channel_axis, activation, residual is not None, False,
        )  # fmt: skip

    return call


def backward(backend: Any, layout: Layout, saved: Saved, dy: Any, out: Any) -> Call | None:
    """``call(dy, saved, out)`` does what `batch_norm_backward` does, without dmean and dvar."""
    x, y = saved.x, saved.y
    dense: Any = backend.dense(layout, x, dy, y, out)
    if dense is None or len(layout.kept_shape) != 1 or saved.weight is not None:
        return None
    flat, usable, empty_like, past_caches, small = dense
    xp = backend.xp
    frozen, has_residual, channels = saved.moments is None, saved.has_residual, layout.kept_shape[0]
    run = backend.dense_backward(layout.folded, x, y, has_residual, frozen)
    simple = small and y is None and out is None

    def call(dy: Any, saved: Saved, out: Any) -> Gradients | None:
        x, y, gamma = saved.x, saved.y, saved.gamma
        if not x.flags.behaved or not dy.flags.behaved or not (simple or usable(out, dy, x, y, gamma)):
            return None
        numbers = xp.empty((4, channels))
        numbers[0] = saved.mean
        numbers[1] = saved.rstd
        numbers[2] = 1.0 if gamma is None else gamma
        numbers[3] = 1.0 if frozen else saved.count
        dx = empty_like(x) if out is None else out
        dresidual = empty_like(x) if has_residual else None
        results = xp.empty((2, channels))
        past = past_caches(dx, dresidual)
        y, extra = None if y is None else flat(y), None if dresidual is None else flat(dresidual)
        run(flat(dy), flat(x), y, None, flat(dx), extra, numbers.ravel(), past, results.ravel())
        return Gradients(dx, results[0], results[1], dresidual)

    return call


def inference(backend: Any, layout: Layout, x: Any, eps: float, residual: Any, relu: bool, out: Any) -> Call | None:
    """``call(x, mean, var, gamma, beta, residual, out)`` does what `batch_norm_inference` does."""
    dense: Any = backend.dense(layout, x, residual, out)
    if dense is None or len(layout.kept_shape) != 1:
        return None
    flat, usable, empty_like, past_caches, small = dense
    xp = backend.xp
    channels, run, flag = layout.kept_shape[0], backend.dense_normalize(layout.folded, x, residual), relu or None
    simple = small and residual is None and out is None

    def call(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> Any:
        if not x.flags.behaved or not (simple or usable(out, x, residual, mean, var, gamma, beta)):
            return None
        numbers = xp.empty((4, channels))
        numbers[0] = mean
        numbers[1] = var
        numbers[2] = 1.0 if gamma is None else gamma
        numbers[3] = 0.0 if beta is None else beta
        y = empty_like(x) if out is None else out
        rest = None if residual is None else flat(residual)
        run(flat(x), flat(y), rest, numbers.ravel(), eps, flag, past_caches(y))
        return y

    return call
