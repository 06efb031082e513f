"""Batch norm of views that do not collapse: in pieces, without copies, as of arrays in one piece."""

import tracemalloc

import numpy as np
import pytest

import fastbn
from fastbn import call, cpu, cuts, pieces
from tests.cases import checks, views
from tests.cases.views import VIEWS, cut_small_arrays
from tests.support import DTYPES, OPTIONS, Layout, make_case, spatial_slice


@pytest.fixture
def in_small_pieces(monkeypatch):
    """Arrays as small as those of the matrix are cut; the pieces that were made."""
    made, make = [], pieces.Pieces.__init__

    def noted(self, *arguments):
        made.append(arguments)
        make(self, *arguments)

    monkeypatch.setattr(pieces.Pieces, "__init__", noted)
    cut_small_arrays(monkeypatch, cpu)
    yield made
    call.forget()


def by_view(*options):
    """Every view with float32, and without options with one other dtype in turn; the rest is slow."""
    other = [dtype for dtype in DTYPES if dtype != "float32"]
    return views.by_view(
        VIEWS, options,
        lambda i, _, j, dtype, k, name: dtype == "float32" or (name == "plain" and dtype == other[i % len(other)]),
    )  # fmt: skip


@by_view("plain", "affine residual relu")
def test_training(layout, dtype, options, in_small_pieces):
    checks.check_backward(make_case(layout, dtype, OPTIONS[options]))


@by_view("affine residual relu")
def test_frozen(layout, dtype, options, in_small_pieces):
    checks.check_frozen(make_case(layout, dtype, OPTIONS[options]))


@by_view("plain")
def test_parts(layout, dtype, options, in_small_pieces):
    checks.check_parts(make_case(layout, dtype, OPTIONS[options]))


@by_view("where weights residual")
def test_weighted(layout, dtype, options, in_small_pieces):
    checks.check_backward(make_case(layout, dtype, OPTIONS[options]))
    assert not in_small_pieces  # weights are laid out for whole arrays


@pytest.mark.parametrize("layout", VIEWS.values(), ids=VIEWS)
def test_moments_are_those_of_the_forward_pass(layout, in_small_pieces):
    case = make_case(layout, "float32")
    _, saved = fastbn.batch_norm(case.x, **case.keywords)
    moments = fastbn.moments(case.x, **case.keywords)
    for mine, others in zip(saved.moments, moments, strict=True):
        np.testing.assert_array_equal(mine, others)


