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
    made: list[fastbn.Saved] = []
    with on_stream(x):
        y = _batch_norm(made, x, weight, bias, residual, relu, eps)
        (saved,) = made
        assert saved.moments is not None
        return tensor(y), tensor(saved.mean), tensor(saved.moments.m2), tensor(saved.rstd)


def _batch_norm(
    saved: list[fastbn.Saved], x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float
) -> Any:
    """The output, an array; what the backward pass needs is appended to the list."""
    activation: Any = "relu" if relu else None
    given = array(x), _array(weight), _array(bias)
    y, made = fastbn.batch_norm(*given, eps=eps, residual=_array(residual), activation=activation, out=_out(x))
    saved.append(made)
    return y


batch_norm = torch.library.custom_op("fastbn::batch_norm", _forward, mutates_args=())


@batch_norm.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, residual, relu, eps = inputs
    y, mean, _, rstd = output
    ctx.save_for_backward(x, y if relu else None, weight, mean, rstd)
    ctx.relu, ctx.has_residual, ctx.eps = relu, residual is not None, eps
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Any, dmean: Any, dm2: Any, drstd: Any) -> tuple[Any, ...]:
    x, _, _, _, rstd = saved = ctx.saved_tensors
    dvar = None if dm2 is None else dm2 * (x.numel() // x.shape[1])
    if drstd is not None:
        through = -0.5 * rstd**3 * drstd
        dvar = through if dvar is None else dvar + through
    return _gradients_of(ctx, saved, torch.zeros_like(x) if dy is None else dy, dmean, dvar)


def _gradients_of(ctx: Any, saved: Any, dy: Tensor, dmean: Any, dvar: Any) -> tuple[Any, ...]:
    x, y, weight, mean, rstd = saved
    with_dz = ctx.relu and ctx.has_residual
    dx, dweight, dbias, dz = _backward(dy, x, y, weight, mean, rstd, dmean, dvar, False, with_dz)
    at = len(ctx.needs_input_grad) - 5
    return dx, *_of_parameters(ctx, weight, dweight, dbias, at), _of_residual(ctx, dy, dz), None, None


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
    with_dz = ctx.relu and ctx.has_residual
    dx, dweight, dbias, dz = _backward(dy, x, y, weight, mean.double(), rstd, None, None, True, with_dz)
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


# --- ways to an operator ----------------------------------------------------------------------------------------------

NOBODY, GRAD, OTHERS = range(3)


def onlookers(*tensors: Tensor | None) -> int:
    """Who is to see an operator, as far as PyTorch tells: nobody but automatic differentiation; `torch.func.grad`,
    which wants functions of a form that costs more; others, as compilers, exporters, tracers, modes and `vmap`.
    """
    if _BLIND or torch.compiler.is_compiling() or _tracing() is not None or _modes():
        return OTHERS
    for t in tensors:
        if t is not None and ((type(t) is not Tensor and type(t) is not torch.nn.Parameter) or t.is_meta):
            return OTHERS
    if not _transformed():
        return NOBODY
    return GRAD if all(transform.key().name == "Grad" for transform in _transforms() or ()) else OTHERS


_tracing: Any = getattr(torch._C, "_get_tracing_state", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transformed: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_transforms: Any = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)
_dual_level = getattr(torch.autograd.forward_ad, "_current_level", None)
# PyTorch has no public way to ask. A version that does not answer is shown operators, which are always right.
_BLIND = None in (_tracing, _modes, _transformed, _transforms, _dual_level)


def train(
    seen: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Any, Any]:
    """The output, and in float64 the mean and the sum of squares about it, as arrays where nobody looks on."""
    if seen == NOBODY:
        saved: list[fastbn.Saved] = []
        given = x, weight, bias, residual
        if _is_differentiated(*given):
            y = Training.apply(saved, *given, relu, eps)
        else:
            with on_stream(x):
                y = tensor(_batch_norm(saved, *given, relu, eps))
        moments = saved[0].moments
        assert moments is not None
        return y, moments.mean, moments.m2
    forward = Forward.apply if seen == GRAD else batch_norm
    y, mean, m2, _ = forward(x, weight, bias, residual, relu, eps)
    return y, mean, m2


def infer(
    seen: int, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, relu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The output, from given statistics."""
    given = x, mean, var, weight, bias, residual
    if seen == NOBODY:
        y: Tensor = (Evaluation.apply if _is_differentiated(*given) else _inference)(*given, relu, eps)
    else:
        y = (Inference.apply if seen == GRAD else batch_norm_inference)(*given, relu, eps)
    return y


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """By reverse differentiation, or by forward differentiation, which PyTorch then says is not there."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Training(torch.autograd.Function):
    """The operator `batch_norm` where nobody looks on: on small tensors in a third of the time.

    One result. The statistics, which no loss reaches, stay arrays; they go to the caller by a list.
    """

    @staticmethod
    def forward(
        ctx: Any, saved: list[fastbn.Saved], x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float
    ) -> Tensor:
        with on_stream(x):
            y = tensor(_batch_norm(saved, x, weight, bias, residual, relu, eps))
        ctx.save_for_backward(x, y if relu else None, weight)
        (made,) = saved
        if residual is not None and not relu:
            made = made._replace(has_residual=False)  # its gradient is dy itself
        ctx.statistics = made[3:]  # what is no tensor of PyTorch's
        ctx.relu, ctx.has_residual, ctx.eps = relu, residual is not None, eps
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 7
        x, y, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or onlookers(dy, x, y, weight) != NOBODY:
            # They are to see where the statistics come from.
            _, mean, _, rstd = batch_norm(x, None, None, None, False, ctx.eps)
            return None, *_gradients_of(ctx, (x, y, weight, mean, rstd), dy, None, None)
        with on_stream(x):
            gamma = _array(weight)
            saved = fastbn.Saved(array(x), _array(y), gamma, *ctx.statistics)
            grads = fastbn.batch_norm_backward(array(dy), saved, out=_out(x))
            kind = grads.gamma.dtype if gamma is None else gamma.dtype
            of_parameters = (
                tensor(g.astype(kind)) if wanted else None
                for g, wanted in zip(grads[1:3], ctx.needs_input_grad[2:4], strict=True)
            )
            dz = dy if grads.residual is None else tensor(grads.residual)
            return None, tensor(grads.x), *of_parameters, dz if ctx.has_residual else None, None, None


class Evaluation(torch.autograd.Function):
    """The operator `batch_norm_inference`, likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _inference(*inputs)
        _save_frozen(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients_frozen(ctx, dy)


class Forward(torch.autograd.Function):
    """The operator `batch_norm` for `torch.func.grad`."""

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


def _backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen = onlookers(*given[:8])
    if seen == NOBODY and not torch.is_grad_enabled():
        return _sums_and_dx(*given)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = (batch_norm_backward if seen == OTHERS else Backward.apply)(*given)
    return found


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


def _of_parameters(ctx: Any, weight: Tensor | None, dweight: Tensor, dbias: Tensor, at: int) -> tuple[Any, Any]:
    """In the parameters' dtypes, those that are asked for."""
    needed = ctx.needs_input_grad[at : at + 2]
    kind = dbias.dtype if weight is None else weight.dtype
    return dweight.to(kind) if needed[0] else None, dbias.to(kind) if needed[1] else None


def _of_residual(ctx: Any, dy: Tensor, dz: Tensor) -> Tensor | None:
    if not ctx.has_residual:
        return None
    return dz if ctx.relu else dy
