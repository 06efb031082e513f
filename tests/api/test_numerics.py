"""The bounds that the package promises, of NumPy arrays; and the same bits always."""

import numpy as np

import fastbn
from fastbn.cpu import division, team
from tests.cases.numerics import *  # noqa: F403
from tests.conftest import forget

# --- the same bits, whatever the threads ------------------------------------------------------------------------------


def everything():
    """What training and statistics give of rows and columns, long and short."""
    for shape in ((3, 2, 300, 301), (64, 5, 7, 7), (2600, 37), (3, 9, 7, 530)):
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(shape, dtype=np.float32) + 5 for _ in range(2))
        weights = rng.random((shape[0], *[1] * (len(shape) - 1)))
        y, saved = fastbn.batch_norm(x)
        yield from (y, *saved.moments, *fastbn.batch_norm_backward(dy, saved)[:3])
        yield from (*fastbn.moments(x, weights=weights), fastbn.var(x), fastbn.var(x, axis=1))


def test_bits_do_not_depend_on_threads(monkeypatch, fresh_plans):
    """In parallel by one, two, four, and serially."""
    asked, hire = set(), team.team_for
    monkeypatch.setattr("fastbn.cpu.program.team_for", lambda threads: asked.add(threads) or hire(threads))
    found = []
    for parallel_from, threads in ((0, 1), (0, 2), (0, 4), (1 << 60, 4)):
        monkeypatch.setattr(team, "PARALLEL_FROM", parallel_from)
        forget()
        with fastbn.threads.num_threads(threads):
            found.append(list(everything()))
    assert asked == {2, 4}
    for results in found[1:]:
        for ours, expected in zip(results, found[0], strict=True):
            np.testing.assert_array_equal(ours, expected)


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
        monkeypatch.setattr(division.Problem, "whole_channels", lambda problem, fused=fused: fused)
        forget()
        z, other = fastbn.batch_norm(x)
        np.testing.assert_array_equal(other.moments.m2, saved.moments.m2)
        np.testing.assert_array_equal(z, y)
        np.testing.assert_array_equal(fastbn.batch_norm_backward(x, other).x, grads.x)
