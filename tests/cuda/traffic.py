"""What calls read and write in global memory, computed from plans: sectors of 32 bytes that warps ask for.

    python -m tests.cuda.traffic --device H100 --dtype float16 --layout NHWC

prints each call's bytes over those of its arrays: 2S where x is read and y is written (S: bytes of x), 3S where a pass
over x has to come before, 3S and 5S of backward passes. All requests count, also those that caches answer: elements,
partials of blocks, numbers of channels. tests/cuda/test_traffic.py holds the counts against kernels that are executed.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

SECTOR = 32
WARP = 32
RESIDENT = 2
"""Blocks that registers leave room for on a multiprocessor, as tests/cuda/test_compile.py holds."""


class Chip(NamedTuple):
    """What plans and the limit of a call depend on; shared memory that a block may have, of kB; GB/s; MB of L2."""

    architecture: int
    processors: int
    shared: int
    bandwidth: int
    cache: int


DEVICES = {
    "A100": Chip(80, 108, 163, 2039, 40),
    "H100": Chip(90, 132, 227, 3350, 50),
    "H200": Chip(90, 132, 227, 4800, 50),
    "B200": Chip(100, 148, 227, 8000, 126),
    "RTX 3090": Chip(86, 82, 99, 936, 6),
    "RTX 4090": Chip(89, 128, 99, 1008, 72),
    "RTX 5090": Chip(120, 170, 99, 1792, 96),
}
DTYPES = {"float16": (0, 2), "bfloat16": (1, 2), "float32": (2, 4), "float64": (3, 8)}
OPERATIONS = ("forward", "backward", "inference")
LAYOUTS = ("NCHW", "NHWC")


# --- calls ------------------------------------------------------------------------------------------------------------


def problem_of(device: Any, shape: tuple[int, ...], layout: str, dtype: str, operation: str) -> Any:
    """A call on arrays without gaps; parameters are float32, of float64 data float64, and statistics float64."""
    from fastbn.cuda import problems

    (number, itemsize), (samples, channels, *spatial) = DTYPES[dtype], shape
    size = math.prod(spatial)
    collapsed = (1, samples, channels, size) if layout == "NCHW" else (1, samples * size, channels, 1)
    strides = (0, channels * size, size, 1) if layout == "NCHW" else (0, channels, 1, 0)
    operand = problems.Placement(tuple(s if n > 1 else 0 for s, n in zip(strides, collapsed, strict=True)), 0)
    parameter = max(number, 2)
    names, types, options = {
        "forward": (("x", "y"), {"gamma": parameter, "beta": parameter}, {}),
        "backward": (("x", "dy", "dx"), {"mean": 3, "spread": 3, "gamma": parameter, "count": 3}, {"frozen": 0}),
        "inference": (
            ("x", "y"),
            dict.fromkeys(("mean", "spread", "gamma", "beta"), parameter),
            {"spread_is_variance": 1},
        ),
    }[operation]
    return problems.Problem(
        device, collapsed, number, itemsize, tuple((name, operand) for name in names), 0, (), tuple(types.items()),
        relu=False, residual=False, options=tuple(options.items()), eps=1e-5,
    )  # fmt: skip


CHOICES = {"forward": "forward", "backward": "backward", "inference": "normalize"}


def planned(problem: Any, operation: str, chip: Chip | None = None) -> Any:
    """The plan, whose launches have names of kernels and macros in place of kernels."""
    from fastbn.cuda import launch, plans

    def blocks(_number: int, _kernel: str, _macros: Any, threads: int, shared: int) -> int:
        of_shared = ((chip.shared + 1) << 10) // (shared + (1 << 10))  # a block takes 1 kB itself
        return min(RESIDENT * 256 // threads, of_shared)

    choose = getattr(plans, CHOICES[operation])
    if chip is None:
        return choose(problem)
    with (
        mock.patch.object(launch, "function", lambda _number, kernel, macros: (kernel, macros)),
        mock.patch.object(launch, "blocks_per_processor", blocks),
    ):
        return choose.__wrapped__(problem)


# --- requests ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def of_numbers(kept: int, width: int, size: int, row: int = 0) -> int:
    """Sectors of numbers of `size` bytes that lie side by side, where runs of `width` are asked for by warps.

    They are the row of that number of a table, whose rows are `kept` numbers.
    """
    total = 0
    for first in range(0, kept, width):
        for start in range(first, min(first + width, kept), WARP):
            begin, end = row * kept + start, row * kept + min(start + WARP, first + width, kept)
            total += (end * size - 1) // SECTOR - begin * size // SECTOR + 1
    return total


def of_elements(problem: Any, macros: Mapping[str, int], fields: Mapping[str, int], strides: tuple[int, ...]) -> int:
    """Sectors of one array that all blocks together ask for, each vector once."""
    batch, outer, channels, inner = problem.shape
    assert batch == 1
    return _of_elements(
        (outer, channels, inner), problem.itemsize, strides, macros["VECTOR"], macros["LANES"],
        bool(macros["ALONG_CHANNELS"]), fields["splits"], fields["share"], macros["THREADS"] if macros["RUN"] else 0,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _of_elements(
    shape: tuple[int, int, int], itemsize: int, strides: tuple[int, ...], vector: int, lanes: int, along: bool,
    splits: int, share: int, threads_of_run: int,
) -> int:  # fmt: skip
    outer, channels, inner = shape
    if threads_of_run:
        return _of_runs(
            outer, channels * inner * itemsize // 16, steps_of(strides, itemsize), lanes, share, threads_of_run
        )
    depth, width = (1, lanes * vector) if along else (vector, lanes)
    steps = steps_of(strides, itemsize)
    ends = (channels, width) if along else (inner, share * depth)
    if all(n * itemsize % SECTOR == 0 for n in ends) and all(s % SECTOR == 0 for s in (steps[1], steps[2] * width)):
        return outer * channels * inner * itemsize // SECTOR  # whole sectors, none of which two requests share
    vectors, row = outer * inner // depth, max(1, inner // depth)
    tiles = -(-channels // width)
    period = SECTOR // math.gcd(steps[2] * width, SECTOR)
    counted = period if tiles % period == 0 else tiles
    rows = WARP // lanes
    total = 0
    for tile in range(counted):
        for first in range(0, vectors, share):
            v = np.arange(first, min(first + share, vectors))
            v = np.append(v, np.repeat(v[-1:], -len(v) % rows)).reshape(-1, rows, 1)
            at = v // row * steps[1] + v % row * depth * steps[3]
            channel = tile * width + np.arange(lanes) * (width // lanes)
            at = at + np.minimum(channel, channels - width // lanes) * steps[2]
            sectors = np.sort((at // SECTOR).reshape(len(v), -1), axis=1)
            total += len(v) + int((np.diff(sectors, axis=1) > 0).sum())
    return total * (tiles // counted)


def steps_of(strides: tuple[int, ...], itemsize: int) -> list[int]:
    """Strides in bytes."""
    return [s * itemsize for s in strides]


def _of_runs(outer: int, vectors: int, steps: list[int], lanes: int, share: int, threads: int) -> int:
    """Of rows of all channels, tiles of which are `lanes` vectors of 16 bytes wide, and blocks some rows high."""
    rows, total = threads // lanes, 0
    thread = np.arange(rows * lanes)
    for tile in range(vectors // lanes):
        for first in range(0, outer, share):
            last = min(first + share, outer)
            at = np.arange(first, last, rows)[:, None] + thread // lanes
            address = at * steps[1] + (tile * lanes + thread % lanes) * 16
            request = np.arange(len(at))[:, None] * threads + thread // WARP
            total += len(np.unique((request * (1 << 40) + address // SECTOR)[at < last]))
    return total


ELEMENTS = {
    "statistics": ("x",),
    "normalize": ("x", "y"),
    "forward": ("x", "y"),
    "grad_sums": ("x", "dy"),
    "grad_input": ("x", "dy", "dx"),
    "backward": ("x", "dy", "dx"),
}
NUMBERS = {
    "normalize": ("gamma", "beta", "mean", "spread"),
    "forward": ("gamma", "beta"),
    "grad_sums": ("mean", "spread"),
    "grad_input": ("mean", "spread", "mean", "spread", "gamma", "count"),
    "backward": ("mean", "spread", "mean", "spread", "gamma", "count"),
}
"""In the order of a block's loads, some twice."""
MOMENTS, GRADIENTS = range(4), range(2)  # rows of results
STATISTICS = (2, 3)  # those that a normalising pass reads: mean and rstd
PIECE = 4  # channels that a block merges
DOUBLES = 8


