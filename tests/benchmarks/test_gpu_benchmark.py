"""`benchmarks/gpu.py` without a GPU: kernels run on the CPU, events, streams and graphs are stand-ins by the clock."""

import contextlib
import json
import subprocess
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest

from fastbn import environment
from tests.conftest import missing
from tests.simt import cuda, host_cupy

gpu = pytest.importorskip("benchmarks.gpu", reason="installed without the benchmarks")
gpu_device, gpu_figures, gpu_tests, gpu_workloads = (
    sys.modules[f"benchmarks.gpu_{part}"] for part in ("device", "figures", "tests", "workloads")
)
workloads = sys.modules["benchmarks.workloads"]

TOY = (2, 4, 3, 5)
NAME = "Toy GPU"


# --- a device without a device ----------------------------------------------------------------------------------------


class Event:
    """Of `cupy.cuda`."""

    done = False

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


class Graph:
    """Of `cupy.cuda.graph`, and of `torch.cuda`."""

    def __init__(self):
        self.launches = 0

    def launch(self, stream=None):
        self.launches += 1

    def replay(self):
        self.launches += 1


class Stream:
    """Of `cupy.cuda`."""

    capturing = False

    def __init__(self, null=False, non_blocking=False):
        assert non_blocking  # work of the default stream would wait for a blocking one, and end a capture

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin_capture(self, mode=None):
        self.capturing = True

    def end_capture(self):
        assert self.capturing
        return Graph()

    def synchronize(self):
        assert not self.capturing


class Pool:
    def free_all_blocks(self, stream=None):
        pass


def raw_kernel(source, name, *_args, **_keywords):
    def launch(grid, block, args):
        assert isinstance(args[0], np.int64)  # the kernel's long long
        assert args[0] > 0

    assert f"void {name}(long long" in source
    return launch


def fails(*_args, **_keywords):
    raise RuntimeError("no\n  luck")


PROPERTIES = {"name": NAME.encode()}


@pytest.fixture
def device(request, monkeypatch):
    """CuPy's events, streams and graphs, and PyTorch's, on a machine without a GPU."""
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)
    import cupy

    for stand_in, real in ((Event, cupy.cuda.Event), (Stream, cupy.cuda.Stream), (Graph, cupy.cuda.graph.Graph)):
        names = {name for name in vars(stand_in) if name[0] != "_"} - {"time", "capturing", "launches", "replay"}
        assert names <= set(dir(real))
    runtime = cupy.cuda.runtime
    with cuda.installed() as emulated:
        for owner, name, stand_in in (
            (cupy.cuda, "Event", Event),
            (cupy.cuda, "Stream", Stream),
            (cupy.cuda, "get_elapsed_time", lambda start, stop: 1e3 * (stop.time - start.time)),
            (cupy, "RawKernel", raw_kernel),
            (cupy, "get_default_memory_pool", Pool),
            (runtime, "getDeviceProperties", lambda number: PROPERTIES),
            (runtime, "memGetInfo", lambda: (1 << 30, 2 << 30)),
        ):
            assert hasattr(owner, name)
            monkeypatch.setattr(owner, name, stand_in)
        monkeypatch.setitem(host_cupy.ATTRIBUTES, "L2CacheSize", 600)  # two buffers of the toy
        torch = environment.optional("torch")
        if torch is not None:
            assert hasattr(torch.cuda.CUDAGraph, "replay")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)  # which looks for a device where it can
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
            monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
            monkeypatch.setattr(torch, "as_tensor", lambda a, device: torch.from_numpy(host_cupy.to_numpy(a)))
        yield emulated


def recorded(path):
    return json.loads(path.read_text(encoding="utf-8"))


def arguments(path, *more, shape=TOY):
    return ["--quick", "--no-tests", "--out", str(path), "--shape", ",".join(map(str, shape)), *more]


