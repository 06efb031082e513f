"""PyTorch's tensors seen as arrays and back: the same memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn.extras import install

_KNOWN = {np.dtype(name).num for name in ("float16", "float32", "float64")}
"""To PyTorch as well; bfloat16 is ml_dtypes' own."""
_NOTHING = nullcontext()


def array(tensor: Tensor) -> Any:
    """A NumPy or CuPy array of the tensor's memory and strides; bfloat16 takes ml_dtypes."""
    tensor = tensor.detach()
    if tensor.is_neg():  # an imaginary part of a conjugate, negated when it is read
        tensor = tensor.resolve_neg()
    if tensor.dtype == torch.bfloat16:
        words = tensor.view(torch.int16)  # which every exchange of arrays knows
        return (_cupy().from_dlpack(words) if tensor.is_cuda else words.numpy()).view(_bfloat16())
    return _cupy().from_dlpack(tensor) if tensor.is_cuda else tensor.numpy()


def tensor(array: Any) -> Tensor:
    """The reverse; the tensor keeps the memory alive."""
    half = array.dtype.num not in _KNOWN
    words = array.view(np.int16) if half else array
    found = torch.from_numpy(words) if isinstance(words, np.ndarray) else torch.from_dlpack(words)
    return found.view(torch.bfloat16) if half else found


def on_stream(tensor: Tensor) -> AbstractContextManager[Any]:
    """On a GPU, CuPy works on PyTorch's current stream."""
    if not tensor.is_cuda:
        return _NOTHING
    stream = torch.cuda.current_stream(tensor.device)
    context: AbstractContextManager[Any] = _cupy().cuda.ExternalStream(stream.cuda_stream, tensor.device.index)
    return context


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(f"bfloat16 tensors need ml_dtypes: {install('bfloat16')}") from error
    return ml_dtypes.bfloat16


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"CUDA tensors need CuPy: {install('cuda12')}, or {install('cuda13')}") from error
    return cupy
