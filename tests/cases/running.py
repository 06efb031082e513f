"""Running statistics that `batch_norm` updates: the bits of `update_running` after it, whatever way the call goes."""

import numpy as np
import pytest

import fastbn
from fastbn import Moments, update_running
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case

UPDATES = ({}, {"rate": 0.0}, {"rate": 1, "correction": 0}, {"rate": np.float32(0.25), "correction": 2.5})
GATHERS = {"alone": None, "two ranks": lambda vector: np.stack([vector, vector])}


PAIRS = [("float64", "float64"), ("float32", "float64"), ("float16", "bfloat16")]
CASES = [
    ("NCHW", "plain"),
    ("NHWC", "weights relu"),
    ("instance NHWC", "affine residual relu"),
    ("spatial slice", "where"),
]
"""Layouts and options of calls."""


def same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def pair(shape, dtypes, seed=0):
    """Running mean and variance, of which some are infinite."""
    rng = np.random.default_rng(seed)
    both = tuple((1 + rng.random(shape)).astype(DTYPES[dtype]) for dtype in dtypes)
    both[0].reshape(-1)[:1] = np.inf
    return both


def check(x, running, update, **keywords):
    """Of the call and of what it is in the place of; and the results of both are the same."""
    before = tuple(a.copy() for a in running)
    y, saved = fastbn.batch_norm(x, running=running, **update, **keywords)
    plain, plainly_saved = fastbn.batch_norm(x, **keywords | ({"out": np.empty_like(x)} if "out" in keywords else {}))
    same_bits(y, plain)
    for ours, theirs in zip((*saved.moments, saved.rstd), (*plainly_saved.moments, plainly_saved.rstd), strict=True):
        same_bits(ours, theirs)
    wanted = update_running(*before, Moments(*saved.moments), **update)
    for ours, theirs in zip(running, wanted, strict=True):
        same_bits(ours, theirs)


@pytest.mark.parametrize(("layout", "options"), CASES)
@pytest.mark.parametrize("dtypes", PAIRS)
def test_updates(layout, options, dtypes):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    for update in UPDATES:
        check(case.x, pair(case.layout.channels, dtypes), update, **case.keywords, **case.epilogue)


@pytest.mark.parametrize("gather", GATHERS)
def test_over_ranks(gather):
    case = make_case(LAYOUTS["NCHW"], "float32", OPTIONS["plain"])
    for update in UPDATES:
        check(case.x, pair(case.layout.channels, ("float64", "float32")), update, gather=GATHERS[gather])


def test_arrays_of_any_strides():
    """Views, several channel axes in another order than in memory; what lies between stays."""
    x = np.random.default_rng(1).standard_normal((3, 4, 5, 2)).astype(np.float32)
    for array, axes in ((x, (1, 3)), (x.transpose(3, 1, 0, 2), (0, 1)), (x[:, :, ::2], 1)):
        shape = tuple(array.shape[axis] for axis in np.atleast_1d(axes))
        roomy = pair((*shape[:-1], 2 * shape[-1]), ("float64", "float32"))
        between = [a[..., 1::2].copy() for a in roomy]
        check(array, tuple(a[..., ::2] for a in roomy), {"rate": 0.5}, channel_axis=axes)
        for ours, theirs in zip((a[..., 1::2] for a in roomy), between, strict=True):
            same_bits(ours, theirs)


def test_channels_that_stay():
    """Those with no more values than the correction, and all of an empty batch."""
    x, where = np.ones((2, 3, 4), np.float32), np.zeros((2, 1, 4), bool)
    for selected in (0, 1):
        where[:, :, :selected] = True
        check(x, pair((3,), ("float32", "float64")), {"correction": 2}, where=where)
    check(x[:0], pair((3,), ("float32", "float64")), {})
    check(x[:, :0], pair((0,), ("float32", "float64")), {})


