"""Threads, processes, signals, limits, memory: what long-running programs do to a library."""

import os
import signal
import sys
import textwrap
import time

import numpy as np
import pytest

import fastbn
from fastbn.cpu import team
from tests import interpreters
from tests.cpu.programs import PRELUDE, command, run
from tests.support import some_slow

LAYERS = ["omp", "workqueue", "tbb"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in Linux's /proc")
needs_team = pytest.mark.skipif(not team.here, reason="Numba's threads run kernels on this system")

# --- several Python threads -------------------------------------------------------------------------------------------

EIGHT_THREADS = """
    failures, ready = [], threading.Barrier(8)

    def work(start):
        try:
            ready.wait()  # nothing has started any team yet
            for i in range(start, start + 1000):
                if not same(answer(arrays[i % len(arrays)]), expected[i % len(arrays)]):
                    failures.append(i)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    print(len(failures), *failures[:3])
"""


@needs_team
@pytest.mark.parametrize("beside", ["", "import torch; torch.ones(1 << 20).add_(1)"])
@pytest.mark.parametrize("threads", [2, 5])
def test_eight_threads_of_a_thousand_calls(beside, threads):
    """One thread has the team, the others run alone meanwhile; all are right."""
    if beside:
        pytest.importorskip("torch")
    program = textwrap.dedent(beside) + "\n" + textwrap.dedent(EIGHT_THREADS) + "print(team._hired)"
    assert run(program, THREADS=str(threads)) == ["0", str(threads - 1)]


@pytest.mark.parametrize("layer", some_slow(LAYERS, ["workqueue"]))
def test_eight_threads_on_numbas(layer):
    """Where fastbn has no team of its own; one layer ends the process when two threads enter it at once."""
    program = textwrap.dedent(EIGHT_THREADS) + "import numba\nprint(numba.threading_layer(), team._hired)"
    assert run(program, layer) == ["0", layer, "0"]


# --- processes --------------------------------------------------------------------------------------------------------


@needs_fork
@needs_team
def test_forked_children_have_teams_of_their_own():
    """Child and grandchild compute the same, with workers of their own, and so does the parent afterwards."""
    program = """
        assert right() and team._hired == 1

        def grandchild():
            return 10 * (threads_here() != 1) + (not right()) + 2 * (team._hired != 1) + 4 * (threads_here() != 2)

        def child():
            return grandchild() or 20 * in_a_child(grandchild)

        print(in_a_child(child), right(), team._hired)
    """
    assert run(program) == ["0", "True", "1"]


@needs_fork
@needs_team
def test_without_futexes():
    """Condition variables, as on macOS, where workers sleep between calls and callers wait: threads, forks, the end."""
    program = textwrap.dedent(EIGHT_THREADS) + textwrap.dedent("""
        time.sleep(0.01)
        print(right(), in_a_child(lambda: not right()), right(), team._hired)
    """)
    assert run(program, CONDITIONS="1", THREADS="3") == ["0", "True", "0", "True", "2"]


@needs_fork
@pytest.mark.parametrize("layer", some_slow(LAYERS, ["workqueue"]))
def test_forked_child_on_numbas_threads(layer):
    """The child, whose layer's threads may be gone, is right."""
    program = "print(right(), in_a_child(lambda: not (right() and right())), right())"
    assert run(program, layer) == ["True", "0", "True"]


@needs_fork
@needs_team
def test_many_forks_in_the_middle_of_calls():
    """Another thread is in a call at every fork; each child calls at once, and ends."""
    program = """
        large = rng.standard_normal((8, 32, 60, 60)).astype(np.float32)
        with fastbn.threads.num_threads(1):
            y = answer(large)
        going, wrong = True, []

        def work():
            while going:
                if not same(answer(large), y):
                    wrong.append(1)

        caller = threading.Thread(target=work)
        caller.start()
        codes = [in_a_child(lambda: not right()) for _ in range(30)]
        going = False
        caller.join()
        print(*set(codes), len(wrong), right())
    """
    assert run(program) == ["0", "0", "True"]


@pytest.mark.slow
@needs_fork
def test_fork_while_another_thread_compiles():
    """The lock of the compiler is not left to a thread that is not in the child."""
    program = """
        from fastbn.cpu import code
        began, kernels = threading.Event(), code._address.__wrapped__

        def slowly(*kernel):
            began.set()
            time.sleep(0.3)
            return kernels(*kernel)

        code._address = slowly
        other = threading.Thread(target=lambda: fastbn.moments(rng.standard_normal((3, 4, 5))))
        other.start()
        began.wait()
        print(in_a_child(lambda: not right() + (fastbn.mean(np.ones((3, 4, 5))) != 1)))
        other.join()
    """
    assert run(program) == ["0"]


@pytest.mark.parametrize("method", ["spawn", *(["fork"] if hasattr(os, "fork") else [])])
def test_pools(method):
    program = f"""
        import multiprocessing
        if __name__ == "__main__":
            right()
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                rows = pool.map(fastbn.mean, arrays * 2)
            print(all(row == fastbn.mean(x) for row, x in zip(rows, arrays * 2)))
    """
    assert run(program) == ["True"]


@pytest.mark.parametrize("method", ["spawn", *(["fork"] if hasattr(os, "fork") else [])])
def test_workers_of_a_data_loader(method, tmp_path):
    """PyTorch tells them to use one thread; where a data set asks for more, it gets them."""
    pytest.importorskip("torch")
    (tmp_path / "normalized.py").write_text(
        textwrap.dedent("""
        import numpy as np, fastbn, os
        from fastbn.cpu import team

        class Normalized:
            def __len__(self):
                return 8

            def __getitem__(self, i):
                x = np.random.default_rng(i).standard_normal((4, 16, 80, 80)).astype(np.float32)
                with fastbn.threads.num_threads(1 + i % 2):
                    y, _ = fastbn.batch_norm(x)
                return y, fastbn.threads.get_num_threads(), team._hired, os.getpid()
    """)
    )
    program = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from normalized import Normalized
        if __name__ == "__main__":
            fastbn.threads.set_num_threads(None)
            torch.ones(1 << 20).add_(1)
            data = Normalized()
            wanted = [data[i][0] for i in range(8)]
            options = {{"batch_size": None, "num_workers": 2, "multiprocessing_context": "{method}"}}
            got = list(torch.utils.data.DataLoader(data, **options))
            print(all(np.array_equal(a, b[0]) for a, b in zip(wanted, got)))
            print(len({{b[3] for b in got}} - {{os.getpid()}}))
            print(*sorted({{b[1] for b in got}}), max(b[2] for b in got))
    """
    assert run(program) == ["True", "2", "1", "1" if team.here else "0"]


# --- beside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_beside_pytorch(first):
    """PyTorch brings threads of its own; whoever comes first, and whatever it sets, both are right."""
    pytest.importorskip("torch")
    program = f"""
        before = right() if {first == "fastbn"} else True
        import torch
        a = torch.from_numpy(rng.standard_normal((300, 300)))
        product = (a.numpy() @ a.numpy())
        ran = before
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            ran &= np.allclose((a @ a).numpy(), product)
            ran &= right()
        print(ran)
    """
    program = "import torch\n" + textwrap.dedent(program) if first == "torch" else program
    assert run(program) == ["True"]


# --- how many threads -------------------------------------------------------------------------------------------------


@needs_linux
@needs_team
@pytest.mark.parametrize(
    ("limit", "workers"),
    [
        ("", 1),
        ("os.environ['NUMBA_NUM_THREADS'] = '1'", 0),
        ("os.environ['OMP_NUM_THREADS'] = '1'", 0),
        ("os.environ['OMP_NUM_THREADS'] = '1,4'", 0),
        ("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", 0),
        ("import fastbn; fastbn.threads.set_num_threads(1)", 0),
        ("import fastbn; fastbn.threads.set_num_threads(4)", 3),
        ("import torch; torch.set_num_threads(1)", 0),
        ("import numba, numba.np.ufunc.parallel; numba.set_num_threads(1)", None),
    ],
)
def test_workers_are_hired_for_what_the_process_may_use(limit, workers):
    """None where one thread is to run, by whatever limit; and the system counts the same."""
    if "torch" in limit:
        pytest.importorskip("torch")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    program = f"""
        import os
        {limit}
        import numpy as np
        import fastbn
        from fastbn.cpu import team
        before = len(os.listdir("/proc/self/task"))
        x = np.random.default_rng(0).standard_normal((8, 32, 60, 60)).astype(np.float32)
        y, _ = fastbn.batch_norm(x)
        assert abs(y.mean((0, 2, 3))).max() < 1e-5
        print(team._hired, len(os.listdir("/proc/self/task")) - before, len(os.sched_getaffinity(0)))
    """
    without = ["NUMBA_NUM_THREADS", "OMP_NUM_THREADS"]
    hired, more, processors = map(int, interpreters.run(interpreters.python(program), without=without).split())
    assert hired == more
    if workers in (0, 3):
        assert hired == workers
    elif workers is None:
        assert hired == 0
    else:
        assert hired == min(processors, team.MOST_MEMBERS) - 1


@needs_team
def test_more_threads_from_one_call_to_the_next():
    """Calls that were remembered with fewer threads use them all, and fewer again; 600 are as many as a team has."""
    program = """
        x = rng.standard_normal((8, 32, 60, 60)).astype(np.float32)
        with fastbn.threads.num_threads(1):
            y = answer(x)
        hired = []
        for threads in (1, 2, 4, 3, 1, 600):
            fastbn.threads.set_num_threads(threads)
            assert all(same(answer(x), y) for _ in range(5)) and right()
            hired.append(team._hired)
        print(*hired, threads_here() - 1 - team._hired)
    """
    assert run(program, THREADS="1") == ["0", "1", "3", "3", "3", str(team.MOST_MEMBERS - 1), "0"]


@needs_team
@pytest.mark.parametrize("given", [0, 2])
def test_no_more_threads_from_the_system(given):
    """The team is as large as it got, and asks no more."""
    program = f"""
        create, asked = team._system().pthread_create, []

        def refuse(*arguments):
            asked.append(1)
            return create(*arguments) if len(asked) <= {given} else 11  # EAGAIN

        team._system().pthread_create = refuse
        print(right(), team._hired, right(), len(asked), threads_here() - 1)
    """
    assert run(program, THREADS="6") == ["True", str(given), "True", str(given + 1), str(given)]


@needs_linux
@needs_team
def test_threads_limited_by_address_space():
    """No room for the stacks of all: fewer threads, and right."""
    program = """
        import resource
        fastbn.threads.set_num_threads(2)
        assert right() and team._hired == 1
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (100 << 20), -1))
        fastbn.threads.set_num_threads(64)
        print(right(), 0 < team._hired < 63, team._refused)
    """
    assert run(program, THREADS="1") == ["True", "True", "True"]


# --- the end ----------------------------------------------------------------------------------------------------------

ENDS = {
    "sleeping": ("time.sleep(0.05)", 0),
    "spinning": ("right()", 0),
    "sys.exit": ("right(); sys.exit(3)", 3),
    "os._exit": ("right(); os._exit(4)", 4),
    "an exception": ("right(); raise ValueError", 1),
    "another thread's last call": ("threading.Thread(target=right).start()", 0),
    "an exit handler registered before": ("", 0),
    "an exit handler": ("import atexit; atexit.register(lambda: right() or os._exit(9))", 0),
    "a thread of the system": ("import signal; signal.raise_signal(signal.SIGTERM)", -15),
    "daemon threads": (
        "[threading.Thread(target=lambda: [right() for _ in range(10**6)], daemon=True).start() for _ in range(3)];"
        "time.sleep(0.05)",
        0,
    ),
    "a team hired by a daemon at the end": (
        "threading.Thread(target=lambda: [fastbn.threads.set_num_threads(k % 60 + 2) or right() for k in range(10**6)],"
        "daemon=True).start()",
        0,
    ),
}


@needs_team
@pytest.mark.parametrize("times", [1, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", ENDS)
def test_ends_at_once(end, times):
    """Workers that sleep, look out for work, or are in the middle of it hold up nothing."""
    last, returns = ENDS[end]
    for _ in range(times):
        began = time.monotonic()
        program = f"assert right() and team._hired == 1\n{last}\n"
        if end == "an exit handler registered before":
            program = f"import atexit, os\natexit.register(lambda: right() or os._exit(9))\n{program}"
        run(program, timeout=60, returns=returns)
        assert time.monotonic() - began < 30


@needs_team
@pytest.mark.parametrize("when", range(4))
def test_interrupted(when):
    """Ctrl-C ends a loop of calls before long; the next call is right, and the process ends."""
    program = """
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
        x = rng.standard_normal((16, 64, 60, 60)).astype(np.float32)
        with fastbn.threads.num_threads(1):
            y = answer(x)
        print("ready", flush=True)
        try:
            while True:
                answer(x)
        except KeyboardInterrupt:
            came = time.monotonic()
        print(came, same(answer(x), y), right())
    """
    process = interpreters.begin(command(program))
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * when)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
    finally:
        ((out, _),) = interpreters.end(process, timeout=60)
    came, *ran = out.split()
    assert ran == ["True", "True"]
    assert float(came) - sent < 5


@needs_linux
@needs_team
def test_signals_are_the_interpreters():
    """A timer's signals during calls run Python's handler in the main thread, and harm no call."""
    program = """
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
        right()
        blocked = []
        for thread in {int(name) for name in os.listdir("/proc/self/task")} - {os.getpid()}:
            with open(f"/proc/self/task/{thread}/status") as file:
                blocked += [int(line.split()[1], 16) for line in file if line.startswith("SigBlk")]
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        ran = [right() for _ in range(100)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        wanted = sum(1 << n - 1 for n in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))
        print(all(ran), len(seen) > 3, all(seen), len(blocked), all(mask & wanted == wanted for mask in blocked))
        print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    """
    assert run(program) == ["True", "True", "True", "1", "True", "0"]


# --- first calls, and memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_processes_on_a_cold_cache(tmp_path):
    """All compile the same kernels at once, and find each other's files."""
    program = textwrap.dedent(PRELUDE) + textwrap.dedent("""
        x = rng.standard_normal((6, 5, 40)).astype(sys.argv[1])
        y, saved = fastbn.batch_norm(x)
        z = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
        print(bool(abs(y - z).max() < 1e-3))
    """)
    begun = [
        interpreters.begin(interpreters.python(program, dtype), NUMBA_CACHE_DIR=tmp_path)
        for dtype in ["float32", "float64"] * 4
    ]
    assert [out for out, _ in interpreters.end(*begun, timeout=500)] == ["True\n"] * 8
    assert list(tmp_path.rglob("*.o"))


