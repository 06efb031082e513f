"""How kernels are compiled, cached and run: `inner`, `kernel`, `run`.

A kernel is a function of a range of tasks, compiled once, on first use. A serial call gives it all of them; a parallel
one shares them among Numba's threads, each of which calls the same machine code. So both give the same bits, and a
parallel call costs no second compilation, which would take at least as long as the first.
"""

import hashlib
import os
import pickle
import threading
import warnings
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.serialize import dumps
from numba.extending import intrinsic

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


def _disk_cache(function):
    """Numba's disk cache for ``function``, or None where nothing is writable."""
    try:
        cache = FunctionCache(function)
        cache._cache_file = _CompiledFiles(cache.cache_path, cache._impl.filename_base)
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


def _compiled(function, **options):
    compiled = njit(nogil=True, error_model="numpy", **options)(function)
    cache = _disk_cache(function)
    if cache is not None:
        compiled._cache = cache
    return compiled


def _launch(run_shares, kernel, tasks, shares, arguments):
    _share_out(run_shares, kernel, tasks, shares, arguments)


LAUNCHERS = _parallel, _launcher = _compiled(_run_shares, parallel=True), _compiled(_launch)
_addresses = {}


def _address(compiled, kinds):
    """Where the machine code for arguments of these types is; compiled, or loaded, on first use."""
    address = _addresses.get((compiled, kinds))
    if address is None:
        compiled.compile(kinds)
        code = compiled.overloads[kinds]
        address = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
        _addresses[compiled, kinds] = address
    return address


class kernel:
    """A compiled entry point ``function(share, first, last, *arguments)``; run it by ``run``."""

    def __init__(self, function):
        self.__doc__ = function.__doc__
        self.compiled = _compiled(function)
        self._places = {}

    def run(self, tasks, shares, *arguments):
        """Run all tasks: in so many shares where that is safe, else on the calling thread.

        The shares are at most those that `shares_of` gives; each is known to the kernel by its number.
        """
        if shares < 2 or _lost_team or not _team.acquire(blocking=False):
            self.compiled(0, 0, tasks, *arguments)
            return
        try:
            team = _address(_parallel, (types.int64,) * 4)
            _launcher(team, self._place(arguments), tasks, shares, arguments)
        finally:
            _team.release()

    def _place(self, arguments):
        """Where the machine code for such arguments is."""
        key = tuple(a.dtype if type(a) is np.ndarray else type(a) for a in arguments)
        place = self._places.get(key)
        if place is None:
            kinds = (types.int64, types.int64, types.int64, *map(numba.typeof, arguments))
            place = self._places[key] = _address(self.compiled, kinds)
        return place


def shares_of(elements):
    """How many threads share so much work."""
    return 1 if elements < PARALLEL_FROM else numba.get_num_threads()
