"""The noise of batches: groups are batches of their own, and the noise is theirs."""

import numpy as np
import pytest
from numpy.testing import assert_allclose


@pytest.fixture
def batch_noise(example):
    return example("batch_noise")


def test_claims(batch_noise, tmp_path, capsys):
    picture = tmp_path / "p.png"
    runs = batch_noise.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "less that of 192" in capsys.readouterr().out
    mean = {(name, size): np.mean(found, axis=0) for name, by in runs.items() for size, found in by.items()}
    for name in ("batch norm", "groups"):
        # 60, 20 and 0 % of the logits measured
        assert mean[name, 4][2] > 0.3 > mean[name, 32][2] > 0.1
        assert mean[name, 192][2] < 1e-5
        assert mean[name, 32][0] > 99
    assert max(mean["plain", size][2] for size in (4, 32, 192)) < 1e-5


def test_groups_are_batches(batch_noise, example):
    """Outputs and gradients are those of a batch norm for each group; inference has all samples' statistics."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((12, 3), dtype=np.float32) for _ in range(2))
    groups, whole = batch_noise.GroupBatchNorm(3, 4), example("network").BatchNorm(3)
    y, dx = groups.forward(x, training=True), groups.backward(dy)
    whole.forward(x, training=True)
    sums = np.zeros((2, 3))
    for part in np.split(np.arange(12), 3):
        alone = example("network").BatchNorm(3)
        assert_allclose(y[part], alone.forward(x[part], training=True), atol=1e-6)
        assert_allclose(dx[part], alone.backward(dy[part]), atol=1e-6)
        sums += alone.gradients["gamma"], alone.gradients["beta"]
    assert_allclose([groups.gradients["gamma"], groups.gradients["beta"]], sums, atol=1e-5)
    assert not np.allclose(y, whole.forward(x, training=True), atol=0.1)
    assert_allclose([groups.mean, groups.var], [0.1 * x.mean(axis=0), 0.9 + 0.1 * x.var(axis=0, ddof=1)], atol=1e-6)


def test_noise(batch_noise):
    x = np.random.default_rng(0).standard_normal((192, 64), dtype=np.float32)
    found = {
        name: [batch_noise.noise(batch_noise.build(name, size, np.random.default_rng(1)), x, np.random.default_rng(2))
               for size in (4, 192)]
        for name in ("plain", "groups")
    }  # fmt: skip
    assert found["groups"][0] > 0.2
    assert max(found["groups"][1], *found["plain"]) < 1e-5


def test_gaps_are_paired_by_seed(batch_noise):
    run = batch_noise.Run
    by_size = {4: [run(100, 95, 0), run(100, 90, 0)], 192: [run(100, 93, 0), run(90, 79, 0)]}
    mean, error = batch_noise.paired(by_size, 4)  # -2 and -1
    assert (mean, error) == pytest.approx((-1.5, 0.5))
    assert batch_noise.paired(by_size, 192) == (0, 0)


def test_samples_are_the_same_for_all(batch_noise, monkeypatch):
    """Batches cover the training samples once an epoch; the test has none of them."""
    seen, tested = [], []

    class Watched:
        layers = ()

        def loss(self, x, labels):
            seen.append(labels)

        def accuracy(self, x, labels):
            tested.append(labels)
            return 0.0

        def parameters(self):
            return []

        def gradients(self):
            return []

        def forward(self, x, training):
            return np.arange(len(x))

    monkeypatch.setattr(batch_noise, "build", lambda *_: Watched())
    numbers = np.arange(500)
    for name, size, count in (("batch norm", 64, 3), ("groups", 4, 1)):
        seen.clear(), tested.clear()
        batch_noise.train(name, size, 2 * count, 7, np.zeros((500, 1)), numbers)
        training, test = tested
        assert len(seen) == 2 * count
        for epoch in (seen[:count], seen[count:]):
            np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), training)
        assert len(training) == 192
        assert sorted([*training, *test]) == list(numbers)
