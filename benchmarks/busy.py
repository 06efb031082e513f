"""Do threads ever lose to one thread? ``python -m benchmarks.busy`` asks it of a machine that others use as well.

Calls on one thread and on the default number take turns in one process. Figures are medians and 95th percentiles of
microseconds, and the default's divided by one thread's: above 1 threads lose. Conditions are the machine as it is, and
beside a process that keeps a core busy, at this one's priority or 15 below it; each also with PyTorch imported
(``+torch``), and with PyTorch's operations between the calls (``+torch-ops``).

Arrays that a core's cache does not hold are taken in turn. From 8 MB on a copy, by NumPy on one Python thread and in
parts on as many as the default, tells what speed-up there is to be had. Up to 8 MB eight Python threads also call at
once: their time is that of the burst divided by all their calls, beside that of one Python thread on one thread.

It takes five minutes, and once the time in which kernels are compiled. asv imports this file: nothing runs before
`main`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.host import Host, core_cache
from benchmarks.workloads import LAYOUTS, Call, Data

with contextlib.suppress(ImportError):  # asv imports this with commits that do not have it
    from fastbn.threads import get_num_threads, num_threads

SIZES = {
    "512 B": (1, 8, 4, 4), "8 kB": (2, 16, 8, 8), "64 kB": (4, 64, 8, 8), "128 kB": (8, 64, 8, 8),
    "256 kB": (16, 64, 8, 8), "512 kB": (32, 64, 8, 8), "1 MB": (16, 64, 16, 16), "1.5 MB": (24, 64, 16, 16),
    "3 MB": (48, 64, 16, 16), "6 MB": (32, 256, 14, 14), "8 MB": (32, 64, 32, 32), "13 MB": (32, 128, 28, 28),
    "26 MB": (32, 256, 28, 28), "103 MB": (32, 256, 56, 56),
}  # fmt: skip
"""Shapes of float32 arrays, channels-first."""
LARGE = 8 << 20  # bytes, from which a copy is measured, and up to which Python threads call at once
OPERATIONS = ("forward", "backward", "inference", "moments", "var")
CALLERS = 8  # Python threads at once
AT_ONCE = f"forward, {CALLERS} callers"
TURNED = 128 << 20  # bytes of x, at least, that calls go through before they return to one
SECONDS, PAIRS, ROUNDS = 0.3, 7, 5  # of a row; pairs of calls at least; bursts of Python threads
TORCH_ELEMENTS = 300_000  # of an operation between calls: enough for all of PyTorch's threads, 0.1 ms


class Condition(NamedTuple):
    """What else there is while a call runs."""

    nice: int | None = None  # of a process that keeps a core busy, more than ours
    torch: str = ""  # "torch": imported; "torch-ops": called between

    def __str__(self) -> str:
        return "+".join(filter(None, ("idle" if self.nice is None else f"nice-{self.nice}", self.torch)))


CONDITIONS = {
    str(condition): condition
    for condition in (Condition(nice, torch) for torch in ("", "torch", "torch-ops") for nice in (None, 0, 15))
}
"""In this order: PyTorch, once imported, stays."""


class Row(NamedTuple):
    """Seconds of calls on one thread and by default."""

    operation: str
    size: str
    one: list[float]
    default: list[float]

    def ratio(self, percent: float) -> float:
        """Of the default's percentile to one thread's."""
        return float(np.percentile(self.default, percent) / np.percentile(self.one, percent))


# --- conditions -------------------------------------------------------------------------------------------------------

BUSY = """
import os
os.nice({nice})
print(flush=True)
while os.getppid() == {parent}:
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def busy(nice: int) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps a core busy; it ends with the block, and by itself if this process is killed."""
    program = BUSY.format(nice=nice, parent=os.getpid())
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout
        process.stdout.readline()  # it has begun
        yield process
    finally:
        process.kill()
        process.communicate()


def between_calls(condition: Condition) -> Callable[[], object]:
    """What is done before each call; imports PyTorch for those conditions that have it."""
    if not condition.torch:
        return lambda: None
    torch: Any = importlib.import_module("torch")
    x = torch.ones(TORCH_ELEMENTS)
    return (lambda: torch.relu(x)) if condition.torch == "torch-ops" else lambda: None


# --- times ------------------------------------------------------------------------------------------------------------


Times = tuple[list[float], list[float]]  # of calls on one thread, and by default


def compared(one: Call, default: Call, between: Callable[[], object], seconds: float) -> Times:
    """Seconds of calls that take turns, the first within `num_threads(1)`; what they return is freed untimed."""
    calls, turns = (one, default), itertools.count()
    times: Times = [], []

    def run(k: int) -> float:
        between()
        turn = next(turns)
        with num_threads(1):  # both enter it, so that neither call finds the caches colder
            pass
        with num_threads(1) if k == 0 else contextlib.nullcontext():
            start = time.perf_counter()
            result = calls[k](turn)
            taken = time.perf_counter() - start
        del result
        return taken

    for k in (0, 1) * 2:
        run(k)
    end = time.perf_counter() + seconds
    while len(times[0]) < PAIRS or time.perf_counter() < end:
        for k in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[k].append(run(k))
    return times


def called_at_once(call: Call, seconds: float) -> Times:
    """Seconds by calls in bursts of one Python thread, on one thread, and of `CALLERS`, by default."""
    times: Times = [], []
    for _ in range(ROUNDS):
        for found, callers in zip(times, (1, CALLERS), strict=True):
            found.append(burst(call, callers, seconds / ROUNDS / 2))
    return times


def burst(call: Call, callers: int, seconds: float) -> float:
    """Seconds by the calls that so many Python threads make together."""

    def calls(number: int) -> int:
        turn = number
        with num_threads(1) if callers == 1 else contextlib.nullcontext():
            while turn == number or time.perf_counter() < end:
                call(turn)
                turn += callers
        return (turn - number) // callers

    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        end = start + seconds
        made = sum(pool.map(calls, range(callers)))
        return (time.perf_counter() - start) / made


def copies(data: Data, pool: ThreadPoolExecutor) -> tuple[Call, Call]:
    """Of x to memory that is there, on this thread, and in as many parts as there are threads."""
    parts = [
        [np.array_split(a.reshape(-1), get_num_threads()) for a in pair] for pair in zip(data.out, data.x, strict=True)
    ]

    def whole(i: int) -> None:
        np.copyto(data.out[i % data.count], data.x[i % data.count])

    def divided(i: int) -> None:
        (out, *outs), (x, *xs) = parts[i % data.count]
        others = [pool.submit(np.copyto, *pair) for pair in zip(outs, xs, strict=True)]
        np.copyto(out, x)
        for other in others:
            other.result()

    return whole, divided


def call_of(data: Data, operation: str) -> Call:
    """It allocates what it returns."""
    if operation != "var":
        return data.ours(operation)
    axes = tuple(axis for axis in range(len(data.shape)) if axis != data.axis % len(data.shape))
    return lambda i: fastbn.var(data.x[i % data.count], axes)


def rows(condition: Condition, sizes: Sequence[str], layout: str, seconds: float) -> Iterator[Row]:
    """As they are measured; from `LARGE` on, each size begins with a copy."""
    between = between_calls(condition)
    beside = contextlib.nullcontext() if condition.nice is None else busy(condition.nice)
    with beside, ThreadPoolExecutor(get_num_threads()) as pool:
        for size in sizes:
            nbytes = 4 * math.prod(SIZES[size])
            count = 1 if nbytes <= core_cache() else max(2, math.ceil(TURNED / nbytes))
            data = Data(Host(), SIZES[size], "float32", layout, count)
            if nbytes >= LARGE:
                yield Row("copy", size, *compared(*copies(data, pool), between, seconds))
            for operation in OPERATIONS:
                call = call_of(data, operation)
                yield Row(operation, size, *compared(call, call, between, seconds))
            if nbytes <= LARGE and condition.torch != "torch-ops":
                yield Row(AT_ONCE, size, *called_at_once(data.ours("forward"), seconds))


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "condition", "operation", "size", "one thread: median, us", "95 %", "{} threads: median, us", "95 %",
    "ratio", "of 95 %", "of a copy's speed-up",
)  # fmt: skip


def share(row: Row, copy: Row | None) -> float:
    """How much of the copy's speed-up an operation has."""
    return copy.ratio(50) / row.ratio(50) if copy and row.operation in OPERATIONS else math.nan


