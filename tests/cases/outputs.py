"""Outputs of any layout, and over inputs."""

import numpy as np
import pytest

import fastbn
from fastbn.cpu import division, memory
from tests.support import LAYOUTS, OPTIONS, make_case

# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 4, 5, 12, 15])
@pytest.mark.parametrize(
    ("shape", "axis"), [((9, 13, 7, 7), 1), ((2, 5, 33, 31), 1), ((3, 50, 4, 4), 1), ((7, 9, 96), -1), ((40, 3), -1)]
)
def test_out_anywhere_in_memory(monkeypatch, fresh_plans, shape, axis, offset):
    """Stores past the caches need whole lines; what lies before and behind an `out` that starts between two stays."""
    monkeypatch.setattr(memory, "CACHE_SHARE", 0)
    monkeypatch.setattr(division, "NONTEMPORAL_ROW", 0)
    rng = np.random.default_rng(offset)
    x = rng.standard_normal(shape, dtype=np.float32)
    gamma, beta = rng.random((2, shape[axis]))
    buffer = np.full(x.size + 64, 7, np.float32)
    first = 16 + offset - buffer.ctypes.data % 64 // 4
    out = buffer[first : first + x.size].reshape(shape)
    y, saved = fastbn.batch_norm(x, gamma, beta, channel_axis=axis)
    mean, var = saved.mean, saved.moments.var()
    given = {"gamma": gamma, "beta": beta, "channel_axis": axis}
    calls = {
        "forward": (lambda out: fastbn.batch_norm(x, **given, out=out)[0], y),
        "inference": (lambda out: fastbn.batch_norm_inference(x, mean, var, **given, out=out), y),
        "backward": (lambda out: fastbn.batch_norm_backward(x, saved, out=out).x, None),
    }
    for what, (call, expected) in calls.items():
        expected = call(None) if expected is None or what == "inference" else expected
        for _ in range(2):  # the second is prepared
            out[...] = 0
            np.testing.assert_array_equal(call(out), expected, what)
            np.testing.assert_array_equal(np.delete(buffer, np.s_[first : first + x.size]), 7)


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.writable])
@pytest.mark.parametrize("out_layout", ["same", "C", "Fortran", "spatial slice"])
def test_out(layout, out_layout):
    """`out` of any layout holds what the call without it returns, and is returned."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    keywords = case.keywords | case.epilogue
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)

    def output():
        if out_layout == "same":
            return layout.place(np.zeros(layout.shape, case.x.dtype))
        if out_layout == "spatial slice":
            return np.zeros((*layout.shape[:-1], 2 * layout.shape[-1] + 1), case.x.dtype)[..., 1::2]
        return np.zeros(layout.shape, case.x.dtype, order=out_layout[0])

    def assert_written(out, returned, expected):
        assert returned is out
        np.testing.assert_array_equal(out, expected)

    out = output()
    assert_written(out, fastbn.batch_norm(case.x, case.gamma, case.beta, out=out, **keywords)[0], expected)
    mean, var = saved.mean, saved.moments.var()
    inference = fastbn.batch_norm_inference(case.x, mean, var, channel_axis=layout.channel_axis)
    out = output()
    returned = fastbn.batch_norm_inference(case.x, mean, var, channel_axis=layout.channel_axis, out=out)
    assert_written(out, returned, inference)
    out = output()
    returned = fastbn.normalize(case.x, mean, saved.moments.rstd(), channel_axis=layout.channel_axis, out=out)
    assert_written(out, returned, inference)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    out = output()
    assert_written(out, fastbn.batch_norm_backward(case.dy, saved, out=out).x, grads.x)
    arguments = (case.dy, case.x, mean, saved.rstd, case.gamma, grads.gamma, grads.beta, saved.count)
    expected = fastbn.grad_input(*arguments, **case.keywords)
    out = output()
    assert_written(out, fastbn.grad_input(*arguments, out=out, **case.keywords), expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "instance Fortran", "spatial slice", "alternating", "NC"])
def test_out_is_an_input(layout):
    """In place over x, residual, dy: the same bits as out of place."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    keywords = case.keywords | case.epilogue
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)
    x = layout.place(case.x)
    y, _ = fastbn.batch_norm(x, case.gamma, case.beta, out=x, **keywords)
    np.testing.assert_array_equal(y, expected)
    residual = layout.place(case.epilogue["residual"])
    y, _ = fastbn.batch_norm(
        case.x, case.gamma, case.beta, channel_axis=layout.channel_axis, residual=residual, activation="relu",
        out=residual,
    )  # fmt: skip
    np.testing.assert_array_equal(y, expected)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    dy = layout.place(case.dy)
    np.testing.assert_array_equal(fastbn.batch_norm_backward(dy, saved, out=dy).x, grads.x)


