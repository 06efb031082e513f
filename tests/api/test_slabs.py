"""Batch norm of views whose channels have slabs: they are walked where they lie, in one launch or two."""

import tracemalloc

import numpy as np
import pytest

import fastbn
from fastbn import call, cpu, cuts
from fastbn.cpu import memory
from fastbn.layout import layout_in_slabs, layout_of
from tests.cases import checks, views
from tests.cases.views import VIEWS, border, steps
from tests.support import OPTIONS, Layout, make_case, reversed_axes

SLABS = {name: VIEWS[name] for name in VIEWS if name.startswith(("NC", "NH")) and "short" not in name} | {
    "NHWC long rows": Layout((3, 2, 700, 3), -1, border(0, 1, 1, 0)),
    "NHWC long rows apart": Layout((3, 1, 520, 17), -1, border(0, 1, 1, 1)),
    "NHWC short rows": Layout((7, 9, 3, 19), -1, border(0, 1, 1, 0)),
    "NHWC one row": Layout((7, 9, 1, 19), -1, border(0, 1, 1, 0)),
    "NHWC of many": Layout((6, 11, 13, 20), -1, border(0, 1, 1, 0)),
    "NHWC reversed": Layout((5, 9, 8, 21), -1, reversed_axes(0, 2)),
    "NHWC of every second": Layout((4, 5, 6, 20), -1, steps(2, 2, 2, 1)),
    "NHWC whole rows": Layout((5, 130, 4, 21), -1, border(0, 1, 0, 0)),
    "NCDHW of every second": Layout((3, 4, 4, 6, 17), 1, steps(1, 1, 2, 2, 1)),
    "NCHW large": Layout((3, 2, 40, 700), 1, border(0, 0, 1, 2)),
    "NCHW of many": Layout((40, 3, 9, 21), 1, border(0, 0, 1, 2)),
    "NCHW one row": Layout((5, 4, 1, 33), 1, border(0, 0, 1, 2)),
    "CNHW": Layout((3, 5, 9, 21), 0, border(0, 1, 1, 2)),
}
OTHERWISE = {
    "NCHW columns reversed",
    "NCHW every second column",
    "NHWC columns",
    "NCHW columns",
    "NCHW one row",
}  # or they collapse


@pytest.fixture
def in_slabs(monkeypatch):
    """Small arrays are walked so, too; the layouts that were."""
    found, in_slabs = [], cuts.in_slabs

    def noted(*arguments):
        found.append(in_slabs(*arguments))
        return found[-1]

    monkeypatch.setattr(cuts, "in_slabs", noted)
    monkeypatch.setattr(cuts, "LEAST_IN_SLABS", 1024)
    monkeypatch.setattr(memory, "FEWEST_SLABS", 6)
    call.forget()
    yield found
    call.forget()


def by_view(*options):
    """Every view with float32, two with float16; the rest is slow, since it compiles as many kernels again."""
    return views.by_view(
        SLABS, options,
        lambda _, view, j, dtype, k, name: dtype == "float32" or (dtype == "float16" and view in ("NCHW", "NHWC")),
    )  # fmt: skip


@by_view("plain", "affine residual relu")
def test_training(layout, dtype, options, in_slabs):
    checks.check_backward(make_case(layout, dtype, OPTIONS[options]))


@by_view("affine residual relu")
def test_frozen(layout, dtype, options, in_slabs):
    checks.check_frozen(make_case(layout, dtype, OPTIONS[options]))


@by_view("plain")
def test_parts(layout, dtype, options, in_slabs):
    checks.check_parts(make_case(layout, dtype, OPTIONS[options]))


@pytest.mark.parametrize("view", [view for view in SLABS if view not in OTHERWISE])
def test_they_are_walked(view, in_slabs):
    case = make_case(SLABS[view], "float32")
    _, saved = fastbn.batch_norm(case.x, **case.keywords)
    assert in_slabs
    assert in_slabs[-1] is not None
    assert len(in_slabs[-1].collapsed) == 5
    moments = fastbn.moments(case.x, **case.keywords)
    for mine, others in zip(saved.moments, moments, strict=True):
        np.testing.assert_array_equal(mine, others)


