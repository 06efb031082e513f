"""The short way of `repeated`: what is left to do for plain arrays of one layout without gaps, like earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn.cpu import memory, plans, team
from fastbn.cpu.extremes import LEAST_EPS, needs_float64
from fastbn.cpu.memory import Array, Strides, empty_like, past_caches
from fastbn.cpu.program import FLOATS, Program, kind_of
from fastbn.cpu.team import threads_for
from fastbn.formulas import reciprocal_std
from fastbn.layout import Layout
from fastbn.merging import Moments
from fastbn.saved import Gradients, Saved

Call = Callable[..., Any]


def forward_again(
    layout: Layout, saved: Saved, x: Any, y: Any, beta: Any, eps: float, residual: Any, out: Any
) -> Call | None:
    """``call(x, gamma, beta, residual, out)`` does what `batch_norm` does."""
    dense = _dense(layout, out is None, x, residual, out)
    if dense is None or len(layout.kept_shape) != 1:
        return None
    usable, empty_like, past_caches, small = dense
    channels = layout.kept_shape[0]
    parameters = _kinds(channels, saved.gamma, beta)
    if parameters is None:
        return None
    run = _forward(layout.folded, x, residual, parameters, saved.activation is not None).prepare()
    simple = small and residual is None and out is None
    channel_axis, activation = saved.channel_axis, saved.activation

    def call(x: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> tuple[Any, Saved] | None:
        if not x.flags.aligned or out is x or not (simple or usable(out, x, residual, gamma, beta)):
            return None
        table = np.empty((6, channels))
        count, m2, mean, rstd, scale, _ = table
        y = empty_like(x) if out is None else out
        run(x, None, y, residual, gamma, beta, table, eps, past_caches(y))
        if eps < LEAST_EPS and needs_float64(x, rstd, scale, eps):
            return None
        return y, Saved(
            x, None if activation is None else y, gamma, None, Moments(count, mean, m2), mean, rstd, count,
            channel_axis, activation, residual is not None, False,
        )  # fmt: skip

    return call


def backward_again(layout: Layout, saved: Saved, dy: Any, gradients: Gradients, out: Any) -> Call | None:
    """``call(dy, saved, out)`` does what `batch_norm_backward` does, without dmean and dvar."""
    x, y = saved.x, saved.y
    dense = _dense(layout, out is None, x, dy, y, out)
    if dense is None or len(layout.kept_shape) != 1 or saved.weight is not None:
        return None
    usable, empty_like, past_caches, small = dense
    frozen, has_residual, channels = saved.moments is None, saved.has_residual, layout.kept_shape[0]
    parameters = _kinds(channels, saved.mean, saved.rstd, saved.gamma, None if frozen else saved.count, None, None)
    if parameters is None:
        return None
    run = _backward(layout.folded, x, y, has_residual, parameters, frozen).prepare()
    simple = small and y is None and out is None

    def call(dy: Any, saved: Saved, out: Any) -> Gradients | None:
        x, y, gamma = saved.x, saved.y, saved.gamma
        if not x.flags.aligned or not dy.flags.aligned or not (simple or usable(out, dy, x, y, gamma)):
            return None
        dx = empty_like(x) if out is None else out
        dresidual = empty_like(x) if has_residual else None
        results = np.empty((2, channels))
        past = past_caches(dx, dresidual)
        run(dy, x, y, None, dx, dresidual, saved.mean, saved.rstd, gamma, saved.count, None, None, results, past)
        return Gradients(dx, results[0], results[1], dresidual)

    return call


def inference_again(
    layout: Layout,
    x: Any,
    y: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    residual: Any,
    relu: bool,
    out: Any,
) -> Call | None:
    """``call(x, mean, var, gamma, beta, residual, out)`` does what `batch_norm_inference` does."""
    dense = _dense(layout, out is None, x, residual, out)
    if dense is None or len(layout.kept_shape) != 1:
        return None
    usable, empty_like, past_caches, small = dense
    parameters = _kinds(layout.kept_shape[0], mean, var, gamma, beta)
    if parameters is None:
        return None
    run = _normalize(layout.folded, x, residual, parameters, relu).prepare()
    simple = small and residual is None and out is None

    def call(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> Any:
        if not x.flags.aligned or not (simple or usable(out, x, residual, mean, var, gamma, beta)):
            return None
        if eps < LEAST_EPS and needs_float64(
            x, reciprocal_std(var.astype(np.float64), eps), 1.0 if gamma is None else gamma, eps
        ):
            return None
        y = empty_like(x) if out is None else out
        run(x, y, residual, mean, var, gamma, beta, eps, past_caches(y))
        return y

    return call


def moments_again(layout: Layout, x: Array) -> Callable[[Array], Array | None] | None:
    """``call(x)`` gives the table (count, M2, mean, rstd) of an array that lies like x, or None.

    Slices that kernels can walk are as good as others.
    """
    folded = memory.folded_view(layout, x)
    walked, strides = memory.walkable(folded)
    if folded is None or walked is not folded or strides is None or x.size == 0:
        return None
    size, shares, kept = x.size, threads_for(x.size), layout.folded[0] * layout.folded[2]
    kind = kind_of(x.dtype)
    run = plans.moments(layout.folded, kind, strides, None, None, shares)

    def call(x: Array) -> Array | None:
        if not x.flags.aligned:
            return None
        table, threads = np.empty((4, kept)), threads_for(size)
        program = run if threads == shares else plans.moments(layout.folded, kind, strides, None, None, threads)
        program(x, None, table, 0.0)
        return table

    return call


# --- what they share --------------------------------------------------------------------------------------------------


def _dense(layout: Layout, own: bool, x: Array, *others: Array | None) -> tuple[Any, ...] | None:
    """For plain arrays of one layout without gaps: what a repeated call does with them; else None.

    Functions that tell whether arrays of a later call may go the short way, allocate a result, and `past_caches`; and
    whether they are so small that one thread does all, however many there may be later. `own` says whether results
    are allocated here.
    """
    arrays = [a for a in (x, *others) if a is not None]
    if not all(type(a) is np.ndarray and a.strides == x.strides and a.dtype == x.dtype for a in arrays):
        return None
    if not (x.dtype.isnative and x.size and x.transpose(layout.order).flags.c_contiguous):
        return None
    shares, size = threads_for(x.size), x.size

    def usable(out: Array | None, x: Array, other: Array | None, *rest: Array | None) -> bool:
        if not x.flags.aligned or not (other is None or other.flags.aligned) or threads_for(size) != shares:
            return False
        if out is None:
            return True
        inputs = (a for a in (x, other, *rest) if a is not None and a is not out)
        return out.flags.behaved and not any(np.may_share_memory(out, a) for a in inputs)

    small = x.nbytes < memory.CACHE_SHARE
    cached = x.nbytes < memory.CACHE_SHARE * (memory.OWN_TIMES if own else 1)
    return (
        usable,
        np.empty_like if small else empty_like,
        (lambda *_: 0.0) if cached else past_caches,
        small and size < team.PARALLEL_FROM,
    )


def _kinds(channels: int, *parameters: Array | None) -> plans.Kinds | None:
    """Of vectors of parameters, which kernels read as they are; None if they cannot."""
    for a in parameters:
        if a is not None and not (
            a.size == channels and a.flags.c_contiguous and a.dtype.isnative and kind_of(a.dtype) in FLOATS
        ):
            return None
    return tuple(None if a is None else kind_of(a.dtype) for a in parameters)


def _dense_strides(shape: tuple[int, ...]) -> Strides:
    _, outer, channel, inner = shape
    return 0, outer * channel * inner, channel * inner, inner


def _normalize(
    shape: tuple[int, ...], x: Array, residual: Array | None, parameters: plans.Kinds, relu: bool
) -> Program:
    """The plan of `cpu.normalize`; the names of its arguments stand there."""
    s = _dense_strides(shape)
    rs = None if residual is None else s
    return plans.normalize(shape, kind_of(x.dtype), s, s, rs, parameters, relu, threads_for(x.size))


def _forward(shape: tuple[int, ...], x: Array, residual: Array | None, parameters: plans.Kinds, relu: bool) -> Program:
    """The plan of `forward`."""
    s = _dense_strides(shape)
    rs = None if residual is None else s
    return plans.forward(shape, kind_of(x.dtype), s, None, None, s, rs, parameters, relu, threads_for(x.size))


def _backward(
    shape: tuple[int, ...], x: Array, y: Array | None, residual: bool, parameters: plans.Kinds, frozen: bool
) -> Program:
    """The plan of `backward`."""
    s = _dense_strides(shape)
    ys, drs, kind = None if y is None else s, s if residual else None, kind_of(x.dtype)
    return plans.backward(shape, kind, s, s, ys, None, None, s, drs, parameters, frozen, threads_for(x.size))
