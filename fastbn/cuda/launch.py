"""Compiling kernels and launching them on the current stream; what plans know of a device; how arguments lie."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda import requirements

cupy = requirements.cupy()
runtime = cupy.cuda.runtime

OPTIONAL = {
    "statistics": ("WEIGHT",),
    "finish_moments": (),
    "forward": ("WEIGHT", "RELU", "RESIDUAL"),
    "normalize": ("RELU", "RESIDUAL"),
    "grad_sums": ("WEIGHT", "RELU"),
    "finish_sums": (),
    "backward": ("WEIGHT", "RELU", "RESIDUAL"),
    "grad_input": ("WEIGHT", "RELU", "RESIDUAL"),
    "update_running": (),
    "strided_statistics": (),
    "finish_strided": (),
}
"""The options that each kernel is compiled for."""

COMPILER_OPTIONS = ("-std=c++17",)

Macros = tuple[tuple[str, int], ...]


class Kernel(NamedTuple):
    """What there is to compile."""

    name: str
    macros: Macros

    @property
    def options(self) -> tuple[str, ...]:
        """Of the compiler."""
        return COMPILER_OPTIONS + tuple(f"-D{name}={value}" for name, value in self.macros)


KERNELS, INCLUDE = (files("fastbn.cuda").joinpath(folder) for folder in ("kernels", "include"))


@lru_cache(maxsize=64)
def source(kernel: str, *, hardware: bool = True) -> str:
    """The text of a kernel with its headers in it, since CuPy's cache of compiled kernels does not see included files.

    Without hardware device.cuh is left out.
    """
    return _expanded(KERNELS.joinpath(f"{kernel}.cu"), set() if hardware else {"device.cuh"})


def _expanded(file: Traversable, seen: set[str]) -> str:
    """A text in which each header stands where it is first included; messages have the files' own lines."""
    lines = [f'#line 1 "{file.name}"']
    for number, line in enumerate(file.read_text().splitlines(), 1):
        name = line.split('"')[1] if line.startswith("#include ") else None
        if name is None and line != "#pragma once":
            lines.append(line)
        elif name is None or name in seen:
            lines.append("")
        else:
            seen.add(name)
            lines += [_expanded(INCLUDE.joinpath(name), seen), f'#line {number + 1} "{file.name}"']
    return "\n".join(lines)


ABSENT = -1
"""The number of a device that is not here: launches that are planned for it have a `Kernel` for their function."""


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
    wanted = Kernel(kernel, macros)
    if number == ABSENT:
        return wanted
    with cupy.cuda.Device(number):
        raw = cupy.RawKernel(source(kernel), kernel, options=wanted.options)
        compiled = requirements.compiled(raw)
        raw.max_dynamic_shared_size_bytes = device(number).shared - raw.shared_size_bytes
        return compiled


@lru_cache(maxsize=4096)
def blocks_per_processor(number: int, kernel: str, macros: Macros, threads: int, shared: int) -> int:
    """How many blocks of a kernel run on one multiprocessor at once; as many as it is made for where none is here."""
    if number == ABSENT:
        return dict(macros)["MIN_BLOCKS"]
    compiled = function(number, kernel, macros)
    with cupy.cuda.Device(number):
        return int(cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(compiled.ptr, threads, shared))


def current_device() -> int:
    """The device that this thread launches on."""
    return int(runtime.getDevice())


def clear(address: int, nbytes: int) -> None:
    """Zero memory in the order of the current stream."""
    runtime.memsetAsync(address, 0, nbytes, cupy.cuda.get_current_stream().ptr)


# --- arguments --------------------------------------------------------------------------------------------------------

MOST_BLOCKS = (1 << 31) - 1  # of a grid


class Params:
    """How the argument of a kernel, `struct Params` in its text, lies in memory.

    Addresses and scalars, of every call; integers and numbers that stay the same from call to call.
    """

    def __init__(
        self, pointers: tuple[str, ...], scalars: tuple[str, ...], integers: tuple[str, ...], constants: tuple[str, ...]
    ) -> None:
        self.pointers, self.scalars, self.integers, self.constants = pointers, scalars, integers, constants
        self.fixed = struct.Struct(f"<{len(integers)}q{len(constants)}d")
        self.nbytes = 8 * (len(pointers) + len(scalars)) + self.fixed.size
        self.dtype = np.dtype(f"V{self.nbytes}")

    def pack_fixed(self, values: Mapping[str, float]) -> bytes:
        """What stays the same; 0 where nothing is given."""
        if unknown := values.keys() - {*self.integers, *self.constants}:
            raise KeyError(f"kernels have no fields {unknown}")
        given = (values.get(name, 0) for name in self.integers + self.constants)
        return self.fixed.pack(*given)

    def packer(self, present: Collection[str]) -> Callable[..., bytes]:
        """``pack(*addresses, *scalars, fixed)``: those that are present, in order of their fields; others are 0."""
        pointers = "".join("Q" if name in present else "8x" for name in self.pointers)
        scalars = "".join("d" if name in present else "8x" for name in self.scalars)
        return struct.Struct(f"<{pointers}{scalars}{self.fixed.size}s").pack


