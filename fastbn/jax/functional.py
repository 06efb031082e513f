"""`batch_norm` as a function of JAX arrays, and what XLA calls on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.exceptions import AxisError
from numpy.lib.array_utils import normalize_axis_tuple

import fastbn
from fastbn.formulas import LEAST_EPS
from fastbn.jax import xla
from fastbn.saved import make_saved

DTYPES = ("float16", "bfloat16", "float32", "float64")
BITS = jnp.uint32  # two hold a float64


class Static(NamedTuple):
    """What a compiled call depends on beside shapes."""

    axes: tuple[int, ...]
    """Those kept, in x's order."""
    eps: float
    relu: bool

    def channels(self, x: Any) -> tuple[int, ...]:
        """The shape of parameters and statistics."""
        return tuple(x.shape[axis] for axis in self.axes)


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    training: bool = True,
    rate: Any = 0.1,
    correction: float = 1,
    eps: float = 1e-5,
    channel_axis: int | tuple[int, ...] = -1,
    residual: Any = None,
    activation: Literal["relu"] | None = None,
) -> tuple[Any, tuple[Any, Any]]:
    """Batch norm, and the running statistics after it.

    Parameters
    ----------
    x : jax.Array
        Of any shape; float16, bfloat16, float32 or float64.
    gamma, beta : jax.Array, optional
        Scale and shift: (C,), C the size of the channel axis; with several axes, what broadcasts to their shape.
    running_mean, running_var : jax.Array, optional
        (C,), or of the shape of the channel axes. In training what the returned ones are made of; else the statistics
        to normalize with, which may broadcast as `gamma` does.
    training : bool, optional
        Whether to normalize with the batch's statistics.
    rate : float or jax.Array without dimensions, optional
        The weight of the new batch in running statistics, in [0, 1]: PyTorch's momentum, 1 less Keras' and Flax'. It
        may be traced, as a schedule's, and has a gradient.
    correction : float, optional
        1 for an unbiased running variance, as PyTorch has it; 0 for Keras' and Flax'.
    eps : float, optional
        Added to the variance. Compiled into the program: not traced.
    channel_axis : int or tuple of ints, optional
        The axis kept; the last, as is usual in JAX. Several are taken in x's order: ``(0, -1)`` is instance norm.
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
        For dtypes that are not floating point, an `eps` that is traced.
    ValueError
        For wrong shapes, an axis that x does not have, evaluation without statistics, an activation not known, a `rate`
        or `eps` out of range.

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
    static = _checked(x, channel_axis, eps, residual, activation)
    channels, several = static.channels(x), not isinstance(channel_axis, (int, np.integer))
    gamma, beta = (_parameter(n, p, channels, several) for n, p in (("gamma", gamma), ("beta", beta)))
    mean, var = (
        _parameter(name, statistic, channels, several and not training)
        for name, statistic in (("running_mean", running_mean), ("running_var", running_var))
    )
    x, mean, var, gamma, beta, residual = _varying_alike(x, mean, var, gamma, beta, residual)
    if not training:
        if mean is None or var is None:
            raise ValueError("running_mean, running_var: expected both with training=False, got None")
        return _infer(static, x, mean, var, gamma, beta, residual), (running_mean, running_var)
    rate = _checked_rate(rate)
    y, _, batch = _train(static, x, gamma, beta, residual)
    count = x.size // math.prod(channels) if x.size else 0
    if count > 0:
        mean = _moved(mean, batch[0], rate)
    if count > correction:
        var = _moved(var, batch[1] * (count / (count - correction)), rate)
    return y, (mean, var)


def _moved(running: Any, batch: Any, rate: Any) -> Any:
    """``(1 - rate) * running + rate * batch``; the side of weight 0 adds nothing, though it be infinite."""
    if running is None:
        return None
    batch = jax.lax.stop_gradient(batch)
    rate = rate if isinstance(rate, Real) else rate.astype(batch.dtype)
    # Finite sides stay, whatever their weight: they are the derivative by the rate.
    old = jnp.where((rate != 1) | jnp.isfinite(running), running, 0).astype(batch.dtype)
    new = jnp.where((rate != 0) | jnp.isfinite(batch), batch, 0)
    return ((1 - rate) * old + rate * new).astype(running.dtype)


def _checked(x: Any, channel_axis: Any, eps: Any, residual: Any, activation: Any) -> Static:
    """What is static; raises for arguments that cannot be computed with."""
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    try:
        axes = tuple(sorted(normalize_axis_tuple(channel_axis, x.ndim, "channel_axis")))
    except AxisError:
        raise ValueError(f"channel_axis: expected an axis of {x.ndim} dimensions, got {channel_axis}") from None
    except TypeError:
        raise TypeError(f"channel_axis: expected an int or a tuple of ints, got {channel_axis!r}") from None
    if residual is not None and (jnp.shape(residual) != x.shape or jnp.result_type(residual) != x.dtype):
        expected, got = f"{x.shape} {x.dtype}", f"{jnp.shape(residual)} {jnp.result_type(residual)}"
        raise ValueError(f"residual: expected {expected}, as x is, got {got}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return Static(axes, _checked_eps(eps), activation is not None)


def _checked_eps(eps: Any) -> float:
    """A number that the program is compiled for."""
    if isinstance(eps, jax.core.Tracer):
        raise TypeError("eps: expected a number, got a traced one; make it static, by static_argnames of jax.jit")
    number = float(_number("eps", eps))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return number


def _checked_rate(rate: Any) -> Any:
    """A number in [0, 1]; of arrays, which may be traced, the value is not looked at."""
    number = _number("rate", rate)
    if isinstance(rate, Real) and not 0 <= number <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate}")
    return number


def _number(name: str, value: Any) -> Any:
    """A real number, Python's or NumPy's, or an array that holds one."""
    if isinstance(value, Real):
        return value
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    if value.shape != ():
        raise ValueError(f"{name}: expected a number, got an array of shape {value.shape}")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected a real number, got dtype {value.dtype}")
    return jnp.asarray(value)


def _parameter(name: str, value: Any, channels: tuple[int, ...], broadcasts: bool) -> Any:
    """None or a number for each channel."""
    if value is None:
        return None
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    sizes = zip(reversed(shape), reversed(channels), strict=False)
    fits = len(shape) <= len(channels) and all(size in (1, channel) for size, channel in sizes)
    if shape != channels and not (broadcasts and fits):
        expected = f"a shape that broadcasts to {channels}" if broadcasts else f"shape {channels}"
        raise ValueError(f"{name}: expected {expected}, got {shape}")
    if dtype.name not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")
    if shape == channels:
        return value
    # Its gradient is a sum over what it is broadcast along: not in half precision.
    return jnp.broadcast_to(jnp.asarray(value, jnp.promote_types(dtype, jnp.float32)), channels)


# --- training ---------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(static: Static, x: Any, gamma: Any, beta: Any, residual: Any) -> tuple[Any, Any, Any]:
    """y; bits of (count, mean, m2, rstd); mean and variance rounded."""
    channels = static.channels(x)
    outputs = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((4, *channels, 2), BITS),
        jax.ShapeDtypeStruct((2, *channels), jax.dtypes.canonicalize_dtype(np.float64)),
    )
    y, table, batch = _call("forward", static, outputs, x, gamma, beta, residual)
    return y, table, batch


def _train_forward(static: Static, x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
    results = _train(static, x, gamma, beta, residual)
    y, table, _ = results
    keeps_y = static.relu and (residual is not None or static.eps < LEAST_EPS)
    return results, (x, y if keeps_y else None, gamma, beta, table, residual is not None)


def _train_backward(static: Static, saved: Any, cotangents: Any) -> Any:
    x, y, gamma, beta, table, has_residual = saved
    dx, dgamma, dbeta, dz = _backward(static, cotangents[0], x, y, gamma, (table, beta), False)
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
    rstd = jax.lax.rsqrt(var.astype(dbeta.dtype) + static.eps)
    scale = rstd if gamma is None else rstd * gamma.astype(dbeta.dtype)
    of_statistics = (-scale * dbeta).astype(mean.dtype), (-0.5 * scale * rstd * dgamma).astype(var.dtype)
    return dx, *of_statistics, _like(gamma, dgamma), _like(beta, dbeta), dz if has_residual else None


_infer.defvjp(_infer_forward, _infer_backward)


def _backward(static: Static, dy: Any, x: Any, y: Any, gamma: Any, statistics: Any, frozen: bool) -> Any:
    """dx, dgamma, dbeta, and dy where relu let it pass; statistics are mean and var, or a table and beta."""
    sums = jax.ShapeDtypeStruct((2, *static.channels(x)), jax.dtypes.canonicalize_dtype(np.float64))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs = (like, sums) if y is None else (like, sums, like)
    dx, dsums, *dz = _call("frozen" if frozen else "backward", static, outputs, dy, x, y, gamma, *statistics)
    return dx, dsums[0], dsums[1], dz[0] if dz else dy


# --- axes of a mesh ---------------------------------------------------------------------------------------------------


def _varies_over(a: Any) -> frozenset[str]:
    """The axes of `jax.shard_map`'s mesh along which an array has other values."""
    kind = jax.typeof(a) if hasattr(jax, "typeof") else None
    axes = getattr(kind, "manual_axis_type", kind)
    return frozenset(getattr(axes, "varying", None) or getattr(kind, "vma", None) or ())


