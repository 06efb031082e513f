"""All that `benchmarks.gpu` asks of the GPU, its driver, the clock and PyTorch's side of the same device.

Both libraries work on the device's default stream, so that one pair of events times either.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from functools import cached_property
from typing import Any

import numba
import numpy as np

import fastbn
from benchmarks.workloads import Call
from fastbn import environment

HOLD = """
extern "C" __global__ void hold(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}
"""
HOLD_SHARE, HOLD_SECONDS = 1.5, 50e-6  # of the host's time for the calls, and beside it
ATTEMPTS = 3  # at holding the device long enough, each twice as long as the last


class Machine:
    """One GPU, its clock, and PyTorch on it where that is installed with CUDA."""

    def __init__(self) -> None:
        from fastbn.cuda import requirements  # which needs CuPy: this module is also read where there is none

        self.attributes = requirements.attributes(0)  # or an error that says what the machine lacks
        self.xp: Any = requirements.cupy()
        cuda = self.xp.cuda
        self.device: Any = cuda.Device(0)
        self.cache_bytes = self.attributes["L2CacheSize"]
        self._start, self._stop = cuda.Event(), cuda.Event()
        self._hold = self.xp.RawKernel(HOLD, "hold")

    @cached_property
    def torch(self) -> Any:
        """PyTorch, or None; imported by those who ask."""
        torch = environment.optional("torch")
        return torch if torch is not None and torch.cuda.is_available() else None

    def describe(self) -> dict[str, Any]:
        """The device and the versions of everything between it and the figures, as plain data."""
        cuda, torch = self.xp.cuda, self.torch
        ml_dtypes = environment.optional("ml_dtypes")
        return {
            "device": cuda.runtime.getDeviceProperties(self.device.id)["name"].decode(),
            "compute_capability": "{ComputeCapabilityMajor}.{ComputeCapabilityMinor}".format(**self.attributes),
            "processors": self.attributes["MultiProcessorCount"],
            "cache_bytes": self.cache_bytes,
            "memory_bytes": int(cuda.runtime.memGetInfo()[1]),
            "driver": driver(),
            "driver_cuda": cuda.runtime.driverGetVersion(),
            "runtime_cuda": cuda.runtime.runtimeGetVersion(),
            "cpu": environment.cpu_model(),
            "versions": {
                "fastbn": fastbn.__version__,
                "python": platform.python_version(),
                "cupy": self.xp.__version__,
                "numpy": np.__version__,
                "numba": numba.__version__,
                "ml_dtypes": ml_dtypes and ml_dtypes.__version__,
                "torch": torch and torch.__version__,
                "torch_cuda": torch and torch.version.cuda,
                "cudnn": torch and torch.backends.cudnn.version(),
            },
            "date": time.strftime("%Y-%m-%d"),
        }

    def now(self) -> float:
        """Seconds of the clock that the budget goes by."""
        return time.perf_counter()

    def synchronize(self) -> None:
        self.device.synchronize()

    def free_bytes(self) -> int:
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def copy(self, x: Any, out: Any) -> None:
        """Within the device; the host does not wait."""
        out.data.copy_from_device_async(x.data, x.nbytes)

    def release(self) -> None:
        """Give back the memory that both libraries keep."""
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()
        if "torch" in self.__dict__ and self.torch is not None:
            self.torch.cuda.empty_cache()

    def wake(self, seconds: float = 0.2) -> None:
        """Let the clocks of an idle device rise."""
        self._hold((1,), (1,), (np.int64(1e9 * seconds),))
        self.synchronize()

    # --- time ---------------------------------------------------------------------------------------------------------

    def timed(self, call: Call, kept: list[Any], first: int, calls: int, host: float) -> float:
        """Seconds of a call on the device, over `calls` calls of which each takes the host `host` seconds.

        The device is held until all are in its queue, so that short kernels are not timed by the host that launches
        them. `kept` takes the results in turn.
        """
        hold = HOLD_SHARE * host * calls + HOLD_SECONDS
        for _ in range(ATTEMPTS):
            self._hold((1,), (1,), (np.int64(1e9 * hold),))
            self._start.record()
            for i in range(first, first + calls):
                kept[i % len(kept)] = call(i)
            held = not self._start.done
            self._stop.record()
            self._stop.synchronize()
            if held:
                break
            hold *= 2
        return 1e-3 * float(self.xp.cuda.get_elapsed_time(self._start, self._stop)) / calls

    def host(self, call: Call, first: int, calls: int) -> float:
        """Seconds of the host for a call that it does not wait for."""
        self.synchronize()
        start = time.perf_counter()
        for i in range(first, first + calls):
            call(i)
        seconds = (time.perf_counter() - start) / calls
        self.synchronize()
        return seconds

    # --- graphs -------------------------------------------------------------------------------------------------------

    def captured(self, call: Call, calls: int) -> Call:
        """A graph of so many calls of fastbn's; calling it replays them."""
        self.synchronize()
        stream = self.xp.cuda.Stream(non_blocking=True)
        with stream:
            results = [call(i) for i in range(calls)]  # leaves memory in the stream's pool: a capture cannot ask for it
            stream.synchronize()
            del results
            stream.begin_capture()
            try:
                results = [call(i) for i in range(calls)]
            finally:
                graph = stream.end_capture()

        def replay(_: int, _kept: Any = results) -> None:
            graph.launch()

        return replay

    def captured_by_torch(self, call: Call, calls: int) -> Call:
        """The same of PyTorch's calls."""
        self.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            results = [call(i) for i in range(calls)]

        def replay(_: int, _kept: Any = results) -> None:
            graph.replay()

        return replay

    # --- PyTorch ------------------------------------------------------------------------------------------------------

    def tensor(self, array: Any) -> Any:
        """PyTorch's view of a CuPy array's memory."""
        if array.dtype.name == "bfloat16":  # which the interface between the two does not know
            return self.torch.as_tensor(array.view(np.int16), device="cuda").view(self.torch.bfloat16)
        return self.torch.as_tensor(array, device="cuda")

    def use_cudnn(self, yes: bool) -> None:
        """Whether PyTorch may take cuDNN's kernels."""
        if self.torch is not None:
            self.torch.backends.cudnn.enabled = yes


def driver() -> str | None:
    """The version of the driver, which CUDA does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None
