"""Calls timed in turn in one process, how fast the machine reads, and what a call allocates.

Like `benchmarks.workloads` it asks nothing of fastbn's inside.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numba
import numpy as np

from benchmarks.host import get_num_threads

BURST_SECONDS = 1e-3  # of a contender, before the others have their turns
FEWEST, MOST_SECONDS = 3, 4.0  # turns that are enough once they have taken so long: NumPy's of float16 take 2 s each
PAUSE = 0.02  # seconds after numbagg's calls: threads of Numba's may spin on for 10 ms, on the cores of ours

Calls = list[Callable[[], object]]
"""Of one contender, one for each buffer."""


def in_turn(contenders: dict[str, Calls], rounds: int, seconds: float) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of a call of each contender, turn by turn; every second turn goes backwards."""
    turn = 0

    def burst(calls: Calls, count: int) -> float:
        """The buffers go round through all contenders: none finds what another has left in a cache."""
        nonlocal turn
        if len(calls) == 1:
            (call,) = calls
            start = time.perf_counter()
            for _ in repeat(None, count):
                call()
            return (time.perf_counter() - start) / count
        start = time.perf_counter()
        for _ in repeat(None, count):
            calls[turn % len(calls)]()
            turn += 1
        return (time.perf_counter() - start) / count

    counts = {}
    for name, calls in contenders.items():
        burst(calls, 1)  # compiles
        counts[name] = max(1, math.ceil(BURST_SECONDS / burst(calls, 1)))
    order = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while (done := len(found["fastbn"])) < rounds or time.perf_counter() - start < seconds:
        if done >= FEWEST and time.perf_counter() - start > MOST_SECONDS:
            break
        for name in order:
            found[name].append(burst(contenders[name], counts[name]))
            if name == "numbagg":
                time.sleep(PAUSE)
        order.reverse()
    return {name: np.array(times) for name, times in found.items()}


def memory_beside_result(call: Callable[[], object]) -> int:
    """The most bytes that a warm call takes, less those of what it returns."""
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak - sum(np.asarray(a).nbytes for a in (result if isinstance(result, tuple) else (result,)))


# --- the machine ------------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, fastmath=True, cache=True)  # type: ignore[misc]
def _sum_far_rows(x):  # type: ignore[no-untyped-def]
    """Four streams: a fifth to a third faster than one, which the prefetchers of a core follow page by page."""
    total = np.float32(0)
    for i in range(x.shape[1]):
        total += (x[0, i] + x[1, i]) + (x[2, i] + x[3, i])
    return total


class Reader:
    """How fast all threads together read buffers: each four far rows, added up in registers."""

    def __init__(self, buffers: Sequence[np.ndarray[Any, Any]], pool: ThreadPoolExecutor) -> None:
        threads = get_num_threads()
        self.pool = pool
        self.parts: list[list[np.ndarray[Any, Any]]] = []
        for buffer in buffers:
            words = buffer.reshape(-1).view(np.uint8)
            row = words.size // (16 * threads) * 4  # bytes: a whole number of float32
            self.parts.append(list(words[: 4 * threads * row].view(np.float32).reshape(threads, 4, -1)))
        self.nbytes = sum(part.nbytes for parts in self.parts for part in parts)

    def __call__(self) -> None:
        """Every buffer once."""
        for first, *others in self.parts:
            futures = [self.pool.submit(_sum_far_rows, part) for part in others]
            _sum_far_rows(first)
            for future in futures:
                future.result()