def line(condition: str, row: Row, copy: Row | None) -> str:
    """Of the table."""
    microseconds = (1e6 * np.percentile(times, percent) for times in (row.one, row.default) for percent in (50, 95))
    figures = [f"{found:.3g}" if found < 100 else f"{found:.0f}" for found in microseconds]
    figures += [f"{row.ratio(50):.2f}", f"{row.ratio(95):.2f}", f"{share(row, copy):.2f}".replace("nan", "")]
    return f"| {' | '.join([condition, row.operation, row.size, *figures])} |"


def worst(condition: str, found: Sequence[Row]) -> str:
    """Of a condition's rows: the highest ratios, the lowest share of a copy's speed-up."""
    copied = {row.size: row for row in found if row.operation == "copy"}
    calls = [row for row in found if row.operation in OPERATIONS]
    figures = {
        "median": {row[:2]: row.ratio(50) for row in calls},
        "95th percentile": {row[:2]: row.ratio(95) for row in calls},
        "callers": {row[:2]: row.ratio(50) for row in found if row.operation == AT_ONCE},
        "of a copy's speed-up": {row[:2]: share(row, copied[row.size]) for row in calls if row.size in copied},
    }
    words = []
    for name, by_row in figures.items():
        if by_row:
            of = (min if "speed-up" in name else max)(by_row, key=by_row.__getitem__)
            words.append(f"{name} {by_row[of]:.2f} ({', '.join(of)})")
    return f"{condition}: {'; '.join(words)}"


