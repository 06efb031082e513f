"""What generated code asks of the machine: memory, warps, and what a thread is."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.memory import Access, Allocation, Array, Shared, Stamps
from tests.ptx.order import Order
from tests.ptx.text import PtxError
from tests.ptx.undefined import Undefined
from tests.ptx.values import PARAMETERS, SHARED

WARP = 32
EVERYONE = 0xFFFFFFFF  # of a mask of lanes


class Operations:
    """Of blocks of a launch that run together; `idx` None are all their threads."""

    def __init__(self, launch: Any, first: int, blocks: int) -> None:
        self.launch, self.first, self.blocks = launch, first, blocks
        self.threads, self.lanes = launch.threads, blocks * launch.threads
        if self.threads % WARP:
            raise PtxError(f"blocks of {self.threads} threads have no whole warps, which is not known here")
        lane = np.arange(self.lanes)
        self.lane, self.block_of = lane, lane // self.threads
        self.thread_of = lane - self.block_of * self.threads
        self.me = (first * self.threads + lane + 1).astype(np.int32)
        """Threads' numbers in the grid, from 1."""
        self.shared = Shared(blocks, launch.shared)
        self.order = Order(self, first, blocks)
        self.undefined = Undefined(self)
        self.arrived = np.zeros(self.lanes, bool)
        self.progress = 0
        """Grows by all that another thread may wait for."""
        self.hits: dict[int, Allocation | None] = {}
        """The allocation that an instruction accessed before, by its line."""

    # --- warps --------------------------------------------------------------------------------------------------------

    def _whole(self, idx: Array) -> Array:
        """Of each thread, whether all lanes of its warp are there."""
        warp = idx // WARP
        return np.bincount(warp, minlength=self.lanes // WARP)[warp] == WARP

    def _members(self, mask: Any, idx: Any, line: int, what: str) -> bool:
        """Whether warps are whole and masks of all lanes; otherwise checks that all in the masks are there."""
        if isinstance(mask, int) and mask == EVERYONE and (idx is None or bool(self._whole(idx).all())):
            return True
        idx = self.lane if idx is None else idx
        masks = np.full(idx.size, mask, np.uint32) if isinstance(mask, int) else mask
        there = np.zeros(self.lanes // WARP, np.uint32)
        bit = np.uint32(1) << (idx % WARP).astype(np.uint32)
        np.bitwise_or.at(there, idx // WARP, bit)
        for wrong, why in (
            (masks & ~there[idx // WARP] != 0, "waits for lanes of its mask that do not come"),
            (masks & bit == 0, "is not in its own mask"),
        ):
            if wrong.any():
                raise PtxError(f"line {line}: {what} by {self.name(idx, int(wrong.argmax()))}: {why}")
        return False

    def shuffle(self, how: str, a: Array, lane: Any, mask: Any, idx: Any, line: int) -> Array:
        """What another lane of the warp has: lane ^ `lane`, or that lane."""
        if self._members(mask, idx, line, "shfl.sync") and isinstance(lane, int):
            rows = a.reshape(-1, WARP)
            if how == "bfly":
                return rows[:, np.arange(WARP) ^ lane].reshape(-1)
            return rows[:, lane].repeat(WARP)
        idx = self.lane if idx is None else idx
        own = idx % WARP
        other = own ^ lane if how == "bfly" else np.broadcast_to(lane, own.shape).astype(np.int64) & (WARP - 1)
        source = idx - own + other
        there = np.zeros(self.lanes, bool)
        there[idx] = True
        masks = np.broadcast_to(np.uint32(mask) if isinstance(mask, int) else mask, own.shape)
        wrong = ~there[source] | ((masks >> other.astype(np.uint32)) & np.uint32(1) == 0)
        if wrong.any():
            raise PtxError(f"line {line}: shfl.sync by {self.name(idx, int(wrong.argmax()))}: that lane takes no part")
        values = np.empty(self.lanes, a.dtype)
        values[idx] = a
        return values[source]

    def ballot(self, predicate: Array, mask: Any, idx: Any, line: int) -> Array:
        """The lanes whose predicate is true."""
        self._members(mask, idx, line, "vote.sync")
        idx = self.lane if idx is None else idx
        votes = np.zeros(self.lanes // WARP, np.uint32)
        np.bitwise_or.at(votes, idx // WARP, predicate.astype(np.uint32) << (idx % WARP).astype(np.uint32))
        return votes[idx // WARP] & np.uint32(mask) if isinstance(mask, int) else votes[idx // WARP] & mask

    # --- what a thread is, and does -----------------------------------------------------------------------------------

    def name(self, idx: Any, at: int) -> str:
        """A thread, as errors name it."""
        lane = int(self.lane[at] if idx is None else idx[at])
        return f"thread {lane % self.threads} of block {self.first + lane // self.threads}"

    def special(self, name: str, axis: str, idx: Any) -> Array:
        """tid, ntid, ctaid or nctaid; grids and blocks have one dimension."""
        n = self.lanes if idx is None else idx.size
        if axis != "x":
            return np.full(n, name.startswith("n"), np.uint32)
        if name in ("ntid", "nctaid"):
            return np.full(n, self.threads if name == "ntid" else self.launch.grid, np.uint32)
        found = self.thread_of if name == "tid" else self.block_of + self.first
        return (found if idx is None else found[idx]).astype(np.uint32)

    def trap(self, idx: Any, line: int) -> None:
        raise PtxError(f"line {line}: trap by {self.name(idx, 0)}")

    def divided(self, a: Array, b: Array, idx: Any, line: int) -> Array:
        """Integers, towards 0."""
        a, b = np.broadcast_arrays(a, b)
        if (b == 0).any():
            raise PtxError(f"line {line}: division by 0 by {self.name(idx, int((b == 0).argmax()))}")
        quotient = a // b
        return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)

    def remainder(self, a: Array, b: Array, idx: Any, line: int) -> Array:
        return a - self.divided(a, b, idx, line) * b

    def fence(self, idx: Any) -> None:
        self.order.fence(idx)

    def arrive(self, idx: Any, line: int) -> None:
        """At the cluster's barrier, which threads then wait for."""
        idx = self.lane if idx is None else idx
        if self.arrived[idx].any():
            raise PtxError(f"line {line}: {self.name(idx, 0)} arrives twice at the cluster's barrier")
        self.arrived[idx] = True

    # --- memory -------------------------------------------------------------------------------------------------------

    def _access(self, what: str, idx: Any, line: int) -> Access:
        return Access(what, line, lambda at: self.name(idx, at))

    def load_param(self, base: Array, offset: int, dtype: Any, count: int, idx: Any, line: int) -> list[Array]:
        access, size = self._access("ld.param", idx, line), dtype.itemsize * count
        at = base.view(np.int64) + (offset - PARAMETERS)
        if (wrong := (at < 0) | (at + size > self.launch.params_size)).any():
            access.fail(wrong, f"out of bounds of {self.launch.params_size} bytes of parameters")
        if (at % size).any():
            access.fail(at % size != 0, f"address is no multiple of {size}")
        values = self.launch.params.view(dtype)
        return [values[at // dtype.itemsize + k] for k in range(count)]

    def _stamp(self, idx: Any) -> Array:
        epoch, thread = self.order.epoch[self.block_of], self.thread_of + 1
        stamps = epoch << 32 | thread
        return stamps if idx is None else stamps[idx]

    def load_shared(self, base: Array, offset: int, dtype: Any, count: int, idx: Any, line: int) -> list[Array]:
        access, size = self._access("ld.shared", idx, line), dtype.itemsize * count
        block = self.block_of if idx is None else self.block_of[idx]
        at = self.shared.places(access, base.view(np.int64) + (offset - SHARED), size, block)
        if (unset := self.shared.load(access, at, size, self._stamp(idx))).any():
            self.undefined.loaded[line] = unset
        values, first = self.shared.data.view(dtype), at // dtype.itemsize
        return [values[first + k] for k in range(count)]

    def store_shared(self, base: Array, offset: int, dtype: Any, given: Any, idx: Any, line: int) -> None:
        access, size = self._access("st.shared", idx, line), dtype.itemsize * len(given)
        block = self.block_of if idx is None else self.block_of[idx]
        at = self.shared.places(access, base.view(np.int64) + (offset - SHARED), size, block)
        self.shared.store(access, at, size, self._stamp(idx))
        values, first = self.shared.data.view(dtype), at // dtype.itemsize
        for k, value in enumerate(given):
            values[first + k] = value

    def _parts(self, access: Access, at: Array, size: int) -> list[tuple[Allocation, Any]]:
        """Allocations, and which of the threads access each: slice(None) are all."""
        low, high, find = int(at.min()), int(at.max()) + size, self.launch.allocations.find
        found = self.hits.get(access.line)
        if found is None or low < found.low or high > found.high:
            found = self.hits[access.line] = find(low, size)
        parts: list[tuple[Allocation, Any]] = []
        left = np.ones(at.size, bool)
        if found is not None and high <= found.high:
            parts, left = [(found, slice(None))], np.zeros(1, bool)
        while left.any():
            low = int(at[left].min())
            found = find(low, size)
            if found is None:
                access.fail(at == low, f"{low:#x} is {self.launch.allocations.why_not(low, size)}")
            here = left & (at + size <= found.high)
            parts.append((found, np.nonzero(here)[0]))
            left &= ~here
        if (odd := at & np.int64(size - 1) != 0).any():
            access.fail(odd, f"address is no multiple of {size}")
        return parts

    def _stamped(self, what: str, idx: Any, some: Any, line: int, allocation: Allocation) -> tuple[Any, ...]:
        """Stamps of an allocation, and what they ask of these threads' access."""
        who = (self.lane if idx is None else idx)[some]
        stamps = self.launch.stamps.setdefault(allocation, Stamps(allocation.high - allocation.low))
        return stamps, self._access(what, who, line), self.me[who], self.order.epoch32(who), self.order.seen(who)

    def load_global(
        self, base: Array, offset: int, dtype: Any, count: int, idx: Any, line: int, how: str
    ) -> list[Array]:
        access, size = self._access("ld.global", idx, line), dtype.itemsize * count
        at, out = base.view(np.int64) + offset, [np.empty(base.size, dtype) for _ in range(count)]
        if how == "volatile":
            self.order.acquire(at, idx)
        counters = how == "volatile" and self.order.is_counter(at)
        for allocation, some in self._parts(access, at, size):
            if not counters:
                stamps, here, me, epoch, seen = self._stamped("ld.global", idx, some, line, allocation)
                stamps.load(here, at[some] - allocation.low, size, me, epoch, seen, how == "constant")
            values, first = allocation.view(dtype), (at[some] - allocation.base) // dtype.itemsize
            for k in range(count):
                out[k][some] = values[first + k]
        if dtype.kind == "f":
            poison = np.iinfo(f"u{dtype.itemsize}").max
            unset = np.logical_or.reduce([values.view(f"u{dtype.itemsize}") == poison for values in out])
            if unset.any():
                self.undefined.loaded[line] = unset
        return out

    def store_global(self, base: Array, offset: int, dtype: Any, given: Any, idx: Any, line: int) -> None:
        access, size = self._access("st.global", idx, line), dtype.itemsize * len(given)
        at = base.view(np.int64) + offset
        self.progress += 1
        for allocation, some in self._parts(access, at, size):
            stamps, here, me, epoch, seen = self._stamped("st.global", idx, some, line, allocation)
            stamps.store(here, at[some] - allocation.low, size, me, epoch, seen)
            values, first = allocation.view(dtype), (at[some] - allocation.base) // dtype.itemsize
            for k, value in enumerate(given):
                values[first + k] = np.broadcast_to(value, at.shape)[some]

    def atomic_add(self, base: Array, offset: int, value: Any, idx: Any, line: int) -> Array:
        """One thread after the other."""
        access, at = self._access("atom.global", idx, line), base.view(np.int64) + offset
        self.progress += 1
        self.order.atomic(at, idx)
        value, before = np.broadcast_to(value, at.shape), np.empty(at.size, np.uint32)
        for allocation, some in self._parts(access, at, 4):
            values = allocation.view(np.dtype(np.uint32))
            for k in np.arange(at.size)[some]:
                place = (int(at[k]) - allocation.base) // 4
                before[k] = values[place]
                values[place] += value[k]
        return before
