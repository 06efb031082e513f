"""What the command line says about this machine and this installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np

import fastbn
from fastbn import backend
from fastbn.caches import last_cache
from fastbn.threads import get_num_threads


def describe() -> dict[str, Any]:
    """Versions, backends, processor, threads and the folder of compiled kernels, as plain data."""
    return {
        "versions": {
            "fastbn": fastbn.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": importlib.metadata.version("numba"),
            "llvmlite": llvmlite.__version__,
        },
        "backends": {kind: backend_state(kind) for kind in ("numpy", "cupy")},
        "dtypes": list(float_dtypes()),
        "left_out": left_out(),
        "cpu": cpu_model(),
        "cache_bytes": last_cache(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": get_num_threads(),
        "threading_layer": threading_layer(),
        "shipped_kernels": shipped_kernels(),
        "kernel_cache": kernel_cache(),
    }


def backend_state(kind: str) -> str:
    """'ready', or why there is no backend for arrays of this kind; a library that is not installed is not imported."""
    if importlib.util.find_spec(kind) is None:
        return "not installed"
    try:
        backend.backend_of(kind)
        if kind == "cupy":
            importlib.import_module("fastbn.cuda.launch").device(0)
    except Exception as error:  # a CUDA library without its driver raises what it likes
        return f"installed, but not usable: {error}"
    return "ready"


def ready_backends() -> list[str]:
    return [kind for kind in ("numpy", "cupy") if backend_state(kind) == "ready"]


@lru_cache
def float_dtypes() -> dict[str, np.dtype[Any]]:
    """The dtypes that can be computed on here, by name; bfloat16 comes with ml_dtypes."""
    dtypes = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
    ml_dtypes = optional("ml_dtypes")
    return dtypes if ml_dtypes is None else dtypes | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def left_out() -> list[str]:
    """What the checks and measurements leave out on this installation, and why."""
    missing = [] if "bfloat16" in float_dtypes() else ["bfloat16: ml_dtypes is not installed"]
    return missing if importlib.util.find_spec("torch") else [*missing, "PyTorch's figures: torch is not installed"]


def optional(name: str) -> Any:
    """A module, or None where it is not installed or does not load."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def torch_with_our_threads() -> Any:
    """PyTorch on as many threads as fastbn uses, or None."""
    torch = optional("torch")
    if torch is not None:
        torch.set_num_threads(get_num_threads())
    return torch


def cpu_model() -> str:
    """The processor's name as its vendor gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def threading_layer() -> str:
    """Whose threads run kernels. Numba's layer is chosen by the first parallel call, which is made here."""
    from fastbn.cpu import team

    if get_num_threads() == 1:
        return "none: one thread"
    if team.here:
        return "fastbn's own"
    fastbn.mean(np.zeros(1 << 18, np.float32))
    return f"Numba's: {importlib.import_module('numba').threading_layer()}"


def shipped_kernels() -> str:
    """How many kernels came with this installation, for which level of processors."""
    from fastbn.cpu import code

    archive, level = code.archive(), code.level_here()
    if archive is None or not archive.path.exists():
        return "none came with this installation" if level else "none for processors without AVX2"
    return f"{len(archive)} came with this installation, for {level}" if len(archive) else "of other sources: not used"


def kernel_cache() -> str | None:
    """The folder that keeps compiled kernels between processes; None where no folder can be written."""
    from fastbn.cpu.code import version
    from fastbn.cpu.store import store_of

    store = store_of(version())
    return None if store is None else str(store.folder)
