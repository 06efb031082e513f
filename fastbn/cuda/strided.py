"""Mean and spread of arrays as they lie: how `strided_statistics.cu` divides the work.

Nothing is copied and nothing as large as the array is allocated: parts of a kept index take 2 % of its bytes at most.
All that changes bits follows from shapes, strides and alignment, and the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda import launch
from fastbn.cuda.geometry import power
from fastbn.cuda.launch import MOST_DIMENSIONS, Device, Launch
from fastbn.cuda.memory import Array, type_of
from fastbn.cuda.problems import Tuning, tuning_of
from fastbn.dimensions import Dimension, dimensions
from fastbn.operands import Mask, Statistic

DTYPES = (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool",
)  # fmt: skip
"""By the kernels' numbers."""
FLOAT32, FLOAT64 = 2, 3
FORMS = ("var", "std", "m2")

MOST_REDUCED = 6  # dimensions, whose coordinates are in registers
FEW = 32  # kept indices of a row below which it is read with the rows behind it
LONG_ROW = 32  # vectors of a row that need not begin or end with one
BYTES_OF_PART = 50  # of what is reduced, for each byte of a part: hence 2 %
BATCHES_OF_SPLIT = 2  # of each thread, below which another block is not worth its merge
LINE = 128  # bytes of a cache line, which neighbouring threads read together


class Data(NamedTuple):
    """What the division depends on."""

    dimensions: tuple[Dimension, ...]
    """From the outermost in memory to the innermost."""
    dtype: int
    itemsize: int
    off: int
    """Bytes from a multiple of 16 to the first element."""
    masked: bool
    skip_nan: bool
    in_float64: bool
    """Whether floats are added up in float64 throughout."""
    sums: bool
    squares: bool


class Division(NamedTuple):
    """How the work is divided; words as in walk.cuh."""

    along_kept: bool
    vector: int
    items: int
    threads: int
    kept: tuple[Dimension, ...]
    """Innermost first."""
    reduced: tuple[Dimension, ...]
    """Innermost first, sizes and steps in vectors."""
    along: int
    beside: int
    width: int
    row: int
    tiles_of_row: int
    splits: int
    share: int
    run: int
    vector_where: int

    @property
    def vectors(self) -> int:
        return math.prod(d.size for d in self.reduced)

    @property
    def all_kept(self) -> int:
        return math.prod(d.size for d in self.kept)

    @property
    def tiles(self) -> int:
        return self.all_kept // self.row * self.tiles_of_row


def _vector(size: int, most: int, others: list[Dimension], data: Data) -> int:
    """Elements of a load: a power of two to which the size, other dimensions' steps and the address agree."""
    vector = most
    while vector > 1 and (
        size % vector or data.off % (vector * data.itemsize) or any(d.step % vector for d in others if d.size > 1)
    ):
        vector //= 2
    return vector


class _Beside(NamedTuple):
    """How the threads of a block lie on an array."""

    along_kept: bool
    vector: int
    reduced: list[Dimension]
    along: int
    beside: int
    width: int
    row: int
    run: int
    vector_where: int
    unit: int = 1
    """Of vectors of a split."""


