"""Cliffs: ``python -m benchmarks.statistics --sweep``, mean and var over sizes and row lengths, NumPy's beside.

A longer array may cost less per byte, never more; and at one size, longer rows likewise: what a call or a row costs
beside its bytes spreads over more of them. So between neighbours of a curve the time per byte should not rise, and not
fall by more than the size or the row grows. What does either by more than `CLIFF` is a cliff. Times are the fastest of
a few turns, and what looks like a cliff is measured again: what else runs on the machine makes peaks, not cliffs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.statistics_cases import numbers
from benchmarks.turns import in_turn

CLIFF = 1.6
SMALLEST, LARGEST = 1000, 256_000_000  # bytes
SIZE = 8_000_000  # bytes, of which rows of every length are made
COLUMNS = 64  # of the outer reductions over sizes
LENGTHS = (
    1, 2, 3, 4, 5, 7, 8, 10, 12, 15, 16, 17, 20, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257,
    300, 400, 512, 700, 1000, 1024, 1025, 1500, 2000, 2048, 3000, 4096, 5000, 7000, 10_000,
)  # fmt: skip
DTYPES = ("float32", "float64", "uint8")
FUNCTIONS = ("mean", "var")
REDUCTIONS = {"inner": -1, "outer": 0}
ROUNDS, SECONDS = 4, 0.05  # of a point, at least
AGAIN = (10, 20)  # turns of the points beside what looks like a cliff, and of those that still do


class Curve(NamedTuple):
    """What is reduced over sizes or row lengths."""

    sweep: str
    """`size` or `row length`."""
    function: str
    reduction: str
    dtype: str


class Point(NamedTuple):
    """Nanoseconds a byte at an abscissa of a curve: bytes, or elements of a row."""

    curve: Curve
    at: int
    ours: float
    theirs: float

    def as_dict(self) -> dict[str, Any]:
        return self.curve._asdict() | {"at": self.at, "ours": self.ours, "theirs": self.theirs}


def points(most: int, short: bool) -> Iterator[Point]:
    """Abscissa by abscissa, dtype by dtype; with `short` every third."""
    step = 3 if short else 1
    sizes = [SMALLEST * 2**k for k in range((most // SMALLEST).bit_length())]
    for dtype in DTYPES:
        for sweep, abscissae in (("size", sizes), ("row length", LENGTHS)):
            for at in abscissae[::step]:
                for function in FUNCTIONS:
                    for reduction in REDUCTIONS:
                        yield measured(Curve(sweep, function, reduction, dtype), at, most, ROUNDS)


def measured(curve: Curve, at: int, most: int, rounds: int) -> Point:
    x = array(curve, at, most)
    calls: dict[str, list[Callable[[], object]]] = {
        name: [partial(getattr(module, curve.function), x, axis=REDUCTIONS[curve.reduction])]
        for name, module in (("fastbn", fastbn), ("numpy", np))
    }
    times = in_turn(calls, rounds, SECONDS)
    return Point(curve, at, *(1e9 * float(times[name].min()) / x.nbytes for name in calls))


def array(curve: Curve, at: int, most: int) -> np.ndarray[Any, Any]:
    """The first numbers of one pool."""
    itemsize = np.dtype(curve.dtype).itemsize
    pool = _pool(curve.dtype, max(most, SIZE) // itemsize)
    if curve.sweep == "size" and curve.reduction == "inner":
        return pool[: at // itemsize]
    size, length = (at, COLUMNS) if curve.sweep == "size" else (SIZE, at)
    return pool[: size // itemsize // length * length].reshape(-1, length)


@lru_cache(maxsize=1)
def _pool(dtype: str, count: int) -> np.ndarray[Any, Any]:
    return numbers(dtype, [count], 0)


def confirmed(found: Sequence[Point], most: int) -> list[Point]:
    """With what looks like a cliff measured again."""
    best = {(point.curve, point.at): point for point in found}
    for rounds in AGAIN:
        suspects = {(p.curve, p.at) for cliff in cliffs(best.values()) for p in (cliff.before, cliff.after)}
        for curve, at in sorted(suspects, key=lambda key: key[0].dtype):
            old, new = best[curve, at], measured(curve, at, most, rounds)
            best[curve, at] = Point(curve, at, min(old.ours, new.ours), min(old.theirs, new.theirs))
    return list(best.values())


class Cliff(NamedTuple):
    """Neighbours of a curve, and by how much the time per byte changes beyond what is natural; NumPy's beside."""

    before: Point
    after: Point
    ours: float
    theirs: float

    def __str__(self) -> str:
        a, b = self.before, self.after
        sweep, function, reduction, dtype = a.curve
        return (
            f"{function} {reduction} {dtype}, {sweep} {a.at} to {b.at}: {a.ours:.3g} to {b.ours:.3g} ns/byte,"
            f" {self.ours:.1f} times ({self.theirs:.1f} NumPy's)"
        )


def cliffs(found: Iterable[Point]) -> list[Cliff]:
    """Steepest first."""
    curves: dict[Curve, list[Point]] = {}
    for point in found:
        curves.setdefault(point.curve, []).append(point)
    steps = [
        Cliff(a, b, *(excess(x, y, b.at / a.at) for x, y in ((a.ours, b.ours), (a.theirs, b.theirs))))
        for curve in curves.values()
        for a, b in pairwise(sorted(curve, key=lambda point: point.at))
    ]
    return sorted((step for step in steps if step.ours > CLIFF), key=lambda step: -step.ours)


def excess(before: float, after: float, growth: float) -> float:
    """Times that a time per byte rises, or that it falls more than a fixed cost explains, spread over as many times."""
    return max(after / before, before / after / growth)


def draw(found: Sequence[Point], path: Path) -> None:
    """A panel for each sweep, function and reduction; a colour for each dtype."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(point.curve.sweep for point in found))
    kinds = [(function, reduction) for function in FUNCTIONS for reduction in REDUCTIONS]
    colours = dict(zip(DTYPES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    figure = Figure(figsize=(12, 2.9 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), len(kinds), squeeze=False, sharey=True)
    for row, sweep in zip(panels, sweeps, strict=True):
        for panel, (function, reduction) in zip(row, kinds, strict=True):
            for dtype, colour in colours.items():
                curve = sorted(p for p in found if p.curve == (sweep, function, reduction, dtype))
                at = [p.at for p in curve]
                panel.plot(at, [p.ours for p in curve], color=colour, label=f"fastbn {dtype}", linewidth=1.4)
                panel.plot(at, [p.theirs for p in curve], "--", color=colour, label=f"NumPy {dtype}", linewidth=0.9)
            panel.set(xscale="log", yscale="log", title=f"{function}, {reduction} axis", xlabel=LABELS[sweep])
            panel.grid(alpha=0.3)
        row[0].set_ylabel("ns per byte")
    panels[0, -1].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=90)


LABELS = {"size": "bytes", "row length": f"elements of a row, in {SIZE / 1e6:.0f} MB"}
