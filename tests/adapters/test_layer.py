"""`fastbn.BatchNorm` beside PyTorch's modules: a state dict goes both ways, and training goes on alike."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import fastbn  # noqa: E402

SHAPES = {nn.BatchNorm1d: (6, 3), nn.BatchNorm2d: (4, 3, 5, 2), nn.BatchNorm3d: (2, 3, 2, 3, 4)}
SETTINGS = {
    "as they are": ({}, {}),
    "eps and momentum": ({"eps": 0.1, "momentum": 0.3}, {"eps": 0.1, "rate": 0.3}),
    "cumulative average": ({"momentum": None}, {"rate": None}),
    "not affine": ({"affine": False}, {"affine": False}),
    "double": ({"dtype": torch.float64}, {"dtype": "float64"}),
}
by_settings = pytest.mark.parametrize("settings", SETTINGS)
by_kind = pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)


def pair(kind, settings, seed=0):
    """PyTorch's module with parameters of its own, and a layer."""
    torch.manual_seed(seed)
    theirs, ours = SETTINGS[settings]
    module, norm = kind(3, **theirs), fastbn.BatchNorm(3, **ours)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return module, norm


def batch(module, norm, seed):
    dtype = np.float64 if module.running_mean.dtype == torch.float64 else np.float32
    rng, shape = np.random.default_rng(seed), SHAPES[type(module)]
    return ((rng.standard_normal(shape) * 2 + 3).astype(dtype) for _ in range(2))


def close(module):
    return {"rtol": 0, "atol": 1e-12 if module.running_mean.dtype == torch.float64 else 2e-5}


def assert_alike(module, norm, seed):
    """Output, gradients, and all of the state after a step."""
    x, dy = batch(module, norm, seed)
    given = torch.from_numpy(x).requires_grad_()
    expected = module(given)
    module.zero_grad()
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(norm.forward(x), expected.detach().numpy(), **close(module))
    np.testing.assert_allclose(norm.backward(dy), given.grad.numpy(), **close(module))
    if norm.gamma is not None:
        for ours, theirs in ((norm.dgamma, module.weight.grad), (norm.dbeta, module.bias.grad)):
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), **close(module) | {"rtol": 2e-6})
    state = norm.state()
    assert list(state) == list(module.state_dict())
    for name, theirs in module.state_dict().items():
        assert state[name].shape == theirs.shape
        np.testing.assert_allclose(state[name], theirs.numpy(), **close(module), err_msg=name)


@by_settings
@by_kind
def test_from_pytorch(kind, settings):
    """After two steps of PyTorch's the layer takes over; then both train, and both evaluate."""
    module, norm = pair(kind, settings)
    for seed in (1, 2):
        module(torch.from_numpy(next(batch(module, norm, seed))))
    norm.load(module.state_dict())
    assert norm.batches == 2
    for name, theirs in module.state_dict().items():
        np.testing.assert_array_equal(norm.state()[name], theirs.numpy())
    assert_alike(module, norm, 3)
    assert_alike(module.eval(), norm.eval(), 4)
    assert_alike(module.train(), norm.train(), 5)


@by_settings
@by_kind
def test_to_pytorch(kind, settings):
    """Strictly: PyTorch finds all the names that it wants, and no others."""
    module, norm = pair(kind, settings)
    norm.load(module.state_dict())
    for seed in (1, 2):
        norm.forward(next(batch(module, norm, seed)))
    other, _ = pair(kind, settings, seed=9)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in norm.state().items()})
    assert other.num_batches_tracked == 2
    for name, theirs in other.state_dict().items():
        np.testing.assert_array_equal(theirs.numpy(), norm.state()[name].astype(theirs.numpy().dtype))
    assert_alike(other, norm, 3)
    assert_alike(other.eval(), norm.eval(), 4)


def test_a_layer_within_a_model():
    """Its names have a prefix there."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = model.state_dict()
    norm = fastbn.BatchNorm(4).load({n.removeprefix("1."): t for n, t in state.items() if n.startswith("1.")})
    norm.forward(np.random.default_rng(0).standard_normal((2, 4, 5), np.float32))
    state |= {f"1.{name}": torch.from_numpy(array) for name, array in norm.state().items()}
    model.load_state_dict(state)
    np.testing.assert_array_equal(model[1].running_mean.numpy(), norm.mean.astype(np.float32))


def test_frozen_statistics():
    """As a module that is evaluated within a model that trains."""
    module, norm = pair(nn.BatchNorm2d, "as they are")
    module(torch.from_numpy(next(batch(module, norm, 1))))
    norm.load(module.state_dict())
    norm.frozen = True
    assert norm.training
    assert_alike(module.eval(), norm, 2)


@pytest.mark.parametrize(("tensor", "message"), [
    (torch.ones(3, requires_grad=True), "requires grad"), (torch.ones(3, dtype=torch.bfloat16), "BFloat16"),
])  # fmt: skip
def test_tensors_that_numpy_cannot_read(tensor, message):
    """PyTorch's reason, and whose it is."""
    norm = fastbn.BatchNorm(3)
    with pytest.raises(TypeError, match=rf"state\['bias'\]: expected an array for numpy, got <class 'torch.*{message}"):
        norm.load(norm.state() | {"weight": np.full(3, 2.0), "bias": tensor})
    np.testing.assert_array_equal(norm.gamma, np.ones(3))
