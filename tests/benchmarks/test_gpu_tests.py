"""`benchmarks/gpu_tests.py`: tests and sanitizers in processes of their own, bounded in time."""

import sys
import time

import numpy as np
import pytest

from tests.benchmarks.gpu_stand_in import recorded
from tests.simt import cuda

gpu = pytest.importorskip("benchmarks.gpu", reason="installed without the benchmarks")
gpu_tests = sys.modules["benchmarks.gpu_tests"]

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
    from fastbn.cuda import launch, plans, problems

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
                operands = tuple((name, problems.Placement(strides, 0)) for name in ("x", "dy", "dx"))
                problem = problems.Problem(h200, shape, 2, 4, operands, 0, (), (), False, False, (("frozen", 0),))
                found.add(plans.backward(problem).strategy)
    cuda.forget()
    assert found == set(plans.STRATEGIES)