def test_a_run(device, tmp_path, capsys):
    path = tmp_path / "new folder" / "run.json"
    status = gpu.main(arguments(path, "--layout", "NCHW", "--markdown"))
    printed, record = capsys.readouterr().out, recorded(path)
    assert [c["message"] for c in record["cells"] if c["state"] != "ok"] == []
    assert status == 0
    assert {(c["what"], c["kind"]) for c in record["cells"]} == {
        *((what, "device") for what in gpu_workloads.OPERATIONS),
        *((what, kind) for what in gpu_workloads.PRIMARY for kind in ("host", "graph")),
    }
    assert record["environment"]["device"] == NAME
    assert record["environment"]["compute_capability"] == "9.0"
    assert record["command"] == "python -m benchmarks.gpu --quick --no-tests --shape 2,4,3,5 --layout NCHW --markdown"
    assert str(tmp_path) not in path.read_text()
    peers = {"torch native"} if environment.optional("torch") else set()
    for cell in record["cells"]:
        assert cell["times"].keys() == {"fastbn", *peers} | ({"copy"} if cell["kind"] == "device" else set())
        assert not cell["notes"]
        assert not peers or cell["difference"] < 1e-5
        for times in cell["times"].values():
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["calls"] >= 1
        name = gpu_figures.Cell.from_dict(cell).name
        assert f"{cell['dtype']:<9}{cell['layout']:<5}2x4x3x5" in printed, name
    assert f"another device, {NAME}" in printed
    assert "| 2x4x3x5 | " in printed
    for goal in record["goals"]:
        assert goal["name"] in printed
    assert gpu.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_channels_last(device, tmp_path, capsys, dtype):
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path, "--layout", "NHWC", "--dtype", dtype, "--operation", "backward")) == 0
    (cell,) = recorded(path)["cells"]
    assert (cell["dtype"], cell["layout"], cell["state"]) == (dtype, "NHWC", "ok")
    assert environment.optional("torch") is None or cell["difference"] < 5e-2


def test_without_torch(device, monkeypatch, tmp_path, capsys):
    optional = environment.optional
    monkeypatch.setattr(environment, "optional", lambda name: None if name == "torch" else optional(name))
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path, "--operation", "inference", "--layout", "NCHW")) == 0
    record = recorded(path)
    assert all(c["times_torch"] is None for c in record["cells"])
    assert record["environment"]["versions"]["torch"] is None
    verdicts = {goal["verdict"] for goal in record["goals"]}
    assert verdicts == {"not measured"}  # nor is anything as large as is asked for


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_are_recorded(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workloads.fastbn, "batch_norm_inference", fails)
    path = tmp_path / "run.json"
    operations = ["--operation", "inference", "--operation", "moments", "--layout", "NCHW"]
    assert gpu.main(arguments(path, *operations)) == 1
    by_key = {(c["what"], c["kind"]): c for c in recorded(path)["cells"]}
    assert by_key["inference", "device"]["state"] == by_key["inference", "host"]["state"] == "error"
    assert by_key["inference", "device"]["message"] == "RuntimeError: no luck"
    assert by_key["moments", "device"]["state"] == "ok"
    assert "error: float32 NCHW 2x4x3x5 inference: RuntimeError: no luck" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["call", "has_cudnn", "__init__"])
def test_what_peers_raise_is_noted(device, monkeypatch, tmp_path, part):
    """Be it early or late."""
    torch = pytest.importorskip("torch")
    if part == "call":
        monkeypatch.setattr(torch, "var_mean", fails)
    else:
        monkeypatch.setattr(workloads.Torch, part, fails)
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path, "--operation", "moments", "--layout", "NCHW")) == 0
    (cell,) = recorded(path)["cells"]
    name = {"call": "torch native", "has_cudnn": "torch cudnn", "__init__": "torch"}[part]
    assert cell["notes"] == {name: "RuntimeError: no luck"}
    assert cell["times"].keys() == {"fastbn", "copy"} | ({"torch native"} if part == "has_cudnn" else set())


