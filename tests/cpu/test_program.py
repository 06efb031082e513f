"""Calls from machine code: what is read of Python's objects, what is counted, what is given back."""

import ctypes
import gc
import sys
import warnings

import numpy as np
import pytest

import fastbn
from fastbn.cpu import objects, program, program_words
from tests import interpreters
from tests.cpu.programs import run

X = np.random.default_rng(0).standard_normal((6, 5, 40)).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [
        np.empty(3),
        np.empty((2, 3), np.float32)[:, 1:],
        np.empty(9, np.uint8)[::-1],
        np.arange(6.0).view(np.matrix)[:, 2:],
    ],
)
def test_where_an_array_keeps_its_address(array):
    assert ctypes.c_int64.from_address(id(array) + objects.DATA_AT).value == array.ctypes.data


@pytest.mark.parametrize("number", [0.0, -1.5, 1e300, float("nan"), np.float64(3.25)])
def test_where_a_float_keeps_its_value(number):
    np.testing.assert_equal(ctypes.c_double.from_address(id(number) + objects.FLOAT_AT).value, float(number))


def test_another_layout_of_objects_is_noticed():
    """It is looked for, not assumed; where it is not found, an error comes at once."""
    with pytest.raises(ValueError, match="not in list"):
        objects._offset(1.5, 0x0123456789ABCDEF)


@pytest.mark.parametrize("eps", [1, True, np.float32(0.25), np.float64(0.25), np.int8(2)])
def test_numbers_of_other_types(eps):
    """What is no float is made one before machine code reads it; again and again."""
    for _ in range(3):
        y, saved = fastbn.batch_norm(X, eps=eps)
        z = fastbn.batch_norm_inference(X, saved.mean, saved.moments.var(), eps=eps)
        wanted = (X - X.mean((0, 2), keepdims=True)) / np.sqrt(X.var((0, 2), keepdims=True) + float(eps))
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        np.testing.assert_allclose(z, wanted, atol=1e-5)


@pytest.mark.usefixtures("fresh_plans")
def test_reference_counts_stay(monkeypatch):
    """Of arrays, of None, which stands for absent ones, of the floats, and of the words of a program."""
    made, prepare = [], program.Program._prepare
    monkeypatch.setattr(program.Program, "_prepare", lambda self: (made.append(self), prepare(self))[1])
    gamma, eps = np.ones(5), 0.125
    y, saved = fastbn.batch_norm(X, gamma, eps=eps)
    out, weight = np.empty_like(X), np.ones((6, 1, 40))

    def calls():
        fastbn.batch_norm_inference(X, saved.mean, saved.rstd, gamma, eps=eps, out=out)
        fastbn.batch_norm_backward(X, saved)
        fastbn.batch_norm(X, gamma, eps=eps)
        fastbn.moments(X, weights=weight)

    for _ in range(10):
        calls()
    assert made
    watched = [X, gamma, eps, out, y, saved.mean, weight, *(p._words for p in made)]
    before = [sys.getrefcount(a) for a in watched]
    gc.collect()  # what earlier tests have left
    none, objects_before = sys.getrefcount(None), len(gc.get_objects())
    for _ in range(2000):
        calls()
    assert [sys.getrefcount(a) for a in watched] == before
    assert abs(sys.getrefcount(None) - none) < 500  # other threads and caches hold some
    gc.collect()
    assert abs(len(gc.get_objects()) - objects_before) < 500


@pytest.mark.usefixtures("fresh_plans")
def test_no_memory_for_scratch(monkeypatch):
    """MemoryError, and the same program is right when there is some."""
    made = []
    prepare = program.Program._prepare
    monkeypatch.setattr(program.Program, "_prepare", lambda self: (made.append(self), prepare(self))[1])
    mean = fastbn.moments(X).mean
    (one,) = made
    at, size = program_words.SCRATCH_BYTES // 8, int(one._words[program_words.SCRATCH_BYTES // 8])
    one._words[at] = 1 << 62
    with pytest.raises(MemoryError):
        fastbn.moments(X)
    for enough in (size, program_words.ON_STACK + 1, 1 << 24):
        one._words[at] = enough
        assert np.array_equal(fastbn.moments(X).mean, mean)


@pytest.mark.usefixtures("fresh_plans")
def test_arrays_live_no_longer_than_their_call(tmp_path):
    """Temporaries as arguments, a read-only map of a file, results whose inputs are gone."""
    expected = fastbn.batch_norm(X)[0]
    for _ in range(200):
        y, saved = fastbn.batch_norm(X.copy(), np.ones(5), np.zeros(5))
        dx = fastbn.batch_norm_backward(X.copy(), saved)[0]
        assert np.array_equal(y, expected)
        assert np.isfinite(dx).all()
    X.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    assert np.array_equal(fastbn.batch_norm(mapped)[0], expected)
    with pytest.raises((ValueError, TypeError)):
        fastbn.batch_norm(mapped, out=mapped)
    assert np.array_equal(mapped, X)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_plans")
def test_thousands_of_programs():
    """Shapes that never repeat: remembered ones are dropped, and memory with them."""
    program_ = """
        import resource, gc
        def calls(first, last):
            for n in range(first, last):
                x = arrays[0].reshape(-1)[: 2 * n].reshape(2, n)
                y, saved = fastbn.batch_norm(x)
                assert np.allclose(y[0], -y[1], atol=1e-5)
        team.PARALLEL_FROM = 1 << 20
        calls(1, 4000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(4000, 9000)
        calls(1, 4000)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    (grown,) = run(program_)
    assert int(grown) < 24 << 10  # kB


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0), (1, 1), (1, 1, 1)])
def test_nothing_to_do(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            y, saved = fastbn.batch_norm(np.ones(shape))
            assert y.shape == shape
            assert (y == 0).all()
            assert fastbn.batch_norm_backward(np.ones(shape), saved)[0].shape == shape


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-X", "dev"], ["-X", "importtime"], ["-I"]])
def test_under_options_of_the_interpreter(flags):
    program_ = f"""
        import sys
        sys.path[:0] = {[p for p in sys.path if p]!r}
        import numpy as np, fastbn, importlib
        x = np.ones((16, 16, 40, 40), np.float32)
        x[0] = 2
        with fastbn.threads.num_threads(3):
            y, _ = fastbn.batch_norm(x)
            importlib.reload(fastbn)
            z, _ = fastbn.batch_norm(x)
        print(np.array_equal(y, z) and abs(y.mean()) < 1e-6)
    """
    assert interpreters.run(interpreters.python(program_, options=flags), timeout=100) == "True\n"