@pytest.mark.parametrize("view", ["NCHW", "NHWC"])
def test_over_ranks(view, in_small_pieces):
    case = make_case(VIEWS[view], "float64", OPTIONS["affine residual relu"])
    given = {**case.keywords, **case.epilogue}
    both = (np.concatenate([a, a]) for a in (case.x, case.dy))
    x, dy = both
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, gather=lambda v: np.stack([v, v]), **given)
    given["residual"] = np.concatenate([given["residual"]] * 2)
    expected, of_both = fastbn.batch_norm(x, case.gamma, case.beta, **given)
    half = len(case.x)
    np.testing.assert_allclose(y, expected[:half], rtol=1e-12, atol=1e-12)
    gradients = fastbn.batch_norm_backward(case.dy, saved, gather=lambda v: np.stack([v, v]))
    whole = fastbn.batch_norm_backward(dy, of_both)
    np.testing.assert_allclose(gradients.x, whole.x[:half], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(2 * gradients.gamma, whole.gamma, rtol=1e-11)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("numbers", [[np.inf, 1.0], [np.nan], [1e200, -1e200], [1e-200, 3e-200], [2.0]], ids=str)
def test_numbers_beyond_the_range(numbers, eps, in_small_pieces):
    layout = VIEWS["NHWC"]
    x = layout.place(np.random.default_rng(0).standard_normal(layout.shape))
    x[1, 2, 3, : len(numbers)] = numbers
    x[..., 5] = np.resize(numbers, layout.shape[:-1])
    y, saved = fastbn.batch_norm(x, channel_axis=-1, eps=eps)
    expected, of_copy = fastbn.batch_norm(x.copy(), channel_axis=-1, eps=eps)
    np.testing.assert_allclose(saved.mean, of_copy.mean, rtol=1e-13)
    np.testing.assert_allclose(saved.rstd, of_copy.rstd, rtol=1e-12)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


def test_out_is_written_alone(in_small_pieces):
    """What lies between the rows of `out` stays as it was, and out may be x."""
    layout = VIEWS["NCHW"]
    case = make_case(layout, "float32", OPTIONS["affine residual relu"])
    expected, _ = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    whole = np.full((5, 6, 11, 25), 7.0, np.float32)
    out = whole[:, :, 1:-1, 2:-2]
    result, _ = fastbn.batch_norm(case.x, case.gamma, case.beta, out=out, **case.keywords)
    assert result is out
    np.testing.assert_array_equal(out, expected)
    out[...] = 7.0
    assert (whole == 7.0).all()
    fastbn.batch_norm(case.x, case.gamma, case.beta, out=case.x, **case.keywords)
    np.testing.assert_array_equal(case.x, expected)


def test_one_array_of_a_call_is_a_view(in_small_pieces):
    """Where x collapses but dy does not, and the other way round."""
    case = make_case(Layout((5, 6, 9, 21)), "float64")
    view = VIEWS["NCHW"].place(case.dy)
    _, saved = fastbn.batch_norm(case.x)
    expected = fastbn.batch_norm_backward(case.dy, saved)
    for mine, other in zip(fastbn.batch_norm_backward(view, saved)[:3], expected[:3], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(fastbn.batch_norm(case.x, residual=view)[1].mean, saved.mean)


def cut_of(x, *others, axis=1):
    kept = frozenset(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
    return cuts.cut_of(cpu, kept, [x, *others])


def test_what_is_cut(monkeypatch):
    images = np.empty((32, 16, 62, 62), np.float32)[:, :, 3:-3, 3:-3]
    cut = cut_of(images)
    assert (cut.axes, cut.kept, cut.slabs) == ((), {1}, True)
    last = np.empty((32, 62, 62, 16), np.float32)[:, 3:-3, 3:-3]
    cut = cut_of(last, axis=3)
    assert (cut.axes, cut.kept, cut.slabs) == ((), {3}, True)
    assert not cut_of(last, np.empty(last.shape[::-1], np.float32).T, axis=3).slabs  # channels are elsewhere in one
    short = np.empty((64, 62, 224, 3), np.float32)[:, 3:-3, ::2]  # rows of 12 bytes
    assert not cut_of(short, axis=3).slabs
    assert cut_of(images[:1, :, :8]) is None  # it is small
    assert cuts.is_cut(cpu, fastbn.layout.layout_of(short.shape, short.strides, frozenset({3})), short)
    assert not cuts.is_cut(cpu, fastbn.layout.layout_of(images.shape, images.strides, frozenset({1})), images)
    monkeypatch.setattr(cpu, "reads_slabs", lambda views: False)
    assert (cut_of(images).axes, cut_of(images).kept) == ((), {0, 1})  # in one piece
    assert (cut_of(last, axis=3).axes, cut_of(last, axis=3).kept) == ((0,), {1, 3})
    whole = np.empty((32, 16, 56, 56), np.float32)
    assert not cuts.is_cut(cpu, fastbn.layout.layout_of(whole.shape, whole.strides, frozenset({1})), whole)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (2,)])
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_pieces_are_the_array(axes, step):
    shape = (4, 5, 6)
    seen = np.zeros(shape, int)
    for index in cuts.Cut(axes, step, frozenset(), ()).indices(shape):
        seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("view", ["NCHW", "NHWC", "NCDHW", "steps"])
def test_no_copies(view):
    """Beside the results, a forward and a backward pass take 4 % of x at most."""
    rng = np.random.default_rng(0)
    views = {
        "NCHW": (np.s_[:, :, 2:-2, 2:-2], (16, 16, 76, 76), 1),
        "NHWC": (np.s_[:, 2:-2, 2:-2], (16, 76, 76, 16), -1),
        "NCDHW": (np.s_[:, :, 1:-1, 1:-1, 1:-1], (4, 16, 18, 36, 74), 1),
        "steps": (np.s_[:, :, ::2], (16, 16, 150, 72), 1),
    }
    index, shape, axis = views[view]
    x = rng.standard_normal(shape, np.float32)[index]
    y, dx = np.empty_like(x), np.empty_like(x)
    for _ in range(2):  # first calls compile
        tracemalloc.start()
        _, saved = fastbn.batch_norm(x, out=y, channel_axis=axis)
        fastbn.batch_norm_backward(x, saved, out=dx)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 0.04 * x.nbytes


@pytest.mark.parametrize(("axis", "collapsed"), [((0, 1), (1, 5, 24, 7)), ((0, 1, 2), (24, 1, 5, 7))])
def test_groups_that_fold_need_no_pieces(axis, collapsed):
    x = spatial_slice((4, 6, 5, 7), np.dtype("f4"))
    view = cpu.collapsed_view(fastbn.layout.layout_of(x.shape, x.strides, frozenset(axis)), x)
    assert view is not None
    assert cpu.reads(view)
    assert view.shape == collapsed


def image_parts(shape=(16, 32, 66, 66)):
    """Images without their border, whose samples and channels kernels walk as they lie, and views that none walks."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)[:, :, 1:-1, 1:-1]
    every_second = np.ones((*x.shape[:-1], 2 * x.shape[-1]), np.float32)[..., ::2]
    return x, every_second


def beside_results(call):
    """Bytes that a warm call takes beside its first result."""
    call()
    tracemalloc.start()
    result = call()[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - result.nbytes


def test_x_that_is_walked_beside_a_residual_that_is_not():
    x, residual = image_parts()
    _, alone = fastbn.batch_norm(x, channel_axis=(0, 1))
    _, saved = fastbn.batch_norm(x, channel_axis=(0, 1), residual=residual)
    for mine, other in zip(saved.moments, alone.moments, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert beside_results(lambda: fastbn.batch_norm(x, channel_axis=(0, 1), residual=residual)) < 0.06 * x.nbytes


def test_x_that_is_cut_beside_a_residual_that_is_not_aligned():
    x, _ = image_parts((8, 16, 72, 72))
    buffer = np.zeros(4 * x.size + 1, np.uint8)
    residual = buffer[1:].view(np.float32).reshape(x.shape)
    _, alone = fastbn.batch_norm(x)
    _, saved = fastbn.batch_norm(x, residual=residual)
    np.testing.assert_array_equal(saved.mean, alone.mean)
    np.testing.assert_array_equal(saved.moments.m2, fastbn.moments(x).m2)


def test_results_of_broadcast_arrays():
    """The order of whose axes is another one than that of the array."""
    x = np.broadcast_to(np.random.default_rng(0).random((64, 96, 42), np.float32)[:, :, None, 1:-1], (64, 96, 8, 40))
    y, _ = fastbn.batch_norm(x, channel_axis=0)
    np.testing.assert_allclose(y, fastbn.batch_norm(x.copy(), channel_axis=0)[0], rtol=1e-5, atol=1e-6)
    assert beside_results(lambda: fastbn.batch_norm(x, channel_axis=0)) < 0.2 * x.nbytes


def test_a_count_that_is_overwritten():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6, 40, 128)).astype(np.float32)[..., ::2]
    dy, names = rng.standard_normal(x.shape).astype(np.float32), ("mean", "rstd", "gamma", "dgamma", "dbeta", "count")
    given = {name: (rng.random(6) + 1).astype(np.float32) for name in names}
    expected = fastbn.grad_input(dy, x, **given)
    out = np.empty(x.shape, np.float32)
    out[0, 0, 0, :6] = given["count"]
    found = fastbn.grad_input(dy, x, **{**given, "count": out[0, 0, 0, :6]}, out=out)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inner", [2, 3, 4, 5, 7, 11, 15, 18, 31])
def test_equal_values_in_short_rows(inner):
    """Whose roundings add up: an image of one colour, seen without its last channel."""
    image = np.zeros((8, 128, 128, inner + 1), np.float32)
    image[..., :-1] = np.linspace(0.1, 2.3, inner, dtype=np.float32)
    x = image[..., :-1]
    _, saved = fastbn.batch_norm(x, channel_axis=0)
    exact = x[0].astype(float)
    np.testing.assert_allclose(saved.mean, exact.mean(), rtol=1e-7)
    np.testing.assert_allclose(saved.moments.var(), exact.var(), rtol=1e-6)


def test_squares_beyond_float64(monkeypatch):
    """What takes a copy, which is prepared once."""
    x = (np.random.default_rng(0).standard_normal((64, 6, 40, 128)) * 1e200)[..., ::2]
    asked, moments = [], cpu.moments
    monkeypatch.setattr(cpu, "moments", lambda *given: asked.append(1) or moments(*given))
    call.forget()
    for _ in range(3):
        _, saved = fastbn.batch_norm(x)
    call.forget()
    assert len(asked) == 1
    np.testing.assert_allclose(saved.mean, x.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(1 / saved.rstd, (x / 1e200).std((0, 2, 3)) * 1e200, rtol=1e-9)


@pytest.mark.parametrize("order", [(4, 1, 3, 2, 0), (0, 1, 2, 3, 4), (2, 0, 4, 1, 3)])
def test_gradients_in_another_order(order):
    """Of two kept axes between reduced ones, of which pieces are cut along the last in memory."""
    rng, shape, kept = np.random.default_rng(0), (33, 17, 33, 2, 8), (1, 3)

    def lying(order):
        a = np.empty([shape[axis] for axis in order]).transpose(np.argsort(order))
        a[...] = rng.standard_normal(shape)
        return a

    x, dy = lying((0, 4, 1, 2, 3)), lying(order)
    _, saved = fastbn.batch_norm(x, channel_axis=kept)
    found = fastbn.batch_norm_backward(dy, saved)
    expected = fastbn.batch_norm_backward(dy.copy(), saved._replace(x=x.copy()))
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


ORDERS = [(1, 0, 2, 3), (0, 1, 2, 3), (2, 1, 0, 3), (0, 2, 1, 3)]  # axes as they lie in memory


def laid_out(a, order):
    """A copy whose axes lie in an order, in a memory that has more beside every row of the first."""
    shape = [a.shape[axis] for axis in order]
    memory = np.empty((shape[0], shape[1] + 1, *shape[2:]), a.dtype)[:, :-1]
    memory[...] = a.transpose(order)
    return memory.transpose(np.argsort(order))


@pytest.mark.parametrize("which", ["out", "dy", "residual", "x"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 2)], ids=str)
def test_kept_axes_of_equal_sizes_in_another_order(axes, order, which, in_small_pieces, monkeypatch):
    """Parameters go with their channels, though their number is the same in every order, and of one piece all."""
    monkeypatch.setattr(cuts, "LITTLE", 1 << 18)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((6, 6, 6, 9)).astype(np.float32) for name in ("x", "dy", "residual", "out")}
    gamma, beta = rng.random((2, 6, 6))
    given = {"gamma": gamma, "beta": beta, "channel_axis": axes, "activation": "relu"}
    expected, saved = fastbn.batch_norm(arrays["x"], residual=arrays["residual"], **given)
    of_dx = fastbn.batch_norm_backward(arrays["dy"], saved)
    inferred = fastbn.batch_norm_inference(arrays["x"], beta, gamma, gamma, beta, channel_axis=axes)
    call.forget()
    arrays[which] = laid_out(arrays[which], order)
    y, saved = fastbn.batch_norm(arrays["x"], residual=arrays["residual"], out=arrays["out"], **given)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    grads = fastbn.batch_norm_backward(arrays["dy"], saved, out=arrays["out"].copy())
    for found, wanted in zip(grads[:4], of_dx[:4], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    y = fastbn.batch_norm_inference(arrays["x"], beta, gamma, gamma, beta, channel_axis=axes, out=laid_out(y, order))
    np.testing.assert_allclose(y, inferred, rtol=1e-5, atol=1e-6)


def test_no_channels_axes_in_pieces(in_small_pieces):
    x = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)[:, ::2]
    expected, of_copy = fastbn.batch_norm(x.copy(), channel_axis=())
    y, saved = fastbn.batch_norm(x, channel_axis=())
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    for found, wanted in zip(fastbn.batch_norm_backward(x, saved), fastbn.batch_norm_backward(x, of_copy), strict=True):
        assert wanted is None or np.shape(found) == np.shape(wanted)
        if wanted is not None:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    _, dbeta = fastbn.grad_sums(x, x, saved.mean, saved.rstd, channel_axis=())
    np.testing.assert_allclose(dbeta, x.sum(dtype=float), rtol=1e-6)
    assert in_small_pieces