def test_graphs_that_cannot_be_captured(device, monkeypatch, tmp_path):
    """PyTorch's is noted, fastbn's is an error."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "run.json"
    only = ["--operation", "inference", "--layout", "NCHW"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", fails)
        assert gpu.main(arguments(path, *only)) == 0
    graph = recorded(path)["cells"][-1]
    assert (graph["kind"], graph["state"], graph["notes"]) == ("graph", "ok", {"torch native": "RuntimeError: no luck"})
    monkeypatch.setattr(Stream, "end_capture", fails)
    assert gpu.main(arguments(path, *only)) == 1
    graph = recorded(path)["cells"][-1]
    assert (graph["kind"], graph["state"], graph["message"]) == ("graph", "error", "RuntimeError: no luck")


def test_arrays_that_cannot_be_made(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "Data", fails)
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path)) == 1
    assert {(c["state"], c["message"]) for c in recorded(path)["cells"]} == {("error", "RuntimeError: no luck")}
    assert gpu.main(["--compile", "--shape", "2,4,3,5"]) == 1
    assert "RuntimeError: no luck" in capsys.readouterr().out


def test_pytorchs_two_ways(device, monkeypatch, tmp_path):
    """Where it takes cuDNN's kernels; here both ways end in the same."""
    torch = pytest.importorskip("torch")
    asked = []
    batch_norm = torch.nn.functional.batch_norm

    def watched(*args):
        asked.append(torch.backends.cudnn.enabled)
        return batch_norm(*args)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", watched)
    monkeypatch.setattr(workloads.Torch, "has_cudnn", lambda *_: True)
    path = tmp_path / "run.json"
    operations = ["--operation", "backward", "--operation", "forward", "--layout", "NHWC"]
    assert gpu.main(arguments(path, *operations)) == 0
    for found in recorded(path)["cells"]:
        assert found["times"].keys() == {"fastbn", "copy", "torch native", "torch cudnn"}
        ways = [found["times"][f"torch {way}"]["median"] for way in ("native", "cudnn")]
        assert found["times_torch"] == pytest.approx(min(ways) / found["times"]["fastbn"]["median"], rel=1e-2)
    assert set(asked) == {True, False}
    assert torch.backends.cudnn.enabled


def test_a_machine_without_a_gpu(device, monkeypatch, capsys):
    monkeypatch.setattr("fastbn.cuda.requirements.attributes", fails)
    assert gpu.main([]) == gpu.EXIT_NO_DEVICE
    assert "nothing to measure: no" in capsys.readouterr().err


def test_torch_without_a_gpu(device, monkeypatch, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *_: None)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--quick", "--no-tests"]) == 0
    assert "left out: PyTorch's figures: torch finds no GPU" in capsys.readouterr().out
    assert recorded(tmp_path / "benchmarks" / "results" / "gpu-toy-gpu.json")["cells"] == []


def test_a_wrong_result_is_an_error(device, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    right = torch.var_mean
    monkeypatch.setattr(torch, "var_mean", lambda *args, **keywords: [a + 1 for a in right(*args, **keywords)])
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path, "--operation", "moments", "--layout", "NCHW")) == 1
    (cell,) = recorded(path)["cells"]
    assert cell["state"] == "error"
    assert "differs from PyTorch's result" in cell["message"]


def test_the_budget_is_kept(device, monkeypatch, tmp_path, capsys):
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr(gpu_device.Machine, "now", lambda self: float(next(clock)))
    path = tmp_path / "run.json"
    operations = ["--operation", "moments", "--operation", "inference", "--layout", "NCHW"]
    assert gpu.main([*arguments(path, *operations), "--budget", "40", "--shape", "1,8,16"]) == 0
    cells, printed = recorded(path)["cells"], capsys.readouterr().out
    states = [c["state"] for c in cells]
    assert states[0] == "ok"
    assert set(states[1:]) >= {"skipped"}
    assert states == sorted(states)  # first what is measured, then what is skipped
    late = [c for c in cells if c["state"] == "skipped"]
    assert {c["message"] for c in late} == {gpu.NO_TIME}
    assert f"not measured, for lack of time: {len(late)} cells of" in printed


def test_arrays_too_large_are_skipped(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_device.Machine, "free_bytes", lambda self: 0)
    path = tmp_path / "run.json"
    assert gpu.main(arguments(path)) == 0
    assert {(c["state"], c["message"].split()[0]) for c in recorded(path)["cells"]} == {("skipped", "needs")}
    assert "skipped: float32 NCHW" in capsys.readouterr().out


