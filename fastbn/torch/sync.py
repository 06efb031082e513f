"""Batch norm over the batches of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastbn
from fastbn.distributed import torch_gather
from fastbn.torch.functional import check, update_running
from fastbn.torch.tensors import array, on_stream, tensor


def synchronised(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float, eps: float, group: Any,
) -> Tensor:  # fmt: skip
    """`batch_norm` in training, with statistics of the whole group; running ones become the same on all ranks."""
    check(x, running_mean, running_var, weight, bias)
    y, mean, m2, count = _Synchronised.apply(x, weight, bias, eps, group)
    values = float(count)
    if values == 1:
        raise ValueError("Expected more than 1 value per channel when training, over all ranks")
    if values:
        update_running(running_mean, running_var, mean, m2, values, momentum)
    return y


class _Synchronised(torch.autograd.Function):
    """An exchange among processes is no operator that a compiler may move: a graph ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any) -> Any:
        ctx.gather = torch_gather(group)
        with on_stream(x):
            given = (None if t is None else array(t) for t in (weight, bias))
            y, saved = fastbn.batch_norm(array(x), *given, eps=eps, gather=ctx.gather)
            assert saved.moments is not None
            statistics = tensor(saved.mean), tensor(saved.moments.m2), tensor(saved.moments.count[:1])
            arrays, ctx.static = saved.arrays()
            ctx.save_for_backward(x, weight, *map(tensor, arrays[1 + (weight is not None) :]))
        ctx.mark_non_differentiable(*statistics)
        return tensor(y), *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, *others = ctx.saved_tensors
        with on_stream(x):
            inputs = (t for t in (x, weight) if t is not None)
            saved = fastbn.Saved.from_arrays([array(t) for t in (*inputs, *others)], ctx.static)
            grads = fastbn.batch_norm_backward(array(dy), saved, gather=ctx.gather)
            kind = torch.float64 if weight is None else weight.dtype
            of_weight, of_bias = (tensor(g).to(kind) for g in (grads.gamma, grads.beta))
            wanted = (
                g if need else None for g, need in zip((of_weight, of_bias), ctx.needs_input_grad[1:3], strict=True)
            )
            return tensor(grads.x), *wanted, None, None
