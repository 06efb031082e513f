"""Memory as threads see it: where it ends, what was freed, what nobody has written, and who must wait for whom.

Two threads that touch the same bytes, one of them writing, need something that orders them: a barrier of the block or
the cluster, or a fence, an atomic operation or volatile load of the same counter, and a fence. Every byte that is
written remembers the thread and its block's barriers before; every read and write looks whether that comes first for
its thread. So what needs a rare order to fail fails in any order.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from tests.ptx.text import PtxError

Array = Any  # np.ndarray

MOST_FREED = 4096


class Allocation:
    """Bytes of device memory; the host's, as kernels see them."""

    def __init__(self, low: int, size: int) -> None:
        self.low, self.high = low, low + size
        self.base = low & ~7
        self._views: dict[str, Array] = {}

    def view(self, dtype: Any) -> Array:
        """Of all its bytes, from `base` on."""
        found = self._views.get(dtype.char)
        if found is None:
            nbytes = -(-(self.high - self.base) // 8) * 8
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.base))
            found = self._views[dtype.char] = raw.view(dtype)
        return found


class Allocations:
    """What is allocated, and what was."""

    def __init__(self) -> None:
        self.live: dict[int, Allocation] = {}
        self.freed: list[tuple[int, int]] = []
        self._owners: dict[int, weakref.ref[Any]] = {}

    def add(self, low: int, size: int, owner: Any) -> None:
        """Memory that is there as long as its owner is."""
        if size == 0 or id(owner) in self._owners:
            return
        key = id(owner)
        self.live[key] = Allocation(low, size)
        self._owners[key] = weakref.ref(owner, lambda _: self._drop(key))

    def _drop(self, key: int) -> None:
        self._owners.pop(key, None)
        gone = self.live.pop(key, None)
        if gone is not None:
            self.freed.append((gone.low, gone.high))
            del self.freed[:-MOST_FREED]

    def find(self, address: int, size: int) -> Allocation | None:
        """The allocation in which these bytes lie."""
        for allocation in self.live.values():
            if allocation.low <= address and address + size <= allocation.high:
                return allocation
        return None

    def why_not(self, address: int, size: int) -> str:
        """What is wrong with an address that is in no allocation."""
        for allocation in self.live.values():
            if address < allocation.high + 256 and address + size > allocation.low - 256:
                end = address + size - allocation.high
                place = f"{end} bytes past the end" if end > 0 else f"{allocation.low - address} bytes before the start"
                return f"out of bounds, {place} of {allocation.high - allocation.low} bytes"
        if any(low <= address < high for low, high in self.freed):
            return "in freed memory"
        return "in no allocation"


class Access:
    """One instruction's access by several threads, and how its errors name them."""

    def __init__(self, what: str, line: int, thread: Callable[[int], str]) -> None:
        self.what, self.line, self.thread = what, line, thread

    def fail(self, wrong: Array, why: str) -> NoReturn:
        """Raise for the first thread of which something is wrong."""
        at = int(np.argmax(wrong.reshape(len(wrong), -1).any(1)))
        raise PtxError(f"line {self.line}: {self.what} by {self.thread(at)}: {why}")


MANY = np.int64(0xFFFFFFFF)
THREAD = np.int64(0xFFFFFFFF)
TWO = 2  # bytes that have one stamp in shared memory


