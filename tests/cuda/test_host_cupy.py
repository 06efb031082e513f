"""CuPy's arrays over host memory: the same memory, NumPy's numbers, CuPy's rules, and nothing left behind."""

import gc
import operator
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest

import fastbn
from tests.conftest import missing
from tests.cuda.harness import numbers
from tests.simt import cuda, host_cupy
from tests.simt.host_cupy import to_cupy, to_numpy
from tests.support import DTYPES, LAYOUTS

X = numbers(3, 4)

# --- memory -----------------------------------------------------------------------------------------------------------

SHARED = {name: layout for name, layout in LAYOUTS.items() if name not in ("unaligned", "swapped bytes")}


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_shared(host, layout, dtype):
    layout = SHARED[layout]
    a = layout.place(numbers(*layout.shape, dtype=DTYPES[dtype]))
    c = to_cupy(a)
    assert (c.shape, c.strides, c.dtype, c.data.ptr) == (a.shape, a.strides, a.dtype, a.ctypes.data)
    low, high = np.lib.array_utils.byte_bounds(a)
    assert c.data.mem.ptr <= low <= high <= c.data.mem.ptr + c.data.mem.size
    back = to_numpy(c)
    assert (back.shape, back.strides, back.dtype, back.ctypes.data) == (a.shape, a.strides, a.dtype, a.ctypes.data)
    c[...] = 2.5
    np.testing.assert_array_equal(a, np.full_like(a, 2.5))
    back[...] = 3.5
    np.testing.assert_array_equal(c.get(), a)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.complex128, np.float16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
def test_any_dtype_and_size(host, dtype, shape):
    a = np.ones(shape, dtype)
    c = to_cupy(a)
    assert (c.shape, c.dtype) == (a.shape, a.dtype)
    np.testing.assert_array_equal(to_numpy(c), a)
    np.testing.assert_array_equal(to_numpy(c.copy()), a)


@pytest.mark.parametrize("layout", ["unaligned", "swapped bytes"])
def test_what_no_gpu_holds_is_copied(host, layout):
    layout = LAYOUTS[layout]
    a = layout.place(numbers(*layout.shape, dtype=np.float32))
    c = to_cupy(a)
    assert c.dtype == np.float32
    assert c.data.ptr % 4 == 0
    assert not np.shares_memory(to_numpy(c), a)
    np.testing.assert_array_equal(to_numpy(c), a)


def test_other_dtypes_are_refused(host):
    for a in (np.array([None]), np.ones(2, np.longdouble), np.array(["a"])):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            to_cupy(a)


def test_memory_lives_as_long_as_its_views(host, cupy):
    a = numbers(1000)
    expected, alive = a[10:20].copy(), weakref.ref(a)
    c = to_cupy(a[10:20])[::-1]
    back = to_numpy(c)
    del a, c
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(back[::-1], expected)
    del back
    gc.collect()
    assert alive() is None
    allocated = to_numpy(cupy.full(1000, 7.0))
    gc.collect()
    assert (allocated == 7).all()


def test_views_of_one_array_may_share_memory(host, cupy):
    """CuPy compares bounds within one allocation only."""
    a = numbers(6, 4)
    first, second, rest = to_cupy(a[:3]), to_cupy(a[2:]), to_cupy(a[3:][::-1])
    assert cupy.may_share_memory(first, second)
    assert cupy.may_share_memory(second, to_cupy(to_numpy(first)))
    assert not cupy.may_share_memory(first, rest)
    assert not cupy.may_share_memory(first, to_cupy(a.copy()))
    by_hand = np.lib.stride_tricks.as_strided(a[:1], (3, 2), (8, 8))
    np.testing.assert_array_equal(to_numpy(to_cupy(by_hand)), by_hand)


