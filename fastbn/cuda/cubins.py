"""Machine code for GPUs that need not be here, in CuPy's cache on disk, where a later process on such a GPU finds it.

A file's name there is a hash of the source, the options, the architecture, NVRTC's version and CuPy's headers, which
CuPy alone should compute: kernels go through the function by which `cupy.RawKernel` compiles. It takes an architecture,
and asks for a device in two places only, to choose a form of code and to load what it compiled. These are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from fastbn.cuda import launch, requirements
from fastbn.cuda.launch import Kernel

cupy = requirements.cupy()


class Job(NamedTuple):
    """A kernel that is being compiled."""

    name: str
    run: Callable[[], None]
    """Waits for it."""


def folder() -> Path | None:
    """Where CuPy keeps machine code; None where it is told not to."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return None
    return Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()


def count() -> int:
    """How many files of machine code are there."""
    kept = folder()
    return 0 if kept is None else sum(1 for _ in kept.glob("*.cubin"))


@contextmanager
def compiling(kernels: Sequence[Kernel], architecture: int, threads: int) -> Iterator[list[Job]]:
    """Jobs of kernels for an architecture, so many at once; of what is on disk already there is nothing to do.

    Threads will do: CuPy lets go of the interpreter while NVRTC compiles, which has no lock of its own.
    """
    with requirements.needing_compiler():
        # Of later architectures CuPy takes the newest that NVRTC knows.
        most = int(cupy.cuda.compiler._get_max_compute_capability())
    workers = ThreadPoolExecutor(threads)
    try:
        with _without_device():
            futures = [workers.submit(_compile, kernel, min(architecture, most)) for kernel in kernels]
            yield [
                Job(f"sm_{architecture} {kernel.name}", future.result)
                for kernel, future in zip(kernels, futures, strict=True)
            ]
    finally:
        workers.shutdown(cancel_futures=True)


def _compile(kernel: Kernel, architecture: int) -> None:
    try:
        with requirements.needing_compiler():
            cupy._core.core.compile_with_cache(
                launch.source(kernel.name), kernel.options, arch=str(architecture), prepend_cupy_headers=False
            )
    except cupy.cuda.compiler.CompileException as error:
        if "architecture" not in str(error):
            raise
        version = ".".join(map(str, cupy.cuda.compiler._get_nvrtc_version()))
        raise ValueError(f"sm_{architecture}: expected an architecture that NVRTC {version} compiles for") from error


@contextmanager
def _without_device() -> Iterator[None]:
    """CuPy's compiler asks for no device, and loads nothing."""
    compiler: Any = cupy.cuda.compiler

    class Unloaded(compiler.function.Module):  # type: ignore[misc]  # CuPy has no types
        def load(self, code: bytes) -> None: ...

    class Functions:
        Module = Unloaded

    with (
        mock.patch.object(
            compiler, "_get_arch_for_options_for_nvrtc", compiler._get_arch_for_options_for_nvrtc.__wrapped__
        ),
        mock.patch.object(compiler, "function", Functions),
    ):
        yield
