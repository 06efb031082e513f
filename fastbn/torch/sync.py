"""Batch norm over the batches of several processes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import fastbn
from fastbn.distributed import torch_gather
from fastbn.torch.functional import check, update_running
from fastbn.torch.tensors import array, on_stream, tensor


def synchronised(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float, eps: float, group: Any, *, residual: Tensor | None = None,
    activation: Literal["relu"] | None = None,
) -> Tensor:  # fmt: skip
    """`batch_norm` in training, with statistics of the whole group; running ones become the same on all ranks."""
    check(x, running_mean, running_var, weight, bias, residual, activation)
    y, mean, m2, count = _Synchronised.apply(x, weight, bias, residual, activation, eps, group)
    values = float(count)
    if values == 1:
        raise ValueError("Expected more than 1 value per channel when training, over all ranks")
    if values:
        update_running(running_mean, running_var, mean, m2, values, momentum)
    return y


class _Synchronised(torch.autograd.Function):
    """An exchange among processes is no operator that a compiler may move: a graph ends here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        activation: Literal["relu"] | None, eps: float, group: Any,
    ) -> Any:  # fmt: skip
        ctx.gather = torch_gather(group)
        ctx.has_residual = residual is not None
        with on_stream(x):
            gamma, beta, added = (None if t is None else array(t) for t in (weight, bias, residual))
            result, saved = fastbn.batch_norm(
                array(x), gamma, beta, eps=eps, residual=added, activation=activation, gather=ctx.gather
            )
            if activation is None:
                saved = saved._replace(has_residual=False)  # its gradient is dy itself
            assert saved.moments is not None
            statistics = tensor(saved.mean), tensor(saved.moments.m2), tensor(saved.moments.count[:1])
            arrays, ctx.static = saved.arrays()
            y = tensor(result)
            # What PyTorch has as tensors is saved as such, so that it sees changes in place.
            fields = (saved.x, x), (saved.y, y), (saved.gamma, weight), (saved.beta, bias)
            known = {id(a): t for a, t in fields if a is not None}
            ctx.save_for_backward(*(known[id(a)] if id(a) in known else tensor(a) for a in arrays))
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        with on_stream(dy):
            saved = fastbn.Saved.from_arrays([array(t) for t in ctx.saved_tensors], ctx.static)
            grads = fastbn.batch_norm_backward(array(dy), saved, gather=ctx.gather)
            of_parameters = (
                None if dtype is None else tensor(g).to(dtype) for g, dtype in zip(grads[1:3], ctx.dtypes, strict=True)
            )
            of_residual = dy if grads.residual is None else tensor(grads.residual)
            found = tensor(grads.x), *of_parameters, of_residual if ctx.has_residual else None
        wanted = (g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None