def test_allocations(host, cupy):
    x = to_cupy(numbers(5, 7, dtype=np.float32)).T
    results = [cupy.empty((3, 5)), cupy.empty_like(x), cupy.ndarray((4,), np.float16)]
    assert host.allocations == [120, 140, 8]
    assert results[1].strides == x.strides
    for result in results:
        assert result.data.ptr % 512 == 0
        assert np.isnan(to_numpy(result)).all()  # what was never written
    assert cupy.empty((0, 3)).data.ptr == 0
    assert not host.operations


# --- CuPy's rules -----------------------------------------------------------------------------------------------------


def test_kinds_do_not_mix(host, cupy):
    a, c = X, to_cupy(X)
    for call in (
        lambda: a + c,
        lambda: c + a,
        lambda: a * c,
        lambda: c / np.array(1.0),
        lambda: cupy.maximum(c, a),
        lambda: np.maximum(c, a),
        lambda: cupy.where(c > 1, c, a),
        lambda: cupy.concatenate([c, a]),
        lambda: operator.iadd(c, a),
        lambda: operator.iadd(a.copy(), c),
        lambda: c + [1.0] * 4,
        lambda: np.asarray(c),
        lambda: np.array([c[0], c[1]]),
        lambda: memoryview(c),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="non-scalar"):
        c[...] = a
    assert isinstance(cupy.asarray(a), cupy.ndarray)
    assert (c > np.array(4.0)).dtype == bool


