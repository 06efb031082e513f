"""How kernels are compiled and cached: `inner`, `compiled`, `machine_code`."""

import hashlib
import os
import pickle
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import llvmlite
import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.serialize import dumps

from fastbn.cpu.store import store_of


@lru_cache
def version():
    """A hash of this folder's sources and of the compiler: Numba's own stamp sees only the file that holds a kernel."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


class _Files:
    """Compiled forms of one function, a file each, in the place of Numba's index of numbered files.

    Two processes that compile different signatures at once give both the same number there, and one of them then loads
    the other's code. Here the name is a hash of all that the code depends on.
    """

    def __init__(self, store, name):
        self._store, self._name = store, name

    def file(self, key):
        return f"{self._name}-{hashlib.sha256(str(key).encode()).hexdigest()[:24]}.nbc"

    def load(self, key):
        content = self._store.read(self.file(key))
        if content is None:
            return None
        stored_key, data = pickle.loads(content)
        return data if stored_key == str(key) else None

    def save(self, key, data):
        self._store.write(self.file(key), dumps((str(key), data)))


class _NoFiles:
    """For installations where nothing can be kept."""

    def load(self, key):
        return None

    def save(self, key, data):
        pass


class _Cache(FunctionCache):
    """Numba's cache of a function, without its search for a folder: compiled forms are those of `store_of`."""

    def __init__(self, function):
        store, name = store_of(version()), f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._name, self._py_func, self._impl = name, function, _Forms(name)
        self._cache_path = None if store is None else str(store.folder)
        self._cache_file = _NoFiles() if store is None else _Files(store, name)
        self._compiling = None
        self.enable()

    def enable(self):
        self._enabled = True

    def load_overload(self, sig, target_context):
        found = super().load_overload(sig, target_context)
        self._compiling = Compilation(self._name, sig) if found is None else None
        return found

    def save_overload(self, sig, data):
        if self._compiling is not None:
            self._compiling.end()
        super().save_overload(sig, data)


class _Forms(FunctionCache._impl_class):
    """How a compiled form is taken apart and put together again: as Numba does it."""

    locator = SimpleNamespace(ensure_cache_path=lambda: None)  # the store's folder is there

    def __init__(self, name):
        self._filename_base = name


# --- a word to those who wait -----------------------------------------------------------------------------------------

PATIENCE = 1.0  # seconds of compilation in a process that nobody needs to be told about
QUIET = "FASTBN_COMPILE_NOTICE"


class Compilation:
    """From a form that was not on disk to its code. On a terminal it is said, once a process, what takes so long."""

    spent, told = 0.0, False

    def __init__(self, name, signature):
        self._what, self._began, self._timer = (name, signature), time.perf_counter(), None
        if not Compilation.told and os.environ.get(QUIET) != "0" and sys.stderr is not None and sys.stderr.isatty():
            self._timer = threading.Timer(max(0.0, PATIENCE - Compilation.spent), self._tell)
            self._timer.daemon = True
            self._timer.start()

    def end(self):
        Compilation.spent += time.perf_counter() - self._began
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self):
        Compilation.told = True
        name, signature = self._what
        kinds = {"uint16": "float16", "int16": "bfloat16", "float32": "float32", "float64": "float64"}
        arrays = (str(kind.dtype) for kind in signature if hasattr(kind, "dtype"))
        dtype = next((kinds[a] for a in arrays if a in kinds), "numbers")
        kept = "once on this machine" if store_of(version()) else "in each process, as no folder can keep them"
        print(
            f"fastbn: compiling kernels ({name} for {dtype}, and others), some seconds, {kept}; `python -m fastbn"
            f" warmup` does it ahead, {QUIET}=0 silences this",
            file=sys.stderr,
        )


# --- compilation ------------------------------------------------------------------------------------------------------


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
    found._cache = _Cache(function)
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
