"""The operators ``torch.ops.fastbn``: what PyTorch's compiler, exporter and automatic differentiation see.

An operator takes and gives tensors and says how its results look (``register_fake``) and what its gradient is
(``register_autograd``). The statistics are results in float64 and inputs of the backward operator, with gradients of
their own: so gradients that reach them, and second derivatives, take the way that they take on paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastbn
from fastbn.torch.tensors import array, on_stream, tensor

# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; in float64 the mean, the sum of squares about it, and 1 / sqrt(variance + eps)."""
    with on_stream(x):
        y, saved = fastbn.batch_norm(
            array(x), _array(weight), _array(bias), eps=eps, residual=_array(residual),
            activation="relu" if relu else None, out=_out(x),
        )  # fmt: skip
        assert saved.moments is not None
        return tensor(y), tensor(saved.mean), tensor(saved.moments.m2), tensor(saved.rstd)


batch_norm = torch.library.custom_op("fastbn::batch_norm", _forward, mutates_args=())


@batch_norm.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, residual, relu, _ = inputs
    y, mean, _, rstd = output
    ctx.save_for_backward(x, y if relu else None, weight, mean, rstd)
    ctx.relu, ctx.has_residual = relu, residual is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Any, dmean: Any, dm2: Any, drstd: Any) -> tuple[Any, ...]:
    x, y, weight, mean, rstd = ctx.saved_tensors
    dvar = None if dm2 is None else dm2 * (x.numel() // x.shape[1])
    if drstd is not None:
        through = -0.5 * rstd**3 * drstd
        dvar = through if dvar is None else dvar + through
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dz = _backward()(
        dy, x, y, weight, mean, rstd, dmean, dvar, False, ctx.relu and ctx.has_residual
    )
    return dx, *_of_parameters(ctx, weight, dweight, dbias), _of_residual(ctx, dy, dz), None, None


batch_norm.register_autograd(_gradients, setup_context=_save)


# --- frozen statistics ------------------------------------------------------------------------------------------------


def _inference(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    relu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The output, from statistics that do not depend on x."""
    with on_stream(x):
        y = fastbn.batch_norm_inference(
            array(x), array(mean), array(var), _array(weight), _array(bias), eps=eps, residual=_array(residual),
            activation="relu" if relu else None, out=_out(x),
        )  # fmt: skip
        return tensor(y)


batch_norm_inference = torch.library.custom_op("fastbn::batch_norm_inference", _inference, mutates_args=())


@batch_norm_inference.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save_frozen(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, var, weight, _, residual, relu, eps = inputs
    ctx.save_for_backward(x, output if relu else None, weight, mean, var)
    ctx.relu, ctx.has_residual, ctx.eps = relu, residual is not None, eps


def _gradients_frozen(ctx: Any, dy: Any) -> tuple[Any, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    rstd = (var.double() + ctx.eps).rsqrt()
    dx, dweight, dbias, dz = _backward()(
        dy, x, y, weight, mean.double(), rstd, None, None, True, ctx.relu and ctx.has_residual
    )
    scale = rstd if weight is None else rstd * weight
    dmean = -scale * dbias if ctx.needs_input_grad[1] else None
    dvar = -0.5 * scale * rstd * dweight if ctx.needs_input_grad[2] else None
    of_statistics = (None if g is None else g.to(of.dtype) for g, of in ((dmean, mean), (dvar, var)))
    return dx, *of_statistics, *_of_parameters(ctx, weight, dweight, dbias, 3), _of_residual(ctx, dy, dz), None, None


batch_norm_inference.register_autograd(_gradients_frozen, setup_context=_save_frozen)


# --- backward ---------------------------------------------------------------------------------------------------------


def _sums_and_dx(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dmean: Tensor | None, dvar: Tensor | None, frozen: bool, with_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx; dweight and dbias in float64; and where it is asked for, dy where relu let it pass, else an empty tensor.

    Batch statistics are given with `y` where there was relu.
    """
    with on_stream(x):
        x_, mean_, rstd_ = array(x), array(mean), array(rstd)
        moments = None
        if not frozen:
            count = type(x_)(mean_.shape, np.float64)
            count.fill(x_.size // max(1, x_.shape[1]))
            moments = fastbn.Moments(count, mean_, mean_)  # of the sum of squares the backward pass knows rstd
        saved = fastbn.Saved(
            x_, _array(y), _array(weight), None, moments, mean_, rstd_, None if moments is None else moments.count, 1,
            None if y is None else "relu", with_dz, False,
        )  # fmt: skip
        grads = fastbn.batch_norm_backward(array(dy), saved, dmean=_array(dmean), dvar=_array(dvar), out=_out(x))
        dz = tensor(grads.residual) if with_dz else x.new_empty(0)
        return tensor(grads.x), tensor(grads.gamma), tensor(grads.beta), dz


batch_norm_backward = torch.library.custom_op("fastbn::batch_norm_backward", _sums_and_dx, mutates_args=())


@batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Any, rstd: Any, dmean: Any, dvar: Any, frozen: bool, with_dz: bool
) -> tuple[Tensor, ...]:
    sums = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), *sums, torch.empty_like(x) if with_dz else x.new_empty(0)


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.frozen, ctx.with_dz = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """By PyTorch's own operations, in float64: second derivatives are wanted rarely, and then right.

    `torch.func.vjp` takes the inputs for independent, as they are here: the mean's own dependence on x is forward's.
    """
    given = ctx.saved_tensors

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        found = _formula(*(None if t is None else next(rest) for t in given), frozen=ctx.frozen)
        return found if ctx.with_dz else found[:3]

    present = [t for t in given if t is not None]
    _, pull = torch.func.vjp(results, *(t.double() for t in present))
    pulled = iter(pull(tuple(g.double() for g in grads[: 3 + ctx.with_dz])))
    return *(None if t is None else next(pulled).to(t.dtype) for t in given), None, None


def _formula(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dmean: Tensor | None, dvar: Tensor | None, *, frozen: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (-1, *(1,) * (x.ndim - 2))
    reduced = [axis for axis in range(x.ndim) if axis != 1]
    dz = dy if y is None else torch.where(y <= 0, 0.0, dy)
    centred = x - mean.view(shape)
    xhat = centred * rstd.view(shape)
    dweight, dbias = (dz * xhat).sum(reduced), dz.sum(reduced)
    scale = rstd if weight is None else rstd * weight
    if frozen:
        return scale.view(shape) * dz, dweight, dbias, dz
    count = x.numel() // x.shape[1]
    dx = scale.view(shape) * (dz - (dbias.view(shape) + xhat * dweight.view(shape)) / count)
    if dmean is not None:
        dx = dx + dmean.view(shape) / count
    if dvar is not None:
        dx = dx + 2 * centred * dvar.view(shape) / count
    return dx, dweight, dbias, dz


batch_norm_backward.register_autograd(_second_gradients, setup_context=_save_backward)


# --- the short way ----------------------------------------------------------------------------------------------------


class Forward(torch.autograd.Function):
    """The operator `batch_norm` where nothing but differentiation looks on: fewer steps, and `torch.func` works."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


class Inference(torch.autograd.Function):
    """The operator `batch_norm_inference`, likewise."""

    forward = staticmethod(_inference)
    setup_context = staticmethod(_save_frozen)
    backward = staticmethod(_gradients_frozen)


class Backward(torch.autograd.Function):
    """The operator `batch_norm_backward`, likewise."""

    forward = staticmethod(_sums_and_dx)
    setup_context = staticmethod(_save_backward)
    backward = staticmethod(_second_gradients)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no compiler, exporter, mode or `vmap` is to see an operator, as far as PyTorch tells."""
    if torch.compiler.is_compiling():
        return False
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    transforms = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)
    if modes is None or transforms is None or modes():
        return False
    if any(transform.key().name != "Grad" for transform in transforms() or ()):
        return False
    return all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)


def _backward() -> Any:
    return Backward.apply if is_plain() else batch_norm_backward


# --- small parts ------------------------------------------------------------------------------------------------------


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else array(tensor)


def _out(x: Tensor) -> Any:
    """None where fastbn's own results, which reuse memory, are in PyTorch's order; else a tensor's memory."""
    dense = x.is_contiguous() or (
        x.ndim in (4, 5)
        and x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    )
    return None if dense else array(torch.empty_like(x))


def _of_parameters(ctx: Any, weight: Tensor | None, dweight: Tensor, dbias: Tensor, at: int = 1) -> tuple[Any, Any]:
    """In the parameters' dtypes, those that are asked for."""
    needed = ctx.needs_input_grad[at : at + 2]
    kind = dbias.dtype if weight is None else weight.dtype
    return dweight.to(kind) if needed[0] else None, dbias.to(kind) if needed[1] else None


def _of_residual(ctx: Any, dy: Tensor, dz: Tensor) -> Tensor | None:
    if not ctx.has_residual:
        return None
    return dz if ctx.relu else dy
