"""Least squares by length and direction: the bound of the paper holds, and batch norm gives the gradient."""

import numpy as np
import pytest

import fastbn


@pytest.fixture
def least_squares(example):
    return example("least_squares")


def test_claim(least_squares, tmp_path, capsys):
    picture = tmp_path / "p.png"
    results = least_squares.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "slowest direction" in capsys.readouterr().out
    for r in results:
        bound, plain, batch_norm = (r.missing[name] for name in ("bound", "plain", "batch norm"))
        assert (batch_norm <= bound * (1 + 1e-9)).all()
        assert (plain <= bound * (1 + 1e-9)).all()
        assert r.gradient_error < 1e-12
        slowness = (1 - np.array([r.rate("plain"), r.rate("batch norm"), r.theory])) * r.condition
        np.testing.assert_allclose(slowness[1], slowness[2], rtol=0.01)
        assert slowness[2] >= 1 - 1e-9
        if r.best == "slowest direction":
            np.testing.assert_allclose(slowness[0], 1, rtol=1e-4)
            assert r.needed("batch norm") < 0.8 * r.needed("plain")
        else:
            assert abs(r.needed("batch norm") / r.needed("plain") - 1) < 0.1


def with_eps(x, v):
    h, saved = fastbn.batch_norm((x @ v)[:, None], eps=0.1)
    return h[:, 0], saved


def with_constant_statistics(x, dh, saved):
    return x.T @ dh * saved.rstd[0]


@pytest.mark.parametrize(
    ("name", "broken"), [("normalized", with_eps), ("direction_gradient", with_constant_statistics)]
)
def test_broken_batch_norm_shows(least_squares, name, broken, monkeypatch):
    monkeypatch.setattr(least_squares, name, broken)
    with np.errstate(all="ignore"):  # it may diverge
        r = least_squares.descend(100, "random direction", 300, np.random.default_rng(0))
    assert not r.gradient_error < 1e-3


def test_gradient(least_squares):
    rng = np.random.default_rng(0)
    p = least_squares.problem(100, "random direction", rng)
    v, step = rng.standard_normal(least_squares.INPUTS), 1e-6
    _, _, gradient = least_squares.rayleigh(p, v)
    differences = [
        (least_squares.rayleigh(p, v - e)[0] ** 2 - least_squares.rayleigh(p, v + e)[0] ** 2) / (2 * step)
        for e in step * np.eye(len(v))
    ]
    np.testing.assert_allclose(gradient, differences, rtol=0, atol=1e-7 * np.abs(gradient).max())
    np.testing.assert_allclose(gradient, p.gradient(v), rtol=1e-12)


def test_a_step_points_where_plain_gradient_descent_points(least_squares):
    """So that the bound of gradient descent holds: the best length makes the error only smaller."""
    rng = np.random.default_rng(0)
    p = least_squares.problem(100, "random direction", rng)
    v = rng.standard_normal(least_squares.INPUTS)
    g, norm, gradient = least_squares.rayleigh(p, v)
    w = g * v / norm
    plain = w - (p.eigenvalues * w - p.u)
    stepped = v - norm**2 / (2 * g**2) * gradient
    np.testing.assert_allclose(
        stepped / np.linalg.norm(stepped), np.sign(g) * plain / np.linalg.norm(plain), rtol=1e-12
    )


def test_the_sample_has_exactly_these_eigenvalues(least_squares):
    p = least_squares.problem(1000, "slowest direction", np.random.default_rng(0))
    np.testing.assert_allclose(fastbn.mean(p.x, axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(p.x.T @ p.x / len(p.x), np.diag(p.eigenvalues), atol=1e-14)
    np.testing.assert_allclose(np.linalg.lstsq(p.x, p.y, rcond=None)[0], p.best, atol=1e-10)
