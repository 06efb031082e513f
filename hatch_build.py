"""Compiled kernels for wheels, by `fastbn.precompile`.

Wheels are made with them from a source distribution, as `python -m build` does. An installation from a clone goes
without: it would take minutes, and developers change the sources. FASTBN_PRECOMPILE=1 asks for them all the same (or
names dtypes, separated by commas), FASTBN_NO_PRECOMPILE=1 for none.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHIVES = "fastbn/cpu/archives"
REQUIRED = ["numpy>=2.1", "numba>=0.62", "ml_dtypes>=0.5"]  # to compile; ml_dtypes for arrays of bfloat16


class Precompile(BuildHookInterface):
    """Puts an archive for each level of processors into the wheel, and names the system in its tag."""

    _folder: str | None = None

    def dependencies(self) -> list[str]:
        """What the build environment must have."""
        return REQUIRED if self._wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before files are collected."""
        if version == "editable" or not self._wanted():
            return
        self._folder = tempfile.mkdtemp(prefix="fastbn-")
        asked = os.environ.get("FASTBN_PRECOMPILE", "1")
        dtypes = [] if asked == "1" else [f"--dtype={name.strip()}" for name in asked.split(",")]
        self.app.display_info("Compiling kernels, some minutes; FASTBN_NO_PRECOMPILE=1 goes without")
        command = [sys.executable, "-m", "fastbn.precompile", self._folder, *dtypes]
        path = os.pathsep.join(filter(None, (self.root, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": os.path.join(self._folder, "cache")}
        subprocess.run(command, cwd=self._folder, env=environment, check=True)
        levels = [entry for entry in Path(self._folder).iterdir() if entry.is_file()]
        build_data["force_include"] |= {str(level): f"{ARCHIVES}/{level.name}" for level in levels}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{system()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _wanted(self) -> bool:
        if self.target_name != "wheel" or os.environ.get("FASTBN_NO_PRECOMPILE", "0") not in ("", "0"):
            return False
        from_distribution = os.path.exists(os.path.join(self.root, "PKG-INFO"))  # which a clone does not have
        return from_distribution or os.environ.get("FASTBN_PRECOMPILE", "0") not in ("", "0")


def system() -> str:
    """The wheel's system, as loosely as its code is tied to one.

    Kernels call ten functions of the C library (`nm -u`: memset, and the team's system calls, locks and clock), by
    names without versions. The oldest glibc that has them all is 2.17; macOS is as old as Numba's wheels ask for.
    """
    machine = platform.machine()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        return f"manylinux_2_17_{machine}"
    if sys.platform == "darwin":
        return "macosx_11_0_arm64" if machine == "arm64" else "macosx_10_15_x86_64"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
