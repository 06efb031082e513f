"""What must hold for any data: equivariance, permutation, splitting, isolation of NaN, round trips."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastbn
from fastbn import reference
from tests.support import LAYOUTS, OPTIONS, make_case

settings.register_profile("fastbn", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("fastbn")

shapes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 40))


@st.composite
def arrays(draw, shape=shapes, dtype=np.float32):
    """Data of any shape, seen in any memory order."""
    shape = draw(shape)
    order = draw(st.permutations(range(len(shape))))
    seed, scale = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    memory = np.empty([shape[axis] for axis in order], dtype)
    x = memory.transpose(np.argsort(order))
    x[...] = np.random.default_rng(seed).standard_normal(shape) * scale
    return x


def spread_of(x):
    return np.abs(x).max() + 1e-30


@given(arrays(), st.floats(0.25, 4), st.floats(-50, 50))
def test_shift_and_scale(x, factor, offset):
    """y does not change when x is scaled and shifted (eps scaled with it); the moments follow."""
    factor, offset = np.float32(factor), np.float32(offset)
    moved = x * factor + offset
    eps = 1e-2 * spread_of(x) ** 2
    y, saved = fastbn.batch_norm(x, eps=eps)
    z, other = fastbn.batch_norm(moved, eps=eps * float(factor) ** 2)
    rounding = 2.0**-22 * spread_of(moved) / (factor * np.sqrt(eps))
    np.testing.assert_allclose(z, y, atol=1e-5 + 2 * rounding)
    np.testing.assert_allclose(other.mean, saved.mean * factor + offset, atol=2e-7 * spread_of(moved), rtol=1e-6)


@given(arrays(), st.randoms(use_true_random=False))
def test_permuting_the_batch(x, random):
    order = random.sample(range(len(x)), len(x))
    y, saved = fastbn.batch_norm(x)
    z, other = fastbn.batch_norm(x[order])
    np.testing.assert_allclose(other.mean, saved.mean, atol=1e-7 * spread_of(x))
    np.testing.assert_allclose(other.moments.m2, saved.moments.m2, rtol=1e-6, atol=1e-12 * spread_of(x) ** 2)
    np.testing.assert_allclose(z, y[order], atol=1e-4)


@given(arrays(), st.data())
def test_permuting_the_channels(x, data):
    """A channel's bits do not depend on its neighbours or its place."""
    order = data.draw(st.permutations(range(x.shape[1])))
    y, saved = fastbn.batch_norm(np.ascontiguousarray(x))
    z, other = fastbn.batch_norm(np.ascontiguousarray(x[:, order]))
    np.testing.assert_array_equal(other.mean, saved.mean[order])
    np.testing.assert_array_equal(z, y[:, order])


@given(arrays(), st.data())
def test_permuting_the_channels_to_rounding(x, data):
    """Where vectors run across channels' rows, a channel's place decides which of its values are added first."""
    order = data.draw(st.permutations(range(x.shape[1])))
    y, saved = fastbn.batch_norm(np.ascontiguousarray(x))
    z, other = fastbn.batch_norm(np.ascontiguousarray(x[:, order]))
    np.testing.assert_allclose(other.mean, saved.mean[order], rtol=0, atol=1e-7 * spread_of(x))
    np.testing.assert_allclose(z, y[:, order], rtol=1e-5, atol=1e-4)


@given(arrays(dtype=np.float64), st.lists(st.integers(0, 9), max_size=4))
def test_split_and_merge_equals_whole(x, cuts):
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    parts = [fastbn.moments(x[a:b]) for a, b in itertools.pairwise(edges)]
    merged, whole = fastbn.merge(*parts), fastbn.moments(x)
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-14 * spread_of(x))
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12, atol=1e-14 * spread_of(x) ** 2)


