"""What tells calls apart (`fastbn.call`): everything that decides how they go, and nothing that cannot be found."""

import itertools
import sys
import warnings
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

import fastbn
from fastbn import call, functional, merging, reduction_calls, reductions
from fastbn.cpu import memory
from tests.support import DTYPES

SIGNED = {
    "float32": np.zeros((4, 6), np.float32),
    "another": np.ones((4, 6), np.float32),
    "float64": np.zeros((4, 6)),
    "bfloat16": np.zeros((4, 6), DTYPES["bfloat16"]),
    "float16": np.zeros((4, 6), np.float16),
    "int32": np.zeros((4, 6), np.int32),
    "swapped": np.zeros((4, 6), ">f4"),
    "shape": np.zeros((6, 4), np.float32),
    "transposed": np.zeros((6, 4), np.float32).T,
    "step": np.zeros((8, 6), np.float32)[::2],
    "reversed": np.zeros((4, 6), np.float32)[::-1],
    "repeated": np.broadcast_to(np.zeros(6, np.float32), (4, 6)),
    "read-only": np.frombuffer(bytes(96), np.float32).reshape(4, 6),
    "unaligned": np.zeros(97, np.uint8)[1:].view(np.float32).reshape(4, 6),
    "fewer": np.zeros(24, np.float32),
    "more": np.zeros((4, 6, 1), np.float32),
    "empty": np.zeros((0, 6), np.float32),
    "number": np.array(1.0, np.float32),
    "many": np.zeros((1,) * 60, np.float32),
    "None": None,
}


def attributes(a):
    return None if a is None else (a.shape, a.strides, a.dtype, a.flags.aligned, a.flags.writeable)


def test_signatures_tell_what_attributes_do():
    for (a, b), (c, d) in itertools.product(itertools.product(SIGNED.values(), repeat=2), repeat=2):
        alike = [*map(attributes, (a, b))] == [*map(attributes, (c, d))]
        assert (call.describe(a, b) == call.describe(c, d)) == alike


def test_signatures_are_the_same_before_they_are_compiled():
    call.describe(np.zeros(3))
    for a, b in itertools.product(SIGNED.values(), repeat=2):
        if a is not None or b is not None:
            assert call._compiled(a, b) == call.in_python((a, b))


def test_signatures_of_many_arrays():
    """Beyond the room that compiled code has, Python describes them."""
    for count in range(1, 40):
        arrays = [np.zeros((2, 3, 4, 5))] * count
        described = call.describe(*arrays)
        assert described == call.in_python(tuple(arrays))
        assert described != call.describe(*arrays[1:], None)
        assert described != call.describe(*arrays, None)
    assert call._compiled(*arrays) is None


@pytest.mark.parametrize("value", [[1.0], 1.0, "x", np.float32(1), np.ma.masked_array([1.0]), object()])
def test_what_is_no_array_is_like_nothing(value):
    assert call.describe(np.zeros(3), value) != call.describe(np.zeros(3), value)


def test_signatures_leave_no_references():
    arrays = [np.zeros((3, 4)), None, np.zeros(4, np.float32), [1]]
    before = [sys.getrefcount(a) for a in (*arrays, np.dtype(float), np.ndarray)]
    for _ in range(1000):
        call.describe(*arrays), call.describe(*arrays[:3])
    after = [sys.getrefcount(a) for a in (*arrays, np.dtype(float), np.ndarray)]
    assert all(abs(a - b) < 50 for a, b in zip(before, after, strict=True))


def test_what_is_disjoint():
    """Said of no two arrays that share memory, of slices whatever way they run; of all that are far from another."""
    whole = np.zeros((12, 10, 8))
    pieces = [whole[i : i + 3, ::s, ::t] for i in (0, 2, 5, 9) for s in (1, -1, 3) for t in (1, -2)]
    pieces += [whole.T[:, :, ::-4], whole[:0], np.broadcast_to(whole[5, 5, 5], (4, 4)), np.zeros(3), whole[1, 1, 1:1]]
    for a, b in itertools.product(pieces, repeat=2):
        disjoint = memory.disjoint(a, b)
        assert not (disjoint and a is not b and np.shares_memory(a, b))
        low, high = np.lib.array_utils.byte_bounds(a)
        first, end = np.lib.array_utils.byte_bounds(b)
        assert disjoint or a is b or (first < high + 16 and low < end + 16)
    assert memory.disjoint(whole, None, np.zeros(4), whole, None)
    assert not memory.disjoint(whole, np.zeros(4), whole[3])
    assert not memory.disjoint(whole, np.zeros(4).view(np.recarray)), "what is not known is looked at"


# --- what a signature leaves out --------------------------------------------------------------------------------------


