"""Internal covariate shift, as measured by the example: against formulas by hand, and the paper's claims."""

from functools import partial

import numpy as np
import pytest


@pytest.mark.slow
def test_claims(example, tmp_path, capsys):
    picture = tmp_path / "covariate_shift.png"
    vggs, linear = example("covariate_shift").main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain, normalized, noisy = vggs.values()

    # As good with noise as without; 65, 98 and 97 % measured.
    assert plain.quality.max() < 0.8
    assert normalized.quality.max() > 0.95
    assert noisy.quality.max() > 0.9
    # and less stable than the plain network: 0.001, 0.09 and 0.28 measured
    moved = [np.median(run.moved) for run in (normalized, plain, noisy)]
    assert moved[0] * 10 < moved[1] < moved[2] / 2

    distance, cosine = (np.array([np.median(run.shift[..., i], axis=0) for run in linear.values()]) for i in (0, 1))
    assert (cosine[1] < cosine[0]).all()
    assert (distance[1] > 10 * distance[0]).sum() > 20  # of 24 layers
    assert "24 of 24 layers by the cosine" in capsys.readouterr().out


def test_shift_of_two_layers(example):
    shift, layers = example("covariate_shift"), example("network")
    rng = np.random.default_rng(0)
    network = layers.Network(layers.Dense(*shape, 1.0, rng, bias=False) for shape in ((4, 3), (3, 2)))
    x, target = rng.standard_normal((5, 4)), rng.standard_normal((5, 2))
    v, w = (parameter.astype(float) for parameter in network.parameters())

    def gradient(v):
        error = x @ v @ w - target
        return (x @ v).T @ error / 5, x.T @ error @ w.T / 5

    g, dv = gradient(v)
    moved, _ = gradient(v - 0.1 * dv)
    found = shift.covariate_shift(network, 0.1, partial(shift.squared_error, x=x, target=target))
    cosine = (g * moved).sum() / np.linalg.norm(g) / np.linalg.norm(moved)
    np.testing.assert_allclose(found, [(np.linalg.norm(g - moved), cosine)], rtol=1e-5)
    np.testing.assert_array_equal(network.parameters()[0], v)  # only a copy has moved


def test_no_step_no_shift(example):
    shift, layers = example("covariate_shift"), example("network")
    rng = np.random.default_rng(0)
    network = layers.vgg(lambda channels: [layers.BatchNorm(channels), layers.Noise(*rng.spawn(1))], rng)
    images, labels = rng.random((8, 8, 8, 1), dtype=np.float32), np.arange(8)
    found = shift.covariate_shift(network, 0.0, partial(layers.Network.loss, x=images, labels=labels))
    np.testing.assert_allclose(found, [(0, 1)] * 4, atol=1e-12)  # the noise is the same, too


def test_noise(example):
    x = np.random.default_rng(0).standard_normal((5000, 3))
    y, zeros, ones = (
        (noise := example("network").Noise(np.random.default_rng(1))).forward(values, training=True)
        for values in (x, 0 * x, 0 * x + 1)
    )
    scale = ones - zeros
    np.testing.assert_allclose(y, scale * x + zeros)
    np.testing.assert_allclose(noise.backward(x), scale * x)
    assert (abs(zeros.mean(axis=0)) < 0.51).all()
    assert (abs(zeros.mean(axis=0)) > 0.01).any()
    np.testing.assert_allclose(zeros.std(axis=0), 0.2 / 12**0.5, rtol=0.05)
    assert ((scale.mean(axis=0) > 0.99) & (scale.mean(axis=0) < 1.26)).all()
    np.testing.assert_allclose(scale.std(axis=0), 0.1, rtol=0.05)
    np.testing.assert_allclose(noise.forward(x, training=False), 1.125 * x)
