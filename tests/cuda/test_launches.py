"""What calls on CuPy arrays launch, do besides and allocate; what they leave behind."""

import collections
import contextlib
import functools
import types
from typing import Any

import pytest

import fastbn
from fastbn.cuda import launch, plans, problems
from tests.cases.arguments import batch, data
from tests.cuda.harness import EVERY, arguments_of, by_function, by_layout, leaves, on_device

pytestmark = pytest.mark.usefixtures("nothing_waits")

CASES = {"NCHW": "affine residual relu", "NHWC": "plain", "NC": "plain", "NCHW short rows": "plain"}
by_case = pytest.mark.parametrize(("layout", "options"), CASES.items(), ids=lambda value: value)

# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["float32", "float16", None])
@by_case
def test_one_launch_each(counted, layout, options, parameters):
    """And nothing else: no conversion of parameters, no transfer, on first calls and on others."""
    x, dy, keywords = arguments_of(layout, options)
    given = {}
    if parameters:
        n = x.shape[keywords["channel_axis"]]
        given = {name: on_device(data((n,), parameters)) for name in ("gamma", "beta")}
    keywords |= {"gamma": None, "beta": None} | given
    epilogue = {name: keywords[name] for name in ("residual", "activation") if name in keywords}
    axis = keywords["channel_axis"]
    mean, var = on_device((data((x.shape[axis],)), data((x.shape[axis],), seed=1)))
    frozen = fastbn.Saved.frozen(x, mean, var, keywords["gamma"], channel_axis=axis)
    for _ in range(3):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
        assert (counted.kernels, counted.operations) == (["forward"], {})
        counted(fastbn.batch_norm_backward, dy, saved)
        assert (counted.kernels, counted.operations) == (["backward"], {})
        counted(fastbn.batch_norm_inference, x, mean, var, **given, channel_axis=axis, **epilogue)
        assert (counted.kernels, counted.operations) == (["normalize"], {})
        counted(fastbn.batch_norm_backward, dy, frozen)
        assert (counted.kernels, counted.operations) == (["backward"], {})


@pytest.mark.parametrize("layout", ["NHWC as NCHW", "channel slice", "instance NCHW", "reversed rows", "ghost"])
def test_one_launch_each_of_arrays_that_can_be_viewed(counted, layout):
    x, dy, keywords = arguments_of(layout, "plain")
    for _ in range(2):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
        assert (counted.kernels, counted.operations) == (["forward"], {})
        counted(fastbn.batch_norm_backward, dy, saved)
        assert (counted.kernels, counted.operations) == (["backward"], {})


@pytest.mark.parametrize("options", ["where", "weights relu", "where weights residual"])
def test_one_launch_each_with_weights(counted, options):
    """Which are given the shape that kernels read before."""
    x, dy, keywords = arguments_of("NCHW", options)
    for _ in range(2):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
        assert counted.kernels == ["forward"]
        counted(fastbn.batch_norm_backward, dy, saved)
        assert counted.kernels == ["backward"]


@pytest.mark.parametrize(("layout", "copied_back"), [("spatial slice", 0), ("alternating", 1)])
def test_what_cannot_be_viewed_is_copied_once(counted, layout, copied_back):
    """Each input to its collapsed form, and where axes alternate too often the output from there."""
    x, dy, keywords = arguments_of(layout, "plain")
    for _ in range(2):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
        assert (counted.kernels, counted.operations) == (["forward"], {"copy": 1 + copied_back})
        counted(fastbn.batch_norm_backward, dy, saved)
        assert (counted.kernels, counted.operations) == (["backward"], {"copy": 2 + copied_back})


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float64"), ("float16", "float16")])
def test_running_statistics_are_one_launch(counted, dtypes):
    """Of any float dtypes, in place or not, of one axis or several, on first calls and on others."""
    moments, rate = on_device(batch((4, 3))), 0.25
    mean, var = on_device(tuple(data((4, 3), dtype) for dtype in dtypes))
    for like in (lambda a: a, lambda a: a.reshape(-1)):
        a, b, these = like(mean), like(var), type(moments)(*map(like, moments))
        for _ in range(3):
            counted(fastbn.update_running, a, b, these, rate=rate)
            assert (counted.kernels, counted.operations) == (["update_running"], {})
            assert counted.allocations == [a.nbytes, b.nbytes]
            counted(fastbn.update_running, a, b, these, rate=rate, correction=0, skip_nonfinite=True, out=(a, b))
            assert (counted.kernels, counted.operations, counted.allocations) == (["update_running"], {}, [])
            rate /= 2  # of every call anew


