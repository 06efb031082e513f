"""Inference by the batch's statistics, by the population's, and folded: `examples/folding.py`."""

import numpy as np
import pytest


@pytest.fixture
def folding(example):
    return example("folding")


@pytest.mark.slow
def test_claims(folding, tmp_path, capsys):
    picture = tmp_path / "folding.png"
    result = folding.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "logits change" in capsys.readouterr().out

    # By the batch's statistics the same images are recognised or not, as others are asked with them: 0.70 to 0.97.
    assert min(result.own["sorted by digit"]) < 0.85
    assert min(result.own["sorted by digit"]) < min(result.own["mixed digits"][1:]) - 0.1
    assert result.own["sorted by digit"][-1] == result.own["mixed digits"][-1] > 0.93  # one batch of all

    assert result.population > 0.93
    assert result.folded == result.population
    assert 0 < result.change < 1e-5  # float32 rounding through five layers; 3e-7 measured

    for networks in result.ms.values():
        assert networks["population"]["batch norm"] > networks["folded"]["batch norm"] == 0
        assert networks["population"]["relu"] > networks["fused"]["relu"] == 0


def test_population(folding):
    """Algorithm 2 by its formula, of the first layer, which sees the same in every order."""
    rng = np.random.default_rng(0)
    images = rng.random((40, 8, 8, 1), dtype=np.float32)
    network = folding.vgg(lambda channels: [folding.BatchNorm(channels)], rng)
    folding.set_population(network, np.split(images, 4))
    sums = [network.layers[0].forward(part, False).reshape(-1, 16).astype(np.float64) for part in np.split(images, 4)]
    np.testing.assert_allclose(network.layers[1].mean, np.mean([x.mean(axis=0) for x in sums], axis=0), atol=1e-6)
    np.testing.assert_allclose(network.layers[1].var, np.mean([x.var(axis=0, ddof=1) for x in sums], axis=0), rtol=1e-5)


def test_the_same_answers(folding):
    """With every parameter and statistic away from 0 and 1; fusing relu changes no bit."""
    rng = np.random.default_rng(0)
    network = folding.vgg(lambda channels: [folding.BatchNorm(channels)], rng)
    for layer in network.layers:
        if isinstance(layer, folding.BatchNorm):
            for name in ("gamma", "beta", "mean", "var"):
                setattr(layer, name, rng.uniform(0.5, 2, layer.gamma.shape).astype(np.float32))
    images = rng.random((5, 8, 8, 1), dtype=np.float32)
    logits, folded = network.forward(images), folding.folded(network)
    assert len(folded.layers) == len(network.layers) - 4
    np.testing.assert_allclose(folded.forward(images), logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(folding.fused(network).forward(images), logits)
    np.testing.assert_array_equal(network.forward(images), logits)  # which is left as it was
