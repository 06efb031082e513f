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
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np


class Chip(NamedTuple):
    """A device of a compute capability, where the planner depends on more than that."""

    processors: int
    shared: int
    threads: int
    """Of one multiprocessor."""


CHIPS = {
    70: Chip(80, 96 << 10, 2048),
    75: Chip(40, 64 << 10, 1024),
    80: Chip(108, 163 << 10, 2048),
    86: Chip(84, 99 << 10, 1536),
    89: Chip(128, 99 << 10, 1536),
    90: Chip(132, 227 << 10, 2048),
    100: Chip(148, 227 << 10, 2048),
    120: Chip(170, 99 << 10, 1536),
}
DTYPES = (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool",
)  # fmt: skip
ITEMSIZES = (2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1)
ROWS = (25, 49, 169, 196)  # elements of a channel's row that vectors of 16 bytes run across, of some dtype
REGISTERS = 65536  # of a multiprocessor


# --- what there is to compile with ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def available() -> str | None:
    """None, or why kernels cannot be compiled and read here."""
    try:
        import cupy  # noqa: F401 - whether it can be
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        nvrtc.getVersion()
    except Exception as error:  # the loader's errors differ by version
        return f"NVRTC cannot be loaded: {error}"
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


# --- what there is to compile -----------------------------------------------------------------------------------------


class Variant(NamedTuple):
    kernel: str
    macros: tuple[tuple[str, int], ...]

    def __getitem__(self, name: Any) -> Any:
        """A macro's value; what a kernel of plain numbers has not is 0, its numbers have any dtype."""
        return dict(self.macros).get(name, 0) if isinstance(name, str) else tuple.__getitem__(self, name)

    @property
    def of_numbers(self) -> bool:
        """Whether it works on numbers of channels alone, whose types it is told when it runs."""
        return "DTYPE" not in dict(self.macros)

    @property
    def strided(self) -> bool:
        """Whether it is of statistics of arrays as they lie, whose results have any dtype."""
        return "strided" in self.kernel

    @property
    def divisions(self) -> int:
        """Of floats, by a subroutine: in the one place where bits are to be NumPy's, for a number of each channel."""
        return int(self.kernel == "update_running")

    @property
    def vector_bits(self) -> int:
        return 8 * self["VECTOR"] * ITEMSIZES[self["DTYPE"]]

    @property
    def transfers(self) -> tuple[int, int]:
        """Loads and stores of vectors that a chunk takes."""
        if self.kernel.startswith("finish") or self.of_numbers:
            return 0, 0
        if self.strided:
            return self["ITEMS_PER_THREAD"], 0
        relu, residual = self["RELU"], self["RESIDUAL"]
        if self.kernel in ("statistics", "forward", "normalize"):
            loads, stores = 1 + residual, self.kernel != "statistics"
        else:
            loads, stores = 2 + relu, 0 if self.kernel == "grad_sums" else 1 + residual
        return loads * self["ITEMS_PER_THREAD"], stores * self["ITEMS_PER_THREAD"]

    def __str__(self) -> str:
        if self.of_numbers or self.strided:
            return f"{self.kernel}, {', '.join(f'{name} {value}' for name, value in self.macros)}"
        layout = (
            "channels-last" if self["ALONG_CHANNELS"] else f"rows of {self['RUN']}" if self["RUN"] else "channels-first"
        )
        options = ", ".join(f"{name} {self[name]}" for name in ("WEIGHT", "RELU", "RESIDUAL", "WIDE") if self[name])
        cluster = f", CLUSTER {self['CLUSTER']}" if self["CLUSTER"] > 1 else ""
        sizes = ", ".join(f"{name} {self[name]}" for name in ("VECTOR", "LANES", "THREADS", "ITEMS_PER_THREAD"))
        return f"{self.kernel} {DTYPES[self['DTYPE']]} {layout}, {sizes}{cluster}{options and f', {options}'}"