@pytest.mark.parametrize("shift", [1, 3, 35, 210])
@pytest.mark.parametrize("forwards", [True, False])
def test_out_partly_overlaps(shift, forwards):
    """An output askew over the input is right too."""
    shape = (4, 6, 5, 7)
    size = int(np.prod(shape))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected, _ = fastbn.batch_norm(values)
    mean, var = np.zeros(6), np.ones(6)
    expected_inference = fastbn.batch_norm_inference(values, mean, var)
    for call, wanted in (
        (lambda x, out: fastbn.batch_norm(x, out=out)[0], expected),
        (lambda x, out: fastbn.batch_norm_inference(x, mean, var, out=out), expected_inference),
    ):
        buffer = np.empty(size + shift, np.float32)
        first, second = buffer[:size].reshape(shape), buffer[shift:].reshape(shape)
        x, out = (first, second) if forwards else (second, first)
        x[...] = values
        call(x, out)
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("what", ["weights", "where", "gamma", "beta"])
@pytest.mark.parametrize("first", [0, 2])
def test_out_over_what_the_backward_pass_reads(what, first):
    """It reads what was given, not y."""
    x = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
    given = {
        "weights": np.arange(1, 13, dtype=np.float32).reshape(6, 2),
        "where": np.arange(12).reshape(6, 2) % 3 > 0,
        "gamma": np.array([3, 4], np.float32),
        "beta": np.array([0.5, -0.5], np.float32),
    }[what]
    others = {"gamma": np.ones(2)} | {what: given, "activation": "relu"}
    expected, of_copy = fastbn.batch_norm(x, **others)
    buffer = np.zeros(64, np.float32)
    memory = buffer[4:].view(given.dtype)[: given.size].reshape(given.shape)
    memory[...] = given
    out = buffer[first : first + x.size].reshape(x.shape)
    y, saved = fastbn.batch_norm(x, **others | {what: memory}, out=out)
    np.testing.assert_array_equal(y, expected)
    for found, wanted in zip(fastbn.batch_norm_backward(x, saved), fastbn.batch_norm_backward(x, of_copy), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_interleaved_out_is_not_an_overlap():
    """Two channel slices of one buffer (a DenseNet block): x stays, and the backward pass works."""
    buffer = np.random.default_rng(0).standard_normal((3, 8, 4, 4)).astype(np.float32)
    x, out = buffer[:, :4], buffer[:, 4:]
    before = x.copy()
    _, saved = fastbn.batch_norm(x, out=out)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(out, fastbn.batch_norm(before)[0])
    fastbn.batch_norm_backward(x, saved)


def test_parameters_overlap_out():
    """gamma and beta may lie in the memory that is written."""
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float64)
    expected, _ = fastbn.batch_norm(x, x[0].copy(), x[1].copy())
    y, _ = fastbn.batch_norm(x, x[0], x[1], out=x)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "spatial slice"])
@pytest.mark.parametrize("other", ["C", "F"])
def test_inputs_in_other_orders(layout, other):
    """dy and residual need not lie in memory as x does."""
    layout = LAYOUTS[layout]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    expected, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    grads = fastbn.batch_norm_backward(case.dy, saved)
    case.epilogue["residual"] = np.array(case.epilogue["residual"], order=other)
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    np.testing.assert_array_equal(y, expected)
    again = fastbn.batch_norm_backward(np.array(case.dy, order=other), saved)
    np.testing.assert_array_equal(again.x, grads.x)
    np.testing.assert_array_equal(again.gamma, grads.gamma)
