"""CuPy arrays that do not collapse, in pieces: the checks of tests/api/test_pieces.py, on the CPU or on a GPU."""

import numpy as np
import pytest

from fastbn import call
from tests.cases import checks, views
from tests.cases.views import VIEWS, cut_small_arrays
from tests.support import DTYPES, OPTIONS, make_case


@pytest.fixture
def in_small_pieces(cuda_arrays, monkeypatch):
    from fastbn import cuda

    monkeypatch.setattr(checks, "fastbn", cuda_arrays)
    monkeypatch.setattr(checks, "SAME_BITS", False)
    cut_small_arrays(monkeypatch, cuda)
    yield cuda_arrays
    call.forget()


def by_view(*options):
    """Every view with one dtype and option; the rest is slow: compilation."""
    count = len(DTYPES) * len(options)
    return views.by_view(VIEWS, options, lambda i, _view, j, _dtype, k, _name: j * len(options) + k == i % count)


@by_view("plain", "affine residual relu")
def test_training(layout, dtype, options, in_small_pieces):
    checks.check_backward(make_case(layout, dtype, OPTIONS[options]))


@by_view("affine residual relu")
def test_frozen(layout, dtype, options, in_small_pieces):
    checks.check_frozen(make_case(layout, dtype, OPTIONS[options]))


@pytest.mark.parametrize("view", ["NCHW", "NHWC", "NCDHW", "rows"])
def test_moments_are_those_of_the_forward_pass(view, in_small_pieces):
    case = make_case(VIEWS[view], "float32")
    _, saved = in_small_pieces.batch_norm(case.x, **case.keywords)
    moments = in_small_pieces.moments(case.x, **case.keywords)
    for mine, others in zip(saved.moments, moments, strict=True):
        np.testing.assert_array_equal(mine, others)
