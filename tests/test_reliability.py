"""Threads, processes, threading layers, memory: what long-running programs do to a library."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

import fastbn

LAYERS = ["omp", "workqueue", "tbb"]

# What each program below begins with: the layer's library, arrays of mixed shapes, and a call with its right answer.
PRELUDE = """
    import ctypes, os, sys, threading, warnings
    if os.environ.get("TBB"):
        ctypes.CDLL(os.environ["TBB"], mode=ctypes.RTLD_GLOBAL)  # Numba looks for it in the system's folders alone
    import numpy as np
    import numba
    import fastbn
    from fastbn.cpu import threads
    threads.PARALLEL_FROM = 0
    rng = np.random.default_rng(0)
    shapes = (4, 6, 30, 30), (8, 40), (20, 9, 5, 5), (500, 33), (1, 8, 16)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def answer(x):
        y, saved = fastbn.batch_norm(x)
        return y, saved.moments.m2, fastbn.batch_norm_inference(x, saved.mean, saved.moments.var())

    def same(a, b):
        return all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
"""


def tbb_library():
    """The file of pip's tbb, which Numba does not find by itself; None without it."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file.locate() for file in files if file.name == "libtbb.so.12"]
    return str(Path(found[0]).resolve()) if found else None


def run(program, layer=None, timeout=300, **environment):
    """What a program prints in a fresh interpreter."""
    if layer == "tbb":
        library = tbb_library()
        if library is None:
            pytest.skip("tbb is not installed")
        environment["TBB"] = library
    if layer is not None:
        environment |= {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "layer", ["omp", "PyTorch", *(pytest.param(layer, marks=pytest.mark.slow) for layer in LAYERS[1:])]
)
def test_eight_threads_of_a_thousand_calls(layer):
    """One thread has the team, the others run alone meanwhile; all are right."""
    if layer == "PyTorch":
        pytest.importorskip("torch")
    program = """
        if os.environ.get("BESIDE"):
            import torch
        from fastbn.cpu import threads
        expected = [answer(x) for x in arrays]
        print(threads.numbas_layer() or "PyTorch")
        failures = []

        def work(start):
            try:
                for i in range(start, start + 1000):
                    if not same(answer(arrays[i % len(arrays)]), expected[i % len(arrays)]):
                        failures.append(i)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(failures))
    """
    if layer == "PyTorch":
        assert run(program, BESIDE="1", NUMBA_NUM_THREADS="2") == [layer, "0"]
    else:
        assert run(program, layer) == [layer, "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", LAYERS)
def test_forked_child_after_a_parallel_call(layer):
    """The child computes the same: serially, and told so once, where the layer's threads do not survive a fork."""
    program = """
        expected = [answer(x) for x in arrays]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            child = os.fork()
            if child == 0:
                right = all(same(answer(x), y) for _ in range(3) for x, y in zip(arrays, expected))
                told = [w for w in caught if w.category is RuntimeWarning and "fastbn" in str(w.message)]
                os._exit(10 * (not right) + len(told))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(numba.threading_layer(), status, all(same(answer(x), y) for x, y in zip(arrays, expected)))
    """
    assert run(program, layer) == [layer, str(int(layer == "omp")), "True"]


def test_spawned_pool():
    program = """
        import multiprocessing
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                rows = pool.map(fastbn.mean, arrays * 2)
            print(all(row == fastbn.mean(x) for row, x in zip(rows, arrays * 2)))
    """
    assert run(program) == ["True"]


@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_beside_pytorch(first):
    """PyTorch brings threads of its own; whoever comes first, and whatever it sets, both are right."""
    pytest.importorskip("torch")
    program = f"""
        before = answer(arrays[0]) if {first == "fastbn"} else None
        import torch
        a = torch.from_numpy(rng.standard_normal((300, 300)))
        expected = (a.numpy() @ a.numpy())
        wanted = [answer(x) for x in arrays]
        right = before is None or same(before, wanted[0])
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            right &= np.allclose((a @ a).numpy(), expected)
            right &= all(same(answer(x), y) for x, y in zip(arrays, wanted))
        print(right, numba.get_num_threads())
    """
    program = "import torch\n" + textwrap.dedent(program) if first == "torch" else program
    assert run(program, NUMBA_NUM_THREADS="2") == ["True", "2"]


