"""The landscape of the loss, as measured by the example: its layers by finite differences, and the paper's claims."""

import numpy as np
import pytest


@pytest.mark.slow
def test_claims(example, tmp_path, capsys):
    picture = tmp_path / "landscape.png"
    landscape = example("landscape")
    runs = landscape.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "l infinity" in capsys.readouterr().out

    late = (landscape.Run(*(values[-3:] for values in run)) for run in runs.values())  # the first step is too early
    figures = {name: np.array(landscape.figures(run, 0, np.inf)[:3]) for name, run in zip(runs, late, strict=True)}
    for name in ("batch norm", "l1", "l2", "l1 centred", "l2 centred"):
        # Range of the loss, change of the gradient, smoothness: at most 0.11, 0.37 and 0.55 times plain measured.
        assert (figures[name] < figures["plain"] * (0.2, 0.5, 0.7)).all()
        assert runs[name].accuracy.max() > 0.93
    assert figures["l infinity"][2] > 0.7 * figures["plain"][2]  # does not show there, as the example says
    # The same formula but for eps, which batch norm has within the root.
    np.testing.assert_allclose(figures["l2 centred"], figures["batch norm"], rtol=0.3)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_lp_norm(example, p, centred):
    rng = np.random.default_rng(0)
    layer = example("landscape").LpNorm(3, p, centred)
    layer.gamma, layer.beta, x, dy = (rng.standard_normal(s) for s in (3, 3, (4, 2, 2, 3), (4, 2, 2, 3)))
    x += 0.3
    z = x - x.mean(axis=(0, 1, 2))
    size = abs(z if centred else x).reshape(-1, 3)
    divisor = size.max(axis=0) if p == np.inf else (size**p).mean(axis=0) ** (1 / p)
    y = z / (divisor + 1e-5) * layer.gamma + layer.beta
    np.testing.assert_allclose(layer.forward(x, training=True), y)

    gradients = [layer.backward(dy), layer.gradients["gamma"], layer.gradients["beta"]]
    for array, gradient in zip((x, layer.gamma, layer.beta), gradients, strict=True):
        for i in np.ndindex(array.shape):
            value, losses = array[i], []
            for array[i] in (value + 1e-6, value - 1e-6):
                losses.append((layer.forward(x, training=True) * dy).sum())
            array[i] = value
            assert gradient[i] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-6)


def test_lp_norm_of_centred_channels_is_batch_norm(example):
    x = np.random.default_rng(0).standard_normal((64, 8, 8, 4), dtype=np.float32) * 3
    x -= x.mean(axis=(0, 1, 2))
    for centred in (False, True):
        lp, batch_norm = example("landscape").LpNorm(4, 2, centred), example("network").BatchNorm(4)
        for training in (True, False):
            for _ in range(100):  # the running averages have arrived
                y, same = (layer.forward(x, training) for layer in (lp, batch_norm))
            np.testing.assert_allclose(y, same, rtol=1e-3, atol=1e-4)
    assert y.dtype == lp.backward(y).dtype == np.float32


def test_look_ahead_on_a_parabola(example):
    landscape = example("landscape")

    class Parabola:
        """``L = 3 |w|^2 / 2``: its gradient 3 w changes by 3 times the distance."""

        def __init__(self):
            self.w = np.array([3.0, 4.0])

        def loss(self, x, labels):
            self.g = 3 * self.w
            return 1.5 * self.w @ self.w

        def parameters(self):
            return [self.w]

        def gradients(self):
            return [self.g]

    network = Parabola()
    loss, losses, changes, smoothness = landscape.look_ahead(network, None, None)
    assert loss == 37.5
    np.testing.assert_allclose(losses, 37.5 * (1 - 3 * landscape.LENGTHS) ** 2)
    np.testing.assert_allclose(changes, 45 * landscape.LENGTHS)
    np.testing.assert_allclose(smoothness, 3)
    assert network.w.tolist() == [3, 4]
