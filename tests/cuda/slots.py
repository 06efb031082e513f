"""Whether the calls of tests/cuda/traffic.py are bound by memory: issue slots, FP64, and bytes in flight, by a model.

    python -m tests.cuda.slots --device H200 B200

No GPU has measured any of it. For each launch, instructions of a thread for a vector (tests/cuda_instructions.py: loops
as disassembled, what comes once in a group of chunks by its share) times vectors, over what the device's schedulers
issue: four instructions of a warp for each clock and multiprocessor. FP64 likewise: arithmetic and comparisons over the
rate of the FP64 units, conversions from and to float64 over that of theirs. Both as shares of the time that the
device's memory takes for the arrays' bytes. Bytes in flight are those that all blocks of a multiprocessor, as many as
registers, shared memory and the grid allow, have loads out for at once.

Left out: what a block does once (its merge, its numbers), and that a thread's last chunk has conditions.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from tests.cuda import traffic
from tests.cuda_compile import available, compiled, disassembly
from tests.cuda_instructions import chunks_of_group, loops_over_vectors, without_flush, without_rare
from tests.cuda_variants import Variant


class Rates(NamedTuple):
    """GHz; for each clock and multiprocessor, threads' FP64 operations, and conversions from and to float64."""

    clock: float
    doubles: int
    conversions: int


RATES = {
    "A100": Rates(1.41, 32, 16),
    "H100": Rates(1.78, 64, 16),
    "H200": Rates(1.78, 64, 16),
    "B200": Rates(1.96, 64, 16),
    "RTX 3090": Rates(1.70, 2, 2),
    "RTX 4090": Rates(2.52, 2, 2),
    "RTX 5090": Rates(2.41, 2, 2),
}
"""Of NVIDIA's data sheets, and of the CUDA programming guide's table of arithmetic throughput."""
ISSUED = 4 * 32  # instructions of threads for each clock and multiprocessor
MOST = 0.65
"""Of the time that memory takes."""
ENOUGH = 64
"""kB in flight for each multiprocessor, by Little's law: 4.8 TB/s, 132 multiprocessors, 1.8 us under load."""
LARGE = 256 << 20
"""Bytes of x from which a device should be full."""


class Counts(NamedTuple):
    """Of a thread, for a vector."""

    instructions: float
    doubles: float
    conversions: float


def counted(loop: tuple[str, ...]) -> Counts:
    """Of a loop's instructions."""
    conversions = sum("F64" in text and bool(re.search(r"\b[FI]2[FI]\b", text)) for text in loop)
    return Counts(len(loop), sum(bool(re.search(r"\bD(ADD|MUL|FMA|SETP)\b", text)) for text in loop), conversions)


def for_a_vector(variant: Variant, architecture: int) -> Counts:
    """In the loop that reads, and in the one that writes."""
    chunks, items = chunks_of_group(variant), variant["ITEMS_PER_THREAD"]

    def of(change: Callable[[str], str]) -> list[float]:
        loops = loops_over_vectors(variant, disassembly(variant, architecture, change))
        return [sum(numbers) for numbers in zip(*(counted(loop.instructions) for loop in loops), strict=True)]

    every = of(without_rare)
    most = of(without_flush) if chunks > 1 else every
    return Counts(*((a / chunks + b * (1 - 1 / chunks)) / items for a, b in zip(every, most, strict=True)))


class Cost(NamedTuple):
    counts: Counts
    blocks: int
    """Of a multiprocessor, as registers allow."""


LIKE = ("DTYPE", "VECTOR", "ALONG_CHANNELS", "RUN", "ITEMS_PER_THREAD", "STEPS")
"""Macros on which loops depend; LANES, THREADS and CLUSTER change constants in them."""


@lru_cache(maxsize=4096)
def _cost(kernel: str, like: tuple[int, ...], architecture: int) -> Cost:
    known = dict(zip(LIKE, like, strict=True))
    threads = 256
    lanes = known["RUN"] or (8 if known["ALONG_CHANNELS"] else 1)
    others = {"LANES": lanes, "THREADS": threads, "WIDE": 0, "WEIGHT": 0, "RELU": 0, "RESIDUAL": 0, "CLUSTER": 1}
    blocks = 1 if architecture == 100 and kernel == "backward" and known["ALONG_CHANNELS"] else 2
    variant = Variant(kernel, tuple({**known, **others, "MIN_BLOCKS": blocks}.items()))
    return Cost(for_a_vector(variant, architecture), compiled(variant, architecture).blocks(threads, architecture))