@given(arrays(dtype=np.float64), st.integers(1, 4))
def test_weights_are_frequencies(x, most):
    """An integer weight counts like that many copies."""
    weights = np.random.default_rng(0).integers(0, most + 1, (len(x), 1, 1))
    weights[0] = 1
    weighted, copied = fastbn.moments(x, weights=weights), fastbn.moments(np.repeat(x, weights.ravel(), axis=0))
    np.testing.assert_array_equal(weighted.count, copied.count)
    np.testing.assert_allclose(weighted.mean, copied.mean, atol=1e-14 * spread_of(x))
    np.testing.assert_allclose(weighted.m2, copied.m2, rtol=1e-12, atol=1e-13 * spread_of(x) ** 2)


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-1e6, 1e6)))
def test_moments_of_arbitrary_numbers(x):
    ours, exact = fastbn.moments(x), reference.moments(x)
    np.testing.assert_allclose(ours.mean, exact.mean, atol=4e-16 * spread_of(x))
    np.testing.assert_allclose(ours.m2, exact.m2, rtol=1e-12, atol=1e-13 * spread_of(x) * np.ptp(x) + 1e-300)


@given(arrays(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_nonfinite_values_stay_in_their_channel(x, bad, data):
    x = np.concatenate([x, x], axis=1)
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    clean_y, clean = fastbn.batch_norm(x)
    clean_grads = fastbn.batch_norm_backward(x, clean)
    x[where] = bad
    y, saved = fastbn.batch_norm(x)
    grads = fastbn.batch_norm_backward(x, saved)
    others = np.arange(x.shape[1]) != where[1]
    np.testing.assert_array_equal(saved.mean[others], clean.mean[others])
    np.testing.assert_array_equal(y[:, others], clean_y[:, others])
    np.testing.assert_array_equal(grads.x[:, others], clean_grads.x[:, others])
    np.testing.assert_array_equal(grads.gamma[others], clean_grads.gamma[others])
    assert np.isnan(y[:, where[1]]).all()
    np.testing.assert_equal(saved.mean[where[1]], bad)
    np.testing.assert_equal(fastbn.mean(x, axis=(0, 2))[where[1]], np.float32(bad))


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 5, 40), (6, 3, 1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_nonfinite_values_are_not_seen(shape, bad):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    where = np.ones((6, 1, shape[2]), bool)
    where[0] = where[3] = False
    for weight in ({"where": where}, {"weights": where.astype(float)}):
        expected, clean = fastbn.batch_norm(x, **weight)
        spoilt = x.copy()
        spoilt[0] = bad
        spoilt[3] = -bad
        y, saved = fastbn.batch_norm(spoilt, **weight)
        np.testing.assert_array_equal(saved.mean, clean.mean)
        np.testing.assert_array_equal(saved.moments.m2, clean.moments.m2)
        np.testing.assert_array_equal(y[1:3], expected[1:3])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_passes_through_relu(activation):
    x = np.array([[np.nan, 1.0], [1.0, 3.0]], np.float32)
    y, _ = fastbn.batch_norm(x, activation=activation)
    assert np.isnan(y[:, 0]).all()
    assert not np.isnan(y[:, 1]).any()
    y = fastbn.normalize(x, np.zeros(2), np.ones(2), activation=activation)
    assert np.isnan(y[0, 0])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "instance NHWC", "NC"])
@pytest.mark.parametrize("options", OPTIONS)
def test_saved_round_trip(layout, options):
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    _, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    arrays, static = saved.arrays()
    assert hash(static) == hash(saved.arrays()[1])
    assert all(isinstance(array, np.ndarray) for array in arrays)
    again = fastbn.Saved.from_arrays([array.copy() for array in arrays], static)
    for field, ours, theirs in zip(saved._fields, saved, again, strict=True):
        if isinstance(ours, fastbn.Moments):
            assert isinstance(theirs, fastbn.Moments)
        np.testing.assert_equal(theirs, ours, err_msg=field)
    grads, other = (fastbn.batch_norm_backward(case.dy, s) for s in (saved, again))
    for ours, theirs in zip(grads, other, strict=True):
        np.testing.assert_equal(theirs, ours)
    with pytest.raises(ValueError, match="arrays: expected"):
        fastbn.Saved.from_arrays(arrays[1:], static)


