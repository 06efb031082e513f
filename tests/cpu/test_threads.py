"""`fastbn.threads`: whose number counts, for whom, and every limit that it has."""

import asyncio
import math
import os
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest

import fastbn
from fastbn import threads
from fastbn.numba_parts import threads as threads_of_numba
from fastbn.threads import get_num_threads, num_threads, set_num_threads
from tests import interpreters

PROGRAM = """
import os, sys
os.sched_getaffinity = lambda pid: set(range(16))
os.cpu_count = lambda: 16
from fastbn import threads
threads._quota = lambda root: sys.maxsize
from fastbn.threads import get_num_threads, num_threads, set_num_threads
"""


def run(program, start=PROGRAM, **environment):
    """What a new process prints; without any start it has the machine's processors, else 16 and no quota."""
    command = interpreters.python(start + textwrap.dedent(program))
    return interpreters.run(command, without=["*_NUM_THREADS"], **environment).split()


@pytest.fixture(autouse=True)
def sixteen(monkeypatch):
    """Of processors, and no other limit."""
    monkeypatch.setattr(threads, "_processors", lambda: 16)
    monkeypatch.setattr(threads_of_numba, "chosen", lambda: None)
    monkeypatch.setattr(threads, "_of_torch", lambda torch: threads.ANY)
    monkeypatch.setattr(threads, "_known", (math.inf, threads.ANY))
    yield
    set_num_threads(None)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


# --- whose number counts ----------------------------------------------------------------------------------------------


def test_precedence():
    assert get_num_threads() == 16
    set_num_threads(3)
    assert get_num_threads() == 3
    with num_threads(20):
        assert get_num_threads() == 20
        with num_threads(1):
            assert get_num_threads() == 1
            set_num_threads(4)
            assert get_num_threads() == 1
        assert get_num_threads() == 20
    assert get_num_threads() == 4
    set_num_threads(None)
    assert get_num_threads() == 16


def test_an_exception_gives_it_back():
    with pytest.raises(ZeroDivisionError), num_threads(2):
        1 / 0  # noqa: B018
    assert get_num_threads() == 16


def test_a_decorated_function():
    decorated = num_threads(2)(get_num_threads)
    assert [decorated(), get_num_threads(), decorated()] == [2, 16, 2]


def test_python_threads():
    """One that runs meanwhile keeps its number; the process's reaches all."""
    entered, asked = threading.Event(), threading.Event()

    def other():
        with num_threads(5):
            entered.set()
            assert asked.wait(10)
            return get_num_threads()

    found = []
    thread = threading.Thread(target=lambda: found.append(other()))
    thread.start()
    assert entered.wait(10)
    assert get_num_threads() == 16
    with num_threads(2):
        assert get_num_threads() == 2
        asked.set()
        thread.join()
    assert found == [5]
    set_num_threads(3)
    assert in_a_thread(get_num_threads) == 3


def test_asynchronous_tasks():
    async def task(n):
        with num_threads(n):
            await asyncio.sleep(0)
            started_within = asyncio.create_task(asked())
            await asyncio.sleep(0)
            return get_num_threads(), await started_within, await asyncio.to_thread(get_num_threads)

    async def asked():
        return get_num_threads()

    async def main():
        return *await asyncio.gather(task(1), task(2), task(3)), get_num_threads()

    assert asyncio.run(main()) == ((1, 1, 1), (2, 2, 2), (3, 3, 3), 16)


@pytest.mark.parametrize("n", [1, np.int64(2), np.uint8(3), 10**6])
def test_integers(n):
    set_num_threads(n)
    assert get_num_threads() == n
    assert type(get_num_threads()) is int
    set_num_threads(None)
    with num_threads(n):
        assert get_num_threads() == n


@pytest.mark.parametrize("put", [set_num_threads, lambda n: num_threads(n).__enter__()], ids=["process", "context"])
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n: expected at least 1, got 0"),
        (-2, ValueError, "n: expected at least 1, got -2"),
        (np.int64(0), ValueError, "n: expected at least 1, got 0"),
        (2.0, TypeError, "n: expected an integer, got float"),
        (True, TypeError, "n: expected an integer, got bool"),
        ("2", TypeError, "n: expected an integer, got str"),
        (np.array([2]), TypeError, "n: expected an integer, got ndarray"),
    ],
    ids=repr,
)
def test_bad_input(put, n, error, message):
    set_num_threads(3)
    with pytest.raises(error, match=f"^{message}$"):
        put(n)
    assert get_num_threads() == 3


