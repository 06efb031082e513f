"""The CPU as a place where workloads run: its fastest copy, its cache, PyTorch on as many threads.

Like `benchmarks.workloads` it asks nothing of fastbn's inside, so that it measures commits of long ago.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from functools import cached_property, lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

try:
    from fastbn.cpu.program import Program
    from fastbn.cpu.sizes import CHUNK
    from fastbn.cpu.team import threads_for
    from fastbn.threads import get_num_threads
except ImportError:  # asv runs this with commits whose kernels run on Numba's threads
    Program = None
    from numba import get_num_threads

ASSUMED_CACHE, ASSUMED_CORE_CACHE = 32 << 20, 512 << 10  # bytes, where the system does not tell
LINE = 64  # bytes


class Host:
    """A machine of `benchmarks.workloads`, with NumPy arrays."""

    xp = np

    def __init__(self) -> None:
        self.cache_bytes = cache("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE") or ASSUMED_CACHE

    @cached_property
    def torch(self) -> Any:
        """PyTorch on Numba's number of threads, or None; imported by those who ask."""
        if importlib.util.find_spec("torch") is None:
            return None
        torch = importlib.import_module("torch")
        torch.set_num_threads(get_num_threads())
        return torch

    def free_bytes(self) -> float:
        return math.inf  # of the system's memory, which it gives by pages

    def synchronize(self) -> None:
        """Calls are over when they return."""

    def copy(self, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """On all threads, written past the caches: twice as fast as memcpy, which reads each line that it writes."""
        words, to = (a.reshape(-1).view(np.uint8) for a in (x, out))
        lead = -to.ctypes.data % LINE
        lines = (to.size - lead) // LINE
        end = lead + LINE * lines
        to[:lead], to[end:] = words[:lead], words[end:]
        _copy_lines(words[lead:end], to[lead:end])

    def tensor(self, array: np.ndarray[Any, Any]) -> Any:
        """PyTorch's view of an array's memory."""
        if array.dtype.name == "bfloat16":  # which NumPy's arrays do not tell PyTorch
            return self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def use_cudnn(self, yes: bool) -> None:
        """There is none."""


def cache(*names: str) -> int:
    """Bytes of the first of these caches that the system tells, or 0."""
    for name in names:
        if name in os.sysconf_names and (found := os.sysconf(name)) > 0:
            return found
    return 0


def core_cache() -> int:
    """Bytes of one core's second-level cache."""
    return cache("SC_LEVEL2_CACHE_SIZE") or ASSUMED_CORE_CACHE


@intrinsic  # type: ignore[misc]
def _stream_line(typing, x, out, i):  # type: ignore[no-untyped-def]
    """Copy a line at byte i past the caches; out's is aligned."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        line = ir.VectorType(ir.IntType(8), LINE)
        x, out = (
            cgutils.create_struct_proxy(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], args[:2], strict=True)
        )
        source, target = (builder.bitcast(builder.gep(p, [args[2]]), line.as_pointer()) for p in (x, out))
        store = builder.store(builder.load(source, align=1), target, align=LINE)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return numba.types.none(x, out, i), codegen


@numba.njit(parallel=True, cache=True)  # type: ignore[misc]
def _copy_by_numba(x, out):  # type: ignore[no-untyped-def]
    for line in numba.prange(x.size // LINE):
        _stream_line(x, out, line * LINE)


@lru_cache
def _blocks_copied(blocks: int) -> Any:
    program = Program(threads_for(blocks * CHUNK), blocks * CHUNK, {"x": "f4*", "out": "f4*"})
    program.launch("copying.stream_blocks", blocks, x=program.array("x"), out=program.array("out"))
    return program


def _copy_lines(x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Bytes, by the threads that run kernels: two teams in turn on the same cores hold each other up."""
    if Program is None:
        _copy_by_numba(x, out)
        return
    blocks = x.size // (4 * CHUNK)
    if blocks > 0:
        _blocks_copied(blocks)(x, out)
    out[4 * CHUNK * blocks :] = x[4 * CHUNK * blocks :]