@lru_cache(maxsize=16)
def planned(architecture: int) -> tuple[Variant, ...]:
    """All that the planner asks for, over a grid of problems, with every choice of options: widest loads first."""
    from fastbn.cuda import launch, plans

    found: set[tuple[str, launch.Macros]] = set()

    def function(_number: int, kernel: str, macros: launch.Macros) -> None:
        found.add((kernel, macros))

    with (
        mock.patch.object(launch, "function", function),
        mock.patch.object(launch, "blocks_per_processor", return_value=2),
        mock.patch.dict(plans.FORCED),
    ):
        for problem in _problems(architecture):
            for choose in (plans.moments, plans.grad_sums, plans.normalize, plans.grad_input):
                choose.__wrapped__(problem)
            for choose, strategy in itertools.product((plans.forward, plans.backward), (None, *plans.STRATEGIES)):
                plans.FORCED["strategy"] = strategy
                choose.__wrapped__(problem)
        plans.update_running.__wrapped__(problem.device, 12, (3,) * 5, skip_nonfinite=False)
    variants = set()
    for kernel, macros in found:
        known = dict(macros)
        options = {"WEIGHT": (1, 2) if known.get("WEIGHT") else (0,), "RELU": (0, 1), "RESIDUAL": (0, 1)}
        fixed = ("RESIDUAL",) if known.get("RUN") else ()  # on which the number of vectors depends
        here = [name for name in options if name in launch.OPTIONAL[kernel] and name not in fixed]
        for values in itertools.product(*(options[name] for name in here)):
            changed = dict(zip(here, values, strict=True))
            variants.add(Variant(kernel, tuple((name, changed.get(name, value)) for name, value in macros)))
    first = ("VECTOR", "ITEMS_PER_THREAD", "THREADS")
    return tuple(sorted(variants, key=lambda v: (v.kernel, *(-v[name] for name in first), v.macros)))


def _problems(architecture: int) -> Iterator[Any]:
    """Problems for which the planner comes to all it can: sizes from a block's to 2^31 vectors, all alignments."""
    from fastbn.cuda import launch, problems

    chip = CHIPS[architecture]
    device = launch.Device(0, architecture, chip.processors, chip.shared)
    for dtype, itemsize in enumerate(ITEMSIZES[:4]):
        offs = [off for off in (0, 2, 4, 8) if off % itemsize == 0]
        reduced = (8, 1 << 8, 1 << 12, 1 << 17, 1 << 23, 1 << 36)
        lasts = itertools.product((1, 2, 4, 8, 16, 32, 64), reduced)
        shapes = [(True, channels, n) for channels, n in lasts] + [(False, 64, n) for n in reduced]
        for (along, channels, n), off, weight in itertools.product(shapes, offs, (0, 2)):
            strides = (0, 0, 1, channels) if along else (0, 0, n, 1)
            operands = (("x", problems.Operand(strides, off)),)
            yield problems.Problem(
                device, (1, 1, channels, n), dtype, itemsize, operands, weight, strides, (), relu=False, residual=False
            )
        for samples, n, residual in itertools.product((1, 32, 1 << 14), ROWS, (False, True)):
            operands = (("x", problems.Operand((0, 64 * n, n, 1), 0)),)
            yield problems.Problem(
                device, (1, samples, 64, n), dtype, itemsize, operands, 0, (), (), relu=False, residual=residual
            )


def covering(variants: Iterable[Variant], factors: Callable[[Variant], tuple[Any, ...]]) -> tuple[Variant, ...]:
    """Some of the variants, in which every pair of values of two factors occurs that occurs in any."""
    candidates = tuple(variants)
    numbers: dict[Any, int] = {}
    rows = [
        [numbers.setdefault((i, j, a, b), len(numbers)) for (i, a), (j, b) in itertools.combinations(values, 2)]
        for values in (tuple(enumerate(factors(variant))) for variant in candidates)
    ]
    pairs, missing = np.array(rows), np.ones(len(numbers), bool)
    chosen = []
    while missing.any():
        best = int(missing[pairs].sum(1).argmax())  # the first of the best
        missing[pairs[best]] = False
        chosen.append(candidates[best])
    return tuple(chosen)