AXES = ("batch", "outer", "channel", "inner")
ARRAYS = ("x", "y", "residual", "dy", "dx", "dresidual", "weight")
PARAMETERS = ("gamma", "beta", "mean", "spread", "count", "dmean", "dvar", "dgamma", "dbeta")

RUNNING_STATISTICS = ("running_mean", "running_var")

TILES = Params(
    pointers=(*ARRAYS, *PARAMETERS, *RUNNING_STATISTICS, "results", "partials", "counters"),
    scalars=("rate", "correction"),
    integers=(
        *(f"{name}_strides_{axis}" for name in ARRAYS for axis in AXES),
        *(f"{name}_type" for name in PARAMETERS + RUNNING_STATISTICS),
        "batches", "channels", "vectors", "row_vectors", "row_magic", "row_shift",
        "tiles_per_batch", "tiles", "splits", "share", "backwards", "summed", "spread_is_variance", "frozen",
    ),
    constants=("eps",),
)  # fmt: skip
"""Of all kernels that go through arrays: tile.cuh."""

MOMENTS = ("mean", "var", "count", "batch_mean", "m2")

RUNNING = Params(
    pointers=(*MOMENTS, "new_mean", "new_var"),
    scalars=("rate", "correction"),
    integers=(*(f"{name}_type" for name in MOMENTS), "channels", "skip_nonfinite"),
    constants=(),
)
"""Of update_running.cu."""

MOST_DIMENSIONS = 8
DIMENSIONS = (
    *("kept_sizes", "kept_x", "kept_where", "kept_results"),
    *("sizes", "steps_x", "steps_where", "strides", "carries_x", "carries_where"),
)

STATISTICS = Params(
    pointers=("x", "where", "count", "mean", "spread", "parts"),
    scalars=("ddof",),
    integers=(
        *(f"{name}_{d}" for name in DIMENSIONS for d in range(MOST_DIMENSIONS)),
        "stride_x", "stride_where", "kept_dimensions", "kept", "row", "tiles", "tiles_of_row", "width",
        "splits", "share", "vectors", "along", "beside", "run", "vector_where", "form", "skip_nan",
        "count_type", "mean_type", "spread_type",
    ),
    constants=(),
)  # fmt: skip
"""Of strided_statistics.cu and finish_strided.cu: walk.cuh."""


class Launch:
    """One kernel with all that does not change from call to call."""

    __slots__ = ("block", "compiled", "cooperative", "fixed", "grid", "params", "shared")

    def __init__(
        self, compiled: Any, grid: int, threads: int, shared: int, cooperative: bool, params: Params,
        fixed: Mapping[str, float],
    ) -> None:  # fmt: skip
        if grid > MOST_BLOCKS:
            raise ValueError(f"x: expected channels for {MOST_BLOCKS} blocks of threads at most, got {grid}")
        self.compiled, self.grid, self.block = compiled, (grid, 1, 1), (threads, 1, 1)
        self.shared, self.cooperative = shared, cooperative
        self.params, self.fixed = params, params.pack_fixed(fixed)

    def bound(self, present: Collection[str]) -> Callable[..., None]:
        """``run(*addresses, *scalars)`` launches on the current stream, with addresses as `Params.packer` takes them.

        Every call has an argument of its own: the driver reads it while other threads run.
        """
        compiled, grid, block, shared, fixed = self.compiled, self.grid, self.block, self.shared, self.fixed
        pack, ndarray, dtype = self.params.packer(present), np.ndarray, self.params.dtype
        if self.cooperative:

            def run(*given: float) -> None:
                argument = ndarray((), dtype, pack(*given, fixed))
                compiled(grid, block, (argument,), shared, enable_cooperative_groups=True)
        else:

            def run(*given: float) -> None:
                compiled(grid, block, (ndarray((), dtype, pack(*given, fixed)),), shared)

        return run
