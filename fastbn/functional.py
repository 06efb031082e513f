"""The kernels by themselves (`normalize`, `grad_sums`, `grad_input`) and batch normalization in one call.

Every function goes the same way: check the arguments, fold the arrays into the kernels' view, call the backend, give
the results the caller's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

from fastbn import arguments, repeated
from fastbn.dispatch import backend_of, device_of, on_device, one_kind
from fastbn.formulas import batch_rstd, input_numbers, reciprocal_std
from fastbn.layout import Layout
from fastbn.merging import Moments, merge
from fastbn.saved import Gradients, Saved

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "fold",
    "grad_input",
    "grad_sums",
    "normalize",
]

Axes = int | tuple[int, ...]
Activation = Literal["relu"] | None
Gather = Callable[[Any], Any]


# --- one call ---------------------------------------------------------------------------------------------------------


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
        scale = _vector("gamma", gamma, layout, backend, 1.0)
        shift = _vector("beta", beta, layout, backend)
        residual = arguments.like("residual", residual, x)
        out, gather = arguments.output("out", out, x), arguments.hook(gather)
        weight = arguments.combined_weight(backend.xp, where, weights, x.shape, layout.kept)

        y = backend.empty_like(x) if out is None else out
        target = _Target(backend, layout, y, out is not None, x, residual, gamma, beta)
        x_ = layout.fold(x)
        w_ = None if weight is None else layout.fold_weight(backend.xp, weight, x.shape)
        r_ = None if residual is None else layout.fold(residual)
        if gather is None:
            vectors = backend.forward(x_, w_, scale, shift, eps, r_, relu, target.array)
            *values, rstd = (layout.kept_array(backend.xp, v) for v in vectors)
            moments = Moments(*values)
        else:
            vectors = backend.moments(x_, w_)
            local = Moments(*(layout.kept_array(backend.xp, v) for v in vectors))
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

    Sums run over every position. Frozen statistics: ``dx = gamma rstd dz``.

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
        out = arguments.output("out", out, x)
        if frozen and not (dmean is None and dvar is None):
            raise ValueError("dmean, dvar: expected None with frozen statistics, which do not depend on x")
        given = dmean, dvar
        # Synchronised sums come back as arrays, which formulas take.
        numbers_of = _vector if gather is None else _float64
        dmean = numbers_of("dmean", dmean, layout, backend)
        dvar = numbers_of("dvar", dvar, layout, backend)
        gamma = numbers_of("saved.gamma", saved.gamma, layout, backend, 1.0)
        mean, rstd = layout.vector(xp, saved.mean), layout.vector(xp, saved.rstd)
        count = mean if frozen else layout.vector(xp, saved.count)

        dx = backend.empty_like(x) if out is None else out
        dresidual = backend.empty_like(x) if saved.has_residual else None
        target = _Target(
            backend, layout, dx, out is not None, x, dy, saved.y, saved.weight, saved.gamma, saved.mean, saved.rstd,
            saved.count, *given,
        )  # fmt: skip
        residual_target = None if dresidual is None else _Target(backend, layout, dresidual, False)
        into = (target.array, None if residual_target is None else residual_target.array)
        x_, dy_ = layout.fold(x), layout.fold(dy)
        y_ = layout.fold(saved.y) if relu else None
        w_ = None if saved.weight is None else layout.fold_weight(xp, saved.weight, x.shape)
        if gather is None:
            dgamma, dbeta = backend.backward(dy_, x_, y_, w_, mean, rstd, gamma, count, dmean, dvar, frozen, *into)
        else:
            dgamma, dbeta = backend.grad_sums(dy_, x_, y_, mean, rstd)
            local = xp.concatenate([layout.kept_array(xp, v).ravel() for v in (dgamma, dbeta)])
            summed = arguments.gathered(xp, gather(local), local.size).sum(axis=0).reshape(2, *layout.kept_shape)
            all_dgamma, all_dbeta = (layout.vector(xp, a) for a in summed)
            numbers = input_numbers(gamma, rstd, all_dgamma, all_dbeta, count, dmean, dvar)
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
        spread = _vector("var", var, layout, backend)
        y = _normalize(backend, x, layout, mean, spread, gamma, beta, eps, residual, activation, out)
        if key is not None:
            again = backend.inference_again(
                layout, x, y, mean, var, gamma, beta, eps, residual, activation is not None, out
            )
            repeated.remember(key, again)
        return y


# --- the three kernels by themselves ----------------------------------------------------------------------------------


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
    rstd = _vector("rstd", rstd, layout, backend)
    return _normalize(backend, x, layout, mean, rstd, gamma, beta, None, residual, activation, out)


@on_device
def grad_sums(dy: Any, x: Any, mean: Any, rstd: Any, *, channel_axis: Axes = 1) -> tuple[Any, Any]:
    """The two sums of the backward pass: ``dgamma = sum(dy * (x - mean) * rstd)`` and ``dbeta = sum(dy)``.

    Parameters
    ----------
    dy, x : array
        Of one shape and dtype: float16, bfloat16, float32 or float64.
    mean, rstd : array
        Of any float dtype, broadcasting to the shape of the channel axes.
    channel_axis : int or tuple of ints
        The axes kept.

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
    backend = backend_of(one_kind({"dy": dy, "x": x, "mean": mean, "rstd": rstd}))
    x = arguments.data("x", x)
    layout = arguments.layout_for(x, channel_axis)
    dy = arguments.like("dy", dy, x)
    mean = _vector("mean", mean, layout, backend)
    rstd = _vector("rstd", rstd, layout, backend)
    dgamma, dbeta = backend.grad_sums(layout.fold(dy), layout.fold(x), None, mean, rstd)
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
    mean, rstd = _float64("mean", mean, layout, backend), _float64("rstd", rstd, layout, backend)
    gamma = _float64("gamma", gamma, layout, backend, 1.0)
    dgamma, dbeta = _float64("dgamma", dgamma, layout, backend), _float64("dbeta", dbeta, layout, backend)
    count = xp.full(mean.shape, float(count)) if isinstance(count, Real) else _float64("count", count, layout, backend)
    weight = arguments.combined_weight(xp, where, weights, x.shape, layout.kept)

    dx = backend.empty_like(x) if out is None else out
    target = _Target(backend, layout, dx, out is not None, x, dy, weight, mean)
    w_ = None if weight is None else layout.fold_weight(xp, weight, x.shape)
    numbers = input_numbers(gamma, rstd, dgamma, dbeta, count, 0.0, 0.0)
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
    bias, shift = _float64("kernel_bias", kernel_bias, layout, backend), _float64("beta", beta, layout, backend)
    mean, var = _float64("mean", mean, layout, backend), _float64("var", var, layout, backend)
    scale = _float64("gamma", gamma, layout, backend, 1.0) * reciprocal_std(var, eps)
    along = [-1 if i in layout.kept else 1 for i in range(kernel.ndim)]
    folded = kernel.astype(backend.xp.float64) * scale.reshape(along)
    return folded.astype(kernel.dtype), ((bias - mean) * scale + shift).astype(kernel.dtype)


