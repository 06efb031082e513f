"""A bias before a normalisation: what the gradient through the statistics is, and what it is without."""

import numpy as np
import pytest
from numpy.testing import assert_allclose


@pytest.fixture
def growth(example):
    return example("bias_growth")


def test_claims(growth, tmp_path, capsys):
    picture = tmp_path / "p.png"
    r = growth.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "outside, old" in capsys.readouterr().out
    for norm in (growth.CENTRED, growth.SCALED):
        outside = r.alone[norm, growth.OUTSIDE]
        assert_allclose(outside.norms, outside.norms[0] * np.arange(1, 201))  # linear, and the loss
        assert_allclose(outside.losses, outside.losses[0])
        assert outside.norms[-1] > 10
        assert r.alone[norm, growth.INSIDE].norms[-1] < 1e-12
    changes = dict(r.rounded)
    assert changes[1] < 1e-5
    assert changes[1e9] > 0.1  # float32 has lost the inputs
    for norm, rate in ((growth.CENTRED, 0.1), (growth.SCALED, 1.0)):
        (inside,), (outside,) = (r.runs[norm, kind, rate] for kind in (growth.INSIDE, growth.OUTSIDE))
        assert inside.bias[-1] < 1e-12
        assert outside.bias[-1] > max(0.3, 1.5 * outside.bias[4])


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("kind", ["inside", "outside"])
def test_gradients(growth, kind, scales):
    """Central differences, of statistics that move with the input or that stand still."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, (6, 3)), rng.standard_normal((6, 3))
    layer = growth.Normalization(3, kind, scales)
    layer.forward(x, training=True)
    mean, std = x.mean(axis=0), x.std(axis=0)
    gradient = layer.backward(dy)

    def value(x):
        moved = kind == "inside"
        centre, scale = (x.mean(axis=0), x.std(axis=0)) if moved else (mean, std)
        return (dy * (x - centre) / (np.sqrt(scale**2 + 1e-5) if scales else 1)).sum()

    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = 1e-6
        assert gradient[i] == pytest.approx((value(x + e) - value(x - e)) / 2e-6, rel=1e-5, abs=1e-8)
    assert (np.abs(gradient.sum(axis=0)).max() < 1e-12) == (kind == "inside")


def test_a_gradient_inside_that_is_not_is_seen(growth, example, monkeypatch):
    """Centring alone, whose gradient is sent back as it came."""
    images, _, labels, _ = example("gallery").digits()
    backward = example("exact").ExactBatchNorm.backward
    monkeypatch.setattr(growth.Normalization, "backward", backward)
    found = growth.only_bias(growth.INSIDE, False, 20, 0, images[:60].astype(float), labels[:60])
    with pytest.raises(ArithmeticError, match="does not grow as it should"):
        growth.check(growth.INSIDE, found)


def test_a_loss_that_changes_is_seen(growth):
    steps = np.arange(1, 11.0)
    growth.check(growth.OUTSIDE, growth.Alone(steps, np.ones(10)))
    with pytest.raises(ArithmeticError, match="the loss has changed"):
        growth.check(growth.OUTSIDE, growth.Alone(steps, 1 - steps / 1e6))
    with pytest.raises(ArithmeticError, match="does not grow"):
        growth.check(growth.OUTSIDE, growth.Alone(steps**0.99, np.ones(10)))


def test_the_gradient_of_the_bias_is_that_of_beta(growth, example):
    """But for gamma / deviation, where statistics are constants."""
    images, _, labels, _ = example("gallery").digits()
    network = growth.build(growth.BETA, True, 0)
    network.loss(images[:60].astype(float), labels[:60])
    dense, norm, *_ = network.layers
    factor = norm.gamma / np.sqrt(norm.var + 1e-5)
    assert_allclose(dense.gradients["bias"], factor * norm.gradients["beta"])
