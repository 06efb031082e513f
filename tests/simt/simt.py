"""CUDA kernels on the CPU: their text compiles as C++, and every thread of a block runs as a fiber.

`emulation.h` says what the text may use, `runtime.cpp` in which order threads run: an integer, the schedule, chooses
it. Of two accesses to memory that no barrier orders, each comes first in one of schedules 0 and 1; from 2 on the order
is random. The same launch takes the same order again. Accesses may be held against PTX's model of memory: see `MODELS`.

Sanitizers find accesses outside of arrays and of shared memory, misaligned ones, and undefined behaviour; they report
and end the process:

    FASTBN_SIMT_FLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" \\
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \\
    LD_PRELOAD="$(g++ -print-file-name=libasan.so)" python -m pytest -n 0 tests/FILE.py
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",  # kernels read arrays as vectors
    "-fno-math-errno",
    "-ffp-contract=off",  # what is not written as fma is rounded twice, on every machine
    "-Werror=frame-larger-than=32768",  # stacks have 64 kB and nothing behind them
)
RUNTIME_FLAGS = ("-O2",)
KERNEL_FLAGS = ("-O0",)  # compiling takes half of the time of -O1, more than running loses

MAX_THREADS = 1024


class SimtError(RuntimeError):
    """A launch that did what kernels must not do."""


class CompileError(RuntimeError):
    pass


def available() -> str | None:
    """None where kernels can be compiled and run, otherwise why not."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"fibers are written for Linux on x86_64 and aarch64, not {platform.system()} on {platform.machine()}"
    if compiler() is None:
        return "neither g++ nor c++ is installed"
    return None


