"""PyTorch's batch norm modules on fastbn's kernels: same parameters, buffers and state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbn.torch.functional import batch_norm
from fastbn.torch.sync import synchronised


class _Mixin:
    """What a forward pass asks of a module's state, before it is computed."""

    def _step(self) -> tuple[Tensor | None, Tensor | None, bool, float]:
        """Running statistics to use or update, whether to use the batch's, and the weight of the batch.

        `num_batches_tracked` counts; with ``momentum=None`` the running statistics are the average of all batches.
        """
        module: Any = self
        momentum = 0.0 if module.momentum is None else module.momentum
        if module.training and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
        training = module.training or (module.running_mean is None and module.running_var is None)
        if module.training and not module.track_running_stats:
            return None, None, True, momentum
        return module.running_mean, module.running_var, training, momentum

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # PyTorch's name
        module: Any = self
        module._check_input_dim(input)
        mean, var, training, momentum = self._step()
        return batch_norm(input, mean, var, module.weight, module.bias, training, momentum, module.eps)


class BatchNorm1d(_Mixin, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on fastbn's kernels: (N, C) or (N, C, L).

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm1d(2)
    >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round()
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """


class BatchNorm2d(_Mixin, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on fastbn's kernels: (N, C, H, W), contiguous or channels-last."""


class BatchNorm3d(_Mixin, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on fastbn's kernels: (N, C, D, H, W)."""


class BatchNormAct2d(BatchNorm2d):
    """Batch norm, residual and relu in one pass over memory; the end of a residual block.

    ``forward(x, residual=None)`` is ``relu(batch_norm(x) + residual)``; with ``activation=None`` without the relu.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNormAct2d(3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> norm(x, residual=x).min() >= 0
    tensor(True)
    """

    def __init__(self, num_features: int, *arguments: Any, activation: Any = "relu", **keywords: Any) -> None:
        super().__init__(num_features, *arguments, **keywords)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002  # PyTorch's name
        self._check_input_dim(input)
        mean, var, training, momentum = self._step()
        return batch_norm(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class SyncBatchNorm(_Mixin, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on fastbn's kernels: one batch norm over the batches of all processes in a group.

    On the CPU (gloo) as well as on GPUs (nccl). Batches may differ in size, and be empty. All ranks compute the same
    bits, by one exchange of float64 moments forwards and one of sums backwards. In evaluation, and in one process, it
    is `BatchNorm2d` for any number of axes.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # PyTorch's name
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, training, momentum = self._step()
        group = self.process_group
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not training or alone or torch.distributed.get_world_size(group) == 1:
            return batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)
        return synchronised(input, mean, var, self.weight, self.bias, momentum, self.eps, group)


OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def convert(model: nn.Module) -> nn.Module:
    """Give every batch norm of a model fastbn's kernels, in place; parameters, buffers, hooks and names stay.

    Parameters
    ----------
    model : torch.nn.Module
        May be a batch norm itself. Classes that extend PyTorch's batch norms, and lazy ones that have seen no data, are
        left as they are.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> isinstance(fastbn.torch.convert(model)[1], fastbn.torch.BatchNorm2d)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module) in OURS:
            module.__class__ = OURS[type(module)]  # the object stays: optimizers, hooks and shared modules hold it
    return model
