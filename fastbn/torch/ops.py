"""The operators ``torch.ops.fastbn``: what PyTorch's compiler, exporter and automatic differentiation see.

An operator takes and gives tensors and says how its results look (`register_fake`), what a batch of calls is
(`register_vmap`), and its derivatives. Those are `torch.autograd.Function`'s, one an operator, which
`torch.func` takes in any nest. The statistics are results in float64 and inputs of the backward operator, with
derivatives of their own: so what reaches them, and second derivatives, take the way that they take on paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import fastbn
from fastbn.torch import formulas, kernels
from fastbn.torch.formulas import along_channels, values_per_channel
from fastbn.torch.kernels import optional, out
from fastbn.torch.tensors import array, on_stream, tensor

# --- active transforms ------------------------------------------------------------------------------------------------

NONE, TRANSFORMS, OTHERS = range(3)


def active_transforms(*tensors: Tensor | None) -> int:
    """Who is to see an operator, as far as PyTorch tells: nobody but reverse differentiation; transforms, as those of
    `torch.func` and forward differentiation, which want functions of a form that costs more; others, as compilers,
    exporters, tracers and modes.
    """
    if _BLIND or torch.compiler.is_compiling():
        return OTHERS
    if forward_ad._current_level >= 0 or _transformed():
        return OTHERS if "Functionalize" in _names_of_transforms() else TRANSFORMS  # which takes no functions
    if _tracing() is not None or _modes():
        return OTHERS
    for t in tensors:
        if t is None:
            continue
        if (type(t) is not Tensor and type(t) is not Parameter) or t.is_meta:
            return OTHERS
    return NONE


def _active_transforms_backwards(*tensors: Tensor | None) -> int:
    """Batches of gradients, of ``is_grads_batched=True``, are no transform to PyTorch but hold no memory either."""
    if not _BLIND:
        for t in tensors:
            if t is not None and _is_batch(t):
                return OTHERS
    return active_transforms(*tensors)


def _names_of_transforms() -> list[str]:
    return [transform.key().name for transform in _transforms() or ()]


def _is_differentiated(*tensors: Any) -> bool:
    """By a transform, at the level that an operator's call has reached."""
    if _transformed is not None and _transformed() and not {"Grad", "Jvp"}.isdisjoint(_names_of_transforms()):
        return True
    enabled = _forwards is None or _forwards()
    # The one level there is: within a compiled graph PyTorch enters it without a word.
    return enabled and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors
    )


_tracing: Any = getattr(torch._C, "_get_tracing_state", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transformed: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_forwards: Any = getattr(torch._C, "_is_fwd_grad_enabled", None)
_functorch: Any = getattr(torch._C, "_functorch", None)
_transforms: Any = getattr(_functorch, "get_interpreter_stack", None)
_is_batch: Any = getattr(_functorch, "is_legacy_batchedtensor", None)
_dual_level = getattr(forward_ad, "_current_level", None)
# PyTorch has no public way to ask. A version that does not answer is shown operators, which are always right.
_BLIND = None in (_tracing, _modes, _transformed, _forwards, _transforms, _is_batch, _dual_level)

# --- batches of calls -------------------------------------------------------------------------------------------------


def _mapped(call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    """A batch of calls is one call, with the mapped axis beside the channels."""
    size = info.batch_size

    def beside_channels(t: Any, axis: int | None) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
        return t.flatten(0, 1) if t.ndim == 2 else t.movedim(0, 1).flatten(1, 2)

    def apart(t: Tensor) -> tuple[Tensor, int]:
        axis = int(t.ndim > 1)
        return t.unflatten(axis, (size, t.shape[axis] // size)), axis

    results = call(*map(beside_channels, given, in_dims))
    if isinstance(results, Tensor):
        return apart(results)
    return tuple(zip(*map(apart, results), strict=True))


# --- operators --------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastbn", "FRAGMENT")


def _define(function: type[torch.autograd.Function], name: str, fake: Callable[..., Any]) -> None:
    """The operator of a kernel, with the derivatives of a function.

    Where `torch.func` or forward differentiation meet the operator itself, which PyTorch would let through without a
    tangent, the formula stands for it.
    """
    kernel = getattr(kernels, name)
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.fastbn, name).default

    def differentiable(*given: Any) -> Any:
        if _is_differentiated(*given):
            return getattr(formulas, name)(*given)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
            return function.apply(*given)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*given)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_library)
    torch.library.register_vmap(
        f"fastbn::{name}", lambda info, in_dims, *given: _mapped(operator, info, in_dims, given), lib=_library
    )
    function.forward = staticmethod(operator)


def _fake_batch_norm(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))


