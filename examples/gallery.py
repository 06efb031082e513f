"""What the gallery's programs share: options, progress, the digits, tables, and one visual style."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from threadpoolctl import threadpool_limits

Array = np.ndarray[Any, Any]

ORANGE, BLUE, GREEN, GREY, PURPLE = "#e0701a", "#2b78c2", "#2d8a4e", "#777777", "#8054a8"
"""Plain networks are orange, those with batch norm blue."""
SHADES = {
    ORANGE: ("#f9bf85", "#e0701a", "#8a3d05"),
    BLUE: ("#8fc1ee", "#2b78c2", "#0b3d75"),
}
"""Light, middle and dark: small, middle and large."""


def options(doc: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with what every program takes: ``--quick``, ``--seed`` and ``--output``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for a test: fewer and smaller of everything")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; %(default)s")
    parser.add_argument("--output", default=output, help="the picture; %(default)s")
    return parser


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Products this small lose on threads: 8 ms against 16 us, measured."""
    with threadpool_limits(1, user_api="blas"):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Products and kernels on one thread each: small arrays gain nothing from a second, and times can be compared."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with one_blas_thread():
            yield
    finally:
        numba.set_num_threads(threads)


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call on one thread: the processor's, so that what else the machine does hardly counts."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread():
        for call in calls.values():
            call()  # compiles, and fills the caches
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def progress(text: str) -> None:
    """On one line of standard error, over the last; no text clears it."""
    print(f"\r{text:<72}", end="" if text else "\r", file=sys.stderr, flush=True)


def digits(images: bool = False) -> tuple[Array, Array, Array, Array]:
    """scikit-learn's: training samples, test samples (float32, 0 to 1), training labels, test labels.

    Always the same quarter tests. Samples are rows of 64 values, or images of (8, 8, 1).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    if images:
        x = x.reshape(-1, 8, 8, 1)
    split: tuple[Array, Array, Array, Array] = tuple(
        train_test_split(x, labels, test_size=0.25, stratify=labels, random_state=0)
    )
    return split


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows of text or numbers under their columns' names, wide enough for both."""
    progress("")
    floats = float, np.floating
    cells = [[*columns], *([f"{v:.3g}" if isinstance(v, floats) else str(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def panels(
    layout: str | list[list[str]], titles: Sequence[str], size: tuple[float, float] = (11, 4.4)
) -> tuple[Figure, dict[str, Any]]:
    """A figure and its axes by letter, as in ``"ab"``; pyplot, which keeps figures and opens windows, is not used."""
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplot_mosaic(layout)
    for (letter, axis), title in zip(axes.items(), titles, strict=True):
        axis.set_title(f"({letter}) {title}", loc="left")
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def spreads(axis: Any, x: Array, values: Array, marker: str = "o-", **style: Any) -> None:
    """Of each row of values, one for each seed: a marker at the mean, and a line from the least to the largest."""
    axis.plot(x, values.mean(axis=1), marker, ms=4, **style)
    axis.vlines(x, values.min(axis=1), values.max(axis=1), color=style["color"], lw=style.get("lw"))


def save(figure: Figure, output: str) -> None:
    """Write the picture; of 256 colours it takes a third of the bytes, and none is missed."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"picture: {Path(output).name}", file=sys.stderr)
