"""Merging moments: infinities in any order, what means in float64 leave, operators."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import fastbn

INF, NAN = np.inf, np.nan
NONFINITE = {  # and the mean that `fastbn.mean` documents
    (1.0, INF, 2.0): INF,
    (1.0, -INF, 2.0): -INF,
    (INF, INF, 1.0): INF,
    (-INF, -INF, -INF): -INF,
    (INF, -INF, 1.0): NAN,
    (INF, 1.0, -INF, INF): NAN,
    (NAN, INF, 1.0): NAN,
    (NAN, 1.0, 2.0): NAN,
}


def column(*values):
    return np.array(values)[:, None]


def splits(values):
    """Every way to cut values into parts that keep their order; empty parts among them."""
    for cuts in itertools.product((False, True), repeat=len(values) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(values)]
        yield [values[a:b] for a, b in itertools.pairwise(edges)] + [()]


@pytest.mark.parametrize("values", NONFINITE, ids=str)
def test_infinities_in_any_order_and_parts(values):
    """datatable#314. m2 is NaN then, as it is of the whole."""
    for order in set(itertools.permutations(values)):
        whole = fastbn.moments(column(*order))
        np.testing.assert_equal([whole.mean[0], whole.m2[0]], [NONFINITE[values], NAN])
        for parts in splits(order):
            merged = fastbn.merge(*(fastbn.moments(column(*part)) for part in parts))
            for ours, expected in zip(merged, whole, strict=True):
                np.testing.assert_array_equal(ours, expected)


