"""Real `cupy.ndarray` objects over host memory, for machines without a CUDA driver.

CuPy makes arrays, views and strides without a driver; what needs one are its kernels, copies and streams. `installed`
replaces these, and nothing above them, by NumPy on the same memory: the allocator, `MemoryPointer`'s copies, the ufunc
objects, the kernels behind operators, reductions and indexing, the current stream and device. CuPy's own Python code
and what it decides (views, strides and orders of results, dtypes, refusals) runs as it is on a GPU.

    with host_cupy.installed():
        x = host_cupy.to_cupy(numpy_array)  # the same memory
        y = host_cupy.to_numpy(x * 2 + 1)
    host_cupy.operations  # Counter({"multiply": 1, "add": 1, ...}): kernels and copies that a GPU would have run

What is not replaced raises CuPy's own error without a driver. On a machine with a GPU it would run on the GPU and read
host memory there, so `available` refuses such machines. Import what imports from CuPy before `installed`: a module
first imported within it may keep a replacement.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

import numpy as np

from tests.simt import host_operations
from tests.simt.host_memory import POISON, allocate, allocations, operations, to_cupy, to_numpy

__all__ = [
    "ATTRIBUTES",
    "POISON",
    "allocate",
    "allocations",
    "available",
    "installed",
    "operations",
    "to_cupy",
    "to_numpy",
]

ATTRIBUTES = {
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
    "L2CacheSize": 60 << 20,
    "MaxRegistersPerBlock": 65536,
    "MaxRegistersPerMultiprocessor": 65536,
    "MaxSharedMemoryPerBlock": 48 << 10,
    "MaxSharedMemoryPerBlockOptin": 227 << 10,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MultiProcessorCount": 132,
    "WarpSize": 32,
}
"""Of the device that `cupy.cuda.Device` claims to be; tests may change them."""


@functools.cache
def available() -> str | None:
    """None, or why this cannot work here."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    if int(cupy.__version__.partition(".")[0]) < 14:
        return f"CuPy {cupy.__version__} is older than 14"
    if cupy.cuda.is_available():
        return "there is a CUDA device, which host memory would be given to"
    return None


# --- the device and its streams ---------------------------------------------------------------------------------------


def _device_and_stream() -> tuple[type, Any]:
    from cupy import cuda

    class HostDevice(cuda.Device):
        """Device 0, which claims `ATTRIBUTES` and is never busy."""

        def __init__(self, device: Any = 0) -> None:
            super().__init__(0 if device is None else device)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        use = synchronize = __exit__
        attributes = property(lambda self: dict(ATTRIBUTES))
        compute_capability = property(
            lambda self: f"{ATTRIBUTES['ComputeCapabilityMajor']}{ATTRIBUTES['ComputeCapabilityMinor']}"
        )

    class HostStream(cuda.Stream):
        """The default stream, whose work is done when it is given."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(null=True)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        synchronize = record = wait_event = __exit__
        done = True
        use = __enter__

    HostStream.null = HostStream()
    return HostDevice, HostStream


def _attribute(number: int, device: int) -> int:
    """`cudaDeviceGetAttribute`, whose numbers have names among the constants of CuPy's module."""
    from cupy.cuda import runtime

    prefix = "cudaDevAttr"
    names = (name for name, value in vars(runtime).items() if name.startswith(prefix) and value == number)
    return next(ATTRIBUTES[name.removeprefix(prefix)] for name in names if name.removeprefix(prefix) in ATTRIBUTES)


def _memory_function(name: str) -> Any:
    """`cudaMemset` and `cudaMemcpy`, of addresses."""

    def function(address: int, source: int, size: int, *_kind_and_stream: int) -> None:
        if size:
            operations[name] += 1
            getattr(ctypes, name.replace("cpy", "move"))(address, source, size)

    return function


# --- installing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def installed() -> Any:
    """Let CuPy's arrays live and compute in host memory while this is entered; yields this module."""
    import cupy
    import cupyx.scipy.special  # noqa: F401 - which CuPy imports at the first ufunc; then it would keep replacements

    operations.clear()
    allocations.clear()
    allocator, before = cupy.cuda.get_allocator(), []
    try:
        for owner, name, replacement in _replacements():
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, replacement)
        cupy.cuda.set_allocator(allocate)
        yield sys.modules[__name__]
    finally:
        cupy.cuda.set_allocator(allocator)
        for owner, name, value in reversed(before):
            if value is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@functools.cache
def _replacements() -> list[tuple[Any, str, Any]]:
    """Modules and classes of CuPy, names in them, and what to set these to."""
    import cupy
    from cupy.cuda import runtime

    ufuncs: dict[int, Any] = {}
    array, concatenate = cupy._core.array, cupy._core.concatenate_method
    found = [(cupy.ndarray, name, method) for name, method in host_operations.array_methods().items()]
    for module in [module for name, module in sys.modules.items() if name == "cupy" or name.startswith("cupy.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, cupy.ufunc) and (
                isinstance(getattr(np, value.name.removeprefix("cupy_"), None), np.ufunc)
                or value.name in ("cupy_copy", "cupy_where")
            ):
                found.append((module, name, ufuncs.setdefault(id(value), host_operations.Ufunc(value))))
            elif value is array:
                found.append((module, name, host_operations.array))
            elif value is concatenate:
                found.append((module, name, host_operations.concatenate))
    for name in host_operations.FUNCTIONS:
        found.append((cupy, name, host_operations.function_like(getattr(cupy, name), name)))
    device, stream = _device_and_stream()
    for module in (cupy.cuda, cupy.cuda.device):
        found.append((module, "Device", device))
    for module in (cupy.cuda, cupy.cuda.stream):
        found.append((module, "Stream", stream))
        found.append((module, "get_current_stream", lambda device_id=-1: stream.null))
    found.append((cupy.cuda.device, "get_device_id", lambda: 0))
    for name, result in {"getDevice": 0, "getDeviceCount": 1, "driverGetVersion": runtime.runtimeGetVersion()}.items():
        found.append((runtime, name, lambda result=result: result))
    for name in ("setDevice", "deviceSynchronize", "streamSynchronize"):
        found.append((runtime, name, lambda *_: None))
    for name in ("memset", "memsetAsync", "memcpy", "memcpyAsync"):
        found.append((runtime, name, _memory_function(name.removesuffix("Async"))))
    found.append((runtime, "deviceGetAttribute", _attribute))
    return found