def requests(problem: Any, plan: Any, step: Any, kernel: str, macros: Mapping[str, int]) -> Counter[str]:
    """Sectors that a launch asks for, by what they are of."""
    names = step.params.integers + step.params.constants
    fields = dict(zip(names, step.params.fixed.unpack(step.fixed), strict=True))
    operands, types, kept = dict(problem.operands), dict(problem.types), problem.kept
    width = macros["LANES"] * (macros["VECTOR"] if macros["ALONG_CHANNELS"] or macros["RUN"] else 1)
    width //= macros["RUN"] or 1
    splits, piece = fields["splits"], min(PIECE, width)
    of_moments = kernel in ("statistics", "finish_moments", "forward", "normalize")
    size = (5 if problem.itemsize == 8 else 4) if of_moments else 2
    first = int(of_moments)  # row of the partials
    found: Counter[str] = Counter()

    def table(name: str, rows: Any, width: int, times: int = 1) -> None:
        found[name] += times * sum(of_numbers(kept, width, DOUBLES, row) for row in rows)

    def results(width: int) -> None:
        table("results", MOMENTS if of_moments else GRADIENTS, width)
        if of_moments and plan.partials:
            table("partials", [0], width)

    for name in ELEMENTS.get(kernel, ()):
        found[name] += of_elements(problem, macros, fields, operands[name].strides)
    for name in NUMBERS.get(kernel, ()):
        if name in types:
            found["numbers"] += splits * of_numbers(kept, width, (2, 2, 4, 8)[types[name]])
    if splits > 1 and kernel in ("statistics", "grad_sums", "forward", "backward"):
        table("partials", range(first, first + splits * size), width)
    alone = splits == 1 and kernel in ("statistics", "grad_sums", "forward", "backward")
    merged = fields["summed"] if kernel.startswith("finish") else splits if kernel in ("forward", "backward") else 1
    if merged > 1:
        table("partials", range(first, first + merged * size), piece)
    if merged > 1 or alone:
        results(piece if merged > 1 else width)
    if (kernel in ("forward", "backward") and splits > 1) or (
        kernel in ("normalize", "grad_input") and fields["summed"]
    ):
        table("results", STATISTICS if of_moments else GRADIENTS, width, splits)
        if of_moments:
            table("partials", [0], width, splits)
    return found


