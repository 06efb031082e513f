"""The execution of CUDA kernels on the CPU, by which the kernels themselves are tested."""

import threading

import ml_dtypes
import numpy as np
import pytest

from tests.simt import simt
from tests.simt.programs import CATCHING, HARMLESS, REVERSE, execute, numbers, text

pytestmark = pytest.mark.skipif(simt.available() is not None, reason=f"no CUDA on this CPU: {simt.available()}")

# --- threads and blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", HARMLESS)
@pytest.mark.parametrize(("grid", "block"), [(1, 1), (3, 31), (2, 64), (5, 71), (2, 1024)])
@pytest.mark.parametrize("cooperative", [False, True])
def test_every_thread_runs_once(grid, block, cooperative, schedule):
    seen = np.zeros(grid * block, np.uint32)
    execute(
        "a[index] += 1 + 2 * (gridDim.x == p.size);",
        seen,
        grid=grid,
        block=block,
        size=grid,
        cooperative=cooperative,
        schedule=schedule,
    )
    assert (seen == 3).all()


def places(schedule, grid=4, block=64, **options):
    """When each thread comes to its first statement."""
    order = execute(
        "a[index] = *b; *b += 1;",
        np.zeros(grid * block, np.uint32),
        np.zeros(1, np.uint32),
        grid=grid,
        block=block,
        schedule=schedule,
        **options,
    )
    assert sorted(order) == list(range(grid * block))
    return order.tolist()


