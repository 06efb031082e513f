"""What the stand-in of the CUDA driver refuses, and that fastbn's calls on it are what they should be."""

import contextlib
import gc

import numpy as np
import pytest

import fastbn
from tests.conftest import missing
from tests.cuda_compile import options_of_cupy
from tests.ptx import compiled as compile_kernels
from tests.ptx import cuda
from tests.ptx.driver import DriverError
from tests.ptx.handwritten import text
from tests.ptx.program import program
from tests.ptx.streams import StreamError
from tests.ptx.text import PtxError
from tests.simt import host_cupy
from tests.support import LAYOUTS, OPTIONS, make_case, some_slow

pytest.importorskip("cupy")

from fastbn.cuda import launch, plans


@pytest.fixture(autouse=True)
def compiled(request):
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


@pytest.fixture(params=cuda.ARCHITECTURES, ids="sm_{}".format)
def driver(request):
    with cuda.installed(request.param) as found:
        yield found


@pytest.fixture
def device():
    """Of compute capability 9.0."""
    with cuda.installed(90) as found:
        yield found


class Written:
    """A kernel of hand-written PTX as a function of a driver; `registers` as ptxas might have found."""

    def __init__(self, driver, body="", directives="", registers=32):
        self.program = program(text(body, directives))
        self.driver, self.name, self.macros = driver, "kernel", {}
        self.registers = self.most_registers = registers
        self.static_shared, self.cluster = self.program.entry.static_shared, self.program.entry.cluster or 1
        self.most_dynamic = 48 << 10

    def __call__(self, *arrays, grid=1, block=32, shared=0, cooperative=False, params=64, stream=None):
        given = np.zeros(8, np.uint64)
        given[: len(arrays)] = [a.data.ptr for a in arrays]
        self.driver.launch(self, (grid, 1, 1), (block, 1, 1), given.tobytes()[:params], shared, cooperative, stream)