def test_memory_stays_flat_over_two_thousand_calls():
    program = """
        import resource
        large = rng.standard_normal((16, 64, 40, 40)).astype(np.float32)
        for x in [large, *arrays] * 5:
            answer(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(2000):
            answer(arrays[i % len(arrays)] if i % 100 else large)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    (grown,) = run(program)
    assert int(grown) < 8 << 10  # kB; one leaked result of the large array would be more


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """64-bit positions and exact counts: a channel of 1.1e9 values, twice, in 4.4 GB."""
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float16)
    half = (1 << 30) + (1 << 20)
    x = np.empty((1, 2, half), np.float16)
    x.reshape(-1, block.size)[...] = block
    x[0, 1, -1] = 1000.0
    moments = fastbn.moments(x)
    assert moments.count.tolist() == [half, half]
    values = block.astype(np.float64)
    np.testing.assert_allclose(moments.mean[0], values.mean(), atol=1e-7)
    np.testing.assert_allclose(moments.var()[0], values.var(), rtol=1e-6)
    extra = 1000.0 - values[-1]
    np.testing.assert_allclose(moments.mean[1] - moments.mean[0], extra / half, rtol=1e-3)
    y = fastbn.batch_norm_inference(x, moments.mean, moments.var(), out=x)
    expected = (np.array([values[0], 1000.0]) - moments.mean) * moments.rstd()
    np.testing.assert_allclose(y[0, [0, 1], [0, -1]], expected, rtol=1e-3)
    last = fastbn.moments(y.reshape(half, 2)[-(half - 5) :], channel_axis=1)  # channels-last, beyond 2^31 too
    assert last.count.tolist() == [half - 5, half - 5]
