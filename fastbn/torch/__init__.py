"""Batch norm for PyTorch by fastbn's kernels: functions, modules, and `convert`, which swaps those of a model.

The meaning is PyTorch's own: momentum weighs the new batch, running variances are unbiased, state dicts are the same.
Tensors are not copied. Statistics are kept in float64 from the forward to the backward pass.

=====================  ===============================================================================================
`batch_norm`           as `torch.nn.functional.batch_norm`, and fused with a residual and relu
`BatchNorm1d` 2d, 3d   as `torch.nn`'s, which they extend
`BatchNormAct2d`       batch norm, residual and relu in one pass over memory
`SyncBatchNorm`        statistics over all processes of a group; on the CPU too, with uneven and empty batches
`SyncBatchNormAct`     what `BatchNormAct2d` becomes by ``SyncBatchNorm.convert_sync_batchnorm``
`convert`              gives every batch norm of a model these kernels
`revert`               gives it PyTorch's again
=====================  ===============================================================================================

`torch.ops.fastbn` has the operators: they compile and export in one graph and differentiate both ways, and again.
"""

try:
    import torch as _torch
except ImportError as error:
    from fastbn.extras import install as _install

    raise ImportError(f"fastbn.torch needs PyTorch, which is not installed: {_install('torch')}") from error

from fastbn.torch.convert import convert, revert
from fastbn.torch.functional import batch_norm
from fastbn.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct2d,
    SyncBatchNorm,
    SyncBatchNormAct,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "batch_norm",
    "convert",
    "revert",
]

del _torch
