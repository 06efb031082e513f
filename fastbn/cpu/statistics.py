"""Mean and variance of arrays as they lie: which of the kernels that `kernels.statistics` names, and who does what.

Nothing is copied and nothing as large as the array is allocated: kernels walk any strides, read every real dtype where
it lies, take masks as bytes, and write results in their dtype. All that changes bits follows from shapes and strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu import team
from fastbn.cpu.division import option
from fastbn.cpu.memory import Array
from fastbn.cpu.program import NONE, Argument, Program, kernel_type
from fastbn.cpu.program_words import VECTOR_KINDS
from fastbn.cpu.records import Formats, Geometry, Options, Results
from fastbn.cpu.sizes import pitch
from fastbn.cpu.statistics_sizes import AHEAD_BYTES, BYTES, FIELDS, MOVED, OF_INNER, OF_ROWS, OF_VALUES
from fastbn.dimensions import Dimension, dimensions
from fastbn.operands import Mask, Statistic

FORMS = ("var", "std", "m2")
SMALL = ("n1*", "s1*", "b1*", "n2*", "s2*")  # what is added up in integers where it lies side by side
MOST_SQUARES = 1 << 20  # of values of 16 bits, whose sum, and twice that, is exact in float64
COMPENSATED = ("f8*", "s8*", "n8*")  # dtypes whose sums in float64 lose digits

SHORT_ROW = 512  # values: reduced rows that are shorter may lie side by side in the rows of `outer`
ENOUGH_ROWS, ENOUGH_LONG_ROWS = 8, 12  # reduced rows side by side, for which a sum of each column is worth the space
LONG_ROW = 128  # values: rows at least so long need ENOUGH_LONG_ROWS rows, shorter ones ENOUGH_ROWS
ENOUGH_FOR_SQUARES = 25  # rows that squares of 4 and 8 bytes need instead, where these have LONG_FOR_SQUARES values
LONG_FOR_SQUARES = 28  # values: rows at least so long need ENOUGH_FOR_SQUARES rows for squares
SHORTEST = 8  # values: of shorter reduced rows, eight neighbours are read together
SMALLEST = 64  # values: of shorter reduced rows of small integers, eight neighbours are read together
FEW_VALUES = 128  # values of a kept index: if it has no more, eight neighbours are read together, whatever its rows
ALONG = 32, 128  # values, and bytes: rows that have both are read each along itself, up to three times as fast
ALONG_NOT_IN_BLOCKS = 40  # values of such rows, where blocks can be transposed: below it a sixth faster
FEW_BYTES = 1 << 10  # bytes of a kept index: FEW_VALUES of narrow dtypes, where rows are read each along itself
ABREAST_ROWS = 12  # rows of neighbouring kept indices, up to which all are read for eight columns at once
FEW = 8  # kept indices in a row: if there are fewer, each is reduced by itself
WORTH = 16  # kept indices a step apart that are worth a row
IN_L1 = 16 << 10  # bytes of sums that `outer` goes through for each row: half the smallest first-level cache
OF_WIDE_ROWS = 64 << 10  # bytes of sums, from L2, where `outer` takes parts of rows: up to 1.6 times as fast as IN_L1
FEW_COLUMNS = 512  # of small integers: a tile may have so many at least, and one for each SIZE_OF_COLUMN
SIZE_OF_COLUMN = 8192  # bytes of the array, of which the 80 that two threads have for a column are a hundredth
NEXT = 64 << 10  # bytes of a kept index, up to which those of the next are prefetched, if they lie nearer than its rows
AHEAD_OF_ROWS = 32 << 10  # bytes ahead in images of one channel, each in a page of its own: 1.4 to 5 times as fast
PART = 1 << 16  # values of a part, about, which a thread takes at once
PART_OF_SQUARES = 1 << 14  # float64 values of such a part, of which each of 32 sums has 512: rounding of 1e-15
PARTS_AT_MOST = 64  # into which the rows of `outer` are divided
TASKS, NARROWEST = 8, 128  # tiles for several threads, where rows are too few to be divided; columns of one at least
FEW_NUMBERS = 1 << 14  # of parts: one thread merges so many in some 20 us
SHARE_OF_PARTS = 4096  # bytes of a column for each part at least, whose numbers have 32: less than a hundredth
TWO_PARTS = 3400  # bytes of a column from which it has two parts, if one thread would do all: less than a fiftieth

_INTEGER_LETTERS = {"i": "s", "u": "n", "b": "b"}


def kernel_type_of_any(dtype: np.dtype[Any]) -> str | None:
    """How kernels name a real dtype; None for others, among them those of the other byte order."""
    if not dtype.isnative:
        return None
    if dtype.kind in _INTEGER_LETTERS:
        return f"{_INTEGER_LETTERS[dtype.kind]}{dtype.itemsize}*"
    kind = kernel_type(dtype)
    return kind if kind in ("f4*", "f8*", "u2*", "i2*") else None


class Summing(NamedTuple):
    """What is added up, and how."""

    itemsize: int
    compensated: bool
    """Sums in float64 lose digits that are wanted."""
    squares: bool
    small: bool = False
    """In integers."""
    mask: int = 0
    """Bytes of its elements, or 0 without one."""

    def columns(self, size: int, wide: bool = False) -> int:
        """Whose sums take half a first-level cache, of an array of so many bytes; or, in parts of rows, more."""
        if self.small:
            many = IN_L1 // (self.itemsize * (6 if self.squares else 4)) * (2 if wide else 1)
            return min(many, max(FEW_COLUMNS, size // SIZE_OF_COLUMN))
        return (OF_WIDE_ROWS if wide else IN_L1) // 8 // (3 if self.squares else 2 if self.compensated else 1)

    def along(self, values: int) -> bool:
        """Whether so many of a kept index are read along."""
        least = ALONG_NOT_IN_BLOCKS if self.in_blocks(values) else ALONG[0]
        return values >= least and values * self.itemsize >= ALONG[1]

    def in_blocks(self, values: int) -> bool:
        """Whether so many neighbours of eight kept indices are transposed."""
        return values > 1 and self.itemsize <= 4 and not self.mask

    def enough(self, size: int) -> int:
        """Rows of so many values, beside each other, from which on each column has a sum."""
        if self.squares and self.itemsize >= 4 and not (self.small or self.mask) and size >= LONG_FOR_SQUARES:
            return ENOUGH_FOR_SQUARES
        long = size >= LONG_ROW and not self.small and (self.squares or not self.compensated)
        return ENOUGH_LONG_ROWS if long else ENOUGH_ROWS

    def few(self, along: bool) -> int:
        """Values of a kept index, up to which all are read at once."""
        return max(FEW_VALUES, FEW_BYTES // self.itemsize) if along else FEW_VALUES


class Division(NamedTuple):
    """How the work is divided."""

    kernel: str
    geometry: Geometry
    dimensions: tuple[int, ...]
    """Kept ones before rows'."""
    tasks: int
    finishing: int
    """Tasks."""
    partials: int
    own: int
    """Numbers that a thread has for itself."""
    strided: bool
    mask_of_rows: bool
    """The mask is the same all along a row."""
    mask_of_cells: bool = False
    """The mask has a byte of each row of kept indices, several of which are taken as one."""
    along: bool = False
    """Values of a kept index are neighbours, enough for a vector."""
    blocks: bool = False
    """Values of a kept index are neighbours, too few for that."""


