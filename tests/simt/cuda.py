"""fastbn's CUDA backend on the CPU: its dispatch, planner and packing as they are, its kernels as `simt` runs them.

    with cuda.installed(processors=3) as emulated:
        y, saved = fastbn.batch_norm(host_cupy.to_cupy(x))
    emulated.launches  # what ran

`OnCupy` stands for the package in tests written for NumPy arrays: it takes and returns these, over the same memory.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastbn
from fastbn import repeated
from tests.simt import host_cupy, simt

ARCHITECTURE = 90
SMALL = {"threads": 64, "held": 2, "along_channels": 64, "cluster": 4, "shared_share": 1.0, "waves": 1, "passes": 2}


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
    blocks: int = 2
    """Resident on one multiprocessor."""
    change: Callable[[str, str], str] = lambda kernel, text: text
    """Of a kernel's text, for tests that break it."""
    launches: list[Launched] = field(default_factory=list)

    def function(self, _number: int, kernel: str, macros: Any, shared: int) -> Any:
        """What `launch.function` gives: a function to launch a kernel with."""
        from fastbn.cuda import launch

        text = self.change(kernel, launch.source(kernel, hardware=False))
        compiled = simt.compile_kernel(text, kernel, dict(macros))
        cluster = dict(macros)["CLUSTER"]

        def run(grid, block, args, shared_mem=0, stream=None, enable_cooperative_groups=False):
            (argument,) = args
            assert shared_mem == shared
            self.launches.append(
                Launched(kernel, dict(macros), grid[0], block[0], shared_mem, enable_cooperative_groups)
            )
            compiled.launch(
                grid[0], block[0], argument.tobytes(), shared_mem, enable_cooperative_groups, cluster, self.schedule
            )

        return run


@contextlib.contextmanager
def installed(
    processors: int = 3, shared: int = 16 << 10, tuning: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Emulated]:
    """Kernels for CuPy arrays run on the CPU, as on a device with so many multiprocessors.

    Blocks and registers are small, so that small arrays go every way through the planner and few kernels are compiled.
    """
    from fastbn.cuda import launch, plans

    emulated = Emulated(**settings)
    device = launch.Device(0, ARCHITECTURE, processors, shared)
    chosen = plans.Tuning(**(SMALL | (tuning or {})))
    with pytest.MonkeyPatch.context() as patch, host_cupy.installed():
        patch.setattr(launch, "function", functools.lru_cache(maxsize=None)(emulated.function))
        patch.setattr(launch, "blocks_per_processor", lambda *_: emulated.blocks)
        patch.setattr(launch, "device", lambda _number: device)
        patch.setitem(plans.TUNING, ARCHITECTURE, chosen)
        forget()
        try:
            yield emulated
        finally:
            forget()


def forget() -> None:
    """Drop all plans."""
    from fastbn.cuda import plans

    repeated.forget()
    for function in (plans.moments, plans.grad_sums, plans.normalize, plans.grad_input, plans.forward, plans.backward):
        function.cache_clear()


class OnCupy:
    """The package's functions for NumPy arrays, computed on CuPy arrays over their memory."""

    def __init__(self, what: Any = fastbn) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._what, name)
        return OnCupy(value) if callable(value) else value

    def __eq__(self, other: object) -> bool:  # tests keep functions as keys
        return bool(self._what == getattr(other, "_what", other))

    def __hash__(self) -> int:
        return hash(self._what)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        known: dict[int, Any] = {}
        device = _to_device(args, known), _to_device(keywords, known)
        return _to_host(self._what(*device[0], **device[1]), known)


def _to_device(value: Any, known: dict[int, Any]) -> Any:
    if type(value) in (np.ndarray, np.memmap):  # others are refused as they are
        array = host_cupy.to_cupy(value)
        known[id(array)] = value, array  # the array itself too: numbers of dead objects are given again
        return array
    if isinstance(value, dict):
        return {name: _to_device(item, known) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(item, known) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, known) for item in value)
    if callable(value) and not isinstance(value, (type, np.dtype)):  # a gather hook
        return lambda vector: _to_device(value(_to_host(vector, {})), known)
    return value


def _to_host(value: Any, known: dict[int, Any]) -> Any:
    import cupy

    if isinstance(value, cupy.ndarray):
        return known[id(value)][0] if id(value) in known else host_cupy.to_numpy(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_host(item, known) for item in value))
    if isinstance(value, tuple):
        return tuple(_to_host(item, known) for item in value)
    return value
