"""How kernels are compiled, cached and run: `inner`, `kernel`, `run`.

A kernel is compiled twice from one source, on first use: with ``prange`` over Numba's threads, and serially for work
too small to share (a parallel call costs 2.2 us, a serial one 0.6 us). Both give the same bits.
"""

import hashlib
import os
import threading
import warnings
from pathlib import Path

import numba
from numba import njit

PARALLEL_FROM = 1 << 15  # elements; below, two threads lose to one (measured: 8k 1.7x slower, 64k 1.5x faster)


def _fingerprint():
    """A hash of this folder's sources: Numba's own stamp sees only the file that holds the kernel, not its helpers."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _disk_cache(function, name):
    """Numba's disk cache for one compiled form of ``function``, or None where nothing is writable."""
    try:
        from numba.core.caching import FunctionCache, IndexDataCacheFile

        cache = FunctionCache(function)
        cache._cache_file = IndexDataCacheFile(cache._cache_path, f"{cache._impl.filename_base}-{name}", _FINGERPRINT)
    except (RuntimeError, ImportError, AttributeError, OSError):  # read-only install without a home; other internals
        return None
    return cache


_FINGERPRINT = _fingerprint()

# One parallel call at a time: a second Python thread runs serially meanwhile. Numba's workqueue layer aborts the process
# when entered twice, and on the other layers two teams of threads on the same cores only slow each other down.
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


def inner(function):
    """A function that kernels call: compiled into them, never called from Python."""
    return njit(nogil=True, error_model="numpy")(function)


class kernel:
    """A compiled entry point: ``kernel(function).run(elements, *arguments)``."""

    def __init__(self, function):
        self.__doc__ = function.__doc__
        self._function = function
        self.parallel = self._compiled("parallel")
        self.serial = self._compiled("serial")

    def _compiled(self, name):
        compiled = njit(nogil=True, error_model="numpy", parallel=name == "parallel")(self._function)
        cache = _disk_cache(self._function, name)
        if cache is not None:
            compiled._cache = cache
        return compiled

    def run(self, elements, *arguments):
        """Run on all of Numba's threads where that pays and is safe, else on the calling thread."""
        if elements < PARALLEL_FROM or _lost_team or numba.get_num_threads() == 1 or not _team.acquire(blocking=False):
            return self.serial(*arguments)
        try:
            return self.parallel(*arguments)
        finally:
            _team.release()
