"""What calls of small arrays cost: ``python -m benchmarks.small``, every public function beside its peer.

Calls alternate in one process, on one thread each; figures are medians of bursts, in microseconds. A goal is a share
of the peer's time, or microseconds on a machine where ``numpy.add`` of twelve numbers takes 0.45; the status is 1 while
one is missed. asv imports this file: nothing runs before `main`.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.host import Host

SHAPE = (2, 12, 15)
ROUNDS, BURST = 40, 100
ADD = 0.45  # us of numpy.add, to which goals in microseconds refer


NAMES = (
    "batch_norm", "batch_norm_backward", "batch_norm_inference", "batch_norm, where", "mean", "var", "std", "mean_var",
    "nanmean", "nanvar", "nanstd", "average", "moments", "merge", "update_running", "update_running, out", "population",
    "normalize", "grad_sums", "grad_input", "fold", "Saved.frozen", "BatchNorm, a step",
)  # fmt: skip
"""Of `rows`, which asv wants to know before anything runs."""


class Row(NamedTuple):
    """A call, its peer, and what is wanted: a share of the peer's time, or microseconds."""

    call: Callable[[], object]
    peer: Callable[[], object] | None = None
    name: str = ""
    share: float | None = None
    us: float | None = None


def rows() -> dict[str, Row]:
    """Every function on arrays that fit a core's first cache."""
    x, dy = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    mean, var, beta, gamma = np.zeros((2, 2, SHAPE[1]), np.float32).reshape(4, -1) + np.float32([[0], [1], [0], [1]])
    mask, kernel = np.arange(SHAPE[0] * SHAPE[2]).reshape(SHAPE[0], 1, -1) % 3 > 0, np.ones((SHAPE[1], 8, 3, 3))
    _, saved = fastbn.batch_norm(x, gamma, beta)
    batch, rstd, (_, dgamma, dbeta, _) = saved.moments, saved.rstd, fastbn.batch_norm_backward(dy, saved)
    numbers, norm = x.ravel(), fastbn.BatchNorm(SHAPE[1])
    peers = torchs(x, dy, mean, var, gamma, beta)
    return {
        "batch_norm": Row(lambda: fastbn.batch_norm(x, gamma, beta), *peers["forward"], share=0.6),
        "batch_norm_backward": Row(lambda: fastbn.batch_norm_backward(dy, saved), *peers["backward"], share=0.8),
        "batch_norm_inference": Row(
            lambda: fastbn.batch_norm_inference(x, mean, var, gamma, beta), *peers["inference"], share=0.5
        ),
        "batch_norm, where": Row(lambda: fastbn.batch_norm(x, gamma, beta, where=mask), us=25),
        "mean": Row(lambda: fastbn.mean(numbers), lambda: np.mean(numbers), "numpy.mean", share=1.0),
        "var": Row(lambda: fastbn.var(numbers), lambda: np.var(numbers), "numpy.var", share=0.5),
        "std": Row(lambda: fastbn.std(numbers), lambda: np.std(numbers), "numpy.std", share=0.5),
        "mean_var": Row(
            lambda: fastbn.mean_var(numbers), lambda: (np.mean(numbers), np.var(numbers)), "numpy.mean and var",
            share=0.4,
        ),
        "nanmean": Row(lambda: fastbn.nanmean(numbers), lambda: np.nanmean(numbers), "numpy.nanmean", share=0.5),
        "nanvar": Row(lambda: fastbn.nanvar(numbers), lambda: np.nanvar(numbers), "numpy.nanvar", share=0.25),
        "nanstd": Row(lambda: fastbn.nanstd(numbers), lambda: np.nanstd(numbers), "numpy.nanstd", share=0.25),
        "average": Row(lambda: fastbn.average(numbers), lambda: np.average(numbers), "numpy.average", share=1.0),
        "moments": Row(lambda: fastbn.moments(x), us=5),
        "merge": Row(lambda: fastbn.merge(batch, batch), us=10),
        "update_running": Row(lambda: fastbn.update_running(mean, var, batch), us=5),
        "update_running, out": Row(lambda: fastbn.update_running(mean, var, batch, out=(mean, var)), us=5),
        "population": Row(lambda: fastbn.population([batch, batch])),
        "normalize": Row(lambda: fastbn.normalize(x, saved.mean, rstd, gamma, beta), us=6),
        "grad_sums": Row(lambda: fastbn.grad_sums(dy, x, saved.mean, rstd), us=6),
        "grad_input": Row(
            lambda: fastbn.grad_input(dy, x, saved.mean, rstd, gamma, dgamma, dbeta, saved.count), us=8
        ),
        "fold": Row(lambda: fastbn.fold(kernel, beta, mean, var, gamma, beta), us=15),
        "Saved.frozen": Row(lambda: fastbn.Saved.frozen(x, mean, var, gamma)),
        "BatchNorm, a step": Row(lambda: (norm.forward(x), norm.backward(dy))),
    }  # fmt: skip


def torchs(*arrays: Any) -> dict[str, tuple[Any, ...]]:
    """PyTorch's calls and their names, if it is installed."""
    if (torch := Host().torch) is None:
        return dict.fromkeys(("forward", "backward", "inference"), ())
    x, dy, mean, var, gamma, beta = map(torch.from_numpy, arrays)
    functional = torch.nn.functional
    _, centre, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, 1e-5)
    backward, all_three = torch.ops.aten.native_batch_norm_backward, [True, True, True]
    return {
        "forward": (lambda: functional.batch_norm(x, None, None, gamma, beta, training=True), "F.batch_norm"),
        "backward": (
            lambda: backward(dy, x, gamma, None, None, centre, rstd, True, 1e-5, all_three),
            "native_batch_norm_backward",
        ),
        "inference": (lambda: functional.batch_norm(x, mean, var, gamma, beta), "F.batch_norm"),
    }


@contextlib.contextmanager
def one_thread(torch: Any) -> Iterator[None]:
    """Of PyTorch, if it is there."""
    before = torch and torch.get_num_threads()
    try:
        if torch is not None:
            torch.set_num_threads(1)
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(before)


def medians(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds of each."""
    for call in calls:
        burst(call)
    return [
        statistics.median(column) for column in zip(*([burst(c) for c in calls] for _ in range(ROUNDS)), strict=True)
    ]


def burst(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(BURST):
        call()
    return 1e6 * (time.perf_counter() - start) / BURST


def main() -> int:
    """Print a table."""
    table, twelve = rows(), np.ones(SHAPE[1])
    missed = False
    with one_thread(Host().torch), fastbn.threads.num_threads(1):
        calls = [lambda: np.add(twelve, twelve), *(c for row in table.values() for c in (row.call, row.peer) if c)]
        add, *found = medians(calls)
    print(f"A call on arrays of {SHAPE}, float32, in us; numpy.add of {SHAPE[1]} numbers takes {add:.2f}\n")
    print("| call | fastbn | peer | | of its time | wanted |\n|---|---|---|---|---|---|")
    times = iter(found)
    for name, row in table.items():
        ours = next(times)
        theirs = next(times) if row.peer else None
        limit = row.share * theirs if row.share and theirs else row.us * max(1.0, add / ADD) if row.us else None
        wanted = f"{row.share}" if row.share else f"{row.us} us" if row.us else ""
        slow = limit is not None and ours > limit
        missed |= slow
        print(
            f"| {name} | {ours:.1f} | {f'{theirs:.1f}' if theirs else ''} | {row.name} |"
            f" {f'{ours / theirs:.2f}' if theirs else ''} | {wanted}{' MISSED' * slow} |"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