def test_a_hanging_kernel_ends_the_process(device, monkeypatch, tmp_path, capfd):
    ended, path = [], tmp_path / "run.json"
    monkeypatch.setattr(gpu, "LONGEST", 0.05)
    monkeypatch.setattr(gpu, "measure", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(gpu.os, "_exit", lambda status: ended.append((status, recorded(path)["cells"][-1]["message"])))
    gpu.main(arguments(path, "--operation", "moments", "--layout", "NCHW"))
    assert ended == [(gpu.EXIT_HANGING, "not finished after 0 s")]


def test_the_drivers_version(monkeypatch):
    found = types.SimpleNamespace(stdout="570.1\n570.1\n")
    monkeypatch.setattr(gpu_device.subprocess, "run", lambda *_args, **_keywords: found)
    monkeypatch.setattr(gpu_device.shutil, "which", lambda name: name)
    assert gpu_device.driver() == "570.1"
    late = subprocess.TimeoutExpired("nvidia-smi", 20)
    monkeypatch.setattr(gpu_device.subprocess, "run", mock.Mock(side_effect=late))
    assert gpu_device.driver() is None
    monkeypatch.setattr(gpu_device.shutil, "which", lambda name: None)
    assert gpu_device.driver() is None


def test_the_device_is_held_longer_where_it_was_not_long_enough(device, monkeypatch):
    held = []
    machine = gpu_device.Machine()
    monkeypatch.setattr(machine, "_hold", lambda grid, block, args: held.append(int(args[0])))
    monkeypatch.setattr(Event, "done", property(lambda self: len(held) < 2))
    kept = [None, None]
    assert machine.timed(lambda i: i, kept, 3, 2, 1e-6) > 0
    assert kept == [4, 3]
    assert held[1] == pytest.approx(2 * held[0], abs=1)
    assert len(held) == 2


def test_the_kernel_that_holds_the_device_compiles():
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    program = nvrtc.createProgram(gpu_device.HOLD, "hold.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_90",))


def test_kernels_are_compiled_ahead(device, monkeypatch, tmp_path, capsys):
    commands = []

    def bounded(command, seconds, folder):
        commands.append(command)
        return ("--dtype=float32" in command), int("--layout=NHWC" in command), "some\noutput"

    monkeypatch.setattr(gpu, "bounded", bounded)
    monkeypatch.setattr(gpu, "run", lambda *_: None)
    shape = ["--shape", "2,4,3,5", "--operation", "moments", "--dtype", "float32", "--dtype", "float64"]
    assert gpu.main(["--no-tests", "--out", str(tmp_path / "run.json"), *shape]) == 0
    printed = capsys.readouterr().out
    assert "not all kernels of float32 NHWC were compiled ahead: exit status 1: some\noutput" in printed
    assert "not all kernels of float64 NCHW were compiled ahead: no time left" in printed
    assert "of float32 NCHW" not in printed
    python, *command = next(c for c in commands if {"--dtype=float32", "--layout=NCHW"} <= set(c))
    assert python == sys.executable
    assert command[:2] == ["-m", "benchmarks.gpu"]
    device.launches.clear()
    assert gpu.main(command[2:]) == 0
    assert {launched.kernel for launched in device.launches} == {"statistics"}
    monkeypatch.setattr(workloads.fastbn, "moments", fails)
    assert gpu.main(command[2:]) == 1
    assert "moments: RuntimeError: no luck" in capsys.readouterr().out
    monkeypatch.setattr(gpu_device.Machine, "free_bytes", lambda self: 0)
    assert gpu.main(command[2:]) == 0  # left to the measurement


# --- tests in processes -----------------------------------------------------------------------------------------------

MATRIX = """
import pytest
def test_good(): pass
@pytest.mark.skip  # counted below
def test_skipped(): pass
def test_bad(): assert False, "a reason"
"""
CONFTEST = "def pytest_addoption(parser): parser.addoption('--require-cuda', action='store_true')"