def test_cooperative_launches_clear_their_counters(counted, monkeypatch):
    monkeypatch.setitem(plans.FORCED, "strategy", "cooperative")
    x, _, keywords = arguments_of("NCHW", "plain")
    for _ in range(2):
        counted(fastbn.batch_norm, x, **keywords)
        assert (counted.kernels, counted.operations) == (["forward"], {"memset": 1})


@by_function
def test_calls_can_be_captured(counted, monkeypatch, function):
    """In a CUDA graph, after one call to warm up: what is loaded and allocated then serves later ones."""
    arguments = on_device(EVERY[function]())
    counted(function, **arguments)
    kernels, before = counted.kernels, collections.Counter(counted.allocations)

    def loaded(*_args):
        raise AssertionError("a kernel was loaded")

    monkeypatch.setattr(launch, "function", loaded)
    monkeypatch.setattr(launch, "blocks_per_processor", loaded)
    for _ in range(2):
        counted(function, **arguments)
        assert counted.kernels == kernels
        assert not collections.Counter(counted.allocations) - before
        assert not {"get", "set"} & counted.operations.keys()


# --- memory -----------------------------------------------------------------------------------------------------------


@by_case
def test_allocations(counted, layout, options):
    """One for each array like x, and one for all results of channels with the scratch behind them."""
    x, dy, keywords = arguments_of(layout, options)
    axis = keywords["channel_axis"]
    row, residual = x.shape[axis] * 8, "residual" in keywords
    for _ in range(3):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
    size, block = counted.allocations
    assert size == x.nbytes
    assert 4 * row <= block <= 4 * row * 5  # parts of four blocks
    numbers = (*saved.moments, saved.mean, saved.rstd, saved.count)
    assert len({a.data.mem.ptr for a in numbers}) == 1
    assert {a.data.mem.size for a in numbers} == {block}
    for _ in range(3):
        grads = counted(fastbn.batch_norm_backward, dy, saved)
    *sizes, block = counted.allocations
    assert sizes == [x.nbytes] * (1 + residual)
    assert 2 * row <= block <= 2 * row * 5
    assert grads.gamma.data.mem is grads.beta.data.mem
    for _ in range(3):
        counted(fastbn.batch_norm_inference, x, saved.mean, saved.rstd, channel_axis=axis)
    assert counted.allocations == [x.nbytes]


def test_out_is_not_allocated(counted):
    x, dy, keywords = arguments_of("NCHW", "plain")
    y, dx = x.copy(), x.copy()
    for _ in range(3):
        _, saved = counted(fastbn.batch_norm, x, **keywords, out=y)
        assert counted.allocations == [4 * 8 * 6]
        counted(fastbn.batch_norm_backward, dy, saved, out=dx)
        assert counted.allocations == [2 * 8 * 6]
        counted(fastbn.batch_norm_inference, x, saved.mean, saved.rstd, out=y)
        assert counted.allocations == []


@by_layout
def test_first_calls_allocate_no_more(counted, layout):
    x, dy, keywords = arguments_of(layout, "plain")
    for _ in range(2):
        _, saved = counted(fastbn.batch_norm, x, **keywords)
        assert len(counted.allocations) == 2
        counted(fastbn.batch_norm_backward, dy, saved)
        assert len(counted.allocations) == 2


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHWC as NCHW"])
def test_nothing_stays_alive(counted, buffers, layout):
    """What is remembered of a call does not hold its arrays: neither inputs nor results."""
    x, dy, keywords = arguments_of(layout, "affine residual relu")
    for _ in range(2):
        inputs = [a.copy() for a in (x, dy)]
        y, saved = fastbn.batch_norm(inputs[0], **keywords)
        grads = fastbn.batch_norm_backward(inputs[1], saved)
        z = fastbn.batch_norm_inference(inputs[0], saved.mean, saved.rstd, channel_axis=keywords["channel_axis"])
        assert any(buffer() is not None for buffer in buffers)
        del inputs, y, saved, grads, z
        assert all(buffer() is None for buffer in buffers)