def _fake_batch_norm_inference(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_batch_norm_backward(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    sums = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), *sums, torch.empty_like(x) if others[-1] else x.new_empty(0)


class Forward(torch.autograd.Function):
    """Of the operator `batch_norm`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, residual, relu, eps = inputs
        y, mean, _, rstd = output
        _save(ctx, x, y if relu else None, weight, mean, rstd)
        ctx.relu, ctx.has_residual, ctx.eps, ctx.of_bias = relu, residual is not None, eps, _dtype(bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Any, dmean: Any, dm2: Any, drstd: Any) -> tuple[Any, ...]:
        x, _, _, _, rstd = saved = ctx.saved_tensors
        dvar = None if dm2 is None else dm2 * values_per_channel(x)
        if drstd is not None:
            through = -0.5 * rstd**3 * drstd
            dvar = through if dvar is None else dvar + through
        return _gradients(ctx, saved, torch.zeros_like(x) if dy is None else dy, dmean, dvar, 1)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, dresidual: Any, *_: Any) -> tuple[Tensor, ...]:
        """``d xhat = rstd * (dx - mean(dx) - xhat * mean(dx * xhat))``: the map from dy to the gradient of x is its
        own transpose.
        """
        x, y, weight, mean, rstd = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        dy, of_xhat, of_x, _ = backward(dx, x, None, weight, mean, rstd, None, None, False, False)
        dy = dy if dresidual is None else dy + dresidual
        if dweight is not None:
            dy = _affine(x, mean, rstd**-2, dweight, dbias, dy, 0.0)
        elif dbias is not None:
            dy = (dy + along_channels(dbias, x)).to(x.dtype)
        count = values_per_channel(x)
        return _where_positive(y, dy), of_x / count, 2 * of_xhat / rstd, -(rstd**2) * of_xhat / count

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        x, *others, relu, eps = given
        if in_dims[0] is not None:
            return _mapped(Forward.apply, info, in_dims, given)
        _, mean, m2, rstd = Forward.apply(x, None, None, None, False, eps)  # once for all
        frozen = x, mean, rstd**-2, *others, relu, 0.0
        y, axis = _mapped(Inference.apply, info, (None, None, *in_dims), frozen)
        return (y, mean, m2, rstd), (axis, None, None, None)


class Inference(torch.autograd.Function):
    """Of the operator `batch_norm_inference`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, mean, var, weight, bias, residual, relu, eps = inputs
        _save(ctx, x, output if relu else None, weight, mean, var)
        ctx.relu, ctx.has_residual, ctx.eps, ctx.of_bias = relu, residual is not None, eps, _dtype(bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        return (None,) * 8 if dy is None else _gradients_frozen(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dmean: Any, dvar: Any, dweight: Any, dbias: Any, dresidual: Any, *_: Any) -> Tensor:
        """``d xhat = rstd * (dx - dmean) - xhat * rstd**2 * dvar / 2``."""
        x, y, weight, mean, var = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        dmean = torch.zeros_like(mean) if dmean is None else dmean
        dy = _affine(dx, dmean, var, weight, dbias, dresidual, ctx.eps)
        if dvar is not None:
            of_rstd = -0.5 * dvar / (var.double() + ctx.eps)
            of_rstd = of_rstd if weight is None else of_rstd * weight
            dweight = of_rstd if dweight is None else of_rstd + dweight
        if dweight is not None:
            dy = _affine(x, mean, var, dweight, None, dy, ctx.eps)
        return _where_positive(y, dy)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        return _mapped(Inference.apply, info, in_dims, given)


class Backward(torch.autograd.Function):
    """Of the operator `batch_norm_backward`: derivatives by the formula.

    `torch.func.vjp` takes the inputs for independent, as they are here: the mean's own dependence on x is forward's.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, *inputs[:8])
        ctx.how = inputs[8:]

    @staticmethod
    def _pullback(ctx: Any) -> tuple[Any, Callable[..., Any], list[Tensor]]:
        """Of the results, from those of the tensors that are there."""
        given = ctx.saved_tensors
        present = [t for t in given if t is not None]

        def results(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            arguments: list[Any] = [None if t is None else next(rest) for t in given]
            return formulas.batch_norm_backward(*arguments, *ctx.how)

        return *torch.func.vjp(results, *present), present

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, pull, _ = Backward._pullback(ctx)
        pulled = iter(pull(grads))
        return *(None if t is None else next(pulled) for t in ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        """Pulled back twice, as a pullback is linear: forward differentiation cannot be begun within itself."""
        results, pull, present = Backward._pullback(ctx)
        _, push = torch.func.vjp(pull, tuple(map(torch.zeros_like, results)))
        given = (t for t, of in zip(tangents, ctx.saved_tensors, strict=False) if of is not None)
        (pushed,) = push(tuple(torch.zeros_like(of) if t is None else t for t, of in zip(given, present, strict=True)))
        return pushed

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        return _mapped(Backward.apply, info, in_dims, given)


_define(Forward, "batch_norm", _fake_batch_norm)
_define(Inference, "batch_norm_inference", _fake_batch_norm_inference)
_define(Backward, "batch_norm_backward", _fake_batch_norm_backward)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _gradients(ctx: Any, saved: Any, dy: Tensor, dmean: Any, dvar: Any, at: int) -> tuple[Any, ...]:
    """Of the operator's inputs; its weight is the function's input ``at``."""
    x, y, weight, mean, rstd = saved
    with_dz = ctx.relu and ctx.has_residual
    dx, dweight, dbias, dz = backward(dy, x, y, weight, mean, rstd, dmean, dvar, False, with_dz)
    return dx, *_of_parameters(ctx, weight, dweight, dbias, at), _of_residual(ctx, dy, dz), None, None


def _gradients_frozen(ctx: Any, dy: Any) -> tuple[Any, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    rstd = (var.double() + ctx.eps).rsqrt()
    with_dz = ctx.relu and ctx.has_residual
    dx, dweight, dbias, dz = backward(dy, x, y, weight, mean.double(), rstd, None, None, True, with_dz)
    scale = rstd if weight is None else rstd * weight
    dmean = -scale * dbias if ctx.needs_input_grad[1] else None
    dvar = -0.5 * scale * rstd * dweight if ctx.needs_input_grad[2] else None
    of_statistics = (None if g is None else g.to(of.dtype) for g, of in ((dmean, mean), (dvar, var)))
    return dx, *of_statistics, *_of_parameters(ctx, weight, dweight, dbias, 3), _of_residual(ctx, dy, dz), None, None


def _of_parameters(ctx: Any, weight: Tensor | None, dweight: Tensor, dbias: Tensor, at: int) -> tuple[Any, Any]:
    """In the parameters' dtypes, those that are asked for."""
    needed = ctx.needs_input_grad[at : at + 2]
    return dweight.to(_dtype(weight)) if needed[0] else None, dbias.to(ctx.of_bias) if needed[1] else None


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _of_residual(ctx: Any, dy: Tensor, dz: Tensor) -> Tensor | None:
    if not ctx.has_residual:
        return None
    return dz if ctx.relu else dy


def _affine(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, residual: Any, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias + residual``, of which tangents are made."""
    seen = active_transforms(x, mean, var, weight, bias, residual)
    return infer(seen, x, mean, var, weight, bias, residual, False, eps)


def _where_positive(y: Tensor | None, dy: Tensor) -> Tensor:
    return dy if y is None else torch.where(y <= 0, 0.0, dy)


# --- ways to an operator ----------------------------------------------------------------------------------------------


def train(
    seen: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float,
    update: kernels.Update | None = None,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """The output, and in float64 the mean and the sum of squares about it, as arrays where nobody looks on.

    There running statistics may be updated.
    """
    if seen == NONE:
        saved: list[fastbn.Saved] = []
        given = x, weight, bias, residual
        if _has_gradient(*given):
            y = Training.apply(saved, *given, relu, eps, update)
        else:
            with on_stream(x):
                y = tensor(kernels.normalized(saved, *given, relu, eps, update))
        moments = saved[0].moments
        assert moments is not None
        return y, moments.mean, moments.m2
    y, mean, m2, _ = _way(seen, Forward, torch.ops.fastbn.batch_norm)(x, weight, bias, residual, relu, eps)
    return y, mean, m2


def infer(
    seen: int, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, relu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The output, from given statistics."""
    given = x, mean, var, weight, bias, residual
    if seen == NONE:
        y: Tensor = (Evaluation.apply if _has_gradient(*given) else kernels.batch_norm_inference)(*given, relu, eps)
    else:
        y = _way(seen, Inference, torch.ops.fastbn.batch_norm_inference)(*given, relu, eps)
    return y


def backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the residual's, where it is asked for."""
    seen = _active_transforms_backwards(*given[:8])
    if seen == NONE and not torch.is_grad_enabled():
        return kernels.batch_norm_backward(*given)
    way = Backward.apply if seen == NONE else _way(seen, Backward, torch.ops.fastbn.batch_norm_backward)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = way(*given)
    return found


def _way(seen: int, function: type[torch.autograd.Function], operator: Any) -> Any:
    """PyTorch loses the outer tangent of a function that it differentiates forwards twice: not the operator's."""
    once = seen == TRANSFORMS and _names_of_transforms().count("Jvp") < 2
    return function.apply if once else operator


def _has_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


class Training(torch.autograd.Function):
    """The operator `batch_norm` where nobody looks on: on small tensors in a third of the time.

    One result. The statistics, which no loss reaches, stay arrays; they go to the caller by a list.
    """

    @staticmethod
    def forward(
        ctx: Any, saved: list[fastbn.Saved], x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float,
        update: kernels.Update | None,
    ) -> Tensor:  # fmt: skip
        with on_stream(x):
            y = tensor(kernels.normalized(saved, x, weight, bias, residual, relu, eps, update))
        (made,) = saved
        ctx.save_for_backward(x, None if made.y is None else y, weight, None if made.beta is None else bias)
        if residual is not None and not relu:
            made = made._replace(has_residual=False)  # its gradient is dy itself
        ctx.saved = made._replace(x=None, y=None, gamma=None, beta=None)  # these are tensors of PyTorch's
        ctx.relu, ctx.has_residual, ctx.eps, ctx.of_bias = relu, residual is not None, eps, _dtype(bias)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 8
        x, y, weight, bias = ctx.saved_tensors
        seen = _active_transforms_backwards(dy, x, y, weight)
        if torch.is_grad_enabled() or seen != NONE:
            # They are to see where the statistics come from.
            again = ctx.relu and y is None
            forward = _way(seen, Forward, torch.ops.fastbn.batch_norm)
            given = (weight, bias) if again else (None, None)
            found, mean, _, rstd = forward(x, *given, None, again, ctx.eps)
            y = found if again else y
            return None, *_gradients(ctx, (x, y, weight, mean, rstd), dy, None, None, 2), None
        with on_stream(x), np.errstate(all="ignore"):  # PyTorch is silent about what overflows a dtype
            gamma = optional(weight)
            saved = ctx.saved._replace(x=array(x), y=optional(y), gamma=gamma, beta=optional(bias))
            grads = fastbn.batch_norm_backward(array(dy), saved, out=out(x))
            of_parameters = (
                tensor(g).to(dtype) if wanted else None
                for g, dtype, wanted in zip(
                    (grads.gamma, grads.beta), (_dtype(weight), ctx.of_bias), ctx.needs_input_grad[2:4], strict=True
                )
            )
            dz = dy if grads.residual is None else tensor(grads.residual)
            return None, tensor(grads.x), *of_parameters, dz if ctx.has_residual else None, None, None, None


class Evaluation(torch.autograd.Function):
    """The operator `batch_norm_inference`, likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = kernels.batch_norm_inference(*inputs)
        Inference.setup_context(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        return Inference.backward(ctx, dy)