def test_what_cupy_has_not_is_refused(host, cupy):
    c = to_cupy(X)
    for call in (
        lambda: c.sum(where=c > 1),
        lambda: cupy.sum(c, where=c > 1),
        lambda: cupy.add(c, c, where=c > 1),
        lambda: c.var(mean=1.0),
        lambda: c.astype(np.float32, casting="same_kind"),
        lambda: cupy.zeros(3, like=X),
        lambda: cupy.add(to_cupy(np.arange(3)), 1.5, out=to_cupy(np.arange(3))),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(AttributeError):
        c.flags.writeable  # noqa: B018 - reading it raises
    with pytest.raises(ValueError, match="ambiguous"):
        bool(c)
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.zeros(3, np.longdouble)


def test_where_has_no_bfloat16(host, cupy):
    c = to_cupy(X.astype(ml_dtypes.bfloat16))
    assert cupy.where(c > 4, c, c).dtype == np.float32
    assert cupy.maximum(c, c).dtype == c.dtype


def test_gpus_do_not_warn(host, cupy):
    zero, huge = to_cupy(np.zeros(2)), to_cupy(np.full(2, 1e30))
    for value in (zero / zero, cupy.sqrt(zero - 1), zero[:0].mean()):
        assert np.isnan(to_numpy(value)).all()
    assert np.isinf(to_numpy((huge * huge).astype(np.float16))).all()


def test_views_stay_views(host, cupy):
    a = numbers(4, 6)
    c = to_cupy(a)
    for view in (c[1:, ::2], c[::-1], c[2], c[..., None], c.T, c.transpose(1, 0), c.reshape(2, 12), c.ravel(), c[1, 1]):
        assert view.data.mem is c.data.mem
    for view in (cupy.broadcast_to(c, (2, 4, 6)), cupy.squeeze(c[:1]), cupy.moveaxis(c, 0, 1), c.view(np.int64)):
        assert view.data.mem is c.data.mem
    assert not host.operations
    for copy in (c.T.reshape(-1), c.T.ravel(), c.flatten(), c.copy(), c[[0, 2]], c[c[:, 0] > 3], cupy.array(c)):
        assert copy.data.mem is not c.data.mem
    np.testing.assert_array_equal(to_numpy(c.T.reshape(-1)), a.T.reshape(-1))


def test_indexing(host, cupy):
    a = numbers(4, 6)
    mask, rows = a > 4, np.array([2, 0])
    c, c_mask, c_rows = map(to_cupy, (a, mask, rows))
    pairs = ((c[c_mask], a[mask]), (c[c_rows, 1:], a[rows, 1:]), (c[rows], a[rows]), (c[1, 2], a[1, 2]))
    for result, expected in pairs:
        assert isinstance(result, cupy.ndarray)
        np.testing.assert_array_equal(to_numpy(result), expected)
    b, d = a.copy(), to_cupy(a.copy())
    for array, by, source in ((b, (mask, rows), a), (d, (c_mask, c_rows), c)):
        array[0] = 1
        array[:, 1] = source[:, 2]
        array[by[0]] = 2
        array[by[1], 3] = source[:2, 0]
        array[...] = array[::-1]
    np.testing.assert_array_equal(to_numpy(d), b)
    assert [float(v) for v in c[0]] == a[0].tolist() == c[0].tolist()


@pytest.mark.parametrize("order", ["C", "F", "A", "K"])
def test_orders_of_copies(host, cupy, order):
    base = numbers(3, 4, 5)
    for a in (base, base.T, base.transpose(1, 0, 2), base[:, ::2], np.asfortranarray(base)):
        for result, expected in (
            (to_cupy(a).astype(np.float32, order=order), a.astype(np.float32, order=order)),
            (to_cupy(a).copy(order), a.copy(order)),
            (cupy.empty_like(to_cupy(a), order=order), np.empty_like(a, order=order)),
            (cupy.array(to_cupy(a), order=order), np.array(a, order=order)),
        ):
            assert result.strides == expected.strides
    c = to_cupy(base)
    assert c.astype(np.float64, copy=False) is c
    assert c.astype(np.float64, order="F", copy=False) is not c


# --- counting ---------------------------------------------------------------------------------------------------------


def test_operations_are_counted(host, cupy):
    c = to_cupy(numbers(3, 4, dtype=np.float32))
    host.operations.clear()
    c.astype(np.float32, copy=False).T.reshape(4, 3)[1:]
    cupy.empty_like(c)
    c[:0] + 1
    assert not host.operations
    runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
    for call, expected in (
        (lambda: c + c * 2, {"add": 1, "multiply": 1}),
        (lambda: c.astype(np.float64), {"copy": 1}),
        (lambda: cupy.ascontiguousarray(c.T), {"copy": 1}),
        (lambda: cupy.zeros(3), {"memset": 1}),
        (lambda: cupy.ones(3), {"fill": 1}),
        (lambda: c.fill(2), {"fill": 1}),
        (lambda: c.sum(), {"sum": 1}),
        (lambda: bool(c.sum() > 0), {"sum": 1, "greater": 1, "get": 1}),
        (lambda: cupy.asarray(np.ones(3)), {"set": 1}),
        (lambda: runtime.memsetAsync(c.data.ptr, 0, c.nbytes, stream.ptr), {"memset": 1}),
    ):
        host.operations.clear()
        call()
        assert host.operations == expected
    assert not to_numpy(c).any()


# --- device and streams -----------------------------------------------------------------------------------------------


def test_device_and_stream(host, cupy, monkeypatch):
    stream = cupy.cuda.get_current_stream()
    assert stream.ptr == 0
    assert isinstance(stream, cupy.cuda.Stream)
    stream.synchronize()
    with cupy.cuda.Device() as device, cupy.cuda.Stream(non_blocking=True):
        device.synchronize()
    assert device.id == cupy.cuda.runtime.getDevice() == cupy.empty(3).device.id == 0
    monkeypatch.setitem(host.ATTRIBUTES, "MultiProcessorCount", 7)
    assert device.attributes["MultiProcessorCount"] == 7
    assert cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, 0) == 7
    assert device.compute_capability == "90"
    assert to_cupy(X, device=1).device.id == 1


# --- nothing is left --------------------------------------------------------------------------------------------------


def everything(cupy):
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0].startswith("cupy")}
    state = {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}
    state |= {("ndarray", key): value for key, value in vars(cupy.ndarray).items()}
    return state | {("inherited", key): getattr(cupy.ndarray, key) for key in dir(cupy.ndarray)}


