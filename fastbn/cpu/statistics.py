"""Mean and variance of arrays as they lie: which kernel of `kernels.statistics`, and how its work is divided.

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
from fastbn.cpu.memory import Array
from fastbn.cpu.program import FLOATS, NONE, Argument, Program, kind_of
from fastbn.cpu.sizes import pitch
from fastbn.dimensions import Dimension, dimensions
from fastbn.operands import Mask, Statistic

# The geometry's words; then dimensions, kept ones before rows', of four words: size, steps in x, mask and results.
PARTS, PIECES, PIECE, ROWS, ROWS_OF_A_PART, COLUMNS, STEP, FORM, KEPT_DIMENSIONS, ROW_DIMENSIONS = range(10)
CHANNELS, SIZE, FOLD, TILE, TAIL, WIDTH, KEPT_STEP, ITEMSIZE, MASK, SKIP_NAN = range(10, 20)
COUNT_KIND, MEAN_KIND, SPREAD_KIND, DIMENSIONS = range(20, 24)
OF_VALUES, OF_ROWS = 1, 2  # what a mask is of
DIMENSION = 4
FIELDS = 4  # of a part
BUFFER = 512  # values that are converted at once
OF_INNER = FIELDS * 8 + BUFFER + 8  # numbers that a thread of `inner` has for itself
FORMS = ("var", "std", "m2")
VAR, STD, SUM_OF_SQUARES = range(3)
DIRECT = ("f4*", "f8*")  # what kernels read themselves where it lies side by side; the rest is converted on the way
EXACT = ("f8*", "s8*", "n8*")  # what float64 sums of lose something
CAREFUL, NO_DEGREES, EMPTY, STATUS = range(4)  # what a call is told, each a float
LEAST_SQUARE = 2.0**-900  # of a sum of squares other than 0, below which some may have been lost

SHORT = 512  # values of a reduced row, below which rows lie side by side in those of `outer`
ENOUGH_ROWS = 8  # of those, for their sums to be worth the space
SHORTEST = 128  # values of a reduced row, below which eight neighbours are read at once, a value of each
FEW_ROWS = 12  # rows of neighbouring kept indices, up to which all are read for eight columns at once
FEW = 8  # kept indices in a row, below which each goes its own way along the reduced ones
WORTH = 16  # kept indices a step apart that are worth a row
IN_L1 = 16 << 10  # bytes of sums that `outer` goes through for each row: half the smallest first-level cache
OF_WIDE_ROWS = 64 << 10  # the same of parts of rows: longer ones are read up to 1.6 times as fast, and sums from L2
PART = 1 << 16  # values that a thread takes at once, about
PART_OF_SQUARES = 1 << 14  # of float64, of which each of 32 sums has 512: rounding of 1e-15
PARTS_AT_MOST = 64  # of the rows of `outer`
TASKS, NARROWEST = 8, 128  # of rows too few to be shared: tiles of so many columns at least, for several threads
FEW_NUMBERS = 1 << 14  # of parts that one thread merges in some 20 us
SHARE_OF_PARTS = 4096  # bytes of a column for each part's 32 bytes: less than a hundredth
TWO_PARTS = 3400  # the same for two parts, without which one thread does all: less than a fiftieth

_INTEGERS = {"i": "s", "u": "n", "b": "b"}


def kind_of_any(dtype: np.dtype[Any]) -> str | None:
    """How kernels name a real dtype; None for others, among them those of the other byte order."""
    if not dtype.isnative:
        return None
    if dtype.kind in _INTEGERS:
        return f"{_INTEGERS[dtype.kind]}{dtype.itemsize}*"
    kind = kind_of(dtype)
    return kind if kind in ("f4*", "f8*", "u2*", "i2*") else None


class _Division(NamedTuple):
    """How the work is divided."""

    kernel: str
    words: tuple[int, ...]
    tasks: int
    parts: int
    finishing: int  # tasks
    partials: int
    own: int  # numbers that a thread has for itself
    strided: bool
    by_rows: bool  # the mask is the same all along a row


def _words(names: dict[int, int], kept: list[Dimension], rows: list[Dimension]) -> tuple[int, ...]:
    values = [0] * DIMENSIONS
    for at, value in (names | {KEPT_DIMENSIONS: len(kept), ROW_DIMENSIONS: len(rows)}).items():
        values[at] = value
    return (*values, *(n for d in (*kept, *rows) for n in d[:4]))


def _along_reduced(d: list[Dimension], run: Dimension, exact: bool, squares: bool, form: int) -> _Division:
    """Rows of reduced values; pieces of long ones."""
    kept = [o for o in d if o.kept]
    rows = [o for o in d if not o.kept and o is not run]
    channels, count = math.prod(o.size for o in kept), math.prod(o.size for o in rows)
    most = PART_OF_SQUARES if exact and squares else PART
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
    named = {
        PARTS: parts, PIECES: pieces, PIECE: piece, ROWS: count, ROWS_OF_A_PART: each, COLUMNS: run.size,
        STEP: run.step if run.size > 1 else 1, FORM: form, CHANNELS: 0, KEPT_STEP: 1,
    }  # fmt: skip
    partials = FIELDS * parts * channels if parts > 1 else 0
    words = _words(named, kept, rows)
    return _Division(
        "inner",
        words,
        channels * parts,
        parts,
        channels,
        partials,
        OF_INNER,
        run.step != 1 and run.size > 1,
        run.mask == 0,
    )


def _along_kept(
    d: list[Dimension], row: Dimension, size: Dimension | None, fold: Dimension | None, most: int, itemsize: int,
    exact: bool, squares: bool, form: int, direct: bool,
) -> _Division:  # fmt: skip
    """Rows of kept indices: ``size`` neighbouring reduced values of each, all of it ``fold`` times; `most` columns."""
    own = [o for o in (row, size) if o is not None]
    inner = 1 if size is None else size.size
    rest = [o for o in d if o not in own]
    kept, rows = [o for o in rest if o.kept], [o for o in rest if not o.kept]
    folded, tail = 1, 0
    if fold is not None:
        folded = min(fold.size, max(1, most // (row.size * inner)))
        count = -(-fold.size // folded)
        folded = -(-fold.size // count)
        tail = fold.size % folded * row.size * inner
        step = fold._replace(size=count, step=fold.step * folded, mask=fold.mask * folded)
        rows = [step if o is fold else o for o in rows]
        rows.sort(key=lambda o: o is step)  # innermost, for its short end
    cells = row.size if folded > 1 else min(row.size, max(8, most // inner // 8 * 8))
    others, count = math.prod(o.size for o in kept), math.prod(o.size for o in rows)
    least = max(1, SHARE_OF_PARTS // (itemsize * folded), PART // (folded * cells * inner))
    longest = 1024 if exact and squares else count
    parts = max(1, min(count // least, max(PARTS_AT_MOST, -(-count // longest))))
    each = -(-count // parts)
    parts = -(-count // each)  # none is empty
    if others * -(-row.size // cells) == parts == 1 and count * folded * itemsize >= TWO_PARTS:
        parts, each = 2, -(-count // 2)
    if folded == 1 and others * parts * -(-row.size // cells) == 1:
        cells = min(cells, max(-(-row.size * others * parts // TASKS), NARROWEST // inner))
        cells = min(row.size, -(-row.size // (8 * -(-row.size // cells))) * 8)  # as many in each tile
    tiles = -(-row.size // cells)
    width = pitch(folded * -(-cells // 8) * 8 * inner + 8 * inner)
    named = {
        PARTS: parts, ROWS: count, ROWS_OF_A_PART: each, STEP: row.step if size is None else size.step, FORM: form,
        CHANNELS: row.size, SIZE: inner, FOLD: folded, TILE: cells, TAIL: tail, WIDTH: width, KEPT_STEP: row.result,
    }  # fmt: skip
    if count <= (FEW_ROWS if row.step == 1 else SHORTEST) and size is None and folded == 1 and direct:
        names = _words(named | {PARTS: 1, ROWS_OF_A_PART: count}, kept, rows)
        return _Division("few", names, others * tiles, 1, 0, 0, 0, row.step != 1, row.mask == 0)
    innermost = row if size is None else size
    partials = FIELDS * row.size * parts * others if parts > 1 else 0
    finishing = others * -(-row.size // 8)
    return _Division(
        "outer", _words(named, kept, rows), others * parts * tiles, parts, finishing, partials, (FIELDS + 1) * width,
        innermost.step != 1, innermost.mask == 0,
    )  # fmt: skip


def divide(
    d: list[Dimension], masked: bool, itemsize: int, exact: bool, squares: bool, form: int, direct: bool = True
) -> _Division:
    """By what lies innermost. Kernels read values directly, or what was fetched."""
    given = itemsize, exact, squares, form, direct
    if not d or all(not o.kept for o in d):
        return _along_reduced(d, d[-1] if d else Dimension(1, 1, 1, 0, False), exact, squares, form)
    last, above = d[-1], d[-2] if len(d) > 1 else None
    most = IN_L1 // 8 // (3 if squares else 2 if exact else 1)
    if not last.kept:
        assert above is not None
        rows = math.prod(o.size for o in d if not o.kept) // last.size
        beside = last.step == 1 and above.step == last.size and (not masked or above.mask == last.mask * last.size)
        if above.kept and beside and last.size < SHORT and rows >= ENOUGH_ROWS:
            return _along_kept(d, above, last, None, most, *given)
        if above.kept and last.size < SHORTEST and above.size >= WORTH and not masked:
            most = min(most, max(8, IN_L1 // (last.size * itemsize)))
            return _along_kept(d, above, None, None, most, *given)
        return _along_reduced(d, last, exact, squares, form)
    beside = last.step == 1 and above is not None and above.step == last.size
    if masked and above is not None:
        beside = beside and above.mask == last.size * last.mask != 0
    if above is not None and not above.kept and beside and 2 * last.size <= most:
        folded = _along_kept(d, last, None, above, most, *given)
        if folded.tasks > 1 or last.size < 2 * NARROWEST:
            return folded
    reduced = [o for o in d if not o.kept]
    run = max(reduced, key=lambda o: o.size, default=last)
    if last.size < FEW and not run.kept and (not masked or run.mask in (0, 1)):
        return _along_reduced(d, run, exact, squares, form)
    return _along_kept(d, last, None, None, most * OF_WIDE_ROWS // IN_L1, *given)


# --- programs ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def plan(
    d: tuple[Dimension, ...], starts: tuple[int, int, int], kind: str, mask: str | None, skip_nan: bool, form: int,
    results: tuple[str | None, str | None, str | None], threads: int,
) -> Program:  # fmt: skip
    """``program(x, where, count, mean, spread, status, ddof)``; a mask that is not of bytes is one of weights."""
    exact, weighted, itemsize = kind in EXACT, mask not in (None, "b1*"), int(kind[1])
    squares = results[2] is not None or (exact and weighted)  # the sum of weights is rounded
    arrays: dict[str, str | None] = {"x": kind, "where": mask}
    arrays |= dict(zip(("count", "mean", "spread"), results, strict=True))
    p = Program(threads, math.prod(o.size for o in d), arrays | {"status": "f8*"}, ["ddof"])
    c = divide(list(d), mask is not None, itemsize, exact, squares, form, kind in DIRECT)
    words = list(c.words)
    words[ITEMSIZE], words[SKIP_NAN] = itemsize, skip_nan
    words[MASK] = (OF_ROWS if c.by_rows else OF_VALUES) if mask else 0
    for at, result in zip((COUNT_KIND, MEAN_KIND, SPREAD_KIND), results, strict=True):
        words[at] = 0 if result is None else FLOATS.index(result)
    given: dict[str, Any] = {"squares": squares or None, "exact": exact or None}
    given |= {"geometry": p.integers(words), "partials": p.scratch(c.partials + 64, "f8*")}
    into: dict[str, Any] = {
        name: _address(p.array(name).after(starts[2]) if arrays[name] else NONE) for name in ("count", "mean", "spread")
    }
    into |= {"ddof": p.number("ddof"), "status": p.array("status")}
    x = p.array("x").after(starts[0])
    selection: dict[str, Any] = {
        "where": p.array("where").after(starts[1]) if mask else None, "masked": words[MASK] == OF_VALUES or None,
        "weighted": weighted or None, "skip_nan": skip_nan or None,
    }  # fmt: skip
    if c.kernel == "few":
        options: dict[str, Any] = {"squares": squares or None, "exact": exact or None, "geometry": given["geometry"]}
        p.launch("statistics_few.few", c.tasks, x=x, strided=c.strided or None, **selection, **options, **into)
        return p
    direct = kind in DIRECT and not c.strided
    data: dict[str, Any] = {
        "x": x if direct else None, "raw": None if direct else x._replace(kind="b1*"),
        "fetch": _address(NONE) if direct else p.function("statistics.fetch", x=kind, step="i8", out="f8*"),
    }  # fmt: skip
    workspace = {"workspace": p.temporary(threads * c.own, "f8*")}
    p.launch(f"statistics_{c.kernel}.{c.kernel}", c.tasks, **(data | selection | given | workspace | into))
    if c.parts > 1:
        p.launch(
            "statistics_results.finish_parts", c.finishing, c.partials < FEW_NUMBERS, **given,
            weighted=weighted or None, **into,
        )  # fmt: skip
    return p


def _address(a: Argument) -> Argument:
    """An array of any kind."""
    return a._replace(kind="i8")


def statistic(
    x: Array, mask: Mask | None, kept: frozenset[int], what: Statistic, result_strides: tuple[int, ...]
) -> Callable[..., object] | None:
    """`fastbn.backend.Backend.statistic`."""
    kind, size = kind_of_any(x.dtype), x.itemsize
    if kind is None or not x.flags.aligned or any(s % size for s in x.strides):
        return None
    if size == 8 and what.mean is not None and what.spread is not None:
        return _one_by_one(x, mask, kept, what, result_strides)
    mask_kind, masks = None, (0,) * x.ndim
    if mask is not None:
        mask_kind, each = kind_of_any(mask.dtype), mask.dtype.itemsize
        if mask_kind is None or any(s % each for s in mask.strides):
            return None
        masks = tuple(s // each for s in mask.strides)
    d, starts = dimensions(x.shape, tuple(s // size for s in x.strides), masks, result_strides, kept)
    if d and d[-1].mask not in (0, 1):
        return None
    results = [None if dtype is None else kind_of(np.dtype(dtype)) for dtype in (what.count, what.mean, what.spread)]
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
