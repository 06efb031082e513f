"""How kernels run: `kernel`, `shares_of`.

A kernel is a function of a range of tasks, compiled once, on first use. A serial call gives it all of them; a parallel
one shares them among a team of threads, each of which calls the same machine code. So both give the same bits, and a
parallel call costs no second compilation, which would take at least as long as the first.

The team is Numba's, or in a process that has loaded PyTorch that of PyTorch's OpenMP: threads wait for their next work
by spinning, and two teams in turn on the same cores hold each other up.
"""

import ctypes
import os
import sys
import threading
import warnings
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.cpu.jit import compiled, machine_code

PARALLEL_FROM = 1 << 15  # elements; below, two threads lose to one (measured: 8k 1.7x slower, 64k 1.5x faster)


# --- which team -------------------------------------------------------------------------------------------------------

# One parallel call at a time: a second Python thread runs serially meanwhile. Numba's workqueue layer aborts the
# process when entered twice, and on the other layers two teams of threads only slow each other down.
_team = threading.Lock()
_lost_team = _told = False  # after a fork

# PyTorch's team: the address of its OpenMP's entry point, 0 where there is none, None before PyTorch is seen.
_openmp = None


def numbas_layer():
    """Numba's threading layer, or None before its first parallel call in the process."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def pytorchs_team():
    """The address of ``GOMP_parallel`` in the OpenMP library that PyTorch runs on; 0 without it.

    On Linux the libraries of GNU, LLVM and Intel have it. A threading layer that the user has chosen stays.
    """
    global _openmp
    if _openmp is None:
        torch = sys.modules.get("torch")
        if not hasattr(torch, "get_num_threads"):  # not there, or still being imported
            return 0
        _openmp = _entry_of_openmp(torch) if numba.config.THREADING_LAYER in ("default", "omp") else 0
    return _openmp


def _entry_of_openmp(torch):
    """Looked up as PyTorch's own library finds it, whatever other OpenMP the process has loaded."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def shares_of(elements):
    """How many threads share so much work: Numba's number, and on PyTorch's team at most PyTorch's."""
    if elements < PARALLEL_FROM:
        return 1
    if pytorchs_team():
        # Asking Numba starts its threads.
        threads = numba.config.NUMBA_NUM_THREADS if numbas_layer() is None else numba.get_num_threads()
        threads = min(threads, sys.modules["torch"].get_num_threads())
    else:
        threads = numba.get_num_threads()
    if threads > 1 and _lost_team:
        _tell()
        return 1
    return threads


def _after_fork():
    """OpenMP's threads do not survive a fork: GNU's kills or blocks a child that calls in after its parent did.

    PyTorch's team may have run for anyone. Numba's is no way out: it finds PyTorch's library, which is loaded globally.
    """
    global _team, _lost_team
    _team = threading.Lock()
    _lost_team = numbas_layer() == "omp" or pytorchs_team() != 0


def _tell():
    global _told
    if not _told:
        _told = True
        warnings.warn(
            "fastbn runs serially in this forked process: OpenMP threads do not survive a fork. Start processes with"
            " the 'spawn' method, or install tbb and set NUMBA_THREADING_LAYER=tbb.",
            RuntimeWarning,
            stacklevel=2,
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- starting a team --------------------------------------------------------------------------------------------------


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

    def codegen(context, builder, signature, values):
        target, address, tasks, shares, arguments = values
        entry, block = _waiting_call(context, builder, address, signature.args[-1], arguments)
        started = [builder.ptrtoint(entry, address.type), tasks, shares, builder.ptrtoint(block, address.type)]
        _call(context, builder, target, [word] * 4, started)
        return context.get_dummy_value()

    return types.none(word, word, word, word, arguments), codegen


@intrinsic
def _share_out_by_openmp(typing, openmp, kernel, tasks, shares, arguments):
    """The same by ``GOMP_parallel(function, data, threads, flags)`` at an address, which calls a function per thread.

    It takes shares until none is left: fewer threads than shares may come, and one that comes late holds up nobody.
    """
    word = types.int64

    def codegen(context, builder, signature, values):
        openmp, address, tasks, shares, arguments = values
        entry, block = _waiting_call(context, builder, address, signature.args[-1], arguments)
        taken = ir.Constant(address.type, 0)
        work = cgutils.alloca_once(builder, ir.LiteralStructType([address.type] * 3 + [block.type]))
        for i, value in enumerate((taken, tasks, shares, block)):
            builder.store(value, cgutils.gep_inbounds(builder, work, 0, i))
        worker = _worker(builder.module, entry, work.type)
        unsigned = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [worker.type, work.type, unsigned, unsigned])
        started = [worker, work, builder.trunc(shares, unsigned), ir.Constant(unsigned, 0)]
        builder.call(builder.inttoptr(openmp, kind.as_pointer()), started)
        return context.get_dummy_value()

    return types.none(word, word, word, word, arguments), codegen


