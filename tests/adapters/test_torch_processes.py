"""Synchronised batch norm of `fastbn.torch` in several processes."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from tests import interpreters  # noqa: E402
from tests.adapters.torch_support import assert_close, leaf  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

PROGRAM = """
import sys, torch, torch.distributed as dist, fastbn.torch as ft
rank, sizes, address, folder = int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(sizes))
torch.manual_seed(0)
x, dy = torch.randn(2, sum(sizes), 3, 4, 4)
mine = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
norm = ft.convert(torch.nn.SyncBatchNorm(3))
with torch.no_grad():
    norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
part = x[mine].clone().requires_grad_()
y = norm(part)
y.backward(dy[mine])
torch.save([y.detach(), part.grad, norm.weight.grad, norm.bias.grad, norm.state_dict()], f"{folder}/{rank}")
dist.destroy_process_group()  # its threads end before Python does
"""


@pytest.mark.parametrize("sizes", [(3, 5), (4, 0, 2)], ids=str)
def test_sync_batch_norm(sizes, tmp_path):
    """On the CPU, over batches that differ in size and one that is empty: as one process with all."""
    address = f"file://{tmp_path / 'meet'}"
    arguments = [",".join(map(str, sizes)), address, tmp_path]
    commands = [interpreters.python(PROGRAM, rank, *arguments) for rank in range(len(sizes))]
    interpreters.end(*map(interpreters.begin, commands), timeout=120)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(len(sizes))]

    torch.manual_seed(0)
    x, dy = torch.randn(2, sum(sizes), 3, 4, 4)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    assert_close(torch.cat([r[0] for r in ranks]), y.detach())
    assert_close(torch.cat([r[1] for r in ranks]), x.grad)
    assert_close(sum(r[2] for r in ranks), norm.weight.grad)
    assert_close(sum(r[3] for r in ranks), norm.bias.grad)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(ranks[0][4][name], value)
        assert all(torch.equal(r[4][name], ranks[0][4][name]) for r in ranks), "the same bits on every rank"


def test_sync_batch_norm_alone():
    ours, theirs = ft.SyncBatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert_close(ours(x), theirs(x))
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_double_backward_of_a_group_is_refused(monkeypatch):
    """Its second derivatives would need another exchange."""
    from fastbn.torch import sync

    monkeypatch.setattr(sync, "torch_gather", lambda group: lambda vector: vector[None])
    x = leaf(4, 3)
    y = sync.synchronised(x, None, None, None, None, 0.1, 1e-5, None)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("affine", [None, (torch.float64, torch.float64), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (9, 3)], ids=str)
def test_gradients_of_a_group(shape, activation, with_residual, affine, monkeypatch):
    """Of one process, with all that is fused; each gradient in its parameter's dtype."""
    from fastbn.torch import sync

    monkeypatch.setattr(sync, "torch_gather", lambda group: lambda vector: vector[None])
    x, residual, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    parameters = [None, None] if affine is None else [torch.rand(3, dtype=kind) + 0.5 for kind in affine]

    def run(call, *given):
        given = [None if t is None else t.clone().requires_grad_() for t in given]
        call(*given).backward(dy)
        return [None if t is None else t.grad for t in given]

    def theirs(x, weight, bias, residual):
        weight, bias = (None if t is None else t.double() for t in (weight, bias))
        y = nn.functional.batch_norm(x, None, None, weight, bias, True)
        y = y if residual is None else y + residual
        return y if activation is None else nn.functional.relu(y)

    def ours(x, weight, bias, residual):
        return sync.synchronised(x, None, None, weight, bias, 0.1, 1e-5, None, residual=residual, activation=activation)

    given = x, *parameters, residual if with_residual else None
    for found, expected in zip(run(ours, *given), run(theirs, *given), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_bias_that_changed_before_the_backward_pass(monkeypatch):
    """Relu's gradient reads it, so PyTorch refuses, as for every tensor that was saved."""
    from fastbn.torch import sync

    monkeypatch.setattr(sync, "torch_gather", lambda group: lambda vector: vector[None])
    x, weight, bias = leaf(4, 3), torch.ones(3), torch.zeros(3)
    y = sync.synchronised(x, None, None, weight, bias, 0.1, 1e-5, None, activation="relu")
    bias.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
