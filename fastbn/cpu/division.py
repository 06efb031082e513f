"""How work is divided: what plans (`plans`, `gradient_plans`) ask of shapes, strides and the number of threads.

What changes the bits of sums (chunks and segments, for which see `sizes`, coalesced rows, the family of kernels)
follows from shape and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from fastbn.cpu import sizes, team
from fastbn.cpu.memory import Nontemporal
from fastbn.cpu.program import Argument, Program, Strided
from fastbn.cpu.records import Chunks, Shape, Slabs, SlabStrides, Strides, Tiles, Walk

Kind = str
AnyStrides = Strides | SlabStrides
S = TypeVar("S", Shape, Slabs)
T = TypeVar("T", Strides, SlabStrides)
Kinds = tuple[Kind | None, ...]  # of vectors of parameters; None for one that has its default

NONTEMPORAL_ROW = 512  # bytes side by side from which nontemporal stores pay: their two ends are stored plainly
SHORT = 1024  # values of a row, below which rows of many channels are read in one go
FEW_ROWS = 8  # below so many, spreading each channel's numbers over its columns costs more than it saves
MEMORY_ORDER_FROM = 16  # values of a row, from which elementwise passes go in memory's order, not by channels
COALESCED_ROWS = 256  # rows of few channels are coalesced only while so many remain
TILE = 1024  # columns, at most, of which a task makes sums; 512 read half as fast, 2048 short rows slower
ROW = 2048  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FUSED_WIDTH = 1024  # bytes of a row of a fused tile, at least: from memory, narrow tiles are slower than two passes
FROM_MEMORY = 4 << 20  # bytes of x from which it is taken to come from there
FUSED_BYTES = 192 << 10  # about so many are read twice by a thread; the next tile's are asked for meanwhile
FUSED_FROM = 2 << 20  # bytes of x from which fusing pays, if threads share it: two passes over less stay in cache
FUSED_MOST = 384 << 10  # what stays in a second-level cache of 512 kB beside the output

PIECES, FEWEST_ROWS = 16, 32  # of rows for each thread, and rows of one at least: each spreads its columns anew
FEW_PARTIALS = 8192  # sums of segments that are merged in some 20 us: less than threads gain


# --- what is planned --------------------------------------------------------------------------------------------------


class Arrays(Generic[S, T]):
    """Arrays of one shape, whose strides are known by the names that a program has for them.

    Parameters
    ----------
    program : Program
        To which launches are added.
    shape : Shape or Slabs
    kind : str
        Of all arrays but the weight.
    num_threads : int
    strides : dict
        Of each array; None of one that is absent.
    """

    sort: type[T]

    def __init__(self, program: Program, shape: S, kind: Kind, num_threads: int, strides: dict[str, T | None]) -> None:
        self.program, self.kind, self.num_threads = program, kind, num_threads
        self.shape: S = shape
        self.strides: dict[str, T | None] = strides
        self.kept, self.itemsize = shape.kept, int(kind[1])
        self.weighted = strides.get("weight") is not None
        self.of_shape = program.record(shape)
        self.compute = "f8*" if kind == "f8*" else "f4*"  # what kernels compute in, and have in their workspace

    def given(self, *names: str) -> list[T]:
        """Strides of those arrays that are not absent."""
        return [s for s in map(self.strides.get, names) if s is not None]

    def arrays(self, *names: str) -> dict[str, Any]:
        """Arguments of a kernel, by the names of its parameters."""
        return {name: self.array(name) for name in names}

    def array(self, name: str, absent: bool = False) -> Strided:
        return self.program.strided(self.program.array(name), None if absent else self.strides[name], self.sort)

    def workspace(self, count: int) -> Argument:
        return self.program.temporary(count, self.compute)

    def affine(self, columns: int, recompute: bool) -> Argument | None:
        """Of so many columns of all threads together, for kernels that compute y again; else None."""
        return self.workspace(sizes.AFFINE * columns) if recompute else None

    def nontemporal(self, whole_lines: bool) -> Argument | bool:
        """Whether a kernel writes past the caches: as a call's arrays decide, if it writes nothing but whole lines."""
        return whole_lines and self.program.at_least("nontemporal", Nontemporal.ALL)

    def nontemporal_rows(self, row: int) -> Argument | bool:
        """The same of a kernel that finds the first whole line of a row, which must be long."""
        long = row * self.itemsize >= NONTEMPORAL_ROW
        return long and self.program.at_least("nontemporal", Nontemporal.FROM_FIRST_LINE)

    def whole_channels(self) -> bool:
        """Whether one thread does all, or there are channels enough to give each thread whole ones."""
        return self.num_threads == 1 or self.kept >= 4 * self.num_threads


