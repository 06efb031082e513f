"""Threads of a launch, all blocks that may run at once together, one NumPy operation for the same instruction of all.

Threads that part run apart, those at the lowest block of instructions first, so that they meet again where they can.
A shuffle or vote waits until its warp is whole, as hardware does; barriers wait for a block or a cluster; a thread in
`nanosleep` goes on when no other can. Threads that wait for what never comes end the launch by an error that names one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.memory import Allocation, Allocations, Array, Stamps
from tests.ptx.operations import WARP, Operations
from tests.ptx.program import Program
from tests.ptx.text import PtxError

MOST_THREADS = 4096  # of blocks that do not wait for one another, run together
MOST_STEPS = 1 << 16  # blocks of instructions, of a launch
MOST_NAPS = 3  # of all threads, without anything that one could wait for
OF_BLOCK, OF_CLUSTER = 0, 1


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


class Machine(Operations):
    """Blocks of a launch that run together: which of their threads go on."""

    def __init__(self, launch: Launch, first: int, blocks: int) -> None:
        super().__init__(launch, first, blocks)
        self.program = launch.program
        self.rank = self._ranks(launch.schedule)
        self.groups: dict[tuple[int, int], Any] = {}
        """Threads that can go on, by the rank of their block and the block of instructions they are at."""
        self.asleep: dict[int, Any] = {}
        self.at_barrier = np.full(self.lanes, -1)
        """The block of instructions behind the barrier where a thread waits."""
        self.barrier_of = np.zeros(self.lanes, np.int8)  # OF_BLOCK or OF_CLUSTER
        self.waiting = np.zeros((2, blocks), int)
        """Threads of each block, at barriers of the block and of the cluster."""
        self.exited = np.zeros(self.lanes, bool)
        self.naps, self.slept_at = 0, -1
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

    def _some_whole(self, idx: Any) -> bool:
        return idx is None or bool(self._whole(idx).any())

    def _whole_warps(self, number: int, idx: Array) -> Array:
        """Those of whole warps, if there are any; the others are put back."""
        whole = self._whole(idx)
        if whole.all() or not whole.any():
            return idx
        self._add(number, idx[~whole])
        return idx[whole]
