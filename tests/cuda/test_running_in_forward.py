"""Running statistics that `batch_norm` updates, on CuPy arrays: within its launches, by every strategy."""

import itertools

import numpy as np
import pytest

import fastbn
from fastbn.cuda import plans
from tests.cases import running as cases
from tests.cuda.harness import by_call, calls, on_device
from tests.cuda.running import CHANNELS, assert_same, expected, numbers
from tests.simt import host_cupy
from tests.support import DTYPES

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(cases, "fastbn", cuda_arrays)


@by_call(
    *(calls(cases.test_updates, **{"layout,options": [case]}, dtypes=cases.PAIRS) for case in cases.CASES),
    calls(cases.test_over_ranks, gather=[*cases.GATHERS]),
    calls(cases.test_arrays_of_any_strides),
    calls(cases.test_channels_that_stay),
    calls(cases.test_outputs_over_inputs),
    calls(cases.test_rates_of_every_call),
    calls(cases.test_wrong, what=[*cases.WRONG]),
    calls(cases.test_a_hook_that_fails),
)
def test_calls(call):
    call()


PAIRS = [*itertools.product(DTYPES, DTYPES)]


@pytest.mark.parametrize(("mean", "var"), PAIRS)
def test_bits_are_numpys(mean, var):
    """Of every dtype, for numbers of all sizes, NaN and infinities among them, where a block has 300 channels."""
    x = np.random.default_rng(0).standard_normal((4, CHANNELS)).astype(np.float32)
    x[:, :5], x[0, 5], x[:2, 6] = 1, np.nan, (np.inf, -np.inf)
    for options in ({}, {"rate": 1.0, "correction": 0.0}, {"rate": 0.0}, {"rate": 0.25, "correction": 4}):
        running, before = (numbers(mean, var)[:2] for _ in range(2))
        for array in (*running, *before):
            array[0] = 1  # no subnormal number, which the execution on the CPU takes for 0
        _, saved = cases.fastbn.batch_norm(x, running=running, **options)
        assert_same(running, expected(*before, fastbn.Moments(*saved.moments), **options))


@pytest.mark.parametrize("layout", ["rows", "columns", "runs", "float64"])
@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_every_strategy(counted, cuda_device, monkeypatch, strategy, layout):
    """Once for a channel, by the block that merges it."""
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    shape = {"columns": (151, 20), "runs": (11, 32, 5, 5)}.get(layout, (2, 5, 6, 40))
    x = np.random.default_rng(1).standard_normal(shape).astype("float64" if layout == "float64" else "float32")
    running = np.zeros(shape[1], np.float32), np.ones(shape[1])
    before = [a.copy() for a in running]
    del cuda_device.launches[:]
    _, saved = cases.fastbn.batch_norm(x, running=running)
    used = {launched.kernel for launched in cuda_device.launches}
    if strategy != "two passes":
        assert used == {"forward"}
        assert max(launched.grid for launched in cuda_device.launches) > 1 or strategy == "block"
    else:
        assert used <= {"statistics", "finish_moments", "normalize"}
    assert_same(running, expected(*before, fastbn.Moments(*saved.moments)))
    np.testing.assert_allclose(saved.mean, x.mean(tuple({*range(x.ndim)} - {1})), atol=1e-6)


def test_no_launch_more(counted, nothing_waits):
    """On first calls and on others, whatever the rate; nothing is allocated that was not."""
    x = host_cupy.to_cupy(np.ones((8, 4, 5), np.float32))
    running = tuple(on_device(cases.pair((4,), ("float32", "float16"))))
    counted(fastbn.batch_norm, x)
    without = counted.kernels, counted.operations, counted.allocations
    for rate in (0.1, 0.1, 0.2):
        counted(fastbn.batch_norm, x, running=running, rate=rate)
        assert (counted.kernels, counted.operations, counted.allocations) == without
    layer = fastbn.BatchNorm(4, xp=__import__("cupy"))
    counted(layer.forward, x)
    assert (counted.kernels, counted.operations, counted.allocations) == without
