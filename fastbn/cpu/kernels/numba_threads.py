"""Numba's threads, for systems where `fastbn.cpu.team` cannot run."""

import os
import threading
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@intrinsic
def _enter(typing, entry, params, thread, first, last):
    """Call the kernel at an address."""
    word = types.int64

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [_I64] * 4).as_pointer())
        builder.call(pointer, values[1:])
        return context.get_dummy_value()

    return types.none(word, word, word, word, word), codegen


def _run_parts(entry, params, tasks, num_threads):
    """Equal parts of the tasks, a thread each."""
    for k in prange(num_threads):
        _enter(entry, params, k, k * tasks // num_threads, (k + 1) * tasks // num_threads)


def team() -> int:
    """The odd number that stands for them: the address of a word that is 1 while they are in use, and their function.

    A forked child does not have them.
    """
    with _making:  # one word for all: some layers end the process when a second caller enters
        return int(_team())


@cache
def _team():
    function = numba.cfunc("void(i8, i8, i8, i8)", parallel=True, nogil=True)(_run_parts)
    words = np.array([0, function.address], np.int64)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: words.__setitem__(0, 1))
    _kept.extend((words, function))
    return words.ctypes.data + 1


_kept = []
_making = threading.RLock()
