"""asv: what a program pays beside a kernel: the import, first calls, small calls, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tracemalloc
from typing import Any

from benchmarks.host import Host
from benchmarks.kernels import BACKENDS, LARGE, case, samples
from benchmarks.small import NAMES, burst, rows
from benchmarks.statistics_cases import MEAN_VAR, TRACKED, Arrays, case_named
from benchmarks.turns import in_turn
from benchmarks.views import NAMES as PASSES
from benchmarks.views import VIEWS, contenders
from benchmarks.workloads import EPS, LAYOUTS, SHAPES

SMALL = "small_1x16x8"
BURST = 200  # small calls timed at once
TURNS, TURNS_SECONDS = 5, 0.4  # of statistics beside NumPy's, at least

FIRST = """
import time
import numpy as np
import fastbn
x = np.ones({shape}, np.float32)
start = time.perf_counter()
y, saved = fastbn.batch_norm(x, channel_axis={axis})
forward = time.perf_counter()
fastbn.batch_norm_backward(y, saved)
print(forward - start, time.perf_counter() - forward)
"""


First = dict[str, list[dict[str, float]]]


class Import:
    """Seconds of a new process."""

    version = "1"
    number = 1
    repeat = 5

    def timeraw_import(self) -> str:
        return "import fastbn"


class FirstCall:
    """Seconds of a process's first call: with an empty cache, and with its kernels on disk."""

    params = (("forward", "backward"), LAYOUTS)
    param_names = ("operation", "layout")
    version = "1"
    timeout = 300

    def setup_cache(self) -> First:
        return {layout: first_calls(layout) for layout in LAYOUTS}

    def track_compiling(self, first: First, operation: str, layout: str) -> float:
        return first[layout][0][operation]

    def track_from_cache(self, first: First, operation: str, layout: str) -> float:
        return first[layout][1][operation]

    track_compiling.unit = track_from_cache.unit = "seconds"  # type: ignore[attr-defined]


def first_calls(layout: str) -> list[dict[str, float]]:
    """Of two processes, one after the other, that share a cache which was empty."""
    program = FIRST.format(shape=(8, 64, 28, 28), axis=1 if layout == "NCHW" else -1)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", program]
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    return [dict(zip(("forward", "backward"), map(float, run.stdout.split()), strict=True)) for run in runs]


class SmallCall:
    """Of arrays that a core's cache holds: what Python around a kernel takes."""

    params = (BACKENDS, (SMALL,), ("forward", "backward", "inference"))
    param_names = ("backend", "workload", "operation")
    version = "1"
    timeout = 120

    def setup(self, backend: str, workload: str, operation: str) -> None:
        self.case = case(operation, backend, SHAPES[workload], "NCHW", "float32")

    def track_call(self, *_: str) -> dict[str, Any]:
        """Of bursts: asv would time each call by itself, and its own setup with it."""
        self.case.run(self.case.call, 5 * BURST)
        return samples([1e6 * self.case.run(self.case.call, BURST) for _ in range(50)], BURST)

    def track_times_numpy(self, backend: str, *_: str) -> dict[str, Any]:
        """Of NumPy's formula of inference, in turn with it: Python around a handful of array operations."""
        data = self.case.data
        x, mean, var = data.x[0], *(a[:, None] for a in (data.mean, data.var))
        gamma, beta = (a[:, None] for a in (data.gamma, data.beta))
        sqrt = self.case.machine.xp.sqrt
        return samples(self.case.ratios(self.case.call, lambda _: (x - mean) / sqrt(var + EPS) * gamma + beta))

    track_call.unit = "us"  # type: ignore[attr-defined]
    track_times_numpy.unit = "times NumPy's formula"  # type: ignore[attr-defined]


class EachFunction:
    """Microseconds of a call of every public function on a small array."""

    params = (NAMES,)
    param_names = ("call",)
    version = "1"
    timeout = 120

    def setup(self, name: str) -> None:
        self.call = rows()[name].call
        burst(self.call)

    def track_call(self, name: str) -> dict[str, Any]:
        return samples([burst(self.call) for _ in range(50)], BURST)

    track_call.unit = "us"  # type: ignore[attr-defined]


class Statistics:
    """How many times NumPy's time mean and var take on some of the cases of ``python -m benchmarks.statistics``."""

    params = (TRACKED, MEAN_VAR)
    param_names = ("case", "function")
    version = "1"
    timeout = 120

    def setup(self, name: str, function: str) -> None:
        calls = Arrays(case_named(name), Host().cache_bytes).contenders(function)
        self.calls = {contender: calls[contender] for contender in ("fastbn", "numpy")}

    def track_times_numpy(self, *_: str) -> dict[str, Any]:
        times = in_turn(self.calls, TURNS, TURNS_SECONDS)
        return samples(list(times["fastbn"] / times["numpy"]))

    track_times_numpy.unit = "times NumPy's time"  # type: ignore[attr-defined]


class Views:
    """How many times the time of the same values in one piece batch norm of views takes (``benchmarks.views``)."""

    params = (tuple(VIEWS), PASSES)
    param_names = ("view", "operation")
    version = "1"
    timeout = 120

    def setup(self, view: str, operation: str) -> None:
        calls = contenders(VIEWS[view], operation)
        self.calls = {contender: calls[contender] for contender in ("fastbn", "one piece")}

    def track_times_one_piece(self, *_: str) -> dict[str, Any]:
        times = in_turn(self.calls, TURNS, TURNS_SECONDS)
        return samples(list(times["fastbn"] / times["one piece"]))

    track_times_one_piece.unit = "times one piece's time"  # type: ignore[attr-defined]


class Memory:
    """The process's peak, and what a call takes beside x, `out` and the statistics it returns."""

    params = (("moments", "forward", "backward", "inference"), LAYOUTS)
    param_names = ("operation", "layout")
    version = "1"
    timeout = 120

    def setup(self, operation: str, layout: str) -> None:
        self.case = case(operation, "numpy", SHAPES[LARGE], layout, "float32")

    def peakmem_call(self, operation: str, layout: str) -> None:
        self.case.run(self.case.call)

    def track_beside_results(self, operation: str, layout: str) -> float:
        x = self.case.data.x[0]
        results = (
            {"moments": 4, "forward": 6, "backward": 2, "inference": 0}[operation] * 8 * x.shape[self.case.data.axis]
        )
        tracemalloc.start()
        kept = self.case.call(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del kept
        return (peak - results) / x.nbytes

    track_beside_results.unit = "share of x"  # type: ignore[attr-defined]