class Kernel:
    """A compiled kernel. `compile_kernel` makes them."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self._library = load(path)
        self._params_size = ctypes.c_uint.in_dll(self._library, "simt_params_size").value

    def launch(
        self,
        grid: int,
        block: int,
        params: bytes | bytearray | memoryview | ctypes.Structure,
        shared: int = 0,
        cooperative: bool = False,
        cluster: int = 1,
        schedule: int = 0,
        model: str | None = None,
    ) -> None:
        """Run `grid` blocks of `block` threads, with `shared` bytes of shared memory each.

        All blocks are resident together if `cooperative`, otherwise those of a cluster; clusters run one by one.
        `model` is one of `MODELS`, for kernels that were compiled with `MODELLED`.
        """
        raw = memoryview(params).tobytes()
        if len(raw) != self._params_size:
            raise ValueError(f"{self.name} takes {self._params_size} bytes of parameters, not {len(raw)}")
        if not 0 < block <= MAX_THREADS:
            raise ValueError(f"a block has 1 to {MAX_THREADS} threads, not {block}")
        if grid < 1 or cluster < 1 or grid % cluster:
            raise ValueError(f"a grid of {grid} blocks has no clusters of {cluster}")
        if shared < 0 or schedule < 0:
            raise ValueError(f"shared memory ({shared}) and schedule ({schedule}) are not negative")
        resident = grid if cooperative else cluster
        message = ctypes.create_string_buffer(2000)
        with LAUNCHING:
            self._library.simt_model(ctypes.c_uint(MODELS[model]))
            error = self._library.simt_launch(  # of the scheduler that this kernel is linked to
                self._library.simt_entry,
                raw,
                ctypes.c_size_t(len(raw)),
                ctypes.c_uint(grid),
                ctypes.c_uint(block),
                ctypes.c_size_t(shared),
                ctypes.c_uint(resident),
                ctypes.c_uint(cluster),
                ctypes.c_uint(schedule),
                message,
                ctypes.c_size_t(len(message)),
            )
        if error:
            raise SimtError(f"{self.name}: {self._with_lines(message.value.decode())}")

    def _with_lines(self, message: str) -> str:
        """A message in which lines of the kernel, and of those that called them, stand for instructions."""
        offsets = re.findall(r"\{([0-9a-f]+)\}", message)
        tool = shutil.which("addr2line")
        if not offsets or tool is None:
            return message
        command = [tool, "-e", self._library._name, *offsets]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        lines = dict(zip(offsets, (Path(line.split(" ")[0]).name for line in found), strict=True))

        def described(calls: re.Match[str]) -> str:
            names = [lines[offset] for offset in re.findall(r"[0-9a-f]+", calls[0])]
            ours = [name.startswith(("emulation.h", "<stdin>")) for name in names]
            start = ours.index(False) if False in ours else 0
            end = ours.index(True, start) if True in ours[start:] else len(names)
            return " < ".join(names[start:end])

        return re.sub(r"\{[0-9a-f]+\}( < \{[0-9a-f]+\})*", described, message)

    def recorded(self, capacity: int, launch: Callable[[], None]) -> np.ndarray:
        """What `launch` does to memory outside of the threads' own and shared memory: an `ACCESS` each, in order.

        Of kernels that were compiled with `RECORDING`.
        """
        accesses = np.empty(capacity, ACCESS)
        simt_record = self._library.simt_record
        simt_record.restype = ctypes.c_size_t
        simt_record(ctypes.c_void_p(accesses.ctypes.data), ctypes.c_size_t(capacity))
        try:
            launch()
        finally:
            count = simt_record(None, ctypes.c_size_t(0))
        if count > capacity:
            raise SimtError(f"{self.name}: {count} accesses, {capacity} are recorded")
        return accesses[:count]


ACCESS = np.dtype(
    [("instruction", "u8"), ("address", "u8"), ("block", "u4"), ("thread", "u4"), ("bytes", "u4"), ("writes", "u4")]
)
RECORDING = ("-fsanitize=thread",)  # the compiler calls a function at every access; accesses.h has it
MODELS = {None: 0, "checked": 1, "stale": 2}
"""How threads see memory: what others write at once; the same, where accesses that PTX does not order are errors
(races.h); or old values, wherever PTX allows them (stale.h)."""
MODELLED = (*RECORDING, "--param=tsan-distinguish-volatile=1", "-g1", "-gdwarf-4")

LAUNCHING = threading.Lock()  # calls leave Python's lock, and the scheduler's state is one


def compile_kernel(text: str, name: str, macros: Mapping[str, object], flags: Sequence[str] = ()) -> Kernel:
    """The kernel `name` of a text that defines `extern "C" __global__ void name(const Params p)`.

    `macros` are defined before the text; `flags` go to the compiler. Objects are kept in the directory
    FASTBN_SIMT_CACHE, by default one of the user's among temporary files. FASTBN_SIMT_FLAGS adds flags for kernels and
    scheduler.
    """
    reason = available()
    if reason is not None:
        raise CompileError(reason)
    if announces := "-fsanitize=thread" in flags:
        text, flags = ASSIGNMENT.sub(r"\1simt::assign(\2, \3);", text), (*flags, "-fdump-tree-optimized=/dev/stdout")
    runtime = built("runtime", (HERE / "runtime.cpp").read_text(), RUNTIME_FLAGS, ("-x", "none", "-ldl"))
    source = "\n".join(
        [
            '#include "emulation.h"',
            *(f"#define {macro} {value}" for macro, value in macros.items()),
            f'#line 1 "{name}.cu"',
            text,
            f"SIMT_ENTRY({name})",
            "",
        ]
    )
    # The scheduler lies beside the kernel, and launches also one that calls nothing of it.
    # It brings the system's libraries, which to search would be a third of a compilation.
    link = ("-x", "none", "-nodefaultlibs", "-Wl,--no-as-needed", str(runtime), "-Wl,-rpath,$ORIGIN", "-lgcc")
    return Kernel(name, built(name, source, (*KERNEL_FLAGS, *flags), link, UNANNOUNCED if announces else None))


# GCC does not announce that the result of a call is stored, where it comes in memory: a function stores it, whose own
# accesses are announced. What the compiler prints of its work shows whether such a store, or a load of an argument, is
# left.
ASSIGNMENT = re.compile(r"(^ *|[;{)] )(\w+(?:\(\)|\[[^\]]*\]|\.\w+)*) = ((?=[^;]*\()(?![^;]* = )[^;]*);", re.MULTILINE)
UNANNOUNCED = re.compile(
    r"^ +(?:\S*(?:->|\*|MEM)\S* = [\w:~<>, ]+ \(.*\);|.*[\w>] \((?:.*, )?(?:\*|MEM|[^&\s,(]\S*->).*\);.*)$",
    re.MULTILINE,
)


def built(
    name: str, source: str, flags: Sequence[str], link: Sequence[str] = (), refused: re.Pattern[str] | None = None
) -> Path:
    """The shared object of this source, compiled unless there is one. The compiler prints nothing that is refused."""
    command = [compiler(), *FLAGS, *flags, *shlex.split(os.environ.get("FASTBN_SIMT_FLAGS", "")), f"-I{HERE}"]
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    identity = repr((command, compiler_version(), platform.machine(), headers, source, link, refused))
    target = cache() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        output = Path(directory) / target.name
        arguments = ["-x", "c++", "-", *link, f"-Wl,-soname,{target.name}", "-o", str(output)]
        done = subprocess.run([*command, *arguments], input=source, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"{name} does not compile\n{done.stderr}")
        if refused and (line := refused.search(done.stdout)):
            raise CompileError(f"{name}: this access would not be announced: {line[0].strip()}")
        os.replace(output, target)  # whole at once: other processes may look for it, or have just put theirs there
    return target


def cache() -> Path:
    given = os.environ.get("FASTBN_SIMT_CACHE")
    path = Path(given or Path(tempfile.gettempdir()) / f"fastbn-simt-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not given and path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user, whose code would run")
    return path


@functools.cache
def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


@functools.cache
def compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
