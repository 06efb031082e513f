"""Gradients of gamma and beta in a dtype, of CuPy arrays: rounded by the kernels, by every strategy."""

import numpy as np
import pytest

import fastbn
from fastbn.cuda import plans
from tests.cases import gradient_dtypes as cases
from tests.cuda.harness import by_call, calls
from tests.simt import host_cupy
from tests.support import DTYPES

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(cases, "fastbn", cuda_arrays)


@by_call(
    *(
        calls(cases.test_dtypes, **{"layout,options": [case]}, dtype=dtypes)
        for case, dtypes in zip(
            cases.CASES, ([*DTYPES], ["float32"], ["float16"], ["bfloat16"], ["float32"]), strict=True
        )
    ),
    calls(cases.test_over_ranks, gather=[*cases.GATHERS]),
    calls(cases.test_frozen_and_empty),
    calls(cases.test_out_askew),
    calls(cases.test_wrong, dtype=["int32"]),
)
def test_calls(call):
    call()


@pytest.mark.parametrize("layout", ["rows", "columns", "runs", "float64"])
@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_every_strategy(counted, monkeypatch, strategy, layout):
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    shape = {"columns": (75, 20), "runs": (6, 32, 5, 5)}.get(layout, (2, 5, 3, 40))
    x, dy = np.random.default_rng(1).standard_normal((2, *shape)).astype("f8" if layout == "float64" else "f4")
    _, saved = cases.fastbn.batch_norm(x)
    for dtype in DTYPES.values():
        cases.check(dy, saved, dtype)


def test_no_launch_more(counted, nothing_waits):
    """Nor an allocation."""
    x = host_cupy.to_cupy(np.ones((8, 4, 5), np.float32))
    _, saved = fastbn.batch_norm(x)
    counted(fastbn.batch_norm_backward, x, saved)
    without = counted.kernels, counted.operations, len(counted.allocations)
    for _ in range(2):
        counted(fastbn.batch_norm_backward, x, saved, dtype="float32")
        assert (counted.kernels, counted.operations, len(counted.allocations)) == without
    layer = fastbn.BatchNorm(4, xp=__import__("cupy"), dtype="float16")
    layer.forward(x)
    counted(layer.backward, x)
    assert (counted.kernels, counted.operations, len(counted.allocations)) == without