def test_saved_frozen_round_trip():
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    saved = fastbn.Saved.frozen(x, np.zeros(3), np.ones(3), y=x, activation="relu")
    again = fastbn.Saved.from_arrays(*saved.arrays())
    assert again.moments is None
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x, again).x, fastbn.batch_norm_backward(x, saved).x)


def test_saved_is_immutable():
    _, saved = fastbn.batch_norm(np.ones((2, 3), np.float32))
    with pytest.raises(AttributeError):
        saved.mean = None


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "instance NCHW", "NCHW long rows"])
@pytest.mark.parametrize(
    "options", ["plain", "affine residual relu", pytest.param("where weights residual", marks=pytest.mark.slow)]
)
def test_gradients_of_the_statistics(layout, options):
    """dmean and dvar against the oracle, whose own are held by finite differences."""
    case = make_case(LAYOUTS[layout], "float64", OPTIONS[options])
    rng = np.random.default_rng(5)
    dmean, dvar = rng.standard_normal((2, *case.layout.channels))
    keywords = case.keywords | case.epilogue
    y, saved = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)
    grads = fastbn.batch_norm_backward(case.dy, saved, dmean=dmean, dvar=dvar)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **keywords)
    dx, dgamma, *_ = reference.batch_norm_backward(case.dy, forward, y=y, dmean=dmean, dvar=dvar)
    np.testing.assert_allclose(grads.x, dx, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(grads.gamma, dgamma, rtol=1e-11, atol=1e-12)
    assert np.abs(grads.x - fastbn.batch_norm_backward(case.dy, saved).x).max() > 1e-3


RANKS = {"even": (2, 2, 2), "uneven": (1, 3, 2), "one empty": (3, 0, 3), "first empty": (0, 6), "alone": (6,)}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "options", ["plain", "affine residual relu", pytest.param("where weights residual", marks=pytest.mark.slow)]
)
def test_gather(ranks, layout, options):
    """Ranks that share statistics give what one process gives on the whole batch, each its own rows."""
    layout = LAYOUTS[layout]
    case = make_case(type(layout)((6, *layout.shape[1:]), layout.channel_axis), "float64", OPTIONS[options])
    keywords = case.keywords | case.epilogue
    whole_y, whole = fastbn.batch_norm(case.x, case.gamma, case.beta, **keywords)
    whole_grads = fastbn.batch_norm_backward(case.dy, whole)
    edges = np.cumsum([0, *RANKS[ranks]])
    cuts = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def on_all_ranks(call):
        """Run a collective call on every rank: once to see what each sends, once with the answer."""
        sent = []

        def listen(vector):
            sent.append(vector.copy())
            return vector[None]

        for cut in cuts:
            call(cut, listen)
        rows = np.stack(sent)
        return [call(cut, lambda vector: rows) for cut in cuts]

    def part(cut):
        sliced = {k: v[cut] if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
        return case.x[cut], sliced

    def forward(cut, gather):
        x, sliced = part(cut)
        return fastbn.batch_norm(x, case.gamma, case.beta, gather=gather, **sliced)

    results = on_all_ranks(forward)
    saved = [s for _, s in results]

    def backward(cut, gather):
        return fastbn.batch_norm_backward(case.dy[cut], saved[cuts.index(cut)], gather=gather)

    grads = on_all_ranks(backward)
    np.testing.assert_allclose(np.concatenate([y for y, _ in results]), whole_y, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([g.x for g in grads]), whole_grads.x, atol=1e-12)
    np.testing.assert_allclose(sum(g.gamma for g in grads), whole_grads.gamma, atol=1e-11)
    np.testing.assert_allclose(sum(g.beta for g in grads), whole_grads.beta, atol=1e-11)
    for s in saved:
        assert s.gathered
        np.testing.assert_allclose(s.count, whole.count, rtol=1e-14)
        np.testing.assert_array_equal(s.count, saved[0].count)
        np.testing.assert_array_equal(s.mean, saved[0].mean)
        running = fastbn.update_running(np.zeros(s.mean.shape), np.ones(s.mean.shape), s.moments)
        np.testing.assert_allclose(running[0], 0.1 * whole.mean, rtol=1e-12)
