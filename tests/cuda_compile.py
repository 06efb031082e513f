"""What NVRTC makes of the CUDA kernels, without a GPU: registers, spills, widths of loads and stores.

    python -m tests.cuda_compile --arch 80 90

compiles every kind of kernel that the planner can ask for, prints a table, and fails where a gate does. --full compiles
several times as many. Options and macros are those of `launch.function` and of CuPy itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.cuda_variants import (
    CHIPS,
    DTYPES,
    REGISTERS,
    Variant,
    chosen,
)

# --- what there is to compile with ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def without_compiler() -> str | None:
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


def available() -> str | None:
    """None, or why kernels cannot be compiled and read here."""
    if reason := without_compiler():
        return reason
    return None if nvdisasm() else "nvdisasm was not found; PyPI has it as nvidia-cuda-nvdisasm"


@lru_cache(maxsize=1)
def nvdisasm() -> str | None:
    """The disassembler: on the path, or where PyPI's package leaves it."""
    found = shutil.which("nvdisasm")
    with contextlib.suppress(ImportError):
        packages = importlib.import_module("nvidia").__path__
        found = found or next((str(file) for at in packages for file in Path(at).glob("*/bin/nvdisasm")), None)
    return found


@lru_cache(maxsize=16)
def compiles_for(architecture: int) -> bool:
    """Whether this NVRTC still, or already, knows an architecture."""
    from cupy.cuda import compiler

    try:
        _compile("", options_of_cupy(architecture), "cubin")
    except compiler.CompileException as error:
        if "architecture" in str(error):
            return False
        raise
    return True


@lru_cache(maxsize=16)
def options_of_cupy(architecture: int) -> tuple[str, ...]:
    """The options that a `cupy.RawKernel` adds to its own, asked of CuPy: they change rounding and registers."""
    from cupy.cuda import compiler

    class Found(Exception):  # noqa: N818 - no error: it carries the options out
        pass

    class Recorder:
        def __init__(self, *_: object, method: str = "ptx", **__: object) -> None:
            self.method = method

        def compile(self, options: tuple[str, ...], _log: object = None) -> tuple[bytes, None]:
            if self.method == "cubin":
                raise Found(options)
            return b"", None  # CuPy first preprocesses an empty file

    with (
        mock.patch.object(compiler, "_NVRTCProgram", Recorder),
        mock.patch.object(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin")),
        mock.patch.object(compiler, "_empty_file_preprocess_cache", {}),
        contextlib.suppress(Found),
    ):
        try:
            compiler._compile_with_cache_cuda("", (), str(architecture), cache_in_memory=True)
        except Found as found:
            return tuple(found.args[0])
    raise AssertionError("CuPy compiles in a way that is not known here")


def _compile(text: str, options: tuple[str, ...], method: str) -> tuple[Any, str]:
    from cupy.cuda import compiler

    log = io.StringIO()
    code, _ = compiler._NVRTCProgram(text, "kernel.cu", method=method).compile(options, log)
    return code, log.getvalue()


# --- what became of it ------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    """Static shared memory."""
    size: int
    loads: dict[int, int]
    """Loads from global memory by their bits."""
    stores: dict[int, int]
    local: int
    """Accesses to local memory: indexed arrays and spills."""
    integer_divisions: int
    float_divisions: int
    """Calls of subroutines."""
    bounds: bool
    """Whether the code was made for blocks, and clusters, of this size."""

    def blocks(self, threads: int, architecture: int) -> int:
        """Blocks of a multiprocessor for which there are registers and threads."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // of_warp // 4 * 4 // (threads // 32), CHIPS[architecture].threads // threads)


def compiled(variant: Variant, architecture: int, text: str | None = None) -> Compiled:
    """Compile a variant as `launch.function` does, or another text in its place."""
    from fastbn.cuda import launch

    text = launch.source(variant.kernel) if text is None else text
    options = (*launch.COMPILER_OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros))
    cubin, log = _compile(text, (*options, *options_of_cupy(architecture), "-Xptxas", "-v"), "cubin")
    registers = _numbers(r"Used (\d+) registers", log)
    stack, stores, loads = _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = _numbers(r"(\d+) bytes smem", log) if " bytes smem" in log else [0]
    code = _disassembled(cubin)
    if code is not None:
        accesses = [_widths(code, name) for name in ("LDG", "STG", "LDL", "STL")]
    else:  # the disassembler has forgotten this architecture
        ptx, _ = _compile(text, (*options, *for_ptx(options_of_cupy(architecture))), "ptx")
        code = ptx if isinstance(ptx, str) else ptx.decode()
        accesses = [_ptx_widths(code, name) for name in ("ld.global", "st.global", "ld.local", "st.local")]
    divisions = [name for name in re.findall(r"CALL\.\S+ ([^;]*)", code) if re.search("div|rem|rcp|sqrt", name)]
    integer = sum(1 for name in divisions if re.search(r"[us](32|64)\b", name))
    return Compiled(
        registers[0], stack, stores, loads, shared[0], len(cubin), accesses[0], accesses[1],
        sum(accesses[2].values()) + sum(accesses[3].values()), integer, len(divisions) - integer,
        _made_for(cubin, variant, architecture),
    )  # fmt: skip


def disassembly(variant: Variant, architecture: int, change: Callable[[str], str] = str) -> str:
    """The instructions of a variant, or of what a change makes of its text."""
    from fastbn.cuda import launch

    options = (*launch.COMPILER_OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros))
    cubin, _ = _compile(change(launch.source(variant.kernel)), (*options, *options_of_cupy(architecture)), "cubin")
    code = _disassembled(cubin)
    if code is None:
        raise LookupError(f"the disassembler does not know sm_{architecture}")
    return code


def _numbers(pattern: str, log: str) -> list[int]:
    found = re.search(pattern, log)
    if found is None:
        raise AssertionError(f"ptxas said nothing like {pattern!r}:\n{log}")
    return [int(number) for number in found.groups()]


def _disassembled(cubin: bytes) -> str | None:
    """The instructions of a cubin, or None where nvdisasm does not know the architecture."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin + b"\0")  # CuPy takes off the last byte, as of a string
        command = [str(nvdisasm()), "-c", "-ndf", str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode and re.search(r"architecture .* (deprecated|not supported|unsupported)", run.stderr):
        return None
    if run.returncode:
        raise AssertionError(run.stderr)
    return run.stdout


def _widths(code: str, instruction: str) -> dict[int, int]:
    """How often an instruction occurs, by the bits that it moves."""
    widths: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*) ", code):
        named = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in modifiers.split("."))
        widths[next((int(found[1]) for found in named if found), 32)] += 1
    return dict(widths)


