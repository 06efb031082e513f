"""Everyday calls of `mean`, `var`, `std` and their nan forms: the cases of ``python -m benchmarks.statistics``.

Each is a shape, a dtype, an axis and perhaps a view of the array, a mask or an accumulation dtype. Arrays are never of
zeros, and large ones come in as many buffers as the last cache cannot hold.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.turns import Calls
from benchmarks.workloads import TILE, buffers

LARGE = 30_000_000  # bytes of x from which the machine's reading speed is asked for
MEAN_VAR, NAN = ("mean", "var"), ("nanmean", "nanvar")
PEERS = ("bottleneck", "numbagg")  # of the nan forms
SPREADS = ("var", "std", "mean_var")  # what has the variance's limits

Axis = int | tuple[int, ...] | None
VIEWS: dict[str, Callable[[Any], Any]] = {
    "": lambda x: x,
    "[::2]": lambda x: x[::2],
    "[:, ::2]": lambda x: x[:, ::2],
    "[::-1]": lambda x: x[::-1],
    "[:, ::-1]": lambda x: x[:, ::-1],
    "[1:-1, 1:-1]": lambda x: x[1:-1, 1:-1],
    "[:, :, 2:-2, 2:-2]": lambda x: x[:, :, 2:-2, 2:-2],
    "[:, 2:-2, 2:-2]": lambda x: x[:, 2:-2, 2:-2],
    "[..., :2]": lambda x: x[..., :2],
    ".T": lambda x: x.T,
    "[:, :-3].T": lambda x: x[:, :-3].T,
}


class Case(NamedTuple):
    """What is reduced, and how."""

    group: str
    dtype: str
    shape: tuple[int, ...]
    """Of the buffer, before the view."""
    axis: Axis
    functions: tuple[str, ...] = MEAN_VAR
    view: str = ""
    accumulate: str = ""
    """The argument `dtype`."""
    mask: tuple[int | None, ...] = ()
    """For each axis whether the mask, or the weights, have it: 1 where they broadcast, None where not."""

    @property
    def name(self) -> str:
        text = f"{self.dtype} {self.shape}{self.view}"
        if self.axis is not None:
            text += f" axis {self.axis}" if isinstance(self.axis, int) else f" axes {self.axis}"
        if self.accumulate:
            text += f", dtype={self.accumulate}"
        if self.mask:
            text += f", {'weights' if self.group == 'average' else 'where'} {self.mask_shape}"
        return text

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return tuple(n if m is None else m for n, m in zip(self.shape, self.mask, strict=True))

    def shrunk(self, most: int) -> Case:
        """The same on an array of at most so many values: the longest axis is halved until it is."""
        shape = list(self.shape)
        while math.prod(shape) > most:
            longest = shape.index(max(shape))
            shape[longest] = -(-shape[longest] // 2)
        return self._replace(shape=tuple(shape))


def _cases(group: str, *rows: tuple[Any, ...], **options: Any) -> list[Case]:
    """Of rows: a dtype, a shape, axes that each make a case."""
    return [Case(group, dtype, shape, axis, **options) for dtype, shape, *axes in rows for axis in axes]


def _sliced(*rows: tuple[Any, ...]) -> list[Case]:
    return [Case("slices", dtype, shape, axis, view=view) for dtype, shape, view, *axes in rows for axis in axes]


FULL2, FULL4 = (None,) * 2, (None,) * 4
CASES: tuple[Case, ...] = (
    *_cases(
        "small",
        ("float32", (10,), None),
        ("float64", (100,), None),
        ("float32", (1000,), None),
        ("float16", (1000,), None),
        ("float32", (3000,), None),
        ("float64", (3000,), None),
        ("float32", (50, 60), None, 0, 1),
        ("float64", (50, 60), 1),
        ("float32", (1000, 3), 0),
        ("float32", (3, 1000), 1),
        ("float32", (10, 12, 15), 1, (0, 2)),
        ("float32", (4, 3, 10, 10), (0, 2, 3)),
        ("float32", (4, 5, 5, 6, 4), (1, 3)),
    ),
    *_cases(
        "middle",
        ("float32", (100, 100), 0),
        ("float32", (70_000,), None),
        ("float64", (70_000,), None),
        ("float32", (900, 700), None, 0, 1),
        ("float64", (900, 700), 0, 1),
        ("float32", (1_000_000,), None),
        ("float32", (1000, 1000), 1),
        ("float32", (300_000, 3), 0),
        ("float32", (20_000, 50), 1),
        ("float32", (100_000, 10), 1),
        ("float32", (16, 64, 14, 14), (0, 2, 3)),
        ("float32", (16, 14, 14, 64), (0, 1, 2)),
        ("float32", (224, 224, 3), (0, 1)),
        ("float32", (64, 100, 96), 1, (0, 2)),
        ("float32", (10, 20, 20, 20, 5), (1, 2, 3)),
        ("float16", (200_000,), None),
        ("float16", (500, 600), 0),
    ),
    *_cases("middle", ("float32", (900, 700), 1), functions=("std", "mean_var")),
    *_cases(
        "large",
        ("float32", (10_000_000,), None),
        ("float32", (13_000_000,), None),
        ("float64", (6_500_000,), None),
        ("float32", (4000, 3100), None, 0, 1),
        ("float64", (2000, 3100), 0, 1),
        ("float32", (5000, 5000), 0, 1),
        ("float32", (5, 1_500_000), 0, 1),
        ("float32", (3_000_000, 3), 0),
        ("float32", (1_000_000, 10), 1),
        ("float32", (100_000, 100), 0, 1),
        ("float32", (64, 3, 224, 224), (0, 2, 3)),
        ("float32", (64, 224, 224, 3), (0, 1, 2)),
        ("float32", (32, 64, 112, 112), (0, 2, 3)),
        ("float32", (32, 112, 112, 64), (0, 1, 2)),
        ("float32", (32, 1280, 14, 14), (0, 2, 3)),
        ("float32", (128, 2048, 7, 7), (0, 2, 3)),
        ("float32", (8, 32, 32, 32, 32), (0, 2, 3, 4)),
        ("float32", (300, 400, 100), 1, (0, 2)),
        ("float32", (20, 30, 40, 50, 10), (1, 3)),
        ("float16", (20_000_000,), None),
        ("float16", (4000, 5000), 0, 1),
    ),
    *_cases("large", ("float32", (4000, 3100), 1), functions=("std", "mean_var")),
    *_cases(
        "integers",
        ("uint8", (28, 28), None),
        ("int64", (300,), None),
        ("uint8", (480, 640, 3), (0, 1)),
        ("int64", (1_000_000,), None),
        ("int16", (1_000_000,), None),
        ("uint16", (2048, 2048), None),
        ("uint8", (50_000_000,), None),
        ("uint8", (6000, 8000), 0, 1),
        ("uint8", (16, 1080, 1920), (1, 2)),
        ("uint8", (64, 512, 512, 3), (0, 1, 2)),
        ("uint8", (64, 3, 512, 512), (0, 2, 3)),
        ("int16", (2000, 10_000), 0),
        ("int32", (4000, 3000), 1),
        ("int64", (5000, 1000), None, 0),
        ("bool", (40_000_000,), None),
    ),
    *_cases(
        "dtype",
        ("float32", (1000,), None),
        ("float32", (900, 700), 1),
        ("float32", (4000, 3100), None, 0, 1),
        ("float32", (5000, 5000), None),
        ("float32", (64, 3, 224, 224), (0, 2, 3)),
        accumulate="float64",
    ),
    *_cases("dtype", ("float16", (20_000_000,), None), ("float16", (4000, 5000), 0), accumulate="float32"),
    *_cases("where", ("float32", (900, 700), 1), ("float32", (4000, 3100), None, 0, 1), mask=FULL2),
    *_cases("where", ("float32", (32, 64, 56, 56), (0, 2, 3)), mask=FULL4),
    *_cases("where", ("float32", (4000, 3100), 0), mask=(None, 1)),
    *_cases("where", ("float32", (64, 224, 224, 3), (0, 1, 2)), mask=(None, None, None, 1)),
    *_cases("where", ("float32", (4000, 3100), 0), mask=FULL2, functions=("mean_var",)),
    *_sliced(
        ("float32", (16, 64, 14, 14), "[:, :, 2:-2, 2:-2]", (0, 2, 3)),
        ("float32", (900, 700), "[::2]", 1),
        ("float32", (32, 64, 112, 112), "[:, :, 2:-2, 2:-2]", (0, 2, 3)),
        ("float32", (32, 112, 112, 64), "[:, 2:-2, 2:-2]", (0, 1, 2)),
        ("float32", (8000, 3100), "[::2]", None, 0, 1),
        ("float32", (4000, 6200), "[:, ::2]", 1),
        ("float32", (4000, 3100), "[::-1]", 0),
        ("float32", (4000, 3100), "[:, ::-1]", 1),
        ("float32", (5000, 5000), "[1:-1, 1:-1]", None),
        ("float32", (4000, 3100), ".T", 0, 1),
        ("float32", (4000, 3100), "[:, :-3].T", 0),
        ("float32", (64, 224, 224, 3), "[..., :2]", (0, 1, 2)),
        ("uint8", (64, 512, 512, 3), "[:, 2:-2, 2:-2]", (0, 1, 2)),
    ),
    *_cases(
        "nan",
        ("float32", (1000,), None),
        ("float32", (900, 700), 1),
        ("float64", (900, 700), 0),
        ("float32", (13_000_000,), None),
        ("float32", (4000, 3100), 0, 1),
        ("float64", (2000, 3100), None),
        ("float32", (64, 3, 224, 224), (0, 2, 3)),
        ("float32", (64, 224, 224, 3), (0, 1, 2)),
        functions=NAN,
    ),
    *_cases("nan", ("float32", (4000, 3100), 1), functions=("nanstd",)),
    *_cases("average", ("float32", (1_000_000,), None), functions=("average",), mask=(None,)),
    *_cases("average", ("float32", (4000, 3100), 0), functions=("average",), mask=FULL2),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
TRACKED = (
    "float32 (1000,)",
    "float32 (900, 700) axis 1",
    "float32 (13000000,)",
    "float32 (4000, 3100) axis 0",
    "uint8 (480, 640, 3) axes (0, 1)",
    "float32 (4000, 3100), dtype=float64",
    "float32 (4000, 3100) axis 0, where (4000, 3100)",
    "float32 (32, 64, 112, 112)[:, :, 2:-2, 2:-2] axes (0, 2, 3)",
)
"""Names of the cases that asv keeps the history of, mean and var."""


def case_named(name: str) -> Case:
    """Of mean and var."""
    (found,) = (case for case in CASES if case.name == name and case.functions == MEAN_VAR)
    return found


# --- arrays -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tile(dtype: str) -> np.ndarray[Any, Any]:
    """Numbers as such arrays have them: normal about 0.5, pixels, counts up to a million."""
    rng, kind = np.random.default_rng(0), np.dtype(dtype)
    if kind.kind == "f":
        return (rng.standard_normal(TILE, np.float32) + np.float32(0.5)).astype(kind)
    if kind.kind == "b":
        return rng.random(TILE) < 0.3
    lowest, highest = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.itemsize <= 2 else (-1_000_000, 1_000_000)
    return rng.integers(max(lowest, 0 if kind.kind == "u" else lowest), highest, TILE, kind, endpoint=True)


def numbers(dtype: str, shape: Sequence[int], number: int, missing: float = 0.0) -> np.ndarray[Any, Any]:
    """The array of this number; none has the numbers of another. A share of them may be NaN."""
    tile = np.roll(_tile(dtype), -number * 7919)
    if missing:
        tile[np.random.default_rng(number).random(TILE) < missing] = np.nan
    array = np.empty(shape, dtype)
    flat = array.reshape(-1)
    whole = flat.size // TILE * TILE
    flat[:whole].reshape(-1, TILE)[...] = tile
    flat[whole:] = tile[: flat.size - whole]
    return array


class Arrays:
    """A case's buffers, what is reduced of them, and the contenders' calls."""

    def __init__(self, case: Case, cache: int) -> None:
        nbytes = math.prod(case.shape) * np.dtype(case.dtype).itemsize
        count = buffers(cache, nbytes) if nbytes >= LARGE else 1  # below it is measured in the caches
        missing = 0.05 if case.functions[0].startswith("nan") else 0.0
        self.case = case
        self.buffers = [numbers(case.dtype, case.shape, i, missing) for i in range(count)]
        self.x = [VIEWS[case.view](buffer) for buffer in self.buffers]

    @property
    def nbytes(self) -> int:
        """Bytes of what is reduced."""
        return int(self.x[0].nbytes)

    @cached_property
    def beside(self) -> np.ndarray[Any, Any] | None:
        """The mask, 70 % of it true, or the weights."""
        if not self.case.mask:
            return None
        random = np.random.default_rng(2).random(self.case.mask_shape, np.float32)
        return random if self.case.group == "average" else random < 0.7

    @cached_property
    def plain(self) -> list[Any]:
        """As many values that lie in one piece and are all there: what a slice, a mask, NaN cost is asked of them."""
        return [numbers(self.case.dtype, x.shape, i) for i, x in enumerate(self.x)]

    @property
    def is_measured_by_plain(self) -> bool:
        """Whether the speed of `plain` is a limit: in slices if rows have 256 bytes, and for masks of x's own shape."""
        if self.case.group == "slices":
            return run_bytes(self.x[0]) >= 256
        return self.case.group == "nan" or (self.case.group == "where" and 1 not in self.case.mask)

    def contenders(self, function: str) -> dict[str, Calls]:
        """Calls by name, fastbn's first."""
        given: dict[str, Any] = {} if self.case.axis is None else {"axis": self.case.axis}
        options = dict(given)
        if self.case.accumulate:
            options["dtype"] = self.case.accumulate
        if self.beside is not None:
            options["weights" if self.case.group == "average" else "where"] = self.beside
        found = {
            "fastbn": [partial(getattr(fastbn, function), x, **options) for x in self.x],
            "numpy": [partial(getattr(np, function, _mean_var), x, **options) for x in self.x],
        }
        if self.case.group in ("where", "slices", "nan"):
            plain = getattr(fastbn, function.removeprefix("nan"))
            found["plain"] = [partial(plain, x, **given) for x in self.plain]
        if self.case.group == "nan":
            spread = {} if function == "nanmean" else {"ddof": 0}
            for name in PEERS:
                if importlib.util.find_spec(name) and not (name == "bottleneck" and isinstance(self.case.axis, tuple)):
                    theirs = getattr(importlib.import_module(name), function)  # bottleneck's take one axis
                    found[name] = [partial(theirs, x, **given, **spread) for x in self.x]
        return found


def _mean_var(x: Any, **options: Any) -> tuple[Any, Any]:
    return np.mean(x, **options), np.var(x, **options)


def run_bytes(x: np.ndarray[Any, Any]) -> int:
    """Bytes that lie together, in whatever order of axes and direction."""
    run = x.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride != run:
            break
        run *= size
    return run
