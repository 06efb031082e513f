"""`batch_norm` as a function of JAX arrays, and what XLA calls on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fastbn
from fastbn.jax import xla

DTYPES = ("float16", "bfloat16", "float32", "float64")
BITS = jnp.uint32  # two hold a float64


class Static(NamedTuple):
    """What a compiled call depends on beside shapes."""

    axis: int
    eps: float
    relu: bool


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    training: bool = True,
    rate: float = 0.1,
    correction: float = 1,
    eps: float = 1e-5,
    channel_axis: int = -1,
    residual: Any = None,
    activation: Literal["relu"] | None = None,
) -> tuple[Any, tuple[Any, Any]]:
    """Batch norm, and the running statistics after it.

    Parameters
    ----------
    x : jax.Array
        Of any shape; float16, bfloat16, float32 or float64.
    gamma, beta : jax.Array, optional
        (C,), C the size of the channel axis: scale and shift.
    running_mean, running_var : jax.Array, optional
        (C,). In training what the returned ones are made of; else the statistics to normalize with.
    training : bool, optional
        Whether to normalize with the batch's statistics.
    rate : float, optional
        The weight of the new batch in running statistics: PyTorch's momentum, 1 less Keras' and Flax'.
    correction : float, optional
        1 for an unbiased running variance, as PyTorch has it; 0 for Keras' and Flax'.
    eps : float, optional
        Added to the variance.
    channel_axis : int, optional
        The axis kept; the last, as is usual in JAX.
    residual : jax.Array, optional
        Added before the activation; x's shape and dtype.
    activation : {'relu'}, optional
        Applied last.

    Returns
    -------
    y : jax.Array
        x's shape and dtype.
    (running_mean, running_var) : tuple of jax.Array or None
        New ones in training, in the dtypes given, without a gradient; else those given.

    Raises
    ------
    TypeError
        For dtypes that are not floating point.
    ValueError
        For wrong shapes, an axis that x does not have, evaluation without statistics, an activation not known.

    Notes
    -----
    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` (Ioffe & Szegedy 2015). Differentiable once, in x, gamma, beta
    and the residual; in evaluation in the statistics as well. `jax.vmap` calls the kernels one after the other.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, fastbn.jax
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, (mean, var) = fastbn.jax.batch_norm(x, running_mean=jnp.zeros(2), running_var=jnp.ones(2))
    >>> y.round(3).tolist(), mean.round(3).tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """
    x = jnp.asarray(x)
    axis = _checked(x, channel_axis, residual, activation, gamma=gamma, beta=beta, mean=running_mean, var=running_var)
    static = Static(axis, float(eps), activation is not None)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both with training=False, got None")
        return _infer(static, x, running_mean, running_var, gamma, beta, residual), (running_mean, running_var)
    y, _, batch = _train(static, x, gamma, beta, residual)
    count = x.size // x.shape[axis] if x.size else 0
    divisor = count - correction
    mean = _moved(running_mean, batch[0], rate if count else 0.0)
    return y, (mean, _moved(running_var, batch[1] / max(divisor, 1), rate if divisor > 0 else 0.0))


def _moved(running: Any, batch: Any, rate: float) -> Any:
    """Towards the batch; a batch that tells nothing is left out."""
    if running is None or rate == 0.0:
        return running
    return ((1 - rate) * running + rate * jax.lax.stop_gradient(batch)).astype(running.dtype)


def _checked(x: Any, channel_axis: int, residual: Any, activation: Any, **vectors: Any) -> int:
    """The channel axis; raises for arguments that cannot be computed with."""
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(f"channel_axis: expected an axis of {x.ndim} dimensions, got {channel_axis}")
    axis: int = channel_axis % x.ndim
    for name, vector in vectors.items():
        if vector is not None and jnp.shape(vector) != (x.shape[axis],):
            raise ValueError(f"{name}: expected shape {(x.shape[axis],)}, got {jnp.shape(vector)}")
        if vector is not None and jnp.result_type(vector).name not in DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {jnp.result_type(vector)}")
    if residual is not None and (jnp.shape(residual) != x.shape or jnp.result_type(residual) != x.dtype):
        expected, got = f"{x.shape} {x.dtype}", f"{jnp.shape(residual)} {jnp.result_type(residual)}"
        raise ValueError(f"residual: expected {expected}, as x is, got {got}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return axis


# --- training ---------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(static: Static, x: Any, gamma: Any, beta: Any, residual: Any) -> tuple[Any, Any, Any]:
    """y; bits of (count, mean, m2, rstd); mean and m2 rounded."""
    channels = x.shape[static.axis]
    outputs = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((4, 2 * channels), BITS),
        jax.ShapeDtypeStruct((2, channels), jax.dtypes.canonicalize_dtype(np.float64)),
    )
    y, table, batch = _call("forward", static, outputs, x, gamma, beta, residual)
    return y, table, batch


def _train_forward(static: Static, x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
    results = _train(static, x, gamma, beta, residual)
    y, table, _ = results
    return results, (x, y if static.relu else None, gamma, beta, table, residual is not None)


def _train_backward(static: Static, saved: Any, cotangents: Any) -> Any:
    x, y, gamma, beta, table, has_residual = saved
    dx, dgamma, dbeta, dz = _backward(static, cotangents[0], x, y, gamma, table, False)
    return dx, _like(gamma, dgamma), _like(beta, dbeta), dz if has_residual else None


def _like(parameter: Any, gradient: Any) -> Any:
    return None if parameter is None else gradient.astype(parameter.dtype)


_train.defvjp(_train_forward, _train_backward)


# --- evaluation -------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _infer(static: Static, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any) -> Any:
    outputs = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    return _call("inference", static, outputs, x, mean, var, gamma, beta, residual)[0]


def _infer_forward(static: Static, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any) -> Any:
    y = _infer(static, x, mean, var, gamma, beta, residual)
    return y, (x, y if static.relu else None, mean, var, gamma, beta, residual is not None)


def _infer_backward(static: Static, saved: Any, dy: Any) -> Any:
    x, y, mean, var, gamma, beta, has_residual = saved
    dx, dgamma, dbeta, dz = _backward(static, dy, x, y, gamma, (mean, var), True)
    rstd = jax.lax.rsqrt(var + static.eps)
    scale = rstd if gamma is None else rstd * gamma
    of_statistics = (-scale * dbeta).astype(mean.dtype), (-0.5 * scale * rstd * dgamma).astype(var.dtype)
    return dx, *of_statistics, _like(gamma, dgamma), _like(beta, dbeta), dz if has_residual else None


_infer.defvjp(_infer_forward, _infer_backward)


def _backward(static: Static, dy: Any, x: Any, y: Any, gamma: Any, statistics: Any, frozen: bool) -> Any:
    """dx, dgamma, dbeta, and dy where relu let it pass."""
    sums = jax.ShapeDtypeStruct((2, x.shape[static.axis]), jax.dtypes.canonicalize_dtype(np.float64))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs = (like, sums, like) if static.relu else (like, sums)
    given = statistics if frozen else (statistics, None)
    dx, dsums, *dz = _call("frozen" if frozen else "backward", static, outputs, dy, x, y, gamma, *given)
    return dx, dsums[0], dsums[1], dz[0] if dz else dy


# --- from XLA to the host ---------------------------------------------------------------------------------------------


def _call(name: str, static: Static, outputs: Sequence[Any], *inputs: Any) -> tuple[Any, ...]:
    """The host's function of this name: on the CPU in place, elsewhere by way of a callback."""
    present = tuple(a for a in inputs if a is not None)
    there = sum(1 << i for i, a in enumerate(inputs) if a is not None)
    attributes = {"there": there, "axis": static.axis, "eps": static.eps, "relu": static.relu}

    def in_place(*arrays: Any) -> tuple[Any, ...]:
        call = jax.ffi.ffi_call(f"fastbn_{name}", outputs, vmap_method="sequential")
        typed = {"there": np.int64(there), "axis": np.int64(static.axis), "eps": np.float64(static.eps)}
        return tuple(call(*arrays, **typed, relu=np.int64(static.relu)))

    def by_callback(*arrays: Any) -> tuple[Any, ...]:
        def on_host(*copies: Any) -> tuple[Any, ...]:
            results = tuple(np.empty(o.shape, o.dtype) for o in outputs)
            HOST[name](attributes, [np.asarray(a) for a in copies], results)
            return results

        return tuple(jax.pure_callback(on_host, tuple(outputs), *arrays, vmap_method="sequential"))

    return jax.lax.platform_dependent(*present, cpu=in_place, default=by_callback)  # type: ignore[no-any-return]  # JAX is not typed here


def _given(attributes: dict[str, Any], inputs: Sequence[Any], count: int) -> list[Any]:
    """All inputs of a call, with None for those that were left out."""
    rest = iter(inputs)
    return [next(rest) if attributes["there"] >> i & 1 else None for i in range(count)]


def _options(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"channel_axis": attributes["axis"], "activation": "relu" if attributes["relu"] else None}


def _forward_on_host(attributes: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    x, gamma, beta, residual = _given(attributes, inputs, 4)
    y, table, batch = outputs
    options = _options(attributes)
    _, saved = fastbn.batch_norm(x, gamma, beta, eps=attributes["eps"], residual=residual, out=y, **options)
    assert saved.moments is not None
    table.view(np.float64)[...] = *saved.moments, saved.rstd
    batch[...] = saved.moments.mean, saved.moments.m2


def _inference_on_host(attributes: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    x, mean, var, gamma, beta, residual = _given(attributes, inputs, 6)
    options = _options(attributes)
    fastbn.batch_norm_inference(
        x, mean, var, gamma, beta, eps=attributes["eps"], residual=residual, out=outputs[0], **options
    )


def _backward_on_host(
    attributes: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any], frozen: bool = False
) -> None:
    dy, x, y, gamma, first, second = _given(attributes, inputs, 6)
    options, relu = _options(attributes), bool(attributes["relu"])
    if frozen:
        saved = fastbn.Saved.frozen(x, first, second, gamma, eps=attributes["eps"], y=y, **options)
        saved = saved._replace(has_residual=relu)
    else:
        count, mean, m2, rstd = np.ascontiguousarray(first).view(np.float64)
        moments = fastbn.Moments(count, mean, m2)
        axis, activation = options["channel_axis"], options["activation"]
        saved = fastbn.Saved(x, y, gamma, None, moments, mean, rstd, count, axis, activation, relu, False)
    grads = fastbn.batch_norm_backward(dy, saved, out=outputs[0])
    outputs[1][...] = grads.gamma, grads.beta
    if relu:
        outputs[2][...] = grads.residual


HOST: dict[str, xla.Function] = {
    "forward": _forward_on_host,
    "inference": _inference_on_host,
    "backward": _backward_on_host,
    "frozen": partial(_backward_on_host, frozen=True),
}
for _name, _function in HOST.items():
    xla.register(f"fastbn_{_name}", _function)
