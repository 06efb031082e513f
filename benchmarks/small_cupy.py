"""What calls on small CuPy arrays cost the host, launches left out: ``python -m benchmarks.small_cupy``.

Without a GPU the arrays lie in host memory (`tests.simt.host_cupy`). What a kernel is launched with is made as ever,
but a launch does nothing, and allocations hand out one block again and again in 0.1 us, where CuPy's memory pool has to
look for one; the table says how many there are. All else is fastbn's and CuPy's own. Figures are medians of this
thread's time in microseconds. Goals are for a machine where ``numpy.add`` of twelve numbers takes 0.45; the status is 1
while one is missed.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import fastbn
from benchmarks.small import ADD, SHAPE

ROUNDS, BURST = 60, 100
BLOCK = 1 << 16  # bytes that an allocation may have


class Row(NamedTuple):
    """A call and, if so, how many microseconds it may take."""

    call: Callable[[], object]
    us: float | None = None


def nothing(*_args: object, **_keywords: object) -> None:
    """In the place of a compiled kernel."""


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """CuPy arrays whose kernels do nothing."""
    import cupy

    from tests.simt import cuda

    with contextlib.ExitStack() as stack:
        if not cupy.cuda.is_available():
            stack.enter_context(cuda.installed())
        from fastbn.cuda import launch

        stack.enter_context(mock.patch.object(launch, "function", return_value=nothing))
        yield


@contextlib.contextmanager
def one_block() -> Iterator[list[int]]:
    """All that is allocated lies there; the sizes of it."""
    import cupy

    block = cupy.cuda.MemoryPointer(cupy.cuda.alloc(BLOCK).mem, 0)
    before, allocations = cupy.cuda.get_allocator(), []

    def allocate(size: int) -> Any:
        allocations.append(size)
        return block

    cupy.cuda.set_allocator(allocate)
    try:
        yield allocations
    finally:
        cupy.cuda.set_allocator(before)


def rows() -> dict[str, Row]:
    """The functions that training and inference call."""
    import cupy

    x, dy = (cupy.ndarray(SHAPE, np.float32) for _ in range(2))
    mean, var, beta, gamma = (cupy.ndarray(SHAPE[1:2], np.float32) for _ in range(4))
    y, dx = cupy.ndarray(SHAPE, np.float32), cupy.ndarray(SHAPE, np.float32)
    _, saved = fastbn.batch_norm(x, gamma, beta)
    batch, rstd = saved.moments, saved.rstd
    return {
        "batch_norm": Row(lambda: fastbn.batch_norm(x, gamma, beta), 10),
        "batch_norm, running": Row(lambda: fastbn.batch_norm(x, gamma, beta, running=(mean, var)), 15),
        "batch_norm, out": Row(lambda: fastbn.batch_norm(x, gamma, beta, out=y), 13),
        "batch_norm_backward": Row(lambda: fastbn.batch_norm_backward(dy, saved), 10),
        "batch_norm_backward, out": Row(lambda: fastbn.batch_norm_backward(dy, saved, out=dx), 13),
        "batch_norm_inference": Row(lambda: fastbn.batch_norm_inference(x, mean, var, gamma, beta), 7),
        "update_running": Row(lambda: fastbn.update_running(mean, var, batch), 8),
        "update_running, out": Row(lambda: fastbn.update_running(mean, var, batch, out=(mean, var)), 8),
        "moments": Row(lambda: fastbn.moments(x)),
        "normalize": Row(lambda: fastbn.normalize(x, mean, rstd, gamma, beta)),
        "grad_sums": Row(lambda: fastbn.grad_sums(dy, x, mean, rstd)),
    }


def medians(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds of each, alternating."""
    for call in calls:
        burst(call)
    times = zip(*([burst(call) for call in calls] for _ in range(ROUNDS)), strict=True)
    return [statistics.median(column) for column in times]


def burst(call: Callable[[], object]) -> float:
    repeated = itertools.repeat(None, BURST)
    start = time.thread_time()
    for _ in repeated:
        call()
    return 1e6 * (time.thread_time() - start) / BURST


def main() -> int:
    """Print a table."""
    twelve, missed = np.ones(SHAPE[1]), False
    with without_launches(), contextlib.ExitStack() as stack:
        table = rows()
        allocations = stack.enter_context(one_block())
        add, *found = medians([lambda: np.add(twelve, twelve), *(row.call for row in table.values())])
        print(f"A call on CuPy arrays of {SHAPE}, float32, in us; numpy.add of {SHAPE[1]} numbers takes {add:.2f}\n")
        print("| call | us | allocations | wanted |\n|---|---|---|---|")
        for (name, row), us in zip(table.items(), found, strict=True):
            allocations.clear()
            row.call()
            slow = row.us is not None and us > row.us * max(1.0, add / ADD)
            missed |= slow
            wanted = "" if row.us is None else f"{row.us} us{' MISSED' * slow}"
            print(f"| {name} | {us:.1f} | {len(allocations)} | {wanted} |")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
