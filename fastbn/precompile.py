"""Compile the kernels that people meet first for levels of processors, into the archives that wheels carry:
``python -m fastbn.precompile FOLDER``. The build hook (`hatch_build.py`) runs it.

Which kernels these are is recorded from the calls of `fastbn.warmup`, made in a process in which kernels do nothing.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

from fastbn import threads, warmup
from fastbn.cpu import code, shipped
from fastbn.cpu.ahead import Kernel
from fastbn.environment import float_dtypes

THREADS = 1, 2, 16  # that calls are recorded for: which kernels run depends on whether there are as many channels


def kernels(dtypes: Sequence[str]) -> list[Kernel]:
    """Those that the calls of `warmup.jobs` ask for. The process that runs this is good for nothing else."""
    found = code.record()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of results, which are none
        for number in THREADS:
            with threads.num_threads(number):
                for job in warmup.jobs(dtypes):
                    job.run()
    return list(found)


def compiled(
    wanted: Sequence[Kernel], levels: Sequence[str], workers: Executor
) -> Iterator[list[tuple[str, list[bytes]]]]:
    """Symbols and their code for each level, as they come."""

    def family(kernel: Kernel) -> tuple[str, str]:
        """Kernels of one module and dtype have inner functions in common, which a process compiles once."""
        module, kinds = kernel[0].partition(".")[0], [kind.partition(":")[2] for kind in kernel[1]]
        return module, next((kind[:2] for kind in kinds if kind[-1] in "*]" and not kind.startswith("none")), "")

    families = [list(group) for _, group in itertools.groupby(sorted(wanted, key=family), family)]
    families.sort(key=len, reverse=True)  # the longest first, or one worker would come to it last
    for done in as_completed([workers.submit(_compile, group, levels) for group in families]):
        yield done.result()


def _compile(group: Sequence[Kernel], levels: Sequence[str]) -> list[tuple[str, list[bytes]]]:
    return [code.build(name, kinds, levels) for name, kinds in group]


def main(argv: Sequence[str] | None = None) -> None:
    """Write an archive for each level."""
    dtypes, levels = [*float_dtypes(), *warmup.INTEGERS], shipped.levels_here()
    parser = argparse.ArgumentParser("python -m fastbn.precompile", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the archives")
    parser.add_argument("--dtype", choices=dtypes, action="append", help="this one only; may be repeated")
    parser.add_argument("--level", choices=levels, action="append", help="this one only; may be repeated")
    parser.add_argument("--processes", type=int, default=_processors(), help="all processors")
    options = parser.parse_args(argv)
    dtypes, levels, begun = options.dtype or dtypes, options.level or levels, time.perf_counter()
    fingerprint = code.sources()  # first: whoever changes them meanwhile gets archives that no process takes
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, processes) as one:
        wanted = one.submit(kernels, dtypes).result()
    objects: dict[str, dict[str, bytes]] = {level: {} for level in levels}
    with ProcessPoolExecutor(options.processes, processes) as workers:
        for done in compiled(wanted, levels, workers):
            for symbol, codes in done:
                for level, content in zip(levels, codes, strict=True):
                    objects[level][symbol] = content
            count, seconds = len(objects[levels[0]]), time.perf_counter() - begun
            print(f"{count} of {len(wanted)} kernels compiled, {seconds:.0f} s", file=sys.stderr, flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        shipped.write(options.folder / level, fingerprint, objects[level])


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
