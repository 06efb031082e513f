"""What calls on CuPy arrays give, on which stream and device they run; and that nothing waits."""

import ctypes
import types

import numpy as np
import pytest

import fastbn
from fastbn.cuda import launch, plans
from tests.cases.arguments import GOOD, channels, data, label
from tests.cuda.harness import EVERY, arguments_of, by_function, by_layout, leaves, on_device
from tests.on_cupy import OnCupy
from tests.simt import host_cupy
from tests.support import DTYPES

pytestmark = pytest.mark.usefixtures("nothing_waits")


# --- results ----------------------------------------------------------------------------------------------------------


def is_array(value):
    return isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "data")


@by_function
def test_results_are_cupy_arrays(function):
    import cupy

    results = [a for a in leaves(function(**on_device(EVERY[function]()))) if is_array(a)]
    assert results
    assert {type(a) for a in results} == {cupy.ndarray}


@pytest.mark.slow  # NumPy's are compiled
@by_function
def test_results_are_like_numpys(function):
    """Shape, dtype, order and value."""
    ours, theirs = function(**on_device(EVERY[function]())), function(**EVERY[function]())
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert is_array(a) == is_array(b)
        if is_array(b):
            assert (a.shape, a.dtype, a.strides) == (b.shape, b.dtype, b.strides)
            np.testing.assert_allclose(host_cupy.to_numpy(a), b, rtol=1e-5, atol=1e-5)
        else:
            assert a == b


@pytest.mark.parametrize("function", [f for f, good in EVERY.items() if "out" in good()], ids=label)
def test_out_is_returned(function):
    arguments = on_device(EVERY[function]())
    results = list(leaves(function(**arguments)))
    assert all(any(a is result for result in results) for a in leaves(arguments["out"]))


WITHIN = {  # functions of the package, an output, and arrays of channels
    "batch_norm": lambda bn, out, a, b, _: bn.batch_norm(out, a, b, out=out)[0],
    "batch_norm_inference": lambda bn, out, a, b, c: bn.batch_norm_inference(out, a, b, c, out=out),
    "normalize": lambda bn, out, a, b, c: bn.normalize(out, a, b, c, out=out),
    "grad_input": lambda bn, out, a, b, _: bn.grad_input(out[::-1].copy(), out, a, b, None, a, b, 7, out=out),
    "batch_norm_backward": lambda bn, out, a, b, _: (
        bn.batch_norm_backward(out[::-1].copy(), bn.batch_norm(out.copy())[1], dmean=a, dvar=b, out=out).x
    ),
}


@pytest.mark.parametrize("name", WITHIN)
def test_parameters_within_out(name):
    """Kernels read them where they lie, blocks one after another, while others write."""
    values = data((70, 8), np.float64)
    expected = WITHIN[name](OnCupy(), values.copy(), *values[-3:].copy())
    for _ in range(2):
        out = values.copy()
        assert WITHIN[name](OnCupy(), out, *out[-3:]) is out
        np.testing.assert_allclose(out, expected, rtol=1e-12)


