"""The contract of a backend, on NumPy arrays with Numba kernels.

Arrays of data are four-dimensional, ``(batch, outer, channel, inner)``, of one dtype: float16, bfloat16, float32 or
float64. Per-channel numbers are float64 vectors over ``batch * channel``. ``weight`` is None, bool or float64, with
size 1 where it does not vary. Arrays to be written must be `writable_in_place`; they may be the inputs themselves,
element for element. What is absent is None.

Here arrays become addresses and strides (`memory`); `plans` chooses the kernels and divides the work, a `Program` runs.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu import plans
from fastbn.cpu.again import backward_again, forward_again, inference_again, moments_again
from fastbn.cpu.extremes import LEAST_EPS, needs_float64, weight_in_range
from fastbn.cpu.memory import (
    Array,
    empty_like,
    folded_view,
    overlap,
    past_caches,
    same_or_apart,
    vector,
    walkable,
    walkable_weight,
    writable_in_place,
)
from fastbn.cpu.program import kind_of
from fastbn.cpu.team import threads_for
from fastbn.formulas import reciprocal_std

__all__ = [
    "backward",
    "backward_again",
    "empty_like",
    "folded_view",
    "forward",
    "forward_again",
    "grad_input",
    "grad_sums",
    "inference_again",
    "moments",
    "moments_again",
    "normalize",
    "overlap",
    "same_or_apart",
    "vector",
    "writable_in_place",
    "xp",
]

xp = np
FLOAT64 = ("f8*",) * 6  # kinds of vectors of parameters, as the functions here take them


def moments(x: Array, weight: Array | None) -> tuple[Array, Array, Array, Array]:
    """Count, mean, M2 and the reciprocal standard deviation, right even where M2 is 0 or infinite in float64."""
    return _moments(x, weight, 0.0)


def _moments(x: Array, weight: Array | None, eps: float) -> tuple[Array, Array, Array, Array]:
    table = np.empty((4, x.shape[0] * x.shape[2]))
    weight, k = weight_in_range(weight, x)
    (x_, xs), (w_, ws, kind) = walkable(x), walkable_weight(weight)
    run = plans.moments(x.shape, kind_of(x.dtype), xs, ws, kind, threads_for(x.size))
    run(x_, w_, table, eps)
    return _unscaled(table, k)


def _unscaled(table: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """Count, mean, M2 and rstd, of weights that were divided by 2^k."""
    if k != 0:
        table[:2] = np.ldexp(table[:2], k)
    return table[0], table[2], table[1], table[3]


def normalize(
    x: Array,
    mean: Array,
    spread: Array,
    gamma: Array,
    beta: Array,
    eps: float | None,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> None:
    """``y = (x - mean) * rstd * gamma + beta + residual``, through relu.

    ``spread`` is the variance, to which eps is added, or without eps the rstd.
    """
    if needs_float64(x, spread if eps is None else reciprocal_std(spread, eps), gamma, eps):
        wide, more = np.empty(x.shape), None if residual is None else residual.astype(np.float64)
        normalize(x.astype(np.float64), mean, spread, gamma, beta, eps, more, relu, wide)
        y[...] = wide
        return
    (x_, xs), (y_, ys), (r_, rs) = walkable(x), walkable(y), walkable(residual)
    run = plans.normalize(x.shape, kind_of(x.dtype), xs, ys, rs, FLOAT64[:4], relu, threads_for(x.size))
    numbers = map(np.ascontiguousarray, (mean, spread, gamma, beta))
    run(x_, y_, r_, *numbers, -1.0 if eps is None else eps, past_caches(y))


def forward(
    x: Array,
    weight: Array | None,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> tuple[Array, Array, Array, Array]:
    """Count, mean, M2 and rstd of x, and y normalised by them."""
    if eps < LEAST_EPS and any(a is not None and np.may_share_memory(a, y) for a in (x, residual)):
        count, mean, m2, rstd = _moments(x, weight, eps)  # before y is written, should float64 be needed
        normalize(x, mean, rstd, gamma, beta, None, residual, relu, y)
        return count, mean, m2, rstd
    table = np.empty((6, x.shape[0] * x.shape[2]))
    weight, k = weight_in_range(weight, x)
    (x_, xs), (w_, ws, weights) = walkable(x), walkable_weight(weight)
    (y_, ys), (r_, rs) = walkable(y), walkable(residual)
    run = plans.forward(x.shape, kind_of(x.dtype), xs, ws, weights, ys, rs, FLOAT64[:2], relu, threads_for(x.size))
    run(x_, w_, y_, r_, *map(np.ascontiguousarray, (gamma, beta)), table, eps, past_caches(y))
    if needs_float64(x, table[3], gamma, eps):
        normalize(x, table[2], table[3], gamma, beta, None, residual, relu, y)
    return _unscaled(table, k)


def grad_sums(
    dy: Array, x: Array, y: Array | None, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Array]:
    """``dgamma = sum(dz * xhat)`` and ``dbeta = sum(dz)``; dz = dy, or 0 where y <= 0.

    What has weight 0 and dz 0 is left out, whatever x is there.
    """
    out = np.zeros((2, x.shape[0] * x.shape[2]))
    if x.size > 0:  # the empty sum is 0, though rstd is NaN
        weight, _ = weight_in_range(weight, x)
        (dy_, dys), (x_, xs), (y_, ys) = walkable(dy), walkable(x), walkable(y)
        w_, ws, weights = walkable_weight(weight)
        run = plans.grad_sums(x.shape, kind_of(x.dtype), dys, xs, ys, ws, weights, threads_for(x.size))
        run(dy_, x_, y_, w_, *map(np.ascontiguousarray, (mean, rstd)), out)
    return out[0], out[1]


def grad_input(
    dy: Array,
    x: Array | None,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    unit: Array,
    scale: Array,
    offset: Array,
    slope: Array,
    dx: Array,
    dresidual: Array | None,
) -> None:
    """``dx = unit * (scale * dz - weight * (offset + slope * (x - mean)))``; dresidual = dz.

    Without x, ``dx = unit * scale * dz``. Where weight and dz are 0, dx is 0, whatever x is.
    """
    weight, k = weight_in_range(weight, dy)
    if k != 0:
        offset, slope = np.ldexp(offset, k), np.ldexp(slope, k)
    (dy_, dys), (x_, xs), (y_, ys) = walkable(dy), walkable(x), walkable(y)
    (w_, ws, weights), (dx_, dxs), (dr_, drs) = walkable_weight(weight), walkable(dx), walkable(dresidual)
    run = plans.grad_input(dy.shape, kind_of(dy.dtype), dys, xs, ys, ws, weights, dxs, drs, threads_for(dy.size))
    numbers = map(np.ascontiguousarray, (mean, scale, offset, slope, unit))
    run(dy_, x_, y_, w_, dx_, dr_, *numbers, past_caches(dx, dresidual))


def backward(
    dy: Array,
    x: Array,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    gamma: Array,
    count: Array,
    dmean: Array,
    dvar: Array,
    frozen: bool,
    dx: Array,
    dresidual: Array | None,
) -> tuple[Array, Array]:
    """The two sums; dx from them (frozen: without the statistics' share); dresidual = dz."""
    out = np.zeros((2, x.shape[0] * x.shape[2]))
    if x.size > 0:
        weight, k = weight_in_range(weight, x)
        count = count if k == 0 else np.ldexp(count, -k)
        (dy_, dys), (x_, xs), (y_, ys) = walkable(dy), walkable(x), walkable(y)
        (w_, ws, weights), (dx_, dxs), (dr_, drs) = walkable_weight(weight), walkable(dx), walkable(dresidual)
        kind, shares = kind_of(x.dtype), threads_for(x.size)
        run = plans.backward(x.shape, kind, dys, xs, ys, ws, weights, dxs, drs, FLOAT64, frozen, shares)
        numbers = map(np.ascontiguousarray, (mean, rstd, gamma, count, dmean, dvar))
        run(dy_, x_, y_, w_, dx_, dr_, *numbers, out, past_caches(dx, dresidual))
    return out[0], out[1]