def test_axes_that_change_later():
    """A list is taken for the numbers that it has at the call."""
    whole = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    expected = fastbn.batch_norm(whole[:3])[0]
    axes = [1]
    x = whole[:3].copy()
    fastbn.batch_norm(x, channel_axis=axes, out=np.empty_like(x))
    fastbn.normalize(x, np.zeros(3), np.ones(3), channel_axis=axes, out=np.empty_like(x))
    axes[0] = 0
    scaled = fastbn.normalize(x, np.arange(3.0), np.ones(3))
    overlapping = whole.copy()
    np.testing.assert_array_equal(
        fastbn.normalize(overlapping[:3], np.arange(3.0), np.ones(3), channel_axis=[1], out=overlapping[1:4]), scaled
    )
    np.testing.assert_array_equal(fastbn.batch_norm(whole[:3], channel_axis=[1], out=whole[1:4])[0], expected)


@pytest.mark.parametrize("axes", [range(1, 2), np.array([1]), np.array(1), (np.int8(1),), [True]])
def test_axes_of_other_sorts(axes):
    x = np.random.default_rng(0).standard_normal((5, 3))
    np.testing.assert_array_equal(fastbn.batch_norm(x, channel_axis=axes)[0], fastbn.batch_norm(x)[0])


COUNTS = [np.str_("4"), np.complex64(4), np.bool_(True), np.void(b"1"), np.datetime64("2020"), "4", 4j, None]


@pytest.mark.parametrize("count", COUNTS, ids=lambda c: type(c).__name__)
def test_counts_that_are_no_real_numbers(count):
    x = np.random.default_rng(0).standard_normal((4, 3))
    given = x, x, *np.ones((5, 3))
    fastbn.grad_input(*given, 4)
    with pytest.raises(TypeError, match=r"^count: expected"):
        fastbn.grad_input(*given, count)
    for same in (4.0, np.float32(4), np.int8(4), Fraction(4)):
        np.testing.assert_array_equal(fastbn.grad_input(*given, same), fastbn.grad_input(*given, 4))


@pytest.mark.parametrize("name", ["mean", "rstd", "count"])
def test_numbers_that_a_saved_must_have(name):
    x = np.random.default_rng(0).standard_normal((4, 3))
    _, saved = fastbn.batch_norm(x)
    fastbn.batch_norm_backward(x, saved)
    with pytest.raises(TypeError, match=rf"^saved\.{name}: expected .* it is required"):
        fastbn.batch_norm_backward(x, saved._replace(**{name: None}))


def test_channel_axis_of_a_saved():
    x = np.random.default_rng(0).standard_normal((4, 3))
    _, saved = fastbn.batch_norm(x)
    fastbn.batch_norm_backward(x, saved)
    with pytest.raises(TypeError, match="channel_axis: expected an int"):
        fastbn.batch_norm_backward(x, saved._replace(channel_axis=1.0))


@pytest.mark.parametrize("kind", ["longdouble", "empty", "integer result", "plain"])
@pytest.mark.parametrize("first", [True, False])
def test_options_of_statistics_that_are_equal(kind, first):
    """What is equal but another, or wrong, has no say in later calls."""
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.longdouble if kind == "longdouble" else float)
    x, more = (x[:0] if kind == "empty" else x), ({"dtype": int} if kind == "integer result" else {})
    calls = [
        lambda: fastbn.mean(x, axis=1, **more), lambda: fastbn.mean(x, axis=True, **more),
        lambda: fastbn.mean(x, axis=[1], **more), lambda: fastbn.mean(x, axis=np.int8(1), **more),
        lambda: fastbn.mean(x, axis=1, keepdims=True, **more), lambda: fastbn.mean(x, axis=1, keepdims=1.0, **more),
        lambda: fastbn.mean(x, axis=1, keepdims=np.True_, **more), lambda: fastbn.std(x, axis=1, ddof=0.5, **more),
        lambda: fastbn.std(x, axis=1, ddof=Fraction(1, 2), **more), lambda: fastbn.var(x, axis=1, ddof=1, **more),
        lambda: fastbn.var(x, axis=1, ddof=True, **more), lambda: fastbn.var(x, axis=1, ddof=np.longdouble(1), **more),
        lambda: fastbn.mean(x, axis=1.0, **more), lambda: fastbn.var(x, axis=1, ddof="1", **more),
    ]  # fmt: skip

    def outcome(call):
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call().tolist()
        except (TypeError, ValueError) as error:
            return type(error)

    alone = []
    for one in calls:
        call.forget()
        alone.append(outcome(one))
    call.forget()
    for i in range(len(calls)) if first else reversed(range(len(calls))):
        np.testing.assert_equal(outcome(calls[i]), alone[i], err_msg=str(i))


UNKEPT = {
    "mask": lambda x: fastbn.mean(x, where=[[True, False, True]]),
    "weights": lambda x: fastbn.mean_var(x, weights=[[1, 2, 3]]),
    "mean": lambda x: fastbn.var(x, mean=np.float32(0)),
    "nan": lambda x: fastbn.var(x, ddof=float("nan")),
    "array": lambda x: fastbn.var(x, axis=0, ddof=np.ones(3)),
    "saved": lambda x: fastbn.batch_norm_backward(x, type("Mine", (fastbn.Saved,), {})(*fastbn.batch_norm(x)[1])),
}


