"""The kernels by themselves: `normalize`, `grad_sums`, `grad_input`; and `fold`, which leaves none to run."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

from fastbn import prepare_folding, prepare_forward, prepare_gradients
from fastbn.call import axes_of, describe, find, keep, number_of

__all__ = ["fold", "grad_input", "grad_sums", "normalize"]

Axes = int | tuple[int, ...]
Activation = Literal["relu"] | None


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
    signature = (
        "normalize", describe(x, mean, rstd, gamma, beta, residual, out), axes_of(channel_axis), activation,
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(
            signature,
            prepare_forward.normalize(x, mean, rstd, gamma, beta, residual, out, channel_axis, None, activation),
        )
    return run(x, mean, rstd, gamma, beta, residual, out)


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
    signature = (
        "grad_sums", describe(dy, x, mean, rstd, where, weights), axes_of(channel_axis),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_gradients.grad_sums(dy, x, mean, rstd, where, weights, channel_axis))
    sums: tuple[Any, Any] = run(dy, x, mean, rstd, where, weights)
    return sums


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
    number = type(count) is float or isinstance(count, Real)
    signature = (
        "grad_input",
        describe(dy, x, mean, rstd, gamma, dgamma, dbeta, None if number else count, where, weights, out),
        number, axes_of(channel_axis),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(
            signature,
            prepare_gradients.grad_input(
                dy, x, mean, rstd, gamma, dgamma, dbeta, count, where, weights, out, channel_axis
            ),
        )
    return run(dy, x, mean, rstd, gamma, dgamma, dbeta, count, where, weights, out)


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
    groups: int = 1,
) -> tuple[Any, Any]:
    """Fold inference's batch normalization into the linear layer before it, whose work then includes it.

    Parameters
    ----------
    kernel : array
        Weights of a dense or convolution layer, of any float dtype.
    kernel_bias : array or None
        Its bias, one number for each output channel.
    mean, var, gamma, beta : array
        The batch norm's, each broadcasting to the shape of the output channels; gamma and beta may be None.
    eps : float
        Added to the variance.
    axis : int
        The kernel's axis of output channels: 0 for PyTorch's (out, in, ...), 1 for its transposed convolutions'
        (in, out, ...), -1 for Keras' and JAX's (..., in, out).
    groups : int
        Of a layer whose `axis` has the output channels of one group, and the axis before it the input channels of all
        groups, one group after the other: PyTorch's transposed convolutions, (in, out / groups, ...). There are
        ``groups * kernel.shape[axis]`` output channels then, group by group. A depthwise kernel of Keras,
        (..., in, multiplier), is one with as many groups as inputs. On axis 0, as in PyTorch's other convolutions,
        are the output channels of all groups whatever their number; leave it 1 where they are on the last one.

    Returns
    -------
    kernel, bias : array
        ``kernel * s`` and ``(kernel_bias - mean) * s + beta`` with ``s = gamma / sqrt(var + eps)``, in the kernel's
        dtype, computed in float64.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`; `groups` that is no int >= 1 or does not divide the channels that it divides into groups.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> kernel = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> fastbn.fold(kernel, None, np.array([1.0, 1.0]), np.array([4.0, 1.0]), eps=0)
    (array([[0.5, 1. ],
           [3. , 4. ]]), array([-0.5, -1. ]))

    Two groups of two inputs and one output:

    >>> fastbn.fold(np.ones((4, 1)), None, np.zeros(2), np.array([4.0, 1.0]), eps=0, axis=1, groups=2)[0].ravel()
    array([0.5, 0.5, 1. , 1. ])
    """
    signature = (
        "fold", describe(kernel, kernel_bias, mean, var, gamma, beta), number_of(eps), axes_of(axis),
        axes_of(groups),
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_folding.fold(kernel, kernel_bias, mean, var, gamma, beta, eps, axis, groups))
    folded: tuple[Any, Any] = run(kernel, kernel_bias, mean, var, gamma, beta)
    return folded