class Slots(NamedTuple):
    """Shares of the time that memory takes; kB in flight for each multiprocessor, of the pass that has least."""

    issue: float
    doubles: float
    in_flight: float
    strategy: str


def slots(device: str, case: tuple[Any, ...]) -> Slots:
    """Of a call on a device."""
    chip, rates = traffic.DEVICES[device], RATES[device]
    shape, layout, dtype, operation = case
    found = traffic.traffic(chip, shape, layout, dtype, operation)
    nbytes = math.prod(shape) * traffic.DTYPES[dtype][1]
    seconds = found.ideal / (chip.bandwidth * 1e9)
    clocks = chip.processors * rates.clock * 1e9
    issue = doubles = 0.0
    in_flight = math.inf
    for step in found.plan.launches:
        kernel, macros = step.compiled
        if kernel.startswith("finish"):
            continue
        named = dict(macros)
        cost = _cost(kernel, tuple(named[name] for name in LIKE), chip.architecture)
        bits = 8 * named["VECTOR"] * traffic.DTYPES[dtype][1]
        threads = nbytes / (bits / 8)  # that take a vector
        issue += threads * cost.counts.instructions / ISSUED / clocks
        double = threads * (cost.counts.doubles / rates.doubles + cost.counts.conversions / rates.conversions)
        doubles += double / clocks
        arrays = 2 if kernel in ("backward", "grad_sums", "grad_input") else 1
        blocks = min(cost.blocks, _of_shared(chip, step), -(-step.grid[0] // chip.processors))
        in_flight = min(in_flight, blocks * step.block[0] * named["ITEMS_PER_THREAD"] * arrays * bits / 8 / 1024)
    return Slots(issue / seconds, doubles / seconds, in_flight, found.strategy)


def _of_shared(chip: traffic.Chip, step: Any) -> int:
    return ((chip.shared + 1) << 10) // (step.shared + (1 << 10))


def worst(device: str, layout: str, dtype: str, operation: str) -> tuple[Slots, Slots, float]:
    """Of the table's cases the one with most issue slots, the one with most FP64; least in flight of a large array."""
    some = {case: slots(device, case) for case in traffic.cases((dtype,), (layout,), (operation,))}
    itemsize = traffic.DTYPES[dtype][1]
    large = [found.in_flight for case, found in some.items() if math.prod(case[0]) * itemsize >= LARGE]
    most = max(some.values(), key=lambda found: found.issue), max(some.values(), key=lambda found: found.doubles)
    return (*most, min(large))


# --- the table --------------------------------------------------------------------------------------------------------


def rows(devices: Any, dtypes: Any, layouts: Any = traffic.LAYOUTS) -> Iterator[str]:
    """Markdown, as in docs/gpu.md."""
    head = [f"{layout} {operation}" for layout in layouts for operation in traffic.OPERATIONS]
    yield f"| device | dtype | {' | '.join(head)} |"
    yield "|---|---" + "|---" * len(head) + "|"
    for device in devices:
        for dtype in dtypes:
            cells = []
            for layout in layouts:
                for operation in traffic.OPERATIONS:
                    issue, doubles, in_flight = worst(device, layout, dtype, operation)
                    cells.append(f"{issue.issue:.0%}, {doubles.doubles:.0%}, {in_flight:.0f}")
            yield f"| {device} | {dtype} | {' | '.join(cells)} |"


def above(devices: Any, dtypes: Any) -> Iterator[tuple[str, tuple[Any, ...], Slots]]:
    """Cases in which instructions or FP64 take more than their share."""
    for device in devices:
        for case in traffic.cases(dtypes):
            found = slots(device, case)
            if max(found.issue, found.doubles) > MOST:
                yield device, case, found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.slots", description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", choices=traffic.DEVICES, default=list(traffic.DEVICES))
    parser.add_argument("--dtype", nargs="+", choices=traffic.DTYPES, default=["float16", "float32"])
    parser.add_argument("--above", action="store_true", help="each case above its share, not the table")
    options = parser.parse_args(arguments)
    if (reason := available()) is not None:
        parser.error(reason)
    if not options.above:
        for row in rows(options.device, options.dtype):
            print(row, flush=True)
        return
    for device, (shape, layout, dtype, operation), found in above(options.device, options.dtype):
        size = "x".join(map(str, shape))
        print(
            f"{device:9} {size:16} {layout} {dtype:8} {operation:9} {found.strategy:11} "
            f"issue {found.issue:.0%} FP64 {found.doubles:.0%} {found.in_flight:.0f} kB"
        )


if __name__ == "__main__":
    main()
