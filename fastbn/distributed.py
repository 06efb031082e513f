"""Ready-made ``gather`` hooks: statistics synchronised over MPI, PyTorch's process groups, or NCCL by CuPy.

A hook takes a float64 vector and returns those of all ranks as the rows of an array, in the order of ranks. That is all
`fastbn.batch_norm` and `batch_norm_backward` ask for; each rank then merges the same rows in the same order, so that
all have the same bits. The ranks' means travel in float64: `fastbn.merge` says how many digits their rounding leaves of
the deviation where the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn import extras

Gather = Callable[[Any], Any]


def mpi_gather(communicator: Any) -> Gather:
    """Over an mpi4py communicator.

    Parameters
    ----------
    communicator : mpi4py.MPI.Comm
        All of its ranks make the same calls. CuPy arrays need an MPI that reads device memory.

    Returns
    -------
    callable
        For ``gather=``.

    Raises
    ------
    TypeError
        For what has no ``Allgather``.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> from fastbn.distributed import mpi_gather
    >>> from mpi4py import MPI  # doctest: +SKIP
    >>> y, saved = fastbn.batch_norm(x, gather=mpi_gather(MPI.COMM_WORLD))  # doctest: +SKIP
    """
    if not hasattr(communicator, "Allgather"):
        raise TypeError(f"communicator: expected an mpi4py communicator, got {type(communicator).__name__}")

    def gather(vector: Any) -> Any:
        rows = _empty(vector, communicator.Get_size())
        if not isinstance(vector, np.ndarray):
            _synchronize()  # MPI reads what CuPy's stream has yet to write
        communicator.Allgather(vector, rows)
        return rows

    return gather


def torch_gather(group: Any = None) -> Gather:
    """Over a process group of `torch.distributed`; gloo for NumPy arrays, nccl for CuPy's.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The default one.

    Returns
    -------
    callable
        For ``gather=``.

    Raises
    ------
    ImportError, RuntimeError
        PyTorch is not installed, or has no process group.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.distributed import torch_gather
    >>> y, saved = fastbn.batch_norm(x, gather=torch_gather())  # doctest: +SKIP
    """
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        raise ImportError(f"torch_gather needs PyTorch: {extras.install('torch')}") from error
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch_gather: expected a process group, call torch.distributed.init_process_group first")

    def gather(vector: Any) -> Any:
        rows = _empty(vector, dist.get_world_size(group))
        exchange = torch.from_numpy if isinstance(vector, np.ndarray) else torch.from_dlpack
        dist.all_gather(list(exchange(rows)), exchange(vector), group=group)
        return rows

    return gather


def nccl_gather(communicator: Any, ranks: int) -> Gather:
    """Over an NCCL communicator of CuPy's, on its current stream.

    Parameters
    ----------
    communicator : cupy.cuda.nccl.NcclCommunicator
        One device a rank.
    ranks : int
        How many the communicator has.

    Returns
    -------
    callable
        For ``gather=``.

    Raises
    ------
    TypeError
        For what has no ``allGather``.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.distributed import nccl_gather
    >>> y, saved = fastbn.batch_norm(x, gather=nccl_gather(communicator, 4))  # doctest: +SKIP
    """
    if not hasattr(communicator, "allGather"):
        raise TypeError(f"communicator: expected a cupy.cuda.nccl one, got {type(communicator).__name__}")

    def gather(vector: Any) -> Any:
        import cupy
        from cupy.cuda import nccl

        rows = _empty(vector, ranks)
        stream = cupy.cuda.get_current_stream().ptr
        communicator.allGather(vector.data.ptr, rows.data.ptr, vector.size, nccl.NCCL_FLOAT64, stream)
        return rows

    return gather


def _empty(vector: Any, ranks: int) -> Any:
    """For as many vectors, of the same kind of array."""
    return type(vector)((ranks, vector.size), np.float64)


def _synchronize() -> None:
    import cupy

    cupy.cuda.get_current_stream().synchronize()