# --- launches ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "no blocks": ({}, {"grid": 0}, "a grid of 0 blocks"),
    "too many blocks": ({}, {"grid": 1 << 31}, "a grid of 2147483648 blocks"),
    "no threads": ({}, {"block": 0}, "blocks of 0 threads"),
    "too many threads": ({}, {"block": 1056}, "blocks of 1056 threads, the device has 1024"),
    "more threads than promised": ({"directives": ".maxntid 64, 1, 1"}, {"block": 96}, "96 threads, made for 64"),
    "too many registers": ({"registers": 128}, {"block": 1024}, "1024 threads of 128 registers, the device has 65536"),
    "shared memory": ({}, {"shared": (48 << 10) + 1}, "49153 bytes of shared memory, the function's attribute allows"),
    "parameters": ({}, {"params": 56}, "56 bytes of parameters, the kernel takes 64"),
    "clusters": (
        {"directives": ".explicitcluster\n.reqnctapercluster 4, 1, 1"}, {"grid": 6}, "6 blocks has no clusters of 4",
    ),
    "no room": ({"registers": 255}, {"block": 256, "cooperative": True, "grid": 4}, "cooperative grid of 4 .* for 3"),
    "a cluster without room": (
        {"directives": ".explicitcluster\n.reqnctapercluster 8, 1, 1", "registers": 255}, {"grid": 8, "block": 256},
        "clusters of 8 blocks, there is room for 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_launches_that_the_driver_refuses(device, what):
    kernel, given, message = REFUSED[what]
    with pytest.raises(DriverError, match=f"kernel: .*{message}"):
        Written(device, **kernel)(**given)
    assert device.launches == []


def test_launches_at_the_limits(device):
    Written(device)(block=1024, shared=48 << 10)
    Written(device, directives=".explicitcluster\n.reqnctapercluster 2, 1, 1")(grid=4)
    Written(device, registers=255)(block=256, grid=3, cooperative=True)
    assert [step.grid for step in device.launches] == [1, 4, 3]


def test_occupancy(device):
    """Of blocks by registers, threads and shared memory, whichever ends first."""
    device.attributes["MaxBlocksPerMultiprocessor"] = 32
    for registers, threads, shared, expected in (
        (32, 256, 0, 8),  # 2048 threads
        (64, 256, 0, 4),
        (128, 256, 0, 2),
        (255, 256, 0, 1),
        (16, 32, 0, 32),  # blocks of a multiprocessor
        (32, 256, 100 << 10, 2),
        (32, 256, 227 << 10, 1),
        (32, 256, 228 << 10, 0),
        (33, 1024, 0, 1),  # registers are given to warps by 256
    ):
        assert device.blocks_of(Written(device, registers=registers), threads, shared) == expected


def test_shared_memory_is_asked_for_before_it_is_used(device):
    """`launch.function` sets the attribute of a function to all that the device has."""
    raw = device.raw_kernel(
        launch.source("update_running"), "update_running", (*launch.COMPILER_OPTIONS, "-DTHREADS=128")
    )
    assert raw.max_dynamic_shared_size_bytes == 48 << 10
    raw.max_dynamic_shared_size_bytes = 16 << 10
    with pytest.raises(DriverError, match="device has 16384"):
        raw.max_dynamic_shared_size_bytes = (16 << 10) + 1
    assert launch.function(0, "update_running", (("THREADS", 128),)).most_dynamic == 16 << 10


# --- calls of fastbn --------------------------------------------------------------------------------------------------


def arguments(layout="NCHW", options="affine residual relu", dtype="float32"):
    case = make_case(LAYOUTS[layout], dtype, OPTIONS[options])
    given = {"gamma": case.gamma, "beta": case.beta, **case.epilogue}
    given = {name: host_cupy.to_cupy(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    return host_cupy.to_cupy(case.x), host_cupy.to_cupy(case.dy), given


def test_the_device_is_asked_and_the_launches_are_its(driver):
    x, dy, given = arguments()
    _, saved = fastbn.batch_norm(x, **given)
    fastbn.batch_norm_backward(dy, saved)
    assert launch.device(0).architecture == driver.architecture
    assert [step.kernel for step in driver.launches] == ["forward", "backward"]
    assert all(f.program.entry.target == driver.architecture for f in driver.functions.values())
    assert all(0 < f.registers <= f.most_registers for f in driver.functions.values())


def test_registers_and_text_are_of_the_same_compilation(device):
    """ptxas keeps within what `__launch_bounds__` promise, and CuPy's machine code is of the text that is executed."""
    options = (*launch.COMPILER_OPTIONS, "-DTHREADS=128")
    launch.function(0, "update_running", (("THREADS", 128),))
    (f,) = device.functions.values()
    ptx, log = compile_kernels.compiled(
        launch.source("update_running"), (*options, *options_of_cupy(90), "-Xptxas", "-v")
    )
    assert ptx == f.program.text
    assert f"Used {f.registers} registers" in log


def test_the_group_of_a_cooperative_launch_has_room(driver, monkeypatch):
    """As many blocks as compiled registers allow, by the driver's occupancy; one more is refused."""
    monkeypatch.setitem(plans.FORCED, "strategy", "cooperative")
    x, _, given = arguments("NHWC many rows", "plain")
    fastbn.batch_norm(x, **given)
    (step,) = driver.launches
    (f,) = (f for f in driver.functions.values() if f.name == "forward")
    room = driver.blocks_of(f, step.threads, step.shared) * driver.attributes["MultiProcessorCount"]
    assert step.cooperative
    assert step.grid <= room
    monkeypatch.setitem(driver.attributes, "MultiProcessorCount", 0)
    with pytest.raises(DriverError, match="there is room for 0"):
        fastbn.batch_norm(x, **given)


def test_another_grid_than_planned_traps(device):
    x, _, given = arguments()
    fastbn.batch_norm(x, **given)
    (f,) = (f for f in device.functions.values() if f.name == "forward")
    plan = device.launches[0]
    params = bytes(f.program.entry.parameter_bytes)
    with pytest.raises(PtxError, match=r"trap|division by 0"):
        device.launch(f, (plan.grid + 1, 1, 1), (plan.threads, 1, 1), params, plan.shared, plan.cooperative)


def test_freed_memory_is_refused(device):
    body = "mul.wide.u32 %rd1, %r90, 4; add.s64 %rd1, %rd90, %rd1; st.global.u32 [%rd1], %r90;"
    kernel = Written(device, body)
    a = host_cupy.to_cupy(np.zeros(32, np.uint32))
    kernel(a)
    assert host_cupy.to_numpy(a).tolist() == list(range(32))

    class Gone:
        ptr = a.data.ptr

    freed = type("Array", (), {"data": Gone})
    del a
    gc.collect()
    with pytest.raises(PtxError, match=r"st.global by thread 0 .* is (in freed memory|in no allocation|out of bounds)"):
        kernel(freed)


# --- streams ----------------------------------------------------------------------------------------------------------

STORE = "mul.wide.u32 %rd1, %r90, 4; add.s64 %rd1, %rd90, %rd1; st.global.u32 [%rd1], %r90;"
LOAD = "mul.wide.u32 %rd1, %r90, 4; add.s64 %rd1, %rd90, %rd1; ld.global.u32 %r1, [%rd1];"


@pytest.fixture
def two(device):
    """A kernel that writes, one that reads, an array and two streams."""
    array = host_cupy.to_cupy(np.zeros(32, np.uint32))
    streams = [device.streams.Stream(non_blocking=True) for _ in range(2)]
    return Written(device, STORE), Written(device, LOAD), array, *streams


def test_streams_need_an_event(two, device):
    store, load, array, first, second = two
    store(array, stream=first)
    load(array, stream=first)
    with pytest.raises(StreamError, match=r"stream 2 uses 128 bytes .* that stream 1 has written, and no event"):
        load(array, stream=second)
    second.wait_event(first.record())
    load(array, stream=second)
    with pytest.raises(StreamError, match="that stream 2 has read"):
        store(array, stream=first)
    first.wait_event(second.record(device.streams.Event()))
    store(array, stream=first)


def test_an_event_is_of_what_was_given_before(two):
    store, load, array, first, second = two
    event = first.record()
    store(array, stream=first)
    second.wait_event(event)
    with pytest.raises(StreamError, match="no event"):
        load(array, stream=second)


def test_the_null_stream_waits_for_streams_that_block(two, device):
    store, load, array, first, _ = two
    blocking = device.streams.Stream()
    store(array, stream=blocking)
    load(array)
    store(array, stream=blocking)
    load(array, stream=device.streams.null)
    with pytest.raises(StreamError, match="no event"):
        load(array, stream=first)


@contextlib.contextmanager
def counters_cleared_on_the_null_stream(driver, patch):
    """What `launch.clear` must not do."""
    memset = driver.memset
    patch.setattr(launch.runtime, "memsetAsync", lambda address, value, size, _: memset(address, value, size, 0))
    yield


@pytest.mark.parametrize("strategy", some_slow([None, "cooperative", "two passes"], ["cooperative"]))
def test_all_of_a_call_is_on_the_current_stream(device, monkeypatch, strategy):
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    x, dy, given = arguments("NHWC many rows", "plain")
    stream = device.streams.Stream(non_blocking=True)
    with stream:
        _, saved = fastbn.batch_norm(x, **given)
        fastbn.batch_norm_backward(dy, saved)
    assert {step.stream for step in device.launches} == {stream.ptr}
    if strategy == "cooperative":
        with (
            counters_cleared_on_the_null_stream(device, monkeypatch),
            stream,
            pytest.raises(StreamError, match="no event"),
        ):
            fastbn.batch_norm(x, **given)


# --- captures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [None, "cooperative", "two passes"])
def test_calls_are_captured_and_replayed(device, monkeypatch, strategy):
    """The graph computes from what the arrays hold when it runs."""
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    x, dy, given = arguments("NHWC many rows", "plain")
    fastbn.batch_norm_backward(dy, fastbn.batch_norm(x, **given)[1])
    before = len(device.launches)
    stream = device.streams.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        y, saved = fastbn.batch_norm(x, **given)
        grads = fastbn.batch_norm_backward(dy, saved)
        graph = stream.end_capture()
    assert len(device.launches) == before
    assert np.isnan(host_cupy.to_numpy(y)).all()
    for seed in range(2):
        host_cupy.to_numpy(x)[...] = np.random.default_rng(seed).standard_normal(x.shape)
        graph.launch(stream)
        with cuda_of_now(device):
            again, saved_now = fastbn.batch_norm(x, **given)
            expected = fastbn.batch_norm_backward(dy, saved_now)
        assert np.array_equal(host_cupy.to_numpy(y), host_cupy.to_numpy(again))
        assert np.array_equal(host_cupy.to_numpy(grads.x), host_cupy.to_numpy(expected.x))


@contextlib.contextmanager
def cuda_of_now(driver):
    """On another stream, after all that was given to others."""
    stream = driver.streams.Stream(non_blocking=True)
    for other in list(driver.streams.known.values()):
        stream.wait_event(other.record())
    with stream:
        yield
    for other in list(driver.streams.known.values()):
        other.wait_event(stream.record())


def test_what_a_capture_does_not_allow(two, device):
    store, _, array, first, second = two
    first.begin_capture()
    with pytest.raises(StreamError, match="captured twice"):
        first.begin_capture()
    with pytest.raises(StreamError, match="a stream is waited for while it is captured"):
        first.synchronize()
    with pytest.raises(StreamError, match="the device is waited for"):
        device.streams.wait_for_device()
    store(array, stream=second)  # another stream goes on
    graph = first.end_capture()
    assert graph.work == []
    with pytest.raises(StreamError, match="a capture ends that did not begin"):
        first.end_capture()
    with pytest.raises(StreamError, match="the null stream cannot be captured"):
        device.streams.null.begin_capture()
    blocking = device.streams.Stream()
    blocking.begin_capture()
    with pytest.raises(StreamError, match="the null stream is used while"):
        store(array, stream=device.streams.null)


def test_what_cupy_computes_is_in_no_graph_here(device):
    """Weights are given their shape by CuPy's operations."""
    case = make_case(LAYOUTS["NCHW"], "float32", OPTIONS["where weights residual"])
    x, where, weights = (host_cupy.to_cupy(a) for a in (case.x, case.keywords["where"], case.keywords["weights"]))
    fastbn.batch_norm(x, where=where, weights=weights)
    stream = device.streams.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        fastbn.batch_norm(x, where=where, weights=weights)
        with pytest.raises(StreamError, match="operations of CuPy ran while a stream was captured"):
            stream.end_capture()


def test_a_graph_whose_memory_is_freed(device):
    x, _, given = arguments("NCHW", "plain")
    fastbn.batch_norm(x, **given)
    stream = device.streams.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        y, saved = fastbn.batch_norm(x, **given)
        graph = stream.end_capture()
    graph.launch(stream)
    del y, saved
    gc.collect()
    with pytest.raises(PtxError, match=r"is in freed memory|in no allocation|out of bounds"):
        graph.launch(stream)
