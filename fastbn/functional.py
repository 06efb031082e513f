"""Batch normalization in one call: forward, backward, and inference.

A function makes the signature of its call and runs the call that was prepared for it (`fastbn.call`,
`fastbn.prepare_forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn import prepare_forward, prepare_gradients, validation
from fastbn.call import Unlike, axes_of, describe, find, keep, number_of
from fastbn.primitives import Activation, Axes
from fastbn.saved import Gradients, Saved

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_inference"]

Gather = Callable[[Any], Any]


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    channel_axis: Axes = 1,
    eps: float = 1e-5,
    where: Any = None,
    weights: Any = None,
    residual: Any = None,
    activation: Activation = None,
    gather: Gather | None = None,
    running: tuple[Any, Any] | None = None,
    rate: float = 0.1,
    correction: float = 1,
    out: Any = None,
) -> tuple[Any, Saved]:
    """Batch normalization with the statistics of the batch.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, of any layout. Channels-first, channels-last, Fortran order and slices
        of whole channels or samples are read where they lie, and so are other slices of contiguous rows from 2 MB on.
        Other views are copied, large arrays a piece at a time, but whole beside `where` or `weights`.
    gamma, beta : array, optional
        Scale and shift, of any float dtype, that broadcast to the shape of the channel axes; 1 and 0 by default.
    channel_axis : int or tuple of ints
        The axes kept; all others are reduced. ``(0, 1)`` is instance norm.
    eps : float
        Added to the variance, in its units; finite and >= 0.
    where : array of bool, optional
        Which elements the statistics count; broadcasts to `x`. `y` is written everywhere.
    weights : array, optional
        How often the statistics count each element; finite, >= 0, shaped like `where`. Both given, they multiply.
    residual : array, optional
        Added before the activation; x's shape and dtype.
    activation : {None, "relu"}
    gather : callable, optional
        Synchronises statistics over ranks: it takes (count, mean, m2), raveled into one float64 vector, and returns all
        ranks' vectors as the rows of one array, in rank order. A rank with an empty `x` takes part.
    running : pair of arrays, optional
        Running mean and variance, of any float dtype and the channel axes' shape, in memory of their own. They are
        updated in place, as `update_running` does it and with its bits; on CuPy arrays within the same launches.
    rate, correction : float
        As for `update_running`, with `running`.
    out : array, optional
        Written and returned as `y`; x's shape and dtype. It may be `x`, but then there is no backward pass.

    Returns
    -------
    y : array
        x's dtype and element order: ``act(gamma * (x - mean) * rstd + beta + residual)``.
    saved : Saved
        For `batch_norm_backward`; ``saved.moments`` for `merge` and `population`.

    Raises
    ------
    TypeError
        Lists, integers, masked arrays, arrays of other libraries, mixed kinds of array, dtypes that are not floats.
    ValueError
        Shapes, dtypes or values that do not fit; the message names the argument. Nothing has been written then.
    numpy.exceptions.AxisError
        A channel axis that `x` has not.

    Notes
    -----
    Per channel, ``mean = sum(w x) / sum(w)``, ``var = sum(w (x - mean)^2) / sum(w)``, ``rstd = 1 / sqrt(var + eps)``.
    Without samples of positive weight these are NaN.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, Algorithm 1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> y, saved = fastbn.batch_norm(x, gamma=np.array([1.0, 10.0]), eps=0)
    >>> y
    array([[ -1., -10.],
           [  1.,  10.]])
    >>> saved.mean, saved.rstd
    (array([2., 4.]), array([1. , 0.5]))
    >>> running = np.zeros(2), np.ones(2)
    >>> y, _ = fastbn.batch_norm(x, running=running)
    >>> running
    (array([0.2, 0.4]), array([1.1, 1.7]))
    """
    pair = () if running is None else running if isinstance(running, tuple) else (Unlike(),)
    signature = (
        "batch_norm", describe(x, gamma, beta, where, weights, residual, out, *pair),
        None if gather is None else callable(gather), axes_of(channel_axis), number_of(eps), activation,
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(
            signature,
            prepare_forward.batch_norm(
                x, gamma, beta, where, weights, residual, out, gather, running, channel_axis, eps, activation
            ),
        )
    result: tuple[Any, Saved] = run(x, gamma, beta, where, weights, residual, out, gather, running, rate, correction)
    return result


def batch_norm_backward(
    dy: Any,
    saved: Saved,
    *,
    dmean: Any = None,
    dvar: Any = None,
    gather: Gather | None = None,
    out: Any = None,
) -> Gradients:
    """Gradients of a loss from its gradient `dy` with respect to the output of `batch_norm`.

    Parameters
    ----------
    dy : array
        x's shape and dtype, of any layout.
    saved : Saved
        From `batch_norm`, or `Saved.frozen` for `batch_norm_inference`.
    dmean, dvar : array, optional
        Gradients that reach the batch's mean and biased variance by other ways, broadcasting to their shape. With
        `gather` those of the whole loss, the same on every rank.
    gather : callable, optional
        As in the forward pass; required if and only if that had one. Takes (dgamma, dbeta) raveled into one float64
        vector.
    out : array, optional
        Written and returned as ``Gradients.x``; x's shape and dtype. It may be `dy`.

    Returns
    -------
    Gradients
        ``x`` and, if there was a residual, ``residual`` in x's dtype and element order; ``gamma`` and ``beta`` float64
        of the channels' shape, whether or not these were given; with `gather` they are this rank's share.

    Raises
    ------
    ValueError
        A forward pass whose `out` overwrote `x`; `gather` given here and not there or the reverse; shapes, dtypes.
    TypeError
        As `batch_norm`; a `saved` that is no `Saved`.

    Notes
    -----
    With ``dz = dy``, or 0 where ``y <= 0`` under relu, ``xhat = (x - mean) rstd`` and W the sum of the weights w::

        dbeta = sum dz      dgamma = sum dz xhat      dresidual = dz
        dx = gamma rstd (dz - w/W (dbeta + xhat dgamma)) + w/W (dmean + 2 (x - mean) dvar)

    Sums run over every position, but where w and dz are 0: such a position contributes nothing to any sum and has
    ``dx = 0``, whatever x holds there, NaN or infinite. Frozen statistics: ``dx = gamma rstd dz``.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, section 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [3.0], [6.0]])
    >>> _, saved = fastbn.batch_norm(x, eps=0)
    >>> grads = fastbn.batch_norm_backward(np.array([[0.0], [0.0], [0.0], [1.0]]), saved)
    >>> grads.beta, abs(grads.x.sum()) < 1e-15
    (array([1.]), np.True_)
    """
    signature: Any = Unlike()
    if type(saved) is Saved:
        s = saved
        signature = (
            "batch_norm_backward",
            describe(dy, s.x, s.y, s.gamma, s.beta, s.weight, s.mean, s.rstd, s.count, dmean, dvar, out),
            None if gather is None else callable(gather), s.moments is None, axes_of(s.channel_axis), s.activation,
            s.has_residual, s.gathered,
        )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(signature, prepare_gradients.batch_norm_backward(dy, saved, dmean, dvar, out, gather))
    gradients: Gradients = run(dy, saved, dmean, dvar, out, gather)
    return gradients


def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    channel_axis: Axes = 1,
    eps: float = 1e-5,
    residual: Any = None,
    activation: Activation = None,
    out: Any = None,
) -> Any:
    """Batch normalization with given statistics: ``act(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``.

    Parameters
    ----------
    x, gamma, beta, channel_axis, eps, residual, activation, out
        As for `batch_norm`; `out` may be `x`.
    mean, var : array
        Of any float dtype, broadcasting to the shape of the channel axes.

    Returns
    -------
    y : array
        x's dtype and element order.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, Algorithm 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm_inference(np.array([[3.0, 9.0]]), np.array([1.0, 1.0]), np.array([4.0, 16.0]), eps=0)
    array([[1., 2.]])
    """
    signature = (
        "batch_norm_inference", describe(x, mean, var, gamma, beta, residual, out), axes_of(channel_axis),
        number_of(eps), activation,
    )  # fmt: skip
    run = find(signature)
    if run is None:
        run = keep(
            signature,
            prepare_forward.normalize(
                x, mean, var, gamma, beta, residual, out, channel_axis, validation.epsilon(eps), activation
            ),
        )
    return run(x, mean, var, gamma, beta, residual, out)
