"""Prepared calls (`fastbn.call`): the same bits and errors however often, and nothing that a signature leaves out."""

import numpy as np
import pytest

import fastbn
from fastbn import call, prepare_forward, prepare_gradients
from fastbn.cpu import team
from fastbn.saved import Saved, make_saved
from tests.cases.calls import *  # noqa: F403
from tests.conftest import forget


def test_arrays_of_a_later_call_are_looked_at(found):
    """Misaligned arrays and read-only ones are others; overlaps are seen."""
    x = np.random.default_rng(0).standard_normal((4, 6, 7, 11)).astype(np.float32)
    mean, var = np.zeros(6), np.ones(6)
    expected = fastbn.batch_norm_inference(x, mean, var)
    locked = x.copy()
    locked.flags.writeable = False
    raw = np.zeros(x.nbytes + 1, np.uint8)
    askew = raw[1:].view(np.float32).reshape(x.shape)
    askew[...] = x
    for a in (locked, askew):
        np.testing.assert_array_equal(fastbn.batch_norm_inference(a, mean, var), expected)
        assert not found
    out = np.empty_like(x)
    fastbn.batch_norm_inference(x, mean, var, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable array"):
        fastbn.batch_norm_inference(x, mean, var, out=out)
    both = np.zeros((5, *x.shape[1:]), np.float32)
    both[:4] = x
    np.testing.assert_array_equal(fastbn.batch_norm_inference(both[:4], mean, var, out=both[1:]), expected)
    mine = x.copy()
    assert fastbn.batch_norm_inference(mine, mean, var, out=mine) is mine
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("name", ["mean", "rstd", "count"])
def test_numbers_of_other_dtypes(found, name):
    """In a `Saved` made by hand."""
    x = np.arange(24.0).reshape(4, 6)
    _, saved = fastbn.batch_norm(x)
    whole = saved._replace(**{name: np.full(6, 4.0)})
    expected = fastbn.batch_norm_backward(x, whole)
    for _ in range(3):
        gradients = fastbn.batch_norm_backward(x, whole._replace(**{name: np.full(6, 4)}))
        for a, b in zip(gradients[:3], expected[:3], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_y_of_another_dtype():
    x = np.arange(24.0).reshape(4, 6)
    y, saved = fastbn.batch_norm(x, activation="relu")
    for wrong in (y.astype(np.float32), y[:3]):
        with pytest.raises(ValueError, match=r"^saved\.y: expected saved\.x's shape \(4, 6\) and dtype float64, got"):
            fastbn.batch_norm_backward(x, saved._replace(y=wrong))


def test_threads_may_change_between_calls(found):
    """A call that was prepared by one thread is not serial for ever."""
    x = np.random.default_rng(0).standard_normal((8, 16, 40, 40)).astype(np.float32)
    assert x.size >= team.PARALLEL_FROM
    asked, hire = [], team.team_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbn.cpu.program.team_for", lambda threads: asked.append(threads) or hire(threads))
        results = []
        for threads in (1, 2, 1, 2):
            with fastbn.threads.num_threads(threads):
                results.append(fastbn.batch_norm(x)[0])
    assert asked == [2, 2]
    assert len(found) == 3
    for y in results:
        np.testing.assert_array_equal(y, results[0])


# --- statistics -------------------------------------------------------------------------------------------------------

STATISTICS = {
    "mean": fastbn.mean,
    "var": fastbn.var,
    "std": fastbn.std,
    "mean_var": fastbn.mean_var,
    "var of samples": lambda x, axis, **k: fastbn.var(x, axis, ddof=1, **k),
    "std of samples": lambda x, axis, **k: fastbn.std(x, axis, ddof=1.5, **k),
    "kept": lambda x, axis, **k: fastbn.var(x, axis, keepdims=True, **k),
}


def lying(x):
    """The same values in memory in several ways."""
    padded = np.zeros((x.shape[0], 2 * x.shape[1], *x.shape[2:]), x.dtype)
    padded[:, ::2] = x
    return {
        "C": x,
        "Fortran": np.asfortranarray(x),
        "reversed": np.ascontiguousarray(x[::-1])[::-1],
        "channels apart": padded[:, ::2],
        "channels last": np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
        "read-only": np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    }


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("axis", [None, 0, (0, 2, 3), -1, (1, 2)])
def test_statistics_of_a_prepared_call_are_those_of_a_first_one(name, dtype, axis):
    """Bits, type and shape, of numbers that the prepared call has not seen."""
    rng = np.random.default_rng(0)
    seen, unseen = (rng.normal(3, 2, (4, 6, 5, 7)).astype(dtype) for _ in range(2))
    for lies in lying(seen):
        x = lying(unseen)[lies]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(call, "_prepared", {})
            first = STATISTICS[name](x, axis)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(call, "_prepared", {})
            STATISTICS[name](lying(seen)[lies], axis)
            result = STATISTICS[name](x, axis)
            assert len(call._prepared) == 1
        assert type(result) is type(first)
        np.testing.assert_array_equal(result, first)
        for a, b in zip(np.atleast_1d(result), np.atleast_1d(first), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan, np.inf, 1e-200, 1e200])
def test_statistics_of_numbers_at_the_ends(value):
    """Constants, infinities, squares beyond the range: what is out of the ordinary is seen after the sums."""
    ordinary = np.random.default_rng(0).standard_normal((6, 5))
    x = ordinary.copy()
    x[:, 2] = value * np.arange(1, 7) if 0 < value < np.inf and value != 7 else value
    for function in (fastbn.mean, fastbn.var, fastbn.std):
        for axis in (0, None):
            forget()
            expected = function(x, axis)
            function(ordinary, axis)
            np.testing.assert_array_equal(function(x, axis), expected)


def test_float16_variance_beyond_its_range():
    x = np.array([-60000.0, 60000.0] * 20, np.float16)
    for _ in range(3):
        assert fastbn.var(x) == np.inf
        assert fastbn.mean(x) == 0
        assert fastbn.std(x) == 60000


def test_other_arguments_of_statistics():
    x = np.arange(24.0).reshape(4, 6)
    for _ in range(2):
        assert fastbn.mean(x, 1).shape == (4,)
        with pytest.raises(TypeError):
            fastbn.mean(x, 1.0)
        with pytest.raises(np.exceptions.AxisError):
            fastbn.mean(x, 2)
        assert fastbn.mean(x, 1, keepdims=True).shape == (4, 1)
        assert fastbn.mean(x, 1, dtype=np.float32).dtype == np.float32
        assert fastbn.mean(x.astype(int), 1).dtype == np.float64
        assert fastbn.var(x, 1, where=x > 3)[0] == 0.25
        assert fastbn.moments(x, channel_axis=0).mean.shape == (4,)
        assert fastbn.moments(x, channel_axis=1).mean.shape == (6,)


@pytest.mark.parametrize("name", ["batch_norm", "normalize", "batch_norm_backward", "grad_input"])
def test_a_call_with_an_out_askew_is_prepared_once(name, monkeypatch):
    """The one without `out` that it takes its result from, too."""
    made = []
    for module in (prepare_forward, prepare_gradients):
        prepare = module.kernels_for
        monkeypatch.setattr(module, "kernels_for", lambda *given, prepare=prepare: made.append(1) or prepare(*given))
    monkeypatch.setattr(call, "_prepared", {})
    rng, ones = np.random.default_rng(0), np.ones(6)
    dy, values = rng.standard_normal((2, 4, 6, 5))
    prepared = []
    for _ in range(3):
        buffer = np.empty(values.size + 7)
        x, out = buffer[7:].reshape(values.shape), buffer[: values.size].reshape(values.shape)
        x[...] = values
        calls = {
            "batch_norm": lambda x, out: fastbn.batch_norm(x, out=out)[0],
            "normalize": lambda x, out: fastbn.normalize(x, ones, ones, out=out),
            "batch_norm_backward": lambda x, out: (
                fastbn.batch_norm_backward(dy, fastbn.Saved.frozen(x, ones, ones), out=out).x
            ),
            "grad_input": lambda x, out: fastbn.grad_input(dy, x, ones, ones, None, ones, ones, 20, out=out),
        }
        wanted = calls[name](values.copy(), None)
        made.clear()
        np.testing.assert_array_equal(calls[name](x, out), wanted)
        prepared.append(len(made))
    assert prepared == [2, 0, 0]


def test_population():
    """Batches of one value or none do not count, nor do their numbers; float32 and integers are taken as float64."""
    nan, inf = np.nan, np.inf
    count = np.array([[2, 2, 2, 1, 0], [4, 1, 3, 1, 1], [3, 5, 2, 0, 1]])
    mean = np.array([[1.0, 2.0, inf, 3.0, nan], [2.0, nan, -inf, 5.0, 7.0], [6.0, 4.0, 1.0, nan, 7.0]])
    m2 = np.array([[1.0, 3.0, nan, 0.0, nan], [6.0, inf, nan, 0.0, 0.0], [4.0, 8.0, 1.0, nan, 0.0]])
    for counts, dtype in ((count.astype(float), float), (count, np.float32)):
        batches = [fastbn.Moments(*each) for each in zip(counts, mean.astype(dtype), m2.astype(dtype), strict=True)]
        for _ in range(2):  # prepared, and found
            means, variances = fastbn.population(batches)
            assert means.dtype == variances.dtype == np.float64
            np.testing.assert_allclose(means, [3.0, 3.0, nan, nan, nan], rtol=1e-15)
            np.testing.assert_allclose(variances, [5 / 3, 2.5, nan, nan, nan], rtol=1e-7)


def test_fields_of_saved_are_where_their_names_say():
    """It is made by positions, for speed."""
    names = [name for name in Saved._fields if name not in ("moments", "count")]
    given = {name: object() for name in names}
    moments = fastbn.Moments(object(), object(), object())
    saved = make_saved(moments=moments, **given)
    assert {name: getattr(saved, name) for name in names} == given
    assert saved.moments is moments
    assert saved.count is moments.count
    again = Saved.from_arrays(*saved.arrays())
    assert again._replace(moments=None) == saved._replace(moments=None)
    assert all(a is b for a, b in zip(again.moments, moments, strict=True))
