"""Small kernels for tests of the execution itself."""

import os

import numpy as np

from tests.simt import simt

TYPES = {
    "float32": "float",
    "float64": "double",
    "int32": "int",
    "uint32": "unsigned",
    "uint16": "unsigned short",
    "uint64": "unsigned long long",
}
HARMLESS = (0, 1, 2, 3)  # schedules by which correct kernels run
CATCHING = (0, 1, 2)  # of which one at least must find a missing barrier
SANITIZED = "-fsanitize" in os.environ.get("FASTBN_SIMT_FLAGS", "")


def text(body, *arrays, before=""):
    """A kernel whose arguments are the pointers a, b, c, ..."""
    members = "".join(f"{TYPES[array.dtype.name]}* {name};" for name, array in zip("abcdef", arrays, strict=False))
    locals_ = "".join(f"auto* {name} = p.{name};" for name, _ in zip("abcdef", arrays, strict=False))
    return f"""
        {before}
        struct Params {{ {members} long long size; }};
        extern "C" __global__ void __launch_bounds__(1024) kernel(const Params p) {{
            {locals_}
            const unsigned thread = threadIdx.x, lane = thread % 32, block = blockIdx.x, threads = blockDim.x;
            const unsigned index = block * threads + thread;
            (void)lane, (void)index;
            {body}
        }}"""


def execute(body, *arrays, grid=1, block=32, size=0, macros=None, before="", flags=(), **options):
    kernel = simt.compile_kernel(text(body, *arrays, before=before), "kernel", macros or {}, flags)
    pointers = [array.ctypes.data for array in arrays]
    kernel.launch(grid, block, np.array([*pointers, size], np.uint64).data, **options)
    return arrays[0]


def numbers(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


REVERSE = """
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    shared[thread] = b[thread];
    BARRIER;
    a[thread] = shared[threads - 1 - thread];"""
