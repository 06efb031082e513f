"""The bounds that the package promises, of NumPy arrays; and the same bits always."""

import os
import subprocess
import sys
import textwrap

import numpy as np

import fastbn
from fastbn.cpu import plans
from tests.cases.numerics import *  # noqa: F403
from tests.conftest import forget

# --- the same bits, whatever the threads ------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import hashlib
    import numpy as np
    import fastbn
    from fastbn.cpu import team

    digest = hashlib.sha256()
    for below in (0, 1 << 60):  # in parallel, and serially
        team.PARALLEL_FROM = below
        digest = hashlib.sha256()
        for shape in ((3, 2, 300, 301), (64, 5, 7, 7), (2600, 37), (3, 9, 7, 530)):
            rng = np.random.default_rng(0)
            x, dy = (rng.standard_normal(shape, dtype=np.float32) + 5 for _ in range(2))
            weights = rng.random((shape[0], *[1] * (len(shape) - 1)))
            y, saved = fastbn.batch_norm(x)
            parts = [y, *saved.moments, *fastbn.batch_norm_backward(dy, saved)[:3]]
            parts += [*fastbn.moments(x, weights=weights), fastbn.var(x), fastbn.var(x, axis=1)]
            for part in parts:
                digest.update(np.ascontiguousarray(part))
        print(digest.hexdigest())
""")


def test_bits_do_not_depend_on_threads():
    hashes = set()
    for threads in (1, 2, 4):
        environment = os.environ | {"NUMBA_NUM_THREADS": str(threads)}
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        hashes.update(run.stdout.split())
    assert len(hashes) == 1


def test_bits_do_not_depend_on_alignment():
    shape = (3, 5, 40, 41)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y, saved = fastbn.batch_norm(x)
    for shift in range(1, 16):
        buffer = np.empty(x.size + shift, np.float32)
        moved = buffer[shift:].reshape(shape)
        moved[...] = x
        z, other = fastbn.batch_norm(moved)
        np.testing.assert_array_equal(other.mean, saved.mean)
        np.testing.assert_array_equal(other.moments.m2, saved.moments.m2)
        np.testing.assert_array_equal(z, y)


def test_bits_do_not_depend_on_the_number_of_channels_per_thread(monkeypatch, fresh_plans):
    """Fused and split strategies agree."""
    x = np.random.default_rng(0).standard_normal((4, 6, 50, 60)).astype(np.float32)
    y, saved = fastbn.batch_norm(x)
    grads = fastbn.batch_norm_backward(x, saved)
    for fused in (True, False):
        monkeypatch.setattr(plans, "_whole_channels", lambda shape, shares, fused=fused: fused)
        forget()
        z, other = fastbn.batch_norm(x)
        np.testing.assert_array_equal(other.moments.m2, saved.moments.m2)
        np.testing.assert_array_equal(z, y)
        np.testing.assert_array_equal(fastbn.batch_norm_backward(x, other).x, grads.x)