def test_a_context_needs_a_number():
    with pytest.raises(TypeError, match="n: expected an integer, got NoneType"), num_threads(None):
        pass


# --- what the process may use -----------------------------------------------------------------------------------------


def test_nothing_is_imported_or_started():
    program = "import fastbn, sys; fastbn.threads.get_num_threads(); print(*sys.modules)"
    assert {"numba", "llvmlite", "torch"}.isdisjoint(run(program, start=""))


def test_the_cost():
    """Of a call, which large arrays pay: 0.7 us here, where files or locks would take 10."""
    program = """
        import timeit
        print(min(timeit.repeat(get_num_threads, number=1000, repeat=20)) / 1000)
    """
    assert float(run(program)[0]) < 5e-6


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 16),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"NUMBA_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "6", "NUMBA_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": " 4 , 2"}, 4),
        ({"OMP_NUM_THREADS": "64"}, 16),
        ({"OMP_NUM_THREADS": "", "NUMBA_NUM_THREADS": "0"}, 16),
        ({"OMP_NUM_THREADS": "many"}, 16),
        ({"OMP_NUM_THREADS": "-1"}, 16),
    ],
    ids=str,
)
def test_environment(environment, expected):
    program = """
        print(get_num_threads())
        os.environ["OMP_NUM_THREADS"] = "2"  # too late, as for OpenMP itself
        print(get_num_threads())
        set_num_threads(30)
        print(get_num_threads())
    """
    assert run(program, **environment) == [str(expected), str(expected), "30"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity():
    """Of the calling thread, at this moment."""
    program = """
        import os, sys, threading
        from fastbn import threads
        threads._quota = lambda root: sys.maxsize
        usable = os.sched_getaffinity(0)
        def ask_on_one():
            os.sched_setaffinity(0, list(usable)[:1])
            print(threads.get_num_threads())
        print(len(usable), threads.get_num_threads())
        thread = threading.Thread(target=ask_on_one)
        thread.start(); thread.join()
        print(threads.get_num_threads())
        ask_on_one()
        os.sched_setaffinity(0, usable)
        print(threads.get_num_threads())
    """
    usable, *found = map(int, run(program, start=""))
    assert found == [usable, 1, usable, 1, usable]


def test_systems_without_affinity(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_HAS_AFFINITY", False)
    for count, expected in ((12, 12), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert threads._processors() == expected


def test_numba():
    """Where its threads have been started; what one Python thread masks is its own."""
    program = """
        import threading, numba
        from numba.np.ufunc import parallel
        print(get_num_threads(), parallel._is_initialized)
        numba.set_num_threads(3)
        print(get_num_threads())
        thread = threading.Thread(target=lambda: print(get_num_threads()))
        thread.start(); thread.join()
        numba.set_num_threads(1)
        with num_threads(2):
            print(get_num_threads())
        print(get_num_threads())
        numba.set_num_threads(4)
        print(get_num_threads())
    """
    assert run(program, NUMBA_NUM_THREADS="4") == ["4", "False", "3", "4", "2", "1", "4"]


def test_all_of_numbas_threads_are_no_limit():
    """They were counted when Numba was imported; the process may use more by now."""
    program = """
        os.sched_getaffinity = lambda pid: {0}
        import numba
        numba.set_num_threads(1)
        os.sched_getaffinity = lambda pid: {0, 1, 2}
        print(numba.config.NUMBA_NUM_THREADS, get_num_threads())
    """
    assert run(program) == ["1", "3"]


def test_pytorch():
    pytest.importorskip("torch")
    program = """
        import torch
        for n in 3, 1, 40:
            torch.set_num_threads(n)
            print(get_num_threads())
        set_num_threads(5)
        torch.set_num_threads(2)
        print(get_num_threads())
    """
    assert run(program) == ["3", "1", "16", "5"]


@pytest.mark.parametrize("name", ["torch", "numba.np.ufunc.parallel"])
@pytest.mark.parametrize("module", [types.ModuleType("half"), None], ids=["being imported", "forbidden"])
def test_modules_that_are_not_there_yet(monkeypatch, name, module):
    monkeypatch.undo()
    before = get_num_threads()
    monkeypatch.setitem(sys.modules, name, module)
    assert get_num_threads() >= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork():
    """A child keeps what was set, asks its own limits, and sets its own number."""
    program = """
        def forked(function):
            child = os.fork()
            if child == 0:
                function()
                sys.stdout.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

        def on_two():
            os.sched_getaffinity = lambda pid: {0, 1}
            print(get_num_threads(), flush=True)
            set_num_threads(7)

        print(get_num_threads(), flush=True)
        forked(on_two)
        set_num_threads(3)
        with num_threads(4):
            forked(lambda: print(get_num_threads()))
        forked(lambda: print(get_num_threads()))
        print(get_num_threads())
    """
    assert run(program) == ["16", "2", "4", "3", "3"]


# --- quotas -----------------------------------------------------------------------------------------------------------


V2, V1 = "0::/a/b", "4:memory:/a\n3:cpu,cpuacct:/a/b\n1:name=systemd:/cpu\n0::/"
MOUNT = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"a/b/cpu.max": "200000 100000"}, 2),
        (V2, {"a/b/cpu.max": "max 100000"}, None),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 50000"}, 3),
        (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "300000 100000", "a/cpu.max": "800000 100000"}, 3),
        (V2, {"cpu.max": "400000 100000"}, 4),  # a container's own group, by its path outside
        (V2, {"a/other/cpu.max": "100000 100000"}, None),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/../b", {"cpu.max": "200000 100000"}, 2),
        ("0::/a:b,c/d", {"a:b,c/cpu.max": "200000 100000"}, 2),
        (V2, {"a/b/cpu.max": "250000 100000"}, 2),  # three would wait for the half that is missing
        (V2, {"a/b/cpu.max": "10000 100000"}, 1),
        (V2, {"a/b/cpu.max": ""}, None),
        (V2, {"a/b/cpu.max": "200000 0"}, None),
        (V2, {"unified/a/b/cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, None),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000",
              "cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "50000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "100000"}, None),
        (V1, {"memory/a/cpu.max": "100000 100000"}, None),
        ("1:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
        (V2, {}, None),
        (None, {"cpu.max": "100000 100000"}, None),
    ],
)  # fmt: skip
def test_quotas(tmp_path, groups, files, expected):
    for name, text in files.items():
        path = tmp_path / MOUNT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    assert threads._quota(tmp_path) == (expected or threads.ANY)