class Shared:
    """Shared memory of blocks, with stamps of who wrote and who read last: barriers before, and the thread plus 1."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size, self.row = size, -(-size // 16) * 16
        self.data = np.full(blocks * self.row, 0xFF, np.uint8)
        self.wrote = np.zeros(blocks * self.row // TWO, np.int64)
        self.read = np.zeros(blocks * self.row // TWO, np.int64)

    def places(self, access: Access, offset: Array, size: int, block: Array) -> Array:
        """Of bytes in `data`, checked."""
        wrong = (offset < 0) | (offset + size > self.size)
        if wrong.any():
            at = int(offset[np.argmax(wrong)])
            access.fail(wrong, f"{at} to {at + size} is out of bounds of {self.size} bytes of shared memory")
        if (offset % size).any():
            access.fail(offset % size != 0, f"address is no multiple of {size}")
        return block * self.row + offset

    def load(self, access: Access, at: Array, size: int, stamp: Array) -> Array:
        """Note reads with these stamps; gives whether nobody has written there."""
        words = (at // TWO)[:, None] + np.arange(size // TWO)
        me, wrote = stamp[:, None], self.wrote[words]
        race = (wrote > (me | THREAD) - MANY) & (wrote != me)
        if race.any():
            access.fail(race, _race("written", wrote[race]))
        before = self.read[words]
        others = (before > (me | THREAD) - MANY) & (before != me)
        self.read[words] = np.where(others, me | MANY, me)
        return (wrote == 0).any(1)

    def store(self, access: Access, at: Array, size: int, stamp: Array) -> None:
        """Note writes with these stamps."""
        words = (at // TWO)[:, None] + np.arange(size // TWO)
        me = stamp[:, None]
        for how, found in (("written", self.wrote[words]), ("read", self.read[words])):
            race = (found > (me | THREAD) - MANY) & (found != me)
            if race.any():
                access.fail(race, _race(how, found[race]))
        self.wrote[words] = me
        if (twice := self.wrote[words] != me).any():
            access.fail(twice, "another thread writes there by the same instruction")


def _race(how: str, stamps: Array) -> str:
    thread = int(stamps[0] & THREAD)
    who = "several threads" if thread == int(MANY) else f"thread {thread - 1}"
    return f"{how} by {who} since the last barrier"


def _unordered(how: str, threads: Array) -> str:
    return f"no barrier or fence since thread {int(threads[0]) - 1} of the grid {how} there"


class Stamps:
    """Of one allocation in global memory, for one launch: who wrote and who read each byte.

    Of several readers without an order none is kept: a write after them is not asked for.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.written = False
        self._reads: list[tuple[Access, Array, int, Array, Array]] = []
        """Before the first write: most arrays are never written."""
        self.writer, self.write_epoch = (np.zeros(0, np.int32),) * 2
        self.reader, self.read_epoch = (np.zeros(0, np.int32),) * 2

    def load(self, access: Access, at: Array, size: int, me: Array, epoch: Array, seen: Any, constant: bool) -> None:
        """Note reads at bytes `at` by threads `me`; `seen(threads, epochs)` says whether what these did comes first."""
        if not self.written:
            self._reads.append((access, at, size, me, epoch))
            return
        places = at[:, None] + np.arange(size)
        writer = self.writer[places]
        race = (writer != 0) & (writer != me[:, None])
        if constant and (writer != 0).any():
            access.fail(writer != 0, "the kernel writes there, and this load may see what was there before")
        if race.any():
            race &= ~seen(writer - 1, self.write_epoch[places])
            if race.any():
                access.fail(race, _unordered("wrote", writer[race]))
        self._note(places, me, epoch)

    def _note(self, places: Array, me: Array, epoch: Array) -> None:
        me, epoch = (np.broadcast_to(a[:, None], places.shape) for a in (me, epoch))
        before = self.reader[places]
        others = (before != 0) & (before != me) & (self.read_epoch[places] >= epoch)
        self.reader[places] = np.where(others, -1, me)
        self.read_epoch[places] = epoch

    def store(self, access: Access, at: Array, size: int, me: Array, epoch: Array, seen: Any) -> None:
        """Note writes likewise."""
        if not self.written:
            self.written = True
            self.writer, self.write_epoch, self.reader, self.read_epoch = np.zeros((4, self.nbytes), np.int32)
            for _, place, width, thread, when in self._reads:
                self._note(place[:, None] + np.arange(width), thread, when)
        places = at[:, None] + np.arange(size)
        for how, who, when in (("wrote", self.writer, self.write_epoch), ("read", self.reader, self.read_epoch)):
            found = who[places]
            race = (found > 0) & (found != me[:, None])
            if race.any():
                race &= ~seen(found - 1, when[places])
                if race.any():
                    access.fail(race, _unordered(how, found[race]))
        self.writer[places] = me[:, None]
        self.write_epoch[places] = epoch[:, None]
        if (twice := self.writer[places] != me[:, None]).any():
            access.fail(twice, "another thread writes there by the same instruction")
