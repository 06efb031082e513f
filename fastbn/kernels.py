"""The kernels by themselves: `normalize`, `grad_sums`, `grad_input`; and `fold`, which leaves none to run.

Every function goes the way of those in ``functional.py``.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

from fastbn import arguments
from fastbn.dispatch import backend_of, on_device, one_kind
from fastbn.formulas import input_numbers, reciprocal_std
from fastbn.layout import Layout
from fastbn.operands import Target, float64_vector, vector

__all__ = ["fold", "grad_input", "grad_sums", "normalize"]

Axes = int | tuple[int, ...]
Activation = Literal["relu"] | None


@on_device
def normalize(
    x: Any,
    mean: Any,
    rstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    channel_axis: Axes = 1,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
) -> Any:
    """Normalise, scale and shift: ``act((x - mean) * rstd * gamma + beta + residual)``.

    Parameters
    ----------
    x, gamma, beta, channel_axis, residual, activation, out
        As for `batch_norm`; `out` may be `x`.
    mean, rstd : array
        Of any float dtype, broadcasting to the shape of the channel axes.

    Returns
    -------
    y : array
        x's dtype and element order.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.normalize(np.array([[3.0], [5.0]]), np.array([4.0]), np.array([2.0]))
    array([[-2.],
           [ 2.]])
    """
    kind = one_kind({"x": x, "mean": mean, "rstd": rstd}, gamma=gamma, beta=beta, residual=residual, out=out)
    backend = backend_of(kind)
    x = arguments.data("x", x)
    layout = arguments.layout_for(x, channel_axis)
    rstd = vector("rstd", rstd, layout, backend)
    return normalized(backend, x, layout, mean, rstd, gamma, beta, None, residual, activation, out)


@on_device
def grad_sums(
    dy: Any, x: Any, mean: Any, rstd: Any, *, channel_axis: Axes = 1, where: Any = None, weights: Any = None
) -> tuple[Any, Any]:
    """The two sums of the backward pass: ``dgamma = sum(dy * (x - mean) * rstd)`` and ``dbeta = sum(dy)``.

    Parameters
    ----------
    dy, x : array
        Of one shape and dtype: float16, bfloat16, float32 or float64.
    mean, rstd : array
        Of any float dtype, broadcasting to the shape of the channel axes.
    channel_axis : int or tuple of ints
        The axes kept.
    where, weights : array, optional
        As for `batch_norm`. The sums run over every position, but where the weight and `dy` are 0, whatever `x` holds.

    Returns
    -------
    dgamma, dbeta : array
        Float64, of the channel axes' shape.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[3.0], [5.0]])
    >>> fastbn.grad_sums(np.array([[1.0], [2.0]]), x, np.array([4.0]), np.array([2.0]))
    (array([2.]), array([3.]))
    """
    backend = backend_of(one_kind({"dy": dy, "x": x, "mean": mean, "rstd": rstd}, where=where, weights=weights))
    x = arguments.data("x", x)
    layout = arguments.layout_for(x, channel_axis)
    dy = arguments.like("dy", dy, x)
    mean = vector("mean", mean, layout, backend)
    rstd = vector("rstd", rstd, layout, backend)
    weight = arguments.combined_weight(backend.xp, where, weights, x.shape, layout.kept)
    w_ = None if weight is None else layout.fold_weight(backend.xp, weight, x.shape)
    dgamma, dbeta = backend.grad_sums(layout.fold(dy), layout.fold(x), None, w_, mean, rstd)
    return layout.kept_array(backend.xp, dgamma), layout.kept_array(backend.xp, dbeta)


@on_device
def grad_input(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    gamma: Any,
    dgamma: Any,
    dbeta: Any,
    count: Any,
    *,
    channel_axis: Axes = 1,
    where: Any = None,
    weights: Any = None,
    out: Any = None,
) -> Any:
    """The gradient of x from the two sums: ``gamma * rstd * (dy - w/count * (dbeta + xhat * dgamma))``.

    It is 0 where the weight and `dy` are, whatever `x` holds there.

    Parameters
    ----------
    dy, x : array
        Of one shape and dtype: float16, bfloat16, float32 or float64.
    mean, rstd, gamma, dgamma, dbeta : array
        Of any float dtype, broadcasting to the shape of the channel axes; `gamma` may be None.
    count : array or number
        The sum of the weights: for a synchronised batch norm over all ranks, as are `dgamma` and `dbeta`.
    channel_axis, where, weights
        As for `batch_norm`.
    out : array, optional
        Written and returned; x's shape and dtype. It may be `dy` or `x`.

    Returns
    -------
    dx : array
        x's dtype and element order.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy, one = np.array([[-1.0], [1.0]]), np.array([[0.0], [2.0]]), np.ones(1)
    >>> fastbn.grad_input(dy, x, 0 * one, one, one, 2 * one, 2 * one, 2)
    array([[0.],
           [0.]])
    """
    required = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, "dgamma": dgamma, "dbeta": dbeta}
    if not isinstance(count, Real):
        required["count"] = count
    kind = one_kind(required, gamma=gamma, where=where, weights=weights, out=out)
    backend = backend_of(kind)
    xp = backend.xp
    x = arguments.data("x", x)
    layout = arguments.layout_for(x, channel_axis)
    dy = arguments.like("dy", dy, x)
    out = arguments.output("out", out, x)
    mean, rstd = float64_vector("mean", mean, layout, backend), float64_vector("rstd", rstd, layout, backend)
    gamma = float64_vector("gamma", gamma, layout, backend, 1.0)
    dgamma, dbeta = float64_vector("dgamma", dgamma, layout, backend), float64_vector("dbeta", dbeta, layout, backend)
    count = (
        xp.full(mean.shape, float(count))
        if isinstance(count, Real)
        else float64_vector("count", count, layout, backend)
    )
    weight = arguments.combined_weight(xp, where, weights, x.shape, layout.kept)

    dx = backend.empty_like(x) if out is None else out
    target = Target(backend, layout, dx, out is not None, x, dy, weight, mean)
    w_ = None if weight is None else layout.fold_weight(xp, weight, x.shape)
    numbers = input_numbers(gamma, rstd, dgamma, dbeta, count, 0.0, 0.0, x.itemsize)
    backend.grad_input(layout.fold(dy), layout.fold(x), None, w_, mean, *numbers, target.array, None)
    target.deliver()
    return dx


@on_device
def fold(
    kernel: Any,
    kernel_bias: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 0,
) -> tuple[Any, Any]:
    """Fold inference's batch normalization into the linear layer before it, whose work then includes it.

    Parameters
    ----------
    kernel : array
        Weights of a dense or convolution layer, of any float dtype.
    kernel_bias : array or None
        Its bias, of shape ``(kernel.shape[axis],)``.
    mean, var, gamma, beta : array
        The batch norm's, each broadcasting to that shape; gamma and beta may be None.
    eps : float
        Added to the variance.
    axis : int
        The kernel's axis of output channels: 0 for PyTorch's (out, in, ...), -1 for Keras' and JAX's (..., in, out).

    Returns
    -------
    kernel, bias : array
        ``kernel * s`` and ``(kernel_bias - mean) * s + beta`` with ``s = gamma / sqrt(var + eps)``, in the kernel's
        dtype, computed in float64.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> kernel = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> fastbn.fold(kernel, None, np.array([1.0, 1.0]), np.array([4.0, 1.0]), eps=0)
    (array([[0.5, 1. ],
           [3. , 4. ]]), array([-0.5, -1. ]))
    """
    kind = one_kind({"kernel": kernel, "mean": mean, "var": var}, kernel_bias=kernel_bias, gamma=gamma, beta=beta)
    backend = backend_of(kind)
    kernel = arguments.data("kernel", kernel)
    layout = arguments.layout_for(kernel, axis, "axis")
    if len(layout.kept_shape) != 1:
        raise TypeError(f"axis: expected an int, got {axis!r}")
    eps = arguments.epsilon(eps)
    bias, shift = (
        float64_vector("kernel_bias", kernel_bias, layout, backend),
        float64_vector("beta", beta, layout, backend),
    )
    mean, var = float64_vector("mean", mean, layout, backend), float64_vector("var", var, layout, backend)
    scale = float64_vector("gamma", gamma, layout, backend, 1.0) * reciprocal_std(var, eps)
    along = [-1 if i in layout.kept else 1 for i in range(kernel.ndim)]
    folded = kernel.astype(backend.xp.float64) * scale.reshape(along)
    return folded.astype(kernel.dtype), ((bias - mean) * scale + shift).astype(kernel.dtype)


# --- what inference does too ------------------------------------------------------------------------------------------


def normalized(
    backend: Any, x: Any, layout: Layout, mean: Any, spread: Any, gamma: Any, beta: Any, eps: float | None,
    residual: Any, activation: Activation, out: Any,
) -> Any:  # fmt: skip
    """The common end of `normalize` and `batch_norm_inference`; spread, the rstd or the variance, is a vector."""
    relu = arguments.is_relu(activation)
    mean = vector("mean", mean, layout, backend)
    scale = vector("gamma", gamma, layout, backend, 1.0)
    shift = vector("beta", beta, layout, backend)
    residual = arguments.like("residual", residual, x)
    out = arguments.output("out", out, x)
    y = backend.empty_like(x) if out is None else out
    target = Target(backend, layout, y, out is not None, x, residual, mean, spread, gamma, beta)
    r_ = None if residual is None else layout.fold(residual)
    backend.normalize(layout.fold(x), mean, spread, scale, shift, eps, r_, relu, target.array)
    target.deliver()
    return y
