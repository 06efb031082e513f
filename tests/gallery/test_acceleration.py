"""The ablation of section 4.2.1: its settings differ in what they say, and a step is what they ask for."""

from itertools import islice

import numpy as np
import pytest


@pytest.fixture
def acceleration(example):
    return example("acceleration")


def test_claims(acceleration, tmp_path, capsys):
    picture = tmp_path / "p.png"
    runs = acceleration.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "all but shuffled" in capsys.readouterr().out
    (plain,), (normalized,), (everything,) = (runs[name] for name in ("plain", "batch norm", "all"))
    # 56, 77 and 91 % measured after ten steps, 93, 96 and 98 % after a hundred
    assert plain.accuracy[0] < normalized.accuracy[0] < everything.accuracy[0]
    assert plain.accuracy[-1] < normalized.accuracy[-1] < everything.accuracy[-1]
    steps = acceleration.figures(runs)["all"][0, 0]
    assert steps <= 60


def test_settings(acceleration):
    default, settings = acceleration.Setting(), acceleration.SETTINGS

    def differ(a, b):
        return {field for field in a._fields if getattr(a, field) != getattr(b, field)}

    changed = {name: differ(settings[name], default) for name in acceleration.CHANGES}
    assert list(changed.values()) == [{"rate"}, {"dropout"}, {"l2"}, {"halvings"}, {"shuffled"}]
    assert differ(settings["all"], default) == set().union(*changed.values())
    assert differ(settings["plain"], default) == {"norm"}
    for name, fields in changed.items():
        assert differ(settings[f"all but {name}"], settings["all"]) == fields
        assert not differ(settings[f"all but {name}"], default) & fields


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches(acceleration, shuffled):
    epoch = 5
    found = np.array(list(islice(acceleration.batches(310, shuffled, np.random.default_rng(0)), 3 * epoch)))
    epochs = [{frozenset(batch) for batch in found[i : i + epoch]} for i in range(0, 3 * epoch, epoch)]
    assert all(len(frozenset().union(*batches)) == epoch * acceleration.BATCH for batches in epochs)
    assert (epochs[0] == epochs[1] == epochs[2]) != shuffled
    assert (found[:epoch] != found[epoch : 2 * epoch]).any()  # in another order at least


def test_steps(acceleration, example, monkeypatch):
    """Rates fall by halves, and the L2 loss pulls weights, not gamma and beta."""
    network = acceleration.Network([example("network").Dense(1, 1, 0.0, np.random.default_rng(0))])
    dense = network.layers[0]
    dense.weight += 1
    monkeypatch.setattr(acceleration, "build", lambda *_: network)
    monkeypatch.setattr(network, "loss", lambda *_: None)
    monkeypatch.setattr(network, "accuracy", lambda *_: float(dense.weight[0, 0]))
    dense.gradients = {"weight": np.full((1, 1), 2.0), "bias": np.ones(1)}
    data = np.zeros((acceleration.BATCH, 1)), None, np.zeros(acceleration.BATCH), None
    setting = acceleration.Setting(rate=0.1, l2=0.5, halvings=2)
    acceleration.train(setting, 2, 0, data)
    rates = 0.1 * 0.5**1, 0.1 * 0.5**2
    weight = 1.0
    for rate in rates:
        weight -= rate * (2 + 0.5 * weight)
    assert dense.weight[0, 0] == pytest.approx(weight, rel=1e-6)
    assert dense.bias[0] == pytest.approx(-sum(rates), rel=1e-6)


def test_figures(acceleration):
    run = acceleration.Run(np.array([10, 20, 30, 40]), np.array([0.1, 0.5, 0.9, 0.8]))
    other = acceleration.Run(run.steps, np.array([0.2, 0.3, 0.4, 0.6]))
    found = acceleration.figures({"plain": [run, other], "all": [other, run]})  # goals: 0.8 and 0.6, not the best ones
    np.testing.assert_allclose(found["plain"], [(30, 90, 80), (40, 60, 60)])
    np.testing.assert_allclose(found["all"], [(np.inf, 60, 60), (30, 90, 80)])
