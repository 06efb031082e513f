"""Batch normalization in one call: forward, backward, and inference.

Every function goes the same way: check the arguments, fold the arrays into the kernels' view, call the backend, give
the results the caller's shape. A call like an earlier one goes a short way (``repeated.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn import arguments, repeated
from fastbn.dispatch import backend_of, device_of, one_kind
from fastbn.formulas import batch_rstd, input_numbers
from fastbn.kernels import Activation, Axes, normalized
from fastbn.merging import Moments, merge
from fastbn.operands import Target, float64_vector, vector
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
    out: Any = None,
) -> tuple[Any, Saved]:
    """Batch normalization with the statistics of the batch.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, of any layout. Channels-first, channels-last, Fortran order and slices of
        whole channels or samples are read where they lie; other slices are copied once.
    gamma, beta : array, optional
        Scale and shift, of any float dtype, that broadcast to the shape of the channel axes; 1 and 0 by default.
    channel_axis : int or tuple of ints
        The axes kept; all others are reduced. ``(0, 1)`` is instance norm.
    eps : float
        Added to the variance, in its units; finite and >= 0.
    where : array of bool, optional
        Which elements the statistics count; broadcasts to `x`, with size 1 on the channel axes. `y` is written
        everywhere.
    weights : array, optional
        How often the statistics count each element; finite, >= 0, shaped like `where`. Both given, they multiply.
    residual : array, optional
        Added before the activation; x's shape and dtype.
    activation : {None, "relu"}
    gather : callable, optional
        Synchronises statistics over ranks: it takes (count, mean, m2), raveled into one float64 vector, and returns all
        ranks' vectors as the rows of one array, in rank order. A rank with an empty `x` takes part.
    out : array, optional
        Written and returned as `y`; x's shape and dtype. It may be `x`, but then there is no backward pass.

    Returns
    -------
    y : array
        x's dtype and element order: ``act(gamma * (x - mean) * rstd + beta + residual)``.
    saved : Saved
        For `batch_norm_backward`; ``saved.moments`` for `update_running`.

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
    """
    key = None
    if where is None and weights is None and gather is None:
        key = repeated.forward_key(x, gamma, beta, channel_axis, eps, residual, activation, out)
        call = repeated.find(key)
        done: tuple[Any, Saved] | None = None if call is None else call(x, gamma, beta, residual, out)
        if done is not None:
            return done
    with device_of(x):
        kind = one_kind({"x": x}, gamma=gamma, beta=beta, where=where, weights=weights, residual=residual, out=out)
        backend = backend_of(kind)
        x = arguments.data("x", x)
        layout = arguments.layout_for(x, channel_axis)
        eps, relu = arguments.epsilon(eps), arguments.is_relu(activation)
        scale = vector("gamma", gamma, layout, backend, 1.0)
        shift = vector("beta", beta, layout, backend)
        residual = arguments.like("residual", residual, x)
        out, gather = arguments.output("out", out, x), arguments.hook(gather)
        weight = arguments.combined_weight(backend.xp, where, weights, x.shape, layout.kept)

        y = backend.empty_like(x) if out is None else out
        target = Target(backend, layout, y, out is not None, x, residual, gamma, beta)
        x_ = layout.fold(x)
        w_ = None if weight is None else layout.fold_weight(backend.xp, weight, x.shape)
        r_ = None if residual is None else layout.fold(residual)
        if gather is None:
            vectors = backend.forward(x_, w_, scale, shift, eps, r_, relu, target.array)
            *values, rstd = (layout.kept_array(backend.xp, v) for v in vectors)
            moments = Moments(*values)
        else:
            vectors = backend.moments(x_, w_)
            local = Moments(*(layout.kept_array(backend.xp, v) for v in vectors[:3]))
            moments = _merged_over_ranks(backend.xp, gather, local)
            rstd = batch_rstd(moments.count, moments.m2, eps)
            mean_, rstd_ = layout.vector(backend.xp, moments.mean), layout.vector(backend.xp, rstd)
            backend.normalize(x_, mean_, rstd_, scale, shift, None, r_, relu, target.array)
        target.deliver()
        x_is_lost = out is not None and backend.overlap(out, x)
        saved = Saved(
            x=None if x_is_lost else x,
            y=y if relu else None,
            gamma=gamma,
            weight=weight,
            moments=moments,
            mean=moments.mean,
            rstd=rstd,
            count=moments.count,
            channel_axis=arguments.static_axes(channel_axis),
            activation=activation,
            has_residual=residual is not None,
            gathered=gather is not None,
        )
        if key is not None:
            repeated.remember(key, backend.forward_again(layout, saved, x, y, beta, eps, residual, out))
        return y, saved


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
        As in the forward pass, and just if it was given there: takes (dgamma, dbeta) raveled into one float64 vector.
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
    key = None
    if dmean is None and dvar is None and gather is None:
        key = repeated.backward_key(dy, saved, out)
        call = repeated.find(key)
        done: Gradients | None = None if call is None else call(dy, saved, out)
        if done is not None:
            return done
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected a fastbn.Saved, got {type(saved).__name__}")
    gather = arguments.hook(gather)
    x, frozen, relu = saved.x, saved.moments is None, saved.activation is not None
    if x is None:
        raise ValueError(
            "saved: expected the input x, but out overwrote it in the forward pass; give it an out of its own"
        )
    if (gather is not None) != saved.gathered:
        came, went = ("a hook", "without one") if gather is not None else ("None", "with one")
        raise ValueError(f"gather: expected what the forward pass had, which ran {went}, got {came}")
    with device_of(dy):
        others = {f"saved.{name}": getattr(saved, name) for name in ("y", "gamma", "weight", "mean", "rstd", "count")}
        kind = one_kind({"dy": dy, "saved.x": x}, dmean=dmean, dvar=dvar, out=out, **others)
        backend = backend_of(kind)
        xp = backend.xp
        layout = arguments.layout_for(x, saved.channel_axis)
        dy = arguments.like("dy", dy, x)
        arguments.like("saved.y", saved.y, x, "saved.x")
        out = arguments.output("out", out, x)
        if frozen and not (dmean is None and dvar is None):
            raise ValueError("dmean, dvar: expected None with frozen statistics, which do not depend on x")
        given = dmean, dvar
        # Synchronised sums come back as arrays, which formulas take.
        numbers_of = vector if gather is None else float64_vector
        dmean = numbers_of("dmean", dmean, layout, backend)
        dvar = numbers_of("dvar", dvar, layout, backend)
        gamma = numbers_of("saved.gamma", saved.gamma, layout, backend, 1.0)
        mean, rstd = layout.vector(xp, saved.mean), layout.vector(xp, saved.rstd)
        count = mean if frozen else layout.vector(xp, saved.count)

        dx = backend.empty_like(x) if out is None else out
        dresidual = backend.empty_like(x) if saved.has_residual else None
        target = Target(
            backend, layout, dx, out is not None, x, dy, saved.y, saved.weight, saved.gamma, saved.mean, saved.rstd,
            saved.count, *given,
        )  # fmt: skip
        residual_target = None if dresidual is None else Target(backend, layout, dresidual, False)
        into = (target.array, None if residual_target is None else residual_target.array)
        x_, dy_ = layout.fold(x), layout.fold(dy)
        y_ = layout.fold(saved.y) if relu else None
        w_ = None if saved.weight is None else layout.fold_weight(xp, saved.weight, x.shape)
        if gather is None:
            dgamma, dbeta = backend.backward(dy_, x_, y_, w_, mean, rstd, gamma, count, dmean, dvar, frozen, *into)
        else:
            dgamma, dbeta = backend.grad_sums(dy_, x_, y_, w_, mean, rstd)
            local = xp.concatenate([layout.kept_array(xp, v).ravel() for v in (dgamma, dbeta)])
            summed = arguments.gathered(xp, gather(local), local.size).sum(axis=0).reshape(2, *layout.kept_shape)
            all_dgamma, all_dbeta = (layout.vector(xp, a) for a in summed)
            numbers = input_numbers(gamma, rstd, all_dgamma, all_dbeta, count, dmean, dvar, x.itemsize)
            backend.grad_input(dy_, x_, y_, w_, mean, *numbers, *into)
        target.deliver()
        if residual_target is not None:
            residual_target.deliver()
        gradients = Gradients(dx, layout.kept_array(xp, dgamma), layout.kept_array(xp, dbeta), dresidual)
        if key is not None:
            repeated.remember(key, backend.backward_again(layout, saved, dy, gradients, out))
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
    key = repeated.inference_key(x, mean, var, gamma, beta, channel_axis, eps, residual, activation, out)
    call = repeated.find(key)
    if call is not None and (done := call(x, mean, var, gamma, beta, residual, out)) is not None:
        return done
    with device_of(x):
        kind = one_kind({"x": x, "mean": mean, "var": var}, gamma=gamma, beta=beta, residual=residual, out=out)
        backend = backend_of(kind)
        x = arguments.data("x", x)
        layout = arguments.layout_for(x, channel_axis)
        eps = arguments.epsilon(eps)
        spread = vector("var", var, layout, backend)
        y = normalized(backend, x, layout, mean, spread, gamma, beta, eps, residual, activation, out)
        if key is not None:
            again = backend.inference_again(
                layout, x, y, mean, var, gamma, beta, eps, residual, activation is not None, out
            )
            repeated.remember(key, again)
        return y


def _merged_over_ranks(xp: Any, gather: Gather, local: Moments) -> Moments:
    """All ranks' moments, merged in rank order."""
    packed = xp.concatenate([a.ravel() for a in local])
    rows = arguments.gathered(xp, gather(packed), packed.size)
    return merge(*(Moments(*row.reshape(3, *local.count.shape)) for row in rows))