def _varying(arrays: Sequence[Any], along: frozenset[str]) -> tuple[Any, ...]:
    """The same, typed as varying along these axes: XLA's calls are typed as varying along none."""

    def typed(a: Any) -> Any:
        missing = tuple(sorted(along - _varies_over(a))) if a is not None else ()
        if not missing:
            return a
        return jax.lax.pcast(a, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(a, missing)

    return tuple(map(typed, arrays)) if along else tuple(arrays)


def _varying_alike(*arrays: Any) -> tuple[Any, ...]:
    """All along the axes of any: so gradients of what does not vary are sums over the mesh."""
    return _varying(arrays, frozenset().union(*(_varies_over(a) for a in arrays if a is not None)))


# --- from XLA to the host ---------------------------------------------------------------------------------------------


def _call(name: str, static: Static, outputs: Sequence[Any], *inputs: Any) -> tuple[Any, ...]:
    """The host's function of this name: on the CPU in place, elsewhere by way of a callback."""
    present = tuple(a for a in inputs if a is not None)
    there = sum(1 << i for i, a in enumerate(inputs) if a is not None)
    axes = sum(1 << axis for axis in static.axes)
    attributes = {"there": there, "axes": axes, "eps": static.eps, "relu": static.relu}

    def in_place(*arrays: Any) -> tuple[Any, ...]:
        call = jax.ffi.ffi_call(f"fastbn_{name}", outputs, vmap_method="sequential")
        typed = {"there": np.int64(there), "axes": np.int64(axes), "eps": np.float64(static.eps)}
        return tuple(call(*arrays, **typed, relu=np.int64(static.relu)))

    def by_callback(*arrays: Any) -> tuple[Any, ...]:
        def on_host(*copies: Any) -> tuple[Any, ...]:
            results = tuple(np.empty(o.shape, o.dtype) for o in outputs)
            HOST[name](attributes, [np.asarray(a) for a in copies], results)
            return results

        return tuple(jax.pure_callback(on_host, tuple(outputs), *arrays, vmap_method="sequential"))

    results: tuple[Any, ...] = jax.lax.platform_dependent(*present, cpu=in_place, default=by_callback)
    return _varying(results, frozenset().union(*map(_varies_over, present)))


def _given(attributes: dict[str, Any], inputs: Sequence[Any], count: int) -> list[Any]:
    """All inputs of a call, with None for those that were left out."""
    rest = iter(inputs)
    return [next(rest) if attributes["there"] >> i & 1 else None for i in range(count)]


def _options(attributes: dict[str, Any]) -> dict[str, Any]:
    bits = attributes["axes"]
    axes = tuple(axis for axis in range(bits.bit_length()) if bits >> axis & 1)
    one = len(axes) == 1  # calls like an earlier one are known by an int
    return {"channel_axis": axes[0] if one else axes, "activation": "relu" if attributes["relu"] else None}


def _forward_on_host(attributes: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    x, gamma, beta, residual = _given(attributes, inputs, 4)
    y, table, batch = outputs
    options = _options(attributes)
    _, saved = fastbn.batch_norm(x, gamma, beta, eps=attributes["eps"], residual=residual, out=y, **options)
    assert saved.moments is not None
    table.view(np.float64)[..., 0] = *saved.moments, saved.rstd
    count, mean, m2 = saved.moments
    with np.errstate(over="ignore"):  # beyond float32
        batch[...] = mean, m2 / np.maximum(count, 1)


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
    options, with_dz = _options(attributes), y is not None
    if frozen:
        saved = fastbn.Saved.frozen(x, first, second, gamma, eps=attributes["eps"], y=y, **options)
        saved = saved._replace(has_residual=with_dz)
    else:
        count, mean, m2, rstd = np.ascontiguousarray(first).view(np.float64)[..., 0]
        moments = fastbn.Moments(count, mean, m2)
        saved = make_saved(
            x=x, y=y, gamma=gamma, beta=second, weight=None, moments=moments, mean=mean, rstd=rstd,
            has_residual=with_dz, gathered=False, **options,
        )  # fmt: skip
    grads = fastbn.batch_norm_backward(dy, saved, out=outputs[0])
    outputs[1][...] = grads.gamma, grads.beta
    if with_dz:
        outputs[2][...] = grads.residual


HOST: dict[str, xla.Function] = {
    "forward": _forward_on_host,
    "inference": _inference_on_host,
    "backward": _backward_on_host,
    "frozen": partial(_backward_on_host, frozen=True),
}
for _name, _function in HOST.items():
    xla.register(f"fastbn_{_name}", _function)
