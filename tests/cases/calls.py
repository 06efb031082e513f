"""Prepared calls: the same bits and errors however often, and nothing that a signature leaves out."""

import numpy as np
import pytest

import fastbn
from fastbn import call
from tests.conftest import forget
from tests.support import LAYOUTS, OPTIONS, make_case


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


def test_programs_without_repetition_keep_memory_flat(monkeypatch):
    monkeypatch.setattr(call, "MOST_CALLS", 8)
    forget()
    for n in range(1, 40):
        fastbn.batch_norm_inference(np.ones((n, 3), np.float32), np.zeros(3), np.ones(3))
    assert len(call._prepared) <= 8
