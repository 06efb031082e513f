"""Arguments that each function accepts."""

import numpy as np

import fastbn
from fastbn import Moments, Saved

SHAPE, CHANNELS, WEIGHTS = (4, 3, 5), (3,), (4, 1, 5)


def data(shape=SHAPE, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).random(shape) + 0.5).astype(dtype)


def channels(seed=0):
    return data(CHANNELS, np.float32, seed)


def batch(shape=CHANNELS):
    return Moments(np.full(shape, 20.0), np.full(shape, 1.5), np.full(shape, 7.0))


def saved(**changes):
    """As a forward pass with weights leaves it."""
    count, mean, m2 = batch()
    fields = {
        "x": data(), "y": None, "gamma": channels(1), "weight": data(WEIGHTS, np.float64), "moments": batch(),
        "mean": mean, "rstd": 1 / np.sqrt(m2 / count), "count": count, "channel_axis": 1, "activation": None,
        "has_residual": False, "gathered": False,
    }  # fmt: skip
    return Saved(**fields | changes)


def read_only(a):
    a.flags.writeable = False
    return a


class Own(np.ndarray):
    """A subclass could mean anything."""


def merge(moments):
    return fastbn.merge(*moments)


# Arguments that each function accepts; a case changes one or two.
GOOD = {
    fastbn.batch_norm: lambda: {
        "x": data(), "gamma": channels(1), "beta": channels(2), "where": data(WEIGHTS, bool),
        "weights": data(WEIGHTS), "residual": data(seed=3), "running": (channels(6), channels(7)), "out": data(seed=4),
    },
    fastbn.batch_norm_backward: lambda: {
        "dy": data(seed=5), "saved": saved(), "dmean": channels(1), "dvar": channels(2), "out": data(seed=4),
    },
    fastbn.batch_norm_inference: lambda: {
        "x": data(), "mean": channels(), "var": channels(1), "gamma": channels(2), "beta": channels(3),
        "residual": data(seed=3), "out": data(seed=4),
    },
    fastbn.normalize: lambda: {
        "x": data(), "mean": channels(), "rstd": channels(1), "gamma": channels(2), "beta": channels(3),
        "residual": data(seed=3), "out": data(seed=4),
    },
    fastbn.grad_sums: lambda: {"dy": data(seed=5), "x": data(), "mean": channels(), "rstd": channels(1)},
    fastbn.grad_input: lambda: {
        "dy": data(seed=5), "x": data(), "mean": channels(), "rstd": channels(1), "gamma": channels(2),
        "dgamma": channels(3), "dbeta": channels(4), "count": channels(5), "where": data(WEIGHTS, bool),
        "weights": data(WEIGHTS), "out": data(seed=4),
    },
    fastbn.fold: lambda: {
        "kernel": data((3, 2, 2)), "kernel_bias": channels(), "mean": channels(1), "var": channels(2),
        "gamma": channels(3), "beta": channels(4),
    },
    Saved.frozen: lambda: {
        "x": data(), "mean": channels(), "var": channels(1), "gamma": channels(2), "y": data(seed=3),
    },
    fastbn.moments: lambda: {"x": data(), "where": data(WEIGHTS, bool), "weights": data(WEIGHTS)},
    fastbn.mean: lambda: {"x": data(), "axis": 1, "where": data(SHAPE, bool), "out": data((4, 5), seed=4)},
    fastbn.var: lambda: {
        "x": data(), "axis": 1, "where": data(SHAPE, bool), "mean": data((4, 1, 5), seed=3),
        "out": data((4, 5), seed=4),
    },
    fastbn.update_running: lambda: {
        "mean": channels(), "var": channels(1), "moments": batch(), "out": (channels(2), channels(3)),
    },
    merge: lambda: {"moments": (batch(), batch(), batch())},
    fastbn.population: lambda: {"moments_of_batches": [batch(), batch()]},
}  # fmt: skip

ARRAYS = {
    function: [name for name, value in good().items() if isinstance(value, np.ndarray)]
    for function, good in GOOD.items()
}
ALL_ARRAYS = [(function, name) for function, names in ARRAYS.items() for name in names]
STATISTICS = (fastbn.moments, fastbn.mean, fastbn.var)


def taking(*names, but=()):
    """Functions and those of the named arguments that they take."""
    return [(function, name) for function, name in ALL_ARRAYS if name in names and function not in but]


def label(value):
    if callable(value):
        return value.__name__
    return value if isinstance(value, str) else None


# --- the check --------------------------------------------------------------------------------------------------------


def arrays_in(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays_in(item)
