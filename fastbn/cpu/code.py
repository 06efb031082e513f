"""Machine code of kernels: the address of each, loaded from disk by llvmlite alone, or compiled now.

A kernel for given arguments is an object file, found by a hash of all that it depends on: the sources, the compiler,
the processor. Only where none is there are Numba and the kernels' sources imported. Loading takes some milliseconds;
importing Numba would take half a second, and SciPy with it, where that is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging  # noqa: F401  # by Numba: its lock around forks is to be known before the one below is waited for
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from fastbn import operands
from fastbn.cpu import ahead, halves, objects, shipped
from fastbn.cpu.machines import machine_for, processor
from fastbn.cpu.store import store_of
from fastbn.numba_parts.version import fingerprint

_HERE = Path(__file__).parent
Kernel = ahead.Kernel
_lock = threading.RLock()
_known: set[Kernel] = set()
if hasattr(os, "register_at_fork"):  # a child has no thread that would let go of it, or of locks that it holds
    os.register_at_fork(before=_lock.acquire, after_in_child=_lock.release, after_in_parent=_lock.release)
loaded, compiled = 0, 0  # kernels of this process: from disk, and made


def address(name: str, *kinds: str) -> int:
    """Where a kernel is, named ``module.function``, for arguments of these kinds (``name:kind`` each)."""
    return addresses([(name, kinds)])[0]


def addresses(kernels: list[Kernel], later: Callable[[], list[Kernel]] = list) -> list[int]:
    """The same of several; where one must be compiled, those that will be wanted later are begun with, too."""
    with _lock:
        if _recorded is not None:
            return [_noted(kernel, _recorded) for kernel in kernels]
        missing = [kernel for kernel in kernels if _is_missing(*kernel)]
        if missing and store_of(version()) is not None:
            ahead.compile_all(missing, [k for k in later() if _is_missing(*k)], lambda k: _address(*k))
        return [_address(*kernel) for kernel in kernels]


def is_missing(name: str, *kinds: str) -> bool:
    """Whether a kernel has yet to be compiled."""
    with _lock:
        return _is_missing(name, kinds)


def _is_missing(name: str, kinds: tuple[str, ...]) -> bool:
    ahead.wait_for((name, kinds))
    if (name, kinds) in _known:
        return False
    symbol = _symbol(name, kinds)
    return _shipped(symbol) is None and _stored(symbol) is None


@cache
def _address(name: str, kinds: tuple[str, ...]) -> int:
    global loaded, compiled
    symbol = _symbol(name, kinds)
    code = _shipped(symbol) or _stored(symbol)
    if code is None:
        code, compiled = _compiled(name, kinds, symbol), compiled + 1
    else:
        loaded += 1
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    found: int = engine.get_function_address(symbol)
    _known.add((name, kinds))
    return found


def _symbol(name: str, kinds: tuple[str, ...]) -> str:
    return f"{name}-{hashlib.sha256(' '.join(kinds).encode()).hexdigest()[:24]}"


@cache
def _engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine_for(None))
    if llvm.get_process_triple().startswith("x86_64") and "+f16c" not in processor()[1].split(","):
        halves.provide(engine)
    return engine


# --- what came with this installation ---------------------------------------------------------------------------------


def level_here() -> str | None:
    """The highest level of this processor that wheels may have kernels for."""
    return shipped.level_of(*processor())


@cache
def archive() -> shipped.Archive | None:
    """The kernels that came with this installation for this processor; empty if they are of other sources."""
    level = level_here()
    return None if level is None else shipped.Archive(shipped.FOLDER / level, sources())


def _shipped(symbol: str) -> bytes | None:
    found = archive()
    return None if found is None else found.read(symbol)


def build(name: str, kinds: tuple[str, ...], levels: Sequence[str]) -> tuple[str, list[bytes]]:
    """The symbol of a kernel, and its code for each of these levels."""
    symbol = _symbol(name, kinds)
    return symbol, _object_code(name, kinds, symbol, levels)


# --- which kernels calls ask for --------------------------------------------------------------------------------------

_LEADS_TO_KERNELS = ("calls", "signatures", "team")  # what calls go through
_recorded: dict[Kernel, None] | None = None


def record() -> dict[Kernel, None]:
    """From now on nothing else is compiled, kernels do nothing, and those that calls ask for are in this dictionary.

    Results are what memory happens to hold: a process that records is good for nothing else.
    """
    global _recorded
    _recorded = {}
    return _recorded


def _noted(kernel: Kernel, notes: dict[Kernel, None]) -> int:
    notes[kernel] = None
    return _address(*kernel) if kernel[0].partition(".")[0] in _LEADS_TO_KERNELS else _nothing()


@cache
def _nothing() -> int:
    """The address of a kernel that does nothing."""
    engine = _engine()
    engine.add_module(llvm.parse_assembly("define void @nothing(i64, i64, i64, i64) {\n  ret void\n}\n"))
    engine.finalize_object()
    found: int = engine.get_function_address("nothing")
    return found


# --- what users have compiled -----------------------------------------------------------------------------------------


@lru_cache
def sources() -> str:
    """A hash of what kernels are made from: sources, system, what they take of Python's objects and the contract."""
    places = [value for name, value in vars(objects).items() if name.endswith("_AT")]
    places += operands.CAREFUL, operands.NO_DEGREES, operands.EMPTY
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()} {places}".encode())
    for source in (*sorted(_HERE.rglob("*.py")), _HERE.parent / "numba_parts" / "compiling.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


@lru_cache
def version() -> str:
    """A hash of the sources, the compiler and the processor."""
    parts = sources(), llvmlite.__version__, fingerprint(), *processor()
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


def _stored(symbol: str) -> bytes | None:
    store = store_of(version())
    return None if store is None else store.read(f"{symbol}.o")


def compile_to_store(name: str, kinds: tuple[str, ...]) -> None:
    """Compile a kernel for other processes, unless it is there."""
    symbol = _symbol(name, kinds)
    if _stored(symbol) is None:
        _compiled(name, kinds, symbol)


def _compiled(name: str, kinds: tuple[str, ...], symbol: str) -> bytes:
    notice = Notice(name, kinds)
    (code,) = _object_code(name, kinds, symbol, [None])
    notice.end()
    store = store_of(version())
    if store is not None:
        store.write(f"{symbol}.o", code)
    return code


def _object_code(name: str, kinds: tuple[str, ...], symbol: str, levels: Sequence[str | None]) -> list[bytes]:
    module, _, function = name.partition(".")
    kernels = importlib.import_module(f"fastbn.cpu.kernels.{module}")
    compiler = importlib.import_module("fastbn.cpu.kernels.compiler")
    codes: list[bytes] = compiler.object_code(getattr(kernels, function), kinds, symbol, levels)
    return codes


# --- a word to those who wait -----------------------------------------------------------------------------------------

NOTICE_AFTER = 1.0  # seconds of compilation in a process that nobody needs to be told about
QUIET = "FASTBN_COMPILE_NOTICE"


def _on_a_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (AttributeError, ValueError):  # a program's own object with `write` alone; a closed one
        return False


class Notice:
    """Of a compilation. On a terminal it is said, once a process, what takes so long."""

    spent, told = 0.0, False

    def __init__(self, name: str, kinds: tuple[str, ...]) -> None:
        self._name, self._kinds, self._began, self._timer = name, kinds, time.perf_counter(), None
        if not Notice.told and os.environ.get(QUIET) != "0" and _on_a_terminal():
            self._timer = threading.Timer(max(0.0, NOTICE_AFTER - Notice.spent), self._tell)
            self._timer.daemon = True
            with suppress(RuntimeError):  # no more threads
                self._timer.start()

    def end(self) -> None:
        Notice.spent += time.perf_counter() - self._began
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        Notice.told = True
        names = {"u2*": "float16", "i2*": "bfloat16", "f4*": "float32", "f8*": "float64"}
        dtype = next((names[kind] for kind in (k.partition(":")[2] for k in self._kinds) if kind in names), "numbers")
        kept = "once on this machine" if store_of(version()) else "in each process, as no folder can keep them"
        print(
            f"fastbn: compiling kernels ({self._name} for {dtype}, and others), some seconds, {kept}; `fastbn warmup`"
            f" does it ahead, {QUIET}=0 silences this",
            file=sys.stderr,
        )