@by_function
def test_results_alone_hold_memory(counted, buffers, function):
    """Scratch lives no longer than results."""
    arguments = on_device(EVERY[function]())
    results = function(**arguments)
    held = {a.data.mem.ptr for a in leaves(results) if hasattr(a, "data")}
    assert sum(buffer() is not None for buffer in buffers) <= len(held)
    del results
    assert all(buffer() is None for buffer in buffers)


# --- what a launch may ask for ----------------------------------------------------------------------------------------

INSTALLED_FUNCTION = launch.function.__wrapped__  # imported before kernels are executed on the CPU
H200 = launch.Device(0, 90, 132, 227 << 10)

ALLOWED: dict[Any, int] = {}
ASKED = collections.defaultdict(set)


class Function:
    """A `cupy.RawKernel` and its function, which kernels of one text and one set of options share with its limit."""

    shared_size_bytes = 16

    def __init__(self, *key, options):
        self.key = (*key, options)
        ALLOWED.setdefault(self.key, 48 << 10)

    @property
    def max_dynamic_shared_size_bytes(self):
        return ALLOWED[self.key]

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value):
        assert value + self.shared_size_bytes <= H200.shared
        ALLOWED[self.key] = value

    @property
    def kernel(self):
        def run(grid, block, args, shared_mem, **_options):
            assert shared_mem <= ALLOWED[self.key], "more shared memory than allowed"
            ASKED[self.key].add(shared_mem)

        return run


def test_shared_memory_is_allowed_whatever_came_before(monkeypatch):
    """One function serves shapes that keep different amounts on the chip, in any order: as an epoch's last batch."""
    context = types.SimpleNamespace(Device=lambda number: contextlib.nullcontext())
    monkeypatch.setattr(launch, "cupy", types.SimpleNamespace(RawKernel=Function, cuda=context))
    monkeypatch.setattr(launch, "function", functools.lru_cache(INSTALLED_FUNCTION))
    monkeypatch.setattr(launch, "device", lambda number: H200)
    for samples in (32, 24, 32, 8, 32):
        operand = problems.Placement((0, 512 * 784, 784, 1), 0)
        problem = problems.Problem(
            H200, (1, samples, 512, 784), 2, 4, (("x", operand), ("y", operand)), 0, (), (), False, False
        )
        plans.forward.__wrapped__(problem).bound(("x", "y"))(0, 0)
    assert max(map(len, ASKED.values())) > 1


def test_more_blocks_than_a_grid_has():
    with pytest.raises(ValueError, match=r"^x: expected channels for 2147483647 blocks of threads at most"):
        launch.Launch(None, 1 << 31, 32, 0, False, launch.TILES, {})
    launch.Launch(None, (1 << 31) - 1, 32, 0, False, launch.TILES, {})


def test_the_second_pass_goes_backwards(monkeypatch):
    """Through what the cache still holds of the first."""
    monkeypatch.setitem(plans.FORCED, "strategy", "two passes")
    x, dy, keywords = arguments_of("NCHW", "plain")
    found, bound = [], launch.Launch.bound

    def noted(self, present):
        names = self.params.integers + self.params.constants
        found.append(dict(zip(names, self.params.fixed.unpack(self.fixed), strict=True))["backwards"])
        return bound(self, present)

    monkeypatch.setattr(launch.Launch, "bound", noted)
    _, saved = fastbn.batch_norm(x, **keywords)
    fastbn.batch_norm_backward(dy, saved)
    assert found == [0, 1, 0, 1]