BESIDE_PYTORCH = """
    import torch
    from fastbn.cpu import threads
    expected = [answer(x) for x in arrays]

    def started():
        return threads.numbas_layer() is not None
"""


def beside_pytorch(program, layer=None, **environment):
    pytest.importorskip("torch")
    program = textwrap.dedent(BESIDE_PYTORCH) + textwrap.dedent(program)
    return run(program, layer, **{"NUMBA_NUM_THREADS": "2"} | environment)


def test_pytorchs_threads_run_kernels():
    """Where PyTorch is, Numba's own threads never start; its number of threads counts."""
    program = """
        torch.set_num_threads(2)
        shares = [threads.shares_of(1 << 20)]
        ran = [all(same(answer(x), y) for x, y in zip(arrays, expected))]
        torch.set_num_threads(1)
        shares.append(threads.shares_of(1 << 20))
        ran.append(all(same(answer(x), y) for x, y in zip(arrays, expected)))
        print(threads.pytorchs_team() > 0, started(), *shares, *ran)
    """
    assert beside_pytorch(program) == ["True", "False", "2", "1", "True", "True"]


def test_fewer_threads_than_shares():
    """OpenMP may give a team fewer threads than asked for: all shares are done."""
    program = """
        torch.set_num_threads(2)
        print(all(same(answer(x), y) for x, y in zip(arrays, expected)), threads.shares_of(1 << 20))
    """
    assert beside_pytorch(program, OMP_THREAD_LIMIT="1") == ["True", "2"]


@pytest.mark.parametrize("layer", ["workqueue", "tbb"])
def test_a_chosen_layer_stays_beside_pytorch(layer):
    assert beside_pytorch("print(threads.pytorchs_team(), numba.threading_layer())", layer) == ["0", layer]


def test_a_pytorch_without_openmp(tmp_path):
    """Numba's threads it is, as on systems whose PyTorch has another library, or none."""
    from fastbn.cpu import threads

    assert threads._entry_of_openmp(types.SimpleNamespace(__file__=str(tmp_path / "__init__.py"))) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_child_of_a_process_with_pytorch(threads):
    """PyTorch's threads do not survive, whoever used them: serially, which on one thread, as in a DataLoader's worker,
    is nothing to be told.
    """
    program = f"""
        a = torch.ones(1 << 20)
        a += a  # on PyTorch's threads
        child = os.fork()
        if child == 0:
            torch.set_num_threads({threads})
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                right = all(same(answer(x), y) for _ in range(3) for x, y in zip(arrays, expected))
            told = [w for w in caught if w.category is RuntimeWarning and "fastbn" in str(w.message)]
            os._exit(10 * (not right) + len(told))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, started(), all(same(answer(x), y) for x, y in zip(arrays, expected)))
    """
    assert beside_pytorch(program) == [str(threads - 1), "False", "True"]


@pytest.mark.slow
def test_eight_processes_on_a_cold_cache(tmp_path):
    """All compile the same kernels at once, and find each other's files."""
    program = textwrap.dedent(PRELUDE) + textwrap.dedent("""
        x = rng.standard_normal((6, 5, 40)).astype(sys.argv[1])
        y, saved = fastbn.batch_norm(x)
        z = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
        print(bool(abs(y - z).max() < 1e-3))
    """)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen([*command, dtype], env=environment, stdout=subprocess.PIPE, text=True)
        for dtype in ["float32", "float64"] * 4
    ]
    assert [process.communicate(timeout=500)[0].strip() for process in started] == ["True"] * 8
    assert list(tmp_path.rglob("*.nbc"))


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
