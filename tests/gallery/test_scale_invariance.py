"""Scale invariance: the derivatives by finite differences, growth by Pythagoras, and what a wrong gradient does."""

import numpy as np
import pytest

import fastbn


@pytest.fixture
def scale(example):
    return example("scale_invariance")


def test_claims(scale, tmp_path, capsys):
    picture = tmp_path / "p.png"
    r = scale.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "eps 1e-05" in capsys.readouterr().out
    assert r.errors[0].max() < 1e-13  # 2e-15 measured
    assert r.errors[1e-5][0].min() > 0.9  # a = 1e-4: eps is all there is
    assert r.errors[1e-5][-1].max() < 1e-10
    assert r.same < 1e-10
    # At a rate of 1000 free weights grow and learn; held ones do not, nor does the plain network.
    (free,), (held,), (plain,) = (r.runs[name][1000.0] for name in (scale.FREE, scale.HELD, scale.PLAIN))
    assert free.accuracy > 0.85 > 0.5 > max(held.accuracy, plain.accuracy)
    assert (free.squares[-1] > 1000 * free.squares[0]).all()
    np.testing.assert_allclose(held.squares[-1], held.squares[0])


def test_derivatives(scale):
    """The whole Jacobians, for each of the weights and inputs, by central differences."""
    rng = np.random.default_rng(0)
    w, u, dy = rng.standard_normal((3, 2)), rng.standard_normal((5, 3)), rng.standard_normal((5, 2))
    for a in (1, 7):
        scaled = a * w
        y, du, dw = scale.normalized(scaled, u, dy, 0)
        x = u @ w
        np.testing.assert_allclose(y, (x - x.mean(axis=0)) / x.std(axis=0))
        for array, gradient in ((u, du), (scaled, dw)):
            for i in np.ndindex(array.shape):
                value, sums = array[i], []
                for array[i] in (value + 1e-5, value - 1e-5):
                    sums.append((scale.normalized(scaled, u, dy, 0)[0] * dy).sum())
                array[i] = value
                assert gradient[i] == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_gradient_with_constant_statistics_is_seen(scale, example, monkeypatch):
    """It would not be orthogonal to the weights."""
    monkeypatch.setattr(fastbn, "batch_norm_backward", constants(fastbn.batch_norm_backward))
    images, test_images, labels, test_labels = example("gallery").digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    with pytest.raises(ArithmeticError, match="not the sum of squares"):
        scale.train(scale.FREE, 1.0, 5, 0, data)


def constants(backward):
    def wrong(dy, saved):
        return backward(dy, saved)._replace(x=dy * saved.rstd)

    return wrong
