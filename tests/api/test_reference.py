"""The oracle itself: numbers worked out by hand, and finite differences for every gradient."""

import numpy as np
import pytest

from fastbn import reference

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_moments_by_hand():
    x = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])
    count, mean, m2 = reference.moments(x)
    assert count.tolist() == [3, 3]
    assert mean.tolist() == [3, 20]
    assert m2.tolist() == [14, 200]  # 4 + 1 + 9 and 100 + 0 + 100


def test_weighted_moments_by_hand():
    x = np.array([[1.0], [4.0], [np.nan], [9.0]])
    weights, where = np.array([[1.0], [2.0], [0.0], [5.0]]), np.array([[True], [True], [True], [False]])
    count, mean, m2 = reference.moments(x, where=where, weights=weights)
    assert (count.item(), mean.item(), m2.item()) == (3, 3, 6)  # 1 * 4 + 2 * 1


def test_instance_moments_by_hand():
    x = np.array([[[1.0, 3.0], [5.0, 5.0]], [[0.0, 4.0], [2.0, 8.0]]])
    _, mean, m2 = reference.moments(x, channel_axis=(0, 1))
    assert mean.tolist() == [[2, 5], [2, 5]]
    assert m2.tolist() == [[2, 0], [8, 18]]


def test_forward_by_hand():
    x = np.array([[1.0], [5.0]])  # mean 3, var 4, eps 12: rstd 1/4
    forward = reference.batch_norm(x, np.array([2.0]), np.array([0.5]), eps=12.0)
    assert forward.y.tolist() == [[-0.5], [1.5]]
    residual = np.array([[0.25], [-4.0]])
    forward = reference.batch_norm(x, np.array([2.0]), np.array([0.5]), eps=12.0, residual=residual, activation="relu")
    assert forward.y.tolist() == [[0], [0]]


def test_inference_by_hand():
    forward = reference.batch_norm_inference(np.array([[7.0]]), np.array([1.0]), np.array([8.0]), eps=1.0)
    assert forward.y.tolist() == [[2.0]]


def test_backward_by_hand():
    """x = -1, 1: xhat = x at eps 0. dy = 0, 2: dbeta = dgamma = 2, dx = dy - (2 + 2 xhat) / 2 = 0, 0."""
    forward = reference.batch_norm(np.array([[-1.0], [1.0]]), eps=0.0)
    dx, dgamma, dbeta, dz = reference.batch_norm_backward(np.array([[0.0], [2.0]]), forward)
    assert (dgamma.item(), dbeta.item()) == (2, 2)
    assert dx.tolist() == [[0], [0]]
    assert dz.tolist() == [[0], [2]]


def test_merge_by_hand():
    a = reference.Statistics(np.array([2.0]), np.array([1.0]), np.array([2.0]))
    b = reference.Statistics(np.array([2.0]), np.array([5.0]), np.array([0.0]))
    empty = reference.Statistics(np.array([0.0]), np.array([np.nan]), np.array([np.nan]))
    assert [v.item() for v in reference.merge(a, empty, b)] == [4, 3, 18]  # 2 + 0 + 16 * 2 * 2 / 4


def test_running_and_population_by_hand():
    batch = reference.Statistics(np.array([3.0, 1.0]), np.array([2.0, 2.0]), np.array([4.0, 0.0]))
    mean, var = reference.update_running(np.zeros(2), np.ones(2), batch, rate=0.5)
    assert mean.tolist() == [1, 0]
    assert var.tolist() == [1.5, 1]
    other = reference.Statistics(np.array([2.0, 2.0]), np.array([6.0, 5.0]), np.array([6.0, 1.0]))
    mean, var = reference.population([batch, other])
    assert mean.tolist() == [4, 5]
    assert var.tolist() == [4, 1]


def test_fold_by_hand():
    kernel, bias = reference.fold(np.ones((1, 2, 2)), None, np.array([1.0]), np.array([3.0]), np.array([4.0]), eps=1.0)
    assert kernel.tolist() == [[[2, 2], [2, 2]]]
    assert bias.tolist() == [-2]


