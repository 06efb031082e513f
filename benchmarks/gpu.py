"""fastbn's CUDA kernels tested and measured on one GPU, in minutes: ``python -m benchmarks.gpu``.

Each workload runs beside a copy of its bytes within the device and beside PyTorch, with cuDNN and without. Contenders
run in turn, on the same memory; what they read and write rotates over buffers that exceed the second-level cache
several times. A figure of ``device`` is the time between two events around calls that were queued before the first of
them began; of ``host``, the time in which Python returns from a call; of ``graph``, a call's share of a replayed graph.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_device import Machine
from benchmarks.gpu_figures import NO_TIME, Cell, cells_of, goals, line, markdown, print_summary, timing, title
from benchmarks.gpu_tests import ROOT, SANITIZED, SANITIZERS, TEST_SECONDS, WORKERS, bounded, run_tests, sanitize
from benchmarks.gpu_workloads import OPERATIONS, QUICK, Job, planned
from benchmarks.workloads import DTYPES, LAYOUTS, Call, Data, TooLargeError, described, noted
from fastbn import environment

# --- measuring --------------------------------------------------------------------------------------------------------


class Effort(NamedTuple):
    """How long each contender is measured."""

    rounds: int
    seconds: float
    """Of the device, a round and contender."""
    most: int
    """Calls a round, at most: the queue of a device holds a thousand launches."""
    host_seconds: float
    graph: int
    """Calls in a graph."""


FULL = Effort(5, 1e-3, 100, 5e-3, 20)
SHORT = Effort(2, 1e-4, 20, 1e-3, 5)

AGREE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-9}
"""Differences from PyTorch up to which both computed the same; accuracy is judged by the tests."""


def measure(machine: Machine, data: Data, cell: Cell, effort: Effort) -> None:
    """Fill in a cell."""
    calls = data.contenders(cell.what, cell.notes)
    start = machine.now()
    ours = calls["fastbn"](0)
    machine.synchronize()
    cell.first_call = machine.now() - start
    _compare(machine, data, cell, ours, calls)
    del ours
    if cell.kind == "host":
        _alternate(cell, _host_timers(machine, cell, calls, effort), effort.rounds)
    else:
        _alternate(cell, _device_timers(machine, data, cell, calls, effort), effort.rounds)
    if cell.difference is not None and not cell.difference <= AGREE[cell.dtype]:
        cell.state, cell.message = "error", f"differs from PyTorch's result by {cell.difference:.2g}"
    else:
        cell.state = "ok"


Timer = tuple[Callable[[], float], int]  # of a round, and its calls


def _alternate(cell: Cell, timers: dict[str, Timer], rounds: int) -> None:
    """A round of each in turn, each time beginning with the next."""
    names = list(timers)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(timers[name][0]())
    cell.times = {name: timing(found[name], timers[name][1]) for name in names}


def _device_timers(
    machine: Machine, data: Data, cell: Cell, calls: dict[str, Call], effort: Effort
) -> dict[str, Timer]:
    """Warm contenders up, and settle how many calls are timed at once; capture them where graphs are asked for."""
    as_graph = cell.kind == "graph"

    def prepared(name: str, call: Call) -> Timer:
        machine.use_cudnn(name != "torch native")
        if as_graph:
            capture = machine.captured_by_torch if name.startswith("torch") else machine.captured
            call = capture(call, effort.graph)
        kept: list[Any] = [None] * data.count
        for i in range(data.count + 1):  # the libraries keep memory for as many results, and one more
            kept[i % data.count] = call(i)
        host = machine.host(call, 1, 3)
        once = machine.timed(call, kept, 4, 2, host)
        number, first = max(1, min(effort.most, math.ceil(effort.seconds / max(once, 1e-9)))), 6

        def round_() -> float:
            nonlocal first
            machine.use_cudnn(name != "torch native")
            seconds = machine.timed(call, kept, first, number, host)
            first += number
            kept[:] = [None] * data.count
            return seconds / effort.graph if as_graph else seconds

        kept[:] = [None] * data.count
        return round_, number

    if as_graph:
        del calls["copy"]
    return _prepared(cell, calls, prepared)


def _host_timers(machine: Machine, cell: Cell, calls: dict[str, Call], effort: Effort) -> dict[str, Timer]:
    def prepared(name: str, call: Call) -> Timer:
        machine.use_cudnn(name != "torch native")
        machine.host(call, 0, 3)
        once = machine.host(call, 3, 3)
        number = max(3, min(effort.most, math.ceil(effort.host_seconds / once)))

        def round_() -> float:
            machine.use_cudnn(name != "torch native")
            return machine.host(call, 0, number)

        return round_, number

    del calls["copy"]
    return _prepared(cell, calls, prepared)


def _prepared(cell: Cell, calls: dict[str, Call], prepare: Callable[[str, Call], Timer]) -> dict[str, Timer]:
    """The timers of contenders; what others than fastbn raise is noted."""
    timers = {"fastbn": prepare("fastbn", calls.pop("fastbn"))}
    for name, call in calls.items():
        with noted(cell.notes, name):
            timers[name] = prepare(name, call)
    return timers


def _compare(machine: Machine, data: Data, cell: Cell, ours: Any, calls: dict[str, Call]) -> None:
    """Note how far fastbn's result is from PyTorch's, sample by sample: conversions take memory."""
    theirs: Any = None
    if "torch native" in calls:
        machine.use_cudnn(False)
        with noted(cell.notes, "torch native"):
            theirs = calls["torch native"](0)
    if theirs is None:
        calls.pop("torch native", None)
        return
    torch = machine.torch
    if cell.what == "moments":
        pairs = [(machine.tensor(ours.mean), theirs[1])]
    else:
        ours = machine.tensor(ours.x if "backward" in cell.what else ours[0] if "forward" in cell.what else ours)
        theirs = theirs[0] if "backward" in cell.what else theirs
        pairs = list(zip(ours.movedim(-1, 1) if data.axis == -1 else ours, theirs, strict=True))
    compute = torch.float64 if cell.dtype == "float64" else torch.float32
    apart = [(a.to(compute) - b.to(compute)).abs().max() for a, b in pairs]
    sizes = [b.to(compute).abs().max() for _, b in pairs]
    cell.difference = float(torch.stack(apart).max() / torch.stack(sizes).max())


# --- a run ------------------------------------------------------------------------------------------------------------

RESERVE = 8.0  # seconds that one cell may take, with the compilation of its kernels
LONGEST = 60.0  # seconds after which a cell is taken to hang, and the process given up: nothing ends a kernel
SAVE_EVERY = 20.0
EXIT_NO_DEVICE, EXIT_HANGING = 2, 3


def run(
    machine: Machine, jobs: Sequence[Job], effort: Effort, deadline: float, cells: list[Cell],
    save: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Measure jobs until the deadline, printing cells as they come and adding them to `cells`."""
    total, done, saved = sum(len(cells_of(job)) for job in jobs), 0, machine.now()

    def add(cell: Cell) -> None:
        nonlocal done
        done += 1
        cells.append(cell)
        if cell.message != NO_TIME:
            print(f"{done:>4}/{total} {max(0, deadline - machine.now()):4.0f} s  {line(cell)}", flush=True)

    for job in jobs:
        data, refused = None, None
        for cell in cells_of(job):
            if machine.now() + RESERVE > deadline:
                cell.state, cell.message = "skipped", NO_TIME
            elif refused is not None:
                cell.state, cell.message = refused
            else:
                with _no_longer_than(LONGEST, cell, cells, save):
                    try:
                        data = data or Data(machine, job.shape, job.dtype, job.layout)
                    except TooLargeError as error:
                        refused = cell.state, cell.message = "skipped", str(error)
                    except Exception as error:
                        refused = cell.state, cell.message = "error", described(error)
                    else:
                        try:
                            measure(machine, data, cell, effort)
                        except Exception as error:
                            cell.state, cell.message = "error", described(error)
            add(cell)
        if data is not None:
            data = None
            with contextlib.suppress(Exception):  # after an error that the device does not recover from
                machine.release()
        if machine.now() > saved + SAVE_EVERY:
            save()
            saved = machine.now()
    machine.use_cudnn(True)