def _waiting_call(context, builder, address, kinds, arguments):
    """A function of (share, first, last, block) that calls a kernel, and the block with its arguments."""
    word = types.int64
    values = [address, *cgutils.unpack_tuple(builder, arguments)]
    block = cgutils.alloca_once(builder, ir.LiteralStructType([v.type for v in values]))
    for i, value in enumerate(values):
        builder.store(value, cgutils.gep_inbounds(builder, block, 0, i))

    function = _internal_function(builder.module, "entry", [address.type] * 3 + [block.type])
    inside = ir.IRBuilder(function.append_basic_block())
    *share, place = function.args
    kernel, *rest = (inside.load(cgutils.gep_inbounds(inside, place, 0, i)) for i in range(len(values)))
    _call(context, inside, kernel, [word, word, word, *kinds.types], [*share, *rest])
    inside.ret_void()
    return function, block


def _worker(module, entry, work):
    """A function of ``{shares taken, tasks, shares, block}*`` that takes and runs shares."""
    function = _internal_function(module, "worker", [work])
    begin, take, run, end = (function.append_basic_block() for _ in range(4))
    builder = ir.IRBuilder(begin)
    taken, tasks, shares, block = (cgutils.gep_inbounds(builder, function.args[0], 0, i) for i in range(4))
    tasks, shares, block = (builder.load(place) for place in (tasks, shares, block))
    one = ir.Constant(tasks.type, 1)
    builder.branch(take)
    builder.position_at_end(take)
    k = builder.atomic_rmw("add", taken, one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", k, shares), run, end)
    builder.position_at_end(run)
    first, last = (builder.sdiv(builder.mul(n, tasks), shares) for n in (k, builder.add(k, one)))
    builder.call(entry, [k, first, last, block])
    builder.branch(take)
    builder.position_at_end(end)
    builder.ret_void()
    return function


def _internal_function(module, name, kinds):
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), module.get_unique_name(name))
    function.linkage = "internal"
    return function


def _call(context, builder, address, kinds, values):
    """Call a compiled function at an address; ours raise nothing."""
    kind = context.call_conv.get_function_type(types.none, kinds)
    context.call_conv.call_function(builder, builder.inttoptr(address, kind.as_pointer()), types.none, kinds, values)


def _launch(run_shares, kernel, tasks, shares, arguments):
    _share_out(run_shares, kernel, tasks, shares, arguments)


def _launch_by_openmp(openmp, kernel, tasks, shares, arguments):
    _share_out_by_openmp(openmp, kernel, tasks, shares, arguments)


LAUNCHERS = _parallel, _launcher, _openmp_launcher = (
    compiled(_run_shares, parallel=True),
    compiled(_launch),
    compiled(_launch_by_openmp),
)


# --- kernels ----------------------------------------------------------------------------------------------------------


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
            openmp = pytorchs_team()
            if openmp:
                _openmp_launcher(openmp, self._place(arguments), tasks, shares, arguments)
            else:
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
