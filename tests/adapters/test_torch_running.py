"""Running statistics of `fastbn.torch` beside PyTorch's, and changes in place that PyTorch is told of."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402
from tests.adapters.torch_support import leaf  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")


def apart(mean, var):
    return mean, var


def of_one_storage(mean, var):
    return tuple(torch.stack([mean, var]))


def strided(mean, var):
    return tuple(torch.stack([t, t], 1)[:, 0] for t in (mean, var))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("lying", [apart, of_one_storage, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_running_statistics(monkeypatch, momentum, lying, dtype, grad):
    """The forward pass updates them, where that is what PyTorch does; PyTorch is told once."""
    calls, batch_norm = [], fastbn.batch_norm
    monkeypatch.setattr(fastbn, "batch_norm", lambda *a, **k: calls.append("running" in k) or batch_norm(*a, **k))
    x, found = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(grad), []
    for function in (ft.batch_norm, F.batch_norm):
        running = lying(torch.linspace(-1, 1, 3).to(dtype), torch.linspace(1, 2, 3).to(dtype))
        versions = [t._version for t in running]
        if function is F.batch_norm:  # which takes one dtype alone
            running = tuple(t.float() for t in running)
        function(x, *running, training=True, momentum=momentum)
        if function is ft.batch_norm:
            changes = 2 if lying is of_one_storage else 1  # which have one version
            assert [t._version for t in running] == [version + changes for version in versions]
        found.append([t.float() for t in running])
    assert calls == [0 < momentum < 1 and lying is not of_one_storage]
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_infinities_in_running_statistics():
    """At either end PyTorch multiplies the other side by 0."""
    for momentum in (0.0, 0.5, 1.0):
        running = [[torch.tensor([np.inf]), torch.tensor([np.inf])] for _ in range(2)]
        for (mean, var), function in zip(running, (ft.batch_norm, F.batch_norm), strict=True):
            function(torch.tensor([[1.0], [2.0]]), mean, var, training=True, momentum=momentum)
        for ours, theirs in zip(*running, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_changes_in_place_are_noticed():
    """Of what the backward pass needs; running statistics, written by NumPy, count as changed as well."""
    x, mean, var = leaf(4, 3), torch.zeros(3), torch.ones(3)
    h = x * 1
    y = ft.batch_norm(h, mean, var, training=True)
    h += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = ft.batch_norm(x, mean, var, training=False)
    ft.batch_norm(x, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("lying", [apart, of_one_storage])
def test_halves_move_by_the_whole_rate(lying):
    """1 - 0.1 is no bfloat16: rounded first, it would be 0.8984."""
    mean, var = lying(torch.ones(4), torch.tensor([1.1, 2.3, 33.3, 777.7]))
    mean, var = (t.bfloat16() for t in (mean, var)) if lying is apart else torch.stack([mean, var]).bfloat16()
    before, x = var.double(), torch.randn(50, 4) * 3
    ft.batch_norm(x, mean, var, training=True, momentum=0.1)
    expected = (0.9 * before + 0.1 * x.double().var(0)).bfloat16()
    torch.testing.assert_close(var, expected, rtol=0, atol=0)
