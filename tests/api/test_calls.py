"""Prepared calls (`fastbn.call`): the same bits and errors however often, and nothing that a signature leaves out."""

import itertools
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import call, cpu, reductions
from fastbn.cpu import memory, team
from tests.conftest import forget
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case


@pytest.fixture
def found(monkeypatch):
    """Signatures whose calls were prepared before."""
    signatures, find = [], call.find

    def noted(signature):
        prepared = find(signature)
        signatures.extend([signature] * (prepared is not None))
        return prepared

    monkeypatch.setattr(call, "_prepared", {})
    for module in ("functional", "kernels"):
        monkeypatch.setattr(f"fastbn.{module}.find", noted)
    return signatures


def calls(case, out=False):
    """Forward, backward, inference and its backward; the arrays that they return."""
    keywords = case.keywords | case.epilogue
    new = (lambda: np.zeros_like(case.x)) if out else (lambda: None)
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, out=new(), **keywords)
    grads = fastbn.batch_norm_backward(case.dy, saved, out=new())
    given = (saved.mean, saved.moments.var(), case.gamma, case.beta)
    axis = case.keywords["channel_axis"]
    z = fastbn.batch_norm_inference(case.x, *given, channel_axis=axis, out=new(), **case.epilogue)
    frozen = fastbn.Saved.frozen(case.x, *given[:3], channel_axis=axis, y=z, activation=case.epilogue.get("activation"))
    frozen_grads = fastbn.batch_norm_backward(case.dy, frozen)
    arrays = [y, *saved.moments, saved.mean, saved.rstd, saved.count, *grads, z, *frozen_grads]
    return [a for a in arrays if a is not None], (saved.channel_axis, saved.activation, saved.has_residual)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("options", ["plain", "affine residual relu"])
@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC", "NHWC as NCHW", "NCHW short rows", "NCHW long rows"])
def test_same_bits(found, layout, options, out):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    first, static = calls(case, out)
    assert not found
    second, again = calls(case, out)
    assert len(found) == 4
    assert static == again
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(found, dtype):
    case = make_case(LAYOUTS["NCHW"], dtype, OPTIONS["plain"])
    first, _ = calls(case)
    second, _ = calls(case)
    assert len(found) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


LYING = (
    "instance NCHW",
    "instance Fortran",
    "channel slice",
    "spatial slice",
    "alternating",
    "swapped bytes",
    "unaligned",
)


@pytest.mark.parametrize("options", ["plain", "affine residual relu", "where weights residual"])
@pytest.mark.parametrize("layout", LYING)
def test_every_call_is_prepared(found, layout, options):
    """Whatever takes copies, permuted parameters, weights."""
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    first, _ = calls(case)
    assert not found
    second, _ = calls(case)
    assert len(found) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


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


