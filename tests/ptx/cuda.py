"""fastbn's CUDA backend on the CPU, by the PTX that NVRTC makes of its kernels: `installed` is as `tests.simt.cuda`'s.

with cuda.installed(90) as driver:
    y, saved = fastbn.batch_norm(host_cupy.to_cupy(x))
driver.launches  # what ran
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import cuda_compile
from tests.ptx.driver import Driver
from tests.simt import host_cupy, host_memory
from tests.simt.cuda import SMALL, OnCupy, forget

__all__ = ["OnCupy", "available", "installed"]

ARCHITECTURES = (80, 90)


def available() -> str | None:
    """None, or why compiled kernels cannot be executed here."""
    return host_cupy.available() or cuda_compile.without_compiler()


@contextlib.contextmanager
def installed(
    architecture: int = 90, processors: int = 3, shared: int = 16 << 10, tuning: dict[str, Any] | None = None,
    blocks: int = 2, change: Callable[[str, str], str] | None = None,
    change_source: Callable[[str, str], str] | None = None,
) -> Iterator[Driver]:  # fmt: skip
    """CuPy arrays' kernels run as PTX on a small device of that compute capability.

    Nothing of fastbn is replaced: it asks the device's attributes and the driver's occupancy, compiles by
    `cupy.RawKernel` and launches on the current stream. Its `tuning` sends small arrays every way; {} is fastbn's own.
    A multiprocessor has at most so many blocks. The changes are of a kernel's PTX and of its text.
    """
    import cupy
    from cupy.cuda import runtime

    from fastbn.cuda import launch, problems

    attributes = host_cupy.ATTRIBUTES | {
        "ComputeCapabilityMajor": architecture // 10, "ComputeCapabilityMinor": architecture % 10,
        "MultiProcessorCount": processors, "MaxSharedMemoryPerBlockOptin": shared,
        "MaxBlocksPerMultiprocessor": blocks,
    }  # fmt: skip
    driver = Driver(architecture, attributes)
    driver.change, driver.change_source = change or driver.change, change_source or driver.change_source
    small = SMALL | ({} if architecture >= 90 else {"cluster": 1})
    streams = driver.streams
    with pytest.MonkeyPatch.context() as patch, host_cupy.installed():
        patch.setattr(host_cupy, "ATTRIBUTES", attributes)
        patch.setattr(host_memory, "WATCHERS", [driver.allocations.add])
        patch.setattr(cupy, "RawKernel", driver.raw_kernel)
        patch.setattr(cupy.cuda.driver, "occupancyMaxActiveBlocksPerMultiprocessor", driver.occupancy)
        patch.setattr(runtime, "memsetAsync", driver.memset)
        for name in ("deviceSynchronize", "streamSynchronize"):
            patch.setattr(runtime, name, streams.wait_for_device)
        for module in (cupy.cuda, cupy.cuda.stream):
            patch.setattr(module, "Stream", streams.Stream)
            patch.setattr(module, "get_current_stream", lambda device_id=-1: streams.current)
        patch.setattr(cupy.cuda, "Event", streams.Event)
        if tuning != {}:
            patch.setitem(problems.TUNING, architecture, problems.Tuning(**(small | (tuning or {}))))
        _forget(launch)
        try:
            yield driver
        finally:
            _forget(launch)


def _forget(launch: Any) -> None:
    """Drop plans and kernels, which belong to another device."""
    forget()
    for function in (launch.device, launch.function, launch.blocks_per_processor):
        function.cache_clear()
