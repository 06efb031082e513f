"""Layer Jacobians by finite differences, the argument for them where it is exact, and the distance from a Gaussian."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import fastbn


@pytest.fixture
def jacobians(example):
    return example("layer_jacobians")


@pytest.mark.slow
def test_claims(jacobians, tmp_path, capsys):
    picture = tmp_path / "p.png"
    results = jacobians.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a Gaussian's own: 0.03" in capsys.readouterr().out
    sizes = {key: [run.size() for (run,) in times] for key, times in results.items()}
    # The size of the weights does not matter with batch norm, and does without it.
    for activation in ("tanh", "relu"):
        one, three = (sizes[activation, "batch norm", gain][0] for gain in (1.0, 3.0))
        assert_allclose(one, three, rtol=1e-3)  # eps
        assert ((one > 0.9) & (one < 1.4)).all()
    assert_allclose(sizes["relu", "plain", 3.0][0], 3 * sizes["relu", "plain", 1.0][0])
    # Not one by one: a tenth of them are near 0 with batch norm, and not with orthogonal weights.
    low = {kind: np.quantile(results["tanh", kind, 1.0][0][0].singular, 0.1) for kind in ("batch norm", "orthogonal")}
    assert low["batch norm"] < 0.1 < 0.6 < low["orthogonal"]
    for key, times in results.items():
        for (run,) in times if key[2] == 1 else ():
            assert (run.outputs < run.inputs).mean() > 0.8


@pytest.mark.parametrize("kind", ["plain", "batch norm"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_jacobians(jacobians, example, activation, kind):
    """One sample moves, statistics stand still."""
    rng = np.random.default_rng(0)
    images, *_ = example("gallery").digits()
    network, blocks = jacobians.build(activation, kind, 1.0, rng)
    for block in blocks:
        if block.norm is not None:
            block.norm.gamma += rng.normal(0, 0.3, jacobians.UNITS)
            block.norm.beta += rng.normal(0, 0.3, jacobians.UNITS)
    network.forward(images[: jacobians.SAMPLES].astype(float), training=True)
    first, second = blocks[3:5]
    found = jacobians.jacobians(first, second)[7]
    function = np.tanh if activation == "tanh" else lambda x: np.maximum(x, 0)
    x = first.dense.x[7] @ first.dense.weight
    if first.norm is not None:
        x = (x - first.norm.saved.mean) * first.norm.saved.rstd

    def to_next(x):
        z = x if first.norm is None else x * first.norm.gamma + first.norm.beta
        sums = function(z) @ second.dense.weight
        return sums if second.norm is None else (sums - second.norm.saved.mean) * second.norm.saved.rstd

    moves = 1e-6 * np.eye(jacobians.UNITS)
    assert_allclose(found, (to_next(x + moves) - to_next(x - moves)) / 2e-6, atol=1e-7)


def test_the_argument_for_linear_layers():
    """J Cov[xhat] J' has a diagonal of 1; J J' only where units are not correlated."""
    rng = np.random.default_rng(0)
    for mixed in (False, True):
        x = rng.standard_normal((100_000, 6)) @ (np.eye(6) + mixed * 0.5)
        xhat, _ = fastbn.batch_norm(x, channel_axis=-1, eps=0)
        w = rng.standard_normal((6, 6))
        _, saved = fastbn.batch_norm(xhat @ w, channel_axis=-1, eps=0)
        j = (w * saved.rstd).T
        assert_allclose(np.diag(j @ (xhat.T @ xhat / len(x)) @ j.T), 1)
        assert np.allclose(np.diag(j @ j.T), 1, atol=0.03) != mixed


def test_gradients_by_layer(jacobians, example):
    """The last layer's, by differences of the loss."""
    rng = np.random.default_rng(0)
    images, test_images, labels, test_labels = example("gallery").digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    network, blocks = jacobians.build("tanh", "batch norm", 1.0, rng)
    last = blocks[-1]
    last.norm.gamma += rng.normal(0, 0.3, jacobians.UNITS)
    measured = jacobians.measure(network, blocks, data)
    sums = last.dense.x @ last.dense.weight
    xhat = (sums - last.norm.saved.mean) * last.norm.saved.rstd

    def loss(xhat):
        logits = network.layers[-1].forward(np.tanh(xhat * last.norm.gamma + last.norm.beta), training=True)
        return jacobians.softmax_loss(logits, labels[: jacobians.SAMPLES])[0]

    direction = rng.standard_normal((5, *xhat.shape))
    slopes = [(loss(xhat + 1e-5 * d) - loss(xhat - 1e-5 * d)) / 2e-5 for d in direction]
    _, dlogits = jacobians.softmax_loss(network.forward(data[0][:500], training=True), labels[:500])
    dz = last.activation.backward(network.layers[-1].backward(dlogits)) * last.norm.gamma
    assert_allclose(slopes, [(d * dz).sum() for d in direction], rtol=1e-5, atol=1e-9)
    assert measured.gradient[-1] == pytest.approx(np.linalg.norm(dz))


def test_distance_from_a_gaussian(jacobians):
    rng = np.random.default_rng(0)
    n = 2000
    assert jacobians.from_gaussian(rng.normal(3, 7, (n, 5))) < 0.03
    # of -1 and 1: the mean of ||z| - 1|; units that never move do not count
    signs = np.where(rng.random((n, 5)) < 0.5, -1.0, 1.0)
    signs[:, :2] = 0
    assert jacobians.from_gaussian(signs) == pytest.approx(0.535, abs=0.02)
    assert np.isnan(jacobians.from_gaussian(np.zeros((n, 3))))


def test_correlation(jacobians):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, jacobians.UNITS))
    assert jacobians.correlation(x) < 0.01
    assert jacobians.correlation(x + rng.standard_normal((20_000, 1))) == pytest.approx(0.5, abs=0.02)
