"""A second process that compiles: whatever becomes of it, results are right and no process stays."""

import os
import textwrap
import time

import pytest

from tests import interpreters

PROGRAM = """
    import os, sys, threading, time
    import numpy as np
    import fastbn
    from fastbn.cpu import ahead, code

    x = np.arange(24.0).reshape(2, 3, 4)

    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return file.read().split()

    def forward():
        y, saved = fastbn.batch_norm(x)
        z = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
        return np.allclose(y, z)
"""
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="processes are listed as on Linux")


def with_helper(program, cache, **more):
    """What is begun, and where."""
    command = interpreters.python(textwrap.dedent(PROGRAM) + textwrap.dedent(program), options=["-W", "error"])
    return command, {"FASTBN_COMPILE_HELPER": 1, "OMP_NUM_THREADS": 2, "NUMBA_CACHE_DIR": cache} | more


def run(program, cache, **more):
    command, environment = with_helper(program, cache, **more)
    return interpreters.run(command, timeout=90, quiet=True, **environment).split()


def left_behind(cache):
    """Processes that were given this cache: their commands, states and processor time, by number."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if str(cache).encode() in file.read() and int(pid) != os.getpid():
                    with open(f"/proc/{pid}/stat") as stat:
                        command, fields = stat.read().rsplit(")", 1)
                    state, times = fields.split()[0], fields.split()[11:13]
                    found[pid] = f"{command}) {state}, ticks in user and system mode: {times}"
        except OSError:
            continue
    return found


def none_left(cache, seconds=120):
    """A process whose parent was killed between `vfork` and `exec` has been seen in its loader for more than 30 s."""
    deadline = time.monotonic() + seconds
    while (found := left_behind(cache)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if found:
        print(found)
    return not found


@needs_proc
@pytest.mark.usefixtures("two_processors")
def test_it_compiles_what_comes_later(tmp_path):
    """The backward pass is on disk when the forward pass is done, or soon after; then the helper ends."""
    program = """
        assert forward()
        helper = ahead._helper
        helper._thread.join(60)
        before = code.compiled
        dx = fastbn.batch_norm_backward(x, fastbn.batch_norm(x)[1])
        print(before > 0, code.compiled - before, children())
    """
    assert run(program, tmp_path) == ["True", "0", "[]"]
    assert none_left(tmp_path, 0)


@pytest.mark.usefixtures("two_processors")
@pytest.mark.slow
def test_what_it_imports(tmp_path):
    """What the program would, whatever it has in `sys.path`; nothing from the folder it happens to run in."""
    (tmp_path / "folder").mkdir()
    for name in ("json", "numba", "llvmlite"):
        (tmp_path / "folder" / f"{name}.py").write_text("import os; open('imported', 'w').close(); os._exit(1)")
    program = f"""
        import pathlib
        sys.path.append(pathlib.Path("elsewhere"))
        sys.path.remove("")
        os.chdir({str(tmp_path / "folder")!r})
        assert forward()
        ahead._helper._thread.join(60)
        print(len(ahead._helper._taken) > 0)
    """
    assert run(program, tmp_path / "cache", PYTHONPATH=".") == ["True"]
    assert not (tmp_path / "folder" / "imported").exists()


@pytest.fixture
def two_processors():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")


BROKEN = {
    "ends at once": 'sys.executable = "/bin/false"',
    "missing": 'sys.executable = "/no/such/program"',
    "another program": 'sys.executable = "/bin/cat"',
    "never answers": "import tempfile; sys.executable = tempfile.mktemp(); "
    "open(sys.executable, 'w').write('#!/bin/sh\\nexec sleep 600'); os.chmod(sys.executable, 0o700)",
    "answers nonsense": "import tempfile; sys.executable = tempfile.mktemp(); "
    "open(sys.executable, 'w').write('#!/bin/sh\\necho usage; exec sleep 600'); os.chmod(sys.executable, 0o700)",
    "raises": 'ahead._PROGRAM = "raise SystemExit(1)"',
    "dies at its first kernel": "ahead._PROGRAM = 'print(flush=True); input()'",
    "no more threads": "threading.Thread.start = lambda self: (_ for _ in ()).throw(RuntimeError('no more threads'))",
}
DEFAULT = "ends at once", "never answers", "dies at its first kernel", "no more threads"


@pytest.mark.slow
@needs_proc
@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize(
    "broken", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in BROKEN if name not in DEFAULT)]
)
def test_a_helper_that_is_none(broken, tmp_path):
    """It changes nothing but time, and is told nobody."""
    assert run(f"import warnings; warnings.simplefilter('ignore', ResourceWarning)\n{BROKEN[broken]}\n"
               "print(forward(), fastbn.mean(x) == 11.5)", tmp_path) == ["True", "True"]  # fmt: skip
    assert none_left(tmp_path)


@pytest.mark.slow
@needs_proc
@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize(
    "end", ["", "os.kill(os.getpid(), 9)", *(pytest.param(e, marks=pytest.mark.slow) for e in ("os._exit(0)", "1 / 0"))]
)
@pytest.mark.parametrize("when", ["before it has begun", "while it compiles"])
def test_a_program_that_ends(end, when, tmp_path):
    """The helper follows, whether it was told or not."""
    wait = "while not ahead._helper._taken: time.sleep(0.01)" if when == "while it compiles" else ""
    program = f"""
        threading.Thread(target=forward, daemon=True).start()
        while ahead._helper is None: time.sleep(0.001)
        {wait}
        {end}
    """
    command, environment = with_helper(program, tmp_path)
    interpreters.run(command, returns=-9 if "kill" in end else 1 if "/" in end else 0, timeout=60, **environment)
    assert none_left(tmp_path)


@pytest.mark.slow
@needs_proc
@pytest.mark.usefixtures("two_processors")
def test_others_meanwhile(tmp_path):
    """A second Python thread calls, and the process forks, while the helper compiles: all are right, and all end."""
    program = """
        ran = []
        callers = [threading.Thread(target=lambda: ran.append(forward())) for _ in range(3)]
        for caller in callers:
            caller.start()
        while ahead._helper is None or not ahead._helper._taken: time.sleep(0.01)
        child = os.fork()
        if child == 0:
            os._exit(not (forward() and ahead._helper is None))
        status = os.waitpid(child, 0)[1]
        for caller in callers:
            caller.join()
        ahead._helper._thread.join(60)
        print(ran, status, len(children()), sep="|")
    """
    assert "".join(run(program, tmp_path)) == "[True,True,True]|0|0"
    assert none_left(tmp_path, 1)
