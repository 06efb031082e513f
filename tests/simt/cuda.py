"""fastbn's CUDA backend on the CPU: its dispatch, planner and packing as they are, its kernels as `simt` runs them.

with cuda.installed(processors=3) as emulated:
    y, saved = fastbn.batch_norm(host_cupy.to_cupy(x))
emulated.launches  # what ran
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from fastbn import call
from tests.on_cupy import OnCupy
from tests.simt import host_cupy, simt

__all__ = ["ARCHITECTURE", "SMALL", "Emulated", "Launched", "OnCupy", "available", "forget", "installed"]

ARCHITECTURE = 90
SMALL = {
    "threads": 64, "items_per_thread": 4, "along_channels": 64, "cluster": 4, "shared_share": 1.0, "waves": 1,
    "passes": 2, "split_bytes": 1,
}  # fmt: skip


def available() -> str | None:
    """None, or why kernels cannot be executed here."""
    return simt.available() or host_cupy.available()


class Launched(NamedTuple):
    kernel: str
    macros: dict[str, int]
    grid: int
    threads: int
    shared: int
    cooperative: bool


@dataclass
class Emulated:
    """The device that kernels believe to run on, and what they did."""

    schedule: int = 0
    shared: int = 16 << 10
    """Bytes that a block may have."""
    blocks: int = 2
    """Resident on one multiprocessor."""
    change: Callable[[str, str], str] = lambda kernel, text: text
    """Of a kernel's text, for tests that break it."""
    launches: list[Launched] = field(default_factory=list)
    model: str | None = os.environ.get("FASTBN_SIMT_MODEL")
    """One of `simt.MODELS`."""
    records: int = 0
    """Accesses to memory, at most, that are recorded of a launch."""
    accesses: list[Any] = field(default_factory=list)
    """Of each launch, as `simt.Kernel.recorded` gives them."""

    def function(self, _number: int, kernel: str, macros: Any) -> Any:
        """What `launch.function` gives: a function to launch a kernel with."""
        from fastbn.cuda import launch

        text = self.change(kernel, launch.source(kernel, hardware=False))
        flags = [*(simt.RECORDING if self.records else ()), *(simt.MODELLED if self.model else ())]
        device = self.change("device.cuh", launch.INCLUDE.joinpath("device.cuh").read_text())
        compiled = simt.compile_kernel(text, kernel, dict(macros), [*flags, cluster_barrier(device)])
        cluster = dict(macros).get("CLUSTER", 1)

        def run(grid, block, args, shared_mem=0, stream=None, enable_cooperative_groups=False):
            (argument,) = args
            assert shared_mem <= self.shared
            self.launches.append(
                Launched(kernel, dict(macros), grid[0], block[0], shared_mem, enable_cooperative_groups)
            )
            launch = functools.partial(
                compiled.launch,
                grid[0], block[0], argument.tobytes(), shared_mem, enable_cooperative_groups, cluster, self.schedule,
                self.model,
            )  # fmt: skip
            if self.records:
                self.accesses.append(compiled.recorded(self.records, launch))
            else:
                launch()

        return run


CLUSTER_BARRIER = {
    "barrier.cluster.arrive": "simt_cluster_arrive(true)",
    "barrier.cluster.arrive.release": "simt_cluster_arrive(true)",
    "barrier.cluster.arrive.relaxed": "simt_cluster_arrive(false)",
    "barrier.cluster.wait": "simt_cluster_wait()",
    "barrier.cluster.wait.acquire": "simt_cluster_wait()",
}


def cluster_barrier(device: str) -> str:
    """The flag by which kernels have the cluster's barrier of this text of device.cuh, which the execution replaces."""
    body = device.split("void cluster_barrier() {")[1].split("\n}")[0]
    steps = [step.strip() for asm in re.findall(r'"(\w[^"]*)"', body) for step in asm.replace("\\n\\t", "").split(";")]
    calls = [CLUSTER_BARRIER[step] for step in steps if step and step != "memory"]
    return f"-DSIMT_CLUSTER_BARRIER={', '.join(calls or ['(void)0'])}"


@contextlib.contextmanager
def installed(
    processors: int = 3, shared: int = 16 << 10, tuning: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Emulated]:
    """Kernels for CuPy arrays run on the CPU, as on a device with so many multiprocessors.

    Blocks and registers are small, so that small arrays go every way through the planner and few kernels are compiled.
    """
    from fastbn.cuda import launch, problems

    emulated = Emulated(shared=shared, **settings)
    device = launch.Device(0, ARCHITECTURE, processors, shared)
    chosen = problems.Tuning(**(SMALL | (tuning or {})))
    with pytest.MonkeyPatch.context() as patch, host_cupy.installed():
        patch.setattr(launch, "function", functools.lru_cache(maxsize=None)(emulated.function))
        patch.setattr(launch, "blocks_per_processor", lambda *_: emulated.blocks)
        patch.setattr(launch, "device", lambda _number: device)
        patch.setitem(problems.TUNING, ARCHITECTURE, chosen)
        forget()
        try:
            yield emulated
        finally:
            forget()


PLANNED = ("moments", "grad_sums", "normalize", "grad_input", "forward", "backward", "update_running")


def forget() -> None:
    """Drop all plans."""
    from fastbn.cuda import plans, strided

    call.forget()
    for function in PLANNED:
        getattr(plans, function).cache_clear()
    strided.plan.cache_clear()
