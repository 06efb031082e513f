"""PTX's model of memory in the CPU execution: small kernels whose verdict is known, right ones beside wrong ones."""

import itertools
import re

import numpy as np
import pytest

from tests.simt import simt
from tests.simt.programs import HARMLESS, REVERSE, SANITIZED, execute

pytestmark = [
    pytest.mark.skipif(simt.available() is not None, reason=f"no CUDA on this CPU: {simt.available()}"),
    pytest.mark.skipif(SANITIZED, reason="accesses are announced to one sanitizer alone"),
]

BEFORE = """
    #define STRONG(place) (*reinterpret_cast<volatile unsigned*>(place))
    #define WAIT(place, value) while (STRONG(place) != (value)) backoff()
    #define ACTOR(which) if (thread == 0 && block == (which))
    struct Four { unsigned long long values[4]; };
    __device__ Four four(unsigned x) { return {{x, x, x, x}}; }
    __device__ unsigned first_of(Four four) { return four.values[0]; }"""
FENCE, BLOCK_FENCE = "__threadfence()", "__threadfence_block()"
BLOCKS = {"cooperative": True, "grid": 2}
CLUSTER = {"grid": 2, "cluster": 2}
RULE = re.compile("kernel: ([^:]*):")


def run(body, model, schedule, flags=(), **options):
    """What a kernel leaves in `a`; `b` has places for what its threads exchange."""
    result, places = np.zeros(64, np.uint32), np.zeros(256, np.uint32)
    flags = (*simt.MODELLED, *flags)
    return execute(body, result, places, before=BEFORE, flags=flags, model=model, schedule=schedule, **options)


def rules(body, **options):
    """By which a kernel is refused, in some schedules; None where it is not."""

    def of(schedule):
        try:
            run(body, "checked", schedule, **options)
        except simt.SimtError as error:
            return RULE.match(str(error))[1]
        return None

    return {of(schedule) for schedule in HARMLESS}


def rule(body, **options):
    """By which a kernel is refused, the same in every schedule; None where it is not."""
    (found,) = rules(body, **options)
    return found


def outcomes(body, count=1, **options):
    """Results where threads see old values, in some schedules."""
    return {tuple(run(body, "stale", schedule, **options)[:count].tolist()) for schedule in range(24)}


# --- message passing --------------------------------------------------------------------------------------------------

MESSAGE = """
    unsigned *data = b, *flag = b + 64;
    ACTOR(0) { STORE_DATA; RELEASE; STORE_FLAG; }
    ACTOR(1) { while (LOAD_FLAG == 0) backoff(); ACQUIRE; a[0] = LOAD_DATA; }"""
RIGHT = {
    "STORE_DATA": "*data = 42", "RELEASE": FENCE, "STORE_FLAG": "STRONG(flag) = 1",
    "LOAD_FLAG": "STRONG(flag)", "ACQUIRE": FENCE, "LOAD_DATA": "__ldcg(data)",
}  # fmt: skip
STRONG_DATA = {"STORE_DATA": "STRONG(data) = 42", "LOAD_DATA": "STRONG(data)"}

