"""Compile the kernels ahead of their first use, into the cache on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn.cpu import code
from fastbn.cpu.team import PARALLEL_FROM
from fastbn.environment import float_dtypes
from fastbn.threads import get_num_threads

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
    """Kernels that this process has: from disk, and newly compiled."""

    loaded: int
    compiled: int


def jobs(dtypes: Sequence[str]) -> list[Job]:
    """Every combination of dtype, layout, serial or parallel, few or many channels, and options."""
    threads = get_num_threads()
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
    """How many kernels this process has loaded and compiled so far."""
    return Counts(code.loaded, code.compiled)