@pytest.mark.parametrize("view", ["NCHW of many", "NHWC of many", "NCDHW", "NCHW large", "NHWC long rows"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_threads_do_not_change_bits(view, dtype, in_slabs, monkeypatch):
    """Nor does it whether passes are fused: one thread takes whole channels, several share them."""
    monkeypatch.setattr(cpu.team, "PARALLEL_FROM", 1)
    case = make_case(SLABS[view], dtype, OPTIONS["affine residual relu"])
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(cpu.team, "threads_for", lambda size, threads=threads: threads)
        call.forget()
        y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
        results.append([y, *saved.moments, *fastbn.batch_norm_backward(case.dy, saved)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("view", ["NCHW", "NHWC"])
@pytest.mark.parametrize("numbers", [[np.inf, 1.0], [np.nan], [1e30, -1e30], [1e-30, 3e-30], [2.0]], ids=str)
def test_numbers_beyond_the_range(numbers, view, dtype, eps, in_slabs):
    """Also in the last slab alone, and in a channel that has nothing else."""
    layout = SLABS[view]
    numbers = np.array(numbers) ** (5 if dtype == "float64" else 1)
    x = layout.place(np.random.default_rng(0).standard_normal(layout.shape).astype(dtype))
    last = np.moveaxis(x, layout.channel_axis, -1)
    last[-1, -1, -1, 1] = numbers[0]
    last[..., 3] = np.resize(numbers, last.shape[:-1])
    y, saved = fastbn.batch_norm(x, channel_axis=layout.channel_axis, eps=eps)
    expected, of_copy = fastbn.batch_norm(x.copy(), channel_axis=layout.channel_axis, eps=eps)
    rtol = 1e-5 if dtype == "float32" else 1e-12
    largest = np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)
    np.testing.assert_allclose(saved.mean, of_copy.mean, rtol=rtol, atol=rtol * largest)
    np.testing.assert_allclose(saved.rstd, of_copy.rstd, rtol=rtol)
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)
    assert in_slabs[0] is not None


@pytest.mark.parametrize("view", ["NCHW", "NHWC", "NCDHW"])
def test_out_is_written_alone(view, in_slabs):
    """What lies between the rows of `out` stays as it was, and out may be x."""
    layout = SLABS[view]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    expected, saved = fastbn.batch_norm(case.x.copy(), case.gamma, case.beta, **case.keywords, **case.epilogue)
    dx = fastbn.batch_norm_backward(case.dy, saved).x
    out = layout.place(np.zeros(layout.shape, np.float32))
    whole = out if out.base is None else out.base
    whole[...] = 7.0
    result, _ = fastbn.batch_norm(case.x, case.gamma, case.beta, out=out, **case.keywords, **case.epilogue)
    assert result is out
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    out[...] = 7.0
    assert (whole == 7.0).all()
    np.testing.assert_allclose(fastbn.batch_norm_backward(case.dy, saved, out=out).x, dx, rtol=1e-5, atol=1e-6)
    out[...] = 7.0
    assert (whole == 7.0).all()
    fastbn.batch_norm(case.x, case.gamma, case.beta, out=case.x, **case.keywords, **case.epilogue)
    np.testing.assert_allclose(case.x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", ["NCHW", "NHWC"])
def test_one_array_of_a_call_is_a_view(view, in_slabs):
    """Where x collapses but dy and the residual do not: statistics have the bits that x by itself has."""
    layout = SLABS[view]
    case = make_case(Layout(layout.shape, layout.channel_axis), "float64")
    dy, residual = layout.place(case.dy), layout.place(np.ones(layout.shape))
    _, saved = fastbn.batch_norm(case.x, **case.keywords)
    expected = fastbn.batch_norm_backward(case.dy, saved)
    for mine, other in zip(fastbn.batch_norm_backward(dy, saved)[:3], expected[:3], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)
    _, beside = fastbn.batch_norm(case.x, residual=residual, **case.keywords)
    np.testing.assert_array_equal(beside.mean, saved.mean)


def test_layouts():
    def collapsed(shape, index, kept, dtype=np.float32):
        x = np.empty(shape, dtype)[index]
        found = layout_in_slabs(x.shape, (x.strides,), frozenset(kept))
        return None if found is None else found.collapsed

    inside = slice(1, -1)
    assert collapsed((8, 16, 9, 9), np.s_[:, :, inside, inside], [1]) == (8, 1, 7, 16, 7)
    assert collapsed((8, 9, 9, 16), np.s_[:, inside, inside], [3]) == (8, 7, 7, 16, 1)
    assert collapsed((8, 9, 9, 16), np.s_[:, inside], [3]) == (8, 1, 63, 16, 1)
    assert collapsed((4, 16, 5, 6, 7), np.s_[:, :, inside, inside, inside], [1]) == (4, 3, 4, 16, 5)
    assert collapsed((4, 3, 16, 5, 6, 7), np.s_[:, :2, :, inside, inside, inside], [2]) is None  # one group more
    assert collapsed((8, 16, 9, 9), np.s_[:, inside], [0, 1]) is None  # two groups are kept


def test_rows_that_are_divided():
    """Few large slabs of channels-last rows become more; all have as many rows, or they stay as they are."""
    assert memory.divided((2, 8, 50000, 64, 1)) == (2, 8, 50000, 64, 1)
    divided = memory.divided((8, 1, 56 * 58, 64, 1))
    assert divided.far * divided.near >= memory.FEWEST_SLABS
    assert divided.near * divided.outer == 56 * 58
    assert memory.divided((3, 1, 10007, 64, 1)) == (3, 1, 10007, 64, 1)
    assert memory.divided((3, 1, 10000, 64, 7)) == (3, 1, 10000, 64, 7)


@pytest.mark.parametrize("view", ["NCHW", "NHWC", "NCDHW"])
def test_memory(view):
    """Beside results, a forward and a backward pass take 1 % of x at most."""
    views = {
        "NCHW": (np.s_[:, :, 2:-2, 2:-2], (16, 16, 76, 76), 1),
        "NHWC": (np.s_[:, 2:-2, 2:-2], (16, 76, 76, 16), -1),
        "NCDHW": (np.s_[:, :, 1:-1, 1:-1, 1:-1], (4, 16, 18, 36, 74), 1),
    }
    index, shape, axis = views[view]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)[index]
    y, dx = np.empty_like(x), np.empty_like(x)
    for _ in range(2):  # first calls compile
        tracemalloc.start()
        _, saved = fastbn.batch_norm(x, out=y, channel_axis=axis)
        fastbn.batch_norm_backward(x, saved, out=dx)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 0.01 * x.nbytes


def test_small_arrays_are_copied():
    """And so need no kernels of their own."""
    x = np.empty((2, 3, 9, 9), np.float32)[:, :, 1:-1, 1:-1]
    layout = layout_of(x.shape, x.strides, frozenset({1}))
    assert cuts.walked_by(cpu, layout, [x]) is None
