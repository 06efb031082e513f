"""The contract as float64 formulas: slow, obvious, NumPy alone. The oracle of the tests; never dispatched to.

Names and arguments are those of the public functions, but for outputs: everything is float64, nothing is written in
place, and no argument is checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any


class Statistics(NamedTuple):
    """Of each channel: sum of weights, mean, sum of squared deviations."""

    count: Array
    mean: Array
    m2: Array


def _float64(a: Array) -> Array:
    return np.asarray(a).astype(np.float64)


def _kept(x: Array, channel_axis: Any) -> list[int]:
    axes = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    return sorted(axis % x.ndim for axis in axes)


def _reduced(x: Array, channel_axis: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis not in _kept(x, channel_axis))


def _spread(parameter: Array, x: Array, channel_axis: Any, default: float = 0.0) -> Array:
    """A parameter in the dimensions of x."""
    kept = _kept(x, channel_axis)
    parameter = np.broadcast_to(_float64(default if parameter is None else parameter), [x.shape[a] for a in kept])
    return parameter.reshape([x.shape[a] if a in kept else 1 for a in range(x.ndim)])


def _weight(x: Array, where: Array, weights: Array) -> Array:
    weight = np.ones(x.shape)
    if where is not None:
        weight = weight * where
    if weights is not None:
        weight = weight * _float64(weights)
    return weight


def moments(x: Array, *, channel_axis: Any = 1, where: Array = None, weights: Array = None) -> Statistics:
    x = _float64(x)
    w, axes = _weight(x, where, weights), _reduced(x, channel_axis)
    selected = np.where(w == 0, 0.0, x)
    with np.errstate(invalid="ignore", over="ignore"):
        count = w.sum(axis=axes)
        divisor = np.where(count == 0, np.nan, count)
        first = (w * selected).sum(axis=axes) / divisor
        # NumPy sums a leading axis row by row: a second look takes its rounding out of the mean, and out of m2.
        deviation = np.where(w == 0, 0.0, x - _spread(first, x, channel_axis))
        rest = (w * deviation).sum(axis=axes) / divisor
        m2 = (w * deviation**2).sum(axis=axes) - count * rest**2
    return Statistics(count, np.where(np.isfinite(rest), first + rest, first), m2)


def mean(x: Array, axis: Any = None, where: Array = True) -> Array:
    x = _float64(x)
    first = np.mean(x, axis=axis, where=where, keepdims=True)
    return np.squeeze(first, axis) + np.mean(x - first, axis=axis, where=where)


def var(x: Array, axis: Any = None, correction: float = 0, where: Array = True) -> Array:
    return np.var(_float64(x), axis=axis, ddof=correction, where=where)


def merge(*parts: Statistics) -> Statistics:
    count = sum(part.count for part in parts)
    mean = sum(np.where(part.count == 0, 0.0, part.count * part.mean) for part in parts) / count
    m2 = sum(np.where(part.count == 0, 0.0, part.m2 + part.count * (part.mean - mean) ** 2) for part in parts)
    return Statistics(count, mean, m2)


def update_running(mean: Array, var: Array, batch: Statistics, *, rate: float = 0.1, correction: float = 1) -> Any:
    left_alone = batch.count <= correction
    unbiased = batch.m2 / np.where(left_alone, np.nan, batch.count - correction)
    new_mean = (1 - rate) * _float64(mean) + rate * batch.mean
    new_var = (1 - rate) * _float64(var) + rate * unbiased
    return np.where(left_alone, mean, new_mean), np.where(left_alone, var, new_var)


def population(batches: list[Statistics]) -> tuple[Array, Array]:
    means = [np.where(b.count > 1, b.mean, np.nan) for b in batches]
    variances = [b.m2 / np.where(b.count > 1, b.count - 1, np.nan) for b in batches]
    return np.nanmean(means, axis=0), np.nanmean(variances, axis=0)


def normalize(
    x: Array, mean: Array, rstd: Array, gamma: Array = None, beta: Array = None,
    *, channel_axis: Any = 1, residual: Array = None, activation: str | None = None,
) -> Array:  # fmt: skip
    x = _float64(x)
    z = (x - _spread(mean, x, channel_axis)) * _spread(rstd, x, channel_axis)
    z = z * _spread(gamma, x, channel_axis, 1.0) + _spread(beta, x, channel_axis)
    if residual is not None:
        z = z + _float64(residual)
    return np.where(z <= 0, 0.0, z) if activation == "relu" else z


def grad_sums(
    dy: Array, x: Array, mean: Array, rstd: Array, *, channel_axis: Any = 1, where: Array = None, weights: Array = None
) -> tuple[Array, Array]:
    dy, axes = _float64(dy), _reduced(x, channel_axis)
    xhat = normalize(x, mean, rstd, channel_axis=channel_axis)
    counts = (_weight(x, where, weights) != 0) | (dy != 0)
    return np.where(counts, dy * xhat, 0.0).sum(axis=axes), dy.sum(axis=axes)


def grad_input(
    dy: Array, x: Array, mean: Array, rstd: Array, gamma: Array, dgamma: Array, dbeta: Array, count: Array,
    *, channel_axis: Any = 1, where: Array = None, weights: Array = None, dmean: Array = None, dvar: Array = None,
) -> Array:  # fmt: skip
    x, dy = _float64(x), _float64(dy)

    def spread(parameter: Array, default: float = 0.0) -> Array:
        return _spread(parameter, x, channel_axis, default)

    w = _weight(x, where, weights)
    xhat = normalize(x, mean, rstd, channel_axis=channel_axis)
    scale = spread(gamma, 1.0) * spread(rstd)
    share = w / spread(count)
    through_sums = scale * (spread(dbeta) + xhat * spread(dgamma))
    through_statistics = spread(dmean) + 2 * (x - spread(mean)) * spread(dvar)
    dx = scale * dy + np.where(w == 0, 0.0, share * (through_statistics - through_sums))
    return np.where((w == 0) & (dy == 0), 0.0, dx)


class Forward(NamedTuple):
    """Everything that the backward pass of the oracle takes."""

    y: Array
    x: Array
    gamma: Array
    statistics: Statistics | None
    mean: Array
    rstd: Array
    options: dict[str, Any]
    activation: str | None


def batch_norm(
    x: Array, gamma: Array = None, beta: Array = None, *, channel_axis: Any = 1, eps: float = 1e-5,
    where: Array = None, weights: Array = None, residual: Array = None, activation: str | None = None,
    statistics: Statistics | None = None,
) -> Forward:  # fmt: skip
    """`statistics` stands for what a gather hook would bring: the moments of all ranks."""
    options = {"channel_axis": channel_axis, "where": where, "weights": weights}
    if statistics is None:
        statistics = moments(x, **options)
    rstd = 1 / np.sqrt(statistics.m2 / statistics.count + eps)
    y = normalize(
        x, statistics.mean, rstd, gamma, beta, channel_axis=channel_axis, residual=residual, activation=activation
    )
    return Forward(y, x, gamma, statistics, statistics.mean, rstd, options, activation)


def batch_norm_inference(
    x: Array, mean: Array, var: Array, gamma: Array = None, beta: Array = None,
    *, channel_axis: Any = 1, eps: float = 1e-5, residual: Array = None, activation: str | None = None,
) -> Forward:  # fmt: skip
    rstd = 1 / np.sqrt(_float64(var) + eps)
    y = normalize(x, mean, rstd, gamma, beta, channel_axis=channel_axis, residual=residual, activation=activation)
    return Forward(y, x, gamma, None, mean, rstd, {"channel_axis": channel_axis}, activation)


def batch_norm_backward(
    dy: Array, forward: Forward, *, y: Array = None, dmean: Array = None, dvar: Array = None, sums: Any = None
) -> tuple[Array, Array, Array, Array]:
    """dx, dgamma, dbeta, dresidual. ``y`` as stored decides relu; ``sums`` are (dgamma, dbeta) over all ranks."""
    dz = _float64(dy)
    if forward.activation == "relu":
        dz = np.where(_float64(forward.y if y is None else y) <= 0, 0.0, dz)
    channel_axis = forward.options["channel_axis"]
    dgamma, dbeta = grad_sums(dz, forward.x, forward.mean, forward.rstd, **forward.options)
    if forward.statistics is None:
        scale = _spread(forward.gamma, dz, channel_axis, 1.0) * _spread(forward.rstd, dz, channel_axis)
        return scale * dz, dgamma, dbeta, dz
    all_dgamma, all_dbeta = (dgamma, dbeta) if sums is None else sums
    dx = grad_input(
        dz, forward.x, forward.mean, forward.rstd, forward.gamma, all_dgamma, all_dbeta, forward.statistics.count,
        dmean=dmean, dvar=dvar, **forward.options,
    )  # fmt: skip
    return dx, dgamma, dbeta, dz


def fold(
    kernel: Array, kernel_bias: Array, mean: Array, var: Array, gamma: Array = None, beta: Array = None,
    *, eps: float = 1e-5, axis: int = 0,
) -> tuple[Array, Array]:  # fmt: skip
    n = kernel.shape[axis]
    scale = np.ones(n) / np.sqrt(_float64(var) + eps) * (1.0 if gamma is None else _float64(gamma))
    bias = (0.0 if kernel_bias is None else _float64(kernel_bias)) - _float64(mean)
    shift = 0.0 if beta is None else _float64(beta)
    return _float64(kernel) * _spread(scale, kernel, axis), bias * scale + shift
