"""How kernels are compiled and cached: `inner`, `compiled`, `machine_code`."""

import hashlib
import os
import pickle
import threading
from pathlib import Path

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.serialize import dumps


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


def _disk_cache(function):
    """Numba's disk cache for ``function``, or None where nothing is writable."""
    try:
        cache = FunctionCache(function)
        cache._cache_file = _CompiledFiles(cache.cache_path, cache._impl.filename_base)
    except (RuntimeError, OSError):  # a read-only installation, and no home to fall back to
        return None
    return cache


_FINGERPRINT = _fingerprint()


class _Part(JITCodeLibrary):
    """The code of an inner function, ready to be linked into a kernel, and no more.

    Numba would optimize each by itself and make machine code of it too: a fifth to a quarter of a first call.
    """

    def finalize(self):
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0  # as of a function that is not there

    @property
    def codegen(self):
        return self  # asked for `set_env` alone

    def set_env(self, name, environment):
        """What Python calls need; there are none."""


class _PartCompiler(Compiler):
    def __init__(self, typingctx, targetctx, library, *rest):
        super().__init__(typingctx, targetctx, _Part(targetctx.codegen(), "part"), *rest)


def inner(function):
    """A function that kernels call: compiled into them, never called from Python.

    Inlined by force: a call that passes arrays counts references and costs some 10 ns, as much as a row of 49 values.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return njit(nogil=True, error_model="numpy", pipeline_class=_PartCompiler, **options)(function)


def compiled(function, **options):
    """The function compiled on first use, from the cache on disk where it is there."""
    found = njit(nogil=True, error_model="numpy", **options)(function)
    cache = _disk_cache(function)
    if cache is not None:
        found._cache = cache
    return found


_addresses = {}


def machine_code(function, kinds):
    """Its address, for arguments of these types; compiled, or loaded, on first use."""
    address = _addresses.get((function, kinds))
    if address is None:
        function.compile(kinds)
        code = function.overloads[kinds]
        address = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
        _addresses[function, kinds] = address
    return address
