"""What comes before what: barriers passed, and what threads know of other blocks by fences and counters.

A block's accesses between two of its barriers have a number, its epoch. A thread knows for each block up to which epoch
all it did comes first. Barriers unite what threads know. A thread that has passed a fence leaves what it knew then at a
counter with its atomic operation; who then reads the counter knows it from its own next fence on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.memory import Array


class Order:
    """Of the blocks that run together."""

    def __init__(self, machine: Any, first: int, blocks: int) -> None:
        self.machine, self.first, self.blocks = machine, first, blocks
        self.epoch = np.ones(blocks, np.int64)
        self.own = self.epoch.astype(np.int32)
        self._known: Any = None
        """[thread, block]; made when blocks first meet."""
        self._fenced: Any = None
        self._heard: Any = None
        self._counters: dict[int, Array] = {}

    def _meet(self) -> Any:
        if self._known is None:
            lanes, own = self.machine.lanes, self.machine.block_of
            self._known = np.zeros((lanes, self.blocks), np.int32)
            self._known[np.arange(lanes), own] = self.epoch[own] - 1
            self._fenced, self._heard = np.zeros_like(self._known), np.zeros_like(self._known)
        return self._known

    def epoch32(self, idx: Array) -> Array:
        """The threads' epochs."""
        return self.own[self.machine.block_of[idx]]

    def seen(self, idx: Array) -> Callable[[Array, Array], Array]:
        """Whether what threads of the grid did in epochs of theirs comes before what these threads do now."""

        def before(threads: Array, epochs: Array) -> Array:
            block = threads // self.machine.threads - self.first
            own = self.machine.block_of[idx][:, None]
            if self._known is None:
                return (block == own) & (epochs < self.own[own])
            here = (block >= 0) & (block < self.blocks)
            inside = np.where(here, block, 0)
            return here & (epochs <= self._known[idx[:, None], inside])

        return before

    def barrier(self, blocks: Array, cluster: int) -> None:
        """All threads of these blocks, or of their clusters, have come."""
        if cluster > 1:
            self._meet()
        self.epoch[blocks] += 1
        self.own = self.epoch.astype(np.int32)
        if self._known is None:
            return
        threads = self.machine.threads
        rows = self._known.reshape(self.blocks, threads, self.blocks)
        for first in blocks[::cluster]:
            group = slice(first, first + cluster)
            most = rows[group].max((0, 1))
            most[group] = self.epoch[group] - 1
            rows[group] = most

    def fence(self, idx: Any) -> None:
        known = self._meet()
        where = slice(None) if idx is None else idx
        known[where] = np.maximum(known[where], self._heard[where])
        self._fenced[where] = known[where]

    def is_counter(self, at: Array) -> bool:
        """Whether these addresses are counters, of atomic operations."""
        return bool(self._counters) and all(int(address) in self._counters for address in np.unique(at))

    def atomic(self, at: Array, idx: Any) -> None:
        self._meet()
        lanes = self.machine.lane if idx is None else idx
        for address, lane in zip(at.tolist(), lanes.tolist(), strict=True):
            left = self._counters.setdefault(address, np.zeros(self.blocks, np.int32))
            np.maximum(left, self._fenced[lane], out=left)
            np.maximum(self._heard[lane], left, out=self._heard[lane])

    def acquire(self, at: Array, idx: Any) -> None:
        """A volatile load, of a counter perhaps."""
        if not self._counters:
            return
        lanes = self.machine.lane if idx is None else idx
        for address, lane in zip(at.tolist(), lanes.tolist(), strict=True):
            if (left := self._counters.get(address)) is not None:
                np.maximum(self._heard[lane], left, out=self._heard[lane])
