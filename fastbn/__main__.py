"""Check this installation and measure its speed: ``python -m fastbn``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from fastbn import bench, check, environment, warmup

DESCRIPTION = """\
Without a command: say what is installed, check every backend, dtype and layout against float64 formulas, and measure
the speed of ResNet-50's batch norms on this machine. Under a minute on two cores, two when kernels are compiled first.
"""
COMMANDS = {
    "info": "versions, backends, processor, threads, and where compiled kernels are kept",
    "check": "accuracy against exact and float64 results, each figure with the bound that it must keep",
    "bench": "time and memory bandwidth, beside a copy, NumPy and PyTorch",
    "warmup": "compile the kernels into the cache on disk, ahead of their first use",
}
DETAILS = {
    "check": "Exit status 1 if a figure misses its bound. NumPy's and PyTorch's figures on the same data stand beside.",
    "bench": "The contenders run in turn, on as many threads, on data that no cache holds; figures are medians.",
    "warmup": "Minutes when nothing is compiled yet. Kernels that are on disk already are loaded, not compiled.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 if a check failed, else 0."""
    options = _parser().parse_args(argv)
    return {"info": _info, "check": _check, "bench": _bench, "warmup": _warmup, None: _all}[options.command](options)


# --- commands ---------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    found = environment.describe()
    if options.json:
        _print_json(found)
    else:
        _print_environment(found)
    return 0


def _check(options: argparse.Namespace) -> int:
    rows = _checked(options, tuple(check.TITLES), options.quick)
    if options.json:
        _print_json({"environment": environment.describe(), **_as_dict(rows)})
    return int(any(not row.ok for row in rows))


def _bench(options: argparse.Namespace) -> int:
    shapes = options.shape or [(bench.BATCH, *shape) for shape in (bench.QUICK if options.quick else bench.RESNET50)]
    results = _measured(options, shapes, options.dtype, options.layout or check.LAYOUTS, options.quick)
    if options.json:
        _print_json({"environment": environment.describe(), "bench": [result.as_dict() for result in results]})
    return 0


def _warmup(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    work = warmup.jobs(options.dtype or list(environment.float_dtypes()))
    for _ in _in_turn(work, options.progress):
        pass
    counts, seconds, folder = warmup.counts(), time.perf_counter() - start, environment.kernel_cache()
    if options.json:
        _print_json({**counts._asdict(), "calls": len(work), "seconds": seconds, "kernel_cache": folder})
    else:
        _print_left_out()
        print(f"{counts.compiled} kernels compiled, {counts.loaded} loaded, in {seconds:.0f} s")
        print(f"kept in {folder}" if folder else "not kept: no folder can be written; set NUMBA_CACHE_DIR to one")
    return 0


def _all(options: argparse.Namespace) -> int:
    found = environment.describe()
    if not options.json:
        _print_environment(found)
    rows = _checked(options, ("oracle",), False, quick_dtypes=True)
    shapes = [(bench.BATCH, *shape) for shape in bench.RESNET50]
    results = _measured(options, shapes, "float32", check.LAYOUTS, False)
    if options.json:
        measured = [result.as_dict() for result in results]
        _print_json({"environment": found, **_as_dict(rows), "bench": measured})
    return int(any(not row.ok for row in rows))
