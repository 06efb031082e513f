"""The team of threads that runs kernels, seen from Python: its memory, its workers, its end.

What it does is compiled (`kernels.team`) and knows neither Python nor Numba, so workers are plain threads of the
system. They sleep in futexes on Linux, in condition variables on other POSIX systems; elsewhere Numba's threads run
kernels.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
from functools import cache

from fastbn.cpu.code import Kernel, address
from fastbn.cpu.team_words import (
    CONDITION,
    COST,
    FUTEX,
    FUTEXES,
    HANDLE,
    HIRED,
    MEMBER,
    MEMBERS,
    MUTEX,
    NUMBER,
    POSSIBLE,
    TEAM,
)
from fastbn.threads import get_num_threads

# What every call needs compiled, and the team.
RUNTIME: list[Kernel] = [("calls.call", ()), ("signatures.describe", ())]
OF_THE_TEAM: list[Kernel] = [("team.serve", ()), ("team.dismiss", ())]

PARALLEL_FROM = 3 << 16  # elements; below, one thread takes 40 us, in which no other can do much
COST_AT_FIRST = 10_000  # ns of calling a sleeper, before the first call has been measured
MOST_MEMBERS = 256  # members

here, futexes = POSSIBLE, FUTEX > 0

_memory, _hired, _closed = 0, 0, False
_refused = False  # the system gave no more threads
_starting = threading.Lock()


def threads_for(elements: int) -> int:
    """How many threads do so much work, at most."""
    return 1 if elements < PARALLEL_FROM else min(get_num_threads(), MOST_MEMBERS)


def team_for(threads: int) -> int:
    """What runs a program's tasks: a team's memory, an odd number for Numba's threads, or 0: this thread alone."""
    if threads < 2:
        return 0
    if not here:
        return _numbas_threads()
    if _hired < threads - 1 and not _refused and _starting.acquire(blocking=False):
        try:
            _start(min(threads, MOST_MEMBERS))
        finally:
            _starting.release()
    return _memory


def _word(place: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(place)


@cache
def _system() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.pthread_create.argtypes = (ctypes.c_void_p,) * 4
    library.pthread_mutex_init.argtypes = library.pthread_cond_init.argtypes = (ctypes.c_void_p,) * 2
    library.pthread_join.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
    return library


@cache
def _dismiss() -> ctypes._FuncPointer:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address("team.dismiss"))


def _start(threads: int) -> None:
    global _memory, _hired, _refused
    if _closed:
        return
    serve = address("team.serve")
    if not _memory:  # never freed: a late worker may look there
        calloc = ctypes.pythonapi.PyMem_RawCalloc
        calloc.argtypes, calloc.restype = (ctypes.c_size_t, ctypes.c_size_t), ctypes.c_void_p
        memory = -(-calloc(MEMBERS + (MOST_MEMBERS + 1) * MEMBER, 1) // 128) * 128
        _word(memory + COST).value = COST_AT_FIRST
        _prepare(memory + MEMBERS)
        _dismiss()  # now: the interpreter's end is no time to compile
        _memory = memory
    # Signals are the interpreter's: workers inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        while _hired < threads - 1 and not _refused:
            member = _memory + MEMBERS + (_hired + 1) * MEMBER
            _prepare(member)
            _word(member + TEAM).value, _word(member + NUMBER).value = _memory, _hired + 1
            if not _word(member + HANDLE).value:  # else Ctrl-C came when it was there and not yet counted
                _refused = _system().pthread_create(member + HANDLE, None, serve, member) != 0
            _hired += not _refused
            _word(_memory + HIRED).value = _hired
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _prepare(member: int) -> None:
    """How a member sleeps."""
    _word(member + FUTEXES).value = futexes
    _system().pthread_mutex_init(member + MUTEX, None)
    _system().pthread_cond_init(member + CONDITION, None)


@atexit.register  # once: forked children inherit it
def _stop() -> None:
    """Workers leave before the interpreter takes their code away."""
    global _closed, _hired
    _closed = True  # first: nobody hires from now on, and who does so now comes to an end
    _starting.acquire(timeout=1.0)
    hired, _hired = _hired, 0
    if not hired:
        return
    _dismiss()(_memory)
    for k in range(1, hired + 1):
        _system().pthread_join(_word(_memory + MEMBERS + k * MEMBER + HANDLE).value, None)


def _after_fork() -> None:
    """The child has none of the threads, and maybe a job that never ends: it begins again."""
    global _memory, _hired, _refused, _starting
    _memory, _hired, _refused, _starting = 0, 0, False, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- Numba's threads --------------------------------------------------------------------------------------------------


def _numbas_threads() -> int:
    from fastbn.cpu.kernels import numba_threads

    team: int = numba_threads.team()
    return team
