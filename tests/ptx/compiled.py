"""Kernels as NVRTC compiles them for a GPU: the PTX text and what ptxas found, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from functools import lru_cache
from typing import NamedTuple

from tests import cuda_compile
from tests.simt import simt


@lru_cache(maxsize=1)
def available() -> str | None:
    """None, or why kernels cannot be compiled here."""
    try:
        import cupy  # noqa: F401 - whether it can be
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        nvrtc.getVersion()
    except Exception as error:  # the loader's errors differ by version
        return f"NVRTC cannot be loaded: {error}"
    return None


class Compiled(NamedTuple):
    ptx: str
    registers: int
    """Of a thread, in the machine code of the same compilation."""


@lru_cache(maxsize=1024)
def compiled(source: str, options: tuple[str, ...], architecture: int) -> Compiled:
    """What CuPy compiles of this source with these options: the machine code's PTX."""
    from cupy_backends.cuda.libs import nvrtc

    every = (*options, *cuda_compile.options_of_cupy(architecture), "-Xptxas", "-v")
    key = hashlib.sha256(repr((source, every, nvrtc.getVersion())).encode()).hexdigest()[:32]
    file = simt.cache() / f"{key}.ptx.json"
    if file.exists():
        return Compiled(*json.loads(file.read_text()))
    program = nvrtc.createProgram(source, "kernel.cu", [], [])
    try:
        nvrtc.compileProgram(program, every)
        ptx, log = nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise simt.CompileError(f"{error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    text = (ptx if isinstance(ptx, str) else ptx.decode()).rstrip("\0")
    found = re.search(r"Used (\d+) registers", log)
    if found is None:
        raise simt.CompileError(f"ptxas said nothing of registers:\n{log}")
    result = Compiled(text, int(found[1]))
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
        json.dump(result, whole)
    os.replace(whole.name, file)  # at once: other processes may look for it
    return result
