"""A prepared call: kernels one after the other, on arrays and numbers that each call gives.

A kernel takes one pointer to its arguments, 8 bytes each. A `Program` says once where each comes from, and its code's
address, in an array of words; a call then is one call of a built-in function (`kernels.calls`), which does the rest.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.code import Kernel, address, addresses, is_missing
from fastbn.cpu.program_words import (
    ALWAYS,
    AT_LEAST,
    CONSTANT,
    DATA,
    FUNCTION,
    INTEGERS,
    KEPT_UNTIMED,
    KEPT_WORK,
    LONG_WORK,
    NEVER,
    NOWHERE,
    NUMBER,
    SCRATCH,
    TEMPORARY,
    VECTOR_KINDS,
    LaunchWords,
    SourceWords,
    VectorWords,
)
from fastbn.cpu.records import MARKS, Options, Results, SlabStrides, Strides
from fastbn.cpu.team import OF_THE_TEAM, RUNTIME, team_for
from fastbn.cpu.team_words import POSSIBLE

_AS_INTEGERS = {"float16": "u2", "bfloat16": "i2", "bool": "u1"}  # as kernels see these: Numba has no halves on the CPU


class Argument(NamedTuple):
    """Of a kernel: its kind, as kernels name it, and where it comes from."""

    kind: str
    source: int
    slot: int = 0
    extra: int = 0

    def after(self, count: int) -> Argument:
        """The same array from an element on."""
        return self._replace(extra=self.extra + count * int(self.kind[1]))


NONE = Argument("none", CONSTANT)


class Strided(NamedTuple):
    """Of a kernel: an array, in one word, and its strides, in another."""

    array: Argument
    strides: Argument


Words = tuple[Argument, ...]
Given = Argument | Strided | Options | Results | bool | float | None


@lru_cache(maxsize=64)
def kernel_type(dtype: np.dtype[Any]) -> str:
    """An array of this dtype, as kernels name it (``dtype.name`` alone takes a microsecond)."""
    return f"{_AS_INTEGERS.get(dtype.name, dtype.str[1:])}*"


class Program:
    """Launches of kernels; ``program(x, y, 1e-5)`` runs them.

    Parameters
    ----------
    threads : int
        That run the tasks, at most.
    work : int
        Elements of all arrays that kernels go through, each as often as they do; writing along costs nothing.
    arrays : dict
        Names of the arrays that a call gives, in order, and their kinds; None for one that is always absent.
    numbers : sequence of str
        Names of the floats that it gives behind them.
    """

    def __init__(self, threads: int, work: int, arrays: dict[str, str | None], numbers: Sequence[str] = ()) -> None:
        self.threads, self._releases = threads, _releases(work)
        self._slots = {name: 8 * i for i, name in enumerate((*arrays, *numbers))}
        self._kinds = {name: kind or "none" for name, kind in arrays.items()} | dict.fromkeys(numbers, "f8")
        self._launches: list[tuple[str, int, int, dict[str, Words]]] = []
        self._functions: list[Kernel] = []
        self._vectors: list[VectorWords] = []
        self._scratch = self._temporary = self._used = 0
        self._integers: list[int] = []
        self._words: Any = None
        self.followed_by: Callable[[], Program] | None = None  # a call that often comes after this one
        self.call: Callable[..., object] = self._first_call

    # --- making it ---

    def array(self, name: str) -> Argument:
        kind = self._kinds[name]
        return NONE if kind == "none" else Argument(kind, DATA, self._slots[name])

    def number(self, name: str) -> Argument:
        return Argument("f8", NUMBER, self._slots[name])

    def at_least(self, name: str, least: float) -> Argument:
        return Argument("bool", AT_LEAST, self._slots[name], _bits(least))

    def scratch(self, count: int, kind: str) -> Argument:
        """Memory for so many values, while a call lasts."""
        place = self._scratch
        self._scratch += -(-count * int(kind[1]) // 64) * 64
        return Argument(kind, SCRATCH, 0, place)

    def temporary(self, count: int, kind: str) -> Argument:
        """The same for the next launch alone, which others use before and after it."""
        place = self._used
        self._used += -(-count * int(kind[1]) // 64) * 64
        self._temporary = max(self._temporary, self._used)
        return Argument(kind, TEMPORARY, 0, place)

    def integers(self, values: Sequence[int]) -> Argument:
        """Constants in memory: behind the program's words, so that who holds these needs nothing else."""
        place = 8 * len(self._integers)
        self._integers += values
        return Argument("i8*", INTEGERS, extra=place)

    def record(self, values: NamedTuple) -> Argument:
        """Integers that a kernel knows by their names, one of `records.INTEGER_RECORDS`."""
        return self.integers(values)._replace(kind=type(values).__name__)

    def strided(
        self, array: Argument, strides: Strides | SlabStrides | None, sort: type[Strides | SlabStrides] = Strides
    ) -> Strided:
        """An array with its strides, of such a sort; of an absent one there are none."""
        if strides is None:
            return Strided(Argument("none" + MARKS[sort], CONSTANT), NONE)
        return Strided(array._replace(kind=array.kind.replace("*", MARKS[sort])), self.record(strides))

    def vector(self, name: str, count: int, default: float, to: Argument) -> None:
        """First of all, copy a vector of parameters to a place, in float64; where none is given, its default."""
        kind = self._kinds[name]
        slot = NOWHERE if kind == "none" else self._slots[name]
        target = NOWHERE if to.source == SCRATCH else to.slot
        self._vectors.append(
            VectorWords(slot, VECTOR_KINDS.index(kind), default=_bits(default), length=count, to=target, start=to.extra)
        )

    def launch(self, name: str, tasks: int, short: bool = False, **arguments: Given) -> None:
        """The kernel ``module.function``; its arguments in order. The calling thread does what is short."""
        threads = 1 if short else self.threads
        self._used = 0
        self._launches.append((name, tasks, threads, {key: _words(a) for key, a in arguments.items()}))

    def function(self, name: str, **kinds: str) -> Argument:
        """The address of a kernel that others call."""
        self._functions.append((name, tuple(f"{key}:{kind}" for key, kind in kinds.items())))
        return Argument("i8", FUNCTION, len(self._functions) - 1)

    def kernels(self) -> list[Kernel]:
        """Those that it launches, and those that these call."""
        launched = [
            (name, tuple(f"{key}:{words[0].kind}" for key, words in given.items()))
            for name, _, _, given in self._launches
        ]
        return [*launched, *self._functions]

    def _later(self) -> list[Kernel]:
        return [] if self.followed_by is None else self.followed_by().kernels()

    # --- running it ---

    def __call__(self, *given: Any) -> None:
        """Arrays, or None for an absent one, and floats: their objects are read as such."""
        if self.threads > 1:
            self.prepared()
            self._words[0] = team_for(self.threads)
        self.call(*given)

    def prepared(self) -> Callable[..., object]:
        """The call itself, for one thread, with its kernels found."""
        if self._words is None:
            self._prepare()
        return self.call

    def _first_call(self, *given: Any) -> object:
        return self.prepared()(*given)

    def _prepare(self) -> None:
        sizes = [self._scratch + self._temporary, len(self._vectors), len(self._launches)]
        words = [0, self._releases, *_of_python(*_OF_PYTHON), *sizes, *chain(*self._vectors)]
        entries = addresses([*self.kernels(), *RUNTIME, *(OF_THE_TEAM if self.threads > 1 else ())], self._later)
        pointers = []  # words that are to point into these words
        for (_, tasks, threads, named), entry in zip(self._launches, entries, strict=False):
            arguments = [word for of_one in named.values() for word in of_one]
            words += LaunchWords(entry, tasks, threads, len(arguments))
            for a in arguments:
                if a.source == TEMPORARY:  # behind all that lasts
                    a = a._replace(source=SCRATCH, extra=a.extra + self._scratch)
                elif a.source == INTEGERS:
                    a = a._replace(source=CONSTANT)
                    pointers.append(len(words) + SourceWords._fields.index("extra"))
                elif a.source == FUNCTION:
                    a = Argument(a.kind, CONSTANT, extra=entries[len(self._launches) + a.slot])
                words += SourceWords(a.source, a.slot, a.extra)
        mine = np.array(words + self._integers, np.int64)
        mine[pointers] += mine.ctypes.data + 8 * len(words)
        # Threads may prepare it at once; the words of the first are everybody's, or a call's team would never change.
        self._words, self.call = vars(self).setdefault("_prepared", (mine, _built_in(_call, "calls.call", mine)))


