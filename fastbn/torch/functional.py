"""`batch_norm` with PyTorch's signature and meaning."""

from __future__ import annotations

import numbers
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastbn.torch import ops
from fastbn.torch.kernels import Update
from fastbn.torch.native import is_preferred, unfused
from fastbn.torch.tensors import array, on_stream, tensor

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
    where_faster: bool | None = None,
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
        The weight of the new batch. A tensor without axes serves as well, and for `eps`.
    eps : float, optional
        Added to the variance.
    residual : Tensor, optional
        Added before the activation; input's shape and dtype.
    activation : {'relu'}, optional
        Applied last.
    where_faster : bool, optional
        False: fastbn's kernels always. By default PyTorch's own operators within graphs that it compiles or exports,
        where Inductor fuses them with their neighbours; True: for small tensors on the CPU too, which its own batch
        norm does faster. Those round sums in the input's type.

    Returns
    -------
    Tensor
        input's dtype and memory format.

    Raises
    ------
    ValueError
        One value per channel in training, an eps that is no positive number, as PyTorch raises them; a residual of
        another shape.
    TypeError
        A momentum or an eps that is no number, None among them.
    RuntimeError
        Statistics or parameters of other sizes, none at all where they are needed, dtypes that are not floating point,
        sparse and nested tensors; running statistics to be updated that require a gradient or are expanded.

    Notes
    -----
    ``y = weight * (x - mean) / sqrt(var + eps) + bias``, statistics over all axes but the second (Ioffe & Szegedy 2015,
    algorithm 1). Differentiable forwards and backwards, in every order and nest of `torch.func` and
    `torch.autograd.forward_ad`: first derivatives and `torch.func.vmap` by the kernels, higher ones by PyTorch's
    operations in float64. Under vmap running statistics to be updated must be mapped too.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> fastbn.torch.batch_norm(x, None, None, training=True, eps=1e-9)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check(input, running_mean, running_var, weight, bias, residual, activation)
    if is_preferred(input, training, where_faster, running_mean, running_var, weight, bias):
        return unfused(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, activation=activation,
        )  # fmt: skip
    if type(momentum) is not float or type(eps) is not float:
        momentum, eps = number("momentum", momentum), number("eps", eps)
    seen = ops.active_transforms(input, running_mean, running_var, weight, bias, residual)
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
    check_written(running_mean, running_var)
    update = update_within(running_mean, running_var, momentum) if seen == ops.NONE and values else None
    y, mean, m2 = ops.train(seen, input, weight, bias, residual, relu, eps, update)
    if update is not None:
        torch.autograd.graph.increment_version([update.mean, update.var])  # whoever saved the old ones is to be told
    elif values and not (running_mean is None and running_var is None):
        UPDATES[seen](running_mean, running_var, mean, m2, values, momentum)
    return y


def update_within(mean: Tensor | None, var: Tensor | None, momentum: float) -> Update | None:
    """What `fastbn.batch_norm` updates as PyTorch does: not by 0 or 1, with which PyTorch multiplies infinities, too.

    Nor tensors that are negated when they are read, whose arrays would be copies, nor two of one memory.
    """
    if mean is None or var is None or not 0.0 < momentum < 1.0 or mean.is_neg() or var.is_neg():
        return None
    if mean.untyped_storage().data_ptr() == var.untyped_storage().data_ptr():
        return None
    return Update(mean, var, momentum)


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: float, momentum: float
) -> None:
    """Move running statistics towards a batch's, in place."""
    with torch.no_grad():
        moved = [
            (running, (running.double() * (1 - momentum)).add_(batch.detach(), alpha=rate))
            for running, batch, rate in (
                (running_mean, mean, momentum), (running_var, m2, momentum / (count - 1)),
            )
            if running is not None
        ]  # fmt: skip
        for running, new in moved:
            running.copy_(new)


