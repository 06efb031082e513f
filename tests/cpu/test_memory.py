"""Memory of large results, which is used again, and what is written past the caches."""

import numpy as np
import pytest

import fastbn
from fastbn import cpu
from fastbn.cpu import memory


def test_freed_buffers_serve_again_and_used_ones_never():
    from fastbn.cpu import memory

    memory._kept.clear()
    like = np.empty((9, 1 << 20), np.float32)
    first = memory.empty_like(like)
    assert first.ctypes.data % 64 == 0
    view = first[2:, ::2]
    place = first.ctypes.data
    del first
    second = memory.empty_like(like)
    assert not np.shares_memory(second, view)
    del view
    third = memory.empty_like(like)
    assert third.ctypes.data == place
    assert third.shape == like.shape
    smaller = memory.empty_like(like[:8])
    del second, third
    assert sum(b.nbytes for b in memory._kept.values()) <= memory.KEPT_BYTES
    del smaller


def test_kept_buffers_are_bounded(monkeypatch):
    from fastbn.cpu import memory

    monkeypatch.setattr(memory, "MAPPED", 1 << 20)
    monkeypatch.setattr(memory, "KEPT_BYTES", 20 << 20)
    memory._kept.clear()
    arrays = [memory.empty_like(np.empty((k, 1 << 20), np.float32)) for k in (1, 2, 3, 1, 2)]
    del arrays
    assert 0 < sum(b.nbytes for b in memory._kept.values()) <= memory.KEPT_BYTES
    memory._kept.clear()


@pytest.mark.parametrize(("kilobytes", "own", "given"), [(3, False, False), (6, False, True), (9, True, True)])
def test_what_may_be_streamed(monkeypatch, fresh_plans, kilobytes, own, given):
    """Results that are allocated from twice the size on from which an `out` is."""
    monkeypatch.setattr(memory, "CACHE_SHARE", 4 << 10)
    monkeypatch.setattr(memory, "OWN_TIMES", 2)
    asked = []
    monkeypatch.setattr(
        cpu,
        "nontemporal_stores",
        lambda *o: (p := memory.nontemporal_stores(*o)) and (lambda *a: asked.append(a) or p(*a)),
    )
    x = np.random.default_rng(0).standard_normal((kilobytes * 256 // 4, 4), dtype=np.float32)
    for out, expected in ((None, own), (np.empty_like(x), given)):
        asked.clear()
        for _ in range(2):
            _, saved = fastbn.batch_norm(x, out=out)
            fastbn.batch_norm_backward(x, saved, out=out)
            fastbn.batch_norm_inference(x, np.zeros(4), np.ones(4), out=out)
        assert len(asked) == 6 * expected
