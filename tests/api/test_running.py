"""Running statistics that `batch_norm` updates, on NumPy arrays."""

import numpy as np
import pytest

import fastbn
from tests.cases.running import *  # noqa: F403
from tests.cases.running import pair, same_bits


def test_read_only():
    running = pair((3,), ("float64", "float64"))
    running[1].flags.writeable = False
    with pytest.raises(ValueError, match=r"^running\[1\]: expected a writable array, got a read-only one"):
        fastbn.batch_norm(np.ones((4, 3)), running=running)


def test_any_byte_order_and_precision():
    """NumPy's own, which kernels do not write."""
    x = np.random.default_rng(0).standard_normal((4, 3))
    for dtype in (">f4", ">f8", np.longdouble):
        running, wanted = (tuple(a.astype(dtype) for a in pair((3,), ("float64", "float64"))) for _ in range(2))
        _, saved = fastbn.batch_norm(x, running=running)
        for ours, theirs in zip(running, fastbn.update_running(*wanted, saved.moments), strict=True):
            same_bits(ours, theirs)
