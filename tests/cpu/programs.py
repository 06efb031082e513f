"""Programs in fresh interpreters, for tests of threads, processes and signals."""

import importlib.metadata
import textwrap
from pathlib import Path

import pytest

from tests import interpreters

# What each program begins with: arrays of mixed shapes, all for two threads, and a call with its right answer.
PRELUDE = """
    import ctypes, os, signal, subprocess, sys, threading, time, warnings
    if os.environ.get("TBB"):
        ctypes.CDLL(os.environ["TBB"], mode=ctypes.RTLD_GLOBAL)  # Numba looks for it in the system's folders alone
    import numpy as np
    import fastbn
    from fastbn.cpu import program, team
    team.PARALLEL_FROM = program.KEPT_WORK = program.LONG_WORK = 0
    if os.environ.get("CONDITIONS"):
        team.futexes = False
    if os.environ.get("NUMBA_THREADING_LAYER"):
        team.here = False
    fastbn.threads.set_num_threads(int(os.environ.get("THREADS", "2")) or None)
    rng = np.random.default_rng(0)
    shapes = (4, 6, 30, 30), (8, 40), (20, 9, 5, 5), (500, 33), (1, 8, 16)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def answer(x):
        y, saved = fastbn.batch_norm(x)
        return y, saved.moments.m2, fastbn.batch_norm_inference(x, saved.mean, saved.moments.var())

    def same(a, b):
        return all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))

    def right():
        return all(same(answer(x), y) for x, y in zip(arrays, expected))

    def threads_here():
        return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 1 + team._hired

    def status_of(child):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "stalled"

    def in_a_child(function):  # what it returns, 0 to 254; 255 where it raises
        child = os.fork()
        if child == 0:
            code = 255
            try:
                code = int(function())
            finally:
                os._exit(code)
        return status_of(child)

    with fastbn.threads.num_threads(1):
        expected = [answer(x) for x in arrays]
"""


def tbb_library():
    """The file of pip's tbb, which Numba does not find by itself; None without it."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file.locate() for file in files if file.name == "libtbb.so.12"]
    return str(Path(found[0]).resolve()) if found else None


def command(program):
    return interpreters.python(textwrap.dedent(PRELUDE) + textwrap.dedent(program), options=["-W", "error"])


def run(program, layer=None, timeout=300, returns=0, **environment):
    """What a program prints in a fresh interpreter, where warnings are errors."""
    if layer == "tbb":
        library = tbb_library()
        if library is None:
            pytest.skip("tbb is not installed")
        environment["TBB"] = library
    if layer is not None:
        environment |= {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    environment = {"OPENBLAS_NUM_THREADS": "1"} | environment
    return interpreters.run(
        command(program), returns=returns, timeout=timeout, quiet=returns == 0, **environment
    ).split()
