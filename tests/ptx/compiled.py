"""Kernels as NVRTC compiles them for a GPU: the PTX text and registers, kept on disk."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import lru_cache

from tests import cuda_compile
from tests.simt import simt


@lru_cache(maxsize=1024)
def ptx(source: str, options: tuple[str, ...], architecture: int) -> str:
    """The text, as CuPy's options make it. That of the machine code is the same: a test compares."""
    return _kept("ptx", source, (*options, *cuda_compile.for_ptx(cuda_compile.options_of_cupy(architecture))))


@lru_cache(maxsize=1024)
def registers(source: str, options: tuple[str, ...], architecture: int) -> int:
    """Of a thread, in the machine code; ptxas takes as long as the compiler."""
    every = (*options, *cuda_compile.options_of_cupy(architecture), "-Xptxas", "-v")
    found = re.search(r"Used (\d+) registers", log := _kept("log", source, every))
    if found is None:
        raise simt.CompileError(f"ptxas said nothing of registers:\n{log}")
    return int(found[1])


def _kept(what: str, source: str, options: tuple[str, ...]) -> str:
    """The PTX or the log of a compilation, from disk where it was done before."""
    from cupy_backends.cuda.libs import nvrtc

    key = hashlib.sha256(repr((source, options, nvrtc.getVersion())).encode()).hexdigest()[:32]
    file = simt.cache() / f"{key}.{what}"
    if file.exists():
        return file.read_text()
    text, log = compiled(source, options)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
        whole.write(text if what == "ptx" else log)
    os.replace(whole.name, file)  # at once: other processes may look for it
    return file.read_text()


def compiled(source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """PTX and log of a compilation."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
        text, log = nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise simt.CompileError(f"{error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    return (text if isinstance(text, str) else text.decode()).rstrip("\0"), log
