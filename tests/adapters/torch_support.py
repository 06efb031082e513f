"""What tests of `fastbn.torch` share: tensors, models and how close results are."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

import fastbn.torch as ft

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 4e-3}
"""Of the largest number; both round results once, PyTorch's float32 sums differ in the last bits."""


def assert_close(ours, theirs, dtype=None):
    """Within the tolerance of the dtype, or of the one that inputs had."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * CLOSE[dtype or ours.dtype])


def leaf(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.randn(*shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
    )


TANGENTS_CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
"""Of the largest number. Halves round a tangent up to three times."""


def assert_all_close(ours, theirs, dtype=None):
    """All tensors of two structures; a missing gradient is one of zeros."""
    ours, theirs = (tree_leaves(a, is_leaf=lambda leaf: leaf is None) for a in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
            continue
        assert a.shape == b.shape
        assert dtype is not None or a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=scale * TANGENTS_CLOSE[dtype or a.dtype])


class Block(nn.Module):
    """A residual block; with ``fused=False`` of PyTorch's modules alone."""

    def __init__(self, fused=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.end = nn.Conv2d(4, 4, 1), ft.BatchNormAct2d(4) if fused else nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.norm(self.conv(x))
        z = self.conv2(h)
        return F.relu(self.end(z) + h) if type(self.end) is nn.BatchNorm2d else self.end(z, h)


def pair():
    """A converted block, PyTorch's own with the same state, and an input."""
    ours, theirs = Block(), Block(fused=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ft.convert(ours), theirs, torch.randn(5, 3, 6, 6)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert_same(a, b)


CONVERTERS = {
    "ours": ft.SyncBatchNorm.convert_sync_batchnorm, "PyTorch's": nn.SyncBatchNorm.convert_sync_batchnorm,
}  # fmt: skip
