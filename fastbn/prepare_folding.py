"""Prepared calls of `fold`: what `fastbn.call` keeps for it (see `fastbn.prepare_forward`)."""

from __future__ import annotations

import operator
from typing import Any

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import backend_of
from fastbn.call import Call
from fastbn.formulas import reciprocal_std
from fastbn.layout import Shape, layout_of


def fold(
    kernel: Any, kernel_bias: Any, mean: Any, var: Any, gamma: Any, beta: Any, eps: Any, axis: Any, groups: Any
) -> Call:
    """``call(kernel, kernel_bias, mean, var, gamma, beta)``."""
    with device_of(kernel):
        kind = one_kind({"kernel": kernel, "mean": mean, "var": var}, kernel_bias=kernel_bias, gamma=gamma, beta=beta)
        backend = backend_of(kind)
        kernel = validation.data("kernel", kernel)
        axes = validation.channel_axes(kernel.ndim, axis, "axis")
        if len(axes) != 1:
            raise TypeError(f"axis: expected an int, got {axis!r}")
        (axis,) = axes
        groups = _checked_groups(groups, kernel.shape, axis)
        eps = validation.epsilon(eps)
        layout = layout_of((groups * kernel.shape[axis],), (1,), frozenset((0,)))  # of the output channels
        given = {"kernel_bias": kernel_bias, "beta": beta, "mean": mean, "var": var, "gamma": gamma}
        for name, parameter in given.items():
            if parameter is not None:
                validation.parameter(name, parameter, layout)
    xp, dtype, inputs, inner = backend.xp, kernel.dtype, kernel.shape[axis - 1], (1,) * (kernel.ndim - 1 - axis)

    def call(kernel: Any, kernel_bias: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        scale = reciprocal_std(layout.vector(xp, var), eps)
        if gamma is not None:
            scale = scale * layout.vector(xp, gamma)
        bias = (0.0 if kernel_bias is None else layout.vector(xp, kernel_bias)) - layout.vector(xp, mean)
        bias = bias * scale
        if beta is not None:
            bias = bias + layout.vector(xp, beta)
        spread = scale
        if groups > 1:  # of each input channel and each output channel of its group
            spread = xp.repeat(scale.reshape(groups, -1), inputs // groups, axis=0)
        folded = kernel.astype(xp.float64) * spread.reshape(spread.shape + inner)
        return folded.astype(dtype, copy=False), bias.astype(dtype, copy=False)

    return backend.on_its_device(call, kernel)


def _checked_groups(groups: Any, shape: Shape, axis: int) -> int:
    """How many groups the axis before ``axis`` has; 1 on axis 0, where output channels are those of all groups."""
    try:
        number = operator.index(groups)
    except TypeError:
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}") from None
    divided = max(axis - 1, 0)
    if number < 1 or shape[divided] % number:
        raise ValueError(
            f"groups: expected a divisor of kernel.shape[{divided}], which is {shape[divided]}, got {groups}"
        )
    return number if axis else 1