def test_outputs_over_inputs():
    """In place, and askew, where y is computed apart: the update is made once."""
    buffer = np.random.default_rng(2).standard_normal((5, 3, 4)).astype(np.float32)
    for x, out in ((buffer[:4], buffer[:4]), (buffer[:4], buffer[1:])):
        running = pair((3,), ("float64", "float32"))
        before, given = tuple(a.copy() for a in running), x.copy()
        y, saved = fastbn.batch_norm(x, running=running, out=out)
        expected, _ = fastbn.batch_norm(given)
        same_bits(y, expected)
        for ours, theirs in zip(running, update_running(*before, Moments(*saved.moments)), strict=True):
            same_bits(ours, theirs)


def test_rates_of_every_call():
    """The signature does not have them: a cumulative average takes another one each time."""
    x = np.random.default_rng(3).standard_normal((3, 6, 2)).astype(np.float32)
    running = np.zeros(2), np.zeros(2)
    for i, batch in enumerate(x):
        fastbn.batch_norm(batch, running=running, rate=1 / (i + 1), correction=0)
    np.testing.assert_allclose(running, (x.mean((0, 1)), x.var(1).mean(0)), rtol=1e-6)


WRONG = {
    "a list": (lambda g: {"running": list(g["running"])}, TypeError, "^running: expected a pair of arrays, got list"),
    "three": (lambda g: {"running": (*g["running"], g["gamma"])}, TypeError, "^running: .* got 3 of them"),
    "none": (lambda g: {"running": (None, g["running"][1])}, TypeError, r"^running\[0\]: expected .* got NoneType"),
    "integers": (
        lambda g: {"running": (g["running"][0].astype(int), g["running"][1])},
        TypeError, r"^running\[0\]: expected a float dtype, got int64",
    ),
    "another shape": (
        lambda g: {"running": (g["running"][0], g["running"][1][:2])},
        ValueError, r"^running\[1\]: expected the shape of the channel axes, \(3,\), got \(2,\)",
    ),
    "broadcast": (
        lambda g: {"running": (np.broadcast_to(g["running"][0][:1], 3), g["running"][1])},
        ValueError, r"^running\[0\]: expected a (writable array|place for each element)",
    ),
    "one array": (
        lambda g: {"running": (g["running"][0],) * 2},
        ValueError, r"^running\[0\]: expected memory of its own, which is updated, got some of running\[1\]'s",
    ),
    "gamma": (
        lambda g: {"running": (g["running"][0], g["gamma"])},
        ValueError, r"^running\[1\]: expected memory of its own, which is updated, got some of gamma's",
    ),
    "a part of x": (
        lambda g: {"running": (g["running"][0], g["x"][0, :, 0])},
        ValueError, r"^running\[1\]: expected memory of its own, which is updated, got some of x's",
    ),
    "a part of out": (
        lambda g: {"running": (g["out"].reshape(-1)[5:8], g["running"][1])},
        ValueError, r"^running\[0\]: expected memory of its own, which is updated, got some of out's",
    ),
    "rate": (lambda g: {"rate": 1.5}, ValueError, r"^rate: expected a number in \[0, 1\], got 1\.5"),
    "no rate": (lambda g: {"rate": None}, TypeError, "^rate: expected a real number, got NoneType"),
    "no correction": (lambda g: {"correction": "1"}, TypeError, "^correction: expected a real number, got str"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong(what):
    """Refused on first calls and on others; nothing has been written."""
    change, error, message = WRONG[what]
    given = {
        "x": np.random.default_rng(4).standard_normal((4, 3, 5)).astype(np.float32), "gamma": np.ones(3),
        "out": np.zeros((4, 3, 5), np.float32), "running": (np.zeros(3), np.ones(3)),
    }  # fmt: skip
    wrong = given | change(given)
    for _ in range(2):
        before = [a.tobytes() for a in (given["x"], given["gamma"], given["out"], *given["running"])]
        with pytest.raises(error, match=message):
            fastbn.batch_norm(**wrong)
        assert before == [a.tobytes() for a in (given["x"], given["gamma"], given["out"], *given["running"])]
        fastbn.batch_norm(**given | {"running": tuple(a.copy() for a in given["running"]), "out": given["out"].copy()})


def test_a_hook_that_fails():
    running = np.zeros(3), np.ones(3)

    def gather(vector):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fastbn.batch_norm(np.ones((4, 3), np.float32), running=running, gather=gather)
    np.testing.assert_array_equal(running, (np.zeros(3), np.ones(3)))
