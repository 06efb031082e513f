"""Views whose axes do not collapse, or only in another order than that of memory."""

from itertools import product

import numpy as np
import pytest

from fastbn import call, cuts
from tests.support import DTYPES, Layout, reversed_axes


def border(*margins):
    """Views of arrays that are so much larger, on both sides of each axis."""

    def strides_of(shape, dtype):
        whole = np.empty([n + 2 * m for n, m in zip(shape, margins, strict=True)], dtype)
        return whole[tuple(slice(m, m + n) for m, n in zip(margins, shape, strict=True))]

    return strides_of


def steps(*by):
    """Views of every second, third, ... index."""

    def strides_of(shape, dtype):
        return np.empty([n * k for n, k in zip(shape, by, strict=True)], dtype)[tuple(slice(None, None, k) for k in by)]

    return strides_of


def transposed(shape, dtype):
    return border(1, 0, 2, 1)(shape[::-1], dtype).transpose(3, 2, 1, 0)


VIEWS = {
    "NCHW": Layout((5, 6, 9, 21), 1, border(0, 0, 1, 2)),
    "NCHW columns": Layout((5, 6, 9, 21), 1, border(0, 0, 0, 2)),
    "NCHW of channels": Layout((4, 3, 9, 21), 1, border(0, 1, 1, 2)),
    "NCHW of every second": Layout((4, 3, 9, 21), 1, steps(2, 2, 2, 1)),
    "NCHW every second column": Layout((4, 3, 9, 21), 1, steps(1, 1, 1, 2)),
    "NCHW rows reversed": Layout((4, 3, 9, 21), 1, reversed_axes(2)),
    "NCHW columns reversed": Layout((4, 3, 9, 21), 1, reversed_axes(3)),
    "NCHW short rows": Layout((9, 6, 5, 3), 1, border(0, 0, 1, 1)),
    "NCHW long rows": Layout((2, 3, 4, 1100), 1, border(0, 0, 1, 2)),
    "NCHW one channel": Layout((3, 1, 14, 21), 1, border(0, 1, 1, 2)),
    "NHWC": Layout((5, 9, 8, 21), -1, border(0, 1, 2, 0)),
    "NHWC columns": Layout((5, 9, 8, 21), -1, border(0, 0, 2, 0)),
    "NHWC of channels": Layout((5, 9, 8, 21), -1, border(0, 1, 1, 3)),
    "NHWC 3 channels": Layout((5, 9, 18, 3), -1, border(0, 1, 1, 0)),
    "NCDHW": Layout((3, 4, 5, 6, 17), 1, border(0, 0, 1, 1, 1)),
    "NDHWC": Layout((3, 5, 6, 7, 9), -1, border(0, 1, 1, 1, 0)),
    "rows": Layout((64, 21), 1, steps(2, 1)),
    "instance": Layout((3, 4, 9, 21), (0, 1), border(0, 0, 1, 2)),
    "instance of every second": Layout((3, 4, 9, 21), (0, 1), steps(2, 2, 1, 1)),
    "instance NHWC": Layout((3, 9, 11, 7), (0, 3), border(0, 1, 1, 0)),
    "rows kept": Layout((3, 4, 9, 21), (1, 2), border(0, 0, 1, 2)),
    "columns kept": Layout((3, 4, 9, 21), (1, 3), border(0, 0, 1, 2)),
    "transposed": Layout((7, 9, 4, 5), 2, transposed),
}


def by_view(views, options, chosen):
    """``layout``, ``dtype`` and ``options`` of a test: all combinations, of which those not ``chosen`` are slow.

    It is asked of the view's number and name, and those of the dtype and option.
    """
    cases = []
    for (i, view), (j, dtype), (k, name) in product(enumerate(views), enumerate(DTYPES), enumerate(options)):
        marks = () if chosen(i, view, j, dtype, k, name) else pytest.mark.slow
        cases.append(pytest.param(views[view], dtype, name, marks=marks, id=f"{view}-{dtype}-{name}"))
    return pytest.mark.parametrize(("layout", "dtype", "options"), cases)


def cut_small_arrays(monkeypatch, backend):
    """From a kilobyte on, and not in slabs; what was prepared before is forgotten."""
    monkeypatch.setattr(backend, "reads_slabs", lambda views: False)
    monkeypatch.setattr(cuts, "AT_LEAST", 2)
    monkeypatch.setattr(cuts, "LITTLE", 2048)
    monkeypatch.setattr(backend, "LEAST_PIECE", 1024)
    call.forget()