MESSAGES = {  # what is changed, the rule that refuses it, and whether old data may be seen
    "right": ({}, None, False),
    "data by a strong load": ({"LOAD_DATA": "STRONG(data)"}, None, False),
    "flag by an atomic operation": ({"STORE_FLAG": "atomicAdd(flag, 1u)"}, None, False),
    "no release": ({"RELEASE": ""}, "race", True),
    "no acquire": ({"ACQUIRE": ""}, "race", True),
    "no acquire, data by a strong load": ({"ACQUIRE": "", "LOAD_DATA": "STRONG(data)"}, "race", True),
    "release to the block": ({"RELEASE": BLOCK_FENCE}, "race", True),
    "acquire from the block": ({"ACQUIRE": BLOCK_FENCE}, "race", True),
    "release behind the flag": ({"RELEASE": "", "STORE_FLAG": f"STRONG(flag) = 1, {FENCE}"}, "race", True),
    "flag of the block": ({"STORE_FLAG": "atomicAdd_block(flag, 1u)"}, "race", None),
    "flag by a plain store": ({"STORE_FLAG": "*flag = 1"}, "race", None),
    "flag by plain loads": ({"LOAD_FLAG": "*flag"}, "race", None),
    "flag by loads past the first-level cache": ({"LOAD_FLAG": "__ldcg(flag)"}, "race", None),
    "data by a plain load": ({"LOAD_DATA": "*data"}, "first-level cache", False),
    "data by ld.global.nc": ({"LOAD_DATA": "__ldg(data)"}, "read-only path", False),
    "strong data without fences": (STRONG_DATA | {"RELEASE": "", "ACQUIRE": ""}, None, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_message_passing(name):
    changed, refused_by, old = MESSAGES[name]
    macros = RIGHT | changed
    assert rule(MESSAGE, macros=macros, **BLOCKS) == refused_by
    if old is None:  # the flag itself is never seen
        with pytest.raises(simt.SimtError, match="deadlock"):
            outcomes(MESSAGE, macros=macros, **BLOCKS)
    else:
        assert ((0,) in outcomes(MESSAGE, macros=macros, **BLOCKS)) == old


def test_fences_of_a_block_are_enough_within_it():
    body = MESSAGE.replace("ACTOR(1)", "if (thread == 32)")
    macros = RIGHT | {"RELEASE": BLOCK_FENCE, "ACQUIRE": BLOCK_FENCE, "LOAD_DATA": "*data"}
    assert rule(body, macros=macros, block=64) is None
    assert rule(body, macros=macros | {"STORE_FLAG": "atomicAdd_block(flag, 1u)"}, block=64) is None
    assert outcomes(body, macros=macros, block=64) == {(42,)}
    assert rule(body, macros=macros | {"ACQUIRE": ""}, block=64) == "race"


CHAIN = """
    ACTOR(0) { b[0] = 42; __threadfence(); STRONG(b + 64) = 1; }
    ACTOR(1) { WAIT(b + 64, 1); BETWEEN; STRONG(b + 128) = 1; }
    ACTOR(2) { WAIT(b + 128, 1); __threadfence(); a[0] = STRONG(b); }"""


def test_what_was_learnt_is_handed_on():
    options = {"cooperative": True, "grid": 3}
    assert rule(CHAIN, macros={"BETWEEN": FENCE}, **options) is None
    assert outcomes(CHAIN, macros={"BETWEEN": FENCE}, **options) == {(42,)}
    for between in ("", BLOCK_FENCE, "__syncwarp(1u)"):
        assert "race" in rules(CHAIN, macros={"BETWEEN": between}, **options)


COUNTED = """
    ACTOR(0) { b[0] = 20; __threadfence(); atomicAdd(b + 64, 1u); }
    ACTOR(1) { b[1] = 22; __threadfence(); WAIT(b + 64, 1); SECOND; }
    ACTOR(2) { WAIT(b + 64, 2); __threadfence(); a[0] = STRONG(b) + STRONG(b + 1); }"""


def test_atomic_operations_hand_on_what_they_read():
    """A strong store does not: who reads it, and has not read the first block's before, learns nothing of that."""
    options = {"cooperative": True, "grid": 3}
    assert rule(COUNTED, macros={"SECOND": "atomicAdd(b + 64, 1u)"}, **options) is None
    assert outcomes(COUNTED, macros={"SECOND": "atomicAdd(b + 64, 1u)"}, **options) == {(42,)}
    assert "race" in rules(COUNTED, macros={"SECOND": "STRONG(b + 64) = 2"}, **options)


# --- orders of strong accesses: no races, but old values --------------------------------------------------------------

BUFFERED = """
    ACTOR(0) { STRONG(b) = 1; BETWEEN; a[0] = STRONG(b + 64); }
    ACTOR(1) { STRONG(b + 64) = 1; BETWEEN; a[1] = STRONG(b); }"""


def test_store_buffers():
    for between, both_old in (("", True), (BLOCK_FENCE, True), (FENCE, False)):
        assert rule(BUFFERED, macros={"BETWEEN": between}, **BLOCKS) is None
        assert ((0, 0) in outcomes(BUFFERED, 2, macros={"BETWEEN": between}, **BLOCKS)) == both_old


def test_reads_do_not_go_back():
    body = """
        ACTOR(0) for (unsigned i = 1; i < 9; ++i) { STRONG(b) = i; __threadfence_block(); if (i % 2) backoff(); }
        ACTOR(1) for (unsigned i = 0; i < 16; ++i) { a[i] = STRONG(b); backoff(); }"""
    assert rule(body, **BLOCKS) is None
    found = outcomes(body, 16, **BLOCKS)
    assert all(list(values) == sorted(values) for values in found)
    assert any(0 < value < 8 for values in found for value in values)


# --- reductions -------------------------------------------------------------------------------------------------------

LAST_BLOCK = """
    unsigned* shared = reinterpret_cast<unsigned*>(dynamic_shared());
    b[index] = index;
    GATHER;
    if (thread == 0) { RELEASE; shared[0] = ARRIVE == gridDim.x - 1; ACQUIRE; }
    __syncthreads();
    if (!shared[0]) return;
    unsigned sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += STRONG(b + i * threads + thread);
    a[thread] = sum;"""
LAST = {"GATHER": "__syncthreads()", "RELEASE": FENCE, "ARRIVE": "atomicAdd(b + 200, 1u)", "ACQUIRE": FENCE}


@pytest.mark.parametrize("cooperative", [False, True])
def test_the_last_block_takes_all(cooperative):
    options = {"grid": 4, "block": 40, "shared": 4, "cooperative": cooperative}
    expected = tuple(4 * t + 240 for t in range(40))
    assert rule(LAST_BLOCK, macros=LAST, **options) is None
    assert outcomes(LAST_BLOCK, 40, macros=LAST, **options) == {expected}
    for wrong in (
        {"GATHER": ""}, {"GATHER": "__syncwarp(threads - thread / 32 * 32 < 32 ? 0xffu : 0xffffffffu)"},
        {"RELEASE": ""}, {"RELEASE": BLOCK_FENCE}, {"ACQUIRE": ""}, {"ACQUIRE": BLOCK_FENCE},
    ):  # fmt: skip
        assert rule(LAST_BLOCK, macros=LAST | wrong, **options) == "race"
        assert not cooperative or outcomes(LAST_BLOCK, 40, macros=LAST | wrong, **options) != {expected}
    assert rule(LAST_BLOCK, macros=LAST | {"ARRIVE": "b[200]++"}, **options) == "race"
    assert rule(LAST_BLOCK, macros=LAST | {"ARRIVE": "atomicAdd_block(b + 200, 1u)"}, **options) == "race"


IN_STEPS = """
    unsigned* shared = reinterpret_cast<unsigned*>(dynamic_shared());
    LOAD(shared + thread) = thread;
    BARRIER;
    for (unsigned half = 16; half > 0; half /= 2) {
        const unsigned value = thread < half ? LOAD(shared + thread + half) : 0;
        BARRIER;
        if (thread < half) LOAD(shared + thread) = LOAD(shared + thread) + value;
        BARRIER;
    }
    if (thread == 0) a[0] = shared[0];"""


def test_a_warp_is_not_in_step():
    """Volatile shared memory without __syncwarp, as before Volta: strong, so no race, but in no order."""
    for access, barrier, refused_by, right in (
        ("*(%s)", "__syncwarp()", None, True),
        ("*(%s)", "__syncthreads()", None, True),
        ("*(%s)", "", "race", False),
        ("*(%s)", "__shfl_sync(0xffffffffu, 0, 0)", "race", False),
        ("*(%s)", "__ballot_sync(0xffffffffu, 1)", "race", False),
        ("STRONG(%s)", "", None, False),
    ):
        macros = {"LOAD(place)": access % "place", "BARRIER": barrier}
        assert rule(IN_STEPS, macros=macros, shared=128) == refused_by, barrier
        assert (outcomes(IN_STEPS, macros=macros, shared=128) == {(496,)}) == right, barrier


# --- shared memory ----------------------------------------------------------------------------------------------------


def test_barriers_of_a_block():
    body = REVERSE.replace("float", "unsigned").replace("b[thread]", "thread")
    for block, barrier, refused_by in (
        (64, "__syncthreads()", None), (64, "__syncwarp()", "race"), (64, "", "race"), (64, "__threadfence()", "race"),
        (32, "__syncwarp()", None), (32, "", "race"),
    ):  # fmt: skip
        assert rule(body, macros={"BARRIER": barrier}, block=block, shared=256) == refused_by


EXCHANGE = """
    unsigned* shared = reinterpret_cast<unsigned*>(dynamic_shared());
    shared[thread] = index;
    WRITTEN;
    a[index] = *map_shared_rank(shared + thread, block ^ 1);
    READ;
    shared[thread] = 99;"""


def test_shared_memory_of_a_cluster():
    options = CLUSTER | {"shared": 128}
    right = {"WRITTEN": "cluster_barrier()", "READ": "cluster_barrier()"}
    expected = (*range(32, 64), *range(32))
    assert rule(EXCHANGE, macros=right, **options) is None
    assert outcomes(EXCHANGE, 64, macros=right, **options) == {expected}
    for place, barrier in itertools.product(right, ("__syncthreads()", f"{FENCE}, __syncthreads(), {FENCE}")):
        assert "race" in rules(EXCHANGE, macros=right | {place: barrier}, **options)
    assert outcomes(EXCHANGE, 64, macros=right | {"WRITTEN": "__syncthreads()"}, **options) != {expected}


def test_barriers_of_a_cluster_release():
    """`arrive.relaxed` brings what a fence before has released."""
    right = {"WRITTEN": "cluster_barrier()", "READ": "cluster_barrier()"}
    for steps, refused_by in (
        ("simt_cluster_arrive(true), simt_cluster_wait()", None),
        ("simt_cluster_arrive(false), simt_cluster_wait()", "race"),
        ("simt_fence(true), simt_cluster_arrive(false), simt_cluster_wait()", None),
        ("simt_fence(false), simt_cluster_arrive(false), simt_cluster_wait()", "race"),
    ):
        options = {"flags": [f"-DSIMT_CLUSTER_BARRIER={steps}"], "shared": 128} | CLUSTER
        assert rule(EXCHANGE, macros=right, **options) == refused_by
    for steps, message in (
        ("simt_cluster_arrive(true)", "has arrived before and not waited"),
        ("simt_cluster_wait()", "waits and has not arrived"),
    ):
        with pytest.raises(simt.SimtError, match=message):
            run("cluster_barrier(), cluster_barrier();", None, 0, [f"-DSIMT_CLUSTER_BARRIER={steps}"], **CLUSTER)


def test_shared_memory_of_a_block_that_has_exited():
    body = "if (block == 0) return; a[thread] = *map_shared_rank(dynamic_shared(), 0);"
    with pytest.raises(simt.SimtError, match="block 0 of the cluster has exited"):
        run(body, None, 0, shared=128, **CLUSTER)
    with pytest.raises(simt.SimtError, match="block 2 of the cluster does not exist"):
        run(body.replace(", 0)", ", 2)"), None, 0, shared=128, **CLUSTER)


# --- bytes, blocks and launches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"grid": 2}, BLOCKS])
def test_blocks_are_in_no_order(options):
    """Nor where they run one after another here."""
    assert rule("if (thread == 0) b[0] = 1;", **options) == "race"
    assert rule("if (thread == 0) b[0] += block;", **options) == "race"
    assert rule("if (thread == block) a[thread] = b[thread ^ 1], b[thread] = 1;", **options) == "race"
    assert rule("atomicAdd(b, 1u);", **options) is None
    assert rule("atomicAdd_block(b, 1u);", **options) == "race"
    assert rule("atomicAdd_block(b + block, 1u);", **options) is None
    assert rule("atomicAdd(b, 1u); if (thread == 0) a[0] = b[0];", **options) == "race"


def test_bytes_side_by_side_are_different_ones():
    body = "reinterpret_cast<unsigned char*>(b)[index] = 1;"
    assert rule(body, **BLOCKS) is None
    assert rule(body.replace("[index]", "[index - block]"), **BLOCKS) == "race"


def test_many_readers_are_before_a_writer():
    """Not the last one alone."""
    body = "if (thread != p.size) a[thread] = b[0]; BARRIER; if (thread == p.size) b[0] = 1;"
    for reader in (0, 7, 63):
        options = {"block": 64, "size": reader}
        assert rule(body, macros={"BARRIER": "__syncthreads()"}, **options) is None
        assert rule(body, macros={"BARRIER": "__syncwarp()"}, **options) == "race"


def test_a_strong_read_hides_no_plain_one():
    body = """
        ACTOR(0) { if (p.size) a[0] = b[0]; __threadfence_block(); a[1] = STRONG(b); atomicAdd(b + 64, 1u); }
        ACTOR(1) { WAIT(b + 64, 1); STRONG(b) = 1; }"""
    assert rule(body, size=0, **BLOCKS) is None
    assert rule(body, size=1, **BLOCKS) == "race"


def test_ld_global_nc_is_for_what_no_one_writes():
    assert rule("a[index] = __ldg(b + index);") is None
    assert rule("b[index] = 1; a[index] = __ldg(b + index);") == "read-only path"
    assert rule("a[index] = __ldg(b + index); b[index] = 1;") == "read-only path"


def test_launches_are_in_order():
    body = "a[index] = b[63 - index]; __syncthreads(); if (p.size) b[63 - index] = index;"
    arrays = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    for size in (1, 0):
        execute(body, *arrays, size=size, block=64, flags=simt.MODELLED, model="checked")
    assert arrays[0].tolist() == list(range(64))


# --- what is reported -------------------------------------------------------------------------------------------------


def test_errors_name_threads_places_and_lines():
    body = """
        auto write = [&](unsigned* place) { *place = 1; };
        if (block == 0 && thread == 3) write(b + 5);
        if (block == 1 && thread == 1) a[0] = b[5];"""
    expected = (
        r"race: block 1, thread 1 reads 0x[0-9a-f]+ at kernel\.cu:(\d+), "
        r"which block 0, thread 3 has written at kernel\.cu:(\d+) < kernel\.cu:(\d+): nothing orders"
    )
    with pytest.raises(simt.SimtError) as error:
        run(body, "checked", 0, **BLOCKS)
    read, write, call = map(int, re.search(expected, str(error.value)).groups())
    assert (read - call, call - write) == (1, 1)
    with pytest.raises(simt.SimtError, match=r"thread 7 writes byte 7 of block 0's shared memory .* thread 0 has read"):
        run("dynamic_shared()[thread] = 1; a[thread] = dynamic_shared()[7];", "checked", 0, block=9, shared=9)


def test_results_of_calls_that_come_in_memory():
    """GCC does not announce that they are stored: a function stores them, or the kernel is refused."""
    body = "Four* to = reinterpret_cast<Four*>(b);\n%s"
    assert rule(body % "to[thread] = four(1);", block=8) is None
    assert rule(body % "to[0] = four(1);", block=8) == "race"
    with pytest.raises(simt.CompileError, match="would not be announced"):
        run(body % "*to = four(1);", "checked", 0)
    with pytest.raises(simt.CompileError, match="would not be announced"):
        run(body % "a[0] = first_of(*to);", "checked", 0)