def test_infinities_stay_in_their_channel():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 3))
    clean = fastbn.merge(*(fastbn.moments(part) for part in np.split(x, 3)))
    x[4, 1] = INF
    merged = fastbn.merge(*(fastbn.moments(part) for part in np.split(x, 3)))
    for ours, expected in zip(merged, clean, strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal([merged.count[1], merged.mean[1], merged.m2[1]], [9, INF, NAN])


def test_infinities_of_unequal_weight():
    for counts in ([1e-30, 1.0], [1.0, 1e30]):
        parts = [
            fastbn.Moments(np.array([n]), np.array([m]), np.zeros(1)) for n, m in zip(counts, (INF, 1), strict=True)
        ]
        for merged in (fastbn.merge(*parts), fastbn.merge(*parts[::-1])):
            np.testing.assert_equal([merged.mean[0], merged.m2[0]], [INF, NAN])


def test_finite_means_whose_difference_overflows():
    parts = [fastbn.moments(column(v)) for v in (1.5e308, -1.5e308, 1.5e308)]
    merged = fastbn.merge(*parts)
    np.testing.assert_allclose(merged.mean, 0.5e308, rtol=1e-15)
    assert merged.m2 == INF


def test_an_infinite_part_alone_is_returned_bit_for_bit():
    some = fastbn.Moments(np.array([4.0, 4.0]), np.array([INF, -0.0]), np.array([7.0, 0.0]))
    none = fastbn.Moments(np.zeros(2), np.array([NAN, -INF]), np.full(2, INF))
    for merged in (
        fastbn.merge(some),
        fastbn.merge(some, none),
        fastbn.merge(none, some),
        fastbn.merge(none, none, some),
    ):
        for ours, expected in zip(merged, some, strict=True):
            assert ours.tobytes() == expected.tobytes()


def test_no_warning_whatever_numpy_is_told():
    with np.errstate(all="raise"):
        parts = [fastbn.moments(column(v)) for v in (INF, 1e300, -INF, 5e-324)]
        assert np.isnan(fastbn.merge(*parts).mean)
        assert fastbn.merge(*parts[1:2], fastbn.moments(column(-1e300))).m2 == INF


def test_what_takes_infinite_moments():
    merged = fastbn.merge(*(fastbn.moments(column(v, 2 * v)) for v in (1.0, INF)))
    assert np.isnan([merged.var(), merged.var(1), merged.std(), merged.rstd()]).all()
    mean, var = fastbn.update_running(np.array([-INF]), np.ones(1), merged)
    assert np.isnan([mean, var]).all()
    mean, _ = fastbn.update_running(np.zeros(1), np.ones(1), merged)
    assert mean == INF
    np.testing.assert_array_equal(
        fastbn.update_running(np.zeros(1), np.ones(1), merged, skip_nonfinite=True), [[0], [1]]
    )
    opposite = fastbn.moments(column(-INF, 1))
    assert fastbn.population([merged, merged])[0] == INF
    assert np.isnan(fastbn.population([merged, opposite])).all()


def test_running_statistics_in_half_precision_overflow_without_a_warning():
    batch = fastbn.Moments(np.array([2.0]), np.array([1e6]), np.array([2e9]))
    mean, var = fastbn.update_running(np.zeros(1, np.float16), np.ones(1, np.float16), batch)
    assert (mean, var) == (INF, INF)


@pytest.mark.parametrize("values", NONFINITE, ids=str)
def test_infinities_over_ranks(values):
    """`gather=` merges; ranks in any order."""
    for order in itertools.permutations(values):
        rows = np.stack([np.concatenate(fastbn.moments(column(v))) for v in order])
        _, saved = fastbn.batch_norm(column(order[0]), gather=lambda vector, rows=rows: rows)
        np.testing.assert_equal([saved.mean[0], saved.moments.m2[0]], [NONFINITE[values], NAN])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("parts", [2, 9, 150])
def test_what_rounded_means_leave(ratio, parts):
    """Exact of what it is given, to 14 digits; the deviation of the data to 2^-53 mean / std, as documented."""
    x = np.random.default_rng(parts).standard_normal(300) + ratio
    pieces = [fastbn.moments(part[:, None]) for part in np.array_split(x, parts)]
    merged = fastbn.merge(*pieces)

    given = [tuple(Fraction(float(a[0])) for a in piece) for piece in pieces]
    n = sum(count for count, _, _ in given)
    mean = sum(count * centre for count, centre, _ in given) / n
    m2 = sum(m2 + count * (centre - mean) ** 2 for count, centre, m2 in given)
    assert abs(Fraction(float(merged.m2[0])) / m2 - 1) < 1e-14
    assert abs(Fraction(float(merged.mean[0])) - mean) <= 2.0**-52 * abs(mean)

    numbers = [Fraction(v) for v in x.tolist()]
    centre = sum(numbers) / len(numbers)
    std = math.sqrt(sum((v - centre) ** 2 for v in numbers) / len(numbers))
    assert abs(merged.std()[0] / std - 1) <= 2.0**-53 * ratio / std + 1e-14


def test_many_equal_parts():
    """Roundings that all go the same way."""
    part = fastbn.Moments(np.array([7.0]), np.array([0.3]), np.array([0.1]))
    merged = fastbn.merge(*[part] * 5000)
    assert abs(Fraction(float(merged.m2[0])) / (5000 * Fraction(0.1)) - 1) < 1e-15
    assert merged.mean[0] == 0.3


def test_without_channels():
    """Zero-dimensional moments stay arrays, which can be merged again."""
    part = fastbn.moments(np.arange(5.0), channel_axis=())
    whole = fastbn.merge(fastbn.merge(part, part), part)
    assert [type(a) for a in whole] == [np.ndarray] * 3
    assert [float(a) for a in whole] == [15, 2, 30]


# --- operators --------------------------------------------------------------------------------------------------------


def batches():
    x = np.random.default_rng(0).standard_normal((12, 3))
    return [fastbn.moments(part) for part in np.split(x, [2, 7])], fastbn.moments(x)


def test_adding_merges():
    (a, b, c), whole = batches()
    added = a + b
    for ours, expected in zip(added, fastbn.merge(a, b), strict=True):
        np.testing.assert_array_equal(ours, expected)
    added += c
    for result in (added, sum([a, b, c]), sum([b, c], start=a), sum([b, c], a)):
        assert type(result) is fastbn.Moments
        np.testing.assert_array_equal(result.count, whole.count)
        np.testing.assert_allclose(result.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(result.m2, whole.m2, rtol=1e-14)


@pytest.mark.parametrize(
    "other", [(), (1, 2), [1], 1, 0.5, True, None, "0", np.ones(3), np.float64(0), np.int64(2)], ids=repr
)
def test_other_operands(other):
    (a, *_), _ = batches()
    name = type(other).__name__
    for operation in (lambda: a + other, lambda: other + a):
        with pytest.raises(TypeError, match=rf"unsupported operand for \+: fastbn.Moments and {name}"):
            operation()
    for operation in (lambda: a * other, lambda: other * a):
        with pytest.raises(TypeError, match=rf"unsupported operand for \*: fastbn.Moments and {name}"):
            operation()


def test_other_operands_of_both_kinds():
    (a, b, _), _ = batches()
    for operation in (lambda: a * b, lambda: a + 0, lambda: a * 0, lambda: a + fastbn.moments(np.ones((2, 4)))):
        with pytest.raises((TypeError, ValueError), match=r"Moments|shape"):
            operation()


def test_otherwise_a_tuple():
    (a, *_), _ = batches()
    count, mean, m2 = a
    assert len(a) == 3
    assert a == fastbn.Moments(count, mean, m2)
    assert a[1:] == (mean, m2)
    assert [type(part) for part in (*a, *a)] == [np.ndarray] * 6
    np.testing.assert_array_equal(np.asarray(a), np.stack([count, mean, m2]))
