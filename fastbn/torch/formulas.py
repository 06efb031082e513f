"""The operators ``torch.ops.fastbn`` by PyTorch's own operations, in float64: same arguments, same results.

These differentiate and map in every order and nest that PyTorch has. The kernels do first derivatives; what is asked
for rarely takes this way, and is then right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = values_per_channel(x)
    reduced = [axis for axis in range(x.ndim) if axis != 1]
    x64 = x.double()
    mean = x64.sum(reduced) / count
    m2 = (x64 - along_channels(mean, x)).square().sum(reduced)
    rstd = (m2 / count + eps).rsqrt()
    return _affine(x, mean, rstd, weight, bias, residual, relu), mean, m2, rstd


def batch_norm_inference(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    relu: bool, eps: float,
) -> Tensor:  # fmt: skip
    return _affine(x, mean.double(), (var.double() + eps).rsqrt(), weight, bias, residual, relu)


def _affine(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    relu: bool,
) -> Tensor:  # fmt: skip
    scale = rstd if weight is None else rstd * weight
    y = (x.double() - along_channels(mean, x)) * along_channels(scale, x)
    if bias is not None:
        y = y + along_channels(bias, x)
    if residual is not None:
        y = y + residual
    y = y.to(x.dtype)
    return y.relu() if relu else y


def batch_norm_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dmean: Tensor | None, dvar: Tensor | None, frozen: bool, with_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    reduced = [axis for axis in range(x.ndim) if axis != 1]
    dz = dy if y is None else torch.where(y <= 0, 0.0, dy)
    dz64 = dz.double()
    centred = x.double() - along_channels(mean, x)
    xhat = centred * along_channels(rstd, x)
    dweight, dbias = (dz64 * xhat).sum(reduced), dz64.sum(reduced)
    scale = along_channels(rstd if weight is None else rstd * weight, x)
    if frozen:
        dx = scale * dz64
    else:
        count = values_per_channel(x)
        dx = scale * (dz64 - (along_channels(dbias, x) + xhat * along_channels(dweight, x)) / count)
        if dmean is not None:
            dx = dx + along_channels(dmean, x) / count
        if dvar is not None:
            dx = dx + 2 * centred * along_channels(dvar, x) / count
    return dx.to(x.dtype), dweight, dbias, dz if with_dz else x.new_empty(0)


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """In a shape that broadcasts against x."""
    return vector.view(-1, *(1,) * (x.ndim - 2))


def values_per_channel(x: Tensor) -> int:
    values: int = x.numel() // max(1, x.shape[1])
    return values
