"""`benchmarks/gpu.py` without a GPU: kernels run on the CPU, events, streams and graphs are stand-ins by the clock."""

import subprocess
import sys
import time
import types
from unittest import mock

import pytest

from fastbn import environment
from tests.benchmarks.gpu_stand_in import NAME, Event, Stream, arguments, recorded

gpu = pytest.importorskip("benchmarks.gpu", reason="installed without the benchmarks")
gpu_device, gpu_figures, gpu_workloads = (
    sys.modules[f"benchmarks.gpu_{part}"] for part in ("device", "figures", "workloads")
)
workloads = sys.modules["benchmarks.workloads"]


def fails(*_args, **_keywords):
    raise RuntimeError("no\n  luck")


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
