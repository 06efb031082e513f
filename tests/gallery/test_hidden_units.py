"""Hidden units one after another: directions lie on the line where the derivation says so, and not elsewhere."""

import numpy as np
import pytest


@pytest.fixture
def hidden_units(example):
    return example("hidden_units")


@pytest.mark.slow
def test_claim(hidden_units, tmp_path, capsys):
    picture = tmp_path / "p.png"
    r = hidden_units.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "kept on the line" in capsys.readouterr().out
    first = r.rounds["from 0"]
    for norms in first.norms:
        assert norms[-1] < 1e-3 * norms[0]
    assert (first.angles[0] < 8).all()  # 2 to 4 measured, with 4000 samples
    assert r.spread < 0.5  # all random starts find the same direction
    assert r.rounds["from random directions"].angles[0].max() > 30
    few, many = ({kind: np.median(angles[size]) for kind, angles in r.angles.items()} for size in (0, -1))
    for kind in ("others 0", "others on the line", "the same, to the span"):
        assert many[kind] < 0.5 * few[kind]  # 16 times the samples
        assert many[kind] < 3
    assert many["others elsewhere"] > 8


def test_broken_batch_norm_shows(hidden_units, example, monkeypatch):
    sample = hidden_units.gaussian_classes(5000, 5, 5, 0.5, np.random.default_rng(0))
    others, v = np.zeros((1, 5)), np.random.default_rng(1).standard_normal(5)
    w, _ = hidden_units.optimise(sample, others, v)
    assert sample.angle(w, sample.line) < 4
    monkeypatch.setattr(example("gdnp"), "direction_gradient", lambda x, dh, saved: x.T @ dh)  # not divided by ||v||_S
    with np.errstate(all="ignore"):
        w, _ = hidden_units.optimise(sample, others, v)
        assert not sample.angle(w, sample.line) < 4


@pytest.fixture
def network(hidden_units):
    """A large sample, and units in no special directions."""
    rng = np.random.default_rng(0)
    sample = hidden_units.gaussian_classes(100_000, 5, 5, 0.5, rng)
    return sample, np.array([sample.weights(rng.standard_normal(5), g) for g in (1.5, -0.7, 1)])


def test_derivatives_of_the_loss(hidden_units):
    a, step, others = np.linspace(-4, 4, 101), 1e-5, np.linspace(1, -2, 101)
    loss = hidden_units.loss_of_unit(others)

    def value(a):
        return np.logaddexp(0, -others - np.tanh(a))

    np.testing.assert_allclose(loss.first(a), (value(a + step) - value(a - step)) / (2 * step), atol=1e-9)
    np.testing.assert_allclose(loss.second(a), (loss.first(a + step) - loss.first(a - step)) / (2 * step), atol=1e-9)


def test_gradient_of_a_unit(hidden_units, network):
    sample, units = network
    step = 1e-5

    def loss_with(w):
        return np.mean(np.logaddexp(0, -hidden_units.output(sample, np.vstack([w, units[1:]]))))

    differences = [(loss_with(units[0] + e) - loss_with(units[0] - e)) / (2 * step) for e in step * np.eye(5)]
    loss = hidden_units.loss_of_unit(hidden_units.output(sample, units[1:]))
    np.testing.assert_allclose(sample.gradient(loss.first(sample.margins(units[0]))), differences, atol=1e-9)


def test_gradient_by_stein(hidden_units, network):
    """The docstring's formula, to the errors of the sample."""
    sample, units = network
    u, S = sample.u, sample.S
    t = np.tanh(sample.y[:, None] * (sample.x @ units.T))
    falling = 1 / (1 + np.exp(t.sum(axis=1)))
    for i in range(3):
        loss = hidden_units.loss_of_unit(t.sum(axis=1) - t[:, i])
        a = sample.margins(units[i])
        M = [np.mean(falling * (1 - falling) * (1 - t[:, j] ** 2) * (1 - t[:, i] ** 2)) for j in range(3)]
        M[i] = np.mean(loss.second(a))
        gradient = np.mean(loss.first(a)) * u + (S - np.outer(u, u)) @ (M @ units)
        np.testing.assert_allclose(sample.gradient(loss.first(a)), gradient, atol=0.003)  # 1 / sqrt(n)
        assert np.abs(gradient).max() > 0.03


def test_the_line_is_a_saddle():
    """Four equal units of the best length, on the line: the docstring's eigenvalues of M, by quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(200)
    z, weights = np.sqrt(0.5) + np.sqrt(0.5) * x, weights / weights.sum()

    def means(g):
        t = np.tanh(g * z)
        s = 1 / (1 + np.exp(4 * t))
        slope = -weights @ (s * (1 - t**2) * z)
        return slope, weights @ (2 * s * t * (1 - t**2)), weights @ (s * (1 - s) * (1 - t**2) ** 2)

    low, high = 0.1, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if means(middle)[0] < 0 else (low, middle)
    _, apart, alike = means(low)
    assert abs(apart + 0.001) < 1e-4
    assert abs(apart + 4 * alike - 0.33) < 0.01
