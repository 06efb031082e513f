"""Processors that LLVM makes code for."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import llvmlite.binding as llvm


def machine_for(level: str | None) -> Any:
    """What LLVM makes code for: a level of processors as LLVM names it, or this one."""
    target = llvm.Target.from_triple(llvm.get_process_triple())
    cpu, features = processor() if level is None else (level, "")
    reloc = "static" if target.name.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )


@cache
def processor() -> tuple[str, str]:
    """Its name and features, or those that Numba is told to make code for."""
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # where LLVM cannot ask
        features = ""
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    return name, os.environ.get("NUMBA_CPU_FEATURES") or ("" if "NUMBA_CPU_NAME" in os.environ else features)
