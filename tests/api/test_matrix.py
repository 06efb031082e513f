"""Every function x layout x dtype x option against the oracle; and wrong backends, which every check must reject."""

import itertools

import numpy as np
import pytest

import fastbn
from fastbn.cpu import division, memory, team
from tests.cases.checks import (
    CHECKS,
    TRAINING,
    check_backward,
    check_frozen,
    check_moments,
    check_parts,
    check_statistics,
)
from tests.conftest import forget
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case
from tests.wrong_backends import broken, use, written


def by_case(*options):
    """Each layout with each dtype: float32 with one of the first three options in turn, the others with one.

    The rest, other kernels to compile, is slow.
    """
    cases = []
    for (i, layout), dtype in itertools.product(enumerate(LAYOUTS), DTYPES):
        one = options[i % len(options[:3])] if dtype == "float32" else "plain" if dtype == "bfloat16" else options[0]
        for name in options:
            marks = [] if name == one else [pytest.mark.slow]
            cases.append(pytest.param(layout, dtype, name, marks=marks))
    return pytest.mark.parametrize(("layout", "dtype", "options"), cases)


# --- the matrix -------------------------------------------------------------------------------------------------------


@by_case(*TRAINING)
def test_moments(layout, dtype, options):
    check_moments(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case(*TRAINING)
def test_training(layout, dtype, options):
    check_backward(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "affine residual relu")
def test_frozen(layout, dtype, options):
    check_frozen(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where")
def test_parts(layout, dtype, options):
    check_parts(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where")
def test_statistics(layout, dtype, options):
    check_statistics(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


# --- strategies: tuning is not correctness ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [TRAINING[0], *(pytest.param(o, marks=pytest.mark.slow) for o in TRAINING[1:3])])
@pytest.mark.parametrize(("serial_below", "whole_channels"), [(0, True), (0, False), (1 << 60, False)])
def test_forced_strategies(monkeypatch, fresh_plans, options, serial_below, whole_channels):
    """Parallel and serial, fused and split, plain and streaming stores: right, and bit for bit the same."""
    case = make_case(LAYOUTS["NCHW long rows"], "float32", OPTIONS[options])
    last = make_case(LAYOUTS["NHWC wide"], "float32", OPTIONS[options])
    short = make_case(LAYOUTS["NCHW short rows"], "float32", OPTIONS[options])
    results = []
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(team, "PARALLEL_FROM", serial_below)
            monkeypatch.setattr(division.Problem, "whole_channels", lambda problem: whole_channels)
            if not whole_channels:
                monkeypatch.setattr(division.Problem, "fused_tile", lambda *_: 0)
            monkeypatch.setattr(memory, "CACHE_SHARE", 0)
            monkeypatch.setattr(division, "NONTEMPORAL_ROW", 0)
            forget()
        for c in (case, last, short):
            check_backward(c)
            check_frozen(c)
            y, saved = fastbn.batch_norm(c.x, c.gamma, c.beta, **c.keywords, **c.epilogue)
            results.append((y, *saved.moments, *fastbn.batch_norm_backward(c.dy, saved)[:3]))
    half = len(results) // 2
    for before, after in zip(results[:half], results[half:], strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_read_only_inputs():
    case = make_case(LAYOUTS["NCHW"], "float32", OPTIONS["affine residual relu"])
    for array in (case.x, case.dy, case.gamma, case.beta, case.epilogue["residual"]):
        array.flags.writeable = False
    check_backward(case)


# --- wrong backends ---------------------------------------------------------------------------------------------------


def scaled(index, factor):
    def change(args, result):
        changed = list(result)
        changed[index] = changed[index] * factor
        return tuple(changed)

    return change


def nudged(position, by):
    """One element of an output array is off by a few roundings."""

    def change(args, result):
        args[position].reshape(-1)[-1] += by
        return result

    return change


FAULTS = {
    "moments": [
        ("moments", scaled(0, 1 + 1e-12)),
        ("moments", scaled(1, 1 + 1e-6)),
        ("moments", scaled(2, 1 + 5e-6)),
    ],
    "statistics": [("statistic", written(3, 1 + 1e-6)), ("statistic", written(4, 1 + 5e-6))],
    "training": [
        ("forward", nudged(5, 1e-4)),
        ("forward", scaled(1, 1 + 1e-6)),
        ("forward", nudged(6, 1e-6)),
        ("forward", nudged(7, 1e-6)),
        ("backward", scaled(0, 1 + 1e-5)),
        ("backward", scaled(1, 1 + 1e-4)),
        ("backward", nudged(11, 1e-4)),
        ("backward", nudged(12, 1e-3)),
    ],
    "frozen": [("normalize", nudged(2, 1e-4)), ("backward", nudged(11, 1e-4)), ("backward", scaled(0, 1.001))],
    "merged": [
        ("merge", scaled(0, 1 + 1e-9)),
        ("merge", scaled(1, 1 + 1e-9)),
        ("merge", scaled(2, 1 + 1e-9)),
        ("update_running", written(5, 1 + 1e-9)),
        ("update_running", written(6, 1 + 1e-9)),
    ],
    "parts": [
        ("grad_sums", scaled(0, 1 + 1e-4)),
        ("grad_sums", scaled(1, 1 + 1e-4)),
        ("grad_input", nudged(13, 1e-4)),
    ],
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("check", "function", "change"),
    [pytest.param(c, f, g, id=f"{c}-{f}-{i}") for c, faults in FAULTS.items() for i, (f, g) in enumerate(faults)],
)
def test_wrong_backend_is_rejected(monkeypatch, layout, check, function, change):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS["affine residual relu"])
    CHECKS[check](case)
    use(monkeypatch, broken(function, change))
    with pytest.raises(AssertionError):
        CHECKS[check](case)
