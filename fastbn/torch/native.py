"""PyTorch's own batch norm, and where it is the faster one: in compiled graphs, and for small tensors on the CPU.

In a graph Inductor makes one loop of batch norm and its neighbours, and chooses their layouts; an operator that it
cannot look into costs more than it saves (a small network's step 250 ms, without it 165). In eager mode the way through
automatic differentiation costs more than a small tensor's batch norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # as PyTorch has it
from torch import Tensor

LEAST_VALUES = {False: (3 << 20, 3 << 20), True: (3 << 17, 5 << 17)}
"""Elements from which fastbn's kernels are faster in evaluation and in training, of contiguous tensors and of
channels-last ones (2 cores of a Xeon, float32: `python -m benchmarks.steps --layers`)."""


HALVES = torch.float16, torch.bfloat16


def is_preferred(
    input: Tensor, training: bool, where_faster: bool | None, *vectors: Tensor | None,  # noqa: A002  # PyTorch's name
) -> bool:  # fmt: skip
    """Whether PyTorch is to compute this; ``where_faster`` is that of `fastbn.torch.batch_norm`."""
    if where_faster is False:
        return False
    if torch.compiler.is_compiling():
        return _has_kernels(input, *vectors)
    if where_faster is None or type(input) is not Tensor or not input.is_cpu or input.is_quantized:
        return False
    contiguous, channels_last = LEAST_VALUES[training]
    few = input.numel() < (contiguous if input.is_contiguous() else channels_last)
    return few and _has_kernels(input, *vectors)


def _has_kernels(x: Tensor, *vectors: Tensor | None) -> bool:
    """PyTorch has none for parameters and statistics of other dtypes than x's, but float32 ones beside halves."""
    kind = None
    for t in vectors:
        if t is not None:
            if kind is not None and t.dtype != kind:
                return False
            kind = t.dtype
    return kind in (None, x.dtype) or (kind == torch.float32 and x.dtype in HALVES)


def unfused(
    input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,  # noqa: A002
    training: bool, momentum: float, eps: float, *, residual: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    """`batch_norm` by PyTorch's operators. TorchScript compiles it."""
    return ended(F.batch_norm(input, mean, var, weight, bias, training, momentum, eps), residual, activation)


def ended(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Residual and activation."""
    if residual is not None:
        y = y + residual
    return y if activation is None else F.relu(y)