def update_below(running_mean: Tensor | None, running_var: Tensor | None, *batch: Any) -> None:
    """The same below all transforms, where PyTorch's own kernel does it."""
    running = (None if t is None else t.detach() for t in (running_mean, running_var))
    _Update.apply(*running, *(t.detach() if isinstance(t, Tensor) else t for t in batch))


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(*given: Any) -> None:
        update_running(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[None, None]:
        names = ("running_mean", "running_var")
        for name, running, axis, of_batch in zip(names, given[:2], in_dims[:2], in_dims[2:4], strict=True):
            if running is not None and axis is None and of_batch is not None:
                raise RuntimeError(
                    f"{name}: expected one for each call under vmap, as they are updated in place, got one for all; "
                    "without running statistics (track_running_stats=False), or in evaluation, none are updated"
                )
        _Update.apply(
            *(t if axis is None else t.movedim(axis, 0) for t, axis in zip(given[:4], in_dims[:4], strict=True)),
            *given[4:],
        )
        return None, None


def update_in_place(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Any, m2: Any, count: float, momentum: float
) -> None:
    """The same with arrays of a batch; NumPy is to be as silent as PyTorch about what overflows."""
    changed = [running for running in (running_mean, running_var) if running is not None]
    for running in changed:
        if running.is_neg():  # lazily negated: an array would be a copy
            update_running(running_mean, running_var, tensor(mean), tensor(m2), count, momentum)
            return
    with on_stream(changed[0]), np.errstate(all="ignore"):
        if running_mean is not None:
            _move(array(running_mean), mean, momentum, momentum)
        if running_var is not None:
            _move(array(running_var), m2, momentum, momentum / (count - 1))
    torch.autograd.graph.increment_version(changed)  # whoever saved the old ones is to be told


def _move(running: Any, batch: Any, momentum: float, rate: float) -> None:
    running[...] = (1 - momentum) * running.astype(np.float64) + rate * batch


UPDATES = {ops.NONE: update_in_place, ops.TRANSFORMS: update_below, ops.OTHERS: update_running}


def number(name: str, value: Any) -> float:
    """A float of what PyTorch takes for one: numbers, also NumPy's, and tensors without axes."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad and not value.is_complex():
        return float(value)
    if not isinstance(value, (numbers.Real, torch.SymInt)):
        got = f"a tensor {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        hint = ", without requires_grad" if isinstance(value, Tensor) and value.requires_grad else ""
        raise TypeError(f"{name}: expected a number or a tensor without axes{hint}, got {got}")
    return float(value)


def check_written(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise for running statistics that an update in place would not do justice."""
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is None:
            continue
        if running.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: expected requires_grad=False in training, where it has no gradient")
        if not running.is_contiguous() and running.stride(0) == 0:
            raise RuntimeError(f"{name}: expected memory of its own, which training updates, got an expanded tensor")


def check(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None = None, activation: str | None = None,
) -> None:  # fmt: skip
    """Raise for arguments that cannot be computed with; nothing is written before."""
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested one" if x.is_nested else f"{x.layout}"
        raise RuntimeError(f"input: expected a dense tensor (torch.strided), got {got}")
    if x.ndim < 2 and (x.ndim == 0 or x.numel()):  # an empty vector passes, as PyTorch has it
        raise ValueError(f"input: expected at least 2 dimensions, got {x.ndim}")
    channels = x.shape[1] if x.ndim > 1 else 0
    if x.dtype not in DTYPES:
        raise RuntimeError(f"input: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    device = x.device
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"input: expected a tensor on the CPU or a CUDA device, got one on {device}")
    for name, vector in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.layout is not torch.strided:
            raise RuntimeError(f"{name}: expected a dense tensor (torch.strided), got {vector.layout}")
        if vector.shape != (channels,):
            raise RuntimeError(f"{name}: expected {channels} elements, one per channel, got {tuple(vector.shape)}")
        if vector.dtype not in DTYPES:
            raise RuntimeError(f"{name}: expected float16, bfloat16, float32 or float64, got {vector.dtype}")
        if vector.device != device:
            raise RuntimeError(f"{name}: expected a tensor on {device}, where input is, got one on {vector.device}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.layout != x.layout):
        expected, got = (f"{tuple(t.shape)} {t.dtype} {t.layout}" for t in (x, residual))
        raise ValueError(f"residual: expected {expected}, as input is, got {got}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