@pytest.mark.parametrize("name", UNKEPT)
@pytest.mark.filterwarnings("ignore:Degrees of freedom")
def test_what_cannot_be_found_again_is_not_kept(name, monkeypatch):
    """It would hold memory, and in the end push out what can be."""
    monkeypatch.setattr(call, "_prepared", {})
    x = np.random.default_rng(0).standard_normal((4, 3))
    for _ in range(5):
        UNKEPT[name](x)
    assert len(call._prepared) <= 1


@pytest.mark.parametrize("kept", [1, 3])
def test_statistics_of_nothing(kept):
    """Of an empty array, whatever lay in memory before; with weights, masks and hooks."""
    x, weights = np.empty((0, kept), np.float32), np.ones((1, kept))
    sent = []
    for _ in range(50):
        del [np.full((4, kept), 123.0) for _ in range(5)][:]
        for given in ({}, {"weights": weights}, {"where": weights > 0}):
            count, mean, m2 = fastbn.moments(x, **given)
            np.testing.assert_array_equal(count, 0)
            assert np.isnan([mean, m2]).all()
        fastbn.batch_norm(x, where=np.ones((1, 1), bool), gather=lambda vector: sent.append(vector) or vector[None])
        np.testing.assert_array_equal(sent[-1][:kept], 0)
        assert np.isnan(sent[-1][kept:]).all()


def test_gather_without_channels():
    x = np.random.default_rng(0).standard_normal((4, 3))
    y, saved = fastbn.batch_norm(x, channel_axis=(), gather=lambda vector: vector[None].copy())
    np.testing.assert_allclose(y, (x - x.mean()) / np.sqrt(x.var() + 1e-5))
    assert saved.mean.shape == ()


def test_out_is_a_parameter_and_the_scale_beyond_float32():
    x, out = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[5.0, 6.0, 7.0]], np.float32)
    y, _ = fastbn.batch_norm(x, np.full((1, 3), 1e25), out, channel_axis=(0, 1), eps=1e-40, out=out)
    np.testing.assert_array_equal(y, [[5, 6, 7]])


def test_out_is_a_row_of_the_weights():
    """Of the same address and strides, but not element for element."""
    x, dy = np.random.default_rng(0).standard_normal((2, 4, 6))
    _, saved = fastbn.batch_norm(x, channel_axis=0, weights=np.arange(1.0, 7).reshape(1, 6))
    expected = fastbn.batch_norm_backward(dy, saved).x
    out = np.empty((4, 6))
    out[0] = saved.weight
    found = fastbn.batch_norm_backward(dy, saved._replace(weight=out[:1]), out=out)
    assert found.x is out
    np.testing.assert_array_equal(out, expected)


def test_a_call_that_is_not_kept_pushes_out_nothing(monkeypatch):
    """However full the cache is."""
    monkeypatch.setattr(call, "_prepared", dict.fromkeys(range(4)))
    monkeypatch.setattr(call, "MOST_CALLS", 4)
    with warnings.catch_warnings(action="ignore"):
        fastbn.var(np.arange(3.0), ddof=np.nan)
    assert len(call._prepared) == 4


class Pair(NamedTuple):
    mean: np.ndarray
    var: np.ndarray


@pytest.mark.parametrize(
    "run",
    [
        lambda x: fastbn.mean(x, where=np.True_),
        lambda x: fastbn.mean(x, where=False),
        lambda x: fastbn.var(x, 1, where=[[True, False, True], [True, True, False]]),
        lambda x: fastbn.average(x, 1, weights=[1, 2, 3]),
        lambda x: fastbn.mean_var(x, 1, weights=[1, 2, 3]),
        lambda x: fastbn.merge(*map(fastbn.moments, 64 * [x])),
        lambda x: fastbn.batch_norm(x, running=Pair(np.zeros(3), np.ones(3))),
        lambda x: fastbn.batch_norm(x, channel_axis=[1]),
    ],
    ids=["true of NumPy", "false", "list", "weights", "weights of mean_var", "64 moments", "a pair with names", "axes"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_call_is_prepared_once(run, monkeypatch):
    x = np.arange(6.0).reshape(2, 3)
    run(x)
    found = []
    monkeypatch.setattr(call, "_prepared", dict(call._prepared))
    for module in (functional, reduction_calls, reductions, merging):
        monkeypatch.setattr(module, "keep", lambda signature, made: found.append(signature) or made)
    run(x)
    assert found == []


@pytest.mark.parametrize("number", [10**400, Fraction(10**400)])
def test_numbers_beyond_float64(number):
    x = np.random.default_rng(0).standard_normal((4, 3))
    with pytest.raises(ValueError, match="eps: expected a number in the range of float64"):
        fastbn.batch_norm(x, eps=number)