def short_table(condition: str, found: Sequence[Row]) -> Iterator[str]:
    """A line for each size: the medians' ratios of all operations."""
    for size, of_size in itertools.groupby(found, lambda row: row.size):
        ratios = {row.operation: f"{row.ratio(50):.2f}" for row in of_size}
        cells = (ratios.get(name, "") for name in (*OPERATIONS, AT_ONCE, "copy"))
        yield f"| {condition} | {size} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and the worst ratios of each condition."""
    parser = argparse.ArgumentParser("python -m benchmarks.busy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CONDITIONS), metavar="CONDITION", help=", ".join(CONDITIONS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each row ({SECONDS})")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--short", action="store_true", help="a line for each size, with ratios of medians alone")
    options = parser.parse_args(argv)
    conditions = [CONDITIONS[name] for name in CONDITIONS if name in (options.only or CONDITIONS)]
    if importlib.util.find_spec("torch") is None:
        conditions = [condition for condition in conditions if not condition.torch]
        print("PyTorch is not installed: without it", file=sys.stderr)
    columns = ("condition", "size", *OPERATIONS, AT_ONCE, "copy") if options.short else COLUMNS
    print(f"| {' | '.join(columns).format(get_num_threads())} |\n{'|---' * len(columns)}|", flush=True)
    summary = []
    for condition in conditions:
        found: list[Row] = []
        copy = None
        for row in rows(condition, options.sizes or list(SIZES), options.layout, options.seconds):
            found.append(row)
            copy = row if row.operation == "copy" else copy if copy and copy.size == row.size else None
            if not options.short:
                print(line(str(condition), row, copy), flush=True)
        if options.short:
            print(*short_table(str(condition), found), sep="\n", flush=True)
        summary.append(worst(str(condition), found))
    print("\nThe worst:", *summary, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
