"""Gradients of gamma and beta in a dtype: those in float64, rounded once."""

import numpy as np
import pytest

import fastbn
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case

CASES = [
    ("NCHW", "plain"), ("NHWC", "weights relu"), ("instance NHWC", "affine residual relu"), ("spatial slice", "plain"),
    ("alternating", "where"),
]  # fmt: skip
GATHERS = {"alone": None, "two ranks": lambda vector: np.stack([vector, vector])}


def check(dy, saved, dtype, **keywords):
    """All else is the same."""
    wide = fastbn.batch_norm_backward(dy, saved, **keywords)
    found = fastbn.batch_norm_backward(dy, saved, dtype=dtype, **keywords)
    for ours, theirs in zip(found[1:3], wide[1:3], strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs.astype(dtype))
    np.testing.assert_array_equal(found.x, wide.x)
    assert (found.residual is None) == (wide.residual is None)


@pytest.mark.parametrize(("layout", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(layout, options, dtype):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    _, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    check(case.dy, saved, DTYPES[dtype])


@pytest.mark.parametrize("gather", GATHERS)
def test_over_ranks(gather):
    case = make_case(LAYOUTS["NCHW"], "float32", OPTIONS["plain"])
    _, saved = fastbn.batch_norm(case.x, gather=GATHERS[gather])
    check(case.dy, saved, np.dtype("float32"), gather=GATHERS[gather])


def test_frozen_and_empty():
    x = np.random.default_rng(0).standard_normal((4, 3, 5))
    for given in (x, x[:0], x[:, :0]):
        channels = given.shape[1]
        saved = fastbn.Saved.frozen(given, np.zeros(channels), np.ones(channels))
        check(given, saved, np.dtype("float16"))
        check(given, fastbn.batch_norm(given)[1], np.dtype("float32"))


def test_out_askew():
    """Which is computed apart."""
    buffer = np.random.default_rng(1).standard_normal((5, 3, 4)).astype(np.float32)
    dy, x = buffer[:4], np.random.default_rng(2).standard_normal((4, 3, 4)).astype(np.float32)
    _, saved = fastbn.batch_norm(x)
    expected = fastbn.batch_norm_backward(dy.copy(), saved, dtype="float32")
    found = fastbn.batch_norm_backward(dy, saved, dtype="float32", out=buffer[1:])
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "nothing", 7])
def test_wrong(dtype):
    x = np.ones((4, 3), np.float32)
    _, saved = fastbn.batch_norm(x)
    with pytest.raises(TypeError, match=r"^dtype: expected one of float16, bfloat16, float32, float64, got "):
        fastbn.batch_norm_backward(x, saved, dtype=dtype)
