"""The calls that people make first: their kernels are compiled ahead, by `fastbn warmup` into the cache on disk, by
`fastbn.precompile` into wheels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn.cpu import code
from fastbn.cpu.team import PARALLEL_FROM
from fastbn.cuts import LEAST_IN_SLABS
from fastbn.environment import float_dtypes
from fastbn.threads import get_num_threads

INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")  # of statistics alone
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "where": ("where",),
    "weights": ("weights",),
    "residual": ("residual",),
    "relu": ("relu",),
    "residual relu": ("residual", "relu"),
}


LAYOUTS = ("NCHW", "NHWC")


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
    floats = [dtype for dtype in dtypes if dtype not in INTEGERS]
    work = []
    for dtype, layout, (size, elements) in itertools.product(floats, LAYOUTS, rows_of.items()):
        for channels, options in itertools.product((many, 2) if layout == "NCHW" else (many,), OPTIONS):
            shape = (2, channels, max(4, elements // channels))
            name = f"{dtype} {layout} {size} {options}"
            work.append(Job(name, partial(_call_all, dtype, layout, shape, OPTIONS[options])))
    if threads > 1:
        short = (16, 128 * threads, 16)  # rows of many channels side by side, in one trip on all threads
        for dtype, options in itertools.product(floats, OPTIONS):
            work.append(
                Job(f"{dtype} short rows {options}", partial(_call_all, dtype, "NCHW", short, OPTIONS[options]))
            )
    if "float32" in floats:  # of the other dtypes it is rarer, and a fifth more kernels
        for layout, channels in itertools.product(LAYOUTS, (many, 2)):
            work.append(Job(f"float32 {layout} views", partial(_views, layout, channels)))
    work += [Job(f"{dtype} {layout} parts", partial(_parts, dtype, layout)) for dtype in floats for layout in LAYOUTS]
    work += [Job(f"{dtype} statistics", partial(_statistics, dtype)) for dtype in dtypes]
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
    if "where" in options:
        fastbn.moments(x, channel_axis=axis, where=np.ones(x.shape, bool))  # another one in each channel
    if len(weighting) > 1:
        return
    fastbn.batch_norm_inference(x, saved.mean, saved.rstd, channel_axis=axis, **epilogue)
    frozen = fastbn.Saved.frozen(x, saved.mean, saved.rstd, channel_axis=axis, y=y, activation=epilogue["activation"])
    fastbn.batch_norm_backward(x, frozen._replace(has_residual="residual" in options))  # as `BatchNorm` does


def _views(layout: str, channels: int) -> None:
    """Images without their border, large enough not to be copied, and for threads to share them."""
    n, height, width = 8, 10, 34 + max(PARALLEL_FROM, LEAST_IN_SLABS // 4) // (64 * channels)
    first = layout == "NCHW"
    whole = np.ones((n, channels, height, width) if first else (n, height, width, channels), np.float32)
    x, axis = whole[:, :, 1:-1, 1:-1] if first else whole[:, 1:-1, 1:-1], 1 if first else -1
    for activation in (None, "relu"):
        y, saved = fastbn.batch_norm(x, channel_axis=axis, activation=activation)
        fastbn.batch_norm_backward(y, saved)
        fastbn.batch_norm_inference(x, saved.mean, saved.rstd, channel_axis=axis, activation=activation)
        fastbn.batch_norm_backward(
            x, fastbn.Saved.frozen(x, saved.mean, saved.rstd, channel_axis=axis, y=y, activation=activation)
        )


def _parts(dtype: str, layout: str) -> None:
    """What batch norm is made of, and what comes after it: running and merged statistics."""
    axis = 1 if layout == "NCHW" else -1
    x = np.ones((3, 4, 5), float_dtypes()[dtype])
    ones = np.ones(x.shape[axis])
    fastbn.normalize(x, ones, ones, channel_axis=axis, out=np.empty_like(x))
    fastbn.grad_sums(x, x, ones, ones, channel_axis=axis)
    fastbn.grad_input(x, x, ones, ones, ones, ones, ones, ones, channel_axis=axis)
    moments = fastbn.moments(x, channel_axis=axis)
    fastbn.merge(moments, moments)
    for running in np.float32, np.float64:
        fastbn.update_running(ones.astype(running), ones.astype(running), moments)


def _statistics(dtype: str) -> None:
    """Of all values, along rows and across them; of neighbours and of values apart; with a mask and without NaNs."""
    table = np.ones((4096, 64), dtype if dtype in INTEGERS else float_dtypes()[dtype])
    for x, axis in (
        (table[:3], None), (table[:3], 0), (table[:3], 1), (table[:3, ::2], 1), (table[:3, ::2], 0),
        (table.reshape(256, 64, 16), (0, 2)), (table, None), (table, 0), (table[:, ::2], None), (table[:, ::2], 0),
        (table.reshape(-1, 8), 1), (table[:4000].reshape(-1, 100), 1), (table.reshape(-1, 8192)[:3], 0),
    ):  # fmt: skip
        for statistic in fastbn.mean, fastbn.var, fastbn.nanmean, fastbn.nanvar:
            statistic(x, axis)
        for statistic in fastbn.mean, fastbn.var:
            statistic(x, axis, where=np.ones(x.shape, bool))
        fastbn.mean_var(x, axis)


def counts() -> Counts:
    """How many kernels this process has loaded and compiled so far."""
    return Counts(code.loaded, code.compiled)