def _ptx_widths(code: str, instruction: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for times, bits in re.findall(rf"\b{re.escape(instruction)}(?:\.(?!v\d)[a-z]+)*(?:\.v(\d))?\.[busf](\d+)", code):
        widths[int(times or 1) * int(bits)] += 1
    return dict(widths)


def for_ptx(options: tuple[str, ...]) -> tuple[str, ...]:
    """The same options, for PTX alone."""
    return tuple(option.replace("-arch=sm_", "-arch=compute_") for option in options)


def _made_for(cubin: bytes, variant: Variant, architecture: int) -> bool:
    """Whether the attributes in a cubin say what __launch_bounds__ and __cluster_dims__ should have said."""
    max_threads, blocks_of_cluster = 0x05, 0x3D  # EIATTR_MAX_THREADS, EIATTR_CTA_PER_CLUSTER
    wanted = [(max_threads, variant["THREADS"])]
    if variant["CLUSTER"] > 1 and architecture >= 90:
        wanted.append((blocks_of_cluster, variant["CLUSTER"]))
    return all(struct.pack("<BBH3I", 4, attribute, 12, size, 1, 1) in cubin for attribute, size in wanted)


def complaints(variant: Variant, code: Compiled) -> list[str]:
    """What a compiled variant must not be."""
    found = []
    if code.spill_stores or code.spill_loads:
        found.append(f"{code.spill_stores} bytes of spills stored, {code.spill_loads} loaded")
    if code.stack or code.local:
        found.append(f"{code.stack} bytes of local memory, {code.local} accesses to it")
    if code.registers > REGISTERS // variant["THREADS"]:
        found.append(f"{code.registers} registers: no block of {variant['THREADS']} threads fits")
    if not code.bounds:
        found.append("not made for blocks or clusters of this size")
    if code.float_divisions > variant.updates:
        found.append(f"{code.float_divisions} calls of floating-point subroutines")
    if variant.of_numbers:
        return found
    bits = variant.vector_bits
    for what, widths, wanted in zip(("load", "store"), (code.loads, code.stores), variant.transfers, strict=True):
        if widths.get(bits, 0) < wanted:
            found.append(f"{widths.get(bits, 0)} {what}s of {bits} bits, not {wanted}: {dict(sorted(widths.items()))}")
        if wider := sum(n for width, n in widths.items() if width > max(bits, 64)):
            found.append(f"{wider} {what}s wider than arrays are aligned")
    least = min(bits, 64)
    narrow = sum(n for width, n in code.stores.items() if width < least)
    narrow -= 2 * variant.updates * sum(width < least for width in (16, 32))  # of running statistics
    if narrow > 0 and not variant.strided:
        found.append(f"{narrow} stores narrower than {least} bits")
    return found


def sizeof_params_is(kernel: str, nbytes: int) -> bool:
    """Whether a kernel's argument has this size in C++."""
    from cupy.cuda import compiler

    from fastbn.cuda import launch

    text = f'{launch.source(kernel)}\nstatic_assert(sizeof(Params) == {nbytes}, "another size");'
    sizes = {"VECTOR": 1, "LANES": 1, "THREADS": 32, "ITEMS_PER_THREAD": 1, "CLUSTER": 1, "MIN_BLOCKS": 1}
    sizes |= {"REDUCED": 1, "IN_FLOAT64": 1}
    others = ("DTYPE", "ALONG_CHANNELS", "RUN", "WIDE", "WEIGHT", "RELU", "RESIDUAL")
    others += ("ALONG_KEPT", "MASK", "SKIP_NAN", "SQUARES")
    sizes["SUMS"] = 1
    options = (f"-D{name}={sizes.get(name, 0)}" for name in (*sizes, *others))
    try:
        _compile(text, (*launch.COMPILER_OPTIONS, *options, *for_ptx(options_of_cupy(80))), "ptx")
    except compiler.CompileException as error:
        if "another size" in str(error):
            return False
        raise
    return True


# --- the command ------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'sm':>3} {'kernel':14} {'dtype':8} {'layout':14} {'vector':>6} {'lanes':>5} {'threads':>7} {'items':>5} "
    f"{'cluster':>7} {'options':20} {'regs':>4} {'blocks':>6} {'spills':>6} {'loads':26} {'stores':20} {'div':>3} "
    f"{'kB':>4}"
)


