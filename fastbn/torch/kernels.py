"""The operators ``torch.ops.fastbn`` by fastbn's kernels, on tensors that hold memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastbn
from fastbn.saved import make_saved
from fastbn.torch.formulas import values_per_channel
from fastbn.torch.tensors import array, on_stream, tensor


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; in float64 the mean, the sum of squares about it, and 1 / sqrt(variance + eps)."""
    made: list[fastbn.Saved] = []
    with on_stream(x):
        y = normalized(made, x, weight, bias, residual, relu, eps)
        (saved,) = made
        assert saved.moments is not None
        return tensor(y), tensor(saved.mean), tensor(saved.moments.m2), tensor(saved.rstd)


class Update(NamedTuple):
    """Running statistics that the forward pass updates."""

    mean: Tensor
    var: Tensor
    momentum: float


def normalized(
    saved: list[fastbn.Saved], x: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, eps: float,
    update: Update | None = None,
) -> Any:  # fmt: skip
    """The output, an array; what the backward pass needs is appended to the list."""
    more: dict[str, Any] = {"activation": "relu"} if relu else {}
    if update is not None:
        more |= {"running": (array(update.mean), array(update.var)), "rate": update.momentum}
    given = array(x), optional(weight), optional(bias)
    y, made = fastbn.batch_norm(*given, eps=eps, residual=optional(residual), out=out(x), **more)
    saved.append(made)
    return y


def batch_norm_inference(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    relu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The output, from statistics that do not depend on x."""
    with on_stream(x):
        y = fastbn.batch_norm_inference(
            array(x), array(mean), array(var), optional(weight), optional(bias), eps=eps, residual=optional(residual),
            activation="relu" if relu else None, out=out(x),
        )  # fmt: skip
        return tensor(y)


def batch_norm_backward(
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
            count.fill(values_per_channel(x))
            moments = fastbn.Moments(count, mean_, None)  # of the sum of squares the backward pass knows rstd
        saved = make_saved(
            x=x_, y=optional(y), gamma=optional(weight), weight=None, moments=moments, mean=mean_, rstd=rstd_,
            channel_axis=1, activation=None if y is None else "relu", has_residual=with_dz, gathered=False,
        )  # fmt: skip
        into = out(x)
        grads = fastbn.batch_norm_backward(array(dy), saved, dmean=optional(dmean), dvar=optional(dvar), out=into)
        dz = tensor(grads.residual) if with_dz else x.new_empty(0)
        if with_dz and into is not None:  # in the order that was announced
            dz = torch.empty_like(x).copy_(dz)
        return tensor(grads.x), tensor(grads.gamma), tensor(grads.beta), dz


def optional(tensor: Tensor | None) -> Any:
    """Its array, if there is one."""
    return None if tensor is None else array(tensor)


def out(x: Tensor) -> Any:
    """None where fastbn's own results, which reuse memory, are in PyTorch's order; else a tensor's memory."""
    dense = x.is_contiguous() or (
        x.ndim in (4, 5)
        and x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    )
    return None if dense else array(torch.empty_like(x))