@pytest.mark.parametrize(("function", "over"), [("forward", "x"), ("backward", "x"), ("backward", "dy")])
def test_out_of_a_later_call_overlaps_an_input(found, function, over):
    """All but a sample of it, which would be written before it is read."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 6, 8, 8)).astype(np.float32) for name in ("x", "dy")}

    def result(out, x, dy):
        if function == "forward":
            return fastbn.batch_norm(x, out=out)[0]
        return fastbn.batch_norm_backward(dy, fastbn.batch_norm(x)[1], out=out).x

    for _ in range(2):
        expected = result(np.zeros((4, 6, 8, 8), np.float32), **arrays)
    both = np.zeros((5, 6, 8, 8), np.float32)
    both[:4] = arrays[over]
    result_of_overlap = result(both[1:], **arrays | {over: both[:4]})
    np.testing.assert_allclose(result_of_overlap, expected, atol=1e-5)


def test_in_place_forward_has_no_backward_however_often(found):
    for _ in range(3):
        x = np.ones((4, 6), np.float32)
        _, saved = fastbn.batch_norm(x, out=x)
        assert saved.x is None


def test_errors_stay_errors(found):
    """A call that differs in what is checked is another call."""
    x, one = np.ones((4, 6), np.float32), np.ones(6)
    for _ in range(2):
        fastbn.batch_norm(x, one)
        fastbn.batch_norm_inference(x, one, one)
    for wrong, error in (
        ({"eps": -1.0}, ValueError),
        ({"eps": True + 0j}, TypeError),
        ({"channel_axis": 1.0}, TypeError),
        ({"channel_axis": [1]}, None),
        ({"channel_axis": 2}, np.exceptions.AxisError),
        ({"activation": "gelu"}, ValueError),
        ({"activation": ["relu"]}, ValueError),
        ({"gamma": np.ones(5)}, ValueError),
        ({"gamma": np.ones(6, int)}, TypeError),
        ({"gamma": [1.0] * 6}, TypeError),
        ({"gamma": np.ma.masked_array(one)}, TypeError),
        ({"out": np.ones((4, 5), np.float32)}, ValueError),
    ):
        if error is None:
            fastbn.batch_norm(x, **wrong)
            continue
        with pytest.raises(error):
            fastbn.batch_norm(x, **wrong)
        with pytest.raises(error):
            fastbn.batch_norm_inference(x, one, one, **wrong)


CHANGES = {
    "dtype of x": lambda a: a | {"x": a["x"].astype(np.float64)},
    "order of x": lambda a: a | {"x": np.asfortranarray(a["x"])},
    "shape of x": lambda a: a | {"x": a["x"][:3]},
    "dtype of gamma": lambda a: a | {"gamma": a["gamma"].astype(np.float32) + np.float32(1)},
    "gamma": lambda a: a | {"gamma": None},
    "beta": lambda a: a | {"beta": a["beta"][::-1].astype(np.float16)},
    "channel_axis": lambda a: a | {"channel_axis": 2},
    "eps": lambda a: a | {"eps": 0.1},
    "activation": lambda a: a | {"activation": None},
    "residual": lambda a: a | {"residual": a["x"] * 2},
    "out": lambda a: a | {"out": np.zeros_like(a["x"])},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("function", ["batch_norm", "batch_norm_inference"])
def test_every_argument_counts(found, function, change):
    """A call that differs in one argument gives what it gives without a call before it."""
    rng = np.random.default_rng(0)
    usual = {"x": rng.standard_normal((4, 6, 6)).astype(np.float32), "activation": "relu", "eps": 1e-5}
    usual |= {"gamma": rng.random(6) + 0.5, "beta": rng.random(6), "channel_axis": 1}
    if function == "batch_norm_inference":
        usual |= {"mean": rng.random(6), "var": rng.random(6) + 0.5}

    def results(arguments):
        y = getattr(fastbn, function)(**arguments)
        if function == "batch_norm_inference":
            return [y]
        grads = fastbn.batch_norm_backward(arguments["x"], y[1])
        return [y[0], y[1].mean, y[1].rstd, *(g for g in grads if g is not None)]

    changed = CHANGES[change](usual)
    expected = [a.copy("K") for a in results(changed)]
    forget()
    for arguments in (usual, usual, changed, changed):
        last = results(arguments)
    assert found
    for a, b in zip(last, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)


def test_inference_without_eps(found):
    """Zero is an eps like others."""
    x = np.arange(24.0).reshape(4, 6)
    for _ in range(3):
        y = fastbn.batch_norm_inference(x, np.full(6, 3.0), np.full(6, 4.0), eps=0.0)
        np.testing.assert_array_equal(y, (x - 3) / 2)
    assert len(found) == 2


def test_a_gathered_forward_is_another_call(found):
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    for _ in range(2):
        fastbn.batch_norm_backward(x, fastbn.batch_norm(x)[1])
    _, saved = fastbn.batch_norm(x, gather=lambda local: local[None])
    with pytest.raises(ValueError, match="gather: expected what the forward pass had"):
        fastbn.batch_norm_backward(x, saved)


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


def test_programs_without_repetition_keep_memory_flat(monkeypatch):
    monkeypatch.setattr(call, "MOST", 8)
    forget()
    for n in range(1, 40):
        fastbn.batch_norm_inference(np.ones((n, 3), np.float32), np.zeros(3), np.ones(3))
    assert len(call._prepared) <= 8


# --- signatures -------------------------------------------------------------------------------------------------------

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


def in_python(*arrays):
    return tuple(map(call._of, arrays))


def test_compiled_signatures_tell_what_pythons_do():
    for (a, b), (c, d) in itertools.product(itertools.product(SIGNED.values(), repeat=2), repeat=2):
        assert (call.describe(a, b) == call.describe(c, d)) == (in_python(a, b) == in_python(c, d))


def test_signatures_of_many_arrays():
    """Beyond the room that compiled code has, Python describes them."""
    for count in range(1, 40):
        arrays = [np.zeros((2, 3, 4, 5))] * count
        described = call.describe(*arrays)
        assert described in (call._compiled(*arrays), in_python(*arrays))
        assert described != call.describe(*arrays[1:], None)
        assert described != call.describe(*arrays, None)
    assert type(described) is tuple


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


def test_what_lies_apart():
    """Said of no two arrays that share memory, of slices whatever way they run; of all that are far from another."""
    whole = np.zeros((12, 10, 8))
    pieces = [whole[i : i + 3, ::s, ::t] for i in (0, 2, 5, 9) for s in (1, -1, 3) for t in (1, -2)]
    pieces += [whole.T[:, :, ::-4], whole[:0], np.broadcast_to(whole[5, 5, 5], (4, 4)), np.zeros(3), whole[1, 1, 1:1]]
    for a, b in itertools.product(pieces, repeat=2):
        apart = memory.apart(a, b)
        assert not (apart and a is not b and np.shares_memory(a, b))
        low, high = np.lib.array_utils.byte_bounds(a)
        first, end = np.lib.array_utils.byte_bounds(b)
        assert apart or a is b or (first < high + 16 and low < end + 16)
    assert memory.apart(whole, None, np.zeros(4), whole, None)
    assert not memory.apart(whole, np.zeros(4), whole[3])
    assert not memory.apart(whole, np.zeros(4).view(np.recarray)), "what is not known is looked at"


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


# --- large results: their memory is used again ------------------------------------------------------------------------


def test_freed_buffers_serve_again_and_used_ones_never():
    from fastbn.cpu import memory

    memory._kept.clear()
    like = np.empty((9, 1 << 20), np.float32)
    first = memory.empty_like(like)
    assert first.ctypes.data % 64 == 0
    view = first[2:, ::2]
    place = first.ctypes.data
    del first
    second = memory.empty_like(like)
    assert not np.shares_memory(second, view)
    del view
    third = memory.empty_like(like)
    assert third.ctypes.data == place
    assert third.shape == like.shape
    smaller = memory.empty_like(like[:8])
    del second, third
    assert sum(b.nbytes for b in memory._kept.values()) <= memory.KEPT
    del smaller


def test_kept_buffers_are_bounded(monkeypatch):
    from fastbn.cpu import memory

    monkeypatch.setattr(memory, "MAPPED", 1 << 20)
    monkeypatch.setattr(memory, "KEPT", 20 << 20)
    memory._kept.clear()
    arrays = [memory.empty_like(np.empty((k, 1 << 20), np.float32)) for k in (1, 2, 3, 1, 2)]
    del arrays
    assert 0 < sum(b.nbytes for b in memory._kept.values()) <= memory.KEPT
    memory._kept.clear()


@pytest.mark.parametrize(("kilobytes", "own", "given"), [(3, False, False), (6, False, True), (9, True, True)])
def test_what_may_be_streamed(monkeypatch, fresh_plans, kilobytes, own, given):
    """Results that are allocated from twice the size on from which an `out` is."""
    monkeypatch.setattr(memory, "CACHE_SHARE", 4 << 10)
    monkeypatch.setattr(memory, "OWN_TIMES", 2)
    asked = []
    monkeypatch.setattr(
        cpu, "past_caches", lambda *o: (p := memory.past_caches(*o)) and (lambda *a: asked.append(a) or p(*a))
    )
    x = np.random.default_rng(0).standard_normal((kilobytes * 256 // 4, 4), dtype=np.float32)
    for out, expected in ((None, own), (np.empty_like(x), given)):
        asked.clear()
        for _ in range(2):
            _, saved = fastbn.batch_norm(x, out=out)
            fastbn.batch_norm_backward(x, saved, out=out)
            fastbn.batch_norm_inference(x, np.zeros(4), np.ones(4), out=out)
        assert len(asked) == 6 * expected


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
def test_fast_statistics_are_the_careful_ones(name, dtype, axis):
    """Bits, type and shape; of other numbers, too, which a prepared call has not seen."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(3, 2, (4, 6, 5, 7)).astype(dtype) for _ in range(2)]
    for lies in lying(arrays[0]):
        both = [lying(x)[lies] for x in arrays]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(call, "_prepared", {})
            patch.setattr(reductions, "_FAST", dict.fromkeys(reductions._FAST, lambda *_: None))
            careful = [STATISTICS[name](x, axis) for x in both]
        for x, expected in zip(both, careful, strict=True):
            result = STATISTICS[name](x, axis)
            assert type(result) is type(expected)
            np.testing.assert_array_equal(result, expected)
            for a, b in zip(np.atleast_1d(result), np.atleast_1d(expected), strict=True):
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
