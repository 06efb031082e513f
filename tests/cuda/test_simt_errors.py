"""What the execution of CUDA kernels on the CPU reports: errors of kernels, texts and launches; under sanitizers."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import interpreters
from tests.simt import simt
from tests.simt.programs import HARMLESS, SANITIZED, execute, text

pytestmark = pytest.mark.skipif(simt.available() is not None, reason=f"no CUDA on this CPU: {simt.available()}")

# --- what is reported -------------------------------------------------------------------------------------------------

POLL = "while (*reinterpret_cast<volatile unsigned*>(b) < 64)"
SPINS = r"deadlock: spinning 1 \(block 0, thread [03]\)"
WRITE = "dynamic_shared()[static_cast<int>(p.size)] = 1;"
CLUSTER = {"grid": 2, "cluster": 2}

ERRORS = {
    "spins": (f"if (thread == 0) {POLL} backoff();", SPINS, {}),
    "spins for a block that is not resident": (
        f"atomicAdd(b, 1u); {POLL} backoff();",
        r"spinning 32 \(block [01], thread 0\)",
        {"grid": 2},
    ),
    "spins with atomics": ("if (thread == 3) while (atomicAdd(b, 0u) == 0) {}", SPINS, {}),
    "spins between barriers": (f"{POLL} {{ if (thread == 0) backoff(); __syncthreads(); }}", SPINS, {}),
    "lanes at a barrier": (
        "if (thread < 8) __syncwarp(); else __syncthreads();",
        r"deadlock: .* 0 waits in __syncwarp with mask 0xffffffff for thread 8, which waits at __syncthreads\(\)",
        {},
    ),
    "lanes at the cluster's barrier": (
        "if (thread < 8) __syncwarp(); else cluster_barrier();",
        r"deadlock: .* waits at cluster_barrier\(\)",
        CLUSTER,
    ),
    "has exited before a barrier": ("if (thread < 40) __syncthreads();", "(have|has) exited", {"block": 64}),
    "has exited before the cluster's barrier": ("if (block == 0) cluster_barrier();", "(have|has) exited", CLUSTER),
    "different barriers": (
        "if (thread < 32) __syncthreads(); else cluster_barrier();",
        "is at .* while other threads of the block are at",
        {"block": 64},
    ),
    "different masks": ("__syncwarp(lane < 16 ? 0xffffffffu : 0xffff0000u);", "(have|has) exited", {}),
    "different masks without end": (
        "for (;;) __shfl_sync(lane < 31 ? 0xffffffffu : 0xfffffffeu, lane, 0);",
        "mask mismatch: .* 0xffffffff .* 0xfffffffe",
        {},
    ),
    "different collectives": (
        "if (lane % 2) __ballot_sync(0xffffffffu, 1); else __shfl_sync(0xffffffffu, 1, 0);",
        "different collectives: .* thread 0 waits in __shfl_sync .* thread 1, which waits in __ballot_sync",
        {},
    ),
    "different sizes": (
        "if (lane < 7) __shfl_sync(0xffffffffu, 1.0f, 0); else __shfl_sync(0xffffffffu, 1.0, 0);",
        "different collectives: .* of 8 bytes",
        {},
    ),
    "a mask without the lane": ("__syncwarp(1u);", "lacks its own lane", {}),
    "a mask with a lane that has exited": ("if (lane == 9) return; __syncwarp();", "(have|has) exited", {}),
    "writes behind shared memory": (WRITE, "48 bytes of shared memory; byte 48 was", {"size": 48, "shared": 48}),
    "writes far behind shared memory": (WRITE, "byte 1000 was written", {"size": 1000, "shared": 47}),
    "writes before shared memory": (WRITE, "byte -1 was written", {"size": 2**64 - 1, "shared": 48}),
    "writes where no shared memory is": (WRITE, "0 bytes of shared memory; byte 0 was written", {}),
    "writes between blocks": (
        f"if (block == 1) {WRITE}",
        "block 1 has 128 bytes of shared memory; byte 130 was written",
        {"size": 130, "shared": 128, "grid": 3, "cooperative": True},
    ),
    "misaligned": (
        "a[0] = __ldg(reinterpret_cast<const float4*>(a + 1 + reinterpret_cast<size_t>(a) / 4 % 2)).x;",
        "no multiple of 16",
        {},
    ),
}

# One kernel of all, which is quicker to compile than one for each.
HARMLESS_BODY = "__syncthreads(); a[index] = __popc(__ballot_sync(0xffffffffu, 1));"
BODIES = [HARMLESS_BODY, *(body for body, _, _ in ERRORS.values())]
ANY_BODY = "".join(f"if (*c == {i}) {{ {body} }}\n" for i, body in enumerate(BODIES))


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    _, message, options = ERRORS[case]
    if SANITIZED and case.startswith(("writes", "misaligned")):
        pytest.skip("sanitizers end the process")

    def run(body, **options):
        return execute(ANY_BODY, np.zeros(64, np.float32), np.zeros(1, np.uint32), np.uint32([body]), **options)

    for schedule in HARMLESS:
        with pytest.raises(simt.SimtError, match=message):
            run(1 + list(ERRORS).index(case), schedule=schedule, **options)
        assert (run(0, block=64) == 32).all()  # as if no fibers had been abandoned


def test_many_turns_are_no_deadlock():
    """Blocks wait in a chain for the one before, with more turns than a deadlock is granted."""
    body = """
        for (unsigned round = 0; round < 300; ++round) {
            while (*reinterpret_cast<volatile unsigned*>(b) != round * gridDim.x + block) backoff();
            atomicAdd(b, 1u);
        }
        *a += 1;"""
    assert execute(body, np.zeros(1, np.float32), np.zeros(1, np.uint32), grid=50, block=1, cooperative=True) == 50


# --- compilation ------------------------------------------------------------------------------------------------------


def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBN_SIMT_CACHE", str(tmp_path / "new"))
    body = "a[index] = VALUE;"
    a = np.zeros(32, np.float32)
    for value, expected in (("1.5f", 1.5), ("(1 + 1)", 2), ("1.5f", 1.5)):
        assert (execute(body, a, macros={"VALUE": value}) == expected).all()
    assert len(list((tmp_path / "new").iterdir())) == 3  # one scheduler, two kernels
    monkeypatch.setattr(subprocess, "run", None)
    execute(body, a, macros={"VALUE": "1.5f"})


def test_texts_that_do_not_compile():
    with pytest.raises(simt.CompileError, match=r"kernel\.cu:2:\d+: error: .*nonsense"):
        simt.compile_kernel("struct Params {};\nnonsense;", "kernel", {})
    with pytest.raises(simt.CompileError, match="frame size"):
        execute("volatile float local[20000]; local[thread] = 0;", np.zeros(1, np.float32))
    for coordinate in ("threadIdx.y", "gridDim.z"):
        with pytest.raises(simt.CompileError, match=coordinate[-1]):
            execute(f"a[0] = {coordinate};", np.zeros(1, np.float32))


def test_arguments_of_launches():
    kernel = simt.compile_kernel(text("", np.zeros(1)), "kernel", {})

    class Params(ctypes.Structure):
        _fields_ = (("a", ctypes.c_void_p), ("size", ctypes.c_longlong))

    for params in (bytes(16), bytearray(16), memoryview(bytes(16)), Params()):
        kernel.launch(1, 32, params)
    with pytest.raises(ValueError, match="takes 16 bytes of parameters, not 8"):
        kernel.launch(1, 32, bytes(8))
    for options in (
        {"block": 0},
        {"block": 1025},
        {"grid": 0},
        {"cluster": 2, "grid": 3},
        {"shared": -1},
        {"schedule": -1},
    ):
        with pytest.raises(ValueError):
            kernel.launch(**({"grid": 1, "block": 32, "params": bytes(16)} | options))


# --- sanitizers -------------------------------------------------------------------------------------------------------

UNDER_SANITIZERS = """
import sys
import numpy as np
from tests.simt import simt
from tests.simt.programs import REVERSE, execute, numbers
body = '''
    volatile float local[9] = {};
    BARRIER;
    if (p.size == 1) { if (thread) __syncthreads(); a[0] = local[lane % 9]; }
    if (p.size == 2) a[1000 + thread] = 1;
    if (p.size == 3) a[thread] = dynamic_shared()[256 + thread];
    if (p.size == 4) *reinterpret_cast<uint2*>(a + 1) = make_uint2(1, 2);'''
def run(size, schedule=0):
    x = numbers(64)
    y = np.zeros(1000, np.float32)
    execute(REVERSE + body, y, x, block=64, size=size, shared=256, macros={"BARRIER": "__syncthreads()"},
            schedule=schedule)
    assert np.array_equal(y[:64], x[::-1])
for schedule in range(3):
    run(0, schedule)
    try:
        run(1, schedule)
    except simt.SimtError:
        print("abandoned", flush=True)
run(int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "report"),
    [(0, None), (2, "heap-buffer-overflow"), (3, "use-after-poison"), (4, "misaligned address")],
)
def test_sanitizers(case, report):
    command = [simt.compiler(), "-print-file-name=libasan.so"]
    library = interpreters.run(command).strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no address sanitizer")
    process = interpreters.begin(
        interpreters.python(UNDER_SANITIZERS, case),
        cwd=Path(__file__).parents[2],
        FASTBN_SIMT_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all",
        LD_PRELOAD=library,
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )
    ((out, err),) = interpreters.end(process, returns=0 if report is None else 1)
    assert out.split() == ["abandoned"] * 3, err
    assert report is None or report in err, err
