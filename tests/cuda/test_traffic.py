"""What calls ask of global memory: the model of tests/cuda/traffic.py against kernels that are executed."""

import itertools
from collections import Counter

import numpy as np
import pytest

from fastbn.cuda import launch, plans
from tests.conftest import missing
from tests.cuda import counting, traffic
from tests.simt import cuda, simt
from tests.simt.programs import text

SHARED = 64 << 10


@pytest.fixture
def emulated(request):
    if reason := cuda.available():
        missing(request, reason)
    with cuda.installed(records=counting.MOST_ACCESSES, shared=SHARED) as emulated:
        yield emulated


def device():
    return launch.Device(0, cuda.ARCHITECTURE, 3, SHARED)


EXECUTED = {
    "rows, block": ((16, 4, 16, 16), "NCHW", "float32", "forward", "block"),
    "rows, cooperative": ((64, 2, 16, 16), "NCHW", "float32", "forward", "cooperative"),
    "rows, cluster, backward": ((16, 4, 16, 16), "NCHW", "float16", "backward", "cluster"),
    "runs, block": ((15, 8, 7, 7), "NCHW", "float32", "forward", "block"),
    "runs, cooperative, backward": ((25, 32, 7, 7), "NCHW", "float16", "backward", "cooperative"),
    "runs, inference": ((16, 16, 5, 5), "NCHW", "float16", "inference", None),
    "columns, cooperative": ((64, 32, 4, 4), "NHWC", "float32", "forward", "cooperative"),
    "columns, two passes": ((64, 32, 4, 4), "NHWC", "float32", "forward", "two passes"),
    "columns, two passes, backward": ((64, 32, 4, 4), "NHWC", "float16", "backward", "two passes"),
    "columns, two passes, float64": ((64, 16, 4, 4), "NHWC", "float64", "forward", "two passes"),
    "columns, inference": ((64, 64, 4, 4), "NHWC", "float16", "inference", None),
}


@pytest.mark.parametrize(("shape", "layout", "dtype", "operation", "strategy"), EXECUTED.values(), ids=EXECUTED)
def test_model(emulated, monkeypatch, shape, layout, dtype, operation, strategy):
    """Each sector that warps ask for, no more and no less."""
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    problem = traffic.problem_of(device(), shape, layout, dtype, operation)
    found, plan = counting.counted(problem, operation, emulated)
    expected = Counter()
    for step, launched in zip(plan.launches, emulated.launches, strict=True):
        expected += traffic.requests(problem, plan, step, launched.kernel, launched.macros)
    del found[counting.COUNTERS]
    assert dict(+found) == dict(expected)
    assert strategy in (None, plan.strategy)


MOST = 1.10


@pytest.mark.parametrize(
    ("name", "step"), [("H200", 7), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in traffic.DEVICES)]
)
def test_no_call_asks_for_much_more_than_its_arrays(name, step):
    """Of ResNet-50's layers, multilayer perceptrons and large images."""
    above = []
    for case in itertools.islice(traffic.cases(), None, None, step):
        found = traffic.traffic(traffic.DEVICES[name], *case)
        assert found.ratio >= 1
        if found.ratio > MOST:
            above.append(traffic.line(name, case, found))
    assert not above, "\n".join(above)


# --- the counting itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "sectors"), [("thread", 16), ("2 * thread", 32), ("16 * thread", 128), ("0", 4)])
def test_requests_of_warps(emulated, at, sectors):
    """Of 128 threads, each of which reads four bytes."""
    a, b = (counting.aligned(4 * 16 * 128).view(np.float32) for _ in range(2))
    kernel = simt.compile_kernel(text(f"a[thread] = b[{at}];", a, b), "kernel", {}, simt.RECORDING)
    params = np.array([a.ctypes.data, b.ctypes.data, 0], np.uint64).data
    accesses = kernel.recorded(1 << 10, lambda: kernel.launch(1, 128, params))
    read = accesses[accesses["writes"] == 0]
    assert len(accesses) == 256
    assert counting.sectors(read) == sectors
    assert counting.sectors(accesses) == sectors + 16
    with pytest.raises(simt.SimtError, match="256 accesses, 255 are recorded"):
        kernel.recorded(255, lambda: kernel.launch(1, 128, params))
