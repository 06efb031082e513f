"""What CUDA kernels need of a machine, and what to do where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OLDEST_ARCHITECTURE = 70  # Volta: the first whose threads of a warp may wait for one another
_PACKAGES = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}


def cupy() -> Any:
    """The cupy that the user's arrays came from."""
    import cupy

    version = tuple(int(part) for part in cupy.__version__.split(".")[:1])
    if version < (13,):
        raise ImportError(
            f"fastbn needs CuPy 13 or later, found {cupy.__version__}; install {_PACKAGES[12]} or {_PACKAGES[13]}"
        )
    return cupy


def attributes(number: int) -> dict[str, int]:
    """The attributes of a device, or an error that says why there are none."""
    module = cupy()
    try:
        device = module.cuda.Device(number)
        found: dict[str, int] = dict(device.attributes)
    except module.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(_without_device(module, error)) from error
    capability = device.compute_capability
    found["ComputeCapabilityMajor"], found["ComputeCapabilityMinor"] = int(capability[:-1]), int(capability[-1])
    return found


def _without_device(module: Any, error: Any) -> str:
    """What to do about a runtime that finds no device."""
    built = module.cuda.runtime.runtimeGetVersion() // 1000
    try:
        driver = module.cuda.runtime.driverGetVersion()
    except module.cuda.runtime.CUDARuntimeError:
        driver = 0
    if driver == 0:
        return f"no NVIDIA driver was found; install the driver of your GPU, one that supports CUDA {built}"
    if driver // 1000 < built:
        older = _PACKAGES.get(driver // 1000)
        instead = f" or install {older}" if older else ""
        return (
            f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, older than CUDA {built}, for "
            f"which this CuPy was built; update the driver{instead}"
        )
    return f"CUDA finds no GPU to use ({error}); is one visible to this process (CUDA_VISIBLE_DEVICES)?"


def check_architecture(architecture: int) -> None:
    """Raise for a GPU that the kernels do not support."""
    if architecture < OLDEST_ARCHITECTURE:
        raise RuntimeError(
            f"this GPU has compute capability {architecture // 10}.{architecture % 10}; fastbn's kernels need "
            f"{OLDEST_ARCHITECTURE // 10}.{OLDEST_ARCHITECTURE % 10} (Volta, 2017) or later"
        )


def compiled(kernel: Any) -> Any:
    """The function of a `cupy.RawKernel`, compiled."""
    with needing_compiler():
        return kernel.kernel


@contextmanager
def needing_compiler() -> Iterator[None]:
    """Without the compiler, the error says what compiling needs."""
    try:
        yield
    except Exception as error:
        if _lacks_compiler(error):
            version = cupy().cuda.runtime.runtimeGetVersion() // 1000
            package = _PACKAGES.get(version, _PACKAGES[12])
            raise RuntimeError(
                "CUDA's runtime compiler (NVRTC), which compiles the kernels, was not found; install it with "
                f"pip install '{package}[ctk]'"
            ) from error
        raise


def _lacks_compiler(error: BaseException) -> bool:
    message = f"{type(error).__name__} {error}".lower()
    missing = (
        isinstance(error, (ImportError, OSError)) or "failed to load" in message or "dynamiclibnotfound" in message
    )
    return missing and "nvrtc" in message