class Traffic(NamedTuple):
    """Of a call: bytes by what they are of, those that its arrays have, and how it goes."""

    requested: Counter[str]
    ideal: int
    strategy: str
    trips: int
    """Times that bytes of x go over memory in the ideal case."""
    plan: Any

    @property
    def ratio(self) -> float:
        return self.requested.total() / self.ideal


def traffic(chip: Chip, shape: tuple[int, ...], layout: str, dtype: str, operation: str) -> Traffic:
    """What a call on a device asks for."""
    from fastbn.cuda import launch

    device = launch.Device(0, chip.architecture, chip.processors, chip.shared << 10)
    problem = problem_of(device, shape, layout, dtype, operation)
    plan = planned(problem, operation, chip)
    requested: Counter[str] = Counter()
    for step in plan.launches:
        kernel, macros = step.compiled
        requested += requests(problem, plan, step, kernel, dict(macros))
    trips = {"forward": 2, "backward": 3, "inference": 2}[operation]
    if plan.strategy == "two passes":
        trips += 1 if operation == "forward" else 2
    nbytes = math.prod(problem.shape) * problem.itemsize
    found = Counter({name: n * SECTOR for name, n in requested.items()})
    return Traffic(found, trips * nbytes, plan.strategy, trips, plan)


# --- the table --------------------------------------------------------------------------------------------------------

LAYERS = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (256, 14, 14), (1024, 14, 14),
    (512, 7, 7), (2048, 7, 7), (128, 56, 56), (256, 28, 28), (512, 14, 14),
)  # fmt: skip
"""ResNet-50's, those of its later form last: benchmarks/workloads.py has both."""
MLP = ((256, 1024), (4096, 512), (4096, 4096), (16384, 1024), (65536, 256))
SHAPES = (*((batch, *layer) for batch in (32, 256) for layer in LAYERS), (4, 128, 1024, 1024))


def cases(dtypes: Any = DTYPES, layouts: Any = LAYOUTS, operations: Any = OPERATIONS) -> Iterator[tuple[Any, ...]]:
    """Shapes, layouts, dtypes and operations."""
    for dtype in dtypes:
        for layout in layouts:
            for shape in SHAPES + (MLP if layout == "NHWC" else ()):
                for operation in operations:
                    yield shape, layout, dtype, operation


def line(device: str, case: tuple[Any, ...], found: Traffic) -> str:
    shape, layout, dtype, operation = case
    grid = " + ".join(str(step.grid[0]) for step in found.plan.launches)
    parts = " ".join(f"{name} {nbytes / found.ideal:.3f}" for name, nbytes in sorted(found.requested.items()))
    return (
        f"{device:9} {'x'.join(map(str, shape)):16} {layout} {dtype:8} {operation:9} {found.strategy:11} "
        f"{found.trips}S {grid:>12} {found.ratio:8.3f} | {parts}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--above", type=float, default=0.0, help="only cases above this ratio")
    options = parser.parse_args(arguments)
    worst: dict[tuple[str, ...], float] = {}
    count = Counter()
    for device in options.device:
        for case in cases(options.dtype, options.layout, options.operation):
            found = traffic(DEVICES[device], *case)
            if found.ratio > options.above:
                print(line(device, case, found))
            key = (device, *case[1:])
            worst[key] = max(worst.get(key, 0.0), found.ratio)
            count[device, found.ratio > 1.1] += 1
    for key, ratio in worst.items():
        print(f"worst of {' '.join(key):40} {ratio:9.3f}")
    print("above 1.10:", {d: f"{count[d, True]} of {count[d, True] + count[d, False]}" for d in options.device})


if __name__ == "__main__":
    main()