def _releases(work: int) -> int:
    """The word `RELEASES` of a program with so much work."""
    if work < KEPT_WORK if POSSIBLE else work < KEPT_UNTIMED:
        return NEVER
    return ctypes.addressof(_lock) if POSSIBLE and work < LONG_WORK else ALWAYS


_lock = (ctypes.c_int64 * 3)()  # the time; the time lost; how many threads wait
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_lock))  # for ever: functions may outlive this module
if hasattr(os, "register_at_fork"):  # no thread of a child waits
    os.register_at_fork(after_in_child=partial(_lock.__setitem__, 2, 0))


def _words(given: Given) -> Words:
    if isinstance(given, Strided):
        return tuple(given)
    if isinstance(given, Options | Results):  # the first word has the kind of all
        first, *others = (word for member in given for word in _words(member))
        kinds = "|".join(word.kind for word in (first, *others))
        return (first._replace(kind=f"{type(given).__name__}({kinds})"), *others)
    if isinstance(given, Argument):
        return (given,)
    if given is None:
        return (NONE,)
    if isinstance(given, bool):
        return (Argument("bool", CONSTANT, extra=int(given)),)
    if isinstance(given, int):
        return (Argument("i8", CONSTANT, extra=given),)
    return (Argument("f8", CONSTANT, extra=_bits(given)),)