def test_groups_of_any_name(tmp_path):
    """Bytes that are no UTF-8, and characters that end lines elsewhere."""
    name = os.fsdecode(b"caf\xe9\xc2\x85x")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/" + os.fsencode(name) + b"\n")
    group = tmp_path / MOUNT / name
    try:
        group.mkdir(parents=True)
    except OSError:
        pytest.skip("the file system takes no such names")
    (group / "cpu.max").write_text("200000 100000\n")
    assert threads._quota(tmp_path) == 2


def test_unreadable_quotas(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / MOUNT / "cpu.max").mkdir(parents=True)  # reading it raises for root as well
    assert threads._quota(tmp_path) == threads.ANY


def test_a_quota_that_changes(monkeypatch):
    monkeypatch.setattr(threads, "QUOTA_SECONDS", 0.01)
    monkeypatch.setattr(threads, "_of_environment", 8)
    monkeypatch.setattr(threads, "_known", (-math.inf, threads.ANY))
    for quota, expected in ((3, 3), (2, 2), (threads.ANY, 8), (5, 5)):
        monkeypatch.setattr(threads, "_quota", lambda root, quota=quota: quota)
        time.sleep(0.02)
        assert get_num_threads() == expected


def test_a_quota_is_not_read_at_every_call(monkeypatch):
    read = []
    monkeypatch.setattr(threads, "_quota", lambda root: read.append(root) or 2)
    monkeypatch.setattr(threads, "_known", (-math.inf, threads.ANY))
    monkeypatch.setattr(threads, "QUOTA_SECONDS", 100)
    assert {get_num_threads() for _ in range(10)} == {2}
    assert len(read) == 1


# --- the package ------------------------------------------------------------------------------------------------------


def test_it_is_there_after_the_import_of_the_package():
    assert fastbn.threads is threads
    assert run("import fastbn\nprint(fastbn.threads.get_num_threads() > 0)", start="") == ["True"]