def _words(kept: list[Dimension], rows: list[Dimension]) -> tuple[int, ...]:
    return tuple(n for d in (*kept, *rows) for n in (d.size, d.step, d.mask, d.result))


def _along_reduced(d: list[Dimension], run: Dimension, how: Summing) -> Division:
    """Rows of reduced values; pieces of long ones."""
    kept = [o for o in d if o.kept]
    rows = [o for o in d if not o.kept and o is not run]
    channels, count = math.prod(o.size for o in kept), math.prod(o.size for o in rows)
    most = PART_OF_SQUARES if how.compensated and how.squares else PART
    pieces, piece, each = 1, run.size, count
    if run.size > most:
        pieces = -(-run.size // most)
        piece = -(-run.size // pieces // 64) * 64
        pieces = -(-run.size // piece)
        each, parts = 1, count * pieces
    else:
        parts = max(1, -(-count * run.size // most))
        each = -(-count // parts)
        parts = -(-count // each)
    geometry = Geometry(
        len(kept), len(rows), rows=count, parts=parts, rows_of_a_part=each, step=run.step if run.size > 1 else 1,
        columns=run.size, pieces=pieces, piece=piece, **_ahead(run, rows, kept, how),
    )  # fmt: skip
    partials = FIELDS * parts * channels if parts > 1 else 0
    strided = run.step != 1 and run.size > 1
    words = _words(kept, rows)
    return Division(
        "inner", geometry, words, tasks=channels * parts, finishing=channels, partials=partials, own=OF_INNER,
        strided=strided, mask_of_rows=run.mask == 0,
    )  # fmt: skip


def _ahead(run: Dimension, rows: list[Dimension], kept: list[Dimension], how: Summing) -> dict[str, int]:
    """What is prefetched: in rows that follow each other, or in those of kept indices that do, which may be nearer."""
    values = run.size * math.prod(o.size for o in rows)
    if kept and rows and abs(kept[-1].step) < abs(rows[-1].step) and values * how.itemsize <= NEXT:
        return {"ahead": kept[-1].step * max(1, AHEAD_OF_ROWS // (values * how.itemsize)), "turn": run.size, "skip": 0}
    above = rows or kept
    step = above[-1].step if above else run.size
    whole, rest = divmod(AHEAD_BYTES // how.itemsize, run.size)
    return {"ahead": whole * step + rest, "turn": run.size - rest, "skip": step - run.size}


def _in_fours(size: int, most: int) -> int:
    """How many of so many are taken as one, so that fours of as many each are left, if that is half the most at least.

    Four rows are read at once: the others, in runs of ten such as cropped images have, would take half the time.
    """
    good = (n for n in range(most, max(1, most // 2 - 1), -1) if size % n == 0 and size // n % 4 == 0)
    return next(good, most)


def _coalesced(
    together: Dimension, rows: list[Dimension], columns: int, vector: int, most: int, how: Summing
) -> tuple[int, int, list[Dimension]]:
    """How many of the rows ``together``, of so many columns, are one; the columns that are left over; all rows then."""
    coalesced = min(together.size, max(1, most // columns))
    coalesced = -(-together.size // -(-together.size // coalesced))
    if how.small:
        coalesced = min(together.size, -(-coalesced // vector) * vector)
    elif rows != [together]:
        coalesced = _in_fours(together.size, coalesced)
    count = -(-together.size // coalesced)
    step = together._replace(size=count, step=together.step * coalesced, mask=together.mask * coalesced)
    others = [o for o in rows if o is not together]
    return coalesced, together.size % coalesced * columns, others + [step][: count - 1]  # innermost, for its short end


def _parts(count: int, coalesced: int, inner: int, cells: int, tiles: int, how: Summing) -> tuple[int, int]:
    """Into how many parts so many rows of each tile of cells are divided, and rows of each; none is empty."""
    least = max(1, SHARE_OF_PARTS // (how.itemsize * coalesced), PART // (coalesced * cells * inner))
    longest = 1024 if how.compensated and how.squares else count
    if how.small and how.itemsize == 2:  # sums of squares are to be exact in float64
        longest = max(1, MOST_SQUARES // (coalesced * inner))
        least = min(least, longest)
    parts = max(1, min(count // least, max(PARTS_AT_MOST, -(-count // longest))))
    each = -(-count // parts)
    parts = -(-count // each)
    if count > 1 and tiles == parts == 1 and count * coalesced * how.itemsize >= TWO_PARTS:
        return 2, -(-count // 2)
    return parts, each


def _along_kept(
    d: list[Dimension], row: Dimension, size: Dimension | None, together: Dimension | None, most: int, how: Summing
) -> Division:
    """Rows of kept indices: ``size`` neighbouring reduced values of each, so many rows ``together``; `most` columns."""
    own, inner = [o for o in (row, size) if o is not None], 1 if size is None else size.size
    rest = [o for o in d if o not in own]
    kept, rows = [o for o in rest if o.kept], [o for o in rest if not o.kept]
    coalesced, tail, vector = 1, 0, BYTES // how.itemsize if how.small and size is None else 8
    if together is not None:
        coalesced, tail, rows = _coalesced(together, rows, row.size * inner, vector, most, how)
    cells = row.size if coalesced > 1 else min(row.size, max(vector, most // inner // vector * vector))
    others, count, tiles = math.prod(o.size for o in kept), math.prod(o.size for o in rows), -(-row.size // cells)
    parts, each = _parts(count, coalesced, inner, cells, others * tiles, how)
    if coalesced == 1 and others * parts * tiles == 1:
        cells = min(cells, max(-(-row.size * others * parts // TASKS), NARROWEST // inner))
        cells = min(row.size, -(-row.size // (vector * -(-row.size // cells))) * vector)  # as many in each tile
        tiles = -(-row.size // cells)
    geometry = Geometry(
        len(kept), len(rows), rows=count, parts=parts, rows_of_a_part=each,
        step=row.step if size is None else size.step, channels=row.size, size=inner, coalesced=coalesced, tail=tail,
        tile=cells, pitch=pitch(coalesced * -(-cells // 8) * 8 * inner + 8 * inner), kept_step=row.result,
        mask_step=row.mask,
    )  # fmt: skip
    neighbours = row.step != 1 and bool(rows) and rows[-1].step == 1
    along = neighbours and how.along(rows[-1].size) and (not how.mask or rows[-1].mask == 1)
    blocks = neighbours and how.in_blocks(rows[-1].size) and not along
    few = ABREAST_ROWS if row.step == 1 else how.few(along)
    if count <= few and size is None and coalesced == 1:
        return Division(
            "few", geometry._replace(parts=1, rows_of_a_part=count), _words(kept, rows), tasks=others * tiles,
            finishing=0, partials=0, own=0, strided=row.step != 1, mask_of_rows=row.mask == 0 and not along,
            along=along, blocks=blocks,
        )  # fmt: skip
    innermost = row if size is None else size
    of_cells = coalesced > 1 and together is not None and how.mask > 0 and innermost.mask == 0 != together.mask
    of_thread = (FIELDS + 1) * geometry.pitch + (-(-4 * geometry.pitch * how.mask // 8) if of_cells else 0)
    return Division(
        "outer", geometry._replace(own=of_thread), _words(kept, rows), tasks=others * parts * tiles,
        finishing=others * -(-row.size // 8), partials=FIELDS * row.size * parts * others if parts > 1 else 0,
        own=of_thread, strided=innermost.step != 1, mask_of_rows=innermost.mask == 0 and not of_cells,
        mask_of_cells=of_cells,
    )  # fmt: skip


def divide(d: list[Dimension], how: Summing) -> Division:
    """By what lies innermost."""
    if not d or all(not o.kept for o in d):
        return _along_reduced(d, d[-1] if d else Dimension(1, 1, 1, 0, False), how)
    last, above = d[-1], d[-2] if len(d) > 1 else None
    size = math.prod(o.size for o in d) * how.itemsize
    most = how.columns(size)
    if not last.kept:
        assert above is not None
        rows = math.prod(o.size for o in d if not o.kept) // last.size
        beside = last.step == 1 and above.step == last.size and (not how.mask or above.mask == last.mask * last.size)
        if above.kept and beside and last.size < SHORT_ROW and rows >= how.enough(last.size):
            return _along_kept(d, above, last, None, most, how)
        values = rows * last.size
        along = last.step == 1 and (not how.mask or last.mask == 1) and how.along(last.size)
        few = values <= how.few(along) and (last.size < LONG_ROW or along)
        short = last.size < SMALLEST if how.small else last.size < SHORTEST or few
        if how.mask:  # only where all is added up at once; neighbours' bytes may lie apart where their values do
            short = above.step != 1 and values < (how.few(along) if along else ALONG[0])
        if above.kept and short and above.size >= WORTH:
            most = min(most, max(8, IN_L1 // (last.size * how.itemsize)))
            return _along_kept(d, above, None, None, most, how)
        return _along_reduced(d, last, how)
    beside = last.step == 1 and above is not None and above.step == last.size
    if how.mask and above is not None:  # a byte of each value, or of each row
        beside = beside and (above.mask == last.size * last.mask or (last.mask == 0 and above.mask == 1))
    if above is not None and not above.kept and beside and 2 * last.size <= most:
        coalesced = _along_kept(d, last, None, above, most, how)
        if coalesced.tasks > 1 or last.size < 2 * NARROWEST:
            return coalesced
    reduced = [o for o in d if not o.kept]
    run = max(reduced, key=lambda o: o.size, default=last)
    if last.size < FEW and not run.kept and (not how.mask or run.mask in (0, 1)):
        return _along_reduced(d, run, how)
    return _along_kept(d, last, None, None, how.columns(size, wide=True), how)


# --- programs ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def plan(
    d: tuple[Dimension, ...], starts: tuple[int, int, int], kind: str, mask: str | None, skip_nan: bool, form: int,
    kinds: tuple[str | None, str | None, str | None], threads: int,
) -> Program:  # fmt: skip
    """``program(x, where, count, mean, spread, status, ddof)``; a mask that is not of bytes is one of weights."""
    compensated, weighted, itemsize = kind in COMPENSATED, mask not in (None, "b1*"), int(kind[1])
    squares = kinds[2] is not None or (compensated and weighted)  # the sum of weights is rounded
    arrays: dict[str, str | None] = {"x": kind, "where": mask}
    arrays |= dict(zip(("count", "mean", "spread"), kinds, strict=True))
    p = Program(threads, (1 + squares) * math.prod(o.size for o in d), arrays | {"status": "f8*"}, ["ddof"])
    how = Summing(itemsize, compensated, squares, kind in SMALL and mask is None, int(mask[1]) if mask else 0)
    c = divide(list(d), how)
    if how.small and c.strided:
        how = how._replace(small=False)
        c = divide(list(d), how)
    mask_of = 0 if mask is None else OF_ROWS if c.mask_of_rows else OF_VALUES
    options = Options(
        squares=option(squares), compensated=option(compensated), masked=option(mask_of == OF_VALUES),
        weighted=option(weighted), skip_nan=option(skip_nan),
    )  # fmt: skip
    selection: dict[str, Any] = {"where": p.array("where").after(starts[1]) if mask else None}
    if c.kernel == "outer":
        selection["by_cell"] = option(c.mask_of_cells)
    into = {
        name: _address(p.array(name).after(starts[2]) if arrays[name] else NONE) for name in ("count", "mean", "spread")
    }
    formats = Formats(form, skip_nan, *(0 if k is None else VECTOR_KINDS.index(k) for k in kinds))
    results = Results(**into, ddof=p.number("ddof"), status=p.array("status"), formats=p.record(formats))
    geometry = p.record(c.geometry._replace(itemsize=itemsize, mask=mask_of, moved=MOVED.get(kind, 0)))
    lying: dict[str, Any] = {"geometry": geometry, "dimensions": p.integers(c.dimensions)}
    given: dict[str, Any] = selection | {"options": options, **lying}
    x = p.array("x").after(starts[0])
    if c.kernel == "few":
        ways = option(c.strided), option(c.along), option(c.blocks)
        given = dict(zip(("strided", "along", "blocks"), ways, strict=True)) | given
        p.launch("statistics_few.few", c.tasks, x=x, **given, results=results)
        return p
    work: dict[str, Any] = {
        "partials": p.scratch(c.partials + 64, "f8*"), "workspace": p.temporary(threads * c.own, "f8*")
    }  # fmt: skip
    finishing: dict[str, Any] = {"merge": _merge(p, options), "results": Results(*map(_address, results))}
    p.launch(f"statistics_{c.kernel}.{c.kernel}", c.tasks, **_reading(p, x, c, how), **given, **work, **finishing)
    if c.geometry.parts > 1:
        short, finishing["partials"] = c.partials < FEW_NUMBERS, work["partials"]
        p.launch("statistics_results.finish_parts", c.finishing, short, **lying, **finishing)
    return p


def _merge(p: Program, options: Options) -> Argument:
    """The function that makes results of parts."""
    words = dict.fromkeys(("pitch", "far", "parts", "at", "step", "count", "mean", "spread"), "i8")
    of_results = {"ddof": "f8", "status": "f8*", "formats": "Formats"}
    own = {
        name: "none" if getattr(options, name) is None else "bool" for name in ("squares", "compensated", "weighted")
    }
    return p.function("statistics_results.merge", table="f8*", **words, **of_results, **own)


def _reading(p: Program, x: Argument, c: Division, how: Summing) -> dict[str, Any]:
    """How values are read: by the kernel itself, or a function that it calls."""
    if not (how.small or c.strided):
        return {"x": x, "raw": None, "fetch": _address(NONE), "integers": None}
    if how.small:
        function = _sums_of_integers(p, c.kernel, x.kind, how.squares)
    else:
        function = p.function("statistics.fetch", x=x.kind, step="i8", out="f8*")
    return {"x": None, "raw": x._replace(kind="b1*"), "fetch": function, "integers": option(how.small)}


def _sums_of_integers(p: Program, kernel: str, kind: str, squares: bool) -> Argument:
    """The function that adds them up."""
    of_squares = "bool" if squares else "none"
    if kernel == "inner":
        return p.function("integers.row", x=kind, squares=of_squares, out="i8*", ahead="i8", turn="i8", skip="i8")
    tables = dict.fromkeys(("table", "sums", "rest"), "f8*") | {"state": "i8*"}
    return p.function("integers.columns", x=kind, step="i8", width="i8", squares=of_squares, **tables)


def _address(a: Argument) -> Argument:
    """An array of any kind."""
    return a._replace(kind="i8")


def statistic(
    x: Array, mask: Mask | None, kept: frozenset[int], what: Statistic, result_strides: tuple[int, ...]
) -> Callable[..., object] | None:
    """`fastbn.backend.Backend.statistic`."""
    kind, size = kernel_type_of_any(x.dtype), x.itemsize
    if kind is None or not x.flags.aligned or any(s % size for s in x.strides):
        return None
    if size == 8 and what.mean is not None and what.spread is not None:
        return _one_by_one(x, mask, kept, what, result_strides)
    mask_kind, masks = None, (0,) * x.ndim
    if mask is not None:
        mask_kind, each = kernel_type_of_any(mask.dtype), mask.dtype.itemsize
        if mask_kind is None or any(s % each for s in mask.strides):
            return None
        masks = tuple(s // each for s in mask.strides)
    d, starts = dimensions(x.shape, tuple(s // size for s in x.strides), masks, result_strides, kept)
    if d and d[-1].mask not in (0, 1):
        return None
    results = [
        None if dtype is None else kernel_type(np.dtype(dtype)) for dtype in (what.count, what.mean, what.spread)
    ]
    skip_nan = what.skip_nan and kind[0] not in "snb"
    given = tuple(d), (*starts,), kind, mask_kind, skip_nan, FORMS.index(what.spread_is), (*results,)
    elements = x.size
    if elements < team.PARALLEL_FROM:
        return plan(*given, 1).prepared()

    def launch(*arrays: Any) -> None:
        plan(*given, team.threads_for(elements))(*arrays)

    return launch


def _one_by_one(
    x: Array, mask: Mask | None, kept: frozenset[int], what: Statistic, result_strides: tuple[int, ...]
) -> Callable[..., object] | None:
    """Mean and spread by a pass each: so the mean has the digits that a sum of float64 alone has, and the bits."""
    first = statistic(x, mask, kept, what._replace(count=None, spread=None), result_strides)
    second = statistic(x, mask, kept, what._replace(mean=None), result_strides)
    if first is None or second is None:
        return None

    def run(x: Array, where: Any, count: Any, mean: Any, spread: Any, status: Array, ddof: float) -> None:
        first(x, where, None, mean, None, status, ddof)
        second(x, where, count, None, spread, status, ddof)

    return run
