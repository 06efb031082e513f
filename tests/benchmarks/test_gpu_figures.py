"""`benchmarks/gpu_figures.py`: shares of a copy's speed, goals and verdicts; and the workloads."""

import json
import sys
import types

import numpy as np
import pytest

from tests.benchmarks.gpu_stand_in import TOY
from tests.simt import host_cupy

gpu = pytest.importorskip("benchmarks.gpu", reason="installed without the benchmarks")
gpu_figures, gpu_workloads = (sys.modules[f"benchmarks.gpu_{part}"] for part in ("figures", "workloads"))
workloads = sys.modules["benchmarks.workloads"]


def cell(what, layout="NCHW", ours=1.0, copy=1.0, torch=None, nbytes=100 << 20, dtype="float32", state="ok"):
    """A cell of hand-made medians, in milliseconds."""
    times = {"fastbn": ours, "copy": copy} | (
        {} if torch is None else {"torch native": torch, "torch cudnn": 3 * torch}
    )
    timed = {name: gpu_figures.timing([1e-3 * t] * 3, 7) for name, t in times.items()}
    return gpu_figures.Cell((32, 64, 8, 8), dtype, layout, nbytes, what, "device", state, times=timed)


@pytest.mark.parametrize(
    ("what", "share", "two_passes"),
    [
        ("inference", 0.5, 0.5),  # as many bytes as the copy, in twice its time
        ("forward", 0.5, 0.75),
        ("backward", 0.75, 1.25),
        ("moments", 0.25, 0.25),
        ("fused forward", 0.75, 1.0),
        ("fused backward", 1.25, 2.0),
    ],
)
def test_shares_of_the_copys_speed(what, share, two_passes):
    measured = cell(what, ours=2.0, copy=1.0)
    assert measured.of_copy() == pytest.approx(share)
    assert measured.of_copy(True) == pytest.approx(two_passes)


def verdicts(*cells):
    return {goal.name: goal for goal in gpu_figures.goals(cells)}


def test_goals_of_each_workload():
    name = "inference NCHW from 64 MB, 2S at the copy's speed, float32"
    assert verdicts()[name].verdict == "not measured"
    good, bad, worse = (cell("inference", copy=share) for share in (0.98, 0.90, 0.70))
    assert verdicts(good)[name].verdict == "met"
    assert verdicts(good, bad)[name].verdict == "met on average, not by each"
    goal = verdicts(good, worse)[name]
    assert goal.verdict == "missed"
    assert (goal.mean, goal.worst, goal.workloads) == (pytest.approx((0.98 * 0.7) ** 0.5), pytest.approx(0.7), 2)
    small, failed = cell("inference", copy=0.1, nbytes=1000), cell("inference", copy=0.1, state="error")
    other = cell("inference", copy=0.1, dtype="float16")
    assert verdicts(good, small, failed, other)[name].verdict == "met"
    assert verdicts(good, other)[name.replace("float32", "other dtypes")].verdict == "missed"


def test_channels_last_goals_count_two_passes():
    name = "backward NHWC from 64 MB, 5S at the copy's speed, float32"
    goal = verdicts(cell("backward", "NHWC", ours=2.5, copy=0.9))[name]
    assert (goal.worst, goal.verdict) == (pytest.approx(0.9), "met")
    goal = verdicts(cell("forward", "NHWC", ours=1.5, copy=0.8))[
        "forward NHWC from 64 MB, 3S at the copy's speed, float32"
    ]
    assert (goal.worst, goal.verdict) == (pytest.approx(0.8), "missed")


def test_goals_over_pytorch():
    fast, slow = cell("forward", torch=2.0), cell("forward", torch=0.9)
    found = verdicts(fast, slow, cell("inference", torch=0.96))
    goal = found["forward from 1 MB, times PyTorch, float32"]
    assert (goal.mean, goal.verdict) == (pytest.approx(1.8**0.5), "met")
    assert found["no workload slower than PyTorch, float32"].verdict == "met on average, not by each"
    assert found["no workload slower than PyTorch, float32"].worst == pytest.approx(0.9)
    assert found["no inference slower than PyTorch, float32"].verdict == "met"


def test_a_cell_is_the_same_after_its_record():
    before = cell("forward", torch=2.0)
    assert gpu_figures.Cell.from_dict(json.loads(json.dumps(before.as_dict()))) == before


def test_lines_show_what_happened():
    assert "copy 0.50 (0.75)" in gpu_figures.line(cell("forward", ours=2.0, torch=3.0))
    assert "torch native  1.50x  torch cudnn  4.50x" in gpu_figures.line(cell("forward", ours=2.0, torch=3.0))
    failed = gpu_figures.Cell(TOY, "float32", "NCHW", 480, "forward", "graph", "error", "why")
    assert gpu_figures.line(failed).endswith("forward        graph ERROR why")


def test_workloads():
    jobs = gpu_workloads.planned((), gpu.DTYPES, gpu.LAYOUTS, gpu_workloads.OPERATIONS)
    assert len(set(jobs)) == len(jobs)
    assert jobs[0].shape == (workloads.BATCH, *workloads.RESNET50[0])
    for dtype in gpu.DTYPES:
        for layout in gpu.LAYOUTS:
            assert gpu_workloads.LARGE in {j.shape for j in jobs if (j.dtype, j.layout) == (dtype, layout)}
    single = {j.shape for j in jobs if j.dtype == "float32"}
    layers = {*workloads.RESNET50, *workloads.RESNET50_V15}
    assert single == {
        *((batch, *layer) for batch in (32, 256) for layer in layers),
        gpu_workloads.LARGE,
        *gpu_workloads.TINY,
    }
    assert all(np.prod(shape) * 4 <= gpu_workloads.TINY_BYTES for shape in gpu_workloads.TINY)


def test_inputs_are_normal_and_differ(device):
    machine = types.SimpleNamespace(xp=sys.modules["cupy"], cache_bytes=600, free_bytes=lambda: 1 << 30, torch=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "TILE", 101)
        for dtype in ("float32", "float64"):
            data = workloads.Data(machine, (4, 8, 8, 8), dtype, "NHWC", 2)
            arrays = [host_cupy.to_numpy(a) for a in (*data.x, *data.dy)]
            for i, array in enumerate(arrays):
                assert array.shape == (4, 8, 8, 8)
                assert abs(array.mean() - 0.5) < 0.3
                assert abs(array.std() - 1) < 0.3
                assert not any(np.array_equal(array, other) for other in arrays[:i])
