"""Compiling kernels and launching them: everything that asks the CUDA runtime for something but memory."""

from __future__ import annotations

import struct
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda import requirements

cupy = requirements.cupy()

SOURCES = {
    "statistics": ("moments",),
    "finish_moments": ("moments",),
    "forward": ("moments", "centre", "affine"),
    "normalize": ("moments", "centre", "affine"),
    "grad_sums": ("centre", "gradients"),
    "finish_sums": ("centre", "gradients"),
    "backward": ("centre", "gradients"),
    "grad_input": ("centre", "gradients"),
}
"""The kernels, each in a file of its name, and the files that they build on, beside tile.cu."""

OPTIONAL = {
    "statistics": ("WEIGHT",),
    "finish_moments": (),
    "forward": ("WEIGHT", "RELU", "RESIDUAL"),
    "normalize": ("RELU", "RESIDUAL"),
    "grad_sums": ("WEIGHT", "RELU"),
    "finish_sums": (),
    "backward": ("WEIGHT", "RELU", "RESIDUAL"),
    "grad_input": ("WEIGHT", "RELU", "RESIDUAL"),
}
"""The options that each kernel is compiled for."""

OPTIONS = ("-std=c++17",)

Macros = tuple[tuple[str, int], ...]


@lru_cache(maxsize=64)
def source(kernel: str, *, hardware: bool = True) -> str:
    """The text of a kernel: one unit without includes, since CuPy's cache of compiled kernels does not see these."""
    names = ("device",) * hardware + ("tile", *SOURCES[kernel], kernel)
    return "\n".join(files("fastbn.cuda").joinpath(f"{name}.cu").read_text() for name in names)


class Device(NamedTuple):
    """What the choice of kernels depends on."""

    number: int
    architecture: int
    """Compute capability: 90 for 9.0."""
    processors: int
    shared: int
    """Bytes of shared memory that one block can have."""


@lru_cache(maxsize=64)
def device(number: int) -> Device:
    """The device of that number."""
    attributes = requirements.attributes(number)
    architecture = 10 * attributes["ComputeCapabilityMajor"] + attributes["ComputeCapabilityMinor"]
    requirements.check_architecture(architecture)
    return Device(number, architecture, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


@lru_cache(maxsize=4096)
def function(number: int, kernel: str, macros: Macros) -> Any:
    """A compiled kernel on a device: ``f(grid, block, args, shared_mem, stream, enable_cooperative_groups)``.

    It may have all shared memory that a block can have. CUDA keeps one limit for a function, not for a launch.
    """
    options = OPTIONS + tuple(f"-D{name}={value}" for name, value in macros)
    with cupy.cuda.Device(number):
        raw = cupy.RawKernel(source(kernel), kernel, options=options)
        compiled = requirements.compiled(raw)
        raw.max_dynamic_shared_size_bytes = device(number).shared - raw.shared_size_bytes
        return compiled


@lru_cache(maxsize=4096)
def blocks_per_processor(number: int, kernel: str, macros: Macros, threads: int, shared: int) -> int:
    """How many blocks of a kernel run on one multiprocessor at once."""
    compiled = function(number, kernel, macros)
    with cupy.cuda.Device(number):
        return int(cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(compiled.ptr, threads, shared))


def current_device() -> int:
    """The device that this thread launches on."""
    return int(cupy.cuda.runtime.getDevice())


def clear(address: int, nbytes: int) -> None:
    """Zero memory in the order of the current stream."""
    cupy.cuda.runtime.memsetAsync(address, 0, nbytes, cupy.cuda.get_current_stream().ptr)


# --- the argument of all kernels --------------------------------------------------------------------------------------

POINTERS = (
    "x", "y", "residual", "dy", "dx", "dresidual", "weight",
    "gamma", "beta", "mean", "spread", "count", "dmean", "dvar", "offset", "slope",
    "results", "partials", "counters",
)  # fmt: skip
AXES = ("batch", "outer", "channel", "inner")
ARRAYS = POINTERS[:7]
NUMBERS = POINTERS[7:16]
FIELDS = (
    *(f"{name}_strides_{axis}" for name in ARRAYS for axis in AXES),
    *(f"{name}_type" for name in NUMBERS),
    "batches", "channels", "vectors", "row_vectors", "row_magic", "row_shift",
    "tiles_per_batch", "tiles", "splits", "share", "backwards", "summed", "spread_is_variance", "frozen",
)  # fmt: skip

_pointers = struct.Struct(f"<{len(POINTERS)}Q")
_pack = _pointers.pack
_fields = struct.Struct(f"<{len(FIELDS)}qd")
_argument = np.dtype(f"V{_pointers.size + _fields.size}")


MOST_BLOCKS = (1 << 31) - 1  # of a grid


class Launch:
    """One kernel with all that does not change from call to call."""

    __slots__ = ("block", "compiled", "cooperative", "fixed", "grid", "shared")

    def __init__(
        self, compiled: Any, grid: int, threads: int, shared: int, cooperative: bool, fields: dict[str, int], eps: float
    ) -> None:
        self.compiled, self.grid, self.block = compiled, (grid, 1, 1), (threads, 1, 1)
        self.shared, self.cooperative = shared, cooperative
        if grid > MOST_BLOCKS:
            raise ValueError(f"x: expected channels for {MOST_BLOCKS} blocks of threads at most, got {grid}")
        unknown = fields.keys() - set(FIELDS)
        if unknown:
            raise KeyError(f"kernels have no fields {unknown}")
        self.fixed = _fields.pack(*(fields.get(name, 0) for name in FIELDS), eps)

    def __call__(self, *pointers: int) -> None:
        """Launch on the current stream with these addresses, in the order of `POINTERS`."""
        arguments = (np.ndarray((), _argument, _pack(*pointers) + self.fixed),)
        if self.cooperative:
            self.compiled(self.grid, self.block, arguments, self.shared, enable_cooperative_groups=True)
        else:
            self.compiled(self.grid, self.block, arguments, self.shared)