# --- what they share --------------------------------------------------------------------------------------------------


class _Target:
    """The folded array that kernels write for a result, and the way from there to the caller's array.

    It is a view of the caller's array where that can be viewed and kernels can write it, else an array of its own.
    """

    def __init__(self, backend: Any, layout: Layout, result: Any, given: bool, *inputs: Any) -> None:
        self.layout, self.result = layout, arguments.plain(result)
        result = self.result
        view = backend.folded_view(layout, result)
        in_place = view is not None
        if given and in_place:
            # Kernels read and write element by element: an input may be the output, but not lie askew to it.
            in_place = all(backend.same_or_apart(result, a) for a in inputs if a is not None)
        self.in_place = in_place and backend.writable_in_place(view)
        if self.in_place:
            self.array = view
        else:
            self.array = backend.xp.empty(layout.folded, result.dtype.newbyteorder("="))

    def deliver(self) -> None:
        if not self.in_place:
            self.layout.unfold(self.array, self.result)


def _normalize(
    backend: Any, x: Any, layout: Layout, mean: Any, spread: Any, gamma: Any, beta: Any, eps: float | None,
    residual: Any, activation: Activation, out: Any,
) -> Any:  # fmt: skip
    """The common end of `normalize` and `batch_norm_inference`; spread, the rstd or the variance, is a vector."""
    relu = arguments.is_relu(activation)
    mean = _vector("mean", mean, layout, backend)
    scale = _vector("gamma", gamma, layout, backend, 1.0)
    shift = _vector("beta", beta, layout, backend)
    residual = arguments.like("residual", residual, x)
    out = arguments.output("out", out, x)
    y = backend.empty_like(x) if out is None else out
    target = _Target(backend, layout, y, out is not None, x, residual, mean, spread, gamma, beta)
    r_ = None if residual is None else layout.fold(residual)
    backend.normalize(layout.fold(x), mean, spread, scale, shift, eps, r_, relu, target.array)
    target.deliver()
    return y


def _vector(name: str, parameter: Any, layout: Layout, backend: Any, default: float = 0.0) -> Any:
    """A checked parameter as the backend's kernels take it."""
    if parameter is not None:
        arguments.parameter(name, parameter, layout)
    return backend.vector(layout, parameter, default)


def _float64(name: str, parameter: Any, layout: Layout, backend: Any, default: float = 0.0) -> Any:
    """A checked parameter as a float64 vector for formulas, which kernels take as well."""
    if parameter is None:
        return backend.xp.full(layout.folded[0] * layout.folded[2], default)
    return layout.vector(backend.xp, arguments.parameter(name, parameter, layout))


def _merged_over_ranks(xp: Any, gather: Gather, local: Moments) -> Moments:
    """All ranks' moments, merged in rank order."""
    vector = xp.concatenate([a.ravel() for a in local])
    rows = arguments.gathered(xp, gather(vector), vector.size)
    return merge(*(Moments(*row.reshape(3, *local.count.shape)) for row in rows))