def line(variant: Variant, code: Compiled, architecture: int) -> str:
    """A row of the table; loads and stores are bits x times, blocks those that registers allow."""
    layout = "channels-last" if variant["ALONG_CHANNELS"] else "channels-first"
    layout = f"rows of {variant['RUN']}" if variant["RUN"] else layout
    layout = ("reduced inner", "kept inner")[variant["ALONG_KEPT"]] if variant.strided else layout
    dtype, layout = ("any", "numbers") if variant.of_numbers else (DTYPES[variant["DTYPE"]], layout)
    weight = ("", "bool weight", "weight", "float32 weight")[variant["WEIGHT"]]
    options = ("RELU", "RESIDUAL", "WIDE", "SUMS", "SQUARES", "MASK", "SKIP_NAN", "IN_FLOAT64")
    names = (weight, *(name.lower()[:3] for name in options if variant[name]))
    loads, stores = (" ".join(f"{b}x{n}" for b, n in sorted(w.items())[::-1]) for w in (code.loads, code.stores))
    return (
        f"{architecture:>3} {variant.kernel:14} {dtype:8} {layout:14} {variant['VECTOR']:>6} "
        f"{variant['LANES']:>5} {variant['THREADS']:>7} {variant['ITEMS_PER_THREAD']:>5} {variant['CLUSTER']:>7} "
        f"{' '.join(filter(None, names)):20} {code.registers:>4} {code.blocks(variant['THREADS'], architecture):>6} "
        f"{code.spill_stores:>6} {loads:26} {stores:20} {code.integer_divisions:>3} {code.size >> 10:>4}"
    )


def _progress(items: Iterator[Any], total: int) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{i}/{total}", end="\n" if i == total else "", file=sys.stderr, flush=True)
            yield item
    else:
        yield from tqdm(items, total=total, unit="kernel")


def _one(job: tuple[Variant, int]) -> Compiled:
    return compiled(*job)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=[80, 90], help="compute capabilities")
    parser.add_argument("--full", action="store_true", help="also every option of the widest kernels")
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args(arguments)
    if (reason := available()) is not None:
        print(reason, file=sys.stderr)
        return 2
    known = [arch for arch in options.arch if compiles_for(arch)]
    jobs = [
        (variant, arch)
        for arch in known
        for variant in chosen(arch, full=options.full)
        if options.kernel is None or variant.kernel in options.kernel
    ]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        results = list(_progress(pool.map(_one, jobs), len(jobs)))
    print(HEADER)
    failures = 0
    for (variant, arch), code in sorted(zip(jobs, results, strict=True), key=lambda item: (item[0][1], item[0][0])):
        print(line(variant, code, arch))
        for complaint in complaints(variant, code):
            print(f"    FAILS: {complaint}")
            failures += 1
    missing = sorted(set(options.arch) - set(known))
    print(f"{len(jobs)} kernels, {failures} failures" + (f"; this NVRTC does not know {missing}" if missing else ""))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
