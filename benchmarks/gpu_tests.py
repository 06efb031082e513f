"""The GPU's tests in processes of their own, for `benchmarks.gpu`: each bounded in time."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

TESTS = "tests/cuda/test_matrix.py"
TEST_SECONDS = 150.0  # at most, and at most a third of the budget
OUTCOMES = {"passed": ".", "failed": "F", "skipped": "s", "errors": "E"}  # in pytest's words, and its marks
WORKERS = 4  # as many groups as the matrix has
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = {
    "pytest": [
        "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestUnknownMarkWarning",
        "-o", "addopts=", "-m", "not slow", "--require-cuda", "-k", "test_training and float32", TESTS,
    ],
    "benchmarks.gpu": [
        "--compile", "--dtype=float32",
        "--shape=32,64,112,112", "--shape=32,64,56,56", "--shape=32,512,7,7", "--shape=2,16,4,4",
    ],
}  # fmt: skip
"""Modules and their arguments: the test matrix, whose arrays are small, and workloads that are divided in every way."""


def matrix_arguments() -> list[str]:
    """Arguments of pytest, with several workers where pytest-xdist is installed."""
    arguments = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", "--require-cuda", TESTS]
    if importlib.util.find_spec("xdist") is not None:
        return [*arguments, "-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadfile"]
    return [*arguments, "-W", "ignore::pytest.PytestUnknownMarkWarning"]  # the marks of its groups


def run_tests(seconds: float, folder: Path = ROOT) -> dict[str, Any]:
    """Run the GPU's test matrix, and say how many passed."""
    arguments = ["-m", "pytest", *matrix_arguments()]
    finished, status, output = bounded([sys.executable, *arguments], seconds, folder)
    counts = dict.fromkeys(OUTCOMES, 0)
    *_, last = [text for text in output.splitlines() if text.strip()] or [""]
    for number, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last):
        counts["errors" if name == "error" else name] = int(number)
    if not finished:
        marks = "".join(re.findall(r"^[.FEsxX]+(?= *(?:\[ *\d+%\])?$)", output, re.MULTILINE))
        counts = {name: marks.count(mark) for name, mark in OUTCOMES.items()}
        state = "not finished"
    elif status == 0:
        state = "passed" if counts["passed"] else "nothing ran"
    else:
        state = "failed" if counts["failed"] or counts["errors"] else "error"
    shown = "" if state == "passed" else output[-3000:].replace(str(folder), ".")
    return {"state": state, **counts, "limit": seconds, "command": shlex.join(["python", *arguments]), "output": shown}


def sanitize(seconds: float, folder: Path = ROOT) -> int:
    """Run some tests and workloads under compute-sanitizer, each so long at most, or print how to; 1 if any fails."""
    program, failed = _sanitizer(), 0
    # Without CuPy's pool, so that the tools see where each array ends.
    script = "import runpy, sys, cupy; cupy.cuda.set_allocator(None); "
    script += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    for tool, (module, arguments) in itertools.product(SANITIZERS, SANITIZED.items()):
        options = ["--tool", tool, "--error-exitcode", "9"]
        python = ["-c", script, module, *arguments]
        print(shlex.join(["compute-sanitizer", *options, "python", *python]), flush=True)
        if program is None:
            continue
        finished, status, output = bounded([program, *options, sys.executable, *python], seconds, folder)
        failed += not finished or status != 0
        outcome = f"exit status {status}" if finished else f"ended after {seconds:.0f} s"
        found = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY.*$", output, re.MULTILINE)
        print("\n".join([f"  {tool}: {outcome}", *(f"  {text}" for text in found)]), flush=True)
        if finished and status != 0:
            print(output[-3000:].replace(str(folder), "."))
    if program is None:
        print("compute-sanitizer, a part of the CUDA toolkit, was not found; these are its commands")
    return int(failed > 0)


def _sanitizer() -> str | None:
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(folder) / "bin") for folder in folders if folder)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def bounded(command: Sequence[str], seconds: float, folder: Path) -> tuple[bool, int, str]:
    """Whether a command finished in time, its exit status and its output; with it end the processes it started."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return False, process.returncode, output
    return True, process.returncode, output