def small_numbers(library, dtype):
    """Everything that is done with numbers of channels alone, where NumPy and CuPy do the arithmetic."""
    rng = np.random.default_rng(0)

    def batch(counts):
        mean, m2 = rng.random((2, 4)) * counts
        return library.Moments(np.array(counts, float), mean, m2)

    batches = [batch([8, 0, 5, 1]), batch([3, 2, 0, 0]), batch([2, 2, 2, 0])]
    merged = library.merge(*batches)
    mean, var, gamma, beta = rng.random((4, 4)).astype(DTYPES[dtype])
    yield from (*merged, *library.population(batches))
    infinite = merged._replace(m2=np.array([np.inf, 1.0, np.nan, 2.0]))
    for moments, options in (
        (merged, {}),
        (merged, {"rate": 1.0, "correction": 0}),
        (infinite, {"skip_nonfinite": True, "rate": 0.5}),
    ):
        yield from library.update_running(mean, var, moments, **options)
        running = mean.copy(), var.copy()
        updated = library.update_running(*running, moments, out=running, **options)
        assert all(a is b for a, b in zip(updated, running, strict=True))
        yield from running
    of = library.Moments
    for moments in (batches[0], merged):
        yield from (of.var(moments), of.var(moments, correction=1), of.std(moments), of.rstd(moments, eps=0.1))
    kernel = rng.standard_normal((4, 3, 4)).astype(DTYPES[dtype])
    yield from library.fold(kernel, None, mean, var)
    yield from library.fold(kernel, beta, mean, var, gamma, beta, eps=0.5, axis=-1)
    x = rng.standard_normal((2, 4, 3)).astype(DTYPES[dtype])
    frozen = library.Saved.frozen(x, mean, var[:1], gamma, y=x, activation="relu")
    yield from (frozen.mean, frozen.rstd)
    arrays, static = frozen.arrays()
    assert hash(static) == hash(library.Saved.from_arrays(arrays, static).arrays()[1])
    yield from library.Saved.from_arrays(arrays, static).arrays()[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_channels(dtype):
    """The same bits as on NumPy arrays."""
    with np.errstate(all="ignore"):
        pairs = list(zip(small_numbers(OnCupy(), dtype), small_numbers(fastbn, dtype), strict=True))
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_current_stream(counted, monkeypatch, strategy):
    """Kernels are launched on CuPy's current stream, and counters cleared in its order."""
    import cupy

    streams, function = [], launch.function

    def noted(*args):
        compiled = function(*args)

        def run(*given, stream=None, **options):
            streams.append(stream)
            assert len(given) <= 4  # the fifth would be the stream
            return compiled(*given, **options)

        return run

    def memset(address, value, size, stream):
        streams.append(stream)
        ctypes.memset(address, value, size)

    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    monkeypatch.setattr(launch, "function", noted)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device_id=-1: types.SimpleNamespace(ptr=77))
    monkeypatch.setattr(cupy.cuda.runtime, "memsetAsync", memset)
    x, dy, keywords = arguments_of("NCHW", "plain")
    for _ in range(2):
        _, saved = fastbn.batch_norm(x, **keywords)
        fastbn.batch_norm_backward(dy, saved)
    each = {"cooperative": [77, None], "two passes": [None, None]}.get(strategy, [None])
    assert streams == each * 4


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", EVERY, ids=label)
def test_the_arrays_device_is_used(devices, function):
    """Not the current one, which is current again after the call."""
    arguments = on_device(EVERY[function](), 1)
    if function is fastbn.update_running:
        del arguments["out"]  # which would be all of its results
    for _ in range(2):
        results = function(**arguments)
        assert {a.data.device_id for a in leaves(results) if hasattr(a, "data")} == {1}
    assert set(devices.launched) <= {(1, 1)}


def test_the_current_device_after_an_error(devices):
    arguments = on_device(GOOD[fastbn.batch_norm](), 1)
    with pytest.raises(ValueError, match="eps"):
        fastbn.batch_norm(**arguments | {"eps": -1.0})
    with pytest.raises(ValueError, match="eps"):
        fastbn.fold(**on_device(GOOD[fastbn.fold](), 1) | {"eps": -1.0})
    assert devices.current == [0]


def test_arrays_like_earlier_ones_on_another_device(devices):
    """What is remembered of a call is of one device."""
    mean, var = channels(), channels(1)
    for current in (0, 1):
        devices.current.append(current)
        for number in (0, 1, 0, 1):
            devices.launched.clear()
            x, dy = on_device((data(), data(seed=5)), number)
            y, saved = fastbn.batch_norm(x)
            grads = fastbn.batch_norm_backward(dy, saved)
            z = fastbn.batch_norm_inference(x, *on_device((mean, var), number))
            assert {a.data.device_id for a in leaves((y, tuple(saved.moments), grads, z)) if a is not None} == {number}
            assert devices.launched == [(number, number)] * 3
        assert devices.current.pop() == current


# --- synchronised statistics ------------------------------------------------------------------------------------------


@by_layout
def test_a_hook_s_vector(cuda_device, layout):
    """Float64 on the device, (count, mean, m2) and then (dgamma, dbeta); any real dtype may come back."""
    import cupy

    x, dy, keywords = arguments_of(layout, "plain")
    seen = []

    def gather(vector):
        seen.append(vector)
        return vector[None].astype(np.float32)

    _, saved = fastbn.batch_norm(x, **keywords, gather=gather)
    grads = fastbn.batch_norm_backward(dy, saved, gather=gather)
    expected = fastbn.moments(x, **keywords), (grads.gamma, grads.beta)
    for vector, parts in zip(seen, expected, strict=True):
        assert type(vector) is cupy.ndarray
        assert (vector.dtype, vector.ndim) == (np.float64, 1)
        assert vector.flags.c_contiguous
        np.testing.assert_array_equal(
            host_cupy.to_numpy(vector), np.concatenate([host_cupy.to_numpy(a) for a in parts])
        )
    assert saved.gathered
    np.testing.assert_allclose(*(host_cupy.to_numpy(a) for a in (saved.mean, expected[0].mean)), rtol=1e-6)
