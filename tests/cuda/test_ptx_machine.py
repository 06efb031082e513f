"""The interpreter of PTX by small kernels: memory, threads that part and meet, barriers, fences, and their faults."""

import numpy as np
import pytest

from tests.ptx.handwritten import execute, line_of, text
from tests.ptx.program import Program
from tests.ptx.text import PtxError

OUT = "mul.wide.u32 %rd1, %r90, 4; add.s64 %rd1, %rd90, %rd1;"
"""The address of a thread's number in the first array."""
SLOT = "shl.b32 %r1, %r91, 2; cvt.u64.u32 %rd2, %r1; mov.u64 %rd3, dynamic; add.s64 %rd2, %rd3, %rd2;"
"""Of its number in shared memory."""


def numbers(count=64, dtype=np.uint32):
    return np.arange(1, count + 1, dtype=dtype)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["u32", "v2.u32", "v4.u32", "f64", "v2.f64", "u16", "u8"])
def test_widths(how):
    """Each thread copies what its access is wide."""
    count, bits = (int(how[1]) if how[0] == "v" else 1), int(how.split(".")[-1][1:])
    prefix = {"u8": "rs", "u16": "rs", "u32": "r", "f64": "fd"}[how.split(".")[-1]]
    registers = ", ".join(f"%{prefix}{k}" for k in range(1, count + 1))
    registers = f"{{{registers}}}" if count > 1 else registers
    width = count * bits // 8
    a = np.random.default_rng(0).integers(0, 256, 32 * width, np.uint8)
    out = np.zeros_like(a)
    execute(
        f"mul.wide.u32 %rd1, %r90, {width}; add.s64 %rd2, %rd91, %rd1; add.s64 %rd3, %rd90, %rd1;"
        f"ld.global.{how} {registers}, [%rd2]; st.global.{how} [%rd3], {registers};",
        out, a,
    )  # fmt: skip
    assert np.array_equal(out, a)


def test_narrow_loads_are_widened_and_stores_take_the_lower_part():
    a, out = np.int16([-3, 5] * 16), np.zeros(64, np.uint16)
    execute(
        "mul.wide.u32 %rd1, %r90, 2; add.s64 %rd2, %rd91, %rd1; mul.wide.u32 %rd4, %r90, 4; add.s64 %rd3, %rd90, %rd4;"
        "ld.global.s16 %rd5, [%rd2]; shr.s64 %rd6, %rd5, 1; st.global.u16 [%rd3], %rd6;"
        "ld.global.u16 %rd7, [%rd2]; shr.u64 %rd8, %rd7, 1; st.global.u16 [%rd3+2], %rd8;",
        out, a,
    )  # fmt: skip
    assert out[:4].tolist() == [0xFFFE, 0x7FFE, 2, 2]


def test_parameters_by_address():
    out = np.zeros(32, np.uint64)
    body = (
        "mov.b64 %rd1, kernel_param_0; add.s64 %rd2, %rd1, 16; ld.param.u64 %rd3, [%rd2+-16]; "
        "ld.param.u32 %r1, [kernel_param_0+4]; mul.wide.u32 %rd4, %r90, 8; add.s64 %rd5, %rd90, %rd4;"
    )
    execute(f"{body} st.global.u64 [%rd5], %rd3;", out)
    assert (out == out.ctypes.data).all()
    execute(f"{body} st.global.u32 [%rd5], %r1;", out)
    assert (out & 0xFFFFFFFF == out.ctypes.data >> 32).all()


