"""Ioffe & Szegedy's experiments in their short form: what they show holds, and would not without normalization."""

from itertools import islice

import numpy as np
import pytest

import fastbn


@pytest.fixture
def digits(example):
    return example("digits")


@pytest.fixture
def data(example):
    return example("gallery").digits()


@pytest.mark.slow
def test_digits(digits, data, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    results = digits.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "batch norm x30" in capsys.readouterr().out

    # After 200 steps the plain network has learnt nothing at any rate; neither would one whose batch norm does nothing.
    _, images, _, labels = data
    for (name, _), run in results.rates.items():
        logits, accuracy = run.network.forward(images), run.network.accuracy(images, labels)
        if name == digits.PLAIN:
            assert accuracy < 0.5
            continue
        assert accuracy > 0.9
        without_batch_norm = digits.folded(run.network)
        assert not any(isinstance(layer, digits.BatchNorm) for layer in without_batch_norm.layers)
        same = without_batch_norm.forward(images)
        # float32 rounding through four layers; 1e-6 measured
        np.testing.assert_allclose(same, logits, rtol=0, atol=1e-5 * np.abs(logits).max())

    # A sigmoid's input is spread from the start with batch norm; all samples are alike to the plain one, at first.
    spread = {name: np.ptp(results.rates[name, 10].percentiles[:, 0]) for name in (digits.PLAIN, digits.NORMALIZED)}
    assert spread[digits.NORMALIZED] > 10 * spread[digits.PLAIN]

    # Initial weights of 0.01 and of 10: batch norm learns from both.
    for (name, _), by_scale in results.scales.items():
        for (run,) in by_scale.values():
            assert run.late() > 0.85 if name == digits.NORMALIZED else run.late() < 0.5

    # Batch norm does without dropout, which slows it; 50 % has not reached 90 % after 200 steps.
    slower = results.variants[digits.NORMALIZED, 10]
    assert slower["no dropout"][0].steps_to(0.9) < slower["dropout 50 %"][0].steps_to(0.9)


def test_without_normalization(digits, data, monkeypatch):
    """An affine map in batch norm's place learns no more than the plain network."""

    def forward(layer, x, training):
        layer.x = x
        return x * layer.gamma + layer.beta

    def backward(layer, dy):
        layer.gradients = {"gamma": (dy * layer.x).sum(axis=0), "beta": dy.sum(axis=0)}
        return dy * layer.gamma

    monkeypatch.setattr(digits.BatchNorm, "forward", forward)
    monkeypatch.setattr(digits.BatchNorm, "backward", backward)
    assert digits.train(digits.NORMALIZED, 1, 200, 0, data).late() < 0.5


def test_batches(digits):
    epoch = 3
    fresh, fixed = (
        np.array(list(islice(digits.batches(200, np.random.default_rng(0), fresh), 2 * epoch)))
        for fresh in (True, False)
    )
    np.testing.assert_array_equal(fresh[:epoch], fixed[:epoch])
    np.testing.assert_array_equal(fixed[:epoch], fixed[epoch:])
    assert (fresh[:epoch] != fresh[epoch:]).any()
    for batches in (fresh[:epoch], fresh[epoch:]):
        assert len(np.unique(batches)) == epoch * digits.BATCH


def test_population_statistics(digits, data):
    """Of equal mini-batches: the mean of all samples, and the mean of the batches' unbiased variances."""
    images = data[0]
    network = digits.build(digits.NORMALIZED, 0.1, np.random.default_rng(0))
    digits.use_population_statistics(network, images)
    dense, norm, *_ = network.layers
    sums = (images[: len(images) // digits.BATCH * digits.BATCH] @ dense.weight).astype(np.float64)
    by_batch = sums.reshape(-1, digits.BATCH, sums.shape[1])
    np.testing.assert_allclose(norm.mean, sums.mean(axis=0), rtol=0, atol=1e-6)  # float32 products
    np.testing.assert_allclose(norm.var, by_batch.var(axis=1, ddof=1).mean(axis=0), rtol=1e-5)
    # Deeper layers see what training gives: their inputs have batch norm's statistics of the batch.
    _, second, *_ = (layer for layer in network.layers if isinstance(layer, digits.BatchNorm))
    hidden = [digits.Sigmoid().forward(fastbn.batch_norm(x)[0], True) @ network.layers[3].weight for x in by_batch]
    np.testing.assert_allclose(second.mean, np.mean(hidden, axis=(0, 1)), rtol=0, atol=1e-5)
