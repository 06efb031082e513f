"""Prepared calls (`fastbn.call`): the same bits and errors however often, and nothing that a signature leaves out."""

import numpy as np
import pytest

import fastbn
from fastbn import call, prepare_reductions
from fastbn.cpu import team
from tests.conftest import forget
from tests.support import LAYOUTS, OPTIONS, make_case


@pytest.fixture
def found(monkeypatch):
    """Signatures whose calls were prepared before."""
    signatures, find = [], call.find

    def noted(signature):
        prepared = find(signature)
        signatures.extend([signature] * (prepared is not None))
        return prepared

    monkeypatch.setattr(call, "_prepared", {})
    for module in ("functional", "primitives"):
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
            patch.setattr(prepare_reductions, "_FAST", dict.fromkeys(prepare_reductions._FAST, lambda *_: None))
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