def test_everything_is_undone(cupy):
    import cupyx.scipy.special  # noqa: F401 - what `installed` imports

    x = to_cupy(np.ones((2, 3)))
    attempts = (
        lambda: x + x,
        lambda: x + 1,
        lambda: 1 - x,
        lambda: -x,
        lambda: x < x,
        lambda: x.T.reshape(-1),
        lambda: x.sum(),
        lambda: x.get(),
        lambda: x.astype(np.float32),
        lambda: operator.iadd(x, x),
        lambda: operator.setitem(x, 0, 1),
        lambda: operator.setitem(x, 0, x[1, ::-1]),
        lambda: cupy.ones(3),
        lambda: np.sqrt(x),
        lambda: cupy.where(x, x, x),
        lambda: cupy.concatenate([x, x]),
        lambda: cupy.cuda.get_current_stream(),
        lambda: cupy.cuda.Device(),
        lambda: cupy.cuda.runtime.getDevice(),
    )

    def fail():
        errors = []
        for attempt in attempts:
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as info:
                attempt()
            errors.append(str(info.value))
        return errors

    errors, before, allocator = fail(), everything(cupy), cupy.cuda.get_allocator()

    def use_and_raise():
        with host_cupy.installed():
            to_numpy(x)[...] = 1
            for attempt in attempts:
                attempt()
            raise KeyError

    with pytest.raises(KeyError):
        use_and_raise()
    after = everything(cupy)
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if value is not after[key] and value != after[key]]
    assert not changed
    assert cupy.cuda.get_allocator() == allocator
    assert fail() == errors


# --- fastbn on such arrays --------------------------------------------------------------------------------------------


@pytest.fixture
def harness(cupy, request):
    """With fastbn's kernels."""
    if reason := cuda.available():
        missing(request, reason)
    with cuda.installed():
        yield host_cupy


def test_moments_merge_and_run_as_numpys(harness, cupy):
    rng = np.random.default_rng(0)

    def batch(n):
        count = np.array([n, 0.0, n, 1.0])
        mean, m2 = np.where(count > 0, rng.random((2, 4)), np.nan)
        return fastbn.Moments(count, mean, m2)

    batches = [batch(8.0), batch(3.0), batch(5.0)]
    on_gpus = [fastbn.Moments(*map(to_cupy, moments)) for moments in batches]
    running = rng.random(4).astype(np.float32), rng.random(4).astype(ml_dtypes.bfloat16)
    outs = tuple(to_cupy(a.copy()) for a in running)

    def updated(first, second, moments):
        for keywords in ({}, {"rate": 1, "skip_nonfinite": True}, {"correction": 0}):
            yield from fastbn.update_running(first, second, moments, **keywords)

    first, first_on_gpu = batches[0], on_gpus[0]
    with np.errstate(all="ignore"):
        pairs = [
            (fastbn.merge(*on_gpus), fastbn.merge(*batches)),
            (fastbn.population(on_gpus), fastbn.population(batches)),
            (updated(*map(to_cupy, running), first_on_gpu), updated(*running, first)),
            (fastbn.update_running(*outs, on_gpus[1], out=outs), fastbn.update_running(*running, batches[1])),
            ((first_on_gpu.var(1), first_on_gpu.std()), (first.var(1), first.std())),
            ((first_on_gpu.rstd(),), (first.rstd(),)),
        ]
    for results, expected in pairs:
        for result, wanted in zip(results, expected, strict=True):
            assert isinstance(result, cupy.ndarray)
            assert result.dtype == wanted.dtype
            np.testing.assert_array_equal(to_numpy(result), wanted)
    assert harness.operations["get"] == 0  # nothing waits for the GPU
    mixed = first_on_gpu._replace(mean=first.mean)
    with pytest.raises(TypeError, match=r"moments\[0\]\.mean: expected a cupy\.ndarray"):
        fastbn.merge(mixed)
