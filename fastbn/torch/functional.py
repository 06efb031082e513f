"""`batch_norm` with PyTorch's signature and meaning."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastbn.torch import ops
from fastbn.torch.tensors import array, on_stream

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_norm(
    input: Tensor,  # noqa: A002  # PyTorch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, and with it a residual and relu.

    Parameters
    ----------
    input : Tensor
        (N, C, ...); float16, bfloat16, float32 or float64, on the CPU or a CUDA device; contiguous, channels-last and
        sliced tensors are read where they lie.
    running_mean, running_var : Tensor or None
        (C,), of any float dtype. In training updated in place: ``(1 - momentum) * running + momentum * batch``, with
        the unbiased variance; an empty batch leaves them alone. Else the statistics to normalize with.
    weight, bias : Tensor, optional
        (C,), of any float dtype: gamma and beta.
    training : bool, optional
        Whether to normalize with the batch's statistics.
    momentum : float, optional
        The weight of the new batch.
    eps : float, optional
        Added to the variance.
    residual : Tensor, optional
        Added before the activation; input's shape and dtype.
    activation : {'relu'}, optional
        Applied last.

    Returns
    -------
    Tensor
        input's dtype and memory format.

    Raises
    ------
    ValueError
        One value per channel in training, an eps that is no positive number, as PyTorch raises them; a residual of
        another shape.
    RuntimeError
        Statistics or parameters of other sizes, none at all where they are needed, dtypes that are not floating point.

    Notes
    -----
    ``y = weight * (x - mean) / sqrt(var + eps) + bias``, statistics over all axes but the second (Ioffe & Szegedy 2015,
    algorithm 1). Twice differentiable.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> fastbn.torch.batch_norm(x, None, None, training=True, eps=1e-9)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check(input, running_mean, running_var, weight, bias, residual, activation)
    seen = ops.onlookers(input, running_mean, running_var, weight, bias, residual)
    relu = activation is not None
    if input.ndim < 2:
        return input.clone()
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("running_mean, running_var: expected both with training=False, got None")
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return ops.infer(seen, input, running_mean, running_var, weight, bias, residual, relu, eps)
    values = input.shape[0]
    for size in input.shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    y, mean, m2 = ops.train(seen, input, weight, bias, residual, relu, eps)
    if values:
        update = update_running if seen else update_in_place
        update(running_mean, running_var, mean, m2, values, momentum)
    return y


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: float, momentum: float
) -> None:
    """Move running statistics towards a batch's, in place."""
    with torch.no_grad():
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(m2, alpha=momentum / (count - 1))


def update_in_place(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Any, m2: Any, count: float, momentum: float
) -> None:
    """The same with arrays of a batch."""
    if running_mean is not None:
        _move(running_mean, mean, momentum, momentum)
    if running_var is not None:
        _move(running_var, m2, momentum, momentum / (count - 1))


def _move(running: Tensor, batch: Any, momentum: float, rate: float) -> None:
    with on_stream(running):
        numbers = array(running)
        numbers[...] = (1 - momentum) * numbers + rate * batch
    torch.autograd.graph.increment_version(running)  # whoever saved the old ones is to be told


def check(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None = None, activation: str | None = None,
) -> None:  # fmt: skip
    """Raise for arguments that cannot be computed with; nothing is written before."""
    if x.ndim < 2 and (x.ndim == 0 or x.numel()):  # an empty vector passes, as PyTorch has it
        raise ValueError(f"input: expected at least 2 dimensions, got {x.ndim}")
    channels = x.shape[1] if x.ndim > 1 else 0
    if x.dtype not in DTYPES:
        raise RuntimeError(f"input: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"input: expected a tensor on the CPU or a CUDA device, got one on {x.device}")
    given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    for name, vector in given.items():
        if vector is None:
            continue
        if vector.ndim != 1 or vector.shape[0] != channels:
            raise RuntimeError(f"{name}: expected {channels} elements, one per channel, got {tuple(vector.shape)}")
        if vector.dtype not in DTYPES:
            raise RuntimeError(f"{name}: expected float16, bfloat16, float32 or float64, got {vector.dtype}")
        if vector.device != x.device:
            raise RuntimeError(f"{name}: expected a tensor on {x.device}, where input is, got one on {vector.device}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (x, residual))
        raise ValueError(f"residual: expected {expected}, as input is, got {got}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