def _bits(number: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


# --- built-in functions -----------------------------------------------------------------------------------------------

_OF_PYTHON = (
    "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef", "PyErr_NoMemory", "PyMem_RawMalloc", "PyMem_RawFree",
)  # fmt: skip
_FASTCALL = 0x0080  # METH_FASTCALL: arguments come as an array of objects


class _Method(ctypes.Structure):
    """``PyMethodDef``."""

    _fields_ = (("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


def _definition() -> _Method:
    """One for all functions of a kind, and for ever: they may outlive this module when the interpreter ends."""
    made = _Method(b"call", None, _FASTCALL, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


_call, _describe, _disjoint = _definition(), _definition(), _definition()


def _built_in(definition: _Method, code: str, words: Any) -> Callable[..., Any]:
    """A function of Python's own kind, which finds the words as its ``self``."""
    definition.code = address(code)
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    make = kind(("PyCFunction_NewEx", ctypes.pythonapi))  # attributes of pythonapi are everybody's
    function: Callable[..., Any] = make(ctypes.addressof(definition), words, None)
    return function


def _of_python(*names: str) -> list[int | None]:
    """Addresses of the interpreter's functions."""
    return [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names]


def describe() -> Callable[..., bytes | None] | None:
    """``describe(*arrays)``: what a signature has of NumPy arrays and Nones, in bytes; None if there are others.

    None until it is compiled: a first call compiles it beside its kernels, in two processes.
    """
    if is_missing("signatures.describe"):
        return None
    return _built_in(_describe, "signatures.describe", _objects())


def _objects() -> Any:
    return np.array(
        [*map(id, (np.ndarray, None, True, False)), *_of_python("PyBytes_FromStringAndSize", "Py_IncRef")], np.int64
    )


@cache
def disjoint() -> Callable[..., bool]:
    """``disjoint(out, *others)``: whether it surely shares no memory with other arrays; itself does not count."""
    return _built_in(_disjoint, "signatures.disjoint", _objects())
