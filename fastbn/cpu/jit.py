"""How kernels are compiled, cached and run: `inner`, `kernel`, `run`.

A kernel is compiled twice from one source, on first use: with ``prange`` over Numba's threads, and serially for work
too small to share (a parallel call costs 2.2 us, a serial one 0.6 us). Both give the same bits.
"""

import hashlib
import os
import pickle
import threading
import warnings
from pathlib import Path

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

PARALLEL_FROM = 1 << 15  # elements; below, two threads lose to one (measured: 8k 1.7x slower, 64k 1.5x faster)


def _fingerprint():
    """A hash of this folder's sources: Numba's own stamp sees only the file that holds the kernel, not its helpers."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _CompiledFiles:
    """Compiled kernels on disk, a file each, in the place of Numba's index of numbered files.

    Two processes that compile different signatures at once give both the same number there, and one of them then loads
    the other's code. Here the name is a hash of all that the code depends on, and a file appears whole or not at all.
    """

    def __init__(self, folder, name):
        self._folder, self._name = Path(folder), name

    def _path(self, key):
        return (
            self._folder / f"{self._name}-{_FINGERPRINT[:12]}-{hashlib.sha256(str(key).encode()).hexdigest()[:24]}.nbc"
        )

    def load(self, key):
        try:
            stored_key, data = pickle.loads(self._path(key).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError, ValueError):
            return None
        return data if stored_key == str(key) else None

    def save(self, key, data):
        for stale in self._folder.glob(f"{self._name}-*.nbc"):
            if _FINGERPRINT[:12] not in stale.name:
                stale.unlink(missing_ok=True)
        temporary = self._path(key).with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        temporary.write_bytes(dumps((str(key), data)))
        os.replace(temporary, self._path(key))

    def flush(self):
        for path in self._folder.glob(f"{self._name}-*.nbc"):
            path.unlink(missing_ok=True)


def _disk_cache(function, name):
    """Numba's disk cache for one compiled form of ``function``, or None where nothing is writable."""
    try:
        cache = FunctionCache(function)
        cache._cache_file = _CompiledFiles(cache.cache_path, f"{cache._impl.filename_base}-{name}")
    except (RuntimeError, OSError):  # a read-only installation, and no home to fall back to
        return None
    return cache


_FINGERPRINT = _fingerprint()

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


def inner(function):
    """A function that kernels call: compiled into them, never called from Python.

    Inlined by force: a call that passes arrays counts references and costs some 10 ns, as much as a row of 49 values.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return njit(nogil=True, error_model="numpy", **options)(function)


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
