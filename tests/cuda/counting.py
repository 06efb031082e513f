"""Sectors that executed kernels ask for: every access of every thread, coalesced by warps as hardware does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tests.cuda import traffic
from tests.simt import cuda

MOST_ACCESSES = 1 << 22
PARTIALS, COUNTERS = "partials", "counters"
ROWS_OF_RESULTS = 4


def aligned(nbytes: int) -> np.ndarray:
    """Memory from a multiple of 512 bytes on, as devices have it."""
    buffer = np.zeros(nbytes + 512, np.uint8)
    start = -buffer.ctypes.data % 512
    return buffer[start : start + nbytes]


def memory_of(problem: Any, plan: Any) -> dict[str, np.ndarray]:
    """Memory for all that a plan has pointers to, ones in arrays and numbers."""
    kept, size = problem.kept, int(np.prod(problem.shape)) * problem.itemsize
    one = {2: np.float16(1), 4: np.float32(1), 8: np.float64(1)}
    found = {name: aligned(size) for name, _ in problem.operands}
    found |= {name: aligned(kept * (2, 2, 4, 8)[number]) for name, number in problem.types}
    for name, data in found.items():
        itemsize = dict(problem.types).get(name)
        dtype = one[problem.itemsize if itemsize is None else (2, 2, 4, 8)[itemsize]]
        data.view(dtype.dtype)[:] = dtype
    needs = {"results": ROWS_OF_RESULTS * kept * 8, PARTIALS: plan.partials * 8, COUNTERS: plan.counters}
    return found | {name: aligned(nbytes) for name, nbytes in needs.items() if nbytes}


def sectors(accesses: np.ndarray) -> int:
    """Of requests: what the lanes of a warp do by the same instruction for the same time."""
    if not accesses.size:
        return 0
    warp = accesses["block"].astype(np.uint64) << 8 | accesses["thread"] // traffic.WARP
    lane = accesses["thread"] % traffic.WARP
    order = np.lexsort((np.arange(accesses.size), lane, accesses["instruction"], warp))
    warp, lane, instruction = warp[order], lane[order], accesses["instruction"][order]
    new = np.ones(accesses.size, bool)
    new[1:] = (np.diff(warp) != 0) | (np.diff(lane) != 0) | (instruction[1:] != instruction[:-1])
    start = np.maximum.accumulate(np.where(new, np.arange(accesses.size), 0))
    times = np.arange(accesses.size) - start
    first = accesses["address"][order] // traffic.SECTOR
    last = (accesses["address"][order] + accesses["bytes"][order] - 1) // traffic.SECTOR
    assert (first == last).all(), "an access crosses sectors"
    return len(np.unique(np.stack([warp, instruction, times.astype(np.uint64), first]), axis=1).T)


def counted(problem: Any, operation: str, emulated: cuda.Emulated) -> tuple[Counter[str], Any]:
    """What the launches of a call ask for, by what it is of, and the plan."""
    from fastbn.cuda import launch

    plan = traffic.planned(problem, operation)
    memory = memory_of(problem, plan)
    present = [name for name in launch.TILES.pointers if name in memory]
    emulated.accesses.clear()
    run = plan.bound(present)
    run(*(memory[name].ctypes.data for name in present))
    found: Counter[str] = Counter()
    elements = {name for name, _ in problem.operands}
    for accesses in emulated.accesses:
        for name, data in memory.items():
            start = data.ctypes.data
            here = accesses[(accesses["address"] >= start) & (accesses["address"] < start + data.nbytes)]
            kind = name if name in elements or name in ("results", PARTIALS, COUNTERS) else "numbers"
            found[kind] += sectors(here)
    return found, plan
