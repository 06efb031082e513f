"""How kernels run: `kernel`, `shares_of`.

A kernel is a function of a range of tasks, compiled once, on first use. A serial call gives it all of them; a parallel
one shares them among Numba's threads, each of which calls the same machine code. So both give the same bits, and a
parallel call costs no second compilation, which would take at least as long as the first.
"""

import os
import threading
import warnings

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.cpu.jit import compiled, machine_code

PARALLEL_FROM = 1 << 15  # elements; below, two threads lose to one (measured: 8k 1.7x slower, 64k 1.5x faster)

# One parallel call at a time: a second Python thread runs serially meanwhile. Numba's workqueue layer aborts the
# process when entered twice, and on the other layers two teams of threads only slow each other down.
_team = threading.Lock()
_lost_team = False


def _layer():
    """Numba's threading layer, or None before the first parallel call of the process."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def _after_fork():
    """GNU OpenMP kills a child that calls in after its parent did."""
    global _team, _lost_team
    _team = threading.Lock()
    _lost_team = _layer() == "omp"
    if _lost_team:
        warnings.warn(
            "fastbn runs serially in this forked process: Numba's OpenMP threads do not survive a fork. Start processes"
            " with the 'spawn' method, or install tbb and set NUMBA_THREADING_LAYER=tbb.",
            RuntimeWarning,
            stacklevel=2,
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def _enter(typing, entry, share, first, last, arguments):
    """Call the plain function at an address, ``entry(share, first, last, arguments)``."""
    word = types.int64

    def codegen(context, builder, signature, values):
        words = [context.get_value_type(word)] * 4
        pointer = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), words).as_pointer())
        builder.call(pointer, values[1:])
        return context.get_dummy_value()

    return types.none(word, word, word, word, word), codegen


def _run_shares(entry, tasks, shares, arguments):
    """Equal shares of tasks, a thread each."""
    for k in prange(shares):
        _enter(entry, k, k * tasks // shares, (k + 1) * tasks // shares, arguments)


@intrinsic
def _share_out(typing, run_shares, kernel, tasks, shares, arguments):
    """Call ``run_shares`` with a function that calls the compiled kernel, both at addresses.

    The kernel's arguments wait in memory for the threads, so that one parallel loop, compiled once, serves all kernels.
    """
    word = types.int64
    kinds = [word, word, word, *arguments.types]

    def codegen(context, builder, signature, values):
        target, address, tasks, shares, arguments = values
        unpacked = [address, *cgutils.unpack_tuple(builder, arguments)]
        block = cgutils.alloca_once(builder, ir.LiteralStructType([v.type for v in unpacked]))
        for i, value in enumerate(unpacked):
            builder.store(value, cgutils.gep_inbounds(builder, block, 0, i))
        entry = _entry_of(context, builder.module, kinds, block.type)
        started = [builder.ptrtoint(entry, address.type), tasks, shares, builder.ptrtoint(block, address.type)]
        _call(context, builder, target, [word] * 4, started)
        return context.get_dummy_value()

    return types.none(word, word, word, word, arguments), codegen


def _entry_of(context, module, kinds, block):
    """A function of (share, first, last, block) that calls a kernel with the arguments in the block."""
    word = context.get_value_type(types.int64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word] * 4), module.get_unique_name("entry"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    *share, place = function.args
    stored = builder.inttoptr(place, block)
    address, *arguments = (
        builder.load(cgutils.gep_inbounds(builder, stored, 0, i)) for i in range(len(block.pointee.elements))
    )
    _call(context, builder, address, kinds, [*share, *arguments])
    builder.ret_void()
    return function


def _call(context, builder, address, kinds, values):
    """Call a compiled function at an address; ours raise nothing."""
    kind = context.call_conv.get_function_type(types.none, kinds)
    context.call_conv.call_function(builder, builder.inttoptr(address, kind.as_pointer()), types.none, kinds, values)


def _launch(run_shares, kernel, tasks, shares, arguments):
    _share_out(run_shares, kernel, tasks, shares, arguments)


LAUNCHERS = _parallel, _launcher = compiled(_run_shares, parallel=True), compiled(_launch)


class kernel:
    """A compiled entry point ``function(share, first, last, *arguments)``; run it by ``run``."""

    def __init__(self, function):
        self.__doc__ = function.__doc__
        self.compiled = compiled(function)
        self._places = {}

    def run(self, tasks, shares, *arguments):
        """Run all tasks: in so many shares where that is safe, else on the calling thread.

        The shares are at most those that `shares_of` gives; each is known to the kernel by its number.
        """
        if shares < 2 or _lost_team or not _team.acquire(blocking=False):
            self.compiled(0, 0, tasks, *arguments)
            return
        try:
            team = machine_code(_parallel, (types.int64,) * 4)
            _launcher(team, self._place(arguments), tasks, shares, arguments)
        finally:
            _team.release()

    def _place(self, arguments):
        """Where the machine code for such arguments is."""
        key = tuple(a.dtype if type(a) is np.ndarray else type(a) for a in arguments)
        place = self._places.get(key)
        if place is None:
            kinds = (types.int64, types.int64, types.int64, *map(numba.typeof, arguments))
            place = self._places[key] = machine_code(self.compiled, kinds)
        return place


def shares_of(elements):
    """How many threads share so much work."""
    return 1 if elements < PARALLEL_FROM else numba.get_num_threads()