def _rows(kept: list[Dimension], reduced: list[Dimension], data: Data, tuning: Tuning, processors: int) -> _Beside:
    """Threads along rows of reduced elements, and beside each other where these are short."""
    inner, *outer = reduced
    most, vector, run = max(1, 16 // data.itemsize), 1, inner.size
    if inner.step == 1:
        ragged = not outer and inner.size >= LONG_ROW * most
        vector = most if ragged else _vector(inner.size, most, [*kept, *outer], data)
    rows = [Dimension(inner.size // vector, inner.step * vector, inner.mask * vector, 0, False), *outer]
    count, channels = math.prod(d.size for d in rows), math.prod(d.size for d in kept)
    threads = _threads(count * channels, tuning)
    every = min(threads, power(count))
    enough = min(every, max(power(count / _items(vector, data, tuning)), LINE // (vector * data.itemsize), 1))
    along = enough if channels * enough >= threads * tuning.waves * processors else every
    beside = threads // along
    return _Beside(False, vector, rows, along, beside, width=beside, row=channels, run=run, vector_where=inner.mask)


def _columns(kept: list[Dimension], reduced: list[Dimension], data: Data, tuning: Tuning) -> _Beside:
    """Threads beside each other along rows of kept indices."""
    inner, *outer = kept
    count = math.prod(d.size for d in reduced)
    vector = 1
    if inner.step == 1:
        vector = _vector(inner.size, _beside(data), [*outer, *reduced], data)
    vectors = inner.size // vector
    threads = _threads(vectors * count * math.prod(d.size for d in outer), tuning)
    lanes = max(LINE // (vector * data.itemsize), threads // count, 1)
    beside = min(vectors, lanes, threads)
    beside = -(-vectors // -(-vectors // beside))
    along = min(threads // beside, power(count))
    return _Beside(
        True, vector, reduced, along, beside, width=beside * vector, row=inner.size, run=0, vector_where=inner.mask
    )


def _few_and_above(kept: list[Dimension], reduced: list[Dimension], data: Data, tuning: Tuning) -> _Beside:
    """A few kept indices and the reduced dimension above them as one row."""
    (few, *outer), (above, *others) = kept, reduced
    size = few.size * above.size
    vector = _vector(size, _beside(data), [*outer, *others], data)
    rows = [Dimension(size // vector, vector, few.mask * vector, 0, False), *others]
    unit = few.size // math.gcd(few.size, vector)
    along = max(1, _threads(math.prod(d.size for d in rows), tuning) // unit) * unit
    return _Beside(True, vector, rows, along, 1, width=few.size, row=few.size, run=0, vector_where=few.mask, unit=unit)


def _beside(data: Data) -> int:
    """Kept indices of a thread at most: squares of four floats, with their sums, take more than 128 registers.

    Without sums, too: `var` is to have the bits of `mean_var`.
    """
    return min(2 if data.squares and data.dtype <= FLOAT64 else 4, 16 // data.itemsize)


def _threads(vectors: int, tuning: Tuning) -> int:
    return min(tuning.threads, max(32, power(vectors)))


def _items(vector: int, data: Data, tuning: Tuning) -> int:
    """Vectors in flight: 64 bytes of the largest."""
    return max(1, tuning.items_per_thread // (2 if vector * data.itemsize == 16 else 1))


def divide(data: Data, device: Device) -> Division | None:
    """By what lies innermost; None for what kernels do not count."""
    tuning, processors = tuning_of(device.architecture), device.processors
    d = data.dimensions
    kept = [o for o in reversed(d) if o.kept] or [Dimension(1, 1, 0, 0, True)]
    reduced = [o for o in reversed(d) if not o.kept] or [Dimension(1, 1, 0, 0, False)]
    if not d or not d[-1].kept:
        b = _rows(kept, reduced, data, tuning, processors)
    else:
        last, above = d[-1], d[-2] if len(d) > 1 else None
        one_row = above is not None and not above.kept and last.step == 1 and above.step == last.size < FEW
        if one_row and above is not None and data.masked:
            one_row = above.mask == last.mask * last.size
        b = (_few_and_above if one_row else _columns)(kept, reduced, data, tuning)
    if len(kept) > MOST_DIMENSIONS or len(b.reduced) > MOST_REDUCED or any(o.size >= 1 << 31 for o in b.reduced[:-1]):
        return None
    vectors, items = math.prod(o.size for o in b.reduced), _items(b.vector, data, tuning)
    tiles_of_row = -(-b.row // b.width)
    tiles = math.prod(o.size for o in kept) // b.row * tiles_of_row
    wanted = -(-tuning.passes * processors // tiles)
    column = math.prod(o.size for o in reduced) * data.itemsize  # bytes of a kept index
    numbers = _numbers_of_part(data._replace(sums=True))  # as with a mean, of which the bits do not depend
    most = min(
        column // max(1, BYTES_OF_PART * 8 * numbers),
        vectors // max(1, BATCHES_OF_SPLIT * b.along * items),
    )
    share = -(-vectors // max(1, min(wanted, most)))
    share = -(-share // b.unit) * b.unit
    threads = max(32, -(-b.along * b.beside // 32) * 32)
    return Division(
        along_kept=b.along_kept, vector=b.vector, items=items, threads=threads, kept=tuple(kept),
        reduced=tuple(b.reduced), along=b.along, beside=b.beside, width=b.width, row=b.row, tiles_of_row=tiles_of_row,
        splits=-(-vectors // share), share=share, run=b.run, vector_where=b.vector_where,
    )  # fmt: skip


# --- launches ---------------------------------------------------------------------------------------------------------


def _numbers_of_part(data: Data) -> int:
    """Of a `Part` of parts.cuh: float64 data have units."""
    unit = int(data.dtype == FLOAT64)
    return (3 + unit) * data.sums + (4 + unit) * data.squares


def macros_of(data: Data, c: Division) -> launch.Macros:
    """Of strided_statistics.cu."""
    return (
        ("DTYPE", data.dtype),
        ("VECTOR", c.vector),
        ("ALONG_KEPT", int(c.along_kept)),
        ("ITEMS_PER_THREAD", c.items),
        ("THREADS", c.threads),
        ("REDUCED", len(c.reduced)),
        ("IN_FLOAT64", int(data.in_float64)),
        ("SUMS", int(data.sums)),
        ("SQUARES", int(data.squares)),
        ("MASK", int(data.masked)),
        ("SKIP_NAN", int(data.skip_nan)),
    )


def fields_of(c: Division) -> dict[str, int]:
    """Of the kernels' argument."""
    fields = {
        "kept_dimensions": len(c.kept), "kept": c.all_kept, "row": c.row, "tiles": c.tiles,
        "tiles_of_row": c.tiles_of_row, "width": c.width, "splits": c.splits, "share": c.share, "vectors": c.vectors,
        "along": c.along, "beside": c.beside, "run": c.run, "vector_where": c.vector_where,
    }  # fmt: skip
    for i, d in enumerate(c.kept):
        fields |= {f"kept_sizes_{i}": d.size, f"kept_x_{i}": d.step, f"kept_where_{i}": d.mask}
        fields[f"kept_results_{i}"] = d.result
    left, stride_x, stride_where = c.along, 0, 0
    for i, d in enumerate(c.reduced):
        last = i + 1 == len(c.reduced)
        left, stride = (0, left) if last else divmod(left, d.size)
        stride_x, stride_where = stride_x + stride * d.step, stride_where + stride * d.mask
        fields |= {f"sizes_{i}": d.size, f"steps_x_{i}": d.step, f"steps_where_{i}": d.mask, f"strides_{i}": stride}
        if not last:
            above = c.reduced[i + 1]
            fields[f"carries_x_{i}"] = above.step - d.size * d.step
            fields[f"carries_where_{i}"] = above.mask - d.size * d.mask
    return fields | {"stride_x": stride_x, "stride_where": stride_where}


class Plan(NamedTuple):
    launches: tuple[Launch, ...]
    nbytes: int
    """Of parts."""


@lru_cache(maxsize=4096)
def plan(device: Device, data: Data, form: int, types: tuple[int | None, ...]) -> Plan | None:
    """One launch, or two where the reduced dimensions are split; types are those of count, mean and spread."""
    c = divide(data, device)
    if c is None:
        return None
    numbers = _numbers_of_part(data)
    fields = fields_of(c) | {"form": form, "skip_nan": int(data.skip_nan)}
    fields |= {f"{name}_type": t for name, t in zip(("count", "mean", "spread"), types, strict=True) if t is not None}
    shared = c.along * c.beside * (c.vector if c.along_kept else 1) * numbers * 8
    function = launch.function(device.number, "strided_statistics", macros_of(data, c))
    first = Launch(function, c.tiles * c.splits, c.threads, shared, False, launch.STATISTICS, fields)
    if c.splits == 1:
        return Plan((first,), 0)
    threads = min(tuning_of(device.architecture).threads, max(32, power(c.splits * c.all_kept)))
    along = min(threads, power(c.splits))
    beside = threads // along
    function = launch.function(device.number, "finish_strided", finishing_macros(data, threads))
    fields |= {"along": along, "beside": beside, "width": beside}
    grid = -(-c.all_kept // beside)
    second = Launch(function, grid, threads, threads * numbers * 8, False, launch.STATISTICS, fields)
    return Plan((first, second), c.all_kept * c.splits * numbers * 8)


def finishing_macros(data: Data, threads: int) -> launch.Macros:
    """Of finish_strided.cu, which sees numbers of parts alone."""
    known = {"DTYPE": FLOAT64 if data.dtype == FLOAT64 else FLOAT32, "THREADS": threads}
    known |= {"SUMS": int(data.sums), "SQUARES": int(data.squares)}
    known |= dict.fromkeys(("VECTOR", "ITEMS_PER_THREAD", "REDUCED", "IN_FLOAT64"), 1)
    return tuple((known | dict.fromkeys(("ALONG_KEPT", "MASK", "SKIP_NAN"), 0)).items())


def statistic(
    x: Array, mask: Mask | None, kept: frozenset[int], what: Statistic, result_strides: tuple[int, ...]
) -> Callable[..., None] | None:
    """`fastbn.backend.Backend.statistic`; its status stays as it was, since to read it would be to wait."""
    size, name = x.itemsize, x.dtype.name
    if name not in DTYPES or x.size == 0 or (mask is not None and mask.dtype != bool):
        return None
    masks = (0,) * x.ndim if mask is None else mask.strides
    d, starts = dimensions(x.shape, tuple(s // size for s in x.strides), masks, result_strides, kept)
    dtype, wanted = DTYPES.index(name), (what.count, what.mean, what.spread)
    types = tuple(None if t is None else type_of(np.dtype(t)) for t in wanted)
    wide = what.spread_is != "m2" and FLOAT64 in types[1:]  # those of moments are as good as batch norm's
    data = Data(
        tuple(d), dtype, size, off=(x.data.ptr + starts[0] * size) % 16, masked=mask is not None,
        skip_nan=what.skip_nan and dtype <= FLOAT64, in_float64=dtype <= FLOAT64 and (wide or dtype == FLOAT64),
        sums=what.mean is not None, squares=what.spread is not None,
    )  # fmt: skip
    found = plan(launch.device(x.data.device_id), data, FORMS.index(what.spread_is), types)
    if found is None:
        return None
    offsets = (starts[0] * size, starts[1], *(0 if t is None else starts[2] * np.dtype(t).itemsize for t in wanted))
    return _runner(found, mask is not None, tuple(t is not None for t in types), offsets)


def _runner(found: Plan, masked: bool, wanted: tuple[bool, ...], offsets: tuple[int, ...]) -> Callable[..., None]:
    """``run(x, where, count, mean, spread, status, ddof)``."""
    names = ("x", "where", "count", "mean", "spread")
    present = [name for name, there in zip(names, (True, masked, *wanted), strict=True) if there]
    places = [(names.index(name), offsets[names.index(name)]) for name in present]
    alloc, nbytes = launch.cupy.cuda.alloc, found.nbytes
    steps = [step.bound([*present, "parts", "ddof"] if nbytes else [*present, "ddof"]) for step in found.launches]

    def run(*arrays_and_more: Any) -> None:
        addresses = [arrays_and_more[i].data.ptr + offset for i, offset in places]
        ddof = arrays_and_more[6]
        if not nbytes:
            steps[0](*addresses, ddof)
            return
        parts = alloc(nbytes)
        for step in steps:
            step(*addresses, parts.ptr, ddof)

    return run
