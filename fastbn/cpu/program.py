"""A prepared call: kernels one after the other, on arrays and numbers that each call gives.

A kernel takes one pointer to its arguments, 8 bytes each. A `Program` says once where each comes from, and its code's
address; a call then packs what has changed into a block, and one native call does the rest (`kernels.team.run`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.code import address
from fastbn.cpu.team import team_for

# Where an argument comes from: itself; a number given at each call; an array given at each call, or the scratch memory,
# so many bytes from the first element; whether a number given is at least so large.
CONSTANT, NUMBER, DATA, SCRATCH, AT_LEAST = range(5)
MOST_ARGUMENTS = 32

_INTEGERS = {"float16": "u2", "bfloat16": "i2", "bool": "u1"}  # as kernels see these: Numba has no halves on the CPU


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


@lru_cache(maxsize=64)
def kind_of(dtype: np.dtype[Any]) -> str:
    """An array of this dtype, as kernels name it (``dtype.name`` alone takes a microsecond)."""
    return f"{_INTEGERS.get(dtype.name, dtype.str[1:])}*"


class Program:
    """Launches of kernels; ``program((x, y), 1e-5)`` runs them.

    Parameters
    ----------
    threads : int
        That share the tasks, at most.
    arrays : dict
        Names of the arrays that a call gives, in order, and their kinds; None for one that is always absent.
    numbers : dict
        The same of numbers, "f8" or "i8".
    """

    def __init__(self, threads: int, arrays: dict[str, str | None], numbers: dict[str, str]) -> None:
        self.threads = threads
        self._slots = {name: 8 * i for i, name in enumerate((*arrays, "", *numbers))}
        self._kinds = {name: kind or "none" for name, kind in (*arrays.items(), *numbers.items())}
        of_numbers = "".join("d" if kind == "f8" else "q" for kind in numbers.values())
        self._layout = struct.Struct(f"{3 + len(arrays)}q{of_numbers}")  # the team, the program, what a call gives
        self._launches: list[tuple[str, int, dict[str, Argument]]] = []
        self._scratch = self._address = 0
        self._kept: list[Any] = []

    # --- making it ---

    def array(self, name: str) -> Argument:
        kind = self._kinds[name]
        return NONE if kind == "none" else Argument(kind, DATA, self._slots[name])

    def number(self, name: str) -> Argument:
        return Argument(self._kinds[name], NUMBER, self._slots[name])

    def at_least(self, name: str, least: int) -> Argument:
        return Argument("bool", AT_LEAST, self._slots[name], least)

    def scratch(self, count: int, kind: str) -> Argument:
        """Memory for so many values, while a call lasts."""
        place = self._scratch
        self._scratch += -(-count * int(kind[1]) // 64) * 64
        return Argument(kind, SCRATCH, self._slots[""], place)

    def integers(self, values: Sequence[int]) -> Argument:
        """Constants in memory."""
        self._kept.append(np.array(values, np.int64))
        return Argument("i8*", CONSTANT, extra=self._kept[-1].ctypes.data)

    def launch(self, name: str, tasks: int, **arguments: Argument | bool | float | None) -> None:
        """The kernel ``module.function``; its arguments in order."""
        self._launches.append((name, tasks, {key: _argument(a) for key, a in arguments.items()}))

    # --- running it ---

    def __call__(self, arrays: tuple[Any, ...], *numbers: float) -> None:
        if not self._address:
            self._prepare()
        scratch = np.empty(self._scratch, np.uint8)
        team = team_for(self.threads)
        _run()(self._layout.pack(team, self._address, *map(id, arrays), id(scratch), *numbers))

    def _prepare(self) -> None:
        words = [_data_at(), len(self._launches)]
        for name, tasks, arguments in self._launches:
            entry = address(name, *(f"{key}:{a.kind}" for key, a in arguments.items()))
            words += [entry, tasks, self.threads, len(arguments)]
            for a in arguments.values():
                words += [a.source, a.slot, a.extra]
        self._scratch += 64  # it starts on a cache line
        program = np.array(words, np.int64)
        self._kept.append(program)
        self._address = program.ctypes.data


def _argument(given: Argument | bool | float | None) -> Argument:
    if given is None:
        return NONE
    if isinstance(given, bool):
        return Argument("bool", CONSTANT, extra=int(given))
    if isinstance(given, float):
        return Argument("f8", CONSTANT, extra=struct.unpack("q", struct.pack("d", given))[0])
    return given


@cache
def _run() -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(address("team.run"))


@cache
def _data_at() -> int:
    """Where an array object has the address of its first element: behind what every Python object begins with."""
    array = np.empty(1)
    words = (ctypes.c_int64 * 16).from_address(id(array))
    return 8 * list(words).index(array.ctypes.data)