@lru_cache(maxsize=16)
def pairwise(architecture: int) -> tuple[Variant, ...]:
    """Every pair of a kernel, dtype, layout, size or option that the planner can ask for together."""
    variants = planned(architecture)
    names = dict.fromkeys(name for variant in variants for name, _ in variant.macros)
    return covering(variants, lambda variant: (variant.kernel, *(variant[name] for name in names)))


@lru_cache(maxsize=16)
def hot(architecture: int) -> tuple[Variant, ...]:
    """Of each kernel what large arrays get: the widest loads, full blocks; every dtype and layout with each option."""
    every = [v for v in planned(architecture) if any(v.transfers) and not v["WIDE"] and v["CLUSTER"] == 1]
    like: dict[Any, Variant] = {}
    for v in every:  # the first of a kind has the widest loads and the most threads; of these the most lanes
        key = (v.kernel, *(v[name] for name in ("DTYPE", "ALONG_CHANNELS", "WEIGHT", "RELU", "RESIDUAL")))
        sizes = [
            tuple(w[name] for name in ("VECTOR", "ITEMS_PER_THREAD", "THREADS", "LANES")) for w in (like.get(key, v), v)
        ]
        like[key] = max(zip(sizes, (like.get(key, v), v), strict=True))[1]
    return covering(
        like.values(),
        lambda v: ((v.kernel, v["DTYPE"], v["ALONG_CHANNELS"]), *(v[name] for name in ("WEIGHT", "RELU", "RESIDUAL"))),
    )


def chosen(architecture: int, *, full: bool) -> tuple[Variant, ...]:
    """What is compiled for an architecture."""
    from tests.cuda.variants import of_statistics

    more = hot(architecture) if full else ()
    return tuple(dict.fromkeys(pairwise(architecture) + more + of_statistics(architecture)))


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
    options = (*launch.OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros))
    cubin, log = _compile(text, (*options, *options_of_cupy(architecture), "-Xptxas", "-v"), "cubin")
    registers = _numbers(r"Used (\d+) registers", log)
    stack, stores, loads = _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = _numbers(r"(\d+) bytes smem", log) if " bytes smem" in log else [0]
    code = _disassembled(cubin)
    if code is not None:
        accesses = [_widths(code, name) for name in ("LDG", "STG", "LDL", "STL")]
    else:  # the disassembler has forgotten this architecture
        ptx, _ = _compile(text, (*options, *_for_ptx(options_of_cupy(architecture))), "ptx")
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

    options = (*launch.OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros))
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


def _for_ptx(options: tuple[str, ...]) -> tuple[str, ...]:
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
    if code.float_divisions > variant.divisions:
        found.append(f"{code.float_divisions} calls of floating-point subroutines")
    if variant.of_numbers:
        return found
    bits = variant.vector_bits
    for what, widths, wanted in zip(("load", "store"), (code.loads, code.stores), variant.transfers, strict=True):
        if widths.get(bits, 0) < wanted:
            found.append(f"{widths.get(bits, 0)} {what}s of {bits} bits, not {wanted}: {dict(sorted(widths.items()))}")
        if wider := sum(n for width, n in widths.items() if width > max(bits, 64)):
            found.append(f"{wider} {what}s wider than arrays are aligned")
    narrow = sum(n for width, n in code.stores.items() if width < min(bits, 64))
    if narrow and not variant.strided:
        found.append(f"{narrow} stores narrower than {min(bits, 64)} bits")
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
        _compile(text, (*launch.OPTIONS, *options, *_for_ptx(options_of_cupy(80))), "ptx")
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
    weight = ("", "bool weight", "weight")[variant["WEIGHT"]]
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