class ProblemInSlabs(Arrays[Slabs, SlabStrides]):
    """Without weights."""

    sort = SlabStrides


class Problem(Arrays[Shape, Strides]):
    sort = Strides

    def halved(self) -> Problem:
        """With the only row of each channel as two, which are read faster than one; else as it is.

        Rows that follow each other come from two halves in turn.
        """
        batch, outer, channel, inner = self.shape
        if self.rows_are_neighbours():
            half = (outer + 1) // 2
            return self._lying(self.shape, lambda s: s._replace(outer=half * s.outer, twice=s.outer))
        if outer > 1 or inner < 2 * sizes.CHUNK or inner % (2 * sizes.CHUNK) > 0:
            return self
        half = inner // 2
        return self._lying(Shape(batch, 2, channel, half), lambda s: s._replace(outer=half, twice=2 * half))

    def rows_are_neighbours(self) -> bool:
        """Whether rows of one channel follow each other, as in a part of an image."""
        _batch, outer, channel, inner = self.shape
        first = next(s for s in self.strides.values() if s is not None)
        return outer > 1 and inner > 1 and (channel == 1 or abs(first.channel) > abs(first.outer))

    def exchanged(self) -> Problem:
        """With the channels' axis as outer, and the other way round."""
        batch, outer, channel, inner = self.shape
        shape = Shape(batch, channel, outer, inner)
        return self._lying(shape, lambda s: Strides(s.batch, s.channel, s.outer, twice=2 * s.channel))

    def _lying(self, shape: Shape, otherwise: Callable[[Strides], Strides]) -> Problem:
        """The same values, seen with other strides."""
        strides = {name: None if s is None else otherwise(s) for name, s in self.strides.items()}
        return Problem(self.program, shape, self.kind, self.num_threads, strides)

    def fused_tile(self, twice: int) -> int:
        """Cells of a tile whose rows all stay in a core's cache between two passes over ``twice`` arrays, or 0."""
        (batch, outer, channel, inner), itemsize = self.shape, self.itemsize
        size = math.prod(self.shape)
        tile = tile_width(channel, inner, itemsize, min(TILE, FUSED_BYTES // max(1, outer * itemsize * twice)))
        if self.num_threads == 1 and size < team.PARALLEL_FROM:
            return tile
        width = tile * inner * itemsize
        narrowest = FUSED_WIDTH if size * itemsize >= FROM_MEMORY else FUSED_WIDTH // 8
        if (
            size * itemsize < FUSED_FROM
            or width < narrowest
            or width * outer * twice > FUSED_MOST
            or batch * -(-channel // tile) < 2 * self.num_threads
        ):
            return 0
        return tile


def problem_of(
    program: Program, shape: Shape | Slabs, kind: Kind, num_threads: int, strides: dict[str, Any]
) -> Problem | ProblemInSlabs:
    if isinstance(shape, Slabs):
        return ProblemInSlabs(program, shape, kind, num_threads, strides)
    return Problem(program, shape, kind, num_threads, strides)


def is_outer(shape: Shape, strides: list[Strides], weighted: bool = False) -> bool:
    """Whether the kernels of `outer_reduction` take these arrays: channels-last, or many short rows side by side."""
    if shape.inner == 1 or shape.channel == 1:
        return shape.channel > 1
    adjacent = all(s.channel == shape.inner for s in strides)
    return shape.inner <= SHORT and shape.outer >= FEW_ROWS and not weighted and adjacent


def coalescing(shape: Shape, itemsize: int, strides: list[Strides], weighted: bool = False) -> int:
    """How many rows of few channels are taken as one; whole cache lines of them where that is possible."""
    rows = min(sizes.COALESCED // max(1, shape.channel), shape.outer // COALESCED_ROWS)
    lines = 64 // math.gcd(64, shape.channel * itemsize)
    rows -= rows % lines if rows > lines else 0
    if shape.inner > 1 or rows < 2 or weighted:
        return 1
    return rows if all(s.outer == shape.channel for s in strides) else 1


def table_of(
    program: Program, kept: int, defaults: NamedTuple, names: tuple[str, ...] | None = None, before: str | None = None
) -> Argument:
    """A table of one of `records`, in float64, from the vectors of its fields' names (or others) that a call gives.

    Of the fields before the one that is named, if one is.
    """
    rows = len(defaults) if before is None else defaults._fields.index(before)
    table = program.scratch(rows * kept, "f8*")
    for i, (name, default) in enumerate([*zip(names or defaults._fields, defaults, strict=True)][:rows]):
        program.vector(name, kept, default, table.after(i * kept))
    return table


class GradientOptions(NamedTuple):
    """What gradients depend on beside their arrays."""

    frozen: bool = False
    """Statistics that do not depend on x, so that dx does not."""
    mixed: bool = False
    """There are gradients of the moments."""
    recompute: bool = False
    """The y of relu is computed again of x."""


# --- how work is divided ----------------------------------------------------------------------------------------------


def tile_width(channels: int, size: int, itemsize: int, most: int) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def chunks_of(problem: Problem) -> Chunks:
    """The largest chunks; whole pairs of rows from two halves."""
    rows, columns = sizes.chunk_grid(problem.shape.outer, problem.shape.inner)
    in_halves = any(s.twice != 2 * s.outer for s in problem.given(*problem.strides))
    return Chunks(rows - rows % 2 if in_halves else rows, columns)


class InOrder:
    """A division of `inner_reduction`'s elementwise passes: equal parts of the values in the order of memory.

    Parameters
    ----------
    problem : Problem
    read, written : sequence of str
        Names of arrays.
    """

    def __init__(self, problem: Problem, read: Sequence[str], written: Sequence[str]) -> None:
        # Rows of one channel may follow each other (a slice of an image): these axes are then exchanged.
        exchanged = problem.shape.channel > 1 and problem.rows_are_neighbours()
        self.problem = problem.exchanged() if exchanged else problem
        batch, outer, channel, inner = self.problem.shape
        run, inputs, outputs = max(1, inner), self.problem.given(*read), self.problem.given(*written)
        for axis, n in ((2, channel), (1, outer), (0, batch)):
            if any(n > 1 and s[axis] != run for s in (*inputs, *outputs)):
                break
            run *= n
        gapped = run == inner and all(s.channel == inner for s in outputs) and all(s.channel >= inner for s in inputs)
        run *= channel if gapped else 1
        self.tasks = sizes.piece_count(problem.shape)
        rows = -(-self.tasks // problem.num_threads) // max(1, -(-inner // sizes.PIECE)) + 2  # of a thread, at most
        if exchanged or outer == 1:  # the rows of one kept index are neighbours
            of_one = channel if exchanged else 1
            values, kept, most = of_one * inner, 1, rows // of_one + 2
        else:
            values, kept = outer * channel * inner, channel
            most = (rows // max(1, outer * channel) + 2) * channel
        self.pitch = min(problem.kept, most) + sizes.PAD
        self.walk = Walk(
            run=run, gapped=int(gapped), pitch=self.pitch, values=values, kept=kept, batch=problem.shape.channel,
            outer=int(exchanged), channel=int(not exchanged),
        )  # fmt: skip


class Tiled:
    """A division of `outer_reduction`: segments of rows for sums, parts of the rows, or whole tiles for both at once.

    Parameters
    ----------
    problem : Problem
    coalesced, width : int
        Rows taken as one, cells of a tile.
    sums : int
        In float64, of each cell and segment.
    scratch : int
        In float64, of each cell of a thread's tile.
    workspace : int
        In the type that kernels compute in, of each column of a thread's tile.
    fused : bool
        Whether tiles are whole.
    """

    def __init__(
        self, problem: Problem, coalesced: int, width: int, *,
        sums: int = 0, scratch: int = 0, workspace: int = 0, fused: bool = False,
    ) -> None:  # fmt: skip
        batch, outer, channel, inner = problem.shape
        num_threads, self._itemsize, self._cells = problem.num_threads, problem.itemsize, channel * coalesced
        # Sums take whole groups of rows and leave the rest to their last step; elementwise passes take it as a row.
        rows = outer // coalesced if sums else -(-outer // coalesced)
        pieces = 1 if num_threads == 1 else max(num_threads, min(PIECES * num_threads, rows // FEWEST_ROWS))
        of_segment = sizes.segment_rows(rows, self._cells)
        height = of_segment if sums or fused else max(1, -(-rows // pieces))
        segments = -(-rows // height)
        self.tiles, self._columns = Tiles(coalesced, width, height), width * inner
        self.tasks = batch * (1 if fused else segments) * -(-self._cells // width)
        of_thread = scratch * (1 + segments if fused else 1) * sizes.padded(width, width)
        self.partials = sums * batch * segments * sizes.padded(self._cells, width) + num_threads * of_thread
        self.columns = num_threads * sizes.pitch(self._columns + sizes.PAD)
        self.workspace = workspace * self.columns

    def whole_lines(self, strides: list[Strides]) -> bool:
        """Whether every row of a tile is whole cache lines, if the array starts on one."""
        columns = 0 if self.tiles.width >= self._cells else self._columns
        steps = [columns, *(step for s in strides for step in (s.batch, s.outer * self.tiles.coalesced))]
        return all(step * self._itemsize % 64 == 0 for step in steps)


def option(on: bool) -> bool | None:
    """For an option, kernels are compiled with it or, if it is None, without."""
    return True if on else None
