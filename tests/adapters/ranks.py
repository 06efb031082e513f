"""What ranks over MPI compute, and one process with all of their data."""

import numpy as np

import fastbn

SIZES = (5, 9, 0, 2)


def data(dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, sum(SIZES), 3, 4, 5)) + 10).astype(dtype)
    return x, dy, *rng.random((2, 3))


def results(x, dy, gamma, beta, gather):
    """y, dx, local gradients, the group's mean and m2, and running statistics after the batch."""
    y, saved = fastbn.batch_norm(x, gamma, beta, gather=gather)
    grads = fastbn.batch_norm_backward(dy, saved, gather=gather)
    running = fastbn.update_running(np.zeros(3), np.ones(3), saved.moments)
    return y, grads.x, grads.gamma, grads.beta, saved.mean, saved.moments.m2, *running