@contextlib.contextmanager
def _no_longer_than(seconds: float, cell: Cell, cells: list[Cell], save: Callable[[], None]) -> Iterator[None]:
    """End the process, with what has been measured on disk, if a cell takes longer."""

    def give_up() -> None:
        cell.state, cell.message = "error", f"not finished after {seconds:.0f} s"
        cells.append(cell)
        save()
        print(f"{cell.name}: {cell.message}; this process ends here", flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_HANGING)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- kernels compiled ahead -------------------------------------------------------------------------------------------

COMPILE_SECONDS = 120.0  # at most, and at most a third of the budget
COMPILE_SHARE = 0.01  # of the free memory, that x may take: other processes and the tests run beside


def first_calls(machine: Machine, jobs: Sequence[Job]) -> int:
    """Compile the kernels of jobs, and run each once; 1 if any call fails."""
    failed = 0
    for job in jobs:
        if job.nbytes > COMPILE_SHARE * machine.free_bytes():
            continue
        for what in job.operations:
            try:
                Data(machine, job.shape, job.dtype, job.layout, count=1).ours(what)(0)
                machine.release()
            except Exception as error:
                print(f"{job} {what}: {described(error)}")
                failed = 1
    return failed


def compile_ahead(pool: Executor, jobs: Sequence[Job], seconds: float) -> dict[str, Future[Any]]:
    """Fill CuPy's cache on disk from a process for each dtype and layout, which share no kernels."""
    shares: dict[tuple[str, str], dict[str, None]] = {}
    for job in jobs:
        shapes = shares.setdefault((job.dtype, job.layout), {})
        shapes[",".join(map(str, job.shape))] = None
    end = time.monotonic() + seconds

    def start(*arguments: str) -> str:
        """Empty, or what went wrong."""
        command = [sys.executable, "-m", "benchmarks.gpu", "--compile", *arguments]
        finished, status, output = bounded(command, max(1.0, end - time.monotonic()), ROOT)
        if not finished:
            return "no time left"
        return f"exit status {status}: {output[-300:]}" if status else ""

    return {
        f"{dtype} {layout}": pool.submit(
            start, f"--dtype={dtype}", f"--layout={layout}",
            *(f"--shape={shape}" for shape in shapes), *(f"--operation={what}" for what in jobs[0].operations),
        )
        for (dtype, layout), shapes in shares.items()
    }  # fmt: skip


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Test, measure, print and record; 1 if a test or a cell failed, whether or not the goals are met."""
    options = _parser().parse_args(argv)
    if isinstance(options.markdown, Path):
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return 0
    if options.sanitize:
        return sanitize(options.budget / (len(SANITIZERS) * len(SANITIZED)))
    try:
        machine = Machine()
    except (ImportError, RuntimeError) as error:
        print(f"nothing to measure: {error}", file=sys.stderr)
        return EXIT_NO_DEVICE
    deadline = machine.now() + options.budget
    dtypes = options.dtype or (["float32"] if options.quick else DTYPES)
    jobs = planned(
        options.shape or (QUICK if options.quick else ()),
        [dtype for dtype in dtypes if dtype in environment.float_dtypes()],
        options.layout or LAYOUTS,
        options.operation or OPERATIONS,
    )
    if options.compile:
        return first_calls(machine, jobs)
    record: dict[str, Any] = {
        "environment": machine.describe(),
        "command": _command(sys.argv[1:] if argv is None else argv),
        "tests": None,
        "cells": [],
        "goals": [],
    }
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{_slug(record['environment']['device'])}.json"
    cells: list[Cell] = []

    def save() -> None:
        record["cells"], record["goals"] = [c.as_dict() for c in cells], [goal.as_dict() for goal in goals(cells)]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_dumped(record), encoding="utf-8")

    print(json.dumps(record["environment"], indent=1))
    left_out = environment.left_out()
    if machine.torch is None and environment.optional("torch") is not None:
        left_out.append("PyTorch's figures: torch finds no GPU")
    print(*(f"left out: {text}\n" for text in left_out), sep="", end="")
    third = options.budget / 3
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - WORKERS)) as pool:
        ahead = {} if options.quick else compile_ahead(pool, jobs, min(COMPILE_SECONDS, third))
        if options.tests:
            record["tests"] = run_tests(min(TEST_SECONDS, third))
            print(f"tests: {record['tests']['state']}, {record['tests']['passed']} passed", flush=True)
        for share, outcome in ahead.items():
            if outcome.result():
                print(f"not all kernels of {share} were compiled ahead: {outcome.result()}")
    save()
    print(title(), flush=True)
    effort = SHORT if options.quick else FULL
    effort = effort._replace(rounds=options.rounds or effort.rounds)
    machine.wake()
    run(machine, jobs, effort, deadline, cells, save)
    save()
    print_summary(record, cells, goals(cells))
    if options.markdown:
        print(f"\n{markdown(record)}")
    tested = record["tests"] is None or record["tests"]["state"] == "passed"
    return int(not tested or any(c.state == "error" for c in cells))


def _command(arguments: Sequence[str]) -> str:
    """How this run was started, but for the place of its file."""
    before = ("", *arguments)
    kept = (a for a, last in zip(arguments, before, strict=False) if last != "--out" and not a.startswith("--out"))
    return shlex.join(["python", "-m", "benchmarks.gpu", *kept])


def _dumped(record: dict[str, Any]) -> str:
    """JSON with a line for each cell and goal."""
    texts = [
        "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value, indent=1)
        for value in record.values()
    ]
    return "{" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in zip(record, texts, strict=True)) + "}\n"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=440, help="seconds; the least important cells are left out (440)"
    )
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="measure only")
    parser.add_argument("--quick", action="store_true", help="a few float32 shapes, two short rounds")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="run a few tests and workloads under compute-sanitizer, and nothing else",
    )
    parser.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/gpu-<device>.json)")
    parser.add_argument(
        "--markdown", nargs="?", type=Path, const=True, help="print tables, of a recorded run where its file is given"
    )
    parser.add_argument("--compile", action="store_true", help="compile and call kernels once, and nothing else")
    parser.add_argument("--rounds", type=int, help="of turns of every contender (5)")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    parser.add_argument("--operation", action="append", choices=OPERATIONS)
    parser.add_argument("--shape", action="append", type=lambda text: tuple(map(int, text.split(","))))
    return parser


if __name__ == "__main__":
    sys.exit(main())
