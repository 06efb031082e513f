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
