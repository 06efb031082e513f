"""Compile the kernels ahead of their first use, into the cache on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np

import fastbn
from fastbn.cpu import columns, columns_gradients, rows, rows_gradients, slab
from fastbn.cpu.threads import LAUNCHERS, PARALLEL_FROM, kernel
from fastbn.environment import float_dtypes

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "where": ("where",),
    "weights": ("weights",),
    "residual": ("residual",),
    "relu": ("relu",),
    "residual relu": ("residual", "relu"),
}


class Job(NamedTuple):
    """Calls that bring a few kernels with them."""

    name: str
    run: Callable[[], None]


class Counts(NamedTuple):
    """Compiled forms of kernels that this process has: from the disk's cache, and newly compiled."""

    loaded: int
    compiled: int


def jobs(dtypes: Sequence[str]) -> list[Job]:
    """Every combination of dtype, layout, serial or parallel, few or many channels, and options."""
    threads = numba.get_num_threads()
    many = 4 * threads  # from here on, channels-first kernels give each thread whole channels
    rows_of = {"serial": 8, "parallel": PARALLEL_FROM} if threads > 1 else {"serial": 8}
    work = []
    for dtype, layout, (size, elements) in itertools.product(dtypes, ("NCHW", "NHWC"), rows_of.items()):
        for channels, options in itertools.product((many, 2) if layout == "NCHW" else (many,), OPTIONS):
            shape = (2, channels, max(4, elements // channels))
            name = f"{dtype} {layout} {size} {options}"
            work.append(Job(name, partial(_call_all, dtype, layout, shape, OPTIONS[options])))
    if threads > 1:
        short = (16, 128 * threads, 16)  # rows of many channels side by side, in one trip on all threads
        for dtype, options in itertools.product(dtypes, OPTIONS):
            work.append(
                Job(f"{dtype} short rows {options}", partial(_call_all, dtype, "NCHW", short, OPTIONS[options]))
            )
    return work


def _call_all(dtype: str, layout: str, shape: tuple[int, ...], options: tuple[str, ...]) -> None:
    """Statistics, forward, backward, inference and its backward."""
    x = np.ones(shape if layout == "NCHW" else (shape[0], shape[2], shape[1]), float_dtypes()[dtype])
    axis = 1 if layout == "NCHW" else -1
    weight_shape = tuple(1 if i == axis % 3 else n for i, n in enumerate(x.shape))
    weighting: dict[str, Any] = {"channel_axis": axis}
    if "where" in options:
        weighting["where"] = np.ones(weight_shape, bool)
    if "weights" in options:
        weighting["weights"] = np.ones(weight_shape)
    epilogue: dict[str, Any] = {"activation": "relu" if "relu" in options else None}
    if "residual" in options:
        epilogue["residual"] = x
    y, saved = fastbn.batch_norm(x, **weighting, **epilogue)
    fastbn.batch_norm_backward(x, saved)
    fastbn.moments(x, **weighting)
    if len(weighting) > 1:
        return
    fastbn.batch_norm_inference(x, saved.mean, saved.rstd, channel_axis=axis, **epilogue)
    if "residual" not in options:
        frozen = fastbn.Saved.frozen(
            x, saved.mean, saved.rstd, channel_axis=axis, y=y, activation=epilogue["activation"]
        )
        fastbn.batch_norm_backward(x, frozen)


def counts() -> Counts:
    """How many compiled forms this process has loaded and compiled so far."""
    modules = (rows, rows_gradients, columns, columns_gradients, slab)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, kernel)]
    statistics = [compiled.stats for compiled in (*LAUNCHERS, *(k.compiled for k in kernels))]
    loaded = sum(sum(s.cache_hits.values()) for s in statistics)
    compiled = sum(sum(s.cache_misses.values()) for s in statistics)
    return Counts(loaded, compiled)
