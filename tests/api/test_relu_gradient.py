"""What the gradient of relu is made of: x, of which y is computed again; y where there was a residual."""

import numpy as np
import pytest

import fastbn
from fastbn import call, cpu, cuts
from fastbn.cpu import division, memory, team
from tests.cases.relu import check_gradient, make_relu_case
from tests.cases.views import VIEWS
from tests.support import DTYPES, LAYOUTS, Layout, Options, some_slow

RELU = Options(affine=True, relu=True, parameter_dtype="float32")
OPTIONS = {
    "affine": RELU,
    "plain": Options(relu=True),
    "where": Options(where=True, affine=True, relu=True, parameter_dtype="float16"),
    "weights": Options(weights=True, affine=True, relu=True),
}
LARGE = {
    "NCHW": Layout((8, 5, 60, 70)),
    "NCHW long rows": Layout((2, 3, 300, 300)),
    "NCHW short rows": Layout((200, 40, 7, 7)),
    "NHWC": Layout((6, 40, 50, 24), -1),
    "NHWC 3 channels": Layout((6, 70, 50, 3), -1),
    "NC": Layout((9001, 19)),
}


@pytest.mark.parametrize("dtype", some_slow([*DTYPES], ["float32", "float16"]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dtype):
    check_gradient(make_relu_case(LAYOUTS[layout], dtype, RELU))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LARGE)
def test_large(layout, dtype, options):
    check_gradient(make_relu_case(LARGE[layout], dtype, OPTIONS[options]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHWC 3 channels", "NC"])
def test_outputs_that_round_to_0(layout, dtype):
    """Those that are positive before they are rounded are not behind."""
    y = check_gradient(make_relu_case(LARGE[layout], dtype, RELU, small=True)).astype(float)
    assert (y == 0).mean() > 0.5
    assert (y > 0).sum() > 100


@pytest.mark.parametrize(("serial_below", "whole_channels"), [(0, True), (0, False), (1 << 60, False)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHWC 3 channels", "NCHW short rows"])
def test_every_way(monkeypatch, fresh_plans, layout, serial_below, whole_channels):
    """Parallel and serial, fused and not."""
    monkeypatch.setattr(team, "PARALLEL_FROM", serial_below)
    monkeypatch.setattr(division.Problem, "whole_channels", lambda problem: whole_channels)
    if not whole_channels:
        monkeypatch.setattr(division.Problem, "fused_tile", lambda *_: 0)
    check_gradient(make_relu_case(LARGE[layout], "float32", RELU))


@pytest.mark.parametrize("least", [1024, 1 << 60])
@pytest.mark.parametrize("dtype", some_slow([*DTYPES], ["float32"]))
@pytest.mark.parametrize("view", [name for name in VIEWS if name.startswith(("NC", "NH"))])
def test_views(monkeypatch, view, dtype, least):
    """In slabs, and in pieces."""
    monkeypatch.setattr(cuts, "LEAST_IN_SLABS", least)
    monkeypatch.setattr(memory, "FEWEST_SLABS", 6)
    monkeypatch.setattr(cpu, "LEAST_PIECE", 64)
    call.forget()
    check_gradient(make_relu_case(VIEWS[view], dtype, RELU))
    call.forget()


def test_gathered():
    """With sums of several ranks, here of one."""
    case = make_relu_case(LAYOUTS["NCHW"], "float32", RELU)
    gather = lambda vector: vector[np.newaxis]  # noqa: E731
    _, alone = fastbn.batch_norm(case.x, case.gamma, case.beta, activation="relu")
    _, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, activation="relu", gather=gather)
    assert saved.y is None
    expected, actual = (
        fastbn.batch_norm_backward(case.dy, alone),
        fastbn.batch_norm_backward(case.dy, saved, gather=gather),
    )
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_y_may_change():
    """It is the caller's: whoever overwrites it changes no gradient, and nothing keeps it alive."""
    case = make_relu_case(LAYOUTS["NCHW"], "float32", RELU)
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, activation="relu")
    expected = fastbn.batch_norm_backward(case.dy, saved).x
    y[...] = -1
    np.testing.assert_array_equal(fastbn.batch_norm_backward(case.dy, saved).x, expected)
    assert not any(a is y for a in saved.arrays()[0])


def test_what_is_saved():
    case = make_relu_case(LAYOUTS["NCHW"], "float32", RELU)
    given = case.x, case.gamma, case.beta
    _, saved = fastbn.batch_norm(*given)
    assert saved.y is None
    assert saved.beta is None
    y, saved = fastbn.batch_norm(*given, residual=case.dy, activation="relu")
    assert saved.y is y
    assert saved.beta is None
    y, saved = fastbn.batch_norm(*given, activation="relu", eps=1e-40)  # y may be computed in float64
    assert saved.y is y
    _, saved = fastbn.batch_norm(*given, activation="relu")
    assert saved.beta is case.beta
    again = fastbn.Saved.from_arrays(*saved.arrays())
    assert again.beta is case.beta
    with pytest.raises(ValueError, match=r"^saved\.beta: expected"):
        fastbn.batch_norm_backward(case.dy, saved._replace(beta=np.ones(5, np.float32)))
    for changes in ({"has_residual": True}, {"moments": None}):
        with pytest.raises(ValueError, match=r"^saved\.y: expected the output, which relu's gradient needs here"):
            fastbn.batch_norm_backward(case.dy, saved._replace(**changes))
