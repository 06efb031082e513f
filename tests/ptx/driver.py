"""What the CUDA driver would refuse: launches that do not fit the device, the kernel or the order of streams.

`Driver` stands in for `cupy.RawKernel`, for the occupancy of the driver and for streams, under the host CuPy of
`tests.simt.host_cupy`; so `fastbn.cuda.launch` runs as it is, and its launches run what NVRTC compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.ptx import compiled, program
from tests.ptx.machine import Launch
from tests.ptx.memory import Allocations
from tests.ptx.streams import Streams
from tests.ptx.text import PtxError

DEFAULT_SHARED = 48 << 10  # of a block, unless a function's attribute says more
RESERVED_SHARED = 1 << 10  # of each block, from compute capability 8.0 on
SHARED_STEP, REGISTER_STEP = 128, 256  # in which shared memory, and registers of a warp, are given
PARTITIONS = 4  # of a multiprocessor, each with warps and registers of its own
REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor; of a thread
WARP = 32


class DriverError(PtxError):
    """What the driver refuses."""


class Launched(NamedTuple):
    """One launch that ran."""

    kernel: str
    macros: dict[str, int]
    grid: int
    threads: int
    shared: int
    cooperative: bool
    stream: int


class Function:
    """A kernel on the device, as `cupy.cuda.Function`."""

    def __init__(self, driver: Driver, source: str, name: str, options: tuple[str, ...]) -> None:
        self.driver, self.name = driver, name
        self.macros = {k: int(v) for k, v in (o[2:].split("=") for o in options if o.startswith("-D"))}
        self.program = program.program(driver.change(name, compiled.ptx(source, options, driver.architecture)))
        self._registers = lambda: compiled.registers(source, options, driver.architecture)
        entry = self.program.entry
        if entry.name != name:
            raise DriverError(f"there is no kernel {name}, but {entry.name}")
        if entry.target > driver.architecture:
            raise DriverError(f"{name} is compiled for sm_{entry.target}, the device is sm_{driver.architecture}")
        self.static_shared, self.cluster = entry.static_shared, entry.cluster or 1
        self.most_dynamic = DEFAULT_SHARED - self.static_shared
        self.ptr = 1 + len(driver.functions)
        driver.functions[self.ptr] = self

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._registers()

    @property
    def most_registers(self) -> int:
        """What ptxas had to keep to for blocks of this size, or what it took."""
        threads = self.program.entry.max_threads
        most = REGISTERS // (threads[0] * self.program.entry.min_blocks) if threads else MOST_REGISTERS
        return min(most, MOST_REGISTERS) if threads else self.registers

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0,
        stream: Any = None, enable_cooperative_groups: bool = False,
    ) -> None:  # fmt: skip
        params = b"".join(argument.tobytes() for argument in args)
        self.driver.launch(self, grid, block, params, shared_mem, enable_cooperative_groups, stream)


class RawKernel:
    """As `cupy.RawKernel`, as far as `fastbn.cuda.launch` asks."""

    def __init__(self, driver: Driver, source: str, name: str, options: tuple[str, ...] = ()) -> None:
        self._make = lambda: Function(driver, source, name, options)
        self._kernel: Function | None = None

    @property
    def kernel(self) -> Function:
        """Compiled when it is first asked for."""
        if self._kernel is None:
            self._kernel = self._make()
        return self._kernel

    @property
    def shared_size_bytes(self) -> int:
        return self.kernel.static_shared

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.kernel.most_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        most = self.kernel.driver.attributes["MaxSharedMemoryPerBlockOptin"] - self.kernel.static_shared
        if not 0 <= size <= most:
            raise DriverError(f"{self.kernel.name}: {size} bytes of dynamic shared memory, the device has {most}")
        self.kernel.most_dynamic = size


class Driver:
    """A device that runs PTX, and what was launched on it."""

    def __init__(self, architecture: int, attributes: dict[str, int]) -> None:
        self.architecture, self.attributes = architecture, attributes
        self.allocations, self.streams = Allocations(), Streams()
        self.functions: dict[int, Function] = {}
        self.launches: list[Launched] = []
        self.change: Callable[[str, str], str] = lambda name, ptx: ptx
        self.change_source: Callable[[str, str], str] = lambda name, source: source
        """Of a kernel's PTX and of its text, for tests that break it."""
        self.instructions = 0
        self.schedule = 0
        """Of blocks: `machine.Launch.schedule`."""

    def raw_kernel(self, source: str, name: str, options: tuple[str, ...] = ()) -> RawKernel:
        """In place of `cupy.RawKernel`."""
        return RawKernel(self, self.change_source(name, source), name, options)

    def occupancy(self, function: int, threads: int, shared: int) -> int:
        """cuOccupancyMaxActiveBlocksPerMultiprocessor."""
        return self.blocks_of(self.functions[function], threads, shared)

    def blocks_of(self, function: Function, threads: int, shared: int) -> int:
        """Blocks that one multiprocessor has room for."""
        has = self.attributes
        warps = -(-threads // WARP)
        of_warp = -(-function.registers * WARP // REGISTER_STEP) * REGISTER_STEP
        warps_with_registers = has["MaxRegistersPerMultiprocessor"] // PARTITIONS // of_warp * PARTITIONS
        of_block = -(-(shared + function.static_shared + RESERVED_SHARED) // SHARED_STEP) * SHARED_STEP
        return min(
            warps_with_registers // warps,
            has["MaxThreadsPerMultiProcessor"] // WARP // warps,
            has["MaxSharedMemoryPerMultiprocessor"] // of_block,
            has["MaxBlocksPerMultiprocessor"],
        )

    def check(
        self, f: Function, grid: tuple[int, ...], block: tuple[int, ...], params: bytes, shared: int, cooperative: bool
    ) -> None:
        """Raise for a launch that the driver refuses."""
        has, (blocks, threads) = self.attributes, (grid[0], block[0])
        entry = f.program.entry

        def refuse(why: str) -> None:
            raise DriverError(f"{f.name}: {why}")

        if any(n != 1 for n in (*grid[1:], *block[1:])):
            refuse(f"a grid of {grid} and blocks of {block}, which have one dimension here")
        if not 1 <= blocks < 1 << 31:
            refuse(f"a grid of {blocks} blocks")
        if not 1 <= threads <= has["MaxThreadsPerBlock"]:
            refuse(f"blocks of {threads} threads, the device has {has['MaxThreadsPerBlock']}")
        if entry.max_threads is not None and threads > entry.max_threads[0]:
            refuse(f"blocks of {threads} threads, made for {entry.max_threads[0]}")
        if f.most_registers * threads > has["MaxRegistersPerBlock"]:
            refuse(f"{threads} threads of {f.most_registers} registers, the device has {has['MaxRegistersPerBlock']}")
        if not 0 <= shared <= f.most_dynamic:
            refuse(f"{shared} bytes of shared memory, the function's attribute allows {f.most_dynamic}")
        if len(params) != entry.parameter_bytes:
            refuse(f"{len(params)} bytes of parameters, the kernel takes {entry.parameter_bytes}")
        if blocks % f.cluster:
            refuse(f"a grid of {blocks} blocks has no clusters of {f.cluster}")
        if not cooperative and f.cluster == 1:
            return
        room = self.blocks_of(f, threads, shared) * has["MultiProcessorCount"]
        if f.cluster > room:
            refuse(f"clusters of {f.cluster} blocks, there is room for {room}")
        if cooperative and blocks > room:
            refuse(f"a cooperative grid of {blocks} blocks, there is room for {room}")

    def launch(
        self, f: Function, grid: tuple[int, ...], block: tuple[int, ...], params: bytes, shared: int,
        cooperative: bool, stream: Any = None,
    ) -> None:  # fmt: skip
        """Check a launch and run it, or note it where its stream is captured."""
        self.check(f, grid, block, params, shared, cooperative)
        what = Launched(f.name, f.macros, grid[0], block[0], shared, cooperative, self.streams.number(stream))

        def run() -> tuple[list[Any], list[Any]]:
            launch = Launch(
                f.program, grid[0], block[0], params, f.static_shared + shared, self.allocations,
                f.cluster, cooperative, self.schedule,
            )  # fmt: skip
            try:
                launch.run()
            except PtxError as error:
                raise type(error)(f"{f.name}: {error}") from None
            self.launches.append(what)
            self.instructions += launch.instructions
            written = [a for a, stamps in launch.stamps.items() if stamps.written]
            return [a for a in launch.stamps if a not in written], written

        self.streams.submit(run, stream)

    def memset(self, address: int, value: int, size: int, stream: int) -> None:
        """cudaMemsetAsync."""
        import ctypes

        if not size:
            return
        allocation = self.allocations.find(address, size)
        if allocation is None:
            raise DriverError(f"memset: {address:#x} is {self.allocations.why_not(address, size)}")

        def run() -> tuple[list[Any], list[Any]]:
            from tests.simt import host_cupy

            host_cupy.operations["memset"] += 1
            if self.allocations.find(address, size) is None:
                raise DriverError(f"memset: {address:#x} is {self.allocations.why_not(address, size)}")
            ctypes.memset(address, value, size)
            return [], [allocation]

        self.streams.submit(run, stream)