# --- finite differences -----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
SHAPE = (4, 3, 5)
X, DY, RESIDUAL = RNG.standard_normal((3, *SHAPE))
GAMMA, BETA, DMEAN, DVAR = RNG.standard_normal((4, 3))
WHERE = RNG.random((4, 1, 5)) < 0.7
WEIGHTS = RNG.random((4, 1, 5)) * WHERE

VARIANTS = {
    "plain": {},
    "where": {"where": WHERE},
    "weights": {"weights": WEIGHTS},
    "where weights": {"where": WHERE, "weights": RNG.random((1, 1, 5))},
    "residual": {"residual": RESIDUAL},
    "relu": {"activation": "relu"},
    "residual relu where": {"residual": RESIDUAL, "activation": "relu", "where": WHERE},
}


def differences(loss, array, step=1e-6):
    """The gradient of a scalar function by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = loss()
        array[index] = kept - step
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


def assert_gradient(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_gradients(variant):
    """Of sum(dy * y) + sum(dmean * mean) + sum(dvar * var) by x, gamma, beta and the residual."""
    x, gamma, beta, residual = X.copy(), GAMMA.copy(), BETA.copy(), RESIDUAL.copy()
    options = VARIANTS[variant] | ({"residual": residual} if "residual" in VARIANTS[variant] else {})

    def loss():
        forward = reference.batch_norm(x, gamma, beta, **options)
        count, mean, m2 = forward.statistics
        return (DY * forward.y).sum() + (DMEAN * mean).sum() + (DVAR * m2 / count).sum()

    forward = reference.batch_norm(x, gamma, beta, **options)
    dx, dgamma, dbeta, dresidual = reference.batch_norm_backward(DY, forward, dmean=DMEAN, dvar=DVAR)
    assert_gradient(dx, differences(loss, x))
    assert_gradient(dgamma, differences(loss, gamma))
    assert_gradient(dbeta, differences(loss, beta))
    if "residual" in options:
        assert_gradient(dresidual, differences(loss, residual))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_gradients(activation):
    """Of inference, also by the statistics: dmean = -gamma rstd dbeta, dvar = -gamma rstd^2 dgamma / 2."""
    x, gamma, beta = X.copy(), GAMMA.copy(), BETA.copy()
    mean, var = RNG.standard_normal(3), RNG.random(3) + 0.5

    def loss():
        return (DY * reference.batch_norm_inference(x, mean, var, gamma, beta, activation=activation).y).sum()

    forward = reference.batch_norm_inference(x, mean, var, gamma, beta, activation=activation)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(DY, forward)
    assert_gradient(dx, differences(loss, x))
    assert_gradient(dgamma, differences(loss, gamma))
    assert_gradient(dbeta, differences(loss, beta))
    assert_gradient(-gamma * forward.rstd * dbeta, differences(loss, mean))
    assert_gradient(-gamma * forward.rstd**2 * dgamma / 2, differences(loss, var))


def test_synchronised_gradients():
    """Three ranks of uneven size, one of them empty: the gradient of the sum of their losses."""
    cuts = [slice(0, 3), slice(3, 3), slice(3, 4)]
    x = X.copy()

    def forwards():
        merged = reference.merge(*(reference.moments(x[cut]) for cut in cuts))
        return [reference.batch_norm(x[cut], GAMMA, BETA, statistics=merged) for cut in cuts]

    def loss():
        return sum((DY[cut] * forward.y).sum() for cut, forward in zip(cuts, forwards(), strict=True))

    parts = forwards()
    local = [reference.batch_norm_backward(DY[cut], forward) for cut, forward in zip(cuts, parts, strict=True)]
    sums = sum(part[1] for part in local), sum(part[2] for part in local)
    dx = [reference.batch_norm_backward(DY[c], f, sums=sums)[0] for c, f in zip(cuts, parts, strict=True)]
    assert_gradient(np.concatenate(dx), differences(loss, x))
    whole = reference.batch_norm_backward(DY, reference.batch_norm(X, GAMMA, BETA))
    np.testing.assert_allclose(np.concatenate(dx), whole[0], rtol=1e-12, atol=1e-14)
