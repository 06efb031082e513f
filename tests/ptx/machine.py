"""Threads of a launch, all blocks that may run at once together, one NumPy operation for the same instruction of all.

Threads that part run apart, those at the lowest block of instructions first, so that they meet again where they can.
A shuffle or vote waits until its warp is whole, as hardware does; barriers wait for a block or a cluster; a thread in
`nanosleep` goes on when no other can. Threads that wait for what never comes end the launch by an error that names one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.memory import Access, Allocation, Allocations, Array, Shared, Stamps
from tests.ptx.order import Order
from tests.ptx.program import Program
from tests.ptx.text import PtxError
from tests.ptx.undefined import Undefined
from tests.ptx.values import PARAMETERS, SHARED

MOST_THREADS = 4096  # of blocks that do not wait for one another, run together
MOST_STEPS = 1 << 16  # blocks of instructions, of a launch
MOST_NAPS = 3  # of all threads, without anything that one could wait for
OF_BLOCK, OF_CLUSTER = 0, 1
WARP = 32
EVERYONE = 0xFFFFFFFF


class Launch:
    """A grid of a program."""

    def __init__(
        self, program: Program, grid: int, threads: int, params: bytes, shared: int,
        allocations: Allocations, cluster: int = 1, cooperative: bool = False, schedule: int = 0,
    ) -> None:  # fmt: skip
        self.schedule = schedule
        """0: all blocks go on together. 1: each goes on alone for as long as it can, 2: the last one first; others
        choose an order at random."""
        self.program, self.grid, self.threads, self.shared = program, grid, threads, shared
        self.params = np.frombuffer(params + bytes(-len(params) % 8), np.uint8)
        self.params_size, self.cluster, self.cooperative = len(params), cluster, cooperative
        self.allocations = allocations
        self.stamps: dict[Allocation, Stamps] = {}
        self.steps = 0
        self.instructions = 0
        """Executed, each for some threads at once."""

    def run(self) -> None:
        """All of it."""
        most = max(MOST_THREADS // self.threads // self.cluster, 1) * self.cluster
        together = self.grid if self.cooperative else min(self.grid, most)
        with np.errstate(all="ignore"):
            for first in range(0, self.grid, together):
                Machine(self, first, min(together, self.grid - first)).run()


class Machine:
    """Blocks of a launch that run together. Generated code calls its methods, with the numbers of threads in `idx`."""

    def __init__(self, launch: Launch, first: int, blocks: int) -> None:
        self.launch, self.program, self.first, self.blocks = launch, launch.program, first, blocks
        self.threads, self.lanes = launch.threads, blocks * launch.threads
        if self.threads % WARP:
            raise PtxError(f"blocks of {self.threads} threads have no whole warps, which is not known here")
        lane = np.arange(self.lanes)
        self.lane, self.block_of = lane, lane // self.threads
        self.thread_of = lane - self.block_of * self.threads
        self.me = (first * self.threads + lane + 1).astype(np.int32)
        self.shared = Shared(blocks, launch.shared)
        self.order = Order(self, first, blocks)
        self.undefined = Undefined(self)
        self.rank = self._ranks(launch.schedule)
        self.groups: dict[tuple[int, int], Any] = {}
        """Threads that can go on, by the rank of their block and the block of instructions they are at."""
        self.asleep: dict[int, Any] = {}
        self.at_barrier = np.full(self.lanes, -1)
        """The block of instructions behind the barrier where a thread waits."""
        self.barrier_of = np.zeros(self.lanes, np.int8)  # OF_BLOCK or OF_CLUSTER
        self.waiting = np.zeros((2, blocks), int)
        """Threads of each block, at barriers of the block and of the cluster."""
        self.arrived = np.zeros(self.lanes, bool)
        self.exited = np.zeros(self.lanes, bool)
        self.progress = 0
        """Grows by all that another thread may wait for."""
        self.naps, self.slept_at = 0, -1
        self.hits: dict[int, Allocation] = {}
        self._add(0, None)

    def _ranks(self, schedule: int) -> Any:
        """In which order blocks go on; None where they go on together."""
        if schedule == 0 or self.blocks == 1:
            return None
        order = np.arange(self.blocks)
        if schedule > 2:
            return np.random.default_rng(schedule).permutation(order)
        return order if schedule == 1 else order[::-1]

    # --- which threads go on ------------------------------------------------------------------------------------------

    def run(self) -> None:
        program, launch = self.program, self.launch
        poison = np.full(self.lanes * 8, 0xFF, np.uint8)  # what nobody has set
        held: list[Any] = [poison[: self.lanes * np.dtype(t).itemsize].view(t) for t in program.slot_types]
        while (place := self._next()) is not None:
            idx, number = self.groups.pop(place), place[1]
            block = program.blocks[number]
            if block.collective and idx is not None:
                idx = self._whole_warps(number, idx)
            launch.steps += 1
            launch.instructions += block.end - block.start
            block.runs += 1
            if launch.steps > MOST_STEPS:
                raise PtxError(f"line {block.line}: {self.name(idx, 0)} does not come to an end")
            found = block.run(held, self, idx)
            if self.undefined:
                self.undefined.follow(block, idx)
            self._go_on(block, number, idx, found)

    def _next(self) -> tuple[int, int] | None:
        """Where to go on: the lowest place, but warps that are not whole wait before collectives."""
        while True:
            for place in sorted(self.groups):
                if not self.program.blocks[place[1]].collective or self._some_whole(self.groups[place]):
                    return place
            if not self.asleep:
                break
            self._wake()
        if self.groups:
            return min(self.groups)  # masks may be of these threads alone
        if not self.exited.all():
            raise PtxError(f"deadlock{self._waiting()}")
        return None

    def _wake(self) -> None:
        """Those in `nanosleep`, as nobody else can go on; too often in vain is an error."""
        self.naps = self.naps + 1 if self.progress == self.slept_at else 0
        self.slept_at = self.progress
        if self.naps > MOST_NAPS:
            where = min(self.asleep)
            thread, line = self.name(self.asleep[where], 0), self.program.blocks[where - 1].last.line
            raise PtxError(f"line {line}: {thread} waits for ever{self._waiting()}")
        for number, idx in self.asleep.items():
            self._add(number, idx)
        self.asleep = {}

    def _waiting(self) -> str:
        """What threads wait for, of an error."""
        found = []
        for kind, what in ((OF_BLOCK, "at a barrier"), (OF_CLUSTER, "at the cluster's barrier")):
            stuck = np.nonzero((self.barrier_of == kind) & (self.at_barrier >= 0))[0]
            if stuck.size:
                line = self.program.blocks[self.at_barrier[stuck[0]] - 1].last.line
                found.append(f"{stuck.size} threads wait {what}, {self.name(stuck, 0)} in line {line}")
        if found and self.exited.any():
            found.append(f"{int(self.exited.sum())} have exited")
        return "".join(f"; {text}" for text in found)

    def _add(self, number: int, idx: Any) -> None:
        if number >= len(self.program.blocks):
            raise PtxError("a thread runs past the end of the kernel")
        if self.rank is None:
            self._join((0, number), idx)
            return
        idx = self.lane if idx is None else idx
        ranks = self.rank[self.block_of[idx]]
        for rank in np.unique(ranks):
            self._join((int(rank), number), idx[ranks == rank])

    def _join(self, place: tuple[int, int], idx: Any) -> None:
        others = self.groups.get(place)
        if others is not None and idx is not None:
            idx = np.sort(np.concatenate([others, idx]))
        self.groups[place] = None if idx is None or idx.size == self.lanes else idx

    def _go_on(self, block: Any, number: int, idx: Any, found: Any) -> None:
        kind = block.kind
        if kind == "next":
            self._add(number + 1, idx)
        elif kind == "branch":
            if not block.conditional:
                self._add(block.target, idx)
                return
            takes = ~found if block.negated else found
            count = int(np.count_nonzero(takes))
            if count == takes.size:
                self._add(block.target, idx)
            elif count == 0:
                self._add(number + 1, idx)
            else:
                idx = self.lane if idx is None else idx
                self._add(block.target, idx[takes])
                self._add(number + 1, idx[~takes])
        elif kind == "exit":
            idx = self.lane if idx is None else idx
            self.exited[idx] = True
            self.progress += 1
            if self.arrived[idx].any():
                raise PtxError(f"line {block.last.line}: {self.name(idx, 0)} exits before the cluster's barrier")
        elif kind == "sleep":
            idx = self.lane if idx is None else idx
            before = self.asleep.get(number + 1)
            self.asleep[number + 1] = idx if before is None else np.sort(np.concatenate([before, idx]))
        else:
            self._wait(block, number + 1, self.lane if idx is None else idx, kind == "cluster")

    def _wait(self, block: Any, after: int, idx: Array, cluster: bool) -> None:
        """Threads come to a barrier; the last one of a block or cluster lets all go on."""
        if cluster and not self.arrived[idx].all():
            raise PtxError(f"line {block.last.line}: {self.name(idx, 0)} waits at a barrier where it has not arrived")
        kind, size = (OF_CLUSTER, self.launch.cluster) if cluster else (OF_BLOCK, 1)
        self.at_barrier[idx], self.barrier_of[idx] = after, kind
        self.waiting[kind] += np.bincount(self.block_of[idx], minlength=self.blocks)
        if (self.waiting.all(0) & (self.waiting.sum(0) == self.threads)).any():
            raise PtxError(f"line {block.last.line}: threads of a block wait at different barriers")
        done = (self.waiting[kind].reshape(-1, size) == self.threads).all(1).repeat(size)
        if not done.any():
            return
        free = self.lane[done[self.block_of]]
        places = self.at_barrier[free].reshape(-1, WARP)
        if (odd := places != places[:, :1]).any():
            lane = free[odd.reshape(-1).argmax()]
            who = self.name(self.lane, lane)
            raise PtxError(f"line {block.last.line}: {who} waits at another barrier than its warp")
        self.order.barrier(np.nonzero(done)[0], size)
        self.progress += 1
        self.waiting[kind, done] = 0
        to = self.at_barrier[free]
        self.at_barrier[free] = -1
        self.arrived[free] = False
        for number in np.unique(to):
            self._add(int(number), free[to == number])

    # --- warps --------------------------------------------------------------------------------------------------------

    def _whole(self, idx: Array) -> Array:
        """Of each thread, whether all lanes of its warp are there."""
        warp = idx // WARP
        return np.bincount(warp, minlength=self.lanes // WARP)[warp] == WARP

    def _some_whole(self, idx: Any) -> bool:
        return idx is None or bool(self._whole(idx).any())

    def _whole_warps(self, number: int, idx: Array) -> Array:
        """Those of whole warps, if there are any; the others are put back."""
        whole = self._whole(idx)
        if whole.all() or not whole.any():
            return idx
        self._add(number, idx[~whole])
        return idx[whole]

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

    def _global(self, access: Access, at: Array, size: int, line: int) -> Allocation | None:
        """The allocation of all addresses; None where there are several."""
        low, high = int(at.min()), int(at.max()) + size
        found = self.hits.get(line)
        if found is None or low < found.low or high > found.high:
            found = self.launch.allocations.find(low, size)
            if found is None:
                access.fail(at == low, f"{low:#x} is {self.launch.allocations.why_not(low, size)}")
                raise AssertionError
            self.hits[line] = found
        if (at & np.int64(size - 1)).any():
            access.fail(at & np.int64(size - 1) != 0, f"address is no multiple of {size}")
        return found if high <= found.high else None

    def _parts(self, access: Access, at: Array, size: int, line: int) -> list[tuple[Allocation, Array | None]]:
        """Allocations, and which threads access each."""
        found = self._global(access, at, size, line)
        if found is not None:
            return [(found, None)]
        parts, left = [], np.ones(at.size, bool)
        while left.any():
            low = int(at[left].min())
            allocation = self.launch.allocations.find(low, size)
            if allocation is None:
                access.fail(at == low, f"{low:#x} is {self.launch.allocations.why_not(low, size)}")
                raise AssertionError
            here = left & (at >= low) & (at + size <= allocation.high)
            parts.append((allocation, np.nonzero(here)[0]))
            left &= ~here
        return parts

    def _stamps(self, allocation: Allocation) -> Stamps:
        found = self.launch.stamps.get(allocation)
        if found is None:
            found = self.launch.stamps[allocation] = Stamps(allocation.high - allocation.low)
        return found

    def load_global(
        self, base: Array, offset: int, dtype: Any, count: int, idx: Any, line: int, how: str
    ) -> list[Array]:
        access, size = self._access("ld.global", idx, line), dtype.itemsize * count
        at = base.view(np.int64) + offset
        if how == "volatile":
            self.order.acquire(at, idx)
        out: list[Array] = [np.empty(at.size, dtype) for _ in range(count)]
        for allocation, some in self._parts(access, at, size, line):
            if some is not None:
                here = self._access("ld.global", (self.lane if idx is None else idx)[some], line)
            else:
                here = access
            values, first = allocation.view(dtype), (at if some is None else at[some]) - allocation.base
            if not (how == "volatile" and self.order.is_counter(at)):
                who = (self.lane if idx is None else idx) if some is None else (self.lane if idx is None else idx)[some]
                self._stamps(allocation).load(
                    here, first + (allocation.base - allocation.low), size, self.me[who], self.order.epoch32(who),
                    self.order.seen(who), how == "constant",
                )  # fmt: skip
            first = first // dtype.itemsize
            for k in range(count):
                if some is None:
                    out[k] = values[first + k]
                else:
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
        everyone = self.lane if idx is None else idx
        for allocation, some in self._parts(access, at, size, line):
            who = everyone if some is None else everyone[some]
            first = (at if some is None else at[some]) - allocation.base
            self._stamps(allocation).store(
                self._access("st.global", who, line), first + (allocation.base - allocation.low), size, self.me[who],
                self.order.epoch32(who), self.order.seen(who),
            )  # fmt: skip
            values, first = allocation.view(dtype), first // dtype.itemsize
            for k, value in enumerate(given):
                values[first + k] = value if some is None else value[some]

    def atomic_add(self, base: Array, offset: int, value: Any, idx: Any, line: int) -> Array:
        """One thread after the other."""
        access, at = self._access("atom.global", idx, line), base.view(np.int64) + offset
        self.progress += 1
        self.order.atomic(at, idx)
        value = np.broadcast_to(np.uint32(value) if np.ndim(value) == 0 else value, at.shape)
        before = np.empty(at.size, np.uint32)
        for allocation, some in self._parts(access, at, 4, line):
            values = allocation.view(np.dtype(np.uint32))
            for k in range(at.size) if some is None else some:
                place = (int(at[k]) - allocation.base) // 4
                before[k] = values[place]
                values[place] += value[k]
        return before