def test_the_matrix_runs_in_a_process(tmp_path, monkeypatch):
    find = gpu_tests.importlib.util.find_spec
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None if name == "xdist" else find(name))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # its options may be of this project's conftest
    (tmp_path / gpu_tests.TESTS).parent.mkdir(parents=True)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / gpu_tests.TESTS).write_text(MATRIX)
    found = gpu_tests.run_tests(60, tmp_path)
    assert {name: found[name] for name in ("state", *gpu_tests.OUTCOMES)} == {
        "state": "failed", "passed": 1, "failed": 1, "skipped": 1, "errors": 0,
    }  # fmt: skip
    assert "a reason" in found["output"]
    assert str(tmp_path) not in found["output"]
    assert found["command"].startswith("python -m pytest ")


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = f"import time; time.sleep(1.2); open({str(tmp_path / 'alive')!r}, 'w')"
    script = (
        f"import subprocess, sys, time; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    finished, status, output = gpu_tests.bounded([sys.executable, "-c", script], 0.6, tmp_path)
    assert (finished, output) == (False, "begun\n")
    assert status != 0
    time.sleep(1)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("output", "status", "state", "counts"),
    [
        ("12 passed, 3 skipped in 4.5s", 0, "passed", (12, 0, 3, 0)),
        ("5 skipped in 0.1s", 0, "nothing ran", (0, 0, 5, 0)),
        ("2 failed, 1 passed, 1 error in 9s", 1, "failed", (1, 2, 0, 1)),
        ("ERROR: unrecognized arguments: --require-cuda", 4, "error", (0, 0, 0, 0)),
        ("..F.s [ 50%]\n..E. [100%]\n.....", None, "not finished", (11, 1, 1, 1)),
    ],
)
def test_what_pytest_prints_is_read(monkeypatch, output, status, state, counts):
    monkeypatch.setattr(gpu_tests, "bounded", lambda *_: (status is not None, status, f"header\n{output}\n"))
    found = gpu_tests.run_tests(1.0)
    assert (found["state"], tuple(found[name] for name in gpu_tests.OUTCOMES)) == (state, counts)


def test_failing_tests_fail_the_run(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_tests, "bounded", lambda *_: (True, 1, "1 failed, 2 passed in 3s"))
    monkeypatch.setattr(gpu, "run", lambda *_: None)
    path = tmp_path / "run.json"
    assert gpu.main(["--quick", "--out", str(path)]) == 1
    assert recorded(path)["tests"]["failed"] == 1
    assert "tests: failed (2 passed, 1 failed, 0 skipped, 0 errors)" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_sanitizers(monkeypatch, capsys, there):
    commands = []

    def bounded(command, seconds, folder):
        commands.append(command)
        return "racecheck" not in command, 9 * ("initcheck" in command), "========= ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(gpu_tests, "bounded", bounded)
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name, path=None: name if there else None)
    assert gpu.main(["--sanitize"]) == int(there)
    printed = capsys.readouterr().out
    assert [command[2] for command in commands] == [tool for tool in gpu_tests.SANITIZERS for _ in range(2)] * there
    for tool in gpu_tests.SANITIZERS:
        assert f"compute-sanitizer --tool {tool}" in printed
    assert ("was not found" in printed) is not there
    for text in ("memcheck: exit status 0\n  ========= ERROR SUMMARY: 0 errors", "racecheck: ended after 55 s"):
        assert (text in printed) is there


def test_sanitized_workloads_are_divided_in_every_way(monkeypatch):
    """On the device whose tuning they are measured with."""
    from fastbn.cuda import launch, plans

    monkeypatch.setattr(launch, "function", lambda *_: None)
    monkeypatch.setattr(launch, "blocks_per_processor", lambda *_: 2)
    cuda.forget()
    h200, found = launch.Device(0, 90, 132, 227 << 10), set()
    for argument in gpu_tests.SANITIZED["benchmarks.gpu"]:
        if argument.startswith("--shape="):
            n, channels, *inner = map(int, argument.removeprefix("--shape=").split(","))
            size = int(np.prod(inner))
            for shape, strides in (
                ((1, n, channels, size), (0, channels * size, size, 1)),
                ((1, n * size, channels, 1), (0, channels, 1, 0)),
            ):
                operands = tuple((name, plans.Operand(strides, 0)) for name in ("x", "dy", "dx"))
                problem = plans.Problem(h200, shape, 2, 4, operands, 0, (), (), False, False, (("frozen", 0),))
                found.add(plans.backward(problem).strategy)
    cuda.forget()
    assert found == set(plans.STRATEGIES)


# --- arithmetic -------------------------------------------------------------------------------------------------------


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
