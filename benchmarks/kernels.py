"""asv: the time of every operation, and how many times its limit and PyTorch's time that is.

The limit is the time in which this machine copies the bytes that must move (`benchmarks.workloads.trips_at_best`). It
is measured in turn with the kernel, in one process on the same buffers: what else happens on the machine meets both,
so their ratio tells a slower kernel from a slower hour.
"""

from __future__ import annotations

import importlib.util
import math
import time
from functools import lru_cache
from typing import Any

from benchmarks.host import Host, core_cache, get_num_threads
from benchmarks.workloads import LAYOUTS, SHAPES, TRIPS, Call, Data, Machine, buffers, dtype_of, trips_at_best

BACKENDS = ("numpy", "cupy")
LARGE, MIDDLE = "resnet50_56x56x256", "resnet50_14x14x1024"  # 103 and 26 MB of float32
CACHES = 2  # times the last cache, that the buffers of an array exceed together
SECONDS = 0.8  # of a comparison
PAIRS = 5  # of a comparison, at least
BURST_SECONDS = 2e-3  # of a contender, before the other has its turn
PAUSE = 0.02  # seconds after PyTorch's calls: OpenMP's threads spin on for 10 ms, on the cores of Numba's


def machine_of(backend: str) -> Machine:
    """Where arrays of this backend lie; not implemented without a GPU."""
    if backend == "numpy":
        return Host()
    if importlib.util.find_spec("cupy") is None:
        raise NotImplementedError("CuPy is not installed")
    from benchmarks.gpu_device import Machine as Device

    try:
        return Device()
    except Exception as error:  # whatever a CUDA library without its driver raises
        raise NotImplementedError(str(error)) from error


class Case:
    """One operation on one workload, warm, and what it is compared with."""

    def __init__(self, operation: str, machine: Machine, shape: tuple[int, ...], layout: str, dtype: str) -> None:
        self.operation, self.machine, self.turn = operation, machine, 0
        itemsize = dtype_of(dtype).itemsize
        self.data = Data(
            machine, shape, dtype, layout, buffers(machine.cache_bytes, math.prod(shape) * itemsize, CACHES)
        )
        cache = core_cache() if isinstance(machine, Host) else math.inf  # a GPU's processors keep them together
        self.trips = trips_at_best(shape, itemsize, layout, operation, cache, get_num_threads())
        self.call = self.data.ours(operation, out=True)
        self.run(self.call)

    def run(self, call: Call, calls: int | None = None) -> float:
        """Seconds of a call, on average; of each buffer once where no number is given."""
        calls = calls or self.data.count
        start = time.perf_counter()
        for _ in range(calls):
            call(self.turn)
            self.turn += 1
        self.machine.synchronize()
        return (time.perf_counter() - start) / calls

    def times_limit(self) -> list[float]:
        """How many times its limit the kernel takes, in pairs of bursts."""
        copies = self.trips / 2  # a copy is two trips
        return [ratio / copies for ratio in self.ratios(self.call, self.data.copy)]

    def times_torch(self) -> list[float]:
        """How many times PyTorch's time; both allocate what they return."""
        return self.ratios(self.data.ours(self.operation), self.data.torchs(self.operation), PAUSE)

    def ratios(self, ours: Call, theirs: Call, pause: float = 0.0) -> list[float]:
        """Of two calls' times in bursts of either in turn."""
        bursts = []
        for call in (ours, theirs):
            self.run(call)
            bursts.append((call, math.ceil(BURST_SECONDS / self.run(call))))
        ratios: list[float] = []
        start = time.perf_counter()
        while len(ratios) < PAIRS or time.perf_counter() - start < SECONDS:
            turn = -1 if len(ratios) % 2 else 1
            times = []
            for call, calls in bursts[::turn]:
                time.sleep(pause)
                times.append(self.run(call, calls))
            numerator, denominator = times[::turn]
            ratios.append(numerator / denominator)
        return ratios


def samples(values: list[float], calls: int = 1) -> dict[str, Any]:
    """A result of which asv keeps the distribution: it compares medians, and whether they differ at all."""
    return {"samples": values, "number": calls}


@lru_cache(maxsize=1)
def case(operation: str, backend: str, shape: tuple[int, ...], layout: str, dtype: str) -> Case:
    """Made once a process: asv sets up again before each sample."""
    return Case(operation, machine_of(backend), shape, layout, dtype)


class _Operation:
    """What a class of one operation measures."""

    operation = ""
    params: tuple[Any, ...] = (BACKENDS, (LARGE, MIDDLE), LAYOUTS, ("float32",))
    param_names: tuple[str, ...] = ("backend", "workload", "layout", "dtype")
    version = "1"
    timeout = 300
    rounds = 1
    repeat = (10, 60, 0.5)  # samples at least, at most, seconds
    warmup_time = 0

    def setup(self, backend: str, workload: str, layout: str, dtype: str) -> None:
        self.case = case(self.operation, backend, SHAPES[workload], layout, dtype)

    def time_call(self, *_: str) -> None:
        self.case.run(self.case.call, 1)

    def track_times_limit(self, *_: str) -> dict[str, Any]:
        return samples(self.case.times_limit())

    track_times_limit.unit = "times the limit"  # type: ignore[attr-defined]


class _Dtypes(_Operation):
    params = (BACKENDS, (LARGE, MIDDLE), LAYOUTS, ("float32", "float16"))


class Statistics(_Operation):
    operation = "moments"


class Forward(_Dtypes):
    operation = "forward"


class Backward(_Dtypes):
    operation = "backward"


class Inference(_Dtypes):
    operation = "inference"


class FusedInference(_Operation):
    operation = "fused"


class FusedForward(_Operation):
    operation = "fused forward"


class FusedBackward(_Operation):
    operation = "fused backward"


class BesidePyTorch:
    """How many times PyTorch's time a call takes, where it is installed; both allocate what they return."""

    params = (BACKENDS, tuple(TRIPS), (LARGE, MIDDLE), LAYOUTS)
    param_names = ("backend", "operation", "workload", "layout")
    version = "1"
    timeout = 300

    def setup(self, backend: str, operation: str, workload: str, layout: str) -> None:
        if importlib.util.find_spec("torch") is None:
            raise NotImplementedError("PyTorch is not installed")
        self.case = case(operation, backend, SHAPES[workload], layout, "float32")
        if self.case.machine.torch is None:
            raise NotImplementedError("PyTorch finds no GPU")

    def track_times_torch(self, *_: str) -> dict[str, Any]:
        return samples(self.case.times_torch())

    track_times_torch.unit = "times PyTorch's time"  # type: ignore[attr-defined]