@pytest.mark.parametrize("options", [{}, {"cooperative": True}, {"cluster": 2}])
def test_schedules(options):
    count = 4 * 64
    assert places(0, **options) == list(range(count))
    assert places(1, **options) == list(reversed(range(count)))
    orders = [places(schedule, **options) for schedule in range(6)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert orders == [places(schedule, **options) for schedule in range(6)]


def test_barriers_repeat_exactly():
    body = """
        for (int round = 0; round < 5; ++round) {
            a[atomicAdd(b, 1u)] = index;
            if (lane % 2) __syncwarp(0xaaaaaaaau);
            __syncthreads();
        }"""

    def order(schedule):
        return execute(
            body,
            np.zeros(2 * 96 * 5, np.uint32),
            np.zeros(1, np.uint32),
            grid=2,
            block=96,
            cooperative=True,
            schedule=schedule,
        ).tolist()

    assert order(7) == order(7)
    assert order(7) != order(8)


def test_launches_of_many_threads_take_turns():
    results = [np.zeros(256, np.float32) for _ in range(4)]
    kernel = simt.compile_kernel(
        text("for (int i = 0; i < 50; ++i) { a[index] += 1; __syncthreads(); }", results[0]), "kernel", {}
    )

    def work(result):
        for _ in range(5):
            kernel.launch(1, 256, np.array([result.ctypes.data, 0], np.uint64).data)

    workers = [threading.Thread(target=work, args=(result,)) for result in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((result == 250).all() for result in results)


# --- shared memory and barriers ---------------------------------------------------------------------------------------

ROTATE = """
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    float value = b[thread];
    for (int i = 0; i < 3; ++i) {
        shared[thread] = value;
        __syncthreads();
        value = shared[(thread + 1) % threads];
        BARRIER;
    }
    a[thread] = value;"""

FROM_ONE = """
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    if (thread == p.size) shared[0] = b[0];
    BARRIER;
    a[thread] = shared[0];"""


def reversed_(x):
    return x[::-1]


def rotated(x):
    return np.roll(x, -3)


def first(x):
    return np.full_like(x, x[0])


@pytest.mark.parametrize(
    ("body", "expected", "block", "barrier", "writer"),
    [
        *((REVERSE, reversed_, block, "__syncthreads()", 0) for block in (71, 256, 1024)),
        (REVERSE, reversed_, 32, "__syncwarp()", 0),
        (REVERSE, reversed_, 9, "__syncwarp(0x1ff)", 0),
        (ROTATE, rotated, 256, "__syncthreads()", 0),
        (ROTATE.replace("__syncthreads", "__syncwarp"), rotated, 32, "__syncwarp()", 0),
        *((FROM_ONE, first, 96, "__syncthreads()", writer) for writer in (0, 40, 95)),
        *((FROM_ONE, first, 32, "__syncwarp()", writer) for writer in (0, 17, 31)),
    ],
)
def test_barriers_are_needed_and_enough(body, expected, block, barrier, writer):
    x = numbers(block)

    def right(barrier, schedule):
        options = {"block": block, "shared": x.nbytes, "size": writer, "macros": {"BARRIER": barrier}}
        return np.array_equal(execute(body, np.zeros_like(x), x, schedule=schedule, **options), expected(x))

    assert all(right(barrier, schedule) for schedule in HARMLESS)
    assert not all(right("", schedule) for schedule in CATCHING)


def test_collectives_of_warps_are_no_barriers_of_blocks():
    body = """
        float* shared = reinterpret_cast<float*>(dynamic_shared());
        shared[thread] = b[thread];
        for (int bit = 1; bit < 32; bit *= 2) __shfl_xor_sync(0xffffffffu, lane, bit);
        a[thread] = shared[thread ^ 32];"""
    x = numbers(128)
    right = [
        np.array_equal(
            execute(body, np.zeros_like(x), x, block=128, shared=512, schedule=schedule),
            x.reshape(2, 2, 32)[:, ::-1].ravel(),
        )
        for schedule in CATCHING
    ]
    assert not all(right)


def test_shared_memory_is_poisoned():
    bits = execute(
        "a[index] = reinterpret_cast<unsigned*>(dynamic_shared())[thread]; __syncthreads();"
        "reinterpret_cast<unsigned*>(dynamic_shared())[thread] = 0;",
        np.zeros(3 * 64, np.uint32),
        grid=3,
        block=64,
        shared=256,
    )
    assert (bits == 0xFFFFFFFF).all()


def test_shared_memory_is_aligned_and_each_block_s_own():
    body = """
        unsigned char* shared = dynamic_shared();
        if (thread == 0) a[block] = reinterpret_cast<unsigned long long>(shared);
        shared[thread] = block;
        cluster_barrier();
        b[index] = shared[thread];"""
    places, values = np.zeros(6, np.uint64), np.zeros(6 * 33, np.uint32)
    execute(body, places, values, grid=6, block=33, shared=33, cluster=3)
    assert (places % 16 == 0).all()
    assert len(set(places.tolist())) == 3
    np.testing.assert_array_equal(values.reshape(6, 33), np.arange(6)[:, None].repeat(33, 1))


# --- collectives of a warp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", HARMLESS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.uint64])
def test_shuffles(dtype, schedule):
    x = (np.random.default_rng(1).random(96) * 1000).astype(dtype)
    body = """
        const unsigned all = 0xffffffffu;
        const auto value = b[index];
        a[index] = __shfl_sync(all, value, 5);
        a[index + 96] = __shfl_sync(all, value, (lane * 7 + 3) % 32);
        a[index + 192] = __shfl_xor_sync(all, value, 9);
        a[index + 288] = __shfl_down_sync(all, value, 3);
        a[index + 384] = __shfl_up_sync(all, value, 4);"""
    result = execute(body, np.zeros(5 * 96, dtype), x, block=96, schedule=schedule).reshape(5, 3, 32)
    lanes = np.arange(32)
    sources = [np.full(32, 5), (lanes * 7 + 3) % 32, lanes ^ 9]
    sources += [np.where(lanes + 3 < 32, lanes + 3, lanes), np.where(lanes >= 4, lanes - 4, lanes)]
    for got, source in zip(result, sources, strict=True):
        np.testing.assert_array_equal(got, x.reshape(3, 32)[:, source])


@pytest.mark.parametrize("schedule", HARMLESS)
def test_votes(schedule):
    body = """
        const bool predicate = b[index] != 0;
        a[index] = __ballot_sync(0xffffffffu, predicate);
        a[index + 128] = __any_sync(0xffffffffu, predicate);
        a[index + 256] = __all_sync(0xffffffffu, predicate);"""
    predicates = np.random.default_rng(2).integers(0, 2, (4, 32)).astype(np.uint32)
    predicates[1], predicates[2] = 0, 1
    result = execute(body, np.zeros(3 * 128, np.uint32), predicates, block=128, schedule=schedule).reshape(3, 4, 32)
    ballots = (predicates.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    for got, expected in zip(result, (ballots, predicates.any(1), predicates.all(1)), strict=True):
        np.testing.assert_array_equal(got, expected[:, None].repeat(32, 1))


@pytest.mark.parametrize("schedule", HARMLESS)
def test_parts_of_a_warp_meet_alone(schedule):
    """Groups of 8 lanes take different numbers of steps; half of the warp waits for all others meanwhile."""
    body = """
        const unsigned group = lane / 8, mask = 0xffu << 8 * group;
        unsigned value = lane;
        for (unsigned i = 0; i <= group; ++i) value += __shfl_xor_sync(mask, value, 1 << i % 3);
        if (lane >= 16) value = __popc(__ballot_sync(0xffff0000u, value & 1)) + 100 * value;
        __syncwarp();
        a[index] = value + 10000 * __shfl_sync(0xffffffffu, lane, 31 - lane);"""
    result = execute(body, np.zeros(64, np.uint32), block=64, schedule=schedule)
    lanes = np.arange(32)
    value = lanes.copy()
    for step in range(4):
        value = np.where(lanes // 8 >= step, value + value[lanes ^ (1 << step % 3)], value)
    value = np.where(lanes >= 16, (value[16:] & 1).sum() + 100 * value, value)
    np.testing.assert_array_equal(result.reshape(2, 32), [value + 10000 * lanes[::-1]] * 2)


def test_values_of_lanes_outside_the_mask_are_poison():
    body = "a[index] = lane < 8 ? __shfl_down_sync(0xffu, lane, 4) : 0;"
    assert execute(body, np.zeros(32, np.uint32)).tolist() == [4, 5, 6, 7] + [0xFFFFFFFF] * 4 + [0] * 24


def test_a_warp_can_lack_lanes():
    """A full mask in the last warp of a block of 71 threads names 25 lanes that never were."""
    body = """
        float value = b[thread];
        for (int delta = 16; delta; delta /= 2) {
            const float other = __shfl_down_sync(0xffffffffu, value, delta);
            if (thread + delta < threads && lane + delta < 32) value += other;
        }
        if (lane == 0) a[thread / 32] = value;"""
    x = np.arange(71, dtype=np.float32)
    sums = execute(body, np.zeros(3, np.float32), x, block=71)
    assert sums.tolist() == [x[:32].sum(), x[32:64].sum(), x[64:].sum()]


# --- several blocks ---------------------------------------------------------------------------------------------------

GRID_BARRIER = """
    __device__ void grid_barrier(unsigned* counter) {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            const unsigned everyone = (atomicAdd(counter, 1u) / gridDim.x + 1) * gridDim.x;
            while (*reinterpret_cast<volatile unsigned*>(counter) < everyone) backoff();
            __threadfence();
        }
        __syncthreads();
    }"""

NEIGHBOURS = """
    float value = b[index];
    for (int i = 0; i < 4; ++i) {
        c[index] = value;
        WRITTEN;
        value = __ldcg(c + (index + threads + 1) % (gridDim.x * threads));
        READ;
    }
    a[index] = value;"""


@pytest.mark.parametrize(
    ("barrier", "resident"),
    [
        ("grid_barrier(d)", {"grid": 6, "cooperative": True}),
        ("cluster_barrier()", {"grid": 4, "cluster": 4}),
        ("cluster_barrier()", {"grid": 4, "cluster": 4, "cooperative": True}),
    ],
)
def test_blocks_exchange_values(barrier, resident):
    x = numbers(resident["grid"] * 64)

    def right(schedule, written, read):
        arrays = np.zeros_like(x), x, np.full_like(x, np.nan), np.zeros(1, np.uint32)
        macros = {"WRITTEN": written, "READ": read}
        y = execute(NEIGHBOURS, *arrays, block=64, macros=macros, before=GRID_BARRIER, schedule=schedule, **resident)
        return np.array_equal(y, np.roll(x, -4 * 65))

    assert all(right(schedule, barrier, barrier) for schedule in HARMLESS)
    assert not all(right(schedule, "", barrier) for schedule in CATCHING)
    assert not all(right(schedule, barrier, "") for schedule in CATCHING)


def test_clusters_run_one_by_one():
    body = "b[block] = *c; cluster_barrier(); if (thread == 0) *c += 1; a[index] = b[block ^ 1];"
    result = execute(
        body, np.zeros(6 * 32, np.uint32), np.zeros(6, np.uint32), np.zeros(1, np.uint32), grid=6, cluster=2
    )
    np.testing.assert_array_equal(result.reshape(3, 64), np.array([0, 2, 4])[:, None].repeat(64, 1))


def test_the_last_block_takes_all():
    body = """
        unsigned* last = reinterpret_cast<unsigned*>(dynamic_shared());
        if (thread == 0) {
            b[block] = block + 1;
            __threadfence();
            *last = atomicAdd(c, 1u) == gridDim.x - 1;
        }
        __syncthreads();
        if (!*last) return;
        if (thread == 0) for (unsigned i = 0; i < gridDim.x; ++i) a[0] += b[i];"""
    for schedule in HARMLESS:
        arrays = np.zeros(1, np.float32), np.zeros(9, np.float32), np.zeros(1, np.uint32)
        assert execute(body, *arrays, grid=9, shared=4, schedule=schedule) == 45


# --- arithmetic -------------------------------------------------------------------------------------------------------


def same(got, expected):
    """Bit for bit, but for the bits of NaN."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    bits = f"u{expected.itemsize}"
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_formats_of_16_bits(name, dtype):
    every = np.arange(65536, dtype=np.uint16)
    widened = execute(f"a[index] = {name}_to_float(b[index]);", np.zeros(65536, np.float32), every, grid=64, block=1024)
    exact = every.view(dtype).astype(np.float32)
    same(widened, exact)

    rng = np.random.default_rng(3)
    finite = np.sort(exact[np.isfinite(exact)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    values = np.concatenate(
        [
            exact,
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(0)),
            rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32),
            np.float32([65519.9, 65520, 3.4e38, -3.4e38, 1e-45]),
        ]
    )
    values = np.resize(values, -(-values.size // 1024) * 1024)
    narrowed = execute(
        f"a[index] = float_to_{name}(b[index]);",
        np.zeros(values.size, np.uint16),
        values,
        grid=values.size // 1024,
        block=1024,
    )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        same(narrowed.view(dtype), values.astype(dtype))


def test_functions():
    body = """
        double* r = a;
        const float x = 2.0f, nan = __uint_as_float(0x7fc00000u), inf = __uint_as_float(0x7f800000u);
        *r++ = sqrt(x) == sqrtf(x) && sqrt(2.0) != static_cast<double>(sqrt(x));
        *r++ = fabs(-x) + fabs(-2.0) + fabsf(-1.0f);
        *r++ = fma(1.0 + 0x1p-52, 1.0 + 0x1p-52, -1.0 - 0x1p-51) == 0x1p-104;
        *r++ = fmaf(1.0f + 0x1p-23f, 1.0f + 0x1p-23f, -1.0f - 0x1p-22f) == 0x1p-46f && fma(x, x, x) == 6;
        *r++ = isfinite(x) && isfinite(2.0) && !isfinite(nan) && !isfinite(inf) && isnan(nan) && isinf(-inf);
        *r++ = rsqrt(4.0f) + rsqrt(4.0) + rsqrtf(4.0f) + __frcp_rn(2.0f) + reciprocal(2.0) + reciprocal(2.0f);
        *r++ = reciprocal_sqrt(4.0) + reciprocal_sqrt(16.0);
        *r++ = __ffs(0) + 10 * __ffs(8) + 100 * __popc(0xff) + 1000 * __clz(1 << 20) + 100000 * __clz(0);
        *r++ = __umulhi(0xffffffffu, 0x80000000u);
        *r++ = max(fmin(x, nan), 1.0f) + min(3, 4) + max(2u, 5u) + fmax(1.0, 2.0);
        *r++ = __float_as_uint(1.0f);
        *r++ = __longlong_as_double(0x4000000000000000LL) + __fmaf_rn(x, x, x) + copysign(1.0f, -x);
        const uint4 four = make_uint4(1, 2, 3, 4);
        const uint2 two = make_uint2(5, 6);
        *r++ = four.x + four.y + four.z + four.w + two.x + two.y + alignof(uint4) + alignof(uint2) + sizeof(int2);
        __stcs(r, 7);
        *r = __ldcs(r) + __ldg(r) + __ldcg(r);"""
    result = execute(body, np.zeros(14), block=1)
    assert result.tolist() == [1, 5, 1, 1, 1, 3, 0.75, 3211840, 2**31 - 1, 12, 0x3F800000, 7, 53, 21]


def test_products_and_sums_are_rounded_apart():
    x = numbers(3000)
    y = execute("a[index] = b[index] * b[index + 1000] + b[index + 2000];", np.zeros(1000, np.float32), x, block=1000)
    np.testing.assert_array_equal(y, x[:1000] * x[1000:2000] + x[2000:])
