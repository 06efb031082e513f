"""Santurkar et al.'s inequalities as the example checks them: by hand, by differences, with wrong gradients."""

import numpy as np
import pytest

import fastbn


@pytest.fixture
def bounds(example):
    return example("smoothness_bounds")


def test_claims(bounds, tmp_path, capsys):
    picture = tmp_path / "p.png"
    r = bounds.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4.4 as printed" in capsys.readouterr().out
    exact, usual, large = (r.steps[of] for of in ((0, 1), (1e-5, 1), (0, 10)))
    # Equalities without eps, 1e-15 and 4e-11 measured; slack of eps / variance with it
    assert np.abs(bounds.collected(exact, "slack")).max() < 1e-12
    assert np.abs(bounds.collected(exact, "second")).max() < 1e-8
    assert 1e-5 < bounds.collected(usual, "slack").max() < 1e-3
    assert (bounds.collected(usual, "slack") > -1e-12).all()
    assert bounds.collected(usual, "second").min() < -1e-6  # does not hold there, as the page says
    # What does not hold as it is read or printed
    assert np.mean(bounds.collected(large, "plain_slack") < 0) > 0.5
    assert (bounds.collected(exact, "root") < 0).all()
    assert (bounds.collected(exact, "printed") < 0).all()
    assert np.mean(bounds.collected(exact, "relaxed") < 0) > 0.3
    np.testing.assert_allclose(r.lemma.learnt, r.lemma.bound)
    assert r.lemma.gradient < 1e-10
    assert 0.3 < np.mean(r.lemma.constant > r.lemma.constant_bound * (1 + 1e-9)) < 0.7


@pytest.mark.parametrize("kept", ["mean", "yhat"])
def test_a_gradient_that_keeps_a_part_is_seen(bounds, example, monkeypatch, kept):
    """dx lacks one of batch norm's two projections: it is longer than theorem 4.1 allows."""
    backward = fastbn.batch_norm_backward

    def wrong(dy, saved):
        found = backward(dy, saved)
        yhat = (saved.x - saved.mean) * saved.rstd
        part = dy.mean(axis=0) if kept == "mean" else yhat * (dy * yhat).mean(axis=0)
        return found._replace(x=found.x + saved.rstd * part)

    monkeypatch.setattr(fastbn, "batch_norm_backward", wrong)
    images, _, labels, _ = example("gallery").digits()
    with pytest.raises(ArithmeticError, match=r"theorem 4\.1 fails"):
        bounds.train(0, 1, 3, 0, (images.astype(float), None, labels, None))


def test_theorems_by_hand(bounds):
    """L(z) = sum(c z^4): gradient and Hessian are known, and batch norm's derivatives are differences of the loss."""
    rng = np.random.default_rng(0)
    y, c, gamma, beta, m = rng.normal(2, 3, (9, 1)), rng.standard_normal((9, 1)), -1.7, 0.4, 9
    yhat, sigma = (y - y.mean()) / y.std(), y.std()
    z = gamma * yhat + beta
    g, hessian = 4 * c * z**3, 12 * c * z**2

    def loss(y):
        return (c * (gamma * (y - y.mean()) / y.std() + beta) ** 4).sum()

    def d_at(y):
        dz = 4 * c * (gamma * (y - y.mean()) / y.std() + beta) ** 3
        _, saved = fastbn.batch_norm(y, np.array([gamma]), np.array([beta]), channel_axis=-1, eps=0)
        return fastbn.batch_norm_backward(dz, saved).x

    d = np.array([loss(y + e) - loss(y - e) for e in 1e-5 * np.eye(m)[:, :, None]])[:, None] / 2e-5
    np.testing.assert_allclose(d_at(y), d, rtol=1e-6, atol=1e-8)
    square, by_mean, by_yhat = bounds.parts(g, yhat)
    assert (gamma / sigma) ** 2 * (square - by_mean - by_yhat) == pytest.approx((d**2).sum(), rel=1e-6)

    d = d_at(y)
    found = bounds.quadratic_form(d_at, y, 0, d[:, 0])
    along = (gamma / sigma) ** 2 * (hessian * d**2).sum()
    away = gamma / (m * sigma**2) * (g * yhat).sum() * (d**2).sum()
    assert abs(away) > 0.01 * abs(along)
    assert found == pytest.approx(along - away, rel=1e-8)
    # and as the loss itself curves
    h = 1e-3 / np.abs(d).max()
    curvature = (loss(y + h * d) - 2 * loss(y) + loss(y - h * d)) / h**2
    assert found == pytest.approx(curvature, rel=1e-4)


def test_best_directions_with_constant_gamma_and_beta(bounds):
    """By all angles: with batch norm it is that of the best weights beside a bias, not without one."""
    rng = np.random.default_rng(1)
    x = rng.normal((1, 0.5), 1, (40, 2))
    target = x @ [0.3, -0.8] + 0.7 + rng.normal(0, 0.1, 40)
    angles = np.linspace(-np.pi, np.pi, 20_001)
    y, _ = fastbn.batch_norm(x @ np.array([np.cos(angles), np.sin(angles)]), channel_axis=-1, eps=0)
    best = angles[((y - target[:, None]) ** 2).sum(axis=0).argmin()]
    with_bias = np.linalg.lstsq(x - x.mean(axis=0), target, rcond=None)[0]
    without = np.linalg.lstsq(x, target, rcond=None)[0]
    assert best == pytest.approx(np.arctan2(*with_bias[::-1]), abs=1e-3)
    assert abs(best - np.arctan2(*without[::-1])) > 0.1