OUTSIDE = {
    "past the end": (
        "ld.global.u32 %r1, [%rd1+4];",
        "ld.global by thread 63 of block 0: .* 4 bytes past the end of 256",
    ),
    "before the start": ("ld.global.u32 %r1, [%rd1+-4];", "ld.global by thread 0 of block 0: .* 4 bytes before"),
    "a store": ("st.global.v2.u32 [%rd1+-8], {%r90, %r90};", "st.global by thread 0 of block 0: .* before"),
    "a vector's end": ("ld.global.v2.u32 {%r1, %r2}, [%rd90+252];", "4 bytes past the end"),
    "nowhere": ("mov.u64 %rd2, 4096; ld.global.u32 %r1, [%rd2];", "0x1000 is in no allocation"),
    "misaligned": ("ld.global.u32 %r1, [%rd90+2];", "thread 0 of block 0: address is no multiple of 4"),
    "a misaligned vector": ("ld.global.v2.u32 {%r1, %r2}, [%rd90+4];", "no multiple of 8"),
    "a misaligned store": ("st.global.u64 [%rd90+4], %rd1;", "thread 0 of block 0: address is no multiple of 8"),
    "shared memory's end": (f"{SLOT} st.shared.u32 [%rd2+4], %r90;", "thread 63 .* 256 to 260 is out of bounds of 256"),
    "shared memory's start": (f"{SLOT} st.shared.u32 [%rd2+-4], %r90;", "st.shared by thread 0 .* out of bounds"),
    "misaligned shared memory": (f"{SLOT} st.shared.u16 [%rd2+1], %rs1;", "no multiple of 2"),
    "a global address in shared memory": ("st.shared.u32 [%rd90], %r90;", "out of bounds of 256 bytes of shared"),
    "a shared address in global memory": (f"{SLOT} st.global.u32 [%rd2], %r90;", "in no allocation"),
    "parameters": ("ld.param.u64 %rd1, [kernel_param_0+64];", "out of bounds of 64 bytes of parameters"),
    "misaligned parameters": ("ld.param.u64 %rd1, [kernel_param_0+4];", "no multiple of 8"),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_accesses_out_of_bounds(what):
    """By the instruction's line and the thread."""
    instruction, message = OUTSIDE[what]
    body = f"{OUT}\n{instruction}"
    with pytest.raises(PtxError, match=f"line {line_of(body, instruction)}: .*{message}"):
        execute(body, numbers(), threads=64, shared=256)


def test_freed_memory():
    import gc

    from tests.ptx.memory import Allocations

    a = numbers()
    allocations = Allocations()
    allocations.add(a.ctypes.data, a.nbytes, a)
    address = a.ctypes.data
    assert allocations.find(address, 8) is not None
    del a
    gc.collect()
    assert allocations.find(address, 8) is None
    assert allocations.why_not(address, 8) == "in freed memory"


def test_memory_of_two_arrays_by_one_instruction():
    a, b = numbers(32), numbers(32) * 100
    choose = "and.b32 %r2, %r90, 1; setp.eq.s32 %p1, %r2, 0; selp.b64 %rd4, %rd90, %rd91, %p1;"
    place = "mul.wide.u32 %rd5, %r90, 4; add.s64 %rd6, %rd4, %rd5;"
    execute(f"{choose} {place} ld.global.u32 %r3, [%rd6]; add.s32 %r3, %r3, 1; st.global.u32 [%rd6], %r3;", a, b)
    assert a.tolist() == [n + (n % 2) for n in range(1, 33)]
    assert b.tolist() == [100 * n + (n % 2 == 0) for n in range(1, 33)]


# --- threads that part and meet ---------------------------------------------------------------------------------------


def test_branches_and_loops():
    """A thread of number n adds 1 .. n: all leave the loop at different times, and meet behind it."""
    out = np.zeros(64, np.uint32)
    execute(
        "mov.u32 %r1, 0; mov.u32 %r2, 0;\n"
        "LOOP: setp.ge.u32 %p1, %r1, %r90;\n@%p1 bra DONE;\n"
        "add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1;\nbra.uni LOOP;\n"
        f"DONE: shfl.sync.bfly.b32 %r3|%p2, %r2, 1, 31, -1;\n{OUT} st.global.u32 [%rd1], %r3;",
        out, threads=64,
    )  # fmt: skip
    total = [n * (n + 1) // 2 for n in range(64)]
    assert out.tolist() == [total[n ^ 1] for n in range(64)]


def test_registers_of_threads_that_wait_stay():
    out = np.zeros(32, np.uint32)
    execute(
        "mov.u32 %r1, 7; setp.lt.u32 %p1, %r90, 5;\n@!%p1 bra ELSE;\nmov.u32 %r1, 8;\nbra.uni BOTH;\n"
        f"ELSE: add.s32 %r1, %r1, 2;\nBOTH: {OUT} st.global.u32 [%rd1], %r1;",
        out,
    )  # fmt: skip
    assert out.tolist() == [8] * 5 + [9] * 27


def test_a_warp_meets_before_a_shuffle_wherever_its_code_stands():
    """Threads of the place that comes first in the text wait for the others."""
    out = np.zeros(32, np.uint32)
    execute(
        "mov.u32 %r1, %r90; setp.lt.u32 %p1, %r90, 5;\n@%p1 bra LATE;\n"
        f"MEET: shfl.sync.idx.b32 %r2|%p2, %r1, 3, 31, -1;\n{OUT} st.global.u32 [%rd1], %r2;\nret;\n"
        "LATE: add.s32 %r1, %r1, 1000;\nbra.uni MEET;",
        out,
    )  # fmt: skip
    assert out.tolist() == [1003] * 32


def test_shuffles_and_votes_of_some_lanes():
    out = np.zeros(32, np.uint32)
    body = (
        "setp.lt.u32 %p1, %r90, 16;\n@!%p1 bra DONE;\nsetp.gt.u32 %p2, %r90, 12; vote.sync.ballot.b32 %r1, %p2, MASK;"
        f"shfl.sync.bfly.b32 %r2|%p3, %r90, 8, 31, MASK; add.s32 %r3, %r1, %r2;\n{OUT} st.global.u32 [%rd1], %r3;\n"
        "DONE:"
    )
    execute(body.replace("MASK", "65535"), out)
    assert out.tolist() == [0b1110000000000000 + (n ^ 8) for n in range(16)] + [0] * 16
    with pytest.raises(
        PtxError, match=r"vote.sync by thread 0 of block 0: waits for lanes of its mask that do not come"
    ):
        execute(body.replace("MASK", "-1"), out)
    with pytest.raises(PtxError, match=r"thread 1 of block 0: is not in its own mask"):
        execute(body.replace("MASK", "1"), out)


def test_blocks_are_numbered():
    out = np.zeros(128, np.uint32)
    execute(f"mov.u32 %r1, %nctaid.x; mad.lo.s32 %r2, %r92, 100, %r1;\n{OUT} st.global.u32 [%rd1], %r2;", out, grid=4)
    assert out.tolist() == [100 * (n // 32) + 4 for n in range(128)]


# --- barriers of a block ----------------------------------------------------------------------------------------------

REVERSED = f"{SLOT} st.shared.u32 [%rd2], %r90;\nbar.sync 0;\nsub.s32 %r2, 63, %r91; shl.b32 %r3, %r2, 2; cvt.u64.u32 %rd4, %r3; add.s64 %rd4, %rd3, %rd4;\nld.shared.u32 %r4, [%rd4];\n{OUT} st.global.u32 [%rd1], %r4;"  # fmt: skip # noqa: E501


def test_a_barrier_orders_shared_memory():
    out = np.zeros(128, np.uint32)
    execute(REVERSED, out, grid=2, threads=64, shared=256)
    assert out.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]


def test_without_the_barrier_it_is_a_race():
    body = REVERSED.replace("bar.sync 0;", "")
    with pytest.raises(PtxError, match=r"ld.shared by thread 0 .* written by thread 63 since the last barrier"):
        execute(body, np.zeros(64, np.uint32), threads=64, shared=256)


def test_what_is_read_must_not_be_overwritten():
    body = f"{REVERSED}\nst.shared.u32 [%rd2], %r90;"
    with pytest.raises(PtxError, match=r"st.shared by thread 0 .* read by thread 63 since the last barrier"):
        execute(body, np.zeros(64, np.uint32), threads=64, shared=256)
    execute(body.replace("\nst.shared", "\nbar.sync 0;\nst.shared"), np.zeros(64, np.uint32), threads=64, shared=256)


def test_two_threads_write_one_place():
    with pytest.raises(PtxError, match="another thread writes there by the same instruction"):
        execute("mov.u64 %rd3, dynamic; st.shared.u32 [%rd3], %r90;", shared=256)
    with pytest.raises(PtxError, match="another thread writes there by the same instruction"):
        execute("st.global.u32 [%rd90], %r90;", numbers())


def test_what_nobody_has_written():
    """May be read, but nothing may depend on it."""
    out = np.zeros(32, np.uint32)
    read = f"{SLOT} ld.shared.u32 %r5, [%rd2]; add.s32 %r6, %r5, 1;"
    execute(f"{read}\n{OUT} st.global.u32 [%rd1], %r90;", out, shared=256)
    for use in (
        f"{OUT} st.global.u32 [%rd1], %r6;", "setp.eq.s32 %p1, %r6, 0;\n@%p1 bra DONE;\nDONE:",
        "cvt.u64.u32 %rd7, %r6; add.s64 %rd8, %rd90, %rd7; ld.global.u8 %rs1, [%rd90]; ld.param.u64 %rd9, [%rd7];",
        "shfl.sync.bfly.b32 %r7|%p2, %r6, 1, 31, -1;",
    ):  # fmt: skip
        with pytest.raises(PtxError, match=r"depends on memory that nobody has written|parameters"):
            execute(f"{read}\n{use}", out, shared=256)
    half = f"setp.lt.u32 %p3, %r91, 16;\n@!%p3 bra LEFT;\n{read}\nLEFT: @%p3 bra DONE;\n"
    half += f"{OUT} st.global.u32 [%rd1], %r6;\nDONE:"
    execute(half, out, shared=256)  # those that read do nothing with it
    half = half.replace("@%p3 bra DONE", "@!%p3 bra DONE")
    with pytest.raises(PtxError, match=r"st.global.u32 by thread 0 of block 0: depends on memory"):
        execute(half, out, shared=256)


def test_new_memory():
    """Is filled with bits that no result has; an array may hold any others."""
    out, new = np.zeros(32), np.full(64, 0xFFFFFFFF, np.uint32).view(np.float64)
    place = "mul.wide.u32 %rd1, %r90, 8; add.s64 %rd2, %rd91, %rd1; add.s64 %rd3, %rd90, %rd1;"
    body = f"{place} ld.global.f64 %fd1, [%rd2]; add.f64 %fd2, %fd1, %fd1;\nst.global.f64 [%rd3], %fd2;"
    new[:7] = np.nan
    with pytest.raises(
        PtxError, match=r"st.global.f64 by thread 7 of block 0: depends on memory that nobody has written"
    ):
        execute(body, out, new)
    new[7:] = 1
    execute(body, out, new)
    assert out[7:].tolist() == [2] * 25


STUCK = {
    "some have exited": ("setp.lt.u32 %p1, %r91, 32;\n@%p1 bra DONE;\nbar.sync 0;\nDONE:", "deadlock; 32 threads wait"),
    "half of a warp": ("setp.lt.u32 %p1, %r91, 40;\n@%p1 bra DONE;\nbar.sync 0;\nDONE:", "deadlock; 24 threads"),
    "two barriers within a warp": (
        "setp.lt.u32 %p1, %r91, 40;\n@%p1 bra ONE;\nbar.sync 0;\nbra.uni DONE;\nONE: bar.sync 0;\nDONE:",
        "another barrier than its warp",
    ),
    "different barriers": (
        "setp.lt.u32 %p1, %r91, 32;\n@%p1 bra ONE;\nbarrier.cluster.arrive.release; barrier.cluster.wait.acquire;\n"
        "bra.uni DONE;\nONE: bar.sync 0;\nDONE:",
        "different barriers",
    ),
    "waiting without arriving": ("barrier.cluster.wait.acquire;", "waits at a barrier where it has not arrived"),
    "arriving twice": ("barrier.cluster.arrive.release;\nbarrier.cluster.arrive.release;", "arrives twice"),
    "arriving alone": ("barrier.cluster.arrive.release;", "exits before the cluster's barrier"),
    "spinning": ("LOOP: nanosleep.u32 40;\nbra.uni LOOP;", "thread 0 of block 0 waits for ever"),
    "an endless loop": ("LOOP: bra.uni LOOP;", "does not come to an end"),
    "a trap": ("setp.ne.u32 %p1, %r91, 7;\n@%p1 bra DONE;\ntrap;\nDONE:", r"line \d+: trap by thread 7 of block 0"),
    "a division by 0": ("sub.s32 %r2, %r91, 9; div.s32 %r3, %r91, %r2;", "division by 0 by thread 9 of block 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", STUCK)
def test_threads_that_do_not_come_to_an_end(what):
    body, message = STUCK[what]
    body = body.replace("setp.ne.u32", "setp.ne.s32")
    with pytest.raises(PtxError, match=message):
        execute(body, threads=64)


def test_warps_may_come_to_different_barriers():
    """As hardware counts them: a barrier has a number, not a place."""
    body = "setp.lt.u32 %p1, %r91, 32;\n@%p1 bra ONE;\nbar.sync 0;\nbra.uni DONE;\nONE: bar.sync 0;\nDONE:"
    assert execute(body, threads=64).steps > 0


# --- blocks that tell each other something ----------------------------------------------------------------------------

# Block b writes its number; then all add 1 to a counter, wait for the others and read the neighbour's.
EXCHANGE = """
mul.wide.u32 %rd1, %r92, 4; add.s64 %rd2, %rd90, %rd1;
setp.ne.s32 %p1, %r91, 0;
@%p1 bra WRITTEN;
st.global.u32 [%rd2], %r92;
WRITTEN: bar.sync 0;
@%p1 bra MET;
membar.gl;
atom.global.add.u32 %r1, [%rd91], 1;
WAIT: ld.volatile.global.u32 %r2, [%rd91];
setp.ge.u32 %p2, %r2, 4;
@%p2 bra ALL;
nanosleep.u32 40;
bra.uni WAIT;
ALL: membar.gl;
MET: bar.sync 0;
setp.ne.s32 %p3, %r91, 5;
@%p3 bra DONE;
add.s32 %r3, %r92, 1; and.b32 %r4, %r3, 3; mul.wide.u32 %rd3, %r4, 4; add.s64 %rd4, %rd90, %rd3;
ld.volatile.global.u32 %r5, [%rd4];
add.s64 %rd5, %rd92, %rd1; st.global.u32 [%rd5], %r5;
DONE:
"""


def exchange(body, schedule=0, cooperative=True):
    from tests.ptx.machine import Launch
    from tests.ptx.memory import Allocations

    values, counter, out = np.full(4, 99, np.uint32), np.zeros(1, np.uint32), np.zeros(4, np.uint32)
    allocations = Allocations()
    for array in (values, counter, out):
        allocations.add(array.ctypes.data, array.nbytes, array)
    params = np.array([values.ctypes.data, counter.ctypes.data, out.ctypes.data, *[0] * 5], np.uint64)
    program = Program(text(body))
    Launch(program, 4, 64, params.tobytes(), 0, allocations, 1, cooperative, schedule).run()
    return out.tolist()


@pytest.mark.parametrize("schedule", range(5))
def test_blocks_exchange_numbers(schedule):
    assert exchange(EXCHANGE, schedule) == [1, 2, 3, 0]


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("dropped", ["membar.gl;\natom", "ALL: membar.gl", "WRITTEN: bar.sync 0", "MET: bar.sync 0"])
def test_each_fence_and_barrier_is_needed(dropped, schedule):
    """In any order of blocks, though the numbers would be right."""
    kept = dropped.replace("membar.gl;\n", "").replace(" membar.gl", "").replace(" bar.sync 0", "")
    with pytest.raises(PtxError, match=r"no barrier or fence since thread .* of the grid (wrote|read) there"):
        exchange(EXCHANGE.replace(dropped, kept), schedule)


def test_who_does_not_wait_is_found_where_blocks_run_one_by_one():
    body = EXCHANGE.replace("@%p2 bra ALL", "@!%p2 bra ALL")
    with pytest.raises(PtxError, match=r"no barrier or fence since|waits for ever"):
        exchange(body, schedule=1)


def test_blocks_that_do_not_run_together_cannot_wait(monkeypatch):
    from tests.ptx import machine

    monkeypatch.setattr(machine, "MOST_THREADS", 64)
    with pytest.raises(PtxError, match="thread 0 of block 0 waits for ever; 63 threads wait at a barrier"):
        exchange(EXCHANGE, cooperative=False)


def test_blocks_without_an_order():
    """Nothing orders two blocks of a plain launch."""
    body = "setp.ne.s32 %p1, %r91, 0;\n@%p1 bra DONE;\nst.global.u32 [%rd90], %r92;\nDONE:"
    with pytest.raises(PtxError, match=r"st.global by thread 0 of block 1|another thread writes there"):
        execute(body, numbers(), grid=2)
    read = "setp.ne.s32 %p1, %r92, 0;\n@%p1 bra OTHER;\n" + OUT + " st.global.u32 [%rd1], %r92;\nret;\n"
    read += "OTHER: sub.s32 %r5, %r90, 32; mul.wide.u32 %rd1, %r5, 4; add.s64 %rd1, %rd90, %rd1;"
    read += "ld.global.u32 %r6, [%rd1];"
    with pytest.raises(
        PtxError, match=r"ld.global by thread 0 of block 1: no barrier or fence since thread 0 of the grid"
    ):
        execute(read, numbers(), grid=2)


def test_loads_past_coherence_see_nothing_that_the_kernel_writes():
    body = f"{OUT} st.global.u32 [%rd1], %r90;\nbar.sync 0;\nld.global.nc.u32 %r5, [%rd1];"
    with pytest.raises(PtxError, match="the kernel writes there"):
        execute(body, numbers())
    execute(body.replace(".nc", ""), numbers())


CLUSTERS = f"""
{OUT} st.global.u32 [%rd1], %r90;
barrier.cluster.arrive.release;
barrier.cluster.wait.acquire;
xor.b32 %r5, %r90, 32; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd6, %rd90, %rd5; ld.global.u32 %r6, [%rd6];
add.s64 %rd7, %rd91, %rd5; st.global.u32 [%rd7], %r6;
"""


@pytest.mark.parametrize("grid", [2, 4])
def test_a_cluster_meets(grid):
    values, out = np.zeros(32 * grid, np.uint32), np.zeros(32 * grid, np.uint32)
    execute(CLUSTERS, values, out, grid=grid, cluster=2)
    assert out.tolist() == [*range(32 * grid)]


def test_blocks_of_different_clusters_do_not_meet():
    values, out = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(PtxError, match="no barrier or fence since"):
        execute(CLUSTERS.replace("%r90, 32;", "%r90, 64;"), values, out, grid=4, cluster=2)
    with pytest.raises(PtxError, match="no barrier or fence since"):
        execute(CLUSTERS, values, out, grid=4, cluster=1)


def test_atomic_operations_count():
    counter = np.zeros(1, np.uint32)
    execute("atom.global.add.u32 %r1, [%rd90], 2;", counter, grid=3)
    assert counter[0] == 192
